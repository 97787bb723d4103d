"""What does Ray cost on one machine, and does a training on two processes end where one does?

    python -m benchmarks.cluster [--photos 2000] [--steps 100]

All workers share this machine's cores: two can't be faster than one, and what is measured is what
the cluster takes for itself. Its start is not counted; that of the workers stands by itself.

* Embedding: the demo's pictures, again and again, at 128 pixels through an exported ResNet50 of
  random weights: the plain loop of :func:`lib.search.embedding.embed_job`, and Ray with 1 and 2
  workers.
* Training: that of notebook 02 on the demo world, with its parameters (``--steps`` in an epoch):
  the head from the feature cache, then the last block; on this process (Keras on TensorFlow) and
  on 1 and 2 workers (JAX). Rates are those of the last block's epochs from its second on.

Prints tables, and as its last line one JSON object: ``embedding`` and ``training`` with photos per
second, ``start`` in seconds, ``overhead`` (the plain loop's rate over that of Ray with one worker),
and ``val_map`` of each training with its 95 % interval.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np

from lib.cluster import ray as cluster
from lib.cluster.emulated import emulated_cluster
from lib.data.catalogue import Catalogue, open_catalogue, split_landmarks
from lib.data.dataset import DatasetHandler, DataSettings
from lib.demo.data import make_demo_data
from lib.evaluation.metrics import average_precision, interval, pair_hits
from lib.files import project_root
from lib.network.engine import export_engine, load_engine
from lib.network.tower import TowerSettings, build_tower, embed, fast_policy, load_tower, save_tower
from lib.search.embedding import PhotoSource, embed_job, photos_in_shards
from lib.training.features import build_cache
from lib.training.stages import Stage, TrainingSettings, train

BATCH = 64
CORES = os.cpu_count() or 1
HERE = "this process"


class Rate(NamedTuple):
    """How fast a way embeds."""

    per_second: float
    start: float  # seconds


def repeated(source: PhotoSource, n: int) -> PhotoSource:
    """So many pictures, the given ones again and again under new names."""
    names, read = [f"{i}-{source.names[i % len(source)]}" for i in range(n)], source.read
    return PhotoSource(names, lambda i, *how: read(i % len(source), *how), source.digest)


def measure_embedding(catalogue: Catalogue, folder: Path, n: int) -> dict[str, Rate]:
    """Photos per second of each way, and what it takes before them.

    A job of n photos and one of a quarter: what the longer one takes more is the rate, and the
    rest of its time the start.
    """
    tower = build_tower(TowerSettings(image_size=128, weights=""))
    path = folder / "tower.engine"
    export_engine(tower, path)
    pictures = photos_in_shards(catalogue)
    seconds: dict[tuple[str, int], float] = {}
    for many in (n // 4, n):
        source = repeated(pictures, many)
        start = time.perf_counter()
        expected = embed_job(load_engine(path), source, folder / f"plain-{many}", BATCH)
        seconds[HERE, many] = time.perf_counter() - start
        for workers in (1, 2):
            cores, out = max(1, CORES // workers), folder / f"ray-{workers}-{many}"
            settings = cluster.ClusterSettings(workers=workers, share_of_processor=cores)
            with emulated_cluster(nodes=workers, cpus=cores):
                start = time.perf_counter()
                found = cluster.embed(path, source, out, BATCH, settings)
                seconds[f"Ray, workers: {workers}", many] = time.perf_counter() - start
            assert found.names == expected.names
            assert np.einsum("nd,nd->n", found.embeddings, expected.embeddings).min() > 0.99
    rates = {}
    for way in dict.fromkeys(way for way, _ in seconds):
        rate = (n - n // 4) / (seconds[way, n] - seconds[way, n // 4])
        rates[way] = Rate(rate, seconds[way, n] - n / rate)
    return rates


def measure_training(
    catalogue: Catalogue, root: Path, folder: Path, steps: int
) -> tuple[dict[str, float], dict[str, dict]]:
    """Photos per second, and validation mAP with its interval, of each way."""
    part = split_landmarks(catalogue, {"train": 0.9, "validation": 0.1}, seed=0)
    data = DataSettings(image_size=96, batch_size=32, seed=1)
    handler = DatasetHandler(catalogue, data, part == "train")
    held_back = DatasetHandler(catalogue, data, part == "validation")
    validation = held_back.photos(held_back.validation_triplets(400))
    settings = TrainingSettings(
        stages=(Stage("head", 6, steps, 3e-3), Stage("last-block", 3, steps, 5e-4)), patience=4
    )
    keras.utils.set_random_seed(1)
    network = {"backbone": "EfficientNetLite0", "weights": "packaged", "precision": fast_policy()}
    tower = build_tower(TowerSettings(image_size=96, **network))
    save_tower(tower, folder / "start.keras")
    cache = build_cache(tower.get_layer("trunk"), handler, folder / "features", 2)
    rates, maps = {}, {}
    for name, workers in {HERE: 0, "Ray, workers: 1": 1, "Ray, workers: 2": 2}.items():
        tower, run = load_tower(folder / "start.keras"), folder / f"run-{workers}"
        task = (tower, handler, validation, settings, run, cache)
        if workers:
            of_cluster = cluster.ClusterSettings(workers=workers)
            with emulated_cluster(nodes=workers):
                cluster.train(*task, of_cluster)
        else:
            train(*task)
        ends = [path.stat().st_mtime for path in sorted(run.glob("tensorboard/events*"))]
        photos = (len(ends) - 7) * steps * data.batch_size * 3
        rates[name] = photos / (ends[-1] - ends[6])
        anchors, positives = (embed(tower, validation[:, role]) for role in (0, 1))
        maps[name] = interval(average_precision(pair_hits(anchors, positives)))._asdict()
    return rates, maps


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cluster")
    parser.add_argument("--photos", type=int, default=2000, help="to embed")
    parser.add_argument("--steps", type=int, default=100, help="in an epoch of the training")
    options = parser.parse_args()
    root = project_root()
    make_demo_data(root)
    catalogue = open_catalogue(root / "Dataset" / "demo_world")
    (root / "runs").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root / "runs") as name:
        embedding = measure_embedding(catalogue, Path(name), options.photos)
        print(f"\n{options.photos} photos embedded, ResNet50 at 128 pixels, photos per second:")
        for way, (rate, start) in embedding.items():
            against = rate / embedding[HERE].per_second
            print(f"{way:<16} {rate:8.1f}   {against:5.2f}   after a start of {start:.1f} s")
        training, maps = measure_training(catalogue, root, Path(name), options.steps)
    print("\nthe last block trained, as in notebook 02, photos per second, and validation mAP:")
    for way, rate in training.items():
        found = maps[way]
        print(
            f"{way:<16} {rate:8.1f}   {rate / training[HERE]:5.2f}   {found['value']:.3f} "
            f"[{found['low']:.3f}, {found['high']:.3f}]"
        )
    result = {
        "embedding": {way: round(rate.per_second, 1) for way, rate in embedding.items()},
        "start": {way: round(rate.start, 1) for way, rate in embedding.items()},
        "training": {way: round(rate, 1) for way, rate in training.items()},
        "overhead": round(embedding[HERE].per_second / embedding["Ray, workers: 1"].per_second, 2),
        "val_map": maps,
        "precision": fast_policy(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
