"""Plans triplets, and the batches of an epoch: stored triplets, or P landmarks with K pictures.

    rng = np.random.default_rng([seed, epoch])
    triplet_batches(catalogue, chosen, steps=100, batch_size=32, rng=rng)    # int (100, 32, 3)
    landmark_batches(catalogue, chosen, steps=100, p=16, k=4, rng=rng)       # int (100, 64)

Plans contain rows of ``catalogue.pictures``. An epoch is planned before it begins, so the same seed
gives the same batches in every process and after every restart; with :func:`hard_negatives`, the
same seed and embeddings do.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from lib.data.catalogue import UNKNOWN, Catalogue

HARDEST = 5  # negatives that are mined for an anchor, as in the paper

_BLOCK = 2**23  # similarities in memory at a time


class SamplingError(ValueError):
    """There are too few usable pictures."""


def usable_triplets(catalogue: Catalogue, chosen: np.ndarray) -> np.ndarray:
    """The stored triplets that are useful for training on the chosen pictures.

    Left out are degenerate triplets (the positive is the anchor), triplets whose negative shows or
    may show the anchor's landmark, and those with a picture that is not chosen.

    Args:
        catalogue: of the shards.
        chosen: bool (pictures,), the same for all pictures of a group.

    Returns:
        int64 (n, 3): anchor, positive and negative.
    """
    triplets = catalogue.triplets[["anchor", "positive", "negative"]].to_numpy()
    group = catalogue.pictures["group"].to_numpy()[triplets]
    keep = ~catalogue.degenerate & (group[:, 0] != group[:, 2]) & chosen[triplets].all(axis=1)
    return triplets[keep]


def triplet_batches(
    catalogue: Catalogue, chosen: np.ndarray, steps: int, batch_size: int, rng: np.random.Generator
) -> np.ndarray:
    """Batches of :func:`usable_triplets`, reshuffled whenever all have been used.

    Returns:
        int64 (steps, batch_size, 3), pictures.

    Raises:
        SamplingError: no usable triplet.
    """
    triplets = usable_triplets(catalogue, chosen)
    if not len(triplets):
        raise SamplingError(
            f"none of the {len(catalogue.triplets)} triplets is usable (in {chosen.sum()} chosen "
            "pictures, anchor and positive different): use more shards"
        )
    order = shuffled_passes(len(triplets), steps * batch_size, rng)
    return triplets[order].reshape(steps, batch_size, 3)


def draw_triplets(landmark: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw triplets as the Kaggle set does.

    The first two photos of each landmark are anchors. The positive is drawn from all photos of the
    landmark, including the anchor; the negative from the anchors of all other landmarks.

    Args:
        landmark: number of each photo's landmark, int (n,).

    Returns:
        int64 (t, 3), photos: anchor, positive and negative, in the order of the landmarks.

    Raises:
        SamplingError: there are fewer than two landmarks.
    """
    photos = [np.flatnonzero(landmark == number) for number in np.unique(landmark)]
    if len(photos) < 2:
        raise SamplingError(f"{len(photos)} landmarks make no triplet: at least two are needed")
    anchors = np.concatenate([of_landmark[:2] for of_landmark in photos])
    triplets = []
    for of_landmark in photos:
        for anchor in of_landmark[:2]:
            positive, negative = of_landmark[rng.integers(len(of_landmark))], anchor
            while landmark[negative] == landmark[anchor]:
                negative = anchors[rng.integers(len(anchors))]
            triplets.append((anchor, positive, negative))
    return np.array(triplets)


def hard_negatives(
    anchors: np.ndarray,
    pool: np.ndarray,
    group: np.ndarray,
    embed: Callable[[np.ndarray], np.ndarray],
    rng: np.random.Generator,
) -> np.ndarray:
    """Mine a negative for each use of an anchor from a pool of pictures.

    For each anchor the nearest picture of each other group is found in the pool; each use of the
    anchor draws one of the ``HARDEST`` nearest of these, or of as many as there are. Radenović,
    Tolias, Chum, "Fine-tuning CNN Image Retrieval with No Human Annotation", TPAMI 2018.

    Args:
        anchors: int (...), pictures, each maybe several times.
        pool: int (p,), different pictures.
        group: int (pictures,); those of different groups certainly show different landmarks.
        embed: pictures, int (n,) -> float32 (n, d) of unit norm.

    Returns:
        int64 (...), a picture of the pool for each of ``anchors``.

    Raises:
        SamplingError: the pool shows an anchor's landmark alone.
    """
    queries, query_of_use = np.unique(anchors, return_inverse=True)
    of_pool, of_queries = group[pool], group[queries]
    vectors, points = embed(pool), embed(queries)
    found = np.empty((len(queries), HARDEST), np.int64)
    exists = np.empty(found.shape, bool)
    step = max(_BLOCK // len(pool), 1)
    for start in range(0, len(queries), step):
        rows = slice(start, start + step)
        similarity = points[rows] @ vectors.T
        similarity[of_queries[rows, None] == of_pool] = -np.inf
        for rank in range(HARDEST):
            best = similarity.argmax(axis=1)
            exists[rows, rank] = similarity[np.arange(len(best)), best] > -np.inf
            found[rows, rank] = pool[best]
            similarity[of_pool[best][:, None] == of_pool] = -np.inf
    count = exists.sum(axis=1)
    if not count.all():
        raise SamplingError(
            f"a pool of {len(pool)} pictures shows no other landmark than an anchor's: set a "
            "larger pool, or pool=0"
        )
    drawn = rng.integers(count[query_of_use])
    return found[query_of_use, drawn].reshape(np.shape(anchors))


def shuffled_passes(n: int, needed: int, rng: np.random.Generator) -> np.ndarray:
    """As many numbers as needed from successive permutations of range(n), int64 (needed,)."""
    passes = -(-needed // n)
    return np.concatenate([rng.permutation(n) for _ in range(passes)])[:needed]


def landmark_batches(
    catalogue: Catalogue, chosen: np.ndarray, steps: int, p: int, k: int, rng: np.random.Generator
) -> np.ndarray:
    """P x K batches (Hermans et al., "In Defense of the Triplet Loss", 2017, section 2).

    A batch has p landmarks with k >= 2 of their ``chosen`` pictures each. Each pass takes one
    landmark of every group, in random order, so that the landmarks of a batch certainly differ. The
    k pictures of a landmark differ if it has that many; else they repeat cyclically.

    Returns:
        int64 (steps, p * k), pictures, grouped by landmark.

    Raises:
        SamplingError: k is below 2, or fewer than p landmarks have two different pictures.
    """
    if k < 2:
        raise SamplingError(f"a landmark needs at least 2 pictures in a batch, not {k}")
    table = catalogue.pictures.loc[chosen & (catalogue.pictures["landmark"] != UNKNOWN)]
    pictures = {
        landmark: rows.to_numpy()
        for landmark, rows in table.groupby("landmark").groups.items()
        if len(rows) >= 2
    }
    landmarks = table.loc[table["landmark"].isin(pictures)].groupby("group")["landmark"].unique()
    if len(landmarks) < p:
        raise SamplingError(
            f"a batch of {p} landmarks needs as many with two different pictures; there are "
            f"{len(landmarks)}: use more shards, or a smaller batch"
        )

    batches = []
    while len(batches) < steps:  # a pass over all groups; an incomplete batch at its end is dropped
        order = rng.permutation(len(landmarks))
        for start in range(0, len(order) - p + 1, p)[: steps - len(batches)]:
            groups = landmarks.iloc[order[start : start + p]]
            drawn = [rng.choice(of_group) for of_group in groups]
            batches.append([np.resize(rng.permutation(pictures[one]), k) for one in drawn])
    return np.array(batches, dtype=np.int64).reshape(steps, p * k)
