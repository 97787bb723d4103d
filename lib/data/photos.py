"""Photos in folders: the test set with its ground truth, and a gallery with a folder per landmark.

test_set = read_test_set(Path("Test_set"), image_size=128)
test_set.photos, test_set.names, test_set.query, test_set.positives
"""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from lib.data.decoding import reduction, resize
from lib.files import show_path

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
GROUND_TRUTH = "ground_truth.csv"
ROLES = ("query", "positive", "distractor")

# Pillow warns from 89 megapixels on, which panoramas have, and refuses twice as many.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

# Threads that read photos hold few large ones in memory at a time: one.
_LARGE = 2**24  # pixels
_one_large_photo = threading.Lock()


class PhotoError(ValueError):
    """A file is no readable picture; the message names it."""


class TestSetError(ValueError):
    """A test set or its ground truth can't be used; the message says what to mend."""

    __test__ = False  # its name begins with Test, but it is no test case


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


def read_photo(path: Path, image_size: int) -> np.ndarray:
    """Read a picture file as uint8 (image_size, image_size, 3) RGB.

    Turned upright by its EXIF orientation, and squashed to a square like the photos of the training
    set: a network should see at evaluation what it saw in training. Whatever Pillow opens will do:
    16 bits become 8, what is transparent is laid on white, an animation is its first frame.

    Raises:
        PhotoError: not a picture, a damaged one, or one of more than 178 megapixels.
    """
    try:
        with Image.open(path) as image:
            return square_of(image, image_size)
    except MemoryError:
        raise
    except Exception as error:  # decoders of damaged files raise whatever they like
        raise PhotoError(f"{show_path(path)} is not a readable picture ({error})") from None


def square_of(image: Image.Image, image_size: int) -> np.ndarray:
    """An opened picture as the network wants it: see :func:`read_photo`, which opens it itself.

    Raises:
        Exception: whatever the decoder of a damaged file likes.
    """
    # A JPEG file is made smaller as the training photos are, see lib.data.decoding.
    factor = reduction(*image.size, image_size)
    image.draft(None, tuple(side // factor for side in image.size))
    with _in_turn(image):
        image = _upright(image)
        factor = min(image.size) // (2 * image_size)
        if image.width * image.height > _LARGE and factor > 1:
            image = image.reduce(factor)  # an array of it would be two more copies
        return resize(np.asarray(image), image_size)


def picture_of(image: Image.Image, longest: int) -> Image.Image:
    """An opened picture as people want it: upright, not squashed, small enough for a page.

    Args:
        image: as opened by Pillow.
        longest: pixels of the longer side, at most; a smaller picture stays as it is.

    Raises:
        Exception: whatever the decoder of a damaged file likes.
    """
    image.draft(None, (longest, longest))
    with _in_turn(image):
        image = _upright(image)
        image.thumbnail((longest, longest))
        return image


def _in_turn(image: Image.Image) -> contextlib.AbstractContextManager:
    large = image.width * image.height > _LARGE
    return _one_large_photo if large else contextlib.nullcontext()


def _upright(image: Image.Image) -> Image.Image:
    """A picture in RGB, turned by its EXIF orientation, with few copies on the way."""
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I"):  # I;16 and its like: grey in 16 bits
        grey = (np.asarray(image) >> 8).clip(0, 255).astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
    if image.has_transparency_data:
        image = image if image.mode == "RGBA" else image.convert("RGBA")
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=image.getchannel("A"))
        return white
    return image if image.mode == "RGB" else image.convert("RGB")


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


def list_photos(folder: Path) -> list[Path]:
    """The picture files of a folder (not of its subfolders), sorted by name."""
    folder = Path(folder)
    if not folder.is_dir():
        return []
    return sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in SUFFIXES and path.is_file() and not path.name.startswith(".")
    )


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
        photos, uint8 (n, s, s, 3) RGB; labels, str (n,), the name of each photo's subfolder; and a
        message for each photo that could not be read.

    Raises:
        TestSetError: no subfolder holds a readable photo.
    """
    folder = Path(folder)
    landmarks = sorted(path for path in folder.glob("*") if path.is_dir())
    paths = [path for landmark in landmarks for path in list_photos(landmark)]
    photos, kept, skipped = read_photos(paths, image_size)
    if not kept:
        raise TestSetError(
            f"{show_path(folder)} holds no photos: it should have a folder of photos a landmark"
        )
    return photos, np.array([path.parent.name for path in kept]), skipped
