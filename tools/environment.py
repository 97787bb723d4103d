"""Records what a run ran on: versions, the commit, and when it started.

record_environment(run, profile="gldv2.yaml")    # -> run / "environment.json"
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from lib.files import project_root, read_json, write_json

ENVIRONMENT = "environment.json"
PACKAGES = (
    "keras",
    "keras-hub",
    "tensorflow",
    "tensorflow-cpu",
    "jax",
    "torch",
    "faiss-cpu",
    "numpy",
)


def environment() -> dict[str, Any]:
    """What this process runs on, in a form for JSON, without names of machines or folders.

    Returns:
        ``python`` and ``platform``; ``keras_backend``; ``versions`` of those of ``PACKAGES`` that
        are installed; ``commit`` of this project and whether there are ``uncommitted_changes``,
        both None where there is no git repository.
    """
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    commit, changed = commit_of(project_root())
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "keras_backend": _keras_backend(),
        "versions": versions,
        "commit": commit,
        "uncommitted_changes": changed,
    }


def record_environment(run: Path, profile: str = "", notebooks: Sequence[str] = ()) -> Path:
    """Write ``environment.json`` into a run's folder, for the report. Call it when the run starts.

    A run that is continued keeps its latest start.

    Args:
        run: the folder.
        profile: name of the profile that the run was started with; "" for none.
        notebooks: names of those that it runs; () for all.
    """
    path = Path(run) / ENVIRONMENT
    started = datetime.now().isoformat(sep=" ", timespec="seconds")
    write_json(
        path, {"started": started, "profile": profile, "notebooks": list(notebooks)} | environment()
    )
    return path


def _keras_backend() -> str:
    """What Keras chooses when it is imported, which would take seconds and load the backend."""
    if chosen := os.environ.get("KERAS_BACKEND"):
        return chosen
    home = Path(os.environ.get("KERAS_HOME") or Path.home() / ".keras")
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return str(read_json(home / "keras.json")["backend"])
    return "tensorflow"


def commit_of(root: Path) -> tuple[str | None, bool | None]:
    """The commit in ``root``, and whether files differ from it."""

    def git(*arguments: str) -> str:
        # No optional locks: a report must not get in the way of someone's commit.
        command = ["git", "--no-optional-locks", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    try:
        # A copy without .git that lies in another repository is not at that one's commit.
        if git("rev-parse", "--show-prefix").strip():
            return None, None
        return git("rev-parse", "HEAD").strip(), bool(git("status", "--porcelain").strip())
    except (OSError, subprocess.CalledProcessError):
        return None, None
