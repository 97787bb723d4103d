"""Whitening of descriptors after training: PCA whitening and the learned whitening Lw.

PCA whitening (Jégou, Chum, "Negative Evidences and Co-occurrences in Image Retrieval: the Benefit
of PCA and Whitening", ECCV 2012) gives descriptors variance 1 in every direction. Lw (Radenović,
Tolias, Chum, "Fine-tuning CNN Image Retrieval with No Human Annotation", TPAMI 2018, "Whitening and
dimensionality reduction") gives variance 1 to the differences between photos of one landmark, which
reduces the influence of light and viewpoint.

    descriptors = projected(head, maps)                  # float32 (n, d), before L2 normalization
    whitening = learn_supervised_whitening(descriptors, labels=labels, dimension=64)
    whitening.apply(descriptors)                         # float32 (n, 64) of unit norm
    head = fold(head, whitening)                         # a head whose embeddings are whitened

Both estimate a covariance S from n samples of d dimensions. If n is not well above d, the smallest
eigenvalues of S are far too small, and whitening would amplify noise. Therefore S is shrunk to
(1 - a) S + a (tr S / d) I. By default a is scikit-learn's OAS estimate (Chen, Wiesel, Eldar, Hero,
"Shrinkage Algorithms for MMSE Covariance Estimation", IEEE TSP 2010), which falls as 1/n;
``shrinkage=0`` is the plain S of the papers.
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
        projection: float64 (d, k), multiplied from the right; the most important columns first.
    """

    mean: np.ndarray
    projection: np.ndarray

    def apply(self, descriptors: np.ndarray) -> np.ndarray:
        """Whiten descriptors: float (n, d) -> float32 (n, k) of unit norm.

        A descriptor equal to the mean gives zeros.

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
        shrinkage: a of the module's docstring, 0 to 1; None: OAS.

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
    the projection is C_S^(-1/2) eig(C_S^(-1/2) C_D C_S^(-1/2)). As in the authors' code, C_D is
    approximated by the covariance of all descriptors, since nearly all pairs do not match.

    Args:
        descriptors: float (n, d), n >= 2.
        labels: (n,), photos of equal label match. A pair of a label with r photos has the weight
            2/r, so the weight of a landmark grows with r, not with its square.
        dimension: how many axes to keep, those along which non-matching photos differ most compared
            with matching ones; None: all d.
        shrinkage: a of the module's docstring, for C_S, 0 to 1; None: OAS.

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
    """Helmert contrasts, which represent all pairs of a label with r photos by r - 1 differences.

    Each is a photo minus the mean of the i photos of its label before it, times sqrt(2i / (i + 1)).
    Their outer products sum to those of all pairs of the label times 2/r. They are uncorrelated, as
    OAS assumes. Two photos give their own difference.
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
    # Centred within labels, the running sums stay small and exact.
    photos = descriptors[order]
    photos = photos - np.repeat(np.add.reduceat(photos, starts) / counts[:, None], counts, axis=0)
    before = np.cumsum(photos, axis=0) - photos  # each label sums to zero, so sums restart
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
    """The shrunk covariance of samples (n, d) of mean zero."""
    if shrinkage is None:
        # One sample shrinks fully. So do equal variances, where rounding may take OAS beyond 1.
        share = oas(samples, assume_centered=True)[1] if len(samples) > 1 else 1.0
        shrinkage = share if 0 <= share <= 1 else 1.0
    elif not 0 <= shrinkage <= 1:
        raise ValueError(f"shrinkage must be from 0 to 1, got {shrinkage}")
    return shrunk_covariance(samples.T @ samples / len(samples), shrinkage)


def _inverse_root(covariance: np.ndarray, dimension: int) -> np.ndarray:
    """The map (d, dimension) to variance 1 along the largest axes of a covariance (d, d)."""
    variances, axes = np.linalg.eigh(covariance)
    variances, axes = variances[::-1], axes[:, ::-1]
    # Descriptors are float32: a standard deviation below 1e-5 of the largest is rounding.
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

    A whitening has to be learned from these, not from embeddings, to be folded into the head.
    """
    until_norm = keras.Model(head.inputs, head.get_layer("l2_normalization").input)
    return np.asarray(until_norm.predict(maps, batch_size=batch_size, verbose=0), np.float32)


def fold(model: keras.Model, whitening: Whitening) -> keras.Model:
    """Build a whitening into the projection of a head, at no cost when embedding.

    Projection, centring and whitening are affine, so one dense layer with a bias replaces them.

    Args:
        model: a head, or a tower with such a head.
        whitening: learned from :func:`projected` of that head.

    Returns:
        a new head or tower whose embeddings are ``whitening.apply(projected(head, maps))``, up to
        the rounding of a projection in half precision (the new one computes in float32). It shares
        pooling and trunk with ``model``, which stays as it is.

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
