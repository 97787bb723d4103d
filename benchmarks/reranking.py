"""What each way to re-rank costs on galleries of several sizes.

    python -m benchmarks.reranking

Made-up descriptors of 128 dimensions, ten photos for each landmark, which differ along a few
directions of its own; 100 queries. For each method and gallery: seconds to prepare the gallery,
milliseconds per query, searching included, and the peak of memory that numpy and scipy had to ask
for meanwhile (tracemalloc). The mAP shows only that the methods do what they should: how much they
help depends on the data, see ``benchmarks/postprocessing.py``.

Prints a table and, as its last line, one JSON object: milliseconds per query by method in the
largest gallery.
"""

from __future__ import annotations

import argparse
import json
import time
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd

from lib.evaluation.metrics import average_precision
from lib.search.rerank import (
    augment_gallery,
    encode_reciprocal,
    expand_queries,
    neighbour_graph,
    rerank_diffusion,
    rerank_k_reciprocal,
    rerank_superglobal,
)

DIMENSION, PHOTOS, QUERIES = 128, 10, 100

# Once per gallery, and per query.
METHODS: dict[str, tuple[Callable, Callable]] = {
    "none": (lambda g: None, lambda q, g, _: q @ g.T),
    "query expansion": (lambda g: None, lambda q, g, _: expand_queries(q, g, k=5) @ g.T),
    "database augmentation": (lambda g: augment_gallery(g, k=5), lambda q, g, new: q @ new.T),
    "k-reciprocal": (encode_reciprocal, rerank_k_reciprocal),
    "diffusion": (neighbour_graph, rerank_diffusion),
    "SuperGlobal": (lambda g: None, lambda q, g, _: rerank_superglobal(q, g)),
}


def make_descriptors(photos: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Descriptors float32 (photos, d) of unit norm, and their landmarks."""
    rng = np.random.default_rng(seed)
    landmarks = -(-photos // PHOTOS)
    labels = np.repeat(np.arange(landmarks), PHOTOS)[:photos]
    centre = rng.normal(size=(landmarks, DIMENSION))
    along = rng.normal(size=(landmarks, DIMENSION))
    x = centre[labels] + along[labels] * rng.uniform(-2, 2, (photos, 1))
    x += rng.normal(size=x.shape)
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32), labels


def measure(prepare: Callable, score: Callable, queries, gallery) -> tuple[np.ndarray, dict]:
    """Scores, and what they cost: once for the time, once more for the memory."""

    def run() -> tuple[np.ndarray, float, float]:
        start = time.perf_counter()
        prepared: Any = prepare(gallery)
        middle = time.perf_counter()
        scores = score(queries, gallery, prepared)
        return scores, middle - start, time.perf_counter() - middle

    scores, preparing, scoring = run()
    tracemalloc.start()
    run()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return scores, {
        "prepare s": preparing,
        "ms per query": 1000 * scoring / len(queries),
        "peak MB": peak / 1e6,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--photos", type=int, nargs="+", default=[5_000, 50_000])
    sizes = parser.parse_args().photos
    rows = []
    for size in sizes:
        x, labels = make_descriptors(size + QUERIES, seed=0)
        chosen = np.random.default_rng(1).permutation(len(x))[:QUERIES]
        gallery, of_gallery = np.delete(x, chosen, axis=0), np.delete(labels, chosen)
        for name, (prepare, score) in METHODS.items():
            scores, cost = measure(prepare, score, x[chosen], gallery)
            ranked = of_gallery[np.argsort(-scores, axis=1, kind="stable")]
            ap = average_precision(ranked == labels[chosen][:, None])
            rows.append({"photos": size, "method": name} | cost | {"mAP": np.nanmean(ap)})
    table = pd.DataFrame(rows).set_index(["photos", "method"])
    print(table.round(2).to_string())
    largest = table.loc[max(sizes), "ms per query"]
    print(json.dumps({name: round(ms, 3) for name, ms in largest.items()}))


if __name__ == "__main__":
    main()
