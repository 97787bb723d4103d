"""The paths that users walk, with the documented commands and profiles, on small sets.

Only numbers are reduced, by parameters: of records, epochs, steps, dimensions, stages of ResNet50.
Two are long tests as well, which `.ci/run` includes: the profile of the real data, and a few photos
of one's own. `make rehearse` runs all.
"""

import contextlib
import os
import re
import shutil
import subprocess
import sys
import urllib.request

import keras
import nbformat
import numpy as np
import pytest
import yaml
from PIL import Image

from benchmarks.kaggle_size import RECORDS, plan_views, write_part
from lib.demo.data import DemoSettings, make_demo_data
from lib.demo.world import draw_views
from lib.files import project_root, read_json
from tests.conftest import end_server, free_port, wait_for
from tests.interrupted import interrupt
from tests.kaggle import Kaggle
from tools.report import OF_A_RUN

pytestmark = pytest.mark.rehearsal

ROOT = project_root()
SHORT = {
    "steps_per_epoch": 1,
    "stages": [["head", 1, 1e-3], ["last-block", 1, 1e-4], ["all", 1, 3e-5]],
    "settings": {"random_stages": [["all", 1, 4e-3]], "compared_epochs": 1},
    "ablation_triplets": 16,
    "ablation_steps": 1,
    "seeds": [1],
    "tuning_landmarks": 10,
    "learning_landmarks": 10,
    "known_landmarks": 50,
    "made_up_photos": 3000,
    "target_recall": 0.9,
    "memory_share": 0.5,
    "tuning_sample": 1000,
}


def copy_project(folder):
    """A copy of the project, with data folders of its own."""
    for name in ("lib", "tools", "notebooks", "profiles", "benchmarks"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("environment.yml", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    return folder


def environment(project):
    return os.environ | {"PYTHONPATH": str(project), "JUPYTER_PREFER_ENV_PATH": "1"}


def python(project, *command, folder=None, before=()):
    """Run a command in a folder, by default the project's; returns what it printed."""
    done = subprocess.run(
        [*map(str, before), sys.executable, *map(str, command)],
        cwd=folder or project,
        env=environment(project),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout + done.stderr


def papermill(project, notebook, profile, run, **parameters):
    """Run a notebook as the README says; returns all that its cells printed."""
    (project / run).mkdir(parents=True, exist_ok=True)
    options = [f"-y{yaml.safe_dump({name: value})}" for name, value in parameters.items()]
    python(
        project,
        *("-m", "papermill", f"notebooks/{notebook}.ipynb", f"{run}/{notebook}.ipynb"),
        *("-f", f"profiles/{profile}.yaml", "-p", "run_dir", run, *options),
        *("-k", "python3", "--cwd", "notebooks"),
    )
    return printed_by(project / run / f"{notebook}.ipynb")


def printed_by(notebook):
    cells = nbformat.read(notebook, as_version=4).cells
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    assert not [o for o in outputs if o.output_type == "error"]
    return "".join(output.get("text", "") for output in outputs)


def place_of(name, source):
    """The number of a notebook's cell once papermill has put one behind the parameters."""
    cells = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4).cells
    return 1 + next(i for i, cell in enumerate(cells) if cell.source.startswith(source))


def metrics_of(run):
    return read_json(run / "metrics.json")


def save_weights(path):
    keras.utils.set_random_seed(0)
    keras.applications.ResNet50(include_top=False, weights=None).save_weights(path)


@pytest.fixture(scope="module")
def kaggle(tmp_path_factory):
    """Shards of Kaggle's form in Dataset/, a test set in Test_set/, and weights of a ResNet50."""
    project = copy_project(tmp_path_factory.mktemp("kaggle"))
    make_demo_data(project, DemoSettings(seed=5, landmarks=200, unseen_landmarks=0))
    for folder in ("Dataset", "Test_set"):
        for path in (project / folder / "demo_world").iterdir():
            if path.suffix != ".json":
                path.rename(project / folder / path.name)
        shutil.rmtree(project / folder / "demo_world")
    save_weights(project / "resnet50.weights.h5")
    return project


@pytest.fixture(scope="module")
def real_data(kaggle):
    """The run of the whole profile, by the command of README, which is interrupted twice."""
    # Three more trainings would write three more checkpoints.
    profile = yaml.safe_load((kaggle / "profiles" / "gldv2.yaml").read_text())
    less = {"batch_size": 4, "measured_photos": 20, "most_queries": 10, "looked_at": 40}
    less |= {"image_sizes": [91, 128], "view_sizes": [[128, 181]]}
    short = SHORT | {"weights": "resnet50.weights.h5"} | less
    few = {"compared_epochs": 0, "embedding_size": 64, "last_stage": 3}
    profile |= short | {"settings": profile["settings"] | few}
    (kaggle / "profiles" / "short.yaml").write_text(yaml.safe_dump(profile))
    command = ["-m", "tools.pipeline", "profiles/short.yaml", "--run-dir", "runs/whole"]
    run = kaggle / "runs" / "whole"
    where = {"cwd": kaggle, "env": environment(kaggle)}
    # python -m tests.interrupted does so in all notebooks.
    moments = {
        "Ctrl-C": ("01_data_exploration", "import"),
        "machine": ("02_triplet_training", "import"),
    }
    for way, (name, source) in moments.items() if sys.platform.startswith("linux") else ():
        moment = run / f"{name}.ipynb", place_of(name, source)
        shown = interrupt([sys.executable, *command], *moment, 0.5, way, **where)
        assert way == "machine" or shown.splitlines()[-1].startswith("Stopped: "), shown[-3000:]
    shown = python(kaggle, *command)
    assert "report.html" in shown and "Traceback" not in shown
    assert "over TCP" not in shown  # as ipykernel warns of ports
    return run


@pytest.mark.long
def test_the_profile_of_the_real_data_runs_to_its_end(kaggle, real_data):
    """Notebook 05 stopped: held back pairs and training landmarks had the same labels."""
    printed = {name: printed_by(real_data / f"{name}.ipynb") for name in OF_A_RUN}
    assert "triplets of as many landmarks" in printed["02_triplet_training"]
    for name in OF_A_RUN:  # they are shared, with no word of the machine's folders
        assert str(kaggle) not in (real_data / f"{name}.ipynb").read_text(), name
    metrics = metrics_of(real_data)
    sections = {
        "data",
        "training",
        "ladder",
        "gem_ablation",
        "test_set",
        "unseen",
        "post_processing",
    }
    assert set(metrics) == sections | {"index", "own_photos", "same_place", "search_app"}
    assert metrics["data"]["records"] > 200
    assert metrics["test_set"]["ground_truth"] and metrics["training"]["epochs"] == 3
    tuned, flat = (metrics["index"][name]["recall@10"] for name in ("tuned", "flat"))
    assert 0.85 < tuned <= 1 and flat > 0.999  # of two that are as near, rounding chooses
    assert metrics["post_processing"]["as trained"]["gain"]["value"] == 0
    for name in ("trained", "frozen", "colour_histogram", "raw_pixels"):
        interval = metrics["unseen"]["map"][name]
        assert 0 < interval["low"] <= interval["value"] <= interval["high"] <= 1
        ranks = metrics["test_set"]["positive_ranks"][name]
        assert len(ranks) == 4 and ranks == sorted(ranks) and 1 <= ranks[0] <= ranks[-1] <= 99
    pages = [f"{name}.{kind}" for name in OF_A_RUN for kind in ("ipynb", "html")]
    for name in (*pages, "report.html", "model.keras", "gallery.index/manifest.json"):
        assert (real_data / name).is_file(), name
    assert (real_data / "history.csv").is_file()
    assert read_json(real_data / "environment.json")["profile"] == "short.yaml"
    assert "Missing in this run" not in (real_data / "report.html").read_text()
    assert not [*real_data.rglob(".part-*")]
    assert len([*(real_data / "figures").glob("*.png")]) >= 10


def test_a_test_set_without_a_ground_truth_is_searched_in(kaggle, real_data):
    """Nothing is said of positives then."""
    shutil.copytree(real_data, kaggle / "runs" / "unlabelled")
    (kaggle / "Test_set" / "ground_truth.csv").rename(kaggle / "ground_truth.csv")
    shown = papermill(kaggle, "05_faiss_evaluation", "short", "runs/unlabelled")
    (kaggle / "ground_truth.csv").rename(kaggle / "Test_set" / "ground_truth.csv")
    assert "There is no ground truth: the ranks of the positives are not known." in shown
    metrics = metrics_of(kaggle / "runs" / "unlabelled")
    assert metrics["test_set"] == {"photos": 100, "ground_truth": False}


def test_one_shard_of_the_real_data_is_fetched_and_goes_through(tmp_path, monkeypatch):
    """`make real`: a shard of the exact format and number of records, from a server."""
    project = copy_project(tmp_path / "project")
    write_part(tmp_path / "train00.tfrec", plan_views(RECORDS, np.random.default_rng(0))[:10_841])
    short = {"steps_per_epoch": 2, "ablation_steps": 2, "ablation_triplets": 64}
    profile = yaml.safe_load((project / "profiles" / "real_slice.yaml").read_text()) | short
    (project / "profiles" / "short.yaml").write_text(yaml.safe_dump(profile))
    kaggle = Kaggle({"train00.tfrec": (tmp_path / "train00.tfrec").read_bytes()})
    monkeypatch.setenv("KAGGLE_API_ENVIRONMENT", "LOCALHOST")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "")
    with kaggle.serving() as url:
        monkeypatch.setenv("http_proxy", url)  # what is asked of localhost comes to the server
        fetch = ["-m", "tools.download", "--dataset-dir", "Dataset/slice", "--shards", "0"]
        assert "10,841 records" in python(project, *fetch)
    only = ["--only", "01", "02", "03", "04", "05"]
    python(project, "-m", "tools.pipeline", "profiles/short.yaml", "--run-dir", "runs/x", *only)
    metrics = metrics_of(project / "runs" / "x")
    assert metrics["data"]["records"] == 10_841
    assert metrics["training"]["tower"]["weights"] in ("imagenet", "packaged")
    assert {"ladder", "gem_ablation", "unseen"} < set(metrics)


def draw_photos(folder, counts):
    for landmark, count in enumerate(counts):
        (folder / f"landmark {landmark}").mkdir(parents=True)
        for number, photo in enumerate(draw_views(11, landmark, list(range(count)))):
            Image.fromarray(photo).save(folder / f"landmark {landmark}" / f"{number}.jpg")


def open_app(project, log, *arguments, before=()):
    """Start the app as README says, until its page answers."""
    command = [*map(str, before), sys.executable, "-m", "lib.app.page", "--no-browser"]
    command += ["--port", str(free_port()), *map(str, arguments)]
    where = {"cwd": project, "env": environment(project), "start_new_session": True}
    with log.open("w") as output:
        server = subprocess.Popen(command, **where, stdout=output, stderr=output)
    try:
        wait_for(lambda: "http://" in log.read_text(), server, log)
        address = re.search(r"http://\S+", log.read_text())[0]
        wait_for(lambda: answers(address), server, log)
    finally:
        end_server(server)


def answers(address):
    with contextlib.suppress(OSError):
        return urllib.request.urlopen(address, timeout=60).status == 200


# A network to learn from.
EXPORT = """
from pathlib import Path
from lib.network.engine import packaged_engine
packaged_engine(Path("stronger"))
"""


STUDIES = ["06_post_processing", "07_index_at_scale"]


@pytest.mark.parametrize(
    ("counts", "weights", "studies"),
    [
        pytest.param([8] * 5, "", [], marks=pytest.mark.long),
        ([3, 4] * 5 + [4], "resnet50.weights.h5", STUDIES),
        ([2, 2], "imagenet", STUDIES),
    ],
    ids=["5 landmarks of 8", "11 of 3 or 4", "2 of 2"],
)
def test_a_few_photos_of_ones_own_go_through(tmp_path, counts, weights, studies):
    """A set of 5 x 8 photos stopped in notebook 02, one of 39 photos took 800 steps."""
    project = copy_project(tmp_path / "project")
    draw_photos(project / "photos", counts)
    if "." in weights:
        save_weights(project / weights)
    python(project, "-m", "tools.convert", "photos/", "Dataset/own", "--size", 256)
    python(project, "-c", EXPORT)
    short = SHORT | {"image_size": 64, "view_sizes": [[64, 96]], "weights": weights}
    short |= {"settings": SHORT["settings"] | {"teacher": "stronger/tower.engine"}}
    del short["steps_per_epoch"]  # the plan's
    names = ["02_triplet_training", "05_faiss_evaluation", *studies]
    names += ["08_your_own_photos"] if sum(counts) >= 10 else []
    names += ["09_same_place"]
    printed = {name: papermill(project, name, "own", "runs/own", **short) for name in names}
    assert "triplets to train on" in printed["02_triplet_training"]
    metrics = metrics_of(project / "runs" / "own")
    assert metrics["training"]["settings"]["teacher"] == "stronger/tower.engine"
    assert (project / "runs" / "own" / "teacher" / "embeddings.npy").is_file()
    assert metrics["unseen"]["landmarks"] >= 2
    assert not metrics.get("post_processing") and metrics["test_set"]["ground_truth"]
    assert metrics["same_place"]["photos"] == metrics["same_place"]["queries"] == sum(counts)
    if sum(counts) >= 10:  # all photos are measured, with each step and the trained network
        assert metrics["own_photos"]["measured"] == sum(counts)
        assert len(metrics["own_photos"]["map"]) == 6
    if len(counts) < 4:
        assert "none can be held back" in printed["02_triplet_training"]
    open_app(project, tmp_path / "log", "--run-dir", "runs/own", "--gallery", "photos/")


# Mounts the first argument on itself, to read only, and runs the others; for this process alone.
READ_ONLY = 'mount --bind "$0" "$0" && mount -o remount,bind,ro "$0" && exec "$@"'
UNSHARE = "unshare", "--map-root-user", "--mount", "sh", "-c", READ_ONLY
needs_unshare = pytest.mark.skipif(not shutil.which("unshare"), reason="needs unshare of Linux")


@needs_unshare
def test_own_photos_in_a_read_only_project(tmp_path, monkeypatch):
    """The three programs keep the network and the embeddings in the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    project, photos = copy_project(tmp_path / "project"), tmp_path / "photos"
    draw_photos(photos, [3] * 4)
    before = *UNSHARE, project
    query = photos / "landmark 0" / "0.jpg"
    shown = python(project, "-m", "tools.search", photos, query, before=before)
    assert "can't be written to" in shown and "landmark 0/1.jpg" in shown
    shown = python(project, "-m", "tools.duplicates", photos, before=before)
    assert "duplicates.html in a browser" in shown and "exporting" not in shown
    open_app(project, tmp_path / "log", "--photos", photos, before=before)
    assert not (project / "runs").exists()
    kept = tmp_path / "cache" / "image-retrieval-system"
    assert {path.name for path in kept.iterdir()} == {"own_photos", "duplicates"}


@needs_unshare
def test_a_read_only_project_an_own_gallery_and_a_run_elsewhere(tmp_path):
    """As on a server where data and code can only be read; started in another folder."""
    project = copy_project(tmp_path / "project")
    world = DemoSettings(seed=5, landmarks=60, unseen_landmarks=0)
    make_demo_data(project, world)
    save_weights(project / "resnet50.weights.h5")
    names = ["0", "1", "2", "07", "Größe", "北京", "a b's", "land/mark"]
    for landmark, name in enumerate(names):
        (tmp_path / "gallery" / name).mkdir(parents=True)
        for number, photo in enumerate(draw_views(12, landmark, list(range(3)))):
            Image.fromarray(photo).save(tmp_path / "gallery" / name / f"{number}.png")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    run = elsewhere / "run"
    run.mkdir()
    parameters = SHORT | {
        "demo": False,
        "run_dir": str(run),
        "gallery_dir": str(tmp_path / "gallery"),
        "backbone": "ResNet50",
        "weights": "resnet50.weights.h5",
        "image_size": 32,
        "batch_size": 4,
    }
    (elsewhere / "own.yaml").write_text(yaml.safe_dump(parameters))
    for name in ("02_triplet_training", "05_faiss_evaluation", "10_search_app"):
        python(
            project,
            *("-m", "papermill", project / "notebooks" / f"{name}.ipynb", run / f"{name}.ipynb"),
            *("-f", elsewhere / "own.yaml", "-k", "python3"),
            folder=elsewhere,
            before=[*UNSHARE, project],
        )
    metrics = metrics_of(run)
    assert metrics["training"]["epochs"] == 3
    assert metrics["unseen"]["landmarks"] == len(names) - 1
    shown = printed_by(run / "05_faiss_evaluation.ipynb")
    assert "left out: 3 photos that are not in a landmark's folder itself" in shown
    assert not [*project.rglob("features")] and not [*project.rglob("landmarks.parquet")]
