"""Runs get folders of their own, and keep the metrics of all their notebooks."""

import json
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime

import pytest

from lib.files import read_json
from lib.runs import new_run, open_run, record_metrics


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


def test_metrics_that_are_none_are_named(tmp_path):
    (tmp_path / "metrics.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"metrics\.json is no record of metrics: delete it"):
        record_metrics(tmp_path, data={})


def test_an_opened_run_has_nothing_half_written(tmp_path):
    """Figures of killed notebooks stayed half-written beside the whole ones."""
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / ".part-0a1b2c3d-05_worst.png").touch()
    (tmp_path / "figures" / "05_worst.png").touch()
    run = open_run(str(tmp_path))
    assert [path.name for path in run.rglob("*.png")] == ["05_worst.png"]
