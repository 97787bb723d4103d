"""Measures the mAP gain and the cost of each step of post-processing after training.

First the descriptors are improved step by step: more views of each photo, other exponents,
whitening. Then each re-ranking is tried on the best descriptors. Settings are chosen on validation
landmarks. Since the best of many settings looks better than it is, later steps build on a step only
if its gain on validation is significant (95 % interval above 0). Nothing is chosen on the test set.

    folds = [Fold(known, validation[None], test, query_rounds(test.labels))]
    steps = run_postprocessing(folds, options)
    summarize(steps, groups, embedding_ms(tower, sizes))    # mAP, gains, milliseconds per query

A query is never part of the gallery it searches.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any, NamedTuple

import keras
import numpy as np
import pandas as pd
from tqdm import tqdm

from lib.evaluation.metrics import average_precision, compare, interval
from lib.network.tower import embed, resized
from lib.network.whitening import Whitening, learn_pca_whitening, learn_supervised_whitening
from lib.search.descriptors import aggregate, describe_views
from lib.studies.recipes import PLAIN, Options, Recipe, Reranking, View, rerankings

# Indices of the queries, and of the gallery they search.
Round = tuple[np.ndarray, np.ndarray]

AS_TRAINED = "as trained"
CHOSEN = "chosen on validation"


@dataclass(frozen=True, eq=False)
class Photos:
    """Descriptors of labelled photos, in several views.

    Attributes:
        views: float32 (n, d) of unit norm for each view.
        labels: (n,), the landmark of each photo.
    """

    views: Mapping[View, np.ndarray]
    labels: np.ndarray

    def take(self, rows: np.ndarray) -> Photos:
        """Select the photos at ``rows``, int or bool."""
        return Photos({view: x[rows] for view, x in self.views.items()}, self.labels[rows])

    def described(self, recipe: Recipe) -> np.ndarray:
        """Aggregate the recipe's views, without whitening: float32 (n, d) of unit norm."""
        return aggregate(np.stack([self.views[view] for view in recipe.views]), recipe.scale_p)


@dataclass(frozen=True, eq=False)
class Fold:
    """A split into photos to learn and choose settings from, and test photos.

    Attributes:
        known: photos of the landmarks that are not tested.
        validation: bool (v, n), v parts of ``known``. To choose settings, the photos of each part
            are searched among all known photos, with a whitening learned from those outside the
            part. For the test, the whitening is learned from all known photos.
        test: photos to measure on.
        rounds: the searches among the test photos.

    Raises:
        ValueError: a query shows a known landmark, or a validation part has some but not all photos
            of a landmark.
    """

    known: Photos
    validation: np.ndarray
    test: Photos
    rounds: Sequence[Round]

    def __post_init__(self):
        labels = self.known.labels
        pairs = [({*labels[part]}, {*labels[~part]}) for part in self.validation]
        queried = {label for queries, _ in self.rounds for label in self.test.labels[queries]}
        for some, others in ((queried, {*labels}), *pairs):
            if both := some & others:
                raise ValueError(
                    f"landmark {str(min(both))!r} would be both learned from, or chosen by, and "
                    "measured on"
                )


@dataclass
class Step:
    """The results of one step; all but ``ap`` and ``base_ap`` have one entry per fold.

    Attributes:
        ap: average precision of all test queries, in the order of folds and rounds.
        base_ap: the same without the step.
        validation_map: mAP of the validation queries.
        settings: the changes of the recipe, or the settings of the re-ranking, that were chosen.
        kept: whether later steps build on this one.
        views: of the recipe.
        search_ms: milliseconds to rank the gallery, per query.
        prepare_ms: milliseconds to prepare the gallery, per photo.
    """

    ap: list[float] = field(default_factory=list)
    base_ap: list[float] = field(default_factory=list)
    validation_map: list[float] = field(default_factory=list)
    settings: list[dict] = field(default_factory=list)
    kept: list[bool] = field(default_factory=list)
    views: list[list[View]] = field(default_factory=list)
    search_ms: list[float] = field(default_factory=list)
    prepare_ms: list[float] = field(default_factory=list)

    def add(self, trial: _Trial, base: _Trial, kept: bool) -> None:
        """Append the results of one fold."""
        self.ap.extend(trial.found.ap.tolist())
        self.base_ap.extend(base.found.ap.tolist())
        self.validation_map.append(float(trial.validation.mean()))
        self.settings.append(trial.settings)
        self.kept.append(kept)
        self.views.append(trial.recipe.views)
        self.search_ms.append(trial.found.search_ms)
        self.prepare_ms.append(trial.found.prepare_ms)


def query_rounds(labels: np.ndarray, queried: np.ndarray | None = None) -> list[Round]:
    """Plan rounds in which each photo is a query once, and no query is in the gallery.

    The queries of round r are the r-th photos of all landmarks that have more than one; all other
    photos are the gallery.

    Args:
        labels: (n,), the landmark of each photo.
        queried: bool (n,), the photos to use as queries; None: all. The others are in the gallery
            of every round.

    Raises:
        ValueError: no queried photo has another photo of its landmark.
    """
    labels = pd.Series(np.asarray(labels))
    place = labels.groupby(labels).cumcount().to_numpy()
    size = labels.groupby(labels).transform("size").to_numpy()
    can_be_query = (size > 1) & (True if queried is None else queried)
    if not can_be_query.any():
        raise ValueError("no landmark has two photos: there is nothing to find")
    searched = [(place == r) & can_be_query for r in range(size[can_be_query].max())]
    return [(np.flatnonzero(chosen), np.flatnonzero(~chosen)) for chosen in searched]


def first_photo_rounds(labels: np.ndarray) -> list[Round]:
    """Plan one search per landmark, with its first photo among all others, as INRIA Holidays does.

    Jégou, Douze, Schmid, "Hamming Embedding and Weak Geometric Consistency for Large Scale Image
    Search", ECCV 2008. Landmarks with a single photo have no query.

    Args:
        labels: (n,), the landmark of each photo.

    Raises:
        ValueError: no landmark has two photos.
    """
    _, first, count = np.unique(labels, return_index=True, return_counts=True)
    if not (count > 1).any():
        raise ValueError("no landmark has two photos: there is nothing to find")
    everything = np.arange(len(labels))
    return [(np.array([q]), np.delete(everything, q)) for q in np.sort(first[count > 1])]


def describe_all(
    tower: keras.Model, photos_at: Callable[[int], np.ndarray], views: Sequence[View]
) -> dict[View, np.ndarray]:
    """Compute all views of photos, with a progress bar.

    Args:
        tower: from :func:`lib.network.tower.build_tower`.
        photos_at: size -> the photos, uint8 (n, size, size, 3) RGB.
        views: the views to compute; those of the same size share a pass through the network.

    Returns:
        float32 (n, d) of unit norm for each view.
    """
    sizes, _, gem_ps = (list(dict.fromkeys(column)) for column in zip(*views, strict=True))
    found = {}
    for size in tqdm(sizes, desc="embedding", unit=" sizes"):
        names = product([size], gem_ps, (False, True))
        described = describe_views(tower, photos_at(size), gem_ps)
        for (_, p, mirrored), descriptors in zip(names, described, strict=True):
            found[size, mirrored, p] = descriptors
    return {view: found[view] for view in views}


def embedding_ms(tower: keras.Model, image_sizes: Iterable[int]) -> dict[int, float]:
    """Measure the milliseconds per view of each size: in batches, the fastest of three runs.

    Args:
        tower: from :func:`lib.network.tower.build_tower`.
        image_sizes: sides in pixels.
    """
    found = {}
    for size in sorted(set(image_sizes)):
        at_size = resized(tower, size)
        photos = np.zeros((64, size, size, 3), dtype=np.uint8)
        embed(at_size, photos)  # compiles
        times = []
        for _ in range(3):
            start = time.perf_counter()
            embed(at_size, photos)
            times.append(time.perf_counter() - start)
        found[size] = 1000 * min(times) / len(photos)
    return found


def run_postprocessing(folds: Sequence[Fold], options: Options) -> dict[str, Step]:
    """Run all steps in each fold.

    Args:
        folds: the splits; their test queries are pooled.
        options: the settings to choose from.

    Returns:
        the results by name: "as trained", the steps of ``options.steps()``, the methods of
        :func:`rerankings` ("no re-ranking" is the plain search with the best descriptors), and
        "chosen on validation": the re-ranking that was best there, or none if its gain was not
        significant.
    """
    methods = rerankings(options)
    steps = {name: Step() for name in (AS_TRAINED, *options.steps(), *methods, CHOSEN)}
    with tqdm(total=len(folds) * (len(steps) - 1), unit=" steps") as bar:
        for fold in folds:
            base = None
            for name, changes in {AS_TRAINED: [{}], **options.steps()}.items():
                before = base.recipe if base else Recipe((options.image_size,))
                plain = methods[PLAIN]
                trial = _best(fold, [(replace(before, **c), plain, {}, c) for c in changes])
                kept = base is None or _is_proven(fold, trial, base)
                steps[name].add(trial, base or trial, kept)
                base = trial if kept else base
                bar.update()
            tried = {}
            for name, method in methods.items():
                tried[name] = _best(fold, [(base.recipe, method, s, s) for s in method.settings])
                steps[name].add(tried[name], base, kept=True)
                bar.update()
            best = max(tried, key=lambda name: tried[name].validation.mean())
            best = best if _is_proven(fold, tried[best], base) else PLAIN
            chosen = replace(tried[best], settings={"method": best} | tried[best].settings)
            steps[CHOSEN].add(chosen, base, kept=True)
    return steps


@dataclass(frozen=True, eq=False)
class _Trial:
    """A step with the settings that were best on validation."""

    recipe: Recipe
    settings: dict[str, Any]
    validation: np.ndarray  # average precision of the validation queries
    found: _Found  # on the test photos


def _best(fold: Fold, choices: list[tuple[Recipe, Reranking, dict, dict]]) -> _Trial:
    """Run the choice (recipe, re-ranking, its settings, settings to report) best on validation."""
    labels = fold.known.labels
    described = {recipe: _Descriptors(fold, recipe) for recipe, *_ in choices}
    validation = [
        np.concatenate(
            [
                _search(x, labels, query_rounds(labels, part), method, settings).ap
                for x, part in zip(described[recipe].known, fold.validation, strict=True)
            ]
        )
        for recipe, method, settings, _ in choices
    ]
    best = int(np.argmax([ap.mean() for ap in validation]))
    recipe, method, settings, name = choices[best]
    found = _search(described[recipe].test, fold.test.labels, fold.rounds, method, settings)
    return _Trial(recipe, name, validation[best], found)


def _is_proven(fold: Fold, trial: _Trial, base: _Trial) -> bool:
    """Check whether a trial's gain over another on validation is significant."""
    labels = fold.known.labels
    rounds = [round_ for part in fold.validation for round_ in query_rounds(labels, part)]
    groups = np.concatenate([labels[queries] for queries, _ in rounds])
    return interval(trial.validation - base.validation, groups).low > 0


class _Descriptors:
    """Descriptors of known photos for each validation part, and of test photos, see Fold."""

    def __init__(self, fold: Fold, recipe: Recipe):
        known, test = fold.known.described(recipe), fold.test.described(recipe)
        self.known, self.test = [known] * len(fold.validation), test
        if recipe.whitening:
            labels = fold.known.labels
            self.known = [
                _learn(recipe, known[~part], labels[~part]).apply(known) for part in fold.validation
            ]
            self.test = _learn(recipe, known, labels).apply(test)


def _learn(recipe: Recipe, descriptors: np.ndarray, labels: np.ndarray) -> Whitening:
    dimension = min(recipe.dimension or np.inf, descriptors.shape[1])
    if recipe.whitening == "pca":
        return learn_pca_whitening(descriptors, dimension)
    return learn_supervised_whitening(descriptors, labels=labels, dimension=dimension)


class _Found(NamedTuple):
    """The result of a search; fields as in :class:`Step`, ``ap`` as an array."""

    ap: np.ndarray
    search_ms: float
    prepare_ms: float


def _search(
    x: np.ndarray, labels: np.ndarray, rounds: Sequence[Round], method: Reranking, settings: dict
) -> _Found:
    ap, preparing, searching = [], 0.0, 0.0
    for queries, gallery in rounds:
        start = time.perf_counter()
        prepared = method.prepare(x[gallery], settings)
        middle = time.perf_counter()
        scores = method.scores(x[queries], x[gallery], prepared, settings)
        ranked = np.argsort(-scores, axis=1, kind="stable")
        searching += time.perf_counter() - middle
        preparing += middle - start
        ap.append(average_precision(labels[gallery][ranked] == labels[queries][:, None]))
    n_queries = sum(len(queries) for queries, _ in rounds)
    n_photos = sum(len(gallery) for _, gallery in rounds)
    return _Found(np.concatenate(ap), 1000 * searching / n_queries, 1000 * preparing / n_photos)


def summarize(
    steps: Mapping[str, Step], groups: np.ndarray, view_ms: Mapping[int, float]
) -> pd.DataFrame:
    """Summarize the steps in a table.

    Args:
        steps: from :func:`run_postprocessing`.
        groups: (q,), the landmark of each test query in the order of ``ap``.
        view_ms: from :func:`embedding_ms`.

    Returns:
        one row per step, with the columns

        * kind: "descriptor" or "re-ranking";
        * map, low, high: mAP of the test queries with its 95 % interval;
        * gain, gain_low, gain_high, p_value: paired by query, over the step it builds on;
        * validation_map, search_ms, prepare_ms: means over the folds, see :class:`Step`;
        * kept: number of folds in which later steps build on it;
        * embedding_ms: to embed all views of a query, mean over the folds;
        * settings: chosen in each fold.
    """
    rows, kind = [], "descriptor"
    for name, step in steps.items():
        kind = "re-ranking" if name == PLAIN else kind
        row = {"step": name, "kind": kind}
        row |= dict(zip(("map", "low", "high"), interval(step.ap, groups), strict=True))
        gain, p_value = compare(step.base_ap, step.ap, groups)
        row |= dict(zip(("gain", "gain_low", "gain_high"), gain, strict=True))
        row |= {
            "p_value": p_value,
            "validation_map": float(np.mean(step.validation_map)),
            "kept": sum(step.kept),
            "embedding_ms": float(
                np.mean([sum(view_ms[size] for size, *_ in views) for views in step.views])
            ),
            "search_ms": float(np.mean(step.search_ms)),
            "prepare_ms": float(np.mean(step.prepare_ms)),
            "settings": step.settings,
        }
        rows.append(row)
    return pd.DataFrame(rows).set_index("step")
