"""Geometric verification: do the local features of two photos lie alike, as on one building?

    matches = match(features, other)                 # tentative: pairs of like descriptors
    found = verify(features, other)                  # those that one homography explains
    found.inliers, found.cells                       # how many, and in how many parts of the photo

Global descriptors tell what looks similar; two photos of one facade are related by a homography,
which can be estimated from the features that both have (Philbin, Chum, Isard, Sivic, Zisserman,
"Object Retrieval with Large Vocabularies and Fast Spatial Matching", CVPR 2007). Features of
different places match, too, but at places that no one homography explains. The estimate is
MAGSAC++ of OpenCV (Barath, Noskova, Ivashechkin, Matas, CVPR 2020), which is deterministic.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import NamedTuple

import cv2
import numpy as np
from threadpoolctl import ThreadpoolController

from lib.search.local_features import Features

MODELS = ("homography", "affine", "fundamental")
RATIO = 0.85  # of the distances to the nearest and the second descriptor, at most (Lowe)
WITHIN = 6.0  # pixels between a feature and where the model puts it, at most
_BREADTH = 0.01  # of the longer side: inliers that lie more narrowly say nothing
GRID = 10  # a photo is parted into GRID x GRID cells
_ROUNDS, _CONFIDENCE = 2000, 0.999  # of the random samples
_LEAST = {"homography": 5, "affine": 4, "fundamental": 9}  # matches: one more than always fit


class Geometry(NamedTuple):
    """How the features of two photos lie to one another.

    Attributes:
        matches: int64 (t, 2), rows of the tentatively matching features of either photo.
        fits: bool (t,), the inliers: those that the model puts within WITHIN pixels.
        model: float64 (3, 3), from points of the first photo to points of the second (fundamental:
            to lines); None if there is none.
        cells: of a grid over either photo, how many hold an inlier; the smaller number, at most
            GRID squared. Many inliers on one poster are in few cells.
    """

    matches: np.ndarray
    fits: np.ndarray
    model: np.ndarray | None
    cells: int

    @property
    def inliers(self) -> int:
        """The number of inliers; 0 without a model."""
        return int(self.fits.sum())


def match(features: Features, other: Features, ratio: float = RATIO) -> np.ndarray:
    """Pairs of features, int64 (t, 2), whose descriptors are each other's nearest.

    Lowe's test drops those that are nearly as near to a second descriptor of the other photo, as
    in rows of equal windows.
    """
    return _match(_unit(features), _unit(other), ratio)


def _unit(features: Features) -> np.ndarray:
    descriptors = features.descriptors.astype(np.float32)
    norms = np.linalg.norm(descriptors, axis=1, keepdims=True)
    return descriptors / np.maximum(norms, 1)  # a descriptor of zeros stays one


def _match(own: np.ndarray, other: np.ndarray, ratio: float) -> np.ndarray:
    if not len(own) or not len(other):
        return np.empty((0, 2), np.int64)
    similarities = own @ other.T
    rows, nearest = np.arange(len(own)), similarities.argmax(axis=1)
    first = similarities[rows, nearest]
    mutual = first >= similarities.max(axis=0)[nearest]
    similarities[rows, nearest] = -1
    second = similarities.max(axis=1)
    # Of unit vectors, the squared distance is 2 - 2 similarity.
    clear = 1 - first < ratio**2 * (1 - second)
    found = np.flatnonzero(mutual & clear)
    return np.stack([found, nearest[found]], axis=1)


def verify(
    features: Features, other: Features, model: str = "homography", ratio: float = RATIO
) -> Geometry:
    """Match two photos and estimate the model that explains most of the matches.

    Any input gives a result; without enough matches, it has no inliers.

    Args:
        model: one of MODELS. A homography relates two views of a plane, or of anything from one
            place; an affine map nearly so, from afar; a fundamental matrix any two views, but it
            binds a point to a line only.
        ratio: see :func:`match`.

    Raises:
        ValueError: an unknown model.
    """
    return _fit(features, other, match(features, other, ratio), model)


def verify_all(
    features: Features, others: Iterable[Features], model: str = "homography"
) -> list[Geometry]:
    """:func:`verify` a photo with many others, on all cores."""
    own = _unit(features)

    def one(other: Features) -> Geometry:
        return _fit(features, other, _match(own, _unit(other), RATIO), model)

    # Products of a thread each: BLAS's own threads would wait for one another, and are several
    # times slower on a busy machine. The limit is the process's, hence one at a time.
    with (
        _LIMIT,
        _blas().limit(limits=1, user_api="blas"),
        ThreadPoolExecutor(os.cpu_count()) as threads,
    ):
        return list(threads.map(one, others))


_LIMIT = threading.Lock()
_blas = cache(ThreadpoolController)


def _fit(features: Features, other: Features, matches: np.ndarray, model: str) -> Geometry:
    if model not in MODELS:
        raise ValueError(f"unknown model {model!r}; choose one of {', '.join(MODELS)}")
    a = features.points[matches[:, 0]].astype(np.float64)
    b = other.points[matches[:, 1]].astype(np.float64)
    none = Geometry(matches, np.zeros(len(matches), bool), None, 0)
    if len(matches) < _LEAST[model]:
        return none
    try:
        matrix = _estimate(a, b, model)
    except cv2.error:  # points that determine nothing, as all on a line
        return none
    if matrix is None or matrix.shape != (3, 3) or not np.isfinite(matrix).all():
        return none
    fits = _distances(a, b, matrix, model) <= WITHIN
    if fits.sum() < _LEAST[model]:
        return none
    if min(_breadth(a[fits], features.size), _breadth(b[fits], other.size)) < _BREADTH:
        return none
    cells = min(_cells(a[fits], features.size), _cells(b[fits], other.size))
    return Geometry(matches, fits, matrix, cells)


def _estimate(a: np.ndarray, b: np.ndarray, model: str) -> np.ndarray | None:
    if model == "affine":
        found, _ = cv2.estimateAffine2D(
            *(a, b), None, cv2.RANSAC, WITHIN, maxIters=_ROUNDS, confidence=_CONFIDENCE
        )
        return None if found is None else np.vstack([found, (0, 0, 1)])
    if model == "fundamental":
        return cv2.findFundamentalMat(a, b, cv2.USAC_MAGSAC, WITHIN, _CONFIDENCE, _ROUNDS)[0]
    return cv2.findHomography(
        a, b, cv2.USAC_MAGSAC, WITHIN, maxIters=_ROUNDS, confidence=_CONFIDENCE
    )[0]


def _distances(a: np.ndarray, b: np.ndarray, matrix: np.ndarray, model: str) -> np.ndarray:
    """Distances in pixels of points b, float64 (t, 2), from where the matrix puts points a."""
    at = np.column_stack([a, np.ones(len(a))]) @ matrix.T
    with np.errstate(all="ignore"):  # far points overflow; they don't fit
        if model == "fundamental":
            offset = np.einsum("td,td->t", np.column_stack([b, np.ones(len(b))]), at)
            found = np.abs(offset) / np.linalg.norm(at[:, :2], axis=1)
        else:
            found = np.linalg.norm(at[:, :2] / at[:, 2:] - b, axis=1)
            # A plane is seen from one side: the points that it would turn over don't fit.
            found[at[:, 2] * np.median(at[:, 2]) <= 0] = np.inf
    return np.where(np.isfinite(found), found, np.inf)


def _breadth(points: np.ndarray, size: Sequence[int]) -> float:
    """The smallest standard deviation of points, float64 (m, 2), as a share of the longer side.

    On a line, or at one place, any points fit some model to within the threshold.
    """
    return float(np.sqrt(max(np.linalg.eigvalsh(np.cov(points.T))[0], 0))) / max(size)


def _cells(points: np.ndarray, size: Sequence[int]) -> int:
    """How many cells of the grid hold some of the points, float64 (m, 2), of a picture."""
    places = np.clip((points * GRID / np.array(size)).astype(int), 0, GRID - 1)
    return len(np.unique(places @ (1, GRID)))


def outline(found: Geometry, size: Sequence[int]) -> np.ndarray:
    """Where a homography puts the corners of the first photo, of a size, float64 (4, 2)."""
    width, height = size
    corners = np.array([[0, 0, 1], [width, 0, 1], [width, height, 1], [0, height, 1]])
    at = corners @ found.model.T
    return at[:, :2] / at[:, 2:]
