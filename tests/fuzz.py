"""Damages files in thousands of ways and has the library read them: ``python -m tests.fuzz``.

Each file comes from the library itself, then bits are flipped, blocks cut, swapped and repeated,
numbers made huge. A reader may raise its own type of error, or return a correct result. All else is
a fault: another error, a crash, a file that takes more than 10 s or 1 GB, or an endless message.

The same seed makes the same files; ``--readers index --only 17 --keep folder`` keeps one of them.
"""

import argparse
import contextlib
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
import warnings
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lib.programs import as_path
from tests import fuzz_cases
from tests.fuzz_cases import READERS, Case

SECONDS, BYTES, LETTERS = 10, 2**30, 3000  # that a file may take, and its error's message
HANGING = 60  # seconds after which a child is ended
STARTING = 300  # seconds in which it has imported the library and made the files
FAULTS = ("wrong error", "wrong result", "crashed", "slow", "memory")


# ---- damage

WORDS = [
    b"[" * 3000,
    b'{"a":' * 3000,
    b"9" * 30,
    b"-1",
    b"1e999",
    b"NaN",
    b"null",
    b"\0",
    b'"',
    b",",
]
WORDS += [b"\n", b"\r", b"\xff\xfe", b"\xef\xbb\xbf", b"'", b"&a [*a, *a]", b": ", b"\xff\xda"]
NUMBERS = [0, 2**15, 2**31 - 1, 2**32 - 1, 2**40, 2**63 - 1]


def damaged(data: bytes, rng: np.random.Generator) -> bytes:
    """Damage ``data`` in one place."""
    n = len(data)
    near = int(rng.integers(min(n, 256) + 1))  # headers and lists of contents are near the ends
    at = int(rng.choice([rng.integers(n + 1), near, n - near]))
    size = int(rng.choice([1, 2, 4, 8, 64, 1000]))
    before, block, after = data[:at], data[at : at + size], data[at + size :]
    other = int(rng.integers(n + 1))
    number = NUMBERS[rng.integers(len(NUMBERS))].to_bytes(8, rng.choice(["little", "big"]))
    number = [number, number[:4], number[4:]][rng.integers(3)]
    word = WORDS[rng.integers(len(WORDS))]
    results = [
        data[:at] + bytes([data[at] ^ 1 << rng.integers(8)]) + data[at + 1 :] if at < n else b"",
        before + rng.bytes(size) + after,
        before + bytes([rng.choice([0, 255])]) * size + after,
        before,
        before + after,
        before + rng.bytes(size) + data[at:],
        before + block * int(rng.choice([2, 3, 1000])) + after,
        data[:other] + block + data[other + size :],
        before + data[other : other + size] + data[at:],
        before + number + data[at + len(number) :],
        before + word + data[at:],
        before + word + data[at + len(word) :],
        data + rng.bytes(size) * int(rng.choice([1, 1000])),
        data + bytes(int(rng.choice([1, 2**20]))),
    ]
    return results[rng.integers(len(results))]


# ---- a child process, which may crash, and its parent


def work(name: str, seed: int, numbers: list[int], keep: Path | None, send) -> None:
    """Send what could not be made, if anything; then a Trial for each number."""
    warnings.simplefilter("ignore")
    for output in (1, 2):  # libraries in C write there
        os.dup2(os.open(os.devnull, os.O_WRONLY), output)
    with tempfile.TemporaryDirectory() as root:
        (whole := Path(root) / "whole").mkdir()
        try:
            case = getattr(fuzz_cases, name)(whole)
            results = {path: case.read(copied(path, path.read_bytes())) for path in case.files}
        except Exception as error:
            return send.send(f"{type(error).__name__}: {error}")
        send.send("")
        limit_memory()
        for number in numbers:
            rng = np.random.default_rng([seed, zlib.crc32(name.encode()), number])
            path = case.files[rng.integers(len(case.files))]
            data = path.read_bytes()
            for _ in range(rng.integers(1, 4)):
                data = damaged(data, rng)
            if keep:
                (keep / f"{name}-{number}{path.suffix}").write_bytes(data)
            send.send(try_on(case, copied(path, data), results[path], number))


def copied(path: Path, data: bytes) -> Path:
    """Copy the folder of ``path``, over the copy before; ``path`` there, with this content."""
    copy = path.parent.with_name("copy")
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(path.parent, copy)
    (copy / path.name).write_bytes(data)
    return copy / path.name


class Trial(NamedTuple):
    number: int
    outcome: str
    message: str
    seconds: float
    bytes: int


def try_on(case: Case, path: Path, expected: Any, number: int) -> Trial:
    before, start, message = peak_memory(), time.monotonic(), ""
    try:
        result = case.read(path)
        outcome = "wrong result" if case.exact and result != expected else "read"
    except case.error as error:
        outcome, message = "refused", str(error)
        if len(message) > LETTERS:
            outcome, message = "wrong error", f"of {len(message)} letters: {message[:LETTERS]}"
    except BaseException as error:
        outcome, message = "wrong error", f"{type(error).__name__}: {str(error)[:LETTERS]}"
    return Trial(number, outcome, message, time.monotonic() - start, peak_memory() - before)


def peak_memory() -> int:
    """Bytes of memory that this process has held at most since the last call."""
    status = Path("/proc/self/status").read_text()
    Path("/proc/self/clear_refs").write_text("5")  # begins a new measurement
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def limit_memory() -> None:
    """Let a reader that asks for far too much fail, instead of the whole machine."""
    import resource

    size = 1024 * int(Path("/proc/self/status").read_text().partition("VmSize:")[2].split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (size + 4 * BYTES, -1))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def attack(name: str, seed: int, numbers: list[int], keep: Path | None) -> Counter:
    """Try a reader on the damaged files of these numbers; prints each fault."""
    counts, numbers = Counter(), list(numbers)
    context = multiprocessing.get_context("forkserver")

    def count(outcome: str, number: int, message: str = "") -> None:
        counts[outcome] += 1
        if outcome in FAULTS:
            print(f"{name} {number}: {outcome} {message[:300]!a}", file=sys.stderr, flush=True)

    while numbers:
        receive, send = context.Pipe(duplex=False)
        child = context.Process(target=work, args=(name, seed, numbers, keep, send))
        child.start()
        send.close()
        with contextlib.suppress(EOFError), receive:
            problem = receive.recv() if receive.poll(STARTING) else "too slow"
            if problem:
                raise SystemExit(f"{name}: its files can't be made: {problem}")
            while numbers and receive.poll(HANGING):
                trial = Trial(*receive.recv())
                numbers.remove(trial.number)
                count(trial.outcome, trial.number, trial.message)
                if trial.seconds > SECONDS:
                    count("slow", trial.number, f"{trial.seconds:.0f} s")
                if trial.bytes > BYTES:
                    count("memory", trial.number, f"{trial.bytes / BYTES:.1f} GB")
            if numbers:
                child.kill()
        child.join()
        if numbers:
            outcome = "slow" if child.exitcode == -signal.SIGKILL else "crashed"
            count(outcome, numbers.pop(0), f"exit code {child.exitcode}")
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--files", type=int, default=2000, help="for each reader")
    parser.add_argument("--readers", nargs="+", choices=READERS, default=READERS)
    parser.add_argument("--only", type=int, help="the number of one file, as a fault names it")
    parser.add_argument("--keep", type=as_path, help="a folder to keep the damaged files in")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    numbers = range(options.files) if options.only is None else [options.only]
    if options.keep:
        options.keep.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    if len(options.readers) > 1:  # imported once; from then on a child starts at once
        multiprocessing.set_forkserver_preload(list(fuzz_cases.LIBRARIES))
    with ThreadPoolExecutor(options.processes) as threads:
        counts = threads.map(
            lambda name: attack(name, options.seed, numbers, options.keep), options.readers
        )
        columns = ("refused", "read", *FAULTS)
        print("".join(f"{column:>17}" for column in ("reader", "files", *columns)), flush=True)
        faults = 0
        for name, of in zip(options.readers, counts, strict=True):
            cells = (name, len(numbers), *(of[column] for column in columns))
            print("".join(f"{cell:>17}" for cell in cells), flush=True)
            faults += sum(of[fault] for fault in FAULTS)
    print(f"{faults} faults; seed {options.seed}, {time.monotonic() - start:.0f} s")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
