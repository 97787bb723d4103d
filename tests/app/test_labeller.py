"""Labels and the widget to choose them, without a browser (see test_browser.py)."""

import errno
import os
import re

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from lib.app.labeller import PAGE, Labeller, Labels, read_labels, write_labels
from lib.data.test_set import TestSetError, read_test_set

ODD = [
    'a "b", c.jpg',
    "<b>bold&amp;.jpg",
    "NA",
    "épée – 塔.jpg",
    "'; x.jpg",
    " 0.jpg",
    "=1+1.jpg",
]


def save_photos(folder, names):
    folder.mkdir(exist_ok=True)
    for i, name in enumerate(names):
        Image.new("RGB", (20, 16), (i % 256, 90, 200)).save(folder / name, format="JPEG")


def embeddings_of(n):
    """On a circle: photo i is the more like photo 0 the smaller i is."""
    angle = np.linspace(0, 2, n)
    return np.stack([np.cos(angle), np.sin(angle)], axis=1)


@pytest.fixture
def folder(tmp_path):
    save_photos(tmp_path / "photos", [f"{i:02}.jpg" for i in range(30)])
    return tmp_path / "photos"


def open_labeller(folder):
    names = sorted(path.name for path in folder.glob("*.jpg"))
    return Labeller(folder, names, embeddings_of(len(names)))


# What the user sees and does, as test_browser.py does it with a mouse.


def button(labeller, description):
    return next(b for b in buttons(labeller) if b.description == description)


def buttons(widget):
    for child in getattr(widget, "children", ()):
        yield from buttons(child)
        if hasattr(child, "description") and hasattr(child, "tooltip"):
            yield child


def photos(labeller):
    """The toggle buttons of the page, in order."""
    return [b for b in buttons(labeller) if "similarity" in str(b.tooltip)]


def press(labeller, name):
    toggle = next(b for b in photos(labeller) if b.tooltip.startswith(f"{name}, "))
    toggle.value = not toggle.value


def swap(labeller, name):
    next(b for b in buttons(labeller) if b.tooltip == f"Make {name} the query").click()


def seen(labeller):
    """All text outside of buttons, without the markup; and the markup."""
    markup = " ".join(c.value for c in labeller.children[1:] if hasattr(c, "value"))
    return re.sub(r"<[^>]*>", " ", markup), markup


# ---- Labels


def test_toggling_twice_undoes():
    labels = Labels("a").toggled("b").toggled("c").toggled("b")
    assert labels == Labels("a", {"c"})
    with pytest.raises(ValueError, match="'a' is the query"):
        labels.toggled("a")


def test_a_positive_that_becomes_the_query_changes_places_with_it():
    assert Labels("a", {"b", "c"}).with_query("b") == Labels("b", {"a", "c"})


def test_a_query_of_another_landmark_forgets_the_positives():
    labels = Labels("a", {"b", "c"})
    assert labels.with_query("a") == labels
    assert labels.with_query("d") == Labels("d") and labels == Labels("a", {"b", "c"})


def test_the_file_is_what_a_test_set_is_read_with(folder):
    names = sorted(path.name for path in folder.iterdir())
    path = write_labels(folder, names, Labels("03.jpg", {"07.jpg", "01.jpg"}))
    assert path.read_text(encoding="utf-8").splitlines()[:5] == [
        "image,role",
        "00.jpg,distractor",
        "01.jpg,positive",
        "02.jpg,distractor",
        "03.jpg,query",
    ]
    test_set = read_test_set(folder, 16)
    assert test_set.names[test_set.query] == "03.jpg"
    assert np.flatnonzero(test_set.positives).tolist() == [1, 7]
    assert read_labels(folder) == Labels("03.jpg", {"07.jpg", "01.jpg"})


NAMES = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1)


@given(st.lists(NAMES, min_size=2, unique=True))
def test_any_name_survives_the_file(tmp_path_factory, names):
    folder = tmp_path_factory.mktemp("names")
    labels = Labels(names[0], set(names[1:2]))
    path = write_labels(folder, names, labels)
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    assert dict(table.itertuples(index=False)).keys() == set(names)
    assert read_labels(folder) == labels


# ---- The widget


def test_choose_save_and_go_on(folder):
    labeller = open_labeller(folder)
    assert "no " in seen(labeller)[0] and "choose the query first" in seen(labeller)[0]
    assert [b.description for b in photos(labeller)] == [f"{i:02}.jpg" for i in range(1, PAGE + 1)]
    press(labeller, "02.jpg")
    button(labeller, "Next page").click()
    assert [b.description for b in photos(labeller)] == [f"{i}.jpg" for i in range(25, 30)]
    assert button(labeller, "Next page").disabled
    press(labeller, "29.jpg")
    assert button(labeller, "✓ positive: 29.jpg").value
    assert "2 positives chosen, not saved yet." in seen(labeller)[0]
    button(labeller, "Save").click()
    assert "ground_truth.csv: 2 positives." in seen(labeller)[0]
    assert np.flatnonzero(read_test_set(folder, 16).positives).tolist() == [2, 29]

    labeller = open_labeller(folder)
    assert "Read from" in seen(labeller)[0] and "2 positives chosen" in seen(labeller)[0]
    assert [b.description for b in photos(labeller) if b.value] == ["✓ positive: 02.jpg"]
    press(labeller, "02.jpg")
    press(labeller, "02.jpg")
    assert "2 positives chosen, as saved." in seen(labeller)[0]
    press(labeller, "02.jpg")
    button(labeller, "Save").click()
    assert np.flatnonzero(read_test_set(folder, 16).positives).tolist() == [29]


def test_another_query_ranks_anew_and_can_be_undone(folder):
    labeller = open_labeller(folder)
    press(labeller, "01.jpg")
    swap(labeller, "20.jpg")
    assert labeller.labels == Labels("20.jpg")
    assert {b.description for b in photos(labeller)[:2]} == {"19.jpg", "21.jpg"}
    assert "0 positives chosen, not saved yet; Undo brings back" in seen(labeller)[0]
    assert len(photos(labeller)) == PAGE and not any(b.value for b in photos(labeller))
    button(labeller, "Undo").click()
    assert labeller.labels == Labels("00.jpg", {"01.jpg"})
    assert photos(labeller)[0].description == "✓ positive: 01.jpg"
    button(labeller, "Undo").click()
    assert labeller.labels == Labels("00.jpg") and button(labeller, "Undo").disabled
    assert photos(labeller)[0].description == "01.jpg"


def test_a_positive_can_become_the_query(folder):
    labeller = open_labeller(folder)
    press(labeller, "01.jpg")
    swap(labeller, "01.jpg")
    assert labeller.labels == Labels("01.jpg", {"00.jpg"})
    assert "The query is 01.jpg: 1 positive chosen, not saved yet." in seen(labeller)[0]


def test_a_late_click_counts_for_the_photo_that_was_clicked(folder):
    labeller = open_labeller(folder)
    first, second = photos(labeller)[:2]
    button(labeller, "Next page").click()
    second.value = True
    assert labeller.labels.positives == {"02.jpg"}
    button(labeller, "Previous page").click()
    swap(labeller, "01.jpg")
    first.value = True  # it is the query by now
    assert labeller.labels == Labels("01.jpg")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EROFS])
def test_a_save_that_fails_keeps_the_choices_and_the_old_file(folder, monkeypatch, code):
    labeller = open_labeller(folder)
    press(labeller, "01.jpg")
    button(labeller, "Save").click()
    before = (folder / "ground_truth.csv").read_bytes()
    press(labeller, "02.jpg")

    def fail(_):
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr("lib.files.os.fsync", fail)
        button(labeller, "Save").click()
    text, markup = seen(labeller)
    assert f"ground_truth.csv: {os.strerror(code)}. Your choices are still here" in text
    assert 'role="alert"' in markup
    assert (folder / "ground_truth.csv").read_bytes() == before
    assert labeller.labels.positives == {"01.jpg", "02.jpg"}
    button(labeller, "Save").click()
    assert np.flatnonzero(read_test_set(folder, 16).positives).tolist() == [1, 2]
    assert len(list(folder.iterdir())) == 31  # nothing half written is left


def test_odd_names_are_text_to_the_browser_and_to_the_file(tmp_path):
    names = [name if name.endswith(".jpg") else f"{name}.jpg" for name in ODD]
    save_photos(tmp_path, names)
    labeller = open_labeller(tmp_path)
    for name in set(names) - {labeller.labels.query}:
        press(labeller, name)
    swap(labeller, "<b>bold&amp;.jpg")
    _, markup = seen(labeller)
    assert "<b>bold" not in markup and "&lt;b&gt;bold&amp;amp;.jpg" in markup
    assert 'alt="positive a &quot;b&quot;, c.jpg"' in markup
    button(labeller, "Save").click()
    test_set = read_test_set(tmp_path, 16)
    assert test_set.names[test_set.query] == "<b>bold&amp;.jpg"
    assert test_set.positives.sum() == len(names) - 1


def test_a_name_that_is_no_unicode_is_named(tmp_path):
    try:
        save_photos(tmp_path, ["a.jpg", os.fsdecode(b"caf\xe9.jpg")])
    except (OSError, UnicodeError):
        pytest.skip("this file system takes no such names")
    labeller = open_labeller(tmp_path)
    assert photos(labeller)[0].description == "caf?.jpg"
    button(labeller, "Save").click()
    assert "the name of caf?.jpg is no valid Unicode" in seen(labeller)[0]
    assert not (tmp_path / "ground_truth.csv").exists()


def test_what_cannot_be_read_is_named_and_keeps_its_role(folder):
    write_labels(folder, [], Labels("00.jpg", {"01.jpg", "02.jpg"}))
    (folder / "02.jpg").write_text("not a picture")
    (folder / "phone.jxl").touch()
    labeller = open_labeller(folder)
    text, _ = seen(labeller)
    assert "1 of the folder's files can't be read, others were left out" in text
    assert "02.jpg" in text and "left out: 1 .jxl files" in text
    assert "1 positive chosen" in text
    press(labeller, "03.jpg")
    button(labeller, "Save").click()
    save_photos(folder, ["02.jpg"])
    assert np.flatnonzero(read_test_set(folder, 16).positives).tolist() == [1, 2, 3]


def test_one_photo_is_a_query_without_others(tmp_path):
    save_photos(tmp_path, ["a.jpg"])
    labeller = open_labeller(tmp_path)
    assert photos(labeller) == [] and button(labeller, "Next page").disabled
    button(labeller, "Save").click()
    assert read_test_set(tmp_path, 16).names == ["a.jpg"]


def test_photos_and_embeddings_must_fit(folder):
    names = [f"{i:02}.jpg" for i in range(30)]
    Labeller(folder, [*names, "below/x.jpg"], embeddings_of(31))  # more do no harm
    with pytest.raises(ValueError, match=r"1 photos have no embedding, such as '29\.jpg'"):
        Labeller(folder, names[:29], embeddings_of(29))
    with pytest.raises(ValueError, match=r"must be finite and \(30, d\)"):
        Labeller(folder, names, embeddings_of(29))
    with pytest.raises(ValueError, match="must be finite"):
        Labeller(folder, names, embeddings_of(30) * np.nan)
    (folder / "ground_truth.csv").write_text("image,role\n")
    with pytest.raises(TestSetError, match="exactly one query"):
        Labeller(folder, names, embeddings_of(30))
