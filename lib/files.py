"""Where things lie on disk, and how they get there whole: the project's folders, runs, safe writes.

root = project_root()
run = open_run("")                    # the newest folder in runs/
record_metrics(run, training={"epochs": 6})
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import xxhash


def project_root(start: Path | None = None) -> Path:
    """The folder that holds ``environment.yml``, found by walking up from ``start``.

    JupyterLab, nbval and papermill start a kernel in different folders; this makes them agree.

    Args:
        start: where to begin; the current folder if None.

    Raises:
        FileNotFoundError: no folder on the way up holds ``environment.yml``.
    """
    start = (start or Path.cwd()).resolve()
    for folder in (start, *start.parents):
        if (folder / "environment.yml").is_file():
            return folder
    raise FileNotFoundError(
        f"no environment.yml in {start} or above it: start the notebook inside the project's folder"
    )


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write a file so that it is either whole or absent.

    Yields a temporary path beside ``path``. When the block ends well, its content is flushed to
    the disk and renamed to ``path`` in one step; when the block fails, it is removed and what was
    at ``path`` stays.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # It ends like the final name: writers such as Keras choose the format by that.
    handle, name = tempfile.mkstemp(prefix=".part-", suffix=f"-{path.name}", dir=path.parent)
    os.close(handle)
    part = Path(name)
    try:
        yield part
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        # mkstemp makes private files; give it the permissions an ordinary new file gets.
        umask = os.umask(0)
        os.umask(umask)
        part.chmod(0o666 & ~umask)
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Make a rename in ``folder`` survive a power cut (a no-op where folders can't be opened)."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextlib.contextmanager
def only_writer(folder: Path, busy: Exception | None) -> Iterator[None]:
    """Keep other processes out; the system lifts the lock when this one ends, however it does.

    Args:
        folder: the lock is the file ``.lock`` in it.
        busy: is raised if another process holds the lock; None: wait until it lets go.
    """
    import fcntl  # here: Windows has none, and does without what needs the lock

    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (fcntl.LOCK_NB if busy else 0))
        except BlockingIOError:
            raise busy from None
        yield


def write_json(path: Path, content: Any) -> None:
    """Write ``content`` as indented JSON, atomically."""
    with replacing(path) as part:
        part.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        ValueError: the file is not JSON; the message names it.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}): delete it") from error


def checksum(path: Path) -> str:
    """XXH3 of a file's content, 32 hexadecimal digits: finds damage, not forgery."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()


# --------------------------------------------------------------------------------------------------
# Runs: one folder for everything that one execution of the notebooks produces
# --------------------------------------------------------------------------------------------------


def new_run(runs: Path | None = None, now: Callable[[], datetime] = datetime.now) -> Path:
    """Make an empty folder ``runs/<date>_<time>`` and point ``runs/latest`` at it.

    Two runs started within one second get different folders (the second a suffix ``-2``).
    """
    runs = runs or project_root() / "runs"
    runs.mkdir(parents=True, exist_ok=True)
    stamp = now().strftime("%Y-%m-%d_%H-%M-%S")
    for attempt in range(1, 1000):
        run = runs / (stamp if attempt == 1 else f"{stamp}-{attempt}")
        with contextlib.suppress(FileExistsError):
            run.mkdir()
            break
    link = runs / f".latest-{os.getpid()}"
    link.unlink(missing_ok=True)
    link.symlink_to(run.name, target_is_directory=True)
    link.replace(runs / "latest")
    return run


def open_run(run_dir: str, *, start_new: bool = False) -> Path:
    """The folder a notebook writes to.

    Args:
        run_dir: a folder relative to the project's root (made if absent), or "" for the newest run.
        start_new: with an empty ``run_dir``, begin a new run instead of continuing the newest.
    """
    if run_dir:
        run = project_root() / run_dir
        run.mkdir(parents=True, exist_ok=True)
        return run.resolve()
    latest = project_root() / "runs" / "latest"
    if start_new or not latest.is_dir():
        return new_run()
    return latest.resolve()


def record_metrics(run: Path, **sections: Any) -> Path:
    """Put named sections into the run's ``metrics.json``; its other sections stay.

    Two notebooks may do so at once.
    """
    path = Path(run) / "metrics.json"
    with only_writer(path.parent, busy=None):
        metrics = read_json(path) if path.is_file() else {}
        write_json(path, metrics | sections)
    return path


def show_path(path: Path) -> str:
    """A path for people: relative to the project where it lies inside, so outputs are alike."""
    path = Path(path).resolve()
    root = project_root()
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)
