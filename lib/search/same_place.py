"""Tells whether two photos show the same place, from their similarity and their geometry.

    calibration = shipped_calibration()
    evidence = evidence_of(cosines, verify_all(features, others))       # float64 (n, 3)
    log_odds = calibration.log_odds(evidence)                           # float64 (n,)
    verdicts = [calibration.verdict(value) for value in log_odds]

Neither is enough alone: a view from around the corner is similar without a homography, and a
poster that hangs in two places fits one. A logistic regression weighs both; it was learned from
photos of known places by ``python -m benchmarks.geometry``, for the descriptors of
:func:`lib.network.engine.packaged_engine`, whitened by the searched photos themselves.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np

from lib.search.geometry import GRID, Geometry

VERDICTS = SAME, PERHAPS, SIMILAR = ("same place", "perhaps", "only similar")
TOP = 100  # photos of a ranking that are verified
CHANCE = 4  # matches that fit a homography whatever they are
SURE = 7.0  # log-odds, a probability of 0.999
_FILE = Path(__file__).with_name("same_place.json")


def evidence_of(cosines: np.ndarray, found: Sequence[Geometry]) -> np.ndarray:
    """What speaks for a common place, float64 (n, 3), of n pairs of photos.

    The columns are the cosine of the descriptors, from -1 to 1; the logarithm of 1 + the inliers
    beyond chance; and the share of the photo's cells that hold an inlier, from 0 to 1.
    """
    inliers = np.array([geometry.inliers for geometry in found], float)
    cells = np.array([geometry.cells for geometry in found], float)
    beyond = np.log1p(np.maximum(inliers - CHANCE, 0))
    return np.stack([np.asarray(cosines, float), beyond, cells / GRID**2], axis=-1)


@dataclass(frozen=True)
class Calibration:
    """A logistic regression on :func:`evidence_of`; beyond SURE, the inliers alone count.

    Attributes:
        network: whose descriptors it is for.
        weights: of the three columns.
        bias: added to the weighted sum.
        same: the least probability that is called the same place, at most that of SURE; from one
            half on it is "perhaps".
        false_yes: set of photos -> the share of its queries that got a false "same place" when
            their right photos were taken away; threshold and weights from other landmarks.
    """

    network: str
    weights: tuple[float, float, float]
    bias: float
    same: float = 1.0
    false_yes: Mapping[str, float] = field(default_factory=dict)

    def log_odds(self, evidence: np.ndarray) -> np.ndarray:
        """The logarithm of the odds for the same place, float64 (n,), of evidence (n, 3).

        Photos without an inlier beyond chance are "perhaps" of the same place, at most: two plain
        walls are as similar as can be. Beyond SURE the inliers alone count, so that the photo that
        a query is a part of goes first: it is in few cells of the other, and less similar to it.
        """
        found = evidence @ np.array(self.weights) + self.bias
        beyond = evidence[..., 1]
        found = np.where(found > SURE, SURE + beyond, found)
        return np.where(beyond > 0, found, np.minimum(found, self.limit - 1e-6))

    @property
    def limit(self) -> float:
        """The log-odds from which on a photo is called the same place."""
        with np.errstate(divide="ignore"):
            return float(np.log(np.divide(self.same, 1 - self.same)))

    def verdict(self, log_odds: float) -> str:
        """One of VERDICTS."""
        return SAME if log_odds >= self.limit else PERHAPS if log_odds >= 0 else SIMILAR


def probability_of(log_odds: np.ndarray | float) -> np.ndarray | float:
    """The probability, from 0 to 1, of the logarithm of odds."""
    with np.errstate(over="ignore"):  # to 0
        return 1 / (1 + np.exp(-np.asarray(log_odds, float)))


def learn_weights(
    evidence: np.ndarray, same: np.ndarray, importance: np.ndarray
) -> tuple[tuple[float, float, float], float]:
    """Learn weights and bias of a Calibration.

    Args:
        evidence: float (n, 3), of n pairs.
        same: bool (n,), whether a pair shows one place.
        importance: float (n,), the weight of each pair, above 0.

    Raises:
        ValueError: all pairs show one place, or none does.
    """
    from sklearn.linear_model import LogisticRegression  # here: it is not needed to search

    model = LogisticRegression(C=100, max_iter=2000).fit(evidence, same, importance)
    return tuple(model.coef_[0].tolist()), float(model.intercept_[0])


@cache
def shipped_calibration() -> Calibration:
    """The calibration for the packaged network."""
    stored = json.loads(_FILE.read_text())
    return Calibration(**stored | {"weights": tuple(stored["weights"])})
