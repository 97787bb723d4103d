"""The tower: preprocessing, norm, one tower for three photos, saving, and other backends."""

import functools
import subprocess
import sys
import zipfile
from dataclasses import replace

import keras
import numpy as np
import pytest
from keras import ops

from lib.network import tower as model_module
from lib.network.losses import ArcFace, InfoNCE, MetricLoss
from lib.network.pooling import gem
from lib.network.tower import (
    BACKBONES,
    Preprocessing,
    Siamese,
    TowerSettings,
    WeightsUnavailableError,
    build_backbone,
    build_tower,
    computing_in,
    embed,
    feature_maps,
    fingerprint,
    frozen_trunk,
    gem_exponent,
    layers_of,
    load_tower,
    other_weights,
    resized,
    save_tower,
    to_float16,
)
from tests.conftest import one_block, unit

SMALL = TowerSettings(image_size=32, embedding_size=16, last_stage=3, weights="")


@pytest.fixture(scope="module")
def tower() -> keras.Model:
    keras.utils.set_random_seed(0)
    return build_tower(SMALL)


@pytest.fixture
def short_tower() -> keras.Model:
    keras.utils.set_random_seed(1)
    with one_block():
        return build_tower(SMALL)


@pytest.fixture
def photos(rng) -> np.ndarray:
    return rng.integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)


def test_embeddings_are_float32_of_unit_norm(tower, photos):
    embeddings = embed(tower, photos)
    assert embeddings.shape == (6, 16) and embeddings.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-5)
    assert embed(tower, photos[:0]).shape == (0, 16)


def test_preprocessing_is_resnets_own_on_rgb(tower):
    colour = np.array([250, 100, 10], dtype=np.uint8)
    layer = tower.get_layer("trunk").get_layer("preprocessing")
    output = ops.convert_to_numpy(layer(np.tile(colour, (1, 2, 2, 1))))
    # "caffe" mode: BGR, ImageNet's mean colour subtracted, no division by 255.
    np.testing.assert_allclose(output[0, 0, 0], [10 - 103.939, 100 - 116.779, 250 - 123.68], 1e-5)


def test_channel_order_matters(tower, photos):
    assert not np.allclose(embed(tower, photos), embed(tower, photos[..., ::-1]), atol=1e-3)


def test_the_frozen_trunk_is_its_map_pooled(tower, photos):
    maps = feature_maps(tower, photos).astype(np.float32)
    expected = unit(keras.ops.convert_to_numpy(gem(maps, 3.0)))
    frozen = frozen_trunk(tower)
    np.testing.assert_allclose(embed(frozen, photos), expected, atol=2e-3)
    assert not frozen.get_layer("head").trainable_variables


def test_siamese_is_one_tower_over_all_three_photos(short_tower, photos):
    tower = short_tower
    siamese = Siamese(tower, MetricLoss(InfoNCE()))
    triplets = photos.reshape(2, 3, 32, 32, 3)
    stacked = ops.convert_to_numpy(siamese(triplets))
    assert stacked.shape == (2, 3, 16)
    np.testing.assert_allclose(stacked.reshape(6, 16), embed(tower, photos), atol=1e-5)
    np.testing.assert_array_equal(stacked.reshape(6, 16), ops.convert_to_numpy(siamese(photos)))
    assert len(siamese.trainable_weights) == len(tower.trainable_weights)
    assert siamese.count_params() == tower.count_params()


def test_siamese_trains_the_weights_of_its_loss(short_tower, photos):
    tower = short_tower
    siamese = Siamese(tower, MetricLoss(ArcFace(), n_groups=4))
    assert len(siamese.trainable_weights) == len(tower.trainable_weights) + 1
    siamese.compile(keras.optimizers.SGD(0.0))
    groups = np.array([0, 0, 1, 1, 3, 3])
    loss = siamese.train_on_batch(photos, groups)
    expected = siamese.metric_loss(groups, siamese(photos, training=True))
    assert loss == pytest.approx(float(expected), rel=1e-3)


@pytest.mark.parametrize(("stage", "channels"), [(3, 512), (4, 1024), (5, 2048)])
def test_stages_of_resnet50(stage, channels):
    settings = TowerSettings(image_size=32, embedding_size=8, last_stage=stage, weights="")
    tower = build_tower(settings)
    side = {3: 4, 4: 2, 5: 1}[stage]
    assert tower.get_layer("trunk").output_shape == (None, side, side, channels)
    if stage == 5:  # the whole backbone: as many weights as Keras' own
        backbone = tower.get_layer("trunk").get_layer("backbone")
        whole = keras.applications.ResNet50(include_top=False, weights=None)
        assert backbone.count_params() == whole.count_params() == 23_587_712


@pytest.mark.long
def test_gem_of_signed_maps_is_refused_and_of_relus_or_swishes_is_not(photos):
    # GeM clipped the negative half of the maps without a word.
    for backbone in ("EfficientNetV2B0", "MobileNetV3Small"):
        build_tower(TowerSettings(32, 8, backbone=backbone, weights=""))
    signed = TowerSettings(32, 8, backbone="ConvNeXtTiny", weights="")
    with pytest.raises(ValueError, match=r'ConvNeXtTiny are signed .*pooling="average"'):
        build_tower(signed)
    tower = build_tower(replace(signed, pooling="average"))
    assert np.isfinite(embed(tower, photos)).all()
    means = feature_maps(tower, photos).astype(np.float32).mean(axis=(1, 2))
    np.testing.assert_allclose(embed(frozen_trunk(tower), photos), unit(means), atol=2e-3)


def test_the_regularization_of_layers_is_part_of_the_loss(tower, photos):
    # compute_loss left it out.
    penalized = keras.Sequential(
        [
            keras.Input((32, 32, 3)),
            keras.layers.GlobalAveragePooling2D(),
            keras.layers.Dense(4, kernel_regularizer=keras.regularizers.L2(1.0)),
        ]
    )
    siamese = Siamese(penalized, MetricLoss(InfoNCE()))
    siamese.compile(keras.optimizers.SGD(0.0))
    groups = np.array([0, 0, 1, 1, 2, 2])
    penalty = float(np.sum(np.square(penalized.get_weights()[0])))
    metric = float(ops.convert_to_numpy(siamese.metric_loss(groups, siamese(photos))))
    assert penalty > 0.1
    for step in (siamese.train_on_batch, siamese.test_on_batch):
        assert float(step(photos, groups)) == pytest.approx(metric + penalty, rel=1e-3)


def test_maps_beyond_the_range_of_float16_are_refused():
    # They became infinite.
    np.testing.assert_array_equal(to_float16(np.float32([[-65504, 0.5]])), [[-65504, 0.5]])
    for value in (7e4, -7e4, np.nan, np.inf):
        with pytest.raises(ValueError, match="float16 ends at 65504"):
            to_float16(np.float32([1.0, value]))


def test_settings_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="last_stage"):
        TowerSettings(last_stage=1)
    with pytest.raises(ValueError, match="image_size must be at least 32"):
        TowerSettings(image_size=16, last_stage=5)


@pytest.mark.long
def test_training_moves_backbone_and_p(short_tower, photos):
    tower = short_tower
    siamese = Siamese(tower, MetricLoss(InfoNCE()))
    siamese.compile(keras.optimizers.Adam(1e-3))
    before = [w.numpy().copy() for w in tower.trainable_weights]
    assert gem_exponent(tower) == 3.0
    triplets = photos.reshape(2, 3, 32, 32, 3)
    losses = [siamese.train_on_batch(triplets, np.array([[0, 0, 2], [1, 1, 3]])) for _ in range(12)]
    assert losses[-1] < losses[0]
    assert gem_exponent(tower) != 3.0
    moved = [
        not np.array_equal(a, b.numpy())
        for a, b in zip(before, tower.trainable_weights, strict=True)
    ]
    assert np.mean(moved) > 0.95


def test_fingerprint_tells_models_apart(tower):
    keras.utils.set_random_seed(2)
    other = build_tower(SMALL)
    assert fingerprint(tower) == fingerprint(tower) != fingerprint(other)
    other.set_weights(tower.get_weights())
    assert fingerprint(other) == fingerprint(tower)


@pytest.mark.long
def test_towers_of_equal_weights_and_different_settings_have_different_fingerprints(tmp_path):
    # It was made of top-level layer names and weights: these shared one, and so did their indices.
    settings = TowerSettings(32, 0, last_stage=3, weights="", pooling="average")
    average = build_tower(settings)
    towers = [average, resized(average, 40)]
    for pooling in ("max", "rmac"):
        towers.append(build_tower(replace(settings, pooling=pooling)))
        towers[-1].set_weights(average.get_weights())
    assert len({fingerprint(tower) for tower in towers}) == 4
    for tower in towers:
        save_tower(tower, tmp_path / "model.keras")
        assert fingerprint(load_tower(tmp_path / "model.keras")) == fingerprint(tower)


def test_a_fingerprint_does_not_depend_on_names_that_keras_counts_up(tmp_path):
    settings = TowerSettings(32, 4, backbone="MobileNetV3Small", weights="", pooling="average")
    one, other = build_tower(settings), build_tower(settings)
    names = [[layer.name for layer in layers_of(tower)] for tower in (one, other)]
    assert names[0] != names[1]  # "add_6" in place of "add"
    other.set_weights(one.get_weights())
    save_tower(other, tmp_path / "model.keras")
    loaded = load_tower(tmp_path / "model.keras")
    assert fingerprint(one) == fingerprint(other) == fingerprint(loaded)


def test_files_that_are_no_tower_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="run notebook 02_triplet_training first"):
        load_tower(tmp_path / "model.keras")
    (tmp_path / "model.keras").write_text("not a model")
    with pytest.raises(ValueError, match=r"model\.keras is not a saved tower"):
        load_tower(tmp_path / "model.keras")
    with zipfile.ZipFile(tmp_path / "model.keras", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("model.weights.h5", bytes(10**8))  # 100 kB that become 100 MB
    with pytest.raises(ValueError, match=r"model\.weights\.h5 is compressed or larger"):
        load_tower(tmp_path / "model.keras")


def test_weights_from_a_file_give_the_backbone_they_were_saved_from(tmp_path):
    shape = (32, 32, 3)
    resnet = keras.applications.ResNet50(include_top=False, weights=None, input_shape=shape)
    path = tmp_path / "resnet50.weights.h5"
    resnet.save_weights(path)
    settings = TowerSettings(32, 8, last_stage=3, weights=str(path))
    backbone = build_tower(settings).get_layer("trunk").get_layer("backbone")
    end = keras.Model(resnet.input, resnet.get_layer("conv3_block4_out").output)
    for a, b in zip(backbone.get_weights(), end.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_file_of_the_backbone_alone_in_half_precision_is_read_as_well(tmp_path):
    with computing_in("float16"):
        half = build_backbone(SMALL)
    assert keras.config.dtype_policy().name == "float32"  # as before the block
    half.save_weights(tmp_path / "half.weights.h5")
    settings = TowerSettings(32, 8, last_stage=3, weights=str(tmp_path / "half.weights.h5"))
    backbone = build_backbone(settings)
    assert {w.dtype for w in backbone.weights} == {"float32"}
    for a, b in zip(half.get_weights(), backbone.get_weights(), strict=True):
        np.testing.assert_array_equal(a.astype(np.float32), b)


def test_mixed_precision_computes_the_backbone_in_bfloat16_and_the_head_in_float32(photos):
    keras.utils.set_random_seed(0)
    mixed = build_tower(replace(SMALL, precision="mixed_bfloat16"))
    maps = mixed.get_layer("trunk").output
    assert maps.dtype == "bfloat16" and mixed.output.dtype == "float32"
    assert {w.dtype for w in mixed.weights} == {"float32"}
    exact = build_tower(SMALL)
    exact.set_weights(mixed.get_weights())
    cosine = (embed(exact, photos) * embed(mixed, photos)).sum(axis=1)
    assert 0.99 < cosine.min() < 1 - 1e-7  # alike, but not the same
    with pytest.raises(ValueError, match="precision must be one of"):
        TowerSettings(precision="float8")


def test_weights_that_can_not_be_had_are_one_clear_line(tmp_path, monkeypatch):
    path = tmp_path / "broken.weights.h5"
    for content in (None, b"not weights"):
        if content:
            path.write_bytes(content)
        with pytest.raises(WeightsUnavailableError, match=r"broken\.weights\.h5") as caught:
            build_tower(TowerSettings(32, 8, last_stage=3, weights=str(path)))
        assert "\n" not in str(caught.value)

    real = keras.applications.ResNet50

    @functools.wraps(real)
    def unreachable(*args, weights=None, **kwargs):
        if weights == "imagenet":
            raise Exception("URL fetch failure on https://...: None -- Name or service not known")
        return real(*args, weights=weights, **kwargs)

    monkeypatch.setitem(BACKBONES, "ResNet50", unreachable)
    with pytest.raises(WeightsUnavailableError, match=r"ImageNet weights .* not be fetched") as e:
        build_tower(TowerSettings(32, 8, last_stage=3, weights="imagenet"))
    assert "\n" not in str(e.value)


def test_where_weights_can_not_be_had_a_package_has_some():
    wanted = TowerSettings(64, 8, last_stage=4)
    instead = other_weights(wanted)
    assert (instead.backbone, instead.weights) == ("EfficientNetLite0", "packaged")
    assert (instead.image_size, instead.embedding_size, instead.last_stage) == (64, 8, 5)
    assert build_tower(instead).output_shape == (None, 8)
    for without in (replace(wanted, weights="a.weights.h5"), TowerSettings(16, last_stage=3)):
        assert other_weights(without) == replace(without, weights="")


FRESH_PROCESS = """
import os, sys
from pathlib import Path
os.environ["KERAS_BACKEND"], folder = sys.argv[1], Path(sys.argv[2])
import keras, numpy as np
from keras import ops
from lib.network.losses import InfoNCE, MetricLoss, active_share_of, embedding_spread, make_loss
from lib.network.mining import MINERS
from lib.network.tower import Siamese, embed, fingerprint, load_tower
assert keras.backend.backend() == sys.argv[1]
photos = np.load(folder / "photos.npy")
tower = load_tower(folder / "model.keras")
np.save(folder / "embeddings.npy", embed(tower, photos))
siamese = Siamese(tower, MetricLoss(InfoNCE()))
siamese.compile(keras.optimizers.SGD(0.01), metrics=[active_share_of(InfoNCE()), embedding_spread])
triplets = photos.reshape(2, 3, 32, 32, 3)
groups = np.array([[0, 0, 2], [1, 1, 3]])
print(*siamese.train_on_batch(triplets, groups))
embeddings = siamese(triplets)
for mining in list(MINERS)[:-1]:  # the last draws at random
    loss = MetricLoss(make_loss("triplet", mining))
    print(float(ops.convert_to_numpy(loss(groups, embeddings))))
assert "tensorflow" not in sys.modules or sys.argv[1] == "tensorflow"
# Last: Keras imports TensorFlow, where it is installed, to describe a network.
print(fingerprint(load_tower(folder / "model.keras")))
"""


@pytest.mark.long
def test_a_saved_tower_embeds_and_trains_alike_in_fresh_tensorflow_and_jax(
    short_tower, photos, tmp_path
):
    tower = short_tower
    save_tower(tower, tmp_path / "model.keras")
    np.save(tmp_path / "photos.npy", photos)
    numbers = {}
    for backend in ("tensorflow", "jax"):
        process = subprocess.run(
            [sys.executable, "-c", FRESH_PROCESS, backend, tmp_path],
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert process.returncode == 0, process.stderr[-2000:]
        found = np.load(tmp_path / "embeddings.npy")
        np.testing.assert_allclose(found, embed(tower, photos), atol=1e-4)
        *_, step, stored, semi_hard, batch_hard, batch_all, loaded = process.stdout.splitlines()
        assert loaded == fingerprint(tower)
        mined = (stored, semi_hard, batch_hard, batch_all)
        numbers[backend] = np.array([*step.split(), *mined], dtype=float)
    np.testing.assert_allclose(numbers["tensorflow"], numbers["jax"], rtol=5e-3)


def test_every_backbone_of_keras_applications_can_be_named():
    assert {"ResNet50", "VGG16", "MobileNet", "ConvNeXtTiny", "EfficientNetV2B0"} <= set(BACKBONES)
    for name in BACKBONES:
        layer = Preprocessing(name)
        pixels = np.full((1, 2, 2, 3), 255, dtype=np.uint8)
        assert ops.convert_to_numpy(layer(pixels)).shape == (1, 2, 2, 3)
    with pytest.raises(ValueError, match=r"no backbone 'ResNet51'; choose one of .*ResNet50"):
        TowerSettings(backbone="ResNet51")
    with pytest.raises(ValueError, match="VGG16 has one width only"):
        TowerSettings(backbone="VGG16", width=0.5)
    with pytest.raises(ValueError, match="MobileNet is taken whole"):
        TowerSettings(backbone="MobileNet", last_stage=4)


@pytest.fixture(scope="module")
def mobile() -> keras.Model:
    keras.utils.set_random_seed(0)
    settings = TowerSettings(64, 0, backbone="MobileNet", width=0.25, weights="")
    return build_tower(settings)


@pytest.mark.long
def test_another_backbone_with_its_own_preprocessing(mobile, rng, tmp_path):
    photos = rng.integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
    own = keras.applications.MobileNet(
        alpha=0.25, include_top=False, weights=None, input_shape=(64, 64, 3)
    )
    own.set_weights(mobile.get_layer("trunk").get_weights())
    maps = own.predict(photos / 127.5 - 1.0, verbose=0)  # "tf" mode: from -1 to 1
    pooled = np.mean(np.maximum(maps, 1e-6).astype(np.float64) ** 3, axis=(1, 2)) ** (1 / 3)
    expected = pooled / np.linalg.norm(pooled, axis=1, keepdims=True)
    np.testing.assert_allclose(embed(mobile, photos), expected, atol=1e-4)

    save_tower(mobile, tmp_path / "model.keras")
    np.testing.assert_array_equal(
        embed(load_tower(tmp_path / "model.keras"), photos), embed(mobile, photos)
    )
    own.save_weights(tmp_path / "own.weights.h5")
    settings = TowerSettings(
        64, 0, backbone="MobileNet", width=0.25, weights=str(tmp_path / "own.weights.h5")
    )
    np.testing.assert_allclose(embed(build_tower(settings), photos), expected, atol=1e-4)
    with pytest.raises(WeightsUnavailableError, match=r"no Keras weights of MobileNet"):
        build_tower(replace(settings, width=0.5))


@pytest.mark.long
def test_a_resized_tower_keeps_weights_and_takes_photos_of_another_size(tower, mobile, rng):
    for one, size in ((tower, 48), (mobile, 96)):
        photos = rng.integers(0, 256, (2, size, size, 3), dtype=np.uint8)
        other = resized(one, size)
        embeddings = embed(other, photos)
        assert embeddings.shape == (2, one.output_shape[-1])
        for a, b in zip(one.get_weights(), other.get_weights(), strict=True):
            np.testing.assert_array_equal(a, b)
        same = resized(other, one.input_shape[1])
        small = rng.integers(0, 256, (2, *one.input_shape[1:]), dtype=np.uint8)
        np.testing.assert_allclose(embed(same, small), embed(one, small), atol=1e-6)
        # What is done to the copy does not reach the original.
        before = one.get_weights()
        other.set_weights([w + 1 for w in other.get_weights()])
        for a, b in zip(before, one.get_weights(), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("processor", "policy"), [("float32", "float32"), ("bfloat16", "mixed_bfloat16")]
)
def test_training_computes_in_what_the_processor_is_fast_in(processor, policy, monkeypatch):
    monkeypatch.setattr(model_module, "fast_precision", lambda: processor)
    if "cpu" in str(ops.zeros(1).device).lower():
        assert model_module.fast_policy() == policy
    else:
        assert model_module.fast_policy() == "mixed_bfloat16"
