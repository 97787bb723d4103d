"""Loads the pages' static files, and encodes pictures and texts for a browser.

page = load("picture_map.html")
uri = picture_uri(photo)     # "data:image/jpeg;base64,..."
"""

from __future__ import annotations

import base64
import html
import io
from pathlib import Path

import numpy as np
from PIL import Image

STATIC = Path(__file__).parent / "static"


def load(name: str) -> str:
    """Read a text file in ``lib/app/static``."""
    return (STATIC / name).read_text(encoding="utf-8")


def data_uri(content: bytes, kind: str) -> str:
    """Encode a picture file as a data URI; ``kind`` is its format, such as "png"."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def picture_uri(picture: np.ndarray, kind: str = "jpeg", quality: int = 85) -> str:
    """Encode a picture, uint8 (h, w, 3) RGB, as a data URI; ``quality`` is Pillow's, 1 to 100."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, kind, quality=quality)
    return data_uri(buffer.getvalue(), kind)


def valid(name: str) -> str:
    """Make a file name valid Unicode, which old names may not be, so that it can be sent."""
    return name.encode("utf-8", "replace").decode("utf-8")


def counted(number: int, what: str) -> str:
    """Write a number with its noun: "1 photo", "2,000 photos"."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def message(text: str, failed: bool = False) -> str:
    """Write a message as HTML that screen readers announce."""
    role = 'role="alert" class="status failed"' if failed else 'role="status" class="status"'
    return f"<div {role}>{html.escape(valid(text))}</div>"
