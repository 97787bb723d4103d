"""The ladder of post-processing: who searches whom, what is chosen by what, what is measured."""

from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from benchmarks.postprocessing import every_photo_rounds, first_photos, only
from lib.evaluation.metrics import average_precision
from lib.network.tower import TowerSettings, build_tower
from lib.network.whitening import learn_pca_whitening
from lib.search.descriptors import describe_views
from lib.search.geometry import Geometry
from lib.studies.figures import plot_postprocessing
from lib.studies.folds import Fold, Pairs, Photos, query_rounds
from lib.studies.postprocessing import (
    AS_TRAINED,
    CHOSEN,
    PLAIN,
    Options,
    Recipe,
    Trial,
    describe_all,
    embedding_ms,
    rerankings,
    run_postprocessing,
    summarize,
)
from tests.conftest import unit

OPTIONS = Options(
    image_size=32,
    image_sizes=((32, 48),),
    gem_ps=(4.6,),
    scale_ps=(2.0,),
    dimensions=(4,),
    neighbours=(1, 2),
    candidates=(8,),
)


def made_up(rng, landmarks, noise, first=0, photos=3) -> Photos:
    """Photos around a direction for each landmark; each view has noise of its own."""
    labels = np.repeat(np.arange(first, first + landmarks), photos)
    centre = unit(rng.normal(size=(landmarks, 8))).repeat(photos, axis=0)
    views = {v: unit(centre + noise * rng.normal(size=centre.shape)) for v in OPTIONS.views}
    return Photos(views, labels)


@pytest.fixture
def fold(rng) -> Fold:
    known, test = made_up(rng, 30, 0.25), made_up(rng, 15, 0.25, first=100)
    return Fold(known, known.labels[None] >= 20, test, query_rounds(test.labels))


# Who searches whom --------------------------------------------------------------------------------


def test_in_rounds_each_photo_is_a_query_once_and_never_in_the_gallery():
    labels = np.array(["b", "a", "b", "c", "b", "a"])
    rounds = [(q.tolist(), g.tolist()) for q, g in query_rounds(labels)]
    assert rounds == [([0, 1], [2, 3, 4, 5]), ([2, 5], [0, 1, 3, 4]), ([4], [0, 1, 2, 3, 5])]
    only_a = query_rounds(labels, labels == "a")
    assert [(q.tolist(), g.tolist()) for q, g in only_a] == [
        ([1], [0, 2, 3, 4, 5]),
        ([5], [0, 1, 2, 3, 4]),
    ]
    with pytest.raises(ValueError, match="nothing to find"):
        query_rounds(labels, labels == "c")


def test_each_photo_is_searched_among_all_others_and_the_first_of_a_landmark_is_marked():
    labels = np.array(["b", "b", "c", "a", "a"])
    rounds = every_photo_rounds(labels)
    assert [(q.tolist(), g.tolist()) for q, g in rounds] == [
        ([0], [1, 2, 3, 4]),
        ([3], [0, 1, 2, 4]),
        ([1], [0, 2, 3, 4]),
        ([4], [0, 1, 2, 3]),
    ]
    queries = np.concatenate([queries for queries, _ in rounds])
    assert first_photos(labels, queries).tolist() == [True, True, False, False]
    with pytest.raises(ValueError, match="nothing to find"):
        every_photo_rounds(np.arange(3))


def test_the_trials_of_some_queries():
    def trial(ap):
        return Trial(Recipe((32,)), {}, np.zeros(1), np.array(ap), 0.0, 0.0, np.array(ap) / 2)

    chosen = np.array([True, False, False, True])
    first, second = only({"step": [trial([0.1, 0.2, 0.3]), trial([0.4])]}, chosen)["step"]
    assert (first.ap.tolist(), second.ap.tolist()) == ([0.1], [0.4])
    assert first.base_ap.tolist() == [0.05] and second.base_ap.tolist() == [0.2]


def test_a_landmark_is_in_one_part_alone(fold):
    with pytest.raises(ValueError, match="landmark '100' would be both learned from"):
        replace(fold, known=replace(fold.known, labels=fold.known.labels + 90))
    with pytest.raises(ValueError, match="landmark '0' would be both learned from"):
        replace(fold, validation=np.arange(len(fold.known.labels))[None] % 2 == 0)


# Descriptors --------------------------------------------------------------------------------------


def test_a_recipe_names_its_views_and_options_name_them_all():
    recipe = Recipe((32, 48), mirrored=True, gem_p=4.6)
    assert recipe.views == [(32, False, 4.6), (32, True, 4.6), (48, False, 4.6), (48, True, 4.6)]
    assert Recipe((32,)).views == [(32, False, None)]
    for changes in OPTIONS.steps().values():
        for change in changes:
            assert set(replace(recipe, **change).views) <= set(OPTIONS.views)


@pytest.mark.long
def test_views_are_those_of_the_tower(rng):
    tower = build_tower(TowerSettings(32, 0, last_stage=3, weights=""))
    photos = {s: rng.integers(0, 256, (2, s, s, 3), dtype=np.uint8) for s in (32, 48)}
    found = describe_all(tower, photos.__getitem__, OPTIONS.views)
    assert list(found) == OPTIONS.views
    expected = describe_views(tower, photos[48], (4.6,))
    np.testing.assert_array_equal(found[48, True, 4.6], expected[1])
    assert set(times := embedding_ms(tower, [32])) == {32} and times[32] > 0


# The ladder ---------------------------------------------------------------------------------------


def run(fold: Fold, options: Options = OPTIONS) -> dict:
    """The steps of a single fold."""
    return {name: trial for name, (trial,) in run_postprocessing([fold], options).items()}


def test_the_plain_rungs_are_what_a_search_gives(fold):
    steps = run(fold)
    labels, x = fold.test.labels, fold.test.views[32, False, None]
    expected = []
    for queries, gallery in fold.rounds:
        order = np.argsort(-(x[queries] @ x[gallery].T), axis=1, kind="stable")
        expected += average_precision(labels[gallery][order] == labels[queries, None]).tolist()
    assert steps[AS_TRAINED].ap.tolist() == expected == steps[AS_TRAINED].base_ap.tolist()
    assert len(expected) == len(labels)
    assert steps[PLAIN].ap.tolist() == steps[PLAIN].base_ap.tolist()
    kept = [name for name in (AS_TRAINED, *OPTIONS.steps()) if steps[name].kept]
    assert (
        steps[kept[-1]].ap.tolist() == steps[PLAIN].ap.tolist()
    )  # re-ranking starts where the descriptors end


def test_each_step_builds_on_the_last_one_that_is_proven_on_validation(fold):
    steps = run(fold)
    validation = {name: trial.validation.mean() for name, trial in steps.items()}
    base, best = AS_TRAINED, validation[AS_TRAINED]
    for name in OPTIONS.steps():
        step = steps[name]
        np.testing.assert_array_equal(step.base_ap, steps[base].ap)
        if step.kept:
            assert validation[name] > best
            base, best = name, validation[name]
    assert base != AS_TRAINED and steps["mirrored"].kept is True
    for name in (*rerankings(OPTIONS), CHOSEN):
        np.testing.assert_array_equal(steps[name].base_ap, steps[base].ap)
    chosen = steps[CHOSEN].settings["method"]
    assert chosen in (PLAIN, max(rerankings(OPTIONS), key=validation.get))
    np.testing.assert_array_equal(steps[CHOSEN].ap, steps[chosen].ap)


class MadeUpPairs:
    """Most photos of a landmark have 20 inliers, some none; those of two have 7."""

    pair_ms = 2.0

    def __init__(self):
        self.asked = set()

    def verify(self, query, others):
        self.asked |= {(query, other) for other in others}
        counts = [7 if query // 3 != other // 3 else 20 * (other % 3 > 0) for other in others]
        return [Geometry(None, np.ones(n, bool), None, 1) for n in counts]


def test_geometric_verification_sorts_the_first_photos_where_they_have_local_features(rng):
    pairs = MadeUpPairs()
    known, test = made_up(rng, 30, 0.9), made_up(rng, 15, 0.9, first=30)
    known = replace(known, pairs=pairs, places=np.arange(90))
    test = replace(test, pairs=pairs, places=np.arange(90, 135))
    fold = Fold(known, known.labels[None] >= 20, test, query_rounds(test.labels))
    steps = run(fold, replace(OPTIONS, verified=(5, 40)))
    step = steps["geometric verification"]
    assert step.settings == {"top": 40, "least": 8}  # six would let the wrong ones in
    assert step.ap.mean() > step.base_ap.mean() + 0.1
    assert 60 <= step.search_ms < 90  # 30 photos are searched, of 2 ms each
    assert steps[CHOSEN].settings["method"] == "geometric verification"
    assert all(query != other for query, other in pairs.asked)
    assert "geometric verification" not in run(fold)


def test_a_pair_is_verified_once(monkeypatch):
    def verified(query, others):
        calls.append((query, others))
        return [f"{query}-{other}" for other in others]

    calls = []
    monkeypatch.setattr("lib.studies.folds.verify_all", verified)
    pairs = Pairs("abcd")
    assert pairs.pair_ms == 0
    assert pairs.verify(0, [1, 2]) == ["a-b", "a-c"]
    assert pairs.verify(0, [2, 3, 1]) == ["a-c", "a-d", "a-b"]
    assert pairs.verify(1, [0]) == ["b-a"]
    assert calls == [("a", ["b", "c"]), ("a", ["d"]), ("b", ["a"])] and pairs.pair_ms > 0


def test_what_makes_no_difference_is_not_kept(fold):
    """Where the second size shows the same as the first, it is as good, but not better."""
    views = {v: fold.known.views[32, False, None] for v in OPTIONS.views}
    same = replace(fold, known=Photos(views, fold.known.labels))
    steps = run(same)
    for name in ("mirrored", "sizes", "other p (GeM+)", "scale GeM"):
        assert steps[name].kept is False
        assert steps[name].validation.mean() == steps[AS_TRAINED].validation.mean()
        np.testing.assert_array_equal(steps[name].base_ap, steps[AS_TRAINED].ap)


def test_views_that_carry_noise_of_their_own_help(fold):
    steps = run_postprocessing([fold], OPTIONS)
    table = summarize(steps, np.concatenate([fold.test.labels[q] for q, _ in fold.rounds]), MS)
    assert table.loc["mirrored", "gain_low"] > 0 and table.loc["mirrored", "p_value"] < 0.01
    assert table.loc["sizes", "map"] > table.loc["mirrored", "map"]


def test_the_choice_does_not_see_the_test_photos(fold, rng):
    other = replace(fold, test=made_up(rng, 15, 2.0, first=100))
    one, two = run(fold), run(other)
    for name in one:
        assert one[name].settings == two[name].settings
        np.testing.assert_array_equal(one[name].validation, two[name].validation)


def test_the_whitening_that_chooses_learns_from_the_others_alone(fold, monkeypatch):
    learned_from = []

    def spy(descriptors):
        learned_from.append(descriptors)
        return learn_pca_whitening(descriptors)

    monkeypatch.setattr("lib.studies.postprocessing.learn_pca_whitening", spy)
    run(fold, replace(OPTIONS, image_sizes=((32,),)))
    sizes = {len(descriptors) for descriptors in learned_from}
    assert sizes == {60, 90}  # 20 landmarks to choose by the other 10, then all 30 to measure
    # All had learned from the same photos, whatever the recipe: those in front.
    choosing, measuring = learned_from[:2]
    np.testing.assert_array_equal(choosing, measuring[~fold.validation[0]])


def test_validation_parts_take_turns(fold):
    labels = fold.known.labels
    parts = np.stack([labels >= 20, (labels >= 10) & (labels < 20)])
    one, two, both = (
        run(replace(fold, validation=v))[AS_TRAINED].validation.mean()
        for v in (*parts[:, None], parts)
    )
    assert both == pytest.approx((one + two) / 2)


@pytest.mark.parametrize("name", list(rerankings(OPTIONS)))
def test_every_reranking_ranks_a_gallery_with_all_its_settings(name, rng):
    method = rerankings(OPTIONS)[name]
    labels = np.repeat(np.arange(6), 4)
    x = unit(np.eye(8)[labels] + 0.1 * rng.normal(size=(24, 8))).astype(np.float32)
    queries, gallery = query_rounds(labels)[0]
    for settings in method.settings:
        scores = method.scores(
            x[queries], x[gallery], method.prepare(x[gallery], settings), settings
        )
        assert scores.shape == (6, 18) and np.isfinite(scores).all()
        order = np.argsort(-scores, axis=1, kind="stable")
        hits = labels[gallery][order] == labels[queries, None]
        assert average_precision(hits).mean() > 0.99  # clear clusters are found by all of them


# The table and the figure -------------------------------------------------------------------------

MS = {32: 1.0, 48: 2.5}


def test_the_table_puts_folds_together(fold):
    one, two = (run_postprocessing(folds, OPTIONS) for folds in ([fold], [fold, fold]))
    groups = np.concatenate([fold.test.labels[q] for q, _ in fold.rounds])
    single, double = summarize(one, groups, MS), summarize(two, np.tile(groups, 2), MS)
    pd.testing.assert_series_equal(single["map"], double["map"])
    assert (double["kept"] == 2 * single["kept"]).all()
    assert single.loc[AS_TRAINED, "embedding_ms"] == 1.0
    assert single.loc["mirrored", "embedding_ms"] == 2.0
    assert (single["low"] <= single["map"]).all() and (single["map"] <= single["high"]).all()
    assert single.loc[AS_TRAINED, "kind"] == "descriptor"
    assert single.loc[[PLAIN, CHOSEN], "kind"].tolist() == ["re-ranking"] * 2
    expected = np.mean(one["sizes"][0].ap - one["sizes"][0].base_ap)
    assert single.loc["sizes", "gain"] == pytest.approx(expected)


def test_the_figure_shows_every_step(fold, tmp_path, monkeypatch):
    monkeypatch.setattr(plt, "close", lambda *figures: None)
    steps = run_postprocessing([fold], OPTIONS)
    groups = np.concatenate([fold.test.labels[q] for q, _ in fold.rounds])
    plot_postprocessing({"made up": summarize(steps, groups, MS)}, save=tmp_path / "x.png")
    figure = plt.gcf()
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == list(steps)
    assert (tmp_path / "x.png").is_file()
    monkeypatch.undo()
    plt.close("all")
