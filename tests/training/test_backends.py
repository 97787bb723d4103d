"""The same training on Keras' TensorFlow, JAX and PyTorch backends.

This file is also the program that the test starts, once for each backend, in a process of its own;
the latter two find no TensorFlow there. All begin with one saved tower and take the same batches,
so that they differ by rounding alone, which few steps leave small: losses agree to 0.1 %, and
embeddings in the end to 0.01, where two at random lie 1.4 apart. That of convolutions also goes on
from a checkpoint in the middle, and ends as it did without.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from lib.data.catalogue import build_catalogue, split_landmarks
from lib.data.dataset import DatasetHandler, DataSettings
from lib.network.tower import TowerSettings, build_tower, embed, load_tower, save_tower
from lib.training.checkpoint import CHECKPOINT
from lib.training.stages import Stage, TrainingSettings, train
from tests.network.test_hub import save_preset
from tests.training.test_stages import Cache, tiny_tower, watching

pytestmark = pytest.mark.long

SETTINGS = TrainingSettings(
    stages=(
        Stage("head", epochs=2, steps_per_epoch=4, learning_rate=1e-2),
        Stage("all", epochs=2, steps_per_epoch=4, learning_rate=1e-3),
    ),
    batch_norm="live",
    ema_momentum=0.5,
    pool=20,
    memory=40,
    teacher_share=0.3,
)


@pytest.fixture(scope="module", params=["convolutions", "transformer"])
def started(request, shards, tmp_path_factory):
    """The process of each backend, and its folder; all run at once."""
    folder = tmp_path_factory.mktemp("backends")
    tower = tiny_tower() if request.param == "convolutions" else tiny_transformer(folder)
    save_tower(tower, folder / "start.keras")
    backends = ["tensorflow", "jax"] + ["torch"] * (importlib.util.find_spec("torch") is not None)
    processes = {
        backend: subprocess.Popen(
            [sys.executable, __file__, request.param, folder, backend, *shards],
            env=os.environ | {"KERAS_BACKEND": backend, "PYTHONPATH": os.pathsep.join(sys.path)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for backend in backends
    }
    yield processes, folder
    for process in processes.values():
        process.kill()


def tiny_transformer(folder: Path):
    if not importlib.util.find_spec("keras_hub"):
        pytest.skip("needs keras-hub: make hub")
    backbone = save_preset(folder / "preset", "dinov2_with_registers")
    return build_tower(TowerSettings(32, 8, "average", backbone=backbone, weights="hub"))


def results(started, backend: str) -> tuple[pd.DataFrame, np.ndarray, np.ndarray]:
    processes, folder = started
    _, errors = processes[backend].communicate(timeout=600)
    assert processes[backend].returncode == 0, errors[-3000:]
    history = pd.read_csv(folder / backend / "history.csv", index_col="epoch")
    before, after = (np.load(folder / f"{backend}-{when}.npy") for when in ("before", "after"))
    return history, before, after


@pytest.fixture(scope="module")
def reference(started):
    return results(started, "tensorflow")


@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_training_is_the_same_as_with_tensorflow(started, reference, backend):
    if backend not in started[0]:
        pytest.skip("needs PyTorch: make backends")
    history, before, after = results(started, backend)
    expected_history, _, expected_after = reference
    assert history["stage"].tolist() == expected_history["stage"].tolist() == [1, 1, 2, 2]
    np.testing.assert_allclose(history["loss"], expected_history["loss"], rtol=1e-3)
    pd.testing.assert_frame_equal(history, expected_history, rtol=1e-2)
    assert np.linalg.norm(after - before, axis=1).mean() > 0.1  # it has moved
    assert np.linalg.norm(after - expected_after, axis=1).max() < 0.01


def main(kind: str, folder: str, backend: str, *shards: str) -> None:
    start, run = Path(folder) / "start.keras", Path(folder) / backend
    catalogue = build_catalogue([Path(shard) for shard in shards])
    part = split_landmarks(catalogue, {"train": 0.7, "validation": 0.3}, seed=0)
    tower = load_tower(start)
    data = DataSettings(image_size=tower.input_shape[1], batch_size=8, seed=1)
    handler = DatasetHandler(catalogue, data, part == "train")
    held_back = DatasetHandler(catalogue, data, part == "validation")
    validation = held_back.photos(held_back.validation_triplets(20))
    photos = handler.photos(np.arange(len(catalogue.pictures)))
    maps = tower.get_layer("trunk").predict(photos, verbose=0).astype(np.float16)
    np.save(f"{run}-before.npy", embed(tower, photos))
    resumed = Path(f"{run}-resumed")
    teacher = np.random.default_rng(0).normal(size=(len(photos), 8)).astype(np.float32)

    def watch(epoch):
        if epoch == 3 and kind == "convolutions":  # in the middle of the second stage
            shutil.copytree(run, resumed)

    cache, watched = Cache(handler, maps), watching(handler, watch)
    train(tower, watched, validation, SETTINGS, run, cache, teacher)
    np.save(f"{run}-after.npy", embed(tower, photos))
    if not resumed.is_dir():
        return
    other = load_tower(start)
    train(other, handler, validation, SETTINGS, resumed, teacher=teacher)
    of_runs = [np.load(folder / CHECKPOINT) for folder in (run, resumed)]
    for name in of_runs[0].files[1:]:
        np.testing.assert_allclose(of_runs[0][name], of_runs[1][name], atol=1e-6, err_msg=name)


if __name__ == "__main__":
    main(*sys.argv[1:])
