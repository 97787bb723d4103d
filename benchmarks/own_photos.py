"""What the search in own photos finds, step by step, with a network that is only frozen.

    python -m benchmarks.own_photos PHOTOS...

Each PHOTOS holds a folder of photos for each landmark. The network is EfficientNet-Lite0 with the
ImageNet weights of its package; nothing is trained. Each step adds to the one before; the step
SEARCH is what ``make app PHOTOS=FOLDER`` and ``python -m tools.search`` do (:mod:`lib.app.answer`).
Two more stand beside it:

* the app's query expansion, added to SEARCH;
* a cross-fitted whitening, in its place: the landmarks are dealt into five folds, and the whitening
  of a query is learned from the photos of the other four. It needs labels, and it flatters: with
  fewer photos than dimensions it shrinks whatever it has seen, and the query's landmark is among
  the fifth that it has not.

Two protocols: every photo is a query, or the first photo of each landmark is (as in INRIA
Holidays). Either searches among all other photos.

Then 200 photos are changed and searched with, as in the app with its geometric verification: how
many find the photo they were made of first? What verification adds to the steps above, see
:mod:`benchmarks.geometry`.

Prints, for each folder, a table of mAP and recall@1 in per cent and one of the changed photos, and
as its last line one JSON object. Writes both to ``benchmarks/results/own_photos_<folder>.json``. Of
the photographs nothing is kept.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import openvino
import pandas as pd
from PIL import Image
from tqdm import tqdm

from benchmarks.duplicates import WAYS, encoded
from lib.app.answer import NEIGHBOURS, SHRINKAGE, Question, Search
from lib.app.gallery import Gallery
from lib.data.photos import (
    PhotoError,
    landmark_name,
    landmark_photos,
    open_picture,
    read_photo,
    upright_rgb,
)
from lib.evaluation.metrics import average_precision, hit_at, leave_one_out
from lib.files import project_root, show_path, write_json
from lib.network.engine import (
    ENGINE,
    GEM_P,
    PACKAGED,
    VIEWS,
    Engine,
    export_engine,
    load_engine,
    packaged_settings,
)
from lib.network.tower import build_tower
from lib.network.whitening import learn_pca_whitening
from lib.programs import as_path, program
from lib.search.local_features import LONGEST, local_features, packed
from lib.search.rerank import expand_queries
from lib.studies.fixes import landmark_folds

STEPS = {  # exponent of GeM, and views
    "a squashed square of 224 pixels, GeM p = 3": (3.0, ()),
    "GeM p = 2": (GEM_P, ()),
    "own shape, longest side 224, also mirrored": (GEM_P, (224,)),
    "longest sides 160, 224 and 320": (GEM_P, VIEWS),
}
SEARCH = "whitened by the folder itself"
EXPANDED = "query expansion"
CROSS_FITTED = "cross-fitted whitening"

_BATCH = 64
_CHANGED = 200  # photos
_FOLDS = 5
_CROSS_SHRINKAGE = 0.1


def packaged(gem_p: float, views: tuple[int, ...]) -> Engine:
    """The packaged network with an exponent and views; () for a squashed square of 224 pixels."""
    settings = packaged_settings(max(views, default=224), gem_p)
    with tempfile.TemporaryDirectory() as folder:
        origin = PACKAGED if (gem_p, views) == (GEM_P, VIEWS) else ""
        export_engine(build_tower(settings), Path(folder) / ENGINE, origin, views)
        return load_engine(Path(folder) / ENGINE)


def describe(engine: Engine, paths: list[Path], name: str) -> np.ndarray:
    """Descriptors of photos, float32 (n, d)."""
    found = []
    with tqdm(total=len(paths), desc=name, unit=" photos", leave=False) as bar:
        for start in range(0, len(paths), _BATCH):
            batch = paths[start : start + _BATCH]
            photos = [read_photo(path, engine.image_size, engine.squashes) for path in batch]
            found.append(engine.embed(photos))
            bar.update(len(batch))
    return np.concatenate(found)


def search_expanded(vectors: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Hits of queries that are moved towards their neighbours."""
    hits = np.zeros((len(labels), len(labels) - 1), dtype=bool)
    for row in range(len(labels)):
        others = np.arange(len(labels)) != row
        query = expand_queries(vectors[[row]], vectors[others], NEIGHBOURS)[0]
        ranks = np.argsort(-(vectors[others] @ query), kind="stable")
        hits[row] = labels[others][ranks] == labels[row]
    return hits


def search_cross_fitted(vectors: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Hits where the whitening of a query is learned from photos of other landmarks."""
    similarities = cross_fitted_similarities(vectors, labels)
    np.fill_diagonal(similarities, -np.inf)
    order = np.argsort(-similarities, axis=1, kind="stable")[:, :-1]
    return labels[order] == labels[:, None]


def cross_fitted_similarities(vectors: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Similarities, float32 (n, n), each row whitened by photos of other landmarks."""
    found = np.empty((len(labels), len(labels)), np.float32)
    for own in landmark_folds(labels, _FOLDS, seed=0):
        whitened = learn_pca_whitening(vectors[~own], shrinkage=_CROSS_SHRINKAGE).apply(vectors)
        found[own] = whitened[own] @ whitened.T
    return found


def quality(hits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """mAP and recall@1 of both protocols, in per cent."""
    asked = hits.any(axis=1)  # a landmark of one photo has nothing to be found
    first = np.isin(np.arange(len(labels)), np.unique(labels, return_index=True)[1])
    row = {}
    for protocol, chosen in (("every photo", asked), ("first photo", asked & first)):
        row[f"mAP, {protocol}"] = 100 * float(average_precision(hits[chosen]).mean())
        row[f"recall@1, {protocol}"] = 100 * float(hit_at(hits[chosen], 1).mean())
    return row


def part(image: Image.Image, area: float, rng: np.random.Generator) -> Image.Image:
    """A part of a picture anywhere in it, of its shape and a share of its area."""
    width, height = (round(side * area**0.5) for side in image.size)
    x, y = rng.integers(image.width - width + 1), rng.integers(image.height - height + 1)
    return image.crop((x, y, x + width, y + height))


def find_changed(engine: Engine, paths: list[Path], vectors: np.ndarray) -> dict[str, dict]:
    """How many changed photos find their original first, and among the first ten, in per cent."""
    rng, names = np.random.default_rng(0), [str(number) for number in range(len(paths))]
    photos = (read_photo(path, LONGEST, squash=False) for path in tqdm(paths, "features"))
    features = {name: packed(local_features(p)) for name, p in zip(names, photos, strict=True)}
    gallery = Gallery(Path(), names, vectors, unreadable=0, features=features)
    search = Search(engine, gallery)
    ways = {
        **{way: WAYS[way] for way in ("JPEG, quality 20", "half the size", "5 % cropped")},
        "a part, 40 % of the area": lambda image: encoded(part(image, 0.4, rng)),
        "mirrored": lambda image: encoded(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)),
        "a quarter turn": lambda image: encoded(image.transpose(Image.Transpose.ROTATE_90)),
    }
    chosen = rng.permutation(len(paths))[:_CHANGED]
    rows = {}
    for way, change in ways.items():
        ranks = []
        for number in tqdm(chosen, way, unit=" photos", leave=False):
            with open_picture(paths[number]) as image:
                photo = search.read(change(upright_rgb(image)))
            found = search.answer(photo, Question(10)).names
            ranks.append(found.index(names[number]) if names[number] in found else 10)
        ranks = np.array(ranks)
        hits = {"first": ranks == 0, "in ten": ranks < 10}
        rows[way] = {place: 100 * float(hit.mean()) for place, hit in hits.items()}
    return rows


def labelled_photos(folder: Path) -> tuple[list[Path], np.ndarray]:
    """The photos of a folder that can be read, and the landmark of each; names the others."""
    paths = []
    for path in landmark_photos(folder).paths:
        try:
            read_photo(path, 32)
        except PhotoError as error:
            print("skipped:", error)
        else:
            paths.append(path)
    return paths, np.array([landmark_name(path.parent.name) for path in paths])


def measure(folder: Path) -> dict:
    """The result of a folder, with a row for each step, and one for each change."""
    paths, labels = labelled_photos(folder)
    rows = {}
    for step, recipe in STEPS.items():
        engine = packaged(*recipe)
        vectors = describe(engine, paths, step)
        rows[step] = leave_one_out(vectors, labels)
    whitened = learn_pca_whitening(vectors, shrinkage=SHRINKAGE).apply(vectors)
    rows[SEARCH] = leave_one_out(whitened, labels)
    rows[EXPANDED] = search_expanded(whitened, labels)
    rows[CROSS_FITTED] = search_cross_fitted(vectors, labels)
    return {
        "name": folder.resolve().name,
        "command": "python -m benchmarks.own_photos PHOTOS",
        "photos": len(labels),
        "landmarks": len(set(labels)),
        "tower": asdict(packaged_settings()),
        "options": {
            "steps": {step: {"gem_p": p, "views": views} for step, (p, views) in STEPS.items()},
            "shrinkage": SHRINKAGE,
            "neighbours": NEIGHBOURS,
            "folds": _FOLDS,
            "cross_fitted_shrinkage": _CROSS_SHRINKAGE,
            "changed": min(_CHANGED, len(labels)),
        },
        "versions": {
            "python": platform.python_version(),
            "keras": keras.__version__,
            "openvino": openvino.__version__,
            "numpy": np.__version__,
            "engine": engine.name,
        },
        "steps": {step: quality(hits, labels) for step, hits in rows.items()},
        "changed": find_changed(engine, paths, vectors),
    }


@program()
def main(given: list[str] | None = None) -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("photos", type=as_path, nargs="+", metavar="PHOTOS")
    found = {}
    for folder in parser.parse_args(given).photos:
        result = measure(folder)
        name = result["name"]
        print(show_path(folder))
        for rows in (result["steps"], result["changed"]):
            print(pd.DataFrame.from_dict(rows, orient="index").round(1).to_string(), end="\n\n")
        path = project_root() / "benchmarks" / "results" / f"own_photos_{name}.json"
        write_json(path, result)
        print(show_path(path), "written")
        found[name] = {s: round(row["mAP, every photo"], 1) for s, row in result["steps"].items()}
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
