"""Trains a tower in stages and validates every epoch on landmarks that it has not seen.

    stages = (
        Stage("head", epochs=4, steps_per_epoch=200, learning_rate=1e-3),
        Stage("last-block", epochs=4, steps_per_epoch=200, learning_rate=1e-4),
        Stage("all", epochs=4, steps_per_epoch=200, learning_rate=3e-5),
    )
    history = train(tower, handler, validation, TrainingSettings(stages), run)

The same call resumes an interrupted training and ends with the same weights, bit for bit. The
folder ``run`` holds the checkpoint, which is all that a resume reads, the log, and ``model.keras``,
the tower of the best epoch so far. Each file is replaced atomically, so an interruption between two
of them does no harm.
"""

from __future__ import annotations

import contextlib
import functools
import math
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import keras
import numpy as np
import pandas as pd
from keras import ops

from lib.data.dataset import DatasetHandler, PlannedBatches
from lib.data.sampling import hard_negatives
from lib.data_parallel import as_the_first, by_itself
from lib.evaluation.metrics import average_precision, pair_hits
from lib.files import only_writer, remove_half_written, show_path
from lib.network.hub import stays_fixed
from lib.network.losses import (
    ArcFace,
    InfoNCE,
    Loss,
    MetricLoss,
    active_share_of,
    check_memory,
    embedding_spread,
    negative_distance,
    positive_distance,
)
from lib.network.mining import ANCHOR, NEGATIVE, compare
from lib.network.tower import Siamese, embed, feature_maps, gem_exponent, layers_of, save_tower
from lib.training.checkpoint import CHECKPOINT, Checkpoint, TrainingError, describe_training
from lib.training.features import FeatureCache
from lib.training.log import TENSORBOARD, TrainingLog

MODEL = "model.keras"

PARTS = ("head", "last-block", "all")
BATCH_NORMS = ("frozen", "live")
_READ = 1024  # pictures in memory at a time: 50 MB of photos of 128 pixels
COLLAPSED_SPREAD = 0.02  # embeddings with less are nearly a single point (see embedding_spread)


@dataclass(frozen=True)
class Stage:
    """A stage of training, in which a part of the tower is trainable.

    Attributes:
        train: "head"; "last-block": the head and the backbone's last block (the layers
            ``conv<n>_...`` with the highest n); or "all".
        epochs: at most, see ``patience`` of :class:`TrainingSettings`.
        learning_rate: Adam's, at the end of the warmup.

    Raises:
        ValueError: an unknown part, no epochs, or no steps.
    """

    train: str
    epochs: int
    steps_per_epoch: int
    learning_rate: float

    def __post_init__(self):
        if self.train not in PARTS:
            raise ValueError(f"train must be one of {', '.join(PARTS)}, got {self.train!r}")
        if self.epochs < 1 or self.steps_per_epoch < 1:
            size = f"{self.epochs} x {self.steps_per_epoch}"
            raise ValueError(f"a stage needs epochs and steps, got {size}; leave the stage out")

    @property
    def steps(self) -> int:
        return self.epochs * self.steps_per_epoch


@dataclass(frozen=True)
class TrainingSettings:
    """How to train.

    Attributes:
        stages: in order; each starts from the best epoch's weights so far, with a new optimizer.
        batch_norm: of the backbone. "frozen": statistics, shift and scale stay fixed, as is usual
            for pre-trained weights, whose statistics come from more photos than a batch has.
            "live": they are updated in the part that a stage trains, as random weights need.
        warmup_share: share of a stage's steps in which the learning rate rises.
        clip_norm, ema_momentum: see :func:`make_optimizer`. A moving average is validated and saved
            in place of the weights; training continues with the weights.
        patience: a stage ends after this many epochs without a better validation mAP.
        pool: pictures, drawn and embedded before each epoch, among which the negatives of its
            stored triplets are mined, see :func:`lib.data.sampling.hard_negatives`. They and the
            anchors are embedded by the weights that train, not by their average. 0: the stored
            negatives.
        memory: of :class:`lib.network.losses.MetricLoss`; 0: none. A stage begins with that of the
            best epoch. Of the history, only ``loss`` takes it into account.
        teacher_share: of the distillation in the loss, from 0 to 1, if :func:`train` has a teacher;
            the rest is that of ``loss``. Of the history, only ``loss`` has both.
        jit: compile the training step with XLA (TensorFlow, JAX) or TorchInductor (PyTorch): True,
            False, or "auto", Keras' choice (JAX, and TensorFlow on a GPU).

    Raises:
        ValueError: no stages, an unknown choice, or what :func:`check_memory` refuses.
    """

    stages: tuple[Stage, ...]
    loss: Loss = field(default_factory=InfoNCE)
    batch_norm: str = "frozen"
    warmup_share: float = 0.1
    clip_norm: float | None = 1.0
    ema_momentum: float | None = None
    patience: int = 5
    pool: int = 0
    memory: int = 0
    teacher_share: float = 0.5
    jit: bool | str = "auto"

    def __post_init__(self):
        if not self.stages:
            raise ValueError("stages is empty: give at least one Stage")
        if self.batch_norm not in BATCH_NORMS:
            names = ", ".join(BATCH_NORMS)
            raise ValueError(f"batch_norm must be one of {names}, got {self.batch_norm!r}")
        if self.pool < 0:
            raise ValueError(f"pool must be at least 0 pictures, got {self.pool}")
        check_memory(self.loss, self.memory)
        if not 0 <= self.teacher_share <= 1:
            raise ValueError(f"teacher_share must be from 0 to 1, got {self.teacher_share}")


def make_optimizer(
    learning_rate: float,
    steps: int,
    warmup_steps: int,
    clip_norm: float | None = 1.0,
    ema_momentum: float | None = None,
) -> keras.optimizers.Adam:
    """Make Adam with linear warmup and cosine decay to 0 (Loshchilov and Hutter, SGDR, 2017).

    Args:
        learning_rate: at the end of the warmup, which begins at 0.
        steps: of the whole training, warmup included.
        clip_norm: limit of the gradients' global norm (Pascanu et al., "On the difficulty of
            training recurrent neural networks", 2013); None: no clipping.
        ema_momentum: of a moving average of the weights (Polyak and Juditsky, 1992); None: none.
    """
    schedule = keras.optimizers.schedules.CosineDecay(
        initial_learning_rate=0.0,
        warmup_target=learning_rate,
        warmup_steps=warmup_steps,
        decay_steps=max(steps - warmup_steps, 1),
    )
    average = {} if ema_momentum is None else {"use_ema": True, "ema_momentum": ema_momentum}
    # beta_2 averages over some 100 steps. Adam's default of 1,000 is too long for short trainings.
    return keras.optimizers.Adam(schedule, beta_2=0.99, global_clipnorm=clip_norm, **average)


def compile_siamese(siamese: Siamese, settings: TrainingSettings, stage: Stage) -> None:
    """Compile the model with a stage's optimizer and the metrics that show a collapse."""
    warmup = math.ceil(settings.warmup_share * stage.steps)
    rate, clip_norm, momentum = stage.learning_rate, settings.clip_norm, settings.ema_momentum
    optimizer = make_optimizer(rate, stage.steps, warmup, clip_norm, momentum)
    active_share = active_share_of(settings.loss)
    metrics = [active_share, positive_distance, negative_distance, embedding_spread]
    siamese.compile(optimizer, metrics=metrics, jit_compile=settings.jit)
    siamese.optimizer.build(siamese.trainable_variables)
    # Build the metrics here. ``fit`` would use a batch for it, which would be lost on JAX and
    # PyTorch, and TensorFlow would trace the step twice.
    siamese.compute_metrics(None, np.arange(2), np.eye(2, siamese.tower.output_shape[-1]))
    siamese.reset_metrics()


def set_trainable(tower: keras.Model, train: str, batch_norm: str) -> None:
    """Set which layers of the trunk are trainable; the head's layers stay as they are.

    Raises:
        TrainingError: "last-block" with a backbone whose layers are not named ``conv<n>_...`` after
            their block, as those of ResNets and DenseNets are.
    """
    trunk = tower.get_layer("trunk")
    trunk.trainable = train != "head"
    blocks = {layer: re.match(r"conv(\d+)_", layer.name) for layer in layers_of(trunk)}
    last = max((int(match[1]) for match in blocks.values() if match), default=None)
    if train == "last-block" and (last or 0) < 2:  # a MobileNet has only a first, "conv1_"
        raise TrainingError(
            'the backbone has no layers conv2_..., conv3_... and so no last block: use train="all"'
        )
    # Layer by layer, and changed twice: on TensorFlow, a model or layer whose own flag does not
    # change does not set its layers.
    for layer, match in blocks.items():
        moves = train == "all" or (train == "last-block" and match and int(match[1]) == last)
        # A frozen batch normalization uses its moving statistics in training as well.
        is_norm = isinstance(layer, keras.layers.BatchNormalization)
        fixed = (is_norm and batch_norm == "frozen") or stays_fixed(layer)
        layer.trainable = bool(fixed or not moves)
        layer.trainable = not layer.trainable


def train(
    tower: keras.Model,
    handler: DatasetHandler,
    validation: np.ndarray,
    settings: TrainingSettings,
    run: Path,
    cache: FeatureCache | None = None,
    teacher: np.ndarray | None = None,
) -> pd.DataFrame:
    """Train, or resume an interrupted training; the tower ends with the best epoch's weights.

    Args:
        tower: from :func:`lib.network.tower.build_tower`. A resume needs the same start weights.
            After an error, it has the weights again that it came with.
        validation: uint8 (n, 3, s, s, 3), triplets of n landmarks that are not trained on.
        run: folder for checkpoint, history, model and log; only one process may train in it.
        cache: from :func:`lib.training.features.build_cache`. Stages that train the head use its
            maps in place of the trunk until a stage changes the trunk.
        teacher: float32 (pictures, d), a stronger network's descriptors of the catalogue's
            pictures, d that of the tower; only the rows of training pictures are read. The tower
            learns them as well, see :class:`lib.network.tower.Siamese`.

    Returns:
        the history, a row for each epoch: stage (from 1); over the training batches loss,
        active_share, positive_distance, negative_distance, embedding_spread; val_loss, the same
        loss over batches of validation triplets, without augmentation, memory and teacher (NaN for
        ArcFace, whose classes they do not have); val_accuracy and val_map, see
        :func:`evaluate_triplets`; p (GeM's exponent); learning_rate (at its end).

    Raises:
        TrainingError: another process trains in ``run``; its checkpoint is damaged, or of other
            settings, pictures, start weights or another network; the loss is not finite; ``run``
            can't be written; a pool for P x K batches; a teacher of another dimension than the
            tower; see also :func:`set_trainable`.
        SamplingError: too few usable pictures, or too small a pool.
    """
    busy = f"another process trains in {show_path(run)}: wait for its end or choose another run_dir"
    before = tower.get_weights()
    # Not the lock of ``run`` itself: it guards metrics.json, which others may write meanwhile.
    (run / TENSORBOARD).mkdir(parents=True, exist_ok=True)
    with only_writer(run / TENSORBOARD, TrainingError(busy)):
        try:
            training = _Training(tower, handler, validation, settings, run, cache, teacher)
            for number in range(1, len(settings.stages) + 1):
                if not training.is_over(number):
                    training.run_stage(number)
            training.checkpoint.restore_best(tower)
        except BaseException:
            tower.set_weights(before)
            raise
        finally:
            set_trainable(tower, "all", "live")
        history = training.checkpoint.history
        with _writing(run, len(history)):
            # Save again: an interruption may have left the model of an epoch that was repeated.
            save_tower(tower, run / MODEL)
    return pd.DataFrame(history).set_index("epoch")


class _Training:
    """The state of a call of :func:`train`; opens the run's checkpoint or begins a new one."""

    def __init__(self, tower, handler, validation, settings, run, cache, teacher):
        self.tower, self.handler, self.validation = tower, handler, validation
        self.settings, self.run, self.cache, self.teacher = settings, run, cache, teacher
        self._batch_size = handler.settings.batch_size
        if settings.pool and handler.settings.pictures_per_landmark:
            raise TrainingError(
                "a pool has negatives for stored triplets, not for P x K batches: set "
                "pictures_per_landmark=0 in DataSettings, or pool=0"
            )
        remove_half_written(run, subfolders=True)
        if teacher is not None and teacher.shape[1] != tower.output_shape[-1]:
            raise TrainingError(
                f"the teacher's descriptors have {teacher.shape[1]} dimensions, the tower's "
                f"embeddings {tower.output_shape[-1]}: reduce them by PCA, or set embedding_size"
            )
        identity = describe_training(tower, handler, validation, settings, teacher)
        if (run / CHECKPOINT).is_file():
            self.checkpoint = Checkpoint.load(run / CHECKPOINT, tower, identity)
        else:
            self.checkpoint = Checkpoint(run / CHECKPOINT, identity)
            loss = self._new_loss()
            Siamese(tower, loss)  # gives the loss its weights
            self.checkpoint.take_best(tower, loss)
            # Save now to keep the loss's random weights, and to find a full disk before an epoch.
            with _writing(run, 0):
                self.checkpoint.save(tower, loss)
        self.log = TrainingLog(run, validation)

    def _new_loss(self) -> MetricLoss:
        groups = int(self.handler.catalogue.pictures["group"].max()) + 1
        return MetricLoss(self.settings.loss, groups, self.settings.memory)

    def is_over(self, number: int) -> bool:
        """Tell whether a stage has had all its epochs or has run out of patience."""
        rows = [row for row in self.checkpoint.history if row["stage"] == number]
        epochs = self.settings.stages[number - 1].epochs
        return len(rows) >= epochs or _epochs_since_best(rows) >= self.settings.patience

    def run_stage(self, number: int) -> None:
        tower, checkpoint, stage = self.tower, self.checkpoint, self.settings.stages[number - 1]
        set_trainable(tower, stage.train, self.settings.batch_norm)
        # Cached maps are stale as soon as a stage has changed the trunk.
        stages = self.settings.stages[:number]
        cached = self.cache is not None and all(s.train == "head" for s in stages)
        model = tower.get_layer("head") if cached else tower
        batches_of = self.cache.batches if cached else self.handler.training_batches
        loss = self._new_loss()
        siamese = Siamese(model, loss, self.settings.teacher_share)
        compile_siamese(siamese, self.settings, stage)
        done = sum(row["stage"] == number for row in checkpoint.history) * stage.steps_per_epoch
        checkpoint.restore(tower, loss, siamese.optimizer if done else None)
        triplets = self.validation
        if cached:
            with by_itself(tower) as local:
                triplets = feature_maps(local, triplets)
        with self.log.progress(f"{number} {stage.train}", stage.steps, done):
            while not self.is_over(number):
                epochs = len(checkpoint.history)
                batches = batches_of(epochs, stage.steps_per_epoch)
                if self.settings.pool:
                    self._mine(batches, epochs, model, cached)
                batches.teacher = self.teacher
                row, weights = _train_epoch(siamese, batches, epochs + 1, self.log)
                # Until ``weights`` are set below, the model holds their moving average, if any.
                with by_itself(model) as local:
                    embeddings = _embed_triplets(local, triplets)
                of_loss = _validation_loss(self.settings.loss, embeddings, self._batch_size)
                row |= as_the_first({"val_loss": of_loss} | _measure(embeddings))
                row["p"] = gem_exponent(tower)
                checkpoint.history.append({"epoch": epochs + 1, "stage": number} | row)
                is_best = _epochs_since_best(checkpoint.history) == 0
                with _writing(self.run, epochs):
                    self.log.write(checkpoint.history, embeddings, is_best=is_best)
                    if is_best:
                        checkpoint.take_best(tower, loss)
                        save_tower(tower, self.run / MODEL)
                    siamese.set_weights(weights)
                    checkpoint.save(tower, loss, siamese.optimizer)

    def _mine(self, batches: PlannedBatches, epoch: int, model: keras.Model, cached: bool) -> None:
        """Replace the stored negatives of an epoch by the hardest of a pool, see ``pool``."""
        handler, plan = self.handler, batches.plan
        read = functools.partial(self.cache.maps, variant=0) if cached else handler.photos
        # The batches' generators have the numbers of the steps.
        rng = np.random.default_rng([handler.settings.seed, epoch, len(plan)])
        pool = rng.permutation(np.unique(handler.triplets))[: self.settings.pool]
        group = handler.catalogue.pictures["group"].to_numpy()
        with by_itself(model) as local:

            def embed_pictures(pictures: np.ndarray) -> np.ndarray:
                starts = range(0, len(pictures), _READ)
                return np.concatenate([embed(local, read(pictures[i : i + _READ])) for i in starts])

            found = hard_negatives(plan[..., ANCHOR], pool, group, embed_pictures, rng)
        plan[..., NEGATIVE] = as_the_first(found.tolist())


def _epochs_since_best(history: list[dict]) -> int:
    maps = [row["val_map"] for row in history]
    return len(maps) - 1 - int(np.argmax(maps)) if maps else 0


@contextlib.contextmanager
def _writing(run: Path, epochs: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise TrainingError(
            f"{show_path(run)} can't be written ({error.strerror or error}): make room on the disk "
            f"and run the same once more, it goes on after epoch {epochs}"
        ) from error


def _train_epoch(
    siamese: Siamese, batches: keras.utils.PyDataset, epoch: int, log: TrainingLog
) -> tuple[dict, list[np.ndarray]]:
    """Train an epoch; return its means and the weights, whose average, if any, the model has."""
    steps = len(batches)
    if keras.backend.backend() == "tensorflow" and hasattr(batches, "as_tf_data"):
        batches = batches.as_tf_data()
    weights = []  # before ``fit`` replaces them with their average
    keep = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda *_: weights.extend(siamese.get_weights())
    )
    # Given the steps, Keras stops before the dataset's end, where TensorFlow's graph would count
    # another iteration of the optimizer.
    logs = siamese.fit(
        batches,
        steps_per_epoch=steps,
        shuffle=False,
        verbose=0,
        callbacks=[log, keep, keras.callbacks.TerminateOnNaN()],
    ).history
    names = ("loss", "active_share", "positive_distance", "negative_distance", "embedding_spread")
    row = {name: logs[name][-1] for name in names}
    # Copy: on JAX, weights and their average now share arrays, which predict would donate.
    siamese.set_weights(siamese.get_weights())
    optimizer = siamese.optimizer
    if not math.isfinite(row["loss"]):
        step = (int(ops.convert_to_numpy(optimizer.iterations)) - 1) % steps + 1
        raise TrainingError(
            f"the loss became {row['loss']} in epoch {epoch}, step {step}: lower "
            "learning_rate (a tenth is a good try) and start a new run"
        )
    if row["embedding_spread"] < COLLAPSED_SPREAD:
        warnings.warn(
            f"collapse: in epoch {epoch} all photos got nearly the same embedding (spread "
            f"{row['embedding_spread']:.4f}); use loss='infonce', or lower learning_rate",
            RuntimeWarning,
            stacklevel=4,
        )
    return row | {"learning_rate": float(ops.convert_to_numpy(optimizer.learning_rate))}, weights


def evaluate_triplets(tower: keras.Model, triplets: np.ndarray) -> dict[str, float]:
    """Validate a tower on triplets uint8 (n, 3, s, s, 3), each of a different landmark.

    Returns:
        val_accuracy: share of triplets whose negative is farther than the positive (chance: 0.5);
        val_map: mean average precision when each anchor searches all positives for its own.
    """
    return _measure(_embed_triplets(tower, triplets))


def _embed_triplets(model: keras.Model, triplets: np.ndarray) -> np.ndarray:
    """Embed photos, or with a head their feature maps, (n, 3, h, w, c) -> float32 (n, 3, d)."""
    return embed(model, triplets.reshape(-1, *triplets.shape[2:])).reshape(len(triplets), 3, -1)


def _validation_loss(loss: Loss, embeddings: np.ndarray, batch_size: int) -> float:
    """The mean loss of validation triplets, float (n, 3, d), in batches as large as in training.

    They are those of :meth:`lib.data.dataset.DatasetHandler.validation_triplets`: each negative is
    the anchor of the triplet before, and so of its landmark.
    """
    if isinstance(loss, ArcFace):
        return float("nan")
    batch_size = min(batch_size, len(embeddings))
    state = keras.random.SeedGenerator(0)  # for miners that draw at random
    values = []
    for start in range(0, len(embeddings) - batch_size + 1, batch_size):
        rows = np.arange(start, start + batch_size)
        groups = np.stack([rows, rows, (rows - 1) % len(embeddings)], axis=1)
        pairs = compare(groups, embeddings[start : start + batch_size])
        values.append(float(ops.convert_to_numpy(loss(pairs, state))))
    return float(np.mean(values)) if values else float("nan")


def _measure(embeddings: np.ndarray) -> dict[str, float]:
    anchor, positive, negative = embeddings.swapaxes(0, 1)
    closer = (anchor * positive).sum(axis=1) > (anchor * negative).sum(axis=1)
    average = average_precision(pair_hits(anchor, positive)).mean()
    return {"val_accuracy": float(closer.mean()), "val_map": float(average)}
