"""Measures the mAP gain of each fix of the original pipeline, on equal photos and seeds.

The original pipeline ran, and its loss fell, but it had the faults listed in :data:`FIXES`. The
ladder fixes them one after another, from all faults to none. Since one fault can hide another, each
fix is also left out of the full recipe alone.

    data = LadderData(photo_maps(backbone, preprocess, photos), labels, test)
    table = run_ladder(data, LadderSettings())       # average precision by arm, seed and query
    summarize(table)                                 # mAP and gain of each fix, with intervals

Only heads are trained, on the feature maps of a frozen trunk, so one training takes seconds. All
arms decode photos in the same way, without augmentation, and each arm has its own learning rate:
the ladder measures neither the original's decoding nor its learning rate of 1e-6.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import keras
import numpy as np
import pandas as pd
from scipy.spatial.distance import cdist
from tqdm import tqdm

from lib.data.sampling import draw_triplets, shuffled_passes
from lib.evaluation.metrics import average_precision, leave_one_out
from lib.network.mining import ANCHOR, POSITIVE
from lib.network.pooling import gem
from lib.network.tower import to_float16
from lib.network.whitening import learn_supervised_whitening
from lib.studies.heads import HeadTrainer, in_parts

# In the order of the ladder: without the fix -> with it. The input comes first, since no other fix
# can help much while the trunk's maps are poor.
FIXES = {
    "input": "RGB / 255 in training, BGR / 255 in the search -> the backbone's own preprocessing",
    "loss": "compares photos 0, 1 and 2 of a batch, under an L2 penalty of 0.01 on the projection "
    "-> anchor, positive and negative of every triplet",
    "L2 norm": "softplus projection, searched by Euclidean distance -> linear one, of unit norm",
    "centring": "embeddings as they are -> less their mean over the batch, and divided by their "
    "standard deviation (batch normalization)",
    "GeM": "p = 1, which is the average -> p starts at 3 and is trained",
    "clean triplets": "triplets whose positive is the anchor itself -> left out",
    "negatives": "triplet loss, one negative for each anchor -> InfoNCE, all photos of the batch",
    "PCA start": "projection starts at random -> from the principal axes of what it projects",
    "whitening": "embeddings as they are -> whitened as learned from the training landmarks",
}

ORIGINAL, FULL = "original", f"+ {list(FIXES)[-1]}"
FROZEN, FROZEN_WHITENED = "frozen trunk", "frozen trunk, whitened"

RIGHT, AS_TRAINED, AS_SEARCHED = "right", "RGB / 255", "BGR / 255"


@dataclass(frozen=True)
class LadderData:
    """Feature maps of labelled photos, and the folds to train and test on.

    Attributes:
        maps: float16 (n, h, w, c) for each input, from :func:`photo_maps`.
        labels: (n,), the landmark of each photo.
        test: bool (f, n), the test photos of each of f folds; the other photos are for training.
            A fold tests on all photos of a landmark or on none.

    Raises:
        ValueError: the shapes do not match, a landmark is in both parts of a fold, or a fold's
            training photos have no pair or no second landmark.
    """

    maps: Mapping[str, np.ndarray]
    labels: np.ndarray
    test: np.ndarray

    def __post_init__(self):
        n = len(self.labels)
        if {len(maps) for maps in self.maps.values()} != {n} or self.test.shape[1:] != (n,):
            raise ValueError(
                f"{n} labels need maps of {n} photos and folds (f, {n}); got "
                f"{[len(maps) for maps in self.maps.values()]} and {self.test.shape}"
            )
        for fold, test in enumerate(self.test):
            if both := set(self.labels[test]) & set(self.labels[~test]):
                raise ValueError(
                    f"fold {fold} tests on landmarks that it trains on, such as {min(both)!r}: put "
                    "all photos of a landmark in one part"
                )
            _, count = np.unique(self.labels[~test], return_counts=True)
            if len(count) < 2 or count.max() < 2:
                raise ValueError(
                    f"fold {fold} trains on {count.sum()} photos of {len(count)} landmarks; there "
                    "must be two landmarks, one of them with two photos"
                )


@dataclass(frozen=True)
class LadderSettings:
    """Length and constants of the trainings.

    Attributes:
        seeds: each arm is trained once per seed (initial weights, triplets, their order).
        steps, batch_size: batches per training, and triplets per batch.
        learning_rates: peak rates of Adam to choose from, with cosine decay to 0. Each arm chooses
            on a fifth of the training landmarks, held out, and then trains on all: a rate that
            suits only some arms would bias the comparison.
        embedding_size: dimension of the embeddings in all arms.
        margin: of the triplet loss; the original's is 0.1.
        temperature: of InfoNCE.

    Raises:
        ValueError: no seed or no learning rate.
    """

    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    steps: int = 40
    batch_size: int = 32
    learning_rates: tuple[float, ...] = (1e-4, 1e-3, 3e-3)
    embedding_size: int = 128
    margin: float = 0.1
    temperature: float = 0.07

    def __post_init__(self):
        if not self.seeds or not self.learning_rates:
            raise ValueError("the ladder needs at least one seed and one learning rate")


def ladder_arms() -> dict[str, frozenset[str]]:
    """List the arms by name, with the fixes of each.

    First come the rungs: "original", then "+ <fix>" with this fix and all before it. Then come the
    arms "all but <fix>"; that of the last fix is left out, since it equals a rung.
    """
    names = list(FIXES)
    rungs = {ORIGINAL: frozenset()}
    rungs |= {f"+ {name}": frozenset(names[: i + 1]) for i, name in enumerate(names)}
    return rungs | {f"all but {name}": frozenset(FIXES) - {name} for name in names[:-1]}


def photo_maps(
    backbone: keras.Model,
    preprocess: Callable[[np.ndarray], np.ndarray],
    photos: np.ndarray,
) -> dict[str, np.ndarray]:
    """Compute feature maps with the right preprocessing and with the two of the original.

    Args:
        backbone: without preprocessing: float32 (n, s, s, 3) -> (n, h, w, c).
        preprocess: the backbone's own, for RGB pixels from 0 to 255.
        photos: uint8 (n, s, s, 3), RGB.

    Returns:
        float16 (n, h, w, c) for each of "right", "RGB / 255" and "BGR / 255".

    Raises:
        ValueError: a value is not a number, or outside the range of float16.
    """
    inputs = {
        RIGHT: preprocess,
        AS_TRAINED: lambda pixels: pixels / 255,
        AS_SEARCHED: lambda pixels: pixels[..., ::-1] / 255,
    }

    def maps(prepare: Callable, part: np.ndarray) -> np.ndarray:
        pixels = np.asarray(prepare(part.astype(np.float32)))
        return to_float16(np.asarray(backbone.predict_on_batch(pixels)))

    return {name: in_parts(partial(maps, prepare), photos, 128) for name, prepare in inputs.items()}


def landmark_folds(labels: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """Split the landmarks at random for cross-validation.

    Returns:
        bool (folds, n), the test photos of each fold; every photo is in exactly one.
    """
    landmarks, landmark = np.unique(labels, return_inverse=True)
    fold = np.random.default_rng(seed).permutation(len(landmarks)) % folds
    return fold[landmark] == np.arange(folds)[:, None]


def run_ladder(
    data: LadderData, settings: LadderSettings, arms: Mapping[str, frozenset[str]] | None = None
) -> pd.DataFrame:
    """Train every arm with every seed on every fold, and search with each test photo.

    The gallery of a query is all other test photos of its fold.

    Args:
        data, settings: of the trainings.
        arms: some of :func:`ladder_arms`; None: all.

    Returns:
        a row per arm, seed and query: columns arm, seed, fold, query (index in ``data.labels``),
        landmark, average_precision (NaN if the landmark has no other photo), learning_rate. Two
        references without a trained head are included: "frozen trunk" (GeM with p = 3 and L2 norm,
        all dimensions), and "frozen trunk, whitened" (with a whitening learned on the training
        landmarks, cut to ``embedding_size``).
    """
    arms = ladder_arms() if arms is None else arms
    # Whitening follows training, and the choice of negatives matters only with the right loss: arms
    # that differ in nothing else share a head.
    heads: dict[frozenset[str], list[str]] = {}
    for arm, fixes in arms.items():
        untouched = {"whitening"} if "loss" in fixes else {"whitening", "negatives"}
        heads.setdefault(fixes - untouched, []).append(arm)
    workshop, parts = _Workshop(data, settings), []
    total = len(data.test) * len(heads) * len(settings.seeds)
    with tqdm(total=total, desc="ladder", unit=" heads", mininterval=1) as bar:
        for fold, test in enumerate(data.test):
            frozen = _search_frozen(data, test, settings.embedding_size)
            found = [(arm, seed, frozen[arm], np.nan) for arm in frozen for seed in settings.seeds]
            for fixes, of_head in heads.items():
                rate = workshop.choose_rate(fixes, ~test)
                for seed in settings.seeds:
                    search = workshop.train(fixes, ~test, rate, seed)
                    bar.update()
                    for arm in of_head:
                        found.append((arm, seed, search(test, "whitening" in arms[arm]), rate))
            queries = {"fold": fold, "query": np.flatnonzero(test), "landmark": data.labels[test]}
            for arm, seed, ap, rate in found:
                part = {"arm": arm, "seed": seed, **queries, "average_precision": ap}
                parts.append(pd.DataFrame(part | {"learning_rate": rate}))
    return pd.concat(parts, ignore_index=True)


def _search_frozen(data: LadderData, test: np.ndarray, dimension: int) -> dict[str, np.ndarray]:
    """Compute the average precision of each test photo for the two references."""
    descriptors, labels = _unit(in_parts(partial(gem, p=3.0), data.maps[RIGHT])), data.labels
    dimension = min(dimension, descriptors.shape[1])
    whitening = learn_supervised_whitening(
        descriptors[~test], labels=labels[~test], dimension=dimension
    )
    found = {FROZEN: descriptors[test], FROZEN_WHITENED: whitening.apply(descriptors[test])}
    return {arm: average_precision(leave_one_out(x, labels[test])) for arm, x in found.items()}


class _Workshop:
    """Trains heads and searches with them; heads of the same structure are compiled once."""

    def __init__(self, data: LadderData, settings: LadderSettings):
        self.data, self.settings = data, settings
        _, self.groups = np.unique(data.labels, return_inverse=True)
        # Average pooling has no weights, so it is computed once: maps of one position.
        self.averages = {
            name: in_parts(partial(gem, p=1.0), maps)[:, None, None]
            for name, maps in data.maps.items()
        }
        self.trainers: dict[frozenset[str], HeadTrainer] = {}

    def maps(self, fixes: frozenset[str], wrong_input: str) -> np.ndarray:
        """Select the maps of all photos, float16 (n, h, w, c), or averages float32 (n, 1, 1, c)."""
        maps = self.data.maps if "GeM" in fixes else self.averages
        return maps[RIGHT if "input" in fixes else wrong_input]

    def train(
        self, fixes: frozenset[str], learned: np.ndarray, rate: float, seed: int
    ) -> Callable[[np.ndarray, bool], np.ndarray]:
        """Train a head on the photos ``learned``, bool (n,).

        Returns:
            a function (photos, bool (n,); whitened) -> average precision of each photo, searched
            among the others. It is valid until the next training.
        """
        settings, trained_on = self.settings, self.maps(fixes, AS_TRAINED)
        structure = fixes - {"input", "clean triplets", "PCA start"}
        if structure not in self.trainers:
            sizes = settings.embedding_size, settings.margin, settings.temperature
            self.trainers[structure] = HeadTrainer(trained_on.shape[1:], structure, *sizes)
        trainer, rows = self.trainers[structure], np.flatnonzero(learned)
        rng = np.random.default_rng(seed)
        triplets = rows[draw_triplets(self.groups[rows], rng)]
        if "clean triplets" in fixes:
            triplets = triplets[triplets[:, ANCHOR] != triplets[:, POSITIVE]]
        trainer.start(trained_on[rows] if "PCA start" in fixes else None, rng)
        batches = shuffled_passes(len(triplets), settings.steps * settings.batch_size, rng)
        batches = triplets[batches].reshape(settings.steps, -1, 3)
        trainer.train(trained_on, self.groups, batches, rate)

        def search(photos: np.ndarray, whitened: bool) -> np.ndarray:
            labels = self.data.labels
            descriptors = trainer.describe(self.maps(fixes, AS_SEARCHED)[photos])
            if whitened:
                whitening = learn_supervised_whitening(
                    trainer.describe(trained_on[learned]), labels=labels[learned]
                )
                # whitening.apply would also normalize, which hides a missing L2 norm.
                descriptors = (descriptors - whitening.mean) @ whitening.projection
            if "L2 norm" in fixes:
                return average_precision(leave_one_out(_unit(descriptors), labels[photos]))
            return average_precision(euclidean_leave_one_out(descriptors, labels[photos]))

        return search

    def choose_rate(self, fixes: frozenset[str], training: np.ndarray) -> float:
        """Choose the learning rate on a fifth of the training landmarks, held out."""
        settings = self.settings
        if len(settings.learning_rates) == 1:
            return settings.learning_rates[0]
        validation = training.copy()
        validation[training] = landmark_folds(self.data.labels[training], 5, seed=0)[0]

        def validation_map(rate: float) -> float:
            search = self.train(fixes, training & ~validation, rate, settings.seeds[0])
            return np.nanmean(search(validation, whitened=False))

        return max(settings.learning_rates, key=validation_map)


def euclidean_leave_one_out(embeddings: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Rank as :func:`lib.evaluation.metrics.leave_one_out`, but by Euclidean distance."""
    distance = cdist(embeddings, embeddings, "sqeuclidean")
    np.fill_diagonal(distance, np.inf)  # ranks the query last, where it is cut off
    ranked = np.argsort(distance, axis=1, kind="stable")[:, :-1]
    return labels[ranked] == labels[:, None]


def _unit(vectors: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.divide(vectors, norms, out=np.zeros_like(vectors), where=norms > 0)


def summarize(table: pd.DataFrame, resamples: int = 2000, seed: int = 0) -> pd.DataFrame:
    """Compute the mAP of each arm and its gain over the arm compared with, with 95 % intervals.

    The intervals cover the choice of queries and seeds, by the pigeonhole bootstrap (Owen, "The
    Pigeonhole Bootstrap", Annals of Applied Statistics 2007): each resample draws seeds and,
    independently, whole landmarks, with replacement, since results of a landmark's photos are
    correlated. All arms share the resamples, so gains are paired by query and seed. The intervals
    do not cover the choice of training landmarks or gallery photos.

    Args:
        table: from :func:`run_ladder`.
        resamples, seed: number of bootstrap samples, and seed of the draws.

    Returns:
        a row per arm: kind ("reference", "rung" or "without"); fix (added or left out; else "");
        map, low, high; seed_deviation, the standard deviation of the mAP over seeds; and, if the
        table has the arm compared with: against (the previous rung; for other arms the full
        recipe), gain, gain_low, gain_high.

    Raises:
        ValueError: no query has a positive.
    """
    table = table.dropna(subset="average_precision")
    if table.empty:
        raise ValueError("no query has a positive in its gallery: there is nothing to average")
    sums = table.pivot_table("average_precision", ["arm", "seed"], "landmark", aggfunc="sum")
    arms = [arm for arm in (FROZEN, FROZEN_WHITENED, *ladder_arms()) if arm in sums.index]
    total = np.stack([sums.loc[arm] for arm in arms])  # (arms, seeds, landmarks)
    size = table.set_index(["arm", "seed"]).loc[sums.index[0]].groupby("landmark").size().to_numpy()
    rng = np.random.default_rng(seed)
    n_seeds, n_landmarks = total.shape[1:]
    seed_count = rng.multinomial(n_seeds, np.full(n_seeds, 1 / n_seeds), resamples)
    count = rng.multinomial(n_landmarks, np.full(n_landmarks, 1 / n_landmarks), resamples)
    queries = count @ size * n_seeds
    drawn, by_seed = {}, {}
    for arm, of_arm in zip(arms, total, strict=True):
        drawn[arm] = ((seed_count @ of_arm) * count).sum(axis=1) / queries
        by_seed[arm] = pd.Series(of_arm.sum(axis=1) / size.sum())
    ends = [(1 - 0.95) / 2, (1 + 0.95) / 2]
    rows = []
    for arm in arms:
        low, high = np.quantile(drawn[arm], ends)
        kind, fix, against = _describe(arm)
        row = {"arm": arm, "kind": kind, "fix": fix, "map": by_seed[arm].mean()}
        row |= {"low": low, "high": high, "seed_deviation": by_seed[arm].std()}
        if against in drawn:
            low, high = np.quantile(drawn[arm] - drawn[against], ends)
            row |= {"against": against, "gain": (by_seed[arm] - by_seed[against]).mean()}
            row |= {"gain_low": low, "gain_high": high}
        rows.append(row)
    return pd.DataFrame(rows).set_index("arm")


def _describe(arm: str) -> tuple[str, str, str]:
    """Look up the kind and fix of an arm, and the arm it is compared with."""
    if arm.startswith("all but "):
        return "without", arm.removeprefix("all but "), FULL
    rungs = list(ladder_arms())[: 1 + len(FIXES)]
    if arm not in rungs:
        return "reference", "", FULL
    place = rungs.index(arm)
    return "rung", ["", *FIXES][place], ["", *rungs][place]
