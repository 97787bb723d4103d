"""Trains a tower stage by stage, and measures every epoch on landmarks it has not seen.

    settings = TrainingSettings(
        stages=(
            Stage("head", epochs=4, steps_per_epoch=200, learning_rate=1e-3),
            Stage("last-block", epochs=4, steps_per_epoch=200, learning_rate=1e-4),
            Stage("all", epochs=4, steps_per_epoch=200, learning_rate=3e-5),
        ),
    )
    history = train(tower, handler, validation, settings, run)

The same call goes on where an interrupted one stopped, and ends with the same weights. After every
epoch the folder ``run`` holds

    checkpoint.npz    all that the training has come to (see :class:`_Checkpoint`)
    model.keras       the tower of the best epoch so far, over all stages
    history.csv, tensorboard/    what :mod:`lib.training.log` shows

The checkpoint alone counts when a training goes on; the others follow from it, and each file is
replaced as a whole, so an interruption between two of them does no harm.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import warnings
import zipfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import keras
import numpy as np
import pandas as pd
from keras import ops

from lib.data.dataset import DatasetHandler
from lib.data_parallel import as_the_first, by_itself
from lib.evaluation.metrics import average_precision, pair_hits
from lib.files import replacing, show_path
from lib.network.losses import (
    LossSettings,
    MetricLoss,
    active_share_within,
    embedding_spread,
    negative_distance,
    positive_distance,
)
from lib.network.tower import (
    Siamese,
    embed,
    feature_maps,
    gem_exponent,
    layers_of,
    save_tower,
)
from lib.training.features import FeatureCache
from lib.training.log import HISTORY, TENSORBOARD, TrainingLog

CHECKPOINT, MODEL = "checkpoint.npz", "model.keras"

PARTS = ("head", "last-block", "all")
BATCH_NORMS = ("frozen", "live")

COLLAPSED_SPREAD = 0.02  # of the embeddings: below it they are one point (see embedding_spread)


class TrainingError(RuntimeError):
    """Training can't go on; the message says why and what to change."""


@dataclass(frozen=True)
class Stage:
    """A part of the training that moves one part of the tower.

    Attributes:
        train: what moves: "head"; "last-block", the head and the last stage of the backbone (the
            layers ``conv<n>_...`` of the highest n); or "all".
        epochs: at most this many.
        steps_per_epoch: batches in an epoch.
        learning_rate: Adam's, at its highest.

    Raises:
        ValueError: an unknown part, or no steps.
    """

    train: str
    epochs: int
    steps_per_epoch: int
    learning_rate: float

    def __post_init__(self):
        if self.train not in PARTS:
            raise ValueError(f"train must be one of {', '.join(PARTS)}, got {self.train!r}")
        if self.epochs < 1 or self.steps_per_epoch < 1:
            raise ValueError(
                "a stage needs at least one epoch of one step, got "
                f"{self.epochs} x {self.steps_per_epoch}; leave the stage out instead"
            )

    @property
    def steps(self) -> int:
        """Batches in all its epochs."""
        return self.epochs * self.steps_per_epoch


@dataclass(frozen=True)
class TrainingSettings:
    """How to train.

    Attributes:
        stages: one after the other; each begins with the weights of the best epoch so far, and
            with a new optimizer.
        loss: see :class:`lib.network.losses.LossSettings`.
        batch_norm: the backbone's batch normalizations. "frozen": they keep their statistics, shift
            and scale, as is usual for pre-trained weights, whose statistics come of more photos
            than a batch holds. "live": those of the part that a stage trains move with it, which
            training from random weights needs.
        warmup_share: share of a stage's steps in which the learning rate rises from 0 to its
            highest; then it falls to 0 along a cosine (Loshchilov and Hutter, SGDR, 2017).
        clip_norm: gradients longer than this, all weights together, are cut to this length
            (Pascanu et al., "On the difficulty of training recurrent neural networks", 2013);
            None: never.
        ema_momentum: of the moving average of the weights (Polyak and Juditsky, 1992), which is
            measured and saved in their place, while training goes on with the weights themselves;
            None: no average.
        patience: a stage ends early after this many epochs without a better validation mAP than
            its own best before.
        jit: compile the training step with XLA (TensorFlow, JAX) or TorchInductor (PyTorch): True,
            False, or "auto", by which Keras compiles on JAX always, on TensorFlow where there is a
            GPU, and on PyTorch never.

    Raises:
        ValueError: no stages, or an unknown choice.
    """

    stages: tuple[Stage, ...]
    loss: LossSettings = field(default_factory=LossSettings)
    batch_norm: str = "frozen"
    warmup_share: float = 0.1
    clip_norm: float | None = 1.0
    ema_momentum: float | None = None
    patience: int = 5
    jit: bool | str = "auto"

    def __post_init__(self):
        if not self.stages:
            raise ValueError("stages is empty: give at least one Stage")
        if self.batch_norm not in BATCH_NORMS:
            raise ValueError(
                f"batch_norm must be one of {', '.join(BATCH_NORMS)}, got {self.batch_norm!r}"
            )


def compile_siamese(siamese: Siamese, settings: TrainingSettings, stage: Stage) -> None:
    """Give the model the optimizer of a stage, and the metrics that show a collapse."""
    warmup = math.ceil(settings.warmup_share * stage.steps)
    schedule = keras.optimizers.schedules.CosineDecay(
        initial_learning_rate=0.0,
        warmup_target=stage.learning_rate,
        warmup_steps=warmup,
        decay_steps=max(stage.steps - warmup, 1),
    )
    average = {} if settings.ema_momentum is None else {"ema_momentum": settings.ema_momentum}
    siamese.compile(
        # beta_2: a memory of 100 steps, where Adam's usual 1,000 is longer than a short training.
        optimizer=keras.optimizers.Adam(
            schedule,
            beta_2=0.99,
            global_clipnorm=settings.clip_norm,
            use_ema=bool(average),
            **average,
        ),
        metrics=[
            active_share_within(settings.loss.margin, settings.loss.squared),
            positive_distance,
            negative_distance,
            embedding_spread,
        ],
        jit_compile=settings.jit,
    )
    siamese.optimizer.build(siamese.trainable_variables)
    # So that the metrics have their variables, too. Else ``fit`` takes a batch to make them: with
    # JAX and PyTorch that batch is lost, and with TensorFlow the step is traced twice.
    siamese.compute_metrics(None, np.arange(2), np.eye(2, siamese.tower.output_shape[-1]))
    siamese.reset_metrics()


def set_trainable(tower: keras.Model, train: str, batch_norm: str) -> None:
    """Choose which weights of a tower training moves.

    Args:
        tower: from :func:`lib.network.tower.build_tower`. Its head is left as it is.
        train: see :class:`Stage`.
        batch_norm: see :class:`TrainingSettings`.

    Raises:
        TrainingError: "last-block" of a backbone whose layers are not named ``conv<n>_...``, n up
            to 2 at least, by the block they are in (those of the ResNets and DenseNets are).
    """
    trunk = tower.get_layer("trunk")
    trunk.trainable = train != "head"
    blocks = {layer: re.match(r"conv(\d+)_", layer.name) for layer in layers_of(trunk)}
    last = max((int(match[1]) for match in blocks.values() if match), default=None)
    if train == "last-block" and (last or 0) < 2:  # a MobileNet's one "conv1_" is its first
        raise TrainingError(
            'the backbone has no layers conv2_..., conv3_... and so no last block: use train="all"'
        )
    # One by one: with TensorFlow, a model whose flag is set to what it is passes nothing on.
    for layer, match in blocks.items():
        moves = train == "all" or (train == "last-block" and match and int(match[1]) == last)
        # A frozen batch normalization uses its moving statistics in training as well.
        is_norm = isinstance(layer, keras.layers.BatchNormalization)
        layer.trainable = bool(moves) and not (is_norm and batch_norm == "frozen")


def train(
    tower: keras.Model,
    handler: DatasetHandler,
    validation: np.ndarray,
    settings: TrainingSettings,
    run: Path,
    cache: FeatureCache | None = None,
) -> pd.DataFrame:
    """Train, or go on with an interrupted training; leaves the best epoch's weights in the tower.

    Args:
        tower: from :func:`lib.network.tower.build_tower`.
        handler: serves the training batches.
        validation: uint8 (n, 3, s, s, 3), triplets of n landmarks that are not trained on.
        settings: see :class:`TrainingSettings`.
        run: folder for checkpoint, history, model and log.
        cache: feature maps of the tower's trunk, from :func:`lib.training.features.build_cache`.
            Stages that train the head learn from them, and leave the trunk out, as long as no stage
            before has changed it.

    Returns:
        the history, a row an epoch: stage (from 1), loss, active_share, positive_distance,
        negative_distance, embedding_spread (over the training batches), val_accuracy (triplets
        whose negative is farther than the positive), val_map (anchor against all positives), p
        (GeM's exponent), learning_rate (at the epoch's end).

    Raises:
        TrainingError: a loss that is not finite; a checkpoint of other settings, another network,
            or damaged; a disk that is full; see also :func:`set_trainable`.
        SamplingError: too few usable pictures.
    """
    run.mkdir(parents=True, exist_ok=True)
    checkpoint = _open_checkpoint(run, tower, handler, settings)
    history = checkpoint.history
    log = TrainingLog(run, validation)
    for number, stage in enumerate(settings.stages, start=1):
        if _is_over(history, number, settings):
            continue
        set_trainable(tower, stage.train, settings.batch_norm)
        # The cache shows the trunk as it was before any stage changed it.
        if cache is not None and all(s.train == "head" for s in settings.stages[:number]):
            model, batches_of = tower.get_layer("head"), cache.batches
        else:
            model, batches_of = tower, handler.training_batches
        loss = _new_loss(handler, settings)
        siamese = Siamese(model, loss)
        compile_siamese(siamese, settings, stage)
        done = sum(row["stage"] == number for row in history) * stage.steps_per_epoch
        checkpoint.restore(tower, loss, siamese.optimizer if done else None)
        triplets = validation
        if model is not tower:
            with by_itself(tower) as local:
                triplets = feature_maps(local, validation)
        with log.progress(f"{number} {stage.train}", stage.steps, done):
            while not _is_over(history, number, settings):
                epoch = len(history) + 1
                batches = batches_of(epoch - 1, stage.steps_per_epoch)
                row, weights = _train_epoch(siamese, batches, epoch, log)
                # As long as the model holds the moving average of its weights, if there is one:
                with by_itself(model) as local:
                    embeddings = _embed_triplets(local, triplets)
                row |= as_the_first(_measure(embeddings)) | {"p": gem_exponent(tower)}
                history.append({"epoch": epoch, "stage": number} | row)
                is_best = _epochs_since_best(history) == 0
                with _writing(run, epoch - 1):
                    log.write(history, embeddings, is_best=is_best)
                    if is_best:
                        checkpoint.best = [*tower.get_weights(), *loss.get_weights()]
                        save_tower(tower, run / MODEL)
                    siamese.set_weights(weights)
                    checkpoint.take(tower, loss, siamese.optimizer)
                    checkpoint.save()
    checkpoint.restore_best(tower)
    set_trainable(tower, "all", "live")
    with _writing(run, len(history)):
        # Once more: an interruption may have left the model of an epoch that was then done again.
        save_tower(tower, run / MODEL)
    return pd.DataFrame(history).set_index("epoch")


def _new_loss(handler: DatasetHandler, settings: TrainingSettings) -> MetricLoss:
    return MetricLoss(settings.loss, int(handler.catalogue.pictures["group"].max()) + 1)


def _is_over(history: list[dict], stage: int, settings: TrainingSettings) -> bool:
    """Whether a stage has had all its epochs, or no better one for long enough."""
    rows = [row for row in history if row["stage"] == stage]
    epochs = settings.stages[stage - 1].epochs
    return len(rows) >= epochs or _epochs_since_best(rows) >= settings.patience


def _epochs_since_best(history: list[dict]) -> int:
    if not history:
        return 0
    return len(history) - 1 - int(np.argmax([row["val_map"] for row in history]))


def _train_epoch(
    siamese: Siamese, batches: keras.utils.PyDataset, epoch: int, log: TrainingLog
) -> tuple[dict, list[np.ndarray]]:
    """One pass over the batches.

    Returns:
        the means of loss and metrics over them, with the learning rate at the end; and the weights
        to go on with. The model is left with their moving average, if the optimizer keeps one.
    """
    steps = len(batches)
    if keras.backend.backend() == "tensorflow" and hasattr(batches, "as_tf_data"):
        batches = batches.as_tf_data()
    end = _EpochEnd()
    callbacks = [log, end, keras.callbacks.TerminateOnNaN()]
    # Told the number of steps, Keras does not run into the end of the dataset, where a graph of
    # TensorFlow would still count one more iteration of the optimizer.
    logs = siamese.fit(
        batches, steps_per_epoch=steps, shuffle=False, verbose=0, callbacks=callbacks
    ).history
    names = ("loss", "active_share", "positive_distance", "negative_distance", "embedding_spread")
    row = {name: logs[name][-1] for name in names}
    # With JAX the weights and their average are the same arrays now, which predict gives away.
    siamese.set_weights(siamese.get_weights())
    if not math.isfinite(row["loss"]):
        raise TrainingError(
            f"the loss became {row['loss']} in epoch {epoch}, step {end.steps}: lower "
            "learning_rate (a tenth is a good try) and start a new run"
        )
    if row["embedding_spread"] < COLLAPSED_SPREAD:
        warnings.warn(
            f"collapse: in epoch {epoch} all photos got nearly the same embedding (spread "
            f"{row['embedding_spread']:.4f}); use loss='infonce', or lower learning_rate",
            RuntimeWarning,
            stacklevel=3,
        )
    rate = float(ops.convert_to_numpy(siamese.optimizer.learning_rate))
    return row | {"learning_rate": rate}, end.weights


class _EpochEnd(keras.callbacks.Callback):
    """Counts the steps, and takes the weights before ``fit`` puts their average in their place."""

    def __init__(self):
        super().__init__()
        self.steps = 0

    def on_train_batch_end(self, batch, logs=None):
        self.steps += 1

    def on_epoch_end(self, epoch, logs=None):
        self.weights = self.model.get_weights()


# --------------------------------------------------------------------------------------------------
# Measuring
# --------------------------------------------------------------------------------------------------


def evaluate_triplets(tower: keras.Model, triplets: np.ndarray) -> dict[str, float]:
    """Measure a tower on stored triplets, each of another landmark.

    Args:
        tower: from :func:`lib.network.tower.build_tower`.
        triplets: uint8 (n, 3, s, s, 3).

    Returns:
        val_accuracy: share of triplets whose negative is farther than the positive, 0.5 is chance;
        val_map: mean average precision of each anchor's search for its one positive among the
        positives of all triplets.
    """
    return _measure(_embed_triplets(tower, triplets))


def _embed_triplets(model: keras.Model, triplets: np.ndarray) -> np.ndarray:
    """Photos, or for a head their feature maps, (n, 3, h, w, c) -> float32 (n, 3, d)."""
    return embed(model, triplets.reshape(-1, *triplets.shape[2:])).reshape(len(triplets), 3, -1)


def _measure(embeddings: np.ndarray) -> dict[str, float]:
    anchor, positive, negative = embeddings.swapaxes(0, 1)
    closer = (anchor * positive).sum(axis=1) > (anchor * negative).sum(axis=1)
    average = average_precision(pair_hits(anchor, positive)).mean()
    return {"val_accuracy": float(closer.mean()), "val_map": float(average)}


# --------------------------------------------------------------------------------------------------
# The checkpoint
# --------------------------------------------------------------------------------------------------


@dataclass
class _Checkpoint:
    """All that a training has come to, after the last epoch of its history.

    One file holds it, so that no part of it can be of another epoch than the rest. What batches
    come next follows from the number of epochs; which stage, and whether it has ended, from the
    history.

    Attributes:
        path: the file.
        settings: of training and data, as JSON has them.
        history: a row an epoch.
        tower, loss: the variables of the tower and of the loss, its random state among them.
        optimizer: those of the optimizer of the history's last stage: moments, moving average of
            the weights, number of steps.
        best: the weights of tower and loss after the best epoch; before any, those of the start.
    """

    path: Path
    settings: dict
    history: list[dict] = field(default_factory=list)
    tower: list[np.ndarray] = field(default_factory=list)
    loss: list[np.ndarray] = field(default_factory=list)
    optimizer: list[np.ndarray] = field(default_factory=list)
    best: list[np.ndarray] = field(default_factory=list)

    def take(self, tower, loss, optimizer=None) -> None:
        """Take over the values of all variables."""
        self.tower, self.loss, self.optimizer = (
            [] if part is None else [np.array(ops.convert_to_numpy(v)) for v in part.variables]
            for part in (tower, loss, optimizer)
        )

    def restore(self, tower, loss, optimizer=None) -> None:
        """Give all variables their values; without an optimizer, at the start of a stage."""
        self._assign(tower.variables, self.tower)
        self._assign(loss.variables, self.loss)
        if optimizer is not None:
            self._assign(optimizer.variables, self.optimizer)
        else:
            self._assign([*tower.weights, *loss.weights], self.best)

    def restore_best(self, tower) -> None:
        """Give the tower the weights of its best epoch."""
        self._assign(tower.weights, self.best[: len(tower.weights)])

    def _assign(self, variables: list, values: list[np.ndarray]) -> None:
        if [tuple(v.shape) for v in variables] != [v.shape for v in values]:
            raise TrainingError(
                f"{show_path(self.path)} is of another network: choose another run_dir, or the "
                "same network to go on with it"
            )
        for variable, value in zip(variables, values, strict=True):
            variable.assign(value)

    _LISTS = ("tower", "loss", "optimizer", "best")

    def save(self) -> None:
        """Write the file, atomically."""
        arrays = {
            f"{name}_{i}": value
            for name in self._LISTS
            for i, value in enumerate(getattr(self, name))
        }
        facts = json.dumps({"settings": self.settings, "history": self.history})
        with replacing(self.path) as part:
            np.savez(part, facts=np.array(facts), **arrays)

    @classmethod
    def load(cls, path: Path) -> _Checkpoint:
        """Read the file.

        Raises:
            TrainingError: it is damaged.
        """
        try:
            with np.load(path, allow_pickle=False) as arrays:
                facts = json.loads(str(arrays["facts"]))
                lists = {name: [] for name in cls._LISTS}
                for key in arrays.files:  # in the order they were written
                    name = key.partition("_")[0]
                    if name in lists:
                        lists[name].append(arrays[key])
            return cls(path, facts["settings"], facts["history"], **lists)
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise TrainingError(
                f"{show_path(path)} can't be read ({error}): choose another run_dir, or delete "
                "the file to begin again"
            ) from error


def _open_checkpoint(
    run: Path, tower: keras.Model, handler: DatasetHandler, settings: TrainingSettings
) -> _Checkpoint:
    """The run's checkpoint, or a first one of the weights as they are."""
    left = [part for name in (CHECKPOINT, MODEL, HISTORY) for part in run.glob(f".part-*-{name}")]
    for part in [*left, *(run / TENSORBOARD).rglob(".part-*")]:
        part.unlink()  # by a process that was killed while it wrote
    asked = {"training": asdict(settings), "data": asdict(handler.settings)}
    asked = json.loads(json.dumps(asked))
    if (run / CHECKPOINT).is_file():
        checkpoint = _Checkpoint.load(run / CHECKPOINT)
        changed = [
            name
            for part, values in asked.items()
            for name, value in values.items()
            if checkpoint.settings[part].get(name) != value
        ]
        if changed:
            raise TrainingError(
                f"{show_path(run)} holds a training with other settings ({', '.join(changed)}); "
                "choose another run_dir, or the same settings to go on with it"
            )
        return checkpoint
    loss = _new_loss(handler, settings)
    Siamese(tower, loss)  # gives the loss its weights
    checkpoint = _Checkpoint(run / CHECKPOINT, asked)
    checkpoint.best = [*tower.get_weights(), *loss.get_weights()]
    checkpoint.take(tower, loss)
    # From now on these are the random weights that the training began with; and a disk that is
    # too small shows before an epoch's work.
    with _writing(run, 0):
        checkpoint.save()
    return checkpoint


@contextlib.contextmanager
def _writing(run: Path, epochs: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise TrainingError(
            f"{show_path(run)} can't be written ({error.strerror or error}): make room on the disk "
            f"and run the same once more, it goes on after epoch {epochs}"
        ) from error
