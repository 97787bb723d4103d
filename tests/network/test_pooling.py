"""Each pooling against plain numpy loops, its limits, its gradient, and its life as a layer."""

from itertools import pairwise

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from keras import ops

from lib.network.pooling import (
    LARGEST_P,
    POOLINGS,
    GeM,
    RMac,
    contribution,
    gem,
    make_pooling,
    rmac_regions,
)

HALF_MAX = float(np.finfo(np.float16).max)


def as_numpy(x):
    return ops.convert_to_numpy(x)


@pytest.fixture
def maps(rng) -> np.ndarray:
    return np.maximum(rng.normal(size=(3, 4, 5, 7)), 0).astype(np.float32)


def reference(kind: str, maps: np.ndarray, p=3.0) -> np.ndarray:
    """Every pooling as its definition says, in float64."""
    x = np.asarray(maps, dtype=np.float64)
    match kind:
        case "gem" | "gem-per-channel":
            x = np.maximum(x, 1e-6)
            peak = x.max(axis=(1, 2))  # divided by it, x^100 fits into float64
            return peak * ((x / peak[:, None, None]) ** p).mean(axis=(1, 2)) ** (1 / p)
        case "average":
            return x.mean(axis=(1, 2))
        case "max":
            return x.max(axis=(1, 2))
        case "rmac":
            return np.stack([reference_rmac(one_map) for one_map in x])


def reference_rmac(one_map: np.ndarray, levels: int = 3) -> np.ndarray:
    """R-MAC of a map (h, w, c), with floating-point positions as in the authors' code."""
    h, w, _ = one_map.shape
    shorter, longer = min(h, w), max(h, w)
    steps = np.arange(2, 8)
    overlap = (shorter - (longer - shorter) / (steps - 1)) / shorter
    extra = 0 if h == w else int(np.argmin(np.abs(overlap - 0.4))) + 1
    total = np.zeros(one_map.shape[-1])
    for level in range(1, levels + 1):
        side = int(np.floor(2 * shorter / (level + 1)))
        if side == 0:
            continue
        rows = level + (extra if h > w else 0)
        columns = level + (extra if w > h else 0)
        # + 1e-9: a position that is a whole number must not be rounded down to the one before.
        for top in np.floor(np.linspace(0, h - side, rows) + 1e-9).astype(int):
            for left in np.floor(np.linspace(0, w - side, columns) + 1e-9).astype(int):
                maximum = np.full(one_map.shape[-1], -np.inf)
                for i in range(side):
                    for j in range(side):
                        maximum = np.maximum(maximum, one_map[top + i, left + j])
                total += maximum / max(np.linalg.norm(maximum), 1e-30)
    return total / max(np.linalg.norm(total), 1e-30)


@pytest.mark.parametrize("kind", POOLINGS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_each_pooling_is_what_it_says_in_float32_whatever_comes_in(kind, dtype, maps):
    rounded = ops.cast(maps, dtype)
    pooled = make_pooling(kind)(rounded)
    assert pooled.dtype == "float32"
    np.testing.assert_allclose(
        as_numpy(pooled), reference(kind, as_numpy(rounded).astype(np.float32)), rtol=1e-5
    )


@pytest.mark.parametrize("kind", POOLINGS)
def test_each_pooling_computes_in_float32_under_a_half_precision_policy(kind, maps):
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_float16")
    try:
        pooled = make_pooling(kind)(maps)
    finally:
        keras.config.set_dtype_policy(before)
    assert pooled.dtype == "float32"
    np.testing.assert_allclose(as_numpy(pooled), reference(kind, maps), rtol=1e-5)


@pytest.mark.parametrize("kind", POOLINGS)
def test_gradients_agree_with_central_differences(kind, rng):
    import tensorflow as tf

    # Distinct values: a maximum has no derivative where two places tie.
    maps = rng.permutation(np.linspace(0.1, 2.0, 2 * 4 * 3 * 2)).reshape(2, 4, 3, 2)
    layer = make_pooling(kind)
    layer = type(layer).from_config(layer.get_config() | {"dtype": "float64"})
    layer.build(maps.shape)
    inputs = [maps]
    if kind.startswith("gem"):
        inputs.append(rng.uniform(1.5, 5.0, layer.p.shape))
        layer.scaled_p.assign(inputs[1])
    weights = rng.normal(size=(2, 2))

    with tf.GradientTape() as tape:
        x = tf.constant(maps)
        tape.watch(x)
        value = tf.reduce_sum(weights * layer(x))
    gradients = tape.gradient(value, [x, *layer.trainable_variables])
    assert len(gradients) == len(inputs)
    for which, gradient in enumerate(gradients):
        numeric = np.empty_like(inputs[which])
        for i in np.ndindex(numeric.shape):
            values = []
            for step in (1e-6, -1e-6):
                moved = [np.array(array) for array in inputs]
                moved[which][i] += step
                values.append(np.sum(weights * reference(kind, *moved)))
            numeric[i] = (values[0] - values[1]) / 2e-6
        np.testing.assert_allclose(gradient.numpy(), numeric, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("p", [1.0, 3.0, LARGEST_P])
@pytest.mark.parametrize("kind", POOLINGS)
def test_values_and_gradients_stay_finite_on_extreme_maps(kind, p, dtype):
    import tensorflow as tf

    zeros = np.zeros((4, 4, 3))
    spike = zeros.copy()
    spike[1, 2, 0] = HALF_MAX
    tiny = np.full((4, 4, 3), 3e-6)
    huge = np.full((4, 4, 3), HALF_MAX)
    maps = tf.constant(np.stack([zeros, spike, tiny, huge]), dtype)
    layer = make_pooling(kind, p)
    with tf.GradientTape() as tape:
        tape.watch(maps)
        pooled = layer(maps)
        value = tf.reduce_sum(pooled * [1.0, 2.0, 3.0])
    expected = reference(kind, maps.numpy(), p)
    if kind == "rmac":
        expected[2] = 0  # too short for a direction
    np.testing.assert_allclose(pooled, expected, rtol=1e-5, atol=1e-6)
    for gradient in tape.gradient(value, [maps, *layer.trainable_variables]):
        assert np.isfinite(gradient).all()


def test_gem_by_hand():
    maps = np.array([1.0, 2.0, 2.0, 3.0], dtype=np.float32).reshape(1, 2, 2, 1)
    assert float(gem(maps, 3.0)[0, 0]) == pytest.approx(((1 + 8 + 8 + 27) / 4) ** (1 / 3))
    two_channels = np.repeat(maps, 2, axis=-1)
    pooled = as_numpy(gem(two_channels, np.array([1.0, 2.0])))[0]
    np.testing.assert_allclose(pooled, [2.0, np.sqrt((1 + 4 + 4 + 9) / 4)], rtol=1e-6)


@pytest.mark.parametrize("scale", [1e-8, 1e12])
def test_gem_neither_overflows_nor_vanishes(scale):
    maps = np.full((1, 2, 2, 1), scale, dtype=np.float32)
    assert float(gem(maps, 12.0)[0, 0]) == pytest.approx(max(scale, 1e-6), rel=1e-4)


def test_gem_at_its_ends_is_average_and_maximum(maps):
    np.testing.assert_allclose(as_numpy(gem(maps, 1.0)), maps.mean(axis=(1, 2)), atol=2e-6)
    np.testing.assert_allclose(as_numpy(gem(maps, 1e4)), maps.max(axis=(1, 2)), rtol=1e-3)
    four_by_four = maps[:, :4, :4]
    share = as_numpy(gem(four_by_four, LARGEST_P)) / four_by_four.max(axis=(1, 2))
    assert share.min() > 0.97


@settings(max_examples=50)
@given(
    arrays(np.float16, (2, 3, 3, 2), elements=st.floats(0, HALF_MAX, width=16)),
    st.lists(st.floats(1, LARGEST_P, width=32), min_size=2, max_size=4, unique=True).map(sorted),
)
def test_gem_lies_between_average_and_maximum_and_grows_with_p(maps, exponents):
    x = np.maximum(maps.astype(np.float64), 1e-6)
    average, maximum = x.mean(axis=(1, 2)), x.max(axis=(1, 2))
    pooled = [average, *(as_numpy(gem(maps, p)) for p in exponents), maximum]
    for smaller, larger in pairwise(pooled):
        assert (larger >= smaller * (1 - 1e-5)).all()


def test_contribution_is_each_places_share_of_the_powers_and_sharpens_with_p(maps):
    for p in (1.0, 3.0, 10.0):
        power = np.maximum(maps.astype(np.float64), 1e-6) ** p
        share = (power / power.sum(axis=(1, 2), keepdims=True)).mean(axis=-1)
        np.testing.assert_allclose(as_numpy(contribution(maps, p)), share, rtol=1e-4)
    flat, sharp = (as_numpy(contribution(maps.astype(np.float16), p)) for p in (1.0, 10.0))
    np.testing.assert_allclose(flat.sum(axis=(1, 2)), 1, rtol=1e-4)
    assert (sharp.max(axis=(1, 2)) > flat.max(axis=(1, 2))).all()


def test_layer_learns_p_only_if_told():
    for trainable in (True, False):
        layer = GeM(3.0, p_trainable=trainable)
        layer.build((None, 2, 2, 1))
        assert len(layer.trainable_variables) == trainable
        assert float(layer.p) == 3.0


def test_p_moves_at_its_own_rate():
    maps = np.array([0.0, 0, 0, 1], dtype=np.float32).reshape(1, 2, 2, 1)
    moved = {}
    for rate in (1.0, 30.0):
        model = keras.Sequential([keras.Input((2, 2, 1)), GeM(3.0, p_rate=rate)])
        model.compile(keras.optimizers.Adam(1e-3), loss=lambda y, x: -ops.sum(x))
        model.train_on_batch(maps, np.zeros((1, 1)))
        moved[rate] = float(model.layers[0].p) - 3.0
        config = model.layers[0].get_config()
        assert GeM.from_config(config).p_rate == rate and ("p_rate" in config) == (rate != 1)
    assert moved[30.0] == pytest.approx(30 * moved[1.0], rel=1e-2)
    assert moved[1.0] == pytest.approx(1e-3, rel=1e-2)  # Adam's step
    model.layers[0].set_p(4.6)
    assert float(model.layers[0].p) == pytest.approx(4.6)
    with pytest.raises(ValueError, match="p_rate must be above 0"):
        GeM(p_rate=0)


def test_training_keeps_p_within_its_bounds():
    maps = np.array([[0.0, 0, 0, 1], [0, 1, 1, 1]], dtype=np.float32).T.reshape(1, 2, 2, 2)
    # A smaller p makes a pooled value smaller: one channel's is pushed down, the other's up.
    for sign, bound in ((1.0, 1.0), (-1.0, LARGEST_P)):
        model = keras.Sequential([keras.Input((2, 2, 2)), GeM(1.2, per_channel=True)])
        model.compile(
            keras.optimizers.SGD(1e6), loss=lambda y, x: ops.sum(x * ops.array([[1.0, -1.0]]) * y)
        )
        model.train_on_batch(maps, np.full((1, 1), sign))
        other = LARGEST_P if bound == 1 else 1.0
        np.testing.assert_array_equal(as_numpy(model.layers[0].p), [bound, other])


@pytest.mark.parametrize("kind", POOLINGS)
def test_a_model_with_each_pooling_survives_saving(kind, maps, tmp_path, rng):
    inputs = keras.Input(maps.shape[1:])
    pooling = make_pooling(kind, p=2.5, p_trainable=False)
    model = keras.Model(inputs, pooling(inputs))
    if kind.startswith("gem"):
        pooling.scaled_p.assign(rng.uniform(1, 5, pooling.p.shape))
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras", safe_mode=True)
    np.testing.assert_array_equal(as_numpy(loaded(maps)), as_numpy(model(maps)))
    assert loaded.get_layer("pooling").get_config() == pooling.get_config()
    assert loaded.count_params() == {"gem": 1, "gem-per-channel": 7}.get(kind, 0)


def test_configs_are_complete():
    layer = GeM.from_config(GeM(2.5, False, per_channel=True, name="pool").get_config())
    assert (layer.initial_p, layer.p_trainable, layer.per_channel) == (2.5, False, True)
    assert layer.name == "pool"
    assert RMac.from_config(RMac(levels=2).get_config()).levels == 2


@pytest.mark.parametrize(
    ("height", "width", "regions"),
    [
        (1, 1, [(0, 0, 1)]),  # levels 2 and 3 would be smaller than a place
        (2, 2, [(0, 0, 2)] + [(i, j, 1) for i in (0, 1) for j in (0, 1)]
            + [(i, j, 1) for i in (0, 0, 1) for j in (0, 0, 1)]),
        (4, 4, [(0, 0, 4)] + [(i, j, 2) for i in (0, 2) for j in (0, 2)]
            + [(i, j, 2) for i in (0, 1, 2) for j in (0, 1, 2)]),
        # Two regions of side 7 along 10 overlap by 4/7, three by 5.5/7: m = 2 is nearer to 0.4.
        (7, 10, [(0, j, 7) for j in (0, 3)] + [(i, j, 4) for i in (0, 3) for j in (0, 3, 6)]
            + [(i, j, 3) for i in (0, 2, 4) for j in (0, 2, 4, 7)]),
        # Two regions of side 2 along 6 would leave a gap, three just touch; five, in steps of
        # 1, overlap by 0.5, four, in steps of 4/3, by 1/3: m = 4 is nearer to 0.4.
        (2, 6, [(0, j, 2) for j in (0, 1, 2, 4)] + [(i, j, 1) for i in (0, 1)
            for j in (0, 1, 2, 3, 5)] + [(i, j, 1) for i in (0, 0, 1) for j in (0, 1, 2, 3, 4, 5)]),
    ],
)  # fmt: skip
def test_regions_of_rmac_by_hand(height, width, regions):
    assert rmac_regions(height, width) == regions
    turned = sorted((left, top, side) for top, left, side in regions)
    assert sorted(rmac_regions(width, height)) == turned


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 5))
def test_regions_of_rmac_lie_inside_and_touch_all_sides(height, width, levels):
    regions = rmac_regions(height, width, levels)
    assert all(t >= 0 and x >= 0 and s >= 1 for t, x, s in regions)
    assert max(t + s for t, _, s in regions) == height and min(t for t, _, _ in regions) == 0
    assert max(x + s for _, x, s in regions) == width and min(x for _, x, _ in regions) == 0


@pytest.mark.parametrize("shape", [(1, 1), (4, 4), (7, 10), (12, 5), (3, 14)])
@pytest.mark.parametrize("levels", [1, 3, 4])
def test_rmac_is_the_loop_over_its_regions(shape, levels, rng):
    maps = np.maximum(rng.normal(size=(2, *shape, 6)), 0).astype(np.float32)
    pooled = as_numpy(RMac(levels)(maps))
    for one_map, descriptor in zip(maps, pooled, strict=True):
        expected = reference_rmac(one_map.astype(np.float64), levels)
        np.testing.assert_allclose(descriptor, expected, atol=1e-6)


def test_rmac_by_hand():
    # One place: the only region is the map itself.
    np.testing.assert_allclose(as_numpy(RMac()(np.array([[[[3.0, 4.0]]]]))), [[0.6, 0.8]])
    # 2 x 2 places, two levels. The whole map has the maxima (3, 4), the places (3, 0), (0, 4),
    # (0, 0) and (0, 2); of unit norm and summed: (0.6 + 1, 0.8 + 1 + 1).
    maps = np.array([[[[3.0, 0], [0, 4]], [[0, 0], [0, 2]]]])
    expected = np.array([1.6, 2.8]) / np.hypot(1.6, 2.8)
    np.testing.assert_allclose(as_numpy(RMac(levels=2)(maps))[0], expected, rtol=1e-6)


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match="unknown pooling 'median'; choose one of gem, gem-per-ch"):
        make_pooling("median")
    for p in (0.5, 101, float("nan")):
        with pytest.raises(ValueError, match="at least 1"):
            GeM(p)
    with pytest.raises(ValueError, match="at least one level"):
        RMac(levels=0)
    with pytest.raises(ValueError, match="fixed height and width"):
        RMac()(keras.Input((None, None, 8)))
