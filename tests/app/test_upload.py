"""Uploads: whatever the bytes are, a photo or a friendly line."""

import io
import struct
import time
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lib.app import upload
from lib.app.upload import MOST_BYTES, MOST_PIXELS, SHOWN, UploadError, read_upload
from lib.data.photos import read_photo


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(width, height):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3)).astype(np.uint8)
    return Image.fromarray(pixels)


def png_of(width, height):
    """A small PNG file that says it is so large, and is: black, packed well."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    rows = zlib.compressobj(9)
    data = b"".join(rows.compress(bytes(1 + width)) for _ in range(height)) + rows.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    end = chunk(b"IDAT", data) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + end


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_an_upload_is_read_as_the_file_would_be(tmp_path, kind):
    content = encoded(noise(900, 600), kind)
    (tmp_path / "photo").write_bytes(content)
    found = read_upload(content, 32)
    np.testing.assert_array_equal(found.pixels, read_photo(tmp_path / "photo", 32))
    assert found.picture.shape == (SHOWN * 2 // 3, SHOWN, 3) and found.picture.dtype == np.uint8


def test_the_picture_is_upright_and_small_ones_stay_as_they_are():
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    found = read_upload(encoded(noise(60, 40), "JPEG", exif=exif), 32)
    assert found.picture.shape == (60, 40, 3) and found.size == (40, 60)
    for squash in (True, False):
        found = read_upload(encoded(noise(4000, 300), "JPEG", exif=exif), 32, squash)
        assert found.picture.shape == (SHOWN, 36, 3) and found.size == (300, 4000)
        found = read_upload(encoded(noise(900, 600)), 32, squash, (450, 0, 900, 600))
        assert found.picture.shape == (320, SHOWN, 3) and found.size == (900, 600)
    assert read_upload(encoded(Image.new("RGBA", (1, 3))), 32).picture.tolist() == [[[255] * 3]] * 3
    sixteen = Image.fromarray(np.full((5, 7), 0x80FF, np.uint16))
    assert read_upload(encoded(sixteen), 32).picture.tolist() == [[[128] * 3] * 7] * 5


def test_too_many_bytes_are_not_even_looked_at():
    with pytest.raises(UploadError, match=r"This file has 21 MB; up to 20 MB"):
        read_upload(bytes(MOST_BYTES + 2**20), 32)


@pytest.mark.parametrize(
    ("side", "message"), [(10_100, "102 megapixels"), (14_000, "far too many")]
)
def test_a_bomb_is_refused_before_it_goes_off(side, message, monkeypatch):
    content = png_of(side, side)
    assert len(content) < 300_000 and side * side > MOST_PIXELS
    monkeypatch.setattr(upload, "pixels_of", None)  # would be called to decode it
    start = time.monotonic()
    with pytest.raises(UploadError, match=message):
        read_upload(content, 32)
    assert time.monotonic() - start < 1


def test_what_other_programs_would_have_to_open_is_no_picture():
    with pytest.raises(UploadError, match="no picture that can be read"):
        read_upload(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n", 32)


def test_half_a_picture_is_damaged():
    content = encoded(noise(300, 300))
    with pytest.raises(UploadError, match="damaged"):
        read_upload(content[: len(content) // 2], 32)


@settings(max_examples=200)
@given(st.data())
def test_any_bytes_give_a_photo_or_a_friendly_line(data):
    kind = data.draw(st.sampled_from(["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"]))
    content = bytearray(encoded(noise(40, 30), kind))
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        found = read_upload(bytes(content), 32)
    except UploadError as error:
        assert str(error)[:5] == "This " and str(error)[-1] == "." and "0x" not in str(error)
    else:
        assert found.pixels.shape == (32, 32, 3) and max(found.picture.shape) <= SHOWN
