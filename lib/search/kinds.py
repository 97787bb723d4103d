"""Kinds of Faiss index: what to build, how to train it, and the parameters of its search.

index = train_and_add(vectors, IndexSettings("IVF1024,SQ8", search="nprobe=16"))
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass

import faiss
import numpy as np

_BLOCK = 65_536  # vectors that are added together


@dataclass(frozen=True)
class IndexSettings:
    """The kind of an index, and how it is searched.

    Attributes:
        factory: what to build, for Faiss's ``index_factory``, such as "IVF1024,SQ8" or "HNSW32".
            "Flat" compares every photo.
        search: parameters of the search for Faiss's ``ParameterSpace``, such as "nprobe=16" or
            "efSearch=64"; others have Faiss's defaults.
        rerank: k * ``rerank`` photos from the Faiss index are ranked again by exact similarity; 0
            keeps its own ranking and similarities, which are approximate for compressed kinds.

    Raises:
        ValueError: ``rerank`` below 0, or search parameters for "Flat", which has none.
    """

    factory: str = "Flat"
    search: str = ""
    rerank: int = 0

    def __post_init__(self):
        if self.rerank < 0:
            raise ValueError(f"rerank must be at least 0, got {self.rerank}")
        if self.factory == "Flat" and self.search:
            raise ValueError(f"an index that compares every photo has no {self.search!r}")


FLAT = IndexSettings()


def train_and_add(
    vectors: np.ndarray, settings: IndexSettings, rows: np.ndarray | None = None
) -> faiss.Index:
    """Make a Faiss index by inner product, trained on a sample and filled block by block.

    Args:
        vectors: float32 (n, d), maybe memory-mapped.
        settings: kind and search; ``rerank`` is not used.
        rows: int64 (m,), which of the vectors to index; all if None.

    Raises:
        ValueError: settings that Faiss does not know, or too few vectors to train such an index.
    """
    from tqdm import tqdm  # here: a sixth of the time that importing the index takes

    rows = np.arange(len(vectors)) if rows is None else rows
    n = len(rows)
    with _refusing(f"make an index {settings.factory!r} of {n} x {vectors.shape[1]}"):
        index = empty_index(vectors.shape[1], settings)
        lists = faiss.try_extract_index_ivf(index)
        if lists and lists.nlist == 1:  # the centre of all needs no more; Faiss warns of fewer
            lists.cp.min_points_per_centroid = 1
        # k-means needs 40 to 256 vectors for each centroid; codebooks have up to 256 centroids.
        sample = max(65_536, 64 * lists.nlist if lists else 0)
        index.train(vectors[rows[np.sort(np.random.default_rng(0).permutation(n)[:sample])]])
        starts = range(0, n, _BLOCK)
        for start in tqdm(starts, desc="indexing", unit=" blocks", disable=len(starts) < 10):
            index.add(vectors[rows[start : start + _BLOCK]])
    return index


def empty_index(dimension: int, settings: IndexSettings) -> faiss.Index:
    """An untrained Faiss index by inner product; RuntimeError for a factory that Faiss refuses."""
    index = faiss.index_factory(dimension, settings.factory, faiss.METRIC_INNER_PRODUCT)
    set_search(index, settings.search)
    return index


def set_search(index: faiss.Index, search: str) -> None:
    """Set search parameters, others stay as they are; ValueError if the index has no such ones."""
    if search:
        with _refusing(f"search by {search!r}"):
            faiss.ParameterSpace().set_index_parameters(index, search)


def merged(search: str, changes: str) -> str:
    """Search parameters after a change: "nprobe=1,ht=8" and "nprobe=4" -> "nprobe=4,ht=8"."""
    parameters = filter(None, re.split("[ ,]+", f"{search},{changes}"))
    return ",".join({one.partition("=")[0]: one for one in parameters}.values())


@contextlib.contextmanager
def _refusing(what: str) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise ValueError(f"Faiss can't {what}: {reason(error)}") from None


def filtered(index: faiss.Index, selector: faiss.IDSelector) -> faiss.SearchParameters | None:
    """The index's search parameters with a selector; None if this kind of index takes none."""
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexPreTransform):
        inner = filtered(index.index, selector)
        return inner and faiss.SearchParametersPreTransform(index_params=inner)
    # Parameters given with a search replace all parameters of the index.
    if isinstance(index, faiss.IndexIVF):
        return faiss.SearchParametersIVF(sel=selector, nprobe=index.nprobe)
    if isinstance(index, faiss.IndexHNSW):
        return faiss.SearchParametersHNSW(sel=selector, efSearch=index.hnsw.efSearch)
    if isinstance(index, faiss.IndexFlat | faiss.IndexScalarQuantizer):
        return faiss.SearchParameters(sel=selector)
    return None


def reason(error: Exception) -> str:
    """An error's message, for Faiss's errors without the place in its source."""
    return str(error).rpartition("Error: ")[2].strip()
