"""Training and embedding past one machine, on Ray: the same settings, and the address of a cluster.

    cluster = ClusterSettings(address="auto", workers=8, gpus=1)
    history = train(tower, handler, validation, settings, Path("/shared/run"), cluster=cluster)
    found = embed(Path("/shared/run/model.keras"), source, Path("/shared/photos"), cluster=cluster)

``lib.training.stages.train`` runs in every worker as it is; Keras' JAX backend sums their gradients
(:mod:`lib.data_parallel`), Ray Train starts them all anew when one dies, and they go on from the
last epoch. ``lib.search.embedding`` embeds in every worker; Ray Data hands out the pictures, and
again those of a worker that has died. Folders, shards and photos must have the same paths on all
machines. On one machine Ray gains nothing: ``python -m benchmarks.cluster`` says what it takes.

Ray and JAX come with the extra ``cluster`` (``make cluster``); they are imported when needed.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lib.network.engine import Engine, keras_engine, load_engine
from lib.search.embedding import Embedded, PhotoSource, claimed, describe_job, embed_pictures

if TYPE_CHECKING:  # who only embeds does without them
    import keras
    import pandas as pd

    from lib.data.dataset import DatasetHandler
    from lib.training.features import FeatureCache
    from lib.training.stages import TrainingSettings

PARTS = "parts"  # of a job: a folder of Parquet files

_OBJECT_STORE = 150_000_000  # bytes of shared memory for each node of an emulated cluster
_MOST_BATCHES = 64  # in one Parquet file


class ClusterError(RuntimeError):
    """The cluster can't do it; the message says why and what to change."""


@dataclass(frozen=True)
class ClusterSettings:
    """Where to work, and with how many.

    Attributes:
        address: of a Ray cluster: "auto" for the one that this machine belongs to, or "host:port".
            "": the cluster this process is connected to already, or else one of this machine alone,
            which ends with the call.
        workers: processes that train or embed together.
        gpus: of each worker; 0: they compute on processors.
        restarts: how often a training may lose workers and start them anew.
        share_of_processor: cores that Ray counts for a worker. An exported tower computes on so
            many threads.

    Raises:
        ValueError: no workers.
    """

    address: str = ""
    workers: int = 2
    gpus: int = 0
    restarts: int = 3
    share_of_processor: float = 1

    def __post_init__(self):
        if self.workers < 1:
            raise ValueError(f"workers must be at least 1, got {self.workers}")

    @property
    def resources(self) -> dict[str, float]:
        """Of one worker, as Ray has them."""
        gpus = {"GPU": self.gpus} if self.gpus else {}
        return {"CPU": self.share_of_processor} | gpus

    @property
    def threads(self) -> int:
        """That one worker computes on, without a GPU."""
        return max(1, round(self.share_of_processor))


# --------------------------------------------------------------------------------------------------
# Ray
# --------------------------------------------------------------------------------------------------


def import_ray():
    """Ray, kept from reporting its use over the network.

    Raises:
        ClusterError: it is not installed.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # What a worker without a GPU sees of GPUs is none of Ray's business; else it warns.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    try:
        import ray
        import ray.data
        import ray.train
    except ModuleNotFoundError as error:
        raise ClusterError(
            f"{error.name} is not installed: it comes with the extra cluster, by "
            "`make cluster` or pip install '.[cluster]'"
        ) from None
    return ray


@contextlib.contextmanager
def emulated_cluster(nodes: int = 2, cpus: int = 1) -> Iterator[Any]:
    """A Ray cluster of several nodes, all on this machine and closed to others, to try things out.

    It listens on 127.0.0.1 alone, has no dashboard, and keeps its files in a temporary folder that
    is gone afterwards. This process is connected to it in the block.

    Args:
        nodes: besides the head, which does no work.
        cpus: that each node says it has.

    Yields:
        Ray's ``Cluster``: ``remove_node(node, allow_graceful=False)`` kills one of its
        ``worker_nodes``.

    Raises:
        ClusterError: Ray is not installed, or this process is connected to a cluster already.
    """
    # Sockets lie in there, whose paths must be short; and no other setting of Ray's reaches all of
    # its processes.
    home = tempfile.mkdtemp(prefix="ray-", dir="/tmp" if Path("/tmp").is_dir() else None)
    os.mkdir(Path(home) / "ray")
    local = {
        "RAY_TMPDIR": home,
        # By this Ray takes 127.0.0.1 for the address of this machine, as it does on a Mac.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_AUTH_TOKEN_PATH": str(Path(home) / "token"),
        "RAY_worker_niceness": "0",  # by default Ray lets every other process go first
        # By default a node of few cores ends a worker that waits, and starts one for the next task.
        "RAY_num_workers_soft_limit": "8",
        # Ray tells at length of each process that has died. Who emulates a cluster has killed it.
        "RAY_DEDUP_LOGS_SKIP_REGEX": ".",
        # A worker that is killed while it trains leaves the others waiting for it.
        "JAX_DISTRIBUTED_SHUTDOWN_TIMEOUT_S": "2",
    }
    before = {name: os.environ.get(name) for name in local}
    os.environ.update(local)
    cluster = None
    try:
        ray = import_ray()
        from ray._private import ray_constants
        from ray.cluster_utils import Cluster

        if ray.is_initialized():
            raise ClusterError("this process is connected to a Ray cluster: call ray.shutdown()")
        enabled = ray_constants.ENABLE_RAY_CLUSTER
        ray_constants.ENABLE_RAY_CLUSTER = False  # should Ray have been imported before
        try:
            node = {"node_ip_address": "127.0.0.1", "object_store_memory": _OBJECT_STORE}
            cluster = Cluster()
            cluster.add_node(num_cpus=0, include_dashboard=False, **node)
            for _ in range(nodes):
                cluster.add_node(num_cpus=cpus, **node)
            with _connected_to(ray, cluster.address, _node_ip_address="127.0.0.1"):
                yield cluster
        finally:
            if cluster is not None:
                cluster.shutdown()
            ray_constants.ENABLE_RAY_CLUSTER = enabled
    finally:
        shutil.rmtree(home, ignore_errors=True)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def busy_processes(kind: str) -> list[int]:
    """Processes of the emulated cluster that do a kind of work, to see what happens if one dies.

    Args:
        kind: as Ray calls the actor: "RayTrainWorker" trains, "MapWorker" embeds.

    Returns:
        their ids, on Linux; elsewhere none are found.
    """
    found, home = [], f"RAY_TMPDIR={os.environ.get('RAY_TMPDIR')}".encode()
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended
            title, variables = (path / "cmdline").read_bytes(), (path / "environ").read_bytes()
            if title.startswith(f"ray::{kind}".encode()) and home in variables:
                found.append(int(path.name))
    return found


@contextlib.contextmanager
def _connected_to(ray, address: str, **options: Any) -> Iterator[None]:
    ray.init(address=address, log_to_driver=False, logging_level="ERROR", **options)
    for name in ("ray.data", "ray.train"):
        logging.getLogger(name).setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    try:
        yield
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _connected(settings: ClusterSettings) -> Iterator[Any]:
    """Ray, connected to the cluster of the settings."""
    ray = import_ray()
    if settings.address:
        with _connected_to(ray, settings.address):
            yield ray
    elif ray.is_initialized():
        yield ray
    else:
        cpus = max(1, round(settings.workers * settings.share_of_processor))
        with emulated_cluster(nodes=1, cpus=cpus):
            yield ray


# --------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------


class _Task(NamedTuple):
    """What every worker is told."""

    tower: bytes  # a .keras file
    handler: DatasetHandler
    validation: np.ndarray
    settings: TrainingSettings
    run: str
    cache: FeatureCache | None
    workers: int


def train(
    tower: keras.Model,
    handler: DatasetHandler,
    validation: np.ndarray,
    settings: TrainingSettings,
    run: Path,
    cache: FeatureCache | None = None,
    cluster: ClusterSettings = ClusterSettings(),
) -> pd.DataFrame:
    """Train as :func:`lib.training.stages.train` does, on several processes.

    Batches, losses and files are those of one process: ``handler.settings.batch_size`` is that of
    all workers together, and a training may begin with some workers and go on with more or fewer,
    or here. When a worker dies, all start anew from the last epoch.

    Args:
        tower: its weights are where training begins; it gets those of the best epoch. It may be on
            any of Keras' backends, while the workers train on JAX.
        handler, validation, settings, cache: see :func:`lib.training.stages.train`.
        run: folder for checkpoint, history, model and log, on a disk that all machines share.
        cluster: see :class:`ClusterSettings`.

    Raises:
        ClusterError: Ray is not installed; a batch can't be divided among the workers; they died,
            or failed, more often than ``restarts``.
        TrainingError: as :func:`lib.training.stages.train` does.
    """
    from lib.network.tower import save_tower
    from lib.training.stages import train as train_here

    rows = handler.settings.batch_size * max(handler.settings.pictures_per_landmark, 1)
    if rows % (cluster.workers * max(cluster.gpus, 1)):
        raise ClusterError(
            f"a batch of {rows} can't be divided evenly among {cluster.workers} workers"
            + (f" of {cluster.gpus} GPUs" if cluster.gpus > 1 else "")
            + ": choose another batch_size, or other workers"
        )
    run = Path(run).resolve()
    run.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        save_tower(tower, Path(folder) / "tower.keras")
        saved = (Path(folder) / "tower.keras").read_bytes()
    task = _Task(saved, handler, validation, settings, str(run), cache, cluster.workers)
    with _connected(cluster) as ray:
        _run_workers(ray, task, cluster)
    # All epochs are done: this reads what came of them.
    return train_here(tower, handler, validation, settings, run, cache)


def _run_workers(ray, task: _Task, cluster: ClusterSettings) -> None:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.v2.jax import JaxTrainer
    from ray.train.v2.jax.config import JaxConfig

    variables = {"KERAS_BACKEND": "jax", "TF_CPP_MIN_LOG_LEVEL": "3", "TQDM_DISABLE": "1"}
    if not cluster.gpus:
        variables |= {"JAX_PLATFORMS": "cpu", "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo"}
    notes = tempfile.mkdtemp(prefix=".part-ray-", dir=task.run)  # Ray Train's own
    try:
        JaxTrainer(
            _train_in_worker,
            train_loop_config={"task": ray.put(task)},
            # Without a GPU as well: else Ray Train leaves each worker to train alone.
            jax_config=JaxConfig(use_gpu=True),
            scaling_config=ScalingConfig(
                num_workers=cluster.workers,
                use_gpu=bool(cluster.gpus),
                resources_per_worker=cluster.resources,
                placement_strategy="SPREAD",
            ),
            run_config=RunConfig(
                name="train",
                storage_path=notes,
                failure_config=FailureConfig(max_failures=cluster.restarts),
                worker_runtime_env={"env_vars": variables},
            ),
        ).fit()
    except ray.train.TrainingFailedError as error:
        reasons = getattr(error, "worker_failures", None) or {0: error}
        rank, reason = min(reasons.items())
        raise ClusterError(f"worker {rank} failed: {_last_line(reason)}") from error
    finally:
        shutil.rmtree(notes, ignore_errors=True)


def _last_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__


def _train_in_worker(config: dict) -> None:
    """One process of a training; all run this at once."""
    import jax
    import ray

    from lib.data_parallel import from_the_first, together
    from lib.network.tower import fingerprint, load_tower
    from lib.training.checkpoint import CHECKPOINT
    from lib.training.stages import train as train_here

    task: _Task = ray.get(config["task"])
    if jax.process_count() != task.workers:
        raise ClusterError(f"{jax.process_count()} processes train together, not {task.workers}")
    seed = task.handler.settings.seed
    with together(seed) as number, tempfile.TemporaryDirectory() as own:
        # The first process writes the run's folder, which takes no other one: each has all weights.
        # What the others write, they alone need. They go on from a copy of the checkpoint, so that
        # none reads what the first is writing.
        run = Path(own) / "run" if number else Path(task.run)
        run.mkdir(exist_ok=True)
        path = run / CHECKPOINT
        known = from_the_first(path.read_bytes() if number == 0 and path.is_file() else b"")
        if number and known:
            path.write_bytes(known)
        start = Path(own) / "tower.keras"
        start.write_bytes(task.tower)
        tower = load_tower(start)
        train_here(tower, task.handler, task.validation, task.settings, run, task.cache)
        weights = fingerprint(tower)
        if from_the_first(weights.encode()).decode() != weights:
            raise ClusterError(f"process {number} ended with other weights than the first")


# --------------------------------------------------------------------------------------------------
# Embedding
# --------------------------------------------------------------------------------------------------


class _Embedder:
    """A worker that embeds: loads the tower once, then takes batch after batch."""

    def __init__(self, tower: str, source: Any, threads: int):
        import ray

        self._engine, self._source = _load(Path(tower), threads), ray.get(source)

    def __call__(self, batch: dict[str, np.ndarray]) -> pa.Table:
        numbers = batch["number"]
        done = embed_pictures(self._engine, self._source, numbers.tolist())
        embeddings, messages = iter(done.embeddings), iter(done.skipped)
        embedded, rows = set(done.names), []
        nothing = np.zeros(self._engine.dimension, np.float32)
        for number in numbers.tolist():
            name = self._source.names[number]
            good = name in embedded
            rows.append((number, name, next(embeddings) if good else nothing))
            rows[-1] += ("" if good else next(messages),)
        number, name, vectors, skipped = zip(*rows, strict=True)
        flat = pa.array(np.concatenate(vectors), pa.float32())
        return pa.table(
            {
                "number": pa.array(number, pa.int64()),
                "name": pa.array(name, pa.string()),
                "embedding": pa.FixedSizeListArray.from_arrays(flat, self._engine.dimension),
                "skipped": pa.array(skipped, pa.string()),
            }
        )


def _load(tower: Path, threads: int | None = None) -> Engine:
    if tower.suffix != ".keras":
        return load_engine(tower, threads=threads)
    from lib.network.tower import load_tower

    return keras_engine(load_tower(tower))


def embed(
    tower: Path,
    source: PhotoSource,
    out_folder: Path,
    batch_size: int = 128,
    cluster: ClusterSettings = ClusterSettings(),
) -> Embedded:
    """Embed pictures as :func:`lib.search.embedding.embed_job` does, on several processes.

    Rows go to Parquet files (number of the picture, name, embedding, and why it was skipped), from
    which an index can be built at any time. A job that was interrupted goes on with the pictures
    that have no row yet.

    Args:
        tower: file of an exported tower, for processors, or a ``.keras`` file, for Keras' backend
            and its GPU.
        source, batch_size: see :func:`lib.search.embedding.embed_job`.
        out_folder: of this job alone, on a disk that all machines share; made if absent.
        cluster: see :class:`ClusterSettings`.

    Returns:
        all of it in memory, in the order of the source. For more than fits there, take
        :func:`embedded_parts`.

    Raises:
        ClusterError: Ray is not installed; an exported tower where workers have GPUs; or pictures
            are missing in the end.
        EmbeddingJobError: as :func:`lib.search.embedding.embed_job` does.
    """
    folder, tower = Path(out_folder).resolve(), Path(tower).resolve()
    if cluster.gpus and tower.suffix != ".keras":
        raise ClusterError(
            f"{tower.name} is an exported tower, which no GPU computes: take the .keras file of "
            "its run, or workers without GPUs"
        )
    job = {"rows": "parquet"} | describe_job(_load(tower), source, batch_size)
    with claimed(folder, job):
        (folder / PARTS).mkdir(exist_ok=True)
        missing = _missing(folder, len(source))
        if len(missing):
            with _connected(cluster) as ray:
                _embed_on(ray, tower, source, folder / PARTS, missing, batch_size, cluster)
        if left := len(_missing(folder, len(source))):
            raise ClusterError(f"{left} of {len(source)} pictures have no row: run it once more")
        return _in_order(folder, len(source), job["dimension"])


def _embed_on(
    ray,
    tower: Path,
    source: PhotoSource,
    parts: Path,
    missing: np.ndarray,
    batch_size: int,
    cluster: ClusterSettings,
) -> None:
    from ray.data import ActorPoolStrategy

    # A block is what is lost with a worker, and becomes a file: some for each worker, none too
    # large. They are here, and not read by tasks, which would wait for the cores of the workers.
    batches = -(-len(missing) // batch_size)
    blocks = max(min(batches, 4 * cluster.workers), -(-batches // _MOST_BATCHES))
    rows = ray.data.from_arrow(
        [pa.table({"number": some}) for some in np.array_split(missing, blocks)]
    )
    rows = rows.map_batches(
        _Embedder,
        fn_constructor_args=(str(tower), ray.put(source), cluster.threads),
        batch_size=batch_size,
        compute=ActorPoolStrategy(size=cluster.workers),
        num_cpus=cluster.share_of_processor,
        num_gpus=cluster.gpus or None,
    )
    # Nor does writing wait for a core.
    rows.write_parquet(str(parts), ray_remote_args={"num_cpus": 0})


def _files(folder: Path) -> list[Path]:
    return sorted((Path(folder) / PARTS).glob("*.parquet"))


def _missing(folder: Path, pictures: int) -> np.ndarray:
    """The pictures without a row, int64; deletes files that were not finished."""
    has_row = np.zeros(pictures, bool)
    for path in _files(folder):
        try:
            has_row[pq.read_table(path, columns=["number"])["number"].to_numpy()] = True
        except (pa.ArrowInvalid, OSError):  # its writer was killed
            path.unlink()
    return np.flatnonzero(~has_row)


def _read_rows(folder: Path) -> Iterator[tuple[np.ndarray, list[str], np.ndarray, np.ndarray]]:
    """Each picture's row once, file by file: numbers, names, embeddings (n, d), messages."""
    seen: set[int] = set()
    for path in _files(folder):
        table = pq.read_table(path)
        numbers = table["number"].to_numpy()
        # A worker that died after it had written may have been followed by one that wrote again.
        first = [i for i, n in enumerate(numbers.tolist()) if n not in seen and not seen.add(n)]
        table = table.take(np.array(first, np.int64))
        column = table["embedding"].combine_chunks()
        yield (
            numbers[first],
            table["name"].to_pylist(),
            column.flatten().to_numpy().reshape(len(first), column.type.list_size),
            np.array(table["skipped"].to_pylist(), object),
        )


def embedded_parts(folder: Path) -> Iterator[Embedded]:
    """What :func:`embed` has embedded, a file at a time, each picture once, in no order.

    Args:
        folder: of the job.
    """
    for _, names, embeddings, messages in _read_rows(folder):
        good = messages == ""
        kept = [name for name, is_good in zip(names, good, strict=True) if is_good]
        yield Embedded(embeddings[good], kept, messages[~good].tolist())


def _in_order(folder: Path, pictures: int, dimension: int) -> Embedded:
    embeddings = np.empty((pictures, dimension), np.float32)
    names, messages = np.empty(pictures, object), np.empty(pictures, object)
    for numbers, some_names, vectors, some_messages in _read_rows(folder):
        embeddings[numbers], names[numbers], messages[numbers] = vectors, some_names, some_messages
    good = messages == ""
    return Embedded(embeddings[good], names[good].tolist(), messages[~good].tolist())
