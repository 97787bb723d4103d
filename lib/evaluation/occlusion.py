"""What in a photo makes it similar to another one: hide a part of it, and see what is lost.

heat = occlusion_heat(engine.embed, photo, engine.embed(other[None])[0])
picture = overlay(photo[None], heat[None])[0]                   # lib.evaluation.failures

Zeiler, Fergus, "Visualizing and Understanding Convolutional Networks", ECCV 2014, section 4.2: they
hid squares and watched the probability of a class. Here the similarity to another photo is watched.
The network is a function, whatever is in it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np


def occlusion_heat(
    embed: Callable[[np.ndarray], np.ndarray], photo: np.ndarray, target: np.ndarray, grid: int = 8
) -> np.ndarray:
    """How much of the similarity to a target each place of a photo carries.

    A square of two cells' width, in the mean colour of the photo, is laid over each cell of a grid
    in turn. All covered photos are embedded in one batch. A place of an even colour looks the same
    when it is covered, and so carries nothing.

    Args:
        embed: from uint8 (n, s, s, 3) to float32 (n, d) of unit norm, such as
            :meth:`lib.network.engine.Engine.embed`.
        photo: uint8 (s, s, 3).
        target: float (d,) of unit norm, the embedding of the other photo.
        grid: cells along each side, at most s.

    Returns:
        float32 (grid, grid): how far the cosine falls when the cell's surroundings are covered; 0
        where it does not fall.

    Raises:
        ValueError: a grid below 1, or finer than the photo.
    """
    size = len(photo)
    if not 1 <= grid <= size:
        raise ValueError(f"grid must be from 1 to the photo's {size} pixels, got {grid}")
    colour = photo.reshape(-1, 3).mean(axis=0).round().astype(np.uint8)
    covered = np.repeat(photo[None], grid * grid + 1, axis=0)  # the last one stays as it is
    cell = size / grid
    for number in range(grid * grid):
        row, column = divmod(number, grid)
        top, left = (max(round((i - 0.5) * cell), 0) for i in (row, column))
        bottom, right = (round((i + 1.5) * cell) for i in (row, column))
        covered[number, top:bottom, left:right] = colour
    similarities = np.asarray(embed(covered), np.float32) @ np.asarray(target, np.float32)
    return np.maximum(similarities[-1] - similarities[:-1], 0).reshape(grid, grid)
