"""Pairs of a batch of embeddings, and miners that choose triplets from them.

    pairs = compare(groups, embeddings)         # all distances of the batch
    triplets = BatchHard()(pairs)               # the triplets that a loss averages over

A batch has one of two arrangements. Photos of different groups show different landmarks.

    stored triplets    groups (n, 3), embeddings (n, 3, d): anchor, positive, negative of each row.
                       Only the anchor and positive of a row are a positive pair. Photos of equal
                       group in different rows may or may not match, and are skipped.
    P x K              groups (m,), embeddings (m, d): photos of equal group show one landmark.

Both become the same (m, m) matrices. Stored triplets give m = 3n photos: photo 3i + r has role r in
row i, and both photos of a positive pair serve as anchors. Embeddings are compared as unit vectors,
in float32: |a - b|^2 = 2 - 2 cos(a, b), from 0 (equal) through 2 (orthogonal) to 4 (opposite).

A memory of r photos of former batches makes the matrices (m, m + r), with further negatives only:
photos of one group in different batches may or may not match.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import keras
from keras import ops

ANCHOR, POSITIVE, NEGATIVE = 0, 1, 2

# Masked values, in a minimum and in a sum of exponentials: finite, because the gradient of a masked
# infinity is NaN, not 0.
_BEYOND_ALL = 5.0  # distances are at most 4
NOTHING = -1e9

Tensor = Any  # of Keras' backend, or anything it converts


class Pairs(NamedTuple):
    """A compared batch; matrices are (m, m), or (m, m + r), with the anchors in the rows."""

    distances: Tensor  # float32, squared Euclidean
    is_positive: Tensor  # bool: known to show one landmark, and not the same photo
    is_negative: Tensor  # bool: known to show different landmarks
    partner: Tensor | None  # int (m,): the only possible positive; None (P x K): any photo
    photos: Tensor  # float32 (m, d), the embeddings at unit length
    group: Tensor  # (m,)

    def at_positives(self, matrix: Tensor) -> Tensor:
        """The columns that may hold positives: (m, p), p = m, or 1 for stored triplets."""
        if self.partner is None:
            return matrix[:, : ops.shape(self.photos)[0]]
        return ops.take_along_axis(matrix, self.partner[:, None], axis=1)

    @property
    def is_anchor(self) -> Tensor:
        """bool (m,): photos with a positive and a negative."""
        return ops.any(self.is_positive, axis=1) & ops.any(self.is_negative, axis=1)

    def with_negatives(self, chosen: Tensor) -> Triplets:
        """Each positive pair with the negative chosen for it, int (m, p)."""
        return Triplets(
            self.at_positives(self.distances),
            ops.take_along_axis(self.distances, chosen, axis=1),
            self.at_positives(self.is_positive) & ops.any(self.is_negative, axis=1)[:, None],
        )


class Triplets(NamedTuple):
    """Triplets of a batch, three tensors of one shape (or that broadcast to one)."""

    positive: Tensor  # float32, squared distance from the anchor
    negative: Tensor  # float32, likewise
    exists: Tensor  # bool; where False, the distances mean nothing


def compare(
    groups: Tensor, embeddings: Tensor, memory: tuple[Tensor, Tensor] | None = None
) -> Pairs:
    """Compare all photos of a batch.

    Args:
        groups: numbers (n, 3) or (m,), see the module's docstring.
        embeddings: float (n, 3, d) or (m, d), of any precision and length.
        memory: groups (r,), -1 where there is no photo, and their unit vectors, float32 (r, d).

    Raises:
        ValueError: shapes that are neither arrangement.
    """
    groups = ops.convert_to_tensor(groups)
    match tuple(groups.shape), tuple(embeddings.shape):
        case (_, 3), (_, 3, _):
            stored = True
        case (_,), (_, _):
            stored = False
        case shapes:
            raise ValueError(
                "a batch is groups (n, 3) with embeddings (n, 3, d), or groups (m,) with "
                f"embeddings (m, d); got {shapes[0]} with {shapes[1]}"
            )
    photos = unit_vectors(embeddings)
    photos = ops.reshape(photos, (-1, photos.shape[-1]))
    group = ops.reshape(groups, (-1,))
    number = ops.arange(ops.shape(photos)[0])
    is_other = ops.not_equal(number[:, None], number[None, :])
    is_negative = ops.not_equal(group[:, None], group[None, :])
    if stored:
        role = number % 3
        partner = number + ops.where(role == ANCHOR, 1, ops.where(role == POSITIVE, -1, 0))
        is_positive = is_other & ops.equal(partner[:, None], number[None, :])
    else:
        partner, is_positive = None, is_other & ops.logical_not(is_negative)
    others = photos
    if memory is not None:
        known, vectors = (ops.convert_to_tensor(kept) for kept in memory)
        differs = ops.not_equal(group[:, None], known[None, :]) & (known >= 0)[None, :]
        is_negative = ops.concatenate([is_negative, differs], axis=1)
        is_positive = ops.concatenate([is_positive, ops.zeros_like(differs)], axis=1)
        others = ops.concatenate([photos, vectors])
    # Rounding may push 2 - 2 cos below 0.
    distances = ops.maximum(2.0 - 2.0 * ops.matmul(photos, ops.transpose(others)), 0.0)
    return Pairs(distances, is_positive, is_negative, partner, photos, group)


def stored_distances(embeddings: Tensor) -> tuple[Tensor, Tensor]:
    """From anchor to positive and to negative of stored triplets, (n, 3, d) -> two float32 (n,)."""
    photos = unit_vectors(embeddings)
    anchor, *others = (photos[:, role] for role in (ANCHOR, POSITIVE, NEGATIVE))
    return tuple(ops.sum(ops.square(anchor - other), axis=-1) for other in others)


def unit_vectors(x: Tensor) -> Tensor:
    """Float32 vectors of unit length along the last axis; the zero vector stays."""
    x = ops.cast(x, "float32")  # 2 - 2 cos would count half precision's rounding as a distance
    return x * ops.rsqrt(ops.maximum(ops.sum(ops.square(x), axis=-1, keepdims=True), 1e-12))


def root(squared: Tensor) -> Tensor:
    """Square root with gradient 0 at 0, where the true gradient is infinite."""
    positive = squared > 0
    return ops.where(positive, ops.sqrt(ops.where(positive, squared, 1.0)), 0.0)


# Only DistanceWeighted uses the state. The name tells miners with equal fields apart where settings
# are written to a file.


@dataclass(frozen=True)
class Stored:
    """The triplets of the rows; shape (n,). A P x K batch raises a ValueError."""

    name: str = field(default="stored", init=False)

    def __call__(self, pairs: Pairs, state: Any = None) -> Triplets:
        if pairs.partner is None:
            raise ValueError(
                'mining "stored" needs stored triplets, not P x K batches: set '
                "pictures_per_landmark=0 in DataSettings, or choose another mining of "
                + ", ".join(name for name in MINERS if name != self.name)
            )
        photos = ops.reshape(pairs.photos, (-1, 3, pairs.photos.shape[-1]))
        group = ops.reshape(pairs.group, (-1, 3))
        exists = ops.not_equal(group[:, ANCHOR], group[:, NEGATIVE])
        return Triplets(*stored_distances(photos), exists)


@dataclass(frozen=True)
class SemiHard:
    """For each positive pair (a, p) the nearest negative beyond the positive; shape (m, p).

        n = argmin d(a, n)   over the negatives with   d(a, n) > d(a, p)

    or the farthest negative if there is none. The hardest, which are nearer than the positive, can
    make an untrained network collapse to one point. Schroff et al., "FaceNet: A Unified Embedding
    for Face Recognition and Clustering", CVPR 2015, section 3.2.
    """

    name: str = field(default="semi-hard", init=False)

    def __call__(self, pairs: Pairs, state: Any = None) -> Triplets:
        positive, others = pairs.at_positives(pairs.distances), pairs.distances[:, None, :]
        beyond = pairs.is_negative[:, None, :] & (others > positive[:, :, None])
        nearest = ops.argmin(ops.where(beyond, others, _BEYOND_ALL), axis=2)
        farthest = ops.argmax(ops.where(pairs.is_negative, pairs.distances, -1.0), axis=1)
        return pairs.with_negatives(ops.where(ops.any(beyond, axis=2), nearest, farthest[:, None]))


@dataclass(frozen=True)
class BatchHard:
    """For each anchor its farthest positive and its nearest negative; shape (m,).

    Hermans et al., "In Defense of the Triplet Loss for Person Re-Identification", 2017, equation 5.
    """

    name: str = field(default="batch-hard", init=False)

    def __call__(self, pairs: Pairs, state: Any = None) -> Triplets:
        return Triplets(
            ops.max(ops.where(pairs.is_positive, pairs.distances, -1.0), axis=1),
            ops.min(ops.where(pairs.is_negative, pairs.distances, _BEYOND_ALL), axis=1),
            pairs.is_anchor,
        )


@dataclass(frozen=True)
class BatchAll:
    """Every anchor with each of its positives and each of its negatives; shape (m, p, m + r).

    Hermans et al. 2017, equation 6. Most triplets soon satisfy the margin, so the loss averages
    over the others (the paper's "batch all, non-zero").
    """

    name: str = field(default="batch-all", init=False)

    def __call__(self, pairs: Pairs, state: Any = None) -> Triplets:
        positive = pairs.at_positives(pairs.distances)[:, :, None]
        exists = pairs.at_positives(pairs.is_positive)[:, :, None] & pairs.is_negative[:, None, :]
        return Triplets(positive, pairs.distances[:, None, :], exists)


@dataclass(frozen=True)
class DistanceWeighted:
    """For each positive pair (a, p) a negative of the anchor, drawn at random; shape (m, p).

    Points spread evenly over the unit sphere of d dimensions have distances D with the density
    q(D) ~ D^(d - 2) * (1 - D^2 / 4)^((d - 3) / 2), which peaks near sqrt(2). The weight 1 / q(D)
    draws all distances equally often; a uniform draw would give almost only easy negatives.
    Wu et al., "Sampling Matters in Deep Embedding Learning", ICCV 2017, section 4, whose code has
    the same defaults. The state is a ``keras.random.SeedGenerator``.

    Attributes:
        nearest: smaller plain distances count as this one. Otherwise the nearest negatives, which
            are mostly label errors, would always be drawn.
        farthest: negatives beyond this plain distance are too easy: they are drawn, uniformly, only
            if the anchor has no others.
    """

    nearest: float = 0.5
    farthest: float = 1.4
    name: str = field(default="distance-weighted", init=False)

    def __post_init__(self):
        if not 0 < self.nearest < self.farthest < 2:
            got = f"{self.nearest} and {self.farthest}"
            raise ValueError(f"0 < nearest < farthest < 2 must hold in mining, got {got}")

    def __call__(self, pairs: Pairs, state: keras.random.SeedGenerator) -> Triplets:
        log_weights = self.log_weights(pairs)
        draws = ops.shape(pairs.at_positives(log_weights))[1]
        return pairs.with_negatives(keras.random.categorical(log_weights, draws, seed=state))

    def log_weights(self, pairs: Pairs) -> Tensor:
        """Logarithms of the weights, float32, not normalized; alike without negatives."""
        dimension = pairs.photos.shape[-1]
        distances = root(ops.stop_gradient(pairs.distances))
        d = ops.clip(distances, self.nearest, self.farthest)
        log_q = (dimension - 2) * ops.log(d) + (dimension - 3) / 2 * ops.log(1.0 - d * d / 4.0)
        within = pairs.is_negative & (distances <= self.farthest)
        may_be_drawn = ops.where(ops.any(within, axis=1)[:, None], within, pairs.is_negative)
        return ops.where(may_be_drawn, -log_q, NOTHING)


Miner = Stored | SemiHard | BatchHard | BatchAll | DistanceWeighted
_ALL = (Stored(), SemiHard(), BatchHard(), BatchAll(), DistanceWeighted())
MINERS: dict[str, Miner] = {miner.name: miner for miner in _ALL}
