"""Metrics against hand-worked examples, other implementations, and properties that must hold."""

import tracemalloc
from itertools import product

import ir_measures
import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from sklearn.metrics import average_precision_score

from lib.evaluation.ground_truth import GroundTruth, from_labels
from lib.evaluation.metrics import (
    GENERAL,
    LANDMARKS,
    REVISITED,
    average_precision,
    capped_precision_at,
    compare,
    hit_at,
    interval,
    judge,
    leave_one_out,
    pair_hits,
    query_table,
    recall_at,
)

some_hits = arrays(bool, array_shapes(min_dims=2, max_dims=2, max_side=12))


@st.composite
def judged_queries(draw, size: int = 12):
    """A ranking of all photos, those that are positive (one at least), and those that are junk."""
    ranking = draw(st.permutations(range(size)))
    kinds = draw(st.lists(st.sampled_from("pjn"), min_size=size, max_size=size))
    kinds[draw(st.integers(0, size - 1))] = "p"
    lists = [[i for i in range(size) if kinds[i] == kind] for kind in "pj"]
    return list(ranking), *lists


def walk(ranking: list[int], positives: list[int], junk: list[int], r: int = 5) -> dict:
    """All measures of one query, by walking down its ranking in plain Python."""
    positives, junk = set(positives), set(junk)
    kept = [photo for photo in ranking if photo not in junk]
    n, hits, total, total_at_n, area, last = len(positives), 0, 0.0, 0.0, 0.0, 0
    precision_before = 1.0
    for rank, photo in enumerate(kept, start=1):
        if photo in positives:
            hits += 1
            last = rank
            total += hits / rank
            area += (precision_before + hits / rank) / 2
            if rank <= n:
                total_at_n += hits / rank
        precision_before = hits / rank
    depth = min(r, last) if hits == n else r
    return {
        "AP": total / n,
        "AP@R": total_at_n / n,
        "trapezoid": area / n,
        "capped": sum(photo in positives for photo in kept[:depth]) / depth,
        "recall": sum(photo in positives for photo in kept[:r]) / n,
        "hit": float(any(photo in positives for photo in kept[:r])),
    }


def ours(hits: np.ndarray, n: np.ndarray, r: int = 5) -> dict:
    """The same of many queries."""
    return {
        "AP": average_precision(hits, n),
        "AP@R": average_precision(hits, n, k=n),
        "trapezoid": average_precision(hits, n, trapezoid=True),
        "capped": capped_precision_at(hits, r, n),
        "recall": recall_at(hits, r, n),
        "hit": hit_at(hits, r),
    }


def value(ranking: list[int], positives: list[int], junk: list[int]) -> dict:
    """The same of one query."""
    hits = judge(np.array([ranking]), [positives], [junk])
    return {name: v[0] for name, v in ours(hits, np.array([len(positives)])).items()}


def random_queries(rng, queries: int, photos: int, ranked: int):
    """Rankings, positives (one at least) and junk; the last ranks of some rows are empty."""
    ranks = rng.permuted(np.tile(np.arange(photos, dtype=np.int32), (queries, 1)), axis=1)
    ranks = ranks[:, :ranked].copy()
    ranks[np.arange(ranked) >= rng.integers(ranked // 2, 2 * ranked, size=(queries, 1))] = -1
    positives, junk = [], []
    for _ in range(queries):
        shuffled, n = rng.permutation(photos), rng.integers(1, 8)
        positives.append(shuffled[:n])
        junk.append(shuffled[n : n + rng.integers(0, 8)])
    return ranks, positives, junk


def test_ten_thousand_rankings_with_junk_against_a_plain_walk(rng):
    for ranked in (20, 12):  # all photos, and what a search for the best twelve returns
        ranks, positives, junk = random_queries(rng, 5000, photos=20, ranked=ranked)
        result = ours(judge(ranks, positives, junk), np.array([len(p) for p in positives]))
        rows = zip(ranks.tolist(), [p.tolist() for p in positives], junk, strict=True)
        expected = [walk(ranking, good, bad.tolist()) for ranking, good, bad in rows]
        for name, values in result.items():
            wanted = [row[name] for row in expected]
            np.testing.assert_allclose(values, wanted, rtol=0, atol=1e-12, err_msg=name)


def compute_ap(ranks: list[int], nres: int) -> float:
    """The definition of the revisited benchmarks: the ranks of the positives count from 0."""
    ap = 0.0
    for j, rank in enumerate(ranks):
        precision_0 = 1.0 if rank == 0 else j / rank
        precision_1 = (j + 1) / (rank + 1)
        ap += (precision_0 + precision_1) / (2 * nres)
    return ap


def revisited(ranking: list[int], positives: list[int], junk: list[int]) -> dict:
    """mAP and mP@k of the revisited benchmarks for one query, step by step as they define them."""
    pos = [rank for rank, photo in enumerate(ranking) if photo in positives]
    skipped = [rank for rank, photo in enumerate(ranking) if photo in junk]
    pos = [rank - sum(j < rank for j in skipped) for rank in pos]
    result = {"AP": compute_ap(pos, len(positives))}
    for kappa in (1, 5, 10):
        kq = min(max(pos) + 1, kappa)
        result[f"P@{kappa}"] = sum(rank + 1 <= kq for rank in pos) / kq
    return result


def landmarks(predictions: list[int], relevant: list[int]) -> float:
    """The formula of the Google Landmarks retrieval challenges, for one query."""
    m, n, total = len(relevant), len(predictions), 0.0
    for k in range(1, min(n, 100) + 1):
        precision = sum(p in relevant for p in predictions[:k]) / k
        rel = 1 if predictions[k - 1] in relevant else 0
        total += precision * rel
    return total / min(m, 100)


def truth_of(positives, junk, photos: int) -> GroundTruth:
    names = [f"query {i}" for i in range(len(positives))]
    return GroundTruth(names, [f"photo {i}" for i in range(photos)], positives, junk)


def test_the_revisited_protocol_is_the_benchmarks_own(rng):
    _, positives, junk = random_queries(rng, 200, photos=40, ranked=40)
    ranks = rng.permuted(np.tile(np.arange(40), (200, 1)), axis=1)  # the benchmark ranks all photos
    positives[7] = positives[7][:0]
    table = query_table(ranks, truth_of(positives, junk, 40), REVISITED)
    for i, ranking in enumerate(ranks.tolist()):
        if i == 7:
            assert table.loc["query 7", list(REVISITED)].isna().all()
        else:
            expected = revisited(ranking, positives[i].tolist(), junk[i].tolist())
            assert table.loc[f"query {i}", list(REVISITED)].to_dict() == pytest.approx(expected)
    assert table["AP"].mean() == pytest.approx(np.nanmean(table["AP"].to_numpy()))


@pytest.mark.parametrize("ranked", [100, 150, 60])
def test_the_landmarks_protocol_is_the_challenges_formula(rng, ranked):
    ranks = rng.permuted(np.tile(np.arange(300), (40, 1)), axis=1)[:, :ranked]
    positives = [rng.permutation(300)[:n] for n in rng.integers(1, 200, size=40)]
    table = query_table(ranks, truth_of(positives, [np.array([], int)] * 40, 300), LANDMARKS)
    lists = zip(ranks.tolist(), [p.tolist() for p in positives], strict=True)
    expected = [landmarks(*row) for row in lists]
    np.testing.assert_allclose(table["AP@100"], expected, rtol=1e-12)


def test_trec_evals_measures_agree(rng):
    ranks, positives, junk = random_queries(rng, 60, photos=50, ranked=30)
    qrels, run = [], []
    for q, ranking in enumerate(ranks.tolist()):
        qrels += [ir_measures.Qrel(str(q), str(p), 1) for p in positives[q]]
        kept = [p for p in ranking if p >= 0 and p not in junk[q]]
        run += [ir_measures.ScoredDoc(str(q), str(p), -i) for i, p in enumerate(kept)]
    n = np.array([len(p) for p in positives])
    hits = judge(ranks, positives, junk)
    for measure, values in (
        (ir_measures.AP, average_precision(hits, n)),
        (ir_measures.R @ 10, recall_at(hits, 10, n)),
        (ir_measures.Success @ 5, hit_at(hits, 5)),
    ):
        theirs = {m.query_id: m.value for m in ir_measures.iter_calc([measure], qrels, run)}
        wanted = [theirs[str(q)] for q in range(60)]
        np.testing.assert_allclose(values, wanted, atol=1e-6, err_msg=str(measure))


def test_judge_by_hand():
    ranks = np.array([[3, 0, 2, 1, 4], [4, 3, -1, -1, -1]])
    hits = judge(ranks, [[1, 4], [3, 0]], [[0, 3], []])
    # Of the first row 2, 1, 4 are left.
    expected = [[False, True, True, False, False], [False, True, False, False, False]]
    np.testing.assert_array_equal(hits, expected)
    np.testing.assert_array_equal(judge(ranks, [[3], [0]]), [[True] + [False] * 4, [False] * 5])
    assert judge(np.empty((0, 5), dtype=int), []).shape == (0, 5)
    assert judge(np.empty((2, 0), dtype=int), [[0], [1]], [[], []]).shape == (2, 0)


def test_rankings_that_make_no_sense_are_refused():
    ranks = np.array([[0, 1, 2], [2, 1, 0]])
    with pytest.raises(ValueError, match="row 1: a positive is junk, too"):
        judge(ranks, [[0], [1]], [[1], [0, 1]])
    with pytest.raises(ValueError, match="row 1: a photo is ranked twice"):
        judge(np.array([[0, 1, 2], [2, 1, 2]]), [[0], [1]])
    with pytest.raises(ValueError, match="2 rankings, but positives of 1 queries and junk of 2"):
        judge(ranks, [[0]])
    with pytest.raises(ValueError, match="2 rankings, but positives of 2 queries and junk of 1"):
        judge(ranks, [[0], [1]], [[]])
    for wrong in (ranks - 2, ranks):
        with pytest.raises(ValueError, match="numbers from 0 on"):
            judge(wrong, [[0], [-1]])
    for wrong in (ranks[0], ranks / 1):
        with pytest.raises(ValueError, match=r"ranks must be int \(q, r\)"):
            judge(wrong, [[0], [1]])


def test_trapezoids_by_hand():
    hits = np.array([[True, False, True, False]])
    # (1 + 1) / 2 for the first hit; precision falls to 1/2 before the second, and is 2/3 at it.
    assert average_precision(hits, trapezoid=True)[0] == pytest.approx(
        (1 + (1 / 2 + 2 / 3) / 2) / 2
    )
    late = np.array([[False, False, True]])
    assert average_precision(late, trapezoid=True)[0] == pytest.approx((0 + 1 / 3) / 2)


def test_map_at_r_by_hand():
    # Three positives, so three ranks count: (1/1 + 2/3) / 3. One positive: only the first rank.
    hits = np.array([[True, False, True, True], [False, True, False, False], [False] * 4])
    result = average_precision(hits, k=hits.sum(axis=1))
    np.testing.assert_allclose(result, [(1 + 2 / 3) / 3, 0, np.nan])


def test_capped_precision_by_hand():
    hits = np.array(
        [
            [True, False, True, False, False],  # all found at rank 3, so P@10 is 2/3
            [True, False, True, False, False],  # one is still missing: 2/10
            [False, False, False, False, False],  # no positive at all
            [False, False, False, False, False],  # the only positive is not found
        ]
    )
    n_positives = [2, 3, 0, 1]
    np.testing.assert_allclose(capped_precision_at(hits, 10, n_positives), [2 / 3, 0.2, np.nan, 0])
    np.testing.assert_allclose(capped_precision_at(hits, 1, n_positives), [1, 1, np.nan, 0])
    np.testing.assert_allclose(capped_precision_at(hits, 2, n_positives), [0.5, 0.5, np.nan, 0])


def test_a_hit_among_the_first_by_hand():
    hits = np.array([[False, True, True], [False, False, True], [False] * 3])
    np.testing.assert_array_equal(hit_at(hits, 2), [1, 0, 0])
    np.testing.assert_array_equal(hit_at(hits, 9), [1, 1, 0])


@given(judged_queries())
def test_measures_are_shares_and_a_perfect_ranking_has_them_all(query):
    ranking, positives, junk = query
    assert all(0 <= v <= 1 for v in value(*query).values())
    rest = [photo for photo in ranking if photo not in positives]
    best = value(positives + rest, positives, junk)
    assert [best[name] for name in ("AP", "AP@R", "trapezoid", "capped", "hit")] == [1] * 5


@given(judged_queries(), st.randoms())
def test_distractors_behind_the_last_positive_change_nothing(query, random):
    ranking, positives, junk = query
    end = max(ranking.index(photo) for photo in positives) + 1
    tail = ranking[end:]
    random.shuffle(tail)
    assert value(ranking[:end] + tail, positives, junk) == value(*query)


@given(judged_queries(), st.randoms())
def test_junk_changes_nothing_wherever_it_is(query, random):
    ranking, positives, junk = query
    moved = [photo for photo in ranking if photo not in junk]
    without = value(moved, positives, [])
    for photo in junk:
        moved.insert(random.randint(0, len(moved)), photo)
    assert value(moved, positives, junk) == without == value(*query)


@given(judged_queries(), st.data())
def test_moving_a_positive_up_never_lowers_a_measure(query, data):
    ranking, positives, junk = query
    photo = data.draw(st.sampled_from(positives))
    place = ranking.index(photo)
    better = ranking[:place] + ranking[place + 1 :]
    better.insert(data.draw(st.integers(0, place)), photo)
    before, after = value(*query), value(better, positives, junk)
    for name in before:
        assert after[name] >= before[name] - 1e-12, name


def test_query_table_reads_rows_as_it_needs_them(rng, tmp_path, monkeypatch):
    ranks, positives, junk = random_queries(rng, 300, photos=60, ranked=60)
    positives[17] = positives[17][:0]
    np.save(tmp_path / "ranks.npy", ranks)
    mapped = np.load(tmp_path / "ranks.npy", mmap_mode="r")
    truth = truth_of(positives, junk, 60)
    expected = query_table(ranks, truth, GENERAL)

    class Rows:
        """Nothing but rows to slice, seven at most."""

        shape = (300, 2**22 // 7)

        def __len__(self):
            return 300

        def __getitem__(self, rows):
            assert rows.stop - rows.start <= 7
            return mapped[rows]

    for given_ranks in (mapped, Rows()):
        table = query_table(given_ranks, truth, GENERAL)
        assert table.equals(expected)
    assert table.index.tolist() == truth.queries and table.index.name == "query"
    assert table.columns.tolist() == ["n_positives", *GENERAL]
    assert table["n_positives"].tolist() == [len(p) for p in positives]
    assert table.drop(columns="n_positives").isna().all(axis=1).tolist() == [
        i == 17 for i in range(300)
    ]
    hits = judge(ranks, positives, junk)
    n = table["n_positives"].to_numpy()
    np.testing.assert_array_equal(table["AP@R"], average_precision(hits, n, k=n))
    np.testing.assert_array_equal(table["hit@5"].drop("query 17"), np.delete(hit_at(hits, 5), 17))


def test_query_table_of_labelled_photos_is_leave_one_out(rng):
    labels = rng.integers(12, size=80)
    embeddings = rng.normal(size=(80, 6)).astype(np.float32)
    ranks = np.argsort(-(embeddings @ embeddings.T), axis=1, kind="stable")
    table = query_table(ranks, from_labels([f"{i:02}" for i in range(80)], labels), GENERAL)
    np.testing.assert_allclose(table["AP"], average_precision(leave_one_out(embeddings, labels)))


def test_query_table_says_what_is_wrong():
    truth = truth_of([np.array([0]), np.array([1])], [np.array([], int)] * 2, 3)
    with pytest.raises(ValueError, match="1 rankings of 2 queries"):
        query_table(np.array([[0, 1, 2]]), truth, GENERAL)
    with pytest.raises(ValueError, match="photo 3 of a gallery of 3 is ranked"):
        query_table(np.array([[0, 1, 2], [1, 2, 3]]), truth, GENERAL)
    with pytest.raises(ValueError, match="from query 'query 0' on, row 1: a photo is ranked twice"):
        query_table(np.array([[0, 1, 2], [1, 2, 2]]), truth, GENERAL)


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


def test_recall_by_hand():
    hits = np.array([[True, False, True, False], [False, False, False, True]])
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


def test_interval_of_many_queries_takes_little_memory():
    """All draws at once took 640 MB; drawn in parts they are the same."""
    values = np.random.default_rng(0).random(20_000)
    tracemalloc.start()
    result = interval(values, resamples=500)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 50_000_000
    draws = np.random.default_rng(0).integers(20_000, size=(500, 20_000))
    tail = (1 - 0.95) / 2
    expected = np.quantile(values[draws].mean(axis=1), [tail, 1 - tail])
    np.testing.assert_allclose(result[1:], expected, rtol=1e-12)


def test_interval_without_any_positive_is_an_error():
    with pytest.raises(ValueError, match="no query has a positive"):
        interval(np.array([np.nan]))


def test_compare_is_the_exact_randomization_test(rng):
    a, b = rng.random(9), rng.random(9) + 0.2
    exact = scipy.stats.permutation_test(
        (b - a,), np.mean, permutation_type="samples", n_resamples=np.inf
    )
    difference, p_value = compare(a, b, resamples=40000)
    assert difference == interval(b - a)
    assert p_value == pytest.approx(exact.pvalue, abs=0.01)


def test_compare_flips_the_queries_of_a_landmark_together(rng):
    groups = rng.permutation(np.repeat(np.arange(6), 5)).astype(str)
    a = rng.random(30)
    b = a + 0.1 + 0.3 * rng.normal(size=6)[groups.astype(int)]
    sums = np.array([(b - a)[groups == g].sum() for g in np.unique(groups)])
    flipped = [abs(np.dot(signs, sums)) for signs in product((1, -1), repeat=6)]
    exact = np.mean(np.array(flipped) >= abs(sums.sum()) - 1e-9)
    grouped = compare(a, b, groups, resamples=40000)
    assert grouped.difference == interval(b - a, groups)
    assert grouped.p_value == pytest.approx(exact, abs=0.01)


def test_compare_depends_on_neither_direction_nor_queries_without_positives(rng):
    a, b = rng.random(40), rng.random(40)
    forth, back = compare(a, b), compare(b, a)
    assert forth.p_value == back.p_value
    assert forth.difference.value == pytest.approx(-back.difference.value)
    with_nan = compare(np.append(a, np.nan), np.append(b, np.nan))
    assert with_nan == forth
    assert compare(a, a).p_value == 1
    assert compare([0.5], [0.7]).p_value == 1  # one query can't tell anything
    for cancelling in ([0.1, 0.2, -0.3] * 8, [0.1, 0.2, 0.3, -0.6] * 4):  # but for rounding
        assert compare(np.zeros(len(cancelling)), np.array(cancelling)).p_value == 1
    assert compare(a, a + 0.1).p_value == pytest.approx(1 / 10000)


def test_without_a_difference_small_p_values_are_as_rare_as_they_say(rng):
    below = sum(compare(*rng.random((2, 30)), resamples=199).p_value <= 0.1 for _ in range(300))
    assert 0.05 <= below / 300 <= 0.16


def test_compare_wants_the_same_queries():
    for a, b in (([0.1, 0.2], [0.1]), ([0.1, np.nan], [0.1, 0.2])):
        with pytest.raises(ValueError, match="measured on the same queries"):
            compare(a, b)
    with pytest.raises(ValueError, match="no query has a positive"):
        compare([np.nan], [np.nan])


def test_every_measure_leaves_out_a_query_that_has_nothing_to_find():
    """hit@k counted it as a miss, beside an AP that left it out."""
    hits = np.array([[True, False], [False, False]])
    for name, measure in GENERAL.items():
        assert np.isnan(measure(hits, hits.sum(axis=1))).tolist() == [False, True], name
