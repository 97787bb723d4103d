"""Metric-learning losses over a batch of embeddings, and metrics that watch a training.

    loss = MetricLoss(TripletLoss(margin=0.3, squared=False, mining=BatchHard()))
    loss = MetricLoss(InfoNCE(temperature=0.07))
    value = loss(groups, embeddings)                          # float32, the mean over the batch

:mod:`lib.network.mining` describes the arrangements of a batch, and has the miners.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import keras
from keras import ops

from lib.network.mining import (
    MINERS,
    NOTHING,
    BatchAll,
    BatchHard,
    DistanceWeighted,
    Miner,
    Pairs,
    SemiHard,
    Stored,
    Tensor,
    compare,
    root,
    unit_vectors,
)

# Each loss maps the pairs of a batch to the mean loss, a float32 scalar; 0 with no triplet, pair
# or anchor to average over. The state is what :class:`MetricLoss` keeps for some losses.


def margin_loss(positive: Tensor, negative: Tensor, margin: float | None) -> Tensor:
    """The loss of each triplet: max(0, d(a, p) - d(a, n) + margin); FaceNet (2015), equation 3.

    A margin of None is the soft margin log(1 + exp(d(a, p) - d(a, n))), of Hermans et al. (2017),
    section 2. :mod:`lib.network.mining` has both references in full.
    """
    if margin is None:
        return ops.softplus(positive - negative)
    return ops.maximum(positive - negative + margin, 0.0)


@dataclass(frozen=True)
class TripletLoss:
    """The mean of :func:`margin_loss` over mined triplets; with BatchAll, over the active ones.

    Attributes:
        margin: how much farther than the positive a negative must be; None: the soft margin.
        squared: squared Euclidean distances, as in FaceNet, or plain ones, as in Hermans et al.
        mining: a miner.
    """

    margin: float | None = 0.3
    squared: bool = True
    mining: Miner = field(default_factory=SemiHard)
    name: str = field(default="triplet", init=False)

    def __post_init__(self):
        if not isinstance(self.mining, Miner):
            raise ValueError(f"mining must be a miner such as BatchHard(), got {self.mining!r}")

    def __call__(self, pairs: Pairs, state: Any = None) -> Tensor:
        each, exists = self.of_each(pairs, state)
        if isinstance(self.mining, BatchAll):
            exists = exists & (each > 0)
        return _mean_where(exists, each)

    def of_each(self, pairs: Pairs, state: Any = None) -> tuple[Tensor, Tensor]:
        """The loss of each mined triplet, float32, and whether that triplet exists, bool."""
        positive, negative, exists = self.mining(pairs, state)
        if not self.squared:
            positive, negative = root(positive), root(negative)
        return margin_loss(positive, negative, self.margin), exists


@dataclass(frozen=True)
class InfoNCE:
    """Each positive against all negatives of the batch.

        log(1 + sum over n of exp((cos(a, n) - cos(a, p)) / t))
            = - log(exp(cos(a, p) / t) / (exp(cos(a, p) / t) + sum over n of exp(cos(a, n) / t)))

    The first form is the (N+1)-tuplet loss (Sohn, "Improved Deep Metric Learning with Multi-class
    N-pair Loss Objective", NIPS 2016, equation 5), the second InfoNCE (van den Oord et al.,
    "Representation Learning with Contrastive Predictive Coding", 2018, equation 4) on cosines over
    a temperature t. Near negatives have the largest gradients, which do not vanish when all
    distances are alike. Positives are averaged outside the logarithm, as in Khosla et al.,
    "Supervised Contrastive Learning", NeurIPS 2020, equation 2.

    Attributes:
        temperature: t, above 0; a smaller one gives the nearest negatives more weight.
    """

    temperature: float = 0.07
    name: str = field(default="infonce", init=False)

    def __post_init__(self):
        _check_positive(self, "temperature")

    def __call__(self, pairs: Pairs, state: Any = None) -> Tensor:
        logits = (1.0 - pairs.distances / 2.0) / self.temperature
        of_negatives = _log_sum_exp(logits, pairs.is_negative)[:, None]
        each = _mean_where(pairs.is_positive, ops.softplus(of_negatives - logits), axis=1)
        return _mean_where(pairs.is_anchor, each)


@dataclass(frozen=True)
class MultiSimilarity:
    """Multi-similarity loss, with its own mining of pairs.

        1/alpha log(1 + sum over p of exp(-alpha (cos(a, p) - base)))
            + 1/beta log(1 + sum over n of exp(beta (cos(a, n) - base)))

    over the pairs of each anchor with cos(a, n) > min over p of cos(a, p) - epsilon, and with
    cos(a, p) < max over n of cos(a, n) + epsilon; then the mean over all anchors.

    Wang et al., "Multi-Similarity Loss with General Pair Weighting for Deep Metric Learning", CVPR
    2019 (base is their lambda, 1 in the paper and 0.5 in their code).

    Attributes:
        alpha, beta: above 0; larger ones give the hardest positives and negatives more weight.
        base: the cosine that positives should exceed and negatives stay below.
        epsilon: how much easier than the hardest pair of the other kind a pair may be.
    """

    alpha: float = 2.0
    beta: float = 50.0
    base: float = 1.0
    epsilon: float = 0.1
    name: str = field(default="multi-similarity", init=False)

    def __post_init__(self):
        _check_positive(self, "alpha", "beta")

    def __call__(self, pairs: Pairs, state: Any = None) -> Tensor:
        cosines = 1.0 - pairs.distances / 2.0
        least_positive = ops.min(ops.where(pairs.is_positive, cosines, 2.0), axis=1, keepdims=True)
        most_negative = ops.max(ops.where(pairs.is_negative, cosines, -2.0), axis=1, keepdims=True)
        positives = pairs.is_positive & (cosines < most_negative + self.epsilon)
        negatives = pairs.is_negative & (cosines > least_positive - self.epsilon)
        excess = cosines - self.base
        each = (
            ops.softplus(_log_sum_exp(-self.alpha * excess, positives)) / self.alpha
            + ops.softplus(_log_sum_exp(self.beta * excess, negatives)) / self.beta
        )
        return _mean_where(pairs.is_anchor, each)


@dataclass(frozen=True)
class ArcFace:
    """Softmax over classes, with an angular margin for the right one.

        - log(exp(s cos(theta_y + m)) / (exp(s cos(theta_y + m)) + sum over j != y of
              exp(s cos(theta_j))))

    theta_j is the angle between an embedding and the centre of class j, y the photo's group. Deng
    et al., "ArcFace: Additive Angular Margin Loss for Deep Face Recognition", CVPR 2019, equation
    3. Beyond theta_y + m = pi, where the cosine would rise again, cos(theta_y) - m sin(m) replaces
    it, as in the authors' code. The state is the centres, float32 (c, d).

    Attributes:
        margin: m in radians, from 0 to pi.
        scale: s, above 0.
    """

    margin: float = 0.5
    scale: float = 64.0
    name: str = field(default="arcface", init=False)

    def __post_init__(self):
        if not 0 <= self.margin < math.pi:
            raise ValueError(f"the margin is an angle from 0 to pi in radians, got {self.margin}")
        _check_positive(self, "scale")

    def __call__(self, pairs: Pairs, state: Tensor) -> Tensor:
        classes = ops.cast(pairs.group, "int32")
        cosines = ops.matmul(pairs.photos, ops.transpose(unit_vectors(state)))
        cosine = ops.take_along_axis(cosines, classes[:, None], axis=1)
        # The floor keeps the gradient finite where an embedding equals its centre.
        sine = ops.sqrt(ops.maximum(1.0 - ops.square(cosine), 1e-9))
        with_margin = ops.where(
            cosine > -math.cos(self.margin),
            cosine * math.cos(self.margin) - sine * math.sin(self.margin),
            cosine - self.margin * math.sin(self.margin),
        )
        is_right = ops.equal(ops.arange(cosines.shape[1]), classes[:, None])
        logits = self.scale * ops.where(is_right, with_margin, cosines)
        return ops.mean(ops.sparse_categorical_crossentropy(classes, logits, from_logits=True))


Loss = TripletLoss | InfoNCE | MultiSimilarity | ArcFace


def make_loss(
    name: str, mining: str = "semi-hard", margin: float = 0.3, temperature: float = 0.07
) -> Loss:
    """Build a loss from a name ("soft-margin": triplets with margin None) and its own settings.

    Raises:
        ValueError: a name that is no loss or not in ``MINERS``, or a number out of range.
    """
    if mining not in MINERS:
        raise ValueError(f"unknown mining {mining!r}; choose one of {', '.join(MINERS)}")
    makers = {
        "triplet": lambda: TripletLoss(margin, mining=MINERS[mining]),
        "soft-margin": lambda: TripletLoss(None, mining=MINERS[mining]),
        "infonce": lambda: InfoNCE(temperature),
        "multi-similarity": MultiSimilarity,
        "arcface": ArcFace,
    }
    if name not in makers:
        raise ValueError(f"unknown loss {name!r}; choose one of {', '.join(makers)}")
    return makers[name]()


def check_memory(loss: Loss, memory: int) -> None:
    """Raise a ValueError if the loss can't compare with a memory of so many photos."""
    if memory < 0:
        raise ValueError(f"memory must be at least 0 photos, got {memory}")
    if memory and (isinstance(loss, ArcFace) or isinstance(getattr(loss, "mining", None), Stored)):
        raise ValueError(
            'ArcFace and mining "stored" compare no photo with those of other batches: set '
            "memory=0, or choose another loss or mining"
        )


class MetricLoss(keras.layers.Layer):
    """A loss as a layer, called with groups and embeddings as ``compare`` takes them.

    It keeps ArcFace's centres, a trainable weight (n_groups, d), or the random state of
    distance-weighted mining, both reproducible by ``keras.utils.set_random_seed``.

    With a memory, a call with ``training=True`` compares the batch also with the photos of the
    calls before, as they were embedded then and without a gradient: Wang et al., "Cross-Batch
    Memory for Embedding Learning", CVPR 2020. Here they are negatives only, the photos of the batch
    join them after the comparison, and the memory fills up from the first step on.

    Args:
        n_groups: number of ArcFace's classes; groups then go from 0 to n_groups - 1.
        memory: how many photos to keep, the latest, in non-trainable weights; 0: none.

    Raises:
        ValueError: ArcFace without n_groups; what the miner, ``compare`` or :func:`check_memory`
            refuses.
    """

    def __init__(self, loss: Loss, n_groups: int | None = None, memory: int = 0):
        super().__init__(dtype="float32")  # half precision is too coarse for cosines
        if isinstance(loss, ArcFace) and not n_groups:
            raise ValueError("ArcFace has a centre for each group: give MetricLoss n_groups")
        check_memory(loss, memory)
        self.settings, self.n_groups, self.memory_size = loss, n_groups, memory
        self.centres = self.seed_generator = self.memory = None
        if isinstance(getattr(loss, "mining", None), DistanceWeighted):
            self.seed_generator = keras.random.SeedGenerator()

    def build(self, groups_shape, embeddings_shape):
        if isinstance(self.settings, ArcFace):
            dimension = embeddings_shape[-1]
            self.centres = self.add_weight(
                name="centres",
                shape=(self.n_groups, dimension),
                initializer=keras.initializers.RandomNormal(stddev=dimension**-0.5),
            )
        if size := self.memory_size:
            none = {"initializer": keras.initializers.Constant(-1), "trainable": False}
            self.memory = (
                self.add_weight((size,), dtype="int", name="memory_groups", **none),
                self.add_weight((size, embeddings_shape[-1]), name="memory_photos", **none),
            )

    def call(self, groups, embeddings, training=False):
        state = self.seed_generator if self.centres is None else self.centres
        memory = self.memory if training else None
        pairs = compare(groups, embeddings, memory)
        value = self.settings(pairs, state)
        if memory:
            for kept, new in zip(memory, (pairs.group, pairs.photos), strict=True):
                new = ops.stop_gradient(ops.cast(new, kept.dtype))
                latest = ops.concatenate([new, ops.convert_to_tensor(kept)])
                kept.assign(ops.slice(latest, [0] * len(kept.shape), kept.shape))
        return value


def _check_positive(loss: Loss, *names: str) -> None:
    for name in names:
        if not getattr(loss, name) > 0:
            raise ValueError(f"{name} must be above 0, got {getattr(loss, name)}")


def _log_sum_exp(values, mask):
    """Along the rows, over the values where the mask is True; about -1e9 if it is nowhere."""
    return ops.logsumexp(ops.where(mask, values, NOTHING), axis=1)


def _mean_where(mask, values, axis=None):
    """Mean of the values where the mask is True; 0 if it is nowhere."""
    count = ops.sum(ops.cast(mask, "float32"), axis=axis)
    return ops.sum(ops.where(mask, values, 0.0), axis=axis) / ops.maximum(count, 1.0)


def distillation_loss(embeddings: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared distance of photos, float (..., d), from a teacher's descriptors of them.

    From 0 (equal) to 4. Budnik and Avrithis, "Asymmetric Metric Learning for Knowledge Transfer",
    CVPR 2021, found such a regression as good as more complex losses.
    """
    difference = unit_vectors(embeddings) - unit_vectors(teacher)
    return ops.mean(ops.sum(ops.square(difference), axis=-1))


# Keras metrics of y_true = groups and y_pred = embeddings, in squared distances. They show a
# collapse of the embeddings, which a falling loss alone does not.


def positive_distance(y_true: Tensor, y_pred: Tensor) -> Tensor:
    """Mean distance of the positive pairs; falls as the network learns."""
    pairs = compare(y_true, y_pred)
    return _mean_where(pairs.is_positive, pairs.distances)


def negative_distance(y_true: Tensor, y_pred: Tensor) -> Tensor:
    """Mean distance of the negative pairs; about 2 if embeddings are spread over the sphere."""
    pairs = compare(y_true, y_pred)
    return _mean_where(pairs.is_negative, pairs.distances)


def active_share_of(loss: Loss) -> Callable[[Tensor, Tensor], Tensor]:
    """A metric: the share of anchors whose hardest triplet violates the margin.

    Near 0, the batches are solved; if it stays at 1, the network is not learning. Margin and
    distance are the loss's, or 0.3 and squared.
    """
    margin = loss.margin if isinstance(loss, TripletLoss) and loss.margin is not None else 0.3
    hardest = TripletLoss(margin, getattr(loss, "squared", True), BatchHard())

    def active_share(y_true, y_pred):
        each, exists = hardest.of_each(compare(y_true, y_pred))
        return _mean_where(exists, ops.cast(each > 0, "float32"))

    return active_share


def embedding_spread(y_true: Tensor, y_pred: Tensor) -> Tensor:
    """Mean squared distance of embeddings from their centre: 0 collapsed, 1 evenly spread."""
    photos = ops.reshape(unit_vectors(y_pred), (-1, y_pred.shape[-1]))
    from_centre = photos - ops.mean(photos, axis=0, keepdims=True)
    return ops.mean(ops.sum(ops.square(from_centre), axis=-1))
