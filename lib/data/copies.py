"""Groups the photos of a folder that are copies of one another, or show one scene.

groups = group_copies(contents, perceptual_hashes, descriptors, pixels, near)

The thresholds are for the descriptors of :func:`lib.network.engine.packaged_engine`. Measured by
``python -m benchmarks.duplicates PHOTOS`` on holidays803, 803 photos of 299 landmarks, 256 pixels
wide: each way to copy was done to 200 photos, and all pairs of different photos were compared.

    of 200 copies                  same picture    same picture or scene
    JPEG, quality 90, no EXIF      200             200
    JPEG, quality 50               200             200
    JPEG, quality 20               196             199
    PNG                            199             200
    WebP, quality 80               199             200
    half the size                  200             200
    a quarter of the size          199             199
    10 % brighter                  185             200
    2 % cropped                    122             200
    5 % cropped                     31             200

    of pairs of different photos   same picture    same scene
    884 of one landmark            1               111
    321,119 of two landmarks       0               0

With 6 bits instead of 3, 198 of the 200 photos cropped by 2 % are the same picture, but so are 10
pairs of one landmark, shots of a burst. A photo of a burst must not pass for a copy, so the crops
are left to the scenes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from scipy.sparse import csr_array

from lib.data.duplicates import near_duplicates

KINDS = SAME_BYTES, SAME_PICTURE, SAME_SCENE = ("same bytes", "same picture", "same scene")
HASHED = 64  # longer side in pixels of the pictures that are hashed; pHash itself takes 32
BITS = 3  # of the perceptual hashes of one picture, that differ at most
PICTURE = 0.6  # cosine of the descriptors of one picture, at least
SCENE = 0.93  # cosine of the descriptors of one scene, at least


class Group(NamedTuple):
    """Photos that are alike.

    Attributes:
        kind: one of KINDS.
        members: int64 (m,), rows, at least two: the largest picture, then others that are like it.
    """

    kind: str
    members: np.ndarray


def group_copies(
    contents: np.ndarray,
    perceptual_hashes: np.ndarray,
    descriptors: np.ndarray,
    pixels: np.ndarray,
    near: np.ndarray,
) -> list[Group]:
    """Group n photos by bytes, then what is left by picture, then what is left by scene.

    The largest picture of a group stands for it in the next step, so a photo is in at most one
    group of a kind. All members are like the largest picture: none joins by being like another
    member only.

    Args:
        contents: int (n,), equal numbers for equal bytes.
        perceptual_hashes: uint64 (n,), see :func:`lib.data.duplicates.perceptual_hash`.
        descriptors: float32 (n, d) of unit norm, maybe memory-mapped.
        pixels: int (n,), of each picture; the first of several largest ones counts as the largest.
        near: int (m, 2), the pairs to compare for scenes, such as each photo and its neighbours.

    Returns:
        the groups in the order of KINDS; within a kind, by the largest picture's row.
    """
    stands_for = np.arange(len(contents))
    by_size = np.argsort(-np.asarray(pixels, np.int64), kind="stable")
    groups: list[Group] = []

    def cosines(row: int, others: np.ndarray) -> np.ndarray:
        return descriptors[others] @ descriptors[row]

    def same_bytes(row: int, others: np.ndarray) -> np.ndarray:
        return contents[others] == contents[row]

    def same_picture(row: int, others: np.ndarray) -> np.ndarray:
        near = few_bits_differ(perceptual_hashes[others], perceptual_hashes[row])
        return near & (cosines(row, others) >= PICTURE)

    def same_scene(row: int, others: np.ndarray) -> np.ndarray:
        return cosines(row, others) >= SCENE

    def add(kind: str, pairs: np.ndarray, similar: Callable) -> None:
        rows = by_size[stands_for[by_size] == by_size]
        found = sorted(_like_the_first(rows, pairs, similar), key=lambda members: members[0])
        for members in found:
            groups.append(Group(kind, members))
            stands_for[members] = members[0]

    _, first, inverse = np.unique(contents, return_index=True, return_inverse=True)
    add(SAME_BYTES, np.stack([first[inverse], stands_for], axis=1), same_bytes)
    alone = np.flatnonzero(stands_for == np.arange(len(contents)))
    rich = alone[~are_plain(perceptual_hashes[alone])]
    add(SAME_PICTURE, rich[near_duplicates(perceptual_hashes[rich], BITS)], same_picture)
    # A copy's neighbours are those of the picture that stands for it; twice, as a picture that
    # stands for equal bytes may be a copy itself.
    add(SAME_SCENE, stands_for[stands_for[near]], same_scene)
    return groups


def few_bits_differ(perceptual_hashes: np.ndarray, other: np.uint64) -> np.ndarray:
    """Whether hashes, uint64 (n,), are near enough to another for one picture, bool (n,)."""
    return np.bitwise_count(perceptual_hashes ^ other) <= BITS


def are_plain(perceptual_hashes: np.ndarray) -> np.ndarray:
    """Whether pictures are so plain that their hashes are alike whatever their colour, bool (n,).

    Of the hashes of others, uint64 (n,), half of the bits are set.
    """
    return np.bitwise_count(perceptual_hashes) != 32


def _like_the_first(
    rows: np.ndarray,
    pairs: np.ndarray,
    similar: Callable[[int, np.ndarray], np.ndarray],
) -> list[np.ndarray]:
    """Grow groups along the pairs; all members are similar to their group's first one.

    Each row that is in no group yet begins one. A pair leads from a member to another row, which
    joins if it is similar to the first; so no more than the pairs are compared.

    Args:
        rows: int (r,), in the order in which they begin groups, and in which members are listed.
        pairs: int (m, 2); those with other rows are ignored.
        similar: tells which of other rows, int (k,), are similar to one, bool (k,).
    """
    place = np.full(1 + max(rows.max(initial=-1), pairs.max(initial=-1)), -1)
    place[rows] = np.arange(len(rows))
    a, b = (ends := place[pairs])[(ends >= 0).all(axis=1)].T
    both = np.concatenate([a, b]), np.concatenate([b, a])
    links = csr_array((np.ones(len(both[0]), bool), both), shape=(len(rows), len(rows)))
    free, groups = np.ones(len(rows), dtype=bool), []
    for first in np.unique(both[0]).tolist():
        if not free[first]:
            continue
        free[first] = False
        members, refused, newest = [first], np.empty(0, int), [first]
        while len(newest):
            reached = np.setdiff1d(links[newest].indices, refused)
            reached = reached[free[reached]]
            alike = similar(rows[first], rows[reached])
            newest = reached[alike]
            refused = np.concatenate([refused, reached[~alike]])
            free[newest] = False
            members += newest.tolist()
        if len(members) > 1:
            groups.append(rows[sorted(members)])
    return groups
