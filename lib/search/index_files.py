"""The files of an index on the disk: written atomically, and checked before they are used.

    with writing(folder):
        parts, manifest = write_parts(folder, parts, {"model": model, "dimension": 128})
    manifest, settings, parts = read_index(folder, model)

A folder holds files that never change, and ``manifest.json``, which lists them with their sizes and
checksums. A change writes new files beside the old ones, and then replaces the manifest. Checksums
find damage, not forgery: don't open an index from somebody you don't trust.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import compress
from pathlib import Path
from typing import Any, BinaryIO

import faiss
import numpy as np

from lib.files import (
    checksum,
    checksum_of_manifest,
    only_writer,
    read_json,
    remove_half_written,
    replacing,
    show_path,
    write_json,
)
from lib.search.kinds import IndexSettings, reason, set_search

MANIFEST = "manifest.json"

_FORMAT = 2  # format 1 was a single file
_BLOCK = 65_536  # rows that are read together
_FILES = re.compile(r"(vectors|names|live|index)-(\d+)-\d+\.(f32|json|bits|faiss)")
_DAMAGE = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
_DAMAGE += (MemoryError, RuntimeError)  # RuntimeError: Faiss, and JSON that is nested too deep


class UnusableIndexError(ValueError):
    """An index is damaged, of another format, or was made by another model."""


class IndexBusyError(RuntimeError):
    """Another process writes to the index."""


@dataclass(frozen=True, eq=False)
class Part:
    """Photos that share their files.

    Attributes:
        names: of n photos.
        vectors: float32 (n, d), in memory or memory-mapped.
        live: bool (n,), False where the photo has been removed.
        index: of all n vectors; None if every vector is compared.
        files: the manifest's entries of the files on the disk, by kind.
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
    def selector(self) -> faiss.IDSelector | None:
        """Makes Faiss skip removed photos; None if there are none."""
        if self.count == len(self.names):
            return None
        return faiss.IDSelectorBitmap(np.packbits(self.live, bitorder="little"))

    def rows_of(self, names: set[str]) -> list[int]:
        """Rows of the photos with these names that have not been removed."""
        return [i for i, name in enumerate(self.names) if name in names and self.live[i]]

    def live_blocks(self) -> Iterator[np.ndarray]:
        """Vectors of photos that have not been removed, float32 (m, d) each."""
        for start in range(0, len(self.names), _BLOCK):
            block, live = self.vectors[start : start + _BLOCK], self.live[start : start + _BLOCK]
            yield block if live.all() else block[live]

    def live_names(self) -> list[str]:
        """Names of photos that have not been removed."""
        return list(compress(self.names, self.live.tolist()))


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Keep other writers out, and delete files that the manifest does not list before and after."""
    busy = f"another process writes to {show_path(folder)}: wait until it has finished"
    with only_writer(folder, IndexBusyError(busy)):
        _delete_unlisted(folder)  # left by a process that was killed
        try:
            yield
        finally:
            _delete_unlisted(folder)


def _delete_unlisted(folder: Path) -> None:
    remove_half_written(folder)
    parts = []
    if (folder / MANIFEST).exists():
        try:
            parts = read_manifest(folder)["parts"]
        except UnusableIndexError:
            return  # the files may be all that is left of the index; a save replaces them
    listed = {entry["name"] for part in parts for entry in part["files"].values()}
    for path in folder.iterdir():
        if _FILES.fullmatch(path.name) and path.name not in listed:
            # Processes that have mapped the file keep it. Windows refuses to delete it then: a
            # later writer will.
            with contextlib.suppress(PermissionError):
                path.unlink()


def _next_number(folder: Path) -> int:
    """A number for the names of new files, above that of every file in the folder."""
    numbers = [int(match[2]) for path in folder.iterdir() if (match := _FILES.fullmatch(path.name))]
    with contextlib.suppress(UnusableIndexError):
        numbers.append(read_manifest(folder)["number"])
    return max(numbers, default=0) + 1


def write_parts(
    folder: Path, parts: list[Part], content: dict[str, Any]
) -> tuple[list[Part], dict[str, Any]]:
    """Write what is not on the disk yet, and last the manifest, which completes the change.

    Args:
        folder: locked by :func:`writing`.
        parts: all parts of the index.
        content: of the manifest, beside the list of files.

    Returns:
        the parts, their vectors mapped from the files, and the manifest.
    """
    number = _next_number(folder)
    parts = [_write_part(folder, f"{number:06d}-{i}", part) for i, part in enumerate(parts)]
    manifest = {
        "format": _FORMAT,
        **content,
        "number": number,
        "photos": sum(part.count for part in parts),
        "parts": [
            {"rows": len(part.names), "photos": part.count, "files": part.files} for part in parts
        ],
    }
    manifest["xxh3"] = checksum_of_manifest(manifest)
    write_json(folder / MANIFEST, manifest)
    return parts, manifest


def _write_part(folder: Path, number: str, part: Part) -> Part:
    files, dimension = dict(part.files), part.vectors.shape[1]

    def write(kind: str, suffix: str, fill: Callable[[BinaryIO], Any]) -> None:
        if kind not in files:
            files[kind] = _write(folder / f"{kind}-{number}.{suffix}", fill)

    starts = range(0, len(part.vectors), _BLOCK)
    blocks = (part.vectors[start : start + _BLOCK] for start in starts)
    write("vectors", "f32", lambda file: file.writelines(blocks))
    # JSON in ASCII also keeps file names that are not valid Unicode.
    write("names", "json", lambda file: file.write(json.dumps(part.names).encode()))
    if part.selector:
        write("live", "bits", lambda file: file.write(np.packbits(part.live)))
    if part.index is not None:
        # Through Python: Faiss's own writer overlooks a disk that is full at the very end.
        write(
            "index",
            "faiss",
            lambda file: faiss.write_index(part.index, faiss.PyCallbackIOWriter(file.write, 2**20)),
        )
    return replace(part, vectors=_mapped(folder / files["vectors"]["name"], dimension), files=files)


def write_vectors(
    folder: Path, blocks: Iterable[np.ndarray], dimension: int
) -> tuple[np.ndarray, dict[str, Any]]:
    """Write vectors of a new part that may not fit into memory, float32 (m, dimension) each block.

    Returns:
        float32 (n, dimension), mapped from the file; and the file's entry of the manifest.
    """
    path = folder / f"vectors-{_next_number(folder):06d}-0.f32"
    entry = _write(path, lambda file: file.writelines(blocks))
    return _mapped(path, dimension), entry


def _write(path: Path, fill: Callable[[BinaryIO], Any]) -> dict[str, Any]:
    """Write a file, and return its entry of the manifest."""
    with replacing(path) as new, new.open("wb") as file:
        fill(file)
    return {"name": path.name, "bytes": path.stat().st_size, "xxh3": checksum(path)}


def _mapped(path: Path, dimension: int) -> np.ndarray:
    """The vectors of a file, float32 (n, d), memory-mapped."""
    return np.asarray(np.memmap(path, "<f4", "r")).reshape(-1, dimension)


@contextlib.contextmanager
def _whole(path: Path) -> Iterator[None]:
    """Turn any error that a damaged file causes into one of a single type."""
    try:
        yield
    except UnusableIndexError:
        raise
    except _DAMAGE as error:
        path.stat()  # FileNotFoundError if another process has deleted the file
        raise UnusableIndexError(
            f"{show_path(path)} is damaged ({reason(error) or type(error).__name__}): "
            "build the index anew"
        ) from None


def read_manifest(folder: Path, model: str | None = None) -> dict[str, Any]:
    """Read the manifest of an index that the model, by its fingerprint, has made; any if None.

    Raises:
        FileNotFoundError: there is no such folder.
        UnusableIndexError: damaged, of another format, or made by another model.
    """
    path = folder / MANIFEST
    if folder.is_file():
        raise UnusableIndexError(
            f"{show_path(folder)} is a file, an index of the previous format or none at all: "
            "build it anew"
        )
    if not folder.exists():
        raise FileNotFoundError(f"no index at {show_path(folder)}")
    if not path.exists():
        raise UnusableIndexError(f"{show_path(path)} is missing: this is no index, build it anew")
    with _whole(path):
        manifest = read_json(path)
        if manifest["format"] > _FORMAT:
            raise UnusableIndexError(
                f"{show_path(path)} has format {manifest['format']}, of a newer version of this "
                "project: update it, or build the index anew"
            )
        if manifest["xxh3"] != checksum_of_manifest(manifest):
            raise ValueError("its checksum differs")
        if not isinstance(manifest["number"], int):
            raise TypeError(f"number {manifest['number']!r}")
        made_by = manifest["model"]
        if model not in (None, made_by):
            raise UnusableIndexError(
                f"{show_path(folder)} was made by another model, or by an earlier version of this "
                f"project ({made_by[:12]}... and not {model[:12]}...): their embeddings can't be "
                "compared; embed the photos with this model and build the index anew"
            )
    return manifest


def read_index(folder: Path, model: str) -> tuple[dict[str, Any], IndexSettings, list[Part]]:
    """Read the manifest, settings and parts, whose vectors and Faiss index are memory-mapped.

    Each file is first compared with its checksum. Raises as :func:`read_manifest`.
    """
    manifest = read_manifest(folder, model)
    try:
        with _whole(folder / MANIFEST):
            settings, dimension = IndexSettings(**manifest["settings"]), manifest["dimension"]
            if dimension < 1:
                raise ValueError(f"dimension {dimension}")
            parts = [_read_part(folder, of, dimension, settings) for of in manifest["parts"]]
        return manifest, settings, parts
    except FileNotFoundError as error:
        if read_manifest(folder, model) != manifest:
            # Another process replaced the manifest, and then deleted the files it had listed.
            return read_index(folder, model)
        raise UnusableIndexError(
            f"{show_path(Path(error.filename))} is missing: build the index anew"
        ) from None


def _read_part(
    folder: Path, entry: dict[str, Any], dimension: int, settings: IndexSettings
) -> Part:
    files, rows = entry["files"], entry["rows"]
    with _checked(folder, files["vectors"]) as path:
        # Nothing is allocated by a number of the manifest before it agrees with a file's size.
        if rows < 1 or path.stat().st_size != 4 * rows * dimension:
            raise ValueError(f"it does not hold {rows} x {dimension} numbers")
        vectors = _mapped(path, dimension)
    with _checked(folder, files["names"]) as path:
        names = json.loads(path.read_bytes())
        if len(names) != rows:
            raise ValueError(f"{len(names)} names and not {rows}")
    live, index = np.ones(rows, bool), None
    if "live" in files:
        with _checked(folder, files["live"]) as path:
            bits = np.unpackbits(np.fromfile(path, np.uint8))
            if not rows <= len(bits) < rows + 8:
                raise ValueError(f"{len(bits)} marks and not {rows}")
            live = bits[:rows].astype(bool)
    if "index" in files:
        with _checked(folder, files["index"]) as path:
            index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
            if (index.ntotal, index.d) != (rows, dimension):
                raise ValueError(f"{index.ntotal} x {index.d} numbers and not {rows} x {dimension}")
            set_search(index, settings.search)
    return Part(names, vectors, live, index, files)


@contextlib.contextmanager
def _checked(folder: Path, entry: dict[str, Any]) -> Iterator[Path]:
    """The path of a file that is as the manifest lists it; the block reads it."""
    if not _FILES.fullmatch(entry["name"]):
        raise ValueError("a file with an unknown name")
    with _whole(path := folder / entry["name"]):
        if (path.stat().st_size, checksum(path)) != (entry["bytes"], entry["xxh3"]):
            raise ValueError("its size or its checksum differs")
        yield path
