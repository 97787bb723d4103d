"""Embedding photos from folders, lists of files or shards; long jobs can be resumed.

    embeddings, names, skipped = embed_folder(tower, Path("my photos"))
    index = PhotoIndex.build(embeddings, names, fingerprint(tower))

Jobs embed many photos, and resume where they were interrupted:

    engine = load_engine(Path("runs/latest/tower.engine"))
    embeddings, names, skipped = embed_job(engine, photos_below(Path("my photos")), Path("out"))

The folder of a job holds ``job.json``, which identifies it; ``embeddings.npy``, float32 (n, d); and
``progress.jsonl``, a line for each batch: names, messages, and a checksum of these and the rows.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import xxhash
from tqdm import tqdm

from lib.data.decoding import decode
from lib.data.photos import NoPhotosError, PhotoError, find_photos, read_photo
from lib.data.records import read_picture
from lib.files import only_writer, read_json, remove_half_written, show_path, write_json
from lib.network.engine import Engine, keras_engine

if TYPE_CHECKING:  # a job whose engine was exported does without them
    import keras

    from lib.data.catalogue import Catalogue

JOB, EMBEDDINGS, PROGRESS = "job.json", "embeddings.npy", "progress.jsonl"

_FORMAT = 1
_HEADER = 128  # bytes of an .npy file before its rows
_THREADS = os.cpu_count() or 1


class EmbeddingJobError(RuntimeError):
    """A job can't be done in this folder; the message says what to change."""


class JobBusyError(EmbeddingJobError):
    """Another process works on the job."""


class Embedded(NamedTuple):
    """The embeddings of some pictures.

    Attributes:
        embeddings: float32 (n, d) of unit norm; of a job, a file that is read as memory.
        names: of the n pictures, in the order of the source.
        skipped: a message for each picture that could not be read.
    """

    embeddings: np.ndarray
    names: list[str]
    skipped: list[str]


# --------------------------------------------------------------------------------------------------
# Sources
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PhotoSource:
    """Pictures in a fixed order.

    Attributes:
        names: one for each picture.
        read: from a picture's number and a side in pixels to uint8 (side, side, 3) RGB; several
            threads call it. Raises PhotoError if the picture can't be read.
        digest: identifies the pictures; a job is resumed only if it is equal.
    """

    names: list[str]
    read: Callable[[int, int], np.ndarray]
    digest: str

    def __len__(self) -> int:
        return len(self.names)


def photos_below(folder: Path) -> PhotoSource:
    """The photos of a folder, then those of its subfolders, by their paths within the folder.

    :func:`lib.data.photos.find_photos` tells which files count.

    Raises:
        NoPhotosError: there is no photo.
    """
    paths = find_photos(folder).paths
    if not paths:
        raise NoPhotosError(f"{show_path(folder)} holds no photos, nor do the folders in it")
    return _of_files(paths, [path.relative_to(folder).as_posix() for path in paths])


def photos_at(paths: Iterable[Path]) -> PhotoSource:
    """Picture files in the order given, named by their paths as given."""
    paths = [Path(path) for path in paths]
    return _of_files(paths, [str(path) for path in paths])


def photos_in_shards(catalogue: Catalogue, pictures: np.ndarray | None = None) -> PhotoSource:
    """Pictures of TFRecord shards, by the hash of their bytes as the catalogue has it.

    Args:
        catalogue: from :func:`lib.data.catalogue.open_catalogue`.
        pictures: int (n,), rows of the catalogue's pictures; all of them if None.
    """
    rows = np.arange(len(catalogue.pictures)) if pictures is None else pictures
    hashes = catalogue.pictures["image"].to_numpy()[rows].tolist()
    places = [catalogue.places[row] for row in rows.tolist()]
    names = [image.hex() for image in hashes]

    def read(number: int, image_size: int) -> np.ndarray:
        try:
            return decode(read_picture(places[number]), image_size)
        except (OSError, ValueError) as error:
            raise PhotoError(f"picture {names[number]} can't be read ({error})") from None

    return PhotoSource(names, read, hashlib.sha256(b"".join(hashes)).hexdigest())


def _of_files(paths: list[Path], names: list[str]) -> PhotoSource:
    digest = hashlib.sha256()
    for path, name in zip(paths, names, strict=True):
        try:
            stat = path.stat()
            state = [name, stat.st_size, stat.st_mtime_ns]
        except OSError:  # reading it will tell
            state = [name]
        digest.update(json.dumps(state).encode())
    return PhotoSource(names, lambda i, size: read_photo(paths[i], size), digest.hexdigest())


# --------------------------------------------------------------------------------------------------
# Embedding them
# --------------------------------------------------------------------------------------------------


def embed_folder(tower: keras.Model, folder: Path, batch_size: int = 128) -> Embedded:
    """Embed the photos of a folder and of all folders in it, as the tower itself does.

    No more than two batches of pixels are in memory at a time. A photo that can't be read does not
    stop the others.

    Args:
        tower: from :func:`lib.network.tower.load_tower`.
        folder: see :func:`photos_below`.
        batch_size: photos that are read together.

    Returns:
        embeddings, names (paths within the folder), and messages: see :class:`Embedded`.

    Raises:
        NoPhotosError: there is no photo, or none that can be read.
    """
    batches = list(_embed(keras_engine(tower), photos_below(folder), 0, 0, batch_size))
    skipped = [message for batch in batches for message in batch.skipped]
    names = [name for batch in batches for name in batch.names]
    if not names:
        raise NoPhotosError(f"none of the photos in {show_path(folder)} can be read: {skipped[0]}")
    return Embedded(np.concatenate([batch.embeddings for batch in batches]), names, skipped)


def embed_job(
    engine: Engine,
    source: PhotoSource,
    out_folder: Path,
    batch_size: int = 128,
    on_progress: Callable[[int, int], None] | None = None,
) -> Embedded:
    """Embed pictures to a file; pictures that the file already has are not embedded again.

    An interrupted or killed job resumes where it stopped when it is called again; damaged rows are
    computed anew. A picture that can't be read does not stop the others.

    Args:
        engine: from :func:`lib.network.engine.load_engine` or ``keras_engine`` there.
        source: from :func:`photos_below`, :func:`photos_at` or :func:`photos_in_shards`.
        out_folder: used by this job only; made if absent.
        batch_size: pictures that are read together, and saved together.
        on_progress: called after each batch with the number of pictures that are done, and of all;
            None shows a progress bar.

    Raises:
        EmbeddingJobError: the folder holds another job (another engine, other pictures), or another
            process works on this one.
    """
    folder = Path(out_folder)
    job = describe_job(engine, source, batch_size)
    with claimed(folder, job):
        names, skipped = _go_on(folder, engine, source, batch_size, on_progress)
    return Embedded(np.load(folder / EMBEDDINGS, mmap_mode="r"), names, skipped)


def describe_job(engine: Engine, source: PhotoSource, batch_size: int) -> dict:
    """What identifies a job; a job is resumed only if all of it is equal.

    The engine's name holds the precision that it computes in, so that all rows of a job have one.
    """
    return {
        "format": _FORMAT,
        "tower": engine.fingerprint,
        "engine": engine.name,
        "image_size": engine.image_size,
        "dimension": engine.dimension,
        "pictures": len(source),
        "digest": source.digest,
        "batch_size": batch_size,
    }


@contextlib.contextmanager
def claimed(folder: Path, job: dict) -> Iterator[None]:
    """Lock the folder of a job for this process.

    Args:
        folder: made if absent.
        job: from :func:`describe_job`.

    Raises:
        EmbeddingJobError: it is that of another job, or another process works in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    busy = f"another process works in {show_path(folder)}: wait until it has finished"
    with only_writer(folder, JobBusyError(busy)):
        _claim(folder, job)
        yield


def _claim(folder: Path, job: dict) -> None:
    """Check that the folder is empty or holds this job."""
    remove_half_written(folder)  # of a process that was killed
    if (folder / JOB).exists():
        try:
            found = read_json(folder / JOB)
        except (ValueError, RecursionError) as error:
            raise EmbeddingJobError(f"{error}, or its folder") from None
        if found != job:
            differ = [
                key for key in job if not isinstance(found, dict) or found.get(key) != job[key]
            ]
            hint = "made by another network or an earlier version of this project; "
            raise EmbeddingJobError(
                f"{show_path(folder)} holds another job (it differs in {', '.join(differ)}): "
                f"{hint if 'tower' in differ else ''}choose another folder, or delete this one"
            )
    elif (folder / EMBEDDINGS).exists() or (folder / PROGRESS).exists():
        raise EmbeddingJobError(
            f"{show_path(folder)} holds embeddings without a {JOB}: choose another folder, or "
            "delete this one"
        )
    else:
        write_json(folder / JOB, job)


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
        names, skipped = _whole_batches(rows, progress, engine.dimension)
        done = len(names) + len(skipped)
        if not done:
            _write_header(rows, (0, engine.dimension))
        if done < len(source):
            silent = on_progress is not None
            for batch in _embed(engine, source, done, len(skipped), batch_size, silent):
                # Written, not mapped: a full disk is an error then, not a crash. The line comes
                # last; rows without a line do not count.
                rows.write(batch.embeddings)
                rows.flush()
                progress.write(_line(batch))
                progress.flush()
                names += batch.names
                skipped += batch.skipped
                if on_progress is not None:
                    on_progress(len(names) + len(skipped), len(source))
        os.fsync(progress.fileno())
        os.fsync(rows.fileno())
        _write_header(rows, (len(names), engine.dimension))
        rows.flush()
        os.fsync(rows.fileno())
    return names, skipped


def _whole_batches(rows, progress, dimension: int) -> tuple[list[str], list[str]]:
    """Names and messages of the batches from the first on that are whole; cuts off the rest."""
    names, skipped, end = [], [], 0
    rows.seek(_HEADER)
    for line in progress:
        try:
            entry = json.loads(line)
            shape = (len(entry["names"]), dimension)
            embeddings = np.frombuffer(rows.read(4 * shape[0] * dimension), "<f4").reshape(shape)
            batch = Embedded(embeddings, entry["names"], entry["skipped"])
            if line != _line(batch):
                break
        except (ValueError, KeyError, TypeError):
            break
        names += batch.names
        skipped += batch.skipped
        end += len(line)
    progress.truncate(end)
    progress.seek(end)
    rows.truncate(_HEADER + 4 * len(names) * dimension)
    rows.seek(0, os.SEEK_END)
    return names, skipped


def _line(batch: Embedded) -> bytes:
    """The line of a batch, with the checksum of its names, messages and rows."""
    entry = {"names": batch.names, "skipped": batch.skipped}
    digest = xxhash.xxh3_128(json.dumps(entry).encode())
    digest.update(np.ascontiguousarray(batch.embeddings, "<f4"))
    return json.dumps(entry | {"xxh3": digest.hexdigest()}).encode() + b"\n"


def _write_header(rows, shape: tuple[int, int]) -> None:
    """Write the header of the .npy file; its length is the same for every shape."""
    rows.seek(0)
    header = {"descr": "<f4", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(rows, header)
    assert rows.tell() == _HEADER


def _embed(
    engine: Engine,
    source: PhotoSource,
    done: int,
    failed: int,
    batch_size: int,
    silent: bool = False,
) -> Iterator[Embedded]:
    """Embed the pictures of a source, batch by batch, and show progress.

    Args:
        done: how many of the first pictures are done already.
        failed: how many of these could not be read.
        silent: without a progress bar.
    """
    with (
        ThreadPoolExecutor(_THREADS) as threads,
        tqdm(
            total=len(source), initial=done, desc="embedding", unit=" photos", disable=silent
        ) as bar,
    ):

        def read_ahead(start: int) -> list[Future]:
            numbers = range(len(source))[start : start + batch_size]
            return _reading(threads, source, numbers, engine.image_size)

        ahead = read_ahead(done)
        for start in range(done, len(source), batch_size):
            pictures = [task.result() for task in ahead]
            ahead = read_ahead(start + batch_size)
            numbers = range(start, start + len(pictures))
            batch = _embed_read(engine, source, numbers, pictures)
            failed += len(batch.skipped)
            if failed:
                bar.set_postfix(skipped=failed, refresh=False)
            yield batch
            bar.update(len(pictures))


def embed_pictures(engine: Engine, source: PhotoSource, numbers: Sequence[int]) -> Embedded:
    """Embed some pictures of a source, as :func:`embed_job` does a batch of them.

    Args:
        engine, source: see :func:`embed_job`.
        numbers: which of the source's pictures.
    """
    with ThreadPoolExecutor(_THREADS) as threads:
        tasks = _reading(threads, source, numbers, engine.image_size)
        return _embed_read(engine, source, numbers, [task.result() for task in tasks])


def _reading(
    threads: ThreadPoolExecutor, source: PhotoSource, numbers: Sequence[int], image_size: int
) -> list[Future]:
    """Begin to read pictures; each comes to uint8 (s, s, 3), or to the error that says why not."""

    def read(number: int) -> np.ndarray | PhotoError:
        try:
            return source.read(number, image_size)
        except PhotoError as error:
            return error

    return [threads.submit(read, number) for number in numbers]


def _embed_read(
    engine: Engine,
    source: PhotoSource,
    numbers: Sequence[int],
    pictures: list[np.ndarray | PhotoError],
) -> Embedded:
    """Embed those of the pictures that could be read."""
    good = [i for i, picture in enumerate(pictures) if not isinstance(picture, PhotoError)]
    photos = np.empty((len(good), *[engine.image_size] * 2, 3), np.uint8)
    for place, i in enumerate(good):
        photos[place] = pictures[i]
    skipped = [str(picture) for picture in pictures if isinstance(picture, PhotoError)]
    return Embedded(engine.embed(photos), [source.names[numbers[i]] for i in good], skipped)
