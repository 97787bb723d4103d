"""Tests of how geometric verification is measured."""

import numpy as np
import pytest
from sklearn.datasets import load_sample_image

from lib.search.local_features import local_features
from lib.search.same_place import shipped_calibration
from lib.studies.verification import inliers_by_angle, second_view, verify_ranking
from tests.conftest import unit


@pytest.fixture(scope="module")
def temple():
    return load_sample_image("china.jpg")[::2, ::2].copy()


def test_a_second_view_lies_where_it_was_put(temple):
    height, width = temple.shape[:2]
    corners = np.array(
        [[10, 5], [width - 40, 20], [width - 10, height - 9], [4, height]], np.float32
    )
    view, known = second_view(temple, corners)
    assert view.shape == temple.shape and view.dtype == np.uint8
    at = known @ [width, height, 1]
    np.testing.assert_allclose(at[:2] / at[2], corners[2], atol=1e-3)
    assert abs(int(view[0, -1].mean()) - 63) < 12  # outside: grey, darker, and noisy


def test_verification_puts_the_same_place_first(temple):
    """The photo that is the most similar by the vectors is of another place."""
    height, width = temple.shape[:2]
    corners = np.array([[0, 0], [width - 20, 9], [width, height - 20], [9, height]], np.float32)
    photos = [temple, load_sample_image("flower.jpg")[::2, ::2], second_view(temple, corners)[0]]
    features = [local_features(np.ascontiguousarray(photo)) for photo in photos]
    vectors = unit(np.array([[1, 0.2], [1, 0.1], [0.8, 1]])).astype(np.float32)
    ranking = verify_ranking(vectors, features, 0, (0, 1, 2), shipped_calibration())
    assert ranking.order.tolist() == [1, 2] == ranking.reranked(1).tolist()
    assert ranking.reranked(2).tolist() == [2, 1]
    assert ranking.results[1].inliers > 100 > 20 > ranking.results[0].inliers
    assert len(ranking.milliseconds) == 3 and ranking.milliseconds == sorted(ranking.milliseconds)


def test_a_tilt_costs_more_than_a_turn(temple):
    left = inliers_by_angle(temple, step=60)
    assert list(left["tilted away"]) == [0, 60] and list(left["turned"]) == [0, 60, 120, 180]
    assert left["tilted away"][60] < 0.5 * left["tilted away"][0]
    assert min(left["turned"].values()) > 0.5 * max(left["turned"].values())
