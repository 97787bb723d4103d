"""Whitening of descriptors after training: PCA whitening and the learned whitening Lw.

PCA whitening (Jégou, Chum, "Negative Evidences and Co-occurrences in Image Retrieval: the Benefit
of PCA and Whitening", ECCV 2012) gives descriptors variance 1 in every direction. Lw (Radenović,
Tolias, Chum, "Fine-tuning CNN Image Retrieval with No Human Annotation", TPAMI 2018, "Whitening and
dimensionality reduction") gives variance 1 to the differences between photos of one landmark, which
reduces the influence of light and viewpoint.

    whitening = learn_supervised_whitening(descriptors, labels=labels, dimension=64)
    whitening.apply(descriptors)                  # float (n, d) -> float32 (n, 64) of unit norm

Both estimate a covariance S from n samples of d dimensions. If n is not well above d, the smallest
eigenvalues of S are far too small, and whitening would amplify noise. Therefore S is shrunk to
(1 - a) S + a (tr S / d) I. By default a is scikit-learn's OAS estimate (Chen, Wiesel, Eldar, Hero,
"Shrinkage Algorithms for MMSE Covariance Estimation", IEEE TSP 2010), which falls as 1/n;
``shrinkage=0`` is the plain S of the papers.
"""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral

import numpy as np
from sklearn.covariance import OAS, shrunk_covariance
from sklearn.utils import check_array, check_scalar, check_X_y


@dataclass(frozen=True, eq=False)
class Whitening:
    """An affine map of descriptors, followed by L2 normalization.

    Attributes:
        mean: float64 (d,), subtracted first.
        projection: float64 (d, k), multiplied from the right; the most important columns first.
    """

    mean: np.ndarray
    projection: np.ndarray

    def keep(self, dimension: int) -> Whitening:
        """The whitening in fewer dimensions: its first columns.

        Raises:
            ValueError: fewer than one, or more than there are.
        """
        dimension = _dimension(dimension, self.projection.shape[1])
        return Whitening(self.mean, self.projection[:, :dimension])

    def apply(self, descriptors: np.ndarray) -> np.ndarray:
        """Whiten descriptors: float (n, d) -> float32 (n, k) of unit norm, or 0 for the mean.

        Raises:
            ValueError: the descriptors are not d-dimensional or not finite.
        """
        descriptors = check_array(descriptors, dtype=np.float64, ensure_min_samples=0)
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
        dimension: how many axes to keep, those of the largest variance; None: all d.
        shrinkage: a of the module's docstring, 0 to 1; None: OAS.

    Raises:
        ValueError: fewer than two descriptors, values that are not finite, a dimension or shrinkage
            out of range, or directions without variance among those kept.
    """
    descriptors = check_array(descriptors, dtype=np.float64, ensure_min_samples=2)
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
        descriptors, shrinkage: as for :func:`learn_pca_whitening`; C_S is shrunk.
        labels: (n,), photos of equal label match. A pair of a label with r photos has the weight
            2/r, so the weight of a landmark grows with r, not with its square.
        dimension: how many axes to keep, those along which non-matching photos differ most compared
            with matching ones; None: all d.

    Raises:
        ValueError: as :func:`learn_pca_whitening`; no matching pair; too few for a shrinkage of 0.
    """
    descriptors, labels = check_X_y(descriptors, labels, dtype=np.float64, ensure_min_samples=2)
    differences = _differences_within_labels(descriptors, labels)
    mean = descriptors.mean(axis=0)
    dimension = _dimension(dimension, len(mean))
    inverse_root = _inverse_root(_covariance(differences, shrinkage), len(mean))
    spread = _covariance((descriptors - mean) @ inverse_root, shrinkage=0)
    _, axes = np.linalg.eigh(spread)
    return Whitening(mean, inverse_root @ axes[:, ::-1][:, :dimension])


def _differences_within_labels(descriptors: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Helmert contrasts: r - 1 uncorrelated rows stand for all pairs of a label with r photos."""
    # Each is a photo minus the mean of the i photos of its label before it, times
    # sqrt(2i / (i + 1)). Their outer products sum to those of all pairs of the label times 2/r.
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


def _dimension(dimension: int | None, available: int) -> int:
    chosen = available if dimension is None else dimension
    return check_scalar(chosen, "dimension", Integral, min_val=1, max_val=available)


def _covariance(samples: np.ndarray, shrinkage: float | None) -> np.ndarray:
    """The shrunk covariance of samples (n, d) of mean zero."""
    if shrinkage is None:
        # One sample shrinks fully. So do equal variances, where rounding may take OAS beyond 1.
        oas = OAS(store_precision=False, assume_centered=True)
        share = oas.fit(samples).shrinkage_ if len(samples) > 1 else 1.0
        shrinkage = share if 0 <= share <= 1 else 1.0
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
