"""Training on a small world: stages, averages, early stops, and names for what goes wrong.

Interruptions have a file of their own, test_resume.py; so have the other backends.
"""

import itertools
import math
from dataclasses import replace

import keras
import numpy as np
import pandas as pd
import pytest

import lib.training.stages
from lib.data.catalogue import build_catalogue
from lib.data.dataset import DatasetHandler, DataSettings, PlannedBatches
from lib.data.records import read_triplets, write_shard
from lib.data.sampling import SamplingError
from lib.network.losses import ArcFace, InfoNCE, MetricLoss, TripletLoss
from lib.network.mining import BatchHard
from lib.network.tower import Siamese, TowerSettings, build_head, computing_in, embed, load_tower
from lib.training.checkpoint import CHECKPOINT, TrainingError
from lib.training.log import HISTORY, TENSORBOARD, TrainingLog
from lib.training.stages import (
    MODEL,
    Stage,
    TrainingSettings,
    compile_siamese,
    evaluate_triplets,
    set_trainable,
    train,
)
from tests.conftest import unit

SETTINGS = TrainingSettings(
    stages=(Stage("all", epochs=3, steps_per_epoch=3, learning_rate=1e-3),),
    batch_norm="live",
    patience=3,
)


def tiny_tower() -> keras.Model:
    """A tower's shape without ResNet50's cost."""
    keras.utils.set_random_seed(0)
    x = images = keras.Input((16, 16, 3))
    for block in (1, 2, 3):
        x = keras.layers.Conv2D(
            8, 3, strides=2, padding="same", use_bias=False, name=f"conv{block}_conv"
        )(x)
        x = keras.layers.BatchNormalization(momentum=0.5, name=f"conv{block}_bn")(x)
        x = keras.layers.Activation("relu", name=f"conv{block}_relu")(x)
    photos = keras.Input((16, 16, 3), dtype="uint8")
    maps = keras.Model(images, x, name="backbone")(keras.layers.Rescaling(1 / 255)(photos))
    trunk = keras.Model(photos, maps, name="trunk")
    head = build_head(trunk.output_shape[1:], TowerSettings(embedding_size=8))
    return keras.Model(photos, head(trunk(photos)), name="tower")


class Maps(PlannedBatches):
    """The feature maps of each batch's pictures."""

    def __init__(self, handler, plan, epoch, maps):
        super().__init__(handler, plan, epoch)
        self.maps, self.group = maps, handler.catalogue.pictures["group"].to_numpy(np.int32)

    def _make(self, pictures, rng):
        return self.maps[pictures], self.group[pictures]


class Cache:
    """A feature cache in memory, of one variant: float16 (pictures, h, w, c)."""

    def __init__(self, handler, maps):
        self.handler, self.of_pictures, self.epochs = handler, maps, []

    def batches(self, epoch, steps):
        self.epochs.append(epoch)
        plan = self.handler.training_batches(epoch, steps).plan
        return Maps(self.handler, plan, epoch, self.of_pictures)

    def maps(self, pictures, variant):
        assert variant == 0
        return self.of_pictures[pictures]


@pytest.fixture
def measured(monkeypatch):
    """Call it with the validation mAP of each epoch to come."""

    def set_values(*values):
        following = iter(values)
        monkeypatch.setattr(
            lib.training.stages, "average_precision", lambda _: np.array(next(following))
        )

    return set_values


def test_validation_has_the_loss_of_the_training():
    """Over whole batches; a negative is the anchor before, of which it must not be a negative."""
    rng = np.random.default_rng(0)
    embeddings = rng.normal(size=(5, 3, 8)).astype(np.float32)
    embeddings /= np.linalg.norm(embeddings, axis=-1, keepdims=True)
    embeddings[:, 2] = np.roll(embeddings[:, 0], 1, axis=0)
    groups = np.array([[0, 0, 4], [1, 1, 0], [2, 2, 1], [3, 3, 2]])
    for loss in (InfoNCE(0.2), TripletLoss(0.5, mining=BatchHard())):
        each = [float(MetricLoss(loss)(groups[i : i + 2], embeddings[i : i + 2])) for i in (0, 2)]
        found = lib.training.stages._validation_loss(loss, embeddings, 2)
        assert found == pytest.approx(np.mean(each), rel=1e-5)
    assert np.isnan(lib.training.stages._validation_loss(ArcFace(), embeddings, 2))
    assert lib.training.stages._validation_loss(InfoNCE(), embeddings, 100) > 0


class Watching(DatasetHandler):
    """A handler that calls ``watch`` before each epoch."""

    def training_batches(self, epoch, steps):
        self.watch(epoch)
        return super().training_batches(epoch, steps)


def watching(handler, watch) -> Watching:
    result = Watching(handler.catalogue, handler.settings, handler.chosen)
    result.watch = watch
    return result


def values_of(tower) -> dict[str, np.ndarray]:
    return {w.path: np.array(keras.ops.convert_to_numpy(w)) for w in tower.weights}


# --------------------------------------------------------------------------------------------------
# What a training leaves
# --------------------------------------------------------------------------------------------------


def test_a_run_leaves_history_checkpoint_log_and_the_best_epochs_model(
    handler, validation, tmp_path
):
    tower = tiny_tower()
    history = train(tower, handler, validation, SETTINGS, tmp_path)
    assert history.index.tolist() == [1, 2, 3]
    assert history.columns.tolist() == [
        *("stage", "loss", "active_share", "positive_distance", "negative_distance"),
        *("embedding_spread", "learning_rate", "val_loss", "val_accuracy", "val_map", "p"),
    ]
    assert history["learning_rate"].iloc[-1] == pytest.approx(0, abs=1e-6)  # the cosine's end
    assert (history["val_loss"] > 0).all()
    pd.testing.assert_frame_equal(
        pd.read_csv(tmp_path / HISTORY, index_col="epoch"), history, check_dtype=False
    )
    saved = load_tower(tmp_path / MODEL)
    np.testing.assert_allclose(
        embed(saved, validation[:, 0]), embed(tower, validation[:, 0]), atol=1e-6
    )
    best = evaluate_triplets(tower, validation)["val_map"]
    assert best == pytest.approx(history["val_map"].max())
    assert {p.name for p in tmp_path.iterdir()} == {CHECKPOINT, HISTORY, MODEL, TENSORBOARD}

    again = tiny_tower()  # nothing is left to do; the run's weights come back
    pd.testing.assert_frame_equal(train(again, handler, validation, SETTINGS, tmp_path), history)
    for a, b in zip(again.get_weights(), tower.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.long
def test_arcface_on_p_x_k_batches_trains_its_centres_along(handler, validation, tmp_path):
    data = replace(handler.settings, batch_size=4, pictures_per_landmark=2)
    handler = DatasetHandler(handler.catalogue, data, handler.chosen)
    settings = replace(
        SETTINGS,
        stages=(Stage("head", 1, 2, 1e-2), Stage("head", 1, 2, 1e-2)),
        loss=ArcFace(scale=8.0),
    )
    kept = []

    def watch(epoch):
        with np.load(tmp_path / CHECKPOINT) as arrays:
            kept.append(arrays["loss_0"])

    history = train(tiny_tower(), watching(handler, watch), validation, settings, tmp_path)
    assert history["stage"].tolist() == [1, 2] and np.isfinite(history["loss"]).all()
    groups = int(handler.catalogue.pictures["group"].max()) + 1
    assert kept[0].shape == kept[1].shape == (groups, 8)
    assert not np.allclose(kept[0], kept[1])


@pytest.mark.long
def test_a_trunk_in_bfloat16_trains(handler, validation, tmp_path):
    with computing_in("mixed_bfloat16"):
        tower = tiny_tower()
    history = train(tower, handler, validation, SETTINGS, tmp_path)
    assert np.isfinite(history["loss"]).all()
    assert {w.dtype for w in tower.weights} == {"float32"}
    saved = load_tower(tmp_path / MODEL)
    np.testing.assert_array_equal(embed(saved, validation[:, 0]), embed(tower, validation[:, 0]))


# --------------------------------------------------------------------------------------------------
# Stages
# --------------------------------------------------------------------------------------------------


def trainable_layers(tower) -> set[str]:
    return {w.path.split("/")[0] for w in tower.trainable_weights}


HEAD = {"pooling", "projection"}


@pytest.mark.parametrize(
    ("part", "batch_norm", "expected"),
    [
        ("head", "live", set()),
        ("last-block", "frozen", {"conv3_conv"}),
        ("last-block", "live", {"conv3_conv", "conv3_bn"}),
        ("all", "frozen", {"conv1_conv", "conv2_conv", "conv3_conv"}),
        ("all", "live", {f"conv{i}_{kind}" for i in (1, 2, 3) for kind in ("conv", "bn")}),
    ],
)
def test_which_weights_and_statistics_a_stage_moves(part, batch_norm, expected, validation):
    tower = tiny_tower()
    set_trainable(tower, "all", "frozen")  # whatever was set before
    set_trainable(tower, part, batch_norm)
    assert trainable_layers(tower) == HEAD | expected
    before = values_of(tower)
    tower(validation[:, 0], training=True)
    after = values_of(tower)
    moved = {path.split("/")[0] for path in before if not np.array_equal(before[path], after[path])}
    assert moved == {"centring"} | {layer for layer in expected if layer.endswith("_bn")}


def test_no_last_block_is_named():
    photos = keras.Input((16, 16, 3), dtype="uint8")
    trunk = keras.Model(photos, keras.layers.Rescaling(1 / 255)(photos), name="trunk")
    head = build_head(trunk.output_shape[1:], TowerSettings(embedding_size=8))
    with pytest.raises(TrainingError, match='no last block: use train="all"'):
        set_trainable(keras.Model(photos, head(trunk(photos))), "last-block", "frozen")


def test_stages_train_one_part_after_the_other(handler, validation, tmp_path, measured):
    tower = tiny_tower()
    states = []
    stages = tuple(Stage(part, 1, 2, 1e-2) for part in ("head", "last-block", "all"))
    settings = replace(SETTINGS, stages=stages, batch_norm="frozen")
    measured(0.1, 0.2, 0.3)  # each epoch is the best so far
    watched = watching(handler, lambda _: states.append(values_of(tower)))
    history = train(tower, watched, validation, settings, tmp_path)
    states.append(values_of(tower))
    assert history["stage"].tolist() == [1, 2, 3]
    moved = [
        {path.split("/")[0] for path in a if not np.array_equal(a[path], b[path])}
        for a, b in itertools.pairwise(states)
    ]
    head = HEAD | {"centring"}
    assert moved == [
        head,
        head | {"conv3_conv"},
        head | {"conv1_conv", "conv2_conv", "conv3_conv"},
    ]
    assert trainable_layers(tower) == trainable_layers(tiny_tower())  # all once more
    assert trainable_layers(load_tower(tmp_path / MODEL)) == trainable_layers(tiny_tower())


@pytest.mark.long
def test_a_head_learns_the_same_from_cached_maps_until_the_trunk_has_changed(
    handler, validation, tmp_path, measured
):
    data = replace(handler.settings, augmentation=None)
    handler = DatasetHandler(handler.catalogue, data, handler.chosen)
    stages = tuple(Stage(part, 1, 2, 1e-2) for part in ("head", "head", "all", "head"))
    settings = replace(SETTINGS, stages=stages, batch_norm="frozen")
    towers = [tiny_tower(), tiny_tower()]
    photos = handler.photos(np.arange(len(handler.catalogue.pictures)))
    maps = towers[1].get_layer("trunk").predict(photos, verbose=0).astype(np.float16)
    cache = Cache(handler, maps)
    for name, tower, of_trunk in zip("ab", towers, (None, cache), strict=True):
        measured(0.1, 0.2, 0.3, 0.4)
        train(tower, handler, validation, settings, tmp_path / name, of_trunk)
    assert cache.epochs == [0, 1]
    first, second = map(values_of, towers)
    for path in first:
        np.testing.assert_allclose(first[path], second[path], atol=2e-3, err_msg=path)


@pytest.mark.parametrize("cached", [True, False])
def test_each_epoch_trains_on_the_hardest_negatives_of_its_pool(
    handler, validation, tmp_path, monkeypatch, cached
):
    """By the weights that it begins with; each stored negative gives way to a mined one."""
    tower, pictures = tiny_tower(), np.unique(handler.triplets)
    group = handler.catalogue.pictures["group"].to_numpy()
    photos = handler.photos(np.arange(len(group)))
    maps = tower.get_layer("trunk").predict(photos, verbose=0).astype(np.float16)
    train_epoch, pools = lib.training.stages._train_epoch, []

    def check(siamese, batches, epoch, log):
        vectors = embed(tower, photos)
        stored = handler.training_batches(epoch - 1, len(batches)).plan
        np.testing.assert_array_equal(batches.plan[..., :2], stored[..., :2])
        nearer = [
            len({*group[pictures[vectors[pictures] @ vectors[a] > vectors[n] @ vectors[a] + 1e-3]]})
            for a, _, n in batches.plan.reshape(-1, 3)
        ]
        # All pictures are in the pool: nearer are its own group and four others.
        anchors, negatives = group[batches.plan[..., [0, 2]]].T
        assert max(nearer) <= 5 and (anchors != negatives).all()
        pools.append(batches.plan[..., 2])
        return train_epoch(siamese, batches, epoch, log)

    monkeypatch.setattr(lib.training.stages, "_train_epoch", check)
    stages = (Stage("head" if cached else "all", 2, 3, 1e-2),)
    settings = replace(SETTINGS, stages=stages, pool=len(pictures), batch_norm="frozen")
    cache = Cache(handler, maps) if cached else None
    train(tower, handler, validation, settings, tmp_path, cache)
    assert len(pools) == 2 and not np.array_equal(*pools)


def test_a_pool_for_p_x_k_batches_and_numbers_below_0_are_refused(handler, validation, tmp_path):
    data = replace(handler.settings, pictures_per_landmark=2)
    other = DatasetHandler(handler.catalogue, data, handler.chosen)
    with pytest.raises(TrainingError, match="pictures_per_landmark=0 in DataSettings, or pool=0"):
        train(tiny_tower(), other, validation, replace(SETTINGS, pool=8), tmp_path)
    with pytest.raises(ValueError, match="pool must be at least 0 pictures, got -1"):
        replace(SETTINGS, pool=-1)
    with pytest.raises(ValueError, match="set memory=0, or choose another loss"):
        replace(SETTINGS, memory=8, loss=ArcFace())


@pytest.mark.long
def test_a_stage_ends_early_and_the_next_begins_with_the_best_weights(
    handler, validation, tmp_path, measured
):
    tower, states, best = tiny_tower(), [], []

    def watch(epoch):
        states.append(values_of(tower))
        if epoch:
            best.append(values_of(load_tower(tmp_path / MODEL)))

    stages = (Stage("all", 9, 1, 1e-2), Stage("head", 9, 1, 1e-2), Stage("all", 1, 1, 1e-2))
    settings = replace(SETTINGS, stages=stages, patience=2)
    measured(*(0.1, 0.5, 0.4, 0.5), *(0.2, 0.3, 0.3, 0.1), 0.6)
    history = train(tower, watching(handler, watch), validation, settings, tmp_path)
    # The second stage stays below the first, yet ends only after two epochs below its own best.
    assert history["stage"].tolist() == [1, 1, 1, 1, 2, 2, 2, 2, 3]
    assert history["val_map"].tolist() == [0.1, 0.5, 0.4, 0.5, 0.2, 0.3, 0.3, 0.1, 0.6]
    for epoch in (4, 8):  # the first of the second and of the third stage
        for path, value in best[1].items():  # the model after the second epoch
            np.testing.assert_array_equal(states[epoch][path], value)
            np.testing.assert_array_equal(best[epoch - 1][path], value)
    assert any((states[4][path] != states[3][path]).any() for path in states[4])
    assert any((values_of(tower)[path] != states[8][path]).any() for path in states[8])


def test_stages_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="head, last-block, all, got 'tail'"):
        Stage("tail", 1, 1, 1e-3)
    with pytest.raises(ValueError, match="got 0 x 5; leave the stage out"):
        Stage("head", 0, 5, 1e-3)
    with pytest.raises(ValueError, match="at least one Stage"):
        TrainingSettings(stages=())
    with pytest.raises(ValueError, match="frozen, live, got 'thawed'"):
        replace(SETTINGS, batch_norm="thawed")


# --------------------------------------------------------------------------------------------------
# The optimizer
# --------------------------------------------------------------------------------------------------


def test_the_learning_rate_warms_up_and_falls_along_a_cosine():
    settings = replace(SETTINGS, warmup_share=0.2, clip_norm=0.5)
    siamese = Siamese(tiny_tower(), MetricLoss(settings.loss))
    compile_siamese(siamese, settings, Stage("all", 5, 10, 1e-3))
    assert siamese.optimizer.global_clipnorm == 0.5
    for step in (0, 5, 10, 30, 50):
        siamese.optimizer.iterations.assign(step)
        cosine = (1 + math.cos(math.pi * (step - 10) / 40)) / 2
        expected = 1e-3 * (step / 10 if step < 10 else cosine)
        found = float(keras.ops.convert_to_numpy(siamese.optimizer.learning_rate))
        assert found == pytest.approx(expected, abs=1e-9)


def test_jit_is_kerass_choice_unless_it_is_set():
    siamese = Siamese(tiny_tower(), MetricLoss(SETTINGS.loss))
    compile_siamese(siamese, SETTINGS, SETTINGS.stages[0])
    on_gpu = bool(keras.distribution.list_devices("gpu"))
    assert (
        siamese.jit_compile
        == {"tensorflow": on_gpu, "jax": True, "torch": False}[keras.backend.backend()]
    )
    compile_siamese(siamese, replace(SETTINGS, jit=True), SETTINGS.stages[0])
    assert siamese.jit_compile


@pytest.mark.long
def test_the_moving_average_is_saved_while_the_weights_train_on(
    handler, validation, tmp_path, measured, monkeypatch
):
    steps = []
    original = TrainingLog.on_train_batch_end

    def recording(self, batch, logs=None):
        steps.append([np.array(keras.ops.convert_to_numpy(w)) for w in self.model.weights])
        original(self, batch, logs)

    monkeypatch.setattr(TrainingLog, "on_train_batch_end", recording)
    settings = replace(SETTINGS, stages=(Stage("all", 2, 3, 1e-2),))
    measured(0.1, 0.2)
    train(tiny_tower(), handler, validation, settings, tmp_path / "without")
    without = steps.copy()
    steps.clear()
    measured(0.1, 0.2)
    tower = tiny_tower()
    averaged = replace(settings, ema_momentum=0.8)
    train(tower, handler, validation, averaged, tmp_path / "with")

    trainable = [w.trainable for w in tower.weights]
    average = steps[0]
    for weights in steps[1:]:
        average = [0.8 * a + 0.2 * w for a, w in zip(average, weights, strict=True)]
    for found, mean, last, moves in zip(
        tower.get_weights(), average, steps[-1], trainable, strict=True
    ):
        np.testing.assert_allclose(found, mean if moves else last, rtol=1e-6, atol=1e-7)
        assert not moves or not np.allclose(mean, last, rtol=1e-6, atol=1e-7)
    for a, b in zip(steps[-1], without[-1], strict=True):  # the average leaves no trace in them
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


# --------------------------------------------------------------------------------------------------
# What goes wrong
# --------------------------------------------------------------------------------------------------


def test_what_does_not_continue_a_run_is_refused(handler, validation, tmp_path):
    train(tiny_tower(), handler, validation, SETTINGS, tmp_path)
    more = replace(SETTINGS, stages=SETTINGS.stages * 2, loss=InfoNCE(temperature=0.1))
    with pytest.raises(TrainingError, match=r"other settings \(stages, loss\)"):
        train(tiny_tower(), handler, validation, more, tmp_path)

    smaller = replace(handler.settings, batch_size=3)
    other = DatasetHandler(handler.catalogue, smaller, handler.chosen)
    with pytest.raises(TrainingError, match=r"other settings \(batch_size\)"):
        train(tiny_tower(), other, validation, SETTINGS, tmp_path)

    tower = tiny_tower()
    maps = tower.get_layer("trunk").output_shape[1:]
    head = build_head(maps, TowerSettings(embedding_size=9))
    photos = tower.input
    wider = keras.Model(photos, head(tower.get_layer("trunk")(photos)), name="tower")
    with pytest.raises(TrainingError, match="is of another network"):
        train(wider, handler, validation, SETTINGS, tmp_path)

    whole = (tmp_path / CHECKPOINT).read_bytes()
    for damaged in (b"", whole[:1000], whole[: len(whole) // 2] + whole[len(whole) // 2 + 1 :]):
        (tmp_path / CHECKPOINT).write_bytes(damaged)
        with pytest.raises(TrainingError, match=r"checkpoint\.npz can't be read"):
            train(tiny_tower(), handler, validation, SETTINGS, tmp_path)


def test_a_loss_that_is_not_a_number_is_named(handler, validation, tmp_path):
    wild = replace(SETTINGS, stages=(Stage("all", 2, 3, float("inf")),))
    with pytest.raises(TrainingError, match=r"in epoch 1, step \d: lower learning_rate"):
        train(tiny_tower(), handler, validation, wild, tmp_path)


def test_a_collapse_is_named(handler, validation, tmp_path):
    tower = tiny_tower()
    projection = tower.get_layer("head").get_layer("projection")
    centring = tower.get_layer("head").get_layer("centring")
    centring.trainable = False  # it would take the common mean away
    kernel = np.zeros(projection.kernel.shape)
    kernel[:, 0] = 1
    projection.set_weights([kernel])  # all photos on one half of one axis
    still = replace(SETTINGS, stages=(Stage("all", 1, 2, 1e-9),))
    with pytest.warns(RuntimeWarning, match="collapse: in epoch 1 all photos"):
        train(tower, handler, validation, still, tmp_path)


def test_too_few_usable_triplets_are_named(shards, validation, tmp_path):
    same = next(t for t in read_triplets(shards[0]) if t.anchor == t.positive)
    write_shard(tmp_path / "train00.tfrec", [same] * 20)
    catalogue = build_catalogue([tmp_path / "train00.tfrec"])
    handler = DatasetHandler(catalogue, DataSettings(image_size=16, batch_size=4))
    with pytest.raises(SamplingError, match="none of the 20 triplets is usable"):
        train(tiny_tower(), handler, validation, SETTINGS, tmp_path / "run")


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


# --------------------------------------------------------------------------------------------------
# A teacher
# --------------------------------------------------------------------------------------------------


def teacher_of(handler) -> np.ndarray:
    """Descriptors that the tiny tower can learn: a projection of each photo's mean colours."""
    photos = handler.photos(np.arange(len(handler.catalogue.pictures)))
    colours = photos.mean(axis=(1, 2)) - photos.mean(axis=(0, 1, 2))
    return unit(colours @ np.random.default_rng(0).normal(size=(3, 8))).astype(np.float32)


@pytest.mark.parametrize("cached", [False, True])
def test_a_tower_learns_its_teachers_descriptors(handler, validation, tmp_path, measured, cached):
    teacher, photos = teacher_of(handler), handler.photos(handler.triplets[:, 0])
    stage = Stage("head" if cached else "all", epochs=4, steps_per_epoch=20, learning_rate=1e-2)
    nearness = {}
    measured(*np.tile([0.1, 0.2, 0.3, 0.4], 2))  # so the last epoch is the best
    for share in (0.0, 1.0):
        tower = tiny_tower()
        every = handler.photos(np.arange(len(teacher)))
        cache = Cache(handler, embed(tower.get_layer("trunk"), every)) if cached else None
        settings = replace(SETTINGS, stages=(stage,), teacher_share=share)
        train(tower, handler, validation, settings, tmp_path / str(share), cache, teacher)
        nearness[share] = (embed(tower, photos) * teacher[handler.triplets[:, 0]]).sum(1).mean()
    assert nearness[1.0] > nearness[0.0] + 0.2


def test_the_loss_is_shared_with_the_teacher(rng):
    embeddings, teacher = unit(rng.normal(size=(2, 4, 3, 8))).astype(np.float32)
    groups = np.arange(12).reshape(4, 3) // 2
    loss = MetricLoss(InfoNCE())
    of_teacher = 2 - 2 * (embeddings * teacher).sum(-1).mean()
    expected = 0.75 * float(loss(groups, embeddings)) + 0.25 * of_teacher
    siamese = Siamese(tiny_tower(), loss, teacher_share=0.25)
    found = siamese.compute_loss(None, groups, embeddings, 3 * teacher)  # of any length
    assert float(found) == pytest.approx(expected, rel=1e-5)
    assert float(siamese.compute_loss(None, groups, embeddings)) == float(loss(groups, embeddings))


def test_a_share_of_nothing_trains_as_without_a_teacher(handler, validation, tmp_path):
    settings, weights = replace(SETTINGS, teacher_share=0.0), []
    for teacher in (None, teacher_of(handler)):
        tower = tiny_tower()
        run = tmp_path / str(teacher is None)
        train(tower, handler, validation, settings, run, teacher=teacher)
        weights.append(tower.get_weights())
    for one, other in zip(*weights, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_teacher_that_does_not_fit_is_refused(handler, validation, tmp_path):
    teacher = teacher_of(handler)
    with pytest.raises(TrainingError, match="have 7 dimensions, the tower's embeddings 8: reduce"):
        train(tiny_tower(), handler, validation, SETTINGS, tmp_path, teacher=teacher[:, :7])
    with pytest.raises(ValueError, match="teacher_share must be from 0 to 1, got 2"):
        replace(SETTINGS, teacher_share=2)
    train(tiny_tower(), handler, validation, SETTINGS, tmp_path, teacher=teacher)
    for other in (None, teacher[::-1]):
        with pytest.raises(
            TrainingError, match=r"checkpoint\.npz is of other teacher's descriptors"
        ):
            train(tiny_tower(), handler, validation, SETTINGS, tmp_path, teacher=other)
