"""What ends a run of all notebooks, in one line, and its profiles.

Whole runs are in tests/notebooks/test_rehearsals.py.
"""

import os
import subprocess
import sys
import time

import papermill
import pytest
from nbclient.exceptions import DeadKernelError
from papermill.exceptions import PapermillExecutionError

from lib.files import project_root
from lib.programs import UsageError
from lib.runs import record_metrics
from tools import pipeline
from tools.pipeline import NOTEBOOKS, main, notebook_parameters, read_profile

ROOT = project_root()
PATHS = [ROOT / "notebooks" / f"{name}.ipynb" for name in NOTEBOOKS]


def test_profiles_name_only_parameters_that_exist():
    known = dict(pair for path in PATHS for pair in notebook_parameters(path).items())
    profiles = sorted((ROOT / "profiles").glob("*.yaml"))
    assert profiles
    for path in profiles:
        read_profile(path, known)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("settings: {margim: 0.2}", "settings: there is no margim, but .*margin"),
        ("settings: {margin: 3e-1}", "margin must be of type float, such as 1.0e-3"),
        ("settings: 3", "settings must be of type dict"),
        ("stages: [[head, 5]]", r'stages holds .* not like \["head", 5, 0.003\]'),
        ("stages: [head]", "stages holds 'head'"),
        ("stages: [[head, 5.0, 0.1]]", "stages: epochs must be of type int"),
        ("settings: {random_stages: [[all]]}", "mine.yaml: settings: random_stages holds"),
    ],
)
def test_what_is_within_a_parameter_of_a_profile_is_checked_as_well(tmp_path, content, reason):
    path = tmp_path / "mine.yaml"
    path.write_text(content)
    with pytest.raises(UsageError, match=reason):
        read_profile(path, {"settings": "dict", "stages": "list"})


def test_a_profile_with_a_wrong_name_is_refused(tmp_path, capsys):
    path = tmp_path / "mine.yaml"
    path.write_text("batch_sise: 8")
    with pytest.raises(UsageError, match="there is no batch_sise, but batch_size"):
        read_profile(path, {"batch_size": "int"})
    path.write_text("- 1")
    with pytest.raises(UsageError, match="must map parameter names"):
        read_profile(path, {"batch_size": "int"})
    assert main([str(tmp_path / "absent.yaml")]) == 2
    assert "can't be read" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content",
    [
        b"name: \xff\xfe",  # not UTF-8: it was a UnicodeDecodeError
        b"day: 2026-13-45",  # a date that is none: it was datetime's ValueError
        b"a: [1",
        b"[" * 3000,  # too deep: it was a RecursionError
        b"1: 2\nbatch_sise: 3\ntrue: 4",  # names that are no texts: they could not be sorted
        b"batch_size: 1\n" + bytes(2**20),  # took half a minute
        b"batch_size: &a [1, 1]\nk: [*a, *a]",  # a few such lines are more than memory holds
        b"x" * 20_000 + b": 1",  # the whole name was in the line
    ],
    ids=["encoding", "date", "syntax", "depth", "names", "size", "references", "name"],
)
def test_a_profile_of_any_wrong_kind_is_refused_in_one_line(tmp_path, capsys, content):
    path = tmp_path / "mine.yaml"
    path.write_bytes(content)
    with pytest.raises(UsageError) as caught:
        read_profile(path, {"batch_size": "int"})
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000
    assert main([str(path)]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith(str(path)) and printed.count("\n") == 1


def test_a_run_folder_that_cannot_be_made_ends_in_one_line(tmp_path, capsys):
    """It was a traceback of FileExistsError."""
    (tmp_path / "file").write_text("")
    assert main(["--run-dir", str(tmp_path / "file")]) == 1
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1
    assert str(tmp_path / "file") in printed.err and not printed.out


@pytest.mark.parametrize(
    ("error", "reason"),
    [(DeadKernelError("died"), "memory is short"), (KeyboardInterrupt(), "interrupted")],
)
def test_a_run_that_is_ended_from_outside_has_a_report(
    tmp_path, capsys, monkeypatch, error, reason
):
    """Both were tracebacks."""

    def stop(*_):
        raise error

    monkeypatch.setattr(pipeline, "run_notebooks", stop)
    assert main(["--run-dir", str(tmp_path / "run")]) == 1
    printed = capsys.readouterr()
    assert f"{reason}\n" in printed.err and printed.err.count("\n") == 2
    assert (tmp_path / "run" / "report.html").is_file() and "report.html" in printed.out


def test_some_notebooks_alone_can_be_run(tmp_path, capsys, monkeypatch):
    """The demo leaves some out; its report does not call them missing."""
    ran = []
    monkeypatch.setattr(pipeline, "run_notebooks", lambda *given: ran.extend(given[-1]))
    assert main(["--run-dir", str(tmp_path / "run"), "--only", "00", "05"]) == 0
    assert ran == ["00_in_one_page", "05_faiss_evaluation"]
    page = (tmp_path / "run" / "report.html").read_text()
    assert "figures of notebook 05" in page and "of notebook 04" not in page
    profile = tmp_path / "own.yaml"
    profile.write_text("demo: false")
    ran.clear()
    assert main([str(profile), "--run-dir", str(tmp_path / "run")]) == 0
    assert ran == pipeline.OF_A_RUN  # the first page has no data of one's own
    with pytest.raises(SystemExit):
        main(["--only", "99"])
    assert "argument --only" in capsys.readouterr().err


def test_a_run_folder_is_of_one_pipeline_at_a_time(tmp_path, capsys, monkeypatch):
    """Two of them overwrote each other's notebooks and metrics."""
    arguments, ran = ["--run-dir", str(tmp_path / "run")], []

    def run_notebooks(run, *_):
        ran.append(run)
        monkeypatch.setattr(pipeline, "run_notebooks", pytest.fail)
        record_metrics(run, data={})  # the notebooks take the folder's own lock meanwhile
        before = (run / "environment.json").stat().st_mtime_ns
        assert main(arguments) == 1
        assert (run / "environment.json").stat().st_mtime_ns == before

    for times in (1, 2):  # and it is free again afterwards
        monkeypatch.setattr(pipeline, "run_notebooks", run_notebooks)
        assert main(arguments) == 0
        assert len(ran) == times
        printed = capsys.readouterr().err
        assert printed.count("\n") == 1 and "--run-dir" in printed
        assert f"another pipeline writes into {tmp_path / 'run'}" in printed


needs_no_data = pytest.mark.skipif(
    any((ROOT / "Dataset").glob("*.tfrec")), reason="Dataset/ holds the real shards"
)


@pytest.mark.skipif(os.name != "posix", reason="elsewhere kernels use ports")
def test_kernels_are_reached_by_files_unless_their_path_is_too_long():
    usable = {"transport": "ipc", "ip": "/tmp/some"}
    assert pipeline.reached_by_files("/tmp/some") == usable
    assert pipeline.reached_by_files("/tmp/" + 90 * "ü") == {}


@pytest.mark.long
@needs_no_data
def test_gldv2_without_data_stops_in_seconds_with_the_instruction(tmp_path):
    start = time.monotonic()
    command = [sys.executable, "-m", "papermill", PATHS[1], tmp_path / "out.ipynb"]
    command += ["-f", ROOT / "profiles" / "gldv2.yaml", "-p", "run_dir", tmp_path / "run"]
    command += ["-k", "python3", "--cwd", ROOT / "notebooks"]
    process = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert process.returncode == 1
    assert "no train*.tfrec in Dataset" in process.stderr
    assert "kaggle.com/datasets/mattbast/google-landmarks-2020-tfrecords" in process.stderr
    assert time.monotonic() - start < 60


@pytest.mark.long
def test_weights_that_are_required_but_absent_stop_the_training_with_one_line(tmp_path):
    parameters = {"weights": "absent.weights.h5", "settings": {"weights_required": True}}
    with pytest.raises(PapermillExecutionError) as caught:
        papermill.execute_notebook(
            str(PATHS[2]),
            str(tmp_path / "out.ipynb"),
            parameters,
            kernel_name="python3",
            cwd=str(PATHS[2].parent),
            progress_bar=False,
        )
    assert caught.value.ename == "SystemExit"
    assert "Stopped: there is no weights file absent.weights.h5" in caught.value.evalue
    assert "\n" not in caught.value.evalue


@pytest.mark.long
@needs_no_data
def test_a_failed_run_says_why_in_one_line_and_keeps_the_page(tmp_path, capsys):
    status = main([str(ROOT / "profiles" / "gldv2.yaml"), "--run-dir", str(tmp_path / "run")])
    printed = capsys.readouterr()
    assert status == 1
    assert "Stopped: DatasetNotFoundError: no train*.tfrec in Dataset" in printed.err
    assert "Traceback" not in printed.err
    assert (tmp_path / "run" / "01_data_exploration.html").is_file()
