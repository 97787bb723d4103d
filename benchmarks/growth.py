"""How do building, searching and memory grow with the number of photos?

    python -m benchmarks.growth                           # 10,000 to 1,000,000 descriptors
    python -m benchmarks.growth --kind IVF2048,RaBitQfs   # what is tuned for 762,000
    python -m benchmarks.growth --most 100000 --name growth_small

Descriptors are sampled by :mod:`benchmarks.big_sets`. The kind of index is what
:func:`lib.studies.index_tuning.tune` chooses for 100,000 of them (or all, if there are fewer), for
recall@10 of 0.99 in a quarter of flat's memory. At each size that kind is built with lists as they
suit the size, and the fastest search that still reaches the recall is found. Queries are 500
others, given all at once to one thread.

A cost that grows like n^a is a straight line of slope a on logarithmic axes: exponents are fitted
by least squares, with the standard error of the slope. Writes results/<name>.json and .png, and
prints a table and the JSON, without its rows, in the last line.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import time

os.environ.setdefault("MPLBACKEND", "agg")

import faiss
import numpy as np
import pandas as pd
from scipy.stats import linregress

from benchmarks.big_sets import sample_file
from lib.files import project_root, write_json
from lib.plots import set_style
from lib.studies.figures import COSTS, plot_growth
from lib.studies.index_tuning import list_count, tune

LEAST, MOST, STEPS, QUERIES, TARGET, SHARE = 10_000, 1_000_000, 5, 500, 0.99, 0.25
TUNED_AT = 100_000


def measure(vectors: np.ndarray, queries: np.ndarray, kind: str) -> list[dict]:
    """Costs of flat and of the tuned kind for some vectors, float32 (n, d)."""
    n = len(vectors)
    start = time.perf_counter()
    flat = faiss.IndexFlatIP(vectors.shape[1])
    flat.add(vectors)
    flat_seconds = time.perf_counter() - start
    del flat
    factory = re.sub(r"IVF\d+", f"IVF{list_count(n)}", kind)
    most = int(SHARE * vectors.nbytes)
    table = tune(vectors, TARGET, most, queries=queries, kinds=[factory]).frontier
    rows = []
    for side, row in (
        ("flat", table[table["factory"] == "Flat"].iloc[0]),
        ("tuned", table[table["chosen"]].iloc[0]),
    ):
        rows.append(
            {
                "side": side,
                "photos": n,
                "factory": row["factory"],
                "search": row["search"],
                "rerank": int(row["rerank"]),
                "recall": float(row["recall"]),
                "build_seconds": flat_seconds if side == "flat" else float(row["build_seconds"]),
                "query_ms": 1000 / float(row["qps_1"]),
                "bytes": int(row["bytes"]),
                "mapped_bytes": vectors.nbytes if row["rerank"] else 0,
            }
        )
    return rows


def exponents(table: pd.DataFrame) -> dict[str, dict[str, dict[str, float]]]:
    """Side -> cost -> slope of the line through (log n, log cost), its standard error, and factor.

    Args:
        table: columns ``side``, ``photos`` and the costs.
    """
    result = {}
    for side, rows in table.groupby("side"):
        result[side] = {}
        for cost in COSTS:
            line = linregress(np.log(rows["photos"]), np.log(rows[cost]))
            result[side][cost] = {
                "exponent": round(float(line.slope), 3),
                "error": round(float(line.stderr), 3),
                "factor": float(np.exp(line.intercept)),
            }
    return result


def main() -> None:
    """Measure, draw, write and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.growth")
    parser.add_argument("--most", type=int, default=MOST, help="photos in the last step")
    parser.add_argument("--kind", default="", help="of index, in place of the tuned one")
    parser.add_argument("--name", default="growth", help="of the files in results/")
    options = parser.parse_args()
    sizes = np.geomspace(LEAST, options.most, STEPS).round().astype(int)
    with sample_file(options.most + QUERIES) as vectors:
        report(vectors[:-QUERIES], np.array(vectors[-QUERIES:]), sizes, options)


def report(
    vectors: np.ndarray, queries: np.ndarray, sizes: np.ndarray, options: argparse.Namespace
) -> None:
    """Measure at each size."""
    some, kind = vectors[:TUNED_AT], options.kind
    if not kind:
        kind = tune(some, TARGET, int(SHARE * some.nbytes)).settings.factory
    print("kind of index:", kind, flush=True)
    rows = []
    for n in sizes.tolist():
        rows += measure(vectors[:n], queries, kind)
        print(pd.DataFrame(rows[-2:]).to_string(header=n == sizes[0], index=False), flush=True)
    table = pd.DataFrame(rows)
    fits = exponents(table)
    results = project_root() / "benchmarks" / "results"
    set_style()
    plot_growth(table, fits, save=results / f"{options.name}.png")
    summary = {"target_recall": TARGET, "memory_share": SHARE, "kind": kind, "exponents": fits}
    write_json(results / f"{options.name}.json", summary | {"rows": rows})
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
