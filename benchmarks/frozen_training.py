"""How much faster does a head train from cached feature maps, and in how much memory?

    python -m benchmarks.frozen_training

Trains the head (GeM's p and the projection) of a frozen ResNet50 with random weights on the demo
world's triplets, for 20 epochs:

* cached: :func:`lib.training.features.build_cache`, with two variants of each picture, then all
  epochs from it. The time is all of it, from the first photo decoded to the last step;
* naive: a Keras model that passes anchor, positive and negative through the frozen network one
  after the other, in every step of every epoch. Its rate does not change, so it is measured over
  some steps (before, between and after those of the other) and extrapolated to 20 epochs.

Each of them is a process of its own; one waits while the other works. Prints a table, and as its
last line one JSON object with ``vs_naive``: how many times as fast the whole training is. Memory is
the most that was resident of a process, and the most that it had taken for itself: without the
files of the cache, which are mapped and leave when their room is needed (known on Linux alone).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np

from benchmarks.memory import OwnMemory, memory_gb
from lib.data.catalogue import open_catalogue, split_landmarks
from lib.data.dataset import DatasetHandler, DataSettings
from lib.demo.data import make_demo_data
from lib.files import project_root
from lib.network.losses import MetricLoss, TripletLoss
from lib.network.mining import Stored
from lib.network.tower import Siamese, TowerSettings, build_tower
from lib.training.features import FrozenTrunk, build_cache

SIZE, BATCH, VARIANTS = 128, 64, 2
LOSS = TripletLoss(mining=Stored())
NAIVE_STEPS = 6  # at a time
PARTS = 4  # of our epochs, with some naive steps after each


def open_handler(share: float) -> DatasetHandler:
    """Serves a share of the demo world's landmarks."""
    catalogue = open_catalogue(project_root() / "Dataset" / "demo_world")
    part = split_landmarks(catalogue, {"used": share, "not": 1 - share}, seed=0)
    return DatasetHandler(catalogue, DataSettings(SIZE, BATCH), part == "used")


def steps_per_epoch(handler: DatasetHandler) -> int:
    """So many batches have all triplets once."""
    return max(len(handler.triplets) // BATCH, 1)


def train_cached(handler: DatasetHandler, epochs: int) -> Iterator[dict]:
    """Our way, in parts: what was done, and the seconds it took."""
    tower = build_tower(TowerSettings(image_size=SIZE, weights=""))
    trunk, steps = tower.get_layer("trunk"), steps_per_epoch(handler)
    runs = project_root() / "runs"
    runs.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="features-", dir=runs) as folder:
        yield {"engine": FrozenTrunk(trunk).name}
        start = time.perf_counter()
        cache = build_cache(trunk, handler, Path(folder), VARIANTS)
        yield {"building": time.perf_counter() - start, "bytes": cache.bytes}
        siamese = Siamese(tower.get_layer("head"), MetricLoss(LOSS))
        siamese.compile(keras.optimizers.Adam(1e-3))
        for part in np.array_split(range(epochs), min(PARTS, epochs)):
            start = time.perf_counter()
            for epoch in part.tolist():
                siamese.fit(cache.batches(epoch, steps), shuffle=False, verbose=0)
            yield {"training": time.perf_counter() - start}


def train_naive(handler: DatasetHandler) -> Iterator[dict]:
    """Three passes of full photos in every step: seconds for some triplets, again and again."""
    tower = build_tower(TowerSettings(image_size=SIZE, weights=""))
    tower.get_layer("trunk").trainable = False
    triplets = keras.Input((3, SIZE, SIZE, 3), dtype="uint8")
    embeddings = keras.ops.stack([tower(triplets[:, role]) for role in range(3)], axis=1)
    model = keras.Model(triplets, embeddings)
    model.compile(keras.optimizers.Adam(1e-3), loss=MetricLoss(LOSS))
    batches = handler.training_batches
    model.fit(batches(0, 2).as_tf_data(), shuffle=False, verbose=0)  # compiles
    epoch = 0
    while True:
        epoch += 1
        start = time.perf_counter()
        model.fit(batches(epoch, NAIVE_STEPS).as_tf_data(), shuffle=False, verbose=0)
        yield {"training": time.perf_counter() - start, "triplets": NAIVE_STEPS * BATCH}


def serve(side: str, share: float, epochs: int, connection) -> None:
    """In a process of its own: does one part of the work each time it is asked to."""
    own = OwnMemory()
    own.start()
    handler = open_handler(share)
    parts = train_cached(handler, epochs) if side == "cached" else train_naive(handler)
    while connection.recv():
        part = next(parts, None)
        connection.send(part and part | {"peak": memory_gb("VmHWM"), "own": own.most})
    parts.close()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.frozen_training")
    parser.add_argument("--share", type=float, default=0.9, help="of the demo world's landmarks")
    parser.add_argument("--epochs", type=int, default=20)
    options = parser.parse_args()
    make_demo_data(project_root())
    handler = open_handler(options.share)

    context = multiprocessing.get_context("spawn")
    ends, processes = {}, []
    for side in ("cached", "naive"):
        ends[side], other = context.Pipe()
        work = (side, options.share, options.epochs, other)
        processes.append(context.Process(target=serve, args=work, daemon=True))
        processes[-1].start()
        other.close()

    def ask(side: str) -> dict | None:
        ends[side].send(True)
        return ends[side].recv()

    cached, naive = [ask("cached")], [ask("naive")]
    while part := ask("cached"):
        cached.append(part)
        naive.append(ask("naive"))
    for end in ends.values():
        end.send(False)
    for process in processes:
        process.join()

    building = sum(part.get("building", 0) for part in cached)
    training = sum(part.get("training", 0) for part in cached)
    triplets = steps_per_epoch(handler) * BATCH * options.epochs
    rates = [part["triplets"] / part["training"] for part in naive]
    naive_rate = sum(part["triplets"] for part in naive) / sum(part["training"] for part in naive)
    ours_rate = triplets / (building + training)
    engine, size = cached[0]["engine"], max(part.get("bytes", 0) for part in cached) / 1e9
    last = {"cached": cached[-1], "naive": naive[-1]}

    print(
        f"\n{options.epochs} epochs of {triplets // options.epochs} triplets, {SIZE} px, whole "
        f"ResNet50, batches of {BATCH}\ncached: {building:.0f} s for {size:.2f} GB of maps "
        f"({VARIANTS} variants, {engine}), {training:.0f} s for the epochs\nnaive: measured over "
        f"{len(naive)} x {NAIVE_STEPS} steps, {min(rates):.1f} to {max(rates):.1f} triplets/s"
    )
    print(f"\n{'':<8} triplets/s   seconds in all   memory: peak      own")
    for side, rate in (("cached", ours_rate), ("naive", naive_rate)):
        print(
            f"{side:<8} {rate:10.1f}   {triplets / rate:14.0f}   {last[side]['peak']:9.2f} GB"
            f"   {last[side]['own']:.2f} GB"
        )
    result = {
        "vs_naive": round(ours_rate / naive_rate, 2),
        "cached_triplets_per_second": round(ours_rate, 1),
        "naive_triplets_per_second": round(naive_rate, 1),
        "epochs_alone_triplets_per_second": round(triplets / training, 1),
        "building_seconds": round(building, 1),
        "cache_gb": round(size, 3),
        "engine": engine,
    }
    for side, memory in last.items():
        result |= {f"{side}_memory_{kind}_gb": round(memory[kind], 2) for kind in ("peak", "own")}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
