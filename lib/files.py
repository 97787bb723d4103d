"""Files that are either whole or absent, locks between processes, paths for messages.

with replacing(path) as part:         # part is renamed to path if the block succeeds
    part.write_text("...")
with only_writer(folder, BusyError("another process writes there")):
    remove_half_written(folder)       # what a killed process left
for line, (image, role) in read_table(path, ["image", "role"], ValueError):
    ...
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
import os
import re
import secrets
import sys
import zipfile
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

import xxhash

_PART = ".part-"  # begins the names of files that are being written
_LARGEST_TABLE = 32_000_000  # bytes
_END = "\0end"  # follows the last line of a table
_NO_TEXT = re.compile("[\0-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def project_root(start: Path | None = None) -> Path:
    """The folder with ``environment.yml`` and ``lib``, found by walking up from ``start``.

    JupyterLab, nbval and papermill start a kernel in different folders; this makes them agree.

    Args:
        start: None: the working directory or, if it is in no project, this file.

    Raises:
        FileNotFoundError: none of these folders, nor one above them, holds both.
    """
    starts = [start] if start else [Path(os.curdir), Path(__file__)]
    for place in starts:
        with contextlib.suppress(OSError):  # the working directory was deleted
            place = Path(place).resolve()
            for folder in (place, *place.parents):
                # Other projects have an environment.yml, too.
                if all((folder / name).is_file() for name in ("environment.yml", "lib/files.py")):
                    return folder
    hint = "work inside the project's folder"
    raise FileNotFoundError(f"no environment.yml in {starts[0]} or above it: {hint}")


def show_path(path: Path) -> str:
    """A path for messages: relative to the project if it lies inside, else absolute.

    It never raises, since error handlers call it. Line breaks and other control characters in a
    name are escaped, as are bytes that are not UTF-8.
    """
    # The working directory was deleted; a null byte in the path; no project.
    with contextlib.suppress(OSError, ValueError):
        # realpath, as Path.resolve() raises on links that form a loop.
        path = Path(os.path.realpath(path))
        path = path.relative_to(project_root())
    return show_name(Path(path).as_posix())


def show_name(name: str) -> str:
    """A file's or folder's name as text; line breaks and what is not UTF-8 are escaped."""
    return _NO_TEXT.sub(lambda c: ascii(c[0])[1:-1], name)


def first_writable(*folders: Path) -> Path:
    """The first folder that files can be written to, made if absent, or else the last."""
    for folder in folders:
        with contextlib.suppress(OSError):  # a read-only disk, a file in its place
            folder.mkdir(parents=True, exist_ok=True)
            if os.access(folder, os.W_OK):
                return folder
    return folders[-1]


def or_cache(folder: Path) -> Path:
    """A folder that programs keep something in, or one in the user's cache if it is read-only.

    It is made if absent. A line on standard error names the one in the cache.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    place = first_writable(folder, cache / "image-retrieval-system" / folder.name)
    if place != folder:
        instead = f"{show_path(place)} is used instead"
        print(f"{show_path(folder)} can't be written to: {instead}", file=sys.stderr)
    return place


def show_error(error: BaseException) -> str:
    """The first line of an error's message, or the error's type if there is no message.

    It is cut after 500 letters: libraries quote what a damaged file holds.
    """
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:500]


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write a file so that it is either whole or absent.

    Yields the path of a temporary file in the same folder, which is flushed to the disk and renamed
    to ``path`` in one step. If the block fails, it is removed and the previous file stays.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # It ends like the final name: writers such as Keras choose the format by that.
    part = path.with_name(f"{_PART}{secrets.token_hex(4)}-{path.name}")
    with _sign_of_life(part), naming(path, part):
        # Not tempfile: its files are private, and these get the permissions of ordinary new ones.
        os.close(os.open(part, os.O_CREAT | os.O_EXCL, 0o666))
        try:
            yield part
            with part.open("rb+") as file:
                os.fsync(file.fileno())
            part.replace(path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
    with contextlib.suppress(OSError):  # some systems can't open folders
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # makes the rename survive a power cut
        finally:
            os.close(folder)


@contextlib.contextmanager
def naming(path: Path, part: Path | None = None) -> Iterator[None]:
    """Let errors of the block name ``path`` if they name no file, as a full disk's, or ``part``."""
    try:
        yield
    except OSError as error:
        if error.errno and error.filename in (None, str(part)):
            error.filename = str(path)
        raise


@contextlib.contextmanager
def _sign_of_life(part: Path) -> Iterator[None]:
    """Hold the lock beside a half-written file; a filelock.Timeout if a live writer holds it."""
    import filelock  # here: 0.1 s, which a process that only reads need not wait

    lock = Path(f"{part}.lock")  # not the file itself: HDF5 locks what it writes
    held = filelock.FileLock(lock, timeout=0).acquire()  # here: a Timeout leaves the other's lock
    try:
        with held:
            yield
    finally:
        with contextlib.suppress(PermissionError):  # Windows keeps files that others have open
            lock.unlink(missing_ok=True)


def remove_half_written(folder: Path, subfolders: bool = False) -> None:
    """Remove the temporary files of :func:`replacing` whose writers have died.

    They are looked for in ``folder``, which may be absent, and maybe in all folders below.
    """
    import filelock

    # Not rglob, which fails where another process removes a folder meanwhile.
    found = {
        Path(top) / name.removesuffix(".lock")
        for top, _, files in islice(os.walk(folder), None if subfolders else 1)
        for name in files
        if name.startswith(_PART)
    }
    for part in found:
        # OSError: the folder is read-only, or a reader has the file open on Windows.
        with contextlib.suppress(filelock.Timeout, OSError), _sign_of_life(part):
            part.unlink(missing_ok=True)


@contextlib.contextmanager
def only_writer(folder: Path, busy: Exception | None, patience: float = 0) -> Iterator[None]:
    """Keep other processes and threads out; the system lifts the lock when the process dies.

    ``busy`` is raised if another process holds the lock, the file ``.lock``, for ``patience``
    seconds; None: wait for it.
    """
    import filelock

    try:
        lock = filelock.FileLock(folder / ".lock", timeout=patience if busy else -1).acquire()
    except filelock.Timeout:
        raise busy from None
    with lock:
        yield


def write_json(path: Path, content: Any) -> None:
    """Write ``content`` as indented JSON, atomically."""
    with replacing(path) as part:
        part.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Read a JSON file; a ValueError that names it if it is not JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # of Unicode, too; nested too deep
        raise ValueError(f"{path} is not valid JSON ({error}): delete it") from error


def checksum_of_manifest(manifest: dict[str, Any]) -> str:
    """XXH3 of all entries except ``xxh3``."""
    content = {key: value for key, value in manifest.items() if key != "xxh3"}
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())


def check_stored(archive: zipfile.ZipFile) -> None:
    """Raise a ValueError unless the archive's files are uncompressed and not larger than it.

    Then reading them takes no more memory than the archive has bytes.
    """
    size = os.fstat(archive.fp.fileno()).st_size
    for entry in archive.infolist():
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > size:
            raise ValueError(f"{entry.filename} is compressed or larger than the file")


def checksum(path: Path) -> str:
    """XXH3 of a file's content, 32 hexadecimal digits: finds damage, not forgery."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()


def read_table(
    path: Path,
    columns: Sequence[str],
    error: type[ValueError],
    errors: str = "strict",
    limit: int = _LARGEST_TABLE,
) -> Iterator[tuple[int, list[str]]]:
    """Read columns of a CSV file as people's spreadsheets write it.

    It is UTF-8 or UTF-16, with commas, semicolons or tabs. Case and spaces in the header, blank
    rows, other columns and Excel's first line ``sep=;`` make no difference. It is read as the rows
    are taken, so what precedes a fault has been yielded.

    Args:
        path: of the file.
        columns: names in the header.
        error: type of the errors, whose message names the line.
        errors: how bytes are treated that do not fit the encoding, see :meth:`bytes.decode`.
        limit: bytes that the file has at most.

    Yields:
        the line in which a row begins, from 1, and its cells of ``columns``; "" for absent cells.
    """
    where, line, before, encoding = show_path(path), 1, 1, "utf-8-sig"
    rows = csv.reader(())
    try:
        if not Path(path).is_file():  # a pipe would wait for ever
            raise OSError("there is no such file")
        with Path(path).open("rb") as file:
            if os.fstat(file.fileno()).st_size > limit:
                raise OSError(f"it has more than {limit / 1e6:.0f} MB")
            mark = file.peek(2)[:2]
            if mark in (b"\xff\xfe", b"\xfe\xff"):
                encoding = "utf-16"
            elif 0 in mark:  # UTF-16 without its mark: the other byte of a Latin letter is 0
                encoding = "utf-16-le" if mark[0] else "utf-16-be"
            lines = io.TextIOWrapper(file, encoding, errors, newline="")
            first = next(lines, "")
            while first and (not first.strip(',;"\t\r\n ') or first.lower().startswith("sep=")):
                before += 1
                first = next(lines, "")
            line, comma = before, max(",;\t", key=first.count)
            padded = f"{comma} " in first
            source = chain([first], lines, [_END])
            rows = csv.reader(source, delimiter=comma, skipinitialspace=padded)
            header = [cell.strip().casefold() for cell in next(rows)]
            if any(header.count(column.casefold()) != 1 for column in columns):
                found = ",".join(header).encode(errors="replace").decode()[:200]
                raise ValueError(f"the columns must be {','.join(columns)}, not {found}")
            places = [header.index(column.casefold()) for column in columns]
            line = before + rows.line_num
            for cells in rows:
                if cells == [_END]:
                    return
                if cells and cells[-1].endswith(_END):
                    raise ValueError("a quotation mark is not closed")
                if any(map(str.strip, cells[len(header) :])):
                    raise ValueError(
                        "it has more cells than the header; text that contains "
                        f"{comma!r} must be in quotation marks"
                    )
                if any(map(str.strip, cells)):
                    yield line, [cells[i] if i < len(cells) else "" for i in places]
                line = before + rows.line_num
    except OSError as problem:
        raise error(f"{where} can't be read as a CSV file: {problem}") from None
    except (UnicodeDecodeError, csv.Error) as problem:
        if isinstance(problem, UnicodeDecodeError):
            # It is in the bytes that were to complete the line after those that were given out.
            line = before + rows.line_num + problem.object.count(b"\n", 0, problem.start)
            problem = problem.reason
        hint = f"it can't be read as a CSV file, save it as 'CSV UTF-8' ({problem})"
        raise error(f"{where}, line {line}: {hint}") from None
    except ValueError as problem:
        raise error(f"{where}, line {line}: {problem}") from None
