"""How much memory a benchmark's process takes (Linux)."""

from __future__ import annotations

import threading
import time


def memory_gb(field: str) -> float:
    """A field of what the system knows of this process, in GB: VmHWM, RssAnon and so on."""
    with open("/proc/self/status") as file:
        (line,) = (line for line in file if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024 / 1e9


class OwnMemory(threading.Thread):
    """Watches what this process takes for itself; ``most`` is the most so far, in GB."""

    def __init__(self):
        super().__init__(daemon=True)
        self.most = 0.0

    def run(self) -> None:
        while True:
            self.most = max(self.most, memory_gb("RssAnon"))
            time.sleep(0.02)
