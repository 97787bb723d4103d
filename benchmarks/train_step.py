"""How fast is a training step, without any cache?

    python -m benchmarks.train_step

Measures, in photos per second and interleaved in one run, at 128 pixels with the whole ResNet50:

* frozen, three towers: a Keras model that passes anchor, positive and negative through the network
  one after the other; only the head is trained;
* frozen, as here: all photos of the batch through :class:`lib.training.features.FrozenTrunk`, then
  a step of the head;
* whole, three towers: the same as the first, and the whole network is trained;
* whole, as here: all photos of the batch as one (:class:`lib.network.tower.Siamese`), the backbone
  in float32 and in mixed_bfloat16;
* input: reading, decoding and augmenting alone.

The processor's peak is the rate of a large float32 matrix product on all cores, in the same rounds.
What a step takes of it counts the multiplications and additions of convolutions and dense layers,
from their shapes, three times: forward, and backward to the inputs and to the weights.

Prints a table, and as its last line one JSON object with ``frozen_vs_three_towers``,
``whole_vs_three_towers`` (of the better precision), ``whole_share_of_peak`` and ``input_vs_frozen``
(above 1: training does not wait for its data).
"""

from __future__ import annotations

import json
import math
import os
import statistics
import time
from collections.abc import Callable

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from tqdm import tqdm

from lib.data.catalogue import open_catalogue
from lib.data.dataset import DatasetHandler, DataSettings
from lib.demo.data import make_demo_data
from lib.files import project_root
from lib.network.losses import MetricLoss, TripletLoss
from lib.network.mining import Stored
from lib.network.tower import Siamese, TowerSettings, build_tower
from lib.training.features import FrozenTrunk

SIZE, BATCH, STEPS, ROUNDS = 128, 32, 2, 5
LOSS = TripletLoss(mining=Stored())
PEAK = 2048  # rows and columns of the matrices whose product is the processor's peak

FROZEN, WHOLE = "frozen, three towers", "whole, three towers"


def new_tower(precision: str = "float32") -> keras.Model:
    """The whole network, with random weights."""
    return build_tower(TowerSettings(image_size=SIZE, weights="", precision=precision))


def three_towers(trainable: bool) -> keras.Model:
    """The usual way: the tower called once for each photo of the triplet."""
    tower = new_tower()
    tower.get_layer("trunk").trainable = trainable
    triplets = keras.Input((3, SIZE, SIZE, 3), dtype="uint8")
    embeddings = keras.ops.stack([tower(triplets[:, role]) for role in range(3)], axis=1)
    model = keras.Model(triplets, embeddings)
    model.compile(keras.optimizers.Adam(1e-4), loss=MetricLoss(LOSS))
    return model


def siamese(tower: keras.Model) -> Siamese:
    """Our way: one batch of all photos."""
    model = Siamese(tower, MetricLoss(LOSS))
    model.compile(keras.optimizers.Adam(1e-4), jit_compile=False)
    return model


def frozen_step() -> Callable:
    """A step of the head on maps that OpenVINO, or whatever is fastest, has just computed."""
    tower = new_tower()
    trunk, model = FrozenTrunk(tower.get_layer("trunk")), siamese(tower.get_layer("head"))

    def step(photos, groups):
        maps = trunk(photos.reshape(-1, SIZE, SIZE, 3))
        return model.train_on_batch(maps.reshape(*groups.shape, *maps.shape[1:]), groups)

    return step


def operations(model: keras.Model) -> int:
    """Multiplications and additions of a forward pass of one photo."""
    total = 0
    for layer in model.layers:
        if isinstance(layer, keras.Model):
            total += operations(layer)
        elif hasattr(layer, "kernel"):
            # Every place of the output is a product with the whole kernel.
            total += 2 * math.prod(layer.kernel.shape) * math.prod(layer.output.shape[1:-1])
    return total


def matrix_product() -> Callable[[], float]:
    """Multiplies large matrices; returns operations per second."""
    a = keras.ops.ones((PEAK, PEAK))

    def rate() -> float:
        start = time.perf_counter()
        for _ in range(10):
            product = keras.ops.matmul(a, a)
        np.asarray(product[0, 0])  # done by now
        return 10 * 2 * PEAK**3 / (time.perf_counter() - start)

    return rate


def input_rate(handler: DatasetHandler, epoch: int) -> float:
    """Photos per second of the training batches, as they are and no more."""
    steps = 20 * STEPS
    batches = iter(handler.training_batches(epoch, steps + 1).as_tf_data())
    next(batches)  # fills the buffers
    start = time.perf_counter()
    for _ in batches:
        pass
    return steps * 3 * BATCH / (time.perf_counter() - start)


def step_rate(step: Callable, batch: tuple[np.ndarray, np.ndarray]) -> float:
    """Photos per second of a training step."""
    start = time.perf_counter()
    for _ in range(STEPS):
        step(*batch)
    return STEPS * 3 * BATCH / (time.perf_counter() - start)


def main() -> None:
    """Measure and print."""
    root = project_root()
    make_demo_data(root)
    catalogue = open_catalogue(root / "Dataset" / "demo_world")
    handler = DatasetHandler(catalogue, DataSettings(SIZE, BATCH))
    batch = handler.training_batches(0, 1)[0]
    steps = {
        FROZEN: three_towers(trainable=False).train_on_batch,
        "frozen, as here": frozen_step(),
        WHOLE: three_towers(trainable=True).train_on_batch,
        "whole, as here, float32": siamese(new_tower()).train_on_batch,
        "whole, as here, mixed_bfloat16": siamese(new_tower("mixed_bfloat16")).train_on_batch,
    }
    multiply = matrix_product()
    multiply()
    for step in steps.values():
        step(*batch)  # compiles
    rates = {name: [] for name in [*steps, "input"]}
    peaks = []
    for round_ in tqdm(range(ROUNDS), unit=" rounds"):
        for name, step in steps.items():
            rates[name].append(step_rate(step, batch))
        rates["input"].append(input_rate(handler, round_))
        peaks.append(multiply())

    median = {name: statistics.median(r) for name, r in rates.items()}
    peak, per_photo = statistics.median(peaks), 3 * operations(new_tower())
    print(
        f"{SIZE} px, whole ResNet50, batches of {BATCH} triplets, median of {ROUNDS} rounds\n"
        f"a photo, forward and backward: {per_photo / 1e9:.1f} GFLOP; float32 matrix product: "
        f"{peak / 1e9:.0f} GFLOP/s"
    )
    print(f"{'':<31} photos/s   slowest - fastest   vs three towers   of peak")
    for name, r in rates.items():
        row = f"{name:<31} {median[name]:8.1f}   {min(r):7.1f} - {max(r):<7.1f}"
        if name in steps:
            row += f"   {median[name] / median[FROZEN if 'frozen' in name else WHOLE]:15.2f}"
        if "whole" in name:
            row += f"   {median[name] * per_photo / peak:7.2f}"
        print(row)
    best = max((name for name in steps if "whole, as here" in name), key=median.get)
    result = {
        "frozen_vs_three_towers": median["frozen, as here"] / median[FROZEN],
        "whole_vs_three_towers": median[best] / median[WHOLE],
        "whole_share_of_peak": median[best] * per_photo / peak,
        "input_vs_frozen": median["input"] / median["frozen, as here"],
    }
    print(json.dumps({name: round(value, 3) for name, value in result.items()}))


if __name__ == "__main__":
    main()
