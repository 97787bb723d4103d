"""Failures are listed with the photo found instead; heat lies where the similarity comes from."""

import numpy as np
import pytest

from lib.evaluation.explain import HEAT, failure_table, occlusion_heat, overlay
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


def test_a_photo_without_heat_is_laid_over_darkly(recwarn):
    """Division by the maximum, 0, made NaN: a warning, and the photo at full brightness."""
    photos = np.full((2, 8, 8, 3), 100, dtype=np.uint8)
    heat = np.zeros((2, 4, 4))
    heat[1] = 1e-40  # a maximum below float32's normal range is still a maximum
    dark, bright = overlay(photos, heat, opacity=0.5).astype(int)
    assert not recwarn
    np.testing.assert_allclose(dark, 50, atol=2)
    np.testing.assert_allclose(bright, np.broadcast_to(bright[0, 0], bright.shape))
    np.testing.assert_allclose(bright[0, 0], 50 + 127.5 * np.array(HEAT(1.0)[:3]), atol=1)


def mean_colours(corner):
    """A network that looks at one part of a photo only: its mean colour, and a constant."""

    def embed(photos):
        colours = photos[(slice(None), *corner)].mean(axis=(1, 2)) / 255
        return unit(np.concatenate([colours, np.full((len(photos), 1), 0.1)], axis=1)).astype("f4")

    return embed


@pytest.mark.parametrize("corner", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_the_heat_lies_in_the_corner_that_the_network_looks_at(corner):
    part = tuple(slice(16 * i, 16 * i + 16) for i in corner)
    photo = np.zeros((32, 32, 3), np.uint8)
    photo[part] = (250, 20, 20)
    photo[tuple(slice(16 * (1 - i), 16 * (1 - i) + 16) for i in corner)] = (20, 250, 20)
    embed = mean_colours(part)
    heat = occlusion_heat(embed, photo, embed(photo[None])[0], grid=4)
    assert heat.shape == (4, 4) and heat.dtype == np.float32
    inside = np.zeros((4, 4), bool)
    inside[tuple(slice(2 * i, 2 * i + 2) for i in corner)] = True
    assert heat[inside].min() > 0
    # The covering square is as wide as two cells: it reaches half a cell into the next quarter.
    far = np.zeros((4, 4), bool)
    far[tuple(3 * (1 - i) for i in corner)] = True
    assert heat[far].max() == 0 and heat[inside].max() == heat.max()


def test_the_heat_is_what_the_similarity_loses(rng):
    photo = rng.integers(0, 256, (12, 12, 3)).astype(np.uint8)
    weights = rng.normal(size=(12 * 12 * 3, 5))

    def embed(photos):
        return unit(photos.reshape(len(photos), -1) @ weights)

    target = unit(rng.normal(size=5))
    heat = occlusion_heat(embed, photo, target, grid=3)
    covered = photo.copy()
    covered[2:10, 0:6] = photo.reshape(-1, 3).mean(axis=0).round()
    lost = (embed(photo[None]) - embed(covered[None]))[0] @ target
    assert heat[1, 0] == pytest.approx(max(lost, 0), abs=1e-5)
    assert heat.min() >= 0 and heat.max() > 0


def test_a_photo_of_one_colour_has_no_heat():
    photo = np.full((16, 16, 3), 99, np.uint8)
    embed = mean_colours((slice(0, 16), slice(0, 16)))
    assert not occlusion_heat(embed, photo, np.array([1, 0, 0, 0])).any()


@pytest.mark.parametrize("grid", [0, 17])
def test_a_grid_that_does_not_fit_is_refused(grid):
    with pytest.raises(ValueError, match="grid must be from 1"):
        occlusion_heat(lambda photos: photos, np.zeros((16, 16, 3), np.uint8), np.ones(3), grid)
