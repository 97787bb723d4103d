"""Two widgets that show photos: one to draw a box on, and one that opens a photo large.

    drawn = PhotoBox(on_box=lambda box: ...)
    drawn.show(picture, size=(4032, 3024))
    large = LargePhoto()
    large.show(picture, "Paris/1.jpg")

A box is drawn with the mouse, a finger or the keyboard. A browser may send anything, so a box that
is none is ignored.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import anywidget
import numpy as np
import traitlets

from lib.app.web import STATIC, picture_uri, valid
from lib.data.photos import Box

LEAST = 8  # pixels of a box's sides


class PhotoBox(anywidget.AnyWidget):
    """A photo on which its user draws a box.

    ``on_box`` is called with the box, in pixels of the upright photo, or None for the whole photo.
    """

    _esm = STATIC / "box.js"
    _css = STATIC / "box.css"
    picture = traitlets.Unicode().tag(sync=True)  # a data URI; "" before the first photo
    sides = traitlets.List([1, 1]).tag(sync=True)  # width and height of the photo in pixels
    box = traitlets.List().tag(sync=True)  # x0, y0, x1, y1; [] without one
    least = traitlets.Int(LEAST).tag(sync=True)

    def __init__(self, on_box: Callable[[Box | None], None]):
        super().__init__()
        self._on_box, self._size = on_box, (1, 1)
        self.on_msg(self._on_message)

    def show(self, picture: np.ndarray, size: tuple[int, int], box: Box | None = None) -> None:
        """Show a photo with a box on it; its width and height are ``size``, whatever is shown.

        ``picture`` is uint8 (h, w, 3); an empty one hides the widget.
        """
        self._size = size  # not as traits, which a browser may set
        with self.hold_sync():
            self.picture = picture_uri(picture) if picture.size else ""
            self.sides, self.box = list(size), list(box or ())

    def _on_message(self, _: Any, content: Any, buffers: list[memoryview]) -> None:
        match content:
            case {"box": []}:
                self._on_box(None)
            case {"box": [x0, y0, x1, y1]}:
                box, (width, height) = (x0, y0, x1, y1), self._size
                # Neither NaN nor a number of hundreds of digits passes.
                if (
                    all(type(edge) in (int, float) for edge in box)
                    and 0 <= x0 < x1 <= width
                    and 0 <= y0 < y1 <= height
                    and min(x1 - x0, y1 - y0) >= LEAST
                ):
                    self._on_box(box)


class LargePhoto(anywidget.AnyWidget):
    """A dialog that shows a photo."""

    _esm = STATIC / "large.js"
    _css = STATIC / "large.css"

    def show(self, picture: np.ndarray, name: str) -> None:
        """Open the dialog with a photo, uint8 (h, w, 3), and its name."""
        self.send({"uri": picture_uri(picture, quality=90), "name": valid(name)})
