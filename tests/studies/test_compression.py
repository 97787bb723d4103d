"""Tests of what a compressed index loses."""

import numpy as np
import pandas as pd
import pytest

from lib.search.kinds import IndexSettings, train_and_add
from lib.studies import figures
from lib.studies.index_tuning import compression_losses
from tests.conftest import unit

N, D, K = 1500, 16, 10


@pytest.fixture(scope="module")
def sets():
    """Vectors in clusters, and queries beside some of them."""
    rng = np.random.default_rng(3)
    centres = unit(rng.normal(size=(60, D)))
    vectors = unit(centres[rng.integers(60, size=N)] + 0.1 * rng.normal(size=(N, D)))
    queries = unit(vectors[:50] + 0.05 * rng.normal(size=(50, D)))
    return vectors.astype(np.float32), queries.astype(np.float32)


@pytest.fixture(scope="module")
def losses(sets):
    return compression_losses(*sets, ["Flat", "SQ8", "SQ4", "PQ4np"], K)


def test_nothing_is_lost_without_compression(losses):
    flat = losses[0]
    assert (flat.recall, flat.reranked, flat.bytes_each) == (1, 1, 4 * D)
    np.testing.assert_allclose(flat.found, flat.exact, atol=1e-6)


def test_fewer_bytes_lose_more_and_reranking_wins_it_back(losses):
    sizes, recalls = [one.bytes_each for one in losses], [one.recall for one in losses]
    assert sizes == [64, 16, 8, 4]
    assert recalls == sorted(recalls, reverse=True) and recalls[-1] < 0.8 < recalls[1]
    errors = [np.abs(one.found - one.exact).mean() for one in losses]
    assert errors == sorted(errors)
    for one in losses:
        assert one.recall <= one.reranked <= 1 and one.found.shape == one.exact.shape == (50, K)
    assert losses[-1].reranked > losses[-1].recall + 0.1


def test_true_similarities_are_those_of_the_photos_found(sets, losses):
    vectors, queries = sets
    _, rows = train_and_add(vectors, IndexSettings("SQ4")).search(queries, K)
    by_hand = np.einsum("qd,qkd->qk", queries, vectors[rows])
    np.testing.assert_allclose(losses[2].exact, by_hand, atol=1e-6)


def test_kinds_that_faiss_does_not_know_are_refused(sets):
    with pytest.raises(ValueError, match="can't make an index 'PQ3'"):
        compression_losses(*sets, ["PQ3"], K)


def test_the_figures_are_drawn(losses, tmp_path):
    figures.plot_compression(losses, save=tmp_path / "losses.png")
    probes = pd.DataFrame({"recall": [0.5, 1], "time": [0.1, 0.4]}, index=[1, 8])
    figures.plot_probes(probes, save=tmp_path / "probes.png")
    table = pd.DataFrame({"side": ["flat"] * 2, "photos": [10, 100]})
    table = table.assign(**{cost: [1.0, 10.0] for cost in figures.COSTS})
    line = {"exponent": 1.0, "error": 0.0, "factor": 0.1}
    fits = {"flat": {cost: line for cost in figures.COSTS}}
    figures.plot_growth(table, fits, save=tmp_path / "growth.png")
    for path in tmp_path.glob("*.png"):
        assert path.stat().st_size > 10_000
