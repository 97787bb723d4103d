"""Decodes JPEG files to squares of pixels, and augments them at random for training.

    pixels = decode(jpeg, image_size=128)                        # uint8 (128, 128, 3) RGB
    variations = draw_variations(rng, len(jpegs), Augmentation())
    pixels = decode(jpegs[0], 128, variations[0])

Decoding releases Python's global lock, so that threads run in parallel.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import repeat
from typing import NamedTuple

import cv2
import numpy as np
import simplejpeg

from lib.data.records import Place, read_picture

cv2.setNumThreads(0)  # the threads that call us already keep all processor cores busy

# A photo larger than needed is first shrunk by the decoder itself, which leaves out the fine waves
# of the cosine transform; to no less than twice the size, so that the rest is up to good filtering.
_REDUCING_GAP = 2


@dataclass(frozen=True)
class Augmentation:
    """How far training photos are varied; each value is drawn uniformly for each photo by itself.

    Shift and zoom stand for where the photographer stood, contrast and brightness for the light. No
    mirroring: a mirrored building is another building.

    Attributes:
        shift: most that a photo is moved along each axis, as a share of its side; what moves in
            from outside is the photo mirrored at its edge.
        zoom: most that it is enlarged or made smaller, as a share. Photos that are stored at the
            size they are used at need not be resampled without it, which makes them a third faster.
        contrast: most that the contrast is raised or lowered, as a share.
        brightness: most that the brightness is raised or lowered, as a share of the whole range.
    """

    shift: float = 0.05
    zoom: float = 0.0
    contrast: float = 0.2
    brightness: float = 0.15


class Variation(NamedTuple):
    """How one photo is varied.

    Attributes:
        left, top: where the part to be seen begins, in shares of the photo's sides; below 0 it
            begins outside of the photo.
        side: its width and height in shares; above 1 it is larger than the photo.
        gain, offset: the colours; new value = gain * value + offset.
    """

    left: float
    top: float
    side: float
    gain: float
    offset: float


def draw_variations(rng: np.random.Generator, n: int, settings: Augmentation) -> list[Variation]:
    """Draw a variation for each of n photos."""
    side = rng.uniform(1 - settings.zoom, 1 + settings.zoom, (n, 1))
    start = (1 - side) / 2 + rng.uniform(-settings.shift, settings.shift, (n, 2))
    gain = rng.uniform(1 - settings.contrast, 1 + settings.contrast, (n, 1))
    brightness = rng.uniform(-settings.brightness, settings.brightness, (n, 1))
    offset = 127.5 * (1 - gain) + 255 * brightness  # middle grey stays middle grey
    rows = np.concatenate([start, side, gain, offset], axis=1)
    # Python's own numbers: quicker than NumPy's, one by one.
    return [Variation(*row) for row in rows.tolist()]


def decode(
    jpeg: bytes | memoryview,
    image_size: int,
    variation: Variation | None = None,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Decode a JPEG picture to a square, whatever its shape.

    Args:
        jpeg: a JPEG file, in colour or grey.
        image_size: side of the square in pixels.
        variation: None leaves the photo as it is.
        out: uint8 (image_size, image_size, 3), contiguous, to be written to; None makes a new one.

    Returns:
        uint8 (image_size, image_size, 3) RGB.

    Raises:
        ValueError: it does not decode.
    """
    if out is None:
        out = np.empty((image_size, image_size, 3), np.uint8)
    height, width, _, _ = simplejpeg.decode_jpeg_header(jpeg)
    if variation is None and height == width == image_size:
        return simplejpeg.decode_jpeg(jpeg, buffer=out)
    factor = reduction(width, height, image_size)
    pixels = simplejpeg.decode_jpeg(
        jpeg, min_height=-(-height // factor), min_width=-(-width // factor)
    )
    if variation is None:
        return resize(pixels, image_size, out)
    pixels = _part(pixels, variation)
    if pixels.shape != out.shape:
        pixels = resize(pixels, image_size, out)
    return cv2.addWeighted(pixels, variation.gain, pixels, 0.0, variation.offset, dst=out)


def _part(pixels: np.ndarray, variation: Variation) -> np.ndarray:
    """The part of a photo that a variation shows, mirrored at the edges where it goes beyond."""
    height, width, _ = pixels.shape
    left, top = round(width * variation.left), round(height * variation.top)
    right = left + max(round(width * variation.side), 1)
    bottom = top + max(round(height * variation.side), 1)
    inside = pixels[max(top, 0) : min(bottom, height), max(left, 0) : min(right, width)]
    beyond = max(-top, 0), max(bottom - height, 0), max(-left, 0), max(right - width, 0)
    if any(beyond):
        return cv2.copyMakeBorder(inside, *beyond, cv2.BORDER_REFLECT_101)
    return inside


def decode_batch(
    places: list[Place],
    image_size: int,
    variations: list[Variation] | None,
    out: np.ndarray,
) -> None:
    """Read and decode pictures, each to its place in the batch.

    Args:
        places: of n pictures.
        image_size, variations: as for :func:`decode`.
        out: uint8 (n, image_size, image_size, 3), is written to.

    Raises:
        RecordError: a shard is not what its catalogue says.
    """
    for place, variation, photo in zip(places, variations or repeat(None), out, strict=False):
        decode(read_picture(place), image_size, variation, photo)


def reduction(width: int, height: int, image_size: int) -> int:
    """By which of 8, 4, 2 and 1 the decoder may divide a photo's sides for a square to be cut."""
    spare = min(width, height) // (_REDUCING_GAP * image_size)
    return 8 if spare >= 8 else 4 if spare >= 4 else 2 if spare >= 2 else 1


def resize(pixels: np.ndarray, image_size: int, out: np.ndarray | None = None) -> np.ndarray:
    """Resize to a square: means over areas where it shrinks, bilinear where it grows.

    Args:
        pixels: uint8 (h, w, 3).
        image_size: side of the square in pixels.
        out: as for :func:`decode`.

    Returns:
        uint8 (image_size, image_size, 3).
    """
    height, width, _ = pixels.shape
    shrinks = height > image_size or width > image_size
    method = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    return cv2.resize(pixels, (image_size, image_size), dst=out, interpolation=method)
