"""Occlusion: the heat lies where the similarity comes from."""

import numpy as np
import pytest

from lib.evaluation.occlusion import occlusion_heat
from tests.conftest import unit


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
