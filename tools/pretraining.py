"""Pre-trains the demo's ResNet50 on drawn landmarks instead of ImageNet.

    python -m tools.pretraining        # or: make backbone; it continues an interrupted run

Every step draws new landmarks, from a world with another seed than the demo's, so that the demo
never searches for them. The result is ``weights/demo_resnet50.weights.h5``, the backbone in half
precision, without the head.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import asdict, dataclass, fields
from itertools import count, islice
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # TensorFlow is chatty

import keras
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from tqdm import tqdm

from lib.data.decoding import resize
from lib.demo.world import draw_views
from lib.evaluation.metrics import average_precision, leave_one_out
from lib.files import (
    only_writer,
    project_root,
    read_json,
    replacing,
    show_error,
    show_path,
    write_json,
)
from lib.network.losses import InfoNCE, MetricLoss
from lib.network.tower import (
    Siamese,
    TowerSettings,
    build_backbone,
    build_tower,
    computing_in,
    embed,
    fast_policy,
)
from lib.programs import UsageError, as_path, program
from lib.training.stages import make_optimizer
from lib.workers import process_pool

WEIGHTS = Path("weights/demo_resnet50.weights.h5")  # below the project's folder
CURVE = "pretraining.csv"

_CHECKPOINT, _SETTINGS = "checkpoint.weights.h5", "pretraining.json"
VALIDATION_LANDMARKS = 100  # with five views each
_FIRST_VALIDATION = 10_000_000  # number of the first; pre-training never reaches it


@dataclass(frozen=True)
class PretrainingSettings:
    """How the backbone is pre-trained.

    Attributes:
        seed: of the world and the batches; must differ from the demo's seed.
        last_stage: last stage of ResNet50 in the backbone, as in TowerSettings.
        small_size, small_steps: side of the photos in pixels in the first steps, and their number;
            they teach coarse shapes at a fraction of the cost.
        size, steps: the same for the remaining steps.
        landmarks, views: landmarks per batch, and views of each.
        drawn_views: views drawn of each landmark, from which a batch samples.
        fresh: number of landmarks replaced by new ones at each step, oldest first.
        window: number of landmarks from which a batch samples.
        embedding_size, temperature: of the head and the InfoNCE loss.
        learning_rate: peak learning rate of Adam.
        steps_per_round: steps between measurements; each also writes a checkpoint.
    """

    seed: int = 20
    last_stage: int = 3
    small_size: int = 32
    small_steps: int = 2700
    size: int = 48
    steps: int = 900
    landmarks: int = 64
    views: int = 4
    drawn_views: int = 8
    fresh: int = 8
    window: int = 1024
    embedding_size: int = 256
    temperature: float = 0.07
    learning_rate: float = 3e-3
    steps_per_round: int = 250

    def __post_init__(self):
        # Keras' ResNet50 takes photos from 32 pixels.
        least = {"seed": 0, "small_steps": 0, "fresh": 0, "small_size": 32, "size": 32}
        least |= {"landmarks": 2, "views": 2, "temperature": 1e-6, "learning_rate": 0}
        most = {"landmarks": self.window, "views": self.drawn_views, "last_stage": 5}
        for name, value in asdict(self).items():
            low, high = least.get(name, 1), most.get(name, math.inf)
            if not low <= value <= high:
                option = f"--{name.replace('_', '-')} {value}"
                raise UsageError(f"{option}: choose a number from {low} to {high}")


def rendered_batches(
    settings: PretrainingSettings, first_step: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield endless P x K batches of drawn landmarks.

    A batch depends only on settings and step, so a resumed pre-training sees the same batches.

    Args:
        settings: of the batches.
        first_step: step of the first batch.

    Yields:
        photos, uint8 (landmarks * views, 128, 128, 3), and the numbers of their landmarks, int32
        (landmarks * views,).
    """
    with process_pool() as pool:

        def begin(landmark: int) -> Future:
            views = list(range(settings.drawn_views))
            return pool.submit(draw_views, settings.seed, landmark, views)

        # The window of a step begins at landmark step * fresh. While the network trains, the
        # landmarks of the next four steps are drawn in the background.
        numbers = count(first_step * settings.fresh)
        ahead = settings.window + 4 * settings.fresh
        drawn = deque(begin(landmark) for landmark in islice(numbers, ahead))
        for step in count(first_step):
            rng = np.random.default_rng([settings.seed, step])
            chosen = rng.choice(settings.window, settings.landmarks, replace=False)
            photos = [
                drawn[i].result()[rng.permutation(settings.drawn_views)[: settings.views]]
                for i in chosen
            ]
            groups = np.repeat(step * settings.fresh + chosen, settings.views)
            yield np.concatenate(photos), groups.astype(np.int32)
            for landmark in islice(numbers, settings.fresh):
                drawn.popleft()
                drawn.append(begin(landmark))


def pretrain(settings: PretrainingSettings, run: Path) -> tuple[keras.Model, pd.DataFrame]:
    """Pre-train, or continue an interrupted pre-training.

    Args:
        settings: of the pre-training.
        run: folder for checkpoint and curve.

    Returns:
        the tower; and the curve, a row per round: steps so far, minutes (without interrupted
        rounds), image_size, loss, and map, the mAP of validation landmarks of the same world.

    Raises:
        ValueError: ``run`` holds a pre-training with other settings or precision, or another
            process uses it.
    """
    run.mkdir(parents=True, exist_ok=True)
    busy = ValueError(f"another process pre-trains in {show_path(run)}: wait until it ends")
    with only_writer(run, busy):
        siamese, rows = _open(settings, run)
        done = int(siamese.optimizer.iterations)
        total = settings.small_steps + settings.steps
        validation = _validation(settings)
        batches = rendered_batches(settings, done)
        with tqdm(total=total, initial=done, desc="pre-training", unit=" steps") as bar:
            while done < total:
                start, before = time.monotonic(), rows[-1]["minutes"] if rows else 0.0
                # All steps of a round have the same image size.
                small = done < settings.small_steps
                side = settings.small_size if small else settings.size
                end = settings.small_steps if small else total
                if side != siamese.tower.input_shape[1]:
                    siamese = _continue_at(siamese, settings, side)
                losses = []
                for photos, groups in islice(batches, min(settings.steps_per_round, end - done)):
                    losses.append(float(siamese.train_on_batch(_resized(photos, side), groups)))
                    bar.update(1)
                done += len(losses)
                row = {"steps": done, "minutes": before + (time.monotonic() - start) / 60}
                row |= {"image_size": side, "loss": float(np.mean(losses))}
                row["map"] = _mean_average_precision(siamese.tower, validation)
                rows.append(row)
                bar.set_postfix(loss=f"{row['loss']:.3f}", map=f"{row['map']:.3f}")
                with replacing(run / CURVE) as part:
                    pd.DataFrame(rows).to_csv(part, index=False)
                with replacing(run / _CHECKPOINT) as part:
                    siamese.save_weights(part, overwrite=True)
        batches.close()
    return siamese.tower, pd.DataFrame(rows)


def _open(settings: PretrainingSettings, run: Path) -> tuple[Siamese, list[dict]]:
    """Create the model and the curve's rows, or load those of an interrupted pre-training."""
    facts = asdict(settings) | {"precision": fast_policy()}
    if not (run / _CHECKPOINT).is_file():
        write_json(run / _SETTINGS, facts)
        return _siamese(settings, settings.small_size), []
    remedy = "delete it, or name another folder with --run-dir"
    found = read_json(run / _SETTINGS)
    # Earlier versions always computed in bfloat16, and stored no precision.
    found = {"precision": "mixed_bfloat16"} | (found if isinstance(found, dict) else {})
    if differ := sorted(key for key in facts if found.get(key) != facts[key]):
        raise ValueError(
            f"{show_path(run)} holds a pre-training with other settings ({', '.join(differ)}): "
            + remedy
        )
    try:
        rows = pd.read_csv(run / CURVE).to_dict("records")
        siamese = _siamese(settings, int(rows[-1]["image_size"]))
        siamese.load_weights(run / _CHECKPOINT)
    except Exception as error:  # pandas', h5py's or Keras', or of a curve without rows
        raise ValueError(f"{show_path(run)} is damaged ({show_error(error)}): {remedy}") from None
    # The curve is written before the checkpoint, so it may be one round ahead.
    done = int(siamese.optimizer.iterations)
    return siamese, [row for row in rows if row["steps"] <= done]


def _validation(settings: PretrainingSettings) -> np.ndarray:
    """Draw five views of each validation landmark, uint8 (n * 5, 128, 128, 3)."""
    landmarks = range(_FIRST_VALIDATION, _FIRST_VALIDATION + VALIDATION_LANDMARKS)
    return np.concatenate([draw_views(settings.seed, i, list(range(5))) for i in landmarks])


def _mean_average_precision(tower: keras.Model, validation: np.ndarray) -> float:
    labels = np.repeat(np.arange(len(validation) // 5), 5)
    embeddings = embed(tower, _resized(validation, tower.input_shape[1]))
    return float(average_precision(leave_one_out(embeddings, labels)).mean())


def _tower_settings(settings: PretrainingSettings, image_size: int) -> TowerSettings:
    return TowerSettings(
        image_size=image_size,
        embedding_size=settings.embedding_size,
        last_stage=settings.last_stage,
        weights="",
        precision=fast_policy(),
    )


def _siamese(settings: PretrainingSettings, image_size: int) -> Siamese:
    keras.utils.set_random_seed(settings.seed)
    tower = build_tower(_tower_settings(settings, image_size))
    loss = MetricLoss(InfoNCE(settings.temperature))
    siamese = Siamese(tower, loss)
    total = settings.small_steps + settings.steps
    siamese.compile(make_optimizer(settings.learning_rate, total, warmup_steps=total // 20))
    siamese.optimizer.build(siamese.trainable_variables)
    return siamese


def _continue_at(siamese: Siamese, settings: PretrainingSettings, image_size: int) -> Siamese:
    """Copy network and optimizer for another image size, on which no weight depends."""
    other = _siamese(settings, image_size)
    other.set_weights(siamese.get_weights())
    for there, here in zip(other.optimizer.variables, siamese.optimizer.variables, strict=True):
        there.assign(here)
    return other


def _resized(photos: np.ndarray, size: int) -> np.ndarray:
    return np.stack([resize(photo, size) for photo in photos])


def save_backbone(tower: keras.Model, settings: PretrainingSettings, path: Path) -> None:
    """Write a tower's ResNet50 as a Keras weights file in half precision, atomically.

    A tower of any precision loads it by ``TowerSettings(weights=path)``.

    Raises:
        ValueError: a weight is not a number, or outside the range of half precision.
    """
    weights = tower.get_layer("trunk").get_layer("backbone").get_weights()
    if not all((np.abs(w) <= np.finfo(np.float16).max).all() for w in weights):
        raise ValueError("a weight is beyond 65504, the range of half precision, or not a number")
    with computing_in("float16"):
        half = build_backbone(_tower_settings(settings, settings.size))
    half.set_weights(weights)
    with replacing(path) as part:
        half.save_weights(part, overwrite=True)


def draw_curve(curve: pd.DataFrame, path: Path) -> None:
    """Draw loss and mAP over time, and write the figure to ``path`` atomically."""
    figure = Figure(figsize=(9, 3), layout="constrained")
    axes = figure.subplots(1, 2, sharex=True)
    for axis, (column, name) in zip(
        axes, {"loss": "training loss", "map": "mAP, landmarks not trained on"}.items(), strict=True
    ):
        for size, part in curve.groupby("image_size"):
            axis.plot(part["minutes"], part[column], marker="o", markersize=4, label=f"{size} px")
        axis.set(title=name, xlabel="minutes", ylim=(0, None))
        axis.legend()
    with replacing(path) as part:
        figure.savefig(part, dpi=90)


@program()
def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tools.pretraining", description=__doc__)
    parser.add_argument("--run-dir", type=as_path, default=Path("runs/backbone"))
    for field in fields(PretrainingSettings):
        option = f"--{field.name.replace('_', '-')}"
        parser.add_argument(option, type=type(field.default), default=field.default)
    options = vars(parser.parse_args(arguments))
    run = project_root() / options.pop("run_dir")
    settings = PretrainingSettings(**options)
    path = project_root() / WEIGHTS
    tower, curve = pretrain(settings, run)
    save_backbone(tower, settings, path)
    with replacing(path.parent / CURVE) as part:
        curve.to_csv(part, index=False, float_format="%.4f")
    draw_curve(curve, path.parent / "pretraining.png")
    print(curve.round(3).to_string(index=False))
    minutes, megabytes = curve["minutes"].iloc[-1], path.stat().st_size / 1e6
    print(f"{show_path(path)}: {megabytes:.1f} MB, made in {minutes:.0f} minutes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
