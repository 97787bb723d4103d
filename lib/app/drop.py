"""A widget to hand a photo over: drop it, paste it, or choose a file.

drop = PhotoDrop(on_photo=lambda content: ..., on_refused=lambda message: ...)

The file input is a real one: it can be reached by Tab and opened by the space bar. A file travels
in pieces, since Jupyter's servers close a connection on a message of more than 10 MB.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import anywidget
import traitlets

from lib.app.upload import MOST_BYTES, too_large
from lib.app.web import STATIC


class PhotoDrop(anywidget.AnyWidget):
    """A place to drop a photo on."""

    _esm = STATIC / "drop.js"
    _css = STATIC / "drop.css"
    most_bytes = traitlets.Int(MOST_BYTES).tag(sync=True)

    def __init__(self, on_photo: Callable[[bytes], None], on_refused: Callable[[str], None]):
        """Make one.

        Args:
            on_photo: gets the bytes of each file that is handed over.
            on_refused: gets what to say about one that is too large.
        """
        super().__init__()
        self._on_photo, self._on_refused = on_photo, on_refused
        self._received = bytearray()
        self.on_msg(self._on_message)

    def _on_message(self, _: Any, content: Any, buffers: list[memoryview]) -> None:
        """Put the pieces together; what does not fit is dropped: a browser may send anything."""
        match content:
            case {"refused": int(size)}:
                self._on_refused(too_large(size))
            case {"start": int(start), "size": int(size)} if len(buffers) == 1:
                if start == 0:
                    self._received.clear()
                if start != len(self._received) or start + len(buffers[0]) > MOST_BYTES:
                    return
                self._received += buffers[0]
                if len(self._received) == size:
                    photo = bytes(self._received)
                    self._received.clear()
                    self._on_photo(photo)
