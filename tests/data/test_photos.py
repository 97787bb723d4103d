"""Photos in folders, with everything that can be wrong with them."""

import io
import os
import re
import subprocess
import sys
import time
import unicodedata
from pathlib import Path

import numpy as np
import pillow_heif
import pytest
from PIL import Image, TiffImagePlugin

from lib.app.gallery import landmark_of
from lib.app.upload import UploadError, read_upload
from lib.data.catalogue import inspect_picture
from lib.data.photos import (
    NoPhotosError,
    PhotoError,
    find_photos,
    jpeg_quality,
    landmark_photos,
    list_photos,
    open_picture,
    read_gallery,
    read_photo,
)
from lib.data.records import RecordError
from lib.data.test_set import TestSetError, read_test_set
from lib.files import project_root
from lib.search.embedding import photos_below
from tools.convert import encode_photo
from tools.labelled import ConversionError, read_folder


def save(path, colour=(200, 30, 60), size=(40, 30), mode="RGB", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).convert(mode).save(path, **options)


def heif(array, mode, **options):
    """A HEIC picture, to save or to add others to; numbers of 16 bits are kept with 10."""
    return pillow_heif.from_bytes(mode, array.shape[1::-1], array.tobytes(), **options)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_any_jpeg_becomes_square_rgb(tmp_path, mode):
    save(tmp_path / "a.jpg", mode=mode)
    photo = read_photo(tmp_path / "a.jpg", 16)
    assert photo.shape == (16, 16, 3) and photo.dtype == np.uint8
    if mode == "RGB":
        np.testing.assert_allclose(photo[8, 8], (200, 30, 60), atol=4)  # red first


def test_photos_are_turned_upright(tmp_path):
    image = Image.new("RGB", (40, 40))
    image.paste((255, 0, 0), (0, 0, 40, 20))  # red above
    exif = Image.Exif()
    exif[0x0112] = 3  # was taken upside down
    image.save(tmp_path / "a.jpg", exif=exif)
    photo = read_photo(tmp_path / "a.jpg", 16)
    assert photo[12, 8, 0] > 200 > photo[3, 8, 0]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photo_of_a_phone_is_turned_upright_once(tmp_path, orientation):
    """HEIC keeps the orientation twice: in its own boxes, and in EXIF, which does not count."""
    stored = np.zeros((64, 128, 3), np.uint8)
    stored[:32, :64], stored[:32, 64:], stored[32:, :64] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    exif = Image.Exif()
    exif[0x112] = orientation
    Image.fromarray(stored).save(tmp_path / "a.png", exif=exif)
    heif(stored, "RGB").save(tmp_path / "a.heic", exif=exif.tobytes(), quality=90)
    content = (tmp_path / "a.heic").read_bytes()
    assert (b"irot" in content or b"imir" in content) == (orientation > 1)
    photo, expected = (read_photo(tmp_path / name, 32) for name in ("a.heic", "a.png"))
    np.testing.assert_allclose(photo[4::8, 4::8], expected[4::8, 4::8], atol=12)
    upload = read_upload(content, 32)
    np.testing.assert_array_equal(upload.pixels, photo)
    assert upload.picture.shape == ((128, 64, 3) if orientation > 4 else (64, 128, 3))
    converted = Image.open(io.BytesIO(encode_photo(tmp_path / "a.heic", 128, 94)))
    inside = slice(16, None, 32)  # not where colours meet
    converted, shown = (np.asarray(x)[inside, inside] for x in (converted, upload.picture))
    np.testing.assert_allclose(converted, shown, atol=12)


def test_a_text_file_named_jpg_is_named(tmp_path):
    (tmp_path / "a.jpg").write_text("not a picture")
    with pytest.raises(PhotoError, match=r"a\.jpg is not a readable picture"):
        read_photo(tmp_path / "a.jpg", 16)


def test_listing_is_sorted_and_ignores_what_is_no_photo(tmp_path):
    for name in ("b.JPG", "a.jpeg", "c.png", ".hidden.jpg", "notes.txt"):
        (tmp_path / name).touch()
    (tmp_path / "folder.jpg").mkdir()
    assert [p.name for p in list_photos(tmp_path)] == ["a.jpeg", "b.JPG", "c.png"]
    with pytest.raises(NoPhotosError, match=r"there is no folder .*absent"):
        list_photos(tmp_path / "absent")


def test_links_neither_loop_nor_lead_outside(tmp_path):
    # `loop -> .` gave 41 entries of one photo; two such links did not end; links led anywhere.
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    save(outside / "secret.jpg")
    save(inside / "a" / "1.jpg")
    save(inside / "2.jpg")
    for name in ("l1", "l2", "a/up"):
        (inside / name).symlink_to(inside)
    (inside / "out").symlink_to(outside)
    (inside / "out.jpg").symlink_to(outside / "secret.jpg")
    (inside / "same.jpg").symlink_to(inside / "a" / "1.jpg")
    (inside / "gone.jpg").symlink_to(inside / "b.jpg")
    (inside / "itself.jpg").symlink_to("itself.jpg")
    paths, left_out = find_photos(inside)
    assert [p.relative_to(inside).as_posix() for p in paths] == ["2.jpg", "same.jpg", "a/1.jpg"]
    assert left_out.pop("files that are absent") + left_out.pop("files that can't be read", 0) == 2
    assert left_out == {"links to folders": 4, "links to files outside of the folder": 1}
    (tmp_path / "link").symlink_to(inside)  # the folder itself may be a link
    assert len(find_photos(tmp_path / "link").paths) == 3


def test_what_can_not_be_read_is_skipped_and_counted(tmp_path, monkeypatch):
    # One subfolder without permission lost the whole folder.
    save(tmp_path / "a" / "1.jpg")
    save(tmp_path / "locked" / "2.jpg")
    save(tmp_path / "deep" / "er" / "3.jpg")
    save(tmp_path / "4.jpg")
    (tmp_path / "5.JXL").touch()
    (tmp_path / "a" / "notes.txt").touch()
    listing = os.scandir

    def refuse(folder):
        if Path(folder).name == "locked":
            raise PermissionError(13, "Permission denied")
        return listing(folder)

    monkeypatch.setattr("os.scandir", refuse)
    paths, left_out = find_photos(tmp_path)
    assert [p.name for p in paths] == ["4.jpg", "1.jpg", "3.jpg"]
    assert left_out == {".jxl files": 1, "folders that can't be read": 1}
    paths, left_out = landmark_photos(tmp_path)
    assert [p.name for p in paths] == ["1.jpg"]
    assert left_out["photos that are not in a landmark's folder itself"] == 2
    _, _, skipped = read_gallery(tmp_path, 8)
    assert "left out: 1 folders that can't be read" in skipped


@pytest.mark.long
def test_a_hundred_thousand_photos_are_found_in_seconds(tmp_path):
    for landmark in range(100):
        (tmp_path / f"{landmark:02}").mkdir()
        for number in range(1000):
            os.mknod(f"{tmp_path}/{landmark:02}/{number:03}.jpg")
    start = time.perf_counter()
    paths, left_out = landmark_photos(tmp_path)
    assert time.perf_counter() - start < 15 and len(paths) == 100_000 and left_out == {}
    assert (paths[0], paths[-1]) == (tmp_path / "00" / "000.jpg", tmp_path / "99" / "999.jpg")


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_names_that_are_not_utf8_are_found_and_their_errors_can_be_printed(tmp_path):
    path = tmp_path / os.fsdecode(b"\xff.jpg")
    save(path)
    assert find_photos(tmp_path).paths == [path]
    path.write_text("no picture")
    with pytest.raises(PhotoError) as raised:
        read_photo(path, 8)
    str(raised.value).encode()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
@pytest.mark.parametrize("opacity", [255, 90])
def test_white_logos_on_transparency_differ(tmp_path, mode, opacity):
    # On white they were all the same white square.
    photos = []
    for number, corner in enumerate([(0, 0), (20, 20)]):
        logo = Image.new("RGBA", (40, 40), (255, 255, 255, 0))
        logo.paste((255, 255, 250, opacity), (*corner, corner[0] + 20, corner[1] + 20))
        path = tmp_path / f"{number}.png"
        logo.convert(mode).save(path)
        photos.append(read_photo(path, 20))
        converted = np.asarray(Image.open(io.BytesIO(encode_photo(path, 20, 94))))
        np.testing.assert_allclose(converted, photos[-1], atol=30)
    assert np.abs(photos[0][:10, :10].astype(int) - photos[1][:10, :10]).min() > 80
    Image.new("LA", (40, 40), (0, 255)).save(tmp_path / "black.png")
    assert read_photo(tmp_path / "black.png", 20).max() == 0
    Image.new("LA", (40, 40), (255, 0)).save(tmp_path / "nothing.png")
    assert read_photo(tmp_path / "nothing.png", 20).min() == 255  # as before


@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_that_lacks_only_its_last_marker_is_read_everywhere(tmp_path, rng, progressive):
    noise = Image.fromarray(rng.integers(0, 256, (90, 120, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x112] = 6
    noise.save(tmp_path / "whole.jpg", progressive=progressive, exif=exif)
    content = (tmp_path / "whole.jpg").read_bytes()
    for cut in (1, 2, 20, len(content) // 2):
        path = tmp_path / "cut.jpg"
        path.write_bytes(content[:-cut])
        if cut > 2:  # the rest of the picture would be grey
            with pytest.raises(PhotoError, match=r"premature end|truncated"):
                read_photo(path, 16)
            assert encode_photo(path, 64, 94).kind == "unreadable"
        else:
            whole = read_photo(tmp_path / "whole.jpg", 16)
            np.testing.assert_array_equal(read_photo(path, 16), whole)
            upload = read_upload(path.read_bytes(), 16)
            np.testing.assert_array_equal(upload.pixels, whole)
            assert upload.picture.shape == (120, 90, 3)
            assert encode_photo(path, 64, 94) == encode_photo(tmp_path / "whole.jpg", 64, 94)


def test_a_jpeg_of_thousands_of_scans_is_refused_before_it_is_decoded(tmp_path):
    # One of 1 MB kept the decoder busy for 96 s: each scan is a pass over all pixels.
    file = io.BytesIO()
    Image.new("L", (4000, 4000)).save(file, "JPEG", progressive=True)
    content = file.getvalue()
    scan = content[content.rfind(b"\xff\xda") : -2]
    path = tmp_path / "a.jpg"
    path.write_bytes(content[:-2] + 4000 * scan + content[-2:])
    with pytest.raises(PhotoError, match="far too many scans"):
        read_photo(path, 8)
    assert encode_photo(path, 8, 90).kind == "too large"
    with pytest.raises(UploadError, match="far too"):
        read_upload(path.read_bytes(), 8)


def odd_exif():
    """Orientation 6 with a tag that is not as the standard has it, as bytes of EXIF."""
    rational = TiffImagePlugin.IFDRational
    for tag, kind, value in [
        *((tag, 2, "4032") for tag in (0x100, 0x101, 0x128, 0x129, 0x213)),
        (0x11A, 10, rational(-72, 1)),
        (0x11A, 5, rational(0, 0)),
        (0x132, 5, rational(1, 2)),
        (0x10F, 5, rational(1, 2)),
        (0x100, 9, -5),
    ]:
        ifd = TiffImagePlugin.ImageFileDirectory_v2()
        ifd.tagtype[0x112], ifd[0x112] = 3, 6
        ifd.tagtype[tag], ifd[tag] = kind, value
        yield b"Exif\0\0II*\0\x08\0\0\0" + ifd.tobytes(8)


@pytest.mark.parametrize("exif", odd_exif())
def test_a_photo_with_odd_exif_is_read_upright_everywhere(tmp_path, exif):
    # Conversion read these, search did not: exif_transpose writes all EXIF anew.
    image = Image.new("RGB", (40, 20))
    image.paste((255, 0, 0), (0, 0, 20, 20))  # red at the left, so above once it is upright
    image.save(tmp_path / "a.jpg", exif=exif)
    photo = read_photo(tmp_path / "a.jpg", 16)
    assert photo[3, 8, 0] > 200 > photo[12, 8, 0]
    converted = Image.open(io.BytesIO(encode_photo(tmp_path / "a.jpg", 40, 94)))
    assert converted.size == (20, 40) and converted.getpixel((10, 5))[0] > 200


def test_16_bits_are_rounded_alike_for_training_and_search(tmp_path):
    # One cut off after a division by 256, the other by 257.
    values = np.linspace(0, 65535, 1024).astype(np.uint16).reshape(32, 32)
    Image.fromarray(values).save(tmp_path / "a.png")
    photo = read_photo(tmp_path / "a.png", 32)
    np.testing.assert_array_equal(photo[..., 0], np.round(values / 257).astype(np.uint8))


@pytest.mark.parametrize("mode", ["RGB;16", "I;16", "L", "RGBA", "RGBa", "RGBA;16"])
def test_a_heic_of_any_depth_is_read_as_it_looks(tmp_path, mode):
    """In 10 bits from new phones, grey, or with transparency."""
    depth = np.uint16 if "16" in mode else np.uint8
    ramp = np.linspace(0, np.iinfo(depth).max, 64).astype(depth)
    channels = {"I": 1, "L": 1}.get(mode[0], len(mode.partition(";")[0]))
    array = np.repeat(np.broadcast_to(ramp, (64, 64))[..., None], channels, axis=2)
    if channels == 4:
        array[..., 3] = np.iinfo(depth).max
        array[:32] = 0  # clear, so white
    heif(array, mode).save(tmp_path / "a.heic", quality=95)
    photo = read_photo(tmp_path / "a.heic", 64)
    grey = np.linspace(0, 255, 64)
    np.testing.assert_allclose(photo[48].mean(axis=1), grey, atol=8)
    np.testing.assert_allclose(photo[16].mean(axis=1), 255 if channels == 4 else grey, atol=8)


def test_of_several_pictures_in_a_heic_the_first_is_read_and_no_thumbnail(tmp_path):
    """A thumbnail is another picture, which may be of a state before the photo was edited."""
    grey = [np.full((256, 256, 3), value, np.uint8) for value in (40, 120, 200)]
    pictures = heif(grey[0], "RGB")
    for other in grey[1:]:
        pictures.add_frombytes("RGB", (256, 256), other.tobytes())
    pictures.save(tmp_path / "a.heif", primary_index=1, thumbnails=[64])
    np.testing.assert_allclose(read_photo(tmp_path / "a.heif", 16), 120, atol=3)
    with open_picture(tmp_path / "a.heif") as image:
        image.draft(None, (64, 64))
        assert image.size == (256, 256)


def test_a_damaged_heic_is_named_and_no_other_format_is_opened(tmp_path, rng):
    heif(rng.integers(0, 256, (64, 64, 3), np.uint8), "RGB").save(tmp_path / "a.hif")
    content = (tmp_path / "a.hif").read_bytes()
    for cut in (8, 20, 100, len(content) // 2, len(content) - 1):
        (tmp_path / "a.hif").write_bytes(content[:cut])
        with pytest.raises(PhotoError, match=r"a\.hif is not a readable picture"):
            read_photo(tmp_path / "a.hif", 16)
    save(tmp_path / "a.avif")
    for path, brand in ((tmp_path / "a.avif", b"avif"), (tmp_path / "b.avif", b"mif1")):
        path.write_bytes((tmp_path / "a.avif").read_bytes().replace(b"ftypavif", b"ftyp" + brand))
        with open_picture(path) as image:
            assert image.format == "AVIF"
    for brand in (b"heic", b"mif1"):  # the second one is of AVIF, too
        (tmp_path / "a.heic").write_bytes(content.replace(b"ftypheic", b"ftyp" + brand))
        with open_picture(tmp_path / "a.heic") as image:
            assert image.format == "HEIF"


def test_postscript_named_like_a_photo_never_reaches_ghostscript(tmp_path, monkeypatch):
    # A folder, a conversion and a page opened it; only the upload had a list of formats.
    (tmp_path / "a.jpg").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"
    )
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", None)
    with pytest.raises(PhotoError, match="none of JPEG, "):
        read_photo(tmp_path / "a.jpg", 8)
    assert encode_photo(tmp_path / "a.jpg", 8, 90).kind == "not a picture"


@pytest.mark.parametrize(
    ("marker", "bits", "kind", "reason"),
    [
        (b"\xff\xc1", 12, "not a picture", "it is damaged, or none of .*, such as with 12 bits"),
        (b"\xff\xc3", 8, "unreadable", "broken data stream .*"),  # lossless; it was a fault of ours
    ],
)
def test_a_jpeg_that_no_decoder_reads_is_skipped_and_named_once(
    tmp_path, marker, bits, kind, reason
):
    save(tmp_path / "a.jpg")
    before, _, after = (tmp_path / "a.jpg").read_bytes().partition(b"\xff\xc0")
    (tmp_path / "a.jpg").write_bytes(before + marker + after[:2] + bytes([bits]) + after[3:])
    save(tmp_path / "b.jpg")
    skipped = read_test_set(tmp_path, 16).skipped
    assert len(skipped) == 1
    assert re.fullmatch(rf"\S*a\.jpg is not a readable picture \({reason}\)", skipped[0])
    assert encode_photo(tmp_path / "a.jpg", 16, 90).kind == kind
    with pytest.raises(UploadError, match=r"^This (is no )?picture"):
        read_upload((tmp_path / "a.jpg").read_bytes(), 16)


def many_scans(side: int) -> bytes:
    """A progressive JPEG file with 4,000 more scans than usual, each empty."""
    Image.new("RGB", (side, side)).save(file := io.BytesIO(), "JPEG", progressive=True)
    content = file.getvalue()
    last = content.rindex(b"\xff\xda")
    length = int.from_bytes(content[last + 2 : last + 4], "big") + 2
    return content[:-2] + 4000 * content[last : last + length] + b"\xff\xd9"


def lossless_webp(side: int) -> bytes:
    """A file of some 40 bytes whose picture took 1.5 GB and more."""
    Image.new("RGB", (16, 16)).save(file := io.BytesIO(), "WEBP", lossless=True)
    content = file.getvalue()
    size = (side - 1 | side - 1 << 14).to_bytes(4, "little")
    return content[:21] + size + content[25:]


def cropped_heic(side: int) -> bytes:
    """A file that claims a large picture, of which a corner of 80 x 60 pixels is shown."""
    heif(np.zeros((60, 80, 3), np.uint8), "RGB").save(file := io.BytesIO())
    before, _, after = file.getvalue().partition(b"ispe\0\0\0\0")
    return before + b"ispe\0\0\0\0" + 2 * side.to_bytes(4) + after[8:]


BOMBS = {"scans": many_scans(4000), "webp": lossless_webp(9990), "heic": cropped_heic(9000)}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("content", BOMBS.values(), ids=BOMBS)
def test_small_files_that_take_minutes_or_gigabytes_are_refused(tmp_path, content):
    """The pixels alone were limited; scans of a JPEG file and the format's needs were not."""
    assert len(content) < 2_000_000
    path = tmp_path / "a.jpg"
    path.write_bytes(content)
    with pytest.raises(PhotoError, match=r"a\.jpg is not a readable picture \(.*too many"):
        read_photo(path, 64)
    assert encode_photo(path, 64, 90).kind == "too large"
    with pytest.raises(UploadError, match="far too many pixels"):
        read_upload(content, 64)
    if content[:2] == b"\xff\xd8":
        with pytest.raises(RecordError, match="far too many scans"):
            inspect_picture(content)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_large_photos_are_read(tmp_path):
    """The limits leave room for files of the largest cameras; transparency takes more memory."""
    Image.new("LA", (9_000, 9_000)).save(tmp_path / "a.png")
    with pytest.raises(PhotoError, match="81 megapixels are too many"):
        read_photo(tmp_path / "a.png", 16)
    Image.new("RGB", (13_000, 12_000), (200, 30, 60)).save(tmp_path / "a.jpg", quality=20)
    assert read_photo(tmp_path / "a.jpg", 16).shape == (16, 16, 3)


def test_importing_sets_nothing_global():
    # Importing lib.data.photos silenced a warning of Pillow for the whole process.
    code = "import warnings, PIL.Image as i, tools.convert, tools.download; "
    code += "bomb = i.DecompressionBombWarning; assert i.MAX_IMAGE_PIXELS == 2**30 // 12; "
    code += "assert all(f[0] != 'ignore' or f[2] is not bomb for f in warnings.filters)"
    assert subprocess.run([sys.executable, "-c", code], cwd=project_root()).returncode == 0


def test_every_reader_of_folders_says_what_it_leaves_out(tmp_path):
    # The test set passed over photos of other formats and links in silence.
    (tmp_path / "outside.jpg").touch()
    folder = tmp_path / "photos"
    save(folder / "a.jpg")
    (folder / "b.JXL").touch()
    (folder / "c.jpg").symlink_to(tmp_path / "outside.jpg")
    reasons = [
        "left out: 1 .jxl files",
        "left out: 1 links to files outside of the folder",
    ]
    assert read_test_set(folder, 8).skipped == reasons
    (folder / "a.jpg").unlink()
    for read, error in (
        (read_test_set, TestSetError),
        (read_gallery, NoPhotosError),
        (lambda folder, _: photos_below(folder), NoPhotosError),
        (lambda folder, _: read_folder(folder), ConversionError),
    ):
        with pytest.raises(error) as raised:
            read(folder, 8)
        assert all(reason in str(raised.value) for reason in reasons)


def test_a_gallery_has_a_folder_per_landmark(tmp_path):
    for name in ("tower/1.jpg", "tower/2.jpg", "bridge/1.jpg"):
        save(tmp_path / name)
    (tmp_path / "bridge" / "2.jpg").write_text("")
    photos, labels, skipped = read_gallery(tmp_path, 16)
    assert photos.shape == (3, 16, 16, 3)
    assert labels.tolist() == ["bridge", "tower", "tower"] and len(skipped) == 1
    with pytest.raises(NoPhotosError, match=r"there is no folder .*absent"):
        read_gallery(tmp_path / "absent", 16)
    (tmp_path / "empty").mkdir()
    with pytest.raises(NoPhotosError, match="folder of photos for each landmark"):
        read_gallery(tmp_path / "empty", 16)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_landmarks_whose_folders_are_not_utf_8_have_names_that_can_be_written(tmp_path):
    """They were half characters, which no UTF-8 file can hold, and so no saved notebook."""
    for name in (b"caf\xe9", b"caf\xe8"):
        save(tmp_path / os.fsdecode(name) / "1.png")
    labels = read_gallery(tmp_path, 16)[1].tolist()
    assert labels == [r"caf\udce8", r"caf\udce9"]


@pytest.mark.parametrize("quality", [10, 50, 75, 94, 100])
def test_jpeg_quality_is_read_from_the_file(tmp_path, quality):
    save(tmp_path / "a.jpg", quality=quality)
    assert jpeg_quality(Image.open(tmp_path / "a.jpg")) == quality
    save(tmp_path / "a.png")
    assert jpeg_quality(Image.open(tmp_path / "a.png")) is None


def test_archives_and_files_without_their_suffix_are_counted(tmp_path):
    """A folder with photos.zip and a photo without suffix was called empty."""
    for name in ("photos.zip", "IMG_0001", "b.jpg.download", "c.jpg~", "notes.txt"):
        (tmp_path / name).touch()
    save(tmp_path / "a.pjpeg", format="JPEG")
    paths, left_out = find_photos(tmp_path)
    assert [path.name for path in paths] == ["a.pjpeg"]
    assert left_out == {".zip files": 1, "files without the suffix of a photo": 3}


def test_numbers_from_0_to_1_are_grey_levels(tmp_path):
    Image.fromarray(np.tile(np.linspace(0, 1, 16, dtype=np.float32), (16, 1))).save(
        tmp_path / "a.tif"
    )
    photo = read_photo(tmp_path / "a.tif", 16)
    assert photo[0, 0].tolist() == [0, 0, 0] and photo[0, 15].tolist() == [255, 255, 255]


@pytest.mark.parametrize("encode", [str, lambda name: unicodedata.normalize("NFD", name)])
def test_a_landmark_is_one_however_its_accent_is_written(tmp_path, encode):
    """A Mac's and a Linux machine's folders of one name were each other's negatives."""
    for name in ("Caf\xe9", encode("Caf\xe9"), "Dom"):
        save(tmp_path / name / f"{len(name)}.jpg")
        save(tmp_path / name / f"{len(name)} b.jpg")
    _, labels, _ = read_gallery(tmp_path, 8)
    assert set(labels) == {"Caf\xe9", "Dom"} == {landmark_of(encode("Caf\xe9/1")), "Dom"}
    photos = read_folder(tmp_path)
    assert photos.table["landmark_id"].is_monotonic_increasing
    assert photos.landmark.max() == 1 and len(photos.landmark) == len(labels)
