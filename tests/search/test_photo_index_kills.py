"""After a kill at any moment an index holds every change that returned, and nothing else.

This file is also the program that the test starts: it imports Faiss once and forks a child for each
attempt. A child opens the index, compares it to the journal of the children before it, and then
adds, removes and compacts until it is killed. It writes to the journal what it is about to do, and
that it has been done; the kill comes at a change of files, or up to 5 milliseconds after it.
"""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import traceback
from pathlib import Path

import numpy as np
import pytest

from lib.search.photo_index import IndexSettings, PhotoIndex

pytestmark = pytest.mark.long

MODEL = "a" * 64
KILLS = 100
KINDS = (IndexSettings(), IndexSettings("IVF4,SQ8", search="nprobe=4", rerank=4))


def test_a_hundred_kills_lose_nothing_and_leave_nothing_half_done(tmp_path):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    process = subprocess.run(
        [sys.executable, __file__, tmp_path],
        env=environment | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    result = json.loads(process.stdout)
    assert result["kills"] == KILLS
    # In the middle of all kinds of changes, before and after the moment that counts; some left
    # files behind that the next writer deleted.
    assert set(result["interrupted"]) == {"add", "remove", "compact"}
    assert result["not kept"] > 2 and result["kept"] > 2 and result["leftovers"] > 2


# --------------------------------------------------------------------------------------------------
# The program
# --------------------------------------------------------------------------------------------------


def vector(name: str) -> np.ndarray:
    v = np.random.default_rng(int(name)).normal(size=16)
    return (v / np.linalg.norm(v)).astype(np.float32)


def vectors(names: list[str]) -> np.ndarray:
    return np.array([vector(name) for name in names]).reshape(-1, 16)


def after(names: list[str], change: str, some: list[str]) -> list[str]:
    if change == "add":
        return names + some
    return [name for name in names if name not in some]


def replayed(journal: Path) -> tuple[list[str], list[str], str]:
    """Photos of all changes that returned; photos if the unfinished one was kept; and its kind."""
    names: list[str] = []
    change, some = "", []
    for line in journal.read_text().splitlines():
        if line == "done":
            names, change = after(names, change, some), ""
        elif line == "undone":
            change = ""
        else:
            change, some = json.loads(line)
    return names, after(names, change, some) if change else names, change


def attempt(folder: Path, journal: Path, seed: int) -> None:
    rng = random.Random(seed)
    index = PhotoIndex.load(folder, MODEL)
    acknowledged, with_flight, change = replayed(journal)
    assert index.names in (acknowledged, with_flight), change
    files = {path.name for path in folder.iterdir()}
    parts = json.loads((folder / "manifest.json").read_text())["parts"]
    listed = {entry["name"] for part in parts for entry in part["files"].values()}
    with journal.open("a") as file:
        if change:
            kept = index.names == with_flight and change != "compact"
            file.write("done\n" if kept else "undone\n")
            with (folder.parent / "interrupted").open("a") as log:
                left = bool(files - listed - {"manifest.json", ".lock"})
                log.write(json.dumps([change, kept, left]) + "\n")
    found, similarities = index.search(vectors(index.names), 1)
    assert found == [[name] for name in index.names]
    np.testing.assert_allclose(similarities, 1, atol=1e-2)

    last, delay = rng.randint(1, 25), rng.choice([0, rng.uniform(0, 0.005)])
    ticks = 0

    def hear(event: str, arguments: tuple) -> None:
        nonlocal ticks
        writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if (writes or event in ("os.rename", "os.remove")) and str(folder) in str(arguments[0]):
            ticks += 1
            if ticks == last and delay:
                threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()
            elif ticks == last:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hear)
    fresh = max(map(int, index.names)) + 1
    with journal.open("a") as file:
        while True:
            change = rng.choice(["add", "add", "remove", "compact"])
            some = []
            if change == "add":
                fresh += 10  # names of a change that was not kept do not come again
                some = [str(fresh + i) for i in range(rng.randint(1, 9))]
            elif change == "remove":
                some = rng.sample(index.names, min(8, len(index.names) - 250))
            file.write(json.dumps([change, some]) + "\n")
            file.flush()
            if change == "add":
                index.add(some, vectors(some))
            elif change == "remove":
                index.remove(some)
            else:
                index.compact()
            file.write("done\n")
            file.flush()


def was_killed(folder: Path, journal: Path, seed: int) -> bool:
    child = os.fork()
    if not child:
        try:
            attempt(folder, journal, seed)
        except BaseException:
            traceback.print_exc()
        os._exit(1)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def main(root: str) -> None:
    kills = 0
    for number, settings in enumerate(KINDS):
        home = Path(root) / str(number)
        folder, journal = home / "gallery.index", home / "journal"
        names = [str(i) for i in range(300)]
        PhotoIndex.build(vectors(names), names, MODEL, settings).save(folder)
        journal.write_text(json.dumps(["add", names]) + "\ndone\n")
        for seed in range(KILLS // len(KINDS)):
            assert was_killed(folder, journal, seed), f"kill {seed} of kind {number}"
            kills += 1
    lines = [
        json.loads(line)
        for log in Path(root).glob("*/interrupted")
        for line in log.read_text().splitlines()
    ]
    result = {
        "kills": kills,
        "interrupted": [change for change, _, _ in lines],
        "kept": sum(kept for _, kept, _ in lines),
        "not kept": sum(not kept for _, kept, _ in lines),
        "leftovers": sum(left for _, _, left in lines),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1])
