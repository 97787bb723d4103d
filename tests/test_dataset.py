"""DatasetHandler: which triplets, in which order, with which pixels."""

import io

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from lib.dataset import DatasetHandler, DataSettings, decode_triplet, make_augmentation
from lib.photos import read_photo
from lib.records import Triplet, read_triplets, write_shard

SETTINGS = DataSettings(image_size=32, batch_size=4, seed=1)


def picture(colour, size=40) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (size, size), colour).save(buffer, "JPEG", quality=94)
    return buffer.getvalue()


def batches(handler, epoch=0, steps=5):
    return [triplets.numpy() for triplets, _ in handler.training_batches(epoch, steps)]


def test_batches_are_uint8_rgb_triplets(tmp_path):
    reds, greens, blues = picture((255, 0, 0)), picture((0, 255, 0)), picture((0, 0, 255))
    write_shard(tmp_path / "train00.tfrec", [Triplet(reds, greens, blues)] * 8)
    settings = DataSettings(image_size=32, batch_size=4, augment=False)
    (batch,) = batches(DatasetHandler([tmp_path / "train00.tfrec"], settings), steps=1)
    assert batch.shape == (4, 3, 32, 32, 3) and batch.dtype == np.uint8
    for role in range(3):  # anchor red, positive green, negative blue: RGB, not BGR
        wanted = np.eye(3)[role] * 255
        np.testing.assert_allclose(batch[:, role], np.broadcast_to(wanted, (4, 32, 32, 3)), atol=3)


def test_order_and_augmentation_follow_from_seed_and_epoch(shards):
    first = batches(DatasetHandler(shards[:12], SETTINGS))
    again = batches(DatasetHandler(shards[:12], SETTINGS))
    np.testing.assert_array_equal(first, again)
    handler = DatasetHandler(shards[:12], SETTINGS)
    assert not np.array_equal(first, batches(handler, epoch=1))
    other_seed = DataSettings(image_size=32, batch_size=4, seed=2)
    assert not np.array_equal(first, batches(DatasetHandler(shards[:12], other_seed)))


def test_one_pass_serves_every_usable_triplet_once(shards):
    settings = DataSettings(image_size=128, batch_size=1, augment=False)
    handler = DatasetHandler(shards, settings)
    stored = [t for shard in shards for t in read_triplets(shard)]
    usable = [t for t in stored if not t.is_degenerate]
    assert handler.records == len(stored) > len(usable)
    seen = batches(handler, steps=len(usable))
    wanted = [decode_triplet(tf.constant(t), 128).numpy() for t in usable]
    assert sorted(x.tobytes() for x in seen) == sorted(x.tobytes() for x in wanted)
    assert handler.tally.undecodable == 0


def test_more_steps_than_records_start_again_in_another_order(shards):
    handler = DatasetHandler(shards[:2], SETTINGS)
    many = batches(handler, steps=12)
    assert len(many) == 12
    assert handler.tally.read > handler.records


def test_undecodable_pictures_are_left_out_and_counted(tmp_path):
    good = Triplet(picture((9, 9, 9)), picture((90, 9, 9)), picture((9, 90, 9)))
    bad = Triplet(good.anchor, b"no picture at all", good.negative)
    cut = Triplet(good.anchor, good.positive, good.negative[: len(good.negative) // 2])
    same = Triplet(good.anchor, good.anchor, good.negative)
    write_shard(tmp_path / "train00.tfrec", [good, bad, same, cut, good, good, good])
    settings = DataSettings(image_size=32, batch_size=4, augment=False)
    handler = DatasetHandler([tmp_path / "train00.tfrec"], settings)
    assert len(batches(handler, steps=1)) == 1
    # The fourth good one may come before the last bad ones: count after a whole number of passes.
    assert len(batches(handler, steps=6)) == 6  # 24 triplets = 6 passes
    tally = handler.tally
    assert tally.read - tally.degenerate - tally.undecodable == 24
    assert 5 <= tally.degenerate <= 6 and 10 <= tally.undecodable <= 12
    np.testing.assert_array_equal(len(handler.validation_triplets(10)), 3)
    assert handler.tally.undecodable == 2 and handler.tally.degenerate == 1


def test_shards_of_useless_triplets_end_instead_of_running_forever(tmp_path):
    same = Triplet(picture((9, 9, 9)), picture((9, 9, 9)), picture((0, 0, 0)))
    write_shard(tmp_path / "train00.tfrec", [same] * 10)
    assert batches(DatasetHandler([tmp_path / "train00.tfrec"], SETTINGS), steps=3) == []


def test_validation_triplets_are_as_stored_and_of_different_landmarks(shards):
    handler = DatasetHandler(shards, DataSettings(image_size=128, batch_size=4))
    chosen = handler.validation_triplets(limit=1000)
    stored = list(handler.stored_triplets())
    positions = []
    for triplet in chosen:
        for position, candidate in enumerate(stored):
            if position > (positions[-1] if positions else -1) and np.array_equal(
                triplet, decode_triplet(tf.constant(candidate), 128)
            ):
                positions.append(position)
                break
    assert len(positions) == len(chosen) > 20
    assert min(np.diff(positions)) >= 2
    assert len(handler.validation_triplets(limit=5)) == 5


def test_validation_landmarks_are_different_by_the_worlds_own_truth(small_world, shards):
    from conftest import SMALL_WORLD

    from lib.demo_data import plan_triplets

    plan = plan_triplets(SMALL_WORLD)
    kept, last = [], -2
    for position, (anchor, positive, _) in enumerate(plan):
        if anchor != positive and position - last >= 2:
            kept.append(anchor.landmark)
            last = position
    assert len(set(kept)) == len(kept)
    handler = DatasetHandler(shards, SETTINGS)
    assert len(handler.validation_triplets(limit=1000)) == len(kept)


def test_a_photo_gets_the_same_pixels_from_a_shard_and_from_a_folder(shards, tmp_path):
    triplet = next(read_triplets(shards[0]))
    (tmp_path / "photo.jpg").write_bytes(triplet.anchor)
    for size in (128, 64, 50):
        from_shard = decode_triplet(tf.constant(triplet), size).numpy()[0].astype(int)
        from_folder = read_photo(tmp_path / "photo.jpg", size).astype(int)
        assert np.abs(from_shard - from_folder).max() <= 2


def test_augmentation_varies_each_photo_by_itself_and_stays_near(rng):
    photo = np.asarray(
        Image.fromarray(rng.integers(60, 200, (8, 8, 3), dtype=np.uint8)).resize((32, 32))
    )
    triplets = np.broadcast_to(photo, (5, 3, 32, 32, 3))
    varied = make_augmentation(seed=1)(tf.constant(triplets)).numpy()
    assert varied.dtype == np.uint8 and varied.shape == triplets.shape
    assert len({x.tobytes() for x in varied.reshape(15, -1)}) == 15
    difference = np.abs(varied.astype(int) - photo).mean(axis=(2, 3, 4))
    assert difference.min() > 0 and difference.max() < 60
    again = make_augmentation(seed=1)(tf.constant(triplets)).numpy()
    np.testing.assert_array_equal(varied, again)


def test_augmentation_is_drawn_anew_for_each_batch(shards):
    """Randomness that is frozen when the function is traced would repeat itself."""
    constant = tf.data.Dataset.from_tensors(np.full((2, 3, 16, 16, 3), 128, np.uint8)).repeat(4)
    drawn = [x.numpy().mean() for x in constant.map(make_augmentation(seed=1))]
    assert len(set(drawn)) == 4


@pytest.mark.parametrize("name", ["train00.tfrec"])
def test_a_damaged_shard_is_refused_at_the_start(tmp_path, name, rng):
    from lib.records import RecordError

    (tmp_path / name).write_bytes(rng.bytes(500))
    with pytest.raises(RecordError, match=name):
        DatasetHandler([tmp_path / name], SETTINGS)
