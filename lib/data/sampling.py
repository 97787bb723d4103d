"""Plans batches: the stored triplets, or P landmarks with K pictures of each.

    rng = np.random.default_rng([seed, epoch])
    triplet_batches(catalogue, chosen, steps=100, batch_size=32, rng=rng)    # int (100, 32, 3)
    landmark_batches(catalogue, chosen, steps=100, p=16, k=4, rng=rng)       # int (100, 64)

A whole epoch is planned before it begins, as rows of the catalogue's pictures: the same seed gives
the same batches in every process and after every restart.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from lib.data.catalogue import UNKNOWN, Catalogue


class SamplingError(ValueError):
    """There are too few pictures for the batches asked for."""


def usable_triplets(catalogue: Catalogue, chosen: np.ndarray) -> np.ndarray:
    """The stored triplets that can teach something without showing what is held back.

    Left out are the degenerate (the positive is the anchor: whatever the network does, their
    distance is 0), those whose negative shows the anchor's landmark, or may, and those whose
    anchor or negative is not among the chosen pictures.

    Args:
        catalogue: of the shards.
        chosen: bool, for each picture whether it may be used. All of a group, or none.

    Returns:
        int64 (n, 3): anchor, positive and negative picture of each.
    """
    triplets = catalogue.triplets[["anchor", "positive", "negative"]].to_numpy()
    group = catalogue.pictures["group"].to_numpy()[triplets]
    keep = ~catalogue.degenerate & (group[:, 0] != group[:, 2]) & chosen[triplets].all(axis=1)
    return triplets[keep]


def triplet_batches(
    catalogue: Catalogue,
    chosen: np.ndarray,
    steps: int,
    batch_size: int,
    rng: np.random.Generator,
) -> np.ndarray:
    """Batches of stored triplets, in a new random order each time all have been used.

    Args:
        catalogue, chosen: see :func:`usable_triplets`.
        steps: number of batches.
        batch_size: triplets in a batch.
        rng: of the order.

    Returns:
        int64 (steps, batch_size, 3), pictures.

    Raises:
        SamplingError: not one usable triplet.
    """
    triplets = usable_triplets(catalogue, chosen)
    if not len(triplets):
        raise SamplingError(
            f"none of the {len(catalogue.triplets)} triplets is usable (in {chosen.sum()} chosen "
            "pictures, anchor and positive different): use more shards"
        )
    order = shuffled_passes(len(triplets), steps * batch_size, rng)
    return triplets[order].reshape(steps, batch_size, 3)


def shuffled_passes(n: int, needed: int, rng: np.random.Generator) -> np.ndarray:
    """Numbers below n, each once in a random order, then again in another, as many as needed.

    Returns:
        int64 (needed,).
    """
    passes = -(-needed // n)
    return np.concatenate([rng.permutation(n) for _ in range(passes)])[:needed]


def landmark_batches(
    catalogue: Catalogue,
    chosen: np.ndarray,
    steps: int,
    p: int,
    k: int,
    rng: np.random.Generator,
) -> np.ndarray:
    """P x K batches (Hermans et al., "In Defense of the Triplet Loss", 2017, section 2).

    Each pass over the landmarks takes every group once, in a random order: no two landmarks of a
    batch may be the same. The k pictures of a landmark are different ones where it has as many;
    else each is used as often as any other, give or take one.

    Args:
        catalogue: of the shards.
        chosen: bool, for each picture whether it may be used.
        steps: number of batches.
        p: landmarks in a batch.
        k: pictures of each, at least 2.
        rng: of the choice and the order.

    Returns:
        int64 (steps, p * k), pictures, those of a landmark side by side.

    Raises:
        SamplingError: fewer than p landmarks with two different pictures.
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

    def in_turn() -> Iterator[np.ndarray]:
        """Batches of landmarks, pass after pass; what does not fill a batch is left to the next."""
        while True:
            order = rng.permutation(len(landmarks))
            for start in range(0, len(order) - p + 1, p):
                groups = landmarks.iloc[order[start : start + p]]
                yield np.array([rng.choice(of_group) for of_group in groups])

    def draw(landmark: int) -> np.ndarray:
        shuffled = rng.permutation(pictures[landmark])
        return np.resize(shuffled, k)

    turns = in_turn()
    batches = [np.concatenate([draw(x) for x in next(turns)]) for _ in range(steps)]
    return np.array(batches, dtype=np.int64).reshape(steps, p * k)
