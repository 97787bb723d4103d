"""Are negatives from a pool, or from former batches, worth more than those of the batch?

    python -m benchmarks.hard_negatives [PHOTOS ...] [--write]

Trains the head of the packaged EfficientNet-Lite0 (frozen, 96 pixels, from the feature cache) on
the demo world and on each PHOTOS, a folder of photos for each landmark. Each way is InfoNCE, or the
triplet loss with semi-hard mining, over the batch alone (as notebook 02 does), with stored
negatives mined from a pool, or with a memory of former batches; besides, the triplet loss over
mined triplets alone (:class:`lib.training.stages.TrainingSettings`).

The landmarks are dealt into five folds, each with a seed of its own. A head is trained on three,
its best epoch is chosen on the fourth, and each photo of the fifth searches among the others of
that fold. In every fold all ways begin with the same weights and batches. So each photo is a query
once, and ways are compared query by query. ``--write`` keeps the result in
``benchmarks/results/hard_negatives.json``, with nothing of the photographs.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np

from benchmarks.photo_sets import against_first, print_rows
from lib.data.catalogue import UNKNOWN, Catalogue, open_catalogue
from lib.data.dataset import DatasetHandler, DataSettings
from lib.data.plan import fit_batches
from lib.demo.data import make_demo_data
from lib.evaluation.metrics import average_precision, leave_one_out
from lib.files import project_root, write_json
from lib.network.losses import InfoNCE, TripletLoss
from lib.network.mining import Stored
from lib.network.tower import TowerSettings, build_head, build_tower, embed
from lib.programs import as_path, program
from lib.studies.fixes import landmark_folds
from lib.training.features import FeatureCache, build_cache
from lib.training.stages import Stage, TrainingSettings, train
from tools.convert import convert
from tools.labelled import read_folder

SIZE, BATCH, EPOCHS, STEPS, RATE, VARIANTS, FOLDS = 96, 32, 4, 40, 3e-3, 1, 5
POOL = MEMORY = 1000
NETWORK = {"backbone": "EfficientNetLite0", "weights": "packaged"}
FROZEN = "frozen"
_ANY = (Stage("head", 1, 1, RATE),)  # fitted to each set
_BATCH_ALONE = {"InfoNCE": InfoNCE(), "triplet": TripletLoss()}
_HARDER = {"": {}, " + pool": {"pool": POOL}, " + memory": {"memory": MEMORY}}
WAYS = {
    f"{name}{more}": TrainingSettings(_ANY, loss, patience=EPOCHS, **settings)
    for name, loss in _BATCH_ALONE.items()
    for more, settings in _HARDER.items()
}
WAYS["triplet, pool alone"] = replace(WAYS["triplet + pool"], loss=TripletLoss(mining=Stored()))


def open_sets(folders: list[Path], scratch: Path) -> Iterator[tuple[str, Catalogue]]:
    """The demo world, and each folder of photos as shards in ``scratch``."""
    make_demo_data(project_root())
    yield "demo world", open_catalogue(project_root() / "Dataset" / "demo_world")
    for folder in folders:
        name = folder.resolve().name
        print(convert(read_folder(folder), scratch / name))
        yield name, open_catalogue(scratch / name)


def measure(catalogue: Catalogue, scratch: Path) -> dict[str, dict]:
    """The mAP of each way; each against its loss over the batch alone, that against the frozen."""
    data = DataSettings(SIZE, BATCH, seed=1)
    tower = build_tower(TowerSettings(SIZE, **NETWORK))
    cache = build_cache(
        tower.get_layer("trunk"), DatasetHandler(catalogue, data), scratch / "features", VARIANTS
    )
    folds = landmark_folds(catalogue.pictures["group"].to_numpy(), FOLDS, seed=0)
    labels, found = [], {way: [] for way in (FROZEN, *WAYS)}
    for fold, test in enumerate(folds):
        towers = train_each(cache, test, folds[(fold + 1) % FOLDS], fold, scratch / f"fold{fold}")
        known = catalogue.pictures["landmark"].to_numpy() != UNKNOWN
        pictures = np.intersect1d(np.flatnonzero(test & known), cache.pictures)
        maps = cache.maps(pictures, 0)
        labels.append(catalogue.pictures["landmark"].to_numpy()[pictures])
        for way, head in towers:
            found[way].append(average_precision(leave_one_out(embed(head, maps), labels[-1])))
    precision = {way: np.concatenate(of) for way, of in found.items()}
    of_all = np.concatenate(labels)
    rows = against_first({way: precision[way] for way in (FROZEN, *_BATCH_ALONE)}, of_all)
    for name in _BATCH_ALONE:
        others = {way: of for way, of in precision.items() if way.startswith(name)}
        for way, row in list(against_first(others, of_all).items())[1:]:
            rows[way] = row | {"against": name}
    for way, row in rows.items():
        row["by_seed"] = [float(np.nanmean(one)) for one in found[way]]
    return rows


def train_each(
    cache: FeatureCache, test: np.ndarray, validation: np.ndarray, seed: int, scratch: Path
) -> Iterator[tuple[str, keras.Model]]:
    """The frozen network's head, and the head that each way trains."""
    frozen = TowerSettings(SIZE, embedding_size=0, gem_p_trainable=False, **NETWORK)
    yield FROZEN, build_head(cache.map_shape, frozen)
    catalogue, data = cache.handler.catalogue, replace(cache.handler.settings, seed=seed)
    chosen = ~(test | validation)
    batch, steps = fit_batches(catalogue, chosen, BATCH, STEPS)
    handler = DatasetHandler(catalogue, replace(data, batch_size=batch), chosen)
    held_back = DatasetHandler(catalogue, data, validation)
    triplets = held_back.photos(held_back.validation_triplets(200))
    keras.utils.set_random_seed(seed)
    tower = build_tower(TowerSettings(SIZE, **NETWORK))
    start = tower.get_weights()
    for number, (way, settings) in enumerate(WAYS.items()):
        tower.set_weights(start)
        settings = replace(settings, stages=(Stage("head", EPOCHS, steps, RATE),))
        of_handler = replace(cache, handler=handler)
        train(tower, handler, triplets, settings, scratch / str(number), of_handler)
        yield way, tower.get_layer("head")


@program()
def main(given: list[str] | None = None) -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.hard_negatives", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("photos", type=as_path, nargs="*", metavar="PHOTOS")
    parser.add_argument(
        "--write", action="store_true", help="keep the result in benchmarks/results"
    )
    arguments = parser.parse_args(given)
    sets, runs = {}, project_root() / "runs"
    runs.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="negatives-", dir=runs) as folder:
        for name, catalogue in open_sets(arguments.photos, Path(folder)):
            sets[name] = measure(catalogue, Path(folder) / f"{name}-runs")
            for way, row in sets[name].items():
                print_rows(name, {way: row}, row.get("against", FROZEN))
                low, high = (100 * row["difference"][end] for end in ("low", "high"))
                print(f"    [{low:+.1f}, {high:+.1f}], p = {row['p_value']:.4f}")
    if arguments.write:
        names = " ".join(name.upper() for name in list(sets)[1:])
        settings = {"size": SIZE, "batch": BATCH, "epochs": EPOCHS, "steps": STEPS, "rate": RATE}
        settings |= {"variants": VARIANTS, "folds": FOLDS, "pool": POOL, "memory": MEMORY}
        result = {
            "command": f"python -m benchmarks.hard_negatives {names} --write",
            "settings": settings,
            "versions": {"keras": keras.__version__, "numpy": np.__version__},
            "sets": sets,
        }
        write_json(project_root() / "benchmarks" / "results" / "hard_negatives.json", result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
