"""Embedding photos from folders or shards; long jobs can be resumed.

    embeddings, names, skipped = embed_folder(tower, Path("my photos"))
    index = PhotoIndex.build(embeddings, names, fingerprint(tower))

    engine = load_engine(Path("runs/latest/tower.engine"))
    embeddings, names, skipped = embed_job(engine, photos_below(Path("my photos")), Path("out"))

A job writes to a folder, and resumes there after an interruption. The folder holds ``job.json``,
which identifies the job; ``embeddings.npy``, a row for each photo; and ``progress.jsonl``, with
names, states, messages and a checksum for each batch. When photos were added, changed or
removed, its job starts anew, but first copies its rows to one file, ``taken.bin``, from which it
takes those of the photos that are as before: of the same name, size and time, or, as photos are
moved, renamed and copied, of the same content.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import quote

import numpy as np
import xxhash
from tqdm import tqdm

from lib.data.decoding import decode
from lib.data.photos import NoPhotosError, PhotoError, find_photos, left_out_lines, read_photo
from lib.data.records import read_picture
from lib.files import (
    checksum,
    naming,
    only_writer,
    read_json,
    remove_half_written,
    replacing,
    show_error,
    show_path,
    write_json,
)
from lib.network.engine import Engine, keras_engine

if TYPE_CHECKING:  # not needed with an exported engine
    import keras

    from lib.data.catalogue import Catalogue

JOB, EMBEDDINGS, PROGRESS = "job.json", "embeddings.npy", "progress.jsonl"
TAKEN = "taken.bin"  # rows of the job before, until the new one is finished

FORMAT = 2  # of a job
_HEADER = 128  # bytes of an .npy file before its rows
_THREADS = os.cpu_count() or 1
_LOOK = 3.0  # seconds in which another process finds that nothing is to do, of 10,000 pictures


class EmbeddingJobError(RuntimeError):
    """The folder holds another job; the message says what to change."""


class JobBusyError(EmbeddingJobError):
    """Another process works on the job."""


class Embedded(NamedTuple):
    """The embeddings of some pictures.

    Attributes:
        embeddings: (n, d), of the engine's type: float32 of unit norm, or the bytes of local
            features; memory-mapped if a job made them.
        names: n names, in the order of the source.
        skipped: a message for each picture that could not be read; then, for a whole source, one
            for each reason for which files were left out.
    """

    embeddings: np.ndarray
    names: list[str]
    skipped: list[str]


@dataclass(frozen=True)
class PhotoSource:
    """Pictures in a fixed order.

    Attributes:
        names: one for each picture.
        read: takes a picture's number, a side in pixels and whether to squash to a square, and
            returns uint8 (h, w, 3) RGB, as :func:`lib.data.photos.read_photo` does. Several threads
            call it. Raises PhotoError if the picture can't be read.
        digest: identifies the pictures; a job is resumed only if it is equal.
        left_out: how many files and folders were left out, by reason.
        states: name -> what changes whenever the picture does, if known.
        folder: of the photos; a job of the same folder takes over the rows of unchanged pictures.
        content: takes a picture's number and returns a checksum of its file, without spaces. Raises
            OSError.
    """

    names: list[str]
    read: Callable[[int, int, bool], np.ndarray]
    digest: str
    left_out: dict[str, int] = field(default_factory=dict)
    states: dict[str, str] = field(default_factory=dict)
    folder: Path | None = None
    content: Callable[[int], str] | None = None

    def __len__(self) -> int:
        return len(self.names)


def photos_below(folder: Path) -> PhotoSource:
    """The photos that :func:`lib.data.photos.find_photos` finds, by their paths within the folder.

    Raises:
        NoPhotosError: there is no photo.
    """
    paths, left_out = find_photos(folder)
    if not paths:
        message = f"{show_path(folder)} holds no photos, nor do the folders in it"
        raise NoPhotosError(message, left_out)
    names = [path.relative_to(folder).as_posix() for path in paths]
    states = {}
    for path, name in zip(paths, names, strict=True):
        with contextlib.suppress(OSError):  # the message comes when it is read
            stat = path.stat()
            states[name] = f"{stat.st_size} {stat.st_mtime_ns}"
    identity = json.dumps([(name, states.get(name)) for name in names])
    digest = hashlib.sha256(identity.encode()).hexdigest()

    def read(number: int, image_size: int, squash: bool) -> np.ndarray:
        return read_photo(paths[number], image_size, squash)

    def content(number: int) -> str:
        return checksum(paths[number])

    return PhotoSource(names, read, digest, left_out, states, Path(folder), content)


def photos_in_shards(catalogue: Catalogue, pictures: np.ndarray | None = None) -> PhotoSource:
    """Pictures of TFRecord shards, named by the hash of their bytes in the catalogue.

    Args:
        catalogue: from :func:`lib.data.catalogue.open_catalogue`.
        pictures: int (n,), rows of the catalogue's pictures; all of them if None.
    """
    rows = range(len(catalogue.pictures)) if pictures is None else pictures.tolist()
    hashes = catalogue.pictures["image"].to_numpy()[rows].tolist()
    places = [catalogue.places[row] for row in rows]
    names = [image.hex() for image in hashes]

    def read(number: int, image_size: int, squash: bool) -> np.ndarray:
        try:  # a shard's pictures are squares
            return decode(read_picture(places[number]), image_size)
        except (OSError, ValueError) as error:
            raise PhotoError(
                f"picture {names[number]} can't be read ({show_error(error)})"
            ) from None

    return PhotoSource(names, read, hashlib.sha256(b"".join(hashes)).hexdigest())


def embed_folder(tower: keras.Model, folder: Path, batch_size: int = 128) -> Embedded:
    """Embed the photos of a folder, see :func:`photos_below`, with a Keras tower.

    Two batches of pixels are in memory at a time. A photo that can't be read does not stop the
    others.

    Raises:
        NoPhotosError: there is no photo, or none that can be read.
    """
    source = photos_below(folder)
    batches = list(_embed(keras_engine(tower), source, range(len(source)), batch_size))
    skipped = [message for batch in batches for message in batch.skipped]
    names = [name for batch in batches for name in batch.names]
    if not names:
        message = f"none of the photos in {show_path(folder)} can be read: {skipped[0]}"
        raise NoPhotosError(message, source.left_out)
    skipped += left_out_lines(source.left_out)
    return Embedded(np.concatenate([batch.embeddings for batch in batches]), names, skipped)


def embed_job(
    engine: Engine,
    source: PhotoSource,
    out_folder: Path,
    batch_size: int = 128,
    on_progress: Callable[[int, int], None] | None = None,
) -> Embedded:
    """Embed pictures to a folder; a job that was interrupted resumes where it stopped.

    Damaged rows are computed anew. A picture that can't be read does not stop the others. If photos
    of a folder were added, changed or removed since, only those of new content are embedded.

    Args:
        engine: from :func:`lib.network.engine.load_engine` or ``keras_engine`` there; or a
            :class:`lib.search.local_features.LocalFeatures`.
        source: from :func:`photos_below` or :func:`photos_in_shards`.
        out_folder: used by this job only; made if absent.
        batch_size: pictures that are read together, and saved together.
        on_progress: called after each batch with the number of pictures done, and of all; None
            shows a progress bar.

    Raises:
        EmbeddingJobError: the folder holds another job (another engine, other pictures).
        JobBusyError: another process works on this one.
    """
    folder = Path(out_folder)
    job = describe_job(engine, source, batch_size)
    if source.folder is not None:
        job["folder"] = place_of(source.folder, folder)
    with claimed(folder, job), naming(folder / EMBEDDINGS):
        names, skipped = _go_on(folder, engine, source, batch_size, on_progress)
        # Before another process may take the rows over for photos that changed.
        embeddings = np.load(folder / EMBEDDINGS, mmap_mode="r")
    return Embedded(embeddings, names, skipped + left_out_lines(source.left_out))


def place_of(photos: Path, job: Path) -> str:
    """Name a folder of photos as seen from a job's folder, so that both can be moved together."""
    photos, job = os.path.realpath(photos), os.path.realpath(job)
    with contextlib.suppress(ValueError):  # another drive of Windows
        photos = os.path.relpath(photos, job)
    return quote(os.fsencode(photos))  # a name need not be UTF-8


def describe_job(engine: Engine, source: PhotoSource, batch_size: int) -> dict:
    """The content of ``job.json``; a job is resumed only if all of it is equal."""
    job = {
        "format": FORMAT,
        "tower": engine.fingerprint,
        "engine": engine.name,  # includes the precision
        "image_size": engine.image_size,
        "dimension": engine.dimension,
        "pictures": len(source),
        "digest": source.digest,
        "batch_size": batch_size,
    }
    if engine.dtype != np.float32:
        job["dtype"] = engine.dtype.str
    return job


@contextlib.contextmanager
def claimed(folder: Path, job: dict) -> Iterator[None]:
    """Lock the folder of a job from :func:`describe_job`; raises as :func:`embed_job`."""
    folder.mkdir(parents=True, exist_ok=True)
    where, remedy = show_path(folder), "choose another folder, or delete this one"
    busy = JobBusyError(f"another process works in {where}: wait until it has finished")
    # Two pages that open at once only look whether all is there.
    with only_writer(folder, busy, _LOOK * max(1, job["pictures"] / 10_000)):
        remove_half_written(folder)
        if (folder / JOB).exists():
            try:
                found = read_json(folder / JOB)
            except ValueError as error:
                raise EmbeddingJobError(f"{error}, or its folder") from None
            found = found if isinstance(found, dict) else {}
            differ = [key for key in job | found if found.get(key) != job.get(key)]
            if differ and "folder" in job and {*differ} <= {"pictures", "digest"}:
                _set_aside(folder, job["dimension"], np.dtype(job.get("dtype", "<f4")))
                write_json(folder / JOB, job)
            elif differ:
                hint = "made by another network or an earlier version of this project; "
                raise EmbeddingJobError(
                    f"{where} holds another job (it differs in {', '.join(differ)[:200]}): "
                    f"{hint if 'tower' in differ else ''}{remedy}"
                )
        elif (folder / EMBEDDINGS).exists() or (folder / PROGRESS).exists():
            raise EmbeddingJobError(f"{where} holds embeddings without a {JOB}: {remedy}")
        else:
            write_json(folder / JOB, job)
        yield


def _set_aside(folder: Path, dimension: int, dtype: np.dtype) -> None:
    """Move all rows of a job to one file, so that a kill loses none."""
    rows = _taken(folder, dimension, dtype)  # of a job that did not finish either
    for name in (EMBEDDINGS, PROGRESS):
        (folder / name).touch()
    with (folder / EMBEDDINGS).open("rb+") as file, (folder / PROGRESS).open("rb+") as progress:
        names, _, states = _whole_batches(file, progress, dimension, dtype)
    embeddings = _mapped(folder / EMBEDDINGS, _HEADER, len(names), dimension, dtype)
    rows |= zip(zip(names, states, strict=True), embeddings, strict=True)
    names, states = [name for name, _ in rows], [state for _, state in rows]
    with replacing(folder / TAKEN) as part, part.open("wb") as file:
        file.write(_line(names, [], states, rows.values()))
        for row in rows.values():
            file.write(row)
    # Not cut: others may have mapped them. The rows go first, since without their lines they would
    # be cut by the next process if this one is killed in between.
    (folder / EMBEDDINGS).unlink()
    (folder / PROGRESS).unlink()


def _mapped(path: Path, start: int, rows: int, dimension: int, dtype: np.dtype) -> np.ndarray:
    """Rows (n, d) of a file, memory-mapped: those of local features may exceed the memory."""
    if not rows:
        return np.empty((0, dimension), dtype)
    return np.memmap(path, dtype, "r", start, (rows, dimension))


class _Before:
    """The rows of the job before, for the pictures that are the same now."""

    def __init__(self, source: PhotoSource, rows: dict[tuple[str, str | None], np.ndarray]):
        self.states: dict[str, str] = {}  # name -> state and content of each picture looked at
        self._source, self._rows, self._of_content = source, {}, {}
        for (name, state), row in rows.items():
            if state:
                state, _, content = state.rpartition(" ")
                self._rows[name, state] = content, row
                self._of_content[content] = row
        self._of_content.pop("", None)

    def row(self, number: int) -> np.ndarray | None:
        """The row of a picture, by name and state, else by content; several threads call it."""
        name = self._source.names[number]
        if (state := self._source.states.get(name)) is None:
            return None
        content, row = self._rows.get((name, state), ("", None))
        if row is None and self._source.content is not None:
            with contextlib.suppress(OSError):  # the message comes when it is read
                content = self._source.content(number)
            row = self._of_content.get(content)
        self.states[name] = f"{state} {content}"
        return row


def _taken(
    folder: Path, dimension: int, dtype: np.dtype
) -> dict[tuple[str, str | None], np.ndarray]:
    """Name and state -> row (d,), as the job before set them aside."""
    if not (folder / TAKEN).exists():
        return {}
    with (folder / TAKEN).open("rb") as file:
        line = file.readline()
        found = _read_batch(line, file, dimension, dtype)
    if found is None:
        return {}
    names, _, states = found
    rows = _mapped(folder / TAKEN, len(line), len(names), dimension, dtype)
    return dict(zip(zip(names, states, strict=True), rows, strict=True))


def _go_on(
    folder: Path,
    engine: Engine,
    source: PhotoSource,
    batch_size: int,
    on_progress: Callable[[int, int], None] | None,
) -> tuple[list[str], list[str]]:
    """Embed the remaining pictures; returns names and messages of all."""
    for name in (EMBEDDINGS, PROGRESS):
        (folder / name).touch()
    with (folder / EMBEDDINGS).open("rb+") as rows, (folder / PROGRESS).open("rb+") as progress:
        dtype = engine.dtype
        names, skipped, _ = _whole_batches(rows, progress, engine.dimension, dtype)
        if not names and not skipped:
            _write_header(rows, (0, engine.dimension), dtype)
        left = range(len(names) + len(skipped), len(source))
        silent = on_progress is not None or not left
        before = _Before(source, _taken(folder, engine.dimension, dtype))
        for batch in _embed(engine, source, left, batch_size, silent, before.row):
            # Written, not mapped: then a full disk is an error, not a crash. Rows whose line is
            # not written yet do not count.
            rows.write(batch.embeddings)
            rows.flush()
            states = [before.states.get(name) for name in batch.names]
            progress.write(_line(batch.names, batch.skipped, states, batch.embeddings))
            progress.flush()
            names += batch.names
            skipped += batch.skipped
            if on_progress is not None:
                on_progress(len(names) + len(skipped), len(source))
        os.fsync(progress.fileno())
        os.fsync(rows.fileno())
        _write_header(rows, (len(names), engine.dimension), dtype)
        rows.flush()
        os.fsync(rows.fileno())
    (folder / TAKEN).unlink(missing_ok=True)
    return names, skipped


# The names, messages and states of a batch, or of several.
_Entries = tuple[list[str], list[str], list[str | None]]


def _whole_batches(rows, progress, dimension: int, dtype: np.dtype) -> _Entries:
    """The entries of all batches before the first damaged one; the rest is cut."""
    names, skipped, states, end = [], [], [], 0
    rows.seek(_HEADER)
    for line in progress:
        if (found := _read_batch(line, rows, dimension, dtype)) is None:
            break
        names += found[0]
        skipped += found[1]
        states += found[2]
        end += len(line)
    progress.truncate(end)
    progress.seek(end)
    rows.truncate(_HEADER + dtype.itemsize * len(names) * dimension)
    rows.seek(0, os.SEEK_END)
    return names, skipped, states


def _read_batch(line: bytes, rows, dimension: int, dtype: np.dtype) -> _Entries | None:
    """The entries of a line, whose rows are read; None if either line or rows are damaged."""
    try:
        entry = json.loads(line)
        names, skipped = entry["names"], entry["skipped"]
        states = entry.get("states", [None] * len(names))
        each = dtype.itemsize * dimension
        read = (rows.read(each) for _ in names)  # one by one: they may exceed the memory
        whole = itertools.takewhile(lambda row: len(row) == each, read)
        return (names, skipped, states) if line == _line(names, skipped, states, whole) else None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _line(names: list[str], skipped: list[str], states: list[str | None], rows: Iterable) -> bytes:
    """The line of a batch, with the checksum of its names, messages, states and rows."""
    entry = {"names": names, "skipped": skipped}
    if any(states):
        entry["states"] = states
    digest = xxhash.xxh3_128(json.dumps(entry).encode())
    for row in rows:
        digest.update(row)
    return json.dumps(entry | {"xxh3": digest.hexdigest()}).encode() + b"\n"


def _write_header(rows, shape: tuple[int, int], dtype: np.dtype) -> None:
    """Write the header of the .npy file; its length is the same for every shape."""
    rows.seek(0)
    header = {"descr": dtype.str, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(rows, header)
    assert rows.tell() == _HEADER


def embed_pictures(engine: Engine, source: PhotoSource, numbers: Sequence[int]) -> Embedded:
    """Embed some pictures of a source, by their numbers, as one batch of :func:`embed_job`."""
    none = Embedded(np.empty((0, engine.dimension), engine.dtype), [], [])
    return next(_embed(engine, source, numbers, max(1, len(numbers)), silent=True), none)


def _embed(
    engine: Engine,
    source: PhotoSource,
    numbers: Sequence[int],
    batch_size: int,
    silent: bool = False,
    known: Callable[[int], np.ndarray | None] = lambda number: None,
) -> Iterator[Embedded]:
    """Embed pictures batch by batch, while the next batch is read; a bar counts others as done.

    ``known`` takes a picture's number and returns its row, if that need not be computed.
    """

    def read(number: int) -> np.ndarray | PhotoError:
        try:
            row = known(number)
            if row is not None:
                return row
            return source.read(number, engine.image_size, engine.squashes)
        except PhotoError as error:
            return error

    done = len(source) - len(numbers)
    bar = tqdm(total=len(source), initial=done, desc=engine.task, unit=" photos", disable=silent)
    with ThreadPoolExecutor(_THREADS) as threads, bar:
        ahead = threads.map(read, numbers[:batch_size])
        for start in range(0, len(numbers), batch_size):
            end = start + batch_size
            pictures, ahead = list(ahead), threads.map(read, numbers[end : end + batch_size])
            skipped = [str(picture) for picture in pictures if isinstance(picture, PhotoError)]
            good = [i for i, picture in enumerate(pictures) if not isinstance(picture, PhotoError)]
            new = [i for i in good if pictures[i].ndim == 3]  # the others are rows
            rows = dict(zip(new, engine.embed([pictures[i] for i in new]), strict=True))
            rows = [rows.get(i, pictures[i]) for i in good]
            embeddings = np.array(rows, engine.dtype).reshape(-1, engine.dimension)
            names = [source.names[numbers[start + i]] for i in good]
            yield Embedded(embeddings, names, skipped)
            bar.update(len(pictures))
