"""How much faster than comparing everything is the index that tuning chooses, at what recall?

    python -m benchmarks.search                   # as many photos as Google Landmarks v2 indexes
    python -m benchmarks.search --photos 50000

Searches 762,000 descriptors of 512 dimensions, sampled by :mod:`benchmarks.big_sets`, with 1,000
others:

* flat: Faiss's exact index, in memory;
* tuned: what :func:`lib.studies.index_tuning.tune` chooses for recall@10 of 0.99 in a quarter of
  flat's memory. It re-ranks by vectors in a mapped file, which are stated apart: the system keeps
  in memory what it has room for (here all, as the file has just been written). It is built anew
  after tuning and asked queries that tuning has not seen;
* hnswlib, usearch and autofaiss, those that can be imported and are named by ``--rivals``.

Queries are given all at once ("batch") with 1 and 2 threads, or one after the other ("single", 2
threads). Flat is fastest in batches, which it multiplies as matrices. A ratio always compares like
with like: batch with batch and 2 threads in ``qps_vs_flat``, single with single in
``single_qps_vs_flat``. Prints a table, and as its last line one JSON object.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import time
from collections.abc import Callable

import faiss
import numpy as np
from faiss.contrib.evaluation import knn_intersection_measure

from benchmarks.big_sets import sample_file
from lib.search.kinds import train_and_add
from lib.studies import index_tuning

PHOTOS, QUERIES, K, TARGET, SHARE = 762_000, 1000, 10, 0.99, 0.25
ROUNDS, SINGLE = 3, 100
RIVALS = ("hnswlib", "usearch", "autofaiss")

# A search: float32 (q, d), threads -> int (q, K).
Search = Callable[[np.ndarray, int], np.ndarray]


def of_faiss(search: Callable[[np.ndarray], np.ndarray]) -> Search:
    """Let Faiss use as many threads as are asked for."""

    def with_threads(queries: np.ndarray, number: int) -> np.ndarray:
        with index_tuning.threads(number):
            return search(queries)

    return with_threads


def build_flat(vectors: np.ndarray) -> tuple[Search, int]:
    """The exact index."""
    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(vectors)
    return of_faiss(lambda queries: index.search(queries, K)[1]), vectors.nbytes


def build_hnswlib(vectors: np.ndarray) -> tuple[Search, int]:
    """A graph, in hnswlib's default size; the least ef that reaches the target is found below."""
    import hnswlib

    index = hnswlib.Index("ip", vectors.shape[1])
    index.init_index(len(vectors), M=16, ef_construction=100)
    for start in range(0, len(vectors), 16_384):
        index.add_items(vectors[start : start + 16_384], num_threads=2)

    def search(queries: np.ndarray, number: int) -> np.ndarray:
        return index.knn_query(queries, K, num_threads=number)[0].astype(np.int64)

    search.efforts = [(ef, index.set_ef) for ef in (16, 32, 64, 128, 256, 512)]
    return search, index.index_file_size()


def build_usearch(vectors: np.ndarray) -> tuple[Search, int]:
    """A graph over vectors of 8 bits a number, which is how usearch gets to a quarter."""
    from usearch.index import Index

    index = Index(ndim=vectors.shape[1], metric="ip", dtype="i8", connectivity=16)
    # Its own conversion multiplies by 127: numbers of unit vectors would use a few bits only.
    scale = 127 / np.abs(vectors[:16_384]).max()

    def rounded(block: np.ndarray) -> np.ndarray:
        return np.clip(np.round(scale * block), -127, 127).astype(np.int8)

    for start in range(0, len(vectors), 16_384):
        block = rounded(vectors[start : start + 16_384])
        index.add(np.arange(start, start + len(block)), block, threads=2)

    def search(queries: np.ndarray, number: int) -> np.ndarray:
        keys = np.atleast_2d(index.search(rounded(queries), K, threads=number).keys)
        return keys.astype(np.int64).reshape(len(queries), -1)

    def set_effort(ef: int) -> None:
        index.expansion_search = ef

    search.efforts = [(ef, set_effort) for ef in (16, 32, 64, 128, 256, 512)]
    return search, index.serialized_length


def build_autofaiss(vectors: np.ndarray) -> tuple[Search, int]:
    """What autofaiss chooses for the same memory."""
    import autofaiss

    index, _ = autofaiss.build_index(
        np.asarray(vectors),
        save_on_disk=False,
        metric_type="ip",
        max_index_memory_usage=f"{int(SHARE * vectors.nbytes / 1e6)}MB",
        current_memory_available="4GB",
        nb_cores=2,
        verbose=40,
    )
    return of_faiss(lambda queries: index.search(queries, K)[1]), index_tuning.memory_of(index)


def reach(search: Search, queries: np.ndarray, exact: np.ndarray) -> dict[str, float]:
    """Recall; with the least effort that reaches the target, if there is a choice."""
    for effort, set_effort in getattr(search, "efforts", [(0, None)]):
        if set_effort:
            set_effort(effort)
        recall = knn_intersection_measure(exact, search(queries, 2))
        if recall >= TARGET:
            break
    return {"recall": recall, "effort": effort}


def speed(search: Search, queries: np.ndarray) -> dict[str, float]:
    """Queries per second, in each of three ways to ask."""
    few = queries[:SINGLE]
    ways = {
        "qps_1": (len(queries), lambda: search(queries, 1)),
        "qps_2": (len(queries), lambda: search(queries, 2)),
        "single_qps": (SINGLE, lambda: [search(few[i : i + 1], 2) for i in range(SINGLE)]),
    }
    result = {}
    for way, (count, ask) in ways.items():
        start = time.perf_counter()
        ask()
        result[way] = count / (time.perf_counter() - start)
    return result


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.search")
    parser.add_argument("--photos", type=int, default=PHOTOS)
    parser.add_argument("--rivals", nargs="*", choices=RIVALS, default=RIVALS)
    options = parser.parse_args()
    with sample_file(options.photos + QUERIES) as everything:
        compare(everything[:-QUERIES], np.array(everything[-QUERIES:]), options.rivals)


def compare(vectors: np.ndarray, queries: np.ndarray, rivals: list[str]) -> None:
    """Build and search with each of them."""
    rows = np.arange(len(vectors))
    exact, _ = index_tuning.search_exactly(vectors, rows, queries, K)
    start = time.perf_counter()
    most = int(SHARE * vectors.nbytes)
    settings, table = index_tuning.tune(vectors, TARGET, most)
    tuning_seconds = time.perf_counter() - start
    front = table[table["frontier"]].drop(columns=["fits", "frontier"])
    print(front.to_string(float_format=lambda value: f"{value:.4g}"))

    def build_tuned(vectors: np.ndarray) -> tuple[Search, int]:
        index = train_and_add(vectors, settings)

        def search(queries: np.ndarray) -> np.ndarray:
            return index_tuning.search_reranked(index, vectors, rows, queries, K, settings.rerank)

        return of_faiss(search), index_tuning.memory_of(index)

    builders = {"flat": build_flat, "tuned": build_tuned}
    of_rivals = {"hnswlib": build_hnswlib, "usearch": build_usearch, "autofaiss": build_autofaiss}
    for name in rivals:
        if importlib.util.find_spec(name):
            builders[name] = of_rivals[name]
        else:
            print(f"{name} is not installed: left out")

    print(f"\n{len(vectors):,} x {vectors.shape[1]}, {settings}, tuned in {tuning_seconds:.0f} s")
    searches, results = {}, {}
    for name, builder in builders.items():
        start = time.perf_counter()
        try:
            searches[name], size = builder(vectors)
        except Exception as error:
            if name not in of_rivals:
                raise
            print(f"{name} fails: {type(error).__name__}: {error}", flush=True)
            continue
        built = {"build_seconds": time.perf_counter() - start, "bytes": size}
        results[name] = built | reach(searches[name], queries, exact)
        print(f"{name}: {results[name]}", flush=True)
    # In turns, so that whatever else the machine does is the same for all.
    rounds = [{name: speed(of, queries) for name, of in searches.items()} for _ in range(ROUNDS)]
    heads = ("recall@10", "batch QPS 1", "batch QPS 2", "single QPS", "build s", "MB")
    print(f"{'':<10}" + "".join(f"{head:>13}" for head in heads))
    for name, one in results.items():
        one |= {way: float(np.median([of[name][way] for of in rounds])) for way in rounds[0][name]}
        print(
            f"{name:<10}{one['recall']:13.4f}{one['qps_1']:13.1f}{one['qps_2']:13.1f}"
            f"{one['single_qps']:13.1f}{one['build_seconds']:13.1f}{one['bytes'] / 1e6:13.1f}"
        )
    flat, tuned = results["flat"], results["tuned"]
    summary = {
        "recall_at_10": round(tuned["recall"], 4),
        "qps_vs_flat": round(tuned["qps_2"] / flat["qps_2"], 2),
        "single_qps_vs_flat": round(tuned["single_qps"] / flat["single_qps"], 2),
        "memory_vs_flat": round(tuned["bytes"] / flat["bytes"], 4),
        "mapped_bytes": vectors.nbytes if settings.rerank else 0,
        "factory": settings.factory,
        "search": settings.search,
        "rerank": settings.rerank,
        "tuning_seconds": round(tuning_seconds, 1),
        "all": {
            name: {key: round(value, 4) for key, value in of.items()}
            for name, of in results.items()
        },
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
