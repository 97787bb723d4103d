"""Geometric verification, on views whose true geometry is known, and on all that has none."""

from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.search.geometry import GRID, MODELS, WITHIN, match, outline, verify, verify_all
from lib.search.local_features import Features, local_features
from tests.conftest import textured

TRUE = np.array([[0.9, -0.2, 60], [0.25, 0.85, -20], [2e-4, -1e-4, 1]])


@pytest.fixture(scope="module")
def views() -> tuple[Features, Features]:
    photo = textured(0)
    other = cv2.warpPerspective(photo, TRUE, photo.shape[1::-1], borderMode=cv2.BORDER_REFLECT)
    return local_features(photo), local_features(other)


def test_matches_are_each_others_nearest_and_pass_the_ratio_test(views):
    a, b = (features.descriptors.astype(np.float64) for features in views)
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))
    distances = np.linalg.norm(a[:, None] - b[None], axis=2)
    expected = []
    for i, row in enumerate(distances):
        j = int(row.argmin())
        if distances[:, j].argmin() == i and row[j] < 0.85 * np.sort(row)[1]:
            expected.append((i, j))
    found = match(*views)
    assert len({*map(tuple, found.tolist())} ^ {*expected}) <= 0.01 * len(expected)
    assert len(expected) > 100


def test_the_homography_of_two_views_is_found(views):
    found = verify(*views)
    assert found.inliers > 100 and found.inliers > 0.8 * len(found.matches)
    corners = np.array([[0, 0, 1], [480, 0, 1], [480, 360, 1], [0, 360, 1.0]]) @ TRUE.T
    true = corners[:, :2] / corners[:, 2:]
    assert np.abs(outline(found, (480, 360)) - true).max() < 2
    assert found.cells > GRID  # all over the photo


@pytest.mark.parametrize("model", MODELS)
def test_every_inlier_is_within_the_threshold(views, model):
    found = verify(*views, model)
    a = views[0].points[found.matches[found.fits, 0]]
    b = views[1].points[found.matches[found.fits, 1]]
    at = np.column_stack([a, np.ones(len(a))]) @ found.model.T
    if model == "fundamental":
        offset = (np.column_stack([b, np.ones(len(b))]) * at).sum(axis=1)
        distances = np.abs(offset) / np.linalg.norm(at[:, :2], axis=1)
    else:
        distances = np.linalg.norm(at[:, :2] / at[:, 2:] - b, axis=1)
    assert len(a) > 50 and distances.max() <= WITHIN


def test_other_photos_have_hardly_an_inlier(views):
    others = [local_features(textured(seed)) for seed in range(10, 20)]
    assert max(found.inliers for found in verify_all(views[0], others)) <= 10


def test_the_result_is_the_same_each_time_and_in_threads(views):
    first = verify(*views)
    with ThreadPoolExecutor(4) as threads:
        again = list(threads.map(lambda _: verify(*views), range(30)))
    for found in [*again, *verify_all(views[0], [views[1]] * 3)]:
        np.testing.assert_array_equal(found.fits, first.fits)
        np.testing.assert_array_equal(found.model, first.model)


def made(points: np.ndarray, descriptors: np.ndarray | None = None) -> Features:
    """Features at given points, whose descriptors are all different."""
    if descriptors is None:
        descriptors = np.random.default_rng(0).integers(0, 120, (len(points), 128), np.uint8)
    return Features(np.asarray(points, np.float32).reshape(-1, 2), descriptors, (640, 480))


ON_A_LINE = np.stack([np.arange(40.0), 2 * np.arange(40.0)], axis=1)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    "points",
    [
        np.empty((0, 2)),
        np.array([[3.0, 4.0]]),
        np.array([[0.0, 0.0], [9, 9], [5, 1]]),
        np.full((50, 2), 7.0),
    ],
    ids=["none", "one", "three", "one place"],
)
def test_what_determines_no_model_has_no_inliers(points, model):
    spread = made(np.random.default_rng(1).uniform(0, 400, (len(points), 2)))
    for pair in ((made(points), spread), (spread, made(points))):
        found = verify(*pair, model)
        assert found.inliers == found.cells == 0 and found.model is None
        assert not len(points) or len(found.matches) == len(points)


def test_a_line_or_one_descriptor_everywhere_is_no_error():
    rng = np.random.default_rng(2)
    spread, patch = rng.uniform(0, 400, (40, 2)), rng.uniform(0, 8, (40, 2))
    noisy = ON_A_LINE + rng.normal(0, 1, ON_A_LINE.shape)
    for model in MODELS:
        for points in (ON_A_LINE, noisy, patch):
            assert verify(made(points), made(ON_A_LINE[:, ::-1]), model).inliers == 0
            assert verify(made(spread), made(points), model).inliers == 0
    zeros = np.zeros((40, 128), np.uint8)
    assert verify(made(ON_A_LINE, zeros), made(ON_A_LINE, zeros)).inliers <= 1
    same = np.full((40, 128), 45, np.uint8)
    assert len(match(made(ON_A_LINE, same), made(ON_A_LINE, same))) == 0


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 60), st.sampled_from(MODELS))
def test_any_points_give_a_result(seed, count, model):
    rng = np.random.default_rng(seed)
    size = rng.choice([1, 10, 640])
    points = rng.uniform(0, size, (2, count, 2))
    if rng.random() < 0.5:
        points = points.round()
    found = verify(made(points[0]), made(points[1]), model)
    assert 0 <= found.cells <= found.inliers <= len(found.matches) == count


def test_inliers_on_one_poster_are_in_few_cells(views):
    photo = textured(0)
    wall = np.full((480, 640, 3), 128, np.uint8)
    small = cv2.resize(photo, (120, 90), interpolation=cv2.INTER_AREA)
    wall[50:140, 60:180] = small
    poster = verify(views[0], local_features(wall))
    whole = verify(*views)
    assert poster.inliers >= 10
    assert poster.cells <= 9 < whole.cells


def test_an_unknown_model_is_refused(views):
    with pytest.raises(ValueError, match="unknown model 'plane'; choose one of homography"):
        verify(*views, model="plane")
