"""How much memory a benchmark's process takes (Linux)."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time


def memory_gb(field: str, pid: int | str = "self") -> float:
    """A field of what the system knows of a process, in GB: VmHWM, RssAnon and so on."""
    with open(f"/proc/{pid}/status") as file:
        (line,) = (line for line in file if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024 / 1e9


class OwnMemory(threading.Thread):
    """Watches what this process takes for itself; ``most`` is the most so far, in GB.

    With ``workers``, those of its process pools are added. ``most_resident`` counts the pages of
    files, too, and those that several processes share once for each of them.
    """

    def __init__(self, workers: bool = False):
        super().__init__(daemon=True)
        self.most = self.most_resident = 0.0
        self._workers = workers

    def run(self) -> None:
        while True:
            children = multiprocessing.active_children() if self._workers else []
            pids = [os.getpid(), *(child.pid for child in children)]
            self.most = max(self.most, _total("RssAnon", pids))
            self.most_resident = max(self.most_resident, _total("VmRSS", pids))
            time.sleep(0.02)


def _total(field: str, pids: list[int]) -> float:
    total = 0.0
    for pid in pids:
        try:
            total += memory_gb(field, pid)
        except (OSError, ValueError):  # it has ended
            continue
    return total
