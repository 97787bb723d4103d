"""GeM against numpy, its limits, its gradient, and its life as a layer."""

from itertools import pairwise

import keras
import numpy as np
import pytest
from keras import ops

from lib.pooling import GeM, contribution, gem, make_pooling


def as_numpy(x):
    return ops.convert_to_numpy(x)


@pytest.fixture
def maps(rng) -> np.ndarray:
    return np.maximum(rng.normal(size=(3, 4, 5, 7)), 0).astype(np.float32)


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0, 7.5])
def test_gem_is_the_generalized_mean(maps, p):
    x = np.maximum(maps.astype(np.float64), 1e-6)
    expected = (x**p).mean(axis=(1, 2)) ** (1 / p)
    np.testing.assert_allclose(as_numpy(gem(maps, p)), expected, rtol=1e-5)


def test_gem_by_hand():
    maps = np.array([1.0, 2.0, 2.0, 3.0], dtype=np.float32).reshape(1, 2, 2, 1)
    assert float(gem(maps, 3.0)[0, 0]) == pytest.approx(((1 + 8 + 8 + 27) / 4) ** (1 / 3))


def test_gem_lies_between_average_and_maximum_and_grows_with_p(maps):
    pooled = [as_numpy(gem(maps, p)) for p in (1.0, 2.0, 4.0, 8.0, 200.0)]
    for smaller, larger in pairwise(pooled):
        assert (larger >= smaller * (1 - 1e-5)).all()
    np.testing.assert_allclose(pooled[0], maps.mean(axis=(1, 2)), atol=1e-5)
    np.testing.assert_allclose(pooled[-1], maps.max(axis=(1, 2)), rtol=0.02)


@pytest.mark.parametrize("scale", [1e-8, 1e12])
def test_gem_neither_overflows_nor_vanishes(scale):
    maps = np.full((1, 2, 2, 1), scale, dtype=np.float32)
    assert float(gem(maps, 12.0)[0, 0]) == pytest.approx(max(scale, 1e-6), rel=1e-4)


def test_gradients_agree_with_finite_differences(rng):
    import tensorflow as tf

    maps = tf.Variable(rng.uniform(0.1, 2.0, (1, 2, 3, 2)))
    p = tf.Variable(2.7, dtype=tf.float64)
    weights = tf.constant(rng.normal(size=(1, 2)))

    def value():
        return tf.reduce_sum(weights * gem(maps, p))

    with tf.GradientTape() as tape:
        result = value()
    gradients = tape.gradient(result, [maps, p])
    for variable, gradient in zip([maps, p], gradients, strict=True):
        start = variable.numpy()
        numeric = np.empty_like(start)
        for i in np.ndindex(start.shape):
            step = np.zeros_like(start)
            step[i] = 1e-6
            variable.assign(start + step)
            above = value().numpy()
            variable.assign(start - step)
            numeric[i] = (above - value().numpy()) / 2e-6
            variable.assign(start)
        np.testing.assert_allclose(gradient.numpy(), numeric, rtol=1e-5, atol=1e-8)


def test_contribution_sums_to_one_and_sharpens_with_p(maps):
    flat, sharp = (as_numpy(contribution(maps, p)) for p in (1.0, 10.0))
    np.testing.assert_allclose(flat.sum(axis=(1, 2)), 1, rtol=1e-4)
    assert (sharp.max(axis=(1, 2)) > flat.max(axis=(1, 2))).all()


def test_layer_learns_p_only_if_told_and_keeps_it_at_least_one():
    for trainable in (True, False):
        layer = GeM(3.0, p_trainable=trainable)
        layer.build((None, 2, 2, 1))
        assert len(layer.trainable_variables) == trainable
        assert float(layer.p) == 3.0
    model = keras.Sequential([keras.Input((2, 2, 1)), GeM(1.2)])
    model.compile(keras.optimizers.SGD(10.0), loss=lambda y, x: ops.sum(x))
    maps = np.array([0.0, 0, 0, 1], dtype=np.float32).reshape(1, 2, 2, 1)
    model.train_on_batch(maps, np.zeros((1, 1)))  # a smaller p makes the sum smaller
    assert float(model.layers[0].p) == 1.0


def test_layer_survives_its_config():
    layer = GeM.from_config(GeM(2.5, p_trainable=False, name="pool").get_config())
    layer.build((None, 2, 2, 1))
    assert (layer.initial_p, layer.p_trainable, layer.name) == (2.5, False, "pool")


def test_poolings_by_name(maps):
    np.testing.assert_allclose(make_pooling("average")(maps), maps.mean(axis=(1, 2)), rtol=1e-5)
    np.testing.assert_allclose(make_pooling("max")(maps), maps.max(axis=(1, 2)))
    np.testing.assert_allclose(make_pooling("gem", p=2.0)(maps), gem(maps, 2.0), rtol=1e-5)
    with pytest.raises(ValueError, match="unknown pooling 'median'; choose one of gem"):
        make_pooling("median")
    with pytest.raises(ValueError, match="at least 1"):
        GeM(0.5)
