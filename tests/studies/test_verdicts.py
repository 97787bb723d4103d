"""Tests of the verdicts on differences."""

import numpy as np
import pytest

from lib.evaluation.metrics import Interval
from lib.studies.verdicts import UNPROVEN, compare_in_turn, holm, verdict


@pytest.mark.parametrize(
    ("difference", "p_value", "expected"),
    [
        (Interval(0.2, 0.1, 0.3), 0.01, "better"),
        (Interval(-0.2, -0.3, -0.1), 0.01, "worse"),
        (Interval(0.2, 0.1, 0.3), 0.05, UNPROVEN),
        (Interval(0.2, -0.1, 0.3), 0.01, UNPROVEN),
        (Interval(0.0, 0.0, 0.0), 0.0, UNPROVEN),
    ],
)
def test_verdicts(difference, p_value, expected):
    assert verdict(difference, p_value) == expected


def test_probabilities_are_corrected_together():
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([0.9, 0.8]) == [1, 1]
    assert holm([]) == []


def test_steps_are_compared_in_turn():
    rng = np.random.default_rng(0)
    start = rng.uniform(0.2, 0.6, 80)
    values = {"start": start, "same": start.copy(), "more": start + rng.uniform(0.1, 0.2, 80)}
    table = compare_in_turn(values, groups=np.arange(80) // 4)
    assert table["verdict"].to_dict() == {"same": UNPROVEN, "more": "better"}
    assert table.loc["same", "gain"].value == 0 and 0.1 < table.loc["more", "gain"].value < 0.2
    assert compare_in_turn({"start": start}).empty
    assert compare_in_turn({}).empty
