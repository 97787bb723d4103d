"""Test sets and their ground truth, as people and spreadsheets write it."""

import os
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lib.app.labeller import Labels, read_labels, write_labels
from lib.data.test_set import TestSetError, read_test_set


def save(path, size=(40, 30), **options):
    Image.new("RGB", size, (200, 30, 60)).save(path, **options)


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
        (b"image,role\nphone.jxl,query", "line 2: 'phone\\.jxl' can't be read"),
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
    (tmp_path / "phone.jxl").touch()
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


@pytest.mark.parametrize(
    "name", ["ground_truth.csv.txt", "Ground-Truth.xlsx", "ground_truth(1).csv"]
)
def test_a_ground_truth_of_another_name_is_not_passed_over(tmp_path, name):
    """It was: another photo became the query, and nothing was judged."""
    save(tmp_path / "a.jpg")
    (tmp_path / name).write_text("image,role\na.jpg,query\n")
    with pytest.raises(TestSetError, match=r"is not read: save it as CSV, named ground_truth\.csv"):
        read_test_set(tmp_path, 8)
