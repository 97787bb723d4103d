"""Draws an interactive map of photos as one self-contained web page.

page = picture_map(points, photos, labels, title="t-SNE of the embeddings")
Path("map.html").write_text(page, encoding="utf-8")
display(HTML(framed(page)))           # in a notebook
"""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Sequence

import numpy as np

from lib.app.web import load, picture_uri

SIZE = 1000  # the map's longer side, in its own units


def picture_map(
    points: np.ndarray, photos: np.ndarray, labels: Sequence[object], *, title: str
) -> str:
    """Build a web page with a dot for each photo, coloured by landmark.

    Pointing at a dot, or moving to it with the arrow keys, shows its photo and landmark, and
    highlights the other dots of the landmark. The page embeds all photos as one WebP picture: 500
    photos of 64 pixels take 300 to 400 KB. The same input gives the same string.

    Args:
        points: float (n, 2), positions of the photos, from t-SNE for instance.
        photos: uint8 (n, s, s, 3), RGB; shown 192 pixels wide.
        labels: n landmarks, shown as text.
        title: heading of the page.

    Raises:
        ValueError: ``points`` is empty, not (n, 2) or not finite; the numbers of photos or labels
            differ from n; or the photos exceed one WebP picture (16383 pixels each way).
    """
    points, labels = np.asarray(points, dtype=float), np.asarray(labels)
    if points.ndim != 2 or points.shape[1] != 2 or not len(points) or not np.isfinite(points).all():
        raise ValueError(f"points must be finite and (n, 2), n at least 1, not {points.shape}")
    if len(photos) != len(points) or len(labels) != len(points):
        raise ValueError(f"{len(points)} points, {len(photos)} photos and {len(labels)} labels")
    landmarks, landmark = np.unique(labels, return_inverse=True)
    order = np.argsort(landmark, kind="stable")
    low, extent = points.min(axis=0), np.ptp(points, axis=0)
    scaled = (points - low) * (SIZE / (extent.max() or 1))  # one scale: distances keep their ratio
    width, height = np.ptp(scaled, axis=0)
    scaled[:, 1] = height - scaled[:, 1]  # on a screen y points down
    columns = math.isqrt(len(photos) - 1) + 1
    data = {
        "width": round(width, 1),
        "height": round(height, 1),
        "points": scaled[order].round(1).tolist(),
        "landmark": landmark[order].tolist(),
        "landmarks": [str(name) for name in landmarks],
        "columns": columns,
        "sprite": _sprite(photos[order], columns),
    }
    # "</script>" would end the script even within a string.
    texts = {"DATA": json.dumps(data).replace("<", "\\u003c"), "TITLE": html.escape(title)}
    return re.sub("@(DATA|TITLE)@", lambda match: texts[match[1]], load("picture_map.html"))


def framed(page: str, height: int = 560) -> str:
    """Embed a page of :func:`picture_map` in a notebook, isolated from its scripts and styles.

    It is ``height`` pixels high and as wide as the surrounding element.
    """
    return (
        '<div><iframe title="Picture map" sandbox="allow-scripts" '
        f'style="width: 100%; height: {height}px; border: 0" srcdoc="{html.escape(page)}">'
        "</iframe></div>"
    )


def _sprite(photos: np.ndarray, columns: int) -> str:
    """Combine all photos in one picture, row by row, as a data URI."""
    n, side = photos.shape[:2]
    rows = -(-n // columns)
    tiles = np.full((rows * columns, side, side, 3), 255, dtype=np.uint8)
    tiles[:n] = photos
    sheet = tiles.reshape(rows, columns, side, side, 3).swapaxes(1, 2)
    return picture_uri(sheet.reshape(rows * side, columns * side, 3), "webp", quality=60)
