"""Pre-trains the demo's ResNet50 on rendered landmarks, in place of ImageNet's photos.

    python -m lib.demo.pretraining            # or: make backbone; goes on where it was interrupted

The demo draws its world, so its landmarks never run out: every step brings new ones. They are drawn
from a world of another seed than the demo's, so that none of them is ever searched for. The result
is ``weights/demo_resnet50.weights.h5``, the trunk in half precision; the head is thrown away, like
ImageNet's classifier.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import asdict, dataclass, fields
from itertools import count, islice
from pathlib import Path

import keras
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from tqdm import tqdm

from lib.data.decoding import resize
from lib.demo.world import draw_views  # in a module of its own: light to import in each process
from lib.evaluation.metrics import average_precision, leave_one_out
from lib.files import project_root, read_json, replacing, show_path, write_json
from lib.network.losses import LossSettings, MetricLoss
from lib.network.tower import (
    Siamese,
    TowerSettings,
    build_backbone,
    build_tower,
    computing_in,
    embed,
)
from lib.training.optimizer import make_optimizer
from lib.workers import process_pool

WEIGHTS = Path("weights/demo_resnet50.weights.h5")  # seen from the project's folder
CURVE = "pretraining.csv"

_CHECKPOINT, _SETTINGS = "checkpoint.weights.h5", "pretraining.json"
VALIDATION_LANDMARKS = 100  # are measured on, with five views each
_FIRST_VALIDATION = 10_000_000  # their numbers begin here; pre-training does not come that far


@dataclass(frozen=True)
class PretrainingSettings:
    """How the backbone is pre-trained.

    Attributes:
        seed: of the world; all landmarks, views and batches follow from it. Not the demo's.
        last_stage: the stage of ResNet50 where the backbone ends, as in TowerSettings.
        small_size, small_steps: first, so many steps at this side in pixels: coarse shapes are
            learned at a fraction of the price.
        size, steps: then so many at the size the backbone is for.
        landmarks, views: a batch is of so many landmarks, with so many views of each.
        drawn_views: views that are drawn of a landmark, of which a batch takes some.
        fresh: new landmarks in each step; as many of the oldest go.
        window: landmarks that batches are chosen from.
        embedding_size, temperature: of the head and the InfoNCE loss.
        learning_rate: Adam's, at its highest.
        steps_per_round: between two measurements and checkpoints.
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


def rendered_batches(
    settings: PretrainingSettings, first_step: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """P x K batches of rendered landmarks, without end.

    A step depends on its number alone: an interrupted pre-training meets the same batches.

    Args:
        settings: see :class:`PretrainingSettings`.
        first_step: number of the step to begin with.

    Yields:
        photos, uint8 (landmarks * views, 128, 128, 3), and the number of each one's landmark,
        int32 (landmarks * views,).
    """
    with process_pool() as pool:

        def begin(landmark: int) -> Future:
            views = list(range(settings.drawn_views))
            return pool.submit(draw_views, settings.seed, landmark, views)

        # Landmarks number step * fresh and following; those of some steps to come are drawn in the
        # background while the network trains.
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
    """Pre-train, or go on with an interrupted pre-training.

    Args:
        settings: see :class:`PretrainingSettings`.
        run: folder for checkpoint and curve.

    Returns:
        the tower; and the curve, a row a round: steps so far, minutes (those of interrupted rounds
        not counted), image_size, loss, and the mAP of landmarks of the same world that are not
        trained on.

    Raises:
        ValueError: ``run`` holds a pre-training with other settings.
    """
    run.mkdir(parents=True, exist_ok=True)
    if not (run / _CHECKPOINT).is_file():
        write_json(run / _SETTINGS, asdict(settings))
    elif read_json(run / _SETTINGS) != asdict(settings):
        raise ValueError(
            f"{show_path(run)} holds a pre-training with other settings: delete it, or name "
            "another folder with --run-dir"
        )
    labels = np.repeat(np.arange(VALIDATION_LANDMARKS), 5)
    validation = np.concatenate(
        [
            draw_views(settings.seed, _FIRST_VALIDATION + i, list(range(5)))
            for i in range(VALIDATION_LANDMARKS)
        ]
    )
    total = settings.small_steps + settings.steps
    siamese = _siamese(settings, settings.small_size)
    rows: list[dict] = []
    if (run / _CHECKPOINT).is_file():
        rows = pd.read_csv(run / CURVE).to_dict("records")
        siamese = _siamese(settings, int(rows[-1]["image_size"]))
        siamese.load_weights(run / _CHECKPOINT)
        # The curve is written first: it may be a round ahead of the checkpoint.
        rows = [row for row in rows if row["steps"] <= int(siamese.optimizer.iterations)]
    done = int(siamese.optimizer.iterations)
    batches = rendered_batches(settings, done)
    with tqdm(total=total, initial=done, desc="pre-training", unit=" steps") as bar:
        while done < total:
            start, before = time.monotonic(), rows[-1]["minutes"] if rows else 0.0
            side = settings.small_size if done < settings.small_steps else settings.size
            if side != siamese.tower.input_shape[1]:
                siamese = _continue_at(siamese, settings, side)
            # A round is of one image size.
            end = settings.small_steps if done < settings.small_steps else total
            losses = []
            for photos, groups in islice(batches, min(settings.steps_per_round, end - done)):
                losses.append(float(siamese.train_on_batch(_resized(photos, side), groups)))
                bar.update(1)
            done += len(losses)
            embeddings = embed(siamese.tower, _resized(validation, side))
            row = {
                "steps": done,
                "minutes": before + (time.monotonic() - start) / 60,
                "image_size": side,
                "loss": float(np.mean(losses)),
                "map": float(average_precision(leave_one_out(embeddings, labels)).mean()),
            }
            rows.append(row)
            bar.set_postfix(loss=f"{row['loss']:.3f}", map=f"{row['map']:.3f}")
            with replacing(run / CURVE) as part:
                pd.DataFrame(rows).to_csv(part, index=False)
            with replacing(run / _CHECKPOINT) as part:
                siamese.save_weights(part, overwrite=True)
    batches.close()
    return siamese.tower, pd.DataFrame(rows)


def _tower_settings(settings: PretrainingSettings, image_size: int) -> TowerSettings:
    return TowerSettings(
        image_size=image_size,
        embedding_size=settings.embedding_size,
        last_stage=settings.last_stage,
        weights="",
        precision="mixed_bfloat16",
    )


def _siamese(settings: PretrainingSettings, image_size: int) -> Siamese:
    keras.utils.set_random_seed(settings.seed)
    tower = build_tower(_tower_settings(settings, image_size))
    loss = MetricLoss(LossSettings(loss="infonce", temperature=settings.temperature))
    siamese = Siamese(tower, loss)
    total = settings.small_steps + settings.steps
    siamese.compile(make_optimizer(settings.learning_rate, total, warmup_steps=total // 20))
    siamese.optimizer.build(siamese.trainable_variables)
    return siamese


def _continue_at(siamese: Siamese, settings: PretrainingSettings, image_size: int) -> Siamese:
    """The same network and optimizer for photos of another size; no weight depends on it."""
    other = _siamese(settings, image_size)
    other.set_weights(siamese.get_weights())
    for there, here in zip(other.optimizer.variables, siamese.optimizer.variables, strict=True):
        there.assign(here)
    return other


def _resized(photos: np.ndarray, size: int) -> np.ndarray:
    return np.stack([resize(photo, size) for photo in photos])


def save_backbone(tower: keras.Model, settings: PretrainingSettings, path: Path) -> None:
    """Write a tower's ResNet50 as a Keras weights file in half precision, atomically.

    Keras loads it into a network of any precision: ``TowerSettings(weights=path)``.
    """
    with computing_in("float16"):
        half = build_backbone(_tower_settings(settings, settings.size))
    half.set_weights(tower.get_layer("trunk").get_layer("backbone").get_weights())
    with replacing(path) as part:
        half.save_weights(part, overwrite=True)


def draw_curve(curve: pd.DataFrame, path: Path) -> None:
    """Draw loss and mAP of a pre-training over its minutes, atomically."""
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


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m lib.demo.pretraining", description=__doc__)
    parser.add_argument("--run-dir", type=Path, default=Path("runs/backbone"))
    for field in fields(PretrainingSettings):
        option = f"--{field.name.replace('_', '-')}"
        parser.add_argument(option, type=type(field.default), default=field.default)
    options = vars(parser.parse_args(arguments))
    run = project_root() / options.pop("run_dir")
    settings = PretrainingSettings(**options)
    try:
        tower, curve = pretrain(settings, run)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    path = project_root() / WEIGHTS
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
