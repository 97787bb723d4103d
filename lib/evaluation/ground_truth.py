"""Reads which photos a search should find for each query, from files or labels.

:func:`lib.evaluation.metrics.query_table` evaluates rankings with it.

    truth = read_revisited(Path("gnd_roxford5k.mat"))["medium"]
    truth = read_landmarks(Path("retrieval_solution_v2.1.csv"), index_names, "Private")
    photos = read_folder(Path("photos")).table                  # from tools.labelled
    truth = from_labels(photos["image_id"], photos["landmark_id"])

Files of Google Landmarks v2 (https://github.com/cvdfoundation/google-landmark): the ground truth is
https://s3.amazonaws.com/google-landmark/ground_truth/retrieval_solution_v2.1.csv, the gallery
https://s3.amazonaws.com/google-landmark/metadata/index.csv. Files of Oxford and Paris revisited:
:data:`REVISITED_FILES`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lib.files import read_table, show_path

REVISITED_FILES = (
    "http://cmp.felk.cvut.cz/revisitop/data/datasets/roxford5k/gnd_roxford5k.mat",
    "http://cmp.felk.cvut.cz/revisitop/data/datasets/rparis6k/gnd_rparis6k.mat",
)
LARGEST = 16_000_000  # bytes; the real files of the revisited benchmarks are far smaller

_LEVELS = {  # level: (kinds of photos that are positives, kinds that are junk)
    "easy": (("easy",), ("junk", "hard")),
    "medium": (("easy", "hard"), ("junk",)),
    "hard": (("hard",), ("junk", "easy")),
}

# SciPy trusts the sizes and types in a file, so a damaged file can crash the process or fill the
# memory. This program reads the file in a separate process with 1 GiB of memory and 8 seconds of a
# processor; it takes about one.
_READ_MAT = """
import json, sys
try:
    import resource
    for limit, value in (("CORE", 0), ("AS", 2**30), ("CPU", 8)):
        resource.setrlimit(getattr(resource, f"RLIMIT_{limit}"), (value, value))
except (ImportError, ValueError):  # Windows has no limits; macOS does not limit the memory
    pass
from scipy.io import loadmat
path, largest, *names = sys.argv[1:]
content = loadmat(path, simplify_cells=True, variable_names=names)
text = json.dumps({name: content.get(name) for name in names}, default=lambda array: array.tolist())
sys.exit(f"it holds more than {largest} letters" if len(text) > int(largest) else print(text))
"""
_SECONDS = 60  # limit for reading a file where other programs need the processor, too


class GroundTruthError(ValueError):
    """A ground truth is wrong or can't be read; the message says where and why."""


@dataclass(frozen=True, eq=False)
class GroundTruth:
    """The photos that a search should find for each query.

    Attributes:
        queries: names of the query photos.
        gallery: names of the photos to search in; a photo's number is its place here.
        positives: for each query the numbers of the photos to find, int (p,). Measures are not
            defined for a query without positives, and means leave it out.
        junk: for each query the numbers of photos that count neither for nor against, int (j,).
        boxes: float (q, 4), the part of each query photo to search for: x1, y1, x2, y2 in pixels
            from the upper left corner; None: the whole photos.

    Raises:
        GroundTruthError: no queries; no gallery; a name twice; a number of entries other than q; a
            photo twice among a query's positives, or among both its positives and its junk; a
            number outside the gallery; or a box without area.
    """

    queries: list[str]
    gallery: list[str]
    positives: list[np.ndarray]
    junk: list[np.ndarray]
    boxes: np.ndarray | None = None

    def __post_init__(self):
        for names, what in ((self.queries, "queries"), (self.gallery, "photos in the gallery")):
            if not names:
                raise GroundTruthError(f"there are no {what}")
            if len(set(names)) < len(names):
                (twice, _), *_ = Counter(names).most_common(1)
                raise GroundTruthError(f"{twice!r:.200} is twice among the {what}")
        if not len(self.queries) == len(self.positives) == len(self.junk):
            lists = f"positives of {len(self.positives)} and junk of {len(self.junk)}"
            raise GroundTruthError(f"{len(self.queries)} queries, but {lists}")
        if self.boxes is not None and self.boxes.shape != (len(self.queries), 4):
            raise GroundTruthError(f"boxes must be (q, 4), got {self.boxes.shape}")
        for number, query in enumerate(self.queries):
            if problem := self._problem(number):
                raise GroundTruthError(f"query {number} ({query!r:.200}): {problem}")

    def _problem(self, query: int) -> str | None:
        positives, junk = self.positives[query], self.junk[query]
        for numbers, what in ((positives, "positives"), (junk, "junk")):
            if numbers.ndim != 1 or numbers.dtype.kind not in "iu":
                return f"{what} must be int (n,), got {numbers.dtype} {numbers.shape}"
            for number in (numbers.min(initial=0), numbers.max(initial=0)):
                if not 0 <= number < len(self.gallery):
                    return f"photo {number} is not in the gallery of {len(self.gallery)}"
        if len(np.unique(positives)) < len(positives):
            return "a photo is twice among the positives"
        if len(both := np.intersect1d(positives, junk)):
            return f"photo {both[0]} ({self.gallery[both[0]]!r:.200}) is both positive and junk"
        if self.boxes is not None:
            x1, y1, x2, y2 = box = self.boxes[query].tolist()
            if not (np.isfinite(box).all() and x1 < x2 and y1 < y2):
                return f"the box {box} is no x1, y1, x2, y2 with x1 < x2 and y1 < y2"
        return None


def from_labels(names: Sequence[str], labels: Sequence[str]) -> GroundTruth:
    """Make a ground truth of photos and the landmark of each, which all are queries and gallery.

    A query should find the other photos of its landmark, if any. The query itself is junk, so it
    does not count in its own ranking.

    Raises:
        GroundTruthError: no photos, a name twice, or not as many labels as names.
    """
    names, labels = list(names), np.asarray(labels)
    if len(names) != len(labels):
        raise GroundTruthError(f"{len(names)} names, but {len(labels)} labels")
    _, landmark = np.unique(labels, return_inverse=True)
    ends = np.cumsum(np.bincount(landmark))
    members = np.split(np.argsort(landmark, kind="stable"), ends[:-1])
    positives = [members[of][members[of] != i] for i, of in enumerate(landmark)]
    return GroundTruth(names, names, positives, list(np.arange(len(names))[:, None]))


def read_landmarks(
    solution: Path, index_names: Sequence[str], usage: Literal["Public", "Private"]
) -> GroundTruth:
    """Read the ground truth of Google Landmarks v2 retrieval, ``retrieval_solution_v2.1.csv``.

    It has the columns id, images (ids of index photos, separated by spaces) and Usage. Queries with
    usage "Ignored" show no landmark of the index and are left out.

    Args:
        index_names: the gallery, the column id of ``index.csv``.
        usage: the half of the queries to read; papers report both.

    Raises:
        GroundTruthError: the file can't be used; the message names the line.
    """
    where = show_path(solution)
    number_of = {name: number for number, name in enumerate(index_names)}
    found: dict[str, tuple[np.ndarray, str]] = {}  # positives and usage of each query
    for line, cells in read_table(solution, ("id", "images", "Usage"), GroundTruthError):
        try:
            query, numbers, its_usage = _solution_line(cells, number_of)
            if query in found:
                raise GroundTruthError(f"query {query!r:.200} is there twice")
        except GroundTruthError as error:
            raise GroundTruthError(f"{where}, line {line}: {error}") from None
        found[query] = np.array(numbers), its_usage
    positives = {query: numbers for query, (numbers, of) in found.items() if of == usage}
    junk = [np.empty(0, dtype=np.int64)] * len(positives)
    try:
        return GroundTruth(list(positives), list(index_names), list(positives.values()), junk)
    except GroundTruthError as error:
        raise GroundTruthError(f"{where}, usage {usage!r}: {error}") from None


def _solution_line(line: list[str], number_of: dict[str, int]) -> tuple[str, list[int], str]:
    query, images, usage = (cell.strip() for cell in line)
    if not query or not usage:
        raise GroundTruthError("it is not id,images,Usage")
    if usage not in ("Public", "Private", "Ignored"):
        raise GroundTruthError(f"usage {usage!r:.200} is none of Public, Private, Ignored")
    names = images.split()
    if usage == "Ignored":
        if names not in ([], ["None"]):
            raise GroundTruthError(f"query {query!r:.200} is ignored, but has images")
        return query, [], usage
    if not names:
        raise GroundTruthError(f"query {query!r:.200} has no images")
    if unknown := [name for name in names if name not in number_of]:
        raise GroundTruthError(f"image {unknown[0]!r:.200} is not in the index")
    if len(set(names)) < len(names):
        raise GroundTruthError(f"query {query!r:.200} lists an image twice")
    return query, [number_of[name] for name in names], usage


def read_revisited(path: Path) -> dict[str, GroundTruth]:
    """Read the ground truth of Oxford or Paris revisited, one of :data:`REVISITED_FILES`.

    Returns:
        the levels of Radenović, Iscen, Tolias, Avrithis, Chum, "Revisiting Oxford and Paris", CVPR
        2018, with boxes. "easy": photos annotated as easy are positives, hard ones junk; "medium":
        both are positives; "hard": hard ones are positives, easy ones junk.

    Raises:
        GroundTruthError: the file can't be used; the message names the query.
    """
    try:
        content = _load_mat(Path(path))
        gallery, queries = _names(content, "imlist"), _names(content, "qimlist")
        entries = content["gnd"]
        entries = [entries] if isinstance(entries, dict) else entries  # of a single query
        if not isinstance(entries, list) or len(entries) != len(queries):
            raise GroundTruthError(f"gnd is no list of {len(queries)} queries")
        found = []
        for number, (query, entry) in enumerate(zip(queries, entries, strict=True)):
            try:
                found.append({key: _numbers(entry, key) for key in ("bbx", "easy", "hard", "junk")})
            except GroundTruthError as error:
                raise GroundTruthError(f"query {number} ({query!r:.200}): {error}") from None
        boxes = np.array([of_query["bbx"] for of_query in found])

        def joined(kinds: tuple[str, ...]) -> list[np.ndarray]:
            return [np.concatenate([of_query[kind] for kind in kinds]) for of_query in found]

        return {
            level: GroundTruth(queries, gallery, joined(positives), joined(junk), boxes)
            for level, (positives, junk) in _LEVELS.items()
        }
    except GroundTruthError as error:
        raise GroundTruthError(f"{show_path(path)}: {error}") from None


def _load_mat(path: Path) -> dict[str, Any]:
    if path.suffix.lower() != ".mat":
        raise GroundTruthError(
            "only .mat files are read, for a pickle can run any program: download "
            + " or ".join(REVISITED_FILES)
        )
    command = [sys.executable, "-c", _READ_MAT, path, str(LARGEST), "imlist", "qimlist", "gnd"]
    try:
        if path.stat().st_size > LARGEST:
            raise GroundTruthError(f"such a file has never more than {LARGEST / 1e6:.0f} MB")
        with path.open("rb") as file:
            if file.read(19) == b"MATLAB 7.3 MAT-file":  # HDF5, which SciPy does not read
                raise GroundTruthError("it is of version 7.3: save it in MATLAB with '-v7'")
        read = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_SECONDS,
            env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},  # each thread takes memory
        )
        if read.returncode == 0:
            return json.loads(read.stdout)
    except (OSError, subprocess.TimeoutExpired, RecursionError) as error:
        raise GroundTruthError(f"it can't be read ({error})") from None
    lines = read.stderr.decode(errors="replace").split("\n")
    reason = next((line for line in reversed(lines) if line), f"signal {-read.returncode}")
    raise GroundTruthError(f"it can't be read ({reason[:200]}): download it again")


def _names(content: dict[str, Any], key: str) -> list[str]:
    names = content[key]
    names = [names] if isinstance(names, str) else names  # a list of one
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise GroundTruthError(f"{key} is no list of names")
    return names


def _numbers(entry: Any, key: str) -> np.ndarray:
    """Return a query's box, or its photos counted from 0, which MATLAB counts from 1."""
    if not isinstance(entry, dict) or key not in entry:
        raise GroundTruthError(f"it has no list {key}")
    try:  # MATLAB's lists have any shape
        numbers = np.asarray(entry[key], dtype=np.float64).reshape(-1)
    except (TypeError, ValueError):
        raise GroundTruthError(f"{key} is no list of numbers") from None
    if key == "bbx":
        if len(numbers) != 4:
            raise GroundTruthError(f"bbx has {len(numbers)} numbers instead of 4")
        return numbers
    if not ((numbers == np.floor(numbers)) & (np.abs(numbers) < 2**53)).all():
        raise GroundTruthError(f"{key} has a number that is not whole")
    return numbers.astype(np.int64) - 1
