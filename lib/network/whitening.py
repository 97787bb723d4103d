"""Whitening of descriptors after training: PCA whitening and the learned whitening Lw.

A whitening is a linear map, learned without gradients. PCA whitening (Jégou, Chum, "Negative
Evidences and Co-occurrences in Image Retrieval: the Benefit of PCA and Whitening", ECCV 2012) gives
descriptors variance 1 in every direction. The learned whitening Lw (Radenović, Tolias, Chum,
"Fine-tuning CNN Image Retrieval with No Human Annotation", TPAMI 2018, "Whitening and
dimensionality reduction") gives it to the differences between photos of one landmark, and so turns
down what varies with light and viewpoint.

    descriptors = projected(head, maps)                  # float32 (n, d), before L2 normalization
    whitening = learn_supervised_whitening(descriptors, labels=labels, dimension=64)
    whitening.apply(descriptors)                         # float32 (n, 64) of unit norm
    head = fold(head, whitening)                         # a head whose embeddings are whitened

Both estimate a covariance S from n samples of d dimensions. If n is near d or below, the smallest
eigenvalues of S are far too small, and a whitening would amplify noise. Therefore S is shrunk to
(1 - a) S + a (tr S / d) I. By default the share a is the OAS estimate (Chen, Wiesel, Eldar, Hero,
"Shrinkage Algorithms for MMSE Covariance Estimation", IEEE TSP 2010) of scikit-learn, which fades
as 1/n; ``shrinkage=0`` is the plain S of the papers.
"""

from __future__ import annotations

from dataclasses import dataclass

import keras
import numpy as np
from keras import ops
from sklearn.covariance import oas, shrunk_covariance


@dataclass(frozen=True, eq=False)
class Whitening:
    """An affine map of descriptors, followed by L2 normalization.

    Attributes:
        mean: float64 (d,), subtracted first.
        projection: float64 (d, k), multiplied from the right; its columns come in falling order of
            importance.
    """

    mean: np.ndarray
    projection: np.ndarray

    def apply(self, descriptors: np.ndarray) -> np.ndarray:
        """Whiten descriptors: float (n, d) -> float32 (n, k) of unit norm.

        A descriptor equal to the mean has no direction and gives zeros.

        Raises:
            ValueError: the descriptors are not d-dimensional or not finite.
        """
        descriptors = _checked(descriptors)
        if descriptors.shape[1] != len(self.mean):
            raise ValueError(
                f"the whitening is for descriptors of {len(self.mean)} dimensions, "
                f"got {descriptors.shape[1]}"
            )
        whitened = (descriptors - self.mean) @ self.projection
        norms = np.linalg.norm(whitened, axis=1, keepdims=True)
        return np.divide(whitened, norms, out=whitened, where=norms > 0).astype(np.float32)


def learn_pca_whitening(
    descriptors: np.ndarray, dimension: int | None = None, shrinkage: float | None = None
) -> Whitening:
    """Learn PCA whitening: rotate to the principal axes, divide by the standard deviations.

    Args:
        descriptors: float (n, d), n >= 2.
        dimension: how many principal axes to keep, those of the largest variance; None: all d.
        shrinkage: share of the covariance replaced by its average, 0 to 1; None: OAS (see above).

    Raises:
        ValueError: fewer than two descriptors, values that are not finite, a dimension or shrinkage
            out of range, or directions without variance among those kept.
    """
    descriptors = _checked(descriptors, at_least=2)
    mean = descriptors.mean(axis=0)
    covariance = _covariance(descriptors - mean, shrinkage)
    return Whitening(mean, _inverse_root(covariance, _dimension(dimension, len(mean))))


def learn_supervised_whitening(
    descriptors: np.ndarray,
    *,
    labels: np.ndarray,
    dimension: int | None = None,
    shrinkage: float | None = None,
) -> Whitening:
    """Learn Lw: whiten the differences of matching pairs, then rotate to the principal axes.

    With C_S the covariance of the differences of matching pairs and C_D that of non-matching ones,
    the projection is C_S^(-1/2) eig(C_S^(-1/2) C_D C_S^(-1/2)). As in the authors' code the
    covariance of all descriptors stands for C_D: nearly all pairs of photos do not match.

    Args:
        descriptors: float (n, d), n >= 2.
        labels: (n,), photos of equal label match. A pair of a label with r photos weighs 2/r, so
            that a landmark counts by its photos, not by their square.
        dimension: how many axes to keep, those along which non-matching photos differ most compared
            with matching ones; None: all d.
        shrinkage: share of C_S replaced by its average, 0 to 1; None: OAS (see above).

    Raises:
        ValueError: fewer than two descriptors, no matching pair, values that are not finite, a
            dimension or shrinkage out of range, or too few pairs for a shrinkage of 0.
    """
    descriptors = _checked(descriptors, at_least=2)
    differences = _differences_within_labels(descriptors, np.asarray(labels))
    mean = descriptors.mean(axis=0)
    dimension = _dimension(dimension, len(mean))
    inverse_root = _inverse_root(_covariance(differences, shrinkage), len(mean))
    spread = _covariance((descriptors - mean) @ inverse_root, shrinkage=0)
    _, axes = np.linalg.eigh(spread)
    return Whitening(mean, inverse_root @ axes[:, ::-1][:, :dimension])


def _differences_within_labels(descriptors: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Differences that stand for all pairs within each label, one fewer than it has photos.

    These are Helmert contrasts: each photo less the mean of the i photos of its label before it,
    times sqrt(2i / (i + 1)). The sum of their outer products is that of all pairs of the label
    times 2/r, and like the differences of separate pairs they are uncorrelated, which the estimate
    of the shrinkage takes for granted. With two photos it is the pair's own difference.
    """
    if labels.shape != (len(descriptors),):
        raise ValueError(
            f"there must be one label for each of the {len(descriptors)} descriptors, "
            f"got the shape {labels.shape}"
        )
    order = np.argsort(labels, kind="stable")
    _, starts, counts = np.unique(labels[order], return_index=True, return_counts=True)
    if counts.max() < 2:
        raise ValueError("no matching pair: no label occurs twice")
    # Centred within labels: the running sums stay small and lose no digits.
    photos = descriptors[order]
    photos = photos - np.repeat(np.add.reduceat(photos, starts) / counts[:, None], counts, axis=0)
    before = np.cumsum(photos, axis=0) - photos  # the labels sum to zero, so each starts afresh
    i = (np.arange(len(photos)) - np.repeat(starts, counts))[:, None]
    has_earlier = i[:, 0] > 0
    i = i[has_earlier]
    return np.sqrt(2 * i / (i + 1)) * (photos[has_earlier] - before[has_earlier] / i)


def _checked(descriptors: np.ndarray, at_least: int = 0) -> np.ndarray:
    descriptors = np.asarray(descriptors, dtype=np.float64)
    if descriptors.ndim != 2:
        raise ValueError(f"descriptors must be (n, d), got the shape {descriptors.shape}")
    if len(descriptors) < at_least:
        raise ValueError(
            f"a whitening is learned from at least {at_least} descriptors, got {len(descriptors)}"
        )
    if not np.isfinite(descriptors).all():
        raise ValueError("descriptors must be finite, but some are NaN or infinite")
    return descriptors


def _dimension(dimension: int | None, available: int) -> int:
    if dimension is None:
        return available
    if not 1 <= dimension <= available:
        raise ValueError(
            f"dimension must be from 1 to the {available} of the descriptors, got {dimension}"
        )
    return dimension


def _covariance(samples: np.ndarray, shrinkage: float | None) -> np.ndarray:
    """The covariance of samples (n, d) of mean zero, a share of it replaced by its average."""
    if shrinkage is None:
        # Of one sample OAS takes the average alone, as of equal variances, where rounding may let
        # the share leave its range.
        share = oas(samples, assume_centered=True)[1] if len(samples) > 1 else 1.0
        shrinkage = share if 0 <= share <= 1 else 1.0
    elif not 0 <= shrinkage <= 1:
        raise ValueError(f"shrinkage must be from 0 to 1, got {shrinkage}")
    return shrunk_covariance(samples.T @ samples / len(samples), shrinkage)


def _inverse_root(covariance: np.ndarray, dimension: int) -> np.ndarray:
    """(d, dimension), which gives data of that covariance variance 1 along its largest axes."""
    variances, axes = np.linalg.eigh(covariance)
    variances, axes = variances[::-1], axes[:, ::-1]
    # A deviation below 1e-5 of the largest is rounding, for descriptors come in float32.
    rank = int(np.sum(variances > 1e-10 * variances[0]))
    if dimension > rank:
        raise ValueError(
            f"only {rank} of {len(variances)} directions have any variance, but {dimension} are to "
            "be whitened: give more (and different) descriptors, a positive shrinkage, or, with "
            "PCA, a smaller dimension"
        )
    return axes[:, :dimension] / np.sqrt(variances[:dimension])


def projected(head: keras.Model, maps: np.ndarray, batch_size: int = 128) -> np.ndarray:
    """A head's descriptors before their L2 normalization: float (n, h, w, c) -> float32 (n, d).

    A whitening learned from these, not from the embeddings, can be folded into the head.
    """
    until_norm = keras.Model(head.inputs, head.get_layer("l2_normalization").input)
    return np.asarray(until_norm.predict(maps, batch_size=batch_size, verbose=0), np.float32)


def fold(model: keras.Model, whitening: Whitening) -> keras.Model:
    """Build a whitening into the projection of a head, at no cost when embedding.

    Projection, centring and whitening are all affine, so that one dense layer does the three:
    pooling -> projection (with a bias) -> L2 normalization.

    Args:
        model: a head, or a tower with such a head.
        whitening: learned from :func:`projected` of that head.

    Returns:
        a new head or tower whose embeddings are ``whitening.apply(projected(head, maps))``. It
        shares the pooling (and the trunk) with ``model``, which stays as it is. Its projection
        computes in float32; the head's own, if in half precision, differs by that much.

    Raises:
        ValueError: the head is folded already, or the whitening is for other descriptors.
    """
    if model.name != "head":
        head = fold(model.get_layer("head"), whitening)
        maps = model.get_layer("trunk")(model.input)
        return keras.Model(model.input, head(maps), name=model.name)
    d, k = whitening.projection.shape
    names = [layer.name for layer in model.layers]
    if "centring" in names:
        projection, centring = model.get_layer("projection"), model.get_layer("centring")
        kernel = ops.convert_to_numpy(projection.kernel).astype(np.float64)
        mean = ops.convert_to_numpy(centring.moving_mean).astype(np.float64)
        variance = ops.convert_to_numpy(centring.moving_variance).astype(np.float64)
        deviation = np.sqrt(variance + centring.epsilon)
    elif "projection" not in names:  # an embedding of size 0: the pooled maps themselves
        kernel = np.eye(model.get_layer("pooling").output.shape[-1])
        mean, deviation = 0.0, 1.0
    else:
        raise ValueError("the head has no centring: a whitening is folded into it already")
    if kernel.shape[1] != d:
        raise ValueError(
            f"the whitening is for descriptors of {d} dimensions, the head's have "
            f"{kernel.shape[1]}: learn it from projected(head, maps)"
        )
    dense = keras.layers.Dense(k, dtype="float32", name="projection")
    x = dense(model.get_layer("pooling").output)
    dense.set_weights(
        [
            (kernel / deviation) @ whitening.projection,
            (-mean / deviation - whitening.mean) @ whitening.projection,
        ]
    )
    x = keras.layers.UnitNormalization(dtype="float32", name="l2_normalization")(x)
    return keras.Model(model.input, x, name="head")
