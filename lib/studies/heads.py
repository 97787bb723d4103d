"""Trains heads with or without each fix of the original pipeline.

The faulty parts serve the study :mod:`lib.studies.fixes` alone, which describes each fix.

    trainer = HeadTrainer(maps.shape[1:], frozenset({"loss", "L2 norm"}), 128, 0.1, 0.07)
    trainer.start(None, rng)                                # new weights, a random projection
    trainer.train(maps, groups, batches, learning_rate=1e-3)
    descriptors = trainer.describe(maps)                    # float32 (n, 128)
"""

from __future__ import annotations

import math
from collections.abc import Callable

import keras
import numpy as np
from keras import ops
from scipy.linalg import eigh

from lib.network.losses import InfoNCE, MetricLoss, TripletLoss, margin_loss
from lib.network.mining import ANCHOR, NEGATIVE, POSITIVE, Stored
from lib.network.pooling import make_pooling
from lib.network.tower import Siamese, TowerSettings, build_head


class OriginalTripletLoss(keras.layers.Layer):
    """The triplet loss the original intended: squared Euclidean distances, no L2 norm.

    Args:
        margin: of the triplet loss; its effect depends on the norm of the embeddings.

    Call arguments: those of :class:`lib.network.losses.MetricLoss`, for stored triplets only.
    """

    def __init__(self, margin: float):
        super().__init__()
        self.margin = margin

    def build(self, groups_shape, embeddings_shape):
        pass  # no weights of its own

    def call(self, groups, embeddings):
        anchor, positive, negative = (embeddings[:, r] for r in (ANCHOR, POSITIVE, NEGATIVE))
        return ops.mean(self.of_each(anchor, positive, negative))

    def of_each(self, anchor, positive, negative):
        """Compute the loss of each triplet: three float (t, d) -> (t,)."""
        to_positive, to_negative = (
            ops.sum(ops.square(anchor - other), axis=-1) for other in (positive, negative)
        )
        return margin_loss(to_positive, to_negative, self.margin)


class OriginalLoss(OriginalTripletLoss):
    """The original's loss, as Keras computed it.

    It was written for [anchors, positives, negatives], but Keras calls a loss once per output of a
    model. So ``y_pred[0]``, ``y_pred[1]`` and ``y_pred[2]`` are the first three *photos* of the
    anchors, then of the positives, then of the negatives. Only nine photos of a batch count, and
    none is compared with its own positive or negative. The L2 penalty on the projection's weights
    (Keras' default, 0.01) dominates the loss.

    Args:
        margin: of the triplet loss.
        projection: the layer whose weights are penalized.
    """

    def __init__(self, margin: float, projection: keras.layers.Layer):
        super().__init__(margin)
        self.projection = projection

    def call(self, groups, embeddings):
        penalty = 0.01 * ops.sum(ops.square(self.projection.kernel))
        return ops.sum(self.of_each(*(embeddings[photo] for photo in range(3)))) + penalty


class HeadTrainer:
    """A head and its loss, compiled once and trained many times.

    Args:
        map_shape: (h, w, c) of the feature maps.
        fixes: names from :data:`lib.studies.fixes.FIXES`; only "loss", "L2 norm", "centring", "GeM"
            and "negatives" matter here.
        embedding_size: dimension of the embeddings.
        margin: of the triplet loss.
        temperature: of InfoNCE.
    """

    def __init__(
        self,
        map_shape: tuple[int, int, int],
        fixes: frozenset[str],
        embedding_size: int,
        margin: float,
        temperature: float,
    ):
        self.head = head = _build_head(map_shape, fixes, embedding_size)
        end = head.get_layer("l2_normalization").input if "L2 norm" in fixes else head.output
        self.describer = keras.Model(head.input, end)
        if "loss" not in fixes:
            loss = OriginalLoss(margin, head.get_layer("projection"))
        elif "negatives" in fixes:
            loss = MetricLoss(InfoNCE(temperature))
        elif "L2 norm" in fixes:
            loss = MetricLoss(TripletLoss(margin, mining=Stored()))
        else:
            loss = OriginalTripletLoss(margin)
        self.siamese = Siamese(head, loss)
        # beta_2 of 0.99 averages over 100 steps; Adam's default over 1,000, more than there are.
        self.siamese.compile(keras.optimizers.Adam(beta_2=0.99))
        self.optimizer = self.siamese.optimizer
        self.optimizer.build(self.siamese.trainable_variables)
        self.variables = [*self.siamese.variables, *self.optimizer.variables]
        self.first = [np.array(ops.convert_to_numpy(variable)) for variable in self.variables]

    def start(self, maps: np.ndarray | None, rng: np.random.Generator) -> None:
        """Reset all weights, and initialize the projection by PCA or at random.

        Args:
            maps: float (n, h, w, c) for :func:`start_from_pca`; None: Glorot uniform (Glorot and
                Bengio, 2010), Keras' default.
            rng: of the projection.
        """
        for variable, value in zip(self.variables, self.first, strict=True):
            variable.assign(value)
        if maps is not None:
            start_from_pca(self.head, maps, rng)
        else:
            kernel = self.head.get_layer("projection").kernel
            bound = math.sqrt(6 / sum(kernel.shape))
            kernel.assign(rng.uniform(-bound, bound, kernel.shape))

    def train(
        self, maps: np.ndarray, groups: np.ndarray, batches: np.ndarray, learning_rate: float
    ) -> None:
        """Train on batches of triplets, with cosine decay of the learning rate to 0.

        Args:
            maps: float (n, h, w, c), of all photos.
            groups: int (n,), of all photos.
            batches: int (steps, t, 3), indices of anchor, positive and negative in ``maps``.
            learning_rate: at the first step.
        """
        for step, batch in enumerate(batches):
            falling = (1 + math.cos(math.pi * step / len(batches))) / 2
            self.optimizer.learning_rate = learning_rate * falling
            self.siamese.train_on_batch(maps[batch], groups[batch])

    def describe(self, maps: np.ndarray) -> np.ndarray:
        """Compute descriptors before the L2 norm: float (n, h, w, c) -> float32 (n, d)."""
        return in_parts(self.describer, maps)


def start_from_pca(head: keras.Model, maps: np.ndarray, rng: np.random.Generator) -> None:
    """Initialize a head's projection with the principal axes of the pooled maps.

    A random projection to fewer dimensions loses signal, which few landmarks can't teach it again;
    PCA loses next to nothing (Krähenbühl et al., "Data-dependent Initializations of Convolutional
    Neural Networks", ICLR 2016). A random rotation then spreads the variance over all dimensions;
    otherwise batch normalization would amplify those of small variance.

    Args:
        head: with layers "pooling" and "projection", as from :func:`lib.network.tower.build_head`.
        maps: float (n, h, w, c), feature maps of training photos.
        rng: of the rotation.
    """
    pooling = keras.Model(head.input, head.get_layer("pooling").output)
    x = in_parts(pooling, maps).astype(np.float64)
    kernel = head.get_layer("projection").kernel
    c, d = kernel.shape
    k = min(c, d)
    _, axes = eigh(np.cov(x, rowvar=False), subset_by_index=[c - k, c - 1])  # the k largest
    rotation, _ = np.linalg.qr(rng.normal(size=(d, k)))
    start = axes @ rotation.T
    # The scale of a Glorot start, for which the learning rates were chosen.
    kernel.assign(start * math.sqrt(2 / (c + d)) / start.std())


def _build_head(map_shape: tuple[int, int, int], fixes: frozenset[str], size: int) -> keras.Model:
    pooling = "gem" if "GeM" in fixes else "average"
    if fixes >= {"L2 norm", "centring"}:
        return build_head(map_shape, TowerSettings(embedding_size=size, pooling=pooling))
    maps = keras.Input(map_shape)
    x = make_pooling(pooling)(maps)
    if "L2 norm" in fixes:
        x = keras.layers.Dense(size, use_bias=False, name="projection")(x)
    else:  # the original's
        x = keras.layers.Dense(size, activation="softplus", name="projection")(x)
    if "centring" in fixes:
        x = keras.layers.BatchNormalization(momentum=0.9, center=False, scale=False)(x)
    if "L2 norm" in fixes:
        x = keras.layers.UnitNormalization(name="l2_normalization")(x)
    return keras.Model(maps, x, name="head")


def in_parts(compute: Callable, rows: np.ndarray, size: int = 256) -> np.ndarray:
    """Apply ``compute`` to ``size`` rows at a time."""
    parts = [compute(rows[i : i + size]) for i in range(0, len(rows), size)]
    return np.concatenate([ops.convert_to_numpy(part) for part in parts])
