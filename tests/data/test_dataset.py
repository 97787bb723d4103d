"""DatasetHandler: the batches that a plan says, in every process and on every way out."""

import subprocess
import sys
import zlib
from dataclasses import replace

import numpy as np
import pytest

from lib.data.catalogue import build_catalogue, open_catalogue, split_landmarks
from lib.data.dataset import DatasetHandler, DataSettings
from lib.data.decoding import decode
from lib.data.records import RecordError, read_triplets
from lib.data.sampling import SamplingError
from lib.demo.data import plan_triplets
from lib.files import project_root
from tests.conftest import SMALL_WORLD

SETTINGS = DataSettings(image_size=32, batch_size=4, seed=1)


@pytest.fixture(scope="module")
def catalogue(small_world):
    return open_catalogue(small_world / "Dataset" / "demo_world")


@pytest.fixture(scope="module")
def handler(catalogue):
    return DatasetHandler(catalogue, SETTINGS)


def test_one_pass_serves_every_usable_triplet_once(catalogue, shards):
    settings = DataSettings(image_size=128, batch_size=1, augmentation=None)
    handler = DatasetHandler(catalogue, settings)
    stored = [t for shard in shards for t in read_triplets(shard)]
    usable = [t for t in stored if t.anchor != t.positive]
    assert 0 < len(handler.triplets) <= len(usable)
    batches = handler.training_batches(0, len(handler.triplets))
    seen = {batches[i][0].tobytes() for i in range(len(batches))}
    wanted = [np.stack([decode(p, 128) for p in t.pictures])[None].tobytes() for t in usable]
    assert len(seen) == len(handler.triplets) and seen <= set(wanted)
    plan = plan_triplets(SMALL_WORLD)
    kept = {wanted.index(one) for one in seen}
    lost = [t for i, t in enumerate(t for t in plan if t[0] != t[1]) if i not in kept]
    assert len(lost) == len(usable) - len(handler.triplets) <= 0.1 * len(usable)


@pytest.mark.parametrize("k", [0, 3])
def test_batches_have_shapes_types_and_groups(catalogue, k):
    handler = DatasetHandler(catalogue, replace(SETTINGS, pictures_per_landmark=k))
    batches = handler.training_batches(0, 2)
    photos, groups = batches[1]
    shape = (4 * k,) if k else (4, 3)
    assert photos.shape == (*shape, 32, 32, 3) and photos.dtype == np.uint8
    assert groups.shape == shape and groups.dtype == np.int32
    np.testing.assert_array_equal(groups, catalogue.pictures["group"].to_numpy()[batches.plan[1]])
    if not k:
        assert (groups[:, 0] == groups[:, 1]).all() and (groups[:, 0] != groups[:, 2]).all()


@pytest.mark.parametrize("has_teacher", [False, True])
@pytest.mark.parametrize("k", [0, 2])
def test_tf_data_and_pydataset_give_the_same_batches(catalogue, rng, k, has_teacher):
    handler = DatasetHandler(catalogue, replace(SETTINGS, pictures_per_landmark=k))
    batches = handler.training_batches(epoch=3, steps=12)
    if has_teacher:
        batches.teacher = rng.normal(size=(len(catalogue.pictures), 5)).astype(np.float32)
        np.testing.assert_array_equal(batches[4][2], batches.teacher[batches.plan[4]])
    given = batches.as_tf_data()
    # Known before they run, as fit wants it.
    assert [part.shape for part in given.element_spec] == [part.shape for part in batches[0]]
    count = 0
    for step, parts in enumerate(given):
        assert len(parts) == 2 + has_teacher
        for part, expected in zip(parts, batches[step], strict=True):
            np.testing.assert_array_equal(part, expected)
        count += 1
    assert count == len(batches) == 12


def test_order_and_augmentation_follow_from_seed_and_epoch(catalogue, handler):
    def pixels(handler, epoch):
        batches = handler.training_batches(epoch, 3)
        return np.stack([batches[i][0] for i in range(3)])

    first = pixels(handler, 0)
    np.testing.assert_array_equal(first, pixels(DatasetHandler(catalogue, SETTINGS), 0))
    assert not np.array_equal(first, pixels(handler, 1))
    assert not np.array_equal(
        first, pixels(DatasetHandler(catalogue, replace(SETTINGS, seed=2)), 0)
    )


@pytest.mark.long
def test_a_batch_is_the_same_in_another_process_and_without_those_before(small_world, handler):
    """A restarted training, or another worker, begins in the middle of an epoch."""
    script = f"""
import zlib
from pathlib import Path
from lib.data.dataset import DatasetHandler, DataSettings
from lib.data.catalogue import open_catalogue
catalogue = open_catalogue(Path({str(small_world / "Dataset" / "demo_world")!r}))
handler = DatasetHandler(catalogue, DataSettings(image_size=32, batch_size=4, seed=1))
photos, groups = handler.training_batches(epoch=2, steps=9)[7]
print(zlib.crc32(photos.tobytes()), groups.ravel().tolist())
"""
    output = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    ).stdout
    photos, groups = handler.training_batches(epoch=2, steps=9)[7]
    assert output.strip() == f"{zlib.crc32(photos.tobytes())} {groups.ravel().tolist()}"


def test_the_same_photo_is_varied_anew_each_time(catalogue):
    handler = DatasetHandler(catalogue, SETTINGS)
    picture = handler.triplets[0, 0]
    rng = np.random.default_rng(0)
    photos, _ = handler.batch(np.full((5, 3), picture), rng)
    assert len({photo.tobytes() for photo in photos.reshape(15, -1)}) == 15
    plain = handler.photos(np.array(picture))
    assert 0 < np.abs(photos.astype(int) - plain).mean() < 60


def test_validation_triplets_are_of_different_landmarks_by_the_worlds_own_truth(catalogue):
    part = split_landmarks(catalogue, {"train": 0.5, "validation": 0.5}, seed=0)
    handler = DatasetHandler(catalogue, SETTINGS, part == "validation")
    chosen = handler.validation_triplets(limit=1000)
    truth = {}
    for pictures, views in zip(
        catalogue.triplets[["anchor", "positive", "negative"]].to_numpy(),
        plan_triplets(SMALL_WORLD),
        strict=True,
    ):
        truth |= {p: view.landmark for p, view in zip(pictures, views, strict=True)}
    landmarks = [[truth[p] for p in row] for row in chosen]
    assert len({anchor for anchor, _, _ in landmarks}) == len(chosen) > 10
    assert all(a == p != n for a, p, n in landmarks)
    assert (part[chosen] == "validation").all()
    # A smaller number of them: the same landmarks.
    np.testing.assert_array_equal(handler.validation_triplets(limit=5)[:, :2], chosen[:5, :2])
    nothing = DatasetHandler(catalogue, SETTINGS, np.zeros(len(part), bool))
    with pytest.raises(SamplingError, match="0 of the chosen landmarks"):
        nothing.validation_triplets(5)


def test_photos_come_as_stored_at_any_size(handler, shards):
    first = next(read_triplets(shards[0]))
    for size in (128, 50):
        photos = handler.photos(np.array([[0, 1]]), size)
        assert photos.shape == (1, 2, size, size, 3)
        np.testing.assert_array_equal(photos[0, 0], decode(first.anchor, size))


def test_a_shard_that_changes_under_training_is_named(tmp_path, shards):
    shard = tmp_path / "train00.tfrec"
    shard.write_bytes(shards[0].read_bytes())
    handler = DatasetHandler(build_catalogue([shard]), SETTINGS)
    batches = handler.training_batches(0, 1)
    shard.write_bytes(bytes(len(shards[0].read_bytes())))
    with pytest.raises(RecordError, match=r"train00\.tfrec: changed"):
        batches[0]


def test_pictures_of_some_landmarks(catalogue):
    group = catalogue.pictures["group"].to_numpy()
    chosen = group % 2 == 0
    handler = DatasetHandler(catalogue, SETTINGS, chosen)
    pictures = handler.landmark_pictures(5, most=3, seed=0)
    assert chosen[pictures].all() and len(set(pictures)) == len(pictures)
    found, count = np.unique(group[pictures], return_counts=True)
    assert len(found) == 5 and (np.diff(group[pictures]) >= 0).all()
    all_of = np.bincount(group)
    np.testing.assert_array_equal(count, np.minimum(all_of[found], 3))
    assert (count >= 2).all()
    np.testing.assert_array_equal(handler.landmark_pictures(5, 3, seed=0), pictures)
    everything = handler.landmark_pictures(10_000, most=10_000, seed=0)
    assert set(everything) == set(np.flatnonzero(chosen & (all_of[group] >= 2)))


@pytest.mark.long
def test_the_queue_is_bounded_whatever_the_number_of_cores(monkeypatch):
    # It grew with the cores: 3.7 GB on 64 of them.
    code = "import os; os.cpu_count = lambda: 64; import lib.data.dataset as d; "
    code += "assert d._QUEUE <= 16"
    assert subprocess.run([sys.executable, "-c", code], cwd=project_root()).returncode == 0
