"""Computes baseline descriptors without learning: colour histograms and raw pixels.

descriptors = colour_histogram(photos)        # uint8 (n, h, w, 3) -> float32 (n, 512)
"""

from __future__ import annotations

import numpy as np


def colour_histogram(photos: np.ndarray, bins: int = 8) -> np.ndarray:
    """Compute the joint RGB histogram of each photo.

    Args:
        photos: uint8 (n, h, w, 3).
        bins: per channel.

    Returns:
        float32 (n, bins**3) of unit norm: the square roots of the shares of pixels. The inner
        product of two histograms is their Bhattacharyya coefficient.
    """
    level = photos.astype(np.int64) * bins // 256
    cell = (level[..., 0] * bins + level[..., 1]) * bins + level[..., 2]
    counts = [np.bincount(photo.ravel(), minlength=bins**3) for photo in cell]
    shares = np.reshape(counts, (len(photos), bins**3)) / max(cell[:1].size, 1)
    return np.sqrt(shares).astype(np.float32)


def raw_pixels(photos: np.ndarray) -> np.ndarray:
    """Centre and normalize the pixels of each photo, so that inner products are correlations.

    Args:
        photos: uint8 (n, h, w, 3).

    Returns:
        float32 (n, h * w * 3) of unit norm (zeros for a photo of one colour).
    """
    pixels = photos.reshape(len(photos), -1).astype(np.float32)
    pixels -= pixels.mean(axis=1, keepdims=True)
    norms = np.linalg.norm(pixels, axis=1, keepdims=True)
    return np.divide(pixels, norms, out=np.zeros_like(pixels), where=norms > 0)
