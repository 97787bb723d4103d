"""Finds neighbouring records of the Kaggle set that show the same landmark, by their order.

certain, possible = pair_neighbours(landmark, anchor, positive, negative, follows)
"""

from __future__ import annotations

import numpy as np
import pandas as pd


def pair_neighbours(
    landmark: np.ndarray,
    anchor: np.ndarray,
    positive: np.ndarray,
    negative: np.ndarray,
    follows: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Find neighbouring records that must show the same landmark, from how the set was made.

    The anchors are the first two photos of each landmark, in the order of the landmarks. So the
    records are a sequence of pairs (two neighbours of one landmark) and singles (landmarks with
    one photo). A single's positive is its anchor. Two records that share a picture are a pair. Two
    records are not a pair if the negative of one shows the landmark of the other. A pair is
    *certain* if every way to cut the sequence by these rules has it, and *possible* if one has it.

    A single would shift all pairs after it by one place. If none of at least 100 pairs that share
    a picture is shifted, there are no singles. If more than 1 % of the landmarks found by their
    bytes are not two neighbours, the records have another order, and nothing is paired.

    Args:
        landmark: int (n,), of each picture by its bytes.
        anchor, positive, negative: int (m,), pictures of each record.
        follows: bool (m,), whether no record is missing between a record and the one before.

    Returns:
        certain, possible: bool (m,), whether records i and i + 1 certainly show the same landmark,
        and whether they may.
    """
    m = len(anchor)
    own, other = landmark[anchor], landmark[negative]
    records = pd.Series(np.arange(m)).groupby(own).agg(["size", "min", "max"])
    paired = (records["size"] == 2) & (records["max"] - records["min"] == 1)
    odd_landmarks = (records["size"] > 1) & ~paired
    nothing = np.zeros(m, dtype=bool), np.zeros(m, dtype=bool)
    if odd_landmarks.sum() > 0.01 * (paired | odd_landmarks).sum():
        return nothing

    alone = records["size"].to_numpy()[np.searchsorted(records.index, own)] == 1
    odd = odd_landmarks.to_numpy()[np.searchsorted(records.index, own)]
    may_be_single = (anchor == positive) & alone
    next_own, next_other = np.append(own[1:], -1), np.append(other[1:], -1)
    both_alone = alone & np.append(alone[1:], False)
    may_pair = (own == next_own) | (both_alone & (other != next_own) & (next_other != own))
    may_pair &= np.append(follows[1:] & ~odd[1:], False) & ~odd
    # A record beside a gap may be half of a pair whose other half is missing.
    gap_before = ~follows | np.append(False, odd[:-1])
    gap_after = np.append(~follows[1:] | odd[1:], True)
    # In each run without a gap, all pairs should begin at even places, or all at odd ones.
    run = np.cumsum(gap_before)
    place = np.arange(m) - np.maximum.accumulate(np.where(gap_before, np.arange(m), 0))
    starts = records["min"][paired].to_numpy()
    shifts = pd.Series(place[starts] % 2).groupby(run[starts]).nunique()
    if len(starts) >= 100 and (shifts <= 1).all():
        may_be_single[:] = False
    by_itself = may_be_single | odd | (alone & (gap_before | gap_after))

    reach, left = _cuts(by_itself, may_pair)
    if not reach[m]:  # the rules contradict each other, so it is another order
        return nothing
    possible = may_pair & reach[:-1] & np.append(left[2:], False)
    alone_in_one = by_itself & reach[:-1] & left[1:]
    second_in_one = np.append(False, possible[:-1])
    return possible & ~alone_in_one & ~second_in_one, possible


def _cuts(by_itself: np.ndarray, may_pair: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Whether the records before i, and those from i on, can be cut into singles and pairs."""
    m = len(by_itself)
    before = np.zeros(m + 1, dtype=bool)
    after = np.zeros(m + 1, dtype=bool)
    before[0] = after[m] = True
    for i in range(m):
        before[i + 1] = (before[i] and by_itself[i]) or (i and before[i - 1] and may_pair[i - 1])
    for i in range(m - 1, -1, -1):
        after[i] = (by_itself[i] and after[i + 1]) or (may_pair[i] and after[i + 2])
    return before, after
