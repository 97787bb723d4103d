"""Vision transformers of keras-hub: their tokens, preprocessing, positions, saving and training.

The presets are tiny networks with random weights, saved to a folder as keras-hub saves its own.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from itertools import cycle
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import ops

from lib.data.catalogue import build_catalogue, split_landmarks
from lib.data.dataset import DatasetHandler, DataSettings
from lib.network import hub
from lib.network.engine import export_engine, load_engine
from lib.network.hub import TokenMap, WeightsUnavailableError
from lib.network.tower import (
    TowerSettings,
    build_tower,
    compute_precision,
    embed,
    feature_maps,
    fingerprint,
    frozen_trunk,
    layers_of,
    load_tower,
    other_weights,
    resized,
    save_tower,
)
from lib.training.checkpoint import TrainingError
from lib.training.features import build_cache
from lib.training.stages import MODEL, Stage, TrainingSettings, set_trainable, train

needs_keras_hub = pytest.mark.skipif(
    importlib.util.find_spec("keras_hub") is None, reason="needs keras-hub: make hub"
)
SIZE, PATCH, CHANNELS = 48, 8, 16
REGISTERS = {"dinov2_with_registers": 3, "dinov3": 4}
NAMES = ("dinov2", "dinov2_with_registers", "dinov3", "clip", "siglip")
MEAN, STD = np.array([0.5, 0.4, 0.3]), np.array([0.2, 0.25, 0.4])


def save_preset(folder: Path, name: str) -> str:
    """Save a tiny preset with random weights, and return the name of its backbone."""
    import keras_hub
    from keras_hub import layers, models

    keras.utils.set_random_seed(0)
    image = {"image_shape": (SIZE, SIZE, 3)}
    shape = {"hidden_dim": CHANNELS, "num_layers": 2, "num_heads": 2, "intermediate_dim": 32}
    text = {"vocabulary_size": 9, "embedding_dim": 8, **shape}
    vision = shape | image | {"patch_size": PATCH}
    if name.startswith("dinov2"):
        place = {"position_embedding_shape": (SIZE, SIZE, 3)}
        registers = REGISTERS.get(name, 0)
        network = models.DINOV2Backbone(**vision, **place, num_register_tokens=registers)
        kind = layers.DINOV2ImageConverter
    elif name == "dinov3":
        network = models.DINOV3Backbone(**vision, num_register_tokens=REGISTERS[name])
        kind = layers.DINOV3ImageConverter
    elif name == "clip":
        texts = models.CLIPTextEncoder(**text, max_sequence_length=4)
        network = models.CLIPBackbone(models.CLIPVisionEncoder(**vision), texts, projection_dim=8)
        kind = layers.CLIPImageConverter
        ids = network.vision_encoder.embedding.position_ids
        ids.assign(np.arange(37)[None])  # as in a trained preset; a new one has zeros
    else:
        texts = models.SigLIPTextEncoder(**text, max_sequence_length=4)
        network = models.SigLIPBackbone(models.SigLIPVisionEncoder(**vision), texts)
        kind = layers.SigLIPImageConverter
    rng = np.random.default_rng(0)
    for weight in network.weights:  # no zeros, else registers and biases would show nothing
        if weight.name not in ("position_ids", "interpolated_position_embeddings"):
            weight.assign(weight + rng.normal(0, 0.1, weight.shape))
    if name.startswith("dinov2"):
        own = network.embeddings
        own.interpolated_position_embeddings.assign(own.position_embeddings)
    assert isinstance(network, keras_hub.models.Backbone)
    network.save_to_preset(folder)
    colours = {"scale": list(1 / (255 * STD)), "offset": list(-MEAN / STD)}
    kind(image_size=(SIZE, SIZE), **colours).save_to_preset(folder)
    return f"hub:{folder}"


@pytest.fixture(scope="module")
def presets(tmp_path_factory) -> dict[str, str]:
    """The backbone of each preset, by name."""
    folder = tmp_path_factory.mktemp("presets")
    return {name: save_preset(folder / name, name) for name in NAMES}


@pytest.fixture
def photos(rng) -> np.ndarray:
    return rng.integers(0, 256, (3, SIZE, SIZE, 3), dtype=np.uint8)


def settings(backbone: str, pooling: str = "class", **others) -> TowerSettings:
    return TowerSettings(SIZE, 8, pooling=pooling, backbone=backbone, weights="hub", **others)


# ---- without keras-hub


def test_the_map_is_of_the_patches_row_by_row_or_of_the_first_token():
    tokens = np.array([-1, -2, -3, 1, 2, 3, 4], np.float32)[None, :, None] * [1, 10]
    maps = ops.convert_to_numpy(TokenMap(skipped=3)(tokens))
    np.testing.assert_array_equal(maps[..., 0], [[[1, 2], [3, 4]]])
    np.testing.assert_array_equal(maps[..., 1], [[[10, 20], [30, 40]]])
    first = ops.convert_to_numpy(TokenMap(skipped=None)(tokens))
    np.testing.assert_array_equal(first, [[[[-1, -10]]]])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pooling": "gem"}, r'signed, and GeM .*choose pooling="class" or "average"'),
        ({"pooling": "gem-per-channel"}, "signed, and GeM"),
        ({"weights": "imagenet"}, 'weights of hub:dinov2_small are weights="hub"'),
        ({"weights": "own.weights.h5"}, 'weights of hub:dinov2_small are weights="hub"'),
        ({"width": 0.5}, "hub:dinov2_small has one width only"),
        ({"last_stage": 4}, "hub:dinov2_small is taken whole"),
        ({"backbone": "ResNet50"}, 'weights of ResNet50 are weights="imagenet"'),
        ({"backbone": "ResNet50", "weights": ""}, "ResNet50 has no class token"),
        ({"backbone": "dinov2_small"}, "no backbone 'dinov2_small'; .*such as hub:dinov2_small"),
    ],
)
def test_settings_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(settings("hub:dinov2_small"), **change)


def test_where_a_preset_can_not_be_had_a_package_has_weights():
    instead = other_weights(settings("hub:dinov2_small"))
    assert (instead.backbone, instead.weights) == ("EfficientNetLite0", "packaged")
    assert (instead.pooling, instead.image_size) == ("gem", SIZE)
    assert other_weights(settings("hub:dinov2_small", "average")).pooling == "average"


def test_without_keras_hub_one_line_names_the_cure(monkeypatch):
    monkeypatch.setitem(sys.modules, "keras_hub", None)
    with pytest.raises(ImportError, match=r"hub: need keras-hub.*`make hub`") as caught:
        build_tower(settings("hub:dinov2_small"))
    assert "\n" not in str(caught.value)


# ---- with tiny presets


@needs_keras_hub
@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
def test_tokens_are_class_then_registers_then_patches(presets, name):
    """The photo says which patch is which, and the embedding's weights which token is which."""
    backbone = hub.build(presets[name], SIZE)
    embedding = next(layer for layer in backbone.layers if "embedding" in layer.name)
    values = {"cls_token": -1, "class_embedding": -1, "register_tokens": -2}
    for weight in embedding.weights:
        weight.assign(np.full(weight.shape, values.get(weight.name, 0), weight.dtype))
    kernel = np.zeros((PATCH, PATCH, 3, CHANNELS), np.float32)
    kernel[0, 0, 0] = 1  # a token is the red of its patch's first pixel
    next(w for w in embedding.weights if w.shape == kernel.shape).assign(kernel)
    patches = np.arange(36, dtype=np.float32).reshape(6, 6)
    photo = np.zeros((1, SIZE, SIZE, 3), np.float32)
    photo[0, ::PATCH, ::PATCH, 0] = patches
    tokens = ops.convert_to_numpy(embedding(photo))
    before = [] if name == "siglip" else [-1] + [-2] * REGISTERS.get(name, 0)
    np.testing.assert_array_equal(tokens[0, :, 0], [*before, *range(36)])
    maps = ops.convert_to_numpy(backbone.get_layer("token_map")(tokens))
    np.testing.assert_array_equal(maps[0, :, :, 5], patches)


@needs_keras_hub
@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
def test_a_tower_has_the_tokens_of_keras_hub_and_is_saved_whole(presets, name, photos, tmp_path):
    from keras_hub import layers, models

    folder = presets[name].removeprefix("hub:")
    network = models.Backbone.from_preset(folder)
    network = getattr(network, "vision_encoder", network)
    pixels = layers.ImageConverter.from_preset(folder)(photos.astype(np.float32))
    expected = (photos / 255 - MEAN) / STD  # divided by 255 once
    np.testing.assert_allclose(ops.convert_to_numpy(pixels), expected, atol=1e-5)
    tokens = ops.convert_to_numpy(network(pixels))
    if name == "siglip":
        first, rest = tokens, keras.Model(network.inputs[0], network.post_layer_norm.output)(pixels)
        patches = ops.convert_to_numpy(rest)
    else:
        first, patches = tokens[:, 0], tokens[:, 1 + REGISTERS.get(name, 0) :]
    found = {}
    for pooling, maps in (("class", first), ("average", patches.reshape(3, 6, 6, CHANNELS))):
        tower = build_tower(settings(presets[name], pooling))
        own = ops.convert_to_numpy(tower.get_layer("trunk")(photos))
        np.testing.assert_allclose(own, maps.reshape(own.shape), atol=1e-4)
        save_tower(tower, tmp_path / "model.keras")
        loaded = load_tower(tmp_path / "model.keras")
        assert fingerprint(loaded) == fingerprint(tower)
        np.testing.assert_array_equal(embed(loaded, photos), embed(tower, photos))
        vectors = maps.reshape(3, -1, CHANNELS).mean(axis=1)  # one token, or all
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        np.testing.assert_allclose(embed(frozen_trunk(tower), photos), vectors, atol=1e-4)
        assert feature_maps(tower, photos).dtype == np.float16
        found[pooling] = fingerprint(tower)
    assert found["class"] != found["average"]


@needs_keras_hub
@pytest.mark.long
@pytest.mark.parametrize(("name", "pooling"), list(zip(NAMES, cycle(("class", "average")))))
def test_an_exported_tower_embeds_alike(presets, name, pooling, photos, tmp_path):
    tower = build_tower(settings(presets[name], pooling))
    export_engine(tower, tmp_path / "tower.engine")
    engine = load_engine(tmp_path / "tower.engine", "float32")
    np.testing.assert_allclose(engine.embed(photos), embed(tower, photos), atol=1e-4)
    with pytest.raises(ValueError, match=r"photos of one size: .*leave out views"):
        export_engine(tower, tmp_path / "views.engine", views=(32, 48))


@needs_keras_hub
@pytest.mark.long
@pytest.mark.parametrize("name", ["dinov2", "dinov2_with_registers"])
def test_positions_for_another_size_are_those_of_keras_hub(presets, name, photos):
    from keras_hub import models

    small = photos[:, :32, :32]
    folder = presets[name].removeprefix("hub:")
    network = models.Backbone.from_preset(folder, image_shape=(32, 32, 3))
    pixels = hub.preprocessing(presets[name])(small)
    expected = ops.convert_to_numpy(network(pixels))[:, 0]
    own = ops.convert_to_numpy(hub.build(presets[name], 32, class_token=True)(pixels))
    np.testing.assert_allclose(own[:, 0, 0], expected, atol=1e-5)


@needs_keras_hub
@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
def test_a_resized_tower_is_the_one_built_at_that_size(presets, name, photos):
    tower = build_tower(settings(presets[name], "average"))
    other = resized(tower, 32)
    assert other.get_layer("trunk").output_shape == (None, 4, 4, CHANNELS)
    direct = build_tower(replace(settings(presets[name], "average"), image_size=32))
    trunks = [one.get_layer("trunk") for one in (other, direct)]
    for a, b in zip(*(trunk.get_weights() for trunk in trunks), strict=True):
        np.testing.assert_array_equal(a, b)
    direct.get_layer("head").set_weights(tower.get_layer("head").get_weights())
    assert fingerprint(other) == fingerprint(direct)
    np.testing.assert_array_equal(
        embed(other, photos[:, :32, :32]), embed(direct, photos[:, :32, :32])
    )
    for build in (lambda: resized(tower, 60), lambda: hub.build(presets[name], 60)):
        with pytest.raises(ValueError, match=r"image_size must be a multiple of 8.*choose 64"):
            build()


@needs_keras_hub
@pytest.mark.long
@pytest.mark.parametrize(("name", "weights"), [("clip", 1), ("siglip", 1), ("dinov2", 2)])
def test_a_ramp_of_positions_stays_one_at_another_size(presets, name, weights):
    backbone = hub.build(presets[name], SIZE)
    ramp = np.repeat(np.arange(6.0), 6)[:, None] * np.ones(CHANNELS)  # by the row of the patch
    before = np.full((int(name != "siglip"), CHANNELS), 9.0)  # of the class
    places = np.concatenate([before, ramp])
    for weight in backbone.layers[1].weights:
        if weight.shape[-2:] == places.shape:
            weight.assign(places.reshape(weight.shape))
    small = hub.resized(backbone, 24).layers[1].weights
    found = [w for w in small if w.shape[-2:] == (len(before) + 9, CHANNELS)]
    assert len(found) == weights
    for weight in found:
        rows = ops.convert_to_numpy(weight).reshape(-1, CHANNELS)
        np.testing.assert_array_equal(rows[:-9], before)
        np.testing.assert_allclose(rows[-9:].reshape(3, 3, -1)[1], 2.5, atol=1e-5)
    # CLIP's of another size were all 0 once: every patch had the first position.
    ids = [ops.convert_to_numpy(w) for w in small if w.name == "position_ids"]
    assert all(np.array_equal(of[0], np.arange(of.shape[1])) for of in ids)
    assert len(ids) == (name != "dinov2")


@needs_keras_hub
@pytest.mark.long
def test_mixed_precision_and_random_weights(presets, photos):
    for name in NAMES:
        mixed = build_tower(settings(presets[name], precision="mixed_bfloat16"))
        assert compute_precision(mixed) == "bfloat16" and mixed.output.dtype == "float32"
        assert mixed.get_layer("trunk").get_layer("preprocessing").compute_dtype == "float32"
        exact = build_tower(settings(presets[name]))
        exact.set_weights(mixed.get_weights())
        cosine = (embed(exact, photos) * embed(mixed, photos)).sum(axis=1)
        assert 0.98 < cosine.min() < 1 - 1e-7
        random = build_tower(replace(settings(presets[name]), weights=""))
        trunks = [one.get_layer("trunk").get_weights() for one in (random, exact)]
        assert any(not np.array_equal(a, b) for a, b in zip(*trunks, strict=True))


@needs_keras_hub
@pytest.mark.long
def test_a_head_is_trained_on_cached_tokens_and_then_the_whole(presets, shards, tmp_path):
    catalogue = build_catalogue(shards)
    part = split_landmarks(catalogue, {"train": 0.7, "validation": 0.3}, seed=0)
    data = DataSettings(image_size=SIZE, batch_size=8, seed=1)
    handler = DatasetHandler(catalogue, data, part == "train")
    held_back = DatasetHandler(catalogue, data, part == "validation")
    validation = held_back.photos(held_back.validation_triplets(20))
    tower = build_tower(settings(presets["dinov2"], "average"))
    before = {w.path: ops.convert_to_numpy(w) for w in tower.weights}
    cache = build_cache(tower.get_layer("trunk"), handler, tmp_path / "features")
    assert cache.map_shape == (6, 6, CHANNELS)
    stages = (Stage("head", epochs=1, steps_per_epoch=20, learning_rate=1e-2),)
    (tmp_path / "head").mkdir()
    training = TrainingSettings(stages)
    history = train(tower, handler, validation, training, tmp_path / "head", cache)
    assert np.isfinite(history["loss"]).all() and np.isnan(history["p"]).all()
    moved = {w.path for w in tower.weights if (ops.convert_to_numpy(w) != before[w.path]).any()}
    assert moved and all("trunk" not in path for path in moved)

    # Whether DINOv2's positions were saved depended on the sign of their change: they stay fixed.
    stages += (Stage("all", epochs=1, steps_per_epoch=2, learning_rate=1e-2),)
    (tmp_path / "all").mkdir()
    train(tower, handler, validation, TrainingSettings(stages), tmp_path / "all", cache)
    assert fingerprint(load_tower(tmp_path / "all" / MODEL)) == fingerprint(tower)
    backbone = tower.get_layer("trunk").get_layer("backbone")
    assert not backbone.layers[1].trainable_weights and backbone.layers[2].trainable
    # Of a loaded tower, whose layers know that they are fixed, parts of them were trained.
    for part, trained in (("all", True), ("head", False)):
        loaded = load_tower(tmp_path / "all" / MODEL)
        set_trainable(loaded, part, "live")
        weights = {layer.name: layer.weights for layer in layers_of(loaded.get_layer("trunk"))}
        names = {name for name, of in weights.items() if any(w.trainable for w in of)}
        assert bool(names) == trained and not any("embedding" in name for name in names)
    stages = (replace(stages[1], train="last-block"),)
    with pytest.raises(TrainingError, match="no last block"):
        train(tower, handler, validation, TrainingSettings(stages), tmp_path / "last-block")


@needs_keras_hub
@pytest.mark.long
def test_presets_that_can_not_be_had_are_one_clear_line(presets, tmp_path):
    folder = presets["dinov2"].removeprefix("hub:")

    def refused(error, message, **changes):
        with pytest.raises(error, match=message) as caught:
            build_tower(replace(settings(f"hub:{tmp_path / 'preset'}"), **changes))
        assert "\n" not in str(caught.value)

    refused(
        WeightsUnavailableError,
        "could not load the preset no_such_preset .*hub:PATH",
        backbone="hub:no_such_preset",
    )
    shutil.copytree(folder, tmp_path / "preset")
    build_tower(settings(f"hub:{tmp_path / 'preset'}"))
    (tmp_path / "preset" / "model.weights.h5").write_bytes(b"not weights")
    refused(WeightsUnavailableError, "could not load the preset")
    (tmp_path / "preset" / "image_converter.json").unlink()
    refused(WeightsUnavailableError, "with its image converter", weights="")
    config = json.loads((Path(folder) / "config.json").read_text())
    config |= {"registered_name": "keras_hub>DINOV9Backbone", "class_name": "DINOV9Backbone"}
    (tmp_path / "preset" / "config.json").write_text(json.dumps(config))
    refused(WeightsUnavailableError, "DINOV9Backbone")  # too old a version of keras-hub


@needs_keras_hub
@pytest.mark.long
def test_other_families_are_refused(tmp_path):
    from keras_hub import models

    shape = {"num_layers": 1, "num_heads": 1, "hidden_dim": 8, "mlp_dim": 8}
    other = models.ViTBackbone((SIZE, SIZE, 3), PATCH, **shape)
    other.save_to_preset(tmp_path)
    with pytest.raises(ValueError, match="is a ViTBackbone, not one of DINOV2Backbone"):
        hub.build(f"hub:{tmp_path}", SIZE)


FRESH_PROCESS = """
import json, sys
from pathlib import Path
import numpy as np
from lib.network.tower import TowerSettings, build_tower, embed, fingerprint, load_tower
folder, presets = Path(sys.argv[1]), json.loads(sys.argv[2])
if not presets:
    sys.modules["keras_hub"] = None
    load_tower(folder / "dinov2.keras")
for name, backbone in presets.items():
    loaded = load_tower(folder / f"{name}.keras")
    np.save(folder / f"{name}.npy", embed(loaded, np.load(folder / "photos.npy")))
    settings = TowerSettings(48, 8, pooling="class", backbone=backbone, weights="hub")
    built = build_tower(settings)
    built.get_layer("head").set_weights(loaded.get_layer("head").get_weights())
    assert fingerprint(built) == fingerprint(loaded)
"""


@pytest.fixture(scope="module")
def saved(presets, tmp_path_factory) -> Path:
    """A folder with a tower of each preset, and photos."""
    folder = tmp_path_factory.mktemp("saved")
    for name in NAMES:
        save_tower(build_tower(settings(presets[name])), folder / f"{name}.keras")
    values = np.random.default_rng(0).integers(0, 256, (3, SIZE, SIZE, 3), dtype=np.uint8)
    np.save(folder / "photos.npy", values)
    return folder


@needs_keras_hub
@pytest.mark.long
@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_other_backends_build_and_load_the_same_towers(presets, saved, backend):
    if backend == "torch":
        pytest.importorskip("torch", reason="needs PyTorch: make backends")
    some = {name: presets[name] for name in ("dinov2_with_registers", "siglip")}
    command = [sys.executable, "-c", FRESH_PROCESS, saved, json.dumps(some)]
    subprocess.run(command, check=True, env=os.environ | {"KERAS_BACKEND": backend})
    for name in some:
        expected = embed(load_tower(saved / f"{name}.keras"), np.load(saved / "photos.npy"))
        np.testing.assert_allclose(np.load(saved / f"{name}.npy"), expected, atol=1e-4)


@needs_keras_hub
@pytest.mark.long
def test_a_saved_tower_names_what_is_missing_to_load_it(saved):
    command = [sys.executable, "-c", FRESH_PROCESS, saved, "{}"]
    process = subprocess.run(command, capture_output=True, text=True)
    assert "ImportError: backbones that begin with hub: need keras-hub" in process.stderr
