"""Ends command-line programs in one line on standard error, whatever went wrong.

@program(prefix="app: ")
def main(arguments: list[str] | None = None) -> int: ...
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path

from lib.files import show_path

_MOST = 1000  # letters of a line
_FULL = (errno.ENOSPC, errno.EDQUOT)
_TYPES = {"float": (int, float), "bool": (bool,), "int": (int,), "str": (str,)}
_TYPES |= {"list": (list,), "dict": (dict,)}


class UsageError(ValueError):
    """A parameter has a value that it can't have; the message names it."""


def as_path(text: str) -> Path:
    """Read a path for ``argparse``, with ``~``; an empty one, as of an unset variable, is refused.

    Raises:
        argparse.ArgumentTypeError: it is empty, which ``Path`` takes for the working directory.
    """
    if not text:
        raise argparse.ArgumentTypeError("the path is empty: name a file or folder")
    return Path(os.path.expanduser(text))


def one_line(text: str) -> str:
    """A text without line breaks, of at most 1,000 letters."""
    return " ".join(text.splitlines())[:_MOST]


def check_types(values: Mapping, types: Mapping[str, str], where: str) -> None:
    """Check the names and the types of parameters.

    Args:
        values: by name.
        types: of all that there are, by name, such as "float" (of which an int is one).
        where: the values stand, to begin the message with.

    Raises:
        UsageError: a name that is not in ``types``, or a value of another type.
    """
    if unknown := sorted(map(str, set(values) - set(types))):
        names = one_line(", ".join(unknown))[:500]
        raise UsageError(f"{where}: there is no {names}, but {', '.join(sorted(types))}")
    for name, value in values.items():
        if type(value) not in _TYPES[types[name]]:
            hint = ", such as 1.0e-3" if types[name] == "float" else ""  # YAML's 1e-3 is a text
            raise UsageError(
                f"{where}: {name} must be of type {types[name]}{hint}, not {value!r:.100}"
            )


def explain(error: Exception) -> str:
    """One line on an error for people: which file or parameter, what happened, and the cure."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text, cure = error.strerror, ": make room on the disk" if error.errno in _FULL else ""
        if isinstance(error.filename, str | bytes):
            text = f"{show_path(Path(os.fsdecode(error.filename)))}: {text}"
            cure = cure or ": check this path and your rights to it, or choose another"
        elif error.errno == errno.ENOENT:  # os.getcwd() names no file
            text = "the working directory was deleted: change to another"
        text += cure
    elif isinstance(error, MemoryError):
        text = f"memory is short: end other programs, or choose smaller values {text}"
    elif not text or not isinstance(error, OSError | ValueError | RuntimeError):
        # Perhaps a fault of this project: then the place is the most useful thing to report.
        frames = traceback.extract_tb(error.__traceback__)[-1:]
        place = "".join(f" in {Path(f.filename).name}, line {f.lineno}" for f in frames)
        text = f"{type(error).__name__}{place}: {text} (python -X dev shows more)"
    return one_line(text)


def program(prefix: str = "") -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Decorate a program's ``main``, which returns the exit status; ``prefix`` begins the line.

    The status is 2 for a UsageError, as ``argparse`` has it, 130 for Ctrl-C, and 1 for any other
    error. ``python -X dev`` keeps the tracebacks.
    """

    def decorate(main: Callable[..., int]) -> Callable[..., int]:
        @wraps(main)
        def run(arguments: list[str] | None = None) -> int:
            with contextlib.suppress(AttributeError):  # names that the terminal can't show
                sys.stdout.reconfigure(errors="backslashreplace")
            try:
                status = main(arguments)
                print(end="", flush=True)  # here, where a full disk or a closed pipe can be told
                return status
            except KeyboardInterrupt:
                line, status = "interrupted: run this again, what is done is kept", 130
            except Exception as error:
                if sys.flags.dev_mode:
                    raise
                line, status = explain(error), 2 if isinstance(error, UsageError) else 1
            with contextlib.suppress(OSError):
                print(prefix + line, file=sys.stderr)
            try:
                print(end="", flush=True)
            except OSError:  # else Python tries again at its end, and complains
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return status

        return run

    return decorate
