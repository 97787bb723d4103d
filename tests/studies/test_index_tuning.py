"""Tuning: the chosen index reaches the recall and fits, and what is reported is true."""

import numpy as np
import pandas as pd
import pytest
from faiss.contrib.evaluation import knn_intersection_measure
from scipy import stats

from lib.search.photo_index import IndexSettings, PhotoIndex
from lib.studies.figures import plot_frontier
from lib.studies.index_tuning import TargetUnreachableError, lower_limit, search_exactly, tune
from tests.conftest import unit

N, D = 4000, 32


def clustered(rng: np.random.Generator, n: int, centres: np.ndarray) -> np.ndarray:
    """Unit vectors, float32 (n, D), round some centres."""
    near = centres[rng.integers(len(centres), size=n)]
    return unit(near + 0.12 * rng.normal(size=(n, D))).astype(np.float32)


@pytest.fixture(scope="module")
def world():
    """Vectors, and queries from the same distribution."""
    rng = np.random.default_rng(5)
    centres = unit(rng.normal(size=(200, D)))
    return clustered(rng, N, centres), clustered(rng, 300, centres)


@pytest.fixture(scope="module")
def tuned(world):
    return tune(world[0], 0.95, N * D * 2)


def test_the_choice_finds_enough_for_fresh_queries_in_the_real_index(world, tuned):
    vectors, queries = world
    names = [str(i) for i in range(N)]
    index = PhotoIndex.build(vectors, names, "model", tuned.settings)
    found = np.array(index.search(queries, 10)[0]).astype(int)
    exact, _ = search_exactly(vectors, np.arange(N), queries, 10)
    assert knn_intersection_measure(exact, found) >= 0.94  # 3,000 neighbours: 0.01 is two errors


def test_the_choice_fits_and_is_the_fastest_that_reaches_the_target(tuned):
    table = tuned.frontier
    (row,) = table[table["chosen"]].to_dict("records")
    assert tuned.settings == IndexSettings(row["factory"], row["search"], row["rerank"])
    assert row["bytes"] <= N * D * 2 and row["fits"] and row["frontier"]
    others = table[(table["recall_low"] >= 0.95) & table["fits"]]
    assert row["qps_2"] == others["qps_2"].max()
    flat = table[table["factory"] == "Flat"]
    assert flat["bytes"].tolist() == [(N - N // 10) * D * 4] and not flat["fits"].any()
    assert table["vectors"].unique().tolist() == [N - N // 10]


def test_on_the_frontier_more_recall_costs_speed(tuned):
    table = tuned.frontier
    front = table[table["frontier"]].sort_values("recall")
    assert len(front) >= 2
    assert front["recall"].is_monotonic_increasing and front["qps_2"].is_monotonic_decreasing
    for row in table[table["fits"]].itertuples():
        as_good = front[(front["recall"] >= row.recall) & (front["qps_2"] >= row.qps_2)]
        assert len(as_good), f"{row} is beaten by nothing on the frontier"


def test_with_all_the_memory_everything_can_be_found(world):
    settings, table = tune(world[0], 1.0, queries=world[1])
    assert table.loc[table["chosen"], "recall"].tolist() == [1.0]
    assert table["vectors"].unique().tolist() == [N]  # none is held out
    assert isinstance(settings, IndexSettings)


def test_a_sample_chooses_the_kinds_that_are_built_with_all(world):
    table = tune(world[0], 0.9, sample=1000).frontier
    first, full = (table[table["vectors"] == n] for n in (1000, N - N // 10))
    assert len(first) + len(full) == len(table)
    kinds = full["factory"].unique()
    assert "Flat" in kinds and 3 <= len(kinds) < first["factory"].nunique()
    assert not first["frontier"].any() and not first["chosen"].any() and full["chosen"].sum() == 1


def test_mapped_vectors_give_the_same_recall(world, tmp_path):
    np.save(tmp_path / "vectors.npy", world[0])
    mapped = np.load(tmp_path / "vectors.npy", mmap_mode="r")

    def of(vectors):
        table = tune(vectors, 0.95, N * (D + 8)).frontier
        return table.set_index(["factory", "search", "rerank"])["recall"]

    # Inner: timings decide which settings are tried.
    both = pd.concat([of(mapped), of(world[0])], axis=1, join="inner")
    assert len(both) >= 10
    np.testing.assert_array_equal(both.iloc[:, 0], both.iloc[:, 1])


def test_impossible_demands_tell_what_is_possible(world):
    vectors = world[0]
    with pytest.raises(TargetUnreachableError, match=r"recall@10 of 0.99 in 20,000 bytes.*460,800"):
        tune(vectors, 0.99, 20_000)
    # Half a byte for each dimension, and no room for more: the message names the best.
    rng = np.random.default_rng(1)
    noise = unit(rng.normal(size=(2000, D))).astype(np.float32)
    with pytest.raises(TargetUnreachableError, match=r"the best that fits is 0\.\d+ .*nprobe=.*by"):
        tune(noise, 1.0, 2000 * 26)


def test_a_target_that_only_the_bound_misses_needs_more_queries(world):
    # The message did not say so. 20 queries whose neighbours are all found show a recall of 0.86.
    with pytest.raises(
        TargetUnreachableError, match=r"1\.000 .*more queries would narrow the bound"
    ):
        tune(world[0][:200], 0.95, 20_000, kinds=["SQ8"])


@pytest.mark.parametrize("target", [0, 1.01, float("nan")])
def test_targets_that_make_no_sense_are_refused(world, target):
    with pytest.raises(ValueError, match="target_recall must be above 0"):
        tune(world[0], target)


def test_too_few_vectors_are_refused(world):
    with pytest.raises(ValueError, match="99 vectors are too few"):
        tune(world[0][:99])


def test_few_vectors_are_tuned_for_without_a_warning(world, capfd):
    """Faiss asked for more of them on stderr, once for each piece of the product quantizer."""
    tune(np.ascontiguousarray(world[0][:200]), 0.3)
    assert "WARNING" not in capfd.readouterr().err


def test_the_frontier_is_drawn(tuned, tmp_path):
    plot_frontier(tuned.frontier, save=tmp_path / "frontier.png")
    assert (tmp_path / "frontier.png").stat().st_size > 10_000


def test_what_a_sample_rules_out_is_told_of_all(world):
    for most, message in ((N * 26, "the best that fits is 0"), (100, "no kind of index is that")):
        with pytest.raises(TargetUnreachableError, match=message):
            tune(
                clustered(np.random.default_rng(2), N, unit(np.ones((1, D)))), 1.0, most, sample=900
            )


def test_the_lower_limit_is_honest_about_few_queries():
    # It had been 1.0 for 10 of 10, as a normal distribution without variance has no width.
    assert lower_limit(1.0, 10) == pytest.approx(0.05**0.1)
    assert lower_limit(0.0, 10) == 0.0
    for hits, queries in ((9, 10), (99, 100), (1, 5)):
        exact = stats.binomtest(hits, queries, alternative="greater").proportion_ci(0.95)
        assert lower_limit(hits / queries, queries) == pytest.approx(exact.low)


def test_perfect_recall_of_a_few_queries_does_not_reach_a_high_target(world):
    few = world[1][:10]
    table = tune(world[0], 0.7, queries=few).frontier
    approximate = table[table["factory"] != "Flat"]
    assert approximate["recall"].max() == 1 and approximate["recall_low"].max() < 0.75
    assert tune(world[0], 0.99, queries=few).settings == IndexSettings()


def test_vectors_that_are_not_of_unit_norm_are_refused(world):
    with pytest.raises(ValueError, match="vectors must have unit norm"):
        tune(2 * world[0])
    with pytest.raises(ValueError, match=r"queries must be \(n, 32\)"):
        tune(world[0], queries=world[1][:, :8])
