"""Reads and writes triplets in TFRecord shards, in the format of the Kaggle set.

A record is a ``tf.train.Example`` with three bytes features, each a JPEG picture
(https://www.kaggle.com/datasets/mattbast/google-landmarks-2020-tfrecords):

    shards = find_shards(Path("Dataset"))         # train00.tfrec ... train15.tfrec
    for triplet in read_triplets(shards[0]):      # raw bytes, in file order
        triplet.anchor, triplet.positive, triplet.negative

Optional features are ``image/id`` and ``landmark_id`` with three values each (:class:`Triplet`).

This module does without TensorFlow, so that it starts fast and serves every Keras backend. The
frame of a record (https://www.tensorflow.org/tutorials/load_data/tfrecord) is the message's length
in 8 bytes, their checksum in 4 bytes, the message, and its checksum in 4 bytes.
"""

from __future__ import annotations

import mmap
import re
import struct
from collections.abc import Iterable, Iterator
from functools import cache, lru_cache
from pathlib import Path
from typing import NamedTuple

import google_crc32c
import xxhash
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format
from google.protobuf.message import DecodeError

from lib.files import replacing, show_name, show_path

FEATURES = ("anchor_img", "positive_img", "negative_img")
IMAGE_ID, LANDMARK_ID = "image/id", "landmark_id"

HOW_TO_GET_THE_DATA = (
    "Get the shards train00.tfrec ... train15.tfrec from "
    "https://www.kaggle.com/datasets/mattbast/google-landmarks-2020-tfrecords: "
    "python -m tools.download fetches and checks them, Dataset/README.md says more"
)

_HEADER = struct.Struct("<QI")  # length of the message, checksum of these 8 bytes
_FOOTER = struct.Struct("<I")  # checksum of the message
_FRAME = _HEADER.size + _FOOTER.size  # bytes that a record has besides its message
_NOT_ZERO = re.compile(rb"[^\0]")
_HOLE = 12  # no record begins with so many zero bytes


class DatasetNotFoundError(FileNotFoundError):
    """The folder lacks shards."""


class RecordError(ValueError):
    """A record can't be used: ``kind`` names the problem, ``detail`` has the particulars."""

    def __init__(self, kind: str, detail: str, where: str = ""):
        super().__init__(f"{where}: {kind} ({detail})" if where else f"{kind} ({detail})")
        self.kind, self.detail = kind, detail


class Triplet(NamedTuple):
    """One training example.

    Attributes:
        anchor, positive, negative: JPEG files.
        image_ids: names of the three photos; () if the shard has none, like Kaggle's.
        landmark_ids: names of their landmarks, or ().
    """

    anchor: bytes
    positive: bytes
    negative: bytes
    image_ids: tuple[str, ...] = ()
    landmark_ids: tuple[str, ...] = ()

    @property
    def pictures(self) -> tuple[bytes, bytes, bytes]:
        """Anchor, positive and negative."""
        return self[:3]


class Frame(NamedTuple):
    """Where a record lies in its shard; offset and length are in bytes."""

    number: int  # from 0
    offset: int  # of the frame
    length: int | None  # of the message; None if the frame is damaged

    @property
    def message_offset(self) -> int:
        """Where the message begins."""
        return self.offset + _HEADER.size


def find_shards(dataset_dir: Path, numbers: Iterable[int] | None = None) -> list[Path]:
    """List a folder's shards ``train<number>.tfrec`` by ascending number.

    Args:
        dataset_dir: its subfolders are not searched.
        numbers: of the shards to list; None lists all.

    Raises:
        DatasetNotFoundError: there are no shards, one of ``numbers`` is missing, or two have the
            same number.
    """
    dataset_dir = Path(dataset_dir)
    found: dict[int, Path] = {}
    for path in sorted(dataset_dir.glob("*.tfrec")):
        number = shard_number(path)
        if number in found:
            raise DatasetNotFoundError(
                f"{show_path(path)} and {found[number].name} have the same number: remove one"
            )
        if number is not None:
            found[number] = path
    numbers = sorted(found) if numbers is None else list(numbers)
    missing = [shard_name(n) for n in numbers if n not in found]
    if found and not missing:
        return [found[n] for n in numbers]
    problem = f"{show_path(dataset_dir)} lacks {', '.join(missing)}"
    if not found:
        nested = sorted({show_path(p.parent) for p in dataset_dir.glob("*/train*.tfrec")})
        hint = f" (there are some in {', '.join(nested)})" if nested else ""
        problem = f"no train*.tfrec in {show_path(dataset_dir)}{hint}"
    if misnamed := misnamed_shards(dataset_dir):
        problem += f"; not named like a shard: {misnamed}"
    raise DatasetNotFoundError(f"{problem}. {HOW_TO_GET_THE_DATA}.")


def misnamed_shards(dataset_dir: Path) -> str:
    """The first names of a folder that are nearly a shard's, such as "train00 (1).tfrec".

    A browser names a second download so. These files are not read.
    """
    names = sorted(path.name for path in Path(dataset_dir).glob("[Tt]rain*.tfrec"))
    return ", ".join(show_name(name) for name in names if shard_number(Path(name)) is None)[:200]


def shard_name(number: int) -> str:
    """File name of a shard."""
    return f"train{number:02d}.tfrec"


def shard_number(shard: Path) -> int | None:
    """Number of a shard by its file name; None if the file is not named like a shard."""
    match = re.fullmatch(r"train(\d+)\.tfrec", Path(shard).name)
    return int(match[1]) if match else None


# ---- messages


# float_list and int64_list are messages, too; here they are bytes, as their content is never read.
_EXAMPLE = """
name: "example.proto" package: "tensorflow" syntax: "proto3"
message_type { name: "BytesList"
  field { name: "value" number: 1 label: LABEL_REPEATED type: TYPE_BYTES } }
message_type { name: "Feature" oneof_decl { name: "kind" }
  field { name: "bytes_list" number: 1 label: LABEL_OPTIONAL type: TYPE_MESSAGE
    type_name: ".tensorflow.BytesList" oneof_index: 0 }
  field { name: "float_list" number: 2 label: LABEL_OPTIONAL type: TYPE_BYTES oneof_index: 0 }
  field { name: "int64_list" number: 3 label: LABEL_OPTIONAL type: TYPE_BYTES oneof_index: 0 } }
message_type { name: "Features"
  field { name: "feature" number: 1 label: LABEL_REPEATED type: TYPE_MESSAGE
    type_name: ".tensorflow.Features.FeatureEntry" }
  nested_type { name: "FeatureEntry" options { map_entry: true }
    field { name: "key" number: 1 label: LABEL_OPTIONAL type: TYPE_STRING }
    field { name: "value" number: 2 label: LABEL_OPTIONAL type: TYPE_MESSAGE
      type_name: ".tensorflow.Feature" } } }
message_type { name: "Example"
  field { name: "features" number: 1 label: LABEL_OPTIONAL type: TYPE_MESSAGE
    type_name: ".tensorflow.Features" } }
"""


@cache
def _example_class():
    """The message class tf.train.Example, from a description instead of TensorFlow."""
    file = text_format.Parse(_EXAMPLE, descriptor_pb2.FileDescriptorProto())
    # Not the default pool: TensorFlow may have put its own class of this name there.
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("tensorflow.Example"))


def parse_triplet(message: bytes) -> Triplet:
    """Parse the message of a record.

    Raises:
        RecordError: it is not an Example with three pictures, or a name is not UTF-8.
    """
    try:
        features = _example_class().FromString(message).features.feature
    except DecodeError as error:
        raise RecordError("not a tf.train.Example", str(error)) from None
    pictures = []
    for name in FEATURES:
        if name not in features:
            found = ", ".join(sorted(features))[:200] or "none"
            raise RecordError("feature missing", f"no {name!r} among {found}")
        values = features[name].bytes_list.value
        if len(values) != 1:
            found = features[name].WhichOneof("kind") or "nothing"
            raise RecordError(
                "feature of a wrong type",
                f"{name!r} should hold the bytes of one picture; it holds {len(values)} in {found}",
            )
        if not values[0]:
            raise RecordError("empty picture", f"{name!r} has 0 bytes")
        pictures.append(values[0])
    names = []
    for name in (IMAGE_ID, LANDMARK_ID):
        values = features[name].bytes_list.value if name in features else ()
        try:
            names.append(tuple(value.decode() for value in values) if len(values) == 3 else ())
        except UnicodeDecodeError as error:
            raise RecordError("name is not UTF-8", f"{name!r}: {error}") from None
    return Triplet(*pictures, *names)


def serialize_triplet(triplet: Triplet) -> bytes:
    """Make the message of a record: the inverse of :func:`parse_triplet`."""
    example = _example_class()()
    for name, picture in zip(FEATURES, triplet.pictures, strict=True):
        example.features.feature[name].bytes_list.value.append(picture)
    for name, values in ((IMAGE_ID, triplet.image_ids), (LANDMARK_ID, triplet.landmark_ids)):
        if values:
            example.features.feature[name].bytes_list.value.extend(v.encode() for v in values)
    # deterministic: protobuf maps have no order of their own.
    return example.SerializeToString(deterministic=True)


# ---- frames


def _checksum(data: bytes) -> int:
    """TFRecord's masked CRC-32C."""
    crc = google_crc32c.value(data)
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def write_shard(path: Path, triplets: Iterable[Triplet]) -> int:
    """Write triplets to a shard, atomically; returns their number."""
    return write_records(path, map(serialize_triplet, triplets))


def write_records(path: Path, messages: Iterable[bytes]) -> int:
    """Write messages to a TFRecord file, atomically; returns their number."""
    count = 0
    with replacing(path) as part, part.open("wb") as file:
        for message in messages:
            length = struct.pack("<Q", len(message))
            header = _HEADER.pack(len(message), _checksum(length))
            file.write(header + message + _FOOTER.pack(_checksum(message)))
            count += 1
    return count


def scan_frames(shard: Path) -> Iterator[Frame]:
    """List the records of a shard, jumping from frame to frame without reading the messages.

    After a frame with a damaged length, the scan goes on at the next record with valid checksums.
    So only the damaged records are lost.
    """
    size = shard.stat().st_size
    if size == 0:
        return
    with shard.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        offset = number = 0
        while offset < size:
            length = _length_at(data, offset)
            yield Frame(number, offset, length)
            number += 1
            if length is None:
                offset = _next_frame(data, offset + 1)
            else:
                offset += length + _FRAME


def _length_at(data: mmap.mmap, offset: int) -> int | None:
    """Length of the message of the frame at ``offset``; None if the frame is damaged or cut off."""
    if offset + _FRAME > len(data):
        return None
    length, checksum = _HEADER.unpack_from(data, offset)
    if offset + _FRAME + length > len(data) or checksum != _checksum(data[offset : offset + 8]):
        return None
    return length


def _next_frame(data: mmap.mmap, start: int) -> int:
    """Offset of the first undamaged record at or after ``start``; the end if there is none."""
    while True:
        # Messages are below 4 GB, so the upper half of a length is zero, which is fast to find.
        offset = data.find(b"\0\0\0\0", start + 4) - 4
        if offset < 0:
            return len(data)
        # As the checksum of the length 0 is not 0, a record after a hole begins at the earliest
        # with the last 8 bytes of the hole.
        if data[offset : offset + _HOLE] == bytes(_HOLE):
            end = _NOT_ZERO.search(data, offset + _HOLE)
            if end is None:
                return len(data)
            start = end.start() - 8
            continue
        length = _length_at(data, offset)
        if length is not None:
            begin = offset + _HEADER.size
            (checksum,) = _FOOTER.unpack_from(data, begin + length)
            if checksum == _checksum(data[begin : begin + length]):
                return offset
        start = offset + 1


def read_message(file, frame: Frame) -> bytes:
    """Read the message of one record.

    Args:
        file: the shard, opened for reading bytes.
        frame: from :func:`scan_frames`.

    Raises:
        RecordError: the frame is damaged, or the message does not match its checksum.
    """
    if frame.length is None:
        remaining = file.seek(0, 2) - frame.offset
        file.seek(frame.offset)
        header, whole = file.read(_HEADER.size), ""
        if len(header) == _HEADER.size:
            length, checksum = _HEADER.unpack(header)
            if checksum != _checksum(header[:8]):
                raise RecordError("damaged length", "the record's length has a wrong checksum")
            whole = f" of {length + _FRAME} bytes"
        raise RecordError("cut off", f"{remaining} bytes left of a record{whole}")
    file.seek(frame.message_offset)
    content = file.read(frame.length + _FOOTER.size)
    message = content[: frame.length]
    if _FOOTER.unpack(content[frame.length :])[0] != _checksum(message):
        raise RecordError("damaged message", "the record's content has a wrong checksum")
    return message


def read_triplets(shard: Path) -> Iterator[Triplet]:
    """Read a shard's triplets as raw bytes, in file order.

    Raises:
        RecordError: a record is damaged, or is no Example with the three pictures.
    """
    with shard.open("rb") as file:
        for frame in scan_frames(shard):
            try:
                yield parse_triplet(read_message(file, frame))
            except RecordError as error:
                where = f"{show_path(shard)}, record {frame.number} (counted from 0)"
                raise RecordError(error.kind, error.detail, where) from None


class Place(NamedTuple):
    """Where one picture lies; position and length are in bytes."""

    shard: str  # its path
    modified_ns: int  # when the shard was last modified, so that a changed file is reopened
    position: int
    length: int
    image: bytes  # its image_hash()


def read_picture(place: Place) -> memoryview:
    """Read one picture from the memory-mapped shard, without a copy; thread-safe.

    Raises:
        RecordError: the shard has changed there.
    """
    shard = _map_shard(place.shard, place.modified_ns)
    content = shard[place.position : place.position + place.length]
    if image_hash(content) != place.image:
        raise RecordError(
            "changed",
            "other bytes lie where the catalogue says a picture is: delete the catalogue beside "
            "the shard, and it is made anew",
            show_path(place.shard),
        )
    return content


@lru_cache(maxsize=256)  # systems limit the number of open files
def _map_shard(path: str, modified_ns: int) -> memoryview:
    """Memory-map a shard; ``modified_ns`` is a part of the cache's key only."""
    with open(path, "rb") as file:
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def image_hash(picture: bytes | memoryview) -> bytes:
    """XXH3 of a picture's bytes, 16 bytes.

    The chance that any two of a million different pictures share a hash is below 1e-26.
    """
    return xxhash.xxh3_128_digest(picture)
