"""The benchmark at the size of the Kaggle set, on a small one."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import simplejpeg

from benchmarks.kaggle_size import RECORDS, make_catalogue, plan_views, split, write_set
from lib.data.records import find_shards, image_hash, read_triplets
from lib.files import project_root

ROOT = project_root()


def test_the_plan_has_kaggles_size_and_form(rng):
    views = plan_views(RECORDS, rng)
    landmark = views[..., 0]
    assert len(np.unique(landmark[:, 0])) == 81_313
    assert len(np.unique(views[:, 0], axis=0)) == RECORDS
    assert (landmark[:, 1] == landmark[:, 0]).all()
    assert (landmark[:, 2] != landmark[:, 0]).all()
    assert (views[:, 2, 1] < 2).all()
    degenerate = (views[:, 0] == views[:, 1]).all(axis=1).mean()
    assert 0.1 < degenerate < 0.4


def test_a_small_set_goes_through_catalogue_and_split(tmp_path, rng):
    write_set(tmp_path, 161)
    shards = find_shards(tmp_path)
    triplets = [list(read_triplets(shard)) for shard in shards]
    assert [len(of) for of in triplets] == [10] * 15 + [11]
    pictures = [picture for of in triplets for triplet in of for picture in triplet.pictures]
    assert {simplejpeg.decode_jpeg_header(p)[:2] for p in pictures} == {(128, 128)}
    views = plan_views(161, np.random.default_rng(0))
    different = len(np.unique(views.reshape(-1, 2), axis=0))
    assert len({image_hash(picture) for picture in pictures}) == different
    made = make_catalogue(tmp_path, {})
    assert (made["pictures"], made["problems"]) == (different, 0)
    held = split(tmp_path, {"validation_share": 0.05})
    assert 0 < held["validation_pictures"] < different // 5
    assert held["bytes"] == 2 * different


def start(folder, *options):
    command = [sys.executable, "-m", "benchmarks.kaggle_size", "--folder", folder, *options]
    return subprocess.Popen(
        list(map(str, command)),
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


@pytest.mark.long
def test_the_program_measures_every_stage_and_leaves_nothing(tmp_path):
    few = "--records", 600, "--cached", 100, "--triplets", 8, "--last-stage", 3
    program = start(tmp_path, *few)
    printed = program.communicate()[0]
    assert program.returncode == 0, printed[-3000:]
    result = json.loads(re.search(r"^{.*}$", printed, re.MULTILINE)[0])
    stages = [value for value in result.values() if isinstance(value, dict)]
    assert len(stages) == 8 and all(stage["bytes"] > 0 for stage in stages)
    assert all(stage["memory_gb"] >= stage["own_memory_gb"] > 0 for stage in stages[1:])
    trained = result["a short epoch of each stage"]
    assert (trained["batch"], trained["steps"]) == (8, 1)
    assert min(trained[f"{part}_seconds"] for part in ("head", "last-block", "all")) > 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.long
@pytest.mark.parametrize(
    ("moment", "number"),
    [("train03.tfrec", signal.SIGINT), ("landmarks.parquet", signal.SIGTERM)],
    ids=["SIGINT", "SIGTERM"],
)
def test_an_interrupted_program_deletes_the_set(tmp_path, moment, number):
    program = start(tmp_path, "--records", 2400)  # so many that processes draw and read them
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob(f"*/{moment}")) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(program.pid, number)  # as a terminal does
    printed = program.communicate(timeout=60)[0]
    assert program.returncode != 0
    assert list(tmp_path.iterdir()) == [], printed[-3000:]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--records", "5"), "--records must be at least 100"),
        (("--cached", "5"), "--cached must be at least 100"),
        (("--triplets", "0"), "--triplets must be at least 1"),
        (("--folder", "nowhere"), "--folder nowhere is no folder"),
        (("--records", "1000000000000"), "choose another --folder or fewer --records"),
    ],
)
def test_wrong_options_are_named(options, message, monkeypatch, capsys):
    from benchmarks.kaggle_size import main

    monkeypatch.setattr(sys, "argv", ["kaggle_size", *options])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
