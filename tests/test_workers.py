"""Processes do their work, and end with the one that started them, however it ends."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lib.workers import process_pool

SCRIPT = """
import os
import time
from lib.workers import process_pool

if __name__ == "__main__":
    with process_pool() as pool:
        print(*{pool.submit(os.getpid).result() for _ in range(20)}, flush=True)
        time.sleep(60)
"""


def test_a_pool_maps_in_order():
    with process_pool() as pool:
        assert list(pool.map(divmod, range(10), [3] * 10)) == [divmod(i, 3) for i in range(10)]
        assert pool.submit(os.getpid).result() != os.getpid()


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="looks for processes in /proc (Linux)")
def test_no_process_outlives_a_killed_parent(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    command = [sys.executable, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        children = parent.stdout.readline().split()
        assert children and all(Path(f"/proc/{pid}").exists() for pid in children)
        parent.kill()
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in children):
        assert time.monotonic() < deadline, "a process goes on without its parent"
        time.sleep(0.1)
