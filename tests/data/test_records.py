"""Shards: whole ones come back, damaged records are named and lose nothing but themselves."""

import struct
import time

import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

from lib.data.records import (
    FEATURES,
    DatasetNotFoundError,
    RecordError,
    Triplet,
    find_shards,
    parse_triplet,
    read_message,
    read_triplets,
    scan_frames,
    serialize_triplet,
    write_shard,
)

SOME = [Triplet(b"a%d" % i, b"p%d" % i, b"n%d" % i) for i in range(5)]


@pytest.fixture
def shard(tmp_path):
    path = tmp_path / "train00.tfrec"
    assert write_shard(path, SOME) == 5
    return path


def read_what_is_whole(shard):
    """The readable triplets, and the kinds of damage of the others."""
    whole, damage = [], []
    with shard.open("rb") as file:
        for frame in scan_frames(shard):
            try:
                whole.append(parse_triplet(read_message(file, frame)))
            except RecordError as error:
                damage.append((frame.number, error.kind))
    return whole, damage


def test_triplets_come_back_in_order(shard):
    assert list(read_triplets(shard)) == SOME


def test_tensorflow_reads_what_is_written_here_and_the_other_way_round(tmp_path):
    named = Triplet(b"a", b"p", b"n", ("1.jpg", "2.jpg", "ä.jpg"), ("x", "x", "y"))
    path = tmp_path / "train00.tfrec"
    write_shard(path, [SOME[0], named])
    messages = list(tf.data.TFRecordDataset(str(path)).as_numpy_iterator())
    features = tf.train.Example.FromString(messages[1]).features.feature
    assert features["anchor_img"].bytes_list.value == [b"a"]
    assert features["image/id"].bytes_list.value == [b"1.jpg", b"2.jpg", "ä.jpg".encode()]
    assert len(tf.train.Example.FromString(messages[0]).features.feature) == 3  # as Kaggle's

    with tf.io.TFRecordWriter(str(path)) as writer:
        for message in messages:
            writer.write(message)
    assert list(read_triplets(path)) == [SOME[0], named]


@given(st.tuples(*[st.binary(min_size=1)] * 3), st.tuples(*[st.text()] * 3))
def test_any_bytes_and_any_names_come_back(pictures, names):
    triplet = Triplet(*pictures, names, names)
    assert parse_triplet(serialize_triplet(triplet)) == triplet


def test_shards_are_found_by_number_not_by_listing_order(tmp_path):
    for number in (2, 10, 0):
        write_shard(tmp_path / f"train{number:02d}.tfrec", SOME)
    (tmp_path / "notes.tfrec").write_bytes(b"")
    assert [p.name for p in find_shards(tmp_path)] == [
        "train00.tfrec",
        "train02.tfrec",
        "train10.tfrec",
    ]
    assert [p.name for p in find_shards(tmp_path, [10, 2])] == ["train10.tfrec", "train02.tfrec"]


def test_missing_shards_are_named_with_the_way_to_get_them(tmp_path):
    with pytest.raises(DatasetNotFoundError, match=r"no train\*\.tfrec.*kaggle\.com"):
        find_shards(tmp_path)
    write_shard(tmp_path / "unzipped" / "train00.tfrec", SOME)
    with pytest.raises(DatasetNotFoundError, match=r"there are some in .*unzipped"):
        find_shards(tmp_path)
    write_shard(tmp_path / "train00.tfrec", SOME)
    with pytest.raises(DatasetNotFoundError, match=r"lacks train01\.tfrec, train14\.tfrec"):
        find_shards(tmp_path, [0, 1, 14])


# ---- damage


@pytest.mark.parametrize("cut", [1, 20, 40])
def test_a_truncated_shard_loses_its_last_record(shard, cut):
    shard.write_bytes(shard.read_bytes()[:-cut])
    assert read_what_is_whole(shard) == (SOME[:4], [(4, "cut off")])
    with pytest.raises(RecordError, match=r"train00\.tfrec, record 4 .*: cut off"):
        list(read_triplets(shard))


def offsets(shard):
    return [frame.offset for frame in scan_frames(shard)]


@pytest.mark.parametrize(
    ("place", "kind"),
    [
        (0, "damaged length"),
        (9, "damaged length"),
        (20, "damaged message"),
        (-1, "damaged message"),
    ],
)
def test_a_changed_bit_costs_one_record(shard, place, kind):
    begin, end = offsets(shard)[2:4]
    content = bytearray(shard.read_bytes())
    content[end + place if place < 0 else begin + place] ^= 1
    shard.write_bytes(content)
    assert read_what_is_whole(shard) == (SOME[:2] + SOME[3:], [(2, kind)])


def test_a_length_that_points_into_another_record_is_not_believed(shard):
    """The length's checksum fits, but not that of the message: the frames after it still do."""
    begin, end = offsets(shard)[1:3]
    content = bytearray(shard.read_bytes())
    content[begin:end] = b"\xff" * (end - begin)
    shard.write_bytes(content)
    assert read_what_is_whole(shard) == (SOME[:1] + SOME[2:], [(1, "damaged length")])


@given(st.data())
def test_damage_anywhere_costs_no_more_records_than_it_touches(data):
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        shard = Path(folder) / "train00.tfrec"
        write_shard(shard, SOME)
        content, begins = bytearray(shard.read_bytes()), offsets(shard)
        start = data.draw(st.integers(0, len(content) - 1))
        garbage = data.draw(st.binary(min_size=1, max_size=40))[: len(content) - start]
        content[start : start + len(garbage)] = garbage
        shard.write_bytes(content)
        ends = [*begins[1:], len(content)]
        untouched = [
            triplet
            for triplet, begin, end in zip(SOME, begins, ends, strict=True)
            if end <= start or begin >= start + len(garbage)
        ]
        whole, _ = read_what_is_whole(shard)
        assert [t for t in whole if t in untouched] == untouched


def test_garbage_and_an_empty_file_hold_no_record(tmp_path, rng):
    shard = tmp_path / "train00.tfrec"
    shard.write_bytes(rng.bytes(1000))
    assert read_what_is_whole(shard) == ([], [(0, "damaged length")])
    shard.write_bytes(b"")
    assert read_what_is_whole(shard) == ([], [])


@pytest.mark.parametrize("behind", range(2))
def test_a_hole_of_zero_bytes_is_skipped_at_the_speed_of_memory(shard, behind):
    # It was scanned byte by byte: 2 MB took 2.5 s, a hole of 300 MB some 6 minutes.
    content = shard.read_bytes()
    hole = bytes(50_000_000 + behind)
    begin = offsets(shard)[1]
    shard.write_bytes(content[:begin] + hole + content[begin:] * (1 - behind))
    start = time.perf_counter()
    whole, problems = read_what_is_whole(shard)
    assert time.perf_counter() - start < 3
    assert whole == (SOME[:1] if behind else SOME) and len(problems) == 1


def message(**features) -> bytes:
    return tf.train.Example(features=tf.train.Features(feature=features)).SerializeToString()


PICTURE = tf.train.Feature(bytes_list=tf.train.BytesList(value=[b"x"]))
NUMBER = tf.train.Feature(int64_list=tf.train.Int64List(value=[1]))
TWO = tf.train.Feature(bytes_list=tf.train.BytesList(value=[b"x", b"y"]))
NO_TEXT = tf.train.Feature(bytes_list=tf.train.BytesList(value=[b"\xff"] * 3))
EMPTY = tf.train.Feature(bytes_list=tf.train.BytesList(value=[b""]))


@pytest.mark.parametrize(
    ("content", "kind", "detail"),
    [
        (b"\xff\xff\xff", "not a tf.train.Example", "Example"),
        (message(anchor_img=PICTURE, label=NUMBER), "feature missing", "'positive_img' among anch"),
        (
            message(anchor_img=NUMBER, positive_img=PICTURE, negative_img=PICTURE),
            "feature of a wrong type",
            "'anchor_img' .* int64_list",
        ),
        (
            message(anchor_img=PICTURE, positive_img=TWO, negative_img=PICTURE),
            "feature of a wrong type",
            "'positive_img' .* 2 in bytes_list",
        ),
        (
            message(anchor_img=PICTURE, positive_img=PICTURE, negative_img=EMPTY),
            "empty picture",
            "'negative_img' has 0 bytes",
        ),
        (
            message(**dict.fromkeys(FEATURES, PICTURE), landmark_id=NO_TEXT),
            "name is not UTF-8",
            "'landmark_id': 'utf-8' codec",
        ),
    ],
    ids=["garbage", "missing", "number", "two", "empty", "no text"],
)
def test_messages_that_are_no_triplets_are_named(content, kind, detail):
    with pytest.raises(RecordError, match=detail) as raised:
        parse_triplet(content)
    assert raised.value.kind == kind


def test_a_feature_name_of_any_length_makes_a_short_message():
    with pytest.raises(RecordError, match="'anchor_img' among xxx") as raised:
        parse_triplet(message(**{"x" * 1_000_000: PICTURE}))
    assert len(str(raised.value)) < 500


def test_an_interrupted_write_leaves_no_shard(tmp_path):
    def failing():
        yield SOME[0]
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_shard(tmp_path / "train00.tfrec", failing())
    assert list(tmp_path.iterdir()) == []


def test_a_frame_is_as_the_format_says(shard):
    content = shard.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    assert content[12 : 12 + length] == serialize_triplet(SOME[0])
    assert offsets(shard)[1] == 12 + length + 4


def test_two_shards_of_one_number_are_refused(tmp_path):
    """One of them was passed over in silence."""
    for name in ("train1.tfrec", "train01.tfrec"):
        write_shard(tmp_path / name, SOME)
    with pytest.raises(DatasetNotFoundError, match=r"train1\.tfrec and train01\.tfrec have the"):
        find_shards(tmp_path)
