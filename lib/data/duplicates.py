"""Finds near-duplicates, pictures whose perceptual hashes differ in few bits.

pairs = near_duplicates(catalogue.pictures["perceptual_hash"].to_numpy())
"""

from __future__ import annotations

import imagehash
import numpy as np
from PIL import Image


def perceptual_hash(picture: Image.Image) -> int:
    """The pHash of the library ImageHash: 64 bits, of which few differ if pictures look alike.

    A bit says whether a low frequency of the grey picture is above their median. So 32 bits are
    set, but for a plain picture, many of whose frequencies are equal.
    """
    return int.from_bytes(np.packbits(imagehash.phash(picture).hash).tobytes(), "big")


def near_duplicates(perceptual_hashes: np.ndarray, most: int = 3) -> np.ndarray:
    """Find pairs of pictures whose perceptual hashes differ in at most ``most`` bits.

    Args:
        perceptual_hashes: uint64 (n,), as in a catalogue.
        most: bits that may differ, from 0 to 3.

    Returns:
        int64 (m, 2), pairs (i, j) with i < j, sorted.

    Raises:
        ValueError: ``most`` is not from 0 to 3.
    """
    if not 0 <= most <= 3:
        raise ValueError(f"most must be from 0 to 3, got {most}")
    hashes = np.asarray(perceptual_hashes, dtype=np.uint64)
    pairs = [np.empty((0, 2), np.int64)]
    # If at most 3 bits differ, one of the hash's 4 quarters is equal. So only pictures that share a
    # quarter are compared; sorted by it, they are neighbours.
    for bits in (0, 16, 32, 48):
        quarter = (hashes >> np.uint64(bits)).astype(np.uint16)
        order = np.argsort(quarter, kind="stable")
        distance, first = 1, np.arange(len(hashes))  # places in that order
        while len(first := first[first + distance < len(hashes)]):
            first = first[quarter[order[first]] == quarter[order[first + distance]]]
            a, b = order[first], order[first + distance]
            near = np.bitwise_count(hashes[a] ^ hashes[b]) <= most
            pairs.append(np.stack([a[near], b[near]], axis=1))
            distance += 1
    return np.unique(np.concatenate(pairs), axis=0)
