"""What one of several processes does: its rows of a batch, and clear words where something lacks.

That several train as one, tests/cluster/test_ray.py shows.
"""

import sys

import keras
import numpy as np
import pytest

import lib.data.dataset
import lib.training.features
from lib.cluster.emulated import ClusterError, import_ray
from lib.cluster.ray import ClusterSettings, embed
from lib.data.catalogue import build_catalogue
from lib.data.dataset import DatasetHandler, DataSettings
from lib.data_parallel import as_the_first, by_itself, own_rows, together
from lib.training.features import FeatureBatches, FeatureCache
from tests.training.test_stages import tiny_tower

SHARES = (slice(0, 4), slice(4, 8))


@pytest.fixture(scope="module")
def catalogue(shards):
    return build_catalogue(shards)


@pytest.mark.parametrize("pictures_per_landmark", [0, 2])
def test_the_shares_of_a_batch_are_the_batch(catalogue, monkeypatch, pictures_per_landmark):
    size = 4 if pictures_per_landmark else 8
    settings = DataSettings(16, size, pictures_per_landmark, seed=3)
    handler = DatasetHandler(catalogue, settings)
    whole = [handler.training_batches(epoch=1, steps=2)[step] for step in (0, 1)]
    shares = []
    for rows in SHARES:
        monkeypatch.setattr(lib.data.dataset, "own_rows", lambda n, rows=rows: {8: rows}[n])
        shares.append([handler.training_batches(epoch=1, steps=2)[step] for step in (0, 1)])
    for step in (0, 1):
        for kind in (0, 1):  # photos, augmented alike; groups
            parts = [share[step][kind] for share in shares]
            assert len(parts[0]) == len(parts[1]) == 4
            np.testing.assert_array_equal(np.concatenate(parts), whole[step][kind])


def test_the_shares_of_a_cached_batch_are_the_batch(catalogue, monkeypatch, tmp_path, rng):
    handler = DatasetHandler(catalogue, DataSettings(16, 8, seed=3))
    pictures = np.unique(handler.triplets)
    maps = rng.random((len(pictures), 2, 1, 1, 4)).astype(np.float16)
    np.save(tmp_path / "maps0000.npy", maps)
    cache = FeatureCache(handler, tmp_path, pictures, 2, (1, 1, 4))
    plan = handler.training_batches(0, 1).plan

    def batch():
        batches = FeatureBatches(cache, plan, 0)
        batches.teacher = np.eye(len(catalogue.pictures), dtype=np.float32)
        return batches[0]

    whole, shares = batch(), []
    for rows in SHARES:
        monkeypatch.setattr(lib.data.dataset, "own_rows", lambda n, rows=rows: rows)
        shares.append(batch())
    for kind in (0, 1, 2):
        parts = [share[kind] for share in shares]
        np.testing.assert_array_equal(np.concatenate(parts), whole[kind])


def test_one_process_is_left_as_it_is():
    tower = tiny_tower()
    with by_itself(tower) as same:
        assert same is tower
    assert own_rows(5) == slice(None)
    assert as_the_first({"val_map": 0.1}) == {"val_map": 0.1}


@pytest.mark.skipif(keras.backend.backend() == "jax", reason="about the other backends")
def test_training_together_needs_jax():
    with pytest.raises(RuntimeError, match="set KERAS_BACKEND=jax"), together(0):
        pass


def test_without_ray_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ClusterError, match="extra cluster, by `make cluster`"):
        import_ray()
    with pytest.raises(ValueError, match="workers must be at least 1"):
        ClusterSettings(workers=0)


def test_a_worker_computes_on_the_cores_that_are_counted_for_it():
    threads = [ClusterSettings(share_of_processor=share).threads for share in (0.2, 1, 8)]
    assert threads == [1, 1, 8]


def test_no_gpu_is_taken_for_an_exported_tower(tmp_path):
    with pytest.raises(ClusterError, match=r"tower\.engine .* take the \.keras file"):
        embed(tmp_path / "tower.engine", None, tmp_path / "out", cluster=ClusterSettings(gpus=1))
    assert not any(tmp_path.iterdir())
