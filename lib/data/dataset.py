"""Makes shuffled and augmented batches of pixels from TFRecord shards, for training.

    catalogue = open_catalogue(Path("Dataset"))
    part = split_landmarks(catalogue, {"train": 0.9, "validation": 0.1}, seed=0)
    handler = DatasetHandler(catalogue, DataSettings(image_size=128), part == "train")
    for photos, groups in handler.training_batches(epoch=0, steps=100):
        ...                        # uint8 (batch, 3, 128, 128, 3) RGB, int32 (batch, 3)

Pixels stay uint8 RGB from 0 to 255: the backbone's own preprocessing is a part of the network.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field

import keras
import numpy as np
import pandas as pd

from lib.data.catalogue import Catalogue
from lib.data.decoding import Augmentation, Variation, decode, draw_variations
from lib.data.records import read_picture
from lib.data.sampling import SamplingError, landmark_batches, triplet_batches, usable_triplets
from lib.data_parallel import own_rows

_THREADS = os.cpu_count() or 1
# Batches made ahead, of 9 MB each at 64 triplets of 128 pixels. It is bounded since a queue that
# grew with the cores took 3.7 GB on 64 cores.
_QUEUE = min(2 * _THREADS, 16)


@dataclass(frozen=True)
class DataSettings:
    """How pictures become batches.

    Attributes:
        image_size: side of the square photos in pixels.
        batch_size: triplets in a batch, or landmarks in a P x K batch.
        pictures_per_landmark: 0 for batches of stored triplets; K >= 2 for P x K batches.
        augmentation: of training photos; None for none.
        seed: of order and augmentation.
    """

    image_size: int = 128
    batch_size: int = 64
    pictures_per_landmark: int = 0
    augmentation: Augmentation | None = field(default_factory=Augmentation)
    seed: int = 0


class DatasetHandler:
    """Serves the pictures of one split. Pictures are given as rows of ``catalogue.pictures``.

    Args:
        catalogue: of the shards.
        settings: see :class:`DataSettings`.
        chosen: bool (pictures,), whether a picture belongs to the split; None for all.

    Attributes:
        triplets: int64 (n, 3), the usable stored triplets, see
            :func:`lib.data.sampling.usable_triplets`.
    """

    def __init__(
        self, catalogue: Catalogue, settings: DataSettings, chosen: np.ndarray | None = None
    ):
        self.catalogue, self.settings = catalogue, settings
        self.chosen = np.ones(len(catalogue.pictures), bool) if chosen is None else chosen
        self.triplets = usable_triplets(catalogue, self.chosen)
        self._group = catalogue.pictures["group"].to_numpy(np.int32)

    def training_batches(self, epoch: int, steps: int) -> Batches:
        """The batches of one epoch, shuffled and augmented.

        They depend on (seed, epoch) alone, so an interrupted training can resume its epoch.

        Args:
            epoch: number of the epoch.
            steps: number of batches; the triplets are reshuffled whenever all have been used.

        Raises:
            SamplingError: too few usable pictures.
        """
        settings = self.settings
        rng = np.random.default_rng([settings.seed, epoch])
        plan_of = (self.catalogue, self.chosen, steps, settings.batch_size)
        if settings.pictures_per_landmark:
            plan = landmark_batches(*plan_of, settings.pictures_per_landmark, rng)
        else:
            plan = triplet_batches(*plan_of, rng)
        return Batches(self, plan, epoch)

    def validation_triplets(self, limit: int) -> np.ndarray:
        """One triplet of each chosen landmark, for evaluation.

        Anchor and positive are the landmark's first stored pair of different pictures. The negative
        is the anchor of another triplet, since the stored negative may be a training photo.

        Returns:
            int64 (n <= limit, 3), pictures; each anchor's positive is its only one among all.

        Raises:
            SamplingError: fewer than two landmarks with two pictures.
        """
        stored = self.catalogue.triplets[["anchor", "positive"]].to_numpy()
        pairs = stored[~self.catalogue.degenerate & self.chosen[stored].all(axis=1)]
        group = self.catalogue.pictures["group"].to_numpy()[pairs[:, 0]]
        _, first = np.unique(group, return_index=True)
        if len(first) < 2:
            raise SamplingError(
                f"{len(first)} of the chosen landmarks have two pictures: choose a larger share"
            )
        anchor, positive = pairs[np.sort(first)[:limit]].T
        return np.stack([anchor, positive, np.roll(anchor, 1)], axis=1)

    def landmark_pictures(self, landmarks: int, most: int, seed: int) -> np.ndarray:
        """Pictures of random landmarks of the split, such as to fit a whitening.

        Args:
            landmarks: at most so many, of those with at least two pictures.
            most: the first so many pictures of a landmark.
            seed: of the draw.

        Returns:
            int64 (n,), pictures, sorted by group.
        """
        pictures = np.flatnonzero(self.chosen)
        group = pd.Series(self._group[pictures])
        place, size = group.groupby(group).cumcount(), group.groupby(group).transform("size")
        with_two = group[size > 1].unique()
        drawn = np.random.default_rng(seed).permutation(with_two)[:landmarks]
        taken = pictures[(group.isin(drawn) & (place < most)).to_numpy()]
        return taken[np.argsort(self._group[taken], kind="stable")]

    def photos(self, pictures: np.ndarray, image_size: int = 0) -> np.ndarray:
        """Decode pictures without augmentation.

        Args:
            pictures: int (...).
            image_size: side in pixels; 0 for that of the settings.

        Returns:
            uint8 (..., image_size, image_size, 3) RGB.
        """
        return self._decode(pictures, image_size or self.settings.image_size, None)

    def batch(
        self, pictures: np.ndarray, rng: np.random.Generator, rows: slice = slice(None)
    ) -> tuple:
        """Decode and augment the pictures of a batch.

        Args:
            pictures: int (...).
            rng: of the augmentation.
            rows: makes only these rows, with the same pixels as in the whole batch.

        Returns:
            photos, uint8 (..., s, s, 3) RGB; groups, int32 (...).
        """
        augmentation = self.settings.augmentation
        variations = augmentation and draw_variations(rng, pictures.size, augmentation)
        if variations:
            numbers = np.arange(pictures.size).reshape(pictures.shape)[rows]
            variations = [variations[number] for number in numbers.flat]
        photos = self._decode(pictures[rows], self.settings.image_size, variations)
        return photos, self._group[pictures[rows]]

    def _decode(self, pictures, size: int, variations: list[Variation] | None) -> np.ndarray:
        flat = np.ravel(pictures).tolist()
        # Aligned to 64 bytes, so that TensorFlow need not copy it.
        raw = np.empty(len(flat) * size * size * 3 + 64, np.uint8)
        photos = raw[-raw.ctypes.data % 64 :][: raw.size - 64].reshape(-1, size, size, 3)
        variations = variations or [None] * len(flat)
        for picture, variation, photo in zip(flat, variations, photos, strict=True):
            decode(read_picture(self.catalogue.places[picture]), size, variation, photo)
        return photos.reshape(*np.shape(pictures), size, size, 3)


class PlannedBatches(keras.utils.PyDataset):
    """The batches of one epoch, made on demand, for ``fit`` on every Keras backend.

    In data-parallel training each process makes its own rows only (:mod:`lib.data_parallel`).

    Args:
        handler: whose pictures they are.
        plan: int64 (steps, ...), the pictures of each batch.
        epoch: its number, for what is drawn at random.

    Attributes:
        teacher: float32 (pictures, d), descriptors of the catalogue's pictures to learn, which then
            are the third part of each batch; None: none.
    """

    teacher: np.ndarray | None = None

    def __init__(self, handler: DatasetHandler, plan: np.ndarray, epoch: int):
        # Threads: decoding and copying release Python's global lock; processes would copy pixels.
        super().__init__(workers=_THREADS, use_multiprocessing=False, max_queue_size=_QUEUE)
        self._handler, self.plan, self._epoch = handler, plan, epoch
        # Here, since Keras' distribution is not visible in the threads that make the batches.
        self._rows = own_rows(plan.shape[1])

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, step: int) -> tuple[np.ndarray, ...]:
        """Photos or maps, float or uint8 (..., h, w, c), groups, int32 (...), and descriptors."""
        # Each batch has its own generator, so the order in which threads make them is irrelevant.
        rng = np.random.default_rng([self._handler.settings.seed, self._epoch, int(step)])
        pictures = self.plan[step]
        batch = self._make(pictures, rng)
        return batch if self.teacher is None else (*batch, self.teacher[pictures[self._rows]])


class Batches(PlannedBatches):
    """Batches of photos, see :meth:`DatasetHandler.batch`."""

    def _make(self, pictures: np.ndarray, rng: np.random.Generator) -> tuple:
        return self._handler.batch(pictures, rng, self._rows)

    def as_tf_data(self):
        """The same batches as a ``tf.data.Dataset``, in order, made on all processor cores."""
        import tensorflow as tf  # here, as other backends need not have it

        size = self._handler.settings.image_size
        shape = self.plan.shape[1:]
        types, shapes = [tf.uint8, tf.int32], [(*shape, size, size, 3), shape]
        if self.teacher is not None:
            types, shapes = [*types, tf.float32], [*shapes, (*shape, self.teacher.shape[-1])]

        def make(step):
            parts = tf.numpy_function(self.__getitem__, [step], types)
            return tuple(map(tf.ensure_shape, parts, shapes))

        options = tf.data.Options()
        # The end of an epoch waits for autotune's thread, which took up to 20 seconds each time.
        options.autotune.enabled = False
        steps = tf.data.Dataset.range(len(self))
        return (
            steps.map(make, num_parallel_calls=min(_THREADS, _QUEUE))
            .prefetch(2)
            .with_options(options)
        )
