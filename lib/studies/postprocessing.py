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

import functools
import time
import timeit
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import keras
import numpy as np
import pandas as pd
from tqdm import tqdm

from lib.evaluation.metrics import average_precision, compare, interval
from lib.network.tower import embed, resized
from lib.network.whitening import Whitening, learn_pca_whitening, learn_supervised_whitening
from lib.search.descriptors import aggregate, describe_views
from lib.search.rerank import (
    augment_gallery,
    encode_reciprocal,
    expand_queries,
    neighbour_graph,
    rerank_diffusion,
    rerank_k_reciprocal,
    rerank_superglobal,
)
from lib.studies.folds import Fold, Photos, Round, View, query_rounds

AS_TRAINED, PLAIN, CHOSEN = "as trained", "no re-ranking", "chosen on validation"


@dataclass(frozen=True)
class Recipe:
    """How a photo's descriptor is computed.

    Attributes:
        image_sizes: sides of the views in pixels.
        mirrored: whether a mirrored view of each size is added.
        gem_p: GeM's exponent; None: the tower's own.
        scale_p: exponent of the mean over the views, see :func:`lib.search.descriptors.aggregate`.
        whitening: "", "pca" or "supervised", see :mod:`lib.network.whitening`.
        dimension: dimensions that the whitening keeps, capped at their number; None: all.
    """

    image_sizes: tuple[int, ...]
    mirrored: bool = False
    gem_p: float | None = None
    scale_p: float = 1.0
    whitening: str = ""
    dimension: int | None = None

    @property
    def views(self) -> list[View]:
        """The views that the descriptor aggregates."""
        sides = (False, True) if self.mirrored else (False,)
        return [(size, side, self.gem_p) for size in self.image_sizes for side in sides]


@dataclass(frozen=True)
class Options:
    """The settings to choose from.

    Attributes:
        image_size: side in pixels at which the tower was trained.
        image_sizes: sets of sizes to embed at.
        gem_ps: exponents of GeM, besides the tower's own.
        scale_ps: exponents of the mean over views.
        dimensions: of whitened descriptors.
        neighbours: numbers of neighbours for the re-rankings, from about the photos per landmark to
            several times that.
        candidates: numbers of photos that SuperGlobal re-ranks.
        verified: numbers of photos that geometric verification re-ranks; it needs local features,
            see :class:`Photos`, and is left out without a number.
    """

    image_size: int
    image_sizes: tuple[tuple[int, ...], ...]
    gem_ps: tuple[float, ...] = (2.0, 4.6)
    scale_ps: tuple[float, ...] = (2.0, 10.0, float("inf"))
    dimensions: tuple[int, ...] = (32, 64, 128, 256)
    neighbours: tuple[int, ...] = (1, 2, 4, 8)
    candidates: tuple[int, ...] = (20, 100)
    verified: tuple[int, ...] = ()

    @property
    def views(self) -> list[View]:
        """All views that any recipe uses."""
        sizes = sorted({self.image_size, *(s for sizes in self.image_sizes for s in sizes)})
        return list(product(sizes, (False, True), (None, *self.gem_ps)))

    def steps(self) -> dict[str, list[dict[str, Any]]]:
        """List the steps that improve descriptors: name -> alternative changes of the recipe."""
        steps = {
            "mirrored": _grid(mirrored=(True,)),
            "sizes": _grid(image_sizes=self.image_sizes),
            "other p (GeM+)": _grid(gem_p=self.gem_ps),
            "scale GeM": _grid(scale_p=self.scale_ps),
            "whitening": _grid(whitening=("pca", "supervised"), dimension=self.dimensions),
        }
        return {name: changes for name, changes in steps.items() if changes}


@dataclass(frozen=True)
class Reranking:
    """A re-ranking method; the defaults give the plain search.

    Attributes:
        settings: the settings to choose from.
        prepare: (gallery (n, d), settings) -> data computed once per gallery.
        scores: (queries (q, d), gallery, prepared data, settings) -> float32 (q, n).
        verifies: whether the settings' ``top`` photos are then sorted by their inliers, those with
            ``least`` or more first, see :func:`lib.search.geometry.verify`.
    """

    settings: list[dict[str, Any]]
    prepare: Callable[[np.ndarray, dict], Any] = lambda gallery, settings: None
    scores: Callable[[np.ndarray, np.ndarray, Any, dict], np.ndarray] = (
        lambda queries, gallery, prepared, settings: queries @ gallery.T
    )
    verifies: bool = False


def rerankings(options: Options) -> dict[str, Reranking]:
    """List the re-rankings of :mod:`lib.search.rerank`, and geometric verification, by name."""
    ks = options.neighbours
    expansion = _grid(k=ks, alpha=(0.0, 3.0))
    methods = {
        PLAIN: Reranking([{}]),
        "query expansion": Reranking(
            expansion, scores=lambda q, g, _, s: expand_queries(q, g, **s) @ g.T
        ),
        "database augmentation": Reranking(
            expansion,
            prepare=lambda g, s: augment_gallery(g, **s),
            scores=lambda q, g, augmented, s: q @ augmented.T,
        ),
        "augmentation and expansion": Reranking(
            expansion,
            prepare=lambda g, s: augment_gallery(g, **s),
            scores=lambda q, g, augmented, s: expand_queries(q, augmented, **s) @ augmented.T,
        ),
        "k-reciprocal": Reranking(
            _grid(k1=[2 * k for k in ks[1:] or ks], k2=(1, 3), lam=(0.3, 0.6)),
            prepare=lambda g, s: encode_reciprocal(g, s["k1"], s["k2"]),
            scores=lambda q, g, encoding, s: rerank_k_reciprocal(q, g, encoding, s["lam"]),
        ),
        "diffusion": Reranking(
            _grid(graph_k=[2 * k for k in ks], k=ks[:3], alpha=(0.8, 0.99)),
            prepare=lambda g, s: neighbour_graph(g, s["graph_k"]),
            scores=lambda q, g, graph, s: rerank_diffusion(
                q, g, graph, s["k"], alpha=s["alpha"], tolerance=1e-4
            ),
        ),
        "SuperGlobal": Reranking(
            _grid(top=options.candidates, k=ks, beta=(0.15, 0.5)),
            scores=lambda q, g, _, s: rerank_superglobal(q, g, **s),
        ),
        "geometric verification": Reranking(
            _grid(top=options.verified, least=(6, 8, 12)), verifies=True
        ),
    }
    return {name: method for name, method in methods.items() if method.settings}


def _grid(**values: Iterable) -> list[dict[str, Any]]:
    return [dict(zip(values, chosen, strict=True)) for chosen in product(*values.values())]


@dataclass(frozen=True, eq=False)
class Trial:
    """The results of one step in one fold, with the settings that were best on validation.

    Attributes:
        recipe: of the descriptors.
        settings: the changes of the recipe, or the settings of the re-ranking, that were chosen.
        validation: average precision of the validation queries.
        ap: average precision of the test queries, in the order of the rounds.
        search_ms: milliseconds to rank the gallery, per query.
        prepare_ms: milliseconds to prepare the gallery, per photo.
        base_ap: ``ap`` without the step.
        kept: whether later steps build on this one.
    """

    recipe: Recipe
    settings: dict[str, Any]
    validation: np.ndarray
    ap: np.ndarray
    search_ms: float
    prepare_ms: float
    base_ap: np.ndarray | None = None
    kept: bool = True


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
    """Measure the milliseconds per view of each size in pixels: the fastest of three batches."""
    found = {}
    for size in sorted(set(image_sizes)):
        at_size = resized(tower, size)
        photos = np.zeros((16, size, size, 3), dtype=np.uint8)
        run = functools.partial(embed, at_size, photos)
        run()  # compiles
        seconds = min(timeit.repeat(run, repeat=3, number=1))
        found[size] = 1000 * seconds / len(photos)
    return found


def run_postprocessing(folds: Sequence[Fold], options: Options) -> dict[str, list[Trial]]:
    """Run all steps in each fold.

    Returns:
        a trial for each fold, by the step's name: "as trained", the steps of ``options.steps()``,
        the methods of :func:`rerankings` ("no re-ranking" is the plain search with the best
        descriptors), and "chosen on validation": the re-ranking that was best there, or none if its
        gain was not significant.
    """
    methods = rerankings(options)
    improvements = {AS_TRAINED: [{}], **options.steps()}
    steps = {name: [] for name in (*improvements, *methods, CHOSEN)}
    with tqdm(total=len(folds) * (len(steps) - 1), unit=" steps") as bar:
        for fold in folds:
            # Learned once for all dimensions, and for all settings of the re-rankings.
            learn = functools.cache(functools.partial(_learn, fold))
            describe = functools.cache(functools.partial(_describe, fold, learn))
            recipe, base = Recipe((options.image_size,)), None
            for name, changes in improvements.items():
                choices = [(replace(recipe, **change), change) for change in changes]
                trial = _best(fold, describe, methods[PLAIN], choices)
                kept = base is None or _is_proven(fold, trial, base)
                steps[name].append(replace(trial, base_ap=(base or trial).ap, kept=kept))
                if kept:
                    recipe, base = trial.recipe, trial
                bar.update()
            tried = {}
            for name, method in methods.items():
                choices = [(recipe, settings) for settings in method.settings]
                trial = _best(fold, describe, method, choices)
                tried[name] = replace(trial, base_ap=base.ap)
                steps[name].append(tried[name])
                bar.update()
            best = max(tried, key=lambda name: tried[name].validation.mean())
            best = best if _is_proven(fold, tried[best], base) else PLAIN
            settings = {"method": best} | tried[best].settings
            steps[CHOSEN].append(replace(tried[best], settings=settings))
    return steps


def _best(
    fold: Fold,
    describe: Callable[[Recipe], tuple[list[np.ndarray], np.ndarray]],
    method: Reranking,
    choices: list[tuple[Recipe, dict[str, Any]]],
) -> Trial:
    """Run the choice of recipe and settings that is best on validation; see :func:`_describe`."""
    labels = fold.known.labels
    validation = [
        np.concatenate(
            [
                _search(x, fold.known, query_rounds(labels, part), method, settings)[0]
                for x, part in zip(describe(recipe)[0], fold.validation, strict=True)
            ]
        )
        for recipe, settings in choices
    ]
    best = int(np.argmax([ap.mean() for ap in validation]))
    recipe, settings = choices[best]
    found = _search(describe(recipe)[1], fold.test, fold.rounds, method, settings)
    return Trial(recipe, settings, validation[best], *found)


def _is_proven(fold: Fold, trial: Trial, base: Trial) -> bool:
    """Check whether a trial's gain over another on validation is significant."""
    labels = fold.known.labels
    rounds = [round_ for part in fold.validation for round_ in query_rounds(labels, part)]
    groups = np.concatenate([labels[queries] for queries, _ in rounds])
    return interval(trial.validation - base.validation, groups).low > 0


def _describe(
    fold: Fold, learn: Callable[[Recipe], list[Whitening]], recipe: Recipe
) -> tuple[list[np.ndarray], np.ndarray]:
    """Describe the known photos for each validation part, and the test photos, see Fold."""
    known, test = (_aggregated(photos, recipe) for photos in (fold.known, fold.test))
    if not recipe.whitening:
        return [known] * len(fold.validation), test
    *parts, whole = learn(replace(recipe, dimension=None))
    dimension = min(recipe.dimension or np.inf, known.shape[1])
    kept = [part.keep(dimension).apply(known) for part in parts]
    return kept, whole.keep(dimension).apply(test)


def _learn(fold: Fold, recipe: Recipe) -> list[Whitening]:
    """Learn a recipe's whitening for each validation part, from what is outside, and for the test.

    In all dimensions: those of a whitening in fewer are the first of these.
    """
    known, labels = _aggregated(fold.known, recipe), fold.known.labels
    found = []
    for rows in (*~fold.validation, np.ones(len(labels), bool)):
        if recipe.whitening == "pca":
            found.append(learn_pca_whitening(known[rows]))
        else:
            found.append(learn_supervised_whitening(known[rows], labels=labels[rows]))
    return found


def _aggregated(photos: Photos, recipe: Recipe) -> np.ndarray:
    return aggregate(np.stack([photos.views[view] for view in recipe.views]), recipe.scale_p)


def _search(
    x: np.ndarray, photos: Photos, rounds: Sequence[Round], method: Reranking, settings: dict
) -> tuple[np.ndarray, float, float]:
    """Search in all rounds; return ``ap``, ``search_ms`` and ``prepare_ms`` of a trial."""
    labels = photos.labels
    ap, preparing, searching = [], 0.0, 0.0
    for queries, gallery in rounds:
        start = time.perf_counter()
        prepared = method.prepare(x[gallery], settings)
        middle = time.perf_counter()
        scores = method.scores(x[queries], x[gallery], prepared, settings)
        ranked = np.argsort(-scores, axis=1, kind="stable")
        searching += time.perf_counter() - middle
        if method.verifies:
            ranked = np.stack(
                [
                    _verified(photos, query, gallery, row, **settings)
                    for query, row in zip(queries, ranked, strict=True)
                ]
            )
        preparing += middle - start
        ap.append(average_precision(labels[gallery][ranked] == labels[queries][:, None]))
    n_queries, n_photos = (sum(map(len, rows)) for rows in zip(*rounds, strict=True))
    search_ms = 1000 * searching / n_queries
    if method.verifies:  # as if no pair were known, but the query's local features
        verified = sum(len(q) * min(settings["top"], len(g)) for q, g in rounds) / n_queries
        search_ms += verified * photos.pairs.pair_ms
    return np.concatenate(ap), search_ms, 1000 * preparing / n_photos


def _verified(
    photos: Photos, query: int, gallery: np.ndarray, ranked: np.ndarray, top: int, least: int
) -> np.ndarray:
    """A ranking of the gallery whose first photos are sorted by their inliers, if enough."""
    near = photos.places[gallery[ranked[:top]]]
    found = photos.pairs.verify(int(photos.places[query]), near.tolist())
    inliers = np.array([geometry.inliers for geometry in found])
    better = np.argsort(np.where(inliers >= least, -inliers, 0), kind="stable")
    return np.concatenate([ranked[:top][better], ranked[top:]])


def summarize(
    steps: Mapping[str, Sequence[Trial]], groups: np.ndarray, view_ms: Mapping[int, float]
) -> pd.DataFrame:
    """Summarize the steps in a table.

    Args:
        steps: from :func:`run_postprocessing`.
        groups: (q,), the landmark of each test query, in the order of folds and rounds.
        view_ms: from :func:`embedding_ms`.

    Returns:
        one row per step, with the columns

        * kind: "descriptor" or "re-ranking";
        * map, low, high: mAP of the test queries with its 95 % interval;
        * gain, gain_low, gain_high, p_value: paired by query, over the step it builds on;
        * validation_map, search_ms, prepare_ms: means over the folds, see :class:`Trial`;
        * kept: number of folds in which later steps build on it;
        * embedding_ms: to embed all views of a query, mean over the folds;
        * settings: chosen in each fold.
    """
    rows, kind = [], "descriptor"
    for name, trials in steps.items():
        kind = "re-ranking" if name == PLAIN else kind
        ap = np.concatenate([trial.ap for trial in trials])
        gain, p_value = compare(np.concatenate([t.base_ap for t in trials]), ap, groups)
        row = {"step": name, "kind": kind}
        row |= dict(zip(("map", "low", "high"), interval(ap, groups), strict=True))
        row |= dict(zip(("gain", "gain_low", "gain_high"), gain, strict=True))
        row |= {
            "p_value": p_value,
            "validation_map": np.mean([t.validation.mean() for t in trials]),
            "kept": sum(t.kept for t in trials),
            "embedding_ms": np.mean([sum(view_ms[v[0]] for v in t.recipe.views) for t in trials]),
            "search_ms": np.mean([t.search_ms for t in trials]),
            "prepare_ms": np.mean([t.prepare_ms for t in trials]),
            "settings": [t.settings for t in trials],
        }
        rows.append(row)
    return pd.DataFrame(rows).set_index("step")
