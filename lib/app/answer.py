"""Finds the photos of a folder that are most like a query photo, or show the same place.

    engine = load_engine(run / ENGINE)
    gallery = open_gallery(engine, Path("Dataset/demo_world/unseen"), run / JOBS)
    search = Search(engine, gallery)
    photo = search.read(Path("query.jpg"))
    answer = search.answer(photo, Question(k=8, kind="exact", rerank="none"))
    answer.names, answer.similarities, answer.votes, answer.verdicts

A gallery is a folder of photos (:mod:`lib.app.gallery`). If it has local features, the first photos
of a ranking are verified by geometry (:mod:`lib.search.same_place`). The way to a photo's folder is
its landmark, unless the folders turn out to be something else (:attr:`Search.landmarks`). Neither
TensorFlow nor Keras is needed.
"""

from __future__ import annotations

import contextlib
import filecmp
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

import numpy as np

from lib.app.gallery import GONE, Gallery, SearchError, landmark_of
from lib.data.photos import (
    Box,
    PhotoError,
    open_picture,
    picture_of,
    read_photo,
    shrunk,
)
from lib.network.engine import Engine
from lib.search.exact import nearest
from lib.search.geometry import verify_all
from lib.search.local_features import (
    LONGEST,
    ROW_BYTES,
    Features,
    local_features,
    unpacked,
)
from lib.search.photo_index import IndexSettings, PhotoIndex
from lib.search.same_place import (
    PERHAPS,
    SAME,
    TOP,
    evidence_of,
    probability_of,
    shipped_calibration,
)

if TYPE_CHECKING:
    from lib.network.whitening import Whitening

KINDS = ("exact", "inverted lists", "graph")
RERANKINGS = ("none", "query expansion")

_LEAST_TO_WHITEN = 10  # photos
_MOST_TO_LEARN = 20_000  # photos that a whitening is learned from
_MOST_TO_ASK, _NEAREST = 200, 10  # photos that tell whether folders are landmarks, and of each
SHRINKAGE = 0.9  # of the covariance: few photos say little of it, see benchmarks/README.md
NEIGHBOURS = 3  # for query expansion; many landmarks have no more photos


@dataclass(frozen=True)
class Question:
    """How to search; a ValueError if k is below 1, or kind or rerank is an unknown name."""

    k: int = 8  # number of photos to find
    # "exact" compares every photo; "inverted lists" (Faiss's IVF) and "graph" (HNSW) compare only
    # some of them, which is faster in large galleries.
    kind: str = "exact"
    # "none", or "query expansion": search with the mean of the query and its nearest neighbours,
    # see lib.search.rerank.expand_queries. The similarities are then to that mean.
    rerank: str = "none"
    # Whether a photo that is a copy of one more similar to the query (lib.data.copies) is folded
    # into it, so that k different photos are found.
    fold: bool = False
    # Whether the first photos of the ranking are verified by geometry, if the gallery has local
    # features: they are then in the order of the log-odds that they show the query's place, see
    # lib.search.same_place.
    verify: bool = True

    def __post_init__(self):
        if self.k < 1:
            raise ValueError(f"k must be at least 1, got {self.k}")
        if self.kind not in KINDS or self.rerank not in RERANKINGS:
            raise ValueError(f"unknown kind {self.kind!r} or re-ranking {self.rerank!r}")


class Answer(NamedTuple):
    """The result of a search."""

    names: list[str]  # of the k photos found, the best first
    similarities: np.ndarray  # float32 (k,), cosines from -1 to 1
    # Landmark -> its share of these photos, weighted by similarity or, if verified, of those that
    # show the same place or perhaps do, by probability. The largest first; shares sum to 1, or
    # there are none.
    votes: dict[str, float]
    # To embed the query, to search and to verify; at first, to wait until the whitening is learned.
    seconds: float
    copies: list[list[str]]  # names of the photos that were folded into each of these
    # If verified: the probability, from 0 to 1, that each of the k shows the query's place, and the
    # verdict, of lib.search.same_place.VERDICTS, or 0 and "" beyond the first TOP; else both empty.
    probabilities: list[float]
    verdicts: list[str]


class Search:
    """Searches a gallery with the engine that embedded it; each index is built at its first use.

    An engine with views was trained for other photos than these. So its descriptors are whitened,
    by a whitening that is learned from the gallery itself, which needs no labels.
    """

    def __init__(self, engine: Engine, gallery: Gallery):
        self.engine, self.gallery = engine, gallery
        # It takes seconds: meanwhile a page can be shown, or a query be read.
        background = ThreadPoolExecutor(1)
        self._learned = background.submit(_searched, engine, gallery)
        background.shutdown(wait=False)
        self._index, self._hash = cache(self._build_index), cache(self._perceptual_hash)

    @property
    def _vectors(self) -> np.ndarray:
        return self._learned.result()[0]

    @property
    def _whitening(self) -> Whitening | None:
        return self._learned.result()[1]

    @property
    def image_size(self) -> int:
        """The side or longest side in pixels of a query photo, see :meth:`read`."""
        verified = self.gallery.features is not None
        return max(self.engine.image_size, LONGEST) if verified else self.engine.image_size

    def read(self, file: Path | BinaryIO, crop: Box | None = None) -> np.ndarray:
        """Read a query photo, or a part of it, as :meth:`answer` needs it; raises PhotoError."""
        return read_photo(file, self.image_size, self.engine.squashes, crop)

    def answer(self, photo: np.ndarray, question: Question, without: str = "") -> Answer:
        """Find the photos most similar to a photo.

        Args:
            photo: uint8 (h, w, 3), from :meth:`read` or :func:`lib.app.upload.read_upload`.
            question: how to search.
            without: the query's name if it is in the gallery; it is left out of the results.
        """
        start = time.perf_counter()
        query = self.engine.embed([shrunk(photo, self.engine.image_size)])
        if self._whitening is not None:
            query = self._whitening.apply(query)
        index, gallery = self._index(question.kind), self.gallery
        verified = question.verify and gallery.features is not None
        features, own = local_features(photo) if verified else None, query[0]
        odds: dict[str, float] = {}  # name -> log-odds, of the photos that are verified
        if question.rerank == "query expansion" and gallery.names != [without]:
            from lib.search.rerank import expand_queries  # here: it loads SciPy

            # The query must not expand itself.
            others = self._vectors[[name != without for name in gallery.names]]
            query = expand_queries(query, others, k=NEIGHBOURS)
        wanted = max((1 + question.fold) * question.k, TOP * verified) + bool(without)
        while True:
            (ranked,), (similarities,) = index.search(query, wanted)
            if verified:
                first = [name for name in ranked if name != without][:TOP]
                odds |= self._log_odds(features, own, [name for name in first if name not in odds])
                order = np.argsort([-odds.get(name, -np.inf) for name in ranked], kind="stable")
                ranked, similarities = [ranked[i] for i in order], similarities[order]
            groups = self._grouped(ranked, question, without)
            if not question.fold or len(groups) == question.k or wanted >= len(gallery.names):
                break
            wanted *= 2
        names = [[ranked[place] for place in group] for group in groups]
        firsts = [group[0] for group in groups]
        similarities = similarities[firsts]
        log_odds = np.array([odds.get(name, -np.inf) for name, *_ in names if verified])
        verdicts = [shipped_calibration().verdict(v) if v > -np.inf else "" for v in log_odds]
        votes: Counter[str] = Counter()
        for place, (name, *_) in enumerate(names):
            vote = float(similarities[place])
            if verified:
                vote = float(probability_of(log_odds[place])) * (verdicts[place] in (SAME, PERHAPS))
            if self.landmarks and (landmark := landmark_of(name)) and vote > 0:
                votes[landmark] += vote
        return Answer(
            names=[name for name, *_ in names],
            similarities=similarities,
            votes={landmark: vote / votes.total() for landmark, vote in votes.most_common()},
            seconds=time.perf_counter() - start,
            copies=[copies for _, *copies in names],
            probabilities=probability_of(log_odds).tolist(),
            verdicts=verdicts,
        )

    def _log_odds(
        self, features: Features, query: np.ndarray, names: list[str]
    ) -> dict[str, float]:
        """Verify photos of the gallery: name -> log-odds that it shows the query's place."""
        plain = np.zeros(ROW_BYTES, np.uint8)
        found = verify_all(features, (unpacked(self.gallery.features.get(n, plain)) for n in names))
        # What a cosine means is known of these descriptors, whitened; else geometry is left.
        cosines = np.zeros(len(names))
        known = self.engine.origin == shipped_calibration().network
        if known and self._whitening is not None:
            cosines = self._vectors[[self._rows[name] for name in names]] @ query
        log_odds = shipped_calibration().log_odds(evidence_of(cosines, found))
        return dict(zip(names, log_odds.tolist(), strict=True))

    def _grouped(self, names: list[str], question: Question, without: str) -> list[list[int]]:
        """Places in a ranking: of the first k photos, each before the places of its copies."""
        places = [place for place, name in enumerate(names) if name != without]
        if not question.fold:
            return [[place] for place in places[: question.k]]
        from lib.data.copies import PICTURE  # here: it loads SciPy

        vectors = self.gallery.embeddings[[self._rows[name] for name in names]]
        near, groups = vectors @ vectors.T >= PICTURE, []
        for place in places:
            firsts = (group for group in groups if near[group[0], place])
            own = [group for group in firsts if self._are_copies(names[group[0]], names[place])]
            if own:
                own[0].append(place)
            elif len(groups) < question.k:
                groups.append([place])
            else:
                break
        return groups

    def _are_copies(self, name: str, other: str) -> bool:
        """Whether two near photos are the same picture or the same bytes, see lib.data.copies."""
        from lib.data.copies import are_plain, few_bits_differ  # here: it loads SciPy

        hashes = np.array([self._hash(name), self._hash(other)], np.uint64)
        if not are_plain(hashes).any():
            return bool(few_bits_differ(hashes[:1], hashes[1])[0])
        with contextlib.suppress(OSError, SearchError):
            return filecmp.cmp(*map(self.gallery.path, (name, other)), shallow=False)
        return False

    def _perceptual_hash(self, name: str) -> int:
        """The pHash of a photo of the gallery; 0 if it can no longer be read."""
        from lib.data.copies import HASHED  # here: it loads SciPy
        from lib.data.duplicates import perceptual_hash

        try:
            with open_picture(self.gallery.path(name)) as image:
                return perceptual_hash(picture_of(image, HASHED))
        except Exception:  # decoders raise anything
            return 0

    @cached_property
    def _rows(self) -> dict[str, int]:
        return {name: row for row, name in enumerate(self.gallery.names)}

    @cached_property
    def landmarks(self) -> list[str]:
        """The landmarks of the gallery, sorted; none if its folders are not landmarks.

        Folders of one's own photos may be years or trips. For an engine with views, folders are
        landmarks if the photos nearest to a photo, at most _NEAREST and as many as its folder has,
        lie in its folder: half of them above those that would lie there by chance. By the plain
        embeddings, so that a page need not wait for the whitening.
        """
        landmarks = self.gallery.landmarks()
        if not self.engine.views:
            return landmarks
        names, folder, photos = np.unique(
            [landmark_of(name) for name in self.gallery.names],
            return_inverse=True,
            return_counts=True,
        )
        others = photos[folder] - 1
        rows = np.flatnonzero((names[folder] != "") & (others > 0))
        if len(landmarks) < 2 or not len(rows):
            return []
        rows = rows[:: -(-len(rows) // _MOST_TO_ASK)]
        embeddings = self.gallery.embeddings
        found, _ = nearest(embeddings[rows], embeddings, _NEAREST + 1)
        shares = []
        for row, near in zip(rows, found, strict=True):
            near = near[near != row][: min(others[row], _NEAREST)]
            shares.append(np.mean(folder[near] == folder[row]))
        chance = others[rows].mean() / (len(folder) - 1)
        return landmarks if 2 * (np.mean(shares) - chance) >= 1 - chance else []

    def photo(self, name: str, crop: Box | None = None) -> np.ndarray:
        """Read a photo of the gallery, or a part of it, as :meth:`answer` needs it.

        Raises:
            SearchError: it can no longer be read.
        """
        try:
            return self.read(self.gallery.path(name), crop)
        except PhotoError:
            raise SearchError(GONE) from None

    def why(self, photo: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Explain what makes two photos, uint8 (h, w, 3), similar to the network.

        Returns a heat map of each, float32 (g, g), see
        :func:`lib.evaluation.explain.occlusion_heat`.
        """
        from lib.evaluation.explain import occlusion_heat  # here: it loads pandas and Matplotlib

        # Hundreds of covered photos are embedded: the smallest view must do.
        embed = replace(self.engine, views=self.engine.views[:1]).embed
        of_photo, of_other = embed([photo, other])
        grid = min(8, *photo.shape[:2], *other.shape[:2])
        return tuple(
            occlusion_heat(embed, seen, target, grid)
            for seen, target in ((photo, of_other), (other, of_photo))
        )

    def _build_index(self, kind: str) -> PhotoIndex:
        names = self.gallery.names
        # Faiss warns below 39 training vectors for each of several lists.
        lists = max(1, min(round(len(names) ** 0.5), len(names) // 39))
        settings = {
            "exact": IndexSettings(),
            "inverted lists": IndexSettings(f"IVF{lists},Flat", f"nprobe={max(1, lists // 4)}"),
            "graph": IndexSettings("HNSW32", "efSearch=64"),
        }
        return PhotoIndex.build(self._vectors, names, self.engine.fingerprint, settings[kind])


def _searched(engine: Engine, gallery: Gallery) -> tuple[np.ndarray, Whitening | None]:
    """The vectors to search among, float32 (n, d), and the whitening of a query, if any."""
    embeddings = gallery.embeddings
    if not engine.views or len(embeddings) < _LEAST_TO_WHITEN:
        return embeddings, None
    from lib.network.whitening import learn_pca_whitening  # here: it loads scikit-learn

    step = -(-len(embeddings) // _MOST_TO_LEARN)
    try:
        whitening = learn_pca_whitening(embeddings[::step], shrinkage=SHRINKAGE)
    except ValueError:  # copies of one photo
        return embeddings, None
    blocks = (embeddings[i : i + 4096] for i in range(0, len(embeddings), 4096))
    vectors = np.concatenate([whitening.apply(block) for block in blocks])
    # The mean itself, as one of the photos, has no direction.
    return (vectors, whitening) if vectors.any(axis=1).all() else (embeddings, None)
