"""The catalogue against worlds whose truth is known, and against damage of every kind."""

import io
import multiprocessing
import re
import shutil
import struct
import time

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import lib.data.catalogue
from lib.data.catalogue import (
    CATALOGUE,
    UNKNOWN,
    CatalogueError,
    build_catalogue,
    identify,
    load_catalogue,
    main,
    open_catalogue,
    pair_agreement,
    save_catalogue,
    split_landmarks,
)
from lib.data.neighbours import pair_neighbours
from lib.data.records import RecordError, Triplet, read_picture, read_triplets, write_shard
from lib.demo.data import plan_triplets
from lib.files import replacing
from tests.conftest import SMALL_WORLD


def jpeg(colour=(90, 30, 60), size=(24, 16), mode="RGB") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).convert(mode).save(buffer, "JPEG")
    return buffer.getvalue()


ONE_PICTURE = jpeg(size=(8, 8))


def picture(number: int) -> bytes:
    """A file of its own for each number, quick to make: bytes after a JPEG's end are allowed."""
    return ONE_PICTURE + struct.pack("<Q", number)


@pytest.fixture(scope="module")
def catalogue(shards):
    return build_catalogue(shards)


def truth_of(catalogue, plan) -> np.ndarray:
    """The true landmark of each picture, by the plan that the triplets were drawn after."""
    truth = np.full(len(catalogue.pictures), -5)
    for pictures, views in zip(catalogue.triplets.iloc[:, 3:].to_numpy(), plan, strict=True):
        truth[pictures] = [view.landmark for view in views]
    return truth


# ---- identities


def test_the_small_worlds_landmarks_are_found_without_error(catalogue):
    truth = truth_of(catalogue, plan_triplets(SMALL_WORLD))
    by_bytes = identify(catalogue, merge_neighbours=False).pictures["landmark"].to_numpy()
    merged = catalogue.pictures["landmark"].to_numpy()
    precision, recall = pair_agreement(by_bytes, truth)
    assert precision == 1.0 and 0.3 < recall < 0.8
    precision_merged, recall_merged = pair_agreement(merged, truth)
    assert precision_merged == 1.0 and recall_merged > recall + 0.2
    # Nothing that belongs together is in two groups.
    assert pair_agreement(catalogue.pictures["group"].to_numpy(), truth)[1] == 1.0


def test_counts_are_those_of_the_plan(catalogue):
    plan = plan_triplets(SMALL_WORLD)
    report = catalogue.report()
    assert report["records"] == len(plan)
    assert report["degenerate triplets"] == sum(anchor == positive for anchor, positive, _ in plan)
    assert report["different pictures"] == len({view for views in plan for view in views})
    assert report["false negatives"] == report["pairs of near-duplicates"] == 0
    assert report["records that can't be used"] == 0


def kaggle_like(landmarks: int, seed: int):
    """Sizes, records and truth of a set made as Kaggle's: two photos or more to a landmark."""
    rng = np.random.default_rng(seed)
    sizes = 2 + np.minimum(rng.pareto(1.2, landmarks) * 3, 500).astype(int)
    first = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    anchors = (first[:, None] + np.arange(2)).ravel()
    positives = np.repeat(first, 2) + rng.integers(np.repeat(sizes, 2))
    negatives = anchors[rng.integers(len(anchors), size=len(anchors))]
    own = np.repeat(np.arange(landmarks), 2)
    truth = np.repeat(np.arange(landmarks), sizes)
    while len(clash := np.flatnonzero(truth[negatives] == own)):
        negatives[clash] = anchors[rng.integers(len(anchors), size=len(clash))]
    return np.stack([anchors, positives, negatives], axis=1), truth


@pytest.mark.long
def test_twenty_thousand_records_like_the_real_ones(tmp_path):
    plan, landmark = kaggle_like(landmarks=10_000, seed=5)
    for number in range(16):  # 15 of equal size, and the remainder, as in the real set
        rows = plan[number * 1333 : (number + 1) * 1333]
        write_shard(
            tmp_path / f"train{number:02d}.tfrec",
            (Triplet(*(picture(p) for p in row)) for row in rows),
        )
    catalogue = identify(build_catalogue(sorted(tmp_path.glob("*.tfrec"))), merge_neighbours=False)
    numbers = catalogue.triplets.iloc[:, 3:].to_numpy()
    truth = np.empty(len(catalogue.pictures), int)
    truth[numbers.ravel()] = landmark[plan.ravel()]
    assert len(numbers) == 20_000 and len(truth) == len(np.unique(plan))
    assert catalogue.degenerate.sum() == (plan[:, 0] == plan[:, 1]).sum()
    assert (catalogue.pictures["landmark"] != UNKNOWN).all()

    precision, recall = pair_agreement(catalogue.pictures["landmark"].to_numpy(), truth)
    assert precision == 1.0
    assert recall == pytest.approx(0.53, abs=0.01)
    merged = identify(catalogue)
    precision, recall = pair_agreement(merged.pictures["landmark"].to_numpy(), truth)
    assert precision == 1.0 and recall > 0.99
    assert pair_agreement(merged.pictures["group"].to_numpy(), truth)[1] == 1.0


def rows_of(photos_of_landmarks, rng):
    """Anchor, positive and negative of a set made as Kaggle's from landmarks of given sizes."""
    first = np.concatenate([[0], np.cumsum(photos_of_landmarks)[:-1]])
    rows, own = [], []
    anchors = [
        (i, f + v)
        for i, (f, n) in enumerate(zip(first, photos_of_landmarks, strict=True))
        for v in range(min(n, 2))
    ]
    for landmark, anchor in anchors:
        positive = first[landmark] + rng.integers(photos_of_landmarks[landmark])
        others = [a for other, a in anchors if other != landmark]
        rows.append((anchor, positive, others[rng.integers(len(others))]))
        own.append(landmark)
    return np.array(rows), np.repeat(np.arange(len(first)), photos_of_landmarks), np.array(own)


@given(st.lists(st.integers(1, 4), min_size=2, max_size=12), st.integers(0, 2**32), st.data())
def test_certain_pairs_are_right_and_possible_pairs_are_all(sizes, seed, data):
    """Whatever the sizes and the luck, and even with records missing in between."""
    rows, _, own = rows_of(sizes, np.random.default_rng(seed))
    kept = np.sort(data.draw(st.lists(st.sampled_from(range(len(rows))), min_size=2, unique=True)))
    anchor, positive, negative = rows[kept].T
    follows = np.concatenate([[kept[0] == 0], np.diff(kept) == 1])
    joined = pd.Series(np.arange(rows.max() + 1))
    for a, b in zip(anchor, positive, strict=True):  # the byte join, by hand
        joined[joined == joined[a]] = joined[b]
    certain, possible = pair_neighbours(joined.to_numpy(), anchor, positive, negative, follows)
    together = np.append((own[kept][1:] == own[kept][:-1]) & follows[1:], False)
    assert not (certain & ~together).any()
    assert not (together & ~possible).any()


def neighbours(*rows, follows=None):
    """certain and possible pairs of records given as (anchor, positive, negative)."""
    anchor, positive, negative = np.array(rows).T
    landmark = np.arange(np.max(rows) + 1)
    for a, b in zip(anchor, positive, strict=True):
        landmark[landmark == landmark[a]] = landmark[b]
    if follows is None:
        follows = np.ones(len(rows), bool)
    certain, possible = pair_neighbours(landmark, anchor, positive, negative, follows)
    return np.flatnonzero(certain).tolist(), np.flatnonzero(possible).tolist()


def test_neighbours_by_hand():
    # Photos 0-3 of landmark A, 4-7 of B, 8 of C; each positive is a third photo.
    a, b, c = [(0, 2, 8), (1, 3, 8)], [(4, 6, 0), (5, 7, 0)], [(8, 8, 0)]
    assert neighbours(*a, *b, (9, 11, 0), (10, 12, 0)) == ([0, 2, 4], [0, 2, 4])
    # A degenerate record may be a single or half of a pair; here two that share photos settle it.
    assert neighbours(*a, *c, *b, (9, 10, 0), (10, 9, 0)) == ([0, 3, 5], [0, 3, 5])
    # The last record may have lost its partner, so without those much is open.
    assert neighbours(*a, *c, *b) == ([0], [0, 2, 3])
    # Two degenerate records at the end: a pair or two singles, who knows.
    assert neighbours(*a, *c, (13, 13, 0)) == ([0], [0, 2])
    # ... unless the negative of the one is the anchor of the other.
    assert neighbours(*a, *c, (13, 13, 8)) == ([0], [0])
    # Where the beginning is missing, every record may be the second of a pair.
    gap = np.array([False, True, True, True])
    assert neighbours(*a, *b, follows=gap) == ([], [0, 1, 2])


def test_shuffled_records_are_not_paired(tmp_path, shards):
    triplets = [t for shard in shards for t in read_triplets(shard)]
    order = np.random.default_rng(0).permutation(len(triplets))
    write_shard(tmp_path / "train00.tfrec", [triplets[i] for i in order])
    shuffled = build_catalogue([tmp_path / "train00.tfrec"])
    by_bytes = identify(shuffled, merge_neighbours=False)
    pd.testing.assert_series_equal(shuffled.pictures["landmark"], by_bytes.pictures["landmark"])
    truth = truth_of(shuffled, [plan_triplets(SMALL_WORLD)[i] for i in order])
    assert pair_agreement(shuffled.pictures["landmark"].to_numpy(), truth)[0] == 1.0


def test_stated_landmarks_are_taken(tmp_path):
    names = [("x", "x", "y"), ("y", "y", "z")]
    triplets = [
        Triplet(picture(0), picture(1), picture(2), ("0", "1", "2"), names[0]),
        Triplet(picture(2), picture(3), picture(4), ("2", "3", "4"), names[1]),
    ]
    write_shard(tmp_path / "train00.tfrec", triplets)
    pictures = build_catalogue([tmp_path / "train00.tfrec"]).pictures
    assert pictures["landmark"].tolist() == [0, 0, 1, 1, 2]
    assert pictures["image_id"].tolist() == ["0", "1", "2", "3", "4"]
    assert pictures["landmark_id"].tolist() == ["x", "x", "y", "y", "z"]


def test_a_picture_seen_as_negative_only_has_no_known_landmark(tmp_path):
    rows = [(0, 1, 9), (9, 9, 0), (2, 3, 8)]
    write_shard(tmp_path / "train00.tfrec", [Triplet(*map(picture, row)) for row in rows])
    catalogue = build_catalogue([tmp_path / "train00.tfrec"])
    assert catalogue.pictures["landmark"].tolist() == [0, 0, 1, 2, 2, UNKNOWN]
    assert catalogue.pictures["group"].nunique() == 4  # but it is a group of its own


def test_pair_agreement_by_hand():
    found, truth = np.array([0, 0, 0, 1, UNKNOWN, UNKNOWN]), np.array([5, 5, 6, 6, 7, 7])
    assert pair_agreement(found, truth) == (1 / 3, 1 / 3)
    assert pair_agreement(np.arange(4), np.zeros(4)) == (1.0, 0.0)


def test_the_report_counts_what_is_wrong_with_a_set(tmp_path):
    again = io.BytesIO()  # one picture saved once more: other bytes, the same sight
    seen = np.random.default_rng(0).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    image = Image.fromarray(seen).resize((64, 64))
    first = io.BytesIO()
    image.save(first, "JPEG", quality=95)
    image.save(again, "JPEG", quality=60)
    a, copy = first.getvalue(), again.getvalue()
    b, c = jpeg((200, 10, 10)), jpeg((10, 200, 10))
    rows = [(a, b, copy), (b, b, a), (c, c, a)]  # the negative of the second is of its landmark
    write_shard(tmp_path / "train00.tfrec", [Triplet(*row) for row in rows])
    report = build_catalogue([tmp_path / "train00.tfrec"]).report()
    assert report["different pictures"] == 4 and report["pictures"] == 9
    assert report["degenerate triplets"] == 2
    assert report["false negatives"] == 1
    assert report["landmarks found"] == 2
    assert report["landmarks with two pictures or more"] == 1


# ---- splits


def test_no_picture_and_no_landmark_is_in_two_parts(catalogue):
    truth = truth_of(catalogue, plan_triplets(SMALL_WORLD))
    for seed in range(5):
        part = split_landmarks(catalogue, {"train": 0.7, "validation": 0.2, "test": 0.1}, seed)
        parts_of_landmark = pd.Series(part).groupby(truth).nunique()
        assert (parts_of_landmark == 1).all()
        assert set(part) == {"train", "validation", "test"}
        assert 0.5 < (part == "train").mean() < 0.9
    again = split_landmarks(catalogue, {"train": 0.7, "validation": 0.2, "test": 0.1}, seed)
    np.testing.assert_array_equal(part, again)


def test_a_split_by_shard_leaks(catalogue):
    """What the split above avoids: a landmark across two shards, and negatives from anywhere."""
    truth = truth_of(catalogue, plan_triplets(SMALL_WORLD))
    triplets = catalogue.triplets
    held_back = triplets["shard"] >= 12
    roles = ["anchor", "positive", "negative"]
    training = set(triplets.loc[~held_back, roles].to_numpy().ravel())
    anchors = triplets.loc[held_back, "anchor"]
    leaked_pictures = training & set(anchors)
    leaked_landmarks = set(truth[list(training)]) & set(truth[anchors])
    assert len(leaked_pictures) > 0.3 * len(anchors)
    assert len(leaked_landmarks) > 0.3 * len(set(truth[anchors]))


def test_shares_must_sum_to_one(catalogue):
    with pytest.raises(ValueError, match="sum to 1"):
        split_landmarks(catalogue, {"train": 0.8}, seed=0)


# ---- reading pictures


def test_a_thousand_random_pictures_are_read_exactly(catalogue, shards):
    stored = [p for shard in shards for t in read_triplets(shard) for p in t.pictures]
    numbers = catalogue.triplets.iloc[:, 3:].to_numpy().ravel()
    for i in np.random.default_rng(0).integers(len(stored), size=1000):
        assert read_picture(catalogue.places[numbers[i]]) == stored[i]


def test_every_occurrence_in_the_file_points_to_its_bytes(catalogue, shards):
    content = [shard.read_bytes() for shard in shards]
    stored = [p for shard in shards for t in read_triplets(shard) for p in t.pictures]
    places = catalogue.rows[["shard", "position", "length"]].itertuples(index=False)
    for picture_, (shard, position, length) in zip(stored, places, strict=True):
        assert content[shard][position : position + length] == picture_


def test_a_shard_changed_after_the_catalogue_is_noticed(tmp_path):
    shard = tmp_path / "train00.tfrec"
    write_shard(shard, [Triplet(picture(0), picture(1), picture(2))])
    assert read_picture(build_catalogue([shard]).places[0]) == picture(0)
    write_shard(shard, [Triplet(picture(5), picture(6), picture(7))])
    places = build_catalogue([shard]).places
    content = bytearray(shard.read_bytes())
    content[places[1].position + 3] ^= 1
    shard.write_bytes(content)
    assert read_picture(places[0]) == picture(5)
    with pytest.raises(RecordError, match=r"train00\.tfrec: changed \(other bytes"):
        read_picture(places[1])


# ---- damage


def huge_header() -> bytes:
    content = bytearray(jpeg())
    sof = content.find(b"\xff\xc0")
    content[sof + 5 : sof + 9] = struct.pack(">HH", 20_000, 20_000)
    return bytes(content)


def test_damaged_records_lose_only_themselves_and_are_named(tmp_path):
    good = [Triplet(picture(3 * i), picture(3 * i + 1), picture(3 * i + 2)) for i in range(9)]
    body = jpeg(size=(300, 200))
    bad = {
        1: (Triplet(picture(100), b"", picture(101)), "empty picture"),
        2: (Triplet(huge_header(), picture(102), picture(103)), "picture too large"),
        3: (Triplet(picture(104), b"no picture", picture(105)), "not a JPEG picture"),
        4: (Triplet(picture(106), picture(107), body[: len(body) // 2]), "picture does not decode"),
        5: (Triplet(picture(108), picture(109), jpeg(mode="CMYK")), "neither RGB nor grey"),
    }
    records = list(good)
    for number, (triplet, _) in bad.items():
        records[number] = triplet
    shard = tmp_path / "train00.tfrec"
    write_shard(shard, records)
    import tensorflow as tf

    messages = list(tf.data.TFRecordDataset(str(shard)).as_numpy_iterator())
    number = tf.train.Feature(int64_list=tf.train.Int64List(value=[1]))
    names = ("anchor_img", "positive_img", "negative_img")
    wrong_type = tf.train.Example(
        features=tf.train.Features(feature=dict.fromkeys(names, number))
    ).SerializeToString()
    messages[6] = wrong_type
    with tf.io.TFRecordWriter(str(shard)) as writer:
        for message in messages:
            writer.write(message)
    content = bytearray(shard.read_bytes())
    content[content.find(messages[7]) + 30] ^= 1  # a wrong checksum
    shard.write_bytes(content[:-9])  # and a tail cut off
    second, third = tmp_path / "train01.tfrec", tmp_path / "train02.tfrec"
    write_shard(second, good[:2])
    third.write_bytes(b"this was never a TFRecord file")

    catalogue = build_catalogue([shard, second, third])
    assert catalogue.problems.iloc[-1].tolist()[:4] == [2, 0, 0, "damaged length"]
    problems = catalogue.problems.iloc[:-1].set_index("record")["problem"].to_dict()
    assert problems == {
        **{number: kind for number, (_, kind) in bad.items()},
        6: "feature of a wrong type",
        7: "damaged message",
        8: "cut off",
    }
    assert (catalogue.problems["shard"][:-1] == 0).all()
    assert "20000 x 20000" in catalogue.problems["detail"][1]
    assert catalogue.triplets[["shard", "record"]].to_numpy().tolist() == [[0, 0], [1, 0], [1, 1]]

    damage = catalogue.damage()
    assert damage["records"].to_dict()["picture does not decode"] == 1
    assert damage.loc["cut off", ["first in", "as record"]].tolist() == ["train00.tfrec", 8]

    save_catalogue(catalogue, tmp_path / CATALOGUE)
    again = load_catalogue(tmp_path / CATALOGUE)
    pd.testing.assert_frame_equal(again.problems, catalogue.problems, check_dtype=False)
    pd.testing.assert_frame_equal(again.rows, catalogue.rows, check_dtype=False)


def test_shards_without_one_usable_record_are_refused(tmp_path):
    shard = tmp_path / "train00.tfrec"
    write_shard(shard, [Triplet(b"a", b"b", b"c")] * 3)
    with pytest.raises(CatalogueError, match=r"no usable record in the 1 shards.*not a JPEG"):
        build_catalogue([shard])
    shard.write_bytes(b"")
    with pytest.raises(CatalogueError, match="are empty: fetch or convert them"):
        build_catalogue([shard])


# ---- the file


@pytest.fixture
def dataset_dir(tmp_path):
    for number in range(3):
        rows = [(9 * number + i, 9 * number + i + 1, 50 + i) for i in range(0, 9, 2)]
        shard = tmp_path / f"train{number:02d}.tfrec"
        write_shard(shard, [Triplet(*map(picture, row)) for row in rows])
    return tmp_path


def test_the_file_is_read_again_unless_the_shards_change(dataset_dir):
    first = open_catalogue(dataset_dir)
    written = (dataset_dir / CATALOGUE).stat().st_mtime_ns
    again = open_catalogue(dataset_dir)
    assert (dataset_dir / CATALOGUE).stat().st_mtime_ns == written
    pd.testing.assert_frame_equal(again.rows, first.rows, check_dtype=False)
    assert again.rows["perceptual_hash"].dtype == np.uint64
    write_shard(dataset_dir / "train03.tfrec", [Triplet(*map(picture, (90, 91, 92)))])
    with pytest.raises(CatalogueError, match="was made from other shards"):
        load_catalogue(dataset_dir / CATALOGUE)
    assert len(open_catalogue(dataset_dir).triplets) == len(first.triplets) + 1


def test_the_command_line_says_what_was_found_and_what_is_wrong(dataset_dir, capsys):
    with (dataset_dir / "train01.tfrec").open("r+b") as file:
        file.truncate(300)
    assert main([str(dataset_dir)]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"landmarks found +\d", printed)
    assert re.search(r"cut off +1 +train01\.tfrec +\d", printed)
    assert main([str(dataset_dir / "absent")]) == 1
    assert "no train*.tfrec" in capsys.readouterr().err


def test_a_second_download_of_a_shard_is_named_and_not_used(dataset_dir, capsys):
    """A browser's "train00 (1).tfrec" was passed over in silence, even where it was alone."""
    open_catalogue(dataset_dir)
    shutil.copy(dataset_dir / "train00.tfrec", dataset_dir / "train00 (1).tfrec")
    capsys.readouterr()
    assert len(open_catalogue(dataset_dir).shards) == 3
    printed = capsys.readouterr().out
    assert printed == "Left out, as not named like a shard: train00 (1).tfrec\n"
    for shard in dataset_dir.glob("train??.tfrec"):
        shard.unlink()
    assert main([str(dataset_dir)]) == 1
    assert "not named like a shard: train00 (1).tfrec" in capsys.readouterr().err


def test_a_folder_that_can_only_be_read_is_catalogued_all_the_same(
    dataset_dir, monkeypatch, capsys
):
    def refuse(*_):
        raise PermissionError("read-only file system")

    monkeypatch.setattr(lib.data.catalogue, "save_catalogue", refuse)
    assert len(open_catalogue(dataset_dir).triplets) == 15
    assert "can't be kept (read-only file system)" in capsys.readouterr().out


def test_what_a_killed_process_left_is_removed_when_the_catalogue_is_made(dataset_dir):
    left = dataset_dir / f".part-00000000-{CATALOGUE}"
    left.touch()
    with replacing(dataset_dir / "train09.tfrec") as part:  # by a process that lives
        open_catalogue(dataset_dir)
        assert not left.exists() and part.exists()
    (dataset_dir / "train09.tfrec").unlink()
    left.touch()
    open_catalogue(dataset_dir)
    assert left.exists()  # reading changes nothing


@pytest.mark.parametrize("damage", ["cut", "bit", "garbage", "empty", "other"])
def test_a_damaged_file_is_noticed_and_made_anew(dataset_dir, damage, rng):
    whole = open_catalogue(dataset_dir)
    path = dataset_dir / CATALOGUE
    content = bytearray(path.read_bytes())
    if damage == "bit":
        content[60] ^= 1
    pd.DataFrame({"a": [1]}).to_parquet(path)
    other = path.read_bytes()
    parts = {"cut": content[:-50], "bit": content, "garbage": rng.bytes(500), "empty": b""}
    path.write_bytes(parts.get(damage, other))
    with pytest.raises(CatalogueError, match=r"landmarks\.parquet is damaged, or no catalogue"):
        load_catalogue(path)
    again = open_catalogue(dataset_dir)
    pd.testing.assert_frame_equal(again.rows, whole.rows, check_dtype=False)


def test_a_flipped_bit_anywhere_in_the_file_is_noticed(dataset_dir):
    """Parquet's checksums left out the footer: a bit there renamed a column without an error."""
    open_catalogue(dataset_dir)
    path = dataset_dir / CATALOGUE
    content = bytearray(path.read_bytes())
    for position in [*range(0, len(content), 40), content.rfind(b"perceptual_hash")]:
        content[position] ^= 1
        path.write_bytes(content)
        with pytest.raises(CatalogueError, match=r"is damaged, or no catalogue"):
            load_catalogue(path)
        content[position] ^= 1
    path.write_bytes(content)
    load_catalogue(path)


def test_any_file_with_a_right_checksum_but_no_catalogue_is_refused(dataset_dir):
    """Its columns were taken for granted: TypeError, AttributeError."""
    open_catalogue(dataset_dir)
    path = dataset_dir / CATALOGUE
    table = pq.read_table(path)
    numbers = table.set_column(0, "shard", pa.array(range(len(table))))
    for other in (
        numbers,
        table.drop_columns(["role"]),
        table.cast(table.schema.remove_metadata()),
    ):
        metadata = (other.schema.metadata or {}) | {b"checksum": table.schema.metadata[b"checksum"]}
        pq.write_table(other.replace_schema_metadata(metadata), file := io.BytesIO())
        path.write_bytes(lib.data.catalogue._with_checksum(file.getvalue()))
        with pytest.raises(CatalogueError, match="is damaged, or no catalogue"):
            load_catalogue(path)


@pytest.mark.long
def test_fifty_kills_never_leave_half_a_catalogue(dataset_dir, rng):
    whole = open_catalogue(dataset_dir)
    path = dataset_dir / CATALOGUE
    # Forked off a server that has imported everything: a start takes milliseconds.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lib.data.catalogue"])

    def start():
        path.unlink(missing_ok=True)
        process = context.Process(target=open_catalogue, args=(dataset_dir,))
        process.start()
        return process

    start().join()  # the server's own start
    durations = []
    for _ in range(3):
        begin = time.perf_counter()
        start().join()
        durations.append(time.perf_counter() - begin)
    complete = 0
    for _ in range(50):
        process = start()
        # Half of the kills fall into the last quarter, where the file is written.
        share = rng.uniform(0.75, 1.05) if rng.random() < 0.5 else rng.uniform(0, 1)
        time.sleep(share * np.median(durations))
        process.kill()  # SIGKILL
        process.join()
        if path.is_file():
            complete += 1
            pd.testing.assert_frame_equal(load_catalogue(path).rows, whole.rows, check_dtype=False)
    assert complete < 50  # some were killed before
    pd.testing.assert_frame_equal(open_catalogue(dataset_dir).rows, whole.rows, check_dtype=False)
