"""Reads a test set: one query photo, a gallery, and the ground truth that says what to find.

test_set = read_test_set(Path("Test_set"), image_size=128)
test_set.photos, test_set.names, test_set.query, test_set.positives
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lib.data.photos import (
    SUFFIXES,
    UNREAD_SUFFIXES,
    NoPhotosError,
    find_photos,
    left_out_lines,
    read_photos,
)
from lib.files import read_table, show_path

GROUND_TRUTH = "ground_truth.csv"
ROLES = ("query", "positive", "distractor")


class TestSetError(ValueError):
    """A test set or its ground truth can't be used; the message says what to change."""

    __test__ = False  # pytest takes it for a test case otherwise


@dataclass(frozen=True)
class TestSet:
    """One query photo and a gallery.

    Attributes:
        photos: uint8 (n, s, s, 3) RGB, the query among them.
        names: n file names, sorted.
        query: index of the query photo.
        positives: bool (n,), other photos of the query's landmark; None without ground truth.
        skipped: a message for each file that could not be read, and for each reason for which
            others were left out.
    """

    __test__ = False

    photos: np.ndarray
    names: list[str]
    query: int
    positives: np.ndarray | None
    skipped: list[str]

    @property
    def gallery(self) -> np.ndarray:
        """Indices of all photos but the query, int64 (n - 1,)."""
        return np.delete(np.arange(len(self.names)), self.query)


def read_test_set(folder: Path, image_size: int) -> TestSet:
    """Read the photos of a test set and its ground truth.

    ``ground_truth.csv`` has the columns ``image`` (a file name) and ``role`` (query, positive or
    distractor), with exactly one query. Photos that it does not name are distractors. Without the
    file, the first photo by name is the query, and the positives are unknown.

    Raises:
        TestSetError: no readable photo, or a ground truth that does not match the photos.
    """
    folder = Path(folder)
    try:
        found, left_out = find_photos(folder, subfolders=False)
    except NoPhotosError as error:
        raise TestSetError(f"{error}. Test_set/README.md says what belongs there.") from None
    photos, paths, skipped = read_photos(found, image_size)
    skipped += left_out_lines(left_out)
    names = [path.name for path in paths]
    if not names:
        why = f": {'; '.join(skipped)}" if skipped else ""
        raise TestSetError(
            f"{show_path(folder)} holds no readable photo ({', '.join(SUFFIXES)}){why}. "
            "Test_set/README.md says what belongs there."
        )
    roles = read_roles(folder, names)
    if roles is None:
        return TestSet(photos, names, query=0, positives=None, skipped=skipped)
    role_of = [roles.get(name, "distractor") for name in names]
    positives = np.array([role == "positive" for role in role_of])
    return TestSet(photos, names, role_of.index("query"), positives, skipped)


def read_roles(folder: Path, readable: Sequence[str] | None = None) -> dict[str, str] | None:
    """Read the role of each photo that the ground truth of a test set names; None without one.

    Names that differ only in case, spaces around them or the encoding of accents are the same if
    just one photo has such a name.

    Args:
        folder: of the test set.
        readable: names of the photos that can be read, the query among them; None: any names.

    Raises:
        TestSetError: the file can't be read, or does not fit; the message names the line.
    """
    found = list(folder.iterdir())
    files = sorted(path for path in found if path.name.casefold() == GROUND_TRUTH)
    if not files:
        for path in found:
            is_list = re.sub("[^a-z]", "", path.name.casefold()).startswith("groundtruth")
            if is_list and path.suffix.lower() not in SUFFIXES:
                raise TestSetError(
                    f"{show_path(path)} is not read: save it as CSV, named {GROUND_TRUTH}"
                )
        return None
    where = show_path(files[-1])  # capitals come first, so it is the usual name if that exists
    alike: dict[str, list[str]] = {}
    for path in found:
        if path.suffix.lower() in (*SUFFIXES, *UNREAD_SUFFIXES):
            alike.setdefault(_folded(path.name), []).append(path.name)
    roles: dict[str, str] = {}
    queries = []
    for line, (image, role) in read_table(
        files[-1], ("image", "role"), TestSetError, "surrogateescape"
    ):
        fits = alike.get(_folded(image), [])
        if image in fits or (readable is None and not fits):
            fits = [image]
        role, shown, problem = role.strip().strip('"').strip().lower(), repr(image[:200]), None
        if role not in ROLES:
            problem = f"role {role[:200]!r} is none of {', '.join(ROLES)}"
        elif len(fits) > 1:
            problem = f"{shown} fits {' and '.join(map(repr, fits))}: write the name as it is"
        elif not fits:
            hint = "" if image.isprintable() else ": save the list as 'CSV UTF-8'"
            problem = f"{shown} does not exist in {show_path(folder)}{hint}"
        elif fits[0] in roles:
            problem = f"{shown} is listed twice"
        elif role == "query" and readable is not None and fits[0] not in readable:
            problem = f"{shown} can't be read in {show_path(folder)}"
        if problem:
            raise TestSetError(f"{where}, line {line}: {problem}")
        roles[fits[0]] = role
        queries += [str(line)] * (role == "query")
    if len(queries) != 1:
        found = f"lines {', '.join(queries[:9])} do" if queries else "no line does"
        raise TestSetError(f"{where} must name exactly one query; {found}")
    return roles


def _folded(name: str) -> str:
    """Equal for file names that people take for the same."""
    raw = os.fsencode(name)
    try:
        text = raw.decode()
    except UnicodeDecodeError:  # older programs for Windows write this
        text = raw.decode("cp1252", "replace")
    return unicodedata.normalize("NFC", text.strip(' "\t\r\n').casefold())
