"""A widget to upload a photo: drop it, paste it, or choose a file.

drop = PhotoDrop(on_photo=lambda content: ..., on_refused=lambda message: ...)

It contains a real file input, which Tab reaches and the space bar opens. Files are sent in pieces,
since Jupyter's servers close the connection on a message of more than 10 MB.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import anywidget
import traitlets

from lib.app.upload import MOST_BYTES, too_large
from lib.app.web import STATIC


class PhotoDrop(anywidget.AnyWidget):
    """A widget that passes the photos uploaded to it to a callback.

    ``on_photo`` is called with the bytes of each file; ``on_refused``, if a file is too large, with
    a message for the user.
    """

    _esm = STATIC / "drop.js"
    _css = STATIC / "drop.css"
    most_bytes = traitlets.Int(MOST_BYTES).tag(sync=True)

    def __init__(self, on_photo: Callable[[bytes], None], on_refused: Callable[[str], None]):
        super().__init__()
        self._on_photo, self._on_refused = on_photo, on_refused
        self._received = bytearray()
        self.on_msg(self._on_message)

    def _on_message(self, _: Any, content: Any, buffers: list[memoryview]) -> None:
        """Join the pieces; ignore those that do not fit, since a browser may send anything."""
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
                    photo, self._received = bytes(self._received), bytearray()
                    self._on_photo(photo)
