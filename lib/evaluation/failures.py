"""Where a search goes wrong: which queries, what took the place of the right photo, and why.

table = failure_table(embeddings, labels, names)     # a row for each query, the worst first
heat = overlay(photos, contribution(maps, p))        # what the network looked at
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
import pandas as pd
from matplotlib import colormaps

from lib.evaluation.metrics import average_precision, leave_one_out

HEAT = colormaps["inferno"]


def failure_table(embeddings: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> pd.DataFrame:
    """Search each photo among all others, and tell what was found first, right and wrong.

    Args:
        embeddings: float (n, d) of unit norm.
        labels: (n,), the landmark of each photo.
        names: of the photos.

    Returns:
        a row for each photo whose landmark has another one, the lowest average precision first, by
        its row of ``embeddings``:

        * name, label;
        * AP: average precision, from 0 to 1;
        * first_hit: rank of the first photo of its landmark, 1 being the best;
        * right, wrong: rows of the most similar photo of its landmark and of another;
        * right_similarity, wrong_similarity: their cosines.

    Raises:
        ValueError: no landmark has two photos, or there is only one landmark.
    """
    labels = np.asarray(labels)
    embeddings = np.asarray(embeddings, dtype=np.float32)
    hits = leave_one_out(embeddings, labels)
    rows = np.flatnonzero(hits.any(axis=1))
    if len(rows) == 0 or hits[rows].all():
        raise ValueError("there must be two landmarks, one of them with two photos")
    similarity = embeddings[rows] @ embeddings.T
    same = labels[rows, None] == labels[None, :]
    right = np.where(same, similarity, -np.inf)
    right[np.arange(len(rows)), rows] = -np.inf
    wrong = np.where(same, -np.inf, similarity)
    table = pd.DataFrame(
        {
            "name": np.asarray(names)[rows],
            "label": labels[rows],
            "AP": average_precision(hits[rows]),
            "first_hit": hits[rows].argmax(axis=1) + 1,
            "right": right.argmax(axis=1),
            "wrong": wrong.argmax(axis=1),
            "right_similarity": right.max(axis=1),
            "wrong_similarity": wrong.max(axis=1),
        },
        index=rows,
    )
    return table.sort_values("AP", kind="stable")


def overlay(photos: np.ndarray, heat: np.ndarray, opacity: float = 0.6) -> np.ndarray:
    """Lay heat maps over photos, bright where the heat is.

    Args:
        photos: uint8 (n, s, s, 3), RGB.
        heat: float (n, h, w), not negative, such as :func:`lib.network.pooling.contribution`; each
            map is scaled by its own largest value.
        opacity: of the heat, from 0 (only the photo) to 1.

    Returns:
        uint8 (n, s, s, 3), RGB.
    """
    size = photos.shape[1:3]
    pictures = []
    for photo, places in zip(photos, np.asarray(heat, dtype=np.float32), strict=True):
        scaled = cv2.resize(places / places.max(), size[::-1], interpolation=cv2.INTER_CUBIC)
        colours = 255 * HEAT(np.clip(scaled, 0, 1))[..., :3]
        pictures.append((1 - opacity) * photo + opacity * colours)
    return np.round(np.stack(pictures)).astype(np.uint8)
