"""Local features of photos: points that are found again in other photos, each with a descriptor.

    features = local_features(photo)             # of a photo, uint8 (h, w, 3)
    features.points, features.descriptors        # float32 (m, 2), uint8 (m, 128)

    rows, names, skipped = embed_job(LocalFeatures(), photos_below(Path("my photos")), Path("out"))
    features = unpacked(rows[0])

The points are SIFT's extrema of differences of Gaussians (Lowe, "Distinctive Image Features from
Scale-Invariant Keypoints", IJCV 2004), the descriptors RootSIFT: the square root of SIFT's shares,
so that the inner product compares histograms by Hellinger's kernel (Arandjelović, Zisserman, "Three
Things Everyone Should Know to Improve Object Retrieval", CVPR 2012).

:func:`lib.search.embedding.embed_job` stores them like descriptors, one row a photo: unchanged
photos keep theirs. A row has ROW_BYTES, 132 kB, whatever it holds, so that any row is found at
once; a million photos take 132 GB.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import cv2
import numpy as np

LONGEST = 640  # longer side in pixels of the photos that features are found in, at most
MOST = 1000  # features of a photo: those of highest contrast
_CONTRAST = 0.02  # SIFT's own is 0.04; walls have little
_DIMENSION = 128
_SCALE = 512  # of a descriptor's square roots, of which hardly any is above a half
_STEPS = 64  # of a point's coordinates in a pixel

_HEADER = 6  # bytes: count, width and height
ROW_BYTES = _HEADER + MOST * (4 + _DIMENSION)


class Features(NamedTuple):
    """The local features of a photo; none if it is plain.

    Attributes:
        points: float32 (m, 2), x and y in pixels of a picture of ``size``; m is at most MOST.
        descriptors: uint8 (m, 128), RootSIFT times 512.
        size: width and height in pixels of the picture that they were found in.
    """

    points: np.ndarray
    descriptors: np.ndarray
    size: tuple[int, int]


def local_features(photo: np.ndarray) -> Features:
    """Find the local features of a photo, uint8 (h, w, 3) RGB; thread-safe.

    A photo above LONGEST pixels is shrunk first.
    """
    height, width = photo.shape[:2]
    scale = LONGEST / max(height, width)
    if scale < 1:
        width, height = (max(1, round(side * scale)) for side in (width, height))
        photo = cv2.resize(photo, (width, height), interpolation=cv2.INTER_AREA)
    grey = cv2.cvtColor(np.ascontiguousarray(photo), cv2.COLOR_RGB2GRAY)
    sift = cv2.SIFT_create(nfeatures=MOST, contrastThreshold=_CONTRAST)
    found, descriptors = sift.detectAndCompute(grey, None)
    if descriptors is None:
        descriptors = np.empty((0, _DIMENSION), np.float32)
    # Equal contrasts may give more than MOST.
    points = np.array([point.pt for point in found[:MOST]], np.float32).reshape(-1, 2)
    return Features(points, _root(descriptors[:MOST]), (width, height))


def _root(sift: np.ndarray) -> np.ndarray:
    """RootSIFT of SIFT descriptors, float32 (m, 128), as uint8."""
    shares = sift / np.maximum(sift.sum(axis=1, keepdims=True), 1e-9)
    return np.minimum(np.rint(_SCALE * np.sqrt(shares)), 255).astype(np.uint8)


def packed(features: Features) -> np.ndarray:
    """A photo's features as one row, uint8 (ROW_BYTES,)."""
    row = np.zeros(ROW_BYTES, np.uint8)
    m = len(features.points)
    row[:_HEADER] = np.array([m, *features.size], "<u2").view(np.uint8)
    points = np.rint(features.points * _STEPS).clip(0, 65535).astype("<u2")
    row[_HEADER : _HEADER + 4 * m] = points.view(np.uint8).ravel()
    start = _HEADER + 4 * MOST
    row[start : start + _DIMENSION * m] = features.descriptors.ravel()
    return row


def unpacked(row: np.ndarray) -> Features:
    """The features of a row from :func:`packed`."""
    m, width, height = np.asarray(row[:_HEADER]).view("<u2").tolist()
    points = np.asarray(row[_HEADER : _HEADER + 4 * m]).view("<u2").reshape(-1, 2)
    start = _HEADER + 4 * MOST
    descriptors = np.asarray(row[start : start + _DIMENSION * m]).reshape(-1, _DIMENSION)
    return Features(points.astype(np.float32) / _STEPS, descriptors, (width, height))


@dataclass(frozen=True)
class LocalFeatures:
    """Finds local features where an :class:`lib.network.engine.Engine` computes descriptors."""

    threads: int | None = None  # None: as many as there are cores

    task: ClassVar = "local features"
    image_size: ClassVar = LONGEST
    squashes: ClassVar = False
    dimension: ClassVar = ROW_BYTES
    dtype: ClassVar = np.dtype(np.uint8)
    fingerprint: ClassVar = f"RootSIFT, {MOST} of contrast {_CONTRAST} in {LONGEST} pixels"
    name: ClassVar = "opencv " + cv2.__version__.partition(".")[0]

    def embed(self, photos: Sequence[np.ndarray]) -> np.ndarray:
        """Rows of the features of n photos, uint8 (n, ROW_BYTES)."""
        before = cv2.getNumThreads()
        cv2.setNumThreads(1)  # OpenCV would take all cores in each thread
        try:
            with ThreadPoolExecutor(self.threads or os.cpu_count()) as threads:
                rows = list(threads.map(lambda photo: packed(local_features(photo)), photos))
        finally:
            cv2.setNumThreads(before)
        return np.array(rows, np.uint8).reshape(-1, ROW_BYTES)
