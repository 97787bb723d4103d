"""Files are whole or absent; runs get folders of their own."""

import json
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime

import pytest

from lib.files import (
    new_run,
    project_root,
    read_json,
    record_metrics,
    replacing,
    write_json,
)


def test_project_root_is_found_from_below():
    root = project_root()
    assert (root / "environment.yml").is_file()
    assert project_root(root / "notebooks") == root
    with pytest.raises(FileNotFoundError, match=r"no environment\.yml"):
        project_root(root.parent)


def test_a_failed_write_leaves_the_old_file_and_no_rubbish(tmp_path):
    path = tmp_path / "folder" / "file.txt"
    with replacing(path) as part:
        part.write_text("old")
    with pytest.raises(RuntimeError), replacing(path) as part:
        part.write_text("half of the n")
        raise RuntimeError
    assert path.read_text() == "old"
    assert [p.name for p in path.parent.iterdir()] == ["file.txt"]


def test_the_temporary_file_ends_like_the_final_one(tmp_path):
    with replacing(tmp_path / "checkpoint.weights.h5") as part:
        assert part.name.endswith("checkpoint.weights.h5")
        assert part.parent == tmp_path  # a rename is only atomic within one file system


def test_json_comes_back_and_a_damaged_file_is_named(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"λ": [1, 2.5, None]})
    assert read_json(path) == {"λ": [1, 2.5, None]}
    path.write_text('{"cut o')
    with pytest.raises(ValueError, match=r"a\.json is not valid JSON"):
        read_json(path)


def test_metrics_of_one_notebook_leave_those_of_the_others(tmp_path):
    record_metrics(tmp_path, data={"records": 3})
    record_metrics(tmp_path, training={"loss": 0.5}, data={"records": 4})
    content = json.loads((tmp_path / "metrics.json").read_text())
    assert content == {"data": {"records": 4}, "training": {"loss": 0.5}}


def test_no_metrics_are_lost_if_notebooks_record_at_once(tmp_path):
    def record(number):
        record_metrics(tmp_path, **{f"notebook_{number}": {"value": number}})

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(record, range(40)))
    assert len(read_json(tmp_path / "metrics.json")) == 40


def test_runs_of_the_same_second_are_different_and_latest_is_the_newest(tmp_path):
    def now():
        return datetime(2026, 5, 4, 3, 2, 1)

    first, second = new_run(tmp_path, now), new_run(tmp_path, now)
    assert (first.name, second.name) == ("2026-05-04_03-02-01", "2026-05-04_03-02-01-2")
    assert (tmp_path / "latest").resolve() == second.resolve()
    assert not (tmp_path / "latest").readlink().is_absolute()  # the folder may be moved
