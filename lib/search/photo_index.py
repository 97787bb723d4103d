"""The Faiss index: photos by name, found by the embedding of a query photo.

    index = PhotoIndex.build(embeddings, names, fingerprint(tower))
    index.save(run / "gallery.index")
    index = PhotoIndex.load(run / "gallery.index", fingerprint(tower))
    names, similarities = index.search(query_embeddings, k=5)
    index.add(more_names, more_embeddings)       # on the disk when this returns
    index.remove(names[0])

An index is a folder of files that never change, and of ``manifest.json``, which lists them with
their checksums. A change writes new files beside the old ones and then replaces the manifest in one
step: before it the change has not happened, after it the change is kept, whatever happens to the
process. Photos lie in *parts*. The first has the Faiss index of the settings' kind; those added
later are few, and compared one by one, until :meth:`PhotoIndex.compact` makes one part of all.
Removing a photo only marks it.

Faiss is imported here and in :mod:`lib.search.tuning`, which finds the settings of large indexes.
"""

from __future__ import annotations

import contextlib
import json
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import xxhash
from tqdm import tqdm

from lib.files import checksum, only_writer, read_json, replacing, show_path, write_json

if sys.platform == "darwin":
    # Faiss and TensorFlow each bring an OpenMP runtime; on macOS two of them crash each other.
    faiss.omp_set_num_threads(1)

MANIFEST = "manifest.json"

_FORMAT = 2  # format 1 was a single file
_BLOCK = 65_536  # rows that are handled together
_FILES = re.compile(r"(vectors|names|live|index)-(\d+)-\d+")
_METRIC = "inner product"


class UnusableIndexError(ValueError):
    """An index is damaged, of another format, or was made by another model."""


class IndexBusyError(RuntimeError):
    """Another process writes to the index."""


@dataclass(frozen=True)
class IndexSettings:
    """The kind of an index, and how it is searched.

    Attributes:
        factory: what to build, for Faiss's ``index_factory``, such as "IVF1024,SQ8" or "HNSW32".
            "Flat" compares every photo.
        search: parameters of the search for Faiss's ``ParameterSpace``, such as "nprobe=16" or
            "efSearch=64"; "" leaves them as they are, Faiss's own at first.
        rerank: fetch k * ``rerank`` photos from the Faiss index, and rank these exactly; 0 takes
            its ranking and its similarities, which are approximate for compressed kinds.

    Raises:
        ValueError: ``rerank`` below 0, or parameters of the search for "Flat", which has none.
    """

    factory: str = "Flat"
    search: str = ""
    rerank: int = 0

    def __post_init__(self):
        if self.rerank < 0:
            raise ValueError(f"rerank must be at least 0, got {self.rerank}")
        if self.factory == "Flat" and self.search:
            raise ValueError(f"an index that compares every photo has no {self.search!r}")


@dataclass(frozen=True, eq=False)
class _Part:
    """Some photos, which lie in files of their own.

    Attributes:
        names: n names.
        vectors: float32 (n, d), in memory or mapped.
        live: bool (n,), False where the photo has been removed.
        index: of all n vectors; None where they are compared one by one.
        files: what is on the disk: the manifest's entry of each kind of file.
    """

    names: list[str]
    vectors: np.ndarray
    live: np.ndarray
    index: faiss.Index | None
    files: dict[str, dict] = field(default_factory=dict)

    @cached_property
    def count(self) -> int:
        """Photos that have not been removed."""
        return int(np.count_nonzero(self.live))

    @cached_property
    def only_live(self) -> faiss.SearchParameters | None:
        """Makes Faiss pass over removed photos; None if this kind of index can't."""
        bits = np.packbits(self.live, bitorder="little")
        return _filtered(self.index, faiss.IDSelectorBitmap(bits))

    def rows_of(self, names: set[str]) -> list[int]:
        """Where those of the names are that have not been removed."""
        return [i for i, name in enumerate(self.names) if name in names and self.live[i]]

    def live_blocks(self) -> Iterator[np.ndarray]:
        """The vectors of photos that have not been removed, float32 (up to ``_BLOCK``, d) each."""
        for start in range(0, len(self.names), _BLOCK):
            block, live = self.vectors[start : start + _BLOCK], self.live[start : start + _BLOCK]
            yield block if live.all() else block[live]

    def live_names(self) -> list[str]:
        """Names of photos that have not been removed."""
        return [name for name, alive in zip(self.names, self.live.tolist(), strict=True) if alive]


class PhotoIndex:
    """Photos by name, to be found by embeddings of unit norm.

    Attributes:
        names: n unique names, in the order they were added in.
        model: fingerprint of the model that made the embeddings.
        settings: kind and search.
        dimension: of the embeddings.
        path: the folder that changes are written to; None before :meth:`save`.
    """

    def __init__(self, parts: list[_Part], model: str, settings: IndexSettings, dimension: int):
        """Use :meth:`build` or :meth:`load`."""
        self.model, self.settings, self.dimension = model, settings, dimension
        self.path: Path | None = None
        self._manifest = ""  # checksum of the manifest that the parts are from
        self._set_parts(parts)

    def _set_parts(self, parts: list[_Part]) -> None:
        self._parts = parts
        self.names = [name for part in parts for name in part.live_names()]

    @classmethod
    def build(
        cls,
        embeddings: np.ndarray,
        names: Sequence[str],
        model: str,
        settings: IndexSettings = IndexSettings(),
    ) -> PhotoIndex:
        """Index embeddings.

        Args:
            embeddings: float32 (n, d) of unit norm, for the inner product to be the cosine. It may
                be memory-mapped. It is not copied, and must not change before :meth:`save`.
            names: n unique names.
            model: :func:`lib.network.tower.fingerprint` of the tower that made the embeddings.
            settings: the kind of index.

        Raises:
            ValueError: embeddings that are not (n, d), finite and of unit norm; n != names; a name
                that comes twice; settings that Faiss does not know, or too few photos to train such
                an index.
        """
        vectors, names = checked_vectors(embeddings, names)
        index = cls([], model, settings, vectors.shape[1])
        if names:
            live = np.ones(len(names), bool)
            index._set_parts([_Part(names, vectors, live, _index_of(vectors, settings))])
        return index

    def __len__(self) -> int:
        return len(self.names)

    # ----------------------------------------------------------------------------------------------
    # Search
    # ----------------------------------------------------------------------------------------------

    def search(self, queries: np.ndarray, k: int) -> tuple[list[list[str]], np.ndarray]:
        """Find the k photos nearest to each query, the nearest first.

        Photos that have been removed are passed over. A query for which the Faiss index finds too
        few others, as its lists or its graph end before, is compared to every photo.

        Args:
            queries: float32 (q, d).
            k: how many; more than there are photos gives all of them.

        Returns:
            names, q lists of min(k, n); and their cosine similarities, float32 (q, min(k, n)),
            from -1 to 1; see ``rerank`` in :class:`IndexSettings` for how exact they are.

        Raises:
            ValueError: k below 1, or queries of another dimension than the index.
        """
        queries = np.ascontiguousarray(queries, dtype=np.float32)
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        if queries.ndim != 2 or queries.shape[1] != self.dimension:
            raise ValueError(
                f"queries must be (q, {self.dimension}) for this index, not {queries.shape}"
            )
        similarities = np.empty((len(queries), 0), np.float32)
        numbers = np.empty((len(queries), 0), np.int64)
        names: list[str] = []
        for part in self._parts:
            if part.index is None:
                found, rows = _compare(queries, part, k)
            else:
                found, rows = _ask_faiss(queries, part, k, self.settings.rerank)
            similarities = np.concatenate([similarities, found], axis=1)
            numbers = np.concatenate([numbers, rows + len(names)], axis=1)
            names = names + part.names if names else part.names
        similarities, numbers = nearest_of(similarities, numbers, k)
        return [[names[i] for i in row] for row in numbers.tolist()], similarities

    # ----------------------------------------------------------------------------------------------
    # Changes
    # ----------------------------------------------------------------------------------------------

    def add(self, names: Sequence[str], embeddings: np.ndarray) -> None:
        """Add photos; on the disk, if the index is saved, when this returns.

        They are compared one by one in a search. Parts of photos added before, of up to twice as
        many, become one part with them: there are never more than a few parts.

        Args:
            names: n names that the index does not have.
            embeddings: float32 (n, d) of unit norm, by the same model.

        Raises:
            ValueError: as :meth:`build` does; another dimension; or a name that the index has.
            IndexBusyError: another process writes to it.
            UnusableIndexError: what is on the disk by now is damaged or another model's.
            OSError: the disk is full; nothing has been added.
        """
        vectors, names = checked_vectors(embeddings, names)
        with self._changing() as folder:
            if vectors.shape[1] != self.dimension:
                raise ValueError(
                    f"embeddings must be (n, {self.dimension}) for this index, not {vectors.shape}"
                )
            for part in self._parts:
                if rows := part.rows_of(set(names)):
                    raise ValueError(
                        f"the index has a photo {part.names[rows[0]]!r} already: remove it first"
                    )
            parts, blocks = list(self._parts), [vectors]
            while parts and parts[-1].index is None and parts[-1].count <= 2 * len(names):
                swallowed = parts.pop()
                blocks = [*swallowed.live_blocks(), *blocks]
                names = swallowed.live_names() + names
            if names:
                parts.append(_Part(names, np.concatenate(blocks), np.ones(len(names), bool), None))
            self._commit(folder, parts, self.settings)

    def remove(self, names: Sequence[str]) -> None:
        """Remove photos; on the disk, if the index is saved, when this returns.

        Their embeddings take up room until :meth:`compact`.

        Args:
            names: photos of the index.

        Raises:
            ValueError: a name that the index does not have; nothing has been removed.
            IndexBusyError, UnusableIndexError, OSError: as :meth:`add` does.
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
        """Change how the index is searched; on the disk, if it is saved, when this returns.

        Args:
            search, rerank: see :class:`IndexSettings`.

        Raises:
            ValueError: parameters that this kind of index does not have.
            IndexBusyError, UnusableIndexError, OSError: as :meth:`add` does.
        """
        settings = replace(self.settings, search=search, rerank=rerank)
        with self._changing() as folder:
            for part in self._parts:
                if part.index is not None:
                    _set_search(part.index, search)
            self._commit(folder, self._parts, settings)

    def compact(self) -> None:
        """Make one part of all: train and fill the Faiss index anew, without removed photos.

        To be called when many photos have been added or removed. It takes as long as
        :meth:`build`, and until its end the room of both on the disk.

        Raises:
            ValueError: too few photos are left to train such an index, which stays as it is.
            IndexBusyError, UnusableIndexError, OSError: as :meth:`add` does.
        """
        with self._changing() as folder:
            blocks = (block for part in self._parts for block in part.live_blocks())
            files = {}
            if not self.names:
                self._commit(folder, [], self.settings)
                return
            if folder is None:
                vectors = np.concatenate(list(blocks))
            else:
                # Through the file: all vectors may be more than fit into memory.
                path = folder / _file_name("vectors", _next_number(folder), 0)
                files["vectors"] = _write_blocks(path, blocks)
                vectors = _mapped(path, self.dimension)
            index = _index_of(vectors, self.settings)
            part = _Part(self.names, vectors, np.ones(len(vectors), bool), index, files)
            self._commit(folder, [part], self.settings)

    @contextlib.contextmanager
    def _changing(self) -> Iterator[Path | None]:
        """Keep other writers out, and go on from what the last one left. Yields the folder."""
        if self.path is None:
            yield None
            return
        with _writing(self.path):
            manifest = _read_manifest(self.path, self.model)
            if manifest["xxh3"] != self._manifest:
                self._take_over(PhotoIndex.load(self.path, self.model))
            yield self.path

    def _take_over(self, other: PhotoIndex) -> None:
        self.settings, self.dimension = other.settings, other.dimension
        self.path, self._manifest = other.path, other._manifest
        self._set_parts(other._parts)

    def _commit(self, folder: Path | None, parts: list[_Part], settings: IndexSettings) -> None:
        """Make parts the content of the index, and of its folder."""
        if folder is not None:
            number = _next_number(folder)
            parts = [_write_part(folder, number, i, part) for i, part in enumerate(parts)]
            manifest = {
                "format": _FORMAT,
                "model": self.model,
                "dimension": self.dimension,
                "metric": _METRIC,
                "settings": asdict(settings),
                "number": number,
                "photos": sum(part.count for part in parts),
                "parts": [
                    {"rows": len(part.names), "photos": part.count, "files": part.files}
                    for part in parts
                ],
            }
            manifest["xxh3"] = _checksum_of_manifest(manifest)
            write_json(folder / MANIFEST, manifest)  # from here on the change is kept
            self.path, self._manifest = folder, manifest["xxh3"]
        self.settings = settings
        self._set_parts(parts)

    # ----------------------------------------------------------------------------------------------
    # Saving and loading
    # ----------------------------------------------------------------------------------------------

    def save(self, path: Path) -> None:
        """Write the index to a folder, in place of the index that may be there, atomically.

        From then on changes go to that folder, and the embeddings are read from it.

        Args:
            path: the folder; it is made if absent.

        Raises:
            UnusableIndexError: there is a file at ``path``.
            IndexBusyError: another process writes to that folder.
            OSError: the disk is full; the index that was there stays.
        """
        path = Path(path)
        if path.is_file():
            raise UnusableIndexError(
                f"{show_path(path)} is a file, an index is a folder: delete it"
            )
        path.mkdir(parents=True, exist_ok=True)
        with _writing(path):
            self._commit(path, [replace(part, files={}) for part in self._parts], self.settings)

    @classmethod
    def load(cls, path: Path, model: str, verify: bool = True) -> PhotoIndex:
        """Open an index that :meth:`save` wrote.

        Embeddings and Faiss index are mapped: they are read from the disk when a search needs them,
        and need not fit into memory. What is loaded stays as it is while others write to the
        folder.

        Args:
            path: the folder.
            model: fingerprint of the tower that will embed the queries.
            verify: compare the checksums of embeddings and Faiss index too, which reads them whole,
                before Faiss gets to parse them. Manifest, names, marks of removed photos and the
                size of every file are always checked.

        Raises:
            FileNotFoundError: there is nothing at ``path``.
            UnusableIndexError: damaged, no index at all, of another format, or made by another
                model.
        """
        path = Path(path)
        while True:
            manifest = _read_manifest(path, model)
            settings = IndexSettings(**manifest["settings"])
            try:
                parts = [
                    _read_part(path, entry, manifest["dimension"], settings, verify)
                    for entry in manifest["parts"]
                ]
            except FileNotFoundError as error:
                if _read_manifest(path, model)["xxh3"] != manifest["xxh3"]:
                    continue  # a writer replaced the manifest, and then deleted what it had listed
                raise UnusableIndexError(
                    f"{show_path(Path(error.filename))} is missing: build the index anew"
                ) from None
            index = cls(parts, model, settings, manifest["dimension"])
            index.path, index._manifest = path, manifest["xxh3"]
            return index


def checked_vectors(embeddings: np.ndarray, names: Sequence[str]) -> tuple[np.ndarray, list[str]]:
    """Embeddings and names, if they are fit for an index.

    Args:
        embeddings, names: see :meth:`PhotoIndex.build`.

    Returns:
        float32 (n, d), without a copy if it was that before; and the names as a list.

    Raises:
        ValueError: as :meth:`PhotoIndex.build` does.
    """
    # A float32 array is not copied here, mapped or not.
    vectors, names = np.ascontiguousarray(embeddings, dtype=np.float32), list(names)
    if np.ndim(embeddings) != 2:
        raise ValueError(f"embeddings must be (n, d), not {np.shape(embeddings)}")
    for start in range(0, len(vectors), _BLOCK):
        norms = np.linalg.norm(vectors[start : start + _BLOCK], axis=1)
        wrong = ~(np.abs(norms - 1.0) <= 1e-3)  # nan is wrong
        if wrong.any():
            raise ValueError(
                f"embeddings must have unit norm (row {start + int(np.argmax(wrong))} has not)"
            )
    if len(vectors) != len(names):
        raise ValueError(f"{len(vectors)} embeddings, but {len(names)} names")
    if len(set(names)) != len(names):
        seen: set[str] = set()
        twice = next(name for name in names if name in seen or seen.add(name))
        raise ValueError(f"names must be unique ({twice!r} comes twice)")
    return vectors, names


# --------------------------------------------------------------------------------------------------
# Faiss
# --------------------------------------------------------------------------------------------------


def _index_of(vectors: np.ndarray, settings: IndexSettings) -> faiss.Index | None:
    """A Faiss index of vectors, float32 (n, d); None for "Flat", where the vectors are enough."""
    return None if settings.factory == "Flat" else train_and_add(vectors, settings)


def train_and_add(
    vectors: np.ndarray, settings: IndexSettings, rows: np.ndarray | None = None
) -> faiss.Index:
    """Make a Faiss index by inner product, trained on a sample and filled block by block.

    Args:
        vectors: float32 (n, d), maybe mapped.
        settings: kind and search; ``rerank`` is not the index's own.
        rows: int64 (m,), which of the vectors to index; all if None.

    Raises:
        ValueError: settings that Faiss does not know, or too few vectors to train such an index.
    """
    dimension = vectors.shape[1]
    n = len(vectors) if rows is None else len(rows)

    def take(places: slice | np.ndarray) -> np.ndarray:
        return vectors[places] if rows is None else vectors[rows[places]]

    try:
        index = faiss.index_factory(dimension, settings.factory, faiss.METRIC_INNER_PRODUCT)
        _set_search(index, settings.search)
        lists = faiss.try_extract_index_ivf(index)
        # k-means needs some 40 to 256 vectors for each centroid; codebooks have up to 256 of them.
        sample = max(65_536, 64 * lists.nlist if lists else 0)
        index.train(take(np.sort(np.random.default_rng(0).permutation(n)[:sample])))
        starts = range(0, n, _BLOCK)
        for start in tqdm(starts, desc="indexing", unit=" blocks", disable=len(starts) < 10):
            index.add(take(slice(start, start + _BLOCK)))
    except RuntimeError as error:
        raise ValueError(
            f"Faiss can't make an index {settings.factory!r} of {n} x {dimension}: {_reason(error)}"
        ) from None
    return index


def _set_search(index: faiss.Index, search: str) -> None:
    if search:
        try:
            faiss.ParameterSpace().set_index_parameters(index, search)
        except RuntimeError as error:
            raise ValueError(f"Faiss can't search by {search!r}: {_reason(error)}") from None


def _reason(error: RuntimeError) -> str:
    """The end of Faiss's message, which begins with a place in its source."""
    return str(error).rpartition("Error: ")[2].strip()


def _filtered(index: faiss.Index, selector: faiss.IDSelector) -> faiss.SearchParameters | None:
    """Parameters that make an index search as it is set to, among the selected vectors only."""
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexPreTransform):
        inner = _filtered(index.index, selector)
        return inner and faiss.SearchParametersPreTransform(index_params=inner)
    # Parameters given with a search stand in for all those that the index is set to.
    if isinstance(index, faiss.IndexIVF):
        return faiss.SearchParametersIVF(sel=selector, nprobe=index.nprobe)
    if isinstance(index, faiss.IndexHNSW):
        return faiss.SearchParametersHNSW(sel=selector, efSearch=index.hnsw.efSearch)
    if isinstance(index, faiss.IndexFlat | faiss.IndexScalarQuantizer):
        return faiss.SearchParameters(sel=selector)
    return None


def _ask_faiss(
    queries: np.ndarray, part: _Part, k: int, rerank: int
) -> tuple[np.ndarray, np.ndarray]:
    """Similarities, float32 (q, min(k, photos)), and rows, int64, of the best in a part."""
    wanted = min(k * max(rerank, 1), part.count)
    removed = len(part.names) - part.count
    only_live = part.only_live if removed else None
    fetched = wanted if only_live else wanted + min(removed, wanted)
    similarities, rows = part.index.search(queries, fetched, params=only_live)
    # Faiss fills up missing results with number -1, which would be the last name.
    useless = (rows < 0) | ~part.live[rows]
    if rerank:
        similarities = similarities_of(queries, part.vectors, rows)
    similarities[useless], rows[useless] = -np.inf, -1
    similarities, rows = nearest_of(similarities, rows, min(k, part.count))
    if (short := rows.min(axis=1, initial=0) < 0).any():
        similarities[short], rows[short] = _compare(queries[short], part, k)
    return similarities, rows


def similarities_of(queries: np.ndarray, vectors: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Exact similarities of each query to some vectors, by all threads and without a copy of them.

    Args:
        queries: float32 (q, d), C-contiguous.
        vectors: float32 (n, d), C-contiguous, maybe mapped.
        rows: int64 (q, m), which vectors; -1 stands for none.

    Returns:
        float32 (q, m), inner products; for a row -1 the value has no meaning.
    """
    similarities = np.zeros(rows.shape, np.float32)
    rows = np.ascontiguousarray(rows, np.int64)
    faiss.fvec_inner_products_by_idx(
        faiss.swig_ptr(similarities),
        faiss.swig_ptr(queries),
        faiss.swig_ptr(vectors),
        faiss.swig_ptr(rows),
        vectors.shape[1],
        *rows.shape,
    )
    return similarities


def _compare(queries: np.ndarray, part: _Part, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The same by comparing each query with every vector."""
    similarities = np.empty((len(queries), 0), np.float32)
    rows = np.empty((len(queries), 0), np.int64)
    for start, block in zip(range(0, len(part.names), _BLOCK), part.live_blocks(), strict=True):
        if len(block):
            found, at = faiss.knn(
                queries, block, min(k, len(block)), metric=faiss.METRIC_INNER_PRODUCT
            )
            of_block = start + np.flatnonzero(part.live[start : start + _BLOCK])
            similarities = np.concatenate([similarities, found], axis=1)
            rows = np.concatenate([rows, of_block[at]], axis=1)
            similarities, rows = nearest_of(similarities, rows, k)
    return similarities, rows


def nearest_of(
    similarities: np.ndarray, numbers: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """The k largest similarities of each row, in descending order, and their numbers.

    Args:
        similarities: float (q, m).
        numbers: int64 (q, m).
        k: more than m takes all. Of equals the one that comes first.
    """
    order = np.argsort(-similarities, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(similarities, order, 1), np.take_along_axis(numbers, order, 1)


# --------------------------------------------------------------------------------------------------
# Files
# --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Keep other writers out, and leave no file that the manifest does not list."""
    busy = f"another process writes to {show_path(folder)}: wait for its end"
    with only_writer(folder, IndexBusyError(busy)):
        _delete_unlisted(folder)  # of a process that was killed
        try:
            yield
        finally:
            _delete_unlisted(folder)


def _delete_unlisted(folder: Path) -> None:
    try:
        parts = _read_manifest(folder)["parts"] if (folder / MANIFEST).exists() else []
    except UnusableIndexError:
        return  # the files may be all there is left; who saves an index here replaces them
    listed = {entry["name"] for part in parts for entry in part["files"].values()}
    for path in folder.iterdir():
        ours = _FILES.match(path.name) or path.name.startswith(".part-")
        if ours and path.name not in listed:
            # Readers that have mapped it keep it. Windows refuses: then a later writer deletes it.
            with contextlib.suppress(PermissionError):
                path.unlink()


def _next_number(folder: Path) -> int:
    """For the names of new files: above the number of each file there."""
    found = (_FILES.match(path.name) for path in folder.iterdir())
    numbers = [int(match[2]) for match in found if match]
    with contextlib.suppress(UnusableIndexError):
        numbers.append(_read_manifest(folder)["number"])
    return max(numbers, default=0) + 1


def _file_name(kind: str, number: int, part: int) -> str:
    suffix = {"vectors": "f32", "names": "json", "live": "bits", "index": "faiss"}[kind]
    return f"{kind}-{number:06d}-{part}.{suffix}"


def _write_part(folder: Path, number: int, i: int, part: _Part) -> _Part:
    """Write what is not on the disk yet; returns the part with all entries of the manifest."""
    files, vectors = dict(part.files), part.vectors

    def path_of(kind: str) -> Path:
        return folder / _file_name(kind, number, i)

    if "vectors" not in files:
        starts = range(0, len(vectors), _BLOCK)
        blocks = (vectors[start : start + _BLOCK] for start in starts)
        files["vectors"] = _write_blocks(path_of("vectors"), blocks)
        vectors = _mapped(path_of("vectors"), vectors.shape[1])
    if "names" not in files:
        # ASCII: names of files that are not valid Unicode come back too.
        files["names"] = _write_blocks(path_of("names"), [json.dumps(part.names).encode()])
    if "live" not in files and part.count < len(part.names):
        files["live"] = _write_blocks(path_of("live"), [np.packbits(part.live)])
    if "index" not in files and part.index is not None:
        with replacing(path_of("index")) as new, new.open("wb") as file:
            # Through Python: Faiss's own writer overlooks a disk that is full at the very end.
            faiss.write_index(part.index, faiss.PyCallbackIOWriter(file.write, 2**20))
        files["index"] = _entry(path_of("index"))
    return replace(part, vectors=vectors, files=files)


def _write_blocks(path: Path, blocks: Iterable[bytes | np.ndarray]) -> dict[str, Any]:
    """Write one file; returns its entry in the manifest."""
    with replacing(path) as new, new.open("wb") as file:
        for block in blocks:
            file.write(block)
    return _entry(path)


def _entry(path: Path) -> dict[str, Any]:
    return {"name": path.name, "bytes": path.stat().st_size, "xxh3": checksum(path)}


def _mapped(path: Path, dimension: int) -> np.ndarray:
    """The vectors of a file, float32 (n, d), read when they are needed."""
    return np.asarray(np.memmap(path, "<f4", "r")).reshape(-1, dimension)


def _checksum_of_manifest(manifest: dict) -> str:
    content = {key: value for key, value in manifest.items() if key != "xxh3"}
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())


def _read_manifest(folder: Path, model: str | None = None) -> dict[str, Any]:
    """The manifest of an index that this version can read, made by this model if one is given."""
    where = show_path(folder / MANIFEST)
    if folder.is_file():
        raise UnusableIndexError(
            f"{show_path(folder)} is a file, an index of the previous format or none at all: "
            "build it anew"
        )
    if not folder.exists():
        raise FileNotFoundError(f"no index at {show_path(folder)}")
    try:
        manifest = read_json(folder / MANIFEST)
        version, stated = manifest["format"], manifest["xxh3"]
        newer = version > _FORMAT
    except FileNotFoundError:
        raise UnusableIndexError(f"{where} is missing: this is no index, build it anew") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UnusableIndexError(f"{where} is damaged ({error}): build the index anew") from None
    if newer:
        raise UnusableIndexError(
            f"{where} has format {version}, of a newer version of this project: update it, or "
            "build the index anew"
        )
    if stated != _checksum_of_manifest(manifest):
        raise UnusableIndexError(f"{where} is damaged (its checksum differs): build it anew")
    if model not in (None, manifest["model"]):
        raise UnusableIndexError(
            f"{show_path(folder)} was made by another model ({manifest['model'][:12]}... and not "
            f"{model[:12]}...): their embeddings can't be compared; build it anew"
        )
    return manifest


def _read_part(
    folder: Path, entry: dict[str, Any], dimension: int, settings: IndexSettings, verify: bool
) -> _Part:
    """Open the files of a part once they are found whole.

    Raises:
        FileNotFoundError: a file is not there.
        UnusableIndexError: a file is damaged.
    """
    files, rows = entry["files"], entry["rows"]
    paths = {kind: folder / of["name"] for kind, of in files.items()}
    for kind, path in paths.items():
        if path.stat().st_size != files[kind]["bytes"]:
            raise UnusableIndexError(
                f"{show_path(path)} has {path.stat().st_size} bytes and should have "
                f"{files[kind]['bytes']}: build the index anew"
            )
        if (verify or kind in ("names", "live")) and checksum(path) != files[kind]["xxh3"]:
            raise UnusableIndexError(
                f"{show_path(path)} is damaged (its checksum differs): build the index anew"
            )
    if files["vectors"]["bytes"] != 4 * rows * dimension:
        raise UnusableIndexError(
            f"{show_path(paths['vectors'])} does not hold {rows} x {dimension} numbers: build the "
            "index anew"
        )
    names = json.loads(paths["names"].read_bytes())
    live = np.ones(rows, bool)
    if "live" in paths:
        live = np.unpackbits(np.fromfile(paths["live"], np.uint8), count=rows).astype(bool)
    index = None
    if "index" in paths:
        try:
            index = faiss.read_index(str(paths["index"]), faiss.IO_FLAG_MMAP_IFC)
        except RuntimeError as error:
            paths["index"].stat()  # which raises an error if a writer has deleted the file
            raise UnusableIndexError(
                f"Faiss can't read {show_path(paths['index'])} ({_reason(error)}): build the index "
                "anew"
            ) from None
        _set_search(index, settings.search)
    return _Part(names, _mapped(paths["vectors"], dimension), live, index, files)
