"""Trains the Siamese model on triplets, and measures every epoch on landmarks it has not seen.

    history = train(siamese, handler, validation, TrainingSettings(epochs=6), run)

After every epoch the folder ``run`` holds ``checkpoint.weights.h5`` (weights, optimizer and place
in the schedule), ``history.csv`` (one row an epoch) and ``model.keras`` (the tower of the best
epoch so far). The same call goes on where an interrupted one stopped.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

import keras
import numpy as np
import pandas as pd
from keras import ops
from tqdm import tqdm

from lib.dataset import DatasetHandler
from lib.losses import (
    TripletLoss,
    active_share_within,
    embedding_spread,
    negative_distance,
    positive_distance,
)
from lib.metrics import average_precision, pair_hits
from lib.model import embed, gem_exponent, load_tower, save_tower
from lib.storage import read_json, replacing, show_path, write_json

CHECKPOINT, HISTORY, MODEL, SETTINGS = (
    "checkpoint.weights.h5",
    "history.csv",
    "model.keras",
    "training.json",
)

COLLAPSED_SPREAD = 0.02  # of the embeddings: below it they are one point (see embedding_spread)


class TrainingError(RuntimeError):
    """Training can't go on; the message says why and what to change."""


@dataclass(frozen=True)
class TrainingSettings:
    """How to train.

    Attributes:
        epochs: at most this many.
        steps_per_epoch: batches in an epoch.
        learning_rate: Adam's, at its highest.
        warmup_share: share of all steps in which the learning rate rises from 0 to its highest;
            then it falls to 0 along a cosine (Loshchilov and Hutter, SGDR, 2017).
        mining, margin, temperature: see :class:`lib.losses.TripletLoss`.
        patience: stop after this many epochs without a better validation mAP.
    """

    epochs: int
    steps_per_epoch: int
    learning_rate: float = 1e-3
    warmup_share: float = 0.1
    mining: str = "semi-hard"
    margin: float = 0.3
    temperature: float = 0.1
    patience: int = 5


def compile_siamese(siamese: keras.Model, settings: TrainingSettings) -> None:
    """Give the model its optimizer, its loss and the metrics that show a collapse."""
    steps = settings.epochs * settings.steps_per_epoch
    warmup = math.ceil(settings.warmup_share * steps)
    schedule = keras.optimizers.schedules.CosineDecay(
        initial_learning_rate=0.0,
        warmup_target=settings.learning_rate,
        warmup_steps=warmup,
        decay_steps=max(steps - warmup, 1),
    )
    siamese.compile(
        # beta_2: a memory of 100 steps, where Adam's usual 1,000 is longer than a short training.
        optimizer=keras.optimizers.Adam(schedule, beta_2=0.99),
        loss=TripletLoss(settings.margin, settings.mining, settings.temperature),
        metrics=[
            active_share_within(settings.margin),
            positive_distance,
            negative_distance,
            embedding_spread,
        ],
    )


def train(
    siamese: keras.Model,
    handler: DatasetHandler,
    validation: np.ndarray,
    settings: TrainingSettings,
    run: Path,
) -> pd.DataFrame:
    """Train, or go on with an interrupted training; leaves the best epoch's weights in the model.

    Args:
        siamese: from :func:`lib.model.build_siamese`.
        handler: serves the training triplets.
        validation: uint8 (n, 3, s, s, 3), triplets of n landmarks that are not trained on.
        settings: see :class:`TrainingSettings`.
        run: folder for checkpoint, history and model.

    Returns:
        the history, a row an epoch: loss, active_share, positive_distance, negative_distance,
        embedding_spread (over the training batches), val_accuracy (triplets whose negative is
        farther than the positive), val_map (anchor against all positives), p (GeM's exponent),
        learning_rate.

    Raises:
        TrainingError: a loss that is not finite, or a checkpoint that was made by other settings.
        SamplingError: too few usable triplets.
    """
    compile_siamese(siamese, settings)
    siamese.optimizer.build(siamese.trainable_variables)
    tower = siamese.get_layer("tower")
    history = _resume(siamese, settings, run)
    total = settings.epochs * settings.steps_per_epoch
    done = len(history) * settings.steps_per_epoch
    with tqdm(total=total, initial=done, unit=" steps", mininterval=1) as bar:
        for epoch in range(len(history), settings.epochs):
            if _epochs_since_best(history) >= settings.patience:
                break
            row = _train_epoch(siamese, handler, epoch, settings.steps_per_epoch, bar)
            row |= evaluate_triplets(tower, validation)
            row |= {"p": gem_exponent(tower)}
            history.append({"epoch": epoch + 1} | row)
            bar.set_postfix(loss=f"{row['loss']:.3f}", val_map=f"{row['val_map']:.3f}")
            if _epochs_since_best(history) == 0:
                save_tower(tower, run / MODEL)
            _save_checkpoint(siamese, history, run)
    tower.set_weights(load_tower(run / MODEL).get_weights())
    return pd.DataFrame(history).set_index("epoch")


def _train_epoch(siamese, handler: DatasetHandler, epoch: int, steps: int, bar: tqdm) -> dict:
    """One pass over ``steps`` batches; returns the means of loss and metrics over them."""
    batches = handler.training_batches(epoch, steps)
    if keras.backend.backend() == "tensorflow":
        batches = batches.as_tf_data()
    step_bar = _StepBar(bar)
    callbacks = [step_bar, keras.callbacks.TerminateOnNaN()]
    # Told the number of steps, Keras does not run into the end of the dataset, where a graph of
    # TensorFlow would still count one more iteration of the optimizer.
    logs = siamese.fit(
        batches, steps_per_epoch=steps, shuffle=False, verbose=0, callbacks=callbacks
    ).history
    row = {name: values[-1] for name, values in logs.items()}
    if not math.isfinite(row["loss"]):
        raise TrainingError(
            f"the loss became {row['loss']} in epoch {epoch + 1}, step {step_bar.steps}: lower "
            "learning_rate (a tenth is a good try) and start a new run"
        )
    if row["embedding_spread"] < COLLAPSED_SPREAD:
        warnings.warn(
            f"collapse: in epoch {epoch + 1} all photos got nearly the same embedding (spread "
            f"{row['embedding_spread']:.4f}); use mining='soft', or lower learning_rate",
            RuntimeWarning,
            stacklevel=3,
        )
    return row | {"learning_rate": float(ops.convert_to_numpy(siamese.optimizer.learning_rate))}


class _StepBar(keras.callbacks.Callback):
    """Counts the steps of an epoch, and moves the progress bar of the whole training."""

    def __init__(self, bar: tqdm):
        super().__init__()
        self.bar = bar
        self.steps = 0

    def on_train_batch_end(self, batch, logs=None):
        self.steps += 1
        self.bar.update(1)


def evaluate_triplets(tower: keras.Model, triplets: np.ndarray) -> dict[str, float]:
    """Measure a tower on stored triplets, each of another landmark.

    Args:
        tower: from :func:`lib.model.build_tower`.
        triplets: uint8 (n, 3, s, s, 3).

    Returns:
        val_accuracy: share of triplets whose negative is farther than the positive, 0.5 is chance;
        val_map: mean average precision of each anchor's search for its one positive among the
        positives of all triplets.
    """
    photos = triplets.reshape(-1, *triplets.shape[2:])
    anchor, positive, negative = embed(tower, photos).reshape(len(triplets), 3, -1).swapaxes(0, 1)
    closer = (anchor * positive).sum(axis=1) > (anchor * negative).sum(axis=1)
    average = average_precision(pair_hits(anchor, positive)).mean()
    return {"val_accuracy": float(closer.mean()), "val_map": float(average)}


def _epochs_since_best(history: list[dict]) -> int:
    if not history:
        return 0
    return len(history) - 1 - int(np.argmax([row["val_map"] for row in history]))


def _save_checkpoint(siamese: keras.Model, history: list[dict], run: Path) -> None:
    # History first: with an interruption in between, it is a row too long, which resuming cuts off.
    with replacing(run / HISTORY) as part:
        pd.DataFrame(history).to_csv(part, index=False)
    with replacing(run / CHECKPOINT) as part:
        siamese.save_weights(part, overwrite=True)


def _resume(siamese: keras.Model, settings: TrainingSettings, run: Path) -> list[dict]:
    """Load the run's checkpoint if there is one; returns the history of the epochs it holds."""
    run.mkdir(parents=True, exist_ok=True)
    if not (run / CHECKPOINT).is_file():
        write_json(run / SETTINGS, asdict(settings))
        return []
    if (before := read_json(run / SETTINGS)) != asdict(settings):
        changed = [name for name, value in asdict(settings).items() if before.get(name) != value]
        raise TrainingError(
            f"{show_path(run)} holds a training with other settings ({', '.join(changed)}); "
            "choose another run_dir, or the same settings to go on with it"
        )
    try:
        siamese.load_weights(run / CHECKPOINT)
    except (OSError, ValueError, KeyError) as error:
        raise TrainingError(
            f"{show_path(run / CHECKPOINT)} does not fit this model "
            f"({str(error).splitlines()[0]}): choose another run_dir"
        ) from error
    epochs = int(siamese.optimizer.iterations) // settings.steps_per_epoch
    return pd.read_csv(run / HISTORY).head(epochs).to_dict("records")
