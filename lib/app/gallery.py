"""Opens a folder of photos to search in: embeds what is new, and keeps the rest in step.

    gallery = open_gallery(engine, Path("~/Pictures").expanduser(), run / JOBS)
    gallery.names, gallery.embeddings, gallery.features

Its photos are embedded once (:func:`lib.search.embedding.embed_job`); for an engine for photographs
in their own shape, local features are stored beside the embeddings, to verify a ranking with.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote_to_bytes

import numpy as np

from lib.data.photos import NoPhotosError, landmark_name, left_out_lines
from lib.files import only_writer, read_json, show_path
from lib.network.engine import Engine
from lib.search.embedding import (
    EMBEDDINGS,
    FORMAT,
    JOB,
    TAKEN,
    Embedded,
    EmbeddingJobError,
    JobBusyError,
    PhotoSource,
    embed_job,
    photos_below,
    place_of,
)
from lib.search.local_features import ROW_BYTES, LocalFeatures

JOBS = "galleries"  # folder in a run that keeps the embeddings of galleries
GONE = "This photo can no longer be read."
_BATCH = 32  # photos between two reports of progress
_KEPT = 30 * 24 * 3600  # seconds that embeddings of a folder that is gone are kept
_ROOM = 2**30  # bytes of the disk that are left free


class SearchError(ValueError):
    """A folder or photo can't be used; the message names no path and may be shown to anyone."""


@dataclass(frozen=True, eq=False)
class Gallery:
    """An embedded folder of photos."""

    folder: Path
    names: list[str]  # n paths relative to the folder
    embeddings: np.ndarray  # float32 (n, d) of unit norm
    unreadable: int  # number of other photos, which could not be read
    left_out: str = ""  # sentences on what else was left out
    # Name -> row of lib.search.local_features.packed, in a memory-mapped file; None: not verified.
    features: Mapping[str, np.ndarray] | None = None

    def path(self, name: str) -> Path:
        """Locate the file of a photo.

        Raises:
            SearchError: a link on its path leads outside the folder.
        """
        path = self.folder / name
        if not os.path.realpath(path).startswith(os.path.join(os.path.realpath(self.folder), "")):
            raise SearchError("This photo is no longer in the folder.")
        return path

    def landmarks(self) -> list[str]:
        """The landmarks of the photos, sorted."""
        return sorted({landmark_of(name) for name in self.names} - {""})


def landmark_of(name: str) -> str:
    """Derive a photo's landmark from its name: the folder it lies in, "" without one.

    It is the whole way to the folder: "Paris/old" and "Rome/old" are two landmarks.
    """
    return landmark_name(name.rpartition("/")[0])


def folder_below(root: Path, typed: str) -> Path:
    """Find the folder that a user typed, absolute or relative to ``root``; resolves all links.

    Raises:
        SearchError: there is no such folder, or it is not below ``root``, or a name on the way
            begins with a dot; the message does not say which.
    """
    try:
        root = Path(root).resolve()
        folder = (root / Path(typed.strip()).expanduser()).resolve()
        parts = folder.relative_to(root).parts  # raises a ValueError outside
        if parts and not any(part[0] == "." for part in parts) and folder.is_dir():
            return folder
    except (OSError, ValueError, RuntimeError):  # a loop of links, a zero byte, an unknown user
        pass
    raise SearchError("There is no such folder that may be searched in.")


def open_gallery(
    engine: Engine,
    folder: Path,
    jobs: Path,
    on_progress: Callable[[int, int], None] | None = None,
    verifiable: bool = True,
) -> Gallery:
    """Embed the photos of a folder and its subfolders, or load their stored embeddings.

    Only photos that are new or changed are embedded. Stored embeddings of other networks or earlier
    versions are removed, and those of folders that are gone, a month after they were last used.

    Args:
        engine, on_progress: see :func:`lib.search.embedding.embed_job`.
        folder: of photos.
        jobs: folder to store embeddings in, with a subfolder for each folder of photos.
        verifiable: whether local features are found, too, if the engine is one with views; each
            photo's take 132 kB of the disk.

    Raises:
        SearchError: there is no photo, or none that can be read.
        JobBusyError: another process embeds the same photos.
        EmbeddingJobError: the stored embeddings can't be used.
    """
    try:
        source = photos_below(folder)
    except NoPhotosError as error:
        text = "There are no photos in this folder, nor in the folders in it."
        raise SearchError(text + _sentences(error.left_out)) from None
    jobs = Path(jobs)
    _remove_superseded(jobs, engine)
    job = _job_of(engine, folder, jobs)
    embeddings, names, skipped = _rows_of(engine, source, job, on_progress)
    left_out, features = _sentences(source.left_out), None
    if names and engine.views and verifiable:
        # Once as much as all: while a changed folder's rows are taken over, there are two of each.
        job = _job_of(LocalFeatures(), folder, jobs)
        needed = len(names) * ROW_BYTES + _ROOM
        if _is_stored(job, source) or shutil.disk_usage(jobs).free > needed:
            rows, of, _ = _rows_of(LocalFeatures(), source, job, on_progress)
            features = dict(zip(of, np.asarray(rows), strict=True))
        else:
            left_out += " The disk has no room to verify what shows the same place."
    if not names:
        raise SearchError(f"None of the photos in this folder can be read.{left_out}")
    unreadable = len(skipped) - len(source.left_out)
    return Gallery(Path(folder), names, embeddings, unreadable, left_out, features)


def _job_of(engine: Engine | LocalFeatures, folder: Path, jobs: Path) -> Path:
    key = hashlib.sha256(f"{engine.fingerprint} {engine.name} {place_of(folder, jobs)}".encode())
    return jobs / key.hexdigest()[:16]


def _rows_of(
    engine: Engine | LocalFeatures,
    source: PhotoSource,
    job: Path,
    on_progress: Callable[[int, int], None] | None,
) -> Embedded:
    try:
        found = embed_job(engine, source, job, _BATCH, on_progress)
    except JobBusyError:  # names a folder of ours
        text = "another process reads these photos: wait until it has finished"
        raise JobBusyError(text) from None
    with contextlib.suppress(OSError):
        (job / JOB).touch()  # its time is that of the last use
    return found


def _is_stored(job: Path, source: PhotoSource) -> bool:
    """Whether a job of exactly these photos is finished."""
    with contextlib.suppress(OSError, ValueError, TypeError):
        whole = not (job / TAKEN).exists() and (job / EMBEDDINGS).exists()
        return whole and dict(read_json(job / JOB)).get("digest") == source.digest
    return False


def open_option(
    engine: Engine, folder: Path, jobs: Path, option: str, verifiable: bool = True
) -> Gallery:
    """:func:`open_gallery` for a program, whose errors name the folder and the option it came by.

    Raises:
        ValueError: there is no photo, or none that can be read.
        JobBusyError, EmbeddingJobError: as in :func:`open_gallery`.
    """
    named = f"{show_path(folder)} ({option})"
    try:
        return open_gallery(engine, folder, jobs, verifiable=verifiable)
    except SearchError as error:  # names no path
        raise ValueError(f"{named}: {error}") from None
    except EmbeddingJobError as error:
        raise type(error)(f"{named}: {error}") from None


def _remove_superseded(jobs: Path, engine: Engine) -> None:
    """Remove embeddings of folders that are gone, and those of other networks."""
    for path in jobs.glob(f"{'[0-9a-f]' * 16}/{JOB}"):
        with contextlib.suppress(JobBusyError, OSError, ValueError, TypeError):
            job, at = dict(read_json(path)), os.path.realpath(path.parent)
            # Earlier versions made a job for each state of a folder, and did not name the folder.
            folder = os.fsdecode(unquote_to_bytes(str(job.get("folder"))))
            # Not at once: it may lie on a drive that is not connected today.
            gone = time.time() - path.stat().st_mtime > _KEPT and not os.path.isdir(
                os.path.join(at, folder)
            )
            ours = (LocalFeatures.fingerprint, LocalFeatures.name)
            own = job.get("tower") == engine.fingerprint
            own = own or (job.get("tower"), job.get("engine")) == ours
            other = not own or job.get("format") != FORMAT
            if gone or other or "folder" not in job:
                with only_writer(path.parent, JobBusyError()):
                    shutil.rmtree(path.parent)


def _sentences(left_out: dict[str, int]) -> str:
    return "".join(f" {line.capitalize()}." for line in left_out_lines(left_out))
