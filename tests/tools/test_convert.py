"""Labelled photos become shards: the plan, the pictures, and what survives any interruption."""

import csv
import functools
import json
import multiprocessing
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
from io import BytesIO

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from lib.data.records import parse_triplet, read_message, read_triplets, scan_frames, write_shard
from lib.files import project_root
from tools import convert as module
from tools.convert import ConversionSettings, convert, encode_photo, main, verify
from tools.labelled import ConversionError, plan_triplets, read_csv, read_folder


def save(path, colour=(200, 30, 60), size=(24, 16), mode="RGB", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).convert(mode).save(path, **options)


def decode(jpeg):
    return np.asarray(Image.open(BytesIO(jpeg)))


def make_photos(folder, counts):
    """A folder per landmark, m0, m1, ...; each photo has a colour of its own (the first 256)."""
    names = [f"m{m}/{i}.png" for m, count in enumerate(counts) for i in range(count)]
    for number, name in enumerate(names):
        save(folder / name, colour=(number % 16 * 16, number // 16 * 16, 90))
    return read_folder(folder)


def triplets_of(folder):
    return [t for shard in sorted(folder.glob("train*.tfrec")) for t in read_triplets(shard)]


def content_of(folder):
    """Name -> content of all that a finished conversion leaves."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# --------------------------------------------------------------------------------------------------
# The plan
# --------------------------------------------------------------------------------------------------

counts_of_landmarks = st.lists(st.integers(1, 8), min_size=2, max_size=30).filter(
    lambda counts: max(counts) > 1
)


@given(counts_of_landmarks, st.integers(0, 9))
def test_the_plan(counts, seed):
    landmark = np.repeat(np.arange(len(counts)), counts)
    plan = plan_triplets(landmark, seed)
    anchors, positives, negatives = plan.T
    several = np.repeat(np.array(counts) > 1, counts)
    np.testing.assert_array_equal(anchors, np.flatnonzero(several))  # each once, in order
    assert (positives != anchors).all()
    assert (landmark[positives] == landmark[anchors]).all()
    assert (landmark[negatives] != landmark[anchors]).all()
    single = set(np.flatnonzero(~several))
    if len(single) <= len(plan):
        assert single <= set(negatives)
    else:
        assert len(set(negatives)) == len(plan)
    np.testing.assert_array_equal(plan, plan_triplets(landmark, seed))


def test_positives_are_drawn_evenly_and_negatives_taken_in_turn():
    landmark = np.repeat(np.arange(200), 4)
    plan = plan_triplets(landmark, seed=0)
    step = np.bincount((plan[:, 1] - plan[:, 0]) % 4, minlength=4)
    assert step[0] == 0 and step[1:].min() > 200  # 267 each on average
    assert np.bincount(plan[:, 2]).max() <= 2  # hardly any turn is missed
    assert (plan != plan_triplets(landmark, seed=1)).any(axis=0).tolist() == [False, True, True]


def test_photos_of_no_other_use_are_negatives_among_others():
    landmark = np.concatenate([np.arange(60), np.repeat(np.arange(60, 120), 2)])
    negatives = plan_triplets(landmark, seed=0)[:, 2]
    assert len(negatives) == 120 and set(range(60)) <= set(negatives)
    assert 20 < (negatives[:60] < 60).sum() < 40  # 30 on average


def test_one_landmark_with_nearly_all_photos_is_no_problem():
    landmark = np.array([0] * 50_000 + [1])
    plan = plan_triplets(landmark, seed=0)
    assert len(plan) == 50_000 and set(plan[:, 2]) == {50_000}


@pytest.mark.parametrize("landmark", [[], [0, 0, 0], [0, 1, 2]])
def test_what_makes_no_triplet(landmark):
    with pytest.raises(ConversionError, match="at least two landmarks are needed"):
        plan_triplets(np.array(landmark, dtype=int), 0)


# --------------------------------------------------------------------------------------------------
# Labels
# --------------------------------------------------------------------------------------------------


def test_a_folder_per_landmark(tmp_path):
    for name in ("b/2.JPG", "b/1.jpeg", "a/x.png", "a/y.WebP", "a/.hidden.jpg", ".git/z.jpg"):
        save(tmp_path / name, format="PNG")
    save(tmp_path / "not in a subfolder.jpg")
    (tmp_path / "a" / "notes.txt").touch()
    photos = read_folder(tmp_path)
    assert photos.table["image_id"].tolist() == ["a/x.png", "a/y.WebP", "b/1.jpeg", "b/2.JPG"]
    assert photos.table["landmark_id"].tolist() == ["a", "a", "b", "b"]
    assert photos.table["path"][3] == str(tmp_path / "b" / "2.JPG")
    assert photos.absent.empty


def test_folders_that_can_not_be_used(tmp_path):
    with pytest.raises(ConversionError, match="has no subfolders with photos"):
        read_folder(tmp_path)
    with pytest.raises(ConversionError, match=r"there is no folder .*absent"):
        read_folder(tmp_path / "absent")
    folder = os.fsencode(tmp_path / "a")
    os.mkdir(folder)
    try:
        open(folder + b"/\xff.jpg", "w").close()
    except OSError:
        pytest.skip("this file system takes no such names")
    with pytest.raises(ConversionError, match=r"left out: 1 photos whose names are not UTF-8"):
        read_folder(tmp_path)
    save(tmp_path / "a" / "1.jpg")  # it was lost with the other
    os.mkdir(os.fsencode(tmp_path) + b"/\xfe")
    shutil.copy(tmp_path / "a" / "1.jpg", os.fsencode(tmp_path) + b"/\xfe/1.jpg")
    photos = read_folder(tmp_path)
    assert photos.table["image_id"].tolist() == ["a/1.jpg"]
    assert photos.left_out == {"photos whose names are not UTF-8": 2}


def test_a_folder_above_whose_name_is_not_utf8_is_no_matter(tmp_path):
    """pandas' type for text refused the paths."""
    root = tmp_path / os.fsdecode(b"\xff")
    try:
        save(root / "a/b/c/abcd.jpg")
    except OSError:
        pytest.skip("this file system takes no such names")
    save(root / "a/1.jpg")
    save(root / "b/1.jpg", colour=(0, 90, 200))
    save(root / "b/2.jpg", colour=(0, 90, 20))
    assert convert(read_folder(root), root / "out").records == 2
    photos = read_csv(write_csv(tmp_path / "l.csv", "abcd,,1"), root)
    assert photos.table["path"].tolist() == [str(root / "a/b/c/abcd.jpg")]


def write_csv(path, *rows, header="id,url,landmark_id"):
    path.write_text("\n".join((header, *rows)) + "\n")
    return path


def test_google_landmarks_v2(tmp_path):
    for number, name in enumerate(("0/0/a/00aa", "0/0/a/00ab", "f/0/1/f012", "0/1/2/0123")):
        save(tmp_path / "train" / f"{name}.jpg", colour=(60 * number, 0, 0))
    labels = write_csv(
        tmp_path / "train.csv",
        "00aa,http://x/1.jpg,007",
        'f012,"http://x/2,3.jpg",1',
        "00ab,,007",
        "beef,http://x/4.jpg,1",
        "0123,http://x/5.jpg,NA",
    )
    photos = read_csv(labels, tmp_path / "train")
    assert photos.table["image_id"].tolist() == ["00aa", "00ab", "f012", "0123"]  # side by side
    assert photos.table["landmark_id"].tolist() == ["007", "007", "1", "NA"]  # text as it stands
    assert photos.table["path"][2] == str(tmp_path / "train/f/0/1/f012.jpg")
    assert photos.absent["image_id"].tolist() == ["beef"]

    report = convert(photos, tmp_path / "out")
    assert (report.photos, report.landmarks, report.single_landmarks) == (4, 3, 2)
    assert (report.skipped, report.examples) == ({"absent": 1}, {"absent": ["beef"]})
    assert "absent: 1, the first: beef" in str(report)


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ("id;url;landmark_id\nabcd;http://x/1,2;007\nabce;;007\n", "utf-8"),
        ("id,landmark_id\nabcd,007\nabce,007\n", "utf-16"),
        ("id,landmark_id\r\nabcd,007\r\nabce,007\r\n", "utf-8-sig"),
        (" ID , Landmark_Id\n abcd , 007\nabce, 007 \n", "utf-8"),
        ("id,landmark_id,\n\nabcd,007,,\n,,\nabce,007,\n\n", "utf-8"),
        ("sep=;\nid;landmark_id\nabcd;007\nabce;007\n", "utf-8"),
    ],
)
def test_lists_that_spreadsheets_save(tmp_path, text, encoding):
    """Each was refused, or lost its photos to a space."""
    for name in ("abcd", "abce"):
        save(tmp_path / "a/b/c" / f"{name}.jpg")
    (tmp_path / "l.csv").write_bytes(text.encode(encoding))
    table = read_csv(tmp_path / "l.csv", tmp_path).table
    assert table["image_id"].tolist() == ["abcd", "abce"]
    assert table["landmark_id"].tolist() == ["007", "007"]


def test_lists_may_be_larger_than_other_tables(tmp_path):
    """A list of Google Landmarks v2 has 500 MB; other tables at most 32."""
    save(tmp_path / "a/b/c/abcd.jpg")
    row = f"abcd,{'x' * 99_000},1\n"
    with (tmp_path / "l.csv").open("w") as file:
        file.write("id,url,landmark_id\n")
        file.writelines(row.replace("abcd", f"abc{number}", 1) for number in range(340))
        file.write(row)
    photos = read_csv(tmp_path / "l.csv", tmp_path)
    assert (len(photos.table), len(photos.absent)) == (1, 340)


def test_links_out_of_the_folder_and_folders_are_no_listed_photos(tmp_path):
    """They were followed, or counted as photos."""
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    save(inside / "a/b/c/abcd.jpg")
    save(outside / "e/0/0/secret.jpg")
    save(outside / "e/0/0/e001.jpg")
    (inside / "a/b/c/abc1.jpg").symlink_to(outside / "e/0/0/secret.jpg")
    (inside / "a/b/c/abc2.jpg").mkdir()
    (inside / "a/b/c/abc3.jpg").symlink_to("abcd.jpg")
    (inside / "a/b/c/abc4.jpg").symlink_to("gone.jpg")
    (inside / "a/b/c/not listed.jpg").symlink_to(outside / "e/0/0/secret.jpg")
    (inside / "e").symlink_to(outside / "e")
    ids = ("abcd", "abc1", "abc2", "abc3", "abc4", "abc5", "e001")
    labels = write_csv(tmp_path / "l.csv", *(f"{name},,1" for name in ids))
    (tmp_path / "link").symlink_to(inside)  # the folder itself may be a link
    for folder in (inside, tmp_path / "link"):
        photos = read_csv(labels, folder)
        assert photos.table["image_id"].tolist() == ["abcd", "abc3"]
        assert photos.absent["image_id"].tolist() == ["abc5"]
        assert photos.left_out == {
            "links to files outside of the folder": 2,
            "folders that are named like photos": 1,
            "files that are absent": 1,
        }


def test_the_photos_of_a_landmark_keep_their_order(tmp_path):
    ids = [f"{number:03d}" for number in range(99, -1, -1)]
    for name in ids:
        save(tmp_path / name[0] / name[1] / name[2] / f"{name}.jpg")
    labels = write_csv(tmp_path / "l.csv", *(f"{name},,{int(name) % 3}" for name in ids))
    table = read_csv(labels, tmp_path).table
    assert table["image_id"].tolist() == [*ids[0::3], *ids[1::3], *ids[2::3]]
    assert table["landmark_id"].unique().tolist() == ["0", "2", "1"]  # as they first appear


def test_a_locked_folder_costs_only_its_photos(tmp_path, monkeypatch):
    for name in ("a/b/c/abcd", "a/b/d/abde"):
        save(tmp_path / f"{name}.jpg")
    listing = os.scandir

    def refuse(folder):
        if "a/b/d" in str(folder):
            raise PermissionError(13, "Permission denied")
        return listing(folder)

    monkeypatch.setattr("os.scandir", refuse)
    photos = read_csv(write_csv(tmp_path / "l.csv", "abcd,,1", "abde,,1"), tmp_path)
    assert photos.table["image_id"].tolist() == ["abcd"]
    assert photos.absent["image_id"].tolist() == ["abde"]
    assert photos.left_out == {"folders that can't be read": 1}


def test_the_url_is_not_needed(tmp_path):
    save(tmp_path / "a/b/c/abcd.jpg")
    labels = write_csv(tmp_path / "l.csv", "5,abcd", header="landmark_id,id")
    assert read_csv(labels, tmp_path).table.iloc[0].to_dict() == {
        "landmark_id": "5",
        "image_id": "abcd",
        "path": str(tmp_path / "a/b/c/abcd.jpg"),
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "l.csv, line 1: the columns must be id,landmark_id, not "),
        (b"\xff\xfe\x00", "l.csv, line 1: it can't be read as a CSV file"),
        (b"id,landmark_id\n\na,1,2,3\nb\n", "l.csv, line 3: it has more cells than the header"),
        (b"id,url\na,b\n", "l.csv, line 1: the columns must be id,landmark_id, not id,url"),
        (
            b"\xef\xbb\xbfid,landmark_id\n" + b"abcd,1\n" * 9998 + b"\xff,1\n",
            "l.csv, line 10000: it",
        ),
        (b"id,landmark_id\n", "none of the 0 photos that .*l.csv"),
        (b"id,landmark_id\nabcd,1\n", "none of the 1 photos that .*l.csv lists is in folders"),
        (b"id,landmark_id\na,1\nb,1\na,2\n", "l.csv, line 4: the id is repeated"),
        (b"id,landmark_id\na,1\nb\n", "l.csv, line 3: .* something is empty"),
        (b'id,url,landmark_id\n\na,"1\n2",1\n\na,,2\n', "l.csv, line 6: the id is repeated"),
    ],
)
def test_lists_that_can_not_be_used(tmp_path, content, message):
    (tmp_path / "l.csv").write_bytes(content)
    with pytest.raises(ConversionError, match=message):
        read_csv(tmp_path / "l.csv", tmp_path)


def test_a_list_that_is_absent(tmp_path):
    with pytest.raises(ConversionError, match=r"m\.csv can't be read as a CSV file"):
        read_csv(tmp_path / "m.csv", tmp_path)


# --------------------------------------------------------------------------------------------------
# Photos
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "expected"),
    [((800, 600), (64, 48)), ((600, 801), (48, 64)), ((40, 30), (40, 30)), ((3000, 2), (64, 1))],
)
@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_the_longer_side_is_limited_and_nothing_enlarged(tmp_path, size, expected, suffix):
    save(tmp_path / f"a.{suffix}", size=size)
    picture = decode(encode_photo(tmp_path / f"a.{suffix}", 64, 94))
    assert picture.shape == (*expected[::-1], 3)
    np.testing.assert_allclose(picture[0, 0], (200, 30, 60), atol=4)


def quarters():
    """40 × 20 pixels, a colour in each quarter."""
    image = Image.new("RGB", (40, 20), "red")
    image.paste("lime", (20, 0, 40, 10))
    image.paste("blue", (0, 10, 20, 20))
    image.paste("white", (20, 10, 40, 20))
    return image


# How a camera stores an upright picture, for each orientation: what it does is undone by the tag.
STORED = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_photos_are_turned_upright(tmp_path, orientation, suffix):
    image, method = quarters(), STORED[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = image.resize((400, 200))
    stored = image if method is None else image.transpose(method)
    stored.save(tmp_path / f"a.{suffix}", exif=exif)
    picture = encode_photo(tmp_path / f"a.{suffix}", 40, 94)
    corners = decode(picture)[[4, 4, 15, 15], [4, 35, 4, 35]]
    expected = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)]
    np.testing.assert_allclose(corners, expected, atol=12)
    assert not Image.open(BytesIO(picture)).getexif()  # or it would be turned twice


def test_odd_metadata_does_not_cost_a_photo(tmp_path):
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "ABC"
    save(tmp_path / "a.jpg", size=(40, 20), exif=exif)
    content = (tmp_path / "a.jpg").read_bytes()
    width_in_words = content.replace(b"\x01\x0f\x00\x02", b"\x01\x00\x00\x02")
    (tmp_path / "a.jpg").write_bytes(width_in_words)
    with pytest.raises(struct.error), Image.open(tmp_path / "a.jpg") as image:
        ImageOps.exif_transpose(image)
    assert decode(encode_photo(tmp_path / "a.jpg", 40, 94)).shape == (40, 20, 3)


def image_of(mode):
    """A picture in a mode, its file's suffix, and the RGB colour it should come out with."""
    if mode == "I;16":
        return Image.fromarray(np.full((20, 20), 128 * 257, np.uint16)), "png", (128, 128, 128)
    if mode == "LA":
        return Image.new("LA", (20, 20), (0, 128)), "png", (127, 127, 127)  # black on white
    if mode == "P with transparency":
        image = Image.new("P", (20, 20), 0)
        image.putpalette([200, 30, 60, 0, 255, 0])
        image.info["transparency"] = 0
        return image, "png", (255, 255, 255)
    image = Image.new("RGB", (20, 20), (200, 30, 60))
    if mode == "RGBA":
        image.putalpha(0)
        return image, "png", (255, 255, 255)
    if mode == "L":
        return image.convert("L"), "jpg", (84, 84, 84)
    if mode == "P":
        return image.quantize(4), "png", (200, 30, 60)
    return image.convert(mode), "jpg" if mode == "CMYK" else "png", (200, 30, 60)


@pytest.mark.parametrize(
    "mode", ["RGB", "L", "CMYK", "P", "RGBA", "LA", "I;16", "P with transparency"]
)
@pytest.mark.parametrize("size", [10, 20])
def test_any_mode_becomes_rgb(tmp_path, mode, size):
    image, suffix, expected = image_of(mode)
    image.save(tmp_path / f"a.{suffix}")
    picture = decode(encode_photo(tmp_path / f"a.{suffix}", size, 94))
    assert picture.shape == (size, size, 3)
    np.testing.assert_allclose(picture.reshape(-1, 3), [expected] * size**2, atol=6)


def test_photos_that_can_not_be_read(tmp_path, monkeypatch):
    save(tmp_path / "good.jpg", size=(200, 200))
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "good.jpg").read_bytes()[:-200])
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "text.jpg").write_text("not a picture")
    names = ("cut.jpg", "empty.jpg", "text.jpg", "missing.jpg")
    failures = [encode_photo(tmp_path / name, 64, 94) for name in names]
    kinds = ["unreadable", "not a picture", "not a picture", "absent"]
    assert [failure.kind for failure in failures] == kinds
    assert all(failure.reason for failure in failures)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100 * 100)
    assert encode_photo(tmp_path / "good.jpg", 64, 94).kind == "too large"


# --------------------------------------------------------------------------------------------------
# Shards
# --------------------------------------------------------------------------------------------------


def test_round_trip(tmp_path):
    photos = make_photos(tmp_path / "photos", [3, 1, 2, 4, 1])
    settings = ConversionSettings(records_per_shard=4, quality=100)
    report = convert(photos, tmp_path / "out", settings)
    assert (report.photos, report.landmarks, report.single_landmarks) == (11, 5, 2)
    assert (report.records, report.shards, report.skipped) == (9, 3, {})
    shards = sorted(path.name for path in (tmp_path / "out").glob("*.tfrec"))
    assert shards == ["train00.tfrec", "train01.tfrec", "train02.tfrec"]

    plan = plan_triplets(photos.landmark, settings.seed)
    triplets = triplets_of(tmp_path / "out")
    assert len(triplets) == len(plan)
    for triplet, row in zip(triplets, plan, strict=True):
        expected = photos.table.iloc[row]
        assert triplet.image_ids == tuple(expected["image_id"])
        assert triplet.landmark_ids == tuple(expected["landmark_id"])
        for picture, path in zip(triplet.pictures, expected["path"], strict=True):
            np.testing.assert_allclose(
                decode(picture)[0, 0], np.array(Image.open(path))[0, 0], atol=3
            )
    assert verify(tmp_path / "out") == report


def test_there_may_be_more_than_a_hundred_shards(tmp_path):
    photos = make_photos(tmp_path / "photos", [51, 50])
    convert(photos, tmp_path / "out", ConversionSettings(records_per_shard=1))
    names = sorted(path.name for path in (tmp_path / "out").glob("*.tfrec"))
    assert (names[0], names[-1], len(names)) == ("train000.tfrec", "train100.tfrec", 101)
    assert verify(tmp_path / "out").records == 101


@pytest.mark.parametrize("seed", range(4))
def test_bad_photos_are_replaced_counted_and_named(tmp_path, seed):
    make_photos(tmp_path / "photos", [4, 4, 1, 2, 2])
    bad = ["m0/1.png", "m1/0.png", "m2/0.png", "m3/0.png", "m4/0.png", "m4/1.png"]
    for name in bad:
        (tmp_path / "photos" / name).write_text("no picture")
    photos = read_folder(tmp_path / "photos")
    report = convert(photos, tmp_path / "out", ConversionSettings(records_per_shard=3, seed=seed))
    # m3/1.png can be read, but there is no positive for it.
    assert report.skipped == {"no partner": 1, "not a picture": 6}
    assert report.examples["no partner"] == ["m3/1.png"]
    assert len(set(report.examples["not a picture"]) & set(bad)) == 3
    with (tmp_path / "out" / "skipped.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["image_id"] for row in rows if row["kind"] == "not a picture"} == set(bad)
    assert all(row["reason"] and row["landmark_id"] == row["image_id"][:2] for row in rows)

    ids = photos.table["image_id"].tolist()
    good = [name for name in ids if name not in bad]

    def next_good(name, fits):
        start = ids.index(name)
        return next(n for n in ids[start:] + ids[:start] if n in good and fits(n))

    expected = []
    for anchor, positive, negative in plan_triplets(photos.landmark, seed):
        own = ids[anchor]
        if own in good and own != "m3/1.png":
            same = next_good(ids[positive], lambda n, own=own: n[:2] == own[:2] and n != own)
            other = next_good(ids[negative], lambda n, own=own: n[:2] != own[:2])
            expected.append((own, same, other))
    assert [triplet.image_ids for triplet in triplets_of(tmp_path / "out")] == expected
    assert len(expected) == 6


def test_a_copy_of_the_anchor_is_no_positive(tmp_path):
    folder = tmp_path / "photos"
    make_photos(folder, [3, 2, 2])
    shutil.copy(folder / "m0/0.png", folder / "m0/1.png")
    shutil.copy(folder / "m1/0.png", folder / "m1/1.png")
    report = convert(read_folder(folder), tmp_path / "out")
    partners = {t.image_ids[0]: t.image_ids[1] for t in triplets_of(tmp_path / "out")}
    assert partners["m0/0.png"] == partners["m0/1.png"] == "m0/2.png"
    assert not any(t.anchor == t.positive for t in triplets_of(tmp_path / "out"))
    assert report.examples == {"no partner": ["m1/0.png", "m1/1.png"]}


def test_the_positive_under_another_name_is_no_negative(tmp_path):
    folder = tmp_path / "photos"
    make_photos(folder, [2, 2])
    shutil.copy(folder / "m0/0.png", folder / "m1/0.png")
    convert(read_folder(folder), tmp_path / "out")
    for triplet in triplets_of(tmp_path / "out"):
        assert len(set(triplet.pictures)) == 3


def test_if_no_photo_can_be_read_that_is_said(tmp_path):
    make_photos(tmp_path / "photos", [2, 2])
    for path in tmp_path.glob("photos/*/*"):
        path.write_text("no picture")
    for _ in range(2):
        with pytest.raises(
            ConversionError, match=r"no record can be made, .*skipped\.csv says why"
        ):
            convert(read_folder(tmp_path / "photos"), tmp_path / "out")
    assert not (tmp_path / "out" / "shards.json").exists()


# --------------------------------------------------------------------------------------------------
# Interruptions, and folders that are not what they should be
# --------------------------------------------------------------------------------------------------

SETTINGS = ConversionSettings(size=16, records_per_shard=4)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Some photos, among them bad ones, and the content of an uninterrupted conversion."""
    folder = tmp_path_factory.mktemp("source")
    make_photos(folder / "photos", [4, 1, 3, 5, 1, 6, 7, 4, 2, 5])
    for name in ("m2/1.png", "m5/0.png", "m6/3.png"):
        (folder / "photos" / name).write_text("no picture")
    photos = read_folder(folder / "photos")
    report = convert(photos, folder / "whole", SETTINGS)
    assert (report.records, report.shards) == (33, 9)
    return photos, content_of(folder / "whole")


@pytest.mark.parametrize("shards_before", range(9))
def test_an_interrupted_conversion_continues(tmp_path, source, monkeypatch, shards_before):
    photos, whole = source
    written = []

    def write_some(path, triplets):
        if len(written) == shards_before:
            (path.parent / ".part-xyz").write_text("left by a killed run")
            raise KeyboardInterrupt
        written.append(path.name)
        return write_shard(path, triplets)

    monkeypatch.setattr(module, "write_shard", write_some)
    with pytest.raises(KeyboardInterrupt):
        convert(photos, tmp_path, SETTINGS)
    assert not (tmp_path / "shards.json").exists()
    assert sorted(path.name for path in tmp_path.glob("*.tfrec")) == written
    with pytest.raises(ConversionError, match="is not complete: convert again"):
        verify(tmp_path)

    before = list(written)
    shards_before = None  # now there is nothing to stop it
    convert(photos, tmp_path, SETTINGS)
    assert len(written) == len(set(written)) == 9 and written[: len(before)] == before
    assert content_of(tmp_path) == whole


def test_a_finished_conversion_is_left_alone(tmp_path, source, monkeypatch):
    photos, whole = source
    first = convert(photos, tmp_path, SETTINGS)
    monkeypatch.setattr(module, "encode_photo", None)
    assert convert(photos, tmp_path, SETTINGS) == first == verify(tmp_path)
    assert content_of(tmp_path) == whole


@pytest.fixture
def mended(tmp_path):
    """A folder whose conversion left out a damaged photo, which a good one has replaced."""
    make_photos(tmp_path / "photos", [4, 3, 3])
    broken = tmp_path / "photos" / "m0" / "1.png"
    good = broken.read_bytes()
    broken.write_bytes(b"broken")
    report = convert(read_folder(tmp_path / "photos"), tmp_path / "out", SETTINGS)
    assert report.skipped == {"not a picture": 1}
    broken.write_bytes(good)
    return read_folder(tmp_path / "photos")


@pytest.mark.parametrize("stop", [None, "before the shards", "at the second shard"])
def test_a_photo_that_was_replaced_is_converted(tmp_path, mended, monkeypatch, stop):
    """A damaged photo stayed left out after a good one had taken its place."""
    if stop:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            if stop == "before the shards":
                patch.setattr(module, "_write_shards", interrupt)
            else:
                write = lambda path, t: (interrupt if "01" in path.name else write_shard)(path, t)  # noqa: E731
                patch.setattr(module, "write_shard", write)
            convert(mended, tmp_path / "out", SETTINGS)
    report = convert(mended, tmp_path / "out", SETTINGS)
    assert (report.records, report.skipped) == (10, {})
    convert(mended, tmp_path / "new", SETTINGS)
    assert content_of(tmp_path / "out") == content_of(tmp_path / "new")


def interrupt(*_):
    raise KeyboardInterrupt


def test_a_conversion_that_did_not_note_the_files_is_refused(tmp_path, mended):
    """Whether they have changed is unknown; an older version made it."""
    path = tmp_path / "out" / "conversion.json"
    plan = json.loads(path.read_text())
    del plan["files"]
    path.write_text(json.dumps(plan))
    before = content_of(tmp_path / "out")
    with pytest.raises(ConversionError, match=r"\(other files\): choose another folder, or delete"):
        convert(mended, tmp_path / "out", SETTINGS)
    assert content_of(tmp_path / "out") == before


def test_without_the_list_of_what_was_skipped_no_shard_is_trusted(tmp_path, source, monkeypatch):
    """After an interruption, the old shards counted as done, and nothing as left out."""
    photos, whole = source
    convert(photos, tmp_path, SETTINGS)
    (tmp_path / "skipped.csv").unlink()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "_write_shards", interrupt)
        convert(photos, tmp_path, SETTINGS)
    convert(photos, tmp_path, SETTINGS)
    assert content_of(tmp_path) == whole


@pytest.mark.parametrize("name", ["train03.tfrec", "skipped.csv"])
def test_what_is_deleted_later_is_made_again(tmp_path, source, name):
    photos, whole = source
    convert(photos, tmp_path, SETTINGS)
    (tmp_path / name).unlink()
    with pytest.raises(ConversionError, match=rf"{name}.*do the same conversion again"):
        verify(tmp_path)
    convert(photos, tmp_path, SETTINGS)
    shards = {name: content for name, content in whole.items() if name.endswith(".tfrec")}
    assert content_of(tmp_path).items() >= shards.items()
    assert verify(tmp_path).skipped == {"not a picture": 3}


def test_verify_names_what_is_damaged(tmp_path, source):
    photos, whole = source
    convert(photos, tmp_path, SETTINGS)
    for name in ("train00.tfrec", "train08.tfrec", "skipped.csv"):
        for position in (0, len(whole[name]) // 2, len(whole[name]) - 1):
            content = bytearray(whole[name])
            content[position] ^= 1
            (tmp_path / name).write_bytes(content)
            with pytest.raises(ConversionError, match=name):
                verify(tmp_path)
        (tmp_path / name).write_bytes(whole[name])
    shutil.copy(tmp_path / "train00.tfrec", tmp_path / "train09.tfrec")
    with pytest.raises(ConversionError, match=r"train09\.tfrec is not what was written: delete it"):
        verify(tmp_path)


@pytest.mark.parametrize(
    "content", ["", "[1]", "[" * 100_000, '{"file": {}}', '{"files": {}, "report": {"a": 1}}']
)
def test_a_damaged_state_file_is_named(tmp_path, source, content):
    """Valid JSON of another structure raised AttributeError, KeyError or TypeError."""
    photos, whole = source
    convert(photos, tmp_path, SETTINGS)
    (tmp_path / "shards.json").write_text(content)
    for action in (lambda: verify(tmp_path), lambda: convert(photos, tmp_path, SETTINGS)):
        with pytest.raises(ConversionError, match=r"shards\.json is damaged: delete it and do"):
            action()
    (tmp_path / "shards.json").unlink()
    convert(photos, tmp_path, SETTINGS)
    assert content_of(tmp_path) == whole
    if not content.startswith("{"):
        (tmp_path / "conversion.json").write_text(content)
        with pytest.raises(ConversionError, match=r"conversion\.json is damaged: delete"):
            convert(photos, tmp_path, SETTINGS)


def test_a_changed_number_in_a_state_file_is_noticed(tmp_path, source):
    """The report was believed, and given out as it stood there."""
    photos, _ = source
    report = convert(photos, tmp_path, SETTINGS)
    path = tmp_path / "shards.json"
    path.write_text(path.read_text().replace(f'"photos": {report.photos}', '"photos": 99'))
    for action in (lambda: verify(tmp_path), lambda: convert(photos, tmp_path, SETTINGS)):
        with pytest.raises(ConversionError, match=r"shards\.json is damaged: delete it and do"):
            action()


@pytest.mark.parametrize("row", [b"train00.tfrec,a,b\n", b"\xff\n"])
def test_a_damaged_list_of_what_was_skipped_is_named(tmp_path, source, row):
    """It raised UnicodeDecodeError, or a table of pandas with gaps was counted."""
    photos, whole = source
    convert(photos, tmp_path, SETTINGS)
    (tmp_path / "train01.tfrec").unlink()
    (tmp_path / "skipped.csv").write_bytes(whole["skipped.csv"] + row)
    with pytest.raises(ConversionError, match=r"skipped\.csv is damaged: delete it and do"):
        convert(photos, tmp_path, SETTINGS)


def test_a_folder_belongs_to_one_conversion(tmp_path, source):
    photos, _ = source
    convert(photos, tmp_path / "a", SETTINGS)
    before = content_of(tmp_path / "a")
    with pytest.raises(ConversionError, match=r"another conversion \(other size\): choose another"):
        convert(photos, tmp_path / "a", ConversionSettings(size=17, records_per_shard=4))
    fewer = make_photos(tmp_path / "photos", [4, 1])
    with pytest.raises(ConversionError, match=r"\(other photos, records, sha256, files\)"):
        convert(fewer, tmp_path / "a", SETTINGS)
    assert content_of(tmp_path / "a") == before
    (tmp_path / "b").mkdir()
    shutil.copy(tmp_path / "a" / "train00.tfrec", tmp_path / "b")
    with pytest.raises(ConversionError, match="holds shards of another origin: choose an empty"):
        convert(photos, tmp_path / "b", SETTINGS)
    assert (tmp_path / "b" / "train00.tfrec").read_bytes() == before["train00.tfrec"]


def test_two_writers_exclude_each_other(tmp_path, source, monkeypatch):
    photos, whole = source

    def encode_and_try(*args):
        monkeypatch.setattr(module, "encode_photo", encode_photo)
        with pytest.raises(ConversionError, match="another process is writing in"):
            convert(photos, tmp_path, SETTINGS)
        return encode_photo(*args)

    monkeypatch.setattr(module, "encode_photo", encode_and_try)
    convert(photos, tmp_path, SETTINGS)
    assert content_of(tmp_path) == whole


# Ends at a moment that is counted, so that a busy machine changes nothing.
KILLED = """
import os, signal, sys, threading
from tqdm import tqdm

tqdm.set_lock(threading.RLock())  # one between processes would stay locked after a kill
moments = 0

def hear(event, arguments):
    global moments
    if event in ("open", "os.rename"):
        moments += 1
        if moments == last:
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(hear)
run()
"""


@pytest.mark.long
def test_killed_at_any_moment_it_continues(tmp_path, source):
    photos, whole = source
    # Its children begin where the imports are done, so that kills hit the conversion.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tools.convert"])

    def convert_until(last, code=KILLED):
        """Whether a process that converts was killed at that opening or renaming of a file."""
        work = {"run": functools.partial(convert, photos, folder, SETTINGS), "last": last}
        process = context.Process(target=exec, args=(code, work))
        process.start()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        return process.exitcode != 0

    folder, count = tmp_path / "whole", tmp_path / "moments"
    counting = KILLED + f"open({str(count)!r}, 'w').write(str(moments))"
    assert not convert_until(0, counting)
    moments, draws = int(count.read_text()), random.Random(0)
    folder, partial, kills = tmp_path / "out", 0, 0
    while kills < 50:
        kills += convert_until(draws.randint(1, moments))
        shards = sorted(folder.glob("train*.tfrec"))
        for shard in shards:
            assert shard.read_bytes() == whole[shard.name]
            with shard.open("rb") as file:
                for frame in scan_frames(shard):
                    parse_triplet(read_message(file, frame))
        partial += 0 < len(shards) < 9
        if (folder / "shards.json").exists():
            verify(folder)
            assert content_of(folder) == whole
            shutil.rmtree(folder)
    convert(photos, folder, SETTINGS)
    assert content_of(folder) == whole
    assert partial > 6  # else the kills came at the wrong moments


# --------------------------------------------------------------------------------------------------
# Settings and the command line
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong", [{"size": 0}, {"quality": 0}, {"quality": 101}, {"records_per_shard": 0}, {"seed": -1}]
)
def test_settings_out_of_range(wrong):
    with pytest.raises(ConversionError, match=next(iter(wrong))):
        ConversionSettings(**wrong)


def test_command_line(tmp_path, capsys):
    make_photos(tmp_path / "photos", [3, 1, 2])
    (tmp_path / "photos" / "m0" / "0.png").write_text("no picture")
    command = [str(tmp_path / "photos"), str(tmp_path / "out"), "--size", "8"]
    assert main([*command, "--records-per-shard", "2", "--seed", "3"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "6 photos of 3 landmarks",
        "landmarks with a single photo, used as a negative only: 1",
        "4 records in 3 shards",
        "not a picture: 1, the first: m0/0.png",
    ]
    plan = json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert (plan["size"], plan["seed"], plan["records_per_shard"]) == (8, 3, 2)
    assert decode(triplets_of(tmp_path / "out")[0].anchor).shape == (5, 8, 3)

    labels = write_csv(tmp_path / "l.csv", "m0/0,u,1")
    wrong = {2: [["--size", "0"]], 1: [["--size", "9"], ["--labels", str(labels)]]}
    for status, options in ((status, o) for status, many in wrong.items() for o in many):
        assert main([*command[:2], *options]) == status
        out, err = capsys.readouterr()
        assert (out, err.count("\n"), err[:7]) == ("", 1, "error: ")
    assert main([str(tmp_path / "none"), str(tmp_path / "out")]) == 1
    assert main([str(tmp_path / "photos"), str(labels)]) == 1  # the target is a file


def test_the_module_is_light_and_runs_as_a_command(tmp_path):
    heavy = "{'tensorflow', 'keras', 'faiss', 'torch'}"
    code = f"import sys, tools.convert; print({heavy} & {{*sys.modules}})"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=project_root(), capture_output=True, text=True
    )
    assert done.stdout == "set()\n"
    command = [sys.executable, "-m", "tools.convert", str(tmp_path), str(tmp_path / "out")]
    done = subprocess.run(command, cwd=project_root(), capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_a_shard_that_was_cut_off_since_is_made_anew(tmp_path):
    """The same command said that all was done."""
    photos = make_photos(tmp_path / "photos", [2, 2, 2])
    report = convert(photos, tmp_path / "out", SETTINGS)
    whole = content_of(tmp_path / "out")
    shard = next((tmp_path / "out").glob("*.tfrec"))
    os.truncate(shard, 100)
    assert convert(photos, tmp_path / "out", SETTINGS) == report
    assert content_of(tmp_path / "out") == whole
