"""What so many photos take: worker hours, time, bytes and money, from rates and prices one states.

    measured = Assumptions(embedded_per_second=181, trained_per_second=25, workers=8)
    capacity([4_100_000, 100_000_000], measured)          # a table, a row for each

It is arithmetic, no measurement: every number that goes in is an attribute of ``Assumptions``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd


@dataclass(frozen=True)
class Assumptions:
    """Rates, sizes and prices. The defaults are round numbers to be replaced by one's own.

    Attributes:
        workers: that train and embed together, a GPU or a machine each.
        embedded_per_second: photos that one worker embeds.
        trained_per_second: photos that one worker trains on, forward and backward.
        efficiency: share of ``workers`` times the rate of one that all of them reach together.
        epochs: how often training sees each photo.
        trained_share: of the photos, those that are trained on.
        photo_bytes: of one stored photo.
        dimension: of an embedding, which is kept in float32.
        index_bytes: of one photo in the search engine's memory, for each dimension: 4 as it is,
            1 for 8-bit codes.
        index_overhead: the engine's memory over that of the vectors alone.
        replicas: how many times the index is held.
        node_memory: bytes of memory that one search node has for the index.
        worker_price, node_price: of a worker and of a search node for an hour.
        storage_price: of 10^9 stored bytes for a month.

    Raises:
        ValueError: a rate, size or number that is not above 0, or a share beyond 1.
    """

    workers: int = 8
    embedded_per_second: float = 2_000
    trained_per_second: float = 500
    efficiency: float = 0.9
    epochs: float = 10
    trained_share: float = 1.0
    photo_bytes: float = 100_000
    dimension: int = 512
    index_bytes: float = 1
    index_overhead: float = 1.3
    replicas: int = 2
    node_memory: float = 200e9
    worker_price: float = 2.0
    node_price: float = 1.5
    storage_price: float = 0.023

    def __post_init__(self):
        for name, value in vars(self).items():
            if not (value >= 0 if name.endswith(("price", "trained_share")) else value > 0):
                raise ValueError(f"{name} must be above 0, got {value}")
        for name in ("efficiency", "trained_share"):
            if getattr(self, name) > 1:
                raise ValueError(f"{name} is a share, at most 1, got {getattr(self, name)}")


HOURS_A_MONTH = 730


def capacity(photos: Sequence[int], given: Assumptions) -> pd.DataFrame:
    """What it takes, a row for each number of photos.

    Returns:
        index: photos. Columns: training_worker_hours, embedding_worker_hours (of work, all workers
        together); training_hours, embedding_hours (that one waits for); photo_bytes,
        embedding_bytes (stored); index_bytes (in memory, with replicas); search_nodes; once (money
        for training and embedding); monthly (for storage and search nodes).
    """
    rows = {}
    for n in photos:
        slowdown = 3600 * given.efficiency
        training = n * given.trained_share * given.epochs / (given.trained_per_second * slowdown)
        embedding = n / (given.embedded_per_second * slowdown)
        stored = n * given.photo_bytes
        vectors = n * given.dimension * 4
        index = n * given.dimension * given.index_bytes * given.index_overhead * given.replicas
        nodes = max(-(-index // given.node_memory), given.replicas)
        rows[n] = {
            "training_worker_hours": training,
            "embedding_worker_hours": embedding,
            "training_hours": training / given.workers,
            "embedding_hours": embedding / given.workers,
            "photo_bytes": stored,
            "embedding_bytes": vectors,
            "index_bytes": index,
            "search_nodes": int(nodes),
            "once": (training + embedding) * given.worker_price,
            "monthly": (stored + vectors) / 1e9 * given.storage_price
            + nodes * given.node_price * HOURS_A_MONTH,
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("photos")
