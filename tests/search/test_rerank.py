"""Re-ranking compared with examples by hand and with the papers, photo by photo."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.evaluation.metrics import average_precision
from lib.search import exact
from lib.search.exact import nearest
from lib.search.rerank import (
    augment_gallery,
    encode_reciprocal,
    expand_queries,
    neighbour_graph,
    rerank_diffusion,
    rerank_k_reciprocal,
    rerank_superglobal,
)
from tests.conftest import unit


def photos(rng, n: int, d: int = 6) -> np.ndarray:
    return unit(rng.normal(size=(n, d))).astype(np.float32)


def at(*degrees: float) -> np.ndarray:
    """Descriptors in the plane: similarities are cosines of differences."""
    angles = np.deg2rad(degrees)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


def ranking(scores: np.ndarray) -> np.ndarray:
    return np.argsort(-scores, axis=1, kind="stable")


# Photos on the axes and on diagonals: many similarities are exactly equal.
AXES = np.array([[1, 0], [-1, 0], [0, 1], [0, -1]], np.float32)
with_ties = st.lists(st.integers(0, 3), min_size=1, max_size=12).map(lambda rows: AXES[rows])
sizes = st.tuples(st.integers(1, 40), st.integers(0, 5), st.integers(1, 60), st.integers(0, 99))


def literal_nearest(similarities: np.ndarray, k: int, without: int | None = None) -> list[int]:
    order = sorted(range(len(similarities)), key=lambda j: (-similarities[j], j))
    return [j for j in order if j != without][:k]


@given(with_ties, with_ties, st.integers(1, 15))
def test_nearest_sorts_and_ties_keep_the_order_of_the_rows(queries, gallery, k):
    rows, similarities = nearest(queries, gallery, k)
    expected = [literal_nearest(gallery @ q, k) for q in queries]
    np.testing.assert_array_equal(rows, expected)
    np.testing.assert_array_equal(
        similarities, np.take_along_axis(queries @ gallery.T, rows, axis=1)
    )
    rows, similarities = nearest(None, gallery, k)
    expected = [literal_nearest(gallery @ x, k, without=i) for i, x in enumerate(gallery)]
    np.testing.assert_array_equal(rows, np.reshape(expected, rows.shape))
    assert rows.shape == similarities.shape == (len(gallery), min(k, len(gallery) - 1))


@pytest.mark.parametrize("k", [1, 7, 100, 300])
def test_nearest_in_a_larger_gallery_and_in_blocks(rng, k, monkeypatch):
    gallery = photos(rng, 300)
    similarities = gallery @ gallery.T
    np.fill_diagonal(similarities, -2)
    expected = ranking(similarities)[:, : min(k, 299)]
    for block in (1, 1000, 2**23):  # a row, three rows, all rows at a time
        monkeypatch.setattr(exact, "_BLOCK", block)
        rows, found = nearest(None, gallery, k)
        np.testing.assert_array_equal(rows, expected)
        expected_values = np.take_along_axis(similarities, expected, axis=1)
        np.testing.assert_allclose(found, expected_values, atol=1e-6)
        assert rows.dtype == np.int64 and found.dtype == np.float32


def test_a_query_is_moved_towards_its_neighbours_by_hand():
    gallery = at(60, -60, 180)
    # cos 60 = 1/2, and the first two are mirror images: they leave the query where it is ...
    np.testing.assert_allclose(expand_queries(at(0), gallery, k=2, alpha=3), at(0), atol=1e-6)
    # ... the first alone does not: (1, 0) + 1/2 (1/2, √3/2).
    expanded = expand_queries(at(0), gallery, k=1, alpha=1)
    np.testing.assert_allclose(expanded, [unit(np.array([1.25, np.sqrt(3) / 4]))], atol=1e-6)
    # The third is opposite to the query: of no weight, unless all weigh the same.
    np.testing.assert_allclose(expand_queries(at(0), gallery, k=3, alpha=1), at(0), atol=1e-6)
    crossed = at(60, 180)
    expanded = expand_queries(at(0), crossed, k=2, alpha=0)
    np.testing.assert_allclose(expanded, at(60), atol=1e-6)
    # The four vectors of a cross add up to nothing.
    np.testing.assert_array_equal(expand_queries(AXES[:1], AXES[1:], k=3, alpha=0), AXES[:1])


@settings(max_examples=50)
@given(sizes, st.sampled_from([0.0, 0.5, 3.0]))
def test_expansion_and_augmentation_follow_the_formula(size, alpha):
    n, q, k, seed = size
    rng = np.random.default_rng(seed)
    queries, gallery = photos(rng, q), photos(rng, n)

    def literal(x, similarities, neighbours):
        total = x.astype(np.float64)
        for j in neighbours:
            total = total + max(similarities[j], 0.0) ** alpha * gallery[j]
        return total / np.linalg.norm(total)

    expanded = expand_queries(queries, gallery, k, alpha)
    assert expanded.shape == (q, 6) and expanded.dtype == np.float32
    for new, x in zip(expanded, queries, strict=True):
        s = (gallery @ x).astype(np.float64)
        np.testing.assert_allclose(new, literal(x, s, literal_nearest(s, k)), atol=1e-4)
    augmented = augment_gallery(gallery, k, alpha)
    for i, (new, x) in enumerate(zip(augmented, gallery, strict=True)):
        s = (gallery @ x).astype(np.float64)
        np.testing.assert_allclose(new, literal(x, s, literal_nearest(s, k, i)), atol=1e-4)


class LiteralReciprocal:
    """Section 3 of Zhong et al., with sets and dense vectors."""

    def __init__(self, gallery: np.ndarray, k1: int, k2: int):
        self.similarities = (gallery @ gallery.T).astype(np.float64)
        self.k1, self.k2, self.n = k1, k2, len(gallery)
        n = range(self.n)
        self.close = [self.reciprocal(i, k1 // 2) for i in n]
        self.single = [
            self.encoding(self.similarities[i], self.extended(self.reciprocal(i, k1))) for i in n
        ]
        self.averaged = [
            np.mean([self.single[j] for j in [i, *self.neighbours(i, k2 - 1)]], axis=0) for i in n
        ]

    def neighbours(self, i: int, k: int) -> list[int]:
        return literal_nearest(self.similarities[i], k, without=i)

    def reciprocal(self, i: int, k: int) -> set[int]:
        return {i} | {j for j in self.neighbours(i, k) if i in self.neighbours(j, k)}

    def extended(self, reciprocal: set[int]) -> set[int]:
        result = set(reciprocal)
        for j in reciprocal:
            if len(reciprocal & self.close[j]) >= 2 / 3 * len(self.close[j]) - 1e-9:
                result |= self.close[j]
        return result

    def encoding(self, similarities: np.ndarray, members: set[int]) -> np.ndarray:
        v = np.zeros(self.n)
        for j in members:
            v[j] = np.exp(-(1 - similarities[j]))
        return v

    def is_near_to(self, j: int, similarity: float) -> bool:
        """Would a query of that similarity be one of the k1 nearest of photo j?"""
        nearer = [i for i in self.neighbours(j, self.k1) if self.similarities[j, i] > similarity]
        return len(nearer) < self.k1

    def scores(self, similarities: np.ndarray, lam: float) -> np.ndarray:
        near = literal_nearest(similarities, self.k1)
        reciprocal = {j for j in near if self.is_near_to(j, similarities[j])}
        own = self.encoding(similarities, self.extended(reciprocal))
        others = [self.single[j] for j in literal_nearest(similarities, self.k2 - 1)]
        own = np.mean([own, *others], axis=0)
        jaccard = [1 - np.minimum(own, v).sum() / np.maximum(own, v).sum() for v in self.averaged]
        return 1 - ((1 - lam) * np.array(jaccard) + lam * (1 - similarities))


@settings(max_examples=40)
@given(sizes, st.integers(1, 12), st.integers(1, 8), st.sampled_from([0.0, 0.3, 1.0]))
def test_k_reciprocal_reranking_is_the_papers(size, k1, k2, lam):
    n, q, _, seed = size
    rng = np.random.default_rng(seed)
    gallery = photos(rng, n, d=3)
    queries = photos(rng, q, d=3)
    literal = LiteralReciprocal(gallery, k1, k2)
    encoding = encode_reciprocal(gallery, k1, k2)
    np.testing.assert_allclose(encoding.single.toarray(), literal.single, atol=1e-6)
    np.testing.assert_allclose(encoding.averaged.toarray(), literal.averaged, atol=1e-6)
    scores = rerank_k_reciprocal(queries, gallery, encoding, lam)
    assert scores.shape == (q, n) and scores.dtype == np.float32
    for row, x in zip(scores, queries, strict=True):
        expected = literal.scores((gallery @ x).astype(np.float64), lam)
        np.testing.assert_allclose(row, expected, atol=1e-5)


def test_k_reciprocal_reranking_by_hand():
    # 0 and 10 have each other, as have 60 and 68. The query's nearest is 10, and it is a nearer one
    # for 10 than 0 is.
    gallery, query = at(0, 10, 60, 68), at(16)
    encoding = encode_reciprocal(gallery, k1=1, k2=1)
    cos = np.cos(np.deg2rad([10, 6, 8]))
    a, b, c = np.exp(cos - 1)
    expected = [[1, a, 0, 0], [a, 1, 0, 0], [0, 0, 1, c], [0, 0, c, 1]]
    np.testing.assert_allclose(encoding.single.toarray(), expected, atol=1e-6)
    # Its encoding is b at the photo at 10: min/max is min(a, b)/(1 + b) and b/(1 + a).
    scores = rerank_k_reciprocal(query, gallery, encoding, lam=0)
    np.testing.assert_allclose(scores, [[a / (1 + b), b / (1 + a), 0, 0]], atol=1e-6)
    # At 25 it is farther from the one at 10 than 0 is: not reciprocal, nothing in common.
    np.testing.assert_array_equal(rerank_k_reciprocal(at(25), gallery, encoding, lam=0), 0)


@settings(max_examples=50)
@given(sizes, st.sampled_from([0.0, 0.6, 0.99]))
def test_diffusion_is_the_closed_form(size, alpha):
    n, q, k, seed = size
    rng = np.random.default_rng(seed)
    gallery, queries = photos(rng, n), photos(rng, q)
    s = (gallery @ gallery.T).astype(np.float64)
    affinity = np.zeros((n, n))
    neighbours = [literal_nearest(s[i], k, without=i) for i in range(n)]
    for i in range(n):
        for j in neighbours[i]:
            if i in neighbours[j]:
                affinity[i, j] = max(s[i, j], 0) ** 3
    degrees = affinity.sum(axis=1)
    root = np.diag([d**-0.5 if d > 0 else 0 for d in degrees])
    normalized = root @ affinity @ root
    graph = neighbour_graph(gallery, k)
    np.testing.assert_allclose(graph.toarray(), normalized, atol=1e-5)
    np.testing.assert_array_equal(graph.toarray(), graph.T.toarray())

    scores = rerank_diffusion(queries, gallery, graph, 3, alpha, tolerance=1e-9)
    assert scores.shape == (q, n) and scores.dtype == np.float32
    for row, x in zip(scores, queries, strict=True):
        similarities = (gallery @ x).astype(np.float64)
        y = np.zeros(n)
        for j in literal_nearest(similarities, 3):
            y[j] = max(similarities[j], 0) ** 3
        f = np.linalg.solve(np.eye(n) - alpha * graph.toarray(), y)
        reached = f > 1e-6
        np.testing.assert_allclose(row[reached], f[reached], rtol=1e-3, atol=1e-6)
        beyond = f < 1e-12
        np.testing.assert_allclose(row[beyond], similarities[beyond] - 2, atol=1e-5)


def test_diffusion_follows_a_chain_and_leaves_the_rest_in_order():
    # From 0 to 90 in steps of 10, as a chain; two photos on the other side, joined to nothing near.
    gallery = at(*range(0, 91, 10), -70, -60)
    scores = rerank_diffusion(at(0), gallery, neighbour_graph(gallery, k=3), k=2)[0]
    assert (scores[:10] > 0).all() and (scores[10:] < 0).all()
    # The far end of the chain comes before photos that are more similar, but in no chain.
    assert list(ranking(scores[None])[0, 10:]) == [11, 10]
    np.testing.assert_allclose(scores[10:], np.cos(np.deg2rad([70, 60])) - 2, atol=1e-6)


def test_a_photo_joined_to_none_keeps_its_similarity():
    gallery = AXES[[0, 2]]
    graph = neighbour_graph(gallery, k=1)
    assert graph.nnz == 0
    scores = rerank_diffusion(AXES[:2], gallery, graph, k=2)
    np.testing.assert_allclose(scores, [[1, -2], [-3, -2]])


@settings(max_examples=50)
@given(sizes, st.integers(1, 12), st.sampled_from([0.0, 0.15, 1.0]))
def test_superglobal_is_the_papers(size, k, beta):
    n, q, top, seed = size
    rng = np.random.default_rng(seed)
    gallery, queries = photos(rng, n), photos(rng, q)
    scores = rerank_superglobal(queries, gallery, top, k, beta)
    assert scores.shape == (q, n) and scores.dtype == np.float32
    for row, x in zip(scores, queries, strict=True):
        similarities = gallery @ x
        candidates = literal_nearest(similarities, top)
        refined = {}
        for i in candidates:
            s = gallery @ gallery[i]
            total, weights = gallery[i].astype(np.float64), 1.0
            for j in [j for j in literal_nearest(s, n, without=i) if j in candidates][:k]:
                total = total + beta * max(s[j], 0) * gallery[j]
                weights += beta * max(s[j], 0)
            refined[i] = total / weights
        best = sorted(candidates, key=lambda i: -(refined[i] @ x))[: k + 1]
        expanded = np.max([refined[i] for i in best], axis=0)
        expected = [(refined[i] @ x + refined[i] @ expanded) / 2 for i in candidates]
        np.testing.assert_allclose(row[candidates], expected, atol=1e-5)
        others = np.setdiff1d(np.arange(n), candidates)
        if len(others):
            assert row[others].max() < row[candidates].min()
            plain = others[np.argsort(-similarities[others], kind="stable")]
            assert list(others[np.argsort(-row[others], kind="stable")]) == list(plain)


def test_superglobal_by_hand():
    # Candidates at 0 and 60 refine each other with 1 * 1/2: (1, 0) + (1/2, √3/2) / 2, over 3/2.
    scores = rerank_superglobal(at(0), at(0, 60, 180), top=2, k=1, beta=1)[0]
    a, b = np.array([5, np.sqrt(3)]) / 6, np.array([4, np.sqrt(12)]) / 6
    expanded = np.array([5, np.sqrt(12)]) / 6  # the larger of each
    expected = [(a[0] + a @ expanded) / 2, (b[0] + b @ expanded) / 2, -1 - 2]
    np.testing.assert_allclose(scores, expected, atol=1e-6)


def arcs(rng, landmarks: int, views: int) -> tuple[np.ndarray, np.ndarray]:
    """Landmarks seen along an arc each: its ends are far from each other, the steps are not."""
    starts, ends = unit(rng.normal(size=(2, landmarks, 16)))
    t = np.tile(np.linspace(0, 1, views), landmarks)[:, None]
    labels = np.repeat(np.arange(landmarks), views)
    x = (1 - t) * starts[labels] + t * ends[labels] + 0.12 * rng.normal(size=(len(labels), 16))
    return unit(x).astype(np.float32), labels


def test_what_the_methods_are_good_for(rng):
    x, labels = arcs(rng, landmarks=30, views=20)
    is_query = np.arange(len(x)) % 20 == 0  # one end of each arc
    queries, gallery = x[is_query], x[~is_query]

    def mean_ap(scores):
        hits = labels[~is_query][ranking(scores)] == labels[is_query][:, None]
        return average_precision(hits).mean()

    plain = mean_ap(queries @ gallery.T)
    # Every method finds more of the arc, and the diffusion nearly all of it.
    assert mean_ap(expand_queries(queries, gallery, k=5) @ gallery.T) > plain + 0.01
    assert mean_ap(queries @ augment_gallery(gallery, k=5).T) > plain + 0.01
    encoding = encode_reciprocal(gallery, k1=10, k2=5)
    assert mean_ap(rerank_k_reciprocal(queries, gallery, encoding)) > plain + 0.05
    assert mean_ap(rerank_superglobal(queries, gallery, top=100, k=5)) > plain + 0.01
    graph = neighbour_graph(gallery, k=10)
    assert mean_ap(rerank_diffusion(queries, gallery, graph, k=5)) > plain + 0.2


RERANKINGS = {
    "k_reciprocal": lambda q, g: rerank_k_reciprocal(q, g, encode_reciprocal(g, k1=6, k2=3)),
    "diffusion": lambda q, g: rerank_diffusion(q, g, neighbour_graph(g, k=5), k=4),
    "superglobal": lambda q, g: rerank_superglobal(q, g, top=20, k=3),
    "expansion": lambda q, g: expand_queries(q, g, k=4) @ g.T,
}


@pytest.mark.parametrize("method", RERANKINGS)
def test_no_query_changes_another_and_the_order_of_the_gallery_does_not_matter(rng, method):
    apply = RERANKINGS[method]
    gallery, queries = photos(rng, 60), photos(rng, 9)
    before = gallery.copy(), queries.copy()
    scores = apply(queries, gallery)
    np.testing.assert_allclose(apply(queries[4:5], gallery)[0], scores[4], atol=1e-5)
    assert apply(queries[:0], gallery).shape == (0, 60)
    order = rng.permutation(60)
    np.testing.assert_allclose(apply(queries, gallery[order]), scores[:, order], atol=1e-5)
    np.testing.assert_array_equal(before[0], gallery)  # the arguments stay as they were
    np.testing.assert_array_equal(before[1], queries)


@pytest.mark.parametrize("method", RERANKINGS)
def test_a_gallery_of_one_photo(method):
    scores = RERANKINGS[method](at(0, 20, 110), at(10))
    assert scores.shape == (3, 1) and np.isfinite(scores).all()
    np.testing.assert_allclose(augment_gallery(at(10)), at(10), atol=1e-6)


def test_bad_input_is_refused(rng):
    gallery, queries = photos(rng, 12), photos(rng, 3)
    encoding, graph = encode_reciprocal(gallery), neighbour_graph(gallery)
    searches = [
        lambda q, g: nearest(q, g, 3),
        expand_queries,
        lambda q, g: rerank_k_reciprocal(q, g, encoding),
        lambda q, g: rerank_diffusion(q, g, graph),
        rerank_superglobal,
    ]
    for search in searches:
        for q, g, message in (
            (queries[0], gallery, r"queries must be \(n, 6\)"),
            (queries, gallery[0], r"gallery must be \(n, d\)"),
            (queries, gallery[:0], "gallery is empty"),
            (queries / 0.9, gallery, "queries must have unit norm"),
            (unit(queries[:, :5]), gallery, r"queries must be \(n, 6\), not \(3, 5\)"),
            (queries, 2 * gallery, "gallery must have unit norm"),
            (
                np.where(queries > 0.5, np.nan, queries),
                gallery,
                "queries must have unit norm, but row . has norm nan",
            ),
        ):
            with pytest.raises(ValueError, match=message):
                search(q, g)
    for prepare in (augment_gallery, encode_reciprocal, neighbour_graph):
        with pytest.raises(ValueError, match="gallery must have unit norm"):
            prepare(2 * gallery)
        with pytest.raises(ValueError, match="must be at least 1, got 0"):
            prepare(gallery, 0)
    for search, message in (
        (lambda: nearest(queries, gallery, 0), "k must be at least 1, got 0"),
        (lambda: expand_queries(queries, gallery, 0), "k must be at least 1"),
        (lambda: expand_queries(queries, gallery, alpha=-1), "alpha must be 0 or more"),
        (lambda: augment_gallery(gallery, alpha=np.nan), "alpha must be 0 or more"),
        (lambda: encode_reciprocal(gallery, k2=0), "k2 must be at least 1"),
        (lambda: rerank_k_reciprocal(queries, gallery, encoding, 1.1), "lam must be from 0 to 1"),
        (lambda: rerank_k_reciprocal(queries, gallery[1:], encoding), "12 photos, got one of 11"),
        (lambda: rerank_diffusion(queries, gallery, graph, alpha=1), "alpha must be from 0 to"),
        (lambda: rerank_diffusion(queries, gallery, graph, tolerance=0), "tolerance must be"),
        (lambda: rerank_diffusion(queries, gallery[1:], graph), "12 photos, got one of 11"),
        (lambda: rerank_diffusion(queries, gallery, graph, k=0), "k must be at least 1"),
        (lambda: rerank_superglobal(queries, gallery, top=0), "top must be at least 1"),
        (lambda: rerank_superglobal(queries, gallery, k=0), "k must be at least 1"),
        (lambda: rerank_superglobal(queries, gallery, beta=-0.1), "beta must be 0 or more"),
    ):
        with pytest.raises(ValueError, match=message):
            search()
