"""Ground truths: which photos of a gallery a search should find, for each query.

Read from the files of the public benchmarks, or made of labelled photos.
:func:`lib.evaluation.metrics.judge` and :func:`lib.evaluation.metrics.query_table` measure rankings
by them.

    truth = read_revisited(Path("gnd_roxford5k.pkl"))["medium"]
    truth = read_landmarks(Path("retrieval_solution_v2.1.csv"), index_names, "Private")
    photos = read_folder(Path("photos")).table                  # from lib.data.labelled
    truth = from_labels(photos["image_id"], photos["landmark_id"], queries="first")

Where the files come from:

* Oxford and Paris revisited: http://cmp.felk.cvut.cz/revisitop/data/datasets/roxford5k/ has
  ``gnd_roxford5k.pkl``, and http://cmp.felk.cvut.cz/revisitop/data/datasets/rparis6k/ has
  ``gnd_rparis6k.pkl``; a file ``.mat`` of the same name lies beside each.
* Google Landmarks v2 (https://github.com/cvdfoundation/google-landmark):
  https://s3.amazonaws.com/google-landmark/ground_truth/retrieval_solution_v2.1.csv, and the gallery
  in https://s3.amazonaws.com/google-landmark/metadata/index.csv.
"""

from __future__ import annotations

import csv
import math
import pickle
import pickletools
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import numpy as np
from scipy.io import loadmat

from lib.files import show_path

LARGEST = 64_000_000  # bytes of a file of the revisited benchmarks: the real ones are far smaller

_KINDS = ("easy", "hard", "junk")
_LEVELS = {  # which kinds are positives, and which are junk
    "easy": (("easy",), ("junk", "hard")),
    "medium": (("easy", "hard"), ("junk",)),
    "hard": (("hard",), ("junk", "easy")),
}


class GroundTruthError(ValueError):
    """A ground truth is wrong or can't be read; the message says where and why."""


@dataclass(frozen=True, eq=False)
class GroundTruth:
    """What a search should find.

    Attributes:
        queries: names of the query photos.
        gallery: names of the photos to search in. A photo's number is its place here.
        positives: for each query the numbers of the photos to find, int (p,). There may be none:
            then measures are not defined, and means leave the query out.
        junk: for each query the numbers of photos that count neither for nor against, int (j,).
        boxes: float (q, 4), the part of each query photo to search for: x1, y1, x2, y2 in pixels
            from the upper left corner; None: all of it.

    Raises:
        GroundTruthError: no queries or gallery, a name twice, not one entry for each query, a photo
            that is positive twice, or both positive and junk, for a query, a number out of the
            gallery, or a box without area.
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
                raise GroundTruthError(f"{twice!r} is twice among the {what}")
        if not len(self.queries) == len(self.positives) == len(self.junk):
            raise GroundTruthError(
                f"{len(self.queries)} queries, but positives of {len(self.positives)} and junk of "
                f"{len(self.junk)}"
            )
        for number, lists in enumerate(zip(self.positives, self.junk, strict=True)):
            if problem := self._problem(*lists):
                raise GroundTruthError(f"query {number} ({self.queries[number]!r}): {problem}")
        if self.boxes is not None:
            if self.boxes.shape != (len(self.queries), 4):
                raise GroundTruthError(f"boxes must be (q, 4), got {self.boxes.shape}")
            x1, y1, x2, y2 = self.boxes.T
            wrong = ~(np.isfinite(self.boxes).all(axis=1) & (x1 < x2) & (y1 < y2))
            if wrong.any():
                number = int(wrong.argmax())
                raise GroundTruthError(
                    f"query {number} ({self.queries[number]!r}): the box "
                    f"{self.boxes[number].tolist()} is no x1, y1, x2, y2 with x1 < x2 and y1 < y2"
                )

    def _problem(self, positives: np.ndarray, junk: np.ndarray) -> str | None:
        for numbers, what in ((positives, "positives"), (junk, "junk")):
            if numbers.ndim != 1 or numbers.dtype.kind not in "iu":
                return f"{what} must be int (n,), got {numbers.dtype} {numbers.shape}"
            for number in (numbers.min(initial=0), numbers.max(initial=0)):
                if not 0 <= number < len(self.gallery):
                    return f"photo {number} is not in the gallery of {len(self.gallery)}"
        if len(np.unique(positives)) < len(positives):
            return "a photo is twice among the positives"
        both = np.intersect1d(positives, junk)
        if len(both):
            return f"photo {both[0]} ({self.gallery[both[0]]!r}) is both positive and junk"
        return None


# --------------------------------------------------------------------------------------------------
# Photos with labels
# --------------------------------------------------------------------------------------------------


def from_labels(
    names: Sequence[str], labels: Sequence[str], queries: Literal["all", "first"] = "all"
) -> GroundTruth:
    """Search labelled photos among themselves: a query should find the others of its landmark.

    The query is in the gallery, too, but junk, so that it is left out of its own ranking.

    Args:
        names: of the photos.
        labels: the landmark of each photo.
        queries: "all": each photo is a query once; "first": the first photo by name of each
            landmark, which is the protocol of INRIA Holidays (Jégou, Douze, Schmid, "Hamming
            Embedding and Weak Geometric Consistency for Large Scale Image Search", ECCV 2008).

    Returns:
        the ground truth with its queries in the order of ``names``. That of a landmark's only photo
        is without positives.

    Raises:
        GroundTruthError: no photos, a name twice, or not a label for each name.
        ValueError: ``queries`` is neither of the two.
    """
    names, labels = list(names), np.asarray(labels)
    if len(names) != len(labels):
        raise GroundTruthError(f"{len(names)} names, but {len(labels)} labels")
    if queries not in ("all", "first"):
        raise ValueError(f"queries must be 'all' or 'first', got {queries!r}")
    _, landmark = np.unique(labels, return_inverse=True)
    ends = np.cumsum(np.bincount(landmark))
    members = np.split(np.argsort(landmark, kind="stable"), ends[:-1])
    chosen = range(len(names))
    if queries == "first":
        by_name = sorted(chosen, key=names.__getitem__)
        _, first = np.unique(landmark[by_name], return_index=True)
        chosen = sorted(by_name[i] for i in first)
    positives = []
    for i in chosen:
        same = members[landmark[i]]
        positives.append(same[same != i])
    return GroundTruth(
        queries=[names[i] for i in chosen],
        gallery=names,
        positives=positives,
        junk=[np.array([i]) for i in chosen],
    )


# --------------------------------------------------------------------------------------------------
# Google Landmarks v2
# --------------------------------------------------------------------------------------------------


def read_landmarks(
    solution: Path, index_names: Sequence[str], usage: Literal["Public", "Private"]
) -> GroundTruth:
    """Read the ground truth of Google Landmarks v2 retrieval, ``retrieval_solution_v2.1.csv``.

    It has the columns id, images (ids of index photos, separated by spaces) and Usage. Queries of
    the usage "Ignored" show no landmark of the index; they do not count.

    Args:
        solution: the file.
        index_names: the gallery, the column id of ``index.csv``.
        usage: which half of the queries: the papers report both.

    Raises:
        GroundTruthError: the file can't be used; the message names the line.
    """
    where = show_path(solution)
    number_of = {name: number for number, name in enumerate(index_names)}
    positives: dict[str, np.ndarray] = {}
    seen = set()
    try:
        with Path(solution).open(newline="", encoding="utf-8") as file:
            lines = csv.reader(file)
            header = next(lines, [])
            if header != ["id", "images", "Usage"]:
                raise GroundTruthError(
                    f"{where}, line 1: the columns must be id,images,Usage, not {','.join(header)}"
                )
            for line in lines:
                try:
                    query, images, use = _solution_line(line, number_of)
                    if query in seen:
                        raise GroundTruthError(f"query {query!r} is there twice")
                except GroundTruthError as error:
                    raise GroundTruthError(f"{where}, line {lines.line_num}: {error}") from None
                seen.add(query)
                if use == usage:
                    positives[query] = np.array(images)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise GroundTruthError(f"{where} can't be read as a CSV file: {error}") from None
    junk = [np.empty(0, dtype=np.int64)] * len(positives)
    try:
        return GroundTruth(list(positives), list(index_names), list(positives.values()), junk)
    except GroundTruthError as error:
        raise GroundTruthError(f"{where}, usage {usage!r}: {error}") from None


def _solution_line(line: list[str], number_of: dict[str, int]) -> tuple[str, list[int], str]:
    """A query, the numbers of its images and its usage."""
    if len(line) != 3 or not line[0]:
        raise GroundTruthError("it is not id,images,Usage")
    query, images, usage = line
    if usage not in ("Public", "Private", "Ignored"):
        raise GroundTruthError(f"usage {usage!r} is none of Public, Private, Ignored")
    if usage == "Ignored":
        if images not in ("", "None"):
            raise GroundTruthError(f"query {query!r} is ignored, but has images")
        return query, [], usage
    names = images.split()
    if not names:
        raise GroundTruthError(f"query {query!r} has no images")
    if unknown := [name for name in names if name not in number_of]:
        raise GroundTruthError(f"image {unknown[0]!r} is not in the index")
    if len(set(names)) < len(names):
        raise GroundTruthError(f"query {query!r} lists an image twice")
    return query, [number_of[name] for name in names], usage


# --------------------------------------------------------------------------------------------------
# Oxford and Paris revisited
# --------------------------------------------------------------------------------------------------


def read_revisited(path: Path) -> dict[str, GroundTruth]:
    """Read the ground truth of Oxford or Paris revisited, ``gnd_roxford5k.pkl`` or the like.

    Positives are annotated as easy or hard, and the three levels of Radenović, Iscen, Tolias,
    Avrithis, Chum, "Revisiting Oxford and Paris", CVPR 2018, put them to use:

    * easy: the easy ones are positives, the hard ones junk;
    * medium: both are positives;
    * hard: the hard ones are positives, the easy ones junk.

    Nothing that a pickle says is executed: of its objects only arrays and numbers of numpy are
    known here, and rebuilt from their bytes.

    Args:
        path: the ``.pkl`` or the ``.mat`` file; both hold the same.

    Returns:
        "easy", "medium" and "hard", with boxes.

    Raises:
        GroundTruthError: the file can't be used; the message names the query.
    """
    path = Path(path)
    try:
        content = _load(path)
        gallery, queries = _names(content, "imlist"), _names(content, "qimlist")
        entries = content.get("gnd")
        if not isinstance(entries, list) or len(entries) != len(queries):
            raise GroundTruthError(f"gnd is no list of {len(queries)} queries")
        first = 1 if path.suffix == ".mat" else 0
        boxes, lists = np.empty((len(queries), 4)), []
        for number, (name, entry) in enumerate(zip(queries, entries, strict=True)):
            try:
                boxes[number] = _box(entry)
                lists.append({kind: _photos(entry, kind, first) for kind in _KINDS})
            except GroundTruthError as error:
                raise GroundTruthError(f"query {number} ({name!r}): {error}") from None

        def joined(kinds: tuple[str, ...]) -> list[np.ndarray]:
            return [np.concatenate([photos[kind] for kind in kinds]) for photos in lists]

        return {
            level: GroundTruth(queries, gallery, joined(positives), joined(junk), boxes)
            for level, (positives, junk) in _LEVELS.items()
        }
    except GroundTruthError as error:
        raise GroundTruthError(f"{show_path(path)}: {error}") from None


def _load(path: Path) -> dict:
    try:
        if path.stat().st_size > LARGEST:
            raise GroundTruthError(f"such a file has never more than {LARGEST / 1e6:.0f} MB")
        return _load_mat(path) if path.suffix == ".mat" else _load_pickle(path)
    except GroundTruthError:
        raise
    except Exception as error:  # whatever a damaged file leads to, deep in a parser
        raise GroundTruthError(f"it can't be read ({error})") from None


def _names(content: dict, key: str) -> list[str]:
    names = content.get(key)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise GroundTruthError(f"{key} is no list of names")
    return names


def _numbers(entry: Any, key: str) -> np.ndarray:
    values = entry.get(key) if isinstance(entry, dict) else None
    try:
        # MATLAB has empty lists in any shape.
        return np.asarray([] if values is None else values, dtype=np.float64).reshape(-1)
    except (TypeError, ValueError):
        raise GroundTruthError(f"{key} is no list of numbers") from None


def _box(entry: Any) -> np.ndarray:
    box = _numbers(entry, "bbx")
    if len(box) != 4:
        raise GroundTruthError(f"bbx has {len(box)} numbers instead of 4")
    return box


def _photos(entry: Any, kind: str, first: int) -> np.ndarray:
    """Photos counted from 0, in a file that counts from ``first``."""
    if not isinstance(entry, dict) or kind not in entry:
        raise GroundTruthError(f"it has no list {kind}")
    numbers = _numbers(entry, kind)
    if not np.isfinite(numbers).all() or (numbers != np.floor(numbers)).any():
        raise GroundTruthError(f"{kind} has a number that is not whole")
    return numbers.astype(np.int64) - first


def _load_mat(path: Path) -> dict:
    content = loadmat(path, simplify_cells=True, variable_names=["imlist", "qimlist", "gnd"])
    # A list of one is simplified, too.
    return {
        key: [value] if isinstance(value, (str, dict)) else list(value)
        for key, value in content.items()
        if key in ("imlist", "qimlist", "gnd")
    }


def _load_pickle(path: Path) -> dict:
    data = path.read_bytes()
    # The unpickler makes room for as many objects as the largest number given to one.
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and argument > len(data):
            raise GroundTruthError(f"the pickle is damaged: it has no {argument} objects")
    # Strings of Python 2, those in arrays too, become str with a letter for each byte.
    content = _Unpickler(BytesIO(data), encoding="latin1").load()
    if not isinstance(content, dict):
        raise GroundTruthError("the pickle holds no dictionary")
    entries = content.get("gnd")
    if isinstance(entries, list):
        content["gnd"] = [
            {key: value.values if isinstance(value, _Array) else value for key, value in e.items()}
            if isinstance(e, dict)
            else None
            for e in entries
        ]
    return content


class _Unpickler(pickle.Unpickler):
    """Builds only what numpy's arrays and numbers need, all of it from classes in this file."""

    def find_class(self, module: str, name: str) -> _Global:
        stand_in = _GLOBALS.get((module.replace("numpy._core.", "numpy.core."), name))
        if stand_in is None:
            raise GroundTruthError(f"the pickle asks for {module}.{name}: it is refused")
        return stand_in


class _Global:
    """Stands in for a function or class that a pickle calls. It can't be changed from there."""

    __slots__ = ("_call",)

    def __init__(self, call: Callable):
        self._call = call

    def __call__(self, *arguments: Any) -> Any:
        return self._call(*arguments)

    def __setstate__(self, state: Any) -> None:
        raise GroundTruthError("the pickle changes a function: it is refused")


class _Dtype:
    """Stands in for numpy.dtype: the type of plain numbers."""

    def __init__(self, name: Any, *_: Any):
        if not (isinstance(name, str) and re.fullmatch("[iuf][1248]", name)):
            raise GroundTruthError(f"the pickle has an array of {name!r}, not of numbers")
        self.name, self.order = name, "|"

    def __setstate__(self, state: tuple) -> None:
        if state[1] not in ("<", ">", "|", "="):
            raise GroundTruthError(f"the pickle has numbers of byte order {state[1]!r}")
        self.order = state[1]

    def read(self, shape: tuple, data: bytes | str, order: str) -> np.ndarray:
        if isinstance(data, str):  # from Python 2
            data = data.encode("latin1")
        values = np.frombuffer(data, dtype=np.dtype(self.order + self.name))
        if values.size != math.prod(shape):
            raise GroundTruthError(f"the pickle has {values.size} numbers for an array of {shape}")
        return values.reshape(shape, order=order)


class _Array:
    """Stands in for numpy.ndarray."""

    def __init__(self, *_: Any):
        pass

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, by_columns, data = state
        self.values = dtype.read(shape, data, "F" if by_columns else "C")


def _encode(text: str, encoding: str) -> bytes:
    """How protocols 0 to 2 write bytes."""
    if encoding != "latin1":
        raise GroundTruthError(f"the pickle has bytes in {encoding!r}")
    return text.encode("latin1")


_GLOBALS = {
    ("numpy", "ndarray"): _Global(_Array),
    ("numpy", "dtype"): _Global(_Dtype),
    ("numpy.core.multiarray", "_reconstruct"): _Global(_Array),
    ("numpy.core.multiarray", "scalar"): _Global(
        lambda dtype, data: dtype.read((), data, "C").item()
    ),
    ("numpy.core.numeric", "_frombuffer"): _Global(
        lambda data, dtype, shape, order: dtype.read(shape, data, order)
    ),
    ("_codecs", "encode"): _Global(_encode),
    ("__builtin__", "bytes"): _Global(lambda: b""),  # so do protocols 0 to 2 write empty bytes
}
