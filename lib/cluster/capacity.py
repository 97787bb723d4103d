"""Estimates time, memory, machines and cost for many photos, from measured rates.

capacity([4_100_000], workers=8, embedded_per_second=181, trained_per_second=25, worker_price=2)
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

HOURS_PER_MONTH = 730


def capacity(
    photos: Sequence[int],
    *,
    workers: int,
    embedded_per_second: float,
    trained_per_second: float,
    worker_price: float,
    efficiency: float = 0.9,
    epochs: float = 10,
    trained_share: float = 1.0,
    photo_bytes: float = 100_000,
    dimension: int = 512,
    index_bytes: float = 1,
    index_overhead: float = 1.3,
    replicas: int = 2,
    node_memory: float = 200e9,
    node_price: float = 1.5,
    storage_price: float = 0.023,
) -> pd.DataFrame:
    """Estimate the resources for each number of photos; replace the defaults by your own numbers.

    Args:
        workers: machines or GPUs that train and embed together.
        embedded_per_second, trained_per_second: photos per second and worker.
        worker_price, node_price: per hour, of a worker and of a search node.
        efficiency: throughput of all workers relative to ``workers`` times that of one, at most 1.
        trained_share: share of the photos used for training, at most 1.
        photo_bytes: size of a stored photo.
        dimension: of an embedding, stored in float32.
        index_bytes: bytes per dimension in the index: 4 for float32, 1 for 8-bit codes.
        index_overhead: memory of the index relative to that of its vectors.
        replicas: copies of the index.
        node_memory: bytes per search node for the index.
        storage_price: per 10^9 bytes and month.

    Returns:
        a row per number of photos (the index): training_worker_hours, embedding_worker_hours (of
        all workers); training_hours, embedding_hours (elapsed); photo_bytes, embedding_bytes
        (storage); index_bytes (memory of all replicas); search_nodes; once (price of training and
        embedding); monthly (price of storage and search nodes).

    Raises:
        ValueError: a rate, size or number is not above 0, a price is below 0, or a share above 1.
    """
    for name, value in locals().items():
        may_be_0 = name.endswith(("price", "share"))
        if name != "photos" and not (value > 0 or (may_be_0 and value == 0)):
            raise ValueError(f"{name} must be above 0, got {value}")
    if efficiency > 1 or trained_share > 1:
        raise ValueError(f"efficiency ({efficiency}) and trained_share ({trained_share}) end at 1")
    index = pd.Index(photos, name="photos")
    n = index.to_numpy(np.float64)
    per_hour = 3600 * efficiency
    training = n * trained_share * epochs / (trained_per_second * per_hour)
    embedding = n / (embedded_per_second * per_hour)
    stored, vectors = n * photo_bytes, n * dimension * 4
    memory = n * dimension * index_bytes * index_overhead * replicas
    nodes = np.maximum(np.ceil(memory / node_memory), replicas).astype(int)
    storage = (stored + vectors) / 1e9 * storage_price
    columns = {
        "training_worker_hours": training,
        "embedding_worker_hours": embedding,
        "training_hours": training / workers,
        "embedding_hours": embedding / workers,
        "photo_bytes": stored,
        "embedding_bytes": vectors,
        "index_bytes": memory,
        "search_nodes": nodes,
        "once": (training + embedding) * worker_price,
        "monthly": storage + nodes * node_price * HOURS_PER_MONTH,
    }
    return pd.DataFrame(columns, index=index)
