"""What post-processing is worth on real photographs, with a network that is only frozen.

    python -m benchmarks.postprocessing PHOTOS

PHOTOS holds a folder of photos for each landmark. The network is the packaged EfficientNet-Lite0;
``--backbone``, ``--width`` and ``--weights``, imagenet or a file without top, name another.
Nothing is trained: a photo's descriptor is GeM (p = 3) of the last feature map.

Two protocols: every photo is a query, or the first photo of each landmark is, as in INRIA
Holidays. All other photos are its gallery. The landmarks are dealt into folds; settings are chosen,
and whitenings learned, on the landmarks of all other folds (each in turn a validation part), see
:mod:`lib.studies.postprocessing`. So no query is measured with a setting that its own landmark had
a say in.

Prints a table for each protocol and, as its last line, one JSON object. Writes
``benchmarks/results/postprocessing_<name>.json``, of the second protocol the table alone. Of the
photographs nothing is kept.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import sys
from dataclasses import asdict, replace
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from tqdm import tqdm

from benchmarks.own_photos import labelled_photos
from lib.data.photos import read_photo, read_photos
from lib.files import project_root, show_path, write_json
from lib.network.tower import TowerSettings, build_tower
from lib.programs import as_path, program
from lib.search.local_features import LONGEST, local_features
from lib.studies.fixes import landmark_folds
from lib.studies.folds import Fold, Pairs, Photos, query_rounds
from lib.studies.postprocessing import (
    AS_TRAINED,
    CHOSEN,
    Options,
    Trial,
    describe_all,
    embedding_ms,
    run_postprocessing,
    summarize,
)

OPTIONS = Options(
    image_size=224,
    image_sizes=((160, 224, 320), (224, 320), (224, 320, 448)),
    dimensions=(64, 128, 256, 512),
    verified=(20, 50, 100),
)


def every_photo_rounds(labels: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Plan a search of each photo among all others, if others show its landmark."""
    queries = np.concatenate([queries for queries, _ in query_rounds(labels)])
    return [(np.array([q]), np.delete(np.arange(len(labels)), q)) for q in queries]


def first_photos(labels: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """Which queries are the first photo of their landmark, bool (q,): those of INRIA Holidays.

    Jégou, Douze, Schmid, "Hamming Embedding and Weak Geometric Consistency for Large Scale Image
    Search", ECCV 2008.
    """
    return np.isin(queries, np.unique(labels, return_index=True)[1])


def only(steps: dict[str, list[Trial]], chosen: np.ndarray) -> dict[str, list[Trial]]:
    """The trials of some of the queries, bool (q,) in the order of folds and rounds."""
    found = {}
    for name, trials in steps.items():
        ends = np.cumsum([len(trial.ap) for trial in trials])[:-1]
        found[name] = [
            replace(trial, ap=trial.ap[own], base_ap=trial.base_ap[own])
            for trial, own in zip(trials, np.split(chosen, ends), strict=True)
        ]
    return found


def make_folds(photos: Photos, n_folds: int) -> list[Fold]:
    """Each fold's queries search all photos; the other folds are the validation parts."""
    test = landmark_folds(photos.labels, n_folds, seed=0)
    rounds = every_photo_rounds(photos.labels)
    folds = []
    for number in range(n_folds):
        known = ~test[number]
        validation = np.delete(test, number, axis=0)[:, known]
        own = [(q, gallery) for q, gallery in rounds if test[number][q[0]]]
        folds.append(Fold(photos.take(known), validation, photos, own))
    return folds


@program()
def main(given: list[str] | None = None) -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("photos", type=as_path, metavar="PHOTOS", help="a folder per landmark")
    parser.add_argument("--backbone", default="EfficientNetLite0", help="of lib.network.tower")
    parser.add_argument("--width", type=float, default=1.0, help="of a MobileNet")
    parser.add_argument("--weights", default="packaged", help="imagenet, packaged, or a file")
    parser.add_argument("--name", default="", help="of the result; by default the folder's")
    parser.add_argument("--folds", type=int, default=5)
    arguments = parser.parse_args(given)

    settings = TowerSettings(
        OPTIONS.image_size,
        embedding_size=0,
        backbone=arguments.backbone,
        width=arguments.width,
        weights=arguments.weights,
    )
    tower = build_tower(settings)
    paths, labels = labelled_photos(arguments.photos)
    views = describe_all(tower, lambda size: read_photos(paths, size)[0], OPTIONS.views)
    features = [
        local_features(read_photo(path, LONGEST, squash=False))
        for path in tqdm(paths, "local features", unit=" photos")
    ]
    photos = Photos(views, labels, Pairs(features), np.arange(len(labels)))
    folds = make_folds(photos, arguments.folds)
    steps = run_postprocessing(folds, OPTIONS)
    queries = np.concatenate([queries for fold in folds for queries, _ in fold.rounds])
    first = first_photos(labels, queries)
    view_ms = embedding_ms(tower, [size for size, *_ in OPTIONS.views])
    every = summarize(steps, labels[queries], view_ms)
    summary = summarize(only(steps, first), labels[queries][first], view_ms)

    name = arguments.name or arguments.photos.resolve().name
    others = {k: v for k, v in vars(arguments).items() if v != parser.get_default(k)}
    del others["photos"]
    if others.get("weights", "imagenet") != "imagenet":
        others["weights"] = "FILE"
    result = {
        "name": name,
        "command": " ".join(
            [
                "python -m benchmarks.postprocessing PHOTOS",
                *(f"--{k} {v}" for k, v in others.items()),
            ]
        ),
        "protocol": "the first photo of each landmark searched among all other photos; settings "
        "and whitenings from the landmarks of the other folds",
        "photos": len(labels),
        "landmarks": len(set(labels)),
        "queries": int(first.sum()),
        "tower": asdict(settings) | {"weights": Path(arguments.weights).name},
        "weights_sha256": _sha256(arguments.weights),
        "options": {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(OPTIONS).items()},
        "view_ms": view_ms,
        "versions": {
            "python": platform.python_version(),
            "keras": keras.__version__,
            "backend": keras.backend.backend(),
            "numpy": np.__version__,
        },
        "summary": summary.reset_index().to_dict("records"),
        "every_photo": {"queries": len(queries), "map": every["map"].to_dict()},
    }
    path = project_root() / "benchmarks" / "results" / f"postprocessing_{name}.json"
    write_json(path, json.loads(json.dumps(result).replace("Infinity", '"inf"')))
    for protocol, table in (("every photo a query", every), ("first photo a query", summary)):
        print(f"{protocol}:")
        print(table.drop(columns=["settings", "kind", "low", "high"]).round(3).to_string())
    print(show_path(path), "written")
    print(json.dumps({n: round(every["map"][n], 4) for n in (AS_TRAINED, CHOSEN)}))
    return 0


def _sha256(weights: str) -> str | None:
    if weights in ("imagenet", "packaged"):
        return None
    return hashlib.sha256(Path(weights).read_bytes()).hexdigest()


if __name__ == "__main__":
    sys.exit(main())
