"""Training on a small world: it runs, resumes, stops early, and names what goes wrong."""

import keras
import numpy as np
import pandas as pd
import pytest

import lib.training
from lib.dataset import DatasetHandler, DataSettings
from lib.landmarks import build_catalogue, split_landmarks
from lib.model import build_siamese, embed, load_tower
from lib.records import read_triplets, write_shard
from lib.sampling import SamplingError
from lib.training import (
    CHECKPOINT,
    HISTORY,
    MODEL,
    TrainingError,
    TrainingSettings,
    evaluate_triplets,
    train,
)

SETTINGS = TrainingSettings(
    epochs=3, steps_per_epoch=3, learning_rate=1e-3, mining="soft", patience=3
)


def tiny_tower() -> keras.Model:
    """A tower's shape without ResNet50's cost: the training code must not care."""
    keras.utils.set_random_seed(0)
    photos = keras.Input((16, 16, 3), dtype="uint8")
    x = keras.layers.Rescaling(1 / 255)(photos)
    x = keras.layers.Conv2D(8, 3, activation="relu")(x)
    trunk = keras.Model(photos, x, name="trunk")
    maps = keras.Input(trunk.output_shape[1:])
    y = keras.layers.GlobalAveragePooling2D(name="pooling")(maps)
    y = keras.layers.BatchNormalization(momentum=0.5)(keras.layers.Dense(8)(y))
    y = keras.layers.UnitNormalization()(y)
    head = keras.Model(maps, y, name="head")
    return keras.Model(photos, head(trunk(photos)), name="tower")


@pytest.fixture(scope="module")
def parts(shards):
    catalogue = build_catalogue(shards)
    return catalogue, split_landmarks(catalogue, {"train": 0.7, "validation": 0.3}, seed=0)


@pytest.fixture
def handler(parts) -> DatasetHandler:
    catalogue, part = parts
    settings = DataSettings(image_size=16, batch_size=4, seed=1)
    return DatasetHandler(catalogue, settings, part == "train")


@pytest.fixture
def validation(parts) -> np.ndarray:
    catalogue, part = parts
    handler = DatasetHandler(catalogue, DataSettings(image_size=16), part == "validation")
    return handler.photos(handler.validation_triplets(50))


def test_a_run_leaves_history_checkpoint_and_the_best_epochs_model(handler, validation, tmp_path):
    tower = tiny_tower()
    history = train(build_siamese(tower), handler, validation, SETTINGS, tmp_path)
    assert history.index.tolist() == [1, 2, 3]
    assert {"loss", "active_share", "embedding_spread", "val_map", "val_accuracy"} <= set(history)
    assert history["learning_rate"].iloc[-1] == pytest.approx(0, abs=1e-6)  # the cosine's end
    pd.testing.assert_frame_equal(
        pd.read_csv(tmp_path / HISTORY, index_col="epoch"), history, check_dtype=False
    )
    saved = load_tower(tmp_path / MODEL)
    np.testing.assert_allclose(
        embed(saved, validation[:, 0]), embed(tower, validation[:, 0]), atol=1e-6
    )
    best = evaluate_triplets(tower, validation)["val_map"]
    assert best == pytest.approx(history["val_map"].max())
    assert {p.name for p in tmp_path.iterdir()} == {CHECKPOINT, HISTORY, MODEL, "training.json"}


class Interrupt(Exception):
    """What stops a training in the middle."""


def test_an_interrupted_training_goes_on_and_ends_with_the_same_weights(
    handler, validation, tmp_path, monkeypatch
):
    straight = tiny_tower()
    train(build_siamese(straight), handler, validation, SETTINGS, tmp_path / "straight")

    original = DatasetHandler.training_batches

    def failing(self, epoch, steps):
        if epoch == 2:
            raise Interrupt
        return original(self, epoch, steps)

    with monkeypatch.context() as patch, pytest.raises(Interrupt):
        patch.setattr(DatasetHandler, "training_batches", failing)
        train(build_siamese(tiny_tower()), handler, validation, SETTINGS, tmp_path / "broken")
    assert len(pd.read_csv(tmp_path / "broken" / HISTORY)) == 2

    resumed = tiny_tower()
    siamese = build_siamese(resumed)
    history = train(siamese, handler, validation, SETTINGS, tmp_path / "broken")
    assert len(history) == 3
    for a, b in zip(straight.get_weights(), resumed.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)

    again = train(siamese, handler, validation, SETTINGS, tmp_path / "broken")  # nothing left to do
    pd.testing.assert_frame_equal(again, history)


def test_a_history_one_row_ahead_of_the_checkpoint_is_cut(handler, validation, tmp_path):
    train(build_siamese(tiny_tower()), handler, validation, SETTINGS, tmp_path)
    rows = pd.read_csv(tmp_path / HISTORY)
    pd.concat([rows, rows.tail(1)]).to_csv(tmp_path / HISTORY, index=False)
    history = train(build_siamese(tiny_tower()), handler, validation, SETTINGS, tmp_path)
    assert history.index.tolist() == [1, 2, 3]


def test_other_settings_do_not_continue_a_run(handler, validation, tmp_path):
    train(build_siamese(tiny_tower()), handler, validation, SETTINGS, tmp_path)
    other = TrainingSettings(epochs=5, steps_per_epoch=3, mining="soft", patience=3)
    with pytest.raises(TrainingError, match=r"other settings \(epochs\)"):
        train(build_siamese(tiny_tower()), handler, validation, other, tmp_path)


def test_training_stops_when_validation_gets_no_better(handler, validation, tmp_path, monkeypatch):
    measured = iter([0.1, 0.3, 0.2, 0.3, 0.9])
    monkeypatch.setattr(lib.training, "evaluate_triplets", lambda *_: {"val_map": next(measured)})
    settings = TrainingSettings(epochs=10, steps_per_epoch=1, patience=2)
    history = train(build_siamese(tiny_tower()), handler, validation, settings, tmp_path)
    assert history["val_map"].tolist() == [0.1, 0.3, 0.2, 0.3]  # the second is the best


def test_a_loss_that_is_not_a_number_is_named(handler, validation, tmp_path):
    wild = TrainingSettings(epochs=2, steps_per_epoch=3, learning_rate=float("inf"))
    with pytest.raises(TrainingError, match="lower learning_rate"):
        train(build_siamese(tiny_tower()), handler, validation, wild, tmp_path)


def test_a_collapse_is_named(handler, validation, tmp_path):
    tower = tiny_tower()
    centring = tower.get_layer("head").layers[-2]
    gamma, beta, *statistics = centring.get_weights()
    centring.set_weights([gamma * 1e-4, beta + 1, *statistics])  # all photos on one point
    with pytest.warns(RuntimeWarning, match="collapse: in epoch 1 all photos"):
        train(build_siamese(tower), handler, validation, SETTINGS, tmp_path)


def test_too_few_usable_triplets_are_named(shards, validation, tmp_path):
    same = next(t for t in read_triplets(shards[0]) if t.is_degenerate)
    write_shard(tmp_path / "train00.tfrec", [same] * 20)
    catalogue = build_catalogue([tmp_path / "train00.tfrec"])
    handler = DatasetHandler(catalogue, DataSettings(image_size=16, batch_size=4))
    with pytest.raises(SamplingError, match="none of the 20 triplets is usable"):
        train(build_siamese(tiny_tower()), handler, validation, SETTINGS, tmp_path)


def test_evaluate_triplets_by_hand():
    class Colours:
        """Embeds a photo of one colour as that colour's direction."""

        output_shape = (None, 3)

        def predict(self, photos, **_):
            colours = photos[:, 0, 0].astype(np.float32)
            return colours / np.linalg.norm(colours, axis=1, keepdims=True)

    red, green, blue = np.eye(3, dtype=np.uint8)[:, None, None, :] * np.uint8(255)
    red, green, blue = (np.broadcast_to(c, (2, 2, 3)) for c in (red, green, blue))
    right = np.stack([red, red, green])
    wrong = np.stack([blue, green, blue])  # its positive is green, its negative blue
    result = evaluate_triplets(Colours(), np.stack([right, wrong]))
    assert result["val_accuracy"] == 0.5
    # Red finds its positive first; for blue both positives are equally far, and ties keep order.
    assert result["val_map"] == pytest.approx((1 + 1 / 2) / 2)
