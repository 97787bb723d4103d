"""How long does somebody wait for an answer of the search app?

    python -m benchmarks.search_app [--rounds 30]

Against the newest run (``make demo``), everything the app does between a file that has arrived and
the last picture of the answer on its way to the browser: decode, embed, search, shrink and encode
the photos found. Measured for a JPEG file of 4000 x 3000 pixels, a PNG file of 3000 x 2000 and a
photo of the demo, with each kind of index and with re-ranking; for "Why?", which embeds 132 photos;
and from nothing to the first answer in a fresh process.

Prints a table, and as its last line one JSON object with ``median_ms`` and ``worst_ms`` of each,
and ``start_seconds``.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from lib.app.answer import KINDS, RERANKINGS
from lib.app.gallery import JOBS, open_gallery
from lib.app.widget import SearchApp
from lib.files import project_root
from lib.network.engine import ENGINE, load_engine
from lib.runs import open_run

START = """
import sys
from pathlib import Path
from lib.network.engine import load_engine
from lib.app.answer import Question, Search
from lib.app.gallery import open_gallery
from lib.app.widget import SearchApp
engine = load_engine(Path(sys.argv[1]))
gallery = open_gallery(engine, Path(sys.argv[2]), Path(sys.argv[3]), lambda done, of: None)
app = SearchApp(engine, gallery, Path(sys.argv[3]))
app._on_photo(Path(sys.argv[4]).read_bytes())
assert app.answer is not None
"""


def camera_photo(small: bytes, kind: str, size: tuple[int, int] = (4000, 3000)) -> bytes:
    """A photo of the demo, as large as a camera's and as rich in details."""
    with Image.open(io.BytesIO(small)) as image:
        pixels = np.asarray(image.resize(size, Image.Resampling.BICUBIC), np.int16)
    grain = np.random.default_rng(0).integers(-12, 13, pixels.shape, np.int16)
    buffer = io.BytesIO()
    Image.fromarray((pixels + grain).clip(0, 255).astype(np.uint8)).save(
        buffer, kind, quality=92, compress_level=1
    )
    return buffer.getvalue()


def measure(action: Callable[[], None], rounds: int) -> dict[str, float]:
    """Median and worst of some rounds, in milliseconds; the first one is not counted."""
    seconds = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - start)
    return {
        "median_ms": round(1000 * statistics.median(seconds[1:]), 1),
        "worst_ms": round(1000 * max(seconds[1:]), 1),
    }


def ask(app: SearchApp, content: bytes) -> None:
    """Hand a photo to the app, which has not shown the photos that it finds before."""
    app.answer = None
    app._thumbnail.cache_clear()
    app._on_photo(content)
    assert app.answer is not None, app._status.value


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.search_app")
    parser.add_argument("--rounds", type=int, default=30)
    rounds = parser.parse_args().rounds
    root, run = project_root(), open_run("")
    folder = root / "Dataset" / "demo_world" / "unseen"
    engine = load_engine(run / ENGINE)
    gallery = open_gallery(engine, folder, run / JOBS)
    app = SearchApp(engine, gallery, run / JOBS)
    path: Path = folder / gallery.names[0]
    small = path.read_bytes()
    photos = {
        "photo of the demo": small,
        "JPEG, 4000 x 3000": camera_photo(small, "JPEG"),
        "PNG, 3000 x 2000": camera_photo(small, "PNG", (3000, 2000)),
    }
    results = {}
    with tqdm(total=len(photos) + len(KINDS) + 1, unit=" measurements") as bar:
        for name, content in photos.items():
            results[name] = measure(lambda content=content: ask(app, content), rounds)
            bar.update()
        app._rerank.value = RERANKINGS[1]
        for kind in KINDS:
            app._kind.value = kind
            results[f"photo of the demo, {kind}, {RERANKINGS[1]}"] = measure(
                lambda: ask(app, small), rounds
            )
            bar.update()
        results["Why?"] = measure(lambda: app._on_why(0), rounds)
        bar.update()
    start = time.perf_counter()
    arguments = (run / ENGINE, folder, run / JOBS, path)
    subprocess.run([sys.executable, "-c", START, *map(str, arguments)], check=True)
    start_seconds = round(time.perf_counter() - start, 2)

    megabytes = {name: len(content) / 2**20 for name, content in photos.items()}
    print(f"{len(gallery.names)} photos, {engine.name}, {rounds} rounds")
    print(f"{'':<52} median ms   worst ms")
    for name, result in results.items():
        size = f" ({megabytes[name]:.1f} MB)" if name in megabytes else ""
        print(f"{name + size:<52} {result['median_ms']:9.1f}  {result['worst_ms']:9.1f}")
    print(f"a fresh process to its first answer: {start_seconds} s")
    print(json.dumps({"answers": results, "start_seconds": start_seconds}))


if __name__ == "__main__":
    main()
