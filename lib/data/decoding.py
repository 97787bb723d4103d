"""Decodes JPEG files to square arrays of pixels, with random augmentation for training.

    pixels = decode(jpeg, image_size=128)                        # uint8 (128, 128, 3) RGB
    variations = draw_variations(rng, len(jpegs), Augmentation())
    pixels = decode(jpegs[0], 128, variations[0])

Decoding releases Python's global lock, so threads run in parallel.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np
import simplejpeg

# The decoder itself shrinks large photos, by dropping high frequencies of the cosine transform. It
# leaves at least twice the size, so that the final resizing filters well.
_REDUCING_GAP = 2
_MOST_SCANNED = 3_000_000_000  # pixels, which take about two seconds


@dataclass(frozen=True)
class Augmentation:
    """Ranges of the random changes, drawn uniformly and independently for each photo.

    Shift and zoom imitate another viewpoint, contrast and brightness other light. There is no
    mirroring, since a mirrored building is another building.

    Attributes:
        shift: largest shift along each axis, as a share of the side; the border is filled with the
            photo mirrored at its edge.
        zoom: largest relative change of scale. At 0, photos stored at the size of the network's
            input need no resampling, which is a third faster.
        contrast: largest relative change of the contrast.
        brightness: largest change of the brightness, as a share of the whole range.
    """

    shift: float = 0.05
    zoom: float = 0.0
    contrast: float = 0.2
    brightness: float = 0.15


class Variation(NamedTuple):
    """The random changes of one photo.

    Attributes:
        left, top: corner of the crop, as shares of the photo's sides; negative if outside.
        side: width and height of the crop as shares; may be above 1.
        gain, offset: of the colours; new value = gain * value + offset.
    """

    left: float
    top: float
    side: float
    gain: float
    offset: float


def is_endless(jpeg: bytes, width: int, height: int) -> bool:
    """Whether a JPEG file has so many scans, each over all its pixels, that decoding takes long.

    Usual files have up to ten. Thousands of empty ones fit into a small file.
    """
    return jpeg.count(b"\xff\xda") * width * height > _MOST_SCANNED  # scans begin with these bytes


def draw_variations(rng: np.random.Generator, n: int, settings: Augmentation) -> list[Variation]:
    """Draw a variation for each of n photos."""
    side = rng.uniform(1 - settings.zoom, 1 + settings.zoom, (n, 1))
    start = (1 - side) / 2 + rng.uniform(-settings.shift, settings.shift, (n, 2))
    gain = rng.uniform(1 - settings.contrast, 1 + settings.contrast, (n, 1))
    brightness = rng.uniform(-settings.brightness, settings.brightness, (n, 1))
    offset = 127.5 * (1 - gain) + 255 * brightness  # middle grey stays middle grey
    rows = np.concatenate([start, side, gain, offset], axis=1)
    # Python's numbers, since single NumPy numbers are slow.
    return [Variation(*row) for row in rows.tolist()]


def decode(
    jpeg: bytes | memoryview,
    image_size: int,
    variation: Variation | None = None,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Decode a JPEG picture and squash it to a square.

    Args:
        jpeg: a JPEG file, in colour or grey.
        image_size: side of the square in pixels.
        variation: None for no augmentation.
        out: contiguous array for the result; None makes a new one.

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
    return _opencv().addWeighted(pixels, variation.gain, pixels, 0.0, variation.offset, dst=out)


def _part(pixels: np.ndarray, variation: Variation) -> np.ndarray:
    """The crop of a variation, where it exceeds the photo filled with the mirrored photo."""
    height, width, _ = pixels.shape
    left, top = round(width * variation.left), round(height * variation.top)
    right = left + max(round(width * variation.side), 1)
    bottom = top + max(round(height * variation.side), 1)
    inside = pixels[max(top, 0) : min(bottom, height), max(left, 0) : min(right, width)]
    beyond = max(-top, 0), max(bottom - height, 0), max(-left, 0), max(right - width, 0)
    if any(beyond):
        return _opencv().copyMakeBorder(inside, *beyond, _opencv().BORDER_REFLECT_101)
    return inside


@cache
def _opencv():
    """OpenCV without threads of its own: those that call us keep all processor cores busy."""
    import cv2  # at first use, since the setting is for the whole process

    cv2.setNumThreads(0)
    return cv2


def reduction(width: int, height: int, image_size: int) -> int:
    """The factor (8, 4, 2 or 1) by which the decoder shrinks a photo of width x height pixels."""
    spare = min(width, height) // (_REDUCING_GAP * image_size)
    return 8 if spare >= 8 else 4 if spare >= 4 else 2 if spare >= 2 else 1


def resize(
    pixels: np.ndarray, size: int | tuple[int, int], out: np.ndarray | None = None
) -> np.ndarray:
    """Squash uint8 (h, w, 3) to a square or to (height, width), as :func:`decode` does.

    It averages areas if a side shrinks, and interpolates linearly else.
    """
    cv2 = _opencv()
    height, width = (size, size) if isinstance(size, int) else size
    shrinks = pixels.shape[0] > height or pixels.shape[1] > width
    method = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    return cv2.resize(pixels, (width, height), dst=out, interpolation=method)
