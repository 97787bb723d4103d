"""Logs a training: a progress bar, ``history.csv``, and files for TensorBoard.

    log = TrainingLog(run, validation)
    with log.progress("head", steps=800, done=100):
        model.fit(..., callbacks=[log])               # moves the bar
    log.write(history, embeddings, is_best=True)      # after each epoch

``tensorboard --logdir runs`` shows the curves of all runs, the hardest validation triplets of each
epoch, and in its projector the embeddings of the validation photos after the best epoch. Each epoch
has its own event file, which is replaced when the epoch is repeated after an interruption.
"""

from __future__ import annotations

import io
import math
import time
from pathlib import Path

import keras
import numpy as np
import pandas as pd
from PIL import Image
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tqdm import tqdm

from lib.data.decoding import resize
from lib.data.records import write_records
from lib.files import replacing

HISTORY, TENSORBOARD = "history.csv", "tensorboard"

HARDEST = 8  # triplets shown for each epoch
PROJECTED = 512  # triplets in the projector, two photos each
THUMBNAIL = 64  # pixels; TensorBoard takes at most 8192 for all photos side by side

_PROJECTOR = """embeddings {{
  tensor_name: "validation"
  tensor_path: "projector/tensors.tsv"
  metadata_path: "projector/metadata.tsv"
  sprite {{
    image_path: "projector/sprite.png"
    single_image_dim: {side}
    single_image_dim: {side}
  }}
}}
"""


class TrainingLog(keras.callbacks.Callback):
    """Shows the progress of a training and writes its log in the folder ``run``.

    Args:
        validation: uint8 (n, 3, s, s, 3), triplets of n landmarks.
    """

    def __init__(self, run: Path, validation: np.ndarray):
        super().__init__()
        self.run, self.validation = run, validation

    def progress(self, name: str, steps: int, done: int = 0) -> tqdm:
        """Return a new progress bar of batches, a context manager."""
        self._bar = tqdm(total=steps, initial=done, desc=name, unit=" steps", mininterval=1)
        return self._bar

    def on_train_batch_end(self, batch, logs=None):
        self._bar.update(1)

    def write(self, history: list[dict], embeddings: np.ndarray, *, is_best: bool) -> None:
        """Show and write the last epoch of the history; raise OSError if a file can't be written.

        Args:
            history: a row for each epoch, with at least epoch, loss and val_map.
            embeddings: float32 (n, 3, d) of the validation triplets.
            is_best: write the embeddings for the projector.
        """
        row = history[-1]
        self._bar.set_postfix(loss=f"{row['loss']:.3f}", val_map=f"{row['val_map']:.3f}")
        with replacing(self.run / HISTORY) as part:
            pd.DataFrame(history).to_csv(part, index=False)
        self._write_events(row, embeddings)
        if is_best:
            self._write_projector(embeddings)

    def _write_events(self, row: dict, embeddings: np.ndarray) -> None:
        values = []
        for name, value in row.items():
            if name not in ("epoch", "stage") and np.isfinite(value):
                tag = f"training/{name}".replace("training/val_", "validation/")
                values.append(Summary.Value(tag=tag, simple_value=value))
        hardest = self.validation[hardest_triplets(embeddings)[:HARDEST]]
        sheet = _grid(hardest.reshape(-1, *hardest.shape[2:]), len(hardest), 3)
        values.append(Summary.Value(tag="validation/hardest_triplets", image=_png(sheet)))
        now = time.time()
        events = [
            Event(file_version="brain.Event:2", wall_time=now),
            Event(summary=Summary(value=values), step=row["epoch"], wall_time=now),
        ]
        path = self.run / TENSORBOARD / f"events.out.tfevents.{row['epoch']:06d}"
        write_records(path, map(Event.SerializeToString, events))

    def _write_projector(self, embeddings: np.ndarray) -> None:
        folder = self.run / TENSORBOARD / "projector"
        pairs = self.validation[:PROJECTED, :2]
        photos = pairs.reshape(-1, *pairs.shape[2:])
        side = min(THUMBNAIL, photos.shape[1])
        with replacing(folder / "tensors.tsv") as part:
            points = embeddings[:PROJECTED, :2].reshape(len(photos), -1)
            np.savetxt(part, points, fmt="%.6g", delimiter="\t")
        with replacing(folder / "metadata.tsv") as part:
            rows = (f"{i}\tanchor\n{i}\tpositive\n" for i in range(len(pairs)))
            part.write_text("landmark\trole\n" + "".join(rows), encoding="utf-8")
        with replacing(folder / "sprite.png") as part:
            k = math.ceil(math.sqrt(len(photos)))  # TensorBoard expects a square
            sprite = _grid(np.stack([resize(photo, side) for photo in photos]), k, k)
            Image.fromarray(sprite).save(part, format="PNG")
        with replacing(folder.parent / "projector_config.pbtxt") as part:
            part.write_text(_PROJECTOR.format(side=side), encoding="utf-8")


def hardest_triplets(embeddings: np.ndarray) -> np.ndarray:
    """Rank triplets, float (n, 3, d) of unit norm, the hardest first -> int64 (n,), their rows."""
    anchor, positive, negative = embeddings.swapaxes(0, 1)
    # For unit vectors, a larger inner product is a smaller distance.
    return np.argsort((anchor * (positive - negative)).sum(axis=1), kind="stable")


def _grid(photos: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Tile photos row by row, on black: uint8 (n, s, s, 3) -> (rows s, columns s, 3)."""
    side = photos.shape[1]
    grid = np.zeros((rows * columns, side, side, 3), np.uint8)
    grid[: len(photos)] = photos
    grid = grid.reshape(rows, columns, side, side, 3)
    return grid.swapaxes(1, 2).reshape(rows * side, columns * side, 3)


def _png(image: np.ndarray) -> Summary.Image:
    """Encode an image, uint8 (h, w, 3), for TensorBoard."""
    encoded = io.BytesIO()
    Image.fromarray(image).save(encoded, format="PNG")
    height, width, colours = image.shape
    return Summary.Image(
        height=height, width=width, colorspace=colours, encoded_image_string=encoded.getvalue()
    )
