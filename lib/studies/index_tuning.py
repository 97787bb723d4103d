"""Finding the fastest kind of index that reaches a recall within some memory.

    settings, table = tune(embeddings, target_recall=0.99, most_bytes=400_000_000)
    index = PhotoIndex.build(embeddings, names, fingerprint(tower), settings)

Recall here is that of approximate search: the share of the k truly nearest photos that are found.
It is measured with queries that are not in the index. The parameters to try come from Faiss's
``ParameterSpace``, the frontier from its ``OperatingPoints``.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import faiss
import numpy as np
import pandas as pd
from faiss.contrib.evaluation import knn_intersection_measure
from scipy import special

from lib.search.exact import checked, knn, nearest_of, similarities_of
from lib.search.kinds import IndexSettings, train_and_add

RERANK = (0, 2, 5, 10, 14, 20, 28, 40, 80)  # factors that are tried
SHORTLIST = 2  # after a trial with a sample, kinds that must reach the target with all vectors
_BLOCK = 16_384  # rows that are searched together
_LITTLE = 0.001  # a gain of recall that is not worth more time
_FAR_SLOWER = 3  # settings this many times slower than one that reaches the target are left out


class TargetUnreachableError(ValueError):
    """No kind of index reaches the recall in this memory; the message says what is possible."""


class Tuned(NamedTuple):
    """The result of :func:`tune`.

    Attributes:
        settings: the fastest that fit and reach the target.
        frontier: a row for each setting that was measured, by kind and recall. ``factory``,
            ``search``, ``rerank``: as in :class:`lib.search.kinds.IndexSettings`; ``vectors``: how
            many were in the index, fewer than all in the trial with a sample; ``recall``: mean over
            the queries; ``recall_low``: its :func:`lower_limit`; ``qps_1``, ``qps_2``: queries per
            second, in one batch, with 1 and 2 threads; ``bytes``: of the index in memory, without
            the vectors that re-ranking reads; ``build_seconds``; ``fits``: within the memory
            allowed; ``frontier``: no other setting of the full index that fits is better in recall
            or ``qps_2`` and as good in the other; ``chosen``: True in one row.
    """

    settings: IndexSettings
    frontier: pd.DataFrame


class _Trial(NamedTuple):
    """Vectors to index, and queries with their true neighbours.

    Attributes:
        vectors: float32 (n, d), maybe memory-mapped.
        rows: int64 (m,), the vectors that are indexed.
        queries: float32 (q, d).
        k: neighbours.
        exact: int64 (q, k), places in ``rows`` of the nearest.
    """

    vectors: np.ndarray
    rows: np.ndarray
    queries: np.ndarray
    k: int
    exact: np.ndarray

    def measure(self, run: Callable[[], tuple[np.ndarray, float]], **row: Any) -> dict[str, Any]:
        """Complete a row of the table by a search that returns what it found, and its seconds."""
        for number in (1, 2):
            with threads(number):
                found, seconds = run()
            row[f"qps_{number}"] = len(found) / seconds
        recall = knn_intersection_measure(self.exact, found)
        low = lower_limit(recall, len(found))
        return {"vectors": len(self.rows), "recall": recall, "recall_low": low} | row

    def flat(self) -> dict[str, Any]:
        """The row of a flat index, whose recall is 1 by definition, whatever the queries."""
        size = self.vectors[:1].nbytes * len(self.rows)
        row = {"factory": "Flat", "search": "", "rerank": 0, "bytes": size, "build_seconds": 0.0}
        of_all = (self.vectors, self.rows, self.queries, self.k)
        return self.measure(lambda: search_exactly(*of_all), **row, recall_low=1.0)

    def reranked(self, index: faiss.Index, rerank: int) -> dict[str, Any]:
        """The row of an index as its search parameters are set, without its kind."""

        def timed() -> tuple[np.ndarray, float]:
            start = time.perf_counter()
            found = search_reranked(index, self.vectors, self.rows, self.queries, self.k, rerank)
            return found, time.perf_counter() - start

        return self.measure(timed, rerank=rerank)


def lower_limit(recall: float, queries: int) -> float:
    """The recall that is exceeded with 95 % certainty: Clopper and Pearson's limit.

    ``recall`` is the mean over so many queries. Each query is one trial, as its neighbours are not
    independent. The limit is below 1 even if all were found: 10 of 10 give 0.74.
    """
    hits = recall * queries
    return float(special.betaincinv(hits, queries - hits + 1, 0.05)) if hits > 0 else 0.0


def tune(
    vectors: np.ndarray,
    target_recall: float = 0.99,
    most_bytes: int | None = None,
    *,
    queries: np.ndarray | None = None,
    k: int = 10,
    kinds: Sequence[str] | None = None,
    sample: int = 50_000,
    seed: int = 0,
) -> Tuned:
    """Find the fastest settings that reach a recall within some memory.

    With many vectors all kinds are tried on a sample first, and only the best are built and
    measured with all vectors.

    Args:
        vectors: float32 (n, d) of unit norm; may be memory-mapped.
        target_recall: recall@k to reach with 95 % certainty (:func:`lower_limit`), above 0 and up
            to 1. Only a flat index reaches 1.
        most_bytes: memory that the index may take; any if None. A flat index takes that of all
            vectors, as each search reads them all.
        queries: float32 (q, d) of unit norm; None: up to 1,000 of the vectors, a tenth at most, are
            held out. At least 300 queries are needed to show a recall of 0.99.
        k: neighbours.
        kinds: of index to try beside Flat, for Faiss's ``index_factory``; those that suit n and d
            if None.
        sample: how many vectors are enough to compare kinds of index.
        seed: of the sample and the held-out queries.

    Raises:
        ValueError: a target out of range, fewer than 100 vectors, or vectors or queries that are
            not (n, d), finite and of unit norm.
        TargetUnreachableError: no setting that was tried fits and reaches the target.
    """
    if not 0 < target_recall <= 1:
        raise ValueError(f"target_recall must be above 0 and at most 1, got {target_recall}")
    if len(vectors) < 100:
        raise ValueError(f"{len(vectors)} vectors are too few to tune for: use Flat")
    vectors = checked(vectors, "vectors")
    order = np.random.default_rng(seed).permutation(len(vectors))
    if queries is None:
        held_out = min(1000, len(vectors) // 10)
        queries, order = vectors[np.sort(order[:held_out])], order[held_out:]
    queries = checked(queries, "queries", vectors.shape[1])

    n, d = len(order), vectors.shape[1]
    rows = np.sort(order)
    trial = _Trial(vectors, rows, queries, k, search_exactly(vectors, rows, queries, k)[0])
    tables = [pd.DataFrame([trial.flat()])]
    wanted = None
    if kinds is None:
        kinds = _kinds(n, n, d, most_bytes)
        if n > 2 * sample:
            rows = np.sort(order[:sample])
            exact, _ = search_exactly(vectors, rows, queries, k)
            small = trial._replace(rows=rows, exact=exact)
            tried = _measure_all(small, _kinds(sample, n, d, most_bytes), target_recall)
            kinds, wanted = _by_speed(kinds, tried, target_recall), SHORTLIST
            tables += tried
    # Kinds that reach the target with a sample may miss it with all; then the next ones are built.
    tables += _measure_all(trial, kinds, target_recall, wanted)
    return _choice(pd.concat(tables, ignore_index=True), n, k, target_recall, most_bytes)


def _by_speed(
    kinds: Sequence[str], tables: Sequence[pd.DataFrame], target_recall: float
) -> list[str]:
    """Kinds that reach the target with a sample, the fastest first; if none does, the nearest.

    A kind that misses the target with a sample misses it with more vectors, too.
    """
    speeds = [_fastest([of], target_recall) for of in tables]
    able = [kinds[i] for i in np.argsort(speeds)[::-1] if speeds[i] > 0]
    return able or [kinds[i] for i in np.argsort([-t["recall"].max() for t in tables])[:1]]


def _measure_all(
    trial: _Trial, kinds: Sequence[str], target_recall: float, wanted: int | None = None
) -> list[pd.DataFrame]:
    """Measure kinds of index in turn, until as many as are wanted reach the target."""
    tables: list[pd.DataFrame] = []
    for kind in kinds:
        tables.append(_measure(trial, kind, target_recall, _fastest(tables, target_recall)))
        if sum(_fastest([of], target_recall) > 0 for of in tables) == wanted:
            break
    return tables


def _choice(
    table: pd.DataFrame, n: int, k: int, target_recall: float, most_bytes: int | None
) -> Tuned:
    """Mark what fits, the frontier and the choice among the settings of the full index."""
    table["fits"] = True if most_bytes is None else table["bytes"] <= most_bytes
    of_choice = table[(table["vectors"] == n) & table["fits"]]
    table["frontier"] = table.index.isin(_undominated(of_choice))
    enough = of_choice[of_choice["recall_low"] >= target_recall]
    if enough.empty:
        demand = f"recall@{k} of {target_recall:g} in {most_bytes:,} bytes"
        possible = _best_possible(table[table["vectors"] == n], target_recall)
        raise TargetUnreachableError(f"{demand} is out of reach: {possible}")
    choice = enough["qps_2"].idxmax()
    table["chosen"] = table.index == choice
    row = table.loc[choice]
    return Tuned(IndexSettings(row["factory"], row["search"], int(row["rerank"])), table)


def search_exactly(
    vectors: np.ndarray, rows: np.ndarray, queries: np.ndarray, k: int
) -> tuple[np.ndarray, float]:
    """Compare queries with every vector.

    Args:
        vectors: float32 (n, d), maybe memory-mapped.
        rows: int64 (m,), the vectors to search.
        queries: float32 (q, d).
        k: neighbours, at most m.

    Returns:
        int64 (q, k), places in ``rows``, the nearest first; and the seconds that comparing took,
        without reading the vectors.
    """
    similarities, seconds = np.empty((len(queries), 0), np.float32), 0.0
    places = np.empty((len(queries), 0), np.int64)
    for start in range(0, len(rows), _BLOCK):
        block = vectors[rows[start : start + _BLOCK]]
        begin = time.perf_counter()
        found, at = knn(queries, block, k)
        found, at = np.hstack([similarities, found]), np.hstack([places, at + start])
        similarities, places = nearest_of(found, at, k)
        seconds += time.perf_counter() - begin
    return places, seconds


def search_reranked(
    index: faiss.Index,
    vectors: np.ndarray,
    rows: np.ndarray,
    queries: np.ndarray,
    k: int,
    rerank: int,
) -> np.ndarray:
    """Search a Faiss index, and rank its best results again by exact similarity.

    Args:
        index: of ``vectors[rows]``.
        vectors, rows, queries, k: as for :func:`search_exactly`, C-contiguous.
        rerank: k * rerank results are ranked again; 0 keeps the index's own ranking.

    Returns:
        int64 (q, k), places in ``rows``, the nearest first; -1 where the index found no more.
    """
    _, places = index.search(queries, min(k * max(rerank, 1), len(rows)))
    if not rerank:
        return places
    similarities = similarities_of(queries, vectors, np.where(places < 0, -1, rows[places]))
    similarities[places < 0] = -np.inf
    return nearest_of(similarities, places, k)[1]


def memory_of(index: faiss.Index) -> int:
    """Bytes of an index in a file, which are also those in memory."""
    return faiss.serialize_index(index).nbytes


@contextlib.contextmanager
def threads(number: int) -> Iterator[None]:
    """Limit the threads of Faiss inside the block; a lower limit that was set before stays."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(min(number, before))
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


def list_count(n: int) -> int:
    """Number of lists for an inverted file of n vectors, a power of two."""
    # 4 sqrt(n) balance finding lists and reading them; k-means wants 39 vectors for each list.
    return 2 ** int(np.log2(max(1, min(4 * np.sqrt(n), n / 39))))


def _kinds(n: int, n_full: int, d: int, most_bytes: int | None) -> list[str]:
    """Kinds of index, without Flat, for n vectors of dimension d.

    Kinds in which ``n_full`` vectors would not fit are left out, the same ones whatever n is.
    """
    lists = list_count(n)
    halves = 2 * (d // 4) or 1  # sub-quantizers, of 4 bits: an even number fills its bytes
    kinds = {  # bytes of each vector: its code, and its number or its neighbours
        f"IVF{lists},Flat": 4 * d + 8,
        f"IVF{lists},SQ8": d + 8,
        f"IVF{lists},SQ4": d / 2 + 8,
        # One bit a dimension, and four numbers: Gao and Long, "RaBitQ", SIGMOD 2024.
        f"IVF{lists},RaBitQfs": d / 8 + 24,
        "HNSW32": 4 * d + 272,
    }
    if d % halves == 0 and n >= 624:  # k-means wants 39 vectors for each of its 16 centres
        kinds[f"IVF{lists},PQ{halves}x4fs"] = halves / 2 + 8
    if d >= 128 and n_full >= 1000:
        # The smallest. PCA, since OPQ's rotation would take minutes to learn.
        kinds[f"PCAR128,IVF{lists},PQ64x4fs"] = 32 + 8
    centres = 4 * d * list_count(n_full)  # of the lists
    return [
        kind
        for kind, each in kinds.items()
        if not most_bytes or n_full * each + centres * ("IVF" in kind) <= most_bytes
    ]


def _fastest(tables: Sequence[pd.DataFrame], target_recall: float) -> float:
    """Queries per second of the fastest setting that reaches the target; 0 if none does."""
    reached = [of.loc[of["recall_low"] >= target_recall, "qps_2"] for of in tables]
    return max((float(qps.max()) for qps in reached if len(qps)), default=0.0)


def _measure(
    trial: _Trial, factory: str, target_recall: float, enough: float = 0.0
) -> pd.DataFrame:
    """Build a kind of index, and search with its parameters from the fastest to the best.

    Settings far slower than one of ``enough`` queries per second, which reaches the target, are
    left out.
    """
    start = time.perf_counter()
    index = train_and_add(trial.vectors, IndexSettings(factory), trial.rows)
    build_seconds, size = time.perf_counter() - start, memory_of(index)
    space = _search_space(index)
    rows, before = [], 0.0
    for number in range(space.n_combinations()):
        space.set_index_parameters(index, number)
        recall, first = 0.0, len(rows)
        for rerank in RERANK:
            row = trial.reranked(index, rerank)
            rows.append(row | {"search": space.combination_name(number)})
            gained, recall = row["recall"] - recall, row["recall"]
            if row["recall_low"] >= target_recall:
                enough = max(enough, row["qps_2"])
                break
            if gained < _LITTLE or row["qps_2"] < enough / _FAR_SLOWER:
                break
        # The settings to come, more lists or a wider walk through the graph, are slower still.
        if recall - before < _LITTLE or rows[first]["qps_2"] < enough / _FAR_SLOWER:
            break
        before = recall
    return pd.DataFrame(rows).assign(factory=factory, bytes=size, build_seconds=build_seconds)


def _search_space(index: faiss.Index) -> faiss.ParameterSpace:
    """Search parameters and the values to try: Faiss's own, and one between each two."""
    space = faiss.ParameterSpace()
    space.initialize(index)
    for i in range(space.parameter_ranges.size()):
        found = space.parameter_ranges.at(i)  # a copy
        own = faiss.vector_to_array(found.values)
        between = np.floor((own[1:] + own[:-1]) / 2)
        faiss.copy_array_to_vector(np.union1d(own, between), space.add_range(found.name).values)
    return space


def _undominated(table: pd.DataFrame) -> list[int]:
    """Labels of the rows on the frontier of recall and speed."""
    points = faiss.OperatingPoints()
    for label, recall, qps in table[["recall", "qps_2"]].itertuples():
        points.add(recall, 1 / qps, "", label)
    optimal = (points.optimal_pts.at(i) for i in range(points.optimal_pts.size()))
    return [point.cno for point in optimal if point.perf > 0]  # the first one stands for nothing


def _best_possible(table: pd.DataFrame, target_recall: float) -> str:
    fits = table[table["fits"]]
    flat = table.loc[table["factory"] == "Flat", "bytes"].iloc[0]
    if fits.empty:
        return f"no kind of index is that small, and a flat one takes {flat:,} bytes"
    best = fits.loc[fits["recall_low"].idxmax()]
    more = "; more queries would narrow the bound" if best["recall"] >= target_recall else ""
    return (
        f"the best that fits is {best['recall']:.3f} (at least {best['recall_low']:.3f}, by "
        f"{best['factory']!r} with {best['search']!r} and rerank={best['rerank']}, in "
        f"{best['bytes']:,} bytes){more}; a flat index finds all in {flat:,} bytes"
    )


class Loss(NamedTuple):
    """How far the searches of a compressed kind of index are from the exact ones.

    Attributes:
        factory: for Faiss's ``index_factory``.
        bytes_each: of a photo in memory, without what all photos share.
        recall: share of the truly nearest k that the index finds, from 0 to 1.
        reranked: the same when the first 10 k are ranked again by exact similarity.
        photos: int64 (q, k), the rows that the index finds, without re-ranking.
        found: float32 (q, k), cosines of queries and photos found, as the index has them.
        exact: float32 (q, k), the true ones.
    """

    factory: str
    bytes_each: int
    recall: float
    reranked: float
    photos: np.ndarray
    found: np.ndarray
    exact: np.ndarray


def compression_losses(
    vectors: np.ndarray,
    queries: np.ndarray,
    factories: Sequence[str],
    k: int = 10,
) -> list[Loss]:
    """Measure what kinds of compressed index lose.

    A product quantizer cuts a vector into pieces and keeps for each the number of the nearest of a
    few standard pieces (Jegou, Douze, Schmid, "Product Quantization for Nearest Neighbor Search",
    PAMI 2011); a scalar quantizer rounds each number.

    Args:
        vectors, queries: float32 (n, d) and (q, d) of unit norm, n at least k.
        factories: kinds without lists, such as "SQ8" or "PQ16np"; without "np" a product quantizer
            is also trained for another kind of search, which takes minutes.
        k: neighbours.

    Raises:
        ValueError: a kind that Faiss does not know or that can't be trained with so few vectors.
    """
    vectors = checked(vectors, "vectors")
    queries = checked(queries, "queries", vectors.shape[1])
    rows = np.arange(len(vectors))
    truth, _ = search_exactly(vectors, rows, queries, k)
    losses = []
    for factory in factories:
        index = train_and_add(vectors, IndexSettings(factory))
        found, photos = index.search(queries, k)
        anew = search_reranked(index, vectors, rows, queries, k, rerank=10)
        losses.append(
            Loss(
                factory=factory,
                bytes_each=index.code_size,
                recall=knn_intersection_measure(truth, photos),
                reranked=knn_intersection_measure(truth, anew),
                photos=photos,
                found=found,
                exact=similarities_of(queries, vectors, photos),
            )
        )
    return losses
