"""Fits the split, the batches and the epochs to the size of a data set.

    split = hold_back(catalogue, share=0.1)
    batch_size, steps = fit_batches(catalogue, split.train, batch_size=64, steps=1400)
    handler = DatasetHandler(catalogue, DataSettings(batch_size=batch_size), split.train)

A large set gets what is asked for. A small one, such as forty photos of one's own, gets less, and a
printed line says what was chosen.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from lib.data.catalogue import Catalogue, split_landmarks
from lib.data.sampling import SamplingError, usable_triplets

_DRAWS = 10  # of landmarks to hold back, of which the best is taken
_PASSES = 4  # over all triplets in an epoch, at most: more would only repeat them


class Split(NamedTuple):
    """Which pictures are for training and which are for validation, bool (pictures,) each."""

    train: np.ndarray
    validation: np.ndarray


def hold_back(catalogue: Catalogue, share: float) -> Split:
    """Hold back landmarks for validation; training and validation get at least two each.

    A landmark counts if two of its pictures are stored as anchor and positive. Of fewer than four
    such landmarks none can be held back: then both parts are the whole set, and what is measured
    on it flatters.

    Args:
        catalogue: of the shards.
        share: of the landmarks, from 0 to 1; the nearest possible one is taken.

    Raises:
        SamplingError: fewer than two landmarks have two pictures.
        ValueError: the share is not from 0 to 1.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"validation_share must be from 0 to 1, not {share}")
    group = catalogue.pictures["group"].to_numpy()
    anchors = catalogue.triplets["anchor"].to_numpy()[~catalogue.degenerate]
    pairs, groups = np.unique(group[anchors]), group.max(initial=-1) + 1
    if len(pairs) < 2:
        raise SamplingError(
            f"{len(pairs)} of the {groups} landmarks in the shards of dataset_dir have two "
            "different photos, but at least 2 must: add photos"
        )
    asked = round(share * groups)
    for held in sorted(range(groups + 1), key=lambda held: abs(held - asked)):
        exact = share if held == asked else held / groups
        if split := _draw_split(catalogue, exact, pairs):
            if held != asked:
                print(
                    f"{held} of {groups} landmarks are held back, as validation_share = {share} "
                    "leaves too few on one side"
                )
            return split
    everything = np.ones(len(group), dtype=bool)
    print(
        f"Only {len(pairs)} landmarks have two photos: none can be held back. All results are of "
        "photos that were trained on, which flatters."
    )
    return Split(everything, everything)


def _draw_split(catalogue: Catalogue, share: float, pairs: np.ndarray) -> Split | None:
    """Hold back a share of the landmarks; None if one side lacks pairs, or there is no triplet.

    Where landmarks have very different numbers of photos, a draw may hold back the large ones. The
    first is taken that leaves half as many triplets as expected, or else the best of some.
    """
    group = catalogue.pictures["group"].to_numpy()
    # Of a triplet, both landmarks must be trained on.
    enough, best, most = (1 - share) ** 2 * len(catalogue.triplets) / 2, None, 0
    for seed in range(_DRAWS):
        part = split_landmarks(catalogue, {"train": 1 - share, "validation": share}, seed)
        split = Split(part == "train", part == "validation")
        of_validation = np.isin(pairs, group[split.validation]).sum()
        if min(of_validation, len(pairs) - of_validation) >= 2:
            usable = len(usable_triplets(catalogue, split.train))
            if usable > most:
                best, most = split, usable
            if usable >= enough:
                break
    return best


def fit_batches(
    catalogue: Catalogue, chosen: np.ndarray, batch_size: int, steps: int
) -> tuple[int, int]:
    """Fit a batch and an epoch to the usable triplets of the chosen pictures.

    Args:
        catalogue, chosen: see :func:`lib.data.sampling.usable_triplets`.
        batch_size: triplets in a batch, at most.
        steps: batches in an epoch, at most; an epoch passes at most 4 times over all triplets.

    Returns:
        the batch size and the steps.
    """
    triplets = len(usable_triplets(catalogue, chosen))
    batch = max(1, min(batch_size, triplets))
    fitted = max(1, min(steps, _PASSES * triplets // batch))
    if (batch, fitted) != (batch_size, steps):
        print(
            f"{triplets} triplets to train on: {fitted} batches of {batch} an epoch, not {steps} "
            f"of {batch_size}"
        )
    return batch, fitted
