"""Better rankings from the same descriptors: query expansion and re-ranking.

Queries are not part of the gallery, and no query changes the result of another one. Every method
ends in scores, float32 (q, n), the larger the better, which the caller ranks once:

    scores = expand_queries(queries, gallery) @ gallery.T
    scores = queries @ augment_gallery(gallery).T
    scores = rerank_k_reciprocal(queries, gallery, encode_reciprocal(gallery))
    scores = rerank_diffusion(queries, gallery, neighbour_graph(gallery))
    scores = rerank_superglobal(queries, gallery)
    ranked = np.argsort(-scores, axis=1, kind="stable")

Photos that a method does not re-rank follow all others, in their old order: they score their
similarity minus 2, or less if there are negative scores.

    method                once per gallery           per query                  memory (numbers)
    expand_queries        nothing                    a search                   q (k + d)
    augment_gallery       n searches                 nothing more               n (k + d)
    rerank_k_reciprocal   n searches, encodings      a search, 100s of columns  100s n
    rerank_diffusion      n searches, sparse graph   a search, 10s of products  n k
    rerank_superglobal    nothing                    a search, M^2 d products   M (M + d)

A search compares with all n photos. Numbers of neighbours are capped at the number of photos.
A ValueError is raised for descriptors that are not (n, d), finite and of unit norm, an empty
gallery, settings out of range, and an encoding or graph of a gallery of another size.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy import sparse
from scipy.sparse.linalg import cg

from lib.search.exact import checked_pair, nearest

_BLOCK = 2**23  # numbers that are computed at a time


def expand_queries(
    queries: np.ndarray, gallery: np.ndarray, k: int = 50, alpha: float = 3.0
) -> np.ndarray:
    """Alpha-weighted query expansion: move each query towards its k nearest photos.

    The new query is q + Σ s^alpha x over the k nearest photos x of similarity s, negative s as 0
    (Radenović, Tolias, Chum, "Fine-tuning CNN Image Retrieval with No Human Annotation", TPAMI
    2018, whose settings are the defaults). With alpha 0 it is the average query expansion of Chum
    et al., "Total Recall", ICCV 2007: all k photos weigh as much as the query.

    Args:
        queries: float (q, d) of unit norm.
        gallery: float (n, d) of unit norm.
        k: how many photos, at least 1.
        alpha: 0 or more; the larger, the less weight dissimilar photos have.

    Returns:
        float32 (q, d) of unit norm. A query whose sum vanishes (opposite photos with alpha 0) is
        unchanged.
    """
    return _moved(queries, gallery, k, alpha)


def augment_gallery(gallery: np.ndarray, k: int = 20, alpha: float = 3.0) -> np.ndarray:
    """Database-side augmentation: move each photo of the gallery towards its k nearest others.

    Neighbours are weighted by similarity^alpha, as in :func:`expand_queries`. Turcot, Lowe, "Better
    Matching with Fewer Features", ICCV workshops 2009, and Arandjelović, Zisserman, "Three Things
    Everyone Should Know to Improve Object Retrieval", CVPR 2012, add them up (alpha 0); Gordo,
    Almazán, Revaud, Larlus, "End-to-end Learning of Deep Visual Representations for Image
    Retrieval", IJCV 2017, weight them by rank.

    Args:
        gallery: float (n, d) of unit norm.
        k: how many other photos, at least 1.
        alpha: 0 or more.

    Returns:
        float32 (n, d) of unit norm, to be searched in place of ``gallery``.
    """
    return _moved(None, gallery, k, alpha)


def _moved(queries: np.ndarray | None, gallery: np.ndarray, k: int, alpha: float) -> np.ndarray:
    """Queries, or if None the gallery, moved towards their k nearest photos."""
    _check_not_negative("alpha", alpha)
    descriptors, gallery = checked_pair(queries, gallery)
    rows, similarities = nearest(queries, gallery, k)
    weights = _sparse_rows(rows, np.maximum(similarities, 0) ** np.float32(alpha), len(gallery))
    moved = descriptors + weights @ gallery
    norms = np.linalg.norm(moved, axis=1, keepdims=True)
    return np.divide(moved, norms, out=descriptors.copy(), where=norms > 0)


class ReciprocalEncoding(NamedTuple):
    """A gallery encoded by :func:`encode_reciprocal`, whose k1 and k2 it keeps.

    Attributes:
        reach: float32 (n,), the similarity from which a query is one of a photo's k1 nearest.
        close: sparse int32 (n, n), 1 for k-reciprocal neighbours with k = k1 // 2.
        single: sparse float32 (n, n), row i is the encoding of photo i.
        averaged: the same after averaging, stored by columns.
    """

    k1: int
    k2: int
    reach: np.ndarray
    close: sparse.csr_array
    single: sparse.csr_array
    averaged: sparse.csc_array


def encode_reciprocal(gallery: np.ndarray, k1: int = 20, k2: int = 6) -> ReciprocalEncoding:
    """Encode each photo of a gallery by its k-reciprocal neighbours, once for all queries.

    Zhong, Zheng, Cao, Li, "Re-ranking Person Re-identification with k-reciprocal Encoding",
    CVPR 2017, section 3, whose settings are the defaults. R(i, k) holds the photos j with i among
    the k nearest of j and j among the k nearest of i. It becomes R* by adding every R(j, k1 / 2), j
    in R(i, k1), of which at least two thirds are in R(i, k1). The encoding is exp(-d(i, j)) for the
    j in R*, else 0, and is averaged over the photo and its k2 - 1 nearest.

    As in the authors' code a photo is in its own R. Unlike there, the distance d is 1 - similarity,
    not the squared distance divided by the row's largest, and encodings are not scaled to a sum of
    1, which is in none of the equations.

    Args:
        gallery: float (n, d) of unit norm.
        k1: how many nearest other photos count, at least 1; half of it is rounded down.
        k2: how many encodings are averaged, at least 1, which takes the photo's own.
    """
    _check_counts(k1=k1, k2=k2)
    gallery, _ = checked_pair(None, gallery)
    rows, similarities = nearest(None, gallery, max(k1, k2 - 1))
    n = len(gallery)
    if similarities.shape[1] < k1:  # fewer others: any query is among the k1 nearest
        reach = np.full(n, -np.inf, dtype=np.float32)
    else:
        reach = similarities[:, k1 - 1].copy()
    rows = np.hstack([np.arange(n)[:, None], rows])  # itself first
    close = _reciprocal(rows[:, : k1 // 2 + 1])
    pattern = _extended(_reciprocal(rows[:, : k1 + 1]), close)
    single = _encoded(pattern, gallery, gallery)
    together = rows[:, :k2]
    shares = np.full(together.shape, 1 / together.shape[1], dtype=np.float32)
    averaged = (_sparse_rows(together, shares, n) @ single).tocsc()
    return ReciprocalEncoding(k1, k2, reach, close, single, averaged)


def rerank_k_reciprocal(
    queries: np.ndarray, gallery: np.ndarray, encoding: ReciprocalEncoding, lam: float = 0.3
) -> np.ndarray:
    """K-reciprocal re-ranking: photos are similar if they have the same neighbours.

    Queries are encoded as in :func:`encode_reciprocal`, which names the paper. The distance of two
    encodings is Jaccard's, d_J = 1 - Σ min / Σ max, the final one (1 - lam) d_J + lam d.

    In the authors' code all queries are part of the gallery: they are neighbours of each other, and
    a new query changes every encoding. Here the gallery is encoded without queries.

    Args:
        queries: float (q, d) of unit norm.
        gallery: float (n, d) of unit norm.
        encoding: of this gallery.
        lam: weight of the plain distance, from 0 to 1, which is the plain ranking.

    Returns:
        float32 (q, n), 1 - the final distance, from -lam to 1.
    """
    if not 0 <= lam <= 1:
        raise ValueError(f"lam must be from 0 to 1, got {lam}")
    queries, gallery = checked_pair(queries, gallery)
    n = len(gallery)
    if len(encoding.reach) != n:
        raise ValueError(
            f"the encoding is of a gallery of {len(encoding.reach)} photos, got one of {n}"
        )
    k1, k2, reach, *_ = encoding
    rows, similarities = nearest(queries, gallery, max(k1, k2 - 1))
    mutual = similarities[:, :k1] >= reach[rows[:, :k1]]
    reciprocal = _sparse_rows(rows[:, :k1], mutual.astype(np.int32), n)
    reciprocal.eliminate_zeros()
    single = _encoded(_extended(reciprocal, encoding.close), queries, gallery)
    others = rows[:, : k2 - 1]
    added = _sparse_rows(others, np.ones(others.shape, dtype=np.float32), n) @ encoding.single
    encodings = ((single + added) / np.float32(1 + others.shape[1])).tocsr()
    sums = encoding.averaged.sum(axis=1)
    scores = queries @ gallery.T
    for i in range(len(queries)):
        own = encodings[[i]]
        sharing = encoding.averaged[:, own.indices]
        smaller = np.minimum(sharing.data, np.repeat(own.data, np.diff(sharing.indptr)))
        overlap = np.bincount(sharing.indices, weights=smaller, minlength=n)
        jaccard = overlap / (own.data.sum() + sums - overlap)  # max(a, b) = a + b - min(a, b)
        scores[i] = (1 - lam) * jaccard + lam * scores[i]
    return scores


def _reciprocal(rows: np.ndarray) -> sparse.csr_array:
    """1 where two photos are in each other's row: int64 (n, k) -> int32 (n, n)."""
    member = _sparse_rows(rows, np.ones_like(rows, dtype=np.int32), len(rows))
    return member.multiply(member.T).tocsr()


def _extended(reciprocal: sparse.csr_array, close: sparse.csr_array) -> sparse.csr_array:
    """R -> R*, as patterns of non-zeros."""
    shared = (reciprocal @ close).multiply(reciprocal).tocsr()  # |R(i, k1) ∩ R(j, k1 / 2)|
    sizes = close.sum(axis=1)
    shared.data = (3 * shared.data >= 2 * sizes[shared.indices]).astype(np.int32)
    shared.eliminate_zeros()
    return (reciprocal + shared @ close).tocsr()


def _encoded(
    pattern: sparse.csr_array, descriptors: np.ndarray, gallery: np.ndarray
) -> sparse.csr_array:
    """exp(similarity - 1) where the pattern (m, n) of m descriptors is not zero."""
    rows, columns = pattern.nonzero()
    values = np.empty(len(rows), dtype=np.float32)
    step = max(1, _BLOCK // gallery.shape[1])
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        values[part] = np.einsum("ij,ij->i", descriptors[rows[part]], gallery[columns[part]])
    return sparse.csr_array((np.exp(values - 1), (rows, columns)), shape=pattern.shape)


def neighbour_graph(gallery: np.ndarray, k: int = 50) -> sparse.csr_array:
    """The graph of a gallery for :func:`rerank_diffusion`, made once for all queries.

    Two photos are joined if each is among the k nearest others of the other one. Their affinity is
    s^3; similarities s of 0 or below join nothing. The affinities A are normalized by the degrees
    D = diag(A 1) to S = D^(-1/2) A D^(-1/2). From Iscen, Tolias, Avrithis, Furon, Chum, "Efficient
    Diffusion on Region Manifolds", CVPR 2017, section 3.

    Args:
        gallery: float (n, d) of unit norm.
        k: how many nearest others, at least 1.

    Returns:
        S, sparse float64 (n, n), symmetric, with eigenvalues from -1 to 1. A photo that is joined
        to none has an empty row.
    """
    rows, similarities = nearest(None, gallery, k)
    directed = _sparse_rows(rows, _affinities(similarities), len(rows))
    # The smaller of both directions: 0 unless mutual, and free of differences by rounding.
    graph = directed.minimum(directed.T).tocsr()
    graph.eliminate_zeros()
    degrees = graph.sum(axis=1)
    scale = 1 / np.sqrt(np.where(degrees > 0, degrees, 1))
    graph.data *= np.repeat(scale, np.diff(graph.indptr)) * scale[graph.indices]
    return graph


def rerank_diffusion(
    queries: np.ndarray,
    gallery: np.ndarray,
    graph: sparse.csr_array,
    k: int = 10,
    alpha: float = 0.99,
    tolerance: float = 1e-6,
) -> np.ndarray:
    """Diffusion: similarity spreads from the query's neighbours along the graph of the gallery.

    The scores f solve (I - alpha S) f = y by conjugate gradients, where y is s^3 for the k photos
    nearest to the query and 0 for others, so the query itself is not in the graph. See the paper of
    :func:`neighbour_graph`; its image regions are left out, as a photo has one descriptor.

    Args:
        queries: float (q, d) of unit norm.
        gallery: float (n, d) of unit norm.
        graph: :func:`neighbour_graph` of this gallery.
        k: from how many photos it spreads, at least 1.
        alpha: from 0 (y itself) to below 1; the larger, the farther it spreads and the longer it
            takes.
        tolerance: from 1e-12 to below 1; the solver stops when the residual is that share of y.

    Returns:
        float32 (q, n): above 0 for photos that the diffusion reaches, below 0 for others.
    """
    if not 0 <= alpha < 1:
        raise ValueError(f"alpha must be from 0 to below 1, got {alpha}")
    if not 1e-12 <= tolerance < 1:
        raise ValueError(f"tolerance must be from 1e-12 to below 1, got {tolerance}")
    queries, gallery = checked_pair(queries, gallery)
    n = len(gallery)
    if graph.shape != (n, n):
        raise ValueError(f"the graph is of a gallery of {graph.shape[0]} photos, got one of {n}")
    rows, similarities = nearest(queries, gallery, k)
    system = (sparse.eye_array(n) - alpha * graph).tocsr()
    scores = np.empty((len(queries), n), dtype=np.float32)
    for i, sources in enumerate(_affinities(similarities)):
        y = np.zeros(n)
        y[rows[i]] = sources
        scores[i] = cg(system, y, rtol=tolerance)[0]
    # The solution is positive within reach and exactly 0 beyond it.
    return _others_below(scores, queries @ gallery.T, scores > 0)


def _affinities(similarities: np.ndarray) -> np.ndarray:
    return np.maximum(similarities, 0).astype(np.float64) ** 3  # the paper's gamma


def rerank_superglobal(
    queries: np.ndarray, gallery: np.ndarray, top: int = 400, k: int = 9, beta: float = 0.15
) -> np.ndarray:
    """SuperGlobal's re-ranking: candidates refine each other, the best expand the query.

    Shao, Chen, Karpur, Cui, Araujo, Cao, "Global Features are All You Need for Image Retrieval and
    Reranking", ICCV 2023; defaults and details are those of the authors' code. Each of the ``top``
    photos nearest to the query is replaced by the mean of itself, of weight 1, and its k nearest
    among them, of weight beta times their similarity. The expanded query is the maximum, in each
    dimension, of the k + 1 refined descriptors most similar to the query. The score is the mean of
    a refined descriptor's inner products with the query and the expanded query. Neither refined
    descriptors nor the expanded query are normalized.

    Unlike in the authors' code, negative similarities have the weight 0. The maximum depends on the
    axes: rotated descriptors give other scores.

    Args:
        queries: float (q, d) of unit norm.
        gallery: float (n, d) of unit norm.
        top: how many candidates are re-ranked (the paper's M), at least 1.
        k: how many neighbours refine a candidate, at least 1; capped at top - 1.
        beta: 0 or more, the weight of neighbours.

    Returns:
        float32 (q, n), the candidates before all others.
    """
    _check_counts(top=top, k=k)
    _check_not_negative("beta", beta)
    queries, gallery = checked_pair(queries, gallery)
    similarities = queries @ gallery.T
    candidates, _ = nearest(queries, gallery, top)
    scores = np.zeros_like(similarities)
    chosen = np.zeros(similarities.shape, dtype=bool)
    for i, rows in enumerate(candidates):
        x = gallery[rows]
        neighbours, weights = nearest(None, x, k)
        weights = np.float32(beta) * np.maximum(weights, 0)
        refined = x + _sparse_rows(neighbours, weights, len(x)) @ x
        refined /= 1 + weights.sum(axis=1, keepdims=True)
        to_query = refined @ queries[i]
        best = np.argsort(-to_query, kind="stable")[: k + 1]
        scores[i, rows] = (to_query + refined @ refined[best].max(axis=0)) / 2
        chosen[i, rows] = True
    return _others_below(scores, similarities, chosen)


def _others_below(scores: np.ndarray, similarities: np.ndarray, reranked: np.ndarray) -> np.ndarray:
    """Give photos that are not re-ranked scores below all others, in the order of similarity."""
    lowest = np.min(scores, axis=1, keepdims=True, where=reranked, initial=0)
    return np.where(reranked, scores, lowest - 2 + similarities)


def _sparse_rows(columns: np.ndarray, values: np.ndarray, n: int) -> sparse.csr_array:
    """A matrix (m, n) with the values (m, k) in the columns (m, k) of its rows, else 0."""
    m, k = columns.shape
    bounds = np.arange(0, m * k + 1, k) if k else np.zeros(m + 1, dtype=np.int64)
    # Copies: scipy sorts the columns of a matrix in place.
    return sparse.csr_array((values.flatten(), columns.flatten(), bounds), shape=(m, n))


def _check_counts(**counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")


def _check_not_negative(name: str, setting: float) -> None:
    if not 0 <= setting < np.inf:
        raise ValueError(f"{name} must be 0 or more and finite, got {setting}")
