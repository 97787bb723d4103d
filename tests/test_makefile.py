"""`make` explains itself, and `make setup` says in plain words what a machine lacks.

Each test runs a copy of the Makefile, in a folder with a space in its name, with a PATH that holds
nothing but the shell's own tools and a made-up python3. Nothing is installed.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAKE = shutil.which("make")
TOOLS = ("awk", "cat", "mkdir", "rm", "touch", "uname")
REAL = f'exec "{sys.executable}" "$@"'

pytestmark = pytest.mark.skipif(MAKE is None, reason="make is not installed")


def make(tmp_path, *arguments, python3, **variables):
    """Run make in a bare copy of the project whose only interpreter is the given shell script."""
    project, tools = tmp_path / "a checkout", tmp_path / "bin"
    project.mkdir()
    tools.mkdir()
    for file in ("Makefile", "pyproject.toml", "requirements.lock"):
        shutil.copy(ROOT / file, project)
    for tool in TOOLS:
        os.symlink(shutil.which(tool), tools / tool)
    (tools / "python3").write_text(f"#!/bin/sh\n{python3}\n")
    (tools / "python3").chmod(0o755)
    environment = {"PATH": str(tools), "HOME": str(tmp_path), "PIP_CONFIG_FILE": os.devnull}
    result = subprocess.run(
        [MAKE, *arguments],
        cwd=project,
        env=environment | variables,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert not list(project.glob(".venv/.stamp*")), "nothing was installed, so no stamp"
    return result


def test_help_lists_the_commands(tmp_path):
    result = make(tmp_path, python3=REAL)
    assert result.returncode == 0, result.stderr
    commands = [line.split()[1] for line in result.stdout.splitlines()]
    assert commands == [
        "help",
        "setup",
        "demo",
        "course",
        "real",
        "app",
        "test",
        "test-long",
        "rehearse",
        "test-solutions",
        "backends",
        "cluster",
        "hub",
        "book",
        "test-cluster",
        "browser",
        "notebooks",
        "screenshots",
        "lab",
        "tensorboard",
        "report",
        "lint",
        "lock",
        "clean",
    ]


def test_keras_hub_is_installed_without_what_it_asks_for(tmp_path):
    # tensorflow-text would bring the package tensorflow, beside tensorflow-cpu.
    result = make(tmp_path, "--dry-run", "hub", "EXTRA=cpu", python3=REAL)
    assert result.returncode == 0, result.stderr
    line = next(line for line in result.stdout.splitlines() if "--no-deps `" in line)
    program = re.search(r"python -c '(.*?)' hub`", line)[1]
    command = [sys.executable, "-c", program, "hub"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert [name.split("==")[0] for name in found.split()] == ["keras-hub", "regex", "tokenizers"]


def test_setup_names_the_pythons_that_are_too_old(tmp_path):
    result = make(tmp_path, "setup", python3="echo 3.9.18")
    assert result.returncode != 0
    assert "needs Python 3.11, 3.12 or 3.13. Found: python3 (3.9.18)." in result.stderr


def test_setup_passes_over_a_python_that_does_not_run(tmp_path):
    result = make(tmp_path, "setup", python3="echo 3.12.1; exit 127")
    assert result.returncode != 0
    assert "Found: no Python at all." in result.stderr


def test_setup_says_that_venv_is_missing(tmp_path):
    no_venv = f'case "$*" in *ensurepip*|*venv*) exit 1;; esac; {REAL}'
    result = make(tmp_path, "setup", python3=no_venv)
    assert result.returncode != 0
    assert f"apt install python3.{sys.version_info.minor}-venv" in result.stderr
    assert "installing" not in result.stderr


@pytest.mark.long
def test_setup_says_that_nothing_could_be_installed(tmp_path):
    result = make(tmp_path, "setup", "EXTRA=cpu", python3=REAL, PIP_NO_INDEX="1")
    assert result.returncode != 0
    assert "Is a package index reachable?" in result.stderr
