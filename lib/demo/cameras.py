"""Tells where the camera of a photo of the demo world saw the parts of its landmark.

    corners = facade_in_view(build_landmark(seed=7, landmark_id=12), view_id=0)     # (4, 2)

So the homography between two photos of one front is known, and one that was estimated from the
photos can be compared with it.
"""

from __future__ import annotations

import numpy as np

from lib.demo.buildings import Landmark
from lib.demo.world import _project


def facade_in_view(landmark: Landmark, view_id: int) -> np.ndarray:
    """Where the photo ``draw_view(landmark, view_id)`` has the corners of the building's front.

    Returns:
        float64 (4, 2), x and y in pixels: the wall's corners at the bottom left, bottom right, top
        right and top left. They may lie outside of the photo, or behind a porch or a tree.
    """
    rng = np.random.default_rng([landmark.seed, landmark.landmark_id, 1 + view_id])
    pixels, *_ = _project(landmark, rng)  # draw_view's first use of the same numbers
    front = slice(*landmark.starts[:2])  # build_landmark begins with the front wall
    return pixels[front]
