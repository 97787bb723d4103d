"""Labelled photos to measure on, of landmarks that the training has not met.

unseen = Unseen(held_back, limit=400)                       # of the training data, or
unseen = Unseen(held_back, gallery=Path("photos"))          # a folder with one for each landmark
photos, labels, skipped = unseen.photos(image_size=96)
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lib.data.photos import read_gallery

if TYPE_CHECKING:
    from lib.data.dataset import DatasetHandler


class Unseen:
    """A labelled gallery or, where there is none, anchor and positive of landmarks held back.

    Of four or more landmarks held back half are left, at least, to choose settings by.

    Args:
        held_back: of the pictures that are not trained on.
        gallery: a folder with a subfolder of photos for each landmark; None: there is none.
        limit: of the landmarks held back to measure on.

    Attributes:
        groups: int (landmarks,), which of those held back are measured on.
    """

    def __init__(self, held_back: DatasetHandler, gallery: Path | None = None, limit: int = 400):
        self._handler, self._gallery = held_back, gallery
        self._group = held_back.catalogue.pictures["group"].to_numpy()
        pairs = held_back.validation_triplets(len(self._group))[:, :2]
        pairs = pairs[: 0 if gallery else min(limit, max(2, len(pairs) // 2))]
        self._pictures, self.groups = pairs.T.ravel(), self._group[pairs[:, 0]]

    def photos(self, image_size: int) -> tuple[np.ndarray, np.ndarray, list[str]]:
        """Read the photos.

        Returns:
            photos, uint8 (n, s, s, 3) RGB; labels, str (n,); messages on photos left out.

        Raises:
            lib.data.photos.NoPhotosError: the gallery has none.
        """
        if self._gallery:
            return read_gallery(self._gallery, image_size)
        photos = self._handler.photos(self._pictures, image_size)
        return photos, self._group[self._pictures].astype(str), []
