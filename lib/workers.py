"""Makes a pool of processes, for work that Python's global lock keeps threads from sharing.

with process_pool() as pool:
    for result in pool.map(function, items): ...
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from concurrent.futures import ProcessPoolExecutor


def process_pool() -> ProcessPoolExecutor:
    """Start a process for each processor core; they end with the process that started them."""
    return ProcessPoolExecutor(
        max_workers=os.cpu_count(),
        # Spawned, not forked: TensorFlow's threads do not survive a fork.
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_end_with_parent,
    )


def _end_with_parent() -> None:
    """End this process when its parent dies: otherwise it would wait for work forever."""

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
