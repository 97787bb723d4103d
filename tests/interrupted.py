"""Interrupts a run of all notebooks, again and again, and compares it with one that never was.

    python -m tests.interrupted profiles/short.yaml --kills 30

The ways take turns: Ctrl-C, a notebook's process that is killed as when memory is short, and all
processes killed as when the machine stops. Each time the same command goes on.
"""

import argparse
import contextlib
import json
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

WAYS = ("Ctrl-C", "memory", "machine")
# What is measured with a clock, or chosen by it.
TIMES = re.compile(r"_ms\b|seconds|per_second|_times|speed|^index$|search_app")


def interrupt(command, notebook: Path, cell: int, delay: float, way: str, **where) -> None:
    """Start a run of notebooks, and interrupt it ``delay`` seconds after a cell's start."""
    start = time.time()
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, start_new_session=True, **where, **pipes) as process:
        while not has_started(notebook, cell, start):
            assert process.poll() is None, process.communicate()[0][-3000:]
            time.sleep(0.1)
        time.sleep(delay)
        kernels = kernels_of(process.pid)
        if way == "Ctrl-C":
            process.send_signal(signal.SIGINT)
        else:
            for pid in kernels + [process.pid] * (way == "machine"):
                os.kill(pid, signal.SIGKILL)
        printed, _ = process.communicate()
    if way != "machine":
        assert process.returncode == 1, printed[-3000:]
        assert printed.splitlines()[-1].startswith("Stopped: "), printed[-3000:]


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


def moments(run: Path, n: int, seed: int = 1):
    """Spread n moments over a run: notebook, cell, and seconds from that cell's start."""
    cells = [
        (path.name, number, cell.metadata.papermill.duration or 0)
        for path in sorted(run.glob("0*.ipynb"))
        for number, cell in enumerate(nbformat.read(path, as_version=4).cells)
        if cell.cell_type == "code"
    ]
    ends, rng = np.cumsum([duration for *_, duration in cells]), np.random.default_rng(seed)
    for moment in (np.arange(n) + rng.random(n)) / n * ends[-1]:
        name, number, duration = cells[np.searchsorted(ends, moment)]
        yield name, number, rng.random() * duration


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
    runs = [Path("runs/whole").resolve(), Path("runs/killed").resolve()]
    commands = [
        [sys.executable, "-m", "tools.pipeline", options.profile, "--run-dir", str(run)]
        for run in runs
    ]
    if not (runs[0] / "report.html").is_file():
        subprocess.run(commands[0], check=True)
    bar = tqdm([*moments(runs[0], options.kills)], unit=" kills")
    for (name, cell, delay), way in zip(bar, cycle(WAYS), strict=False):
        bar.set_postfix_str(f"{name}, cell {cell}, {way}")
        interrupt(commands[1], runs[1] / name, cell, delay, way)
    subprocess.run(commands[1], check=True)
    whole, killed = (without_times(json.loads((r / "metrics.json").read_text())) for r in runs)
    rubbish = [path.name for path in runs[1].rglob(".part-*")]
    print(f"{options.kills} kills; the metrics are equal: {whole == killed}; left over: {rubbish}")
    sys.exit(whole != killed or bool(rubbish))


if __name__ == "__main__":
    main()
