"""Computes baseline descriptors without learning: colour histograms and raw pixels.

descriptors = colour_histogram(photos)        # uint8 (n, h, w, 3) -> float32 (n, 512)
"""

from __future__ import annotations

import numpy as np


def colour_histogram(photos: np.ndarray) -> np.ndarray:
    """Compute the RGB histogram of each photo, uint8 (n, h, w, 3), in 8 x 8 x 8 bins.

    Returns:
        float32 (n, 512) of unit norm: the square roots of the shares of pixels. The inner product
        of two histograms is their Bhattacharyya coefficient.
    """
    red, green, blue = np.moveaxis(photos // 32, -1, 0).astype(np.int64)
    cell = (red * 8 + green) * 8 + blue
    counts = [np.bincount(photo.ravel(), minlength=512) for photo in cell]
    shares = np.reshape(counts, (len(photos), 512)) / max(cell[:1].size, 1)
    return np.sqrt(shares).astype(np.float32)


def raw_pixels(photos: np.ndarray) -> np.ndarray:
    """Centre and normalize the pixels of each photo, so that inner products are correlations.

    uint8 (n, h, w, 3) -> float32 (n, h * w * 3) of unit norm (zeros for a photo of one colour).
    """
    pixels = photos.reshape(len(photos), -1).astype(np.float32)
    pixels -= pixels.mean(axis=1, keepdims=True)
    norms = np.linalg.norm(pixels, axis=1, keepdims=True)
    return np.divide(pixels, norms, out=np.zeros_like(pixels), where=norms > 0)
