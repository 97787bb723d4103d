"""Whitening of descriptors after training: PCA whitening and the learned whitening Lw.

PCA whitening (Jégou, Chum, "Negative Evidences and Co-occurrences in Image Retrieval: the Benefit
of PCA and Whitening", ECCV 2012) gives descriptors variance 1 in every direction. Lw (Radenović,
Tolias, Chum, "Fine-tuning CNN Image Retrieval with No Human Annotation", TPAMI 2018, "Whitening and
dimensionality reduction") gives variance 1 to the differences between photos of one landmark.

    whitening = learn_supervised_whitening(descriptors, labels=labels, dimension=64)
    whitening.apply(descriptors)                  # float (n, d) -> float32 (n, 64) of unit norm

Both estimate a covariance S from n samples of d dimensions. If n is not well above d, the smallest
eigenvalues of S are far too small, and whitening would amplify noise. Therefore S is shrunk to
(1 - a) S + a (tr S / d) I, where a is the OAS estimate (Chen, Wiesel, Eldar, Hero, "Shrinkage
Algorithms for MMSE Covariance Estimation", IEEE TSP 2010), which falls as 1/n.
"""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral

import numpy as np
import pandas as pd
from sklearn.covariance import shrunk_covariance
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


def learn_pca_whitening(descriptors: np.ndarray, dimension: int | None = None) -> Whitening:
    """Learn PCA whitening: rotate to the principal axes, divide by the standard deviations.

    Args:
        descriptors: float (n, d), n >= 2.
        dimension: number of axes to keep, those of the largest variance; None: all d.

    Raises:
        ValueError: bad or constant descriptors, or a dimension out of range.
    """
    descriptors = check_array(descriptors, dtype=np.float64, ensure_min_samples=2)
    mean = descriptors.mean(axis=0)
    covariance = _shrunk_covariance(descriptors - mean, len(descriptors))
    return Whitening(mean, _inverse_root(covariance, _dimension(dimension, len(mean))))


def learn_supervised_whitening(
    descriptors: np.ndarray, *, labels: np.ndarray, dimension: int | None = None
) -> Whitening:
    """Learn Lw: whiten the differences of matching pairs, then rotate to the principal axes.

    With C_S the covariance of the differences of matching pairs and C_D that of non-matching ones,
    the projection is C_S^(-1/2) eig(C_S^(-1/2) C_D C_S^(-1/2)). As in the authors' code, C_D is
    approximated by the covariance of all descriptors, since nearly all pairs do not match.

    Args:
        descriptors: float (n, d), n >= 2.
        labels: (n,), photos of equal label match. A pair of a label with r photos has the weight
            2/r, so the weight of a landmark grows with r, not with its square.
        dimension: number of axes to keep, those along which non-matching photos differ most
            compared with matching ones; None: all d.

    Raises:
        ValueError: as :func:`learn_pca_whitening`; no matching pair.
    """
    descriptors, labels = check_X_y(descriptors, labels, dtype=np.float64, ensure_min_samples=2)
    free = len(labels) - len(np.unique(labels))
    if free == 0:
        raise ValueError("no matching pair: no label occurs twice")
    # Over a label with r photos of mean m, the outer products of x_i - x_j of all pairs, times 2/r,
    # sum to twice those of x_i - m of all photos.
    means = pd.DataFrame(descriptors).groupby(labels).transform("mean").to_numpy()
    mean = descriptors.mean(axis=0)
    dimension = _dimension(dimension, len(mean))
    c_s = _shrunk_covariance(np.sqrt(2) * (descriptors - means), free)
    inverse_root = _inverse_root(c_s, len(mean))
    whitened = (descriptors - mean) @ inverse_root
    _, axes = np.linalg.eigh(whitened.T @ whitened / len(whitened))
    return Whitening(mean, inverse_root @ axes[:, ::-1][:, :dimension])


def _dimension(dimension: int | None, available: int) -> int:
    chosen = available if dimension is None else dimension
    return check_scalar(chosen, "dimension", Integral, min_val=1, max_val=available)


def _shrunk_covariance(samples: np.ndarray, n: int) -> np.ndarray:
    """The shrunk covariance of samples of mean zero, with n degrees of freedom."""
    covariance = samples.T @ samples / n
    return shrunk_covariance(covariance, _oas(covariance, n))


def _oas(covariance: np.ndarray, n: int) -> float:
    """As in sklearn.covariance.oas, where n is always the number of samples."""
    d = len(covariance)
    square, squared_mean = np.mean(covariance**2), (np.trace(covariance) / d) ** 2
    spread = (n + 1) * (square - squared_mean / d)  # rounding may take 0 below 0
    return min((square + squared_mean) / spread, 1.0) if spread > 0 else 1.0


def _inverse_root(covariance: np.ndarray, dimension: int) -> np.ndarray:
    """The map (d, dimension) to variance 1 along the largest axes of a covariance (d, d)."""
    variances, axes = np.linalg.eigh(covariance)
    variances, axes = variances[::-1], axes[:, ::-1]
    # Descriptors are float32: a standard deviation below 1e-5 of the largest is rounding.
    rank = int(np.sum(variances > 1e-10 * variances[0]))
    if dimension > rank:
        found = f"only {rank} of {len(variances)} directions have any variance"
        raise ValueError(f"{found}, but {dimension} are to be whitened")
    return axes[:, :dimension] / np.sqrt(variances[:dimension])
