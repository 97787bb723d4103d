"""Copies are grouped: by bytes, by picture, by scene."""

import numpy as np

from lib.data.copies import KINDS, SAME_BYTES, SAME_PICTURE, SAME_SCENE, group_copies
from lib.data.duplicates import perceptual_hash

HALF = 0x00000000FFFFFFFF  # 32 bits, as a photo's hash has


def grouped(contents, hashes, angles, pixels, near=()):
    """The groups as lists; a photo's descriptor is an angle, in degrees."""
    turn = np.radians(np.asarray(angles, float))
    descriptors = np.stack([np.cos(turn), np.sin(turn)], axis=1).astype(np.float32)
    near = np.array(near, np.int64).reshape(-1, 2)
    arrays = np.array(contents), np.array(hashes, np.uint64), descriptors, np.array(pixels), near
    return [(kind, members.tolist()) for kind, members in group_copies(*arrays)]


def test_bytes_then_pictures_then_scenes():
    # 0 and 3 have equal bytes; 1 is 0 in a smaller size; 2 is another photo of the scene.
    hashes = [HALF, HALF ^ 0b101 << 31, HALF << 8, HALF]
    near = [[2, 1], [3, 0]]  # 2 was near a copy only
    assert grouped([5, 6, 7, 5], hashes, [0, 9, 20, 0], [9, 4, 9, 9], near) == [
        (SAME_BYTES, [0, 3]),
        (SAME_PICTURE, [0, 1]),
        (SAME_SCENE, [0, 2]),
    ]
    assert KINDS == (SAME_BYTES, SAME_PICTURE, SAME_SCENE)


def test_what_stands_for_equal_bytes_may_be_a_copy_itself():
    # 1 and 2 have equal bytes, 0 is larger; 3 is near 2 only.
    hashes = [HALF, HALF, HALF, HALF << 8]
    assert grouped([5, 6, 6, 7], hashes, [0, 5, 5, 10], [9, 4, 4, 9], [[3, 2]]) == [
        (SAME_BYTES, [1, 2]),
        (SAME_PICTURE, [0, 1]),
        (SAME_SCENE, [0, 3]),
    ]


def test_neither_the_hash_nor_the_descriptor_is_enough():
    assert grouped([0, 1], [HALF, HALF], [0, 80], [1, 1]) == []
    assert grouped([0, 1], [HALF, HALF << 8], [0, 0], [1, 1]) == []
    assert grouped([0, 1], [HALF, HALF], [0, 0], [1, 2]) == [(SAME_PICTURE, [1, 0])]


def test_plain_pictures_are_never_the_same_picture():
    from PIL import Image

    hashes = [perceptual_hash(Image.new("RGB", (32, 32), c)) for c in ("navy", "teal")]
    assert hashes[0] == hashes[1] and hashes[0].bit_count() != 32
    assert grouped([0, 1], hashes, [0, 0], [1, 1]) == []


def test_scenes_are_no_chains():
    # Each photo is like the next one, 20 degrees on; the largest is in the middle.
    angles, near = [0, 20, 40, 60, 80], [[i, i + 1] for i in range(4)]
    hashes = [HALF << i for i in range(0, 30, 6)]
    found = grouped(range(5), hashes, angles, [1, 1, 2, 1, 1], near)
    assert found == [(SAME_SCENE, [2, 1, 3])]
    # A member that no pair links with the largest is compared with it as well.
    assert grouped(range(5), hashes, [0, 9, 18, 5, 80], [2, 1, 1, 1, 1], near) == [
        (SAME_SCENE, [0, 1, 2, 3])
    ]


def test_no_photos_and_one():
    assert grouped([], [], [], []) == []
    assert grouped([1], [HALF], [0], [1], [[0, 0]]) == []


def test_many_equal_bytes(rng):
    contents = rng.integers(0, 60, 100)
    hashes = rng.integers(0, 2**64, 100, dtype=np.uint64)
    found = grouped(contents, hashes, contents * 6.0, rng.integers(1, 9, 100))
    same = [members for kind, members in found if kind == SAME_BYTES]
    counts = np.unique(contents, return_counts=True)[1]
    assert sorted(map(len, same)) == sorted(counts[counts > 1])
    assert all(len(set(contents[members])) == 1 for members in same)
