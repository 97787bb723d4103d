"""Losses and minings against plain loops over all triplets, and against another library."""

import json
import math
from dataclasses import asdict

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import ops

from lib.network.losses import (
    ArcFace,
    InfoNCE,
    MetricLoss,
    MultiSimilarity,
    TripletLoss,
    active_share_of,
    embedding_spread,
    make_loss,
    margin_loss,
    negative_distance,
    positive_distance,
)
from lib.network.mining import (
    MINERS,
    BatchAll,
    BatchHard,
    DistanceWeighted,
    Pairs,
    SemiHard,
    Stored,
    compare,
    root,
    stored_distances,
)
from tests.conftest import unit

N_GROUPS = 12  # for ArcFace; more than any batch here has

TRIPLET_LOSSES = [
    TripletLoss(margin, squared, mining)
    for margin in (0.5, None)
    for mining in MINERS.values()
    for squared in (True, False)
]
OTHER_LOSSES = [
    InfoNCE(temperature=0.2),
    MultiSimilarity(beta=10.0, base=0.5),
    ArcFace(scale=8.0),
]
EVERY_LOSS = OTHER_LOSSES + TRIPLET_LOSSES
ARRANGEMENTS = ("stored triplets", "P x K")


def name_of(x) -> str:
    if x.name == "triplet":
        return f"margin {x.margin}, {x.mining.name}, {'squared' if x.squared else 'plain'}"
    return x.name


def mining_of(x) -> str:
    return x.mining.name if x.name == "triplet" else ""


def as_numpy(x):
    return ops.convert_to_numpy(x)


def on_circle(*degrees):
    angle = np.deg2rad(degrees)
    return np.stack([np.cos(angle), np.sin(angle)], axis=-1).astype(np.float32)


def all_different(n: int) -> np.ndarray:
    """Groups of n triplets: a landmark of its own for each pair, another for each negative."""
    row = np.arange(n)
    return np.stack([row, row, row + n], axis=1)


def value_of(x, groups, embeddings) -> float:
    layer = MetricLoss(x, N_GROUPS)
    if x.name == "arcface":
        layer.build(groups.shape, embeddings.shape)
        layer.centres.assign(centres(embeddings.shape[-1]))
    return float(layer(groups, embeddings))


def centres(dimension: int) -> np.ndarray:
    return np.random.default_rng(5).normal(size=(N_GROUPS, dimension)).astype(np.float32)


def make_batch(arrangement: str) -> tuple[np.ndarray, np.ndarray]:
    """Groups and embeddings that overlap enough for every loss to have something to do."""
    rng = np.random.default_rng(0)
    if arrangement == "P x K":
        groups = np.array([0, 0, 0, 1, 1, 2, 2, 3, 4, 4])
        return groups, unit(rng.normal(size=(10, 5))).astype(np.float32)
    groups = all_different(4)
    groups[2, 2] = groups[0, 0]  # a stored negative may be of another row's landmark
    return groups, unit(rng.normal(size=(4, 3, 5))).astype(np.float32)


@pytest.fixture(params=ARRANGEMENTS)
def batch(request):
    return make_batch(request.param)


def is_random(x) -> bool:
    return mining_of(x) == "distance-weighted"


def fits(x, groups: np.ndarray) -> bool:
    return groups.ndim == 2 or mining_of(x) != "stored"


def not_random(groups: np.ndarray) -> list:
    return [x for x in EVERY_LOSS if fits(x, groups) and not is_random(x)]


def every_loss(choose=lambda x: True):
    """Parametrizes a test by the losses, each with the batches of both arrangements."""
    cases = [
        pytest.param(x, make_batch(arrangement), id=f"{name_of(x)}, {arrangement}")
        for x in filter(choose, EVERY_LOSS)
        for arrangement in ARRANGEMENTS
        if fits(x, make_batch(arrangement)[0])
    ]
    return pytest.mark.parametrize("x, batch", cases)


# --------------------------------------------------------------------------------------------------
# The definitions once more, as plain loops in double precision
# --------------------------------------------------------------------------------------------------


def pairs_by_loops(groups, embeddings, memory=()):
    """Squared distances, and for each photo the lists of its positives and of its negatives.

    The memory's photos, (group, vector) each, are further columns.
    """
    photos = unit(np.float64(embeddings).reshape(-1, embeddings.shape[-1]))
    group, m = groups.ravel(), len(photos)
    others = [*photos, *(np.float64(vector) for _, vector in memory)]
    distances = np.array([[((a - b) ** 2).sum() for b in others] for a in photos])
    positives, negatives = [[] for _ in range(m)], [[] for _ in range(m)]
    for a in range(m):
        for b in range(m):
            if group[a] != group[b]:
                negatives[a].append(b)
            elif a != b and (groups.ndim == 1 or (a // 3 == b // 3 and a % 3 < 2 and b % 3 < 2)):
                positives[a].append(b)
        negatives[a] += [m + i for i, (of_kept, _) in enumerate(memory) if of_kept != group[a]]
    return distances, positives, negatives


def triplets_by_loops(x, groups, embeddings, memory=()):
    distances, positives, negatives = pairs_by_loops(groups, embeddings, memory)
    d = distances if x.squared else np.sqrt(distances)
    for a in range(len(d)):
        if x.mining.name == "stored":
            if a % 3 == 0 and groups[a // 3, 0] != groups[a // 3, 2]:
                yield d[a, a + 1], d[a, a + 2]
            continue
        if not positives[a] or not negatives[a]:
            continue
        to_positives, to_negatives = d[a, positives[a]], d[a, negatives[a]]
        if x.mining.name == "batch-hard":
            yield to_positives.max(), to_negatives.min()
        for positive in to_positives:
            if x.mining.name == "semi-hard":
                beyond = to_negatives[to_negatives > positive]
                yield positive, beyond.min() if len(beyond) else to_negatives.max()
            if x.mining.name == "batch-all":
                yield from ((positive, negative) for negative in to_negatives)


def loss_by_loops(x, groups, embeddings, memory=()) -> float:
    if x.name == "triplet":
        values = [
            math.log1p(math.exp(p - n)) if x.margin is None else max(0, p - n + x.margin)
            for p, n in triplets_by_loops(x, groups, embeddings, memory)
        ]
        if x.mining.name == "batch-all":
            values = [v for v in values if v > 0]
        return np.mean(values) if values else 0.0
    if x.name == "arcface":
        return np.mean(arcface_by_loops(x, groups, embeddings))
    distances, positives, negatives = pairs_by_loops(groups, embeddings, memory)
    cos, values = 1 - distances / 2, []
    for a in range(len(cos)):
        if not positives[a] or not negatives[a]:
            continue
        near, far = cos[a, positives[a]], cos[a, negatives[a]]
        if x.name == "infonce":
            e = [np.exp(c / x.temperature) for c in near]
            others = sum(np.exp(c / x.temperature) for c in far)
            values.append(np.mean([-np.log(v / (v + others)) for v in e]))
        else:
            hard_near = near[near < far.max() + x.epsilon]
            hard_far = far[far > near.min() - x.epsilon]
            pull = np.log(1 + np.exp(-x.alpha * (hard_near - x.base)).sum()) / x.alpha
            push = np.log(1 + np.exp(x.beta * (hard_far - x.base)).sum()) / x.beta
            values.append(pull + push)
    return np.mean(values) if values else 0.0


def arcface_by_loops(x, groups, embeddings) -> list[float]:
    photos = unit(np.float64(embeddings).reshape(-1, embeddings.shape[-1]))
    values = []
    for photo, group in zip(photos, groups.ravel(), strict=True):
        theta = np.arccos(np.clip(unit(np.float64(centres(len(photo)))) @ photo, -1, 1))
        logits = np.cos(theta)
        if theta[group] + x.margin < np.pi:
            logits[group] = np.cos(theta[group] + x.margin)
        else:
            logits[group] -= x.margin * np.sin(x.margin)
        e = np.exp(x.scale * logits)
        values.append(-np.log(e[group] / e.sum()))
    return values


@st.composite
def batches(draw):
    """Batches of either arrangement, of any groups: some anchors have no positive or negative."""
    seed, dimension = draw(st.integers(0, 2**32 - 1)), draw(st.integers(3, 6))
    shape = draw(st.sampled_from([(1, 3), (2, 3), (4, 3), (1,), (2,), (5,), (9,)]))
    rng = np.random.default_rng(seed)
    groups = rng.integers(0, draw(st.integers(1, 5)), size=shape)
    if len(shape) == 2:
        groups[:, 1] = groups[:, 0]
    return groups, rng.normal(size=(*shape, dimension)).astype(np.float32)


@settings(max_examples=15, derandomize=True)  # minings jump at ties
@given(batches())
def test_every_loss_against_loops(batch):
    groups, embeddings = batch
    for x in not_random(groups):
        expected = loss_by_loops(x, groups, embeddings)
        assert value_of(x, groups, embeddings) == pytest.approx(expected, rel=1e-3, abs=1e-4), x


def gradient_of(x, groups, embeddings) -> np.ndarray:
    layer, variable = MetricLoss(x, N_GROUPS), tf.Variable(embeddings)
    layer.build(groups.shape, embeddings.shape)
    if x.name == "arcface":
        layer.centres.assign(centres(embeddings.shape[-1]))
    with tf.GradientTape() as tape:
        loss = layer(groups, variable)
    assert np.isfinite(loss)
    return tf.convert_to_tensor(tape.gradient(loss, variable)).numpy()


@every_loss(lambda x: not is_random(x))
def test_gradients_against_differences_of_the_loops(x, batch):
    groups, embeddings = batch
    step, expected = 1e-6, np.zeros(embeddings.size)
    for i in range(embeddings.size):
        move = np.zeros(embeddings.size)
        move[i] = step
        up, down = (
            loss_by_loops(x, groups, np.float64(embeddings) + sign * move.reshape(embeddings.shape))
            for sign in (1, -1)
        )
        expected[i] = (up - down) / (2 * step)
    found = gradient_of(x, groups, embeddings)
    np.testing.assert_allclose(found.ravel(), expected, rtol=2e-2, atol=2e-4)


@every_loss()
def test_gradients_reach_anchor_positive_and_negative(x, batch):
    groups, embeddings = batch
    of_photo = np.abs(gradient_of(x, groups, embeddings)).sum(axis=-1)
    assert np.isfinite(of_photo).all()
    if groups.ndim == 2:
        assert (of_photo.sum(axis=0) > 1e-4).all()
    else:
        assert (np.bincount(groups, of_photo)[[0, 1, 2, 4]] > 1e-4).all()  # 3 has no positive


@every_loss()
def test_the_collapse_to_one_point_is_finite(x, batch):
    groups, _ = batch
    collapsed = np.tile(unit(np.arange(1.0, 6.0)), (*groups.shape, 1)).astype(np.float32)
    for same in (collapsed, 0 * collapsed):
        assert np.isfinite(gradient_of(x, groups, same)).all()
    if x.name == "triplet":
        expected = math.log(2) if x.margin is None else x.margin
        assert value_of(x, groups, collapsed) == pytest.approx(expected, abs=2e-3)


@every_loss(lambda x: x.name != "arcface")
def test_a_batch_without_negatives_has_no_loss_and_no_gradient(x, batch):
    groups, embeddings = batch
    same = np.zeros_like(groups)
    assert value_of(x, same, embeddings) == 0
    np.testing.assert_array_equal(gradient_of(x, same, embeddings), 0)


def test_order_of_the_batch_and_rotation_of_the_space_do_not_matter(batch, rng):
    groups, embeddings = batch
    order = rng.permutation(len(groups))
    rotation, _ = np.linalg.qr(rng.normal(size=(5, 5)))
    for x in not_random(groups):
        before = value_of(x, groups, embeddings)
        assert value_of(x, groups[order], embeddings[order]) == pytest.approx(before, rel=1e-4)
        if x.name != "arcface":  # its centres would have to turn as well
            turned = (embeddings @ rotation).astype(np.float32)
            assert value_of(x, groups, turned) == pytest.approx(before, rel=1e-4)


def test_losses_compile_for_batches_of_any_size(batch):
    groups, embeddings = batch
    shapes = [
        tf.TensorSpec((None, *groups.shape[1:]), "int64"),
        tf.TensorSpec((None, *embeddings.shape[1:]), "float32"),
    ]
    for x in EVERY_LOSS:
        if not fits(x, groups) or (x.name == "triplet" and x.margin is None):  # mined alike
            continue
        layer = MetricLoss(x, N_GROUPS)
        layer.build(groups.shape, embeddings.shape)
        compiled = tf.function(layer, input_signature=shapes)
        for n in (len(groups), 3):
            value = compiled(groups[:n], embeddings[:n])
            if is_random(x):
                assert np.isfinite(value)
            else:
                expected = float(layer(groups[:n], embeddings[:n]))
                assert float(value) == pytest.approx(expected, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("size", [25, 7])  # it fills up in the third step; less than a batch
def test_a_memory_adds_the_photos_of_former_batches_as_negatives(batch, size, rng):
    groups, embeddings = batch
    losses = [x for x in EVERY_LOSS if x.name != "arcface" and mining_of(x) != "stored"]
    for x in losses:
        layer = MetricLoss(x, memory=size)
        layer.build(groups.shape, embeddings.shape)
        kept = []
        for step in range(4):
            vectors = embeddings + 0.5 * rng.normal(size=embeddings.shape).astype(np.float32)
            of_step = groups + step  # so that some landmarks come again
            if not is_random(x):
                alone, expected = (loss_by_loops(x, of_step, vectors, m) for m in ((), kept))
                assert float(layer(of_step, vectors)) == pytest.approx(alone, rel=1e-3)
                value = float(layer(of_step, vectors, training=True))
                assert value == pytest.approx(expected, rel=1e-3), (x, step)
            else:
                assert np.isfinite(layer(of_step, vectors, training=True))
            photos = unit(vectors.reshape(-1, 5))
            kept = [*zip(of_step.ravel(), photos, strict=True), *kept][:size]
            of_memory, memory = map(as_numpy, layer.memory)
            assert of_memory.tolist() == [group for group, _ in kept] + [-1] * (size - len(kept))
            np.testing.assert_allclose(memory[: len(kept)], [v for _, v in kept], atol=1e-6)


# --------------------------------------------------------------------------------------------------
# Pairs
# --------------------------------------------------------------------------------------------------


def test_pairs_against_loops(batch):
    groups, embeddings = batch
    distances, positives, negatives = pairs_by_loops(groups, embeddings)
    pairs = compare(groups, embeddings)
    np.testing.assert_allclose(pairs.distances, distances, atol=1e-5)
    np.testing.assert_allclose(root(pairs.distances), np.sqrt(distances), atol=1e-3)
    for a in range(len(distances)):
        assert np.flatnonzero(pairs.is_positive[a]).tolist() == positives[a]
        assert np.flatnonzero(pairs.is_negative[a]).tolist() == negatives[a]


def test_photos_of_one_group_in_two_rows_are_neither_positives_nor_negatives(rng):
    groups = np.array([[0, 0, 1], [0, 0, 2]])
    embeddings = rng.normal(size=(2, 3, 4)).astype(np.float32)
    pairs = compare(groups, embeddings)
    assert np.flatnonzero(pairs.is_positive[0]).tolist() == [1]  # the other row's 3 and 4 are not
    assert np.flatnonzero(pairs.is_negative[0]).tolist() == [2, 5]
    assert not np.any(pairs.is_positive[2])
    # Where the other row's positive lies does not matter to an anchor.
    moved = embeddings.copy()
    moved[1, 1] = -moved[1, 1]
    for mining in (SemiHard(), BatchHard()):
        before, after = (mining(compare(groups, x)) for x in (embeddings, moved))
        np.testing.assert_allclose(before.negative[0], after.negative[0], atol=1e-6)
        np.testing.assert_allclose(before.positive[0], after.positive[0], atol=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_any_precision_is_compared_in_float32_as_unit_vectors(dtype, batch):
    groups, embeddings = batch
    rounded = tf.cast(10 * embeddings, dtype)
    for x in not_random(groups):
        layer = MetricLoss(x, N_GROUPS)
        value = layer(groups, rounded)
        assert value.dtype == "float32"
        exact = layer(groups, tf.cast(rounded, "float64"))
        assert float(value) == pytest.approx(float(exact), rel=1e-4)
    distances, _, _ = pairs_by_loops(groups, tf.cast(rounded, "float64").numpy())
    np.testing.assert_allclose(compare(groups, rounded).distances, distances, atol=1e-5)


def test_a_policy_of_half_precision_does_not_reach_the_loss(batch):
    groups, embeddings = batch
    expected = value_of(InfoNCE(), groups, embeddings)
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        assert value_of(InfoNCE(), groups, embeddings) == expected
    finally:
        keras.config.set_dtype_policy("float32")


def test_what_is_no_batch_is_refused():
    for groups, embeddings in (
        (np.zeros((4, 3)), np.zeros((12, 8))),
        (np.zeros(4), np.zeros((4, 3, 8))),
        (np.zeros((4, 2)), np.zeros((4, 2, 8))),
    ):
        with pytest.raises(ValueError, match=r"groups \(n, 3\) with embeddings \(n, 3, d\), or"):
            compare(groups, embeddings)
        with pytest.raises(ValueError, match=r"groups \(n, 3\) with embeddings \(n, 3, d\), or"):
            MetricLoss(ArcFace(), 4)(groups, embeddings)


# --------------------------------------------------------------------------------------------------
# Triplets by hand
# --------------------------------------------------------------------------------------------------


def test_stored_triplets_compare_anchor_positive_and_negative_of_one_row():
    # Anchor at 0 degrees; squared distance to an angle a is 2 - 2 cos a, plain 2 sin(a / 2).
    easy = on_circle(0, 0, 180)  # positive at 0, negative at 4
    swapped = on_circle(0, 180, 0)
    between = on_circle(0, 60, 90)  # positive at 1, negative at 2
    rows = np.stack([easy, swapped, between])
    np.testing.assert_allclose(stored_distances(rows), [[0, 4, 1], [4, 0, 2]], atol=1e-6)
    for squared, expected in ((True, (0 + 5.5 + 0.5) / 3), (False, (0 + 3.5 + 2.5 - 2**0.5) / 3)):
        x = TripletLoss(1.5, squared, Stored())
        assert value_of(x, all_different(3), rows) == pytest.approx(expected, abs=1e-6)


def pairs_of_one_anchor(to_positives, to_negatives):
    """The pairs of a P x K batch of which only the first row says anything."""
    row = np.float32([0, *to_positives, *to_negatives])
    n, m = len(to_positives), len(row)
    is_positive, is_negative = np.zeros((2, m, m), bool)
    is_positive[0, 1 : n + 1], is_negative[0, n + 1 :] = True, True
    pairs = compare(np.zeros(m), np.eye(m, dtype=np.float32))
    return pairs._replace(
        distances=ops.convert_to_tensor(np.tile(row, (m, 1))),
        is_positive=ops.convert_to_tensor(is_positive),
        is_negative=ops.convert_to_tensor(is_negative),
    )


def test_minings_by_hand():
    pairs = pairs_of_one_anchor([1.0, 2.0], [0.5, 1.2, 1.9])
    semi_hard = SemiHard()(pairs)
    exists = as_numpy(semi_hard.exists)
    assert np.argwhere(exists).tolist() == [[0, 1], [0, 2]]
    np.testing.assert_allclose(as_numpy(semi_hard.positive)[exists], [1.0, 2.0])
    # Nearest beyond 1; nothing lies beyond 2, so the farthest.
    np.testing.assert_allclose(as_numpy(semi_hard.negative)[exists], [1.2, 1.9])
    hard = BatchHard()(pairs)
    assert (float(hard.positive[0]), float(hard.negative[0])) == pytest.approx((2.0, 0.5))
    assert as_numpy(hard.exists).tolist() == [True] + 5 * [False]
    assert np.count_nonzero(BatchAll()(pairs).exists) == 6


def test_a_negative_as_far_as_the_positive_is_not_beyond_it():
    mined = SemiHard()(pairs_of_one_anchor([1.0], [1.0, 1.5]))
    assert float(mined.negative[0, 1]) == 1.5


def test_batch_all_averages_over_the_active_triplets_only():
    # Two pairs at 0 and 60 degrees: each anchor's positive at 0, both negatives at 1.
    embeddings, groups = on_circle(0, 0, 60, 60), np.array([0, 0, 1, 1])
    for margin, expected in ((1.5, 0.5), (0.9, 0.0)):
        x = TripletLoss(margin, mining=BatchAll())
        assert value_of(x, groups, embeddings) == pytest.approx(expected, abs=1e-6)
    far = np.concatenate([embeddings, on_circle(180, 180)])  # 4 and 3 away: nothing to learn there
    x = TripletLoss(1.5, mining=BatchAll())
    assert value_of(x, np.array([0, 0, 1, 1, 2, 2]), far) == pytest.approx(0.5, abs=1e-6)


def test_margin_losses_by_hand():
    values = margin_loss(np.float32([0.2, 0.2]), np.float32([0.6, 0.4]), 0.3)
    np.testing.assert_allclose(values, [0.0, 0.1], atol=1e-6)
    value = margin_loss(np.float32([0.8]), np.float32([1.4]), None)
    np.testing.assert_allclose(value, np.log1p(np.exp(0.8 - 1.4)), rtol=1e-5)


def test_stored_mining_of_a_p_x_k_batch_names_the_fix(rng):
    layer = MetricLoss(TripletLoss(mining=Stored()))
    with pytest.raises(ValueError, match=r"pictures_per_landmark=0 .* another mining of semi-hard"):
        layer(np.array([0, 0, 1]), rng.normal(size=(3, 4)))


# --------------------------------------------------------------------------------------------------
# Distance-weighted sampling
# --------------------------------------------------------------------------------------------------


def pairs_of(distances, is_negative, dimension: int) -> Pairs:
    """Pairs of these plain distances with all that the weights need."""
    photos = np.zeros((len(distances), dimension), np.float32)
    return Pairs(ops.convert_to_tensor(distances**2), None, is_negative, None, photos, None)


def test_sampling_weights_make_all_distances_alike(rng):
    # The weight is one over the density of distances on the sphere: the weighted histogram of the
    # distances of random points is flat.
    for dimension in (3, 4, 6):
        distances = np.linalg.norm(
            unit(rng.normal(size=(60_000, dimension))) - np.eye(dimension)[0], axis=1
        )
        pairs = pairs_of(np.float32(distances)[None], np.ones((1, 60_000), bool), dimension)
        log_weights = np.float64(as_numpy(DistanceWeighted(0.01, 1.99).log_weights(pairs))[0])
        bins = np.linspace(0.7, 1.7, 6)
        counts, _ = np.histogram(distances, bins)
        weighted, _ = np.histogram(distances, bins, weights=np.exp(log_weights - log_weights.max()))
        np.testing.assert_allclose(weighted / weighted.mean(), 1, atol=0.1)
        assert dimension == 3 or counts.max() > 1.5 * counts.min()  # they were not flat before


def test_sampling_weights_of_many_dimensions_stay_finite_and_within_bounds():
    distances = np.float32([[0.0, 0.2, 0.5, 1.0, 1.39, 1.41, 2.0]] * 3)
    is_negative = np.array([[False] + 6 * [True], 5 * [False] + 2 * [True], 7 * [False]])
    found = as_numpy(DistanceWeighted().log_weights(pairs_of(distances, is_negative, 2048)))
    assert np.isfinite(found).all()
    first, beyond, none = found
    assert first[1] == first[2] > first[3] > first[4]  # nearer than 0.5 counts as 0.5
    assert (first[[0, 5, 6]] == -1e9).all()  # no negative; from beyond 1.4 none is drawn ...
    assert beyond[5] == beyond[6] > -1e9 and (beyond[:5] == -1e9).all()  # ... or all alike
    assert (none == none[0]).all()


@pytest.mark.parametrize("squared", [True, False])
def test_distance_weighted_loss_averages_to_its_expectation(squared, batch):
    groups, embeddings = batch
    x = TripletLoss(1.0, squared, DistanceWeighted())
    distances, positives, negatives = pairs_by_loops(groups, embeddings)
    expected = []
    for a in range(len(distances)):
        near = [n for n in negatives[a] if distances[a, n] <= 1.4**2] or negatives[a]
        d = np.clip(np.sqrt(distances[a, near]), 0.5, 1.4)
        weights = 1 / (d**3 * (1 - d**2 / 4))  # in 5 dimensions
        for p in positives[a] if negatives[a] else ():
            to_p, to_n = distances[a, p], distances[a, near]
            violation = to_p - to_n if squared else np.sqrt(to_p) - np.sqrt(to_n)
            expected.append((np.maximum(violation + 1.0, 0) * weights).sum() / weights.sum())
    keras.utils.set_random_seed(2)
    layer = MetricLoss(x)
    compiled = tf.function(layer)
    values = np.array([compiled(groups, embeddings).numpy() for _ in range(200)])
    assert values.std() > 0.01  # each call draws anew
    error = values.std() / len(values) ** 0.5
    assert values.mean() == pytest.approx(np.mean(expected), abs=4 * float(error))
    keras.utils.set_random_seed(2)
    again = MetricLoss(x)
    np.testing.assert_allclose([again(groups, embeddings) for _ in range(3)], values[:3], rtol=1e-5)


# --------------------------------------------------------------------------------------------------
# The other losses by hand
# --------------------------------------------------------------------------------------------------


def test_infonce_of_one_negative_is_the_soft_margin_loss_of_cosines():
    groups, embeddings = np.array([0, 0, 1]), on_circle(0, 50, 120)
    cos = np.cos(np.deg2rad([50, 120, 70]))
    expected = np.mean(np.log1p(np.exp((cos[1:] - cos[0]) / 0.5)))
    found = InfoNCE(temperature=0.5)(compare(groups, embeddings))
    assert float(found) == pytest.approx(expected, rel=1e-5)


def test_infonce_survives_extremes():
    # Positives opposite, negatives on top of the anchors: a loss of 2 / temperature, no overflow.
    groups, embeddings = np.array([0, 0, 1, 1]), on_circle(0, 180, 0, 180)
    assert float(InfoNCE(0.005)(compare(groups, embeddings))) == pytest.approx(400, rel=1e-3)
    solved = on_circle(0, 0, 180, 180)
    assert float(InfoNCE(0.005)(compare(groups, solved))) == 0


def test_multi_similarity_mines_pairs_that_overlap():
    # Cosines of the first anchor: positive 0.5, negative 0; they overlap once epsilon exceeds 0.5.
    pairs = compare(np.array([0, 0, 1]), on_circle(0, 60, -90))
    assert float(MultiSimilarity(2.0, 50.0, 1.0, epsilon=0.4)(pairs)) == 0
    one = np.log1p(np.exp(-2 * (0.5 - 1))) / 2 + np.log1p(np.exp(10 * (0 - 0.2))) / 10
    # The other anchor's negative has the cosine of 150 degrees, far from any overlap.
    expected = (
        one - np.log1p(np.exp(-2 * (0.5 - 1))) / 2 + np.log1p(np.exp(-2 * (0.5 - 0.2))) / 2
    ) / 2
    found = MultiSimilarity(2.0, 10.0, 0.2, epsilon=0.6)(pairs)
    assert float(found) == pytest.approx(expected, rel=1e-5)


def test_arcface_keeps_falling_as_an_embedding_turns_away_from_its_centre():
    def loss_at(degrees: float, margin: float) -> float:
        pairs = compare(np.array([0]), on_circle(degrees))
        return float(ArcFace(margin, 4.0)(pairs, np.float32([[1, 0], [0, 0]])))  # cosines cos, 0

    assert (np.diff([loss_at(degrees, 0.5) for degrees in np.linspace(0, 180, 40)]) > 0).all()
    # Without a margin it is the plain softmax.
    expected = -np.log(np.exp(4 * np.cos(1)) / (np.exp(4 * np.cos(1)) + 1))
    assert loss_at(np.rad2deg(1), 0.0) == pytest.approx(expected, rel=1e-5)


def test_arcface_has_a_finite_gradient_on_a_centre_and_opposite():
    layer = MetricLoss(ArcFace(), n_groups=3)
    layer.build((2,), (2, 3))
    # Two centres are one, or the first photo would be so surely right that it had no gradient.
    layer.centres.assign([[1, 0, 0], [0, 1, 0], [1, 0, 0]])
    embeddings = tf.Variable(np.float32([[1, 0, 0], [0, -1, 0]]))
    with tf.GradientTape() as tape:
        loss = layer(np.array([0, 1]), embeddings)
    gradients = tape.gradient(loss, [embeddings, layer.centres.value])
    assert all(np.isfinite(x).all() for x in gradients) and np.isfinite(loss)


def test_arcface_learns_its_centres():
    keras.utils.set_random_seed(0)
    layer = MetricLoss(ArcFace(), n_groups=4)
    layer.build((4,), (4, 6))
    assert [w.shape for w in layer.trainable_weights] == [(4, 6)]
    embeddings, groups = np.eye(6, dtype=np.float32)[:4], np.array([3, 2, 1, 0])
    optimizer = keras.optimizers.Adam(0.3)
    for _ in range(25):
        with tf.GradientTape() as tape:
            loss = layer(groups, embeddings)
        optimizer.apply(tape.gradient(loss, [layer.centres.value]), [layer.centres])
    assert float(loss) < 0.1
    assert (np.argmax(embeddings @ as_numpy(layer.centres).T, axis=1) == groups).all()


# --------------------------------------------------------------------------------------------------
# Against pytorch-metric-learning
# --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pml():
    return pytest.importorskip(
        "pytorch_metric_learning",
        reason="needs pytorch-metric-learning: make backends",
    )


@pytest.fixture
def p_x_k(pml, rng):
    """Groups and embeddings of a P x K batch, and both once more for torch."""
    import torch

    groups = np.repeat(np.arange(6), 4)
    embeddings = unit(rng.normal(size=(6, 1, 8)) + rng.normal(size=(6, 4, 8)))
    embeddings = embeddings.reshape(24, 8).astype(np.float32)
    return groups, embeddings, torch.from_numpy(embeddings), torch.from_numpy(groups)


def euclidean(squared: bool):
    from pytorch_metric_learning.distances import LpDistance

    return LpDistance(normalize_embeddings=True, p=2, power=2 if squared else 1)


@pytest.mark.parametrize("squared", [True, False])
def test_triplet_losses_agree_with_pytorch_metric_learning(p_x_k, squared):
    from pytorch_metric_learning.losses import TripletMarginLoss
    from pytorch_metric_learning.miners import BatchHardMiner
    from pytorch_metric_learning.reducers import MeanReducer

    groups, embeddings, *theirs = p_x_k
    distance = euclidean(squared)
    for ours in (0.3, None):
        smooth = ours is None
        margin = 0.0 if smooth else 0.3
        expected = TripletMarginLoss(margin, smooth_loss=smooth, distance=distance)(*theirs)
        x = TripletLoss(ours, squared, BatchAll())
        assert value_of(x, groups, embeddings) == pytest.approx(float(expected), rel=1e-4)

        hardest = BatchHardMiner(distance=distance)(*theirs)
        criterion = TripletMarginLoss(
            margin, smooth_loss=smooth, distance=distance, reducer=MeanReducer()
        )
        x = TripletLoss(ours, squared, BatchHard())
        expected = float(criterion(*theirs, hardest))
        assert value_of(x, groups, embeddings) == pytest.approx(expected, rel=1e-4)


def test_semi_hard_negatives_are_the_nearest_of_pytorch_metric_learning(p_x_k):
    from pytorch_metric_learning.miners import TripletMarginMiner

    groups, embeddings, *theirs = p_x_k
    miner = TripletMarginMiner(0.3, type_of_triplets="semihard", distance=euclidean(True))
    pairs = compare(groups, embeddings)
    nearest = {}
    for a, p, n in np.stack([x.numpy() for x in miner(*theirs)], axis=1):
        negative = float(pairs.distances[a, n])
        nearest[a, p] = min(negative, nearest.get((a, p), np.inf))
    mined = SemiHard()(pairs)
    excess = as_numpy(mined.negative - mined.positive)
    within = as_numpy(mined.exists) & (excess > 0) & (excess <= 0.3)
    assert {tuple(pair) for pair in np.argwhere(within)} == nearest.keys()
    assert len(nearest) > 10
    for (a, p), negative in nearest.items():
        assert float(mined.negative[a, p]) == pytest.approx(negative, abs=1e-6)


def test_infonce_agrees_with_pytorch_metric_learning(p_x_k):
    from pytorch_metric_learning.losses import NTXentLoss, SupConLoss

    groups, embeddings, embeddings_, groups_ = p_x_k
    x = InfoNCE(temperature=0.2)
    expected = float(NTXentLoss(temperature=0.2)(embeddings_, groups_))
    assert value_of(x, groups, embeddings) == pytest.approx(expected, rel=1e-4)
    # With one positive an anchor, the denominators of supervised contrastive learning are the same.
    two = np.arange(24) % 4 < 2
    expected = float(SupConLoss(temperature=0.2)(embeddings_[two], groups_[two]))
    assert value_of(x, groups[two], embeddings[two]) == pytest.approx(expected, rel=1e-4)


def test_multi_similarity_agrees_with_pytorch_metric_learning(p_x_k):
    from pytorch_metric_learning.losses import MultiSimilarityLoss
    from pytorch_metric_learning.miners import MultiSimilarityMiner

    groups, embeddings, *theirs = p_x_k
    for base in (1.0, 0.5):
        hard = MultiSimilarityMiner(epsilon=0.1)(*theirs)
        expected = float(MultiSimilarityLoss(alpha=2, beta=50, base=base)(*theirs, hard))
        x = MultiSimilarity(base=base)
        assert value_of(x, groups, embeddings) == pytest.approx(expected, rel=1e-4)


def test_arcface_agrees_with_pytorch_metric_learning(p_x_k):
    import torch
    from pytorch_metric_learning.losses import ArcFaceLoss

    groups, embeddings, *theirs = p_x_k
    for margin in (0.5, 2.0):  # the second goes beyond pi for some photos
        criterion = ArcFaceLoss(N_GROUPS, 8, margin=math.degrees(margin), scale=64)
        criterion.W.data = torch.from_numpy(centres(8).T.copy())
        x = ArcFace(margin=margin)
        expected = criterion(*theirs).item()
        assert value_of(x, groups, embeddings) == pytest.approx(expected, rel=1e-4)


def test_sampling_weights_agree_with_pytorch_metric_learning(p_x_k, monkeypatch):
    from pytorch_metric_learning.miners import DistanceWeightedMiner
    from pytorch_metric_learning.utils import loss_and_miner_utils

    groups, embeddings, *theirs = p_x_k
    seen = []
    monkeypatch.setattr(
        loss_and_miner_utils,
        "get_random_triplet_indices",
        lambda labels, weights, **kwargs: seen.append(weights.numpy()) or 3 * [labels[:0]],
    )
    DistanceWeightedMiner(cutoff=0.5, nonzero_loss_cutoff=1.4)(*theirs)
    log_weights = DistanceWeighted().log_weights(compare(groups, embeddings))
    np.testing.assert_allclose(ops.softmax(log_weights, axis=1), seen[0], rtol=1e-3, atol=1e-6)


# --------------------------------------------------------------------------------------------------
# What to watch
# --------------------------------------------------------------------------------------------------


def test_metrics_against_loops(batch):
    groups, embeddings = batch
    distances, positives, negatives = pairs_by_loops(groups, embeddings)
    m = range(len(distances))
    expected = {
        positive_distance: np.mean([distances[a, p] for a in m for p in positives[a]]),
        negative_distance: np.mean([distances[a, n] for a in m for n in negatives[a]]),
    }
    hardest = [
        (max(distances[a, positives[a]]), min(distances[a, negatives[a]]))
        for a in m
        if positives[a] and negatives[a]
    ]
    squared = active_share_of(TripletLoss(0.05))
    expected[squared] = np.mean([p - n + 0.05 > 0 for p, n in hardest])
    plain = active_share_of(TripletLoss(0.05, squared=False))
    expected[plain] = np.mean([p**0.5 - n**0.5 + 0.05 > 0 for p, n in hardest])
    photos = embeddings.reshape(-1, 5)
    spread = ((photos - photos.mean(axis=0)) ** 2).sum(axis=1).mean()
    expected[embedding_spread] = spread
    for metric, value in expected.items():
        # As model.compile wraps them: Keras hands groups over as floats.
        wrapped = keras.metrics.MeanMetricWrapper(metric, name=metric.__name__)
        wrapped.update_state(groups, embeddings)
        assert float(wrapped.result()) == pytest.approx(value, rel=1e-4), metric.__name__


def test_the_signs_of_life_name_a_collapse(batch):
    groups, embeddings = batch
    collapsed = np.tile(unit(np.ones(5)), (*groups.shape, 1)).astype(np.float32)
    assert float(embedding_spread(groups, collapsed)) < 1e-6
    assert 0.7 < float(embedding_spread(groups, embeddings)) <= 1
    assert float(active_share_of(InfoNCE())(groups, collapsed)) == 1
    solved = np.eye(N_GROUPS, dtype=np.float32)[groups]
    assert float(active_share_of(InfoNCE())(groups, solved)) == 0
    assert float(positive_distance(groups, solved)) == pytest.approx(0, abs=1e-6)
    assert float(negative_distance(groups, solved)) == pytest.approx(2, abs=1e-6)


# --------------------------------------------------------------------------------------------------
# Settings
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: make_loss("soft"), "unknown loss 'soft'; choose one of triplet, soft-margin, inf"),
        (lambda: make_loss("triplet", "hardest"), "unknown mining 'hardest'; choose one of stored"),
        (lambda: TripletLoss(mining="batch-hard"), r"such as BatchHard\(\), got 'batch-hard'"),
        (lambda: InfoNCE(temperature=0.0), "temperature must be above 0, got 0.0"),
        (lambda: MultiSimilarity(beta=-1.0), "beta must be above 0"),
        (lambda: ArcFace(margin=28.6), "angle from 0 to pi in radians, got 28.6"),
        (lambda: ArcFace(scale=0.0), "scale must be above 0"),
        (lambda: DistanceWeighted(farthest=2.0), "nearest < farthest < 2"),
        (lambda: MetricLoss(InfoNCE(), memory=-1), "memory must be at least 0 photos, got -1"),
        (lambda: MetricLoss(ArcFace(), 3, memory=8), "set memory=0, or choose another loss"),
        (lambda: MetricLoss(TripletLoss(mining=Stored()), memory=8), 'mining "stored" compare no'),
    ],
)
def test_settings_that_make_no_sense_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_arcface_without_the_number_of_groups_is_refused():
    with pytest.raises(ValueError, match="n_groups"):
        MetricLoss(ArcFace())


def test_names_make_the_losses():
    assert make_loss("triplet", "batch-hard", 0.2) == TripletLoss(0.2, mining=BatchHard())
    assert make_loss("soft-margin", "stored") == TripletLoss(None, mining=Stored())
    assert make_loss("infonce", temperature=0.1) == InfoNCE(0.1)
    assert make_loss("multi-similarity") == MultiSimilarity()
    assert make_loss("arcface") == ArcFace()


def test_written_settings_of_different_losses_and_miners_differ():
    written = [json.dumps(asdict(x)) for x in EVERY_LOSS]
    assert len(set(written)) == len(EVERY_LOSS)


def test_the_share_of_active_anchors_of_a_loss_without_a_margin_is_that_within_0_3(batch):
    expected = float(active_share_of(TripletLoss(0.3))(*batch))
    for loss in (TripletLoss(None), InfoNCE(), ArcFace()):
        assert float(active_share_of(loss)(*batch)) == expected
