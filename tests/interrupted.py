"""Interrupts a run of all notebooks, again and again, and compares it with one that never was.

    python -m tests.interrupted profiles/short.yaml --kills 30

Each notebook runs by the papermill command of README. The ways take turns: Ctrl-C, a notebook's
process that is killed as when memory is short, and all processes killed as when the machine stops.
Each time the same command begins again; the last one is left to end.
"""

import argparse
import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from itertools import cycle
from pathlib import Path

import nbformat
import numpy as np
from tqdm import tqdm

from lib.files import read_json
from tools.report import OF_A_RUN

WAYS = ("Ctrl-C", "memory", "machine")
# What is measured with a clock, or chosen by it.
TIMES = re.compile(r"_ms\b|seconds|per_second|_times|speed|^index$|search_app")


def interrupt(command, notebook: Path, cell: int, delay: float, way: str, **where) -> str | None:
    """Start a run of notebooks, and interrupt it ``delay`` seconds after a cell's start.

    Returns what it printed; None if it ended before, as a run that goes on has less to do.
    """
    # What runs in the background of a script ignores Ctrl-C, and so do the processes it starts.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    start = time.time()
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, start_new_session=True, **where, **pipes) as process:
        while not has_started(notebook, cell, start):
            assert process.poll() is None, process.communicate()[0][-3000:]
            time.sleep(0.1)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(delay)
            return None
        kernels = kernels_of(process.pid)
        if way == "Ctrl-C":
            process.send_signal(signal.SIGINT)
        else:
            for pid in kernels + [process.pid] * (way == "machine"):
                os.kill(pid, signal.SIGKILL)
        printed, _ = process.communicate()
    assert process.returncode, printed[-3000:]
    return printed


def has_started(notebook: Path, cell: int, since: float) -> bool:
    """Whether papermill has come to a cell, as it notes in the notebook that it writes."""
    with contextlib.suppress(OSError, ValueError, nbformat.ValidationError):
        if notebook.stat().st_mtime > since:
            cells = nbformat.read(notebook, as_version=4).cells
            return cells[cell].metadata.papermill.status != "pending"
    return False


def kernels_of(pid: int) -> list[int]:
    """Process ids of the notebooks' processes that a process has started; Linux only."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    lines = {child: Path(f"/proc/{child}/cmdline").read_bytes() for child in children}
    return [int(child) for child, line in lines.items() if b"ipykernel" in line]


def moments(run: Path, n: int, seed: int = 1) -> list[tuple[str, int, float]]:
    """Spread n moments over a run: notebook, cell, and seconds from that cell's start."""
    cells = [
        (name, number, cell.metadata.papermill.duration or 0)
        for name in OF_A_RUN
        for number, cell in enumerate(nbformat.read(run / f"{name}.ipynb", as_version=4).cells)
        if cell.cell_type == "code"
    ]
    ends, rng = np.cumsum([duration for *_, duration in cells]), np.random.default_rng(seed)
    places = np.searchsorted(ends, (np.arange(n) + rng.random(n)) / n * ends[-1])
    return [(*cells[place][:2], rng.random() * cells[place][2]) for place in places]


def command(name: str, profile: str, run: Path) -> list[str]:
    """README's command for one notebook."""
    notebook = f"{name}.ipynb"
    places = [str(Path("notebooks") / notebook), str(run / notebook)]
    options = ["-f", profile, "-p", "run_dir", str(run), "-k", "python3", "--cwd", "notebooks"]
    return [sys.executable, "-m", "papermill", *places, *options, "--no-progress-bar"]


def without_times(metrics):
    """Metrics without what differs between two runs of the same."""
    if not isinstance(metrics, dict):
        return metrics
    return {k: without_times(v) for k, v in metrics.items() if not TIMES.search(k)}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.interrupted", description=__doc__)
    parser.add_argument("profile")
    parser.add_argument("--kills", type=int, default=30)
    options = parser.parse_args()
    whole, killed = Path("runs/whole").resolve(), Path("runs/killed").resolve()
    for folder in (whole, killed):
        folder.mkdir(parents=True, exist_ok=True)
    for name in OF_A_RUN:
        if not (whole / f"{name}.ipynb").is_file():
            subprocess.run(command(name, options.profile, whole), check=True)
    late, planned = 0, moments(whole, options.kills)
    ways = cycle(WAYS)
    for name in OF_A_RUN:
        again = command(name, options.profile, killed)
        bar = tqdm([moment for moment in planned if moment[0] == name], unit=" kills")
        for (_, cell, delay), way in zip(bar, ways, strict=False):
            bar.set_postfix_str(f"{name}, cell {cell}, {way}")
            late += interrupt(again, killed / f"{name}.ipynb", cell, delay, way) is None
        subprocess.run(again, check=True)
    one, other = (without_times(read_json(run / "metrics.json")) for run in (whole, killed))
    rubbish = [path.name for path in killed.rglob(".part-*")]
    print(
        f"{len(planned) - late} kills; the metrics are equal: {one == other}; left over: {rubbish}"
    )
    sys.exit(one != other or bool(rubbish))


if __name__ == "__main__":
    main()
