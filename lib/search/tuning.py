"""Which kind of index, and which search: the fastest that finds enough within so much memory.

    settings, table = tune(embeddings, target_recall=0.99, most_bytes=400_000_000)
    index = PhotoIndex.build(embeddings, names, fingerprint(tower), settings)

"Enough" is the recall of approximate search: of the k photos truly nearest to a query, the share
among the k that were found. It is measured with queries that the index has never seen. Which
parameters a kind of index has and which values are worth a try, Faiss's ``ParameterSpace`` knows;
its ``OperatingPoints`` keep those that nothing else beats in both recall and time.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import faiss
import numpy as np
import pandas as pd

from lib.search.exact import nearest_of, similarities_of
from lib.search.kinds import IndexSettings, train_and_add

RERANK = (0, 2, 5, 10, 14, 20, 28, 40, 80)  # factors that are tried
SHORTLIST = 2  # kinds that must reach the target with all vectors, when a sample chose them
_BLOCK = 16_384  # rows that are handled together
_LITTLE = 0.001  # recall that is not worth more time
_FAR_SLOWER = 3  # times slower than what has reached the target: not tried any further
_SURE = 1.645  # standard errors: one-sided 95 %


class TargetUnreachableError(ValueError):
    """No kind of index finds enough in so little memory; the message says what is possible."""


class Tuned(NamedTuple):
    """What :func:`tune` has found.

    Attributes:
        settings: of the choice.
        frontier: a row for each setting that was measured, by kind and recall. ``factory``,
            ``search``, ``rerank``: as in :class:`lib.search.photo_index.IndexSettings`;
            ``vectors``: how many were in the index, fewer than all in a first round; ``recall``:
            mean over the queries, and ``recall_low``, its lower limit (95 % sure); ``qps_1``,
            ``qps_2``: queries per second, all of them given at once, with 1 and 2 threads;
            ``bytes``: of the index in memory; ``mapped_bytes``: of the vectors that re-ranking
            reads here and there from a mapped file, 0 without; ``build_seconds``; ``fits``: within
            the memory allowed; ``frontier``: True where no other setting of the full index that
            fits is better in one of recall and ``qps_2`` and as good in the other; ``chosen``: True
            in one row.
    """

    settings: IndexSettings
    frontier: pd.DataFrame


@dataclass(frozen=True)
class _Trial:
    """Vectors to index, and queries with the truth about them.

    Attributes:
        vectors: float32 (n, d), maybe mapped.
        rows: int64 (m,), those of them that are in the index.
        queries: float32 (q, d).
        exact: int64 (q, k), places in ``rows`` of the nearest.
    """

    vectors: np.ndarray
    rows: np.ndarray
    queries: np.ndarray
    exact: np.ndarray

    @classmethod
    def of(
        cls, vectors: np.ndarray, rows: np.ndarray, queries: np.ndarray, k: int
    ) -> tuple[_Trial, pd.DataFrame]:
        """Find the truth; and the row of a table that tells how fast a flat index does."""
        seconds = {}
        for number in (1, 2):
            with threads(number):
                exact, seconds[number] = search_exactly(vectors, rows, queries, k)
        trial = cls(vectors, rows, queries, exact)
        row = trial._row(np.ones(len(queries)), seconds, 0)
        size = len(rows) * vectors.shape[1] * vectors.itemsize
        kind = {"factory": "Flat", "search": "", "rerank": 0, "bytes": size, "build_seconds": 0.0}
        return trial, pd.DataFrame([row | kind])

    def row(self, index: faiss.Index, rerank: int) -> dict:
        """Search an index, and tell how good and how fast it is."""
        seconds, k = {}, self.exact.shape[1]
        for number in (1, 2):
            with threads(number):
                start = time.perf_counter()
                found = search_reranked(index, self.vectors, self.rows, self.queries, k, rerank)
                seconds[number] = time.perf_counter() - start
        return self._row(shares_found(self.exact, found), seconds, rerank)

    def _row(self, shares: np.ndarray, seconds: dict[int, float], rerank: int) -> dict:
        mapped = len(self.rows) * self.vectors.shape[1] * self.vectors.itemsize if rerank else 0
        error = shares.std() / np.sqrt(len(shares))
        return {
            "vectors": len(self.rows),
            "recall": shares.mean(),
            "recall_low": shares.mean() - _SURE * error,
            "qps_1": len(shares) / seconds[1],
            "qps_2": len(shares) / seconds[2],
            "mapped_bytes": mapped,
        }


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

    With many vectors, all kinds are tried on a sample of them first, and the best are built with
    all: what is chosen is measured on the full index.

    Args:
        vectors: float32 (n, d) of unit norm; may be memory-mapped.
        target_recall: recall@k that must be reached, above 0 and up to 1, with 95 % certainty given
            the number of queries.
        most_bytes: memory that the index may take; any if None. A flat index takes all vectors, as
            each search reads them all.
        queries: float32 (q, d); None: up to 1,000 of the vectors, a tenth at most, are held out.
        k: neighbours.
        kinds: of index to try beside Flat, for Faiss's ``index_factory``; those that suit n and d
            if None.
        sample: how many vectors are enough to compare kinds of index.
        seed: of what is drawn.

    Raises:
        ValueError: a target outside its range, or fewer than 100 vectors.
        TargetUnreachableError: no setting that was tried fits and reaches the target.
    """
    if not 0 < target_recall <= 1:
        raise ValueError(f"target_recall must be above 0 and at most 1, got {target_recall}")
    if len(vectors) < 100:
        raise ValueError(f"{len(vectors)} vectors are too few to tune for: use Flat")
    vectors = np.ascontiguousarray(vectors, np.float32)  # not copied if it is that already
    order = np.random.default_rng(seed).permutation(len(vectors))
    if queries is None:
        held_out = min(1000, len(vectors) // 10)
        queries, order = vectors[np.sort(order[:held_out])], order[held_out:]
    queries = np.ascontiguousarray(queries, np.float32)
    n, d = len(order), vectors.shape[1]

    tables = []
    by_sample = kinds is None and n > 2 * sample
    kinds = _kinds(n, n, d, most_bytes) if kinds is None else list(kinds)
    wanted = len(kinds)
    if by_sample:
        wanted = SHORTLIST
        trial = _Trial.of(vectors, np.sort(order[:sample]), queries, k)[0]
        for kind in _kinds(sample, n, d, most_bytes):
            tables.append(_measure(trial, kind, target_recall, _fastest(tables, target_recall)))
        fastest = [_fastest([of], target_recall) for of in tables]
        # A kind that does not get there with a sample won't with more neighbours to confuse.
        able = [kinds[i] for i in np.argsort(-np.array(fastest)) if fastest[i] > 0]
        # If none does, the most able one tells what is possible.
        most_able = np.argsort([-t["recall"].max() for t in tables])[:1]
        kinds = able or [kinds[i] for i in most_able]
    trial, flat = _Trial.of(vectors, np.sort(order), queries, k)
    tables.append(flat)
    full = []
    for kind in kinds:
        # Some that got there with a sample may not any more: the next ones take their turn.
        full.append(_measure(trial, kind, target_recall, _fastest(full, target_recall)))
        wanted -= _fastest(full[-1:], target_recall) > 0
        if not wanted:
            break
    tables += full
    table = pd.concat(tables, ignore_index=True)
    table["fits"] = True if most_bytes is None else table["bytes"] <= most_bytes
    of_choice = table[(table["vectors"] == n) & table["fits"]]
    table["frontier"] = table.index.isin(_undominated(of_choice))

    enough = of_choice[of_choice["recall_low"] >= target_recall]
    if enough.empty:
        demand = f"recall@{k} of {target_recall:g} in {most_bytes:,} bytes"
        possible = _best_possible(table[table["vectors"] == n])
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
        vectors: float32 (n, d), maybe mapped.
        rows: int64 (m,), which of them to search.
        queries: float32 (q, d).
        k: neighbours, at most m.

    Returns:
        int64 (q, k), places in ``rows``, the nearest first; and the seconds that comparing took,
        without reading the vectors.
    """
    similarities = np.empty((len(queries), 0), np.float32)
    places = np.empty((len(queries), 0), np.int64)
    seconds = 0.0
    for start in range(0, len(rows), _BLOCK):
        block = vectors[rows[start : start + _BLOCK]]
        begin = time.perf_counter()
        found, at = faiss.knn(queries, block, min(k, len(block)), metric=faiss.METRIC_INNER_PRODUCT)
        similarities = np.concatenate([similarities, found], axis=1)
        places = np.concatenate([places, at + start], axis=1)
        similarities, places = nearest_of(similarities, places, k)
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
    """Search a Faiss index, and rank the best of its results exactly.

    Args:
        index: of ``vectors[rows]``.
        vectors: float32 (n, d), C-contiguous, maybe mapped.
        rows: int64 (m,).
        queries: float32 (q, d), C-contiguous.
        k: neighbours.
        rerank: k * rerank results are ranked anew; 0 keeps the index's own ranking.

    Returns:
        int64 (q, k), places in ``rows``, the nearest first; -1 where the index found no more.
    """
    _, places = index.search(queries, min(k * max(rerank, 1), len(rows)))
    if not rerank:
        return places
    similarities = similarities_of(queries, vectors, np.where(places < 0, -1, rows[places]))
    similarities[places < 0] = -np.inf
    return nearest_of(similarities, places, k)[1]


def shares_found(exact: np.ndarray, found: np.ndarray) -> np.ndarray:
    """Recall of each query: int (q, k) and int (q, k) -> float64 (q,) from 0 to 1."""
    if len(exact) != len(found):
        raise ValueError(f"{len(exact)} queries have an answer to compare with, {len(found)} one")
    return (exact[:, :, None] == found[:, None, :]).any(axis=2).mean(axis=1)


def memory_of(index: faiss.Index) -> int:
    """Bytes of an index as it is written to a file, which is what it takes once it is loaded."""
    written = 0

    def count(part: bytes) -> int:
        nonlocal written
        written += len(part)
        return len(part)

    faiss.write_index(index, faiss.PyCallbackIOWriter(count))
    return written


@contextlib.contextmanager
def threads(number: int) -> Iterator[None]:
    """Let Faiss use so many threads inside the block, or as many as it was allowed if fewer."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(min(number, before))
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


def list_count(n: int) -> int:
    """How many lists an inverted file of n vectors should have, a power of two."""
    # About 4 sqrt(n) balance finding lists and reading them; k-means wants 39 vectors each.
    return 2 ** int(np.log2(max(1, min(4 * np.sqrt(n), n / 39))))


def _kinds(n: int, n_full: int, d: int, most_bytes: int | None) -> list[str]:
    """Kinds of index but Flat that suit n vectors of dimension d, the same ones for each n.

    Left out are those that would not fit when ``n_full`` vectors are in them.
    """
    lists = list_count(n)
    halves = 2 * (d // 4) or 1  # sub-quantizers, of 4 bits: an even number fills its bytes
    kinds = {  # bytes for each vector: its code, and its number or its neighbours
        f"IVF{lists},Flat": 4 * d + 8,
        f"IVF{lists},SQ8": d + 8,
        f"IVF{lists},SQ4": d / 2 + 8,
        # One bit a dimension, and four numbers: Gao and Long, "RaBitQ", SIGMOD 2024.
        f"IVF{lists},RaBitQfs": d / 8 + 24,
        "HNSW32": 4 * d + 272,
    }
    if d % halves == 0:
        kinds[f"IVF{lists},PQ{halves}x4fs"] = halves / 2 + 8
    if d >= 128 and n_full >= 1000:
        # The very small one. OPQ's rotation would take minutes to learn in many dimensions.
        kinds[f"PCAR128,IVF{lists},PQ64x4fs"] = 32 + 8
    return [kind for kind, each in kinds.items() if not most_bytes or n_full * each <= most_bytes]


def _fastest(tables: Sequence[pd.DataFrame], target_recall: float) -> float:
    """Queries per second of the fastest setting that reaches the target; 0 if none does."""
    reached = [of.loc[of["recall_low"] >= target_recall, "qps_2"] for of in tables]
    return max((float(qps.max()) for qps in reached if len(qps)), default=0.0)


def _measure(
    trial: _Trial, factory: str, target_recall: float, enough: float = 0.0
) -> pd.DataFrame:
    """Build a kind of index, and search with its parameters from the fastest to the best.

    Settings far slower than ``enough``, the queries per second with which the target has been
    reached, are left out.
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
            row = trial.row(index, rerank)
            rows.append(row | {"search": space.combination_name(number), "rerank": rerank})
            gained, recall = row["recall"] - recall, row["recall"]
            # More candidates than are needed only cost time.
            if row["recall_low"] >= target_recall:
                enough = max(enough, row["qps_2"])
                break
            if gained < _LITTLE or row["qps_2"] < enough / _FAR_SLOWER:
                break
        # So do more lists, or a wider walk through the graph; those to come are slower still.
        if recall - before < _LITTLE or rows[first]["qps_2"] < enough / _FAR_SLOWER:
            break
        before = recall
    table = pd.DataFrame(rows)
    return table.assign(factory=factory, bytes=size, build_seconds=build_seconds)


def _search_space(index: faiss.Index) -> faiss.ParameterSpace:
    """The parameters of a search, and the values to try: Faiss's own, and one between each two."""
    space = faiss.ParameterSpace()
    space.initialize(index)
    for i in range(space.parameter_ranges.size()):
        found = space.parameter_ranges.at(i)  # a copy
        own = faiss.vector_to_array(found.values)
        between = np.floor((own[1:] + own[:-1]) / 2)
        faiss.copy_array_to_vector(np.union1d(own, between), space.add_range(found.name).values)
    return space


def _undominated(table: pd.DataFrame) -> list[int]:
    """Labels of the rows that no other one beats in both recall and speed."""
    points = faiss.OperatingPoints()
    for label, recall, qps in table[["recall", "qps_2"]].itertuples():
        points.add(recall, 1 / qps, "", label)
    optimal = (points.optimal_pts.at(i) for i in range(points.optimal_pts.size()))
    return [point.cno for point in optimal if point.perf > 0]  # the first one stands for nothing


def _best_possible(table: pd.DataFrame) -> str:
    fits = table[table["fits"]]
    flat = table.loc[table["factory"] == "Flat", "bytes"].iloc[0]
    if fits.empty:
        return f"no kind of index is that small, and a flat one takes {flat:,} bytes"
    best = fits.loc[fits["recall_low"].idxmax()]
    return (
        f"the best that fits is {best['recall']:.3f} (at least {best['recall_low']:.3f}, by "
        f"{best['factory']!r} with {best['search']!r} and rerank={best['rerank']}, in "
        f"{best['bytes']:,} bytes); a flat index finds all in {flat:,} bytes"
    )
