"""Lists labelled photos of a folder or a CSV file, and plans triplets of them.

photos = read_folder(Path("photos"))          # or read_csv(Path("train.csv"), Path("train"))
plan = plan_triplets(photos.landmark, seed=0)
"""

from __future__ import annotations

import os
import sys
import unicodedata
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import pandas as pd

from lib.data.photos import NoPhotosError, landmark_name, landmark_photos, left_out_lines
from lib.files import read_table, show_path

_LARGEST_LIST = 2**31  # bytes; that of Google Landmarks v2 has 500 MB
_OUTSIDE = "links to files outside of the folder"


class ConversionError(ValueError):
    """The photos can't be converted; the message says what to change."""


@dataclass(frozen=True)
class LabelledPhotos:
    """Photos of known landmarks.

    Attributes:
        table: columns image_id, path and landmark_id, all str; sorted by landmark, in order of
            first appearance.
        absent: the same for photos that are listed but absent.
        left_out: how many files and folders were left out, by reason.
    """

    table: pd.DataFrame
    absent: pd.DataFrame
    left_out: dict[str, int] = field(default_factory=dict)

    @property
    def landmark(self) -> np.ndarray:
        """Number of each photo's landmark, int64 (n,), from 0 in ascending order."""
        return pd.factorize(self.table["landmark_id"])[0]


def read_folder(folder: Path) -> LabelledPhotos:
    """List the photos of a folder with a subfolder for each landmark, sorted by name.

    The image id is ``<landmark>/<file name>``.

    Raises:
        ConversionError: no photos.
    """
    try:
        found, left_out = landmark_photos(folder)
    except NoPhotosError as error:
        raise ConversionError(str(error)) from None
    paths = [path for path in found if _is_text(f"{path.parent.name}/{path.name}")]
    if len(paths) < len(found):
        left_out["photos whose names are not UTF-8"] = len(found) - len(paths)
    if not paths:
        message = f"{show_path(folder)} has no subfolders with photos: give each landmark one, or "
        message += "name the CSV file with the labels"
        raise ConversionError("; ".join([message, *left_out_lines(left_out)]))
    rows = [(f"{p.parent.name}/{p.name}", landmark_name(p.parent.name)) for p in paths]
    table = pd.DataFrame(rows, columns=["image_id", "landmark_id"])
    # Of type object, as pandas' own type for text takes no folders whose names are not UTF-8.
    table["path"] = pd.Series(list(map(str, paths)), dtype=object)
    # Two folders may be one landmark's.
    order = np.argsort(pd.factorize(table["landmark_id"])[0], kind="stable")
    table = table.iloc[order].reset_index(drop=True)
    return LabelledPhotos(table, table.iloc[:0], left_out)


def _is_text(name: str) -> bool:
    return name == name.encode(errors="ignore").decode()


def read_csv(labels: Path, image_root: Path) -> LabelledPhotos:
    """List the photos of Google Landmarks v2's ``train.csv`` or a similar file.

    It needs the columns ``id`` and ``landmark_id``, see :func:`lib.files.read_table`. A photo's
    path is ``<image_root>/<a>/<b>/<c>/<id>.jpg``, where a, b, c are the first three characters of
    its id (https://github.com/cvdf/google-landmark). Photos whose paths lead out of ``image_root``
    are left out.

    Raises:
        ConversionError: the file can't be used, or none of its photos exists.
    """
    columns = ("id", "landmark_id")
    rows = partial(read_table, labels, columns, ConversionError, limit=_LARGEST_LIST)
    where, ids, landmarks = show_path(labels), [], []
    for _, (image_id, landmark_id) in rows():
        ids.append(image_id.strip())
        landmark_id = unicodedata.normalize("NFC", landmark_id.strip())
        landmarks.append(sys.intern(landmark_id))  # most are repeated
    table = pd.DataFrame({"image_id": ids, "landmark_id": landmarks}, dtype=str)
    wrong = (table == "").any(axis=1) | table["image_id"].duplicated()
    if wrong.any():
        line, _ = next(islice(rows(), int(wrong.argmax()), None))
        raise ConversionError(f"{where}, line {line}: the id is repeated, or something is empty")
    paths = [f"{_folder(str(image_root), name)}{name}.jpg" for name in ids]
    # Listing the folders (4096 for the whole set) is far faster than looking for each photo.
    root, found, locked = os.path.realpath(image_root), {}, 0
    for folder in filter(os.path.isdir, {_folder(str(image_root), name) for name in ids}):
        inside = _leads_into(folder, root)
        try:
            with os.scandir(folder) as entries:
                found |= {e.path: _fault(e, root) if inside else _OUTSIDE for e in entries}
        except OSError:
            locked += 1
    fault = pd.Series([found.get(path, "absent") for path in paths], dtype=str)
    present, absent = fault == "", fault == "absent"
    left_out = {"folders that can't be read": locked} if locked else {}
    left_out |= fault[~present & ~absent].value_counts().to_dict()
    if not present.any():
        raise ConversionError(
            f"none of the {len(table):,} photos that {where} lists is in folders <a>/<b>/<c> of "
            f"{show_path(image_root)}: name the right folder, and unpack the photos there"
            + "".join(f"; {line}" for line in left_out_lines(left_out))
        )
    table["path"] = pd.Series(paths, dtype=object)
    absent, table = table[absent], table[present]
    together = np.argsort(pd.factorize(table["landmark_id"])[0], kind="stable")
    return LabelledPhotos(table.iloc[together].reset_index(drop=True), absent, left_out)


def _folder(image_root: str, image_id: str) -> str:
    return f"{image_root}/{image_id[:1]}/{image_id[1:2]}/{image_id[2:3]}/"


def _fault(entry: os.DirEntry, root: str) -> str:
    """Why a file is left out, or "" if it is not, as :func:`lib.data.photos.find_photos` has it."""
    try:
        if entry.is_dir():
            return "folders that are named like photos"
        if not entry.is_file():
            return "files that are absent"
        return _OUTSIDE if entry.is_symlink() and not _leads_into(entry.path, root) else ""
    except OSError:
        return "files that can't be read"


def _leads_into(path: str, root: str) -> bool:
    return Path(os.path.realpath(path)).is_relative_to(root)


def plan_triplets(landmark: np.ndarray, seed: int) -> np.ndarray:
    """Choose anchor, positive and negative of each record.

    Each photo of a landmark with at least two photos is the anchor of one record, in input order.
    Its positive is drawn from the landmark's other photos. Negatives are taken in turn from a
    permutation of all photos, skipping those of the anchor's landmark. Photos of landmarks with a
    single photo come early in the permutation, since they can serve as negatives only.

    Args:
        landmark: number of each photo's landmark, int (n,), from 0 in ascending order.
        seed: of the random choices.

    Returns:
        int64 (records, 3), photos.

    Raises:
        ConversionError: there are fewer than two landmarks, or none has two photos.
    """
    count = np.bincount(landmark)
    if len(count) < 2 or count.max() < 2:
        raise ConversionError(
            f"{len(landmark)} photos of {len(count)} landmarks make no triplet: at least two "
            "landmarks are needed, one of them with at least two photos"
        )
    rng = np.random.default_rng(seed)
    anchors = np.flatnonzero(count[landmark] > 1)
    size, start = count[landmark[anchors]], (np.cumsum(count) - count)[landmark[anchors]]
    step = rng.integers(1, size)  # cyclically from the anchor to another photo of the landmark
    positives = start + (anchors - start + step) % size

    order = rng.permutation(len(landmark))
    order = order[np.argsort(count[landmark[order]] > 1, kind="stable")]  # single photos first,
    order[: len(anchors)] = rng.permutation(order[: len(anchors)])  # mixed with the first others
    shown = landmark[order]
    changes = np.flatnonzero(shown != np.roll(shown, 1))  # where the landmark changes
    next_change = changes[np.searchsorted(changes, np.arange(len(order)), "right") % len(changes)]
    negatives, turn = [], 0
    for own in landmark[anchors]:
        if shown[turn] == own:
            turn = next_change[turn]
        negatives.append(order[turn])
        turn = (turn + 1) % len(order)
    return np.stack([anchors, positives, negatives], axis=1)
