"""Draws the demo world: photos of made-up landmarks, so that no download is needed.

    photo = draw_view(build_landmark(seed=7, landmark_id=12), view_id=0)

A landmark is defined by the *shape* of its building (:mod:`lib.demo.buildings`). Each photo has its
own camera, light, weather, paint and passers-by, so colours do not reveal the landmark.
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from lib.demo.buildings import WINDOW, Landmark, build_landmark

SIZE, JPEG_QUALITY = 128, 94  # pixels and quality of a photo, as in the Kaggle set

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
    return tuple(np.clip(colour, 0, 255).astype(int).tolist())


def _project(landmark: Landmark, rng: np.random.Generator):
    """Place a camera; return pixels (v, 2), depths (v,), camera position (3,), horizon row."""
    # Azimuth 0 is in front of the building, where most people stand.
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
    # The building fills this share of the frame; above 1, parts of it are cut off.
    share = rng.uniform(0.8, 1.02)
    low, high = plane.min(axis=0), plane.max(axis=0)
    focal = share * SIZE / (high - low).max()
    offset = SIZE * (0.5 + rng.uniform(-0.06, 0.06, 2)) - focal * (low + high) / 2
    roll = np.deg2rad(rng.normal(0, 1.5))
    turn = np.array([[np.cos(roll), -np.sin(roll)], [np.sin(roll), np.cos(roll)]])
    pixels = (focal * plane + offset - SIZE / 2) @ turn.T + SIZE / 2
    horizon = focal * np.tan(elevation) * -1 + offset[1]
    return pixels, depth, camera, horizon


def draw_view(landmark: Landmark, view_id: int) -> np.ndarray:
    """Draw a photo of a landmark.

    Args:
        landmark: the building.
        view_id: number of the photo. Equal numbers give equal pixels: with the landmark's seed and
            id, it determines camera, light, paint, weather and passers-by.

    Returns:
        uint8 (128, 128, 3), RGB.
    """
    rng = np.random.default_rng([landmark.seed, landmark.landmark_id, 1 + view_id])
    pixels, depth, camera, horizon = _project(landmark, rng)

    hour = rng.choice(list(_LIGHTS), p=[0.32, 0.2, 0.14, 0.2, 0.06, 0.08])
    sky, skyline, sun_colour, ambient = (np.asarray(v, dtype=np.float64) for v in _LIGHTS[hour])
    angle = rng.uniform(-0.5 * np.pi, 0.5 * np.pi) - 0.5 * np.pi  # the sun is never behind it
    height = np.deg2rad(rng.uniform(15, 65))
    sun = np.array([np.cos(angle) * np.cos(height), np.sin(angle) * np.cos(height), np.sin(height)])

    image = Image.new("RGB", (SIZE, SIZE))
    draw = ImageDraw.Draw(image)
    _draw_backdrop(draw, rng, horizon, _jitter(rng, sky), _jitter(rng, skyline), hour)

    wall = _jitter(rng, _PAINTS[rng.integers(len(_PAINTS))])
    second_wall = np.clip(wall * rng.uniform(0.8, 1.15), 0, 255)
    roof = _jitter(rng, _ROOFS[rng.integers(len(_ROOFS))])
    trim = np.clip(wall * rng.uniform(0.65, 1.25), 0, 255)
    lit = hour == "night" and rng.random() < 0.7
    window = (250, 214, 130) if lit else _jitter(rng, (58, 66, 80))
    door = _jitter(rng, (84, 58, 40))
    paint = np.array([wall, roof, trim, window, door, second_wall])  # in the order of materials

    haze = rng.uniform(0.5, 0.75) if hour == "fog" else rng.uniform(0, 0.15)
    _draw_building(
        draw, landmark, pixels, depth, camera, paint, sun, sun_colour, ambient, lit, haze, skyline
    )
    light = float(sun_colour.mean() * (0.6 + 0.4 * ambient))
    _draw_passers_by(draw, rng, horizon, light)
    return _develop(image, rng, hour)


def _draw_building(
    draw, landmark, pixels, depth, camera, paint, sun, sun_colour, ambient, lit, haze, skyline
) -> None:
    """Paint the faces turned to the camera from back to front, each with its windows and trim."""
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

    # Windows come after their wall, so a stable sort by face paints them on top of it.
    rank = np.full(len(landmark.faces), -1)
    order = solid[visible][np.argsort(-distance[solid[visible]], kind="stable")]
    rank[order] = np.arange(len(order))
    rank = rank[landmark.faces]
    corners = list(map(tuple, np.round(pixels, 1).tolist()))
    for polygon in np.argsort(rank, kind="stable")[np.count_nonzero(rank < 0) :].tolist():
        draw.polygon(corners[starts[polygon] : starts[polygon + 1]], fill=fills[polygon])


def _draw_backdrop(draw, rng, horizon: float, sky, skyline, hour: str) -> None:
    """Draw the sky with clouds, houses or hills on the horizon, and the ground."""
    ground = int(np.clip(horizon, 0.05 * SIZE, SIZE))
    for band in range(8):
        share = band / 7
        y0, y1 = ground * band // 8, ground * (band + 1) // 8
        draw.rectangle([0, y0, SIZE, y1], fill=_rgb(sky * (1 - share) + skyline * share))
    if hour in ("noon", "morning", "sunset"):
        for _ in range(int(rng.integers(0, 5))):
            x, y = rng.uniform(0, SIZE), rng.uniform(0, 0.7 * ground + 1)
            w, h = rng.uniform(0.1, 0.35) * SIZE, rng.uniform(0.03, 0.08) * SIZE
            draw.ellipse([x - w, y - h, x + w, y + h], fill=_rgb(skyline * 0.5 + 122))
    for _ in range(int(rng.integers(0, 9))):
        x, w, h = rng.uniform(-10, SIZE), rng.uniform(6, 30), rng.uniform(2, 0.14 * SIZE)
        colour = _rgb(skyline * 0.55 + _jitter(rng, (70, 74, 70), 14) * 0.45)
        if rng.random() < 0.5:
            draw.rectangle([x, ground - h, x + w, ground], fill=colour)
        else:
            draw.ellipse([x - w, ground - h, x + w, ground + h], fill=colour)
    light = 0.3 if hour == "night" else 1.0
    floor = _jitter(rng, _GROUNDS[rng.integers(len(_GROUNDS))], 12) * light
    draw.rectangle([0, ground, SIZE, SIZE], fill=_rgb(floor))
    if rng.random() < 0.4:  # a path or a pool
        x, w = rng.uniform(0, SIZE), rng.uniform(0.1, 0.3) * SIZE
        draw.polygon(
            [(SIZE / 2, ground), (SIZE / 2 + 4, ground), (x + w, SIZE), (x - w, SIZE)],
            fill=_rgb(floor * rng.uniform(0.75, 1.2)),
        )


def _draw_passers_by(draw, rng, horizon: float, light: float) -> None:
    """Draw trees, people and lamp posts in front of the building."""
    base = np.clip(max(horizon, 0.8 * SIZE), 0, SIZE)
    places = [(-0.05, 0.3), (0.7, 1.05), (0.0, 1.0)]  # mostly at the sides
    for _ in range(int(rng.choice([0, 1, 2, 3], p=[0.35, 0.35, 0.2, 0.1]))):
        x = SIZE * rng.uniform(*places[rng.integers(len(places))])
        foot = rng.uniform(base, SIZE * 1.02)
        drawing = rng.choice([_draw_tree, _draw_person, _draw_lamp], p=[0.45, 0.35, 0.2])
        drawing(draw, rng, x, foot, light)


def _draw_tree(draw, rng, x: float, foot: float, light: float) -> None:
    tall, wide = rng.uniform(0.15, 0.42) * SIZE, rng.uniform(0.05, 0.11) * SIZE
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


def _draw_person(draw, rng, x: float, foot: float, light: float) -> None:
    tall = rng.uniform(0.08, 0.2) * SIZE
    wide = tall * 0.16
    coat, skin = rng.uniform(20, 230, 3) * light, np.array([214, 170, 140]) * light
    draw.rectangle([x - wide, foot - tall * 0.82, x + wide, foot], fill=_rgb(coat))
    head = [x - wide * 0.8, foot - tall, x + wide * 0.8, foot - tall * 0.78]
    draw.ellipse(head, fill=_rgb(skin))


def _draw_lamp(draw, rng, x: float, foot: float, light: float) -> None:
    top = foot - rng.uniform(0.3, 0.6) * SIZE
    draw.line([x, foot, x, top], fill=(40, 42, 44), width=2)
    draw.ellipse([x - 3, top - 4, x + 3, top + 2], fill=(236, 226, 190))


def _develop(image: Image.Image, rng: np.random.Generator, hour: str) -> np.ndarray:
    """Add blur, rain, exposure, a colour cast and noise."""
    if rng.random() < 0.25:
        image = image.filter(ImageFilter.BoxBlur(rng.uniform(0.3, 0.9)))
    if hour == "overcast" and rng.random() < 0.3:
        draw = ImageDraw.Draw(image)
        for _ in range(40):
            x, y = rng.uniform(0, SIZE, 2)
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
    """Draw several photos of a landmark, uint8 (views, 128, 128, 3) RGB."""
    landmark = build_landmark(seed, landmark_id)
    return np.stack([draw_view(landmark, view_id) for view_id in view_ids])


def render_jpegs(seed: int, landmark_id: int, view_ids: list[int]) -> list[bytes]:
    """Draw several photos of a landmark as JPEG files."""
    jpegs = [io.BytesIO() for _ in view_ids]
    for photo, jpeg in zip(draw_views(seed, landmark_id, view_ids), jpegs, strict=True):
        Image.fromarray(photo).save(jpeg, "JPEG", quality=JPEG_QUALITY)
    return [jpeg.getvalue() for jpeg in jpegs]
