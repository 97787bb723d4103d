"""Losses against hand-worked triplets and plain loops over all triplets of a batch."""

import keras
import numpy as np
import pytest
from conftest import unit
from keras import ops

from lib.losses import (
    TripletLoss,
    active_share_within,
    batch_distances,
    embedding_spread,
    margin_loss,
    negative_distance,
    positive_distance,
    semi_hard_negative,
    soft_triplet_loss,
    stored_distances,
)


def as_numpy(x):
    return ops.convert_to_numpy(x)


def on_circle(*degrees):
    angle = np.deg2rad(degrees)
    return np.stack([np.cos(angle), np.sin(angle)], axis=-1).astype(np.float32)


def all_different(n: int) -> np.ndarray:
    """Groups of n triplets: a landmark of its own for each pair, another for each negative."""
    row = np.arange(n)
    return np.stack([row, row, row + n], axis=1)


@pytest.fixture
def triplets(rng) -> np.ndarray:
    return unit(rng.normal(size=(6, 3, 8))).astype(np.float32)


def test_stored_loss_compares_anchor_positive_and_negative_of_one_row():
    # Anchor at 0 degrees; squared distance to an angle a is 2 - 2 cos a.
    easy = on_circle(0, 0, 180)  # positive at 0, negative at 4
    swapped = on_circle(0, 180, 0)
    between = on_circle(0, 60, 90)  # positive at 1, negative at 2
    loss = TripletLoss(margin=1.5, mining="stored", reduction=None)
    values = as_numpy(loss(all_different(3), np.stack([easy, swapped, between])))
    np.testing.assert_allclose(values, [0, 4 + 1.5, 1 - 2 + 1.5], atol=1e-6)


def test_every_photo_of_a_triplet_gets_a_gradient(triplets):
    import tensorflow as tf

    for mining in ("stored", "semi-hard", "soft"):
        embeddings = tf.Variable(triplets)
        with tf.GradientTape() as tape:
            loss = TripletLoss(margin=5.0, mining=mining)(all_different(6), embeddings)
        gradient = tape.gradient(loss, embeddings).numpy()
        assert np.isfinite(gradient).all()
        assert (np.abs(gradient).sum(axis=(0, 2)) > 1e-4).all(), mining


def plain_distances(triplets):
    """The batch's distances by loops: (anchor, positive) pairs, each with its negatives."""
    for i in range(len(triplets)):
        for a, p in ((0, 1), (1, 0)):
            anchor = triplets[i, a]
            negatives = [
                ((anchor - triplets[j, role]) ** 2).sum()
                for j in range(len(triplets))
                for role in range(3)
                if j != i or role == 2
            ]
            yield ((anchor - triplets[i, p]) ** 2).sum(), np.array(negatives)


def in_batch_order(values):
    """Loops go row by row; the batch has all anchors first, then all positives."""
    return np.concatenate([values[::2], values[1::2]])


def test_batch_distances_against_loops(triplets):
    positive, others, is_negative = map(as_numpy, batch_distances(triplets, all_different(6)))
    expected = list(plain_distances(triplets))
    np.testing.assert_allclose(positive, in_batch_order([p for p, _ in expected]), rtol=1e-4)
    negatives = in_batch_order([np.sort(n) for _, n in expected])
    for row, mask, wanted in zip(others, is_negative, negatives, strict=True):
        np.testing.assert_allclose(np.sort(row[mask]), wanted, rtol=1e-3, atol=1e-5)


def test_photos_of_one_group_are_not_negatives_of_each_other(triplets):
    groups = all_different(6)
    groups[2] = groups[4]  # two records of one landmark meet in a batch
    groups[1, 2] = groups[3, 0]  # and a stored negative is of another record's landmark
    _, _, is_negative = map(as_numpy, batch_distances(triplets, groups))
    of_photo = groups.T.ravel()
    for anchor in range(12):
        for photo in range(18):
            assert is_negative[anchor, photo] == (of_photo[anchor] != of_photo[photo])
    # The photos that are none do not matter: the loss is that of the batch without them.
    for mining in ("soft", "semi-hard"):
        loss = TripletLoss(mining=mining, reduction=None)
        moved = triplets.copy()
        moved[4, 1] = -triplets[4, 1]
        before, after = (as_numpy(loss(groups, x))[2] for x in (triplets, moved))
        assert before == pytest.approx(after, abs=1e-6)


def test_semi_hard_against_loops(triplets):
    margin, expected = 0.5, []
    for positive, negatives in plain_distances(triplets):
        beyond = negatives[negatives > positive]
        negative = beyond.min() if len(beyond) else negatives.max()
        expected.append(max(0.0, positive - negative + margin))
    loss = TripletLoss(margin=margin, mining="semi-hard", reduction=None)
    values = as_numpy(loss(all_different(6), triplets))
    np.testing.assert_allclose(values, in_batch_order(expected), atol=1e-4)


def test_semi_hard_by_hand():
    positive = np.array([1.0, 1.0], dtype=np.float32)
    others = np.array([[0.0, 0.5, 1.2, 3.0], [0.0, 0.5, 0.7, 0.9]], dtype=np.float32)
    is_negative = np.array([[False, True, True, True]] * 2)
    negative = as_numpy(semi_hard_negative(positive, others, is_negative))
    np.testing.assert_allclose(negative, [1.2, 0.9])  # nearest beyond 1; else the farthest


def test_soft_loss_against_loops(triplets):
    temperature, expected = 0.2, []
    for positive, negatives in plain_distances(triplets):
        cos_p, cos_n = 1 - positive / 2, 1 - negatives / 2
        expected.append(np.log1p(np.exp((cos_n - cos_p) / temperature).sum()))
    loss = TripletLoss(mining="soft", temperature=temperature, reduction=None)
    values = as_numpy(loss(all_different(6), triplets))
    np.testing.assert_allclose(values, in_batch_order(expected), rtol=1e-4)


def test_soft_loss_of_one_negative_is_the_soft_margin_triplet_loss():
    positive, negative = np.float32([0.8]), np.float32([[0.0, 1.4]])
    value = soft_triplet_loss(positive, negative, np.array([[False, True]]), temperature=0.5)
    assert float(value[0]) == pytest.approx(np.log1p(np.exp(0.8 - 1.4)), rel=1e-5)


def test_soft_loss_survives_extreme_distances():
    positive, others = np.float32([4.0]), np.float32([[0.0, 0.0, 4.0]])
    value = soft_triplet_loss(positive, others, np.array([[False, True, True]]), 0.01)
    assert float(value[0]) == pytest.approx(200.0, rel=1e-4)


def test_margin_loss_is_zero_beyond_the_margin():
    values = as_numpy(margin_loss(np.float32([0.2, 0.2]), np.float32([0.6, 0.4]), 0.3))
    np.testing.assert_allclose(values, [0.0, 0.1], atol=1e-6)


def test_the_signs_of_life_name_a_collapse(triplets):
    collapsed = np.tile(unit(np.ones(8)), (6, 3, 1)).astype(np.float32)
    assert as_numpy(embedding_spread(None, collapsed)).max() < 1e-6
    assert 0.7 < as_numpy(embedding_spread(None, triplets)).mean() <= 1.0 + 1e-6
    active = active_share_within(0.3)
    assert as_numpy(active(all_different(6), collapsed)).mean() == 1.0
    solved = np.repeat(np.eye(12)[:6, None], 3, axis=1).astype(np.float32)
    solved[:, 2] = np.eye(12)[6:]
    assert as_numpy(active(all_different(6), solved)).mean() == 0.0
    np.testing.assert_allclose(as_numpy(positive_distance(None, solved)), 0, atol=1e-6)
    np.testing.assert_allclose(as_numpy(negative_distance(None, solved)), 2, atol=1e-6)


def test_stored_distances_by_hand():
    positive, negative = stored_distances(on_circle(0, 60, 180)[None])
    assert (float(positive[0]), float(negative[0])) == pytest.approx((1.0, 4.0))


def test_loss_survives_its_config():
    loss = TripletLoss(margin=0.7, mining="soft", temperature=0.2)
    copy = keras.losses.deserialize(keras.losses.serialize(loss))
    assert copy.get_config() == loss.get_config()
    with pytest.raises(ValueError, match="unknown mining 'hardest'; choose one of stored"):
        TripletLoss(mining="hardest")
