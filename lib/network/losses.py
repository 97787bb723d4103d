"""Metric-learning losses and minings over a batch of embeddings, and what to watch in training.

A batch comes in one of two arrangements. Groups are numbers: photos of different groups surely show
different landmarks.

    stored triplets    groups (n, 3), embeddings (n, 3, d): anchor, positive, negative of each row.
                       The one sure positive pair of a row is its anchor and its positive; photos
                       of equal group elsewhere may show one landmark or not, and are neither.
    P x K              groups (m,), embeddings (m, d): photos of equal group show one landmark.

    loss = MetricLoss(LossSettings(loss="triplet", mining="batch-hard", margin=0.3))
    value = loss(groups, embeddings)                          # float32, the mean over the batch
    found, losses = active_triplets(groups, embeddings, 0.3)  # what is left to learn

Both arrangements become the same three (m, m) matrices (:func:`compare`), with the m = 3n photos of
stored triplets row by row; minings and losses are functions of these alone. Every photo that has a
positive is an anchor, so both photos of a stored pair are. An anchor without a positive or without
a negative in the batch contributes nothing.

Embeddings are compared as unit vectors, in float32: |a - b|^2 = 2 - 2 cos(a, b), from 0 (equal)
over 2 (orthogonal) to 4 (opposite), or its root.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

LOSSES = ("triplet", "soft-margin", "infonce", "multi-similarity", "arcface")
MININGS = ("stored", "semi-hard", "batch-hard", "batch-all", "distance-weighted")

ANCHOR, POSITIVE, NEGATIVE = 0, 1, 2

# What stands for "none" in a minimum, a maximum or a sum of exponentials. It is finite, for the
# gradient of an infinity that was masked out is not 0 but NaN.
_BEYOND_ALL = 5.0  # distances end at 4
_NOTHING = -1e9

Tensor = Any  # of Keras' backend, or whatever it takes for one


@dataclass(frozen=True)
class LossSettings:
    """Which loss, and its constants; those that belong to another loss are not used.

    Attributes:
        loss: "triplet" (:func:`margin_loss`), "soft-margin" (:func:`soft_margin_loss`), "infonce",
            "multi-similarity" or "arcface" (the functions of these names).
        mining: of "triplet" and "soft-margin", which triplets of the batch count: "stored" (those
            of the rows), "semi-hard", "batch-hard", "batch-all" or "distance-weighted" (see
            ``*_triplets``).
        margin: of "triplet": by how much a negative must be farther than the positive.
        squared: of "triplet" and "soft-margin": squared Euclidean distances, or plain ones.
        temperature: of "infonce": the smaller, the more the nearest negatives count.
        sampling_nearest, sampling_farthest: of "distance-weighted": plain distances, see
            :func:`sampling_weights`; the values are those of the authors' code.
        ms_alpha, ms_beta, ms_lambda, ms_epsilon: of "multi-similarity".
        arcface_margin, arcface_scale: of "arcface"; the margin is an angle in radians.

    Raises:
        ValueError: an unknown loss or mining, or a constant out of its range.
    """

    loss: str = "infonce"
    mining: str = "semi-hard"
    margin: float = 0.3
    squared: bool = True
    temperature: float = 0.07
    sampling_nearest: float = 0.5
    sampling_farthest: float = 1.4
    ms_alpha: float = 2.0
    ms_beta: float = 50.0
    ms_lambda: float = 1.0
    ms_epsilon: float = 0.1
    arcface_margin: float = 0.5
    arcface_scale: float = 64.0

    def __post_init__(self):
        if self.loss not in LOSSES:
            raise ValueError(f"unknown loss {self.loss!r}; choose one of {', '.join(LOSSES)}")
        if self.mining not in MININGS:
            raise ValueError(f"unknown mining {self.mining!r}; choose one of {', '.join(MININGS)}")
        for name in ("temperature", "ms_alpha", "ms_beta", "arcface_scale"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        if not 0 <= self.arcface_margin < math.pi:
            raise ValueError(
                f"arcface_margin is an angle from 0 to pi in radians, got {self.arcface_margin}"
            )
        if not 0 < self.sampling_nearest < self.sampling_farthest < 2:
            raise ValueError(
                "0 < sampling_nearest < sampling_farthest < 2 must hold, got "
                f"{self.sampling_nearest} and {self.sampling_farthest}"
            )


class Pairs(NamedTuple):
    """What there is to know of every two photos of a batch, (m, m) with the anchors in the rows."""

    distances: Tensor  # float32
    is_positive: Tensor  # bool: surely of one landmark, and not the same photo
    is_negative: Tensor  # bool: surely of different landmarks
    partner: Tensor | None  # int (m,): the only photo that may be a positive; None: all may

    def at_positives(self, matrix: Tensor) -> Tensor:
        """The columns that may hold positives, (m, m) -> (m, p).

        These are all m in a P x K batch, but in one of stored triplets p = 1: what is done for
        every pair and negative then costs m times less.
        """
        if self.partner is None:
            return matrix
        return ops.take_along_axis(matrix, self.partner[:, None], axis=1)


class Triplets(NamedTuple):
    """Triplets of a batch, three tensors of one shape (or that broadcast to one)."""

    positive: Tensor  # float32, distance of anchor and positive
    negative: Tensor  # float32, distance of anchor and negative
    exists: Tensor  # bool: there is such a triplet; elsewhere the distances mean nothing


# --------------------------------------------------------------------------------------------------
# From a batch to its pairs
# --------------------------------------------------------------------------------------------------


def compare(groups: Tensor, embeddings: Tensor, squared: bool = True) -> Pairs:
    """The distances of all photos of a batch, and which of them are positives and negatives.

    Args:
        groups: numbers (n, 3) or (m,), see the module's docstring.
        embeddings: float (n, 3, d) or (m, d), of any precision; their lengths do not matter.
        squared: squared Euclidean distances, or plain ones.

    Returns:
        the (m, m) matrices, m = 3n for stored triplets: photo 3i + r is the one of role r in row i.

    Raises:
        ValueError: shapes that are neither arrangement.
    """
    groups = ops.convert_to_tensor(groups)
    stored = _is_stored(groups, embeddings)
    photos = _unit(embeddings)
    photos = ops.reshape(photos, (-1, photos.shape[-1]))
    group = ops.reshape(groups, (-1,))
    number = ops.arange(ops.shape(photos)[0])
    is_other = _differ(number)
    is_negative = _differ(group)
    if stored:
        role = number % 3
        to_partner = ops.where(role == ANCHOR, 1, ops.where(role == POSITIVE, -1, 0))
        partner = number + to_partner
        is_positive = is_other & ops.equal(partner[:, None], number[None, :])
    else:
        partner, is_positive = None, is_other & ops.logical_not(is_negative)
    # Rounding may push 2 - 2 cos below 0.
    distances = ops.maximum(2.0 - 2.0 * ops.matmul(photos, ops.transpose(photos)), 0.0)
    return Pairs(distances if squared else _root(distances), is_positive, is_negative, partner)


def stored_distances(embeddings: Tensor, squared: bool = True) -> tuple[Tensor, Tensor]:
    """Distances within each stored triplet.

    Args:
        embeddings: float (n, 3, d).
        squared: squared Euclidean distances, or plain ones.

    Returns:
        two float32 (n,): anchor to positive, anchor to negative.
    """
    photos = _unit(embeddings)
    anchor = photos[:, ANCHOR]
    positive, negative = (
        ops.sum(ops.square(anchor - photos[:, role]), axis=-1) for role in (POSITIVE, NEGATIVE)
    )
    return (positive, negative) if squared else (_root(positive), _root(negative))


def _is_stored(groups, embeddings) -> bool:
    """Whether the batch is of stored triplets rather than P x K."""
    shapes = tuple(groups.shape), tuple(embeddings.shape)
    match shapes:
        case (_, 3), (_, 3, _):
            return True
        case (_,), (_, _):
            return False
    raise ValueError(
        f"a batch is groups (n, 3) with embeddings (n, 3, d), or groups (m,) with embeddings "
        f"(m, d); got {shapes[0]} with {shapes[1]}"
    )


def _differ(numbers):
    return ops.not_equal(numbers[:, None], numbers[None, :])


def _unit(x):
    """Float32 vectors of unit length along the last axis; the zero vector stays, with a gradient.

    The tower's embeddings have unit length, but not to float32's precision after a detour through
    half precision, and 2 - 2 cos takes a wrong length for a distance.
    """
    x = ops.cast(x, "float32")
    return x * ops.rsqrt(ops.maximum(ops.sum(ops.square(x), axis=-1, keepdims=True), 1e-12))


def _root(squared):
    """Square root with the gradient 0 at 0, where the true one is infinite."""
    positive = squared > 0
    return ops.where(positive, ops.sqrt(ops.where(positive, squared, 1.0)), 0.0)


def _mean_where(mask, values, axis=None):
    """Mean of the values where the mask holds, 0 where it nowhere does."""
    count = ops.sum(ops.cast(mask, "float32"), axis=axis)
    return ops.sum(ops.where(mask, values, 0.0), axis=axis) / ops.maximum(count, 1.0)


# --------------------------------------------------------------------------------------------------
# Minings: which triplets of a batch count
# --------------------------------------------------------------------------------------------------


def stored_triplets(groups: Tensor, embeddings: Tensor, squared: bool = True) -> Triplets:
    """The triplets of the rows, no mining at all; shape (n,).

    Args:
        groups, embeddings, squared: as for :func:`compare`.

    Raises:
        ValueError: the batch is not one of stored triplets.
    """
    groups = ops.convert_to_tensor(groups)
    if not _is_stored(groups, embeddings):
        raise ValueError(
            'mining "stored" needs batches of stored triplets, groups (n, 3), and got a P x K '
            "batch: set pictures_per_landmark=0 in DataSettings, or choose another mining of "
            f"{', '.join(MININGS[1:])}"
        )
    exists = ops.not_equal(groups[:, ANCHOR], groups[:, NEGATIVE])
    return Triplets(*stored_distances(embeddings, squared), exists)


def semi_hard_triplets(pairs: Pairs) -> Triplets:
    """For each positive pair (a, p) the nearest negative that lies beyond the positive; (m, p).

        n = argmin d(a, n)   over the negatives with   d(a, n) > d(a, p)

    Schroff et al., "FaceNet: A Unified Embedding for Face Recognition and Clustering", CVPR 2015,
    section 3.2. Nearer ones, which the hardest would be, drive an untrained network to map
    everything to one point. Where no negative lies beyond the positive, the farthest is taken.
    """
    positive, others = pairs.at_positives(pairs.distances), pairs.distances[:, None, :]
    beyond = pairs.is_negative[:, None, :] & (others > positive[:, :, None])
    nearest = ops.argmin(ops.where(beyond, others, _BEYOND_ALL), axis=2)
    farthest = ops.argmax(ops.where(pairs.is_negative, pairs.distances, -1.0), axis=1)
    chosen = ops.where(ops.any(beyond, axis=2), nearest, farthest[:, None])
    return _with_negatives(pairs, chosen)


def batch_hard_triplets(pairs: Pairs) -> Triplets:
    """For each anchor its farthest positive and its nearest negative; shape (m,).

        p = argmax d(a, p),   n = argmin d(a, n)

    Hermans et al., "In Defense of the Triplet Loss for Person Re-Identification", 2017, equation 5.
    """
    return Triplets(
        ops.max(ops.where(pairs.is_positive, pairs.distances, -1.0), axis=1),
        ops.min(ops.where(pairs.is_negative, pairs.distances, _BEYOND_ALL), axis=1),
        _is_anchor(pairs),
    )


def all_triplets(pairs: Pairs) -> Triplets:
    """Every anchor with each of its positives and each of its negatives; shape (m, p, m).

    Hermans et al., "In Defense of the Triplet Loss for Person Re-Identification", 2017, equation 6.
    Most of them soon obey the margin: their loss is to be averaged over those that do not (the
    paper's "batch all, non-zero"), or the few that are left drown.
    """
    positive = pairs.at_positives(pairs.distances)[:, :, None]
    exists = pairs.at_positives(pairs.is_positive)[:, :, None] & pairs.is_negative[:, None, :]
    return Triplets(positive, pairs.distances[:, None, :], exists)


def distance_weighted_triplets(
    pairs: Pairs, log_weights: Tensor, seed: keras.random.SeedGenerator
) -> Triplets:
    """For each positive pair (a, p) a negative of the anchor, drawn at random; shape (m, p).

    Args:
        pairs: from :func:`compare`.
        log_weights: float (m, m), see :func:`sampling_weights`.
        seed: the state of the draw.
    """
    draws = ops.shape(pairs.at_positives(log_weights))[1]
    chosen = keras.random.categorical(log_weights, draws, seed=seed)
    return _with_negatives(pairs, chosen)


def sampling_weights(
    distances: Tensor, is_negative: Tensor, dimension: int, nearest: float, farthest: float
) -> Tensor:
    """Logarithm of the weight of each negative in distance-weighted sampling.

    Points spread evenly over the unit sphere of d dimensions lie at a distance D of each other with
    the density

        q(D) ~ D^(d - 2) * (1 - D^2 / 4)^((d - 3) / 2)

    nearly all of them at about the root of 2. Drawn with the weight 1 / q(D), negatives come from
    all distances alike, where a draw at random would give hardly any but easy ones.

    Wu et al., "Sampling Matters in Deep Embedding Learning", ICCV 2017, section 4. Their bound on
    the weight is 1 / q(nearest): without it the very nearest, mostly mistakes of the labels, would
    be drawn always. As in the authors' code none is drawn from beyond ``farthest``, where q falls
    once more and negatives have nothing to teach; an anchor whose negatives all lie there draws
    from them all alike.

    Args:
        distances: float (m, m), plain Euclidean.
        is_negative: bool (m, m).
        dimension: of the embeddings.
        nearest: smaller distances count as this one.
        farthest: see above.

    Returns:
        float32 (m, m), not normalized; all photos have the same in a row without negatives.
    """
    d = ops.clip(ops.stop_gradient(distances), nearest, farthest)
    log_q = (dimension - 2) * ops.log(d) + (dimension - 3) / 2 * ops.log(1.0 - d * d / 4.0)
    within = is_negative & (distances <= farthest)
    may_be_drawn = ops.where(_has(within)[:, None], within, is_negative)
    return ops.where(may_be_drawn, -log_q, _NOTHING)


def _with_negatives(pairs: Pairs, chosen: Tensor) -> Triplets:
    """Each positive pair with the negative that was chosen for it, int (m, p)."""
    return Triplets(
        pairs.at_positives(pairs.distances),
        ops.take_along_axis(pairs.distances, chosen, axis=1),
        pairs.at_positives(pairs.is_positive) & _has(pairs.is_negative)[:, None],
    )


def _is_anchor(pairs: Pairs) -> Tensor:
    """Which photos have a positive and a negative."""
    return _has(pairs.is_positive) & _has(pairs.is_negative)


def _has(mask):
    return ops.any(mask, axis=1)


# --------------------------------------------------------------------------------------------------
# Losses
# --------------------------------------------------------------------------------------------------


def margin_loss(positive: Tensor, negative: Tensor, margin: float) -> Tensor:
    """The triplet loss, for each triplet: max(0, d(a, p) - d(a, n) + margin).

    Schroff et al., "FaceNet: A Unified Embedding for Face Recognition and Clustering", CVPR 2015,
    equation 3, with squared distances; Hermans et al. 2017 prefer plain ones.
    """
    return ops.maximum(positive - negative + margin, 0.0)


def soft_margin_loss(positive: Tensor, negative: Tensor) -> Tensor:
    """The triplet loss without a margin, for each triplet: log(1 + exp(d(a, p) - d(a, n))).

    Hermans et al., "In Defense of the Triplet Loss for Person Re-Identification", 2017, section 2.
    It falls off smoothly and never quite stops pulling.
    """
    return ops.softplus(positive - negative)


def infonce(pairs: Pairs, temperature: float) -> Tensor:
    """Each positive against all negatives of the batch, in one smooth loss.

        log(1 + sum over n of exp((cos(a, n) - cos(a, p)) / t))
            = - log(exp(cos(a, p) / t) / (exp(cos(a, p) / t) + sum over n of exp(cos(a, n) / t)))

    In the first form it is the (N+1)-tuplet loss (Sohn, "Improved Deep Metric Learning with
    Multi-class N-pair Loss Objective", NIPS 2016, equation 5), in the second InfoNCE (van den Oord
    et al., "Representation Learning with Contrastive Predictive Coding", 2018, equation 4) on
    cosines over a temperature t. No negative is chosen and none is lost: each pulls in proportion
    to how close it comes, so the gradient does not die in the plateau at the start, where all
    distances are alike.

    Each positive of an anchor gives one such term; their mean is the anchor's loss. The sum over
    positives stands outside the logarithm, the better way in Khosla et al., "Supervised Contrastive
    Learning", NeurIPS 2020, equation 2 (whose denominators hold the other positives as well).

    Args:
        pairs: from :func:`compare`, squared distances.
        temperature: t; the smaller, the more the nearest negatives count.

    Returns:
        float32, the mean over the anchors.
    """
    logits = (1.0 - pairs.distances / 2.0) / temperature
    of_negatives = _log_sum_exp(logits, pairs.is_negative)[:, None]
    each = _mean_where(pairs.is_positive, ops.softplus(of_negatives - logits), axis=1)
    return _mean_where(_is_anchor(pairs), each)


def multi_similarity(
    pairs: Pairs, alpha: float, beta: float, lambda_: float, epsilon: float
) -> Tensor:
    """Multi-similarity loss, with the mining of pairs that belongs to it.

        1/alpha log(1 + sum over p of exp(-alpha (cos(a, p) - lambda)))
            + 1/beta log(1 + sum over n of exp(beta (cos(a, n) - lambda)))

    over the pairs of each anchor that are hard enough for it:

        cos(a, n) > min over p of cos(a, p) - epsilon,
        cos(a, p) < max over n of cos(a, n) + epsilon

    Wang et al., "Multi-Similarity Loss with General Pair Weighting for Deep Metric Learning", CVPR
    2019, with alpha = 2, beta = 50, lambda = 1 and epsilon = 0.1 (lambda = 0.5 in their code).

    Args:
        pairs: from :func:`compare`, squared distances.
        alpha, beta: how much the hardest positives and negatives outweigh the others.
        lambda_: the cosine that positives are to exceed and negatives to stay below.
        epsilon: how much easier than the hardest pair of the other kind a pair may be.

    Returns:
        float32, the mean over the anchors, those without a hard pair included.
    """
    cosines = 1.0 - pairs.distances / 2.0
    least_positive = ops.min(ops.where(pairs.is_positive, cosines, 2.0), axis=1, keepdims=True)
    most_negative = ops.max(ops.where(pairs.is_negative, cosines, -2.0), axis=1, keepdims=True)
    positives = pairs.is_positive & (cosines < most_negative + epsilon)
    negatives = pairs.is_negative & (cosines > least_positive - epsilon)
    excess = cosines - lambda_
    each = (
        ops.softplus(_log_sum_exp(-alpha * excess, positives)) / alpha
        + ops.softplus(_log_sum_exp(beta * excess, negatives)) / beta
    )
    return _mean_where(_is_anchor(pairs), each)


def arcface(cosines: Tensor, classes: Tensor, margin: float, scale: float) -> Tensor:
    """Softmax over classes, with an angular margin for the right one.

        - log(exp(s cos(theta_y + m)) / (exp(s cos(theta_y + m)) + sum over j != y of
              exp(s cos(theta_j))))

    theta_j is the angle between an embedding and the centre of class j, y the right class.

    Deng et al., "ArcFace: Additive Angular Margin Loss for Deep Face Recognition", CVPR 2019,
    equation 3, with m = 0.5 and s = 64. Where theta_y + m would pass pi and the cosine rise once
    more, cos(theta_y) - m sin(m) stands for it, as in the authors' code: it keeps falling.

    Args:
        cosines: float32 (m, c) of the photos with the centres of the classes.
        classes: int (m,) from 0 to c - 1.
        margin: m in radians, from 0 to pi.
        scale: s.

    Returns:
        float32, the mean over the photos.
    """
    classes = ops.cast(classes, "int32")
    cosine = ops.take_along_axis(cosines, classes[:, None], axis=1)
    # The floor keeps the root's slope finite where the embedding lies on its centre, or opposite.
    sine = ops.sqrt(ops.maximum(1.0 - ops.square(cosine), 1e-9))
    with_margin = ops.where(
        cosine > -math.cos(margin),
        cosine * math.cos(margin) - sine * math.sin(margin),
        cosine - margin * math.sin(margin),
    )
    is_right = ops.equal(ops.arange(cosines.shape[1]), classes[:, None])
    logits = scale * ops.where(is_right, with_margin, cosines)
    return ops.mean(ops.sparse_categorical_crossentropy(classes, logits, from_logits=True))


def _log_sum_exp(values, mask):
    """Along the rows, over the values where the mask holds; very negative where it nowhere does."""
    return ops.logsumexp(ops.where(mask, values, _NOTHING), axis=1)


class MetricLoss(keras.layers.Layer):
    """The mean loss of a batch, chosen by its settings.

    It is a layer for what belongs to a loss besides its equation: the centres of ArcFace's classes,
    a weight (n_groups, d) to be trained along, and the state of the draw of distance-weighted
    sampling. Both start from ``keras.utils.set_random_seed``.

    Args:
        settings: see :class:`LossSettings`.
        n_groups: of "arcface", how many classes there are; groups then go from 0 to n_groups - 1.

    Call arguments:
        groups: numbers (n, 3) or (m,).
        embeddings: float (n, 3, d) or (m, d).

    Returns:
        float32, a scalar; 0 where the batch holds no triplet, pair or anchor that counts.

    Raises:
        ValueError: "arcface" without n_groups; mining "stored" on a P x K batch; shapes that are
            neither arrangement.
    """

    def __init__(self, settings: LossSettings, n_groups: int | None = None, **kwargs):
        # Whatever the policy: the cosines of half precision are too coarse.
        super().__init__(**{"dtype": "float32"} | kwargs)
        if settings.loss == "arcface" and not n_groups:
            raise ValueError(
                'loss "arcface" has a centre for each group: give MetricLoss their number, n_groups'
            )
        self.settings, self.n_groups = settings, n_groups
        self.is_sampling = (
            settings.loss in ("triplet", "soft-margin") and settings.mining == "distance-weighted"
        )
        if self.is_sampling:
            self.seed_generator = keras.random.SeedGenerator()

    def build(self, groups_shape, embeddings_shape):
        if self.settings.loss == "arcface":
            dimension = embeddings_shape[-1]
            self.centres = self.add_weight(
                name="centres",
                shape=(self.n_groups, dimension),
                initializer=keras.initializers.RandomNormal(stddev=dimension**-0.5),
            )

    def call(self, groups, embeddings):
        settings = self.settings
        match settings.loss:
            case "arcface":
                return self._arcface(groups, embeddings)
            case "infonce":
                return infonce(compare(groups, embeddings), settings.temperature)
            case "multi-similarity":
                constants = (settings.ms_alpha, settings.ms_beta)
                constants += (settings.ms_lambda, settings.ms_epsilon)
                return multi_similarity(compare(groups, embeddings), *constants)
        positive, negative, counts = self._mine(groups, embeddings)
        if settings.loss == "triplet":
            each = margin_loss(positive, negative, settings.margin)
        else:
            each = soft_margin_loss(positive, negative)
        if settings.mining == "batch-all":
            counts = counts & (each > 0)
        return _mean_where(counts, each)

    def _mine(self, groups, embeddings) -> Triplets:
        settings = self.settings
        if settings.mining == "stored":
            return stored_triplets(groups, embeddings, settings.squared)
        pairs = compare(groups, embeddings, settings.squared)
        match settings.mining:
            case "semi-hard":
                return semi_hard_triplets(pairs)
            case "batch-hard":
                return batch_hard_triplets(pairs)
            case "batch-all":
                return all_triplets(pairs)
        log_weights = sampling_weights(
            _root(pairs.distances) if settings.squared else pairs.distances,
            pairs.is_negative,
            embeddings.shape[-1],
            settings.sampling_nearest,
            settings.sampling_farthest,
        )
        return distance_weighted_triplets(pairs, log_weights, self.seed_generator)

    def _arcface(self, groups, embeddings):
        groups = ops.convert_to_tensor(groups)
        _is_stored(groups, embeddings)
        photos = ops.reshape(_unit(embeddings), (-1, embeddings.shape[-1]))
        cosines = ops.matmul(photos, ops.transpose(_unit(self.centres)))
        settings = self.settings
        return arcface(
            cosines, ops.reshape(groups, (-1,)), settings.arcface_margin, settings.arcface_scale
        )


# --------------------------------------------------------------------------------------------------
# What to watch: Keras metrics of y_true = groups and y_pred = embeddings, in squared distances. A
# falling loss alone does not show a collapse.
# --------------------------------------------------------------------------------------------------


def positive_distance(y_true: Tensor, y_pred: Tensor) -> Tensor:
    """Mean distance of the positive pairs; falls as the network learns what stays the same."""
    pairs = compare(y_true, y_pred)
    return _mean_where(pairs.is_positive, pairs.distances)


def negative_distance(y_true: Tensor, y_pred: Tensor) -> Tensor:
    """Mean distance of the negative pairs; about 2 for a space that is used well."""
    pairs = compare(y_true, y_pred)
    return _mean_where(pairs.is_negative, pairs.distances)


def triplet_accuracy(y_true: Tensor, y_pred: Tensor) -> Tensor:
    """Share of triplets whose negative is farther than the positive; 0.5 is chance.

    Of the stored ones, or of all that a P x K batch holds.
    """
    y_true = ops.convert_to_tensor(y_true)
    if _is_stored(y_true, y_pred):
        positive, negative, exists = stored_triplets(y_true, y_pred)
    else:
        positive, negative, exists = all_triplets(compare(y_true, y_pred))
    return _mean_where(exists, ops.cast(positive < negative, "float32"))


def active_share_within(margin: float, squared: bool = True) -> Callable[[Tensor, Tensor], Tensor]:
    """A metric: the share of anchors whose hardest triplet violates ``margin``.

    Only these have a gradient in a triplet loss; near 0 the batch has nothing left to teach, and
    stuck at 1 the network has not begun to learn.

    Args:
        margin: of the triplet loss.
        squared: whether the margin is one of squared distances.
    """

    def active_share(y_true, y_pred):
        positive, negative, exists = batch_hard_triplets(compare(y_true, y_pred, squared))
        active = margin_loss(positive, negative, margin) > 0
        return _mean_where(exists, ops.cast(active, "float32"))

    return active_share


def embedding_spread(y_true: Tensor, y_pred: Tensor) -> Tensor:
    """Mean squared distance of the batch's embeddings from their centre, from 0 to 1.

    0 is the collapse to one point; embeddings spread evenly over the sphere reach 1.
    """
    photos = ops.reshape(_unit(y_pred), (-1, y_pred.shape[-1]))
    from_centre = photos - ops.mean(photos, axis=0, keepdims=True)
    return ops.mean(ops.sum(ops.square(from_centre), axis=-1))


def active_triplets(
    groups: Tensor, embeddings: Tensor, margin: float, squared: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """All triplets of a batch that violate the margin, the hardest first.

    Args:
        groups, embeddings, squared: as for :func:`compare`.
        margin: by how much a negative must be farther than the positive.

    Returns:
        int64 (t, 3), the anchor, positive and negative photo of each, as numbers from 0 to m - 1
        (photo 3i + r is the one of role r in row i of stored triplets), and float32 (t,), their
        losses (:func:`margin_loss`), all above 0.
    """
    distances, is_positive, is_negative = map(
        ops.convert_to_numpy, compare(groups, embeddings, squared)[:3]
    )
    anchor, positive = np.nonzero(is_positive)
    losses = distances[anchor, positive][:, None] - distances[anchor] + np.float32(margin)
    pair, negative = np.nonzero(is_negative[anchor] & (losses > 0))
    losses = losses[pair, negative]
    order = np.argsort(-losses, kind="stable")
    triplets = np.stack([anchor[pair], positive[pair], negative], axis=1)
    return triplets[order], losses[order]
