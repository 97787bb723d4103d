"""Triplets in TFRecord shards, in the format of the Kaggle set: write, find, scan and read them.

A shard is a TFRecord file of ``tf.train.Example`` messages with three bytes features, each a JPEG
picture (https://www.kaggle.com/datasets/mattbast/google-landmarks-2020-tfrecords):

    shards = find_shards(Path("Dataset"))         # train00.tfrec ... train15.tfrec
    for triplet in read_triplets(shards[0]):      # raw bytes, in file order
        triplet.anchor, triplet.positive, triplet.negative
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # before TensorFlow is imported: it is chatty

import numpy as np
import pandas as pd
import tensorflow as tf
from tqdm import tqdm

from lib.storage import replacing, show_path

FEATURES = ("anchor_img", "positive_img", "negative_img")

HOW_TO_GET_THE_DATA = (
    "Get the shards train00.tfrec ... train15.tfrec from "
    "https://www.kaggle.com/datasets/mattbast/google-landmarks-2020-tfrecords "
    "(kaggle datasets download -d mattbast/google-landmarks-2020-tfrecords -p Dataset --unzip); "
    "Dataset/README.md says how to check them"
)


class DatasetNotFoundError(FileNotFoundError):
    """There are no shards where they were looked for."""


class RecordError(ValueError):
    """A shard can't be read; the message names the file, the record and what to do."""


class Triplet(NamedTuple):
    """One training example as stored: three JPEG files."""

    anchor: bytes
    positive: bytes
    negative: bytes

    @property
    def is_degenerate(self) -> bool:
        """Whether the positive is the anchor itself: distance 0 whatever the network does."""
        return self.anchor == self.positive


def find_shards(dataset_dir: Path, numbers: Iterable[int] | None = None) -> list[Path]:
    """List a folder's shards ``train<number>.tfrec`` by ascending number.

    Args:
        dataset_dir: the folder; its subfolders are not searched.
        numbers: which shards; all if None.

    Raises:
        DatasetNotFoundError: the folder, any shard, or one of the asked for numbers is missing.
    """
    dataset_dir = Path(dataset_dir)
    found = {
        int(match[1]): path
        for path in sorted(dataset_dir.glob("*.tfrec"))
        if (match := re.fullmatch(r"train(\d+)\.tfrec", path.name))
    }
    if not found:
        nested = sorted({show_path(p.parent) for p in dataset_dir.glob("*/train*.tfrec")})
        hint = f" (there are some in {', '.join(nested)})" if nested else ""
        raise DatasetNotFoundError(
            f"no train*.tfrec in {show_path(dataset_dir)}{hint}. {HOW_TO_GET_THE_DATA}."
        )
    numbers = sorted(found) if numbers is None else list(numbers)
    if missing := [n for n in numbers if n not in found]:
        names = ", ".join(f"train{n:02d}.tfrec" for n in missing)
        raise DatasetNotFoundError(
            f"{show_path(dataset_dir)} lacks {names}. {HOW_TO_GET_THE_DATA}."
        )
    return [found[n] for n in numbers]


def write_shard(path: Path, triplets: Iterable[Triplet]) -> int:
    """Write triplets to a shard, atomically; returns how many."""
    count = 0
    with replacing(path) as part, tf.io.TFRecordWriter(str(part)) as writer:
        for triplet in triplets:
            features = {
                name: tf.train.Feature(bytes_list=tf.train.BytesList(value=[picture]))
                for name, picture in zip(FEATURES, triplet, strict=True)
            }
            example = tf.train.Example(features=tf.train.Features(feature=features))
            writer.write(example.SerializeToString())
            count += 1
    return count


def count_records(shard: Path) -> int:
    """Count a shard's records, checking every checksum and the first record's features.

    It reads the file once, at the speed of the disk: a training run should fail over a damaged
    shard in its first seconds and not in its third hour.

    Raises:
        RecordError: not a TFRecord, cut off, damaged, empty, or without one of the features.
    """
    if shard.stat().st_size == 0:
        raise RecordError(f"{show_path(shard)} is empty (0 bytes): fetch this file again.")
    next(read_triplets(shard))
    try:
        count = tf.data.TFRecordDataset(str(shard)).reduce(np.int64(0), lambda n, _: n + 1)
    except tf.errors.DataLossError:
        for _ in read_triplets(shard):  # slower, but it says where
            pass
        raise
    return int(count)


def read_triplets(shard: Path) -> Iterator[Triplet]:
    """Read a shard's triplets as raw bytes, in file order.

    Raises:
        RecordError: a record is damaged, or is no Example with the three pictures.
    """
    number = 0
    records = iter(tf.data.TFRecordDataset(str(shard)))
    while True:
        try:
            record = next(records, None)
        except tf.errors.DataLossError as error:
            what = (
                "is no TFRecord file, or its first record is damaged"
                if number == 0
                else f"is cut off or damaged in record {number} (counted from 0)"
            )
            reason = error.message.partition(";")[0].partition(" [")[0]
            raise RecordError(
                f"{show_path(shard)} {what} ({reason}): fetch this file again."
            ) from None
        if record is None:
            return
        yield _parse(record.numpy(), shard, number)
        number += 1


def _parse(record: bytes, shard: Path, number: int) -> Triplet:
    where = f"{show_path(shard)}, record {number} (counted from 0)"
    try:
        features = tf.train.Example.FromString(record).features.feature
    except Exception as error:  # protobuf's DecodeError has no public name common to its versions
        raise RecordError(f"{where} is not a tf.train.Example: {error}") from None
    pictures = []
    for name in FEATURES:
        values = features[name].bytes_list.value if name in features else ()
        if len(values) != 1:
            raise RecordError(
                f"{where} has no picture {name!r}; its features are: "
                f"{', '.join(sorted(features)) or 'none'}. This project reads examples with the "
                f"bytes features {', '.join(FEATURES)}."
            )
        pictures.append(values[0])
    return Triplet(*pictures)


def survey(shards: Sequence[Path]) -> pd.DataFrame:
    """Count what the shards hold, comparing pictures by their bytes.

    Args:
        shards: files, in the order of their numbers.

    Returns:
        a row a shard, with the integer columns ``records``; ``degenerate`` (positive = anchor);
        ``positive is next anchor`` (so two neighbouring records show the same landmark);
        ``negative is an anchor`` (of any other record of these shards).

    Raises:
        RecordError: a shard can't be read to its end.
    """
    anchors: set[bytes] = set()
    negatives: list[list[bytes]] = []
    rows = []
    for shard in tqdm(shards, unit=" shards", leave=False):
        row = Counter(records=0, degenerate=0)
        row["positive is next anchor"] = 0
        negatives.append([])
        previous_positive = None
        for triplet in read_triplets(shard):
            anchor, positive, negative = (_digest(picture) for picture in triplet)
            row["records"] += 1
            row["degenerate"] += anchor == positive
            row["positive is next anchor"] += anchor == previous_positive
            previous_positive = None if anchor == positive else positive
            anchors.add(anchor)
            negatives[-1].append(negative)
        rows.append(row)
    table = pd.DataFrame(rows, index=[shard.name for shard in shards])
    table["negative is an anchor"] = [sum(n in anchors for n in shard) for shard in negatives]
    return table


def _digest(picture: bytes) -> bytes:
    return hashlib.blake2b(picture, digest_size=16).digest()
