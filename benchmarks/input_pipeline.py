"""Does the input pipeline keep up with the JPEG decoder, and does its memory stay flat?

    python -m benchmarks.input_pipeline

Measures, in photos per second and interleaved in one run, on the demo world's records:

* bare: ``tf.io.decode_jpeg`` of the same bytes, held in memory, in all threads, and nothing else;
* ours: read by the catalogue, decoded, batched (as a tf.data.Dataset, and as a PyDataset);
* ours, augmented: the same with shift, contrast and brightness drawn for each photo;
* naive: a tf.data pipeline as it is usually written for this data: records in file order, each
  triplet decoded, resized and augmented (likewise) by itself in floats, then batched.

Then it serves one epoch of 200,000 records, and prints the process's memory on the way (on Linux).
Prints tables, and as its last line one JSON object with ``vs_bare_decode``,
``vs_bare_decode_augmented`` and ``vs_naive`` (augmented against the naive one, which augments too).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import tensorflow as tf
from tqdm import tqdm

from benchmarks.memory import memory_gb
from lib.data.catalogue import open_catalogue
from lib.data.dataset import Batches, DatasetHandler, DataSettings
from lib.data.decoding import Augmentation
from lib.data.records import FEATURES, read_picture
from lib.demo.data import make_demo_data
from lib.files import project_root

SIZE, BATCH, STEPS, ROUNDS = 128, 64, 75, 7  # size and batch of profiles/gldv2.yaml
THREADS = os.cpu_count() or 1
EPOCH_RECORDS = 200_000


def options() -> tf.data.Options:
    """Settings of all tf.data pipelines here: no tuner, the number of threads is given."""
    options = tf.data.Options()
    options.autotune.enabled = False
    return options


def bare(jpegs: list[bytes]) -> tf.data.Dataset:
    """Decode and throw away; 16 to a call, so that next to nothing but the decoder costs time."""

    def decode(chunk):
        return tf.add_n([tf.size(tf.io.decode_jpeg(chunk[i], channels=3)) for i in range(16)])

    chunks = tf.reshape(tf.constant(jpegs), (-1, 16))
    return (
        tf.data.Dataset.from_tensor_slices(chunks)
        .map(decode, num_parallel_calls=THREADS, deterministic=False)
        .prefetch(8)
        .with_options(options())
    )


def naive(shards: list[str], triplets: int) -> tf.data.Dataset:
    """The usual way: per triplet, in floats, augmentation before batching."""
    features = {name: tf.io.FixedLenFeature((), tf.string) for name in FEATURES}

    def shifted(photo):
        """The photo moved by up to 5 %, mirrored at its edge, as Keras' RandomTranslation does."""
        x, y = tf.unstack(tf.random.uniform((2,), -0.05 * SIZE, 0.05 * SIZE))
        return tf.raw_ops.ImageProjectiveTransformV3(
            images=photo[None],
            transforms=tf.stack([1.0, 0.0, x, 0.0, 1.0, y, 0.0, 0.0])[None],
            output_shape=(SIZE, SIZE),
            fill_value=0.0,
            interpolation="BILINEAR",
            fill_mode="REFLECT",
        )[0]

    def load(record):
        pictures = tf.io.parse_single_example(record, features)
        photos = []
        for name in FEATURES:
            photo = tf.image.convert_image_dtype(
                tf.io.decode_jpeg(pictures[name], channels=3), tf.float32
            )
            photo = tf.image.resize(photo, (SIZE, SIZE))
            photo = shifted(photo)
            photo = tf.image.random_brightness(photo, 0.15)
            photo = tf.image.random_contrast(photo, 0.8, 1.2)
            photos.append(tf.clip_by_value(photo, 0.0, 1.0))
        return tuple(photos)

    return (
        tf.data.TFRecordDataset(shards)
        .take(triplets)
        .shuffle(1024)
        .map(load, num_parallel_calls=THREADS)
        .batch(BATCH)
        .prefetch(2)
        .with_options(options())
    )


def seconds(pipeline) -> float:
    """Time to run through a pipeline and drop what it gives."""
    start = time.perf_counter()
    for _ in pipeline:
        pass
    return time.perf_counter() - start


def by_threads(batches: Batches):
    """What Keras does with a PyDataset: threads make batches, a few ahead of the consumer."""
    with ThreadPoolExecutor(THREADS) as pool:
        waiting = deque()
        for step in range(len(batches)):
            waiting.append(pool.submit(batches.__getitem__, step))
            if len(waiting) > 2 * THREADS:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.input_pipeline")
    parser.add_argument("--records", type=int, default=EPOCH_RECORDS, help="of the long epoch")
    epoch_records = parser.parse_args().records

    root = project_root()
    make_demo_data(root)
    catalogue = open_catalogue(root / "Dataset" / "demo_world")
    plain = DatasetHandler(catalogue, DataSettings(SIZE, BATCH, augmentation=None))
    varied = DatasetHandler(catalogue, DataSettings(SIZE, BATCH, augmentation=Augmentation()))
    photos = 3 * BATCH * STEPS
    jpegs = [
        bytes(read_picture(catalogue.places[p])) for p in plain.training_batches(0, STEPS).plan.flat
    ]
    shards = [str(shard) for shard in catalogue.shards]
    pipelines = {
        "bare decode_jpeg": lambda r: bare(jpegs),
        "ours, tf.data": lambda r: plain.training_batches(r, STEPS).as_tf_data(),
        "ours, PyDataset": lambda r: by_threads(plain.training_batches(r, STEPS)),
        "ours, tf.data, augmented": lambda r: varied.training_batches(r, STEPS).as_tf_data(),
        "ours, PyDataset, augmented": lambda r: by_threads(varied.training_batches(r, STEPS)),
        "naive, augmented": lambda r: naive(shards, BATCH * STEPS),
    }
    rates = {name: [] for name in pipelines}
    for round_ in tqdm(range(ROUNDS + 1), unit=" rounds"):
        for name, make in pipelines.items():
            rate = photos / seconds(make(round_))
            if round_:  # the first warms up
                rates[name].append(rate)

    median = {name: statistics.median(r) for name, r in rates.items()}
    print(f"{SIZE} px, {THREADS} threads, median of {ROUNDS} rounds")
    print(f"{'':<28} photos/s   slowest - fastest   of bare decode")
    for name, r in rates.items():
        share = median[name] / median["bare decode_jpeg"]
        print(f"{name:<28} {median[name]:8.0f}   {min(r):7.0f} - {max(r):<7.0f}   {share:6.2f}")

    print(f"\nmemory over an epoch of {epoch_records} records, {SIZE} px, augmented")
    steps = epoch_records // BATCH
    marks = {round(steps * share) for share in (0.1, 0.25, 0.5, 0.75, 1.0)}
    memory = []
    batches = varied.training_batches(0, steps).as_tf_data()
    for step, _ in enumerate(tqdm(batches, total=steps, unit=" batches"), start=1):
        if step in marks:
            memory.append(1000 * memory_gb("RssAnon"))
            tqdm.write(f"{step * BATCH:>8} records  {memory[-1]:6.0f} MB")

    result = {
        "vs_bare_decode": median["ours, tf.data"] / median["bare decode_jpeg"],
        "vs_bare_decode_augmented": median["ours, tf.data, augmented"] / median["bare decode_jpeg"],
        "vs_naive": median["ours, tf.data, augmented"] / median["naive, augmented"],
        "pydataset_vs_bare_decode": median["ours, PyDataset"] / median["bare decode_jpeg"],
        "pydataset_vs_bare_decode_augmented": median["ours, PyDataset, augmented"]
        / median["bare decode_jpeg"],
        "memory_growth": memory[-1] / memory[0],
    }
    print(json.dumps({name: round(value, 3) for name, value in result.items()}))


if __name__ == "__main__":
    main()
