"""Who searches whom: labelled photos, the folds they are dealt into, and rounds of queries.

    photos = Photos(views, labels)
    known, test = photos.take(~tested), photos.take(tested)
    fold = Fold(known, validation[None], test, query_rounds(test.labels))

A query is never part of the gallery it searches, and no landmark that is measured on has been
learned from.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from lib.search.geometry import Geometry, verify_all
from lib.search.local_features import Features

# Side of the photo in pixels, whether it is mirrored, GeM's exponent (None: the tower's).
View = tuple[int, bool, float | None]
# Indices of the queries, and of the gallery they search.
Round = tuple[np.ndarray, np.ndarray]


class Pairs:
    """Geometric verification of pairs of photos, each of them once, however often it is asked for.

    Args:
        features: of each photo, from :func:`lib.search.local_features.local_features`.
    """

    def __init__(self, features: Sequence[Features]):
        self.features = features
        self._found: dict[tuple[int, int], Geometry] = {}
        self._seconds = 0.0

    @property
    def pair_ms(self) -> float:
        """Milliseconds that a pair took on the average, on all cores."""
        return 1000 * self._seconds / max(len(self._found), 1)

    def verify(self, query: int, others: Sequence[int]) -> list[Geometry]:
        """Verify a photo with others, by their places in ``features``."""
        new = [other for other in others if (query, other) not in self._found]
        start = time.perf_counter()
        found = verify_all(self.features[query], [self.features[other] for other in new])
        self._seconds += time.perf_counter() - start
        self._found.update(zip([(query, other) for other in new], found, strict=True))
        return [self._found[query, other] for other in others]


@dataclass(frozen=True, eq=False)
class Photos:
    """Descriptors of labelled photos, in several views.

    Attributes:
        views: float32 (n, d) of unit norm for each view.
        labels: (n,), the landmark of each photo.
        pairs: of these photos and maybe others; None if none is verified.
        places: int64 (n,), where these are in ``pairs``.
    """

    views: Mapping[View, np.ndarray]
    labels: np.ndarray
    pairs: Pairs | None = None
    places: np.ndarray | None = None

    def take(self, rows: np.ndarray) -> Photos:
        """Select the photos at ``rows``, int or bool."""
        views = {view: x[rows] for view, x in self.views.items()}
        places = None if self.places is None else self.places[rows]
        return Photos(views, self.labels[rows], self.pairs, places)


@dataclass(frozen=True, eq=False)
class Fold:
    """A split into photos to learn and choose settings from, and test photos.

    Attributes:
        known: photos of the landmarks that are not tested.
        validation: bool (v, n), v parts of ``known``. To choose settings, the photos of each part
            are searched among all known photos, with a whitening learned from those outside the
            part. For the test, the whitening is learned from all known photos.
        test: photos to measure on.
        rounds: the searches among the test photos.

    Raises:
        ValueError: a query shows a known landmark, or a validation part has some but not all photos
            of a landmark.
    """

    known: Photos
    validation: np.ndarray
    test: Photos
    rounds: Sequence[Round]

    def __post_init__(self):
        labels = self.known.labels
        pairs = [({*labels[part]}, {*labels[~part]}) for part in self.validation]
        queried = {label for queries, _ in self.rounds for label in self.test.labels[queries]}
        for some, others in ((queried, {*labels}), *pairs):
            if both := some & others:
                raise ValueError(
                    f"landmark {str(min(both))!r} would be both learned from, or chosen by, and "
                    "measured on"
                )


def query_rounds(labels: np.ndarray, queried: np.ndarray | None = None) -> list[Round]:
    """Plan rounds in which each photo is a query once, and no query is in the gallery.

    The queries of round r are the r-th photos of all landmarks that have more than one; all other
    photos are the gallery.

    Args:
        labels: (n,), the landmark of each photo.
        queried: bool (n,), the photos to use as queries; None: all. The others are in the gallery
            of every round.

    Raises:
        ValueError: no queried photo has another photo of its landmark.
    """
    labels = pd.Series(np.asarray(labels))
    place = labels.groupby(labels).cumcount().to_numpy()
    size = labels.groupby(labels).transform("size").to_numpy()
    can_be_query = (size > 1) & (True if queried is None else queried)
    if not can_be_query.any():
        raise ValueError("no landmark has two photos: there is nothing to find")
    searched = [(place == r) & can_be_query for r in range(size[can_be_query].max())]
    return [(np.flatnonzero(chosen), np.flatnonzero(~chosen)) for chosen in searched]
