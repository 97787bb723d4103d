"""Says whether one system is better than another: by its interval and a corrected probability.

verdict(difference, p_value)    # "better", "worse" or "no proven difference"
gains = compare_in_turn({"frozen": one, "whitened": other}, groups=labels)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
import pandas as pd

from lib.evaluation.metrics import Interval, compare

UNPROVEN = "no proven difference"


def verdict(difference: Interval, p_value: float) -> str:
    """ "better" or "worse" if the probability is below 0.05 and the interval leaves 0 out."""
    if p_value >= 0.05 or difference.low * difference.high <= 0:
        return UNPROVEN
    return "better" if difference.value > 0 else "worse"


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct the probabilities of several comparisons together: Holm, 1979.

    The smallest is multiplied by their number n, the next one by n - 1, and so on; none becomes
    less than one before it, nor more than 1.
    """
    corrected, least = [1.0] * len(p_values), 0.0
    for rank, place in enumerate(np.argsort(p_values, kind="stable")):
        least = max(least, min(1.0, p_values[place] * (len(p_values) - rank)))
        corrected[place] = least
    return corrected


def compare_in_turn(
    values: Mapping[str, np.ndarray], groups: np.ndarray | None = None
) -> pd.DataFrame:
    """Compare each step with the one before it, query by query.

    Args:
        values: step -> float (q,), of the same queries; NaN for one that has no value.
        groups: (q,), as for :func:`lib.evaluation.metrics.compare`.

    Returns:
        a row for each step but the first: ``gain`` (an Interval), ``P, corrected`` for all of them
        together, and ``verdict``.
    """
    names = list(values)
    pairs = pairwise(names)
    found = [compare(values[one], values[other], groups=groups) for one, other in pairs]
    corrected = holm([of.p_value for of in found])
    gains = [of.difference for of in found]
    verdicts = [verdict(gain, p) for gain, p in zip(gains, corrected, strict=True)]
    columns = {"gain": pd.Series(gains, names[1:], object), "P, corrected": corrected}
    return pd.DataFrame(columns | {"verdict": verdicts}, names[1:])
