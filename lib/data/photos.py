"""Finds photos in folders and reads them upright in RGB.

paths, left_out = find_photos(Path("my photos"))
photo = read_photo(paths[0], image_size=128)     # uint8 (128, 128, 3)
photos, labels, messages = read_gallery(Path("a folder per landmark"), image_size=128)
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import re
import threading
import unicodedata
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import simplejpeg
from PIL import ExifTags, Image, UnidentifiedImageError

from lib.data.decoding import is_endless, reduction, resize
from lib.files import show_error, show_name, show_path

SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".pjpeg", ".pjp", ".mpo"),
    *(".png", ".webp", ".avif", ".heic", ".heif", ".hif", ".gif", ".bmp", ".tif", ".tiff"),
)
# Pillow opens more formats, some by starting other programs (Ghostscript for PostScript).
FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "HEIF", "GIF", "BMP", "TIFF")
FORMAT_NAMES = "JPEG, PNG, WebP, AVIF, HEIC, GIF, BMP and TIFF"  # for people
_JPEG = ("JPEG", "MPO")  # what Pillow calls a JPEG file with one picture, and with several
UNREAD_SUFFIXES = (  # photos that Pillow can't read, or not as a camera shows them; archives
    *(".jxl", ".jp2", ".psd", ".svg", ".tar", ".tgz", ".gz"),
    *(".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".raf", ".rw2", ".zip", ".rar", ".7z"),
)

# Left, top, right and bottom edge in pixels of the upright picture.
Box = tuple[float, float, float, float]

_MOST_BYTES = 2**28  # of a file that is looked into
_PALE = 224  # a grey that is hardly seen on white
_LARGE = 2**24  # pixels; only one thread at a time decodes such a photo, to save memory
_one_large_photo = threading.Lock()
_MOST_MEMORY = 2**30  # bytes that decoding a picture may take, however small its file is
_BYTES_PER_PIXEL = {"JPEG": 6, "MPO": 6, "WEBP": 17, "AVIF": 13, "HEIF": 17}  # while decoding

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


class _EmptyCropError(ValueError):
    """A box lies outside of its picture."""


class NoPhotosError(ValueError):
    """A folder holds no photos that can be read; what it holds is in ``left_out``, by reason."""

    def __init__(self, message: str, left_out: dict[str, int] | None = None):
        self.left_out = left_out or {}
        super().__init__("; ".join([message, *left_out_lines(self.left_out)]))


# ---- finding


class FoundPhotos(NamedTuple):
    """Paths of photos, and how many files and folders were left out, by reason."""

    paths: list[Path]
    left_out: dict[str, int]


def find_photos(folder: Path, subfolders: bool = True) -> FoundPhotos:
    """Find photos by their suffixes: first those in the folder itself, then each subfolder's.

    Files and folders are sorted by name. Hidden names (with a leading dot) and files that are not
    photos are ignored. Left out and counted are links to folders (which could form loops), links
    to files outside of ``folder``, unreadable folders and files, archives, and photos in formats
    that are not supported.

    Args:
        subfolders: whether to search subfolders at any depth.

    Raises:
        NoPhotosError: there is no such folder.
    """
    if not os.path.isdir(folder):
        raise NoPhotosError(f"there is no folder {show_path(Path(folder))}")
    root = os.path.realpath(folder)  # Path.resolve() raises on links that form a loop
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
        for entry in entries:
            kind, path = os.path.splitext(entry.name)[1].lower(), Path(entry.path)
            try:
                if entry.name.startswith("."):
                    if kind in SUFFIXES or (subfolders and entry.is_dir()):
                        left_out["hidden files and folders"] += 1
                elif entry.is_dir():
                    if subfolders and entry.is_symlink():
                        left_out["links to folders"] += 1
                    elif subfolders:
                        below.append(path)
                elif kind in UNREAD_SUFFIXES:
                    left_out[f"{kind} files"] += 1
                elif kind not in SUFFIXES:
                    # Such as a download that was broken off, or a photo without its suffix.
                    if not kind or any(suffix in entry.name.lower() for suffix in SUFFIXES):
                        left_out["files without the suffix of a photo"] += 1
                elif not entry.is_file():
                    left_out["files that are absent"] += 1
                elif entry.is_symlink() and not path.resolve().is_relative_to(root):
                    left_out["links to files outside of the folder"] += 1
                else:
                    paths.append(path)
            except OSError:
                left_out["files that can't be read"] += 1
        folders += reversed(below)
    return FoundPhotos(paths, dict(left_out))


def landmark_photos(folder: Path) -> FoundPhotos:
    """Find the photos of a folder with a subfolder for each landmark, sorted by name.

    Photos beside these subfolders or deeper than them are left out and counted.
    """
    paths, left_out = find_photos(folder)
    depth = len(Path(folder).parts) + 2
    kept = [path for path in paths if len(path.parts) == depth]
    if len(kept) < len(paths):
        left_out["photos that are not in a landmark's folder itself"] = len(paths) - len(kept)
    return FoundPhotos(kept, left_out)


def landmark_name(folder: str) -> str:
    """The landmark that a folder's name says: one, however its accents are encoded."""
    return show_name(unicodedata.normalize("NFC", folder))


def left_out_lines(left_out: dict[str, int]) -> list[str]:
    """A message for each reason for which files or folders were left out."""
    return [f"left out: {count} {reason}" for reason, count in left_out.items()]


def list_photos(folder: Path) -> list[Path]:
    """The photos of a folder without its subfolders, see :func:`find_photos`."""
    return find_photos(folder, subfolders=False).paths


# ---- reading


@functools.cache
def _register_heif() -> None:
    """Have Pillow read HEIC; not at import, as that would change the whole process."""
    from pillow_heif import register_heif_opener  # here: it loads slowly

    # With thumbnails, a small picture would come from another picture of the file.
    register_heif_opener(thumbnails=False, depth_images=False, aux_images=False)


def open_picture(file: Path | BinaryIO) -> Image.Image:
    """Open a picture file without decoding it; the caller closes it.

    Raises:
        OSError: it can't be read, or is in none of FORMATS.
        PIL.Image.DecompressionBombError: decoding would take many seconds or more than 1 GB (178
            megapixels; 63 of WebP and HEIC, 82 of AVIF, 76 of other pictures with transparency, a
            palette or more than 8 bits).
    """
    _register_heif()
    try:
        image = Image.open(file, formats=FORMATS)
    except UnidentifiedImageError:  # Pillow's message is the file's name
        raise UnidentifiedImageError(
            f"it is damaged, or none of {FORMAT_NAMES}, or of a rare kind, such as with 12 bits"
        ) from None
    try:
        _check_cost(image)
    except BaseException:
        image.close()
        raise
    return image


def _content(image: Image.Image) -> bytes:
    """The bytes of an opened file."""
    image.fp.seek(0)  # Pillow itself seeks before it reads on
    return image.fp.read(_MOST_BYTES)


def read_photo(
    path: Path | BinaryIO, image_size: int, squash: bool = True, crop: Box | None = None
) -> np.ndarray:
    """Read a picture file upright (:func:`upright_rgb`), as uint8 (h, w, 3) RGB.

    Args:
        image_size: h and w of a squashed square, as in training; else the longer side's pixels, at
            most.
        squash: whether to make it a square.
        crop: the part to read; None: all.

    Raises:
        PhotoError: it is damaged, in none of FORMATS, or too large (see :func:`open_picture`), or
            the crop lies outside of it.
    """
    try:
        with open_picture(path) as image:
            return pixels_of(image, image_size, squash, crop)
    except MemoryError:
        raise
    except _EmptyCropError as error:
        raise PhotoError(f"{show_path(path)}: {error}") from None
    except Exception as error:  # decoders of damaged files raise anything
        raise PhotoError(
            f"{show_path(path)} is not a readable picture ({show_error(error)})"
        ) from None


def pixels_of(
    image: Image.Image, image_size: int, squash: bool = True, crop: Box | None = None
) -> np.ndarray:
    """Decode an opened picture for a network, see :func:`read_photo`.

    Raises:
        Exception: anything that the decoder of a damaged file raises.
    """
    if not squash:
        return np.asarray(picture_of(image, image_size, crop))
    if crop is None:
        # The JPEG decoder shrinks by the same factor as for training, see lib.data.decoding.
        factor = reduction(*image.size, image_size)
        image.draft(None, tuple(side // factor for side in image.size))
    with _in_turn(image):
        image = _cropped(upright_rgb(image), crop)
        factor = min(image.size) // (2 * image_size)
        if image.width * image.height > _LARGE and factor > 1:
            image = image.reduce(factor)  # before the array below copies it
        return resize(np.asarray(image), image_size)


def picture_of(image: Image.Image, longest: int, crop: Box | None = None) -> Image.Image:
    """Decode an opened picture in its own shape: upright RGB with its aspect ratio.

    Args:
        image: from :func:`open_picture`.
        longest: the longer side has at most so many pixels; smaller pictures keep their size.
        crop: the part to decode; None: all.

    Raises:
        Exception: anything that the decoder of a damaged file raises.
    """
    if crop is None:
        scale = 2 * longest / max(image.size)  # to twice the size; thumbnail() filters better
        image.draft(None, tuple(max(round(side * scale), 1) for side in image.size))
    with _in_turn(image):
        image = _cropped(upright_rgb(image), crop)
        image.thumbnail((longest, longest))
        return image


def shrunk(photo: np.ndarray, longest: int) -> np.ndarray:
    """Shrink a photo, uint8 (h, w, 3), to a longer side as :func:`picture_of` does."""
    image = Image.fromarray(photo)
    image.thumbnail((longest, longest))
    return np.asarray(image)


def picture_and_size(image: Image.Image, longest: int) -> tuple[Image.Image, tuple[int, int]]:
    """:func:`picture_of`, and width and height in pixels of the whole picture, upright."""
    width, height = image.size  # before the decoder shrinks it
    picture = picture_of(image, longest)
    if (picture.width - picture.height) * (width - height) < 0:  # it was turned upright
        width, height = height, width
    return picture, (width, height)


def _cropped(image: Image.Image, crop: Box | None) -> Image.Image:
    if crop is None:
        return image
    x0, y0, x1, y1 = (round(edge) for edge in crop)
    x0, y0, x1, y1 = max(x0, 0), max(y0, 0), min(x1, image.width), min(y1, image.height)
    if x0 >= x1 or y0 >= y1:
        size = f"{image.width} x {image.height} pixels"
        raise _EmptyCropError(f"no pixel of its {size} lies in the box {show_box(crop)}")
    return image.crop((x0, y0, x1, y1))


def show_box(box: Box) -> str:
    """A box as a command line takes it: "x0,y0,x1,y1"."""
    return ",".join(f"{edge:g}" for edge in box)


def _check_cost(image: Image.Image) -> None:
    pixels = image.width * image.height
    if image.format == "HEIF":  # it is decoded whole, before it is cropped to its size
        sizes = re.findall(rb"ispe\0{4}(....)(....)", _content(image), re.DOTALL)
        pixels = max(pixels, *(int.from_bytes(w) * int.from_bytes(h) for w, h in sizes), 0)
    plain = image.mode in ("1", "L", "RGB") and not image.has_transparency_data
    if pixels * _BYTES_PER_PIXEL.get(image.format, 6 if plain else 14) > _MOST_MEMORY:
        raise Image.DecompressionBombError(f"{pixels / 1e6:.0f} megapixels are too many")
    if image.format in _JPEG and is_endless(_content(image), *image.size):
        raise Image.DecompressionBombError("it has far too many scans")


def _in_turn(image: Image.Image) -> contextlib.AbstractContextManager:
    large = image.width * image.height > _LARGE
    return _one_large_photo if large else contextlib.nullcontext()


def upright_rgb(image: Image.Image) -> Image.Image:
    """Convert a picture to 8-bit RGB and apply its EXIF orientation.

    16 bits are rounded to 8, numbers from 0 to 1 become 0 to 255, and the first frame of an
    animation is taken. Transparency becomes white, or black in a picture that could not be seen on
    white, such as a white logo. A JPEG file may lack the marker at its end.
    """
    try:
        image.load()
    except OSError:
        if image.format not in _JPEG or image.fp is None:  # no decoder reads this kind of JPEG
            raise
        content = _content(image) + b"\xff\xd9"
        simplejpeg.decode_jpeg(content, min_height=1, min_width=1)  # fails if more is missing
        size, image = image.size, open_picture(io.BytesIO(content))
        image.draft(None, size)
        image.load()
    orientation = None
    with contextlib.suppress(Exception):  # invalid EXIF is ignored
        # Not ImageOps.exif_transpose: it rewrites all EXIF data, and fails if any of it is odd.
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    if image.mode == "F":  # mostly from 0 to 1
        grey = np.nan_to_num(np.asarray(image))
        grey = (grey * (255 if grey.max() <= 1 else 1)).clip(0, 255)
        image = Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    elif image.mode.startswith("I"):  # 16 bits of grey, maybe stored in 32
        # Rounds v / 257; the clip prevents an overflow of 16 bits.
        grey = (np.asarray(image).clip(0, 65407) + 128) // 257
        image = Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    elif image.has_transparency_data:
        image = image if image.mode == "RGBA" else image.convert("RGBA")
        alpha = image.getchannel("A")
        for background in ("white", "black"):
            laid = Image.new("RGB", image.size, background)
            laid.paste(image, mask=alpha)
            shades = laid.convert("L").histogram(alpha)
            if sum(shades[:_PALE]) >= 0.005 * sum(shades):
                break  # it is seen, or there is nothing to see
        image = laid
    elif image.mode != "RGB":
        image = image.convert("RGB")
    method = _TO_UPRIGHT.get(orientation) if isinstance(orientation, int) else None
    return image if method is None else image.transpose(method)


def read_photos(paths: Iterable[Path], image_size: int) -> tuple[np.ndarray, list[Path], list[str]]:
    """Read many pictures, skipping those that can't be read.

    Returns:
        photos, uint8 (n, s, s, 3) RGB; their n paths; and a message for each skipped one.
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


def jpeg_quality(image: Image.Image) -> int | None:
    """Estimate the quality from 1 to 100 that a JPEG file was saved with, on libjpeg's scale.

    It is the quality whose quantization table is nearest; None if the opened file is not a JPEG.
    """
    tables = getattr(image, "quantization", None)
    if not tables:
        return None
    # libjpeg's quality scales the standard's whole luminance table (ITU-T T.81, table K.1), so its
    # first and largest steps suffice.
    steps, found = np.array([16, 121]), np.array([tables[0][0], max(tables[0])])
    quality = np.arange(1, 101)
    scale = np.where(quality < 50, 5000 // quality, 200 - 2 * quality)
    expected = ((steps * scale[:, None] + 50) // 100).clip(1, 255)
    return int(quality[np.abs(found - expected).sum(axis=1).argmin()])


def read_gallery(folder: Path, image_size: int) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Read a labelled gallery: a folder with a subfolder of photos for each landmark.

    Returns:
        photos, uint8 (n, s, s, 3) RGB; labels, str (n,), see :func:`landmark_name`; and messages on
        unreadable photos and on what :func:`landmark_photos` left out.

    Raises:
        NoPhotosError: no subfolder holds a readable photo.
    """
    paths, left_out = landmark_photos(folder)
    photos, kept, skipped = read_photos(paths, image_size)
    if not kept:
        why = f" ({'; '.join(skipped[:3])})" if skipped else ""
        raise NoPhotosError(
            f"{show_path(folder)} holds no photos{why}: it should have a folder of photos "
            "for each landmark",
            left_out,
        )
    skipped += left_out_lines(left_out)
    return photos, np.array([landmark_name(path.parent.name) for path in kept]), skipped
