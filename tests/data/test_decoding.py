"""Pixels: the same from a shard and from a folder, and varied as the settings say."""

import io
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from lib.data.decoding import (
    Augmentation,
    Variation,
    decode,
    draw_variations,
    reduction,
    resize,
)
from lib.data.photos import read_photo
from lib.files import project_root

WHOLE = Variation(left=0.0, top=0.0, side=1.0, gain=1.0, offset=0.0)


def jpeg(pixels: np.ndarray, mode="RGB") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def smooth(rng, height=90, width=120) -> np.ndarray:
    small = Image.fromarray(rng.integers(60, 200, (6, 8, 3), dtype=np.uint8))
    return np.asarray(small.resize((width, height), Image.Resampling.BICUBIC))


def test_channels_are_rgb():
    for channel in range(3):
        colour = np.zeros((32, 32, 3), np.uint8)
        colour[..., channel] = 255
        wanted = np.eye(3)[channel] * 255
        for size in (32, 8, 40):
            np.testing.assert_allclose(decode(jpeg(colour), size)[4, 4], wanted, atol=3)


@pytest.mark.parametrize("shape", [(128, 128), (703, 1000), (300, 200), (20, 30)])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_photo_gets_the_same_pixels_from_a_shard_and_from_a_folder(tmp_path, rng, shape, mode):
    content = jpeg(smooth(rng, *shape), mode)
    (tmp_path / "photo.jpg").write_bytes(content)
    for size in (128, 64, 50, 32):
        from_folder = read_photo(tmp_path / "photo.jpg", size)
        np.testing.assert_array_equal(decode(content, size), from_folder)


def test_a_photo_shrunk_by_the_decoder_is_near_one_shrunk_afterwards(rng):
    pixels = smooth(rng, 800, 1000)
    whole = np.asarray(Image.open(io.BytesIO(jpeg(pixels))))
    fast = decode(jpeg(pixels), 50).astype(int)
    assert reduction(1000, 800, 50) == 8
    assert np.abs(fast - resize(whole, 50)).max() <= 4


def test_how_far_the_decoder_may_shrink():
    # Never below twice the size that is wanted.
    sides = [(100, 100), (200, 200), (399, 900), (400, 400), (5000, 800)]
    assert [reduction(*s, image_size=50) for s in sides] == [1, 2, 2, 4, 8]


def test_the_whole_photo_without_change_is_the_photo(rng):
    content = jpeg(smooth(rng, 64, 64))
    np.testing.assert_array_equal(decode(content, 64, WHOLE), decode(content, 64))


def test_a_part_is_cut_out_where_the_variation_says(rng):
    content = jpeg(smooth(rng, 80, 100))
    pixels = np.asarray(Image.open(io.BytesIO(content)))
    got = decode(content, 64, WHOLE._replace(left=0.3, top=0.1, side=0.5))
    np.testing.assert_array_equal(got, resize(pixels[8:48, 30:80], 64))


def test_what_lies_outside_is_mirrored(rng):
    content = jpeg(smooth(rng, 64, 64))
    pixels = decode(content, 64)
    moved = decode(content, 64, WHOLE._replace(left=-0.125, top=0.0625))  # 8 right, 4 up
    np.testing.assert_array_equal(moved[:60, 8:], pixels[4:, :56])
    np.testing.assert_array_equal(moved[:60, :8], pixels[4:, 8:0:-1])
    np.testing.assert_array_equal(moved[60:, 8:], pixels[62:58:-1, :56])
    wide = decode(content, 64, WHOLE._replace(left=-0.25, top=-0.25, side=1.5))
    np.testing.assert_array_equal(
        wide, resize(np.pad(pixels, ((16, 16), (16, 16), (0, 0)), "reflect"), 64)
    )


def test_contrast_and_brightness_by_hand(rng):
    pixels = smooth(rng, 32, 32)
    variation = WHOLE._replace(gain=1.5, offset=-60.0)
    content = jpeg(pixels)
    plain = decode(content, 32).astype(float)
    wanted = np.clip(np.round(1.5 * plain - 60.0), 0, 255)  # no wrap below 0 or above 255
    np.testing.assert_allclose(decode(content, 32, variation), wanted, atol=1)


def test_it_writes_where_it_is_told(rng):
    content = jpeg(smooth(rng, 64, 64))
    batch = np.zeros((3, 32, 32, 3), np.uint8)
    for variation in (None, draw_variations(rng, 1, Augmentation())[0]):
        batch[:] = 0
        decode(content, 32, variation, batch[1])
        assert batch[1].any() and not batch[[0, 2]].any()
        np.testing.assert_array_equal(batch[1], decode(content, 32, variation))


def test_variations_keep_to_their_limits(rng):
    settings = Augmentation(shift=0.1, zoom=0.2, contrast=0.3, brightness=0.1)
    left, top, side, gain, offset = np.array(draw_variations(rng, 5000, settings)).T
    for start in (left, top):
        centre = start + side / 2 - 0.5
        assert -0.1 <= centre.min() < -0.099 and 0.099 < centre.max() <= 0.1
    assert 0.8 <= side.min() < 0.81 and 1.19 < side.max() <= 1.2
    assert 0.7 <= gain.min() < 0.72 and 1.28 < gain.max() <= 1.3
    brightness = offset - 127.5 * (1 - gain)
    assert -25.51 <= brightness.min() < -24 and 24 < brightness.max() <= 25.51
    none = draw_variations(rng, 3, Augmentation(0.0, 0.0, 0.0, 0.0))
    np.testing.assert_allclose(none, [WHOLE] * 3)


def test_opencv_is_set_to_no_threads_at_its_first_use_not_by_an_import():
    # Importing the module changed OpenCV for the whole process.
    code = "import cv2; cv2.setNumThreads(3); import lib.data.decoding as d, numpy as np; "
    code += "assert cv2.getNumThreads() == 3; d.resize(np.zeros((4, 4, 3), np.uint8), 2); "
    code += "assert cv2.getNumThreads() < 2"
    assert subprocess.run([sys.executable, "-c", code], cwd=project_root()).returncode == 0


@pytest.mark.parametrize("content", [b"", b"no picture", None])
def test_what_does_not_decode_is_an_error(rng, content):
    if content is None:
        content = jpeg(smooth(rng))[:-300]
    with pytest.raises(ValueError):
        decode(content, 32)
