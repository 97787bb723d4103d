"""How fast are 5,000 rankings of 100,000 photos evaluated, and in how much memory?

    python -m benchmarks.evaluation

Writes random rankings to a temporary file of 2 GB (5,000 x 100,000 int32), with 1 to 100 positives
and up to 50 junk photos for each query, and evaluates them by the protocol of the revisited Oxford
and Paris benchmarks:

* ours: :func:`lib.evaluation.metrics.query_table` on the memory-mapped file;
* naive: a plain Python loop down each ranking, for some of the queries. It must come to the same
  numbers; its rate does not change, so the time of all queries is extrapolated;
* scikit-learn: ``average_precision_score`` for the same queries, ``np.isin`` having taken out the
  junk: one of the four measures, and without trapezoids.

They take turns, so that whatever else the machine does disturbs them alike. Prints a table, and as
its last line one JSON object with ``vs_naive`` and ``vs_sklearn``: how many times as fast ours is.
Memory is that of this process with all three: the most that was resident, and the most that it had
taken for itself, without the pages of the mapped file, which leave when their room is needed (known
on Linux alone).
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.metrics import average_precision_score

from benchmarks.memory import OwnMemory, memory_gb
from lib.evaluation.ground_truth import GroundTruth
from lib.evaluation.metrics import REVISITED, query_table

PARTS = 5  # of our queries, with some of the others' after each


def write_rankings(path: Path, queries: int, photos: int, rng: np.random.Generator) -> np.ndarray:
    """A memory-mapped file, int32 (queries, photos), written a few rows at a time."""
    rows = np.tile(np.arange(photos, dtype=np.int32), (20, 1))
    with path.open("wb") as file:
        for start in range(0, queries, len(rows)):
            rng.permuted(rows, axis=1)[: queries - start].tofile(file)
    return np.memmap(path, np.int32, "r", shape=(queries, photos))


def make_truth(queries: range, photos: int, rng: np.random.Generator) -> GroundTruth:
    """Positives and junk that have nothing in common."""
    positives, junk = [], []
    for _ in queries:
        drawn, n = rng.choice(photos, size=150, replace=False), rng.integers(1, 101)
        positives.append(drawn[:n])
        junk.append(drawn[n : n + rng.integers(51)])
    names = [f"query {i}" for i in queries]
    return GroundTruth(names, [f"photo {i}" for i in range(photos)], positives, junk)


def naive(ranking: np.ndarray, positives: np.ndarray, junk: np.ndarray) -> list[float]:
    """The revisited protocol's measures of one query, by walking down its ranking."""
    positives, junk = set(positives.tolist()), set(junk.tolist())
    found, rank, area, before, hits_at = 0, 0, 0.0, 1.0, []
    for photo in ranking.tolist():
        if photo in junk:
            continue
        rank += 1
        if photo in positives:
            found += 1
            hits_at.append(rank)
            area += (before + found / rank) / 2
        before = found / rank
    depths = [min(k, hits_at[-1]) for k in (1, 5, 10)]
    precisions = [sum(rank <= depth for rank in hits_at) / depth for depth in depths]
    return [area / len(positives), *precisions]


def sklearn_ap(ranking: np.ndarray, positives: np.ndarray, junk: np.ndarray) -> float:
    """Average precision of one query, by scikit-learn."""
    kept = ranking[~np.isin(ranking, junk)]
    return average_precision_score(np.isin(kept, positives), -np.arange(len(kept)))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evaluation")
    parser.add_argument("--queries", type=int, default=5000)
    parser.add_argument("--photos", type=int, default=100_000)
    parser.add_argument("--sample", type=int, default=50, help="queries of the others")
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    own = OwnMemory()
    own.start()

    seconds = {"ours": 0.0, "naive": 0.0, "scikit-learn": 0.0}
    tables, expected = [], []
    with tempfile.TemporaryDirectory(prefix="rankings-") as folder:
        ranks = write_rankings(Path(folder) / "ranks", options.queries, options.photos, rng)
        for part in np.array_split(np.arange(options.queries), PARTS):
            rows = slice(part[0], part[-1] + 1)
            truth = make_truth(range(rows.start, rows.stop), options.photos, rng)
            start = time.perf_counter()
            tables.append(query_table(ranks[rows], truth, REVISITED))
            seconds["ours"] += time.perf_counter() - start

            some = range(options.sample // PARTS)
            queries = [(ranks[rows.start + i], truth.positives[i], truth.junk[i]) for i in some]
            start = time.perf_counter()
            values = [naive(*query) for query in queries]
            seconds["naive"] += time.perf_counter() - start
            expected.append(pd.DataFrame(values, truth.queries[: len(some)], list(REVISITED)))
            start = time.perf_counter()
            for query in queries:
                sklearn_ap(*query)
            seconds["scikit-learn"] += time.perf_counter() - start
        del ranks, queries

    table, expected = pd.concat(tables), pd.concat(expected)
    np.testing.assert_allclose(table.loc[expected.index, list(REVISITED)], expected, atol=1e-12)
    rates = {side: len(expected) / seconds[side] for side in ("naive", "scikit-learn")}
    rates = {"ours": options.queries / seconds["ours"]} | rates
    peak = memory_gb("VmHWM")
    print(
        f"\n{options.queries:,} rankings of {options.photos:,} photos, the others measured on "
        f"{len(expected)} of them\n\n{'':<12} queries/s   seconds for all"
    )
    for side, rate in rates.items():
        print(f"{side:<12} {rate:9.0f}   {options.queries / rate:15.1f}")
    print(f"memory: peak {peak:.2f} GB, own {own.most:.2f} GB\n")
    result = {
        "vs_naive": round(rates["ours"] / rates["naive"], 1),
        "vs_sklearn": round(rates["ours"] / rates["scikit-learn"], 1),
        "seconds": round(seconds["ours"], 2),
        "queries": options.queries,
        "photos": options.photos,
        "memory_peak_gb": round(peak, 2),
        "memory_own_gb": round(own.most, 2),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
