"""Is one batch of 3n worth it, and does training wait for its data?

    python -m benchmarks.siamese_step

Measures, in photos per second and interleaved in one run, on the demo's settings:

* one: a training step with anchor, positive and negative as one batch of 3n (the project's way);
* three: the same through three passes of the tower over n photos each;
* input: reading, decoding, resizing and augmenting alone.

Prints a table, and as its last line one JSON object with ``one_vs_three`` (above 1: one batch is
faster) and ``input_vs_one`` (above 1: training does not wait for its data).
"""

from __future__ import annotations

import json
import statistics
import time

import keras
import numpy as np

from lib.dataset import DatasetHandler, DataSettings
from lib.demo_data import make_demo_data
from lib.landmarks import open_catalogue
from lib.losses import TripletLoss
from lib.model import TowerSettings, build_siamese, build_tower
from lib.storage import project_root

IMAGE_SIZE, BATCH, STEPS, ROUNDS = 32, 32, 12, 5


def three_passes(tower: keras.Model) -> keras.Model:
    """The Siamese model as three calls of the tower, for comparison."""
    triplets = keras.Input((3, *tower.input_shape[1:]), dtype="uint8")
    return keras.Model(
        triplets, keras.ops.stack([tower(triplets[:, role]) for role in range(3)], axis=1)
    )


def seconds_per_step(model: keras.Model, batch: tuple[np.ndarray, np.ndarray]) -> float:
    """Mean time of a training step, the first (which compiles) not counted."""
    model.train_on_batch(*batch)
    start = time.perf_counter()
    for _ in range(STEPS):
        model.train_on_batch(*batch)
    return (time.perf_counter() - start) / STEPS


def seconds_per_batch(handler: DatasetHandler, epoch: int) -> float:
    """Mean time to serve a training batch, the first (which fills the buffers) not counted."""
    batches = iter(handler.training_batches(epoch, 10 * STEPS).as_tf_data())
    next(batches)
    start = time.perf_counter()
    served = sum(1 for _ in batches)
    return (time.perf_counter() - start) / served


def main() -> None:
    """Measure and print."""
    root = project_root()
    make_demo_data(root)
    catalogue = open_catalogue(root / "Dataset" / "demo_world")
    handler = DatasetHandler(catalogue, DataSettings(image_size=IMAGE_SIZE, batch_size=BATCH))
    batch = handler.training_batches(0, 1)[0]
    settings = TowerSettings(image_size=IMAGE_SIZE, last_stage=3, weights="")
    models = {
        "one": build_siamese(build_tower(settings)),
        "three": three_passes(build_tower(settings)),
    }
    for model in models.values():
        model.compile(keras.optimizers.Adam(), loss=TripletLoss(mining="soft"))
    times = {"one": [], "three": [], "input": []}
    for round_ in range(ROUNDS):
        for name, model in models.items():
            times[name].append(seconds_per_step(model, batch))
        times["input"].append(seconds_per_batch(handler, round_))
    rate = {name: 3 * BATCH / statistics.median(t) for name, t in times.items()}

    print(f"{'':<8} photos/s   slowest - fastest round")
    for name, t in times.items():
        print(f"{name:<8} {rate[name]:8.0f}   {3 * BATCH / max(t):.0f} - {3 * BATCH / min(t):.0f}")
    result = {f"{name}_photos_per_second": round(value, 1) for name, value in rate.items()}
    result["one_vs_three"] = round(rate["one"] / rate["three"], 3)
    result["input_vs_one"] = round(rate["input"] / rate["one"], 3)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
