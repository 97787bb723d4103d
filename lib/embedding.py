"""From photos of one's own, with or without labels, straight to embeddings.

embeddings, names, skipped = embed_folder(tower, Path("my photos"))
index = PhotoIndex.build(embeddings, names, fingerprint(tower))
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import keras
import numpy as np
from tqdm import tqdm

from lib.model import embed
from lib.photos import PhotoError, TestSetError, list_photos, read_photo
from lib.storage import show_path


def embed_folder(
    tower: keras.Model, folder: Path, batch_size: int = 128
) -> tuple[np.ndarray, list[str], list[str]]:
    """Embed the photos of a folder and of all folders in it.

    No more than two batches of pixels are in memory at a time. A photo that can't be read does not
    stop the others.

    Args:
        tower: from :func:`lib.model.load_tower`.
        folder: files that do not look like photos, and those whose name begins with a dot, are
            passed over.
        batch_size: photos that go through the network together.

    Returns:
        embeddings, float32 (n, d) of unit norm; n names, paths within the folder; and a message for
        each photo that could not be read.

    Raises:
        TestSetError: there is no photo.
    """
    folder = Path(folder)
    paths = list(_photos_below(folder))
    if not paths:
        raise TestSetError(f"{show_path(folder)} holds no photos, nor do the folders in it")
    size = tower.input_shape[1]

    def read(path: Path) -> np.ndarray | PhotoError:
        try:
            return read_photo(path, size)
        except PhotoError as error:
            return error

    embeddings, names, skipped = [], [], []
    with (
        ThreadPoolExecutor(os.cpu_count()) as threads,
        tqdm(total=len(paths), desc="embedding", unit=" photos") as bar,
    ):
        for start in range(0, len(paths), batch_size):
            some = paths[start : start + batch_size]
            results = dict(zip(some, threads.map(read, some), strict=True))
            skipped += [str(r) for r in results.values() if isinstance(r, PhotoError)]
            photos = {p: r for p, r in results.items() if not isinstance(r, PhotoError)}
            if photos:
                embeddings.append(embed(tower, np.stack(list(photos.values())), batch_size))
                names += [path.relative_to(folder).as_posix() for path in photos]
            bar.update(len(some))
    if not embeddings:
        raise TestSetError(f"none of the photos in {show_path(folder)} can be read: {skipped[0]}")
    return np.concatenate(embeddings), names, skipped


def _photos_below(folder: Path) -> Iterator[Path]:
    """Photos of the folder itself in sorted order, then those of its subfolders, likewise."""
    yield from list_photos(folder)
    if folder.is_dir():
        for below in sorted(p for p in folder.iterdir() if p.is_dir() and p.name[0] != "."):
            yield from _photos_below(below)
