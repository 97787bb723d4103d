"""A small world of made-up landmarks, drawn as photographs, for running without any download.

A landmark is a building in three dimensions whose *shape* is its identity; a view is one photograph
of it, with its own camera, light, weather, paint and passers-by. Nothing but the geometry is shared
by two views of a landmark, so colours do not give it away:

    landmark = build_landmark(seed=7, landmark_id=12)
    photo = draw_view(landmark, view_id=0)      # uint8 (128, 128, 3) RGB
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

PHOTO_SIZE = 128  # pixels; the Kaggle set's
JPEG_QUALITY = 94  # likewise

# What a polygon is made of. Every view paints the materials anew.
WALL, ROOF, TRIM, WINDOW, DOOR, SECOND_WALL = range(6)
N_MATERIALS = 6


@dataclass(frozen=True)
class Landmark:
    """A building as polygons in its own coordinates: x right, y away from the front, z up.

    Attributes:
        seed: seed of the world it belongs to.
        landmark_id: its number in that world.
        vertices: float64 (v, 3), the corners of all polygons one after another. The building stands
            on z = 0, is centred on the z axis and fits a sphere of radius 1 about (0, 0, height/2).
        starts: int64 (p + 1,), polygon i has the corners ``vertices[starts[i]:starts[i + 1]]``.
        materials: int64 (p,), one of the material constants.
        faces: int64 (p,), the polygon that polygon i lies on (windows lie on a wall); i itself for
            a face of a solid.
        height: height of the building in the same unit.
    """

    seed: int
    landmark_id: int
    vertices: np.ndarray
    starts: np.ndarray
    materials: np.ndarray
    faces: np.ndarray
    height: float


# --------------------------------------------------------------------------------------------------
# Building a landmark
# --------------------------------------------------------------------------------------------------


class _Builder:
    """Collects the faces of solids, and the windows and mouldings that lie on them."""

    def __init__(self) -> None:
        self.polygons: list[np.ndarray] = []
        self.materials: list[int] = []
        self.faces: list[int] = []

    def face(self, corners, material: int) -> int:
        """Add a face (corners counter-clockwise seen from outside); returns its number."""
        self.polygons.append(np.asarray(corners, dtype=np.float64))
        self.materials.append(material)
        self.faces.append(len(self.faces))
        return len(self.faces) - 1

    def on_face(self, face: int, outlines, material: int) -> None:
        """Add polygons lying on a four-cornered face; (n, corners, 2) in its (u, v) from 0 to 1."""
        origin, right, _, up = self.polygons[face]
        u, v = np.moveaxis(np.asarray(outlines, dtype=np.float64), -1, 0)[..., None]
        added = origin + u * (right - origin) + v * (up - origin)
        self.polygons.extend(added)
        self.materials.extend([material] * len(added))
        self.faces.extend([face] * len(added))

    def prism(self, outline, z0: float, z1: float, material: int, top: int = ROOF) -> list[int]:
        """An upright prism over a counter-clockwise (n, 2) outline; returns its side faces."""
        outline = np.asarray(outline, dtype=np.float64)
        sides = []
        for a, b in zip(outline, np.roll(outline, -1, axis=0), strict=True):
            corners = [(*a, z0), (*b, z0), (*b, z1), (*a, z1)]
            sides.append(self.face(corners, material))
        self.face([(*p, z1) for p in outline], top)
        return sides

    def pyramid(self, outline, z0: float, height: float, material: int = ROOF) -> None:
        """A pyramid (or, over a round outline, a cone) over a counter-clockwise outline."""
        outline = np.asarray(outline, dtype=np.float64)
        apex = (*outline.mean(axis=0), z0 + height)
        for a, b in zip(outline, np.roll(outline, -1, axis=0), strict=True):
            self.face([(*a, z0), (*b, z0), apex], material)

    def gable(self, box: _Box, z0: float, height: float, along_x: bool) -> None:
        """A saddle roof on a box, its ridge along x or y."""
        (x0, y0), (x1, y1) = box.low, box.high
        xm, ym, z1 = box.x, box.y, z0 + height
        if along_x:
            a, b = (x0, ym, z1), (x1, ym, z1)
            self.face([(x0, y0, z0), (x1, y0, z0), b, a], ROOF)
            self.face([(x1, y1, z0), (x0, y1, z0), a, b], ROOF)
            self.face([(x1, y0, z0), (x1, y1, z0), b], WALL)
            self.face([(x0, y1, z0), (x0, y0, z0), a], WALL)
        else:
            a, b = (xm, y0, z1), (xm, y1, z1)
            self.face([(x1, y0, z0), (x1, y1, z0), b, a], ROOF)
            self.face([(x0, y1, z0), (x0, y0, z0), a, b], ROOF)
            self.face([(x0, y0, z0), (x1, y0, z0), a], WALL)
            self.face([(x1, y1, z0), (x0, y1, z0), b], WALL)

    def dome(self, x: float, y: float, radius: float, z0: float, profile) -> None:
        """A surface of revolution; ``profile`` lists (radius share, height) from bottom to top."""
        rings = [_circle(x, y, radius * share, 10) for share, _ in profile]
        levels = [z0 + z for _, z in profile]
        for lower, upper, za, zb in zip(rings, rings[1:], levels, levels[1:], strict=False):
            for i in range(len(lower)):
                j = (i + 1) % len(lower)
                quad = [(*lower[i], za), (*lower[j], za), (*upper[j], zb), (*upper[i], zb)]
                self.face(quad, ROOF)


@dataclass(frozen=True)
class _Box:
    """An upright box: centre and size of its ground plan."""

    x: float
    y: float
    width: float
    depth: float

    @property
    def low(self) -> tuple[float, float]:
        return self.x - self.width / 2, self.y - self.depth / 2

    @property
    def high(self) -> tuple[float, float]:
        return self.x + self.width / 2, self.y + self.depth / 2

    @property
    def outline(self) -> list[tuple[float, float]]:
        (x0, y0), (x1, y1) = self.low, self.high
        return [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]


def _circle(x: float, y: float, radius: float, n: int) -> np.ndarray:
    angle = 2 * np.pi * np.arange(n) / n
    return np.stack([x + radius * np.cos(angle), y + radius * np.sin(angle)], axis=1)


def _opening(u: float, v: float, width: float, height: float, shape: str) -> np.ndarray:
    """Outline (corners, 2) of a window or door in (u, v): centre of its sill, width, height."""
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
    """Lay one window pattern on every face in ``faces``, which are ``height`` high."""
    shape = rng.choice(["plain", "arched", "pointed"])
    rows = int(rng.integers(1, max(2, min(6, round(height / 0.22) + 1))))
    per_unit = rng.uniform(2.5, 7.0)
    width, tall = rng.uniform(0.3, 0.7), rng.uniform(0.45, 0.8)
    mouldings = rng.random() < 0.5
    for face in faces:
        origin, right = build.polygons[face][:2]
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
    """Put a roof on a box; returns the height of its highest point."""
    kind = rng.choice(kinds)
    side = min(box.width, box.depth)
    if kind == "gable":
        rise = side * rng.uniform(0.25, 0.8)
        build.gable(box, z, rise, along_x=bool(rng.random() < 0.5))
    elif kind == "hip":
        rise = side * rng.uniform(0.25, 0.7)
        build.pyramid(box.outline, z, rise)
    elif kind == "spire":
        rise = side * rng.uniform(1.3, 3.2)
        build.pyramid(box.outline, z, rise)
    elif kind == "dome":
        rise = _dome(build, box.x, box.y, side * rng.uniform(0.36, 0.5), z, rng)
    elif kind == "battlement":
        rise = 0.09
        teeth = int(rng.integers(3, 6))
        for share in (np.arange(teeth) + 0.5) / teeth:
            x = box.low[0] + share * box.width
            for y in (box.low[1] + 0.02, box.high[1] - 0.02):
                tooth = _Box(x, y, 0.5 * box.width / teeth, 0.04)
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
    """A drum and a round, pointed or onion-shaped dome; returns how far it rises over z."""
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
    if rng.random() < 0.5:  # a lantern or finial on top
        size = radius * rng.uniform(0.12, 0.25)
        build.pyramid(_circle(x, y, size, 6), z + top - 0.1 * tall, radius * rng.uniform(0.3, 0.9))
    return top


def _tower(build: _Builder, x, y, width: float, height: float, style: np.random.Generator) -> None:
    """A square or round tower from the ground. Equal states of ``style`` give equal towers."""
    if style.random() < 0.4:
        outline, sides = _circle(x, y, width / 2, 8), 8
    else:
        outline, sides = _Box(x, y, width, width).outline, 4
    faces = build.prism(outline, 0, height, WALL)
    if style.random() < 0.85:
        _windows(build, faces, style, height)
    if sides == 4:
        roofs = ["spire", "hip", "dome", "battlement", "flat", "spire"]
        _roof(build, _Box(x, y, width * 1.04, width * 1.04), height, style, roofs)
    elif style.random() < 0.6:
        build.pyramid(_circle(x, y, width * 0.56, 8), height, width * style.uniform(0.7, 2.6))
    else:
        _dome(build, x, y, width * 0.5, height, style)


def build_landmark(seed: int, landmark_id: int) -> Landmark:
    """Build a landmark of the world ``seed``; equal arguments give an equal result."""
    rng = np.random.default_rng([seed, landmark_id, 0])
    build = _Builder()

    body = _Box(0.0, 0.0, rng.uniform(0.7, 2.6), rng.uniform(0.6, 1.5))
    height = rng.uniform(0.35, 1.5) * (0.7 if body.width > 1.8 else 1.0)
    sides = build.prism(body.outline, 0, height, WALL)
    if rng.random() < 0.92:
        _windows(build, sides, rng, height)
    _roof(build, body, height, rng, ["gable", "hip", "flat", "steps", "dome", "battlement"])

    # The entrance tells front from back: a door, a porch with columns or a stair, or a gateway.
    front = sides[0]
    entrance = rng.choice(["door", "porch", "stairs", "none"])
    if entrance == "door":
        tall, wide = rng.uniform(0.3, 0.65), rng.uniform(0.12, 0.3)
        shape = rng.choice(["plain", "arched", "pointed"])
        build.on_face(front, [_opening(0.5, 0, wide, tall, shape)], DOOR)
    elif entrance == "porch":
        porch = _Box(0, body.low[1] - 0.16, body.width * rng.uniform(0.35, 0.9), 0.3)
        tall, n = height * rng.uniform(0.55, 0.95), int(rng.integers(3, 9))
        for x in np.linspace(porch.low[0] + 0.05, porch.high[0] - 0.05, n):
            build.prism(_circle(x, porch.low[1] + 0.05, 0.035, 6), 0, tall, TRIM)
        build.prism(porch.outline, tall, tall + 0.06, TRIM)
        if rng.random() < 0.7:
            build.gable(porch, tall + 0.06, porch.width * rng.uniform(0.1, 0.25), along_x=False)
    elif entrance == "stairs":
        for step in range(3):
            plan = _Box(0, body.low[1] - 0.1, body.width * 0.6 - 0.1 * step, 0.3 - 0.08 * step)
            build.prism(plan.outline, 0.05 * step, 0.05 * (step + 1), TRIM, TRIM)
    if rng.random() < 0.25:  # a rose window
        rose = rng.uniform(0.08, 0.16)
        ring = _circle(0.0, 0.0, rose, 12) * (1.0, body.width / height) + (0.5, 0.72)
        build.on_face(front, [ring], WINDOW)

    # Towers come alone, in pairs or in fours; those of a group are equal.
    for _ in range(int(rng.choice([0, 1, 2], p=[0.2, 0.5, 0.3]))):
        width, tall = rng.uniform(0.16, 0.5), rng.uniform(0.7, 2.6)
        x = body.width / 2 * rng.choice([1.0, 1.15, 0.75])
        y = body.depth / 2
        groups = {
            "front pair": [(-x, -y), (x, -y)],
            "back pair": [(-x, y), (x, y)],
            "four": [(-x, -y), (x, -y), (-x, y), (x, y)],
            "side": [(x * rng.choice([-1, 1]), y * rng.uniform(-1, 1))],
            "middle": [(body.width * rng.uniform(-0.2, 0.2), y * rng.choice([-1.0, 0.0, 1.0]))],
        }
        style = int(rng.integers(2**32))
        for tx, ty in groups[rng.choice(list(groups))]:
            _tower(build, tx, ty, width, tall, np.random.default_rng(style))

    for side in (-1, 1):  # wings
        if rng.random() < 0.4:
            width, depth = rng.uniform(0.4, 1.2), body.depth * rng.uniform(0.4, 0.9)
            wing = _Box(side * (body.width + width) / 2, rng.uniform(-0.2, 0.2), width, depth)
            low = height * rng.uniform(0.4, 0.95)
            faces = build.prism(wing.outline, 0, low, WALL)
            _windows(build, faces, rng, low)
            _roof(build, wing, low, rng, ["gable", "hip", "flat", "battlement"])

    starts = np.cumsum([0, *(len(p) for p in build.polygons)])
    vertices = np.concatenate(build.polygons)
    low, high = vertices.min(axis=0), vertices.max(axis=0)
    vertices = vertices - [*(low + high)[:2] / 2, 0.0]
    radius = np.linalg.norm(vertices - [0, 0, high[2] / 2], axis=1).max()
    return Landmark(
        seed,
        landmark_id,
        vertices / radius,
        starts,
        np.array(build.materials),
        np.array(build.faces),
        float(high[2] / radius),
    )


# --------------------------------------------------------------------------------------------------
# Photographing it
# --------------------------------------------------------------------------------------------------

# Sky at the top and at the horizon, colour of the sun's light, share of ambient light.
_LIGHTS = {
    "noon": ((92, 148, 222), (190, 214, 238), (1.0, 1.0, 0.97), 0.45),
    "morning": ((150, 180, 220), (246, 222, 190), (1.0, 0.92, 0.78), 0.40),
    "sunset": ((88, 84, 140), (246, 160, 98), (1.0, 0.72, 0.48), 0.38),
    "overcast": ((168, 172, 178), (206, 208, 210), (0.9, 0.92, 0.95), 0.75),
    "fog": ((196, 200, 204), (214, 216, 218), (0.92, 0.93, 0.95), 0.80),
    "night": ((10, 14, 38), (44, 46, 78), (0.42, 0.44, 0.62), 0.45),
}
_PAINTS = np.array(
    [(214, 198, 166), (232, 228, 218), (176, 112, 92), (152, 150, 148), (216, 182, 136),
     (128, 116, 106), (196, 166, 160), (166, 174, 160), (132, 142, 154), (230, 212, 164),
     (104, 102, 104), (200, 200, 204)], dtype=np.float64,
)  # fmt: skip
_ROOFS = np.array(
    [(140, 78, 60), (90, 96, 102), (92, 126, 116), (120, 94, 70), (72, 74, 80), (170, 150, 92),
     (164, 164, 166)], dtype=np.float64,
)  # fmt: skip
_GROUNDS = np.array(
    [(96, 124, 66), (150, 142, 126), (120, 120, 118), (176, 160, 124), (226, 228, 232)],
    dtype=np.float64,
)


def _jitter(rng: np.random.Generator, colour, spread: float = 12.0) -> np.ndarray:
    return np.clip(np.asarray(colour, dtype=np.float64) + rng.normal(0, spread, 3), 0, 255)


def _rgb(colour) -> tuple[int, int, int]:
    r, g, b = np.clip(colour, 0, 255).astype(int)
    return int(r), int(g), int(b)


def _project(landmark: Landmark, rng: np.random.Generator, size: int):
    """Place a camera; returns pixel positions (v, 2), depths (v,), camera position, horizon row."""
    # 0 is straight in front, where most people stand.
    azimuth = np.deg2rad(np.clip(rng.normal(0, 20), -50, 50))
    elevation = np.deg2rad(rng.choice([rng.uniform(1, 10), rng.uniform(5, 20)]))
    distance = rng.uniform(2.0, 5.0)  # in radii of the building
    middle = np.array([0.0, 0.0, landmark.height / 2])
    ground = np.array([np.sin(azimuth), -np.cos(azimuth), 0.0])
    back = np.cos(elevation) * ground + np.array([0.0, 0.0, np.sin(elevation)])
    camera = middle + distance * back
    right = np.array([np.cos(azimuth), np.sin(azimuth), 0.0])
    up = np.cross(back, right)
    axes = np.stack([right, up, -back])  # rows: right, up, forward

    x, y, depth = axes @ (landmark.vertices - camera).T
    plane = np.stack([x / depth, -y / depth], axis=1)
    # The focal length fits the building to a share of the frame: over 1 cuts some of it off.
    share = rng.uniform(0.8, 1.02)
    low, high = plane.min(axis=0), plane.max(axis=0)
    focal = share * size / (high - low).max()
    offset = size * (0.5 + rng.uniform(-0.06, 0.06, 2)) - focal * (low + high) / 2
    roll = np.deg2rad(rng.normal(0, 1.5))
    turn = np.array([[np.cos(roll), -np.sin(roll)], [np.sin(roll), np.cos(roll)]])
    pixels = (focal * plane + offset - size / 2) @ turn.T + size / 2
    horizon = focal * np.tan(elevation) * -1 + offset[1]
    return pixels, depth, camera, horizon


def draw_view(landmark: Landmark, view_id: int, size: int = PHOTO_SIZE) -> np.ndarray:
    """Photograph a landmark.

    Args:
        landmark: what to photograph.
        view_id: number of the view; camera, light, paint, weather and what stands in front are
            drawn from (world seed, landmark id, view id), so equal arguments give equal pixels.
        size: side of the square photo in pixels.

    Returns:
        uint8 (size, size, 3), RGB.
    """
    rng = np.random.default_rng([landmark.seed, landmark.landmark_id, 1 + view_id])
    pixels, depth, camera, horizon = _project(landmark, rng, size)

    hour = rng.choice(list(_LIGHTS), p=[0.32, 0.2, 0.14, 0.2, 0.06, 0.08])
    sky, skyline, sun_colour, ambient = (np.asarray(v, dtype=np.float64) for v in _LIGHTS[hour])
    angle = rng.uniform(-0.5 * np.pi, 0.5 * np.pi) - 0.5 * np.pi  # the sun is on the front's side
    height = np.deg2rad(rng.uniform(15, 65))
    sun = np.array([np.cos(angle) * np.cos(height), np.sin(angle) * np.cos(height), np.sin(height)])

    image = Image.new("RGB", (size, size))
    draw = ImageDraw.Draw(image)
    _draw_backdrop(draw, rng, size, horizon, _jitter(rng, sky), _jitter(rng, skyline), hour)

    paint = np.empty((N_MATERIALS, 3))
    paint[WALL] = _jitter(rng, _PAINTS[rng.integers(len(_PAINTS))])
    paint[SECOND_WALL] = np.clip(paint[WALL] * rng.uniform(0.8, 1.15), 0, 255)
    paint[ROOF] = _jitter(rng, _ROOFS[rng.integers(len(_ROOFS))])
    paint[TRIM] = np.clip(paint[WALL] * rng.uniform(0.65, 1.25), 0, 255)
    lit = hour == "night" and rng.random() < 0.7
    paint[WINDOW] = (250, 214, 130) if lit else _jitter(rng, (58, 66, 80))
    paint[DOOR] = _jitter(rng, (84, 58, 40))

    haze = rng.uniform(0.5, 0.75) if hour == "fog" else rng.uniform(0, 0.15)
    _draw_building(
        draw, landmark, pixels, depth, camera, paint, sun, sun_colour, ambient, lit, haze, skyline
    )
    light = float(sun_colour.mean() * (0.6 + 0.4 * ambient))
    _draw_passers_by(draw, rng, size, horizon, light)
    return _develop(image, rng, hour)


def _draw_building(
    draw, landmark, pixels, depth, camera, paint, sun, sun_colour, ambient, lit, haze, skyline
) -> None:
    """Paint the faces that look at the camera, the farthest first, each with what lies on it."""
    starts = landmark.starts
    solid = np.flatnonzero(landmark.faces == np.arange(len(landmark.faces)))
    a, b, c = (landmark.vertices[starts[solid] + i] for i in range(3))
    normals = np.cross(b - a, c - a)
    normals /= np.linalg.norm(normals, axis=1, keepdims=True) + 1e-12
    visible = np.einsum("ij,ij->i", normals, camera - a) > 0
    distance = np.add.reduceat(depth, starts[:-1]) / np.diff(starts)
    shine = np.clip(normals @ sun, 0, None)
    brightness = ambient + (1 - ambient) * shine  # Lambert's law

    colours = paint[landmark.materials]
    level = np.zeros(len(landmark.faces))
    level[solid] = brightness
    glows = lit & (landmark.materials == WINDOW)
    shaded = colours * level[landmark.faces, None] * sun_colour
    colours = np.where(glows[:, None], colours, shaded) * (1 - haze) + skyline * haze
    fills = [tuple(c) for c in np.clip(colours, 0, 255).astype(int).tolist()]

    # What lies on a face was added after it: a stable sort by the face keeps that order.
    rank = np.full(len(landmark.faces), -1)
    order = solid[visible][np.argsort(-distance[solid[visible]], kind="stable")]
    rank[order] = np.arange(len(order))
    rank = rank[landmark.faces]
    corners = list(map(tuple, np.round(pixels, 1).tolist()))
    for polygon in np.argsort(rank, kind="stable")[np.count_nonzero(rank < 0) :].tolist():
        draw.polygon(corners[starts[polygon] : starts[polygon + 1]], fill=fills[polygon])


def _draw_backdrop(draw, rng, size: int, horizon: float, sky, skyline, hour: str) -> None:
    """Sky with clouds, far houses or hills on the horizon, and the ground."""
    ground = int(np.clip(horizon, 0.05 * size, size))
    for band in range(8):
        share = band / 7
        y0, y1 = ground * band // 8, ground * (band + 1) // 8
        draw.rectangle([0, y0, size, y1], fill=_rgb(sky * (1 - share) + skyline * share))
    if hour in ("noon", "morning", "sunset"):
        for _ in range(int(rng.integers(0, 5))):
            x, y = rng.uniform(0, size), rng.uniform(0, 0.7 * ground + 1)
            w, h = rng.uniform(0.1, 0.35) * size, rng.uniform(0.03, 0.08) * size
            draw.ellipse([x - w, y - h, x + w, y + h], fill=_rgb(skyline * 0.5 + 122))
    for _ in range(int(rng.integers(0, 9))):
        x, w, h = rng.uniform(-10, size), rng.uniform(6, 30), rng.uniform(2, 0.14 * size)
        colour = _rgb(skyline * 0.55 + _jitter(rng, (70, 74, 70), 14) * 0.45)
        if rng.random() < 0.5:
            draw.rectangle([x, ground - h, x + w, ground], fill=colour)
        else:
            draw.ellipse([x - w, ground - h, x + w, ground + h], fill=colour)
    light = 0.3 if hour == "night" else 1.0
    floor = _jitter(rng, _GROUNDS[rng.integers(len(_GROUNDS))], 12) * light
    draw.rectangle([0, ground, size, size], fill=_rgb(floor))
    if rng.random() < 0.4:  # a path or a pool
        x, w = rng.uniform(0, size), rng.uniform(0.1, 0.3) * size
        draw.polygon(
            [(size / 2, ground), (size / 2 + 4, ground), (x + w, size), (x - w, size)],
            fill=_rgb(floor * rng.uniform(0.75, 1.2)),
        )


def _draw_passers_by(draw, rng, size: int, horizon: float, light: float) -> None:
    """Trees, people and lamp posts between the camera and the building."""
    base = np.clip(max(horizon, 0.8 * size), 0, size)
    places = [(-0.05, 0.3), (0.7, 1.05), (0.0, 1.0)]  # rather at the sides than in front
    for _ in range(int(rng.choice([0, 1, 2, 3], p=[0.35, 0.35, 0.2, 0.1]))):
        x = size * rng.uniform(*places[rng.integers(len(places))])
        foot = rng.uniform(base, size * 1.02)
        drawing = rng.choice([_draw_tree, _draw_person, _draw_lamp], p=[0.45, 0.35, 0.2])
        drawing(draw, rng, size, x, foot, light)


def _draw_tree(draw, rng, size: int, x: float, foot: float, light: float) -> None:
    tall, wide = rng.uniform(0.15, 0.42) * size, rng.uniform(0.05, 0.11) * size
    trunk, green = np.array([82, 62, 44]) * light, _jitter(rng, (62, 96, 48), 16) * light
    draw.rectangle([x - 1.5, foot - tall * 0.5, x + 1.5, foot], fill=_rgb(trunk))
    if rng.random() < 0.4:  # a fir
        left, right, low = x - wide, x + wide, foot - tall * 0.2
        draw.polygon([(left, low), (right, low), (x, foot - tall)], fill=_rgb(green))
        return
    for _ in range(4):
        cx, cy = x + rng.normal(0, wide * 0.5), foot - tall * rng.uniform(0.55, 0.9)
        leaves = _rgb(green * rng.uniform(0.8, 1.15))
        draw.ellipse([cx - wide, cy - wide, cx + wide, cy + wide], fill=leaves)


def _draw_person(draw, rng, size: int, x: float, foot: float, light: float) -> None:
    tall = rng.uniform(0.08, 0.2) * size
    wide = tall * 0.16
    coat, skin = rng.uniform(20, 230, 3) * light, np.array([214, 170, 140]) * light
    draw.rectangle([x - wide, foot - tall * 0.82, x + wide, foot], fill=_rgb(coat))
    head = [x - wide * 0.8, foot - tall, x + wide * 0.8, foot - tall * 0.78]
    draw.ellipse(head, fill=_rgb(skin))


def _draw_lamp(draw, rng, size: int, x: float, foot: float, light: float) -> None:
    top = foot - rng.uniform(0.3, 0.6) * size
    draw.line([x, foot, x, top], fill=(40, 42, 44), width=2)
    draw.ellipse([x - 3, top - 4, x + 3, top + 2], fill=(236, 226, 190))


def _develop(image: Image.Image, rng: np.random.Generator, hour: str) -> np.ndarray:
    """What lens, film and air do to the picture: blur, colour cast, exposure, noise, rain."""
    if rng.random() < 0.25:
        image = image.filter(ImageFilter.BoxBlur(rng.uniform(0.3, 0.9)))
    size = image.size[0]
    if hour == "overcast" and rng.random() < 0.3:
        draw = ImageDraw.Draw(image)
        for _ in range(40):
            x, y = rng.uniform(0, size, 2)
            draw.line([x, y, x - 2, y + 7], fill=(190, 194, 200))
    photo = np.asarray(image, dtype=np.float32)
    cast = rng.uniform(0.88, 1.12, 3).astype(np.float32)
    gain, gamma = rng.uniform(0.8, 1.2), rng.uniform(0.8, 1.25)
    curve = 255 * np.clip(gain * (np.arange(256, dtype=np.float32) / 255) ** gamma, 0, 1)
    photo = curve[photo.astype(np.uint8)] * cast
    noise = rng.integers(-64, 64, photo.shape[:2], dtype=np.int8).astype(np.float32)
    photo += (noise * rng.uniform(0.0, 0.12))[..., None]
    return np.clip(photo, 0, 255).astype(np.uint8)


def draw_views(seed: int, landmark_id: int, view_ids: list[int]) -> np.ndarray:
    """Photograph a landmark some times: uint8 (views, 128, 128, 3) RGB."""
    landmark = build_landmark(seed, landmark_id)
    return np.stack([draw_view(landmark, view_id) for view_id in view_ids])


def render_jpegs(seed: int, landmark_id: int, view_ids: list[int]) -> list[bytes]:
    """Draw some views of one landmark as JPEG files."""
    jpegs = []
    for photo in draw_views(seed, landmark_id, view_ids):
        buffer = io.BytesIO()
        Image.fromarray(photo).save(buffer, "JPEG", quality=JPEG_QUALITY)
        jpegs.append(buffer.getvalue())
    return jpegs
