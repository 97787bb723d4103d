"""Exact nearest neighbours of descriptors, and the check of descriptors.

    rows, similarities = nearest(queries, gallery, k=10)

Descriptors are float32 (n, d) of unit norm, compared by their inner product, which is the cosine.
Faiss computes it on all cores.
"""

from __future__ import annotations

import sys

import faiss
import numpy as np

if sys.platform == "darwin":
    # Faiss and TensorFlow each bring an OpenMP runtime, and two of them crash on macOS.
    faiss.omp_set_num_threads(1)

_BLOCK = 2**23  # neighbours that are sorted at a time
_ROWS = 65_536  # rows that are checked at a time


def checked(
    descriptors: np.ndarray, name: str = "embeddings", dimension: int | None = None
) -> np.ndarray:
    """Descriptors as float32 (n, d), C-contiguous; not copied if they are that already.

    Args:
        descriptors: float (n, d) of unit norm, maybe memory-mapped.
        name: for the message.
        dimension: d; any if None.

    Raises:
        ValueError: they are not (n, d), finite and of unit norm.
    """
    shape = np.shape(descriptors)
    if len(shape) != 2 or shape[1] != (dimension or shape[1]):
        raise ValueError(f"{name} must be (n, {dimension or 'd'}), not {shape}")
    descriptors = np.ascontiguousarray(descriptors, dtype=np.float32)
    for start in range(0, len(descriptors), _ROWS):
        norms = np.linalg.norm(descriptors[start : start + _ROWS], axis=1)
        wrong = ~(np.abs(norms - 1) <= 1e-3)  # NaN is wrong
        if wrong.any():
            row = int(np.argmax(wrong))
            raise ValueError(
                f"{name} must have unit norm, but row {start + row} has norm {norms[row]:.4g}"
            )
    return descriptors


def checked_pair(queries: np.ndarray | None, gallery: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """:func:`checked` queries, the gallery if None, and gallery, which must not be empty."""
    gallery = checked(gallery, "gallery")
    if len(gallery) == 0:
        raise ValueError("the gallery is empty")
    return gallery if queries is None else checked(queries, "queries", gallery.shape[1]), gallery


def nearest(
    queries: np.ndarray | None, gallery: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Find the k most similar photos of each query, in descending order of similarity.

    Args:
        queries: float (q, d) of unit norm; None: each photo of the gallery among all others.
        gallery: float (n, d) of unit norm.
        k: capped at the number of photos (of other photos, if queries is None).

    Returns:
        rows of the gallery, int64 (q, k), and similarities, float32 (q, k). Ties keep the order of
        the rows.

    Raises:
        ValueError: k below 1, an empty gallery, or descriptors that fail :func:`checked`.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    descriptors, gallery = checked_pair(queries, gallery)
    similarities, rows = knn(descriptors, gallery, k + (queries is None))
    if queries is not None:
        return rows, similarities
    others = rows != np.arange(len(rows))[:, None]
    others[others.all(axis=1), -1] = False  # more than k photos equal this one
    shape = len(rows), rows.shape[1] - 1
    return rows[others].reshape(shape), similarities[others].reshape(shape)


def knn(
    queries: np.ndarray, vectors: np.ndarray, k: int, selector: faiss.IDSelector | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Like ``faiss.knn`` by inner product, but ties keep the order of the rows; nothing is checked.

    Args:
        queries: float32 (q, d), C-contiguous.
        vectors: float32 (n, d), C-contiguous, maybe memory-mapped.
        k: capped at n.
        selector: searches only the vectors it selects, at least k.

    Returns:
        similarities, float32 (q, k), in descending order, and rows, int64 (q, k).
    """
    k = min(k, len(vectors))
    similarities, rows = np.empty((len(queries), k), np.float32), np.empty((len(queries), k), int)
    fetched = min(k + 1, len(vectors))
    step = max(1, _BLOCK // max(fetched, 1))
    for start in range(0, len(queries) if k else 0, step):
        some = queries[start : start + step]
        found = np.empty((len(some), fetched), np.float32)
        at = np.empty((len(some), fetched), np.int64)
        # Not faiss.knn, which takes no selector.
        faiss.knn_inner_product(
            faiss.swig_ptr(some),
            faiss.swig_ptr(vectors),
            vectors.shape[1],
            len(some),
            len(vectors),
            fetched,
            faiss.swig_ptr(found),
            faiss.swig_ptr(at),
            selector,
        )
        order = np.lexsort((at, -found))[:, :k]
        last = found[:, k:].max(axis=1, initial=-np.inf)
        found, at = np.take_along_axis(found, order, 1), np.take_along_axis(at, order, 1)
        # Faiss may have left out an earlier row that ties with the last one it found.
        if (tied := (found[:, -1] == last) & (at[:, -1] >= 0)).any():
            more, rows_of_more = knn(some[tied], vectors, 2 * k, selector)
            found[tied], at[tied] = more[:, :k], rows_of_more[:, :k]
        similarities[start : start + step], rows[start : start + step] = found, at
    return similarities, rows


def similarities_of(queries: np.ndarray, vectors: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Exact similarities of each query to some vectors, which are not copied.

    Args:
        queries, vectors: as for :func:`knn`.
        rows: int64 (q, m), which vectors; -1 stands for none.

    Returns:
        float32 (q, m), inner products, undefined for a row of -1.
    """
    similarities = np.zeros(rows.shape, np.float32)
    rows = np.ascontiguousarray(rows, np.int64)
    faiss.fvec_inner_products_by_idx(
        faiss.swig_ptr(similarities),
        faiss.swig_ptr(queries),
        faiss.swig_ptr(vectors),
        faiss.swig_ptr(rows),
        vectors.shape[1],
        *rows.shape,
    )
    return similarities


def nearest_of(
    similarities: np.ndarray, numbers: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """The k largest similarities of each row, in descending order, and their numbers.

    Args:
        similarities: float (q, m).
        numbers: int64 (q, m).
        k: capped at m; ties keep input order.
    """
    order = np.argsort(-similarities, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(similarities, order, 1), np.take_along_axis(numbers, order, 1)
