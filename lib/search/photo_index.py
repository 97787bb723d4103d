"""The photo index: photos by name, found by the embedding of a query photo.

    index = PhotoIndex.build(embeddings, names, fingerprint(tower))
    index.save(run / "gallery.index")
    index = PhotoIndex.load(run / "gallery.index", fingerprint(tower))
    names, similarities = index.search(query_embeddings, k=5)
    index.add(more_names, more_embeddings)
    index.remove(names[0])

An index consists of *parts*. The first part has a Faiss index of the settings' kind. Photos added
later are few and compared one by one, until :meth:`PhotoIndex.compact` makes one part of all.
Removing a photo only marks it. Changes of a saved index are on the disk when the method returns; an
unfinished one leaves no trace.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from lib.files import show_path
from lib.search.exact import checked, knn, nearest_of, similarities_of
from lib.search.index_files import (
    Part,
    UnusableIndexError,
    read_index,
    read_manifest,
    write_parts,
    write_vectors,
    writing,
)
from lib.search.kinds import (
    FLAT,
    IndexSettings,
    empty_index,
    filtered,
    merged,
    set_search,
    train_and_add,
)


class PhotoIndex:
    """Photos by name, found by embeddings of unit norm.

    Methods that change a saved index raise IndexBusyError if another process writes to it,
    UnusableIndexError if the files are damaged or another model's by now, and OSError if the disk
    is full. Then, as after a ValueError, nothing has been changed.

    Attributes:
        names: n unique names, in the order they were added in.
        model: fingerprint of the model that made the embeddings.
        settings: kind and search.
        dimension: d, of the embeddings.
        path: the folder that changes are written to; None before :meth:`save`.
    """

    def __init__(self, parts: list[Part], model: str, settings: IndexSettings, dimension: int):
        """Use :meth:`build` or :meth:`load`."""
        self.model, self.settings, self.dimension = model, settings, dimension
        self.path: Path | None = None
        self._manifest = ""  # checksum of the manifest that lists the parts
        self._set_parts(parts)

    def _set_parts(self, parts: list[Part]) -> None:
        self._parts = parts
        self.names = [name for part in parts for name in part.live_names()]

    @classmethod
    def build(
        cls,
        embeddings: np.ndarray,
        names: Sequence[str],
        model: str,
        settings: IndexSettings = FLAT,
    ) -> PhotoIndex:
        """Index embeddings.

        Args:
            embeddings: float32 (n, d) of unit norm, maybe memory-mapped. They are not copied, and
                must not change before :meth:`save`.
            names: n unique names.
            model: :func:`lib.network.tower.fingerprint` of the tower that made the embeddings.
            settings: the kind of index.

        Raises:
            ValueError: embeddings that are not (n, d), finite and of unit norm; n != names; a
                repeated name; settings that Faiss does not know, or too few photos to train on.
        """
        vectors, names = checked_vectors(embeddings, names)
        return cls(_one_part(names, vectors, settings), model, settings, vectors.shape[1])

    @classmethod
    def load(cls, path: Path, model: str) -> PhotoIndex:
        """Open an index that :meth:`save` wrote.

        Embeddings and Faiss index are memory-mapped once their checksums have been compared, and
        may be larger than the memory. The loaded index does not change while others write to the
        folder.

        Args:
            path: the folder.
            model: fingerprint of the tower that will embed the queries.

        Raises:
            FileNotFoundError: there is nothing at ``path``.
            UnusableIndexError: damaged, no index, of another format, or made by another model.
        """
        path = Path(path)
        manifest, settings, parts = read_index(path, model)
        index = cls(parts, model, settings, manifest["dimension"])
        index.path, index._manifest = path, manifest["xxh3"]
        return index

    def __len__(self) -> int:
        return len(self.names)

    def search(self, queries: np.ndarray, k: int) -> tuple[list[list[str]], np.ndarray]:
        """Find the k photos nearest to each query, the nearest first.

        If the Faiss index finds fewer than k photos for a query (its lists or its graph end
        before), that query is compared with every photo.

        Args:
            queries: float32 (q, d) of unit norm.
            k: capped at the number of photos.

        Returns:
            names, q lists of min(k, n); and their cosine similarities, float32 (q, min(k, n)),
            which are approximate for some ``settings``: see :class:`IndexSettings`.

        Raises:
            ValueError: k below 1, or queries that are not (q, d), finite and of unit norm.
        """
        queries = checked(queries, "queries", self.dimension)
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        similarities = [np.empty((len(queries), 0), np.float32)]
        numbers, names = [np.empty((len(queries), 0), np.int64)], []
        for part in self._parts:
            found, rows = _search_part(part, queries, k, self.settings.rerank)
            similarities.append(found)
            numbers.append(rows + len(names))
            names = names + part.names if names else part.names
        similarities, numbers = nearest_of(np.hstack(similarities), np.hstack(numbers), k)
        return [[names[i] for i in row] for row in numbers.tolist()], similarities

    def add(self, names: Sequence[str], embeddings: np.ndarray) -> None:
        """Add photos, which are compared one by one in a search.

        Added parts of up to twice as many photos are merged with them, so an index has few parts.

        Args:
            names: n names that the index does not have.
            embeddings: float32 (n, d) of unit norm, by the same model.

        Raises:
            ValueError: as :meth:`build` does; another dimension; or a name that the index has.
        """
        vectors, names = checked_vectors(embeddings, names)
        with self._changing() as folder:
            checked(vectors[:1], dimension=self.dimension)
            for part in self._parts:
                if rows := part.rows_of(set(names)):
                    raise ValueError(
                        f"the index has a photo {part.names[rows[0]]!r} already: remove it first"
                    )
            parts, blocks = list(self._parts), [vectors]
            while parts and parts[-1].index is None and parts[-1].count <= 2 * len(names):
                merged_part = parts.pop()
                blocks = [*merged_part.live_blocks(), *blocks]
                names = merged_part.live_names() + names
            self._commit(folder, parts + _one_part(names, np.concatenate(blocks)), self.settings)

    def remove(self, names: Sequence[str]) -> None:
        """Remove photos; their embeddings take up room until :meth:`compact`.

        Raises:
            ValueError: a name that the index does not have.
        """
        gone = set(names)
        with self._changing() as folder:
            parts, missing = [], set(gone)
            for part in self._parts:
                if rows := part.rows_of(gone):
                    missing -= {part.names[row] for row in rows}
                    live = part.live.copy()
                    live[rows] = False
                    files = {kind: of for kind, of in part.files.items() if kind != "live"}
                    part = replace(part, live=live, files=files)
                if part.count:
                    parts.append(part)
            if missing:
                raise ValueError(f"the index has no photo {min(missing)!r}")
            self._commit(folder, parts, self.settings)

    def tune(self, search: str, rerank: int) -> None:
        """Change how the index is searched, see :class:`IndexSettings`; other parameters stay.

        Raises:
            ValueError: parameters that this kind of index does not have.
        """
        with self._changing() as folder:
            # On an empty index first, so that refused parameters are not half set on the real one.
            set_search(empty_index(self.dimension, self.settings), search)
            search = merged(self.settings.search, search)
            settings = replace(self.settings, search=search, rerank=rerank)
            self._commit(folder, self._parts, settings)
            for part in self._parts:
                if part.index is not None:
                    set_search(part.index, search)

    def compact(self) -> None:
        """Train and fill the Faiss index anew with all photos that have not been removed.

        Call it when many photos have been added or removed. It takes as long as :meth:`build`, and
        twice the room on the disk while it runs.

        Raises:
            ValueError: too few photos are left to train such an index.
        """
        with self._changing() as folder:
            parts, files = [], {}
            if self.names:
                blocks = (block for part in self._parts for block in part.live_blocks())
                if folder is None:
                    vectors = np.concatenate(list(blocks))
                else:  # through the file: all vectors may be larger than the memory
                    vectors, files["vectors"] = write_vectors(folder, blocks, self.dimension)
                parts = _one_part(self.names, vectors, self.settings, files)
            self._commit(folder, parts, self.settings)

    def save(self, path: Path) -> None:
        """Write the index to a folder, made if absent, in place of an index that may be there.

        From then on changes go to that folder, and the embeddings are read from it.

        Raises:
            UnusableIndexError: there is a file at ``path``.
        """
        path = Path(path)
        if path.is_file():
            raise UnusableIndexError(
                f"{show_path(path)} is a file, an index is a folder: delete it"
            )
        path.mkdir(parents=True, exist_ok=True)
        with writing(path):
            self._commit(path, [replace(part, files={}) for part in self._parts], self.settings)

    @contextlib.contextmanager
    def _changing(self) -> Iterator[Path | None]:
        """Lock the folder, load what another process has changed, and yield the folder."""
        if self.path is None:
            yield None
            return
        with writing(self.path):
            if read_manifest(self.path, self.model)["xxh3"] != self._manifest:
                vars(self).update(vars(PhotoIndex.load(self.path, self.model)))
            yield self.path

    def _commit(self, folder: Path | None, parts: list[Part], settings: IndexSettings) -> None:
        """Replace the content of the index and of its folder."""
        if folder is not None:
            content = {
                "model": self.model,
                "dimension": self.dimension,
                "metric": "inner product",
                "settings": asdict(settings),
            }
            parts, manifest = write_parts(folder, parts, content)
            self.path, self._manifest = folder, manifest["xxh3"]
        self.settings = settings
        self._set_parts(parts)


def checked_vectors(embeddings: np.ndarray, names: Sequence[str]) -> tuple[np.ndarray, list[str]]:
    """Embeddings as float32 (n, d), see :func:`lib.search.exact.checked`, and n unique names.

    Raises:
        ValueError: embeddings that are not of unit norm; n != names; or a repeated name.
    """
    vectors, names = checked(embeddings), list(names)
    if len(vectors) != len(names):
        raise ValueError(f"{len(vectors)} embeddings, but {len(names)} names")
    if len(set(names)) != len(names):
        (twice, _), *_ = Counter(names).most_common(1)
        raise ValueError(f"names must be unique ({twice!r} comes twice)")
    return vectors, names


def _one_part(
    names: list[str],
    vectors: np.ndarray,
    settings: IndexSettings = FLAT,
    files: dict[str, dict] | None = None,
) -> list[Part]:
    """A part of all photos, or none without photos; "Flat" needs only the vectors."""
    if not names:
        return []
    index = None if settings.factory == "Flat" else train_and_add(vectors, settings)
    return [Part(names, vectors, np.ones(len(names), bool), index, files or {})]


def _search_part(
    part: Part, queries: np.ndarray, k: int, rerank: int
) -> tuple[np.ndarray, np.ndarray]:
    """Similarities, float32 (q, min(k, photos)), and rows, int64, of the best in a part."""
    k = min(k, part.count)
    if part.index is None:
        return knn(queries, part.vectors, k, part.selector)
    fetched = min(k * max(rerank, 1), part.count)
    # Made for each search, as it copies the index's parameters, which can change.
    only_live = filtered(part.index, part.selector) if part.selector else None
    if only_live is None:
        fetched += min(len(part.names) - part.count, fetched)
    similarities, rows = part.index.search(queries, fetched, params=only_live)
    # Faiss fills up missing results with the number -1.
    useless = (rows < 0) | ~part.live[rows]
    if rerank:
        similarities = similarities_of(queries, part.vectors, rows)
    similarities[useless], rows[useless] = -np.inf, -1
    similarities, rows = nearest_of(similarities, rows, k)
    if (short := rows.min(axis=1, initial=0) < 0).any():
        similarities[short], rows[short] = knn(queries[short], part.vectors, k, part.selector)
    return similarities, rows
