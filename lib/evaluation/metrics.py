"""Measures retrieval quality (average precision, recall@k), with intervals and paired tests.

All measures start from ``hits``, a boolean matrix (queries, ranks): ``hits[q, r]`` tells whether
the photo at rank r (0 is the best) shows the landmark of query q.

    hits = leave_one_out(embeddings, labels)
    value = interval(average_precision(hits), groups=labels)     # mAP with its 95 % interval

With the ground truth of a benchmark (:mod:`lib.evaluation.ground_truth`), a protocol names the
measures:

    table = query_table(ranks, read_revisited(path)["medium"], REVISITED)    # a row for each query
    table.mean()                                                             # mAP and mP@k
    compare(table["AP"], better["AP"])                  # the gain, its interval and its p-value
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from lib.evaluation.ground_truth import GroundTruth


class Interval(NamedTuple):
    """A mean over queries and its bootstrap confidence interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


class Comparison(NamedTuple):
    """The gain of one system over another, and the probability of such a gain by chance."""

    difference: Interval
    p_value: float


def judge(
    ranks: np.ndarray, positives: Sequence[np.ndarray], junk: Sequence[np.ndarray] | None = None
) -> np.ndarray:
    """Turn rankings into ``hits``, bool (q, r), given the positives and the junk of each query.

    Junk counts neither for nor against: it is removed, and the photos behind it move up (Philbin,
    Chum, Isard, Sivic, Zisserman, "Object Retrieval with Large Vocabularies and Fast Spatial
    Matching", CVPR 2007). Misses fill the end of the row.

    Args:
        ranks: int (q, r), numbers of gallery photos, the best first; -1, a miss, where a search
            found fewer than r.
        positives, junk: for each query the numbers of these photos, int (p,); None: no junk.

    Raises:
        ValueError: not as many rankings as positives and junk; for a query, a photo that is ranked
            twice or is both positive and junk; or a negative number (other than -1 in ``ranks``).
    """
    ranks = np.asarray(ranks)
    if ranks.ndim != 2 or ranks.dtype.kind not in "iu":
        raise ValueError(f"ranks must be int (q, r), got {ranks.dtype} {ranks.shape}")
    junk = [()] * len(ranks) if junk is None else junk
    if not len(ranks) == len(positives) == len(junk):
        given = f"positives of {len(positives)} queries and junk of {len(junk)}"
        raise ValueError(f"{len(ranks)} rankings, but {given}")
    positives, junk = ([np.asarray(n, dtype=np.intp) for n in lists] for lists in (positives, junk))
    numbers = np.concatenate([np.empty(0, dtype=np.intp), *positives, *junk])
    if numbers.min(initial=0) < 0 or ranks.min(initial=0) < -1:
        raise ValueError("photos have numbers from 0 on (only in ranks, -1 stands for none)")

    # An element for each photo, and a last one for index -1.
    size = 2 + max(numbers.max(initial=0), int(ranks.max(initial=0)))
    grade, seen = np.zeros(size, dtype=np.int8), np.zeros(size, dtype=bool)
    hits = np.zeros(ranks.shape, dtype=bool)
    for query, (good, bad) in enumerate(zip(positives, junk, strict=True)):
        row = ranks[query].astype(np.intp)  # NumPy's index type: converted once for both uses
        seen[row] = True
        seen[-1] = False
        if np.count_nonzero(seen) != np.count_nonzero(row >= 0):
            raise ValueError(f"row {query}: a photo is ranked twice")
        seen.fill(False)
        grade[good] = 1
        if grade[bad].any():
            raise ValueError(f"row {query}: a positive is junk, too")
        grade[bad] = -1
        graded = grade[row]
        hit, skipped = np.flatnonzero(graded == 1), np.flatnonzero(graded == -1)
        hits[query, hit - np.searchsorted(skipped, hit)] = True
        grade[good] = grade[bad] = 0
    return hits


def _find(hits: np.ndarray, n_positives: np.ndarray | None) -> tuple[np.ndarray, ...]:
    """Return each hit's query, rank and place in its query; each query's hits and positives."""
    hits = np.atleast_2d(np.asarray(hits, dtype=bool))
    query, rank = np.divmod(np.flatnonzero(hits), hits.shape[1])  # far quicker than nonzero in 2-D
    count = np.bincount(query, minlength=len(hits))
    place = np.arange(len(query)) - (np.cumsum(count) - count)[query]
    n_positives = np.broadcast_to(count if n_positives is None else n_positives, count.shape)
    if np.any(count > n_positives):
        raise ValueError("a query has more hits than positives")
    return query, rank, place, count, n_positives


def average_precision(
    hits: np.ndarray,
    n_positives: np.ndarray | None = None,
    k: int | np.ndarray | None = None,
    trapezoid: bool = False,
) -> np.ndarray:
    """Average precision: the precision at each hit's rank, averaged over a query's positives.

    The measures below have the same arguments, result and errors. With ``k`` it is AP@k: only the
    first k ranks count, and the sum is divided by min(k, positives), so that a perfect start scores
    1. Two protocols use AP@k:

    * k = 100 is mAP@100 of the Google Landmarks retrieval challenges (Weyand, Araujo, Cao, Sim,
      "Google Landmarks Dataset v2", CVPR 2020, and the rules of the Kaggle challenges "Landmark
      Retrieval" 2019 to 2021);
    * k = n_positives is MAP@R (Musgrave, Belongie, Lim, "A Metric Learning Reality Check", ECCV
      2020).

    Args:
        hits: bool (q, r).
        n_positives: int (q,), positives of each query in the whole gallery; None: all are hits.
        k: number of ranks that count, int or int (q,); None: all.
        trapezoid: integrate the precision-recall curve with trapezoids: each hit counts with the
            average of its precision and the precision just before it (1 before the first rank), as
            in the Oxford and Paris benchmarks, original and revisited (Radenović, Iscen, Tolias,
            Avrithis, Chum, CVPR 2018; compute_ap in https://github.com/filipradenovic/revisitop).

    Returns:
        float64 (q,) from 0 to 1; NaN for a query without positives, which a mean must leave out.

    Raises:
        ValueError: a query has more hits than positives.
    """
    query, rank, place, count, n_positives = _find(hits, n_positives)
    precision = (place + 1) / (rank + 1)
    if trapezoid:
        before = np.divide(place, rank, out=np.ones(len(rank)), where=rank > 0)
        precision = (before + precision) / 2
    best = n_positives
    if k is not None:
        k = np.broadcast_to(k, count.shape)
        precision[rank >= k[query]] = 0
        best = np.minimum(k, n_positives)
    return _divide(np.bincount(query, weights=precision, minlength=len(count)), best)


def capped_precision_at(
    hits: np.ndarray, k: int, n_positives: np.ndarray | None = None
) -> np.ndarray:
    """Compute the share of hits among the first k ranks, or up to the last positive if earlier.

    Its mean is mP@k of the revisited Oxford and Paris benchmarks (compute_map in the repository
    that :func:`average_precision` names): a query with fewer than k positives can reach 1, too. If
    a positive is missing from the ranking, all k ranks count.
    """
    query, rank, _, count, n_positives = _find(hits, n_positives)
    last = np.zeros(len(count), dtype=np.int64)
    last[query] = rank + 1  # of a query's hits, the last assignment stays
    depth = np.where(count == n_positives, np.minimum(k, last), k)
    return _divide(np.bincount(query[rank < k], minlength=len(count)), depth)


def recall_at(hits: np.ndarray, k: int, n_positives: np.ndarray | None = None) -> np.ndarray:
    """Compute the share of a query's positives that are among the first k ranks.

    In metric-learning papers, "recall@k" often means :func:`hit_at`.
    """
    query, rank, _, count, n_positives = _find(hits, n_positives)
    return _divide(np.bincount(query[rank < k], minlength=len(count)), n_positives)


def hit_at(hits: np.ndarray, k: int, n_positives: np.ndarray | None = None) -> np.ndarray:
    """Tell whether a hit is among the first k ranks, float64 (q,), 0 or 1.

    If the numbers of positives are given, a query without any has NaN, as in the other measures.

    The mean is metric learning's recall@k (Oh Song, Xiang, Jegelka, Savarese, "Deep Metric Learning
    via Lifted Structured Feature Embedding", CVPR 2016).
    """
    found = np.atleast_2d(np.asarray(hits, dtype=bool))[:, :k].any(axis=1).astype(np.float64)
    return found if n_positives is None else np.where(np.asarray(n_positives) > 0, found, np.nan)


def _divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.divide(a, b, out=np.full(len(a), np.nan), where=np.asarray(b) > 0)


# A protocol maps the name of each column to its measure, a function of hits and n_positives.
Protocol = Mapping[str, Callable[[np.ndarray, np.ndarray], np.ndarray]]

# Oxford and Paris revisited: the mean over queries gives mAP and mP@1, 5, 10.
REVISITED: Protocol = {
    "AP": lambda hits, n: average_precision(hits, n, trapezoid=True),
    "P@1": lambda hits, n: capped_precision_at(hits, 1, n),
    "P@5": lambda hits, n: capped_precision_at(hits, 5, n),
    "P@10": lambda hits, n: capped_precision_at(hits, 10, n),
}

# Google Landmarks retrieval: mAP@100.
LANDMARKS: Protocol = {"AP@100": lambda hits, n: average_precision(hits, n, k=100)}

# Labelled photos, for instance INRIA Holidays: mAP, and the measures of metric learning.
GENERAL: Protocol = {
    "AP": average_precision,
    "AP@R": lambda hits, n: average_precision(hits, n, k=n),
    "hit@1": lambda hits, n: hit_at(hits, 1, n),
    "hit@5": lambda hits, n: hit_at(hits, 5, n),
    "hit@10": lambda hits, n: hit_at(hits, 10, n),
    "recall@10": lambda hits, n: recall_at(hits, 10, n),
}


def query_table(ranks: np.ndarray, truth: GroundTruth, protocol: Protocol) -> pd.DataFrame:
    """Evaluate rankings, query by query.

    Args:
        ranks: as for :func:`judge`, junk included. Rows are read in blocks, so a memory-mapped file
            may exceed the memory.
        protocol: the measures: REVISITED, LANDMARKS, GENERAL or your own.

    Returns:
        a row for each query, indexed by its name, with the columns n_positives (int) and the
        measures (float64). Without positives they are NaN, which pandas' mean() leaves out.

    Raises:
        ValueError: not as many rankings as queries, a number outside the gallery, or a ranking that
            :func:`judge` refuses.
    """
    if len(ranks) != len(truth.queries):
        raise ValueError(f"{len(ranks)} rankings of {len(truth.queries)} queries")
    n_positives = np.array([len(numbers) for numbers in truth.positives])
    columns = {name: np.empty(len(ranks)) for name in protocol}
    step = max(1, 2**22 // max(1, ranks.shape[1]))  # 4 MB of hits: they stay in the cache
    for start in range(0, len(ranks), step):
        rows = slice(start, start + step)
        block = np.asarray(ranks[rows])
        if block.max(initial=-1) >= len(truth.gallery):
            raise ValueError(f"photo {block.max()} of a gallery of {len(truth.gallery)} is ranked")
        try:
            hits = judge(block, truth.positives[rows], truth.junk[rows])
        except ValueError as error:
            raise ValueError(f"from query {truth.queries[start]!r} on, {error}") from None
        for name, measure in protocol.items():
            columns[name][rows] = measure(hits, n_positives[rows])
    table = pd.DataFrame(columns, index=pd.Index(truth.queries, name="query"))
    table[n_positives == 0] = np.nan
    table.insert(0, "n_positives", n_positives)
    return table


def interval(
    values: np.ndarray, groups: np.ndarray | None = None, resamples: int = 2000
) -> Interval:
    """Compute the mean over queries and its 95 % percentile-bootstrap interval (Efron 1979).

    Args:
        values: float (q,); NaN (a query without positives) is left out.
        groups: (q,), such as the landmark of each query. Photos of a landmark succeed and fail
            together, so whole groups are drawn; otherwise the interval would be far too narrow.
        resamples: number of bootstrap samples, drawn with a fixed seed.

    Raises:
        ValueError: no query has positives.
    """
    values = np.asarray(values, dtype=np.float64)
    sums, sizes = _sums(values, groups)
    rng = np.random.default_rng(0)
    means = np.empty(resamples)
    step = max(1, 2**20 // len(sums))  # 8 MB of draws at a time
    for start in range(0, resamples, step):
        block = means[start : start + step]
        draws = rng.integers(len(sums), size=(len(block), len(sums)))
        block[:] = sums[draws].sum(axis=1) / sizes[draws].sum(axis=1)
    tail = (1 - 0.95) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return Interval(float(values[~np.isnan(values)].mean()), float(low), float(high))


def _sums(values: np.ndarray, groups: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Return each group's sum and number of values; NaN is left out."""
    kept = ~np.isnan(values)
    if not kept.any():
        raise ValueError("no query has a positive in the gallery: there is nothing to average")
    groups = np.arange(len(values)) if groups is None else np.asarray(groups)
    _, group = np.unique(groups[kept], return_inverse=True)
    return np.bincount(group, weights=values[kept]), np.bincount(group)


def compare(
    a: np.ndarray, b: np.ndarray, groups: np.ndarray | None = None, resamples: int = 9999
) -> Comparison:
    """Compare two systems by a measure of the same queries.

    The p-value is that of a two-sided randomization test: if a and b were equally good, either sign
    of each difference would be equally likely (Smucker, Allan, Carterette, "A Comparison of
    Statistical Significance Tests for Information Retrieval Evaluation", CIKM 2007).

    Args:
        a, b: float (q,); NaN (a query without positives) is left out.
        groups: (q,), as for :func:`interval`; the differences of a group change sign together.
        resamples: draws of signs, with a fixed seed; the p-value is then at least
            1 / (resamples + 1). Where there are no more ways to choose signs, all are tried.

    Returns:
        the mean of b - a with its interval, and the p-value.

    Raises:
        ValueError: a and b differ in shape or in their NaN, or no query has positives.
    """
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.shape != b.shape or np.any(np.isnan(a) != np.isnan(b)):
        raise ValueError("a and b must be measured on the same queries, with NaN for the same ones")
    from scipy.stats import permutation_test  # here: it takes a second

    difference = interval(b - a, groups)
    sums, _ = _sums(b - a, groups)
    if len(sums) == 1:  # either sign is as far: it can't tell anything
        return Comparison(difference, 1.0)
    # Of a total of 1, so that sums that differ only by rounding can be made equal.
    sums = sums / (np.abs(sums).sum() or 1.0)
    test = permutation_test(
        (sums,),
        lambda x, axis: np.abs(x.sum(axis)).round(12),
        permutation_type="samples",  # of a single sample: signs change
        alternative="greater",
        n_resamples=resamples,
        batch=500,  # a few at a time: memory stays at 500 x groups
        rng=0,
    )
    return Comparison(difference, float(test.pvalue))


def leave_one_out(embeddings: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Search each photo among all others; ties keep the order of the rows.

    Embeddings, float (n, d), are compared by inner product; labels, (n,), are the landmarks.
    Returns hits, bool (n, n - 1).
    """
    labels = np.asarray(labels)
    embeddings = np.asarray(embeddings, dtype=np.float32)
    hits = np.empty((len(labels), len(labels) - 1), dtype=bool)
    for start in range(0, len(labels), 1024):  # memory stays at 1024 x n
        rows = np.arange(start, min(start + 1024, len(labels)))
        similarity = embeddings[rows] @ embeddings.T
        similarity[np.arange(len(rows)), rows] = -np.inf  # the query itself comes last ...
        ranked = np.argsort(-similarity, axis=1, kind="stable")[:, :-1]  # ... and is cut off
        hits[rows] = labels[ranked] == labels[rows, None]
    return hits


def pair_hits(queries: np.ndarray, positives: np.ndarray) -> np.ndarray:
    """Search for each query's positive, in the same row, among all: float (n, d) -> bool (n, n)."""
    similarity = np.asarray(queries, dtype=np.float32) @ np.asarray(positives, dtype=np.float32).T
    ranked = np.argsort(-similarity, axis=1, kind="stable")
    return ranked == np.arange(len(ranked))[:, None]
