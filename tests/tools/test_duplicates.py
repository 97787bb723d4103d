"""Copies in a folder of photos are named, and nothing but the report is written."""

import csv
import html
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from lib.app.gallery import JOBS
from lib.data.copies import SAME_BYTES, SAME_PICTURE, SAME_SCENE
from lib.files import only_writer
from lib.network.engine import OWN_PHOTOS, Engine
from tools import duplicates
from tools.duplicates import PAGE, TABLE, find_copies, main, near_pairs


def coarse(photos):
    """Descriptors of the colours of 4 x 4 areas and of the whole; a network needs its weights."""
    areas = photos.reshape(len(photos), 4, 8, 4, 8, 3).mean((2, 4)).reshape(len(photos), -1) - 128
    return (areas / (np.linalg.norm(areas, axis=1, keepdims=True) + 1e-9)).astype(np.float32)


ENGINE = Engine(coarse, 32, 48, "coarse", "numpy")


@pytest.fixture(autouse=True)
def engine(monkeypatch, tmp_path):
    monkeypatch.setattr(duplicates, "packaged_engine", lambda run: ENGINE)
    monkeypatch.setattr(duplicates, "project_root", lambda: tmp_path)


def draw(seed, size=(320, 240)):
    """A made-up picture: overlapping shapes in random colours."""
    random = np.random.default_rng(seed)
    image = Image.new("RGB", size, tuple(random.integers(0, 255, 3).tolist()))
    pen = ImageDraw.Draw(image)
    for _ in range(12):
        x, y = random.integers(-40, 320), random.integers(-40, 240)
        w, h = random.integers(40, 200, 2)
        box = [int(x), int(y), int(x + w), int(y + h)]
        pen.ellipse(box, fill=tuple(random.integers(0, 255, 3).tolist()))
    return image


@pytest.fixture
def photos(tmp_path):
    """A folder with two different pictures."""
    folder = tmp_path / "photos"
    (folder / "below").mkdir(parents=True)
    draw(1).save(folder / "one.jpg", quality=95)
    draw(2).save(folder / "below" / "two.jpg", quality=95)
    return folder


def found(photos, out, capsys):
    """Run the program; the groups as (kind, names), the rows of the table, and what it prints."""
    assert main([str(photos), "--out", str(out)]) == 0
    text = (out / TABLE).read_text("utf-8", errors="surrogateescape")
    rows = list(csv.DictReader(text.splitlines(keepends=True)))
    groups = {}
    for row in rows:
        groups.setdefault((int(row["group"]), row["kind"]), []).append(row["name"])
    assert [number for number, _ in groups] == [*range(1, len(groups) + 1)]
    return [(kind, names) for (_, kind), names in groups.items()], rows, capsys.readouterr().out


def state(folder):
    return {p: (p.stat().st_mtime_ns, p.is_file() and p.read_bytes()) for p in folder.rglob("*")}


def test_same_bytes_under_two_names(photos, tmp_path, capsys):
    shutil.copy(photos / "one.jpg", photos / "below" / "copy of one.jpg")
    groups, rows, printed = found(photos, tmp_path / "out", capsys)
    assert groups == [(SAME_BYTES, ["one.jpg", "below/copy of one.jpg"])]
    assert [row["similarity"] for row in rows] == ["1.0000"] * 2
    assert (rows[0]["width"], rows[0]["height"]) == ("320", "240")
    assert int(rows[0]["bytes"]) == (photos / "one.jpg").stat().st_size
    first, second, third, *_ = printed.splitlines()
    assert first == "same bytes: 1 group, 2 photos"
    assert second == "same picture: 0 groups, 0 photos"
    assert third == "same scene: 0 groups, 0 photos"


def test_one_picture_in_many_forms(photos, tmp_path, capsys):
    image = Image.open(photos / "one.jpg")
    image.resize((160, 120)).save(photos / "small.png")
    image.save(photos / "poor.jpg", quality=30)
    image.save(photos / "other.webp")
    turned = image.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[274] = 6  # the camera was turned, as the upright picture is
    turned.save(photos / "turned.jpg", exif=exif, quality=95)
    groups, rows, _ = found(photos, tmp_path / "out", capsys)
    names = ["one.jpg", "other.webp", "poor.jpg", "turned.jpg", "small.png"]
    assert groups == [(SAME_PICTURE, names)]
    assert {(row["width"], row["height"]) for row in rows[:4]} == {("320", "240")}
    assert all(float(row["similarity"]) > 0.9 for row in rows)


def test_plain_pictures_have_one_hash_but_are_not_the_same_picture(photos, tmp_path, capsys):
    for colour in ("navy", "red", "black"):
        Image.new("RGB", (64, 64), colour).save(photos / f"{colour}.png")
    Image.new("RGB", (64, 64), (0, 0, 120)).save(photos / "navy too.png")
    copies = find_copies(photos, ENGINE, tmp_path / "jobs")
    plain = {p.perceptual_hash for p in copies.photos if p.name in ("navy.png", "red.png")}
    assert len(plain) == 1
    groups, *_ = found(photos, tmp_path / "out", capsys)
    assert groups == [(SAME_SCENE, ["navy too.png", "navy.png"])]


def test_files_that_can_not_be_read_are_named(photos, tmp_path, capsys):
    (photos / "broken <b>.jpg").write_bytes(b"\xff\xd8 broken off")
    (photos / "empty.png").touch()
    (photos / "raw.cr2").touch()
    *_, printed = found(photos, tmp_path / "out", capsys)
    assert "can't be read: 2 photos: broken <b>.jpg, empty.png\nleft out: 1 .cr2 files" in printed
    page = (tmp_path / "out" / PAGE).read_text("utf-8")
    assert "<li>broken &lt;b&gt;.jpg</li>" in page and "broken <b>" not in page


def test_a_photo_that_is_gone_after_it_was_embedded(photos, tmp_path, capsys, monkeypatch):
    shutil.copy(photos / "one.jpg", photos / "again.jpg")

    def gone_meanwhile(*arguments, **settings):
        gallery = whole(*arguments)
        (photos / "again.jpg").unlink()
        return gallery

    whole = duplicates.open_option
    monkeypatch.setattr(duplicates, "open_option", gone_meanwhile)
    groups, _, printed = found(photos, tmp_path / "out", capsys)
    assert groups == [] and "can't be read: 1 photo: again.jpg" in printed


NAMES = ['<img src=x onerror="a()">.jpg', "a\nb,c.jpg", "Ærø ‮ 東京.jpg", os.fsdecode(b"\xff.jpg")]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_odd_names(photos, tmp_path, capsys, name):
    try:
        shutil.copy(photos / "one.jpg", photos / name)
    except OSError:
        pytest.skip("this file system has no such names")
    groups, *_ = found(photos, tmp_path / "out", capsys)
    assert [(kind, {*names}) for kind, names in groups] == [(SAME_BYTES, {name, "one.jpg"})]
    page = (tmp_path / "out" / PAGE).read_text("utf-8")
    assert "<img src=x" not in page
    shown = duplicates.show_name(name)
    assert f"<strong>{html.escape(shown)}".replace("&quot;", "&#34;") in page


def test_the_page_stands_alone(photos, tmp_path, capsys):
    draw(1).resize((160, 120)).save(photos / "small.png")
    found(photos, tmp_path / "out", capsys)
    page = (tmp_path / "out" / PAGE).read_text("utf-8")
    pictures = re.findall(r"<img ([^>]*)>", page)
    assert len(pictures) == 2
    assert all(
        'src="data:image/jpeg;base64,' in p and 'alt="Small picture of' in p for p in pictures
    )
    assert page.count("320 × 240 pixels, <strong>the most</strong>") == 1
    assert "160 × 120 pixels<br>" in page
    assert not re.search(r"<script|<link|https?://|url\(", page)


def test_long_lists_are_cut_on_the_page(photos, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(duplicates, "_MOST_GROUPS", 1)
    monkeypatch.setattr(duplicates, "_MOST_PHOTOS", 2)
    for number in range(3):
        shutil.copy(photos / "one.jpg", photos / f"{number}.jpg")
    shutil.copy(photos / "below" / "two.jpg", photos / "two.jpg")
    groups, *_ = found(photos, tmp_path / "out", capsys)
    assert [len(names) for _, names in groups] == [4, 2]
    page = (tmp_path / "out" / PAGE).read_text("utf-8")
    assert page.count("<img") == 2 and "Group 1: 4 photos" in page
    assert "2 more photos of this group are in duplicates.csv only" in page
    assert "1 more groups are in duplicates.csv only" in page


def test_the_folder_stays_as_it_is_and_the_report_is_not_counted(photos, capsys):
    shutil.copy(photos / "one.jpg", photos / "again.jpg")
    before, out = state(photos), photos / "report"
    first = found(photos, out, capsys)
    written = state(out)
    assert {p.name for p in out.iterdir()} == {PAGE, TABLE}
    assert found(photos, out, capsys) == first
    after = state(photos)
    assert {path: after[path] for path in before} == before
    assert {path for path in after if path not in before and out not in path.parents} == {out}
    assert {path: s[1] for path, s in written.items()} == {p: s[1] for p, s in state(out).items()}


@pytest.mark.parametrize(
    ("name", "said"),
    [("absent", "there is no folder"), ("empty", "holds no photos"), ("broken", "can be read")],
)
def test_no_photos_end_in_one_line(tmp_path, capsys, name, said):
    for folder in ("empty", "broken"):
        (tmp_path / folder).mkdir()
    (tmp_path / "broken" / "a.jpg").touch()
    assert main([str(tmp_path / name), "--out", str(tmp_path / "out")]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert name in last and said in last and not (tmp_path / "out" / PAGE).exists()


def test_a_folder_that_another_program_reads_is_named(photos, tmp_path, capsys, monkeypatch):
    """The message named the folder of its embeddings."""
    monkeypatch.setattr("lib.search.embedding._LOOK", 0.1)
    found(photos, tmp_path / "out", capsys)
    (job,) = (tmp_path / OWN_PHOTOS / JOBS).iterdir()
    with only_writer(job, RuntimeError()):
        assert main([str(photos), "--out", str(tmp_path / "out")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "photos (PHOTOS): another process" in line and JOBS not in line


def test_a_report_that_can_not_be_written_ends_in_one_line(photos, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main([str(photos), "--out", str(tmp_path / "file")]) == 1
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1 and "file" in printed.err and not printed.out


def test_only_files_of_one_size_are_read_for_their_checksum(photos, tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr(duplicates, "checksum", lambda path: read.append(Path(path).name) or "x")
    find_copies(photos, ENGINE, tmp_path / "jobs")
    assert read == []
    shutil.copy(photos / "one.jpg", photos / "again.jpg")
    find_copies(photos, ENGINE, tmp_path / "jobs")
    assert sorted(read) == ["again.jpg", "one.jpg"]


def test_near_pairs_against_all_pairs(rng, monkeypatch):
    monkeypatch.setattr(duplicates, "_BLOCK", 7)
    descriptors = rng.normal(size=(30, 3)).astype(np.float32)
    descriptors /= np.linalg.norm(descriptors, axis=1, keepdims=True)
    expected = np.argwhere(descriptors @ descriptors.T >= duplicates.SCENE)
    expected = expected[expected[:, 0] != expected[:, 1]]
    assert len(expected) > 10  # of 30 photos
    assert sorted(near_pairs(descriptors).tolist()) == expected.tolist()
