"""A map of photos to look at with the mouse: a web page in one string, which needs no network.

page = picture_map(points, photos, labels, title="t-SNE of the embeddings")
Path("map.html").write_text(page, encoding="utf-8")
display(HTML(framed(page)))           # in a notebook
"""

from __future__ import annotations

import base64
import html
import io
import json
import math
import re
from collections.abc import Sequence

import numpy as np
from PIL import Image

SIZE = 1000  # the map's longer side, in its own units

# One string, for the page must be one file. @DATA@ is JSON; the script draws everything from it.
PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>@TITLE@</title>
<style>
* { box-sizing: border-box; }
html, body { height: 100%; margin: 0; }
body { display: flex; flex-direction: column; padding: 8px 12px; background: white; color: #222;
  font: 14px/1.4 system-ui, "DejaVu Sans", sans-serif; }
h1 { font-size: 16px; margin: 0 0 6px; }
main { flex: 1; min-height: 0; display: flex; gap: 12px; }
svg { flex: 1; min-width: 0; border: 1px solid #ccc; border-radius: 4px; cursor: grab; }
circle { stroke: white; cursor: pointer; outline: none; }
svg.pointed circle { opacity: 0.2; }
svg.pointed circle.same { opacity: 1; }
svg circle.here { stroke: black; }
aside { flex: 0 0 216px; overflow: auto; overflow-wrap: anywhere; }
aside div { background-color: #eee; background-repeat: no-repeat; }
#photo { width: 200px; height: 200px; border: 4px solid #eee; border-radius: 4px; }
#label { font-weight: bold; margin: 6px 0 0; }
#count { margin: 0 0 6px; color: #555; }
#others { display: flex; flex-wrap: wrap; gap: 4px; background: none; }
#others div { width: 47px; height: 47px; }
@media (max-width: 560px) { main { flex-direction: column; } aside { flex-basis: 250px; } }
footer { color: #555; font-size: 12px; margin-top: 4px; }
</style>
</head>
<body>
<h1>@TITLE@</h1>
<main>
<svg role="group" aria-label="Map of the photos: the arrow keys go from one to the next"></svg>
<aside><div id="photo"></div><p id="label">Point at a dot</p><p id="count"></p>
<div id="others"></div></aside>
</main>
<footer>Colour: landmark. Point at a dot, or Tab into the map: &larr; &rarr; next photo, &uarr;
&darr; next landmark. Zoom: Ctrl + wheel, or + and &minus;. Drag to move, 0 to see all.</footer>
<script type="application/json" id="data">@DATA@</script>
<script>
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const svg = document.querySelector("svg");
const find = (id) => document.getElementById(id);

// Photos and dots are sorted by landmark: those of one landmark follow each other.
const members = data.landmarks.map(() => []);
data.landmark.forEach((landmark, i) => members[landmark].push(i));
// The golden angle keeps the hues of successive landmarks apart, however many there are.
const colour = (k) => `hsl(${(k * 137.508) % 360} 70% ${[45, 62, 32][k % 3]}%)`;

const dots = data.points.map(([x, y], i) => {
  const dot = document.createElementNS("http://www.w3.org/2000/svg", "circle");
  const k = data.landmark[i];
  const number = members[k].indexOf(i) + 1;
  dot.setAttribute("cx", x);
  dot.setAttribute("cy", y);
  dot.setAttribute("fill", colour(k));
  dot.setAttribute("tabindex", i ? -1 : 0); // Tab enters the map once; the arrow keys do the rest
  dot.setAttribute("role", "img");
  dot.setAttribute("aria-label", `${data.landmarks[k]}, photo ${number} of ${members[k].length}`);
  dot.addEventListener("pointerover", () => show(i));
  dot.addEventListener("focus", () => show(i));
  svg.append(dot);
  return dot;
});

// All photos lie in one picture, row by row; a box shows one of them as its background.
function paint(box, i, side) {
  const column = i % data.columns, row = Math.floor(i / data.columns);
  box.style.backgroundImage = `url(${data.sprite})`;
  box.style.backgroundSize = `${data.columns * side}px auto`;
  box.style.backgroundPosition = `${-column * side}px ${-row * side}px`;
  box.setAttribute("role", "img");
  box.setAttribute("aria-label", dots[i].getAttribute("aria-label"));
}

let pointed = -1; // the dot whose photo is shown
function show(i) {
  pointed = i;
  const k = data.landmark[i];
  svg.classList.add("pointed");
  dots.forEach((dot, j) => {
    dot.classList.toggle("same", data.landmark[j] === k);
    dot.classList.toggle("here", j === i);
    dot.setAttribute("tabindex", j === i ? 0 : -1);
  });
  look();
  paint(find("photo"), i, 192);
  find("photo").style.borderColor = colour(k);
  find("label").textContent = data.landmarks[k];
  find("count").textContent = `photo ${members[k].indexOf(i) + 1} of ${members[k].length}`;
  find("others").replaceChildren(...members[k].filter((j) => j !== i).slice(0, 24).map((j) => {
    const box = document.createElement("div");
    paint(box, j, 47);
    return box;
  }));
}

// What is seen: the left upper corner, the width and the height, in the map's units.
const margin = 30;
const all = { x: -margin, y: -margin, w: data.width + 2 * margin, h: data.height + 2 * margin };
let view = { ...all };
function look() {
  svg.setAttribute("viewBox", `${view.x} ${view.y} ${view.w} ${view.h}`);
  const box = svg.getBoundingClientRect();
  const unit = Math.max(view.w / box.width, view.h / box.height) || 1; // a pixel of the screen
  dots.forEach((dot, i) => {
    dot.setAttribute("r", (i === pointed ? 9 : 6) * unit);
    dot.style.strokeWidth = (i === pointed ? 2 : 1) * unit;
  });
  return unit;
}
function zoom(factor, x = view.x + view.w / 2, y = view.y + view.h / 2) {
  factor = Math.min(Math.max(factor, 0.02 * all.w / view.w), all.w / view.w);
  view = { x: x + (view.x - x) * factor, y: y + (view.y - y) * factor,
    w: view.w * factor, h: view.h * factor };
  look();
}

svg.addEventListener("wheel", (event) => {
  if (!event.ctrlKey) return; // the page around the map must still scroll
  event.preventDefault();
  const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(
    svg.getScreenCTM().inverse());
  zoom(Math.exp(Math.sign(event.deltaY) * 0.2), at.x, at.y);
}, { passive: false });
svg.addEventListener("pointermove", (event) => {
  if (!(event.buttons & 1)) return;
  const unit = look();
  view.x -= event.movementX * unit;
  view.y -= event.movementY * unit;
  look();
});
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return; // the browser's own
  const k = data.landmark[pointed];
  const first = (landmark) => members[landmark]?.[0] ?? pointed;
  const to = { ArrowRight: pointed + 1, ArrowLeft: pointed - 1, ArrowDown: first(k + 1),
    ArrowUp: first(k - 1), Home: 0, End: dots.length - 1 }[event.key];
  if (event.key === "+") zoom(0.8);
  else if (event.key === "-") zoom(1.25);
  else if (event.key === "0") { view = { ...all }; look(); }
  else if (to !== undefined) dots[to]?.focus();
  else return;
  event.preventDefault();
});
new ResizeObserver(look).observe(svg);
</script>
</body>
</html>
"""


def picture_map(
    points: np.ndarray, photos: np.ndarray, labels: Sequence[object], *, title: str
) -> str:
    """A web page with a dot for each photo, coloured by landmark.

    Pointing at a dot, or going to it with the arrow keys, shows its photo and its landmark, and
    brings out the other dots of that landmark. All photos are one WebP picture within the page;
    500 of 64 pixels take 300 to 400 KB. The same input gives the same string.

    Args:
        points: float (n, 2), where the photos lie, by t-SNE for instance.
        photos: uint8 (n, s, s, 3), RGB. The page shows them 192 pixels wide.
        labels: n landmarks, shown as text.
        title: a heading.

    Raises:
        ValueError: no points, points that are not (n, 2) and finite, another number of photos or
            labels, or more photos than one WebP picture can hold (16383 pixels each way).
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
    # In a script, "</script>" would end it even within a string.
    texts = {"DATA": json.dumps(data).replace("<", "\\u003c"), "TITLE": html.escape(title)}
    return re.sub("@(DATA|TITLE)@", lambda match: texts[match[1]], PAGE)


def framed(page: str, height: int = 560) -> str:
    """A page as a part of another, in a notebook or a report: neither's script or style meets.

    Args:
        page: from :func:`picture_map`.
        height: in pixels; the width is all there is.
    """
    return (
        '<div><iframe title="Picture map" sandbox="allow-scripts" '
        f'style="width: 100%; height: {height}px; border: 0" srcdoc="{html.escape(page)}">'
        "</iframe></div>"
    )


def _sprite(photos: np.ndarray, columns: int) -> str:
    """All photos in one picture, row by row, as a data URI."""
    n, side = photos.shape[:2]
    rows = -(-n // columns)
    tiles = np.full((rows * columns, side, side, 3), 255, dtype=np.uint8)
    tiles[:n] = photos
    sheet = tiles.reshape(rows, columns, side, side, 3).swapaxes(1, 2)
    buffer = io.BytesIO()
    image = Image.fromarray(sheet.reshape(rows * side, columns * side, 3))
    image.save(buffer, "WEBP", quality=60, method=4)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"
