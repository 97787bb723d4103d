"""Loads the pages' static files, and encodes pictures as data URIs.

page = load("picture_map.html")
uri = picture_uri(photo)     # "data:image/jpeg;base64,..."
"""

from __future__ import annotations

import base64
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


def picture_uri(picture: np.ndarray, kind: str = "jpeg", **options) -> str:
    """Encode a picture, uint8 (h, w, 3) RGB; ``options`` are those of Pillow's ``save``."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, kind, **options)
    return data_uri(buffer.getvalue(), kind)
