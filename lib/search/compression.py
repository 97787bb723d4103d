"""What a compressed index loses: similarities that are only nearly right, and so neighbours.

    losses = compression_losses(embeddings, queries, ["SQ8", "PQ16np"])
    plots.plot_compression(losses)

A product quantizer cuts a vector into pieces and keeps for each the number of the nearest of a few
standard pieces (Jegou, Douze, Schmid, "Product Quantization for Nearest Neighbor Search", PAMI
2011); a scalar quantizer rounds each number. What they keep has a fixed error, which does not
matter between a landmark and the rest of the world and does between neighbours that are alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lib.search.exact import similarities_of
from lib.search.kinds import IndexSettings, train_and_add
from lib.search.tuning import search_exactly, search_reranked, shares_found


class Loss(NamedTuple):
    """One kind of index without an inverted file, which compares all photos.

    Attributes:
        factory: for Faiss's ``index_factory``.
        bytes_each: of a photo in memory; what all photos share is not in it.
        recall: share of the truly nearest k that its own ranking finds, from 0 to 1.
        reranked: the same when the first k * rerank are ranked anew by the exact vectors.
        found: float32 (q, k), cosines of queries and photos found, as the index has them.
        exact: float32 (q, k), the true ones.
    """

    factory: str
    bytes_each: int
    recall: float
    reranked: float
    found: np.ndarray
    exact: np.ndarray


def compression_losses(
    vectors: np.ndarray,
    queries: np.ndarray,
    factories: Sequence[str],
    k: int = 10,
    rerank: int = 10,
) -> list[Loss]:
    """Search each kind of index, and tell how far it is from the truth.

    Args:
        vectors: float32 (n, d) of unit norm, n at least k.
        queries: float32 (q, d) of unit norm.
        factories: kinds such as "SQ8" or "PQ16np"; without "np" a product quantizer is trained for
            another kind of search as well, which takes minutes.
        k: neighbours.
        rerank: k * rerank candidates are ranked anew.

    Raises:
        ValueError: a kind that Faiss does not know or that can't be trained with so few vectors.
    """
    vectors, queries = (np.ascontiguousarray(v, np.float32) for v in (vectors, queries))
    rows = np.arange(len(vectors))
    truth, _ = search_exactly(vectors, rows, queries, k)
    losses = []
    for factory in factories:
        index = train_and_add(vectors, IndexSettings(factory))
        found, photos = index.search(queries, k)
        anew = search_reranked(index, vectors, rows, queries, k, rerank)
        losses.append(
            Loss(
                factory=factory,
                bytes_each=index.code_size,
                recall=float(shares_found(truth, photos).mean()),
                reranked=float(shares_found(truth, anew).mean()),
                found=found,
                exact=similarities_of(queries, vectors, photos),
            )
        )
    return losses
