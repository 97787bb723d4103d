"""The ladder: its exhibits are as faulty as the original, its arms share what they must share."""

import json
from dataclasses import replace
from itertools import pairwise

import keras
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from keras import ops

from benchmarks.ladder import make_result
from lib.evaluation.metrics import average_precision, interval, leave_one_out
from lib.network.tower import TowerSettings, build_head
from lib.studies.figures import plot_ladder
from lib.studies.fixes import (
    AS_SEARCHED,
    AS_TRAINED,
    FIXES,
    FROZEN,
    FROZEN_WHITENED,
    FULL,
    ORIGINAL,
    RIGHT,
    LadderData,
    LadderSettings,
    euclidean_leave_one_out,
    ladder_arms,
    landmark_folds,
    photo_maps,
    run_ladder,
    summarize,
)
from lib.studies.heads import OriginalLoss, OriginalTripletLoss, start_from_pca
from tests.conftest import unit

QUICK = LadderSettings(
    seeds=(0, 1), steps=30, batch_size=8, learning_rates=(0.03,), embedding_size=8
)


# What is searched for, and what is learned from ---------------------------------------------------


def test_arms_add_one_fix_after_another_and_leave_each_out_once():
    arms = ladder_arms()
    rungs = [fixes for arm, fixes in arms.items() if not arm.startswith("all but")]
    assert rungs[0] == set() and rungs[-1] == set(FIXES) == arms[FULL]
    assert [below < above for below, above in pairwise(rungs)] == [True] * 9
    assert [len(rung) for rung in rungs] == list(range(10))
    left_out = [set(FIXES) - fixes for arm, fixes in arms.items() if arm.startswith("all but")]
    # All but the last fix is the last rung but one.
    assert [*left_out, set(FIXES) - rungs[-2]] == [{name} for name in FIXES]


def test_folds_test_each_landmark_once():
    labels = np.array([3, 1, 1, 2, 3, 3, 5, 4, 5])
    folds = landmark_folds(labels, 3, seed=0)
    assert folds.sum(axis=0).tolist() == [1] * 9
    assert sorted(len(set(labels[fold])) for fold in folds) == [1, 2, 2]
    for fold in folds:
        assert not set(labels[fold]) & set(labels[~fold])


def test_folds_that_can_not_be_used_are_errors():
    maps, labels = {RIGHT: np.zeros((4, 1, 1, 2), np.float16)}, np.array([0, 0, 1, 1])
    with pytest.raises(ValueError, match="fold 1 tests on landmarks that it trains on, such as"):
        LadderData(maps, np.array([0, 1, 2, 2]), np.array([[1, 0, 0, 0], [1, 0, 0, 1]], bool))
    with pytest.raises(ValueError, match="fold 0 trains on 2 photos of 1 landmarks"):
        LadderData(maps, labels, np.array([[True, True, False, False]]))
    with pytest.raises(ValueError, match="4 labels need maps of 4 photos"):
        LadderData({RIGHT: maps[RIGHT][:3]}, labels, np.ones((1, 4), bool))


def test_photo_maps_feed_the_backbone_in_three_ways(rng):
    photos = rng.integers(0, 256, (5, 2, 2, 3), dtype=np.uint8)
    pixels = keras.Input((2, 2, 3))
    backbone = keras.Model(pixels, keras.layers.Identity()(pixels))
    maps = photo_maps(backbone, lambda x: x / 127.5 - 1, photos)
    expected = {
        RIGHT: photos / 127.5 - 1,
        AS_TRAINED: photos / 255,
        AS_SEARCHED: np.flip(photos, axis=-1) / 255,
    }
    assert maps.keys() == expected.keys()
    for name in expected:
        assert maps[name].dtype == np.float16
        np.testing.assert_allclose(maps[name], expected[name], atol=1e-3)


def test_maps_beyond_float16_are_refused():
    """They became infinite without a word: training on them gives NaN."""
    pixels = keras.Input((2, 2, 3))
    for factor, peak in ((300.0, "reach 76500"), (np.nan, "reach nan")):
        backbone = keras.Model(pixels, keras.layers.Rescaling(factor)(pixels))
        with pytest.raises(ValueError, match=rf"{peak}.*, float16 ends at 65504"):
            photo_maps(backbone, lambda x: x, np.full((1, 2, 2, 3), 255, np.uint8))


# The exhibits -------------------------------------------------------------------------------------


def test_original_loss_is_what_keras_makes_of_a_loss_over_three_outputs(rng):
    """The original's way, written down once more: a model of three outputs, a loss for all."""
    maps = rng.normal(size=(6, 3, 5)).astype(np.float32)  # of 6 triplets
    projection = keras.layers.Dense(4, activation="softplus", kernel_regularizer="l2")
    inputs = [keras.Input((5,)) for _ in range(3)]
    model = keras.Model(inputs, [projection(x) for x in inputs])

    def loss(y_true, y_pred):
        positive = ops.sum(ops.square(y_pred[0] - y_pred[1]), axis=-1)
        negative = ops.sum(ops.square(y_pred[0] - y_pred[2]), axis=-1)
        return ops.maximum(positive - negative + 0.1, 0.0)

    model.compile(loss=[loss] * 3)
    roles = [maps[:, role] for role in range(3)]
    keras_value = model.evaluate(roles, [np.zeros((6, 4))] * 3, batch_size=6, verbose=0)
    embeddings = ops.stack(model(roles), axis=1)
    value = OriginalLoss(0.1, projection)(np.zeros((6, 3)), embeddings)
    total = keras_value[0] if isinstance(keras_value, list) else keras_value
    assert float(value) == pytest.approx(total, rel=1e-5)

    # Rows 3, 4 and 5 of the batch might as well not be there.
    others = np.array(ops.convert_to_numpy(embeddings))
    others[3:] = 9.0
    assert float(OriginalLoss(0.1, projection)(np.zeros((6, 3)), others)) == pytest.approx(total)


def test_original_loss_does_not_fall_where_positives_meet():
    """Positives on their anchors, negatives far away: no triplet loss could ask for more."""
    projection = keras.layers.Dense(2, kernel_initializer="zeros")
    projection.build((None, 2))
    photos = np.array([[0.0, 0.0], [5.0, 0.0], [1.0, 0.0]])  # 0 is farther from 1 than from 2
    embeddings = np.stack([photos, photos, photos + 100], axis=1).astype(np.float32)
    assert float(OriginalTripletLoss(0.1)(np.zeros((3, 3)), embeddings)) == 0
    value = OriginalLoss(0.1, projection)(np.zeros((3, 3)), embeddings)
    assert float(value) == pytest.approx(3 * (25 - 1 + 0.1), rel=1e-4)


def test_original_triplet_loss_against_numpy(rng):
    embeddings = rng.normal(size=(7, 3, 4)).astype(np.float32)
    a, p, n = embeddings.swapaxes(0, 1)
    each = [
        max(0, np.linalg.norm(x - y) ** 2 - np.linalg.norm(x - z) ** 2 + 0.5)
        for x, y, z in zip(a, p, n, strict=True)
    ]
    value = OriginalTripletLoss(0.5)(np.zeros((7, 3)), embeddings)
    assert float(value) == pytest.approx(np.mean(each), rel=1e-5)


def test_euclidean_search_against_brute_force(rng):
    embeddings, labels = rng.normal(size=(9, 3)) * rng.uniform(1, 9, (9, 1)), np.arange(9) % 3
    hits = euclidean_leave_one_out(embeddings, labels)
    for query in range(9):
        others = [i for i in range(9) if i != query]
        others.sort(key=lambda i: np.linalg.norm(embeddings[i] - embeddings[query]))
        assert hits[query].tolist() == [labels[i] == labels[query] for i in others]
    same = euclidean_leave_one_out(unit(embeddings), labels)
    np.testing.assert_array_equal(same, leave_one_out(unit(embeddings), labels))
    assert (hits != same).any()  # the norm makes a difference


@pytest.mark.parametrize("size", [3, 5, 8])
def test_pca_start_keeps_the_principal_axes(rng, size):
    """Of 5 channels, 3 vary: three dimensions suffice to keep all distances, up to one factor."""
    spread = np.diag([3.0, 1.0, 0.3, 1e-4, 1e-4])
    maps = 20 + rng.normal(size=(60, 1, 1, 5)) @ spread @ np.linalg.qr(rng.normal(size=(5, 5)))[0]
    head = build_head((1, 1, 5), TowerSettings(embedding_size=size, pooling="average"))
    start_from_pca(head, maps, rng)
    kernel = ops.convert_to_numpy(head.get_layer("projection").kernel)
    assert kernel.std() == pytest.approx(np.sqrt(2 / (5 + size)), rel=1e-4)  # Glorot's
    before, after = maps[:, 0, 0], maps[:, 0, 0] @ kernel
    distances = [
        np.linalg.norm(x[:, None] - x[None], axis=-1)[~np.eye(60, dtype=bool)]
        for x in (before, after)
    ]
    np.testing.assert_allclose(
        distances[1] / distances[0], np.median(distances[1] / distances[0]), rtol=1e-3
    )
    # No dimension is left with next to nothing, as unrotated the last ones would be.
    assert after.std(axis=0).min() > 0.01 * after.std(axis=0).max()


# The ladder ---------------------------------------------------------------------------------------


def toy_data(rng: np.random.Generator) -> LadderData:
    """24 landmarks of 4 photos: 6 channels tell the landmark, 6 louder ones only the light."""
    labels = np.repeat(np.arange(24), 4)
    landmark, light = rng.uniform(0, 1, (24, 6)), rng.uniform(0, 3, (96, 6))
    shown = np.concatenate([landmark[labels], light], axis=1)
    right = np.maximum(shown[:, None, None] + rng.normal(0, 0.05, (96, 2, 2, 12)), 0)
    maps = {RIGHT: right, AS_TRAINED: right * 0.5, AS_SEARCHED: right[..., ::-1] * 0.5}
    maps = {name: m.astype(np.float16) for name, m in maps.items()}
    return LadderData(maps, labels, landmark_folds(labels, 2, seed=0))


@pytest.fixture(scope="module")
def data() -> LadderData:
    return toy_data(np.random.default_rng(0))


@pytest.fixture(scope="module")
def table(data) -> pd.DataFrame:
    return run_ladder(data, QUICK)


def test_every_arm_searches_every_photo_with_every_seed(data, table):
    arms = [FROZEN, FROZEN_WHITENED, *ladder_arms()]
    assert set(table["arm"]) == set(arms)
    assert len(table) == len(arms) * 2 * 96
    assert not table.duplicated(["arm", "seed", "query"]).any()
    np.testing.assert_array_equal(table["landmark"], data.labels[table["query"]])
    assert data.test[table["fold"], table["query"]].all()
    assert table["average_precision"].between(0, 1).all()


def test_frozen_trunk_is_gem_3_of_the_right_maps(data, table):
    test = data.test[1]
    maps = data.maps[RIGHT][test].astype(np.float64)
    descriptors = unit(np.mean(np.maximum(maps, 1e-6) ** 3, axis=(1, 2)) ** (1 / 3))
    precision = average_precision(leave_one_out(descriptors, data.labels[test]))
    rows = table.query("arm == @FROZEN and fold == 1 and seed == 0")
    np.testing.assert_allclose(rows.sort_values("query")["average_precision"], precision, atol=1e-6)


def test_the_whole_recipe_learns_what_the_original_does_not(table):
    value = table.groupby("arm")["average_precision"].mean()
    assert value[FULL] > value[FROZEN] + 0.1
    assert value[FULL] > value[ORIGINAL] + 0.1


def test_no_head_sees_what_it_must_not(data, table):
    """The faulty input of training is never searched in, and that of the search never trained on;
    what one fold gives does not depend on the others. And equal seeds give equal results."""
    test = data.test[0]
    maps = {name: maps.copy() for name, maps in data.maps.items()}
    maps[AS_TRAINED][test] = np.nan
    maps[AS_SEARCHED][~test] = np.nan
    arms = {arm: ladder_arms()[arm] for arm in (ORIGINAL, "+ L2 norm", FULL, "all but input")}
    alone = run_ladder(LadderData(maps, data.labels, data.test[:1]), QUICK, arms)
    both = table[table["arm"].isin(alone["arm"])].merge(alone, on=["arm", "seed", "query"])
    assert len(both) == len(alone) == 6 * 2 * test.sum()
    np.testing.assert_allclose(both["average_precision_x"], both["average_precision_y"], atol=1e-6)


def test_seeds_make_a_difference(table):
    by_seed = table[table["arm"] == FULL].groupby("seed")["average_precision"].mean()
    assert by_seed[0] != by_seed[1]


def test_each_arm_takes_the_rate_that_does_best_on_validation_landmarks(data):
    one_fold = LadderData(data.maps, data.labels, data.test[:1])
    settings = replace(QUICK, seeds=(0,), learning_rates=(1e-9, 0.03))
    table = run_ladder(one_fold, settings, {FULL: frozenset(FIXES)})
    rates = table.groupby("arm")["learning_rate"].unique()
    assert rates[FULL].tolist() == [0.03]  # with 1e-9 nothing is learned
    assert np.isnan(rates[FROZEN]).all()


# The summary --------------------------------------------------------------------------------------


def made_up_table(rng, seeds=5, landmarks=30, seed_noise=0.02) -> pd.DataFrame:
    """Landmarks of 2 or 3 queries, arms whose true gains are known."""
    sizes = rng.integers(2, 4, landmarks)
    landmark = np.repeat(np.arange(landmarks), sizes)
    base = rng.uniform(0.2, 0.5, landmarks)[landmark]
    gains = {FROZEN: 0.1, ORIGINAL: 0.0, "+ input": 0.05, FULL: 0.3, "all but GeM": 0.25}
    rows = []
    for arm, gain in gains.items():
        for seed in range(seeds):
            value = base + gain + rng.normal(0, seed_noise)
            rows.append(
                pd.DataFrame(
                    {
                        "arm": arm,
                        "seed": seed,
                        "query": np.arange(len(landmark)),
                        "landmark": landmark,
                        "average_precision": value,
                    }
                )
            )
    return pd.concat(rows, ignore_index=True)


def test_summary_holds_means_and_paired_gains(rng):
    table = made_up_table(rng, seed_noise=0)
    # A query without a positive has no average precision, and does not count.
    nothing = table.iloc[[0]].assign(landmark=-1, average_precision=np.nan)
    summary = summarize(pd.concat([table, nothing]))
    mean = table.groupby("arm")["average_precision"].mean()
    np.testing.assert_allclose(summary["map"], mean[summary.index])
    assert summary.loc["+ input", ["kind", "fix", "against"]].tolist() == [
        "rung",
        "input",
        ORIGINAL,
    ]
    assert summary.loc["all but GeM", ["kind", "fix", "against"]].tolist() == [
        "without",
        "GeM",
        FULL,
    ]
    assert summary.loc[FROZEN, ["kind", "against"]].tolist() == ["reference", FULL]
    assert summary.loc[ORIGINAL, "kind"] == "rung" and np.isnan(summary.loc[ORIGINAL, "gain"])
    # The same gain on every query and with every seed: paired, there is nothing left to chance,
    # however far the landmarks are apart.
    gain = summary.loc[["+ input", "all but GeM"], ["gain", "gain_low", "gain_high"]]
    np.testing.assert_allclose(gain, [[0.05] * 3, [-0.05] * 3])
    assert (summary["high"] - summary["low"] > 0.03).all()


def test_without_differences_between_seeds_only_landmarks_are_left_to_chance(rng):
    table = made_up_table(rng, seed_noise=0)
    summary = summarize(table, resamples=20_000)
    one = table.query("arm == @FULL and seed == 0")
    expected = interval(one["average_precision"], one["landmark"], resamples=20_000)
    np.testing.assert_allclose(summary.loc[FULL, ["map", "low", "high"]], expected, atol=0.002)


def test_interval_against_a_bootstrap_in_plain_loops(rng):
    table = made_up_table(rng, landmarks=6, seed_noise=0.1)
    row = summarize(table, resamples=4000).loc["+ input"]
    photos = {
        key: [of.to_numpy() for _, of in rows.groupby("landmark")["average_precision"]]
        for key, rows in table.groupby(["arm", "seed"])
    }
    differences = []
    for _ in range(1000):
        seeds, landmarks = rng.integers(5, size=5), rng.integers(6, size=6)
        means = [
            np.mean(np.concatenate([photos[arm, s][i] for s in seeds for i in landmarks]))
            for arm in ("+ input", ORIGINAL)
        ]
        differences.append(means[0] - means[1])
    expected = np.quantile(differences, [0.025, 0.975])
    np.testing.assert_allclose(row[["gain_low", "gain_high"]].astype(float), expected, atol=0.02)
    assert row["gain_high"] - row["gain_low"] > 0.05  # of which the seeds alone are the cause


def test_nothing_to_average_is_an_error(rng):
    with pytest.raises(ValueError, match="no query has a positive"):
        summarize(made_up_table(rng).assign(average_precision=np.nan))


def test_figure_shows_the_summary(table, tmp_path, monkeypatch):
    monkeypatch.setattr(plt, "close", lambda *figures: None)
    summary = summarize(table, resamples=50)
    plot_ladder({"toy": summary}, save=tmp_path / "ladder.png")
    assert (tmp_path / "ladder.png").stat().st_size > 0
    left, right = plt.gcf().axes
    assert [label.get_text() for label in left.get_yticklabels()] == [ORIGINAL] + [
        f"+ {name}" for name in FIXES
    ]
    widths = [bar.get_width() for bar in left.patches[:10]]
    np.testing.assert_allclose(widths, summary.loc[summary["kind"] == "rung", "map"])
    added, missed = right.containers
    np.testing.assert_allclose(added.lines[0].get_xdata(), summary.loc["+ input":FULL, "gain"])
    losses = summary.loc[summary["kind"] == "without", "gain"]
    np.testing.assert_allclose(missed.lines[0].get_xdata(), -losses)
    monkeypatch.undo()
    plt.close("all")


# The benchmark, without its photographs -----------------------------------------------------------


def test_result_of_the_benchmark_can_be_read_back_and_names_no_place(data, table, tmp_path):
    weights = tmp_path / "some.weights.h5"
    weights.write_bytes(b"weights")
    result = json.loads(json.dumps(make_result(data, table, QUICK, weights), allow_nan=False))
    assert [result[what] for what in ("photos", "landmarks", "queries")] == [96, 24, 96]
    assert result["folds"] == {"photos": [48, 48], "landmarks": [12, 12]}
    assert set(result["learning_rates"]) == set(ladder_arms())
    assert str(tmp_path) not in json.dumps(result)
    summary, expected = pd.DataFrame(result["summary"]).set_index("arm"), summarize(table)
    assert summary.columns.tolist() == expected.columns.tolist()
    np.testing.assert_allclose(summary["map"], expected["map"])
    np.testing.assert_allclose(summary["gain_low"].astype(float), expected["gain_low"])
    assert not plot_ladder({"read back": summary})
