"""The whole chain of notebooks through papermill, on a tiny setting, and its profiles."""

import json
import subprocess
import sys
import time

import papermill
import pytest
from nbclient.exceptions import DeadKernelError
from papermill.exceptions import PapermillExecutionError

from lib.files import project_root
from lib.runs import record_metrics
from tests.interrupted import interrupt
from tools import pipeline
from tools.pipeline import NOTEBOOKS, ProfileError, main, notebook_parameters, read_profile

# The chain takes longest: a group of its own, so that it runs beside all the others.
pytestmark = pytest.mark.xdist_group("notebooks")

ROOT = project_root()
PATHS = [ROOT / "notebooks" / f"{name}.ipynb" for name in NOTEBOOKS]

TINY = {
    "image_size": 32,
    "batch_size": 8,
    "steps_per_epoch": 3,
    "head_epochs": 1,
    "last_block_epochs": 1,
    "random_epochs": 2,
    "cached_variants": 1,
    "ladder_seeds": [],
    "validation_limit": 40,
    "ablation_triplets": 16,
    "ablation_steps": 2,
    "seeds": [1],
    "image_sizes": [32],
    "view_sizes": [[24, 32]],
    "tuning_landmarks": 20,
    "learning_landmarks": 20,
    "known_landmarks": 200,
    "made_up_photos": 3000,
    "target_recall": 0.9,
    "memory_share": 0.5,
    "tuning_sample": 1000,
}


def test_profiles_name_only_parameters_that_exist():
    known = set().union(*map(notebook_parameters, PATHS))
    profiles = sorted((ROOT / "profiles").glob("*.yaml"))
    assert profiles
    for path in profiles:
        read_profile(path, known)


def test_a_profile_with_a_wrong_name_is_refused(tmp_path, capsys):
    path = tmp_path / "mine.yaml"
    path.write_text("batch_sise: 8")
    with pytest.raises(ProfileError, match="no notebook has a parameter batch_sise"):
        read_profile(path, {"batch_size"})
    path.write_text("- 1")
    with pytest.raises(ProfileError, match="must map parameter names"):
        read_profile(path, {"batch_size"})
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
    with pytest.raises(ProfileError) as caught:
        read_profile(path, {"batch_size"})
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


@pytest.mark.long
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks for kernels in /proc")
def test_the_chain_is_interrupted_and_goes_on_and_keeps_its_results(tmp_path, capsys):
    profile = tmp_path / "tiny.yaml"
    profile.write_text(json.dumps(TINY | {"weights": "absent.weights.h5"}))  # goes on without
    arguments = [str(profile), "--run-dir", str(tmp_path / "run")]
    command = [sys.executable, "-m", "tools.pipeline", *arguments]
    # In training, and in the descriptors of views.
    interrupted = [("02_triplet_training", 21, "Ctrl-C"), ("04_faiss_evaluation", 25, "machine")]
    for name, cell, way in interrupted:
        interrupt(command, tmp_path / "run" / f"{name}.ipynb", cell, 0.5, way, cwd=ROOT)
    status = main(arguments)
    printed = capsys.readouterr()
    assert status == 0, printed.err[-3000:]
    folder = tmp_path / "run"
    metrics = json.loads((folder / "metrics.json").read_text())
    sections = {"data", "training", "gem_ablation", "test_set", "unseen", "post_processing"}
    sections |= {"index", "search_app"}
    assert set(metrics) == sections
    assert (
        0.85 < metrics["index"]["tuned"]["recall@10"] <= 1 == metrics["index"]["flat"]["recall@10"]
    )
    assert metrics["post_processing"]["as trained"]["gain"]["value"] == 0
    assert metrics["training"]["epochs"] == 2
    assert metrics["training"]["tower"]["weights"] == ""
    for name in ("trained", "untrained", "colour_histogram", "raw_pixels"):
        interval = metrics["unseen"]["map"][name]
        assert 0 < interval["low"] <= interval["value"] <= interval["high"] < 1
        ranks = metrics["test_set"]["positive_ranks"][name]
        assert len(ranks) == 4 and ranks == sorted(ranks) and 1 <= ranks[0] <= ranks[-1] <= 99
    assert metrics["unseen"]["map"]["colour_histogram"]["value"] < 0.15
    for name in (*(f"{n}.ipynb" for n in NOTEBOOKS), *(f"{n}.html" for n in NOTEBOOKS)):
        assert (folder / name).is_file(), name
    for name in ("report.html", "model.keras", "gallery.index/manifest.json", "history.csv"):
        assert (folder / name).is_file(), name
    assert json.loads((folder / "environment.json").read_text())["profile"] == "tiny.yaml"
    assert "Missing in this run" not in (folder / "report.html").read_text()
    assert not [*folder.rglob(".part-*")]
    assert len(list((folder / "figures").glob("*.png"))) >= 10
    assert "report.html" in printed.out and "Traceback" not in printed.err


needs_no_data = pytest.mark.skipif(
    any((ROOT / "Dataset").glob("*.tfrec")), reason="Dataset/ holds the real shards"
)


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
    parameters = TINY | {"weights": "absent.weights.h5", "weights_required": True}
    with pytest.raises(PapermillExecutionError) as caught:
        papermill.execute_notebook(
            str(PATHS[1]),
            str(tmp_path / "out.ipynb"),
            {
                name: parameters[name]
                for name in parameters
                if name in notebook_parameters(PATHS[1])
            },
            kernel_name="python3",
            cwd=str(PATHS[1].parent),
            progress_bar=False,
        )
    assert caught.value.ename == "SystemExit"
    assert "Stopped: absent.weights.h5 holds no weights" in caught.value.evalue
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
