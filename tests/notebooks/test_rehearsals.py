"""The paths that users walk, with the documented commands and profiles, on small sets.

Only the numbers of records, epochs and steps are reduced, by parameters.
"""

import json
import os
import shutil
import subprocess
import sys

import keras
import nbformat
import pytest
from PIL import Image

from lib.demo.data import DemoSettings, make_demo_data
from lib.demo.world import draw_views
from lib.files import project_root

# Beside all others, as each test takes minutes; one after the other, as each takes all cores.
pytestmark = [pytest.mark.long, pytest.mark.xdist_group("rehearsals")]

ROOT = project_root()
SHORT = {
    "steps_per_epoch": 1,
    "head_epochs": 1,
    "last_block_epochs": 1,
    "all_epochs": 1,
    "random_epochs": 1,
    "ablation_triplets": 16,
    "ablation_steps": 1,
    "seeds": [1],
}


def copy_project(folder):
    """A copy of the project, with data folders of its own."""
    for name in ("lib", "tools", "notebooks", "profiles", "benchmarks"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("environment.yml", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    return folder


def python(project, *command):
    """Run a command as in the project's folder; returns what it printed."""
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=project,
        env=os.environ | {"PYTHONPATH": str(project), "JUPYTER_PREFER_ENV_PATH": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout + done.stderr


def papermill(project, notebook, profile, run, **parameters):
    """Run a notebook as the README says; returns all that its cells printed."""
    (project / run).mkdir(parents=True, exist_ok=True)
    options = [f"-y{json.dumps({name: value})}" for name, value in parameters.items()]
    python(
        project,
        *("-m", "papermill", f"notebooks/{notebook}.ipynb", f"{run}/{notebook}.ipynb"),
        *("-f", f"profiles/{profile}.yaml", "-p", "run_dir", run, *options),
        *("-k", "python3", "--cwd", "notebooks"),
    )
    cells = nbformat.read(project / run / f"{notebook}.ipynb", as_version=4).cells
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    assert not [o for o in outputs if o.output_type == "error"]
    return "".join(output.get("text", "") for output in outputs)


@pytest.fixture(scope="module")
def kaggle(tmp_path_factory):
    """Shards of Kaggle's form in Dataset/, a test set in Test_set/, and weights of a ResNet50."""
    project = copy_project(tmp_path_factory.mktemp("kaggle"))
    make_demo_data(project, DemoSettings(seed=5, landmarks=300, unseen_landmarks=0))
    for folder in ("Dataset", "Test_set"):
        for path in (project / folder / "demo_world").iterdir():
            if path.suffix != ".json":
                path.rename(project / folder / path.name)
        shutil.rmtree(project / folder / "demo_world")
    keras.utils.set_random_seed(0)
    network = keras.applications.ResNet50(include_top=False, weights=None)
    network.save_weights(project / "resnet50.weights.h5")
    return project


def test_the_profile_of_the_real_data_runs_to_its_end(kaggle):
    """Notebook 04 stopped: held back pairs and training landmarks had the same labels."""
    short = SHORT | {"weights": "resnet50.weights.h5", "batch_size": 4, "made_up_photos": 5000}
    names = ["01_data_exploration", "02_triplet_training", "03_gem_ablation"]
    names += ["04_faiss_evaluation", "05_index_at_scale"]
    printed = {name: papermill(kaggle, name, "gldv2", "runs/x", **short) for name in names}
    assert "16 shards" in printed["01_data_exploration"]
    assert "triplets of as many landmarks" in printed["02_triplet_training"]
    metrics = json.loads((kaggle / "runs" / "x" / "metrics.json").read_text())
    assert metrics["test_set"]["ground_truth"] and metrics["post_processing"]
    assert metrics["training"]["epochs"] == 3
    # Without a ground truth, the same test set is searched in, and nothing is said of positives.
    (kaggle / "Test_set" / "ground_truth.csv").unlink()
    shown = papermill(kaggle, "04_faiss_evaluation", "gldv2", "runs/x", **short)
    assert "There is no ground truth: the ranks of the positives are not known." in shown
    metrics = json.loads((kaggle / "runs" / "x" / "metrics.json").read_text())
    assert metrics["test_set"] == {"photos": 100, "ground_truth": False}


def draw_photos(folder, counts):
    for landmark, count in enumerate(counts):
        (folder / f"landmark {landmark}").mkdir(parents=True)
        for number, photo in enumerate(draw_views(11, landmark, list(range(count)))):
            Image.fromarray(photo).save(folder / f"landmark {landmark}" / f"{number}.jpg")


@pytest.mark.parametrize(
    ("counts", "post_processing"),
    [([8] * 5, False), ([3, 4] * 5 + [4], False), ([2, 2], False)],
    ids=["5 landmarks of 8", "11 of 3 or 4", "2 of 2"],
)
def test_a_few_photos_of_ones_own_go_through(tmp_path, counts, post_processing):
    """A set of 5 x 8 photos stopped in notebook 02, one of 39 photos took 800 steps."""
    project = copy_project(tmp_path / "project")
    draw_photos(project / "photos", counts)
    python(project, "-m", "tools.convert", "photos/", "Dataset/own", "--size", 256)
    short = SHORT | {"image_size": 64, "view_sizes": [[64, 96]]}
    del short["steps_per_epoch"]  # the plan's
    names = ["02_triplet_training", "04_faiss_evaluation"]
    printed = {name: papermill(project, name, "own", "runs/own", **short) for name in names}
    assert "triplets to train on" in printed["02_triplet_training"]
    metrics = json.loads((project / "runs" / "own" / "metrics.json").read_text())
    assert metrics["unseen"]["landmarks"] >= 2
    assert bool(metrics["post_processing"]) == post_processing
    assert metrics["test_set"]["ground_truth"]
    if len(counts) < 4:
        assert "none can be held back" in printed["02_triplet_training"]
