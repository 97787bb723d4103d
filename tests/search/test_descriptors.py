"""Several views of a photo: sizes, mirroring, exponents, and their generalized mean."""

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.data.catalogue import build_catalogue, split_landmarks
from lib.data.dataset import DatasetHandler, DataSettings
from lib.network.engine import keras_engine
from lib.network.tower import TowerSettings, build_tower, embed, resized
from lib.network.whitening import learn_pca_whitening
from lib.search import descriptors, embedding
from lib.search.descriptors import aggregate, describe_views, teacher_descriptors
from tests.conftest import unit


@pytest.fixture(scope="module")
def tower() -> keras.Model:
    keras.utils.set_random_seed(0)
    return build_tower(TowerSettings(32, 0, last_stage=3, weights=""))


@pytest.fixture
def photos(rng):
    return {size: rng.integers(0, 256, (3, size, size, 3), dtype=np.uint8) for size in (24, 32)}


@pytest.mark.long
def test_views_of_any_size_are_followed_by_their_mirror_images(tower, photos):
    views = [*describe_views(tower, photos[24]), *describe_views(tower, photos[32])]
    assert all(view.shape == (3, 512) and view.dtype == np.float32 for view in views)
    np.testing.assert_allclose(views[2], embed(tower, photos[32]), atol=1e-6)
    np.testing.assert_allclose(views[3], embed(tower, photos[32][:, :, ::-1]), atol=1e-6)
    np.testing.assert_allclose(views[0], embed(resized(tower, 24), photos[24]), atol=1e-6)


@pytest.mark.long
def test_another_exponent_changes_the_views_but_not_the_tower(tower, photos):
    before = embed(tower, photos[32])
    view = describe_views(tower, photos[32], (1.0,))[0]
    maps = tower.get_layer("trunk").predict(photos[32], verbose=0)
    np.testing.assert_allclose(view, unit(maps.mean(axis=(1, 2))), atol=1e-3)  # p = 1: the average
    np.testing.assert_array_equal(embed(tower, photos[32]), before)
    both = describe_views(tower, photos[32], (1.0, None))
    assert both.shape == (4, 3, 512)
    np.testing.assert_allclose(both[[0, 2]], [view, before], atol=1e-6)

    average = build_tower(TowerSettings(32, 0, pooling="average", last_stage=3, weights=""))
    with pytest.raises(ValueError, match="no GeM pooling"):
        describe_views(average, photos[32], (4.6,))


def test_aggregate_by_hand():
    views = np.array([[[1.0, 0.0]], [[0.0, 1.0]]])
    np.testing.assert_allclose(aggregate(views), [[0.5**0.5, 0.5**0.5]], atol=1e-6)
    views = np.array([[[0.6, 0.8], [0.0, -1.0]], [[0.8, 0.6], [0.0, -1.0]]])
    # Of the first photo: the lowest values are 0 and -1; at p = 2 the second dimension is
    # sqrt((1.8^2 + 1.6^2) / 2) - 1.
    first = [((0.36 + 0.64) / 2) ** 0.5, ((1.8**2 + 1.6**2) / 2) ** 0.5 - 1]
    np.testing.assert_allclose(aggregate(views, p=2), unit(np.array([first, [0, -1]])), atol=1e-6)
    np.testing.assert_allclose(aggregate(views, p=np.inf)[0], unit(np.array([0.8, 0.8])), atol=1e-6)
    with pytest.raises(ValueError, match="p must be at least 1"):
        aggregate(views, p=0.5)


@settings(max_examples=50)
@given(st.integers(0, 10_000), st.sampled_from([1.0, 1.5, 3.0, 10.0]))
def test_aggregate_has_unit_norm_whatever_the_order_and_number_of_equal_views(seed, p):
    rng = np.random.default_rng(seed)
    views = unit(rng.normal(size=(3, 4, 5)))
    result = aggregate(views, p)
    np.testing.assert_allclose(np.linalg.norm(result, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(aggregate(views[::-1], p), result, atol=1e-6)
    np.testing.assert_allclose(aggregate(np.concatenate([views, views]), p), result, atol=1e-6)
    np.testing.assert_allclose(aggregate(views[:1].repeat(2, axis=0), p), views[0], atol=1e-5)


def test_a_teachers_descriptors_of_the_chosen_pictures(shards, tmp_path, monkeypatch):
    photos = keras.Input((8, 8, 3), dtype="uint8")
    means = keras.layers.AveragePooling2D(4)(keras.layers.Rescaling(1 / 255)(photos))
    flat = keras.layers.UnitNormalization()(keras.layers.Flatten()(means))
    teacher = keras.Model(photos, flat)
    catalogue = build_catalogue(shards)
    chosen = split_landmarks(catalogue, {"train": 0.7, "validation": 0.3}, seed=0) == "train"
    handler = DatasetHandler(catalogue, DataSettings(16), chosen.copy())
    broken = catalogue.places[np.flatnonzero(chosen)[5]]
    read = embedding.read_picture

    def read_most(place):
        if place == broken:
            raise ValueError("damaged")
        return read(place)

    monkeypatch.setattr("lib.search.embedding.read_picture", read_most)
    found = teacher_descriptors(keras_engine(teacher), handler, 5, tmp_path)
    assert found.shape == (len(catalogue.pictures), 5) and found.dtype == np.float32
    chosen[np.flatnonzero(chosen)[5]] = False
    assert not found[~chosen].any()
    plain = embed(teacher, handler.photos(np.flatnonzero(chosen), 8))
    expected = learn_pca_whitening(plain, 5).apply(plain)
    np.testing.assert_allclose(found[chosen], expected, atol=1e-4)
    monkeypatch.setattr(descriptors, "_MOST_TO_LEARN", 100)  # in parts, learned from some
    of_parts = teacher_descriptors(keras_engine(teacher), handler, 5, tmp_path)
    assert (of_parts.any(axis=1) == found.any(axis=1)).all() and (of_parts != found).any()
    with pytest.raises(ValueError, match="have 12 dimensions, fewer than the 13"):
        teacher_descriptors(keras_engine(teacher), handler, 13, tmp_path)
