"""Fetches files over the network: resumed after an interruption, checked, whole or not there.

archive = fetch(Remote("https://example.org/photos.tgz"), Path("Benchmarks/x"))
unpack(archive, Path("Benchmarks/x/jpg"))       # the photos alone, without folders
"""

from __future__ import annotations

import hashlib
import http.client
import shutil
import tarfile
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from lib.data.photos import SUFFIXES
from lib.files import replacing, show_error, show_path

_BLOCK = 2**20  # bytes
_SECONDS = 60  # without an answer
PART = ".arriving"  # after the name of a file that is not whole yet


class FetchError(RuntimeError):
    """A file can't be fetched, or is damaged; the message says how to get it by hand."""


@dataclass(frozen=True)
class Remote:
    """A file on a server.

    Attributes:
        url: http or https.
        sha256: its checksum, if it is known; "": not.
        md5: address of a text that begins with its MD5, if there is one.
    """

    url: str
    sha256: str = ""
    md5: str = ""

    @property
    def name(self) -> str:
        """Of the file."""
        return self.url.rsplit("/", 1)[-1]


def fetch(remote: Remote, folder: Path) -> Path:
    """Fetch a file into a folder, unless it is there; returns its path.

    An interrupted transfer goes on where it stopped, if the server can do that.

    Raises:
        FetchError: see there.
    """
    target = folder / remote.name
    if target.is_file():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + PART)
    try:
        _transfer(remote.url, part)
        _check(part, remote)
    except (OSError, ValueError, http.client.HTTPException) as error:  # urllib's are OSErrors
        raise FetchError(
            f"{remote.url} can't be fetched ({show_error(error)}): run this again, what has "
            f"arrived is kept; or put the file at {show_path(target)} by hand"
        ) from None
    part.replace(target)
    return target


def _transfer(url: str, part: Path) -> None:
    """Append to ``part`` what is missing of a file."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        answer = urllib.request.urlopen(request, timeout=_SECONDS)
    except urllib.error.HTTPError as error:
        if error.code == 416 and have:  # it has all of it; if not, the check says so
            return
        raise
    with answer:
        resumed = answer.status == 206
        length = int(answer.headers.get("Content-Length") or 0)
        have = have if resumed else 0
        bar = tqdm(total=have + length or None, initial=have, desc=part.stem, unit="B")
        bar.unit_scale = True
        with bar, part.open("ab" if resumed else "wb") as file:
            while block := answer.read(_BLOCK):
                file.write(block)
                bar.update(len(block))
            if length and file.tell() < have + length:
                raise ConnectionError(f"the connection broke after {file.tell():,} bytes")


def _check(part: Path, remote: Remote) -> None:
    """Compare checksums; a damaged file is deleted."""
    wanted = {"sha256": remote.sha256}
    if remote.md5:
        with urllib.request.urlopen(remote.md5, timeout=_SECONDS) as answer:
            wanted["md5"] = answer.read(32).decode("ascii", "replace")
    for kind, digest in wanted.items():
        with part.open("rb") as file:
            if digest and hashlib.file_digest(file, kind).hexdigest() != digest:
                part.unlink()
                raise ValueError(f"it arrived damaged, as its {kind} is not the published one")


def unpack(archive: Path, folder: Path) -> int:
    """Unpack the photos of a tar archive into one folder, all or none; returns how many.

    Folders within the archive are left out of the names; what is no photo is not unpacked.

    Raises:
        FetchError: the archive is damaged or cut off; nothing is unpacked.
    """
    arriving = folder.with_name(f"{folder.name}{PART}.{archive.name}")
    shutil.rmtree(arriving, ignore_errors=True)
    arriving.mkdir(parents=True)
    try:
        with tarfile.open(archive) as tar:
            for member in tqdm(tar, desc=f"unpacking {archive.name}", unit=" files"):
                name = PurePosixPath(member.name).name
                if member.isfile() and Path(name).suffix.lower() in SUFFIXES:
                    source = tar.extractfile(member)
                    with source, (arriving / name).open("wb") as file:
                        shutil.copyfileobj(source, file)
    except (tarfile.TarError, EOFError, OSError, ValueError) as error:
        shutil.rmtree(arriving, ignore_errors=True)
        raise FetchError(
            f"{show_path(archive)} can't be unpacked ({show_error(error)}): delete it, and run "
            "this again to fetch it anew"
        ) from None
    photos = sorted(arriving.iterdir())
    folder.mkdir(parents=True, exist_ok=True)
    begun = folder / f".{archive.name}{PART}"  # tells these photos from somebody's own
    begun.touch()
    for photo in photos:
        photo.replace(folder / photo.name)
    arriving.rmdir()
    with replacing(folder / f".{archive.name}.unpacked") as part:
        part.write_text(f"{len(photos)} photos\n")
    begun.unlink()
    return len(photos)


def is_unpacked(archive_name: str, folder: Path) -> bool:
    """Whether :func:`unpack` has unpacked an archive of that name into ``folder``."""
    return (folder / f".{archive_name}.unpacked").is_file()


def is_begun(archive_name: str, folder: Path) -> bool:
    """Whether it has, or was interrupted while it moved the photos there."""
    return is_unpacked(archive_name, folder) or (folder / f".{archive_name}{PART}").is_file()
