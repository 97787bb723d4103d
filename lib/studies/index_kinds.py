"""Measures kinds of Faiss index side by side: what each finds, its time, and all its memory.

kinds = {"flat": (flat, "", [0]), "IVF": (ivf, "nprobe", [1, 4, 16])}
table = measure_kinds(kinds, queries, exact)    # a row for each kind and setting
chosen = fastest_of_each(table, target_recall=0.99)
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import faiss
import numpy as np
import pandas as pd
from faiss.contrib.evaluation import knn_intersection_measure

from lib.search.kinds import set_search
from lib.studies.index_tuning import memory_of, threads

PARTS = ("vectors", "codes", "links", "numbers", "learned", "rest")  # of an index's memory


def memory_parts(index: faiss.Index) -> dict[str, int]:
    """Bytes of an index by what they hold; their sum is that of the index in a file.

    Returns:
        ``vectors``: as they came, 4 bytes for each number; ``codes``: compressed vectors;
        ``links``: a graph's, with the place of each photo's links; ``numbers``: which photos a
        list holds; ``learned``: centres of lists, standard pieces, ranges, rotations; ``rest``:
        what fills up blocks of codes, and a few bytes of settings.
    """
    parts = Counter(dict.fromkeys(PARTS, 0)) + _parts(index)
    return {part: parts[part] for part in PARTS} | {
        "rest": memory_of(index) - sum(parts.values()),
    }


def _parts(index: faiss.Index) -> Counter:
    """The parts that can be counted, by the kind of index; an unknown kind has none."""
    index = faiss.downcast_index(index)
    kept = index.ntotal * getattr(index, "code_size", 0)
    match index:
        case faiss.IndexPreTransform():
            chain = [faiss.downcast_VectorTransform(t) for t in _items(index.chain)]
            sizes = [t.A.size() + t.b.size() for t in chain if hasattr(t, "A")]
            return Counter(learned=4 * sum(sizes)) + _parts(index.index)
        case faiss.IndexRefine():
            return _parts(index.base_index) + _parts(index.refine_index)
        case faiss.IndexHNSW():
            graph = index.hnsw
            sizes = 4 * graph.neighbors.size() + 8 * graph.offsets.size() + 4 * graph.levels.size()
            return Counter(links=sizes) + _parts(index.storage)
        case faiss.IndexIVF():
            centres = sum(_parts(index.quantizer).values())
            kind = "vectors" if isinstance(index, faiss.IndexIVFFlat) else "codes"
            own = Counter({kind: kept, "numbers": 8 * index.ntotal})
            return own + Counter(learned=centres + _learned(index))
        case faiss.IndexFlat():
            return Counter(vectors=kept)
    return Counter(codes=kept, learned=_learned(index))


def _items(vector) -> list:
    return [vector.at(i) for i in range(vector.size())]


def _learned(index: faiss.Index) -> int:
    """Bytes of the standard pieces of a product quantizer, or of a scalar one's ranges."""
    pieces = index.pq.centroids.size() if hasattr(index, "pq") else 0
    ranges = index.sq.trained.size() if hasattr(index, "sq") else 0
    return 4 * (pieces + ranges)


def time_search(
    search: Callable[[np.ndarray], Any], queries: np.ndarray, singly: int = 100
) -> tuple[Any, float, float]:
    """Search with all queries at once, and with some of them one by one, on one core.

    (For a single query the threads of several cores cost more than they save.)

    Returns:
        what was found for all; milliseconds per query of all at once; and of a single query, the
        median.
    """
    with threads(1):
        start = time.perf_counter()
        found = search(queries)
        at_once, singles = time.perf_counter() - start, []
        for query in queries[:singly]:
            start = time.perf_counter()
            search(query[None])
            singles.append(time.perf_counter() - start)
    return found, 1000 * at_once / len(queries), 1000 * float(np.median(singles))


def measure_kinds(
    kinds: Mapping[str, tuple[faiss.Index, str, Sequence[float]]],
    queries: np.ndarray,
    exact: np.ndarray,
    one_by_one: int = 100,
) -> pd.DataFrame:
    """Search with each setting of each index.

    Args:
        kinds: name -> index, the name of a parameter of its search for Faiss's ``ParameterSpace``
            ("" for none), and the values to try.
        queries: float32 (q, d).
        exact: int64 (q, k), the photos truly nearest.
        one_by_one: of the queries, how many are also asked singly, as a person does.

    Returns:
        a row for each: ``kind``, ``setting``, ``recall`` (share of the exact ones found), ``ms``
        (of a single query, the median), ``ms_at_once`` (of a query, if all are asked together),
        and bytes: ``PARTS`` and ``total``.
    """
    rows, k = [], exact.shape[1]
    for kind, (index, parameter, values) in kinds.items():
        memory = memory_parts(index)
        for value in values:
            setting = f"{parameter}={value}" if parameter else ""
            set_search(index, setting)
            (_, found), at_once, single = time_search(
                lambda some, index=index: index.search(some, k), queries, one_by_one
            )
            rows.append(
                {"kind": kind, "setting": setting}
                | {"recall": knn_intersection_measure(exact, found)}
                | {"ms": single, "ms_at_once": at_once}
                | memory
                | {"total": sum(memory.values())}
            )
    return pd.DataFrame(rows)


def fastest_of_each(table: pd.DataFrame, target_recall: float) -> pd.DataFrame:
    """For each kind the fastest setting that reaches a recall, or else the one that finds most."""
    chosen = []
    for _, rows in table.groupby("kind", sort=False):
        enough = rows[rows["recall"] >= target_recall]
        chosen.append(enough["ms"].idxmin() if len(enough) else rows["recall"].idxmax())
    return table.loc[chosen].set_index("kind")
