"""Which copies of photographs ``python -m tools.duplicates`` recognises, and what it takes for one.

    python -m benchmarks.duplicates PHOTOS

PHOTOS holds a folder of photos for each landmark. The first photo of each of the first landmarks is
copied in several ways and compared with its copies; then all photos are compared with one another,
and the copies with all photos of other landmarks. Copies are made in memory; nothing is kept.

Prints a table of copies and one of pairs: how many count as the same picture, how many of these by
the bits of the perceptual hash alone, and how many reach the cosine of the same scene. Of copies it
also tells the most bits that differ and the lowest cosine, both but for 1 % of them.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import pandas as pd
from PIL import Image, ImageEnhance
from tqdm import tqdm

from lib.data.copies import BITS, PICTURE, SCENE
from lib.data.photos import landmark_photos, open_picture, pixels_of, upright_rgb
from lib.files import or_cache, project_root
from lib.network.engine import OWN_PHOTOS, Engine, packaged_engine
from lib.programs import UsageError, as_path, program
from tools.duplicates import inspect

_BATCH = 64


def encoded(image: Image.Image, kind: str = "JPEG", **options: int) -> BinaryIO:
    """A picture as a file in memory, without metadata."""
    file = io.BytesIO()
    image.save(file, kind, **{"quality": 90} | options)
    file.seek(0)
    return file


def smaller(image: Image.Image, factor: int) -> Image.Image:
    """A picture at 1 / factor of its size."""
    return image.resize([max(1, side // factor) for side in image.size], Image.Resampling.LANCZOS)


def cropped(image: Image.Image, share: float) -> Image.Image:
    """A picture without ``share`` of its width and height, half of it at each side."""
    x, y = (round(side * share / 2) for side in image.size)
    return image.crop((x, y, image.width - x, image.height - y))


WAYS: dict[str, Callable[[Image.Image], BinaryIO]] = {
    "JPEG, quality 90, no EXIF": encoded,
    "JPEG, quality 50": lambda image: encoded(image, quality=50),
    "JPEG, quality 20": lambda image: encoded(image, quality=20),
    "PNG": lambda image: encoded(image, "PNG"),
    "WebP, quality 80": lambda image: encoded(image, "WEBP", quality=80),
    "half the size": lambda image: encoded(smaller(image, 2)),
    "a quarter of the size": lambda image: encoded(smaller(image, 4)),
    "10 % brighter": lambda image: encoded(ImageEnhance.Brightness(image).enhance(1.1)),
    "2 % cropped": lambda image: encoded(cropped(image, 0.02)),
    "5 % cropped": lambda image: encoded(cropped(image, 0.05)),
}


class Described(NamedTuple):
    """Pictures as the program sees them."""

    hashes: np.ndarray  # uint64 (n,)
    descriptors: np.ndarray  # float32 (n, d) of unit norm

    def take(self, rows: np.ndarray) -> Described:
        """Some of them."""
        return Described(self.hashes[rows], self.descriptors[rows])


def describe(engine: Engine, files: Iterable[Path | BinaryIO]) -> Described:
    """Hash and embed pictures, each opened twice, as it is decoded at two sizes."""
    hashes, descriptors, photos = [], [np.empty((0, engine.dimension), np.float32)], []
    for file in files:
        with open_picture(file) as image:
            photos.append(pixels_of(image, engine.image_size, engine.squashes))
        if not isinstance(file, Path):
            file.seek(0)
        with open_picture(file) as image:
            hashes.append(inspect(image)[2])
        if len(photos) == _BATCH:
            descriptors.append(engine.embed(photos))
            photos = []
    if photos:
        descriptors.append(engine.embed(photos))
    return Described(np.array(hashes, np.uint64), np.concatenate(descriptors))


def pair_row(bits: np.ndarray, cosines: np.ndarray) -> dict[str, float | int]:
    """What a table says of some pairs, by their bits and cosines."""
    return {
        "pairs": len(bits),
        "same picture": int(((bits <= BITS) & (cosines >= PICTURE)).sum()),
        "few bits": int((bits <= BITS).sum()),
        "same scene": int((cosines >= SCENE).sum()),
    }


def copy_row(of: Described, copies: Described) -> dict[str, float | int]:
    """The table's row of a way to copy; ``of`` are the originals."""
    bits = np.bitwise_count(of.hashes ^ copies.hashes)
    cosines = np.einsum("nd,nd->n", of.descriptors, copies.descriptors)
    same = (bits <= BITS) & (cosines >= PICTURE)
    return pair_row(bits, cosines) | {
        "either": int((same | (cosines >= SCENE)).sum()),
        "bits": int(np.quantile(bits, 0.99)),
        "cosine": round(float(np.quantile(cosines, 0.01)), 3),
    }


@program()
def main(given: list[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("photos", type=as_path, metavar="PHOTOS", help="a folder per landmark")
    parser.add_argument("--copied", type=int, default=200, help="photos that are copied")
    arguments = parser.parse_args(given)
    if arguments.copied < 1:
        raise UsageError(f"--copied {arguments.copied} must be at least 1")
    paths = landmark_photos(arguments.photos).paths
    if not paths:
        raise ValueError(f"{arguments.photos} has no folders of photos")
    engine = packaged_engine(or_cache(project_root() / OWN_PHOTOS))
    photos = describe(engine, tqdm(paths, "photos", leave=False))
    landmarks = np.array([path.parent.name for path in paths])
    first = np.unique(landmarks, return_index=True)[1][: arguments.copied]
    by_way = {}
    for way, copy in WAYS.items():

        def files(copy=copy, way=way):
            for row in tqdm(first, way, leave=False):
                with open_picture(paths[row]) as image:
                    yield copy(upright_rgb(image))

        by_way[way] = describe(engine, files())
    originals = photos.take(first)
    table = {way: copy_row(originals, copies) for way, copies in by_way.items()}
    pairs = pair_rows(photos, landmarks, by_way, landmarks[first])
    for rows in (table, pairs):
        print(pd.DataFrame.from_dict(rows, orient="index").to_string(), end="\n\n")
    return 0


def pair_rows(
    photos: Described, landmarks: np.ndarray, by_way: dict[str, Described], copied: np.ndarray
) -> dict[str, dict[str, float | int]]:
    """The table's rows of pairs of different photos.

    Args:
        landmarks, copied: str (n,) and (c,), of the photos, and of each way's copies.
    """
    a, b = np.triu_indices(len(landmarks), 1)
    bits = np.bitwise_count(photos.hashes[a] ^ photos.hashes[b])
    cosines = (photos.descriptors @ photos.descriptors.T)[a, b]
    same = landmarks[a] == landmarks[b]
    rows = {
        "photos of one landmark": pair_row(bits[same], cosines[same]),
        "photos of two landmarks": pair_row(bits[~same], cosines[~same]),
    }
    other = copied[:, None] != landmarks
    bits = [np.bitwise_count(c.hashes[:, None] ^ photos.hashes)[other] for c in by_way.values()]
    cosines = [(c.descriptors @ photos.descriptors.T)[other] for c in by_way.values()]
    return rows | {
        "copies and photos of other landmarks": pair_row(
            np.concatenate(bits), np.concatenate(cosines)
        )
    }


if __name__ == "__main__":
    sys.exit(main())
