"""DatasetHandler: triplets from TFRecord shards to batches of pixels, through tf.data.

    handler = DatasetHandler(find_shards(Path("Dataset"), range(12)), DataSettings(image_size=128))
    for triplets, _ in handler.training_batches(epoch=0, steps=100):
        ...                                       # uint8 (batch, 3, 128, 128, 3), RGB
    print(handler.tally)                          # what was read, and what was left out

Axis 1 is anchor, positive, negative. Pixels stay uint8 RGB from 0 to 255: the backbone's own
preprocessing is a part of the network.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from lib.records import FEATURES, Triplet, count_records, read_triplets

if keras.backend.backend() != "tensorflow":
    tf.config.set_visible_devices([], "GPU")  # the network is another framework's, so is the GPU

_RECORDS_AT_ONCE = 256  # parsed together: one call for many records

# The number of threads is set here rather than tuned by TensorFlow: its tuner works in a thread
# that the end of an epoch waits for, which took up to 20 seconds each time.
_THREADS = os.cpu_count() or 1
_NO_TUNING = tf.data.Options()
_NO_TUNING.autotune.enabled = False


@dataclass(frozen=True)
class DataSettings:
    """How triplets become batches.

    Attributes:
        image_size: side in pixels that the photos are resized to.
        batch_size: triplets in a batch (three times as many photos).
        shuffle_buffer: records held to draw the next one from. Records of one landmark stand side
            by side in a shard and should not meet in a batch, so it should be large.
        augment: whether training photos are varied at random.
        seed: of order and augmentation.
    """

    image_size: int = 128
    batch_size: int = 64
    shuffle_buffer: int = 4096
    augment: bool = True
    seed: int = 0


@dataclass(frozen=True)
class Tally:
    """What happened to the records of a pass so far.

    Attributes:
        read: records read.
        degenerate: left out because their positive is the anchor itself.
        undecodable: left out because a picture is missing or does not decode.
    """

    read: int = 0
    degenerate: int = 0
    undecodable: int = 0

    def __str__(self) -> str:
        return (
            f"{self.read} records read, {self.degenerate} left out because positive = anchor, "
            f"{self.undecodable} because a picture does not decode"
        )


class DatasetHandler:
    """Serves the triplets of some shards.

    Every record is used but the degenerate (positive = anchor: whatever the network does, their
    distance is 0) and those with a picture that does not decode; ``tally`` counts both.

    Args:
        shards: the files, as :func:`lib.records.find_shards` lists them.
        settings: see :class:`DataSettings`.

    Raises:
        RecordError: a shard is no TFRecord, is cut off or damaged, or its first record lacks a
            picture.
    """

    def __init__(self, shards: Sequence[Path], settings: DataSettings):
        self.shards = [Path(shard) for shard in shards]
        self.settings = settings
        self.records = sum(count_records(shard) for shard in self.shards)
        self.tally = Tally()

    def training_batches(self, epoch: int, steps: int) -> tf.data.Dataset:
        """The batches of one epoch, shuffled and augmented.

        Order and augmentation follow from (seed, epoch) alone, so an interrupted training can go on
        with the epoch it was in.

        Args:
            epoch: number of the epoch.
            steps: how many batches; past the last record they go on from the first in a new order.

        Returns:
            a dataset of pairs: uint8 (batch_size, 3, s, s, 3), and the targets that Keras wants to
            see, zeros (batch_size,) (a triplet's one label is the order of its photos). Shorter
            than ``steps``, or empty, if more than three of four records had to be left out.
        """
        settings = self.settings
        seed = int(np.random.SeedSequence([settings.seed, epoch]).generate_state(1)[0])
        order = np.random.default_rng(seed).permutation(len(self.shards))
        names = [str(self.shards[i]) for i in order]
        needed = steps * settings.batch_size
        # Enough passes even if three of four records are left out, but not without end.
        passes = 2 + 4 * needed // max(self.records, 1)
        targets = tf.zeros(settings.batch_size)
        batches = (
            tf.data.TFRecordDataset(names, num_parallel_reads=min(len(names), 16))
            .shuffle(settings.shuffle_buffer, seed=seed)
            .repeat(passes)
            .enumerate()
            .batch(_RECORDS_AT_ONCE)
            .scan(np.int64(0), _parse)
            .unbatch()
            .filter(lambda number, degenerate, pictures: pictures[0] != pictures[1])
            .map(self._decode_numbered, num_parallel_calls=_THREADS)
            .ignore_errors()
            .batch(settings.batch_size, drop_remainder=True)
            .enumerate()
            .map(self._count)
            .take(steps)
        )
        if settings.augment:
            # One call at a time: the layers draw from one random state, in a fixed order.
            batches = batches.map(make_augmentation(seed))
        batches = batches.map(lambda triplets: (triplets, targets)).prefetch(4)
        return batches.with_options(_NO_TUNING)

    def _decode_numbered(self, number, degenerate, pictures):
        return number, degenerate, decode_triplet(pictures, self.settings.image_size)

    def _count(self, batch, numbered):
        """Note the tally. The last triplet of a batch tells how many records came before it."""
        numbers, degenerate, triplets = numbered

        def note(batch: np.ndarray, number: np.ndarray, degenerate: np.ndarray) -> np.int32:
            used, read = (int(batch) + 1) * self.settings.batch_size, int(number) + 1
            self.tally = Tally(read, int(degenerate), read - int(degenerate) - used)
            return np.int32(0)

        noted = tf.numpy_function(note, [batch, numbers[-1], degenerate[-1]], tf.int32)
        with tf.control_dependencies([noted]):
            return tf.identity(triplets)

    def validation_triplets(self, limit: int) -> np.ndarray:
        """The first usable triplets, one of a landmark, as they are stored: no augmentation.

        The shards hold up to two records a landmark, side by side. So records that are at least two
        places apart show different landmarks, and each anchor has one positive among those of all.

        Args:
            limit: at most this many.

        Returns:
            uint8 (n, 3, s, s, 3).
        """
        chosen, last_chosen, tally = [], -2, Tally()
        for position, triplet in enumerate(self.stored_triplets()):
            tally = replace(tally, read=position + 1)
            if triplet.is_degenerate:
                tally = replace(tally, degenerate=tally.degenerate + 1)
                continue
            try:
                pixels = decode_triplet(tf.constant(triplet), self.settings.image_size)
            except tf.errors.InvalidArgumentError:
                tally = replace(tally, undecodable=tally.undecodable + 1)
                continue
            if position - last_chosen >= 2:
                chosen.append(pixels)
                last_chosen = position
            if len(chosen) == limit:
                break
        self.tally = tally
        size = self.settings.image_size
        return np.asarray(chosen, dtype=np.uint8).reshape(-1, 3, size, size, 3)

    def stored_triplets(self) -> Iterator[Triplet]:
        """All triplets as raw bytes, in the order of the shards, nothing left out."""
        return chain.from_iterable(read_triplets(shard) for shard in self.shards)


def _parse(degenerate_before, chunk):
    """Parse a chunk of numbered records, and go on counting those with positive = anchor."""
    numbers, records = chunk
    # A missing picture becomes an empty one, which does not decode, and is counted as such.
    features = {name: tf.io.FixedLenFeature((), tf.string, default_value="") for name in FEATURES}
    parsed = tf.io.parse_example(records, features)
    pictures = tf.stack([parsed[name] for name in FEATURES], axis=1)
    same = tf.cast(pictures[:, 0] == pictures[:, 1], tf.int64)
    degenerate = degenerate_before + tf.cumsum(same)
    return degenerate[-1], (numbers, degenerate, pictures)


def decode_triplet(pictures, image_size: int):
    """Decode three JPEG pictures: string (3,) -> uint8 (3, image_size, image_size, 3) RGB.

    Raises:
        tf.errors.InvalidArgumentError: one of them is no picture.
    """
    return tf.stack([_decode(pictures[i], image_size) for i in range(len(FEATURES))])


def _decode(picture, image_size: int):
    # The accurate inverse DCT: as other decoders have it, so that a photo read from a folder gets
    # the same pixels as the same photo in a shard.
    pixels = tf.io.decode_jpeg(picture, channels=3, dct_method="INTEGER_ACCURATE")

    def resized():
        small = tf.image.resize(pixels, (image_size, image_size), "bicubic", antialias=True)
        return tf.saturate_cast(tf.round(small), tf.uint8)

    fits = tf.reduce_all(tf.shape(pixels)[:2] == image_size)
    return tf.ensure_shape(tf.cond(fits, lambda: pixels, resized), (image_size, image_size, 3))


def make_augmentation(seed: int) -> Callable[[tf.Tensor], tf.Tensor]:
    """Small random variations of training photos, drawn for each photo by itself.

    Shifts and zoom stand for where the photographer stood, brightness and contrast for the light.
    No mirroring: a mirrored building is another building.

    Returns:
        a function uint8 (n, 3, s, s, 3) -> uint8 (n, 3, s, s, 3).
    """
    layers = keras.layers
    pixels = {"value_range": (0, 255)}
    steps = [
        layers.RandomTranslation(0.05, 0.05, fill_mode="reflect", seed=seed + 1),
        layers.RandomZoom(0.1, fill_mode="reflect", seed=seed + 2),
        layers.RandomBrightness(0.15, **pixels, seed=seed + 3),
        layers.RandomContrast(0.2, **pixels, seed=seed + 4),
    ]

    def augment(triplets):
        shape = tf.shape(triplets)
        photos = tf.cast(tf.reshape(triplets, (-1, *triplets.shape[2:])), tf.float32)
        for step in steps:
            photos = step(photos, training=True)
        photos = tf.clip_by_value(tf.round(photos), 0, 255)
        return tf.ensure_shape(tf.reshape(tf.cast(photos, tf.uint8), shape), triplets.shape)

    return augment
