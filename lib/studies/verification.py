"""Measures geometric verification: rankings verified to several depths, and how far it reaches.

ranking = verify_ranking(vectors, features, query, (0, 10, 50), shipped_calibration())
ranking.reranked(10)                # the photos, the first 10 in their new order
left = inliers_by_angle(photo)      # {"tilted away": {0: 400, 15: 377, ...}, "turned": ...}
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from time import perf_counter
from typing import NamedTuple

import cv2
import numpy as np

from lib.search.geometry import Geometry, verify, verify_all
from lib.search.local_features import Features, local_features
from lib.search.same_place import Calibration, evidence_of


class Ranking(NamedTuple):
    """A query's ranking, of which the first photos have been verified.

    Attributes:
        order: int64 (n - 1,), the other photos, the most similar first.
        results: of the first of them, down to the largest depth.
        log_odds: float64, of the same photos, that they show the query's place.
        milliseconds: until each depth was reached.
    """

    order: np.ndarray
    results: list[Geometry]
    log_odds: np.ndarray
    milliseconds: list[float]

    def reranked(self, k: int) -> np.ndarray:
        """The order, its first k photos sorted by their log-odds, which must have been verified."""
        return np.r_[self.order[:k][np.argsort(-self.log_odds[:k], kind="stable")], self.order[k:]]


def verify_ranking(
    vectors: np.ndarray,
    features: Sequence[Features],
    query: int,
    depths: Sequence[int],
    calibration: Calibration,
    comparable: bool = True,
) -> Ranking:
    """Rank all other photos by similarity, and verify the first ones.

    Args:
        vectors: float32 (n, d) of unit norm.
        features: of the n photos.
        query: one of them.
        depths: how many photos are verified, from 0 upwards.
        comparable: whether similarities count; they do not unless the vectors are whitened.
    """
    cosine = vectors @ vectors[query]
    order = np.argsort(-cosine, kind="stable")
    order = order[order != query]
    results, milliseconds = [], [0.0]
    for low, high in pairwise(depths):
        start = perf_counter()
        results += verify_all(features[query], [features[row] for row in order[low:high]])
        milliseconds.append(milliseconds[-1] + 1000 * (perf_counter() - start))
    evidence = evidence_of(comparable * cosine[order[: depths[-1]]], results)
    return Ranking(order, results, calibration.log_odds(evidence), milliseconds)


def second_view(photo: np.ndarray, corners: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A photo seen from elsewhere: darker, noisy, and moved by a known homography.

    Args:
        photo: uint8 (h, w, 3).
        corners: float32 (4, 2), where its corners come to lie, from the upper left clockwise.

    Returns:
        the second view, uint8 (h, w, 3), and the homography, float64 (3, 3).
    """
    height, width = photo.shape[:2]
    own = np.array([[0, 0], [width, 0], [width, height], [0, height]], np.float32)
    known = cv2.getPerspectiveTransform(own, corners)
    seen = 0.7 * cv2.warpPerspective(photo, known, (width, height), borderValue=(90, 90, 90))
    seen += np.random.default_rng(0).normal(0, 5, seen.shape)
    return np.clip(seen, 0, 255).astype(np.uint8), known


def inliers_by_angle(photo: np.ndarray, step: int = 15) -> dict[str, dict[int, int]]:
    """Inliers of a photo and itself, tilted away like a wall seen from the side, and turned.

    Returns:
        "tilted away" and "turned" -> degrees -> inliers. What is turned lies in a larger square.
    """
    height, width = photo.shape[:2]
    own, side = local_features(photo), int(np.ceil(np.hypot(height, width)))
    lens = np.array([[width, 0, width / 2], [0, width, height / 2], [0, 0, 1]])
    left: dict[str, dict[int, int]] = {"tilted away": {}, "turned": {}}
    for angle in range(0, 181, step):
        turn = cv2.getRotationMatrix2D((width / 2, height / 2), angle, 1)
        turn[:, 2] += (side - width) / 2, (side - height) / 2
        turned = cv2.warpAffine(photo, turn, (side, side))
        left["turned"][angle] = verify(own, local_features(turned)).inliers
        if angle < 90:
            cos, sin = np.cos(np.deg2rad(angle)), np.sin(np.deg2rad(angle))
            tilt = lens @ [[cos, 0, 0], [0, 1, 0], [sin, 0, 1]] @ np.linalg.inv(lens)
            tilted = cv2.warpPerspective(photo, tilt, (width, height))
            left["tilted away"][angle] = verify(own, local_features(tilted)).inliers
    return left
