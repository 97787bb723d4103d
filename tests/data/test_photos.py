"""Photos in folders, with everything that can be wrong with them."""

import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

from lib.app.upload import UploadError, read_upload
from lib.data.catalogue import inspect_picture
from lib.data.photos import (
    NoPhotosError,
    PhotoError,
    TestSetError,
    find_photos,
    jpeg_quality,
    landmark_photos,
    list_photos,
    read_gallery,
    read_photo,
    read_test_set,
)
from lib.data.records import RecordError
from lib.files import project_root
from tools.convert import encode_photo


def save(path, colour=(200, 30, 60), size=(40, 30), mode="RGB", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).convert(mode).save(path, **options)


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


def test_a_text_file_named_jpg_is_named(tmp_path):
    (tmp_path / "a.jpg").write_text("not a picture")
    with pytest.raises(PhotoError, match=r"a\.jpg is not a readable picture"):
        read_photo(tmp_path / "a.jpg", 16)


def test_listing_is_sorted_and_ignores_what_is_no_photo(tmp_path):
    for name in ("b.JPG", "a.jpeg", "c.png", ".hidden.jpg", "notes.txt"):
        (tmp_path / name).touch()
    (tmp_path / "folder.jpg").mkdir()
    assert [p.name for p in list_photos(tmp_path)] == ["a.jpeg", "b.JPG", "c.png"]
    assert list_photos(tmp_path / "absent") == []


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
    (tmp_path / "5.HEIC").touch()
    (tmp_path / "a" / "notes.txt").touch()
    listing = os.scandir

    def refuse(folder):
        if Path(folder).name == "locked":
            raise PermissionError(13, "Permission denied")
        return listing(folder)

    monkeypatch.setattr("os.scandir", refuse)
    paths, left_out = find_photos(tmp_path)
    assert [p.name for p in paths] == ["4.jpg", "1.jpg", "3.jpg"]
    assert left_out == {".heic files": 1, "folders that can't be read": 1}
    paths, left_out = landmark_photos(tmp_path)
    assert [p.name for p in paths] == ["1.jpg"]
    assert left_out["photos that are not in a landmark's folder itself"] == 2
    _, _, skipped = read_gallery(tmp_path, 8)
    assert "left out: 1 folders that can't be read" in skipped


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_names_that_are_not_utf8_are_found_and_their_errors_can_be_printed(tmp_path):
    path = tmp_path / os.fsdecode(b"\xff.jpg")
    save(path)
    assert find_photos(tmp_path).paths == [path]
    path.write_text("no picture")
    with pytest.raises(PhotoError) as raised:
        read_photo(path, 8)
    str(raised.value).encode()


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


def test_postscript_named_like_a_photo_never_reaches_ghostscript(tmp_path, monkeypatch):
    # A folder, a conversion and a page opened it; only the upload had a list of formats.
    (tmp_path / "a.jpg").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"
    )
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", None)
    with pytest.raises(PhotoError, match="cannot identify"):
        read_photo(tmp_path / "a.jpg", 8)
    assert encode_photo(tmp_path / "a.jpg", 8, 90).kind == "not a picture"


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


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("content", [many_scans(4000), lossless_webp(9990)], ids=["scans", "webp"])
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


def write_truth(folder, *rows):
    (folder / "ground_truth.csv").write_text("\n".join(("image,role", *rows)))


def test_a_test_set_with_ground_truth(tmp_path):
    for name in ("a.jpg", "b.jpg", "c.jpg", "d.jpg"):
        save(tmp_path / name)
    write_truth(tmp_path, "c.jpg,query", "a.jpg,positive", "d.jpg,distractor")
    test_set = read_test_set(tmp_path, 16)
    assert test_set.photos.shape == (4, 16, 16, 3)
    assert test_set.names[test_set.query] == "c.jpg"
    np.testing.assert_array_equal(test_set.positives, [True, False, False, False])
    np.testing.assert_array_equal(test_set.gallery, [0, 1, 3])


def test_without_ground_truth_the_first_name_is_the_query(tmp_path):
    for name in ("b.jpg", "a.jpg", "c.jpg"):
        save(tmp_path / name)
    test_set = read_test_set(tmp_path, 16)
    assert (test_set.names[test_set.query], test_set.positives) == ("a.jpg", None)


def test_a_text_file_among_the_photos_is_skipped_and_counted(tmp_path):
    save(tmp_path / "b.jpg")
    (tmp_path / "a.jpg").write_text("not a picture")
    test_set = read_test_set(tmp_path, 16)
    assert test_set.names == ["b.jpg"]
    assert len(test_set.skipped) == 1 and "a.jpg" in test_set.skipped[0]


def test_an_empty_test_set_says_what_belongs_there(tmp_path):
    with pytest.raises(TestSetError, match=r"no readable photo.*Test_set/README\.md"):
        read_test_set(tmp_path, 16)
    (tmp_path / "a.jpg").write_text("not a picture")
    with pytest.raises(TestSetError, match=r"no readable photo.*a\.jpg is not a readable"):
        read_test_set(tmp_path, 16)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["a.jpg,positive"], "exactly one query; no line does"),
        (["a.jpg,query", "b.jpg,query"], "exactly one query; lines 2, 3 do"),
        (["a.jpg,query", "b.jpg,postive"], "line 3: role 'postive' is none of"),
        (["a.jpg,query", "a.jpg,positive"], r"line 3: 'a\.jpg' is listed twice"),
        (["a.jpg,query", "z.jpg,positive"], r"line 3: 'z\.jpg' does not exist"),
        (["broken.jpg,query"], r"line 2: 'broken\.jpg' can't be read"),
    ],
)
def test_a_ground_truth_that_does_not_fit_names_the_line(tmp_path, rows, message):
    save(tmp_path / "a.jpg")
    save(tmp_path / "b.jpg")
    (tmp_path / "broken.jpg").write_text("")
    write_truth(tmp_path, *rows)
    with pytest.raises(TestSetError, match=message):
        read_test_set(tmp_path, 16)


@pytest.mark.parametrize("content", ["", "name,kind\na.jpg,query", "\x00\xff"])
def test_a_ground_truth_that_is_no_such_table_is_named(tmp_path, content):
    save(tmp_path / "a.jpg")
    (tmp_path / "ground_truth.csv").write_text(content, encoding="latin-1")
    with pytest.raises(TestSetError, match=r"ground_truth\.csv"):
        read_test_set(tmp_path, 16)


def test_a_gallery_has_a_folder_per_landmark(tmp_path):
    for name in ("tower/1.jpg", "tower/2.jpg", "bridge/1.jpg"):
        save(tmp_path / name)
    (tmp_path / "bridge" / "2.jpg").write_text("")
    photos, labels, skipped = read_gallery(tmp_path, 16)
    assert photos.shape == (3, 16, 16, 3)
    assert labels.tolist() == ["bridge", "tower", "tower"] and len(skipped) == 1
    with pytest.raises(NoPhotosError, match="folder of photos for each landmark"):
        read_gallery(tmp_path / "absent", 16)


@pytest.mark.parametrize("quality", [10, 50, 75, 94, 100])
def test_jpeg_quality_is_read_from_the_file(tmp_path, quality):
    save(tmp_path / "a.jpg", quality=quality)
    assert jpeg_quality(Image.open(tmp_path / "a.jpg")) == quality
    save(tmp_path / "a.png")
    assert jpeg_quality(Image.open(tmp_path / "a.png")) is None
