"""Triplet losses over embeddings of unit norm, and what to watch while they train.

A batch of n triplets comes as one tensor (n, 3, d): anchor, positive and negative embedding of each
row; its targets (n, 3) are numbers, and photos of different numbers show different landmarks.
Distances are squared Euclidean, from 0 (equal) over 2 (orthogonal) to 4 (opposite).

    loss = TripletLoss(margin=0.3, mining="semi-hard")
    model.compile(optimizer, loss=loss, metrics=[active_share_within(0.3), embedding_spread])

The in-batch minings take the anchor and the positive of each row as two photos of one landmark, let
each of them be the anchor of the other once, and mine negatives among all photos of the batch, the
stored negatives included, whose number is another.
"""

from __future__ import annotations

import keras
from keras import ops

MININGS = ("stored", "semi-hard", "soft")

ANCHOR, POSITIVE, NEGATIVE = 0, 1, 2


def squared_distance(a, b):
    """Squared Euclidean distance over the last axis; float (..., d) twice -> (...)."""
    return ops.sum(ops.square(a - b), axis=-1)


def stored_distances(embeddings):
    """Distances within each stored triplet.

    Args:
        embeddings: float (n, 3, d).

    Returns:
        two float (n,): anchor to positive, anchor to negative.
    """
    anchor = embeddings[:, ANCHOR]
    return (
        squared_distance(anchor, embeddings[:, POSITIVE]),
        squared_distance(anchor, embeddings[:, NEGATIVE]),
    )


def batch_distances(embeddings, groups):
    """Distances from every anchor to its positive and to every photo of the batch.

    Args:
        embeddings: float (n, 3, d) of unit norm.
        groups: numbers (n, 3); only photos of different groups are surely of different landmarks.

    Returns:
        positive: float (2n,), for the n anchors and then, roles exchanged, the n positives.
        others: float (2n, 3n), to all anchors, then all positives, then all stored negatives.
        is_negative: bool (2n, 3n), whether ``others`` is of another group than the anchor.
    """
    n = ops.shape(embeddings)[0]
    anchors, positives, negatives = (embeddings[:, i] for i in (ANCHOR, POSITIVE, NEGATIVE))
    photos = ops.concatenate([anchors, positives, negatives])
    # |a - b|^2 = 2 - 2 a.b for unit vectors; rounding may push it below 0.
    others = ops.maximum(2.0 - 2.0 * ops.matmul(photos[: 2 * n], ops.transpose(photos)), 0.0)
    group = ops.concatenate([groups[:, i] for i in (ANCHOR, POSITIVE, NEGATIVE)])
    is_negative = ops.not_equal(group[: 2 * n, None], group[None, :])
    positive = ops.tile(squared_distance(anchors, positives), [2])
    return positive, others, is_negative


def margin_loss(positive, negative, margin: float):
    """The triplet loss max(0, positive - negative + margin) (Schroff et al., FaceNet, 2015)."""
    return ops.maximum(positive - negative + margin, 0.0)


def semi_hard_negative(positive, others, is_negative):
    """Distance to the nearest negative that lies beyond the positive (FaceNet, section 3.2).

    Nearer ones, which the hardest would be, drive an untrained network to map everything to one
    point. Where no negative lies beyond the positive, the farthest negative is taken.

    Args:
        positive: float (a,), distance of each anchor to its positive.
        others: float (a, b), distance of each anchor to every photo.
        is_negative: bool (a, b), which photos are negatives.

    Returns:
        float (a,).
    """
    beyond = ops.logical_and(is_negative, others > positive[:, None])
    nearest_beyond = ops.min(ops.where(beyond, others, float("inf")), axis=1)
    farthest = ops.max(ops.where(is_negative, others, float("-inf")), axis=1)
    return ops.where(ops.any(beyond, axis=1), nearest_beyond, farthest)


def soft_triplet_loss(positive, others, is_negative, temperature: float):
    """Every negative of the batch in one smooth triplet loss.

    The (N+1)-tuplet loss (Sohn, "Improved Deep Metric Learning with Multi-class N-pair Loss
    Objective", NIPS 2016, equation 5) on cosines over a temperature t:

        log(1 + sum over negatives of exp((cos(a, n) - cos(a, p)) / t))

    With one negative it is the soft-margin triplet loss. No negative is chosen and none is lost:
    each pulls in proportion to how close it comes, so the gradient does not die in the plateau at
    the start, where all distances are alike.

    Args:
        positive, others, is_negative: as for :func:`semi_hard_negative`.
        temperature: the smaller, the more the nearest negatives count.

    Returns:
        float (a,).
    """
    # cos = 1 - distance / 2, so that the difference of cosines is half that of the distances.
    excess = (positive[:, None] - others) / (2.0 * temperature)
    excess = ops.where(is_negative, excess, float("-inf"))
    return ops.logaddexp(ops.logsumexp(excess, axis=1), 0.0)


@keras.saving.register_keras_serializable(package="image_retrieval")
class TripletLoss(keras.losses.Loss):
    """The loss of a batch of triplets; ``y_pred`` is (n, 3, d), ``y_true`` the groups (n, 3).

    Args:
        margin: by how much a negative must be farther than the positive ("stored", "semi-hard").
        mining: "stored": the negative of each row; "semi-hard": for each anchor one negative of
            the batch; "soft": all negatives of the batch.
        temperature: of the "soft" loss.

    Raises:
        ValueError: an unknown mining.
    """

    def __init__(
        self,
        margin: float = 0.3,
        mining: str = "semi-hard",
        temperature: float = 0.1,
        name: str = "triplet_loss",
        **kwargs,
    ):
        super().__init__(name=name, **kwargs)
        if mining not in MININGS:
            raise ValueError(f"unknown mining {mining!r}; choose one of {', '.join(MININGS)}")
        self.margin, self.mining, self.temperature = margin, mining, temperature

    def call(self, y_true, y_pred):
        if self.mining == "stored":
            return margin_loss(*stored_distances(y_pred), self.margin)
        positive, others, is_negative = batch_distances(y_pred, y_true)
        if self.mining == "soft":
            return soft_triplet_loss(positive, others, is_negative, self.temperature)
        negative = semi_hard_negative(positive, others, is_negative)
        return margin_loss(positive, negative, self.margin)

    def get_config(self):
        settings = {"margin": self.margin, "mining": self.mining, "temperature": self.temperature}
        return super().get_config() | settings


# --------------------------------------------------------------------------------------------------
# What to watch: Keras metrics over y_pred (n, 3, d). A falling loss alone does not show a collapse.
# --------------------------------------------------------------------------------------------------


def positive_distance(y_true, y_pred):
    """Mean distance of anchor and positive; falls as the network learns what stays the same."""
    return stored_distances(y_pred)[0]


def negative_distance(y_true, y_pred):
    """Mean distance of anchor and stored negative; about 2 for a space that is used well."""
    return stored_distances(y_pred)[1]


def triplet_accuracy(y_true, y_pred):
    """Share of stored triplets whose negative is farther than the positive; 0.5 is chance."""
    positive, negative = stored_distances(y_pred)
    return ops.cast(positive < negative, "float32")


def active_share_within(margin: float):
    """A metric: the share of anchors with a negative of the batch within ``margin``.

    Only these have a gradient; near 0 the batch has nothing left to teach, and stuck at 1 the
    network has not begun to learn.
    """

    def active_share(y_true, y_pred):
        positive, others, is_negative = batch_distances(y_pred, y_true)
        hardest = ops.min(ops.where(is_negative, others, float("inf")), axis=1)
        return ops.cast(margin_loss(positive, hardest, margin) > 0, "float32")

    return active_share


def embedding_spread(y_true, y_pred):
    """Mean squared distance of the batch's embeddings from their centre, from 0 to 1.

    0 is the collapse to one point; embeddings spread evenly over the sphere reach 1.
    """
    photos = ops.reshape(y_pred, (-1, ops.shape(y_pred)[-1]))
    return squared_distance(photos, ops.mean(photos, axis=0, keepdims=True))
