"""Shards: whole ones come back, damaged ones are named."""

import numpy as np
import pytest
import tensorflow as tf

from lib.records import (
    DatasetNotFoundError,
    RecordError,
    Triplet,
    count_records,
    find_shards,
    read_triplets,
    survey,
    write_shard,
)

SOME = [Triplet(b"a%d" % i, b"p%d" % i, b"n%d" % i) for i in range(5)]


@pytest.fixture
def shard(tmp_path):
    path = tmp_path / "train00.tfrec"
    assert write_shard(path, SOME) == 5
    return path


def test_triplets_come_back_in_order(shard):
    assert list(read_triplets(shard)) == SOME
    assert count_records(shard) == 5


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


@pytest.mark.parametrize("cut", [1, 20, 40])
def test_a_truncated_shard_names_file_and_record(shard, cut):
    shard.write_bytes(shard.read_bytes()[:-cut])
    with pytest.raises(RecordError, match=r"train00\.tfrec is cut off or damaged in record 4"):
        count_records(shard)


def test_a_changed_bit_is_found_by_the_checksum(shard):
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(RecordError, match=r"train00\.tfrec is cut off or damaged in record 2"):
        count_records(shard)


def test_garbage_and_an_empty_file_are_no_shards(tmp_path, rng):
    shard = tmp_path / "train00.tfrec"
    shard.write_bytes(rng.bytes(1000))
    with pytest.raises(RecordError, match=r"train00\.tfrec is no TFRecord file"):
        count_records(shard)
    shard.write_bytes(b"")
    with pytest.raises(RecordError, match=r"train00\.tfrec is empty"):
        count_records(shard)


def test_a_missing_feature_is_named_with_those_that_are_there(tmp_path):
    shard = tmp_path / "train00.tfrec"
    feature = tf.train.Feature(bytes_list=tf.train.BytesList(value=[b"x"]))
    names = ("anchor_img", "positive_img", "label")
    example = tf.train.Example(features=tf.train.Features(feature=dict.fromkeys(names, feature)))
    with tf.io.TFRecordWriter(str(shard)) as writer:
        writer.write(example.SerializeToString())
    message = r"record 0 .* no picture 'negative_img'.* anchor_img, label, positive_img"
    with pytest.raises(RecordError, match=message):
        count_records(shard)


def test_a_record_that_is_no_example_is_named(tmp_path):
    shard = tmp_path / "train00.tfrec"
    with tf.io.TFRecordWriter(str(shard)) as writer:
        writer.write(b"\xff\xff\xff")
    with pytest.raises(RecordError, match=r"record 0 .* is not a tf\.train\.Example"):
        count_records(shard)


def test_an_interrupted_write_leaves_no_shard(tmp_path):
    def failing():
        yield SOME[0]
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_shard(tmp_path / "train00.tfrec", failing())
    assert list(tmp_path.iterdir()) == []


def test_survey_counts_by_bytes(tmp_path):
    a, b, c, d = b"A", b"B", b"C", b"D"
    write_shard(tmp_path / "0", [Triplet(a, b, c), Triplet(b, b, d), Triplet(c, a, a)])
    write_shard(tmp_path / "1", [Triplet(a, a, b"unknown")])
    table = survey([tmp_path / "0", tmp_path / "1"])
    assert table.loc["0"].to_dict() == {
        "records": 3,
        "degenerate": 1,
        "positive is next anchor": 1,
        "negative is an anchor": 2,
    }
    np.testing.assert_array_equal(table.loc["1"], [1, 1, 0, 0])
