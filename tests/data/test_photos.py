"""Photos in folders, with everything that can be wrong with them."""

import io
import os
import subprocess
import sys
import time
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

from lib.app.answer import landmark_of
from lib.app.labeller import Labels, read_labels, write_labels
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
from lib.search.embedding import photos_below
from tools.convert import encode_photo
from tools.labelled import ConversionError, read_folder


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


def test_every_reader_of_folders_says_what_it_leaves_out(tmp_path):
    # The test set passed over HEIC photos and links in silence.
    (tmp_path / "outside.jpg").touch()
    folder = tmp_path / "photos"
    save(folder / "a.jpg")
    (folder / "b.HEIC").touch()
    (folder / "c.jpg").symlink_to(tmp_path / "outside.jpg")
    reasons = [
        "left out: 1 .heic files",
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


# What spreadsheets and people make of image,role / épée.jpg,query / b.JPG,positive / c.jpg,...
PLAIN = "image,role\népée.jpg,query\nb.JPG,positive\nc.jpg,distractor\n"
WRITTEN = {
    "as it should be": PLAIN.encode(),
    "Excel, CSV UTF-8": PLAIN.encode("utf-8-sig").replace(b"\n", b"\r\n"),
    "Excel in Germany": PLAIN.replace(",", ";").encode("cp1252"),
    "Excel, Unicode text": PLAIN.replace(",", "\t").replace("\n", "\r\n").encode("utf-16"),
    "big-endian": b"\xfe\xff" + PLAIN.encode("utf-16-be"),
    "UTF-16 without its mark": PLAIN.encode("utf-16-le"),
    "old Macs": PLAIN.replace("\n", "\r").encode(),
    "no last line end": PLAIN.strip().encode(),
    "sep": b"sep=;\r\n" + PLAIN.replace(",", ";").encode(),
    "spaces": PLAIN.replace(",", " , ").replace("\n", " \n").encode(),
    "quotes and spaces": 'image, role\n"épée.jpg" , "query"\n"b.JPG" , "positive"\n'.encode(),
    "case": PLAIN.replace("image,role", "Image,ROLE").replace("query", "Query").encode(),
    "case of endings": PLAIN.replace(".jpg", ".JPG").replace("b.JPG", "b.jpg").encode(),
    "trailing commas": PLAIN.replace("\n", ",,\n").encode() + b",,,\n",
    "an extra column": PLAIN.replace("role", "role,notes").encode(),
    "columns in another order": 'no,role,"a, b",image\n1,query,"x\n\ny",épée.jpg\n'
    "2,positive,,b.JPG\n".encode(),
    "blank lines": b"\n \n" + PLAIN.replace("\n", "\n\n,\n").encode(),
    "names in quotes with line ends": PLAIN.replace("b.JPG", '"b.JPG\n"').encode(),
    "accents apart": unicodedata.normalize("NFD", PLAIN).encode(),
}


@pytest.mark.parametrize("form", ["NFC", "NFD"])
@pytest.mark.parametrize("written", WRITTEN)
def test_a_ground_truth_is_understood_as_spreadsheets_write_it(tmp_path, written, form):
    query = unicodedata.normalize(form, "épée.jpg")
    for name in (query, "b.JPG", "c.jpg"):
        save(tmp_path / name, size=(4, 4), format="JPEG")
    (tmp_path / "ground_truth.csv").write_bytes(WRITTEN[written])
    test_set = read_test_set(tmp_path, 16)
    assert test_set.names[test_set.query] == query and test_set.skipped == []
    assert [n for n, p in zip(test_set.names, test_set.positives, strict=True) if p] == ["b.JPG"]
    assert read_labels(tmp_path) == Labels(query, frozenset({"b.JPG"}))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        # The lines were counted as if none were blank, and as if no cell held a line end.
        (b"image,role\n\na.jpg,query\n\nz.jpg,positive", r"line 5: 'z\.jpg' does not exist in"),
        (b'image,role,n\na.jpg,query,"x\n\ny"\nb.jpg,good,', "line 5: role 'good' is none of"),
        (b"\n\nimage,role\na.jpg,query\nb.jpg,query", "one query; lines 4, 5 do"),
        (b"image;role\na.jpg;query\nA.JPG ;positive", r"line 3: 'A\.JPG ' is listed twice"),
        (b"image,role\na.jpg,query\nx.JPG,positive", r"line 3: .* fits 'X\.jpg' and 'x\.jpg'"),
        (b"image,role\na.jpg,query\nb,c.jpg,positive", "line 3: .* must be in quotation marks"),
        (b'image,role\na.jpg,query\n"b.jpg,positive\n', "line 3: a quotation mark is not closed"),
        (b'image,role,n\na.jpg,query,"x\nb.jpg,positive,\n', "line 2: a quotation mark is not"),
        (b"image,role\nphone.heic,query", "line 2: 'phone\\.heic' can't be read"),
        (b"image,role\na.jpg,query\n,positive", "line 3: '' does not exist"),
        (b"image,role\na.jpg,query\nb.jpg\n", "line 3: role '' is none of query, positive"),
        (b"a.jpg,query\nb.jpg,positive", r"line 1: the columns must be image,role, not a\.jpg,que"),
        (b"image,role,role\na.jpg,query,", "line 1: the columns must be image,role, not image,"),
        (
            "image,role\na.jpg,query\n\xe9.jpg,positive".encode("cp1252"),
            "line 3: .* as 'CSV UTF-8'",
        ),
        ("image,role\na.jpg,query\n".encode("utf-16")[:-1], "line 2: .* save it as 'CSV UTF-8'"),
        (b"PK\3\4\0\0\xff\xfe", "line 1: the columns must be image,role"),
        (b"image,role\na.jpg," + b"q" * 200_000, "line 2: it can't be read as a CSV file.*field"),
    ],
)
def test_a_ground_truth_that_can_not_be_understood_names_its_true_line(tmp_path, content, message):
    for name in ("a.jpg", "b.jpg", "X.jpg", "x.jpg"):
        save(tmp_path / name, size=(4, 4))
    (tmp_path / "phone.heic").touch()
    (tmp_path / "ground_truth.csv").write_bytes(content)
    with pytest.raises(TestSetError, match=rf"ground_truth\.csv.*{message}") as raised:
        read_test_set(tmp_path, 16)
    assert len(str(raised.value).encode()) < 1000 and "\n" not in str(raised.value)


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to("gone")])
def test_a_ground_truth_that_is_no_file_is_named(tmp_path, make):
    # Folders and broken links were taken for "no ground truth", a pipe waited for ever.
    save(tmp_path / "a.jpg")
    make(tmp_path / "ground_truth.csv")
    with pytest.raises(TestSetError, match=r"(truth\.csv|gone) can't be read as a CSV file"):
        read_test_set(tmp_path, 16)


def test_a_ground_truth_may_have_capitals_in_its_name(tmp_path):
    for name in ("a.jpg", "b.jpg"):
        save(tmp_path / name)
    (tmp_path / "Ground_Truth.CSV").write_text("image,role\nb.jpg,query")
    assert read_test_set(tmp_path, 16).query == 1
    write_labels(tmp_path, ["a.jpg", "b.jpg"], Labels("a.jpg"))  # the usual name is preferred
    assert read_test_set(tmp_path, 16).query == 0


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


@pytest.mark.parametrize(
    "name", ["ground_truth.csv.txt", "Ground-Truth.xlsx", "ground_truth(1).csv"]
)
def test_a_ground_truth_of_another_name_is_not_passed_over(tmp_path, name):
    """It was: another photo became the query, and nothing was judged."""
    save(tmp_path / "a.jpg")
    (tmp_path / name).write_text("image,role\na.jpg,query\n")
    with pytest.raises(TestSetError, match=r"is not read: save it as CSV, named ground_truth\.csv"):
        read_test_set(tmp_path, 8)
