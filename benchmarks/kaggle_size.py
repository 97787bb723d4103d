"""What does a set of the size of Kaggle's take: seconds, bytes and memory, stage by stage?

    python -m benchmarks.kaggle_size                    # 5.4 GB, deleted at the end
    python -m benchmarks.kaggle_size --records 16000    # a tenth
    python -m benchmarks.kaggle_size --folder /data     # not in the system's temporary folder

Writes a made-up set in the format of Kaggle's (:mod:`lib.data.records`) and of its size: 81,313
landmarks with two anchors each make 162,626 records, 10,841 in each of 15 shards and 11 in the
last. A picture is the mean of two cut-outs of one texture, 128 x 128 pixels, JPEG of quality 94:
cheap to draw, all different, about as large as a photo; nothing can be learned from them. Then,
with the values of ``profiles/gldv2.yaml``:

* catalogue: made, and opened again;
* split: :func:`lib.data.plan.hold_back`;
* plan: the batches of one epoch;
* features: the feature cache. Its rate does not change, so it is the difference between building it
  for a fifth of ``--cached`` pictures and for all of them; for 10,000 pictures and for the whole
  set that is extrapolated;
* training: a short epoch of each of the profile's stages, of ``--triplets`` triplets, in the
  profile's batches, without a feature cache;
* evaluation: photos of up to 2,000 triplets read, embedded by a ResNet50 with random weights, and
  ranked.

Each stage is a process of its own, after the one before has ended. All stages but the first open
the catalogue before their clock starts, and their memory includes it and the libraries they need.
Memory is the most that was resident, and the most that was taken without the pages of files, of the
process and its workers together (known on Linux alone).

The set lies in a new folder, which is deleted whatever happens, unless the program is killed with
SIGKILL. Prints a table, and as its last line one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import simplejpeg
import yaml
from tqdm import tqdm

from benchmarks.memory import OwnMemory
from lib.data.catalogue import CATALOGUE, Catalogue, open_catalogue
from lib.data.plan import Split, fit_batches, hold_back
from lib.data.records import Triplet, find_shards, shard_name, write_shard
from lib.files import project_root
from lib.programs import as_path
from lib.workers import process_pool

# Keras is imported within the stages that need it, as each stage's memory is measured.

RECORDS, FULL_SHARDS, SIZE, QUALITY = 162_626, 15, 128, 94
CACHED = 2560  # pictures whose feature maps are computed
TRAINED = 512  # triplets of an epoch
VALIDATED = 64  # triplets after each epoch; the evaluation has a stage of its own
UNIT = 10_000  # pictures that the time of the feature cache is given for
FEWEST = 100  # records
BYTES_PER_RECORD = 34_000  # 33,184 were measured
_FEW = 2_000  # up to so many records, starting processes takes longer than drawing them
_TEXTURE = 1024  # side in pixels


# ---- the made-up set


def plan_views(records: int, rng: np.random.Generator) -> np.ndarray:
    """Draw triplets as the Kaggle set does, int64 (records, 3, 2): landmark and view of each role.

    A landmark has 2 to 1,000 photos, most have few. Its first two are anchors, in the order of the
    landmarks. The positive is any photo of the landmark, the anchor included; the negative is an
    anchor of another landmark.
    """
    anchor = np.arange(records)
    photos = 2 + np.minimum(5 * rng.pareto(1.1, records // 2 + 1), 998).astype(np.int64)
    landmark = anchor // 2
    positive = rng.integers(photos[landmark])
    negative = rng.integers(records, size=records)
    same = negative // 2 == landmark
    negative[same] = (negative[same] + 2) % records
    anchors = np.stack([landmark, anchor % 2], axis=1)
    return np.stack([anchors, np.stack([landmark, positive], axis=1), anchors[negative]], axis=1)


@cache
def _texture() -> np.ndarray:
    """Noise whose amplitude falls with the frequency as in photos, uint8 (1024, 1024, 3)."""
    n, rng = _TEXTURE, np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(n)[:, None], np.fft.rfftfreq(n)[None])
    frequency[0, 0] = 1.0  # the mean
    # Grey for the most part, as photos are.
    waves = np.fft.rfft2(rng.normal(size=(n, n)) + 0.25 * rng.normal(size=(3, n, n))) / frequency
    noise = np.stack(np.fft.irfft2(waves, s=(n, n)), axis=2)
    return np.clip(128 + 48 * (noise - noise.mean()) / noise.std(), 0, 255).astype(np.uint8)


def draw(landmark: int, view: int) -> bytes:
    """Draw one picture as a JPEG file; equal numbers give equal bytes."""
    places = _TEXTURE - SIZE
    # A factor without common divisors sends different numbers to different places.
    at = [number * 611_953 % places**2 for number in (landmark, 1000 * landmark + view)]
    crops = [_texture()[y : y + SIZE, x : x + SIZE] for y, x in (divmod(a, places) for a in at)]
    picture = crops[0] // 2 + crops[1] // 2
    return simplejpeg.encode_jpeg(picture, QUALITY, "RGB", "420")


def write_part(path: Path, views: np.ndarray) -> int:
    triplets = (Triplet(*(draw(*view) for view in roles)) for roles in views.tolist())
    return write_shard(path, triplets)


def write_set(folder: Path, records: int) -> None:
    """Write the shards, on all cores; a picture that recurs is drawn again."""
    size = records // FULL_SHARDS
    views = plan_views(records, np.random.default_rng(0))
    parts = [views[i * size : (i + 1) * size] for i in range(FULL_SHARDS)]
    if records % FULL_SHARDS:
        parts.append(views[FULL_SHARDS * size :])
    paths = [folder / shard_name(number) for number in range(len(parts))]
    with process_pool() as pool, tqdm(total=records, desc="writing", unit=" records") as bar:
        for count in (map if records <= _FEW else pool.map)(write_part, paths, parts):
            bar.update(count)


# ---- the stages


def _open(folder: Path, profile: dict) -> tuple[Catalogue, Split]:
    catalogue = open_catalogue(folder)
    return catalogue, hold_back(catalogue, profile["validation_share"])


def make_catalogue(folder: Path, profile: dict) -> dict[str, Any]:
    """Index the shards."""
    start = time.perf_counter()
    catalogue = open_catalogue(folder)
    seconds = time.perf_counter() - start
    return {
        "seconds": seconds,
        "bytes": (folder / CATALOGUE).stat().st_size,
        "pictures": len(catalogue.pictures),
        "problems": len(catalogue.problems),
    }


def open_again(folder: Path, profile: dict) -> dict[str, Any]:
    """Read the catalogue's file and make its two tables."""
    start = time.perf_counter()
    catalogue = open_catalogue(folder)
    size = catalogue.pictures.memory_usage().sum() + catalogue.triplets.memory_usage().sum()
    return {"seconds": time.perf_counter() - start, "bytes": int(size)}


def split(folder: Path, profile: dict) -> dict[str, Any]:
    """Hold back landmarks for validation."""
    catalogue = open_catalogue(folder)
    _ = catalogue.pictures, catalogue.triplets
    start = time.perf_counter()
    parts = hold_back(catalogue, profile["validation_share"])
    seconds = time.perf_counter() - start
    held = {"validation_pictures": int(parts.validation.sum())}
    return {"seconds": seconds, "bytes": sum(part.nbytes for part in parts)} | held


def plan_epoch(folder: Path, profile: dict) -> dict[str, Any]:
    """Plan the batches of one epoch."""
    from lib.data.dataset import DatasetHandler, DataSettings

    catalogue, parts = _open(folder, profile)
    start = time.perf_counter()
    batch, steps = fit_batches(
        catalogue, parts.train, profile["batch_size"], profile["steps_per_epoch"]
    )
    handler = DatasetHandler(catalogue, DataSettings(SIZE, batch), parts.train)
    batches = handler.training_batches(0, steps)
    return {
        "seconds": time.perf_counter() - start,
        "bytes": batches.plan.nbytes,
        "steps": steps,
        "training_triplets": len(handler.triplets),
        "training_pictures": len(np.unique(handler.triplets)),
    }


def _tower(profile: dict):
    from lib.network.tower import TowerSettings, build_tower, fast_policy

    shape = {name: profile["settings"][name] for name in ("embedding_size", "last_stage")}
    return build_tower(TowerSettings(SIZE, weights="", precision=fast_policy(), **shape))


def build_features(folder: Path, profile: dict, cached: int) -> dict[str, Any]:
    """Build the feature cache for a fifth of some training pictures, and for all of them."""
    from lib.data.dataset import DatasetHandler, DataSettings
    from lib.training.features import FrozenTrunk, build_cache

    catalogue, parts = _open(folder, profile)
    trunk = _tower(profile).get_layer("trunk")
    everything = DatasetHandler(catalogue, DataSettings(SIZE), parts.train)
    drawn = everything.landmark_pictures(cached // 2, most=4, seed=0)[:cached]
    pictures, seconds = [], []
    for some in (drawn[: len(drawn) // 5], drawn):
        chosen = np.zeros(len(parts.train), dtype=bool)
        chosen[some] = True
        settings = DataSettings(SIZE, pictures_per_landmark=2)
        start = time.perf_counter()
        features = build_cache(
            trunk, DatasetHandler(catalogue, settings, chosen), folder / "features", variants=1
        )
        seconds.append(time.perf_counter() - start)
        pictures.append(len(features.pictures))
    # A run of a few pictures measures nothing: then all time is the start's.
    each = max(seconds[1] - seconds[0], 0.0) / (pictures[1] - pictures[0])
    return {
        "seconds": each * UNIT,
        "bytes": features.bytes_per_map * UNIT,
        "measured_on": pictures[1],
        "start_seconds": seconds[1] - each * pictures[1],
        "engine": FrozenTrunk(trunk).name,
    }


def train_stages(folder: Path, profile: dict, trained: int) -> dict[str, Any]:
    """Train a short epoch of each stage, each in a run of its own, which is compiled first."""
    from lib.data.dataset import DatasetHandler, DataSettings
    from lib.training.stages import Stage, TrainingSettings, train

    catalogue, parts = _open(folder, profile)
    tower = _tower(profile)
    held_back = DatasetHandler(catalogue, DataSettings(SIZE), parts.validation)
    validation = held_back.photos(held_back.validation_triplets(VALIDATED))
    batch = min(profile["batch_size"], trained)
    handler = DatasetHandler(catalogue, DataSettings(SIZE, batch), parts.train)
    seconds = {}
    for part, _, rate in profile["stages"]:
        start = time.perf_counter()
        average = profile["settings"]["ema_momentum"]
        settings = TrainingSettings((Stage(part, 1, trained // batch, rate),), ema_momentum=average)
        train(tower, handler, validation, settings, folder / part)
        seconds[f"{part}_seconds"] = time.perf_counter() - start
    runs = [folder / part for part, *_ in profile["stages"]]
    written = sum(path.stat().st_size for run in runs for path in run.rglob("*") if path.is_file())
    steps = {"batch": batch, "steps": trained // batch}
    return {"seconds": sum(seconds.values()), "bytes": written} | steps | seconds


def evaluate(folder: Path, profile: dict) -> dict[str, Any]:
    """Read, embed and rank the photos of the held back triplets."""
    from lib.data.dataset import DatasetHandler, DataSettings
    from lib.training.stages import evaluate_triplets

    catalogue, parts = _open(folder, profile)
    tower = _tower(profile)
    start = time.perf_counter()
    handler = DatasetHandler(catalogue, DataSettings(SIZE), parts.validation)
    photos = handler.photos(handler.validation_triplets(profile["validation_limit"]))
    evaluate_triplets(tower, photos)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "bytes": photos.nbytes, "triplets": len(photos)}


# ---- the program


def alone(stage: Callable[..., dict], *arguments) -> dict[str, Any]:
    """Run a stage in a new process; adds the most memory that it and its workers took, in GB."""
    context = multiprocessing.get_context("spawn")
    end, other = context.Pipe(duplex=False)
    process = context.Process(target=_serve, args=(other, stage, arguments))
    process.start()
    other.close()
    try:
        return end.recv()
    except EOFError:
        sys.exit(f"the stage {stage.__name__} failed; its error stands above")
    finally:  # an interruption as well
        process.terminate()
        process.join()


def _serve(connection, stage: Callable[..., dict], arguments: tuple) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the program itself ends this process
    memory = OwnMemory(workers=True)
    memory.start()
    result = stage(*arguments)
    connection.send(result | {"memory_gb": memory.most_resident, "own_memory_gb": memory.most})


@contextlib.contextmanager
def new_folder(inside: Path | None) -> Iterator[Path]:
    """A temporary folder, deleted at the end and also where the program is told to end."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    with tempfile.TemporaryDirectory(prefix="kaggle-size-", dir=inside) as folder:
        yield Path(folder)


def measure(
    folder: Path, profile: dict, records: int, cached: int, trained: int
) -> dict[str, dict[str, Any]]:
    """Write the set, run all stages; the results by the stage's name in the table."""
    start = time.perf_counter()
    write_set(folder, records)
    results = {"writing the set": {"seconds": time.perf_counter() - start}}
    shards = find_shards(folder)
    results["writing the set"]["bytes"] = sum(shard.stat().st_size for shard in shards)
    stages = {
        "catalogue, made": (make_catalogue,),
        "catalogue, opened again": (open_again,),
        "split": (split,),
        "plan of an epoch": (plan_epoch,),
        f"feature cache, {UNIT:,} pictures": (build_features, cached),
        "a short epoch of each stage": (train_stages, trained),
        "evaluation": (evaluate,),
    }
    for name, (stage, *more) in stages.items():
        print(f"{name} ...", flush=True)
        results[name] = alone(stage, folder, profile, *more)
    return results


def show(results: dict[str, dict[str, Any]], records: int) -> None:
    """Print the table."""
    features, plan = results[f"feature cache, {UNIT:,} pictures"], results["plan of an epoch"]
    share = plan["training_pictures"] / UNIT
    whole = {key: features[key] * share for key in ("seconds", "bytes")}
    rows = results | {f"feature cache, {plan['training_pictures']:,} pictures": whole}
    print(
        f"\n{records:,} records, {results['catalogue, made']['pictures']:,} different pictures, "
        f"{os.cpu_count()} cores; the feature cache ({features['engine']}) extrapolated from "
        f"{features['measured_on']:,} pictures, epochs of "
        f"{results['a short epoch of each stage']['steps']:,} steps, evaluation of "
        f"{results['evaluation']['triplets']:,} triplets\n\n"
        f"{'':<32}{'seconds':>9}{'MB':>11}{'memory':>12}{'without files':>16}"
    )
    for name, row in rows.items():
        line = f"{name:<32}{row['seconds']:9.2f}{row['bytes'] / 1e6:11.1f}"
        if "memory_gb" in row:
            line += f"{row['memory_gb']:9.2f} GB{row['own_memory_gb']:13.2f} GB"
        print(line)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kaggle_size")
    parser.add_argument("--records", type=int, default=RECORDS, help="a landmark has two")
    parser.add_argument("--cached", type=int, default=CACHED, help="pictures to measure with")
    parser.add_argument("--triplets", type=int, default=TRAINED, help="of an epoch that is trained")
    parser.add_argument("--folder", type=as_path, help="the set's new folder is made in this one")
    stage = "of ResNet50 whose map is pooled"
    parser.add_argument("--last-stage", type=int, choices=(3, 4, 5), default=5, help=stage)
    options = parser.parse_args()
    if options.records < FEWEST:
        parser.error(f"--records must be at least {FEWEST}, not {options.records}")
    if options.cached < 100:
        parser.error(f"--cached must be at least 100, not {options.cached}")
    if options.triplets < 1:
        parser.error(f"--triplets must be at least 1, not {options.triplets}")
    inside = options.folder or Path(tempfile.gettempdir())
    if not inside.is_dir():
        parser.error(f"--folder {inside} is no folder: make it first")
    # A map of 4 x 4 x 2048 float16 has 64 KiB, that of the stage before it twice as much. The cache
    # is built twice, the second one is larger.
    of_map = 65_536 * 2 ** (5 - options.last_stage)
    needed = BYTES_PER_RECORD * options.records + 1.2 * of_map * options.cached
    if needed > (free := shutil.disk_usage(inside).free):
        parser.error(
            f"{needed / 1e9:.1f} GB are needed in {inside}, {free / 1e9:.1f} GB are free: choose "
            "another --folder or fewer --records"
        )
    profile = yaml.safe_load((project_root() / "profiles" / "gldv2.yaml").read_text("utf-8"))
    profile["settings"]["last_stage"] = options.last_stage
    with new_folder(options.folder) as folder:
        print(f"{folder} is deleted at the end", flush=True)
        results = measure(folder, profile, options.records, options.cached, options.triplets)
    show(results, options.records)
    rounded = {
        stage: {key: round(v, 3) if isinstance(v, float) else v for key, v in result.items()}
        for stage, result in results.items()
    }
    chosen = {"records": options.records, "last_stage": options.last_stage}
    print(json.dumps(chosen | rounded))


if __name__ == "__main__":
    main()
