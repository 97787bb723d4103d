"""The public benchmarks of instance retrieval: where their files are, what a query should find.

    task = open_set("roxford5k", Path("Dataset/benchmarks"))  # fetches what is missing
    task.gallery, task.queries                          # photos to embed, in their own shape
    task.truths(names)["hard"]                          # lib.evaluation.ground_truth.GroundTruth

Each set lies in a folder of its own: the photos in the subfolders that ARCHIVES names, mostly
``jpg/``, the ground truth beside them.

    roxford5k, rparis6k  Radenović, Iscen, Tolias, Avrithis, Chum, "Revisiting Oxford and Paris",
                         CVPR 2018. Queries are cropped to their boxes before anything else, and
                         are not in the gallery.
    holidays             Jégou, Douze, Schmid, "Hamming Embedding and Weak Geometric
                         Consistency", ECCV 2008. The first photo of each group is its query, the
                         others are to be found; it is left out of its own ranking.
    copydays             Douze et al., "Evaluation of GIST descriptors for web-scale image search",
                         CIVR 2009. Copies under strong attack search for their originals.
    gldv2                Weyand, Araujo, Cao, Sim, "Google Landmarks Dataset v2", CVPR 2020:
                         retrieval, mAP@100, public and private queries.
    ilias                Kordopatis-Zilos et al., "ILIAS", CVPR 2025: mAP@1k. Its photos (6 TB with
                         the distractors) are fetched by hand.
    folder:PATH          your own: a folder for each landmark, each photo a query.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lib.data.photos import find_photos, landmark_name, landmark_photos, read_photo
from lib.evaluation import metrics
from lib.evaluation.ground_truth import (
    REVISITED_FILES,
    GroundTruth,
    from_labels,
    read_landmarks,
    read_revisited,
)
from lib.files import only_writer, read_table, show_path
from lib.search.embedding import PhotoSource
from tools.fetch import Remote, fetch, is_begun, is_unpacked, unpack

_OXFORD = "https://www.robots.ox.ac.uk/~vgg/data/oxbuildings/oxbuild_images-v1.tgz"
_PARIS = "https://www.robots.ox.ac.uk/~vgg/data/parisbuildings/paris_{}-v1.tgz"
_HOLIDAYS = "http://pascal.inrialpes.fr/data/holidays/jpg{}.tar.gz"
_COPYDAYS = "https://dl.fbaipublicfiles.com/vissl/datasets/copydays_{}.tar.gz"
_GLDV2 = "https://s3.amazonaws.com/google-landmark/"
_ORIGINAL = "8b85b7914fd0145bc258bde3440f6a622243ca91ee085fe2025ce7bdeb0bfb8e"
_STRONG = "7852c64aa4a37e8329ce08159fc947c16f09c66737db0a2479a90fc9ae40760c"

ARCHIVES: dict[str, dict[str, list[Remote]]] = {  # set: folder: archives of its photos
    "roxford5k": {"jpg": [Remote(_OXFORD)]},
    "rparis6k": {"jpg": [Remote(_PARIS.format(n)) for n in (1, 2)]},
    "holidays": {"jpg": [Remote(_HOLIDAYS.format(n)) for n in (1, 2)]},
    "copydays": {
        "original": [Remote(_COPYDAYS.format("original"), sha256=_ORIGINAL)],
        "strong": [Remote(_COPYDAYS.format("strong"), sha256=_STRONG)],
    },
    "gldv2": {
        part: [
            Remote(
                f"{_GLDV2}{part}/images_{n:03}.tar",
                md5=f"{_GLDV2}md5sum/{part}/md5.images_{n:03}.txt",
            )
            for n in range(count)
        ]
        for part, count in (("index", 100), ("test", 20))
    },
}
TRUTHS = {
    "roxford5k": [Remote(REVISITED_FILES[0])],
    "rparis6k": [Remote(REVISITED_FILES[1])],
    "gldv2": [
        Remote(f"{_GLDV2}ground_truth/retrieval_solution_v2.1.csv"),
        Remote(f"{_GLDV2}metadata/index.csv"),
    ],
}
GIGABYTES = {  # of the archives, about; the photos in them take as much
    "roxford5k": 2,
    "rparis6k": 2.5,
    "holidays": 2.7,
    "copydays": 0.3,
    "gldv2": 120,
}
_R50 = (
    "ResNet50, GeM, triplet loss",
    "https://github.com/filipradenovic/cnnimageretrieval-pytorch",
)
_CGD = "MobileNetV2, distilled (4.8 M weights)", "https://github.com/ban0329/CGD"
_AMES = "AMES over SuperGlobal, re-ranked", "https://arxiv.org/abs/2408.03282"

Published = tuple[str, dict[str, float], str]  # system, mAP in per cent by level, source


def _published(of: tuple[str, str], medium: float, hard: float) -> Published:
    system, source = of
    return system, {"medium": medium, "hard": hard}, source


PUBLISHED: dict[str, list[Published]] = {
    "roxford5k": [
        _published(_R50, 63.6, 40.9),
        _published(_CGD, 81.0, 61.9),
        _published(_AMES, 89.2, 78.7),
    ],
    "rparis6k": [_published(_CGD, 89.8, 79.0), _published(_AMES, 93.4, 86.8)],
}
PUBLISHED_1M: dict[str, list[Published]] = {  # among the million distractors
    "roxford5k": [_published(_CGD, 75.2, 50.8)],
    "rparis6k": [_published(_CGD, 78.2, 59.4)],
}
TRAPEZOIDS: metrics.Protocol = {  # of holidays_map.py, in the evaluation package of Holidays
    "AP": lambda hits, n: metrics.average_precision(hits, n, trapezoid=True)
}
ILIAS: metrics.Protocol = {"AP@1000": lambda hits, n: metrics.average_precision(hits, n, k=1000)}


class OfficialError(ValueError):
    """A set can't be used; the message names the file and what to do."""


@dataclass(frozen=True, eq=False)
class Task:
    """A set of photos to measure on.

    Attributes:
        name: of the set.
        gallery, queries: the photos; None: the queries are photos of the gallery.
        truths: takes the names of the gallery's photos that could be read, and returns a ground
            truth for each level. Raises OfficialError if one is missing that must not.
        protocol: the measures; the first is the one that papers compare.
        depth: how many ranks they look at; None: all.
    """

    name: str
    gallery: PhotoSource
    queries: PhotoSource | None
    truths: Callable[[list[str]], dict[str, GroundTruth]]
    protocol: metrics.Protocol
    depth: int | None = None


def open_set(name: str, folder: Path, longest: int = 1024) -> Task:
    """Open a set, after fetching what is missing of it.

    Args:
        name: one of those above.
        folder: of all sets.
        longest: pixels of the longer side that photos are shrunk to.

    Raises:
        OfficialError, tools.fetch.FetchError, lib.evaluation.ground_truth.GroundTruthError: a file
            is missing, can't be fetched, or is damaged.
        lib.data.photos.NoPhotosError: a folder has no photos.
    """
    if name.startswith("folder:"):
        return _open_folder(Path(os.path.expanduser(name.removeprefix("folder:"))), longest)
    if name not in OPENERS:
        names = ", ".join([*OPENERS, "folder:PATH"])
        raise OfficialError(f"there is no set {name!r:.100}, but {names}")
    place = folder / name
    place.mkdir(parents=True, exist_ok=True)
    busy = f"another program fetches {name} into {show_path(place)}: wait until it has finished"
    with only_writer(place, OfficialError(busy)):
        for remote in TRUTHS.get(name, []):
            fetch(remote, place)
        for part, archives in ARCHIVES.get(name, {}).items():
            _fetch_photos(place / part, archives, name)
    return OPENERS[name](place, longest)


def _fetch_photos(photos: Path, archives: Sequence[Remote], name: str) -> None:
    """Fetch archives and unpack them; nothing, if somebody has put photos into the folder."""
    begun = [is_begun(archive.name, photos) for archive in archives]
    if photos.is_dir() and not any(begun) and any(photos.iterdir()):
        return
    missing = [archive for archive in archives if not is_unpacked(archive.name, photos)]
    if missing:
        free = shutil.disk_usage(photos.parent).free / 1e9
        print(
            f"{name} takes about {GIGABYTES[name]:g} GB on the way and as much in the end; "
            f"{free:.0f} GB are free",
            file=sys.stderr,
        )
    for archive in missing:
        path = fetch(archive, photos.parent)
        unpack(path, photos)
        path.unlink()


def photos_at(
    paths: Sequence[Path],
    names: Sequence[str],
    longest: int,
    boxes: np.ndarray | None = None,
    folder: Path | None = None,
) -> PhotoSource:
    """Photos at given places, in their own shape, cropped to boxes and then shrunk.

    Args:
        paths, names: of each photo.
        longest: pixels of the longer side that they are shrunk to; they are never enlarged.
        boxes: float (n, 4), see :class:`lib.evaluation.ground_truth.GroundTruth`.
        folder: of photos that may change; a job then embeds only those that did.

    Raises:
        OfficialError: a photo is missing.
    """
    states = []
    for path, name in zip(paths, names, strict=True):
        try:
            stat = path.stat()
        except OSError as error:
            absent = sum(not other.exists() for other in paths)
            raise OfficialError(
                f"{show_path(path)} is missing ({error.strerror}), {absent} of {len(paths)} in "
                f"all: put it there, or delete {show_path(path.parent)} and run this again"
            ) from None
        states.append((name, stat.st_size, stat.st_mtime_ns))
    of_boxes = [] if boxes is None else boxes.tolist()
    identity = json.dumps([states, longest, of_boxes]).encode()

    def read(number: int, image_size: int, squash: bool) -> np.ndarray:
        crop = None if boxes is None else tuple(boxes[number])
        side = image_size if squash else min(image_size, longest)
        return read_photo(paths[number], side, squash, crop)

    states = {name: f"{size} {time}" for name, size, time in states} if folder else {}
    digest = hashlib.sha256(identity).hexdigest()
    return PhotoSource(list(names), read, digest, states=states, folder=folder)


def _whole(truths: dict[str, GroundTruth]) -> Callable[[list[str]], dict[str, GroundTruth]]:
    """The truths of an official gallery, of which no photo may be missing."""
    gallery = next(iter(truths.values())).gallery

    def checked(names: list[str]) -> dict[str, GroundTruth]:
        if missing := sorted({*gallery} - {*names}):
            raise OfficialError(
                f"{len(missing)} photos of the gallery can't be read, first {missing[0]}: official "
                "numbers need all of them; put whole files there, or delete the folder of the "
                "photos and run this again"
            )
        return truths

    return checked


def _open_revisited(place: Path, longest: int) -> Task:
    truths = read_revisited(next(iter(sorted(place.glob("gnd_*.mat"))), place / "gnd.mat"))
    truth = truths["medium"]

    def paths(names: list[str]) -> list[Path]:
        return [place / "jpg" / f"{name}.jpg" for name in names]

    gallery = photos_at(paths(truth.gallery), truth.gallery, longest)
    queries = photos_at(paths(truth.queries), truth.queries, longest, truth.boxes)
    return Task(place.name, gallery, queries, _whole(truths), metrics.REVISITED)


def _open_holidays(place: Path, longest: int) -> Task:
    paths, _ = find_photos(place / "jpg")
    names = [path.name for path in paths]
    if wrong := [name for name in names if not Path(name).stem.isdecimal()]:
        raise OfficialError(
            f"{show_path(place / 'jpg')}: {wrong[0]!r:.100} is not named like 100000.jpg, by which "
            "the group is known"
        )

    def truths(found: list[str]) -> dict[str, GroundTruth]:
        groups = [int(Path(name).stem) // 100 for name in found]
        truth = from_labels(found, groups)
        first = {group: row for row, group in reversed(list(enumerate(groups)))}
        return {"all": _queried(truth, sorted(first.values()))}

    source = photos_at(paths, names, longest, folder=place / "jpg")
    return Task("holidays", source, None, truths, TRAPEZOIDS)


def _queried(truth: GroundTruth, rows: Sequence[int]) -> GroundTruth:
    """A ground truth with some of its queries."""
    chosen = [[of[row] for row in rows] for of in (truth.queries, truth.positives, truth.junk)]
    return GroundTruth(chosen[0], truth.gallery, *chosen[1:])


def _open_copydays(place: Path, longest: int) -> Task:
    (originals, copies) = (find_photos(place / part).paths for part in ("original", "strong"))
    names, asked = ([path.name for path in paths] for paths in (originals, copies))
    # The first four digits are the picture's.
    right = [[n for n, name in enumerate(names) if name[:4] == copy[:4]] for copy in asked]
    none = [np.empty(0, dtype=np.int64)] * len(asked)
    truth = GroundTruth(asked, names, [np.array(numbers, int) for numbers in right], none)
    gallery, queries = photos_at(originals, names, longest), photos_at(copies, asked, longest)
    return Task("copydays", gallery, queries, _whole({"strong": truth}), TRAPEZOIDS)


def _open_landmarks(place: Path, longest: int) -> Task:
    listed = [cells[0] for _, cells in read_table(place / "index.csv", ("id",), OfficialError)]
    solution = place / "retrieval_solution_v2.1.csv"
    usages = ("Public", "Private")
    truths = {usage.lower(): read_landmarks(solution, listed, usage) for usage in usages}
    asked = [query for truth in truths.values() for query in truth.queries]
    sources = (
        photos_at([place / part / f"{name}.jpg" for name in names], names, longest)
        for part, names in (("index", listed), ("test", asked))
    )
    return Task("gldv2", *sources, _whole(truths), metrics.LANDMARKS, 100)


def read_ilias(place: Path) -> tuple[list[str], list[str], GroundTruth]:
    """Read the lists of ILIAS, ``image_ids/image_query_ids.txt`` and ``positive_ids.txt``.

    A line of either begins with an id such as ``<instance>/query/0.jpg``; what follows a comma is
    not needed here.

    Returns:
        the ids of queries and positives, and the ground truth of a gallery of the positives;
        distractors follow them.

    Raises:
        OfficialError: a list is missing, or not of that form.
    """
    lists = []
    for name in ("image_query_ids.txt", "positive_ids.txt"):
        path = place / "image_ids" / name
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError) as error:
            base = "https://vrg.fel.cvut.cz/ilias_data/image_ids/"
            raise OfficialError(
                f"{show_path(path)} can't be read ({error}): get it from {base}{name}"
            ) from None
        ids = sorted(line.partition(",")[0].strip() for line in lines if line.strip())
        if wrong := [one for one in ids if "/" not in one]:
            raise OfficialError(f"{show_path(path)}: {wrong[0]!r:.100} is not like instance/photo")
        lists.append(ids)
    queries, positives = lists
    of_instance: dict[str, list[int]] = {}
    for number, one in enumerate(positives):
        of_instance.setdefault(one.partition("/")[0], []).append(number)
    right = [np.array(of_instance.get(one.partition("/")[0], []), int) for one in queries]
    junk = [np.empty(0, dtype=np.int64)] * len(queries)
    return queries, positives, GroundTruth(queries, positives, right, junk)


def _open_ilias(place: Path, longest: int) -> Task:
    queries, positives, truth = read_ilias(place)
    sources = (
        photos_at([place / name for name in names], names, longest)
        for names in (positives, queries)
    )
    return Task("ilias", *sources, _whole({"core": truth}), ILIAS, 1000)


def _open_folder(folder: Path, longest: int) -> Task:
    paths, _ = landmark_photos(folder)
    if not paths:
        where = show_path(folder)
        raise OfficialError(f"{where} has no folders with photos: give each landmark one")
    names = [f"{path.parent.name}/{path.name}" for path in paths]

    def truths(found: list[str]) -> dict[str, GroundTruth]:
        return {"all": from_labels(found, [landmark_name(name.split("/")[0]) for name in found])}

    source = photos_at(paths, names, longest, folder=folder)
    return Task(f"folder {folder.name}", source, None, truths, metrics.GENERAL)


OPENERS = {
    "roxford5k": _open_revisited,
    "rparis6k": _open_revisited,
    "holidays": _open_holidays,
    "copydays": _open_copydays,
    "gldv2": _open_landmarks,
    "ilias": _open_ilias,
}
