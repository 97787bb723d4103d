"""Reads uploaded photos: checks them before decoding, and refuses them in plain words.

    upload = read_upload(content, engine.image_size)
    upload.pixels, upload.picture

Any bytes give a photo or an :class:`UploadError`.
"""

from __future__ import annotations

import io
import logging
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from lib.data.photos import FORMAT_NAMES, Box, open_picture, picture_and_size, pixels_of

MOST_BYTES = 20 * 2**20
MOST_PIXELS = 100_000_000
SHOWN = 480  # longer side in pixels of the picture that is shown

_SHRUNK = ("JPEG", "MPO")  # decoded at reduced size, so once for each of the two sizes

log = logging.getLogger(__name__)


class UploadError(ValueError):
    """The upload can't be used; the message names no path and quotes no decoder."""


class Upload(NamedTuple):
    """A photo in two sizes."""

    pixels: np.ndarray  # uint8 (h, w, 3) RGB, the engine's input
    picture: np.ndarray  # uint8 (h, w, 3) RGB for display, upright, with the aspect ratio kept
    size: tuple[int, int]  # width and height in pixels of the whole photo, upright


def read_upload(
    content: bytes, image_size: int, squash: bool = True, crop: Box | None = None
) -> Upload:
    """Read a picture file for an engine and for display; the arguments are those of
    :func:`lib.data.photos.read_photo`. The picture for display is not cropped.

    Raises:
        UploadError: too many bytes or pixels, not a picture, or a damaged one.
    """
    if len(content) > MOST_BYTES:
        raise UploadError(too_large(len(content)))
    try:
        with open_picture(io.BytesIO(content)) as image:
            count = image.width * image.height
            if count > MOST_PIXELS:
                raise UploadError(
                    f"This picture has {count / 1e6:.0f} megapixels; "
                    f"up to {MOST_PIXELS / 1e6:.0f} can be searched with."
                )
            pixels = pixels_of(image, image_size, squash, crop)
            if squash and image.format not in _SHRUNK:
                return with_picture(pixels, image)
        with open_picture(io.BytesIO(content)) as image:
            return with_picture(pixels, image)
    except UploadError:
        raise
    except UnidentifiedImageError:
        raise UploadError(f"This is no picture that can be read. {FORMAT_NAMES} can.") from None
    except Image.DecompressionBombError:  # by Pillow before the check above, or later
        raise UploadError("This picture has far too many pixels to be searched with.") from None
    except Exception as error:  # decoders raise errors of any type on damaged files
        log.info("an upload could not be decoded: %s", error)
        raise UploadError("This picture is damaged: its file can't be decoded.") from None


def with_picture(pixels: np.ndarray, image: Image.Image) -> Upload:
    """Add to a network's input the opened photo that it was read from.

    Raises:
        Exception: anything that the decoder of a damaged file raises.
    """
    picture, size = picture_and_size(image, SHOWN)
    return Upload(pixels, np.asarray(picture), size)


def too_large(size: int) -> str:
    """Write the message that refuses a file of ``size`` bytes."""
    most = MOST_BYTES >> 20
    return f"This file has {size / 2**20:.0f} MB; up to {most} MB can be searched with."
