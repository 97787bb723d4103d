"""Shows where a search fails, and which parts of a photo make it similar to another.

    table = failure_table(embeddings, labels, names)     # a row for each query, the worst first
    heat = occlusion_heat(engine.embed, photo, engine.embed(other[None])[0])
    picture = overlay(photo[None], heat[None])[0]

Occlusion: Zeiler, Fergus, "Visualizing and Understanding Convolutional Networks", ECCV 2014,
section 4.2, with the similarity to another photo in place of the probability of a class.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import cv2
import numpy as np
import pandas as pd
from matplotlib import colormaps

from lib.evaluation.metrics import average_precision, leave_one_out

HEAT = colormaps["inferno"]


def failure_table(embeddings: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> pd.DataFrame:
    """Search each photo among all others, and list the first right and the first wrong result.

    Args:
        embeddings: float (n, d) of unit norm.
        labels: (n,), the landmark of each photo.

    Returns:
        a row for each photo whose landmark has another photo, indexed by its row of
        ``embeddings``, the lowest AP (average precision) first: name, label; AP; first_hit (rank of
        the first photo of its landmark, from 1); right, wrong (rows of the most similar photo of
        its landmark and of another); right_similarity, wrong_similarity.

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


def occlusion_heat(
    embed: Callable[[np.ndarray], np.ndarray], photo: np.ndarray, target: np.ndarray, grid: int = 8
) -> np.ndarray:
    """Measure how much each part of a photo adds to its similarity to a target.

    A square two cells wide, in the photo's mean colour, covers each cell of a grid in turn. All
    covered photos are embedded in one batch. A part that already has that colour gets heat 0.

    Args:
        embed: from uint8 (n, h, w, 3) to float32 (n, d) of unit norm, such as
            :meth:`lib.network.engine.Engine.embed`.
        photo: uint8 (h, w, 3).
        target: float (d,) of unit norm, the embedding of the other photo.
        grid: cells along each side, from 1 to the shorter one; otherwise a ValueError.

    Returns:
        float32 (grid, grid): the fall of the cosine when the cell is covered; 0 if it rises.
    """
    sides = photo.shape[:2]
    if not 1 <= grid <= min(sides):
        raise ValueError(f"grid must be from 1 to the photo's {min(sides)} pixels, got {grid}")
    colour = photo.reshape(-1, 3).mean(axis=0).round().astype(np.uint8)
    covered = np.repeat(photo[None], grid * grid + 1, axis=0)  # the last one stays uncovered
    for number in range(grid * grid):
        places = zip(divmod(number, grid), sides, strict=True)
        rows, columns = (
            slice(max(round((i - 0.5) * side / grid), 0), round((i + 1.5) * side / grid))
            for i, side in places
        )
        covered[number, rows, columns] = colour
    similarities = np.asarray(embed(covered), np.float32) @ np.asarray(target, np.float32)
    return np.maximum(similarities[-1] - similarities[:-1], 0).reshape(grid, grid)


def overlay(photos: np.ndarray, heat: np.ndarray, opacity: float = 0.6) -> np.ndarray:
    """Lay heat maps over photos, uint8 (n, s, s, 3) RGB, as the result; bright where the heat is.

    Args:
        heat: float (n, h, w), not negative, from :func:`occlusion_heat` or
            :func:`lib.network.pooling.contribution`. Each map is divided by its maximum; a map of
            zeros stays dark.
        opacity: of the heat, from 0 (only the photo) to 1.
    """
    size = photos.shape[1:3]
    pictures = []
    for photo, places in zip(photos, np.asarray(heat, dtype=np.float32), strict=True):
        scaled = places / (places.max() or 1)
        scaled = cv2.resize(scaled, size[::-1], interpolation=cv2.INTER_CUBIC)
        colours = 255 * HEAT(np.clip(scaled, 0, 1))[..., :3]
        pictures.append((1 - opacity) * photo + opacity * colours)
    return np.round(np.stack(pictures)).astype(np.uint8)
