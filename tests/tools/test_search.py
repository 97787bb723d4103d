"""The command line's search: the app's ranking, and lines for whatever goes wrong."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from lib.app.answer import Question, Search
from lib.app.gallery import JOBS, open_gallery
from lib.app.upload import read_upload
from lib.data.photos import read_photo
from lib.files import only_writer, project_root
from lib.network.engine import ENGINE, OWN_PHOTOS, export_engine, load_engine
from lib.network.tower import TowerSettings, build_tower
from lib.search.embedding import PROGRESS
from lib.search.same_place import VERDICTS
from tests.conftest import one_block, wait_for
from tools import search as command


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A small network for photos in their own shape, from random weights."""
    path = tmp_path_factory.mktemp("engine") / "tower.engine"
    settings = TowerSettings(image_size=32, last_stage=3, embedding_size=0, weights="")
    with one_block():
        tower = build_tower(settings)
    export_engine(tower, path, views=(32, 64))
    return path


@pytest.fixture
def photos(tmp_path, exported, monkeypatch):
    """A folder of 24 photos, one of them in a folder; the packaged network is a small one."""
    monkeypatch.setattr(command, "packaged_engine", lambda run: load_engine(exported, "float32"))
    monkeypatch.setattr(command, "project_root", lambda: tmp_path)
    folder = tmp_path / "photos"
    (folder / "in").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(24):
        patches = rng.integers(0, 256, (3, 4, 3), np.uint8)
        photo = Image.fromarray(patches).resize((160, 120), Image.Resampling.BICUBIC)
        photo.save(folder / ("in/23.png" if number == 23 else f"{number:02}.png"))
    return folder


def results(capsys, *arguments, status=0):
    assert command.main([*map(str, arguments), "--json"]) == status
    return json.loads(capsys.readouterr().out)


def test_every_door_ranks_alike(photos, tmp_path, exported, capsys):
    query = tmp_path / "query.jpg"
    Image.open(photos / "05.png").resize((100, 75)).save(query, quality=60)
    (answer,) = results(capsys, photos, query, "--k", 24)
    assert answer["query"] == str(query) and answer["results"][0]["name"] == "05.png"
    engine = load_engine(exported, "float32")
    search = Search(engine, open_gallery(engine, photos, tmp_path / "runs/own_photos" / JOBS))
    by_hand = search.answer(search.read(query), Question(24))
    upload = read_upload(query.read_bytes(), search.image_size, engine.squashes)
    in_the_app = search.answer(upload.pixels, Question(24))
    assert by_hand.names == in_the_app.names == [found["name"] for found in answer["results"]]


def test_a_photo_of_the_folder_does_not_find_itself(photos, tmp_path, capsys, monkeypatch):
    (tmp_path / "link").symlink_to(photos, target_is_directory=True)
    monkeypatch.chdir(photos)
    for query in (photos / "in" / "23.png", "in/23.png", tmp_path / "link" / "in" / "23.png"):
        (answer,) = results(capsys, photos, query, "--k", 30)
        assert len(answer["results"]) == 23
        assert "in/23.png" not in {found["name"] for found in answer["results"]}
    copied = tmp_path / "copy.png"
    shutil.copy(photos / "in" / "23.png", copied)
    (answer,) = results(capsys, photos, copied, "--k", 1)
    assert answer["results"][0]["name"] == "in/23.png"
    assert answer["results"][0]["similarity"] == pytest.approx(1, abs=1e-3)


def test_a_link_in_the_folder_does_not_find_itself(photos, capsys):
    (photos / "link.png").symlink_to("in/23.png")
    for query, other in (("link.png", "in/23.png"), ("in/23.png", "link.png")):
        (answer,) = results(capsys, photos, photos / query, "--k", 30)
        found = [found["name"] for found in answer["results"]]
        assert query not in found and found[0] == other and len(found) == 24


def test_a_folder_that_another_program_reads_is_named(photos, tmp_path, capsys, monkeypatch):
    """The message named the folder of its embeddings."""
    monkeypatch.setattr("lib.search.embedding._LOOK", 0.1)
    results(capsys, photos, photos / "00.png")
    job = min((tmp_path / OWN_PHOTOS / JOBS).iterdir())
    with only_writer(job, RuntimeError()):
        assert command.main([str(photos), str(photos / "00.png")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "photos (PHOTOS): another process reads these photos: wait" in line
    assert JOBS not in line


@pytest.mark.long
def test_an_interrupted_search_goes_on_where_it_stopped(tmp_path, exported):
    run, photos, n = tmp_path / "run", tmp_path / "photos", 96
    for folder in (run, photos):
        folder.mkdir()
    shutil.copy(exported, run / ENGINE)
    # Takes some time to read, so that the signal comes before the end.
    colours = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
    Image.fromarray(colours).resize((1600, 1200)).save(tmp_path / "query.png")
    for number in range(n):
        os.link(tmp_path / "query.png", photos / f"{number:03}.png")
    line = [sys.executable, "-m", "tools.search", photos, tmp_path / "query.png", "--run-dir", run]
    where = {"cwd": project_root(), "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    # What a script starts in the background ignores Ctrl-C, and so does what that starts.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = subprocess.Popen(line, **where, text=True)
    finally:
        signal.signal(signal.SIGINT, before)
    wait_for(lambda: any(p.stat().st_size for p in run.glob(f"{JOBS}/*/{PROGRESS}")), process)
    process.send_signal(signal.SIGINT)
    printed, said = process.communicate(timeout=60)
    assert process.returncode == 130 and not printed
    *bar, last = said.strip().splitlines()
    assert last.startswith("interrupted: run this again")
    assert all(shown.startswith("embedding: ") for shown in bar)
    (progress,) = run.glob(f"{JOBS}/*/{PROGRESS}")
    kept = sum(len(json.loads(batch)["names"]) for batch in progress.read_bytes().splitlines())
    again = subprocess.run(line, **where, text=True)
    assert again.returncode == 0 and again.stdout.splitlines()[1].split()[1] == "1.000"
    assert 0 < kept < n and int(re.search(rf"(\d+)/{n} ", again.stderr)[1]) == kept


def test_a_box_searches_with_a_part(photos, tmp_path, capsys):
    wall = Image.new("RGB", (320, 240), "grey")
    wall.paste(Image.open(photos / "07.png"), (100, 60))
    wall.save(tmp_path / "wall.png")
    (answer,) = results(capsys, photos, tmp_path / "wall.png", "--box", "100,60,260,180")
    best = answer["results"][0]
    assert best.items() >= {"name": "07.png", "similarity": 1.0}.items()
    assert best["verdict"] in VERDICTS and 0 < best["probability"] < 1
    part = read_photo(tmp_path / "wall.png", 500, squash=False, crop=(100, 60, 260, 180))
    np.testing.assert_array_equal(part, np.asarray(Image.open(photos / "07.png")))


def test_a_query_that_is_no_photo_is_told_and_the_others_answered(photos, tmp_path, capsys):
    (tmp_path / "no.jpg").write_text("no photo")
    found = results(capsys, photos, tmp_path / "no.jpg", photos / "00.png", status=1)
    assert (
        "no.jpg is not a readable picture" in found[0]["error"] and len(found[1]["results"]) == 10
    )
    assert command.main([str(photos), str(photos / "00.png"), str(tmp_path / "none.jpg")]) == 1
    printed = capsys.readouterr()
    assert "none.jpg" in printed.err and printed.out.splitlines()[1].split()[0] == "1"
    (answer,) = results(capsys, photos, photos / "00.png", "--box", "900,0,950,5", status=1)
    assert answer["error"].endswith(
        "00.png: no pixel of its 160 x 120 pixels lies in the box 900,0,950,5"
    )


@pytest.mark.parametrize(
    ("arguments", "status", "named"),
    [
        (["none", "a.jpg"], 1, "none (PHOTOS)"),
        (["@", "@00.png", "--k", "0"], 2, "--k 0"),
        (["@", "@00.png", "@01.png", "--box", "0,0,1,1"], 2, "--box"),
        (["@in/empty", "@00.png"], 1, "no photos in this folder"),
        (["@", "@00.png", "--run-dir", "none"], 1, "no trained model in none"),
    ],
)
def test_what_a_person_can_do_wrong(photos, capsys, arguments, status, named):
    (photos / "in" / "empty").mkdir()
    given = [a.replace("@", f"{photos}/") for a in arguments]
    assert command.main(given) == status
    (line,) = capsys.readouterr().err.splitlines()
    assert named in line


@pytest.mark.parametrize("box", ["1,2,3", "a,b,c,d", "5,0,5,9", "nan,0,1,1"])
def test_a_box_that_is_none(photos, capsys, box):
    with pytest.raises(SystemExit) as stopped:
        command.main([str(photos), str(photos / "00.png"), "--box", box])
    assert stopped.value.code == 2 and "--box" in capsys.readouterr().err
