"""Whitenings against other implementations, and what they are good for."""

from functools import partial
from itertools import combinations

import numpy as np
import pytest
import scipy.linalg
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.covariance import oas
from sklearn.decomposition import PCA

from lib.evaluation.metrics import average_precision, leave_one_out
from lib.network.whitening import Whitening, learn_pca_whitening, learn_supervised_whitening
from tests.conftest import unit


def correlated(rng, n: int, d: int) -> np.ndarray:
    """Descriptors whose directions differ in variance by three orders of magnitude."""
    axes = np.linalg.qr(rng.normal(size=(d, d)))[0]
    return (rng.normal(size=(n, d)) * np.geomspace(1, 0.03, d)) @ axes + rng.normal(size=d)


def whitened(whitening: Whitening, descriptors: np.ndarray) -> np.ndarray:
    """What apply() gives before it normalizes."""
    return (descriptors - whitening.mean) @ whitening.projection


def same_up_to_sign(actual: np.ndarray, expected: np.ndarray, **tolerance) -> None:
    """Compare columns, whose signs are arbitrary."""
    signs = np.sign(np.sum(actual * expected, axis=0))
    np.testing.assert_allclose(actual * signs, expected, **tolerance)


def test_pca_whitening_leaves_unit_variance_in_every_direction(rng):
    x = correlated(rng, 400, 12)
    whitening = learn_pca_whitening(x, shrinkage=0)
    y = whitened(whitening, x)
    np.testing.assert_allclose(y.mean(axis=0), 0, atol=1e-10)
    np.testing.assert_allclose(np.cov(y.T, bias=True), np.eye(12), atol=1e-8)
    applied = whitening.apply(x)
    assert applied.shape == (400, 12) and applied.dtype == np.float32
    np.testing.assert_allclose(applied, unit(y), atol=1e-6)


@pytest.mark.parametrize("dimension", [1, 5, 12])
def test_pca_whitening_is_sklearns(rng, dimension):
    x = correlated(rng, 300, 12)
    expected = PCA(dimension, whiten=True, svd_solver="full").fit(x).transform(x)
    whitening = learn_pca_whitening(x, dimension, shrinkage=0)
    assert whitening.projection.shape == (12, dimension)
    # sklearn divides by n - 1.
    same_up_to_sign(whitened(whitening, x) * np.sqrt(299 / 300), expected, rtol=1e-6, atol=1e-8)


def labels_of(pairs: np.ndarray) -> np.ndarray:
    """One label for each pair, which together are all rows."""
    labels = np.empty(pairs.size, int)
    labels[pairs] = np.arange(len(pairs))[:, None]
    return labels


def test_lw_gives_the_differences_of_matching_pairs_unit_variance_and_sorts_the_rest(rng):
    x = correlated(rng, 300, 10)
    pairs = rng.permutation(300).reshape(-1, 2)
    whitening = learn_supervised_whitening(x, labels=labels_of(pairs), shrinkage=0)
    y = whitened(whitening, x)
    differences = y[pairs[:, 0]] - y[pairs[:, 1]]
    np.testing.assert_allclose(differences.T @ differences / len(pairs), np.eye(10), atol=1e-8)
    covariance = np.cov(y.T, bias=True)
    variances = np.diag(covariance)
    np.testing.assert_allclose(covariance, np.diag(variances), atol=1e-8)
    assert (np.diff(variances) <= 0).all()


def test_lw_solves_the_generalized_eigenvalue_problem(rng):
    x = correlated(rng, 200, 8)
    pairs = rng.permutation(200).reshape(-1, 2)
    c_s, c_d = np.zeros((8, 8)), np.zeros((8, 8))
    for i, j in pairs:
        c_s += np.outer(x[i] - x[j], x[i] - x[j]) / len(pairs)
    for row in x:
        c_d += np.outer(row - x.mean(axis=0), row - x.mean(axis=0))
    _, expected = scipy.linalg.eigh(c_d, c_s)  # c_d v = lambda c_s v with v' c_s v = 1
    for dimension in (8, 3):
        whitening = learn_supervised_whitening(
            x, labels=labels_of(pairs), dimension=dimension, shrinkage=0
        )
        same_up_to_sign(whitening.projection, expected[:, ::-1][:, :dimension], rtol=1e-6)


@settings(max_examples=25)
@given(st.lists(st.integers(0, 9), min_size=30, max_size=40), st.integers(0, 1000))
def test_labels_stand_for_all_pairs_of_each_label(labels, seed):
    x = correlated(np.random.default_rng(seed), len(labels), 4)
    labels = np.array(labels)
    c_s, weights = np.zeros((4, 4)), 0.0
    for label in set(labels.tolist()):
        rows = np.flatnonzero(labels == label)
        for i, j in combinations(rows, 2):
            c_s += 2 / len(rows) * np.outer(x[i] - x[j], x[i] - x[j])
            weights += 2 / len(rows)
    c_s /= weights
    p = learn_supervised_whitening(x, labels=labels, shrinkage=0).projection
    np.testing.assert_allclose(p.T @ c_s @ p, np.eye(4), atol=1e-6)


def nuisance_world(rng, axes, landmarks: int) -> tuple[np.ndarray, np.ndarray]:
    """Six directions tell landmarks apart, ten vary as much from photo to photo."""
    labels = np.repeat(np.arange(landmarks), 4)
    identity = rng.normal(size=(landmarks, 6))[labels] + 0.3 * rng.normal(size=(len(labels), 6))
    nuisance = rng.normal(size=(len(labels), 10))
    return np.hstack([identity, nuisance]) @ axes, labels


def mean_ap(embeddings: np.ndarray, labels: np.ndarray) -> float:
    return average_precision(leave_one_out(embeddings, labels)).mean()


def test_lw_turns_down_what_varies_within_landmarks_and_pca_does_not(rng):
    axes = np.linalg.qr(rng.normal(size=(16, 16)))[0]
    x, labels = nuisance_world(rng, axes, 150)
    unseen, unseen_labels = nuisance_world(rng, axes, 60)
    plain = mean_ap(unit(unseen), unseen_labels)
    by_pca = mean_ap(learn_pca_whitening(x).apply(unseen), unseen_labels)
    lw = learn_supervised_whitening(x, labels=labels)
    cut = learn_supervised_whitening(x, labels=labels, dimension=6)
    assert by_pca < plain + 0.05
    assert mean_ap(lw.apply(unseen), unseen_labels) > plain + 0.15
    # The six directions are the first: nothing else is needed.
    assert mean_ap(cut.apply(unseen), unseen_labels) > plain + 0.3


def test_the_whitening_in_fewer_dimensions_is_the_first_columns(rng):
    x, labels = correlated(rng, 60, 12), np.repeat(np.arange(20), 3)
    for learn in (learn_pca_whitening, partial(learn_supervised_whitening, labels=labels)):
        kept, whole = learn(x, dimension=5), learn(x)
        np.testing.assert_array_equal(whole.keep(5).projection, kept.projection)
        np.testing.assert_array_equal(whole.keep(12).apply(x), whole.apply(x))
        for wrong in (0, 13):
            with pytest.raises(ValueError, match="dimension"):
                whole.keep(wrong)


def test_with_few_samples_the_covariance_is_shrunk(rng):
    x = correlated(rng, 40, 60)  # fewer descriptors than dimensions
    x -= x.mean(axis=0)
    covariance, _ = oas(x, assume_centered=True)
    variances, axes = np.linalg.eigh(covariance)
    expected = (axes / np.sqrt(variances))[:, ::-1]
    whitening = learn_pca_whitening(x, dimension=39)  # the last 21 directions are all alike
    same_up_to_sign(whitening.projection, expected[:, :39], rtol=1e-6, atol=1e-8)

    pairs = np.arange(40).reshape(-1, 2)
    differences = x[pairs[:, 0]] - x[pairs[:, 1]]
    c_s, _ = oas(differences, assume_centered=True)
    p = learn_supervised_whitening(x, labels=labels_of(pairs)).projection
    np.testing.assert_allclose(p.T @ c_s @ p, np.eye(60), atol=1e-8)


@pytest.mark.parametrize("n_pairs", [1, 3])
def test_a_handful_of_pairs_is_enough_to_learn_something_finite(rng, n_pairs):
    x = correlated(rng, 30, 20)
    labels = np.arange(30)
    labels[1 : 2 * n_pairs : 2] = labels[: 2 * n_pairs : 2]
    whitening = learn_supervised_whitening(x, labels=labels)
    embeddings = whitening.apply(correlated(rng, 10, 20))
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-6)


def test_shrinkage_fades_with_the_number_of_samples_and_can_be_set(rng):
    x = correlated(rng, 20000, 5)
    learned, plain = learn_pca_whitening(x), learn_pca_whitening(x, shrinkage=0)
    same_up_to_sign(learned.projection, plain.projection, rtol=0.1, atol=0.1)
    # Shrunk all the way every direction has the same variance, and nothing but a turn is left.
    turn = learn_pca_whitening(x, shrinkage=1).projection
    np.testing.assert_allclose(turn.T @ turn, 5 / np.trace(np.cov(x.T)) * np.eye(5), rtol=1e-3)


def test_directions_without_variance_are_never_blown_up(rng):
    flat = correlated(rng, 200, 4) @ rng.normal(size=(4, 9))  # 9 dimensions, but of rank 4
    for dimension in (5, None):
        with pytest.raises(ValueError, match="only 4 of 9 directions have any variance"):
            learn_pca_whitening(flat, dimension, shrinkage=0)
    y = whitened(learn_pca_whitening(flat, 4, shrinkage=0), flat)
    np.testing.assert_allclose(np.cov(y.T, bias=True), np.eye(4), atol=1e-8)
    with pytest.raises(ValueError, match="a positive shrinkage"):
        learn_supervised_whitening(flat, labels=np.arange(200) // 2, shrinkage=0)
    # Shrunk, a direction is at most 1/sqrt(shrinkage) times as strong as the average one.
    shrunk = learn_pca_whitening(flat, shrinkage=0.01).projection
    average = np.trace(np.cov(flat.T, bias=True)) / 9
    assert np.linalg.norm(shrunk, axis=0).max() <= 10.0001 / np.sqrt(average)


def test_the_mean_itself_has_no_direction():
    whitening = Whitening(np.array([1.0, 2.0]), np.diag([1.0, 2.0]))
    applied = whitening.apply(np.array([[1.0, 2.0], [4.0, 4.0]]))
    np.testing.assert_allclose(applied, [[0, 0], [0.6, 0.8]], atol=1e-7)
    assert whitening.apply(np.empty((0, 2))).shape == (0, 2)


def test_bad_input_is_refused(rng):
    x = rng.normal(size=(20, 6))
    labels = np.arange(20) // 2
    for learn in (learn_pca_whitening, lambda x, *a: learn_supervised_whitening(x, labels=labels)):
        with pytest.raises(ValueError, match=r"1 sample\(s\).* while a minimum of 2 is required"):
            learn(x[:1])
        with pytest.raises(ValueError, match="Expected 2D array, got 1D"):
            learn(x[0])
        with pytest.raises(ValueError, match="contains NaN"):
            learn(np.where(x > 1, np.nan, x))
        with pytest.raises(ValueError, match="only 0 of 6 directions"):
            learn(np.ones((20, 6)))
    for dimension in (0, 7):
        with pytest.raises(ValueError, match=f"dimension == {dimension}, must be"):
            learn_pca_whitening(x, dimension)
        with pytest.raises(ValueError, match=f"dimension == {dimension}, must be"):
            learn_supervised_whitening(x, labels=labels, dimension=dimension)
    with pytest.raises(ValueError, match=r"'shrinkage'.* in the range \[0.0, 1.0\]. Got 1.5"):
        learn_pca_whitening(x, shrinkage=1.5)
    with pytest.raises(ValueError, match="no matching pair: no label occurs twice"):
        learn_supervised_whitening(x, labels=np.arange(20))
    with pytest.raises(ValueError, match=r"inconsistent numbers of samples: \[20, 19\]"):
        learn_supervised_whitening(x, labels=labels[:-1])
    with pytest.raises(ValueError, match="for descriptors of 6 dimensions, got 5"):
        learn_pca_whitening(x).apply(x[:, :5])
