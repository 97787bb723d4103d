"""What training is worth on photographs: head and last block, tested on other landmarks.

    python -m benchmarks.real_training PHOTOS ... [--seeds 2] [--write]

Each PHOTOS holds a folder of photos for each landmark. The landmarks are dealt into five folds. For
each fold the packaged EfficientNet-Lite0 is trained on the landmarks of the other four (first the
head, then the last block with it; InfoNCE; batches of 16 landmarks x 2 photos, varied as notebook
02 does), and every photo of the fold is a query among the fold's others. Beside it stand the frozen
network and the frozen network whitened by the same training photos: a training should beat both.

``--write`` keeps the result in ``benchmarks/results/real_training.json``, with nothing of the
photographs.
"""

from __future__ import annotations

import argparse
import os
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import cv2
import keras
import numpy as np
from tqdm import tqdm

from benchmarks.photo_sets import against_first, print_rows, read_sets
from lib.data.decoding import Augmentation, draw_variations
from lib.evaluation.metrics import average_precision, leave_one_out
from lib.files import project_root, write_json
from lib.network.losses import InfoNCE, MetricLoss
from lib.network.tower import Siamese, TowerSettings, build_tower, embed, frozen_trunk
from lib.network.whitening import learn_pca_whitening
from lib.programs import as_path, program
from lib.studies.fixes import landmark_folds
from lib.training.stages import Stage, TrainingSettings, compile_siamese, set_trainable

SIZE, FOLDS, LANDMARKS, EACH = 128, 5, 16, 2
STAGES = (Stage("head", 1, 150, 1e-3), Stage("last-block", 1, 150, 2e-4))
FROZEN, WHITENED, HEAD, TRAINED = "frozen", "frozen, whitened", "head trained", "last block trained"


def varied(photos: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Photos moved a little, with other contrast and brightness; uint8 as before."""
    changed = []
    variations = draw_variations(rng, len(photos), Augmentation())
    for photo, (left, top, side, gain, offset) in zip(photos, variations, strict=True):
        move = np.array([[1 / side, 0, -left * SIZE], [0, 1 / side, -top * SIZE]])
        moved = cv2.warpAffine(photo, move, (SIZE, SIZE), borderMode=cv2.BORDER_REFLECT_101)
        changed.append(np.clip(gain * moved.astype(np.float32) + offset, 0, 255))
    return np.stack(changed).astype(np.uint8)


def train_on(photos: np.ndarray, labels: np.ndarray, seed: int, bar: tqdm):
    """Train a tower; yields it after each stage."""
    keras.utils.set_random_seed(seed)
    rng = np.random.default_rng(seed)
    network = {"backbone": "EfficientNetLite0", "weights": "packaged"}
    tower = build_tower(TowerSettings(image_size=SIZE, **network))
    names, count = np.unique(labels, return_counts=True)
    rows = [np.flatnonzero(labels == name) for name in names[count >= EACH]]
    settings = TrainingSettings(STAGES, InfoNCE())
    for stage in STAGES:
        set_trainable(tower, stage.train, settings.batch_norm)
        siamese = Siamese(tower, MetricLoss(settings.loss))
        compile_siamese(siamese, settings, stage)
        for _ in range(stage.steps):
            some = rng.choice(len(rows), min(LANDMARKS, len(rows)), replace=False)
            chosen = np.concatenate([rng.choice(rows[i], EACH, replace=False) for i in some])
            siamese.train_on_batch(varied(photos[chosen], rng), np.repeat(some, EACH))
            bar.update()
        yield tower


def measure(photos: np.ndarray, labels: np.ndarray, seeds: int) -> dict[str, dict]:
    """The mAP of each way with its interval, and the difference to the frozen network."""
    steps = FOLDS * seeds * sum(stage.steps for stage in STAGES)
    found = {name: np.zeros((seeds, len(labels))) for name in (FROZEN, WHITENED, HEAD, TRAINED)}
    with tqdm(total=steps, unit=" steps", mininterval=1) as bar:
        for test in landmark_folds(labels, FOLDS, seed=0):

            def judge(name: str, vectors: np.ndarray, seed: int, test=test) -> None:
                found[name][seed, test] = average_precision(leave_one_out(vectors, labels[test]))

            for seed in range(seeds):
                stages = zip(
                    (HEAD, TRAINED), train_on(photos[~test], labels[~test], seed, bar), strict=True
                )
                for name, tower in stages:
                    if seed == 0 and name == HEAD:  # its trunk is the frozen one
                        frozen = frozen_trunk(tower)
                        vectors = embed(frozen, photos[test])
                        whitening = learn_pca_whitening(embed(frozen, photos[~test]), shrinkage=0.1)
                        for row in range(seeds):
                            judge(FROZEN, vectors, row)
                            judge(WHITENED, whitening.apply(vectors), row)
                    judge(name, embed(tower, photos[test]), seed)
    rows = against_first({name: of.mean(axis=0) for name, of in found.items()}, labels)
    for name, row in rows.items():
        row["by_seed"] = [float(np.nanmean(one)) for one in found[name]]
    return rows


@program()
def main(given: list[str] | None = None) -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.real_training", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("photos", type=as_path, nargs="+", metavar="PHOTOS")
    parser.add_argument("--seeds", type=int, default=2, help="how many")
    parser.add_argument(
        "--write", action="store_true", help="keep the result in benchmarks/results"
    )
    arguments = parser.parse_args(given)
    sets = {}
    for name, photos, labels in read_sets(arguments.photos, SIZE):
        rows = measure(photos, labels, arguments.seeds)
        sets[name] = {"photos": len(labels), "landmarks": len(set(labels)), "ways": rows}
        print_rows(name, rows, "the frozen network")
    if arguments.write:
        names = " ".join(s.upper() for s in sets)
        command = f"python -m benchmarks.real_training {names} --seeds {arguments.seeds} --write"
        versions = {"keras": keras.__version__, "numpy": np.__version__}
        result = {"command": command, "size": SIZE, "folds": FOLDS, "versions": versions}
        path = project_root() / "benchmarks" / "results" / "real_training.json"
        write_json(path, result | {"sets": sets})
    return 0


if __name__ == "__main__":
    sys.exit(main())
