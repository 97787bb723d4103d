"""Photos in folders: found, read upright in RGB, a test set with its ground truth.

paths, left_out = find_photos(Path("my photos"))
photo = read_photo(paths[0], image_size=128)     # uint8 (128, 128, 3)
test_set = read_test_set(Path("Test_set"), image_size=128)
test_set.photos, test_set.names, test_set.query, test_set.positives
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import ExifTags, Image

from lib.data.decoding import reduction, resize
from lib.files import show_path

SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif"),
    *(".png", ".webp", ".avif", ".gif", ".bmp", ".tif", ".tiff"),
)
# Pillow opens far more, some of it with the help of other programs (Ghostscript for PostScript).
FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF")
_UNREAD_SUFFIXES = (".heic", ".heif", ".jxl", ".dng")  # photos, too, which Pillow does not read

GROUND_TRUTH = "ground_truth.csv"
ROLES = ("query", "positive", "distractor")

# Threads that read photos hold few large ones in memory at a time: one.
_LARGE = 2**24  # pixels
_one_large_photo = threading.Lock()

_TO_UPRIGHT = {  # by EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class PhotoError(ValueError):
    """A file is not a readable picture; the message names it."""


class NoPhotosError(ValueError):
    """A folder holds no photos that can be read; the message says what it should hold."""


class TestSetError(ValueError):
    """A test set or its ground truth can't be used; the message says what to change."""

    __test__ = False  # its name begins with Test, but it is no test case


# --------------------------------------------------------------------------------------------------
# Finding
# --------------------------------------------------------------------------------------------------


class FoundPhotos(NamedTuple):
    """The photos of a folder.

    Attributes:
        paths: their paths.
        left_out: how many files and folders were left out, by reason.
    """

    paths: list[Path]
    left_out: dict[str, int]


def find_photos(folder: Path, subfolders: bool = True) -> FoundPhotos:
    """Find picture files by their names: those of the folder, then those of each subfolder.

    Both are in the order of their names. Names that begin with a dot are ignored, like files that
    are not photos. Left out and counted are: links to folders, since what they lead to is either
    found without them or lies outside of ``folder``; links to files outside; folders that can't be
    read; files that vanish meanwhile; and photos in formats that are not supported.

    Args:
        folder: may be absent: then there are no photos.
        subfolders: whether to look into all folders below.
    """
    root = os.path.realpath(folder)
    paths, left_out, folders = [], Counter(), [Path(folder)]
    while folders:
        below = []
        try:
            with os.scandir(folders.pop()) as entries:
                entries = sorted(entries, key=lambda entry: entry.name)
        except FileNotFoundError:
            continue
        except OSError:
            left_out["folders that can't be read"] += 1
            continue
        for entry in (entry for entry in entries if not entry.name.startswith(".")):
            kind, path = os.path.splitext(entry.name)[1].lower(), Path(entry.path)
            try:
                if entry.is_dir():
                    if not subfolders:
                        continue
                    if entry.is_symlink():
                        left_out["links to folders"] += 1
                    else:
                        below.append(path)
                elif kind in _UNREAD_SUFFIXES:
                    left_out[f"{kind} files"] += 1
                elif kind in SUFFIXES and not entry.is_file():
                    left_out["files that are absent"] += 1
                elif kind in SUFFIXES and entry.is_symlink() and not _is_inside(path, root):
                    left_out["links to files outside of the folder"] += 1
                elif kind in SUFFIXES:
                    paths.append(path)
            except OSError:
                left_out["files that can't be read"] += 1
        folders += reversed(below)
    return FoundPhotos(paths, dict(left_out))


def _is_inside(path: Path, root: str) -> bool:
    return Path(os.path.realpath(path)).is_relative_to(root)


def landmark_photos(folder: Path) -> FoundPhotos:
    """Find the photos of a folder with a subfolder for each landmark, in sorted order.

    Photos beside the subfolders and in folders further down are left out, and counted.
    """
    paths, left_out = find_photos(folder)
    depth = len(Path(folder).parts) + 2
    kept = [path for path in paths if len(path.parts) == depth]
    if len(kept) < len(paths):
        left_out["photos that are not in a landmark's folder itself"] = len(paths) - len(kept)
    return FoundPhotos(kept, left_out)


def list_photos(folder: Path) -> list[Path]:
    """The photos of a folder itself, without its subfolders, see :func:`find_photos`."""
    return find_photos(folder, subfolders=False).paths


# --------------------------------------------------------------------------------------------------
# Reading
# --------------------------------------------------------------------------------------------------


def open_picture(file: Path | BinaryIO) -> Image.Image:
    """Open a picture file if it has one of FORMATS, without decoding it; to be closed after use.

    Raises:
        OSError: it can't be read, or is not such a picture.
        PIL.Image.DecompressionBombError: it has more than 178 megapixels.
    """
    return Image.open(file, formats=FORMATS)


def read_photo(path: Path, image_size: int) -> np.ndarray:
    """Read a picture file as uint8 (image_size, image_size, 3) RGB.

    It is turned upright (:func:`upright_rgb`) and squashed to a square like the photos of the
    training set: a network should see at evaluation what it saw in training.

    Raises:
        PhotoError: not a picture of FORMATS, a damaged one, or one of more than 178 megapixels.
    """
    try:
        with open_picture(path) as image:
            return square_of(image, image_size)
    except MemoryError:
        raise
    except Exception as error:  # decoders of damaged files raise anything
        raise PhotoError(f"{show_path(path)} is not a readable picture ({error})") from None


def square_of(image: Image.Image, image_size: int) -> np.ndarray:
    """An opened picture as the network takes it, see :func:`read_photo`.

    Raises:
        Exception: anything that the decoder of a damaged file raises.
    """
    # A JPEG file is made smaller as the training photos are, see lib.data.decoding.
    factor = reduction(*image.size, image_size)
    image.draft(None, tuple(side // factor for side in image.size))
    with _in_turn(image):
        image = upright_rgb(image)
        factor = min(image.size) // (2 * image_size)
        if image.width * image.height > _LARGE and factor > 1:
            image = image.reduce(factor)  # an array of it would be two more copies
        return resize(np.asarray(image), image_size)


def picture_of(image: Image.Image, longest: int) -> Image.Image:
    """An opened picture as people see it: upright, in RGB, in its own shape.

    Args:
        image: from :func:`open_picture`.
        longest: most pixels of the longer side; a smaller picture keeps its size.

    Raises:
        Exception: anything that the decoder of a damaged file raises.
    """
    scale = 2 * longest / max(image.size)  # twice, so that the rest is up to good filtering
    image.draft(None, tuple(max(round(side * scale), 1) for side in image.size))
    with _in_turn(image):
        image = upright_rgb(image)
        image.thumbnail((longest, longest))
        return image


def _in_turn(image: Image.Image) -> contextlib.AbstractContextManager:
    large = image.width * image.height > _LARGE
    return _one_large_photo if large else contextlib.nullcontext()


def upright_rgb(image: Image.Image) -> Image.Image:
    """Convert a picture to 8-bit RGB and turn it by its EXIF orientation.

    16 bits become 8, rounded; transparent parts are laid on white; of an animation it takes the
    first frame.
    """
    image.load()
    orientation = None
    with contextlib.suppress(Exception):  # EXIF that can't be parsed spoils no picture
        # ImageOps.exif_transpose would write all EXIF anew, and fails where any of it is odd.
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    if image.mode.startswith("I"):  # grey in 16 bits, or in 32 of which 16 are used
        # Rounds v / 257; the limit keeps the sum within 16 bits.
        grey = (np.asarray(image).clip(0, 65407) + 128) // 257
        image = Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    elif image.has_transparency_data:
        image = image if image.mode == "RGBA" else image.convert("RGBA")
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=image.getchannel("A"))
        image = white
    elif image.mode != "RGB":
        image = image.convert("RGB")
    method = _TO_UPRIGHT.get(orientation) if isinstance(orientation, int) else None
    return image if method is None else image.transpose(method)


def read_photos(paths: Iterable[Path], image_size: int) -> tuple[np.ndarray, list[Path], list[str]]:
    """Read many pictures, going on past those that fail.

    Returns:
        photos, uint8 (n, s, s, 3); the n paths they came from; and a message for each that failed.
    """
    photos, kept, skipped = [], [], []
    for path in paths:
        try:
            photos.append(read_photo(path, image_size))
            kept.append(path)
        except PhotoError as error:
            skipped.append(str(error))
    shape = (-1, image_size, image_size, 3)
    return np.asarray(photos, dtype=np.uint8).reshape(shape), kept, skipped


# First and largest step of the quantization table that the JPEG standard suggests for brightness
# (ITU-T T.81, table K.1). libjpeg's "quality" scales the whole table, so two steps show the scale.
_FIRST_STEP, _LARGEST_STEP = 16, 121


def jpeg_quality(image: Image.Image) -> int | None:
    """The quality from 1 to 100 that a JPEG file was saved with, by libjpeg's scale.

    Args:
        image: as opened by Pillow, not yet changed.

    Returns:
        the quality whose quantization table comes nearest; None if it is no JPEG.
    """
    tables = getattr(image, "quantization", None)
    if not tables:
        return None
    first, largest = tables[0][0], max(tables[0])
    scale = {q: 5000 // q if q < 50 else 200 - 2 * q for q in range(1, 101)}

    def error(quality: int) -> float:
        expected = [
            min(max((step * scale[quality] + 50) // 100, 1), 255)
            for step in (_FIRST_STEP, _LARGEST_STEP)
        ]
        return abs(first - expected[0]) + abs(largest - expected[1])

    return min(scale, key=error)


# --------------------------------------------------------------------------------------------------
# Test set and gallery
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TestSet:
    """The photos to search in and the one to search for.

    Attributes:
        photos: uint8 (n, s, s, 3), RGB.
        names: n file names, in sorted order.
        query: index of the query photo.
        positives: bool (n,), photos of the query's landmark (not the query itself); None without
            ground truth.
        skipped: what could not be read, a message a file.
    """

    __test__ = False

    photos: np.ndarray
    names: list[str]
    query: int
    positives: np.ndarray | None
    skipped: list[str]

    @property
    def gallery(self) -> np.ndarray:
        """Indices of the photos to search in: all but the query, int64 (n - 1,)."""
        return np.delete(np.arange(len(self.names)), self.query)


def read_test_set(folder: Path, image_size: int) -> TestSet:
    """Read the photos of a test set and its ground truth.

    ``ground_truth.csv`` has the columns ``image`` (a file name) and ``role`` (query, positive or
    distractor), with exactly one query. Photos it does not name are distractors. Without the file,
    the first name in sorted order is the query, and what is a positive is not known.

    Raises:
        TestSetError: no readable photo, or a ground truth that does not fit them.
    """
    folder = Path(folder)
    photos, paths, skipped = read_photos(list_photos(folder), image_size)
    names = [path.name for path in paths]
    if not names:
        why = f": {'; '.join(skipped)}" if skipped else ""
        raise TestSetError(
            f"{show_path(folder)} holds no readable photo ({', '.join(SUFFIXES)}){why}. "
            "Test_set/README.md says what belongs there."
        )
    truth_file = folder / GROUND_TRUTH
    if not truth_file.is_file():
        return TestSet(photos, names, query=0, positives=None, skipped=skipped)

    roles = _read_roles(truth_file)
    unreadable = {path.name for path in list_photos(folder)} - set(names)
    for line, (image, role) in enumerate(roles.items(), start=2):
        if image not in names and (image not in unreadable or role == "query"):
            state = "can't be read" if image in unreadable else "does not exist"
            raise TestSetError(
                f"{show_path(truth_file)}, line {line}: {image!r} {state} in {show_path(folder)}"
            )
    role_of = [roles.get(name, "distractor") for name in names]
    positives = np.array([role == "positive" for role in role_of])
    return TestSet(photos, names, role_of.index("query"), positives, skipped)


def _read_roles(truth_file: Path) -> dict[str, str]:
    import pandas as pd  # here: whoever only reads photos starts sooner without it

    where = show_path(truth_file)
    try:
        table = pd.read_csv(truth_file, dtype=str, keep_default_na=False)
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise TestSetError(f"{where} is not a CSV file: {error}") from None
    if not {"image", "role"} <= set(table.columns):
        raise TestSetError(
            f"{where} needs the columns image,role; it has {','.join(table.columns)}"
        )
    roles: dict[str, str] = {}
    for line, (image, role) in enumerate(zip(table["image"], table["role"], strict=True), start=2):
        if role not in ROLES:
            raise TestSetError(f"{where}, line {line}: role {role!r} is none of {', '.join(ROLES)}")
        if image in roles:
            raise TestSetError(f"{where}, line {line}: {image!r} is listed twice")
        roles[image] = role
    lines = [line for line, role in enumerate(roles.values(), start=2) if role == "query"]
    if len(lines) != 1:
        found = f"lines {', '.join(map(str, lines))} do" if lines else "no line does"
        raise TestSetError(f"{where} must name exactly one query; {found}")
    return roles


def read_gallery(folder: Path, image_size: int) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Read a labelled gallery: a folder with a subfolder of photos for each landmark.

    Returns:
        photos, uint8 (n, s, s, 3) RGB; labels, str (n,), the name of each photo's subfolder; and
        messages: one for each photo that could not be read, one for each reason in ``left_out``
        of :func:`landmark_photos`.

    Raises:
        NoPhotosError: no subfolder holds a readable photo.
    """
    paths, left_out = landmark_photos(folder)
    photos, kept, skipped = read_photos(paths, image_size)
    skipped += [f"left out: {count} {reason}" for reason, count in left_out.items()]
    if not kept:
        why = f" ({'; '.join(skipped[:3])})" if skipped else ""
        raise NoPhotosError(
            f"{show_path(folder)} holds no photos{why}: it should have a folder of photos "
            "for each landmark"
        )
    return photos, np.array([path.parent.name for path in kept]), skipped
