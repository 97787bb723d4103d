"""Tests of made-up descriptors: they have the structure of the real ones."""

import numpy as np
import pytest

from lib.studies.descriptor_model import LARGEST, fit
from tests.conftest import unit

D, LANDMARKS, EACH = 16, 400, 6


@pytest.fixture(scope="module")
def real():
    """Descriptors (2400, 16) of 400 landmarks in 2 clusters, with photos that scatter a little."""
    rng = np.random.default_rng(0)
    towns = unit(rng.normal(size=(2, D)))
    centres = unit(towns[np.arange(LANDMARKS) % 2] + 0.15 * rng.normal(size=(LANDMARKS, D)))
    landmarks = np.repeat(np.arange(LANDMARKS), EACH)
    noise = rng.normal(size=(len(landmarks), D)) * np.linspace(0.02, 0.08, D)
    return unit(centres[landmarks] + noise).astype(np.float32), landmarks


def similarities(vectors: np.ndarray) -> tuple[float, float]:
    """Medians of the similarity to the nearest other one, and to any."""
    similarity = vectors @ vectors.T
    others = similarity[~np.eye(len(vectors), dtype=bool)].reshape(len(vectors), -1)
    return float(np.median(others.max(axis=1))), float(np.median(others))


def test_neighbours_are_as_near_and_others_as_far_as_in_the_real_set(real):
    vectors, landmarks = real
    sizes = np.full(LANDMARKS, EACH)
    sampled = fit(vectors, landmarks).sample(len(vectors), seed=1, sizes=sizes)
    assert sampled.dtype == np.float32 and sampled.shape == vectors.shape
    np.testing.assert_allclose(np.linalg.norm(sampled, axis=1), 1, atol=1e-5)
    of_real, of_sampled, of_noise = map(
        similarities, (vectors, sampled, unit(np.random.default_rng(2).normal(size=vectors.shape)))
    )
    assert of_sampled == pytest.approx(of_real, abs=0.03)
    assert of_noise != pytest.approx(of_real, abs=0.1)  # what is compared tells them apart


def test_the_directions_in_which_photos_scatter_are_kept(real):
    vectors, landmarks = real
    model = fit(vectors, landmarks)
    scatter = np.diag(model.within @ model.within)
    assert scatter[-4:].mean() > 4 * scatter[:4].mean()


def test_equal_arguments_give_equal_descriptors_and_other_seeds_others(real):
    model = fit(*real)
    np.testing.assert_array_equal(model.sample(500, seed=3), model.sample(500, seed=3))
    assert not np.array_equal(model.sample(500, seed=3), model.sample(500, seed=4))


def test_sizes_have_a_heavy_tail(real):
    vectors, landmarks = real
    still = np.full(len(vectors), 1e-4)[:, None] * vectors  # photos that lie on their landmark
    centres = vectors[::EACH][landmarks]
    model = fit(unit(centres + still).astype(np.float32), landmarks)
    sampled = model.sample(20_000, seed=0)
    _, counts = np.unique(sampled.round(2), axis=0, return_counts=True)
    assert 200 < counts.max() <= LARGEST and np.median(counts) <= 10


def test_without_two_photos_of_a_landmark_nothing_can_be_learned(real):
    with pytest.raises(ValueError, match="no landmark has two photos"):
        fit(real[0], np.arange(len(real[0])))


def test_landmarks_of_equal_photos_make_equal_photos(real):
    """Photos that do not scatter made NaN: their scatter was divided by its sum, 0."""
    vectors, landmarks = real
    copies = vectors[::EACH][landmarks]
    sizes = np.full(LANDMARKS, EACH)
    sampled = fit(copies, landmarks).sample(len(copies), seed=0, sizes=sizes)
    np.testing.assert_allclose(np.linalg.norm(sampled, axis=1), 1, atol=1e-5)
    assert len(np.unique(sampled.round(3), axis=0)) <= LANDMARKS
