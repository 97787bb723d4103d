"""Trains and embeds on many machines with Ray.

    cluster = ClusterSettings(address="auto", workers=8, gpus=1)
    history = train(tower, handler, validation, settings, Path("/shared/run"), cluster=cluster)
    found = embed(Path("/shared/run/model.keras"), source, Path("/shared/photos"), cluster=cluster)

Training: Keras' JAX backend sums the gradients (:mod:`lib.data_parallel`). When a worker dies, all
restart from the last epoch. Embedding: Ray Data distributes the pictures, and reassigns those of a
dead worker. Folders, shards and photos must have the same paths on all machines. Ray and JAX come
with the extra ``cluster`` (``make cluster``).
"""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lib.cluster.emulated import ClusterError, connected_to, emulated_cluster, import_ray
from lib.data.photos import left_out_lines
from lib.network.engine import PRECISIONS, Engine, keras_engine, load_engine
from lib.search.embedding import Embedded, PhotoSource, claimed, describe_job, embed_pictures
from lib.search.local_features import LocalFeatures

if TYPE_CHECKING:  # not needed for embedding
    import keras
    import pandas as pd

    from lib.data.dataset import DatasetHandler
    from lib.training.features import FeatureCache
    from lib.training.stages import TrainingSettings

PARTS = "parts"  # folder of a job's Parquet files


@dataclass(frozen=True)
class ClusterSettings:
    """Which cluster to use, and how much of it; a ValueError if ``workers`` is below 1."""

    # "auto" for the Ray cluster of this machine, or "host:port". "": the cluster this process is
    # connected to, or else an emulated one that ends with the call.
    address: str = ""
    workers: int = 2  # number of processes that train or embed together
    gpus: int = 0  # per worker; 0: workers compute on the CPU
    restarts: int = 3  # maximum number of restarts of a training
    share_of_processor: float = 1  # cores that Ray reserves per worker

    def __post_init__(self):
        if self.workers < 1:
            raise ValueError(f"workers must be at least 1, got {self.workers}")

    @property
    def threads(self) -> int:
        """Number of threads of a worker that embeds with an exported tower."""
        return max(1, round(self.share_of_processor))


@contextlib.contextmanager
def _connected(settings: ClusterSettings) -> Iterator[Any]:
    """Connect to the cluster of the settings; yield the module ``ray``."""
    ray = import_ray()
    if settings.address:
        with connected_to(ray, settings.address):
            yield ray
    elif ray.is_initialized():
        yield ray
    else:
        cpus = max(1, round(settings.workers * settings.share_of_processor))
        with emulated_cluster(nodes=1, cpus=cpus):
            yield ray


def train(
    tower: keras.Model,
    handler: DatasetHandler,
    validation: np.ndarray,
    settings: TrainingSettings,
    run: Path,
    cache: FeatureCache | None = None,
    cluster: ClusterSettings = ClusterSettings(),
    teacher: np.ndarray | None = None,
) -> pd.DataFrame:
    """Train as :func:`lib.training.stages.train`, in several processes.

    Batches, losses and files are the same as in one process: ``handler.settings.batch_size`` counts
    the rows of all workers together. An interrupted training can continue with another number of
    workers, or without Ray.

    Args:
        tower: in any Keras backend, though workers use JAX; its weights become those of the best
            epoch.
        handler, validation, settings, cache, teacher: see :func:`lib.training.stages.train`.
        run: folder for checkpoint, history, model and log, on a disk that all machines share.

    Raises:
        ClusterError: Ray is not installed or does not start; a batch can't be divided evenly among
            the workers; or workers failed more often than ``restarts``.
        TrainingError: as :func:`lib.training.stages.train`.
    """
    from lib.network.tower import save_tower
    from lib.training.stages import train as train_here

    rows = handler.settings.batch_size * max(handler.settings.pictures_per_landmark, 1)
    if rows % (cluster.workers * max(cluster.gpus, 1)):
        each = f" of {cluster.gpus} GPUs" if cluster.gpus > 1 else ""
        raise ClusterError(
            f"a batch of {rows} can't be divided evenly among {cluster.workers} workers{each}: "
            "choose another batch_size, or other workers"
        )
    run = Path(run).resolve()
    run.mkdir(parents=True, exist_ok=True)
    with (
        _connected(cluster) as ray,
        TemporaryDirectory(prefix=".part-ray-", dir=run, ignore_cleanup_errors=True) as shared,
    ):
        start = Path(shared) / "tower.keras"
        save_tower(tower, start)
        task = ray.put((start, handler, validation, settings, run, cache, teacher))
        _run_workers(ray, task, shared, cluster)
    # All epochs are done, so this only reads the results.
    return train_here(tower, handler, validation, settings, run, cache, teacher)


def _run_workers(ray, task: Any, shared: str, cluster: ClusterSettings) -> None:
    """Train in all workers; ``shared`` is a folder for Ray Train's files."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.v2.jax import JaxTrainer
    from ray.train.v2.jax.config import JaxConfig

    variables = {"KERAS_BACKEND": "jax", "TF_CPP_MIN_LOG_LEVEL": "3", "TQDM_DISABLE": "1"}
    if not cluster.gpus:
        variables |= {"JAX_PLATFORMS": "cpu", "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo"}
    try:
        JaxTrainer(
            _train_in_worker,
            train_loop_config={"task": task, "workers": cluster.workers},
            # True even without a GPU: otherwise Ray Train lets each worker train alone.
            jax_config=JaxConfig(use_gpu=True),
            scaling_config=ScalingConfig(
                num_workers=cluster.workers,
                use_gpu=bool(cluster.gpus),
                resources_per_worker={"CPU": cluster.share_of_processor}
                | ({"GPU": cluster.gpus} if cluster.gpus else {}),
                placement_strategy="SPREAD",
            ),
            run_config=RunConfig(
                name="train",
                storage_path=shared,
                failure_config=FailureConfig(max_failures=cluster.restarts),
                worker_runtime_env={"env_vars": variables},
            ),
        ).fit()
    except ray.train.TrainingFailedError as error:
        reasons = getattr(error, "worker_failures", None) or {0: error}
        rank, reason = min(reasons.items())
        raise ClusterError(f"worker {rank} failed: {_last_line(reason)}") from error


def _last_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[-1]


def _train_in_worker(config: dict) -> None:
    """Train in a worker; all workers run this at the same time."""
    import jax
    import ray

    from lib.data_parallel import from_the_first, together
    from lib.network.tower import fingerprint, load_tower
    from lib.training.checkpoint import CHECKPOINT
    from lib.training.stages import train as train_here

    start, handler, validation, settings, run, *rest = ray.get(config["task"])
    # What was compiled before a worker died need not be compiled again, which is most of its start.
    compiled = start.parent / f"jax-{platform.node()}"  # of each machine, as processors differ
    jax.config.update("jax_compilation_cache_dir", str(compiled))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    if (found := jax.process_count()) != config["workers"]:
        raise ClusterError(f"{found} processes train together, not {config['workers']}")
    with together(handler.settings.seed) as number, TemporaryDirectory() as own:
        # Only the first process writes to the run's folder, since all hold the same weights. The
        # others use temporary folders, with a copy of the checkpoint, which the first may replace.
        path = run / CHECKPOINT
        known = from_the_first(path.read_bytes() if number == 0 and path.is_file() else b"")
        if number:
            run = Path(own)
            if known:
                (run / CHECKPOINT).write_bytes(known)
        tower = load_tower(start)
        train_here(tower, handler, validation, settings, run, *rest)
        weights = fingerprint(tower)
        if from_the_first(weights.encode()).decode() != weights:
            raise ClusterError(f"process {number} ended with different weights than process 0")


class _Embedder:
    """A worker that loads the tower once, and then embeds batch after batch."""

    def __init__(self, tower: Path | None, source: Any, precision: str, threads: int):
        import ray

        self._engine, _ = _load(tower, precision, threads)
        self._source = ray.get(source)

    def __call__(self, batch: dict[str, np.ndarray]) -> pa.Table:
        numbers = batch["number"]
        done = embed_pictures(self._engine, self._source, numbers.tolist())
        names = [self._source.names[number] for number in numbers]
        embedded = np.isin(names, done.names)
        embeddings = np.zeros((len(names), self._engine.dimension), self._engine.dtype)
        embeddings[embedded] = done.embeddings
        skipped = np.full(len(names), "", object)
        skipped[~embedded] = done.skipped
        flat = pa.array(embeddings.ravel())
        return pa.table(
            {
                "number": pa.array(numbers, pa.int64()),
                "name": pa.array(names, pa.string()),
                "embedding": pa.FixedSizeListArray.from_arrays(flat, self._engine.dimension),
                "skipped": pa.array(skipped, pa.string()),
            }
        )


def _load(
    tower: Path | None, precision: str, threads: int | None = None
) -> tuple[Engine | LocalFeatures, str]:
    """Load a tower and name its precision; check that this machine computes in ``precision``."""
    if tower is None:
        return LocalFeatures(threads), precision
    if tower.suffix == ".keras":
        from lib.network.tower import load_tower

        engine = keras_engine(load_tower(tower))
    else:
        asked = precision if precision in PRECISIONS else "auto"  # only "auto" gives float16
        engine = load_engine(tower, asked, threads)
    found = engine.name.rpartition(" ")[2]  # "openvino bfloat16"
    if precision not in ("auto", found):
        raise ClusterError(
            f"{tower.name} is computed in {found} on {platform.node()}, not in {precision}: one "
            f"job can't mix them; use embed(precision={found!r}) if all machines compute in it"
        )
    return engine, found


def embed(
    tower: Path | None,
    source: PhotoSource,
    out_folder: Path,
    batch_size: int = 128,
    cluster: ClusterSettings = ClusterSettings(),
    precision: str = "auto",
) -> Embedded:
    """Embed pictures as :func:`lib.search.embedding.embed_job`, in several processes.

    Rows are written to Parquet files: number of the picture, name, embedding, and the reason if it
    was skipped. An interrupted job continues with the pictures that have no row yet.

    Args:
        tower: file of an exported tower, for the CPU; or a ``.keras`` file, for Keras' backend and
            its GPU; or None: local features are found in place of descriptors, see
            :mod:`lib.search.local_features`.
        source, batch_size: see :func:`lib.search.embedding.embed_job`.
        out_folder: for this job only, on a disk that all machines share; created if missing.
        precision: of all workers: "float32", "bfloat16", or "auto": the fast one on this machine
            (for a ``.keras`` file, its own).

    Returns:
        all rows in memory, in the order of the source. If they do not fit, use
        :func:`embedded_parts`.

    Raises:
        ClusterError: Ray is not installed or does not start; the tower is exported but workers have
            GPUs; a machine does not compute in the precision; or rows are missing at the end.
        EmbeddingJobError: as :func:`lib.search.embedding.embed_job`.
    """
    folder = Path(out_folder).resolve()
    tower = None if tower is None else Path(tower).resolve()
    if cluster.gpus and tower is None:
        raise ClusterError("local features are found on processors only: take workers without GPUs")
    if cluster.gpus and tower.suffix != ".keras":
        raise ClusterError(
            f"{tower.name} is an exported tower, which runs on processors only: take the .keras "
            "file of its run, or workers without GPUs"
        )
    engine, precision = _load(tower, precision)
    job = {"rows": "parquet"} | describe_job(engine, source, batch_size)
    with claimed(folder, job):
        (folder / PARTS).mkdir(exist_ok=True)
        missing = _missing(folder, len(source))
        if len(missing):
            with _connected(cluster) as ray:
                worker = (tower, ray.put(source), precision, cluster.threads)
                _embed_on(ray, worker, missing, batch_size, folder / PARTS, cluster)
        if left := len(_missing(folder, len(source))):
            raise ClusterError(f"{left} of {len(source)} pictures have no row: run the job again")
        if not len(source):
            return Embedded(np.empty((0, engine.dimension), engine.dtype), [], [])
        table = pa.concat_tables([pq.read_table(path) for path in _files(folder)])
        # The first row of each picture, in the order of the pictures.
        found = _embedded(table, np.unique(table["number"].to_numpy(), return_index=True)[1])
        return found._replace(skipped=found.skipped + left_out_lines(source.left_out))


def _embed_on(
    ray, worker: tuple, missing: np.ndarray, batch_size: int, parts: Path, cluster: ClusterSettings
) -> None:
    from ray.data import ActorPoolStrategy

    # A block becomes one file, and is lost if its worker dies: hence a few per worker, of at most
    # 64 batches.
    # Blocks come from this process, since tasks that read them would wait for the workers' cores.
    batches = -(-len(missing) // batch_size)
    blocks = max(min(batches, 4 * cluster.workers), -(-batches // 64))
    tables = [pa.table({"number": some}) for some in np.array_split(missing, blocks)]
    rows = ray.data.from_arrow(tables).map_batches(
        _Embedder,
        fn_constructor_args=worker,
        batch_size=batch_size,
        compute=ActorPoolStrategy(size=cluster.workers),
        num_cpus=cluster.share_of_processor,
        num_gpus=cluster.gpus or None,
    )
    try:
        # 0 cores, so that writing does not wait for them either.
        rows.write_parquet(str(parts), ray_remote_args={"num_cpus": 0})
    except ray.exceptions.RayError as error:
        raise ClusterError(f"a worker failed: {_last_line(error)}") from error


def _files(folder: Path) -> list[Path]:
    return sorted((Path(folder) / PARTS).glob("*.parquet"))


def _missing(folder: Path, pictures: int) -> np.ndarray:
    """Find the pictures without a row, int64 (n,), and delete unfinished files."""
    has_row = np.zeros(pictures, bool)
    for path in _files(folder):
        try:
            has_row[pq.read_table(path, columns=["number"])["number"].to_numpy()] = True
        except (pa.ArrowInvalid, OSError) as error:
            if getattr(error, "errno", None):  # an I/O error: the file may be intact
                raise
            path.unlink()  # its writer was killed
    return np.flatnonzero(~has_row)


def embedded_parts(folder: Path) -> Iterator[Embedded]:
    """Read an ``out_folder`` of :func:`embed` file by file; each picture once, in any order."""
    seen: set[int] = set()
    for path in _files(folder):
        table = pq.read_table(path)
        numbers = enumerate(table["number"].to_pylist())
        # If a worker died after writing its rows, another has written them again.
        first = [row for row, n in numbers if n not in seen and not seen.add(n)]
        yield _embedded(table, np.array(first, int))


def _embedded(table: pa.Table, rows: np.ndarray) -> Embedded:
    """Select rows of a table, int (n,), in this order."""
    column = table["embedding"].combine_chunks()
    vectors = column.flatten().to_numpy().reshape(len(table), column.type.list_size)
    names, skipped = (np.array(table[c].to_pylist(), object)[rows] for c in ("name", "skipped"))
    good = skipped == ""
    return Embedded(vectors[rows[good]], names[good].tolist(), skipped[~good].tolist())
