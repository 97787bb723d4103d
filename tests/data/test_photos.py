"""Photos in folders, with everything that can be wrong with them."""

import numpy as np
import pytest
from PIL import Image

from lib.data.photos import (
    NoPhotosError,
    PhotoError,
    TestSetError,
    jpeg_quality,
    list_photos,
    read_gallery,
    read_photo,
    read_test_set,
)


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
    with pytest.raises(NoPhotosError, match="folder of photos a landmark"):
        read_gallery(tmp_path / "absent", 16)


@pytest.mark.parametrize("quality", [10, 50, 75, 94, 100])
def test_jpeg_quality_is_read_from_the_file(tmp_path, quality):
    save(tmp_path / "a.jpg", quality=quality)
    assert jpeg_quality(Image.open(tmp_path / "a.jpg")) == quality
    save(tmp_path / "a.png")
    assert jpeg_quality(Image.open(tmp_path / "a.png")) is None
