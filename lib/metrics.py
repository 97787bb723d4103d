"""Measures of retrieval quality, in plain numpy: what share of the right photos comes early.

All of them start from ``hits``, a boolean matrix (queries, ranks): ``hits[q, r]`` tells whether the
photo at rank r (the best is r = 0) shows the landmark of query q.

    hits = leave_one_out(embeddings, labels)
    value = interval(average_precision(hits), groups=labels)     # mAP with its 95 % interval
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Interval(NamedTuple):
    """A mean over queries and its bootstrap confidence interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def _positives(hits: np.ndarray, n_positives: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    hits = np.atleast_2d(np.asarray(hits, dtype=bool))
    if n_positives is None:
        n_positives = hits.sum(axis=1)
    n_positives = np.broadcast_to(np.asarray(n_positives), hits.shape[:1])
    if np.any(hits.sum(axis=1) > n_positives):
        raise ValueError("a query has more hits than positives")
    return hits, n_positives


def average_precision(
    hits: np.ndarray, n_positives: np.ndarray | None = None, k: int | None = None
) -> np.ndarray:
    """Average precision: the precision at each hit's rank, averaged over a query's positives.

    The information-retrieval definition (sum of precisions, no trapezoids as in the Oxford
    protocol). With ``k`` it is AP@k: only the first k ranks count, and the sum is divided by
    min(k, positives), so that a perfect start scores 1.

    Args:
        hits: bool (q, r).
        n_positives: int (q,), positives of each query in the whole gallery; None: the hits are all.
        k: how many ranks count; all if None.

    Returns:
        float64 (q,) from 0 to 1; NaN for a query without positives, which a mean must leave out.
    """
    hits, n_positives = _positives(hits, n_positives)
    hits = hits[:, :k]
    precision = np.cumsum(hits, axis=1) / np.arange(1, hits.shape[1] + 1)
    best = n_positives if k is None else np.minimum(k, n_positives)
    return _divide((precision * hits).sum(axis=1), best)


def precision_at(hits: np.ndarray, k: int) -> np.ndarray:
    """Share of hits among the first k ranks (a gallery of fewer than k counts the rest as misses).

    Returns:
        float64 (q,) from 0 to 1.
    """
    hits = np.atleast_2d(np.asarray(hits, dtype=bool))
    return hits[:, :k].sum(axis=1) / k


def recall_at(hits: np.ndarray, k: int, n_positives: np.ndarray | None = None) -> np.ndarray:
    """Share of a query's positives found among the first k ranks.

    Metric-learning papers often call something else "recall@k": the share of queries with at least
    one hit among the first k ranks.

    Returns:
        float64 (q,) from 0 to 1; NaN for a query without positives.
    """
    hits, n_positives = _positives(hits, n_positives)
    return _divide(hits[:, :k].sum(axis=1), n_positives)


def _divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.divide(a, b, out=np.full(len(a), np.nan), where=np.asarray(b) > 0)


def interval(
    values: np.ndarray,
    groups: np.ndarray | None = None,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Mean over queries with a percentile-bootstrap confidence interval (Efron 1979).

    Args:
        values: float (q,); NaN (a query without positives) is left out.
        groups: (q,), which queries belong together. Photos of one landmark succeed and fail
            together, so whole landmarks are drawn, or the interval would be far too narrow.
        level: probability of the interval.
        resamples: how many bootstrap samples.
        seed: of the draws; equal arguments give the equal interval.

    Raises:
        ValueError: no query has positives.
    """
    values = np.asarray(values, dtype=np.float64)
    groups = np.arange(len(values)) if groups is None else np.asarray(groups)
    kept = ~np.isnan(values)
    if not kept.any():
        raise ValueError("no query has a positive in the gallery: there is nothing to average")
    values, groups = values[kept], groups[kept]
    _, group = np.unique(groups, return_inverse=True)
    sums, sizes = np.bincount(group, weights=values), np.bincount(group)
    draws = np.random.default_rng(seed).integers(len(sums), size=(resamples, len(sums)))
    means = sums[draws].sum(axis=1) / sizes[draws].sum(axis=1)
    tail = (1 - level) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return Interval(float(values.mean()), float(low), float(high))


def leave_one_out(embeddings: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Use each photo once as the query against all others.

    Args:
        embeddings: float (n, d), compared by their inner product (cosine, if of unit norm).
        labels: (n,), the landmark of each photo.

    Returns:
        hits, bool (n, n - 1). Ties keep the order of the rows, so that the result is reproducible.
    """
    labels = np.asarray(labels)
    embeddings = np.asarray(embeddings, dtype=np.float32)
    hits = np.empty((len(labels), len(labels) - 1), dtype=bool)
    for start in range(0, len(labels), 1024):  # a slice at a time: memory stays at 1024 x n
        rows = np.arange(start, min(start + 1024, len(labels)))
        similarity = embeddings[rows] @ embeddings.T
        similarity[np.arange(len(rows)), rows] = -np.inf  # the query itself comes last ...
        ranked = np.argsort(-similarity, axis=1, kind="stable")[:, :-1]  # ... and is cut off
        hits[rows] = labels[ranked] == labels[rows, None]
    return hits


def pair_hits(queries: np.ndarray, positives: np.ndarray) -> np.ndarray:
    """Search each query's one positive among the positives of all queries.

    Args:
        queries: float (n, d), compared with ``positives`` by their inner product.
        positives: float (n, d), row i shows what query i shows.

    Returns:
        hits, bool (n, n).
    """
    similarity = np.asarray(queries, dtype=np.float32) @ np.asarray(positives, dtype=np.float32).T
    ranked = np.argsort(-similarity, axis=1, kind="stable")
    return ranked == np.arange(len(ranked))[:, None]
