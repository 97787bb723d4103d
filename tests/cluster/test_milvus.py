"""Milvus finds what Faiss finds, and keeps what it has acknowledged.

It is Milvus Lite that answers, in this process and as a server.

This file is also the program that a test kills while it adds photos.
"""

import contextlib
import importlib.util
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from lib.cluster.milvus import MilvusIndex, MilvusSettings
from lib.search.photo_index import PhotoIndex, UnusableIndexError
from tests.conftest import end_server, free_port, unit, wait_for

needs_milvus = pytest.mark.skipif(
    not importlib.util.find_spec("milvus_lite"), reason="needs Milvus Lite: make cluster"
)
pytestmark = [pytest.mark.long, needs_milvus]

MODEL = "a" * 64
D = 16
ROWS = 50  # that the program adds at once
KILLS = 4


def vector_of(name: str) -> np.ndarray:
    return unit(np.random.default_rng(int(name)).normal(size=D)).astype(np.float32)


def vectors_of(names: list[str]) -> np.ndarray:
    return np.array([vector_of(name) for name in names], np.float32).reshape(-1, D)


def listens(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


@contextlib.contextmanager
def running_server(folder: Path, port: int = 0) -> Iterator[tuple[subprocess.Popen, str]]:
    """Milvus Lite's gRPC server over a folder, and its address."""
    port = port or free_port()
    command = [sys.executable, "-m", "milvus_lite", "server", "--host=127.0.0.1"]
    with (folder.parent / "server.log").open("a") as log:
        server = subprocess.Popen(
            [*command, f"--port={port}", f"--data-dir={folder}"],
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        wait_for(lambda: listens(port), server, folder.parent / "server.log", seconds=120)
        yield server, f"http://127.0.0.1:{port}"
    finally:
        end_server(server)


@pytest.fixture
def uri(tmp_path) -> str:
    return str(tmp_path / "photos.db")


@pytest.fixture(params=["in this process", "server"])
def index(request, uri, tmp_path):
    with contextlib.ExitStack() as stack:
        if request.param == "server":
            _, uri = stack.enter_context(running_server(tmp_path / "server"))
        names = [str(i) for i in range(300)]
        index = stack.enter_context(
            contextlib.closing(MilvusIndex.build(vectors_of(names), names, MODEL, uri))
        )
        yield index


def test_it_finds_what_faiss_finds_through_all_changes(index, rng):
    names = [str(i) for i in range(300)]
    faiss = PhotoIndex.build(vectors_of(names), names, MODEL)
    queries = unit(rng.normal(size=(40, D))).astype(np.float32)
    more = [str(i) for i in range(300, 350)]

    def both_agree(k: int) -> None:
        expected, similarities = faiss.search(queries, k)
        found, found_similarities = index.search(queries, k)
        assert found == expected and len(index) == len(faiss)
        assert found_similarities.dtype == np.float32
        np.testing.assert_allclose(found_similarities, similarities, atol=1e-5)

    both_agree(10)
    faiss.add(more, vectors_of(more))
    index.add(more, vectors_of(more))
    both_agree(10)
    gone = faiss.search(queries[:5], 3)[0]
    gone = sorted(set(itertools.chain(*gone)))
    faiss.remove(gone)
    index.remove(gone)
    both_agree(10)
    both_agree(400)  # more than there are


def test_what_is_added_again_is_there_once(index):
    again = ["7", "300"]
    index.add(again, vectors_of(["500", "300"]))
    index.add(again, vectors_of(["500", "300"]))
    assert len(index) == 301
    found, similarities = index.search(vectors_of(["500", "7"]), 1)
    assert found[0] == ["7"] and similarities[0, 0] == pytest.approx(1, abs=1e-5)
    assert found[1] != ["7"]  # what it was before is gone


def test_it_refuses_what_a_photo_index_refuses(index):
    with pytest.raises(ValueError, match="unit norm"):
        index.add(["x"], np.ones((1, D), np.float32))
    with pytest.raises(ValueError, match="unique"):
        index.add(["x", "x"], vectors_of(["1", "2"]))
    with pytest.raises(ValueError, match=r"must be \(n, 16\)"):
        index.add(["x"], np.eye(1, D + 1, dtype=np.float32))
    with pytest.raises(ValueError, match=r"queries must be \(n, 16\)"):
        index.search(np.ones((1, 3)), 1)
    with pytest.raises(ValueError, match="k must be"):
        index.search(vectors_of(["1"]), 0)
    with pytest.raises(ValueError, match="has no photo 'x'"):
        index.remove(["1", "x"])
    with pytest.raises(ValueError, match="1024 bytes"):
        index.add(["é" * 600], vectors_of(["1"]))
    assert len(index) == 300


def test_a_collection_of_another_model_is_refused(uri):
    MilvusIndex.build(vectors_of(["1"]), ["1"], MODEL, uri).close()
    with pytest.raises(UnusableIndexError, match="another model"):
        MilvusIndex.load("b" * 64, uri)
    with pytest.raises(FileNotFoundError, match="'others'"):
        MilvusIndex.load(MODEL, uri, "others")
    with pytest.raises(UnusableIndexError, match="already"):
        MilvusIndex.build(vectors_of(["1"]), ["1"], MODEL, uri)
    from pymilvus import MilvusClient

    client = MilvusClient(uri)
    client.create_collection("foreign", dimension=D)
    client.close()
    with pytest.raises(UnusableIndexError, match="not made by this project"):
        MilvusIndex.load(MODEL, uri, "foreign")
    index = MilvusIndex.load(MODEL, uri)
    assert (len(index), index.dimension) == (1, D)
    index.close()


def test_an_empty_collection_finds_nothing_until_something_is_added(uri):
    index = MilvusIndex.build(np.empty((0, D), np.float32), [], MODEL, uri)
    found, similarities = index.search(vectors_of(["1", "2"]), 5)
    assert found == [[], []] and similarities.shape == (2, 0)
    index.add(["1"], vectors_of(["1"]))
    assert index.search(vectors_of(["1"]), 5)[0] == [["1"]]
    index.close()


def test_an_approximate_kind_is_searched_with_its_parameters(uri, rng):
    names = [str(i) for i in range(2000)]
    settings = MilvusSettings("HNSW", {"M": 16, "efConstruction": 100}, {"ef": 200})
    index = MilvusIndex.build(vectors_of(names), names, MODEL, uri, settings=settings)
    queries = unit(rng.normal(size=(50, D))).astype(np.float32)
    expected, _ = PhotoIndex.build(vectors_of(names), names, MODEL).search(queries, 10)
    found, _ = index.search(queries, 10)
    pairs = zip(found, expected, strict=True)
    assert np.mean([len({*a} & {*b}) / 10 for a, b in pairs]) > 0.95
    index.close()


def test_without_pymilvus_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "pymilvus", None)
    with pytest.raises(ImportError, match=r"extra milvus, by `make cluster`"):
        MilvusIndex.load(MODEL, "nowhere.db")


def test_a_kill_while_photos_are_added_loses_nothing_acknowledged(uri, tmp_path):
    journal = tmp_path / "journal"
    journal.touch()
    rng = np.random.default_rng(0)
    in_the_middle = 0
    for _ in range(KILLS):
        process = program(uri, journal)
        before = journal.read_text().count("done")
        deadline = time.monotonic() + 120
        while journal.read_text().count("done") < before + 3:
            assert process.poll() is None, process.stderr.read()[-3000:]
            assert time.monotonic() < deadline
        time.sleep(rng.uniform(0, 0.02))  # into the middle of what comes next
        process.send_signal(signal.SIGKILL)
        process.communicate()
        in_the_middle += journal.read_text().splitlines()[-1] != "done"
    assert in_the_middle
    process = program(uri, journal, "--check")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors[-3000:]


def test_a_server_that_is_killed_and_comes_back_has_lost_nothing(tmp_path):
    from pymilvus import MilvusException

    folder, port, acknowledged = tmp_path / "server", free_port(), []
    batches = [[str(i) for i in range(start, start + ROWS)] for start in range(0, 2000, ROWS)]
    with running_server(folder, port) as (server, uri):
        index = MilvusIndex.build(np.empty((0, D), np.float32), [], MODEL, uri)

        def kill() -> None:
            while len(acknowledged) < 5:
                time.sleep(0.001)
            server.kill()

        threading.Thread(target=kill, daemon=True).start()
        with pytest.raises(MilvusException):
            for batch in batches:
                index.add(batch, vectors_of(batch))
                acknowledged += [batch]
    assert 5 <= len(acknowledged) < len(batches)
    with pytest.raises(MilvusException):
        MilvusIndex.load(MODEL, uri)
    missing = batches[len(acknowledged)]
    with running_server(folder, port) as (_, uri):
        index.add(missing, vectors_of(missing))  # maybe once more; at once, by the same connection
        index.close()
        index = MilvusIndex.load(MODEL, uri)
        names = [name for batch in [*acknowledged, missing] for name in batch]
        assert len(index) == len(names)
        assert index.search(vectors_of(names), 1)[0] == [[name] for name in names]
        index.close()


def program(uri: str, journal: Path, *more: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, __file__, uri, journal, *more],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def main(uri: str, journal: str, check: str = "") -> None:
    """Check what was acknowledged; then send what was not once more, and add until killed."""
    lines = Path(journal).read_text().splitlines()
    batches = [json.loads(line) for line in lines if line != "done"]
    begun = [] if not lines or lines[-1] == "done" else batches[-1]
    done = [name for batch in batches for name in batch if batch is not begun]
    if lines:
        index = MilvusIndex.load(MODEL, uri)
        if done:
            found, similarities = index.search(vectors_of(done), 1)
            assert found == [[name] for name in done]
            np.testing.assert_allclose(similarities, 1, atol=1e-5)
        assert len(done) <= len(index) <= len(done) + len(begun)
    else:
        index = MilvusIndex.build(np.empty((0, D), np.float32), [], MODEL, uri)
    if begun:
        index.add(begun, vectors_of(begun))
        assert len(index) == len(done) + len(begun)  # each is there once
    if check:
        return
    with Path(journal).open("a") as file:
        if begun:
            file.write("done\n")
        for start in itertools.count(len(batches) * ROWS, ROWS):
            names = [str(i) for i in range(start, start + ROWS)]
            file.write(json.dumps(names) + "\n")
            file.flush()
            index.add(names, vectors_of(names))
            file.write("done\n")
            file.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
