"""The ladder: what each fix against a faulty pipeline is worth, on the same pictures and seeds.

This project began as a repair. The original pipeline (its faults are :data:`FIXES`) ran, and its
loss fell. Here its faults are taken away one after another, the first rung having them all and the
last none; and from the whole recipe each fix is left out once, for a fault may hide behind others.

    data = LadderData(photo_maps(backbone, preprocess, photos), labels, test)
    table = run_ladder(data, LadderSettings())       # average precision by arm, seed and query
    summarize(table)                                 # mAP and what each fix adds, with intervals

Only heads are trained, on the maps of a frozen trunk, so that a training takes seconds. Photos are
read alike for every arm, nothing is augmented, and each arm has a learning rate that suits it: what
the original lost by reading and varying photos, and by its rate of 1e-6, is not in here.

The faulty parts below (``Original...``, ``_faulty_head``) are exhibits: nothing else uses them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import keras
import numpy as np
import pandas as pd
from keras import ops
from scipy.linalg import eigh
from tqdm import tqdm

from lib.data.sampling import shuffled_passes
from lib.evaluation.metrics import average_precision, leave_one_out
from lib.network.losses import InfoNCE, MetricLoss, TripletLoss, margin_loss
from lib.network.mining import ANCHOR, NEGATIVE, POSITIVE, Stored
from lib.network.pooling import gem, make_pooling
from lib.network.tower import Siamese, TowerSettings, build_head
from lib.network.whitening import learn_supervised_whitening

# In the order in which the ladder mends them; what is done without a fix, and what with it. The
# input comes first: as long as the trunk gives next to nothing, no other fix can show its worth.
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
    """Photos of known landmarks, as a frozen trunk sees them.

    Attributes:
        maps: float16 (n, h, w, c), the feature maps of all photos under each input, from
            :func:`photo_maps`.
        labels: (n,), the landmark of each photo.
        test: bool (f, n), for each of f folds the photos to measure on; the others are for
            training. All photos of a landmark, or none.

    Raises:
        ValueError: the arrays do not fit each other, a landmark is in both parts of a fold, or a
            fold has nothing to learn from.
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
    """How the ladder is climbed.

    Attributes:
        seeds: each arm is trained once with each of these (first weights, triplets, order).
        steps, batch_size: length of a training, in batches of so many triplets.
        learning_rates: Adam's, falling to 0 along a cosine. Of several, each arm takes the one that
            does best on a fifth of the training landmarks, trained on the other four, so that no
            fault is blamed for a rate that suits another arm. Then it trains on all of them.
        embedding_size: dimension of the embeddings, of all arms.
        margin: of the triplet loss; 0.1 is the original's.
        temperature: of InfoNCE.
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


# --------------------------------------------------------------------------------------------------
# The arms
# --------------------------------------------------------------------------------------------------


def ladder_arms() -> dict[str, frozenset[str]]:
    """The arms by name, with the fixes that each has.

    First the rungs: "original", then "+ <fix>", each with all the fixes before it. Then
    "all but <fix>": the whole recipe less one fix. ("All but" the last one is a rung already.)
    """
    names = list(FIXES)
    rungs = {ORIGINAL: frozenset()}
    rungs |= {f"+ {name}": frozenset(names[: i + 1]) for i, name in enumerate(names)}
    return rungs | {f"all but {name}": frozenset(FIXES) - {name} for name in names[:-1]}


def photo_maps(
    backbone: keras.Model,
    preprocess: Callable[[np.ndarray], np.ndarray],
    photos: np.ndarray,
    batch_size: int = 128,
) -> dict[str, np.ndarray]:
    """The feature maps of photos, as they should be made, and in the two ways of the original.

    Args:
        backbone: without preprocessing: float32 (n, s, s, 3) -> (n, h, w, c).
        preprocess: what the backbone's weights expect, of RGB pixels from 0 to 255.
        photos: uint8 (n, s, s, 3), RGB.
        batch_size: photos that pass through the network at once.

    Returns:
        float16 (n, h, w, c) each of "right", "RGB / 255" and "BGR / 255".
    """
    inputs = {
        RIGHT: preprocess,
        AS_TRAINED: lambda pixels: pixels / 255,
        AS_SEARCHED: lambda pixels: pixels[..., ::-1] / 255,
    }
    maps = {}
    for name, prepare in inputs.items():
        batches = []
        for start in range(0, len(photos), batch_size):
            pixels = photos[start : start + batch_size].astype(np.float32)
            batch = backbone.predict_on_batch(np.asarray(prepare(pixels)))
            batches.append(np.asarray(batch, dtype=np.float16))
        maps[name] = np.concatenate(batches)
    return maps


def landmark_folds(labels: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """Deal the landmarks into folds, for cross-validation: each is tested on once.

    Args:
        labels: (n,), the landmark of each photo.
        folds: how many.
        seed: of the dealing.

    Returns:
        bool (folds, n), the photos that each fold is tested on.
    """
    landmarks, landmark = np.unique(labels, return_inverse=True)
    fold = np.random.default_rng(seed).permutation(len(landmarks)) % folds
    return fold[landmark] == np.arange(folds)[:, None]


def draw_triplets(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Choose triplets the way the Kaggle set was made.

    The first two photos of each landmark are anchors. The positive is drawn from all photos of the
    landmark, the anchor included; the negative from the anchors of all other landmarks.

    Args:
        labels: (n,), the landmark of each photo, at least two different ones.
        rng: of the draw.

    Returns:
        int64 (t, 3), rows of ``labels``: anchor, positive and negative of each.
    """
    names, landmark = np.unique(labels, return_inverse=True)
    photos = [np.flatnonzero(landmark == i) for i in range(len(names))]
    anchors = np.concatenate([of_landmark[:2] for of_landmark in photos])
    triplets = []
    for anchor in anchors:
        positive = rng.choice(photos[landmark[anchor]])
        negative = rng.choice(anchors[landmark[anchors] != landmark[anchor]])
        triplets.append((anchor, positive, negative))
    return np.array(triplets)


def start_at_random(head: keras.Model, rng: np.random.Generator) -> None:
    """Start a head's projection from Keras' usual distribution (Glorot and Bengio, 2010)."""
    kernel = head.get_layer("projection").kernel
    bound = math.sqrt(6 / sum(kernel.shape))
    kernel.assign(rng.uniform(-bound, bound, kernel.shape))


def start_from_pca(head: keras.Model, maps: np.ndarray, rng: np.random.Generator) -> None:
    """Start a head's projection from the principal axes of the pooled maps, not at random.

    A random projection to fewer dimensions throws away what the trunk knows as readily as noise,
    and few landmarks can't teach it anew; a PCA loses next to nothing. (One of the starts in
    Krähenbühl et al., "Data-dependent Initializations of Convolutional Neural Networks", ICLR
    2016.) The axes are then rotated at random, which deals the variance out evenly: the centring,
    which divides each dimension by its standard deviation, would blow up the small ones.

    Args:
        head: with layers "pooling" and "projection", as from :func:`lib.network.tower.build_head`.
        maps: float (n, h, w, c), feature maps of training photos.
        rng: of the rotation.
    """
    pooling = keras.Model(head.input, head.get_layer("pooling").output)
    x = _in_parts(pooling, maps).astype(np.float64)
    kernel = head.get_layer("projection").kernel
    c, d = kernel.shape
    k = min(c, d)
    _, axes = eigh(np.cov(x, rowvar=False), subset_by_index=[c - k, c - 1])  # the k largest
    rotation, _ = np.linalg.qr(rng.normal(size=(d, k)))
    start = axes @ rotation.T
    # As large as a random start, for which the learning rates are made.
    kernel.assign(start * math.sqrt(2 / (c + d)) / start.std())


# --------------------------------------------------------------------------------------------------
# Exhibits: the faulty parts
# --------------------------------------------------------------------------------------------------


class OriginalLoss(keras.layers.Layer):
    """The original's loss, as it came to be computed.

    It was written for [anchors, positives, negatives], but Keras calls a loss once for each output
    of a model. So ``y_pred[0]``, ``y_pred[1]`` and ``y_pred[2]`` are the first three *photos* of
    the anchors, then of the positives, then of the negatives. Nine photos of a batch count, none of
    them against a photo that it belongs with. The L2 penalty on the projection's weights, 0.01 by
    Keras' default, is meant to be on the side, but is far the greater part.

    Args:
        margin: of the triplet loss.
        projection: the layer whose weights are penalized.

    Call arguments as for :class:`lib.network.losses.MetricLoss`, stored triplets only.
    """

    def __init__(self, margin: float, projection: keras.layers.Layer):
        super().__init__()
        self.margin, self.projection = margin, projection

    def build(self, groups_shape, embeddings_shape):
        pass  # no weights of its own

    def call(self, groups, embeddings):
        first = embeddings[:3]  # three photos (axis 0) of each of the three outputs (axis 1)
        positive = ops.sum(ops.square(first[0] - first[1]), axis=-1)
        negative = ops.sum(ops.square(first[0] - first[2]), axis=-1)
        penalty = 0.01 * ops.sum(ops.square(self.projection.kernel))
        return ops.sum(margin_loss(positive, negative, self.margin)) + penalty


class OriginalTripletLoss(keras.layers.Layer):
    """The loss that the original meant, on embeddings of any length: squared Euclidean distances.

    Args:
        margin: of the triplet loss. How much it is depends on how long the embeddings are.

    Call arguments as for :class:`lib.network.losses.MetricLoss`, stored triplets only.
    """

    def __init__(self, margin: float):
        super().__init__()
        self.margin = margin

    def build(self, groups_shape, embeddings_shape):
        pass  # no weights

    def call(self, groups, embeddings):
        anchor, positive, negative = (embeddings[:, r] for r in (ANCHOR, POSITIVE, NEGATIVE))
        to_positive = ops.sum(ops.square(anchor - positive), axis=-1)
        to_negative = ops.sum(ops.square(anchor - negative), axis=-1)
        return ops.mean(margin_loss(to_positive, to_negative, self.margin))


def _faulty_head(
    map_shape: tuple[int, int, int], pooling: str, fixes: frozenset[str], size: int
) -> keras.Model:
    """A head that lacks the L2 norm (and has a softplus in its place), or the centring, or both."""
    maps = keras.Input(map_shape)
    x = make_pooling(pooling)(maps)
    if "L2 norm" in fixes:
        x = keras.layers.Dense(size, use_bias=False, name="projection")(x)
    else:
        x = keras.layers.Dense(size, activation="softplus", name="projection")(x)
    if "centring" in fixes:
        x = keras.layers.BatchNormalization(momentum=0.9, center=False, scale=False)(x)
    if "L2 norm" in fixes:
        x = keras.layers.UnitNormalization(name="l2_normalization")(x)
    return keras.Model(maps, x, name="head")


def euclidean_leave_one_out(embeddings: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """As :func:`lib.evaluation.metrics.leave_one_out`, by Euclidean distance of embeddings of any
    length.

    Returns:
        hits, bool (n, n - 1).
    """
    x = np.asarray(embeddings, dtype=np.float64)
    squared = (x * x).sum(axis=1)
    distance = squared[:, None] + squared[None, :] - 2 * x @ x.T
    np.fill_diagonal(distance, np.inf)  # the query itself comes last, and is cut off
    ranked = np.argsort(distance, axis=1, kind="stable")[:, :-1]
    return labels[ranked] == labels[:, None]


# --------------------------------------------------------------------------------------------------
# Training and measuring
# --------------------------------------------------------------------------------------------------


def run_ladder(
    data: LadderData,
    settings: LadderSettings,
    arms: Mapping[str, frozenset[str]] | None = None,
) -> pd.DataFrame:
    """Train every arm with every seed on every fold, and search each test photo among the others.

    The gallery of a query is all other test photos of its fold.

    Args:
        data: see :class:`LadderData`.
        settings: see :class:`LadderSettings`.
        arms: some of :func:`ladder_arms`; None: all.

    Returns:
        a row for each arm, seed and query (a row of ``data.labels``): columns arm, seed, fold,
        query, landmark, average_precision (NaN without another photo of the landmark),
        learning_rate. Besides the arms there are two references without any training of a head:
        "frozen trunk", GeM of p = 3 and L2 norm, all its dimensions; and "frozen trunk, whitened",
        the same whitened as learned from the training landmarks, cut to ``embedding_size``.
    """
    arms = ladder_arms() if arms is None else arms
    # Whitening comes after training, and without the right loss there are no negatives to choose:
    # such arms share a head.
    heads: dict[frozenset[str], list[str]] = {}
    for arm, fixes in arms.items():
        untouched = {"whitening"} if "loss" in fixes else {"whitening", "negatives"}
        heads.setdefault(fixes - untouched, []).append(arm)
    workshop = _Workshop(data, settings)
    choices = len(settings.learning_rates) if len(settings.learning_rates) > 1 else 0
    total = len(data.test) * len(heads) * (choices + len(settings.seeds))
    rows = []
    with tqdm(total=total, desc="ladder", unit=" heads", mininterval=1) as bar:
        for fold, test in enumerate(data.test):
            queries = {"fold": fold, "query": np.flatnonzero(test), "landmark": data.labels[test]}
            for arm, precision in _search_frozen(data, test, settings.embedding_size).items():
                for seed in settings.seeds:
                    rows.append({"arm": arm, "seed": seed, "average_precision": precision})
                    rows[-1] |= queries
            for fixes, of_head in heads.items():
                rate = workshop.choose_rate(fixes, fold, bar)
                for seed in settings.seeds:
                    head = workshop.train(fixes, ~test, rate, seed)
                    bar.update(1)
                    for arm in of_head:
                        precision = head.search(test, whitened="whitening" in arms[arm])
                        rows.append({"arm": arm, "seed": seed, "average_precision": precision})
                        rows[-1] |= queries | {"learning_rate": rate}
    table = pd.concat([pd.DataFrame(row) for row in rows], ignore_index=True)
    columns = ["arm", "seed", "fold", "query", "landmark", "average_precision", "learning_rate"]
    return table[columns]


def _search_frozen(data: LadderData, test: np.ndarray, dimension: int) -> dict[str, np.ndarray]:
    """Average precision of each test photo by the references."""
    descriptors = _unit(_gem(data.maps[RIGHT], 3.0))
    whitening = learn_supervised_whitening(
        descriptors[~test],
        labels=data.labels[~test],
        dimension=min(dimension, descriptors.shape[1]),
    )
    found = {FROZEN: descriptors[test], FROZEN_WHITENED: whitening.apply(descriptors[test])}
    labels = data.labels[test]
    return {arm: average_precision(leave_one_out(x, labels)) for arm, x in found.items()}


class _Workshop:
    """Trains heads. Networks of one structure are compiled once."""

    def __init__(self, data: LadderData, settings: LadderSettings):
        self.data, self.settings = data, settings
        _, self.groups = np.unique(data.labels, return_inverse=True)
        # The average has nothing to train: computed once, as maps of a single place.
        self.averages = {name: _gem(maps, 1.0)[:, None, None] for name, maps in data.maps.items()}
        self.trainers: dict[frozenset[str], _Trainer] = {}

    def train(self, fixes: frozenset[str], learned: np.ndarray, rate: float, seed: int) -> _Head:
        """Train a head on the photos ``learned``, bool (n,); it lasts until the next one."""
        maps = self.data.maps if "GeM" in fixes else self.averages
        trained_on = maps[RIGHT if "input" in fixes else AS_TRAINED]
        searched_in = maps[RIGHT if "input" in fixes else AS_SEARCHED]
        structure = fixes - {"input", "clean triplets", "PCA start"}
        if structure not in self.trainers:
            self.trainers[structure] = _Trainer(trained_on.shape[1:], structure, self.settings)
        rows = np.flatnonzero(learned)
        rng = np.random.default_rng(seed)
        triplets = rows[draw_triplets(self.data.labels[rows], rng)]
        if "clean triplets" in fixes:
            triplets = triplets[triplets[:, ANCHOR] != triplets[:, POSITIVE]]
        trainer = self.trainers[structure]
        trainer.reset()
        if "PCA start" in fixes:
            start_from_pca(trainer.head, trained_on[rows], rng)
        else:  # of equal seed, all arms with the same
            start_at_random(trainer.head, rng)
        trainer.train(trained_on, self.groups, triplets, rate, rng)
        is_unit = "L2 norm" in fixes
        return _Head(trainer, trained_on, searched_in, self.data.labels, learned, is_unit)

    def choose_rate(self, fixes: frozenset[str], fold: int, bar: tqdm) -> float:
        """The learning rate that does best on landmarks held back from those to be trained on."""
        settings, training = self.settings, ~self.data.test[fold]
        if len(settings.learning_rates) == 1:
            return settings.learning_rates[0]
        validation = training.copy()
        validation[training] = landmark_folds(self.data.labels[training], 5, seed=0)[0]
        values = []
        for rate in settings.learning_rates:
            head = self.train(fixes, training & ~validation, rate, settings.seeds[0])
            bar.update(1)
            values.append(np.nanmean(head.search(validation, whitened=False)))
        return settings.learning_rates[int(np.argmax(values))]


@dataclass(frozen=True)
class _Head:
    """A trained head, and the photos it learned from and searches in."""

    trainer: _Trainer
    trained_on: np.ndarray
    searched_in: np.ndarray
    labels: np.ndarray
    learned: np.ndarray
    is_unit: bool

    def search(self, photos: np.ndarray, whitened: bool) -> np.ndarray:
        """Average precision of each of ``photos``, bool (n,), searched for among the others."""
        descriptors = self.trainer.describe(self.searched_in[photos])
        if whitened:
            whitening = learn_supervised_whitening(
                self.trainer.describe(self.trained_on[self.learned]),
                labels=self.labels[self.learned],
            )
            # By hand, for whitening.apply would mend a missing L2 norm.
            descriptors = (descriptors - whitening.mean) @ whitening.projection
        if self.is_unit:
            hits = leave_one_out(_unit(descriptors), self.labels[photos])
        else:
            hits = euclidean_leave_one_out(descriptors, self.labels[photos])
        return average_precision(hits)


class _Trainer:
    """Trains one kind of head again and again: compiled once, it begins anew with each call."""

    def __init__(
        self, map_shape: tuple[int, int, int], fixes: frozenset[str], settings: LadderSettings
    ):
        self.settings = settings
        self.head = head = _build_head(map_shape, fixes, settings.embedding_size)
        end = head.get_layer("l2_normalization").input if "L2 norm" in fixes else head.output
        self.describer = keras.Model(head.input, end)
        self.siamese = Siamese(head, _build_loss(head, fixes, settings))
        # beta_2: a memory of 100 steps, where Adam's usual 1,000 is longer than the training.
        self.siamese.compile(keras.optimizers.Adam(beta_2=0.99))
        self.optimizer = self.siamese.optimizer
        self.optimizer.build(self.siamese.trainable_variables)
        self.variables = [*self.siamese.variables, *self.optimizer.variables]
        self.start = [np.array(ops.convert_to_numpy(variable)) for variable in self.variables]

    def reset(self) -> None:
        """Forget all training."""
        for variable, value in zip(self.variables, self.start, strict=True):
            variable.assign(value)

    def train(self, maps, groups, triplets, rate: float, rng: np.random.Generator) -> None:
        """Train on triplets, int (t, 3) as rows of maps (n, h, w, c) and groups (n,)."""
        steps = self.settings.steps
        order = shuffled_passes(len(triplets), steps * self.settings.batch_size, rng)
        for step, rows in enumerate(order.reshape(steps, -1)):
            self.optimizer.learning_rate = rate * (1 + math.cos(math.pi * step / steps)) / 2
            batch = triplets[rows]
            self.siamese.train_on_batch(maps[batch], groups[batch])

    def describe(self, maps: np.ndarray) -> np.ndarray:
        """Descriptors before the L2 norm: float (n, h, w, c) -> float32 (n, d)."""
        return _in_parts(self.describer, maps)


def _build_head(map_shape: tuple[int, int, int], fixes: frozenset[str], size: int) -> keras.Model:
    pooling = "gem" if "GeM" in fixes else "average"
    if fixes >= {"L2 norm", "centring"}:
        return build_head(map_shape, TowerSettings(embedding_size=size, pooling=pooling))
    return _faulty_head(map_shape, pooling, fixes, size)


def _build_loss(
    head: keras.Model, fixes: frozenset[str], settings: LadderSettings
) -> keras.layers.Layer:
    if "loss" not in fixes:
        return OriginalLoss(settings.margin, head.get_layer("projection"))
    if "negatives" in fixes:
        return MetricLoss(InfoNCE(settings.temperature))
    if "L2 norm" in fixes:
        return MetricLoss(TripletLoss(settings.margin, mining=Stored()))
    return OriginalTripletLoss(settings.margin)


def _gem(maps: np.ndarray, p: float) -> np.ndarray:
    """GeM of many maps, float16 (n, h, w, c) -> float32 (n, c)."""
    return _in_parts(lambda part: gem(part, p), maps)


def _in_parts(compute: Callable, maps: np.ndarray) -> np.ndarray:
    """``compute`` of many maps, 256 at a time."""
    parts = [maps[i : i + 256] for i in range(0, len(maps), 256)]
    return np.concatenate([ops.convert_to_numpy(compute(part)) for part in parts])


def _unit(vectors: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.divide(vectors, norms, out=np.zeros_like(vectors), where=norms > 0)


# --------------------------------------------------------------------------------------------------
# What it shows
# --------------------------------------------------------------------------------------------------


def summarize(
    table: pd.DataFrame, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> pd.DataFrame:
    """The mAP of each arm, and what it gains over the arm it is to be compared with.

    The intervals honour two sources of chance at once, the landmarks that happen to be searched for
    and the seeds that happen to be trained with, by the pigeonhole bootstrap (Owen, "The Pigeonhole
    Bootstrap", Annals of Applied Statistics 2007): each resample draws landmarks with replacement
    (whole ones, for photos of one landmark succeed and fail together), and independently of them
    seeds, and averages over the queries of the drawn landmarks under the drawn seeds. Every
    resample is used for all arms, so gains are paired: the same queries, the same seeds.

    What the intervals leave out: other landmarks to train on, and other photos in the gallery.

    Args:
        table: from :func:`run_ladder`.
        level: probability of the intervals.
        resamples: how many bootstrap samples.
        seed: of the draws; equal arguments give equal intervals.

    Returns:
        a row an arm: kind ("reference", "rung" or "without") and fix (which one is added, or left
        out; else ""); map, low, high; seed_deviation, the standard deviation of the mAP from seed
        to seed; against, the arm to compare with (for a rung the one before, for the others the
        whole recipe), and gain, gain_low, gain_high over it, where the table has it.

    Raises:
        ValueError: no query has a positive.
    """
    table = table[table["average_precision"].notna()]
    if table.empty:
        raise ValueError("no query has a positive in its gallery: there is nothing to average")
    sums = table.pivot_table(
        index=["arm", "seed"], columns="landmark", values="average_precision", aggfunc="sum"
    )
    arms = [arm for arm in (FROZEN, FROZEN_WHITENED, *ladder_arms()) if arm in set(table["arm"])]
    seeds = table["seed"].unique()
    total = np.stack([sums.loc[arm].loc[seeds].to_numpy() for arm in arms])  # (arm, seed, landmark)
    first = table[(table["arm"] == arms[0]) & (table["seed"] == seeds[0])]
    size = first.groupby("landmark").size().reindex(sums.columns).to_numpy()  # queries of each

    rng = np.random.default_rng(seed)
    n_seeds, n_landmarks = total.shape[1:]
    seed_count = rng.multinomial(n_seeds, np.full(n_seeds, 1 / n_seeds), resamples)
    count = rng.multinomial(n_landmarks, np.full(n_landmarks, 1 / n_landmarks), resamples)
    queries = count @ size * n_seeds
    drawn = {
        arm: ((seed_count @ total[i]) * count).sum(axis=1) / queries for i, arm in enumerate(arms)
    }
    value = dict(zip(arms, total.sum(axis=(1, 2)) / (size.sum() * n_seeds), strict=True))
    by_seed = total.sum(axis=2) / size.sum()
    ends = [(1 - level) / 2, (1 + level) / 2]
    rows = []
    for i, arm in enumerate(arms):
        low, high = np.quantile(drawn[arm], ends)
        kind, fix, against = _describe(arm)
        row = {"arm": arm, "kind": kind, "fix": fix, "map": value[arm], "low": low, "high": high}
        row["seed_deviation"] = by_seed[i].std(ddof=1) if n_seeds > 1 else np.nan
        if against in drawn:
            low, high = np.quantile(drawn[arm] - drawn[against], ends)
            row |= {"against": against, "gain": value[arm] - value[against]}
            row |= {"gain_low": low, "gain_high": high}
        rows.append(row)
    return pd.DataFrame(rows).set_index("arm")


def _describe(arm: str) -> tuple[str, str, str]:
    """Kind and fix of an arm, and which arm it is compared with."""
    rungs = [ORIGINAL, *(f"+ {fix}" for fix in FIXES)]
    if arm in rungs:
        place = rungs.index(arm)
        return "rung", arm.removeprefix("+ ") if place else "", rungs[place - 1] if place else ""
    if arm.startswith("all but "):
        return "without", arm.removeprefix("all but "), FULL
    return "reference", "", FULL
