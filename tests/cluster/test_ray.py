"""Several processes do what one does, and one that is killed makes no difference.

This file is also the program that the tests start: one of two processes that train together without
Ray, and a process that embeds on a cluster, to be killed.
"""

import contextlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

import lib.cluster.ray
from lib.cluster.emulated import ClusterError, busy_processes, emulated_cluster
from lib.cluster.ray import PARTS, ClusterSettings, embed, embedded_parts
from lib.data.catalogue import build_catalogue, split_landmarks
from lib.data.dataset import DatasetHandler, DataSettings
from lib.data.photos import PhotoError
from lib.network.engine import export_engine, load_engine
from lib.network.losses import TripletLoss
from lib.network.mining import BatchHard
from lib.network.openvino import fast_precision
from lib.network.tower import load_tower, save_tower
from lib.search.embedding import (
    EmbeddingJobError,
    PhotoSource,
    embed_job,
    photos_below,
    photos_in_shards,
)
from lib.search.local_features import LocalFeatures
from lib.training.checkpoint import CHECKPOINT
from lib.training.log import HISTORY
from lib.training.stages import Stage, TrainingSettings, train
from tests.conftest import textured, wait_for

needs_ray = pytest.mark.skipif(
    not importlib.util.find_spec("ray"), reason="needs Ray: make cluster"
)
pytestmark = [pytest.mark.long, needs_ray]

# Everything that could differ: triplets mined from a pool and negatives from the whole batch, a
# memory, live statistics, an average. tests/test_data_parallel.py shows that the shares of a P x K
# batch together are the batch.
SETTINGS = TrainingSettings(
    stages=(
        Stage("head", epochs=1, steps_per_epoch=4, learning_rate=1e-2),
        Stage("all", epochs=3, steps_per_epoch=4, learning_rate=1e-3),
    ),
    loss=TripletLoss(mining=BatchHard()),
    batch_norm="live",
    ema_momentum=0.5,
    pool=20,
    memory=40,
)
JAX = {
    "KERAS_BACKEND": "jax",
    "JAX_PLATFORMS": "cpu",
    "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
    "TQDM_DISABLE": "1",
}
# Sums in another order: some units in the last place of float32 for each of 16 steps, of values
# around 1; of the memory's embeddings more, where little is left to be brought to length 1. All in
# all, weights move by a hundredth. (With Adam, a weight whose gradient is 0 but for rounding, such
# as a bias before a live batch normalization, would move by up to its learning rate; this tower has
# none.)
ROUNDING = 1e-5


def task_of(shards) -> tuple[DatasetHandler, np.ndarray, TrainingSettings]:
    catalogue = build_catalogue([Path(shard) for shard in shards])
    part = split_landmarks(catalogue, {"train": 0.7, "validation": 0.3}, seed=0)
    data = DataSettings(image_size=16, batch_size=8, seed=1)
    held_back = DatasetHandler(catalogue, data, part == "validation")
    validation = held_back.photos(held_back.validation_triplets(20))
    return DatasetHandler(catalogue, data, part == "train"), validation, SETTINGS


def program(*arguments: object, **variables: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, __file__, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | variables,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def processes_with(*words: str) -> list[int]:
    """Ids of the processes whose command line has all the words."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            line = path.read_bytes().decode(errors="replace")
            if all(word in line for word in words):
                found.append(int(path.parent.name))
    return found


@pytest.fixture(scope="module")
def cluster():
    assert "RAY_TMPDIR" not in os.environ
    with emulated_cluster(nodes=2, cpus=1) as cluster:
        yield cluster


# --------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------


def arrays_of(run: Path) -> dict[str, np.ndarray]:
    with np.load(run / CHECKPOINT) as arrays:
        return {name: arrays[name] for name in arrays.files if name != "facts"}


def assert_same_training(run: Path, expected: Path, atol: float) -> None:
    found, arrays = arrays_of(run), arrays_of(expected)
    assert found.keys() == arrays.keys()
    for name, value in arrays.items():
        np.testing.assert_allclose(found[name], value, rtol=0, atol=atol, err_msg=name)
    tables = [pd.read_csv(folder / HISTORY) for folder in (run, expected)]
    pd.testing.assert_frame_equal(*tables, rtol=1e-4)


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    from tests.training.test_stages import tiny_tower

    path = tmp_path_factory.mktemp("start") / "tower.keras"
    save_tower(tiny_tower(), path)
    return path


@pytest.fixture(scope="module")
def one_process(start, shards) -> Path:
    """The run of a single process on the same backend."""
    run = start.parent / "one"
    process = program("train", start, run, 0, 1, 0, *shards, **JAX)
    assert process.wait(300) == 0, process.stderr.read()[-3000:]
    before = load_tower(start).get_weights()
    moved = [np.abs(a - b).max() for a, b in zip(arrays_of(run).values(), before, strict=False)]
    assert max(moved) > 100 * ROUNDING
    return run


def test_two_processes_train_as_one(start, shards, one_process):
    port = 20_000 + os.getpid() % 10_000
    runs = [start.parent / f"two-{rank}" for rank in (0, 1)]
    processes = [
        program("train", start, run, rank, 2, port, *shards, **JAX) for rank, run in enumerate(runs)
    ]
    for process in processes:
        assert process.wait(400) == 0, process.stderr.read()[-3000:]
    assert_same_training(runs[1], runs[0], atol=0)
    assert_same_training(runs[0], one_process, atol=ROUNDING)


def test_a_worker_that_is_killed_makes_no_difference(cluster, start, shards, one_process, tmp_path):
    from lib.cluster.ray import train as train_on_cluster

    handler, validation, training = task_of(shards)
    run, killed = tmp_path / "run", []

    def kill_one() -> None:
        history = run / HISTORY
        wait_for(lambda: history.is_file() and len(history.read_text().splitlines()) >= 3)
        workers = busy_processes("RayTrainWorker")
        killed.extend(workers[-1:])
        for pid in killed:
            os.kill(pid, signal.SIGKILL)

    thread = threading.Thread(target=kill_one)
    thread.start()
    tower = load_tower(start)
    settings = ClusterSettings(workers=2, restarts=1)
    history = train_on_cluster(tower, handler, validation, training, run, cluster=settings)
    thread.join()
    assert len(killed) == 1 and len(history) == 4
    # Workers compare their weights at the end, and fail if they differ.
    assert_same_training(run, one_process, atol=ROUNDING)
    best = arrays_of(run)
    for i, weight in enumerate(tower.get_weights()):
        np.testing.assert_array_equal(weight, best[f"best_{i}"])
    assert not list(run.glob(".part-*"))


def test_a_batch_that_can_not_be_divided_is_refused_at_once(start, shards, tmp_path):
    from lib.cluster.ray import train as train_on_cluster

    handler, *others = task_of(shards)
    pairs = replace(handler.settings, pictures_per_landmark=2)
    for number, data in ((8, handler.settings), (16, pairs)):
        task = (load_tower(start), DatasetHandler(handler.catalogue, data), *others, tmp_path, None)
        with pytest.raises(ClusterError, match=f"{number} can't be divided .* among 3 workers"):
            train_on_cluster(*task, ClusterSettings(workers=3))


# --------------------------------------------------------------------------------------------------
# Embedding
# --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def engine(start) -> Path:
    path = start.parent / "tower.engine"
    export_engine(load_tower(start), path)
    return path


def slow_source(shards, begun: Path | None = None) -> PhotoSource:
    """The pictures of shards; each takes its time, and one can't be read.

    A file is made when the first is read.
    """
    source = photos_in_shards(build_catalogue([Path(shard) for shard in shards]))

    def read(number: int, image_size: int, squash: bool) -> np.ndarray:
        if begun:
            begun.touch()
        time.sleep(0.2)
        if number == 7:
            raise PhotoError("picture 7 can't be read")
        return source.read(number, image_size, squash)

    return PhotoSource(source.names, read, source.digest)


@pytest.fixture(scope="module")
def expected(engine, shards, start):
    return embed_job(load_engine(engine), slow_source(shards), start.parent / "alone", 8)


def assert_each_once(found, expected, folder: Path) -> None:
    assert found.names == expected.names and found.skipped == expected.skipped
    np.testing.assert_array_equal(found.embeddings, expected.embeddings)
    parts = list(embedded_parts(folder))
    assert sorted(n for part in parts for n in part.names) == sorted(expected.names)
    assert [m for part in parts for m in part.skipped] == expected.skipped


def when(condition, act) -> threading.Thread:
    """Act once a condition holds, in a thread."""

    def watch() -> None:
        wait_for(condition)
        act()

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


def test_local_features_are_found_as_on_one_machine(cluster, tmp_path):
    (folder := tmp_path / "photos").mkdir()
    for number in range(5):
        Image.fromarray(textured(number)).save(folder / f"{number}.png")
    (folder / "broken.png").write_bytes(b"no picture")
    alone = embed_job(LocalFeatures(), photos_below(folder), tmp_path / "alone")
    assert_each_once(
        embed(None, photos_below(folder), tmp_path / "job", 2), alone, tmp_path / "job"
    )


def test_a_killed_actor_makes_no_difference(cluster, engine, shards, expected, tmp_path):
    begun, killed = tmp_path / "begun", []

    def kill_one() -> None:
        time.sleep(1)
        killed.extend(busy_processes("MapWorker")[:1])
        os.kill(killed[0], signal.SIGKILL)

    thread = when(begun.exists, kill_one)
    found = embed(engine, slow_source(shards, begun), tmp_path, 8)
    thread.join()
    assert killed
    assert_each_once(found, expected, tmp_path)
    with pytest.raises(EmbeddingJobError, match="another job"):
        embed(engine, slow_source(shards), tmp_path, 16)


def test_a_killed_driver_is_followed_by_one_that_goes_on(
    cluster, engine, shards, expected, tmp_path
):
    parts = tmp_path / PARTS
    driver = program("embed", cluster.address, engine, tmp_path, *shards)
    when(lambda: list(parts.glob("*.parquet")), driver.kill).join()
    assert driver.wait() == -signal.SIGKILL
    time.sleep(3)  # its tasks end with it
    before = {path.name for path in parts.iterdir()}
    (parts / "torn.parquet").write_bytes(b"PAR1")  # as by a writer that was killed
    found = embed(engine, slow_source(shards), tmp_path, 8)
    assert before and before < {path.name for path in parts.iterdir()}
    assert_each_once(found, expected, tmp_path)
    # Rows that were written twice count once.
    (parts / "again.parquet").write_bytes((parts / min(before)).read_bytes())
    assert_each_once(found, expected, tmp_path)
    assert_each_once(embed(engine, slow_source(shards), tmp_path, 8), expected, tmp_path)


def test_a_machine_that_computes_in_another_precision_is_refused(
    cluster, engine, shards, tmp_path, monkeypatch
):
    """Each worker chose by its own processor: rows of two precisions came into one set."""
    load = lib.cluster.ray.load_engine

    def on_another_processor(*arguments, **options):  # that of the driver alone
        return replace(load(*arguments, **options), name="openvino float16")  # as on a phone's

    here = fast_precision()
    monkeypatch.setattr(lib.cluster.ray, "load_engine", on_another_processor)
    with pytest.raises(ClusterError, match=rf"in {here} on .*, not in float16.*precision='{here}"):
        embed(engine, slow_source(shards), tmp_path, 8)
    assert not list((tmp_path / PARTS).glob("*.parquet"))
    with pytest.raises(EmbeddingJobError, match=r"another job .*engine"):
        monkeypatch.undo()
        embed(engine, slow_source(shards), tmp_path, 8, precision="float32")
    if here == "float32":  # else this processor can do both
        with pytest.raises(ClusterError, match="not in bfloat16"):
            embed(engine, slow_source(shards), tmp_path, 8, precision="bfloat16")


def test_a_killed_node_makes_no_difference(cluster, engine, shards, expected, tmp_path):
    """It comes last, for the cluster has one node less from then on."""
    begun, nodes = tmp_path / "begun", list(cluster.worker_nodes)
    assert len(nodes) == 2

    def kill_one() -> None:
        wait_for(lambda: len(busy_processes("MapWorker")) == 2)  # one on each node
        cluster.remove_node(nodes[0], allow_graceful=False)

    thread = when(begun.exists, kill_one)
    found = embed(engine, slow_source(shards, begun), tmp_path, 8)
    thread.join()
    assert list(cluster.worker_nodes) == nodes[1:]
    assert_each_once(found, expected, tmp_path)


# --------------------------------------------------------------------------------------------------
# What an emulated cluster leaves
# --------------------------------------------------------------------------------------------------


def listening(pids: list[int]) -> set[str]:
    """The addresses that processes listen on, in hexadecimal as the system has them."""
    inodes = set()
    for pid in pids:
        for link in Path(f"/proc/{pid}/fd").glob("*"):
            with contextlib.suppress(OSError):
                inodes |= set(re.findall(r"socket:\[(\d+)\]", os.readlink(link)))
    rows = [
        line.split()
        for table in ("tcp", "tcp6")
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]
    ]
    return {row[1].split(":")[0] for row in rows if row[3] == "0A" and row[9] in inodes}


@pytest.mark.parametrize("failures", [1, 2])
def test_a_cluster_that_does_not_start_is_started_once_more(monkeypatch, failures):
    """What the failed start has left is ended; the message says what Ray's own logs say."""
    clusters, left = [], []

    class Fails:
        address, nodes, is_down = "", 0, False

        def __init__(self):
            clusters.append(self)

        def add_node(self, **settings):
            if len(clusters) <= failures:
                logs = Path(os.environ["RAY_TMPDIR"]) / "ray" / "session_latest" / "logs"
                logs.mkdir(parents=True, exist_ok=True)
                (logs / "raylet.1.err").write_text("it began\nno port was free\n")
                left.append(subprocess.Popen(["sleep", "60"]))
                raise Exception("The current node timed out during startup.")
            self.nodes += 1

        def shutdown(self):
            self.is_down = True

    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.cluster_utils.Cluster", Fails)
    monkeypatch.setattr(
        lib.cluster.emulated, "connected_to", lambda *_, **__: contextlib.nullcontext()
    )
    fails = (
        pytest.raises(ClusterError, match=r"(?s)timed out.*raylet\.1\.err: no port was free")
        if failures == 2
        else contextlib.nullcontext()
    )
    with fails, emulated_cluster(nodes=2):
        assert [cluster.nodes for cluster in clusters] == [0, 3]
    assert [cluster.is_down for cluster in clusters] == [True, True]
    assert [process.wait(10) for process in left] == [-signal.SIGKILL] * failures


def test_an_emulated_cluster_is_closed_and_leaves_nothing():
    outside = [
        Path.home() / ".ray",
        Path.home() / "ray_results",
        Path(tempfile.gettempdir()) / "ray",
    ]
    script = """
import os, sys, time
from lib.cluster.emulated import emulated_cluster
with emulated_cluster(nodes=1):
    print(os.environ["RAY_TMPDIR"], flush=True)
    sys.stdin.read()
"""
    there_before = [path.exists() for path in outside]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    home = process.stdout.readline().strip()
    pids = [pid for pid in processes_with(home) if pid != os.getpid()]
    assert len(pids) >= 4
    loopback = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}
    addresses = listening([*pids, process.pid])
    assert addresses and addresses <= loopback
    process.communicate("")
    assert process.returncode == 0
    wait_for(lambda: not processes_with(home), seconds=30)
    assert not Path(home).exists()
    assert [path.exists() for path in outside] == there_before


# --------------------------------------------------------------------------------------------------
# The programs
# --------------------------------------------------------------------------------------------------


def train_as(start: str, run: str, rank: str, count: str, port: str, *shards: str) -> None:
    """One of the processes that train together."""
    import jax

    from lib.data_parallel import together

    alone = int(count) == 1
    if not alone:
        jax.distributed.initialize(f"127.0.0.1:{port}", int(count), int(rank))
    with contextlib.nullcontext() if alone else together(seed=1):
        train(load_tower(Path(start)), *task_of(shards), Path(run))


def embed_on(address: str, engine: str, folder: str, *shards: str) -> None:
    """A driver, which is killed in the middle."""
    settings = ClusterSettings(address)
    print(json.dumps(embed(Path(engine), slow_source(shards), Path(folder), 8, settings).names))


if __name__ == "__main__":
    {"train": train_as, "embed": embed_on}[sys.argv[1]](*sys.argv[2:])
