"""Names the copies in a folder of photos: ``python -m tools.duplicates PHOTOS [--out FOLDER]``.

    found = find_copies(Path("photos"), packaged_engine(run), run / JOBS)
    write_page(found, Path("out"))       # -> out / "duplicates.html", for people
    write_csv(found, Path("out"))        # -> out / "duplicates.csv", for programs

It finds groups of equal bytes, of one picture in several sizes or formats, and of photos of one
scene (:mod:`lib.data.copies`). It deletes nothing. Descriptors are shared with the search in own
photos (``python -m tools.search``, ``make app PHOTOS=``): a photo is embedded once for all.
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from lib.app.gallery import JOBS, open_option
from lib.app.web import counted, picture_uri
from lib.data.copies import HASHED, KINDS, SCENE, Group, group_copies
from lib.data.duplicates import perceptual_hash
from lib.data.photos import (
    NoPhotosError,
    find_photos,
    left_out_lines,
    open_picture,
    picture_and_size,
    picture_of,
)
from lib.files import checksum, or_cache, project_root, replacing, show_name, show_path
from lib.network.engine import OWN_PHOTOS, Engine, packaged_engine
from lib.programs import as_path, program
from lib.search.exact import nearest
from tools.pages import PAGES

PAGE, TABLE = "duplicates.html", "duplicates.csv"

_NEIGHBOURS = 32  # of a photo, that are compared with it for scenes
_BLOCK = 4096  # photos that are compared between two steps of the progress bar
_SHOWN = 176  # longer side in pixels of the page's pictures
_MOST_GROUPS = 1000  # on the page: with some 8 KB for each picture, browsers still open it
_MOST_PHOTOS = 24  # of a group on the page


class Photo(NamedTuple):
    """A photo as it lies in the folder."""

    name: str  # path below the folder
    bytes: int
    width: int  # in pixels, upright
    height: int
    perceptual_hash: int
    content: tuple[int, str]  # size, and checksum or, if no other file has that size, name


@dataclass(frozen=True, eq=False)
class Copies:
    """What :func:`find_copies` found.

    Attributes:
        folder: of the photos.
        photos: that can be read.
        descriptors: float32 (n, d) of unit norm, of these photos.
        groups: of rows of ``photos``.
        unreadable: names of the photos that can't be read.
        left_out: a message for each reason for which other files were left out.
    """

    folder: Path
    photos: list[Photo]
    descriptors: np.ndarray
    groups: list[Group]
    unreadable: list[str]
    left_out: list[str]

    def similarities(self, group: Group) -> np.ndarray:
        """The cosines of a group's members to its largest picture, float32 (m,)."""
        descriptors = self.descriptors[group.members]
        return (descriptors @ descriptors[0]).clip(-1, 1)

    def summary(self) -> list[str]:
        """A line for each kind, for photos that can't be read, and for files left out."""
        lines = []
        for kind in KINDS:
            sizes = [len(group.members) for group in self.groups if group.kind == kind]
            lines.append(f"{kind}: {counted(len(sizes), 'group')}, {counted(sum(sizes), 'photo')}")
        if self.unreadable:
            first = ", ".join(map(show_name, self.unreadable[:3]))
            more = ", ..." if len(self.unreadable) > 3 else ""
            lines.append(f"can't be read: {counted(len(self.unreadable), 'photo')}: {first}{more}")
        return lines + self.left_out


def find_copies(folder: Path, engine: Engine, jobs: Path) -> Copies:
    """Find the copies in a folder of photos and its subfolders; shows progress bars.

    Args:
        engine: the thresholds of :mod:`lib.data.copies` are for
            :func:`lib.network.engine.packaged_engine`.
        jobs: a folder that keeps the descriptors; made if absent.

    Raises:
        ValueError, JobBusyError, EmbeddingJobError: see :func:`lib.app.gallery.open_option`.
    """
    paths, left_out = find_photos(folder)
    gallery = open_option(engine, folder, jobs, "PHOTOS", verifiable=False)
    sizes = Counter(map(_size, paths))
    several = {size for size, count in sizes.items() if count > 1}
    with ThreadPoolExecutor(os.cpu_count()) as threads:  # Pillow decodes without the GIL
        looked_at = threads.map(partial(_look_at, folder, several), gallery.names)
        seen = list(
            tqdm(looked_at, "looking at copies", len(gallery.names), leave=False, unit=" photos")
        )
    photos, numbers = [photo for photo in seen if photo], {}
    kept = np.array([photo is not None for photo in seen])
    descriptors = gallery.embeddings if kept.all() else gallery.embeddings[kept]
    readable = {photo.name for photo in photos}
    names = [path.relative_to(folder).as_posix() for path in paths]
    groups = group_copies(
        np.array([numbers.setdefault(photo.content, len(numbers)) for photo in photos]),
        np.array([photo.perceptual_hash for photo in photos], np.uint64),
        descriptors,
        np.array([photo.width * photo.height for photo in photos]),
        near_pairs(descriptors),
    )
    unreadable = [name for name in names if name not in readable]
    return Copies(folder, photos, descriptors, groups, unreadable, left_out_lines(left_out))


def _size(path: Path) -> int:
    """A file's size in bytes; -1 if it is gone."""
    try:
        return path.stat().st_size
    except OSError:
        return -1


def _look_at(folder: Path, several: set[int], name: str) -> Photo | None:
    """Inspect a photo; None if it can't be read.

    ``several`` holds the sizes in bytes of more files than one: only these need a checksum.
    """
    path = folder / name
    try:
        size = path.stat().st_size
        content = size, checksum(path) if size in several else name
        with open_picture(path) as image:
            return Photo(name, size, *inspect(image), content)
    except MemoryError:
        raise  # says nothing about the photo
    except Exception:  # decoders of damaged files raise anything
        return None


def inspect(image: Image.Image) -> tuple[int, int, int]:
    """Width and height in pixels, upright, and perceptual hash of an opened picture.

    Raises:
        Exception: anything that the decoder of a damaged file raises.
    """
    small, size = picture_and_size(image, HASHED)
    return *size, perceptual_hash(small)


def near_pairs(descriptors: np.ndarray) -> np.ndarray:
    """Each photo with those of its nearest neighbours that may show the same scene.

    Args:
        descriptors: float32 (n, d) of unit norm, maybe memory-mapped.

    Returns:
        int64 (m, 2), rows; memory grows with n, not with its square.
    """
    pairs = [np.empty((0, 2), np.int64)]
    with tqdm(total=len(descriptors), desc="comparing", leave=False, unit=" photos") as bar:
        for start in range(0, len(descriptors), _BLOCK):
            block = descriptors[start : start + _BLOCK]
            rows, similarities = nearest(block, descriptors, _NEIGHBOURS + 1)  # and itself
            one, place = np.nonzero(similarities >= SCENE)
            pairs.append(np.stack([start + one, rows[one, place]], axis=1))
            bar.update(len(block))
    pairs = np.concatenate(pairs)
    return pairs[pairs[:, 0] != pairs[:, 1]]


# ---- the report


def write_csv(copies: Copies, out: Path) -> None:
    """Write a row for each member of each group.

    A name that is not valid UTF-8 keeps its bytes; read them with ``errors="surrogateescape"``.
    """
    with (
        replacing(out / TABLE) as part,
        part.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file,
    ):
        table = csv.writer(file)
        table.writerow(["group", "kind", "name", "bytes", "width", "height", "similarity"])
        for number, group in enumerate(copies.groups, 1):
            for row, similarity in zip(group.members, copies.similarities(group), strict=True):
                photo = copies.photos[row]
                shown = photo.name, photo.bytes, photo.width, photo.height, f"{similarity:.4f}"
                table.writerow([number, group.kind, *shown])


def write_page(copies: Copies, out: Path) -> None:
    """Write a page that shows the groups; it needs no other file, no script and no network."""
    shown = copies.groups[:_MOST_GROUPS]
    kinds: dict[str, list[dict]] = {kind: [] for kind in KINDS}
    for number, group in enumerate(tqdm(shown, "showing", leave=False, unit=" groups"), 1):
        kinds[group.kind].append(
            {
                "number": number,
                "photos": _shown_photos(copies, group),
                "left_out": max(0, len(group.members) - _MOST_PHOTOS),
            }
        )
    page = PAGES.get_template("duplicates.html.j2").render(
        folder=show_name(copies.folder.resolve().name),
        summary=copies.summary(),
        kinds=kinds,
        left_out=len(copies.groups) - len(shown),
        csv=TABLE,
        unreadable=[show_name(name) for name in copies.unreadable],
    )
    with replacing(out / PAGE) as part:
        part.write_text(page, encoding="utf-8")


def _shown_photos(copies: Copies, group: Group) -> list[dict]:
    """The first members of a group, as the page shows them."""
    photos = [copies.photos[row] for row in group.members[:_MOST_PHOTOS]]
    return [
        photo._asdict()
        | {
            "name": show_name(photo.name),
            "source": _small_picture(copies.folder / photo.name),
            "largest": photo.width * photo.height == photos[0].width * photos[0].height,
            "similarity": similarity,
        }
        for photo, similarity in zip(photos, copies.similarities(group), strict=False)
    ]


def _small_picture(path: Path) -> str:
    """A photo as a small data URI; "" if it can no longer be read."""
    try:
        with open_picture(path) as image:
            return picture_uri(np.asarray(picture_of(image, _SHOWN)), quality=75)
    except MemoryError:
        raise
    except Exception:  # decoders of damaged files raise anything
        return ""


@program()
def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.duplicates",
        description="Name the copies in a folder of photos. Nothing is deleted.",
    )
    parser.add_argument(
        "photos", type=as_path, metavar="PHOTOS", help="a folder, with its subfolders"
    )
    parser.add_argument(
        "--out",
        type=as_path,
        metavar="FOLDER",
        help=f"where {PAGE} and {TABLE} go; default: runs/duplicates",
    )
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore", module="PIL")  # unreadable photos are counted
    paths, left_out = find_photos(options.photos)  # before the network is made
    if not paths:
        raise NoPhotosError(f"{show_path(options.photos)} holds no photos", left_out)
    run = or_cache(project_root() / OWN_PHOTOS)
    out = options.out or run.parent / "duplicates"
    out.mkdir(parents=True, exist_ok=True)  # before minutes of work
    copies = find_copies(options.photos, packaged_engine(run), run / JOBS)
    write_csv(copies, out)
    write_page(copies, out)
    print("\n".join(copies.summary()))
    print(f"Open {(out / PAGE).resolve().as_uri()} in a browser.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
