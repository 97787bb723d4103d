"""Samples synthetic descriptors that resemble real ones, to test an index at any size.

    model = fit(descriptors, landmarks)                    # real ones: float32 (15,275, 512)
    vectors = model.sample(762_000, seed=0)

White noise would not do: in 512 dimensions all of its points are about equally far from each other,
so no index can skip or compress any of them. Real descriptors share a mean, have most of their
variance in a few dimensions, and are clustered by landmark. A sampled descriptor is therefore

    mean_c + between_c^(1/2) z_landmark + spread_landmark * within^(1/2) z_photo

scaled to unit norm. Both z are standard normal. The covariances between and within landmarks are
estimated from the real set (one-way random effects: Searle, Casella, McCulloch, "Variance
Components", 1992, chapter 3). Landmarks form clusters, too, so their means follow a mixture of
components c, found by k-means. Spreads are those of real landmarks; sizes have a Pareto tail.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from sklearn.cluster import KMeans

LARGEST = 10_000  # photos of a landmark, the maximum in Google Landmarks v2
_ROWS = 65_536  # sampled at a time


@dataclass(frozen=True)
class DescriptorModel:
    """A distribution of descriptors: a Gaussian mixture of landmarks, with photos around each.

    Attributes:
        shares: float (c,), the weights of the mixture's components.
        means: float32 (c, d), of the components.
        between: float32 (c, d, d), square roots of the components' covariances.
        within: float32 (d, d), square root of the covariance of a landmark's photos.
        spreads: float32 (m,), the scatter of real landmarks' photos, relative to ``within``.
    """

    shares: np.ndarray
    means: np.ndarray
    between: np.ndarray
    within: np.ndarray
    spreads: np.ndarray

    def sample(self, n: int, seed: int, sizes: np.ndarray | None = None) -> np.ndarray:
        """Draw descriptors.

        Args:
            n: number of descriptors.
            seed: equal arguments give equal descriptors.
            sizes: int (m,), photos of each landmark, at least n in all; None: drawn from a Pareto
                distribution.

        Returns:
            float32 (n, d) of unit norm (zeros if all real ones are), in random order.
        """
        rng = np.random.default_rng(seed)
        if sizes is None:  # one landmark for each photo would be more than enough
            tail = np.floor(5.0 * rng.pareto(1.1, n) + 0.9)
            sizes = 1 + np.minimum(tail, LARGEST - 1).astype(np.int64)
        sizes = sizes[: np.searchsorted(np.cumsum(sizes), n) + 1]
        landmark = rng.permutation(np.repeat(np.arange(len(sizes)), sizes)[:n])
        d = self.means.shape[1]
        component = rng.choice(len(self.shares), len(sizes), p=self.shares)
        centres = np.empty((len(sizes), d), np.float32)
        for c, (mean, root) in enumerate(zip(self.means, self.between, strict=True)):
            rows = np.flatnonzero(component == c)
            centres[rows] = rng.standard_normal((len(rows), d), np.float32) @ root + mean
        spread = rng.choice(self.spreads, len(sizes))
        vectors = np.empty((n, d), np.float32)
        for start in range(0, n, _ROWS):
            block, which = vectors[start : start + _ROWS], landmark[start : start + _ROWS]
            block[:] = rng.standard_normal(block.shape, np.float32) @ self.within
            block *= spread[which, None]
            block += centres[which]
            norms = np.linalg.norm(block, axis=1, keepdims=True)
            np.divide(block, norms, out=block, where=norms > 0)
        return vectors


def fit(descriptors: np.ndarray, landmarks: np.ndarray) -> DescriptorModel:
    """Estimate the distribution.

    Args:
        descriptors: float32 (n, d) of unit norm.
        landmarks: int (n,), the landmark of each.

    Raises:
        ValueError: no landmark has two photos.
    """
    x = np.asarray(descriptors, np.float64)
    _, landmark, counts = np.unique(landmarks, return_inverse=True, return_counts=True)
    centres = np.zeros((len(counts), x.shape[1]))
    np.add.at(centres, landmark, x)
    centres /= counts[:, None]
    residuals = x - centres[landmark]
    several = counts > 1
    if not several.any():
        raise ValueError("no landmark has two photos: their scatter is unknown")
    within = residuals.T @ residuals / np.sum(counts - 1)
    scatter = np.bincount(landmark, weights=np.sum(residuals**2, axis=1))[several]
    spreads = np.sqrt(scatter / (counts[several] - 1) / (np.trace(within) or 1))

    components = min(64, max(1, len(centres) // 8))
    component = KMeans(components, n_init=1, random_state=0).fit_predict(centres)
    means, roots = np.empty((components, x.shape[1]), np.float32), []
    for c in range(components):
        inside = component == c
        means[c] = centres[inside].mean(axis=0)
        deviations = centres[inside] - means[c]
        # A landmark's mean, estimated from a few photos, also scatters by their noise.
        noise = within * np.mean(1 / counts[inside])
        roots.append(_root(deviations.T @ deviations / np.sum(inside) - noise))
    return DescriptorModel(
        shares=np.bincount(component, minlength=components) / len(component),
        means=means,
        between=np.stack(roots),
        within=_root(within),
        spreads=spreads.astype(np.float32),
    )


def _root(covariance: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(covariance)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    return root.astype(np.float32)
