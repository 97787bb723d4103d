"""Downloads the Kaggle set and verifies that all of its shards are complete.

Each shard is checked before it is moved into the folder. ``SHA256SUMS`` there keeps the checksums:

    download(Path("Dataset"))   # missing shards; or: python -m tools.download [--shards 0 1]
    verify(Path("Dataset"))     # fetches nothing; or: python -m tools.download --verify
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import hashlib
import os
import re
import shutil
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd
from tqdm import tqdm

from lib.data.records import (
    RecordError,
    find_shards,
    parse_triplet,
    read_message,
    scan_frames,
    shard_name,
)
from lib.files import project_root, remove_half_written, replacing, show_path
from lib.programs import as_path, program

KAGGLE_SET = "mattbast/google-landmarks-2020-tfrecords"
KAGGLE_PAGE = f"https://www.kaggle.com/datasets/{KAGGLE_SET}"
# Records of each shard. The last shard has the remainder; its number is not published.
KAGGLE_COUNTS: Mapping[int, int | None] = {n: 10_841 for n in range(15)} | {15: None}
KAGGLE_GB = 5  # upper bound: the output of a Kaggle notebook, as this set, may have 4.9 GB

CHECKSUMS = "SHA256SUMS"
ARRIVING = ".download"  # subfolder for files not checked yet

HOW_TO_SIGN_IN = (
    "make an API token on https://www.kaggle.com/settings and put it into the environment variable "
    "KAGGLE_API_TOKEN or the file ~/.kaggle/access_token (a token of the older kind: into "
    "KAGGLE_USERNAME and KAGGLE_KEY, or ~/.kaggle/kaggle.json)"
)


class DownloadError(RuntimeError):
    """The set can't be fetched or is incomplete; the message says in one line what to do."""


def download(dataset_dir: Path, expected: Mapping[int, int | None] = KAGGLE_COUNTS) -> pd.DataFrame:
    """Fetch missing shards, then verify all. Existing files are never replaced.

    After an interruption the next call continues, even within a shard.

    Args:
        dataset_dir: the folder; made if absent.
        expected: number of records by number of the shard (None: at least one record).

    Returns:
        see :func:`verify`.

    Raises:
        DownloadError: a shard can't be fetched, is damaged or has a wrong number of records.
        OSError: the folder can't be written to.
    """
    dataset_dir = Path(dataset_dir)
    dataset_dir.mkdir(parents=True, exist_ok=True)
    remove_half_written(dataset_dir)  # each may be a whole shard
    sums = _read_checksums(dataset_dir)
    for number, count in expected.items():
        target = dataset_dir / shard_name(number)
        if target.exists():
            continue
        arrived = _fetch(target.name, dataset_dir)
        if problem := _check(arrived, count, sums.get(target.name))["problem"]:
            arrived.unlink()  # else kagglehub would take it for complete
            raise DownloadError(f"{target.name} came, but {problem}: run this again to refetch it")
        with replacing(target) as part:
            arrived.replace(part)
    shutil.rmtree(dataset_dir / ARRIVING, ignore_errors=True)
    return verify(dataset_dir, expected)


def verify(
    dataset_dir: Path, expected: Mapping[int, int | None] | None = KAGGLE_COUNTS
) -> pd.DataFrame:
    """Check every record's checksums, the number of records, and the files' SHA-256.

    If all are right, shards that ``SHA256SUMS`` does not list yet are added to it.

    Args:
        dataset_dir: the folder.
        expected: see :func:`download`; None checks all shards that exist, of any number of records.

    Returns:
        a row for each shard, indexed by file name: records, bytes, sha256.

    Raises:
        lib.data.records.DatasetNotFoundError: a shard is missing.
        DownloadError: a shard is damaged, has a wrong number of records, or has changed.
    """
    dataset_dir = Path(dataset_dir)
    shards = find_shards(dataset_dir, expected)
    counts = {shard_name(n): count for n, count in (expected or {}).items()}
    sums = _read_checksums(dataset_dir)
    rows, size = [], sum(shard.stat().st_size for shard in shards)
    with (
        ThreadPoolExecutor() as pool,
        # disable=None: no bar in a log file, where an error should be the only line
        tqdm(total=size, desc="checking", unit="B", unit_scale=True, disable=None) as bar,
    ):
        for row in pool.map(lambda s: _check(s, counts.get(s.name), sums.get(s.name)), shards):
            rows.append(row)
            bar.update(row["bytes"])
    if problems := [f"{row['shard']} {row['problem']}" for row in rows if row["problem"]]:
        raise DownloadError(
            f"{show_path(dataset_dir)}: {'; '.join(problems)}. Take such a shard away, and "
            "python -m tools.download fetches it anew; if it is as you want it, delete "
            f"{CHECKSUMS}."
        )
    table = pd.DataFrame(rows).set_index("shard").drop(columns="problem")
    if (known := sums | table["sha256"].to_dict()) != sums:
        text = "".join(f"{digest}  {name}\n" for name, digest in sorted(known.items()))
        # A read-only folder can be verified, too. Bytes, as sha256sum needs "\n" on Windows.
        with contextlib.suppress(OSError), replacing(dataset_dir / CHECKSUMS) as part:
            part.write_bytes(text.encode())
    return table


def _check(shard: Path, count: int | None, sha256: str | None) -> dict:
    """Read a whole shard; returns its row of :func:`verify` and its ``problem`` ("" if none)."""
    records, damage, problem = 0, [], ""
    with shard.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        for frame in scan_frames(shard):
            records += 1
            try:
                parse_triplet(read_message(file, frame))
            except RecordError as error:
                damage.append(f"record {frame.number} (counted from 0): {error}")
    if damage:
        problem = f"has {len(damage)} damaged of {records} records, first {damage[0]}"
    elif not records or (count is not None and records != count):
        problem = f"holds {records} records instead of {count or 'at least 1'}"
    elif sha256 and digest != sha256:
        problem = f"is not the file it was (its SHA-256 is not the one in {CHECKSUMS})"
    row = {"shard": shard.name, "records": records, "bytes": shard.stat().st_size}
    return row | {"sha256": digest, "problem": problem}


def _read_checksums(dataset_dir: Path) -> dict[str, str]:
    """Read ``SHA256SUMS`` (the format of the command sha256sum): SHA-256 by file name."""
    path = dataset_dir / CHECKSUMS
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    return {name: digest for digest, name in re.findall(r"(?m)^([0-9a-f]{64}) [ *](.+)$", text)}


def _fetch(name: str, dataset_dir: Path) -> Path:
    """Download one file of the set; returns its path below the data folder."""
    import kagglehub  # here: it takes half a second, and verify() does not need it

    # Only in its cache, not in ``output_dir``, does kagglehub resume half a file. The caches of
    # Kaggle and Colab are off, since they would mount files that can't be moved.
    settings = {"KAGGLEHUB_CACHE": str(dataset_dir.resolve() / ARRIVING)}
    settings |= dict.fromkeys(("DISABLE_KAGGLE_CACHE", "DISABLE_COLAB_CACHE"), "1")
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        return Path(kagglehub.dataset_download(KAGGLE_SET, name))
    except Exception as error:  # kagglehub's exceptions have no common base class
        raise DownloadError(_explain(error, name, dataset_dir)) from error
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _explain(error: Exception, name: str, dataset_dir: Path) -> str:
    """One line on what went wrong in :func:`_fetch` and how to mend it."""
    from kagglehub.exceptions import CredentialError, DataCorruptionError, UnauthenticatedError

    cause = getattr(error.args[0], "reason", error) if error.args else error  # urllib3's is shorter
    reason = " ".join(str(cause).split())
    status = getattr(getattr(error, "response", None), "status_code", None)
    number = getattr(error, "errno", None)
    again = "run this again, what has arrived is kept"
    broken_file = isinstance(error, ValueError) and "credentials file" in reason
    if status == 401 or broken_file or isinstance(error, CredentialError | UnauthenticatedError):
        return f"Kaggle has no valid credentials of yours ({status or reason}): {HOW_TO_SIGN_IN}"
    if status == 403:
        terms = f"open {KAGGLE_PAGE}, sign in, accept the terms if it asks for that"
        return f"Kaggle refuses {name} (403 Forbidden): {terms}, and {HOW_TO_SIGN_IN}"
    if status == 404:
        return f"Kaggle has no {name} (404 Not Found): look at {KAGGLE_PAGE} if the set was changed"
    if status:
        return f"Kaggle answered {status} when asked for {name} ({reason}): try again later"
    if isinstance(error, DataCorruptionError):
        return f"{name} was damaged on its way (wrong MD5): run this again to refetch it"
    if number in (errno.ENOSPC, errno.EDQUOT):
        free = f"{shutil.disk_usage(dataset_dir).free / 1e9:.1f} GB free"
        need = f"the whole set takes up to {KAGGLE_GB} GB"
        return f"the disk of {show_path(dataset_dir)} is full ({free}; {need}): make room, {again}"
    if isinstance(error, OSError) and number is None:  # of requests; the disk's have a number
        return f"no connection to Kaggle, or it broke ({reason}): check the network and {again}"
    return f"{name} could not be fetched ({type(error).__name__}: {reason})"


@program()
def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.download", description=f"Fetch {KAGGLE_PAGE} and check it."
    )
    parser.add_argument("--dataset-dir", type=as_path, help="default: the project's folder Dataset")
    shards = {"nargs": "+", "type": int, "choices": KAGGLE_COUNTS, "metavar": "NUMBER"}
    parser.add_argument("--shards", **shards, help="these alone; one has 300 MB of some 5 GB")
    parser.add_argument("--verify", action="store_true", help="check what is there, fetch nothing")
    options = parser.parse_args(arguments)
    dataset_dir = options.dataset_dir or project_root() / "Dataset"
    expected = {number: KAGGLE_COUNTS[number] for number in options.shards or KAGGLE_COUNTS}
    table = (verify if options.verify else download)(dataset_dir, expected)
    print(table[["records", "bytes"]].to_string(formatters=dict.fromkeys(table, "{:,}".format)))
    print(f"All whole: {table['records'].sum():,} records, {table['bytes'].sum():,} bytes.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
