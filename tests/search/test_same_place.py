"""The verdict on two photos: its evidence, its calibration, and the file that is shipped."""

import numpy as np
import pytest

from lib.network.engine import PACKAGED
from lib.search.geometry import Geometry
from lib.search.same_place import (
    PERHAPS,
    SAME,
    SIMILAR,
    SURE,
    Calibration,
    evidence_of,
    learn_weights,
    probability_of,
    shipped_calibration,
)


def geometry(inliers: int, cells: int) -> Geometry:
    return Geometry(np.zeros((inliers, 2), int), np.ones(inliers, bool), None, cells)


def test_evidence_is_similarity_inliers_beyond_chance_and_spread():
    found = evidence_of([0.5, -0.1], [geometry(4, 3), geometry(24, 50)])
    np.testing.assert_allclose(found, [[0.5, 0, 0.03], [-0.1, np.log(21), 0.5]])
    assert evidence_of([], []).shape == (0, 3)


def test_more_of_any_evidence_makes_the_same_place_likelier():
    shipped = shipped_calibration()
    assert all(weight > 0 for weight in shipped.weights)
    alike = shipped.log_odds(evidence_of([0.1] * 3, [geometry(n, n // 2) for n in (0, 12, 60)]))
    assert [*map(shipped.verdict, alike)][::2] == [SIMILAR, SAME]
    assert (np.diff(alike) > 0).all()


def test_the_shipped_calibration_is_that_of_the_packaged_network():
    shipped = shipped_calibration()
    assert shipped.network == PACKAGED
    assert 0.5 < shipped.same < 1 and np.mean([*shipped.false_yes.values()]) < 0.02


def test_verdicts_follow_the_probability():
    calibration = Calibration("", (1.0, 0.0, 0.0), 0.0, same=0.9)
    odds = calibration.log_odds(np.array([[3.0, 1, 0], [1.0, 1, 0], [-1.0, 1, 0], [9.0, 0, 0]]))
    assert [*map(calibration.verdict, odds)] == [SAME, PERHAPS, SIMILAR, PERHAPS]
    assert Calibration("", (1.0, 0.0, 0.0), 0.0).log_odds(np.array([[6.0, 0, 0]])) == 6
    np.testing.assert_allclose(probability_of(np.log([9.0, 1.0])), [0.9, 0.5])
    assert probability_of(np.array([-1e9, 1e9])).tolist() == pytest.approx([0, 1])


def test_among_sure_photos_that_with_most_inliers_is_first():
    """A part of a photo is in few of its cells, and less similar to it than another photo."""
    other_view, whole = geometry(60, 60), geometry(300, 40)
    odds = shipped_calibration().log_odds(evidence_of([0.8, 0.5], [other_view, whole]))
    assert SURE < odds[0] < odds[1]
    ramp = Calibration("", (1.0, 0.0, 0.0), 0.0).log_odds(np.array([[v, 1, 1] for v in range(20)]))
    assert (np.diff(ramp) >= 0).all() and ramp[7] == 7 and ramp[8] == ramp[19] == 8


def test_weights_are_learned_from_pairs(rng):
    evidence = rng.normal(size=(4000, 3))
    odds = evidence @ (2.0, 1.0, 0.5) - 1
    same = rng.random(4000) < probability_of(odds)
    weights, bias = learn_weights(evidence, same, np.ones(4000))
    np.testing.assert_allclose([*weights, bias], [2, 1, 0.5, -1], atol=0.2)
    with pytest.raises(ValueError):
        learn_weights(evidence, np.ones(4000, bool), np.ones(4000))
