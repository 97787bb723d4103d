"""The cameras of the demo world are those that its photos are drawn with."""

import numpy as np
import pytest

from lib.demo import world
from lib.demo.buildings import WALL, build_landmark
from lib.demo.cameras import facade_in_view


@pytest.mark.parametrize("number", range(5))
def test_the_corners_are_those_of_the_front_wall_as_it_is_drawn(number, monkeypatch):
    landmark = build_landmark(3, number)
    a, b, c, d = landmark.vertices[slice(*landmark.starts[:2])]
    assert landmark.materials[0] == WALL and landmark.faces[0] == 0
    assert np.ptp([a[1], b[1], c[1], d[1]]) == 0, "upright, and across the way to the front"
    assert np.cross(b - a, c - a)[1] < 0, "it looks to the front"
    assert a[2] == b[2] == 0 < c[2] == d[2] and a[0] == d[0] < b[0] == c[0]
    drawn = []
    project = world._project
    monkeypatch.setattr(world, "_project", lambda *given: drawn.append(project(*given)) or drawn[0])
    world.draw_view(landmark, 4)
    np.testing.assert_array_equal(facade_in_view(landmark, 4), drawn[0][0][:4])
    assert np.abs(facade_in_view(landmark, 5) - facade_in_view(landmark, 4)).max() > 1
