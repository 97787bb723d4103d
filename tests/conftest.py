"""What several tests share: small shards of a small demo world, made once."""

import os

os.environ.setdefault("MPLBACKEND", "agg")

import contextlib
import random
import signal
import socket
import subprocess
import time
from pathlib import Path

import cv2
import hypothesis
import numpy as np
import pytest

from lib.demo.data import DemoSettings, make_demo_data

# What a script runs in the background ignores Ctrl-C, and so would all that tests start.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# A busy machine is slow: no test fails for the time it takes.
hypothesis.settings.register_profile("tests", deadline=None)
hypothesis.settings.load_profile("tests")

SMALL_WORLD = DemoSettings(seed=3, landmarks=60, unseen_landmarks=6, unseen_views=3, distractors=20)


@pytest.fixture(scope="session")
def small_world(tmp_path_factory) -> Path:
    """A folder with Dataset/demo_world and Test_set/demo_world; not to be changed."""
    root = tmp_path_factory.mktemp("world")
    assert make_demo_data(root, SMALL_WORLD)
    return root


@pytest.fixture(scope="session")
def shards(small_world) -> list[Path]:
    """The paths of the small world's shards."""
    return sorted((small_world / "Dataset" / "demo_world").glob("train*.tfrec"))


def be_a_project(root: Path) -> None:
    """Make a folder one that `project_root` takes for the project's."""
    (root / "lib").mkdir()
    for name in ("environment.yml", "lib/files.py"):
        (root / name).touch()


@pytest.fixture(autouse=True)
def same_draws_each_time():
    """Keras takes seeds that nobody gives it from Python's generator, and shuffles by NumPy's."""
    random.seed(0)
    np.random.seed(0)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture(scope="module")
def browser():
    """Chromium, or a skipped test that names the way to it."""
    api = pytest.importorskip("playwright.sync_api", reason="needs Playwright: make browser")
    from tests.chromium import OPTIONS, find_chromium

    with api.sync_playwright() as playwright:
        path = find_chromium(playwright)
        if path is None:
            pytest.skip("needs Chromium: make browser")
        browser = playwright.chromium.launch(executable_path=path, args=OPTIONS)
        yield browser
        browser.close()


@contextlib.contextmanager
def new_page(browser):
    """A page of the browser; what is reported as an error fails the test."""
    page = browser.new_page(viewport={"width": 1280, "height": 1000})
    page.set_default_timeout(60_000)  # a busy machine is slow
    errors = page.errors = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda m: m.type == "error" and errors.append(f"{m.text} {m.location}"))
    yield page
    page.close()
    assert errors == []


@pytest.fixture
def page(browser):
    """A page of its own."""
    with new_page(browser) as page:
        yield page


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def wait_for(condition, server=None, log=None, seconds=300):
    """Wait until a condition holds; fails with the server's log if it ends or time is over."""
    deadline = time.monotonic() + seconds
    while not condition():
        alive = server is None or server.poll() is None
        assert alive and time.monotonic() < deadline, log.read_text() if log else "no result"
        time.sleep(0.02)


def end_server(server: subprocess.Popen) -> None:
    """End a server that was started in a session of its own; it ends its kernels first."""
    if server.poll() is not None:
        return
    os.killpg(server.pid, signal.SIGTERM)
    try:
        server.wait(20)
    except subprocess.TimeoutExpired:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


@contextlib.contextmanager
def one_block():
    """Towers built with ``last_stage=3`` get one block of ResNet50 alone: compiled in a second."""
    from lib.network.tower import STAGES

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setitem(STAGES, 3, "conv2_block1_out")
        yield


def textured(seed: int) -> np.ndarray:
    """A made-up photo, uint8 (360, 480, 3), with blobs of all sizes: many local features."""
    rng = np.random.default_rng(seed)
    photo = np.zeros((360, 480, 3), np.float32)
    for side in (4, 8, 16, 40):
        shape = (480 // side, 360 // side)
        blobs = rng.uniform(-1, 1, (*shape[::-1], 3)).astype(np.float32)
        photo += cv2.resize(blobs, (480, 360), interpolation=cv2.INTER_CUBIC)
    return np.uint8(255 * (photo - photo.min()) / (photo.max() - photo.min()))


def unit(vectors: np.ndarray) -> np.ndarray:
    """Divide by the length along the last axis."""
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
