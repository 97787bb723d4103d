"""The feature cache: the trunk's own maps, the handler's own batches, whole whatever happens."""

import fcntl
import json
import os
import resource
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import keras
import numpy as np
import pytest

from lib.data.catalogue import open_catalogue
from lib.data.dataset import DatasetHandler, DataSettings
from lib.data.decoding import Augmentation
from lib.data.sampling import SamplingError
from lib.network.tower import computing_in
from lib.training import features
from lib.training.features import MANIFEST, FeatureCacheError, FrozenTrunk, build_cache

SETTINGS = DataSettings(image_size=16, batch_size=4, seed=1)


@pytest.fixture(scope="module")
def catalogue(small_world):
    return open_catalogue(small_world / "Dataset" / "demo_world")


@pytest.fixture(scope="module")
def handler(catalogue):
    return DatasetHandler(catalogue, SETTINGS)


def make_trunk(seed: int = 0, scale: float = 1 / 255) -> keras.Model:
    keras.utils.set_random_seed(seed)
    photos = keras.Input((16, 16, 3), dtype="uint8")
    x = keras.layers.Conv2D(8, 3, 4, activation="relu")(keras.layers.Rescaling(scale)(photos))
    return keras.Model(photos, x, name="trunk")


@pytest.fixture(scope="module")
def trunk():
    return make_trunk()


@pytest.fixture
def small_files(monkeypatch):
    monkeypatch.setattr(features, "_SHARD_BYTES", 1)  # 64 pictures a file, the fewest there can be


@pytest.fixture(scope="module")
def cache(trunk, handler, tmp_path_factory):
    return build_cache(trunk, handler, tmp_path_factory.mktemp("features"), 3, engine="keras")


def content(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.npy")}


def test_variant_0_is_what_the_trunk_makes_of_the_picture_as_it_is_stored(cache, trunk, handler):
    some = cache.pictures[[5, 0, 70, 5, -1, 9]].reshape(2, 3)
    maps = cache.maps(some, variant=0)
    assert maps.dtype == np.float16 and maps.shape == (2, 3, 4, 4, 8) == (2, 3, *cache.map_shape)
    expected = trunk.predict(handler.photos(some.ravel()), verbose=0).reshape(maps.shape)
    np.testing.assert_allclose(maps, expected, rtol=2e-3, atol=1e-5)


def test_other_variants_are_augmented_each_photo_in_its_own_way(trunk, catalogue, tmp_path):
    """Brightness alone, on a trunk that is linear in it: the change must be one of the drawn."""
    photos = keras.Input((16, 16, 3), dtype="uint8")
    x = keras.layers.AveragePooling2D(16)(keras.layers.Rescaling(1 / 255)(photos))
    means = keras.Model(photos, x, name="trunk")
    lighter = Augmentation(shift=0.0, contrast=0.0, brightness=0.15)
    handler = DatasetHandler(catalogue, replace(SETTINGS, augmentation=lighter))
    cache = build_cache(means, handler, tmp_path, 3, engine="keras")
    plain, *varied = (cache.maps(cache.pictures, v).astype(float) for v in range(3))
    middle = ((plain > 0.3) & (plain < 0.7)).all(axis=(1, 2, 3))  # where little is cut off
    assert middle.sum() > 50
    shifts = [(v - plain)[middle].mean(axis=(1, 2, 3)) for v in varied]
    for shift in shifts:
        assert np.abs(shift).max() < 0.16 and shift.std() > 0.05  # uniform: 0.15 / sqrt(3) = 0.087
    assert abs(np.corrcoef(*shifts)[0, 1]) < 0.4


@pytest.mark.parametrize("k", [0, 2, 3])
def test_cached_are_just_the_pictures_that_training_can_meet(trunk, catalogue, tmp_path, k):
    some = catalogue.pictures["group"].to_numpy() % 3 > 0
    settings = replace(SETTINGS, pictures_per_landmark=k, augmentation=None)
    handler = DatasetHandler(catalogue, settings, some)
    cache = build_cache(trunk, handler, tmp_path, 1, engine="keras")
    plan = np.concatenate([cache.batches(epoch, 100).plan.ravel() for epoch in range(5)])
    np.testing.assert_array_equal(np.unique(plan), cache.pictures)
    assert 0 < len(cache.pictures) < some.sum() < len(some)
    elsewhere = np.flatnonzero(~some)[0]
    with pytest.raises(KeyError, match=rf"1 pictures \(first: {elsewhere}\)"):
        cache.maps(np.array([cache.pictures[0], elsewhere]), 0)


@pytest.mark.parametrize("k", [0, 2])
def test_batches_are_the_handlers_with_a_variant_drawn_for_each_photo(
    trunk, catalogue, tmp_path, k
):
    handler = DatasetHandler(catalogue, replace(SETTINGS, pictures_per_landmark=k))
    cache = build_cache(trunk, handler, tmp_path, 3, engine="keras")
    ours, theirs = cache.batches(epoch=2, steps=6), handler.training_batches(epoch=2, steps=6)
    assert len(ours) == 6
    drawn = []
    for step in range(6):
        (maps, groups), (photos, expected) = ours[step], theirs[step]
        assert maps.dtype == np.float16 and maps.shape == (*photos.shape[:-3], 4, 4, 8)
        np.testing.assert_array_equal(groups, expected)
        variants = np.stack([cache.maps(theirs.plan[step], v) for v in range(3)])
        is_it = (variants == maps).all(axis=(-3, -2, -1))
        assert is_it.any(axis=0).all()
        drawn.append(is_it.argmax(axis=0))
    share = np.bincount(np.ravel(drawn), minlength=3) / np.size(drawn)
    assert share.min() > 0.15
    np.testing.assert_array_equal(cache.batches(2, 6)[4][0], ours[4][0])
    again = cache.batches(3, 6)
    again.plan = ours.plan
    assert not np.array_equal(again[4][0], ours[4][0])  # another epoch, other variants


def test_the_queue_is_bounded_whatever_the_number_of_cores(cache, monkeypatch):
    """Before, it held two batches a core: on 64 cores 128 batches, of 12 MB each."""
    monkeypatch.setattr(features, "_THREADS", 64)
    assert cache.batches(0, 1).max_queue_size <= 16


def test_fit_trains_a_head_on_them(cache):
    maps = keras.Input(cache.map_shape)
    triplets = keras.Input((3, *cache.map_shape))
    head = keras.Model(maps, keras.layers.Dense(4)(keras.layers.GlobalMaxPooling2D()(maps)))
    model = keras.Model(triplets, keras.ops.stack([head(triplets[:, i]) for i in range(3)], axis=1))
    seen = []

    def loss(groups, embeddings):
        seen.append((embeddings.dtype, embeddings.shape[1:]))
        return keras.ops.mean(keras.ops.square(embeddings))

    model.compile(keras.optimizers.Adam(0.01), loss=loss)
    losses = [model.fit(cache.batches(e, 8), verbose=0).history["loss"][0] for e in range(3)]
    assert losses[2] < losses[0] and seen == [("float32", (3, 4))] * len(seen)


def test_a_cache_is_found_again_and_made_of_the_same_bytes_anywhere(
    trunk, handler, catalogue, cache, tmp_path, small_files, capsys
):
    first = build_cache(trunk, handler, tmp_path / "a", 2, engine="keras")
    maps = content(first.folder)
    assert len(maps) == -(-len(first.pictures) // 64) > 2
    stamps = {path: path.stat().st_mtime_ns for path in first.folder.iterdir()}
    capsys.readouterr()
    # Neither the size of batches nor another handler of the same pictures makes a difference.
    other = DatasetHandler(catalogue, replace(SETTINGS, batch_size=7))
    assert build_cache(trunk, other, tmp_path / "a", 2, engine="keras").folder == first.folder
    assert {path: path.stat().st_mtime_ns for path in first.folder.iterdir()} == stamps
    assert capsys.readouterr().out == ""  # nothing to compute, nothing to state
    assert content(build_cache(make_trunk(), other, tmp_path / "b", 2, "keras").folder) == maps
    # Where a file ends does not matter for what is in it.
    np.testing.assert_array_equal(first.maps(first.pictures, 1), cache.maps(cache.pictures, 1))


def test_whatever_changes_the_maps_makes_another_cache(trunk, handler, catalogue, cache):
    folder, some = cache.folder.parent, np.arange(len(catalogue.pictures)) % 20 > 0

    def of(trunk=trunk, chosen=None, variants=3, engine="keras", **settings):
        handler = DatasetHandler(catalogue, replace(SETTINGS, **settings), chosen)
        return build_cache(trunk, handler, folder, variants, engine).folder

    others = [
        of(make_trunk(seed=1)),
        of(chosen=some),
        of(variants=2),
        of(variants=1),
        of(engine="openvino"),
        of(seed=2),
        of(augmentation=Augmentation(shift=0.1)),
        of(pictures_per_landmark=2),
    ]
    assert of() == cache.folder and len({cache.folder, *others}) == 9
    # Without augmented variants nothing is drawn, and the augmentation does not matter.
    assert of(variants=1, seed=5, augmentation=None) == others[3]


def test_a_picture_that_changes_is_computed_again(trunk, catalogue, handler, cache):
    rows = catalogue.rows.copy()
    rows.at[0, "image"] = bytes(16)
    changed = DatasetHandler(replace(catalogue, rows=rows), SETTINGS)
    made_of, before = (
        features._identity(trunk, "keras float32", of, cache.pictures, 3)
        for of in (changed, handler)
    )
    assert made_of.pop("pictures") != before.pop("pictures") and made_of == before


@pytest.mark.parametrize(
    "damage",
    [
        lambda file: file.write_bytes(file.read_bytes()[:-1]),
        lambda file: file.write_bytes(file.read_bytes()[:-1] + b"\x7f"),
        lambda file: file.unlink(),
        lambda file: (file.parent / MANIFEST).write_text('{"files": '),
        lambda file: (file.parent / MANIFEST).write_text('["files"]'),
        lambda file: (file.parent / MANIFEST).unlink(),
    ],
)
def test_damage_is_found_and_repaired(trunk, handler, tmp_path, small_files, damage, capsys):
    first = build_cache(trunk, handler, tmp_path, 2, engine="keras")
    maps = content(first.folder)
    file = first.folder / "maps0001.npy"
    untouched = (first.folder / "maps0000.npy").stat().st_ino
    damage(file)
    listed = (first.folder / MANIFEST).is_file() and b"made_of" in (
        first.folder / MANIFEST
    ).read_bytes()
    capsys.readouterr()
    again = build_cache(trunk, handler, tmp_path, 2, engine="keras")
    assert content(again.folder) == maps
    said = capsys.readouterr().out
    if listed:
        assert "maps0001.npy is missing or damaged" in said
        assert (first.folder / "maps0000.npy").stat().st_ino == untouched
    assert "feature cache: " in said


def test_the_size_is_stated_before_anything_is_computed(
    trunk, handler, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(FrozenTrunk, "__call__", lambda self, photos: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        build_cache(trunk, handler, tmp_path, 2, engine="keras")
    n = len(np.unique(handler.triplets))
    said = capsys.readouterr().out
    assert f"{n} pictures x 2 variants x 256 bytes = {n * 512 / 1e9:.2f} GB; " in said
    assert "GB free; by keras float32" in said

    def with_free(free):
        monkeypatch.setattr(features.shutil, "disk_usage", lambda _: SimpleNamespace(free=free))

    with_free(n * 512)
    with pytest.raises(ZeroDivisionError):  # just enough
        build_cache(trunk, handler, tmp_path, 2, engine="keras")
    with_free(n * 512 - 1)
    with pytest.raises(FeatureCacheError, match="choose fewer variants or another folder"):
        build_cache(trunk, handler, tmp_path, 2, engine="keras")
    assert not list(tmp_path.rglob("*.npy"))


def test_what_is_there_counts_when_space_is_short(
    trunk, handler, tmp_path, small_files, monkeypatch, capsys
):
    cache = build_cache(trunk, handler, tmp_path, 2, engine="keras")
    (cache.folder / "maps0001.npy").unlink()
    monkeypatch.setattr(
        features.shutil, "disk_usage", lambda _: SimpleNamespace(free=64 * cache.bytes_per_map * 2)
    )
    build_cache(trunk, handler, tmp_path, 2, engine="keras")
    there = (cache.bytes - 64 * 2 * cache.bytes_per_map) / 1e9
    assert f"GB, {there:.2f} GB of them there; " in capsys.readouterr().out
    with pytest.raises(FeatureCacheError, match="or delete the other caches there"):
        build_cache(make_trunk(seed=1), handler, tmp_path, 2, engine="keras")


def test_a_disk_that_fills_up_is_named_with_the_cure(trunk, handler, tmp_path):
    """Before, the bare OSError came through."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(FeatureCacheError, match=r"written \(File too large\): make room"):
            build_cache(trunk, handler, tmp_path, 2, engine="keras")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.name != ".lock"]
    build_cache(trunk, handler, tmp_path, 2, engine="keras")
    (tmp_path / "file").touch()
    with pytest.raises(FeatureCacheError, match="choose another folder"):
        build_cache(trunk, handler, tmp_path / "file", 2, engine="keras")


def test_one_process_builds_at_a_time(trunk, handler, tmp_path):
    folder = build_cache(trunk, handler, tmp_path, 1, engine="keras").folder
    with (folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        # Reading needs no lock.
        assert build_cache(trunk, handler, tmp_path, 1, engine="keras").folder == folder
        (folder / "maps0000.npy").unlink()
        with pytest.raises(FeatureCacheError, match="another process builds"):
            build_cache(trunk, handler, tmp_path, 1, engine="keras")
    build_cache(trunk, handler, tmp_path, 1, engine="keras")


def test_what_makes_no_sense_is_refused(trunk, handler, catalogue, tmp_path):
    with pytest.raises(ValueError, match="unknown engine 'tpu'; choose one of auto, keras"):
        build_cache(trunk, handler, tmp_path, 2, engine="tpu")
    with pytest.raises(ValueError, match="0 variants"):
        build_cache(trunk, handler, tmp_path, 0)
    plain = DatasetHandler(catalogue, replace(SETTINGS, augmentation=None))
    with pytest.raises(ValueError, match=r"2 variants: .* no other without augmentation"):
        build_cache(trunk, plain, tmp_path, 2)
    larger = DatasetHandler(catalogue, replace(SETTINGS, image_size=32))
    with pytest.raises(ValueError, match="takes photos of 16 pixels, the handler serves 32"):
        build_cache(trunk, larger, tmp_path, 2)
    nothing = DatasetHandler(catalogue, SETTINGS, np.zeros(len(catalogue.pictures), bool))
    with pytest.raises(SamplingError, match="no pictures to train on"):
        build_cache(trunk, nothing, tmp_path, 2)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("engine", ["keras", "openvino"])
def test_maps_that_float16_can_not_hold_are_an_error(engine, handler, tmp_path):
    with pytest.raises(FeatureCacheError, match="float16 ends at 65504"):
        build_cache(make_trunk(scale=1e4), handler, tmp_path, 1, engine)
    assert not list(tmp_path.rglob("*.npy"))


def test_openvino_computes_what_keras_does(trunk, handler):
    photos = handler.photos(np.unique(handler.triplets)[:70])  # a batch, and a smaller one
    ours, keras_ = FrozenTrunk(trunk), FrozenTrunk(trunk, "keras")
    assert ours.name in ("openvino bfloat16", "openvino float32") and keras_.name == "keras float32"
    a, b = ours(photos), keras_(photos)
    assert a.dtype == b.dtype == np.float16 and a.shape == b.shape == (70, 4, 4, 8)
    np.testing.assert_allclose(a, b, rtol=0.02, atol=0.01)
    np.testing.assert_array_equal(ours(photos[64:]), a[64:])
    assert ours(photos[:0]).shape == (0, 4, 4, 8)


def test_a_trunk_in_mixed_precision_is_computed_by_either_engine(trunk, handler):
    with computing_in("mixed_bfloat16"):
        mixed = make_trunk()
    photos = handler.photos(np.unique(handler.triplets)[:9])
    for engine in ("keras", "openvino"):
        frozen = FrozenTrunk(mixed, engine)
        expected = FrozenTrunk(trunk, engine)(photos)
        np.testing.assert_allclose(frozen(photos), expected, rtol=0.03, atol=0.02)
        assert frozen.name == ("keras bfloat16" if engine == "keras" else FrozenTrunk(trunk).name)
    assert mixed.outputs[0].dtype == "bfloat16"


# --------------------------------------------------------------------------------------------------
# Other processes
# --------------------------------------------------------------------------------------------------

# On Keras' NumPy backend, which has no threads that a fork would lose. TensorFlow, which Keras
# imports to write a model's configuration, is imported once, not in each fork; it runs nothing.
KILLED = """
import json, os, signal, sys
from pathlib import Path
import keras, numpy as np, tensorflow, xxhash
from lib.training import features
from lib.data.dataset import DatasetHandler, DataSettings
from lib.data.catalogue import open_catalogue

features._SHARD_BYTES = 1
folder = Path(sys.argv[2])
catalogue = open_catalogue(Path(sys.argv[1]))
some = np.arange(len(catalogue.pictures)) < 150  # a first file, a last, and one between
handler = DatasetHandler(catalogue, DataSettings(image_size=16, seed=1), some)
photos = keras.Input((16, 16, 3), dtype="uint8")
trunk = keras.Model(photos, keras.layers.AveragePooling2D(8)(keras.layers.Rescaling(0.1)(photos)))

def build(place, moment=0):
    "Builds in a process of its own that is killed at a moment; returns whether it was."
    process = os.fork()
    if process == 0:
        sys.stdout = sys.stderr = open(os.devnull, "w")
        moments = iter(range(1, 10_000))

        def mortal(function):
            def called(*args, **kwargs):
                if next(moments) == moment:
                    os.kill(os.getpid(), signal.SIGKILL)
                result = function(*args, **kwargs)
                if next(moments) == moment:
                    os.kill(os.getpid(), signal.SIGKILL)
                return result
            return called

        # What is written survives a process without being flushed to the disk, which takes long.
        os.fsync, Path.replace = mortal(lambda file: None), mortal(Path.replace)
        features.FrozenTrunk.__call__ = mortal(features.FrozenTrunk.__call__)
        try:
            features.build_cache(trunk, handler, place, 2)
        except BaseException:
            os._exit(1)
        os._exit(0)
    status = os.waitpid(process, 0)[1]
    assert status in (0, signal.SIGKILL), status
    return status == signal.SIGKILL

def whole(place):
    "The files the manifest lists, each with the size and checksum it should have."
    manifests = list(place.rglob("manifest.json"))
    listed = json.loads(manifests[0].read_text())["files"] if manifests else {}
    for name, entry in listed.items():
        data = (manifests[0].parent / name).read_bytes()
        assert entry == {"bytes": len(data), "xxh3": xxhash.xxh3_128_hexdigest(data)}, name
    return set(listed)

def content(place):
    return {p.name: p.read_bytes().hex() for p in place.rglob("*") if p.is_file()}

assert not build(folder / "at once")
expected = content(folder / "at once")

moments, killed = 0, True
while killed:  # at each moment in turn, from an empty folder
    moments += 1
    place = folder / str(moments)
    killed = build(place, moments)
    whole(place)
    assert not build(place)
    assert content(place) == expected, moments

attempts, done, place = 0, [set()], folder / "again and again"
while build(place, 22):  # soon after a file is done, time and again
    attempts += 1
    done.append(whole(place))
    assert done[-1] > done[-2]
assert content(place) == expected
print(json.dumps({"files": len(whole(place)), "moments": moments, "attempts": attempts}))
"""


def run(script: str, backend: str, *arguments) -> str:
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        env=os.environ | {"KERAS_BACKEND": backend},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.long
def test_a_build_that_is_killed_at_any_moment_goes_on(small_world, tmp_path):
    result = json.loads(run(KILLED, "numpy", small_world / "Dataset" / "demo_world", tmp_path))
    # Each file: 2 batches computed; 3 calls to make it whole, and 3 for the manifest; each of them
    # has a moment before and one after. Only a moment past the last lets a process live.
    assert result["files"] > 2 and result["moments"] == result["files"] * 16 + 1
    # A process lives for 22 moments: a file and a third. So each finishes one that counts.
    assert result["attempts"] == result["files"] - 1


TRAINED = """
import sys
from pathlib import Path
import keras, numpy as np
from lib.data.dataset import DatasetHandler, DataSettings
from lib.training.features import FrozenTrunk, build_cache
from lib.data.catalogue import open_catalogue

handler = DatasetHandler(
    open_catalogue(Path(sys.argv[1])), DataSettings(image_size=16, batch_size=4, seed=1)
)
handler.photos(np.arange(2))
trunk = keras.saving.load_model(sys.argv[2])
assert "tensorflow" not in sys.modules  # later: Keras imports it to write a model's configuration
cache = build_cache(trunk, handler, Path(sys.argv[3]), 2)
maps = keras.Input((3, *cache.map_shape))
head = keras.Model(maps, keras.ops.mean(keras.layers.Dense(5)(maps), axis=(2, 3)))
head.compile("adam", loss=lambda groups, x: keras.ops.mean(keras.ops.square(x)))
head.fit(cache.batches(0, 8), verbose=0)
np.save(sys.argv[4], cache.maps(cache.pictures, 1))
print(FrozenTrunk(trunk).name)
"""


@pytest.mark.long
@pytest.mark.parametrize(("backend", "engine"), [("jax", "keras"), ("torch", "openvino")])
def test_a_cache_on_another_backend(small_world, trunk, cache, tmp_path, backend, engine):
    pytest.importorskip(backend)
    trunk.save(tmp_path / "trunk.keras")
    places = [small_world / "Dataset" / "demo_world", tmp_path / "trunk.keras", tmp_path / "cache"]
    name = run(TRAINED, backend, *places, tmp_path / "maps.npy").splitlines()[-1]
    assert name.split()[0] == engine
    expected = cache.maps(cache.pictures, 1)
    np.testing.assert_allclose(np.load(tmp_path / "maps.npy"), expected, rtol=0.02, atol=0.01)
