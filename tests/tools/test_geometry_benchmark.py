"""The benchmark of geometric verification: what is learned from whom, and what counts as wrong."""

import numpy as np
import pytest

from benchmarks.geometry import Ranking, cross_fitted, expanded, false_yes, fit, hits_of
from tests.conftest import unit


@pytest.fixture
def ranking(rng) -> Ranking:
    """Forty photos of twenty places; pairs of one place have more inliers."""
    labels = np.repeat(np.arange(20), 2)
    similarities = rng.uniform(0, 0.5, (40, 40)).astype(np.float32)
    np.fill_diagonal(similarities, -np.inf)
    order = np.argsort(-similarities, axis=1)[:, :-1]
    same = labels[order] == labels[:, None]
    inliers = np.where(same, 3, 1) + rng.normal(0, 0.8, same.shape)
    cosines = np.take_along_axis(similarities, order, 1)
    evidence = np.stack([cosines, inliers, np.zeros_like(inliers)], axis=-1)
    return Ranking(labels, np.arange(40), similarities, order, evidence, same)


def test_what_is_learned_comes_from_pairs_of_known_photos_only(ranking):
    known = ranking.labels >= 4
    fitted = fit([(ranking, known)])
    touched = ~(known[:, None] & known[ranking.order])
    changed = ranking._replace(evidence=np.where(touched[..., None], 1e3, ranking.evidence))
    assert fit([(changed, known)]) == fitted
    assert fitted.weights[1] > 1 and fitted.same > 0.5


def test_verification_by_other_places_puts_the_right_photo_first(ranking):
    odds, limits = cross_fitted(ranking)
    before, after = (hits_of(ranking, scores)[:, 0].mean() for scores in (None, odds))
    assert after > before + 0.3
    assert false_yes(odds, ranking.same, limits)["pairs"] < 0.01
    assert limits.shape == (40, 1) and fit([(ranking, ranking.labels > 0)]).limit > 0


def test_false_answers_are_counted_by_pair_and_by_query():
    odds = np.array([[3.0, -1, 2], [1, 5, 0]])
    same = np.array([[True, False, False], [False, True, False]])
    assert false_yes(odds, same, 2.0) == {"pairs": 0.25, "queries": 0.5}


@pytest.mark.parametrize("gallery", [False, True])
def test_a_query_never_moves_the_gallery_that_it_searches(ranking, rng, gallery):
    vectors = unit(rng.normal(size=(40, 8))).astype(np.float32)
    chosen = np.zeros(ranking.same.shape, bool)
    chosen[:, :5] = True
    found = expanded(vectors, ranking, chosen, gallery)
    query, weights = 7, np.maximum(ranking.similarities, 0) ** 3
    near = [[o for o in row[:5] if o != query][:3] for row in ranking.order]
    moved = np.array([vectors[i] + weights[i, n] @ vectors[n] for i, n in enumerate(near)])
    expected = unit(moved) @ vectors[query] if gallery else vectors @ unit(moved[query])
    expected[query] = -np.inf
    np.testing.assert_allclose(found[query], expected, atol=1e-5)
