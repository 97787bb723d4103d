"""Metrics against hand-worked examples, scikit-learn, and properties that must hold."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from sklearn.metrics import average_precision_score

from lib.metrics import (
    average_precision,
    interval,
    leave_one_out,
    pair_hits,
    precision_at,
    recall_at,
)

some_hits = arrays(bool, array_shapes(min_dims=2, max_dims=2, max_side=12))


def test_average_precision_by_hand():
    hits = [
        [True, False, True, False, False],  # (1/1 + 2/3) / 2
        [False, False, False, False, True],  # 1/5
        [True, True, False, False, False],  # 1
        [False, False, False, False, False],  # no positive at all
    ]
    result = average_precision(np.array(hits))
    np.testing.assert_allclose(result, [5 / 6, 1 / 5, 1.0, np.nan])


def test_positives_missing_from_the_ranking_count_as_missed():
    hits = np.array([[True, False, True]])
    assert average_precision(hits, n_positives=[4])[0] == pytest.approx((1 + 2 / 3) / 4)
    assert recall_at(hits, 3, n_positives=[4])[0] == pytest.approx(2 / 4)


def test_average_precision_at_k_divides_by_the_most_that_k_ranks_can_hold():
    hits = np.array([[True, True, False, True]])  # three positives, two ranks count
    assert average_precision(hits, k=2)[0] == pytest.approx(1.0)
    assert average_precision(hits, k=3)[0] == pytest.approx(2 / 3)


def test_precision_and_recall_by_hand():
    hits = np.array([[True, False, True, False], [False, False, False, True]])
    np.testing.assert_allclose(precision_at(hits, 2), [1 / 2, 0])
    np.testing.assert_allclose(precision_at(hits, 8), [2 / 8, 1 / 8])
    np.testing.assert_allclose(recall_at(hits, 2), [1 / 2, 0])
    np.testing.assert_allclose(recall_at(hits, 4), [1, 1])


def test_more_hits_than_positives_is_an_error():
    with pytest.raises(ValueError, match="more hits than positives"):
        average_precision(np.array([[True, True]]), n_positives=[1])


@given(some_hits)
def test_average_precision_agrees_with_scikit_learn(hits):
    scores = -np.arange(hits.shape[1])  # the first rank has the highest score
    for row, value in zip(hits, average_precision(hits), strict=True):
        if row.any():
            assert value == pytest.approx(average_precision_score(row, scores), abs=1e-12)
        else:
            assert np.isnan(value)


@given(some_hits, st.data())
def test_moving_a_hit_forward_never_lowers_average_precision(hits, data):
    row = hits[0]
    swaps = [i for i in range(1, len(row)) if row[i] and not row[i - 1]]
    if not swaps:
        return
    i = data.draw(st.sampled_from(swaps))
    better = row.copy()
    better[i - 1], better[i] = True, False
    assert average_precision(better)[0] > average_precision(row)[0]


@given(some_hits)
def test_what_comes_after_the_last_hit_changes_nothing(hits):
    longer = np.concatenate([hits, np.zeros((len(hits), 5), dtype=bool)], axis=1)
    np.testing.assert_allclose(average_precision(longer), average_precision(hits), rtol=1e-12)


def test_leave_one_out_against_a_plain_loop(rng):
    labels = rng.integers(4, size=30)
    embeddings = rng.normal(size=(30, 5)).astype(np.float32)
    hits = leave_one_out(embeddings, labels)
    assert hits.shape == (30, 29)
    for query in range(30):
        others = [i for i in range(30) if i != query]
        others.sort(key=lambda i, q=query: -float(embeddings[q] @ embeddings[i]))
        np.testing.assert_array_equal(hits[query], labels[others] == labels[query])


def test_a_query_is_not_its_own_answer_even_among_duplicates():
    embeddings = np.ones((3, 2), dtype=np.float32)
    hits = leave_one_out(embeddings, np.array(["a", "a", "b"]))
    np.testing.assert_array_equal(hits.sum(axis=1), [1, 1, 0])


def test_pair_hits_finds_each_querys_own_positive():
    queries, positives = np.eye(4), np.eye(4)[[0, 1, 3, 2]]
    hits = pair_hits(queries, positives)
    assert hits[0, 0] and hits[1, 0]
    assert not hits[2, 0] and not hits[3, 0]
    np.testing.assert_array_equal(hits.sum(axis=1), 1)


def test_interval_holds_the_mean_and_leaves_out_queries_without_positives():
    result = interval(np.array([0.0, 1.0, np.nan, 1.0]))
    assert result.value == pytest.approx(2 / 3)
    assert 0 <= result.low <= result.value <= result.high <= 1
    assert result == interval(np.array([0.0, 1.0, np.nan, 1.0]))


def test_interval_covers_the_truth_about_as_often_as_it_says(rng):
    inside = 0
    for _ in range(200):
        sample = rng.random(60)
        _, low, high = interval(sample, resamples=300)
        inside += low <= 0.5 <= high
    assert 0.88 <= inside / 200 <= 0.99


def test_interval_is_wider_when_queries_come_in_groups(rng):
    landmark = rng.random(20)
    values, groups = np.repeat(landmark, 10), np.repeat(np.arange(20), 10)
    alone, grouped = interval(values), interval(values, groups=groups)
    assert grouped.high - grouped.low > 2 * (alone.high - alone.low)


def test_interval_without_any_positive_is_an_error():
    with pytest.raises(ValueError, match="no query has a positive"):
        interval(np.array([np.nan]))
