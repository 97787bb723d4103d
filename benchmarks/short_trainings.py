"""What benchmarks of short trainings share: sets of photos, folds of landmarks, one start for all.

    rows = measure(catalogue, ways_of, {"with a memory": "alone"}, size=96, scratch=folder)

Heads of the packaged EfficientNet-Lite0 are trained from the feature cache, with ``--whole`` the
whole network after them. The landmarks are dealt into five folds, each with a seed of its own. A
network is trained on three, its best epoch is chosen on the fourth, and each photo of the fifth
searches among the others of that fold. In every fold all ways begin with the same weights and
batches. So each photo is a query once, and ways are compared query by query.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

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
from lib.network.tower import TowerSettings, build_head, build_tower, embed
from lib.programs import as_path
from lib.studies.fixes import landmark_folds
from lib.training.features import FeatureCache, build_cache
from lib.training.stages import Stage, TrainingSettings, train
from tools.convert import convert
from tools.labelled import read_folder

BATCH, EPOCHS, STEPS, RATE, VARIANTS, FOLDS = 32, 4, 40, 3e-3, 1, 5
NETWORK = {"backbone": "EfficientNetLite0", "weights": "packaged"}
FROZEN = "frozen"
# Fewer steps where a set has not so many batches.
HEAD = (Stage("head", EPOCHS, STEPS, RATE),)
WHOLE = (*HEAD, Stage("all", 1, STEPS, RATE / 10))
Stages = tuple[Stage, ...]


class Way(NamedTuple):
    """How a network is trained: settings, and maybe a teacher's descriptors of all pictures."""

    settings: TrainingSettings
    teacher: np.ndarray | None = None


WaysOf = Callable[[DatasetHandler], Mapping[str, Way]]  # of the landmarks that are trained on


def open_sets(folders: list[Path], scratch: Path) -> Iterator[tuple[str, Catalogue]]:
    """Each folder of photos as shards in ``scratch``, and the demo world."""
    for folder in folders:
        name = folder.resolve().name
        print(convert(read_folder(folder), scratch / name))
        yield name, open_catalogue(scratch / name)
    make_demo_data(project_root())
    yield "demo world", open_catalogue(project_root() / "Dataset" / "demo_world")


def measure(
    catalogue: Catalogue, ways_of: WaysOf, against: Mapping[str, str], size: int, scratch: Path
) -> dict[str, dict]:
    """The mAP of the frozen network and of each way, and its difference to what it is against.

    A teacher is measured as well, by its own descriptors. ``against`` names a way for each of some
    ways; the others are compared with the frozen network.
    """
    tower = build_tower(TowerSettings(size, **NETWORK))
    handler = DatasetHandler(catalogue, DataSettings(size, BATCH, seed=1))
    cache = build_cache(tower.get_layer("trunk"), handler, scratch / "features", VARIANTS)
    folds = landmark_folds(catalogue.pictures["group"].to_numpy(), FOLDS, seed=0)
    landmark = catalogue.pictures["landmark"].to_numpy()
    labels, found = [], {}
    for fold, test in enumerate(folds):
        networks = train_each(
            cache, ways_of, test, folds[(fold + 1) % FOLDS], fold, scratch / f"fold{fold}"
        )
        pictures = np.intersect1d(np.flatnonzero(test & (landmark != UNKNOWN)), cache.pictures)
        labels.append(landmark[pictures])
        for way, network, teacher in networks:
            takes_maps = network.input_shape[1:] == cache.map_shape
            seen = cache.maps(pictures, 0) if takes_maps else handler.photos(pictures)
            described = {way: embed(network, seen)}
            if teacher is not None and fold not in found.get("the teacher", {}):
                described["the teacher"] = teacher[pictures]
            for name, x in described.items():
                of_folds = found.setdefault(name, {})
                of_folds[fold] = average_precision(leave_one_out(x, labels[-1]))
    precision = {way: np.concatenate([*of.values()]) for way, of in found.items()}
    rows = {}
    for way in precision:
        other = against.get(way, FROZEN)
        pair = {other: precision[other], way: precision[way]}
        rows[way] = against_first(pair, np.concatenate(labels))[way] | {"against": other}
        rows[way]["by_seed"] = [float(np.nanmean(one)) for one in found[way].values()]
    return rows


def train_each(
    cache: FeatureCache,
    ways_of: WaysOf,
    test: np.ndarray,
    validation: np.ndarray,
    seed: int,
    scratch: Path,
) -> Iterator[tuple[str, keras.Model, np.ndarray | None]]:
    """The frozen head and what each way trains, head or tower, with its teacher; use it at once."""
    catalogue, data = cache.handler.catalogue, replace(cache.handler.settings, seed=seed)
    frozen = TowerSettings(data.image_size, embedding_size=0, gem_p_trainable=False, **NETWORK)
    yield FROZEN, build_head(cache.map_shape, frozen), None
    chosen = ~(test | validation)
    batch, steps = fit_batches(catalogue, chosen, BATCH, STEPS)
    handler = DatasetHandler(catalogue, replace(data, batch_size=batch), chosen)
    held_back = DatasetHandler(catalogue, data, validation)
    triplets = held_back.photos(held_back.validation_triplets(200))
    keras.utils.set_random_seed(seed)
    tower = build_tower(TowerSettings(data.image_size, **NETWORK))
    start = tower.get_weights()
    for number, (way, (settings, teacher)) in enumerate(ways_of(handler).items()):
        tower.set_weights(start)
        stages = tuple(
            replace(stage, steps_per_epoch=min(steps, stage.steps_per_epoch))
            for stage in settings.stages
        )
        settings = replace(settings, stages=stages)
        of_handler = replace(cache, handler=handler)
        train(tower, handler, triplets, settings, scratch / str(number), of_handler, teacher)
        yield way, tower if stages[-1].train == "all" else tower.get_layer("head"), teacher


def run(
    name: str,
    measured: Callable[[Catalogue, Path, Stages], dict[str, dict]],
    settings: dict,
    given: list[str] | None,
) -> int:
    """Measure, print and write, as a program; ``settings`` stand in the result."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}")
    parser.add_argument("photos", type=as_path, nargs="*", help="a folder of folders of photos")
    parser.add_argument("--whole", action="store_true", help="train the whole network, not heads")
    parser.add_argument("--write", action="store_true", help="keep it in benchmarks/results")
    arguments = parser.parse_args(given)
    stages = WHOLE if arguments.whole else HEAD
    sets, runs = {}, project_root() / "runs"
    runs.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{name}-", dir=runs) as folder:
        for of, catalogue in open_sets(arguments.photos, Path(folder)):
            sets[of] = measured(catalogue, Path(folder) / f"{of}-runs", stages)
            for way, row in sets[of].items():
                print_rows(of, {way: row}, row["against"])
                low, high = (100 * row["difference"][end] for end in ("low", "high"))
                print(f"    [{low:+.1f}, {high:+.1f}], p = {row['p_value']:.4f}")
    if arguments.write:
        options = ["--whole"] * arguments.whole + ["--write"]
        command = [f"python -m benchmarks.{name}", *map(str.upper, [*sets][:-1]), *options]
        settings |= {"batch": BATCH, "stages": [asdict(stage) for stage in stages]}
        result = {
            "command": " ".join(command),
            "settings": settings | {"variants": VARIANTS, "folds": FOLDS},
            "versions": {"keras": keras.__version__, "numpy": np.__version__},
            "sets": sets,
        }
        file = f"{name}_whole.json" if arguments.whole else f"{name}.json"
        write_json(project_root() / "benchmarks" / "results" / file, result)
    return 0
