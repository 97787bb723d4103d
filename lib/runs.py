"""Makes and opens run folders, which keep the notebooks' results and metrics.

run = open_run("")                    # the newest folder in runs/
record_metrics(run, training={"epochs": 6})
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

from lib.files import (
    only_writer,
    project_root,
    read_json,
    remove_half_written,
    show_path,
    write_json,
)


def new_run(runs: Path | None = None, now: Callable[[], datetime] = datetime.now) -> Path:
    """Make an empty folder ``runs/<date>_<time>`` and point ``runs/latest`` at it."""
    runs = runs or project_root() / "runs"
    runs.mkdir(parents=True, exist_ok=True)
    stamp = now().strftime("%Y-%m-%d_%H-%M-%S")
    for suffix in ("", *(f"-{number}" for number in range(2, 1000))):
        run = runs / f"{stamp}{suffix}"
        with contextlib.suppress(FileExistsError):  # another run started within this second
            run.mkdir()
            break
    link = runs / f".latest-{os.getpid()}"
    link.unlink(missing_ok=True)
    link.symlink_to(run.name, target_is_directory=True)
    link.replace(runs / "latest")
    return run


def open_run(run_dir: str, *, start_new: bool = False) -> Path:
    """Return the folder that a notebook writes to, without what killed notebooks left half-written.

    Args:
        run_dir: a folder relative to the project's root (made if absent), or "" for the newest run.
        start_new: with an empty ``run_dir``, make a new run instead.
    """
    run = project_root() / (run_dir or "runs/latest")
    if run_dir:
        run.mkdir(parents=True, exist_ok=True)
    elif start_new or not run.is_dir():
        return new_run()
    remove_half_written(run, subfolders=True)
    return run.resolve()


def record_metrics(run: Path, **sections: Any) -> Path:
    """Set sections of the run's ``metrics.json``; two notebooks may do so at once."""
    path = Path(run) / "metrics.json"
    with only_writer(path.parent, busy=None):
        metrics = read_json(path) if path.is_file() else {}
        if not isinstance(metrics, dict):
            raise ValueError(f"{show_path(path)} is no record of metrics: delete it")
        write_json(path, metrics | sections)
    return path
