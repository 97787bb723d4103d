"""Failures: what stands in the place of the right photo."""

import numpy as np
import pytest

from lib.evaluation.failures import HEAT, failure_table, overlay
from lib.evaluation.metrics import average_precision, leave_one_out
from tests.conftest import unit


def test_the_table_by_hand():
    # On a circle, in degrees: a at 0 and 10; b at 15 and 90; c alone at 100.
    angles = np.deg2rad([0, 10, 15, 90, 100])
    embeddings = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    labels = np.array(["a", "a", "b", "b", "c"])
    table = failure_table(embeddings, labels, ["a0", "a1", "b0", "b1", "c0"])
    assert set(table.index) == {0, 1, 2, 3}  # c has nothing to find
    assert table.loc[0, ["name", "first_hit", "right", "wrong"]].tolist() == ["a0", 1, 1, 2]
    assert table.loc[1, ["AP", "first_hit", "right", "wrong"]].tolist() == [0.5, 2, 0, 2]
    assert table.loc[2, ["AP", "first_hit", "right", "wrong"]].tolist() == [1 / 3, 3, 3, 1]
    assert table.loc[3, ["AP", "first_hit", "right", "wrong"]].tolist() == [0.5, 2, 2, 4]
    assert table.index[0] == 2 and table["AP"].is_monotonic_increasing
    assert table.loc[1, "wrong_similarity"] == pytest.approx(np.cos(np.deg2rad(5)), abs=1e-6)
    assert table.loc[1, "right_similarity"] == pytest.approx(np.cos(np.deg2rad(10)), abs=1e-6)


def test_the_table_agrees_with_the_metrics(rng):
    embeddings, labels = unit(rng.normal(size=(40, 5))), rng.integers(0, 12, 40)
    table = failure_table(embeddings, labels, [str(i) for i in range(40)])
    hits = leave_one_out(embeddings, labels)
    expected = average_precision(hits)
    np.testing.assert_allclose(table["AP"], expected[table.index])
    assert set(table.index) == set(np.flatnonzero(~np.isnan(expected)))
    failed = table["wrong_similarity"] > table["right_similarity"]
    np.testing.assert_array_equal(failed, table["first_hit"] > 1)


def test_nothing_to_find_or_to_confuse_is_refused(rng):
    embeddings = unit(rng.normal(size=(3, 4)))
    for labels in ([1, 2, 3], [1, 1, 1]):
        with pytest.raises(ValueError, match="two landmarks"):
            failure_table(embeddings, np.array(labels), "abc")


def test_heat_is_laid_over_the_photo_where_it_is():
    photos = np.full((1, 8, 8, 3), 100, dtype=np.uint8)
    heat = np.zeros((1, 2, 2))
    heat[0, 0, 1] = 0.25  # whatever its scale
    picture = overlay(photos, heat, opacity=0.5)[0].astype(int)
    brightest = np.round(0.5 * 100 + 0.5 * 255 * np.array(HEAT(1.0)[:3]))
    np.testing.assert_allclose(picture[0, 7], brightest, atol=1)
    np.testing.assert_allclose(picture[7, 0], 50, atol=5)  # no heat: half the photo, half black
    np.testing.assert_array_equal(overlay(photos, heat, opacity=0), photos)
