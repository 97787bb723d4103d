"""A training that is killed at any moment ends with the weights of one that never was.

This file is also the program that the test starts: it imports TensorFlow once, without running
anything of it, and forks a child for each attempt. Two trainings run side by side; each is killed
six times, in every sixth of its course once, and goes on from what the killed child left on disk.
In between the disk is full at times, which ends in an error and not in a damaged file.

The moments are counted in *ticks*, training steps and changes of files, to be spread alike over
computing and writing; each comes up to 20 milliseconds after its tick.
"""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from tqdm import tqdm

from lib.data.catalogue import build_catalogue, split_landmarks
from lib.data.dataset import DatasetHandler, DataSettings
from lib.network.losses import TripletLoss
from lib.network.mining import DistanceWeighted
from lib.training.checkpoint import Checkpoint, TrainingError
from lib.training.log import TrainingLog
from lib.training.stages import Stage, TrainingSettings, train
from tests.training.test_stages import Cache, tiny_tower

pytestmark = pytest.mark.long

KILLS = 6  # of each of the two trainings
SEEDS = (1, 2)
# Before some of the kills, an attempt on a full disk: how many bytes a file may have. The first
# checkpoint does not fit; the epoch's log; the checkpoint or the model, of some 50 and 80 kB.
FULL_DISKS = {0: 1_000, 2: 5_000, 4: 30_000}

# Everything that has a state: optimizer, moving average, random draw, memory, early stop. The
# negatives follow from the weights that an epoch begins with.
SETTINGS = TrainingSettings(
    stages=tuple(Stage(part, 4, 2, 1e-2) for part in ("head", "last-block", "all")),
    loss=TripletLoss(mining=DistanceWeighted()),
    ema_momentum=0.8,
    batch_norm="live",
    patience=2,
    pool=10,
    memory=20,
)


def test_twelve_kills_and_six_full_disks_leave_no_trace(shards, tmp_path):
    environment = os.environ | {"KERAS_BACKEND": "tensorflow", "OPENBLAS_NUM_THREADS": "1"}
    process = subprocess.run(
        [sys.executable, __file__, tmp_path, *shards],
        env=environment | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    straight = tmp_path / "straight"
    expected, history = contents_of(straight)
    assert {row["stage"] for row in history} == {1, 2, 3}
    interrupted = []  # the stage of each kill
    for seed in SEEDS:
        run = tmp_path / f"killed-{seed}"
        interrupted += json.loads(run.with_suffix(".json").read_text())
        found, resumed = contents_of(run)
        assert resumed == history
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_array_equal(found[name], value, err_msg=name)
        assert (run / "history.csv").read_bytes() == (straight / "history.csv").read_bytes()
        names = {path.relative_to(run) for path in run.rglob("*")}
        assert names == {path.relative_to(straight) for path in straight.rglob("*")}
    assert len(interrupted) == KILLS * len(SEEDS) and set(interrupted) == {1, 2, 3}


def contents_of(run: Path) -> tuple[dict[str, np.ndarray], list[dict]]:
    """All arrays of a run, its checkpoint's and in the end its tower's; and its history."""
    with np.load(run / "checkpoint.npz") as arrays:
        history = json.loads(str(arrays["facts"]))["history"]
        values = {name: arrays[name] for name in arrays.files if name != "facts"}
    if (tower := run.with_name(f"{run.name}-tower.npz")).is_file():
        with np.load(tower) as arrays:
            values |= {f"tower {name}": arrays[name] for name in arrays.files}
    return values, history


# --------------------------------------------------------------------------------------------------
# The program
# --------------------------------------------------------------------------------------------------


class Ticks:
    """Counts training steps and changes of files in a folder, and kills the process at one tick."""

    def __init__(self, run: Path, last: float, delay: float):
        self.run, self.last, self.delay = str(run), last, delay
        self.count = 0
        self.of_checkpoints = []  # how many there were when each checkpoint was complete
        sys.addaudithook(self._hear)

    def tick(self) -> None:
        self.count += 1
        if self.count == self.last:
            threading.Timer(self.delay, os.kill, (os.getpid(), signal.SIGKILL)).start()

    def _hear(self, event: str, arguments: tuple) -> None:
        writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if (writes or event == "os.rename") and str(arguments[0]).startswith(self.run):
            self.tick()
            if event == "os.rename" and str(arguments[1]).endswith("checkpoint.npz"):
                self.of_checkpoints.append(self.count)


def attempt(run: Path, handler, validation, last: float, delay: float) -> None:
    """Train, or go on, in this process; killed at a tick, or to the end."""
    tf.config.experimental.enable_op_determinism()
    tf.config.threading.set_intra_op_parallelism_threads(1)
    ticks = Ticks(run, last, delay)
    of_log = TrainingLog.on_train_batch_end

    def on_train_batch_end(log, batch, logs=None):
        of_log(log, batch, logs)
        ticks.tick()

    TrainingLog.on_train_batch_end = on_train_batch_end
    tower = tiny_tower()
    load_checkpoint = Checkpoint.load

    def load(path, tower, identity):
        checkpoint = load_checkpoint(path, tower, identity)
        # From here on the weights are the checkpoint's, not the tower's.
        tower.set_weights([np.zeros_like(weight) for weight in tower.get_weights()])
        return checkpoint

    Checkpoint.load = load
    maps = np.random.default_rng(0).random((len(handler.catalogue.pictures), 2, 2, 8), np.float32)
    cache = Cache(handler, maps.astype(np.float16))  # where they come from does not matter here
    train(tower, handler, validation, SETTINGS, run, cache)
    if ticks.count >= last:
        time.sleep(60)  # until the kill comes
    np.savez(f"{run}-tower.npz", *tower.get_weights())
    run.with_name("ticks.json").write_text(json.dumps([*ticks.of_checkpoints, ticks.count]))


def attempt_on_full_disk(run: Path, handler, validation, largest: int) -> None:
    """Go on where no file may grow beyond so many bytes; it ends with an error that says so."""
    epochs = len(history_of(run))
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
    try:
        attempt(run, handler, validation, float("inf"), 0)
    except TrainingError as error:
        assert "can't be written (File too large): make room on the disk" in str(error), error
        assert str(error).endswith(f"it goes on after epoch {epochs}"), error
    else:
        raise AssertionError("no error")


def forked(work, *arguments) -> int:
    """Run a function in a child; returns the child's process id."""
    if child := os.fork():
        return child
    # The usual lock is one of all processes, and would stay with a child that is killed.
    tqdm.set_lock(threading.RLock())
    try:
        work(*arguments)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def was_killed(child: int) -> bool:
    """Wait for a child; returns whether it was killed, rather than coming to its end."""
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return True
    assert status == 0, "a child failed"
    return False


def kill_again_and_again(run: Path, handler, validation, ticks: list[int], seed: int) -> None:
    rng = random.Random(seed)
    stages = []
    for i in range(KILLS):
        if i in FULL_DISKS:
            before = checkpoint_of(run)
            arguments = (run, handler, validation, FULL_DISKS[i])
            assert not was_killed(forked(attempt_on_full_disk, *arguments))
            assert checkpoint_of(run) == before and not list(run.rglob(".part-*"))
        # The ticks of the epochs that the checkpoint holds do not come again.
        known = ticks[len(history_of(run))] if checkpoint_of(run) else 0
        moment = max(int(ticks[-1] * (i + rng.random()) / KILLS) - known, 1)
        delay = rng.choice([0, rng.uniform(0, 0.02)])
        assert was_killed(forked(attempt, run, handler, validation, moment, delay))
        stages.append(history_of(run)[-1]["stage"] if history_of(run) else 1)
    assert not was_killed(forked(attempt, run, handler, validation, float("inf"), 0))
    run.with_suffix(".json").write_text(json.dumps(stages))


def checkpoint_of(run: Path) -> bytes:
    path = run / "checkpoint.npz"
    return path.read_bytes() if path.is_file() else b""


def history_of(run: Path) -> list[dict]:
    return contents_of(run)[1] if checkpoint_of(run) else []


def main(folder: str, *shards: str) -> None:
    """Train once without and twice with kills, in folders of ``folder``."""
    folder = Path(folder)
    catalogue = build_catalogue([Path(shard) for shard in shards])
    part = split_landmarks(catalogue, {"train": 0.7, "validation": 0.3}, seed=0)
    data = DataSettings(image_size=16, batch_size=4, seed=1)
    handler = DatasetHandler(catalogue, data, part == "train")
    held_back = DatasetHandler(catalogue, data, part == "validation")
    validation = held_back.photos(held_back.validation_triplets(20))
    of_all = (handler, validation)
    assert not was_killed(forked(attempt, folder / "straight", *of_all, float("inf"), 0))
    ticks = json.loads((folder / "ticks.json").read_text())
    runs = [(folder / f"killed-{seed}", *of_all, ticks, seed) for seed in SEEDS]
    children = [forked(kill_again_and_again, *arguments) for arguments in runs]
    assert not any([was_killed(child) for child in children])


if __name__ == "__main__":
    main(*sys.argv[1:])
