"""Builds the demo's landmarks: random buildings in three dimensions, as polygons.

    landmark = build_landmark(seed=7, landmark_id=12)

:mod:`lib.demo.world` photographs them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

# Materials of polygons. Each photo chooses its own colours for them.
WALL, ROOF, TRIM, WINDOW, DOOR, SECOND_WALL = range(6)


@dataclass(frozen=True)
class Landmark:
    """A building as polygons in its own coordinates: x right, y away from the front, z up.

    Attributes:
        seed, landmark_id: seed of the world, and number in that world.
        vertices: float64 (v, 3), the corners of all polygons, concatenated. The building stands on
            z = 0, centred on the z axis, within a sphere of radius 1 around (0, 0, height / 2).
        starts: int64 (p + 1,); polygon i has the corners ``vertices[starts[i]:starts[i + 1]]``.
        materials: int64 (p,), such as ``WALL``.
        faces: int64 (p,), the polygon on which polygon i lies, as a window on a wall; i itself for
            a face of a solid.
        height: of the building, in the unit of the vertices.
    """

    seed: int
    landmark_id: int
    vertices: np.ndarray
    starts: np.ndarray
    materials: np.ndarray
    faces: np.ndarray
    height: float


class _Builder:
    """Collects the faces of solids, and the windows and mouldings on them."""

    def __init__(self) -> None:
        self.polygons: list[tuple[np.ndarray, int, int]] = []  # corners, material, face

    def face(self, corners, material: int) -> int:
        """Add a face, its corners counter-clockwise from outside; return its number."""
        number = len(self.polygons)
        self.polygons.append((np.asarray(corners, dtype=np.float64), material, number))
        return number

    def on_face(self, face: int, outlines, material: int) -> None:
        """Add polygons on a four-cornered face: outlines (n, corners, 2), (u, v) from 0 to 1."""
        origin, right, _, up = self.polygons[face][0]
        u, v = np.moveaxis(np.asarray(outlines, dtype=np.float64), -1, 0)[..., None]
        added = origin + u * (right - origin) + v * (up - origin)
        self.polygons += [(corners, material, face) for corners in added]

    def prism(self, outline, z0: float, z1: float, material: int, top: int = ROOF) -> list[int]:
        """Add a prism over a counter-clockwise outline (n, 2); return its side faces."""
        sides = [
            self.face([(*a, z0), (*b, z0), (*b, z1), (*a, z1)], material)
            for a, b in _edges(outline)
        ]
        self.face([(*p, z1) for p in outline], top)
        return sides

    def pyramid(self, outline, z0: float, height: float) -> None:
        """Add a pyramid over a counter-clockwise outline; a round one gives a cone."""
        apex = (*np.mean(outline, axis=0), z0 + height)
        for a, b in _edges(outline):
            self.face([(*a, z0), (*b, z0), apex], ROOF)

    def gable(self, box: _Box, z0: float, height: float, along_x: bool) -> None:
        """Add a saddle roof on a box, its ridge along x or y."""
        p0, p1, p2, p3 = box.outline if along_x else np.roll(box.outline, -1, axis=0)
        (x0, y0), _, (x1, y1), _ = box.outline
        a, b = ((x0, box.y), (x1, box.y)) if along_x else ((box.x, y0), (box.x, y1))
        slopes = [(p0, p1, b, a), (p2, p3, a, b)]
        ends = [(p1, p2, b), (p3, p0, a)]
        for corners in slopes + (ends if along_x else ends[::-1]):
            levels = [z0, z0] + [z0 + height] * (len(corners) - 2)
            points = [(*p, z) for p, z in zip(corners, levels, strict=True)]
            self.face(points, ROOF if len(corners) == 4 else WALL)

    def dome(self, x: float, y: float, radius: float, z0: float, profile) -> None:
        """Add a surface of revolution; ``profile``: (share of the radius, height), upwards."""
        rings = [[(*p, z0 + z) for p in _circle(x, y, radius * share, 10)] for share, z in profile]
        for lower, upper in pairwise(rings):
            for (a, b), (c, d) in zip(_edges(lower), _edges(upper), strict=True):
                self.face([a, b, d, c], ROOF)


@dataclass(frozen=True)
class _Box:
    """An upright box: centre and size of its ground plan."""

    x: float
    y: float
    width: float
    depth: float

    @property
    def outline(self) -> list[tuple[float, float]]:
        """The corners, counter-clockwise from the front left."""
        x0, x1 = self.x - self.width / 2, self.x + self.width / 2
        y0, y1 = self.y - self.depth / 2, self.y + self.depth / 2
        return [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]


def _edges(outline) -> Iterator[tuple]:
    """Pair each corner with the next; the last one with the first."""
    return zip(outline, [*outline[1:], outline[0]], strict=True)


def _circle(x: float, y: float, radius: float, n: int) -> np.ndarray:
    angle = 2 * np.pi * np.arange(n) / n
    return np.stack([x + radius * np.cos(angle), y + radius * np.sin(angle)], axis=1)


def _opening(u: float, v: float, width: float, height: float, shape: str) -> np.ndarray:
    """Outline a window or door, (corners, 2) in (u, v), where (u, v) is its sill's centre."""
    left, right, top = u - width / 2, u + width / 2, v + height
    if shape == "plain":
        return np.array([(left, v), (right, v), (right, top), (left, top)])
    if shape == "pointed":
        spring = v + 0.6 * height
        return np.array([(left, v), (right, v), (right, spring), (u, top), (left, spring)])
    angle = np.linspace(0, np.pi, 6)
    spring = v + 0.62 * height
    arch = [(u + width / 2 * np.cos(a), spring + 0.38 * height * np.sin(a)) for a in angle]
    return np.array([(left, v), (right, v), *arch])


def _windows(build: _Builder, faces: list[int], rng: np.random.Generator, height: float) -> None:
    """Lay the same window pattern on all ``faces``, which are ``height`` high."""
    shape = rng.choice(["plain", "arched", "pointed"])
    rows = int(rng.integers(1, max(2, min(6, round(height / 0.22) + 1))))
    per_unit = rng.uniform(2.5, 7.0)
    width, tall = rng.uniform(0.3, 0.7), rng.uniform(0.45, 0.8)
    mouldings = rng.random() < 0.5
    for face in faces:
        origin, right = build.polygons[face][0][:2]
        columns = max(1, round(np.linalg.norm(right - origin) * per_unit))
        window = _opening(0, 0, width / columns, tall / rows, shape)
        u = (np.arange(columns) + 0.5) / columns
        v = (np.arange(rows) + (1 - tall) / 2) / rows
        sills = np.stack(np.meshgrid(u, v), axis=-1).reshape(-1, 1, 2)
        build.on_face(face, sills + window, WINDOW)
        if mouldings and rows > 1:
            moulding = np.array([(0, -0.02), (1, -0.02), (1, 0.02), (0, 0.02)])
            v = np.arange(1, rows) / rows
            build.on_face(face, np.stack([0 * v, v], axis=-1)[:, None] + moulding, TRIM)


def _roof(build: _Builder, box: _Box, z: float, rng: np.random.Generator, kinds) -> float:
    """Put a roof on a box; return the z of its highest point."""
    kind = rng.choice(kinds)
    side = min(box.width, box.depth)
    if kind == "gable":
        rise = side * rng.uniform(0.25, 0.8)
        build.gable(box, z, rise, along_x=bool(rng.random() < 0.5))
    elif kind in ("hip", "spire"):
        rise = side * (rng.uniform(0.25, 0.7) if kind == "hip" else rng.uniform(1.3, 3.2))
        build.pyramid(box.outline, z, rise)
    elif kind == "dome":
        rise = _dome(build, box.x, box.y, side * rng.uniform(0.36, 0.5), z, rng)
    elif kind == "battlement":
        rise = 0.09
        teeth = int(rng.integers(3, 6))
        (x0, y0), _, (_, y1), _ = box.outline
        for share in (np.arange(teeth) + 0.5) / teeth:
            for y in (y0 + 0.02, y1 - 0.02):
                tooth = _Box(x0 + share * box.width, y, 0.5 * box.width / teeth, 0.04)
                build.prism(tooth.outline, z, z + rise, WALL, WALL)
    elif kind == "steps":
        rise, inner = 0.0, box
        for _ in range(int(rng.integers(1, 4))):
            shrink, step = rng.uniform(0.55, 0.8), rng.uniform(0.1, 0.25)
            inner = _Box(box.x, box.y, inner.width * shrink, inner.depth * shrink)
            build.prism(inner.outline, z + rise, z + rise + step, SECOND_WALL)
            rise += step
    else:  # flat, with a parapet
        rise = 0.05
        parapet = _Box(box.x, box.y, box.width * 1.06, box.depth * 1.06)
        build.prism(parapet.outline, z, z + rise, TRIM)
    return z + rise


def _dome(build: _Builder, x, y, radius: float, z: float, rng: np.random.Generator) -> float:
    """Add a drum with a round, pointed or onion dome; return its height above z."""
    drum = rng.uniform(0.0, 0.6) * radius
    if drum > 0.1 * radius:
        build.prism(_circle(x, y, radius, 10), z, z + drum, SECOND_WALL)
    tall = radius * rng.uniform(0.7, 1.5)
    if rng.random() < 0.3:  # onion
        profile = [(0.8, 0.0), (1.15, 0.25), (1.0, 0.5), (0.5, 0.75), (0.08, 1.1)]
    else:
        angle = np.linspace(0, 0.47 * np.pi, 5)
        profile = list(zip(np.cos(angle), np.sin(angle), strict=True))
    build.dome(x, y, radius, z + drum, [(share, v * tall) for share, v in profile])
    top = drum + 1.05 * tall
    if rng.random() < 0.5:  # a lantern or finial
        size = radius * rng.uniform(0.12, 0.25)
        build.pyramid(_circle(x, y, size, 6), z + top - 0.1 * tall, radius * rng.uniform(0.3, 0.9))
    return top


def _tower(build: _Builder, x, y, width: float, height: float, style: np.random.Generator) -> None:
    """Add a square or round tower; equal states of ``style`` give equal towers."""
    is_round = style.random() < 0.4
    outline = _circle(x, y, width / 2, 8) if is_round else _Box(x, y, width, width).outline
    faces = build.prism(outline, 0, height, WALL)
    if style.random() < 0.85:
        _windows(build, faces, style, height)
    if not is_round:
        roofs = ["spire", "hip", "dome", "battlement", "flat", "spire"]
        _roof(build, _Box(x, y, width * 1.04, width * 1.04), height, style, roofs)
    elif style.random() < 0.6:
        build.pyramid(_circle(x, y, width * 0.56, 8), height, width * style.uniform(0.7, 2.6))
    else:
        _dome(build, x, y, width * 0.5, height, style)


def build_landmark(seed: int, landmark_id: int) -> Landmark:
    """Build a landmark of the world ``seed``; equal arguments give equal landmarks."""
    rng = np.random.default_rng([seed, landmark_id, 0])
    build = _Builder()
    body = _Box(0.0, 0.0, rng.uniform(0.7, 2.6), rng.uniform(0.6, 1.5))
    height = rng.uniform(0.35, 1.5) * (0.7 if body.width > 1.8 else 1.0)
    sides = build.prism(body.outline, 0, height, WALL)
    if rng.random() < 0.92:
        _windows(build, sides, rng, height)
    _roof(build, body, height, rng, ["gable", "hip", "flat", "steps", "dome", "battlement"])
    _entrance(build, sides[0], body, height, rng)
    if rng.random() < 0.25:  # a rose window
        rose = rng.uniform(0.08, 0.16)
        ring = _circle(0.0, 0.0, rose, 12) * (1.0, body.width / height) + (0.5, 0.72)
        build.on_face(sides[0], [ring], WINDOW)
    _towers(build, body, rng)
    for side in (-1, 1):  # wings
        if rng.random() < 0.4:
            width, depth = rng.uniform(0.4, 1.2), body.depth * rng.uniform(0.4, 0.9)
            wing = _Box(side * (body.width + width) / 2, rng.uniform(-0.2, 0.2), width, depth)
            low = height * rng.uniform(0.4, 0.95)
            faces = build.prism(wing.outline, 0, low, WALL)
            _windows(build, faces, rng, low)
            _roof(build, wing, low, rng, ["gable", "hip", "flat", "battlement"])

    polygons, materials, faces = zip(*build.polygons, strict=True)
    vertices = np.concatenate(polygons)
    low, high = vertices.min(axis=0), vertices.max(axis=0)
    vertices -= [*(low + high)[:2] / 2, 0.0]
    radius = np.linalg.norm(vertices - [0, 0, high[2] / 2], axis=1).max()
    starts, height = np.cumsum([0, *map(len, polygons)]), float(high[2] / radius)
    materials, faces = np.array(materials), np.array(faces)
    return Landmark(seed, landmark_id, vertices / radius, starts, materials, faces, height)


def _entrance(build: _Builder, front: int, body: _Box, height: float, rng) -> None:
    """Add a door, a porch with columns, stairs, or nothing; it marks the building's front."""
    entrance = rng.choice(["door", "porch", "stairs", "none"])
    y = body.outline[0][1]  # of the front
    if entrance == "door":
        tall, wide = rng.uniform(0.3, 0.65), rng.uniform(0.12, 0.3)
        shape = rng.choice(["plain", "arched", "pointed"])
        build.on_face(front, [_opening(0.5, 0, wide, tall, shape)], DOOR)
    elif entrance == "porch":
        porch = _Box(0, y - 0.16, body.width * rng.uniform(0.35, 0.9), 0.3)
        tall, n = height * rng.uniform(0.55, 0.95), int(rng.integers(3, 9))
        (x0, y0), (x1, _), *_ = porch.outline
        for x in np.linspace(x0 + 0.05, x1 - 0.05, n):
            build.prism(_circle(x, y0 + 0.05, 0.035, 6), 0, tall, TRIM)
        build.prism(porch.outline, tall, tall + 0.06, TRIM)
        if rng.random() < 0.7:
            build.gable(porch, tall + 0.06, porch.width * rng.uniform(0.1, 0.25), along_x=False)
    elif entrance == "stairs":
        for step in range(3):
            plan = _Box(0, y - 0.1, body.width * 0.6 - 0.1 * step, 0.3 - 0.08 * step)
            build.prism(plan.outline, 0.05 * step, 0.05 * (step + 1), TRIM, TRIM)


def _towers(build: _Builder, body: _Box, rng: np.random.Generator) -> None:
    """Add up to two groups of one, two or four towers; those of a group are equal."""
    for _ in range(int(rng.choice([0, 1, 2], p=[0.2, 0.5, 0.3]))):
        width, tall = rng.uniform(0.16, 0.5), rng.uniform(0.7, 2.6)
        x = body.width / 2 * rng.choice([1.0, 1.15, 0.75])
        y = body.depth / 2
        groups = [
            [(-x, -y), (x, -y)],
            [(-x, y), (x, y)],
            [(-x, -y), (x, -y), (-x, y), (x, y)],
            [(x * rng.choice([-1, 1]), y * rng.uniform(-1, 1))],
            [(body.width * rng.uniform(-0.2, 0.2), y * rng.choice([-1.0, 0.0, 1.0]))],
        ]
        style = int(rng.integers(2**32))
        for tx, ty in groups[rng.choice(len(groups))]:
            _tower(build, tx, ty, width, tall, np.random.default_rng(style))
