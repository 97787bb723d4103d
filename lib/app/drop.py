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

SCRIPT = """
const PIECE = 4 * 1024 * 1024;

async function send(model, file) {
  if (!file) return;
  if (file.size > model.get("most_bytes")) {
    model.send({ refused: file.size });
    return;
  }
  const content = await file.arrayBuffer();
  let start = 0;
  do {
    const piece = content.slice(start, start + PIECE);
    model.send({ start, size: content.byteLength }, undefined, [piece]);
    start += piece.byteLength;
  } while (start < content.byteLength);
}

function render({ model, el }) {
  const zone = document.createElement("label");
  zone.className = "photo-drop";
  const text = document.createElement("span");
  text.innerHTML = "<b>Drop a photo here</b><br>paste it, or <u>choose a file</u>";
  const input = document.createElement("input");
  input.type = "file";
  input.accept = "image/*";
  zone.append(text, input);
  el.append(zone);

  // A page of its own takes photos anywhere: dropped beside the box, the browser would open them.
  const place = document.body.dataset.voila ? document.body : zone;
  const over = (event) => { event.preventDefault(); zone.classList.add("over"); };
  const leave = () => zone.classList.remove("over");
  const drop = (event) => {
    event.preventDefault();
    leave();
    send(model, event.dataTransfer.files[0]);
  };
  const paste = (event) => send(model, event.clipboardData.files[0]);
  const choose = () => { send(model, input.files[0]); input.value = ""; };
  const listeners = { dragover: over, dragleave: leave, drop, paste };
  for (const [name, listener] of Object.entries(listeners)) {
    place.addEventListener(name, listener);
  }
  input.addEventListener("change", choose);
  return () => {
    for (const [name, listener] of Object.entries(listeners)) {
      place.removeEventListener(name, listener);
    }
  };
}

export default { render };
"""

STYLE = """
.photo-drop { display: flex; align-items: center; justify-content: center; text-align: center;
  box-sizing: border-box; min-height: 92px; padding: 12px; cursor: pointer; border-radius: 10px;
  border: 2px dashed #6b7280; background: #f8fafc; color: #1f2937; line-height: 1.6; }
.photo-drop:hover, .photo-drop.over { border-color: #2563c9; background: #eef4ff; }
.photo-drop:focus-within { outline: 3px solid #2563c9; outline-offset: 2px; }
.photo-drop b { font-size: 17px; }
.photo-drop input { position: absolute; width: 1px; height: 1px; opacity: 0; }
"""


class PhotoDrop(anywidget.AnyWidget):
    """A place to drop a photo on."""

    _esm = SCRIPT
    _css = STYLE
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
