"""Batches of pixels from TFRecord shards, shuffled and augmented, for training.

    catalogue = open_catalogue(Path("Dataset"))
    part = split_landmarks(catalogue, {"train": 0.9, "validation": 0.1}, seed=0)
    handler = DatasetHandler(catalogue, DataSettings(image_size=128), part == "train")
    for photos, groups in handler.training_batches(epoch=0, steps=100):
        ...                        # uint8 (batch, 3, 128, 128, 3) RGB, int32 (batch, 3)

Pixels stay uint8 RGB from 0 to 255: the backbone's own preprocessing is a part of the network.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field

import keras
import numpy as np
import pandas as pd

from lib.data.catalogue import Catalogue
from lib.data.decoding import Augmentation, Variation, decode_batch, draw_variations
from lib.data.sampling import SamplingError, landmark_batches, triplet_batches, usable_triplets
from lib.data_parallel import own_rows

_THREADS = os.cpu_count() or 1
# Batches that are made ahead, each of 9 MB at 64 triplets of 128 pixels: bounded, as a queue that
# grows with the cores took 3.7 GB on 64 of them.
_QUEUE = min(2 * _THREADS, 16)


@dataclass(frozen=True)
class DataSettings:
    """How pictures become batches.

    Attributes:
        image_size: side in pixels that the photos are resized to.
        batch_size: triplets in a batch, three photos each; or landmarks.
        pictures_per_landmark: 0 for batches of stored triplets; k >= 2 for P x K batches, of
            ``batch_size`` landmarks with k pictures of each.
        augmentation: how training photos are varied at random; None leaves them as they are.
        seed: of order and augmentation.
    """

    image_size: int = 128
    batch_size: int = 64
    pictures_per_landmark: int = 0
    augmentation: Augmentation | None = field(default_factory=Augmentation)
    seed: int = 0


class DatasetHandler:
    """Serves the pictures of some landmarks.

    Args:
        catalogue: of the shards.
        settings: see :class:`DataSettings`.
        chosen: bool, for each picture whether it may be used, from
            :func:`lib.data.catalogue.split_landmarks`; None: all.

    Attributes:
        triplets: int64 (n, 3), the usable stored triplets, as pictures of the catalogue.
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

        Order and augmentation follow from (seed, epoch) alone, so an interrupted training can go on
        with the epoch it was in.

        Args:
            epoch: number of the epoch.
            steps: how many batches; past the last triplet they go on from the first in a new order.

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
        """A triplet of each chosen landmark, for measuring.

        Anchor and positive are the first stored ones that differ. The negative is the anchor of
        another chosen landmark: the stored one may well be a training photo.

        Args:
            limit: at most this many.

        Returns:
            int64 (n, 3), pictures; each anchor has one positive among those of all.

        Raises:
            SamplingError: there are not two landmarks with two pictures.
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
        """Several pictures of each of some landmarks, for learning or choosing without training.

        Args:
            landmarks: how many of the chosen ones that have at least two pictures, drawn at random;
                all if there are fewer.
            most: pictures of a landmark at most, the first ones.
            seed: of the draw.

        Returns:
            int64 (n,), pictures, in ascending order of their group; that tells what they show.
        """
        pictures = np.flatnonzero(self.chosen)
        group = pd.Series(self._group[pictures])
        place, size = group.groupby(group).cumcount(), group.groupby(group).transform("size")
        with_two = group[size > 1].unique()
        drawn = np.random.default_rng(seed).permutation(with_two)[:landmarks]
        taken = pictures[(group.isin(drawn) & (place < most)).to_numpy()]
        return taken[np.argsort(self._group[taken], kind="stable")]

    def photos(self, pictures: np.ndarray, image_size: int = 0) -> np.ndarray:
        """Pictures as they are stored.

        Args:
            pictures: int (...), rows of the catalogue's pictures.
            image_size: side in pixels; 0 for that of the settings.

        Returns:
            uint8 (..., image_size, image_size, 3) RGB.
        """
        return self._decode(pictures, image_size or self.settings.image_size, None)

    def batch(
        self, pictures: np.ndarray, rng: np.random.Generator, rows: slice = slice(None)
    ) -> tuple:
        """Pictures for training: augmented, and with their groups.

        Args:
            pictures: int (...), rows of the catalogue's pictures.
            rng: of the augmentation.
            rows: make only these of the batch, as they are in the whole of it.

        Returns:
            photos, uint8 (..., s, s, 3); groups, int32 (...): photos of different groups show
            different landmarks.
        """
        augmentation = self.settings.augmentation
        variations = augmentation and draw_variations(rng, pictures.size, augmentation)
        if variations:
            photos_a_row = pictures[0].size
            variations = [
                variations[row * photos_a_row + i]
                for row in range(len(pictures))[rows]
                for i in range(photos_a_row)
            ]
        photos = self._decode(pictures[rows], self.settings.image_size, variations)
        return photos, self._group[pictures[rows]]

    def _decode(self, pictures, size: int, variations: list[Variation] | None) -> np.ndarray:
        places = [self.catalogue.places[picture] for picture in np.ravel(pictures).tolist()]
        photos = _aligned((len(places), size, size, 3))
        decode_batch(places, size, variations, photos)
        return photos.reshape(*np.shape(pictures), size, size, 3)


def _aligned(shape: tuple[int, ...]) -> np.ndarray:
    """An empty uint8 array that begins at a multiple of 64: TensorFlow takes it without a copy."""
    size = math.prod(shape)
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].reshape(shape)


class Batches(keras.utils.PyDataset):
    """The batches of one epoch, for ``fit`` on every Keras backend; each is made when asked for.

    Of several processes that train together, each makes its own rows (:mod:`lib.data_parallel`).

    Args:
        handler: makes the batches.
        plan: int64 (steps, ...), the pictures of each batch.
        epoch: number of the epoch, for the augmentation.
    """

    def __init__(self, handler: DatasetHandler, plan: np.ndarray, epoch: int):
        # Threads, not processes: decoding releases Python's lock, and no pixels need to be copied.
        super().__init__(workers=_THREADS, use_multiprocessing=False, max_queue_size=_QUEUE)
        self._handler, self.plan, self._epoch = handler, plan, epoch
        # Asked here: the threads that make the batches can't see what Keras is set to.
        self._rows = own_rows(plan.shape[1])

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Photos and groups of one batch, see :meth:`DatasetHandler.batch`."""
        # Each batch has randomness of its own: it does not matter which thread makes it, and when.
        rng = np.random.default_rng([self._handler.settings.seed, self._epoch, int(step)])
        return self._handler.batch(self.plan[step], rng, self._rows)

    def as_tf_data(self):
        """The same batches as a ``tf.data.Dataset``, made by all processor cores, in order."""
        import tensorflow as tf  # here: who trains on another backend does without it

        size = self._handler.settings.image_size
        shape = self.plan.shape[1:]

        def make(step):
            photos, groups = tf.numpy_function(self.__getitem__, [step], (tf.uint8, tf.int32))
            return tf.ensure_shape(photos, (*shape, size, size, 3)), tf.ensure_shape(groups, shape)

        options = tf.data.Options()
        # The number of threads is known; TensorFlow's tuner of it works in a thread that the end
        # of an epoch waits for, which took up to 20 seconds each time.
        options.autotune.enabled = False
        steps = tf.data.Dataset.range(len(self))
        return (
            steps.map(make, num_parallel_calls=min(_THREADS, _QUEUE))
            .prefetch(2)
            .with_options(options)
        )
