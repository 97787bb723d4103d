"""How fast are photos embedded, and does the ranking stay the same?

    python -m benchmarks.embedding [--rounds 5]

Measures, in photos per second and interleaved in one run, with the whole ResNet50 (random weights)
at 128 and 224 pixels and with the demo's backbone at 32:

* Keras ``predict``, the usual way;
* Keras, compiled: the tower as a ``tf.function``, without the loop around it;
* the exported tower, :func:`lib.network.engine.load_engine`, in float32 and in bfloat16;
* ONNX Runtime in float32, if it and tf2onnx are installed. Its export runs in a process of its own
  that may take so much memory and no more.

The processor's peak is the rate of a large float32 matrix product on all cores, in the same rounds;
bfloat16 may go beyond it.

The gate: of the demo's unseen landmarks, each photo's ten nearest others by an engine's embeddings,
and how many of them are among its ten nearest by Keras' in float32. And the start: seconds from
nothing to a photo's embedding in a fresh process.

Prints tables, and as its last line one JSON object with ``vs_predict_fp32`` and ``vs_predict_best``
(the exported tower's rates over ``predict``'s, the smaller of those at 128 and 224 pixels),
``share_of_peak`` (of float32, likewise), ``overlaps``, ``startup_seconds`` and all ``rates``.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from tqdm import tqdm

from benchmarks.train_step import matrix_product, operations
from lib.data.photos import list_photos, read_gallery
from lib.demo.data import make_demo_data
from lib.files import project_root
from lib.network.engine import export_engine, load_engine
from lib.network.tower import TowerSettings, build_tower, embed, load_tower, save_tower

BATCH, NEAREST = 64, 10
EXPORT_BYTES, EXPORT_SECONDS = 12 * 2**30, 300  # of the export to ONNX
DEMO = "EfficientNet-Lite0, 96 px"
SETTINGS = {
    "ResNet50, 128 px": TowerSettings(image_size=128, weights=""),
    "ResNet50, 224 px": TowerSettings(image_size=224, weights=""),
    DEMO: TowerSettings(
        image_size=96, embedding_size=0, backbone="EfficientNetLite0", weights="packaged"
    ),
}
PREDICT, COMPILED = "Keras predict", "Keras, compiled"
FLOAT32, BFLOAT16, ONNX = "exported, float32", "exported, bfloat16", "ONNX Runtime, float32"

START = {
    "exported": """
import sys
from pathlib import Path
from lib.network.engine import load_engine
from lib.data.photos import read_photo
engine = load_engine(Path(sys.argv[1]))
engine.embed(read_photo(Path(sys.argv[3]), engine.image_size)[None])
""",
    "Keras": """
import sys
from pathlib import Path
from lib.network.tower import embed, load_tower
from lib.data.photos import read_photo
tower = load_tower(Path(sys.argv[2]))
embed(tower, read_photo(Path(sys.argv[3]), tower.input_shape[1])[None])
""",
}


def export_onnx(tower_file: Path, path: Path) -> None:
    """In a process of its own: writes a saved tower as ONNX, within its bound of memory."""
    resource.setrlimit(resource.RLIMIT_DATA, (EXPORT_BYTES, EXPORT_BYTES))
    tower = load_tower(tower_file)
    embed(tower, np.zeros((1, *tower.input_shape[1:]), np.uint8))  # Keras asks for a call before
    tower.export(str(path), format="onnx", verbose=False)


def onnx_engine(tower_file: Path) -> Callable | None:
    """The tower in ONNX Runtime, or None and a line that says why."""
    if missing := [name for name in ("onnxruntime", "tf2onnx") if not find_spec(name)]:
        print(f"ONNX Runtime is left out: {' and '.join(missing)} not installed")
        return None
    path = tower_file.with_suffix(".onnx")
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=export_onnx, args=(tower_file, path))
    process.start()
    process.join(EXPORT_SECONDS)
    if process.exitcode != 0:
        process.kill()
        print(f"ONNX Runtime is left out: the export failed (exit code {process.exitcode})")
        return None
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda photos: session.run(None, {name: photos})[0]


def ways_of(tower: keras.Model, folder: Path) -> dict[str, Callable]:
    """All ways to embed: functions from photos to embeddings."""
    import tensorflow as tf

    exported, saved = folder / "tower.engine", folder / "tower.keras"
    export_engine(tower, exported)
    save_tower(tower, saved)
    compiled = tf.function(lambda photos: tower(photos, training=False))
    ways = {
        PREDICT: lambda photos: embed(tower, photos, BATCH),
        COMPILED: lambda photos: compiled(tf.constant(photos)).numpy(),
        FLOAT32: load_engine(exported, "float32").embed,
        BFLOAT16: load_engine(exported, "bfloat16").embed,
        ONNX: onnx_engine(saved),
    }
    return {name: way for name, way in ways.items() if way}


def measure(tower: keras.Model, ways: dict[str, Callable], rounds: int) -> tuple[dict, float]:
    """Photos per second of each way, median of the rounds; and the peak in operations."""
    size = tower.input_shape[1]
    photos = np.random.default_rng(0).integers(0, 256, (BATCH, size, size, 3), np.uint8)
    multiply, rates, peaks = matrix_product(), {name: [] for name in ways}, []
    multiply()
    for way in ways.values():
        way(photos)  # compiles
    for _ in tqdm(range(rounds), unit=" rounds"):
        for name, way in ways.items():
            times, start = 0, time.perf_counter()
            while times == 0 or time.perf_counter() - start < 1:
                way(photos)
                times += 1
            rates[name].append(times * BATCH / (time.perf_counter() - start))
        peaks.append(multiply())
    return {name: statistics.median(r) for name, r in rates.items()}, statistics.median(peaks)


def nearest(embeddings: np.ndarray) -> np.ndarray:
    """Each photo's nearest others, int (n, 10)."""
    similarity = embeddings @ embeddings.T
    np.fill_diagonal(similarity, -np.inf)
    return np.argsort(-similarity, axis=1)[:, :NEAREST]


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    """The share of nearest photos by one kind of embeddings that are nearest by the other."""
    pairs = zip(nearest(a), nearest(b), strict=True)
    return float(np.mean([len(np.intersect1d(*pair)) / NEAREST for pair in pairs]))


def startup(folder: Path, photo: Path, rounds: int) -> dict[str, float]:
    """Seconds from nothing to a photo's embedding, median."""
    arguments = [str(folder / "tower.engine"), str(folder / "tower.keras"), str(photo)]
    seconds = {name: [] for name in START}
    for _ in range(rounds):
        for name, script in START.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", script, *arguments], check=True)
            seconds[name].append(time.perf_counter() - start)
    return {name: round(statistics.median(s), 2) for name, s in seconds.items()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.embedding")
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    root = project_root()
    make_demo_data(root)
    rates, shares, overlaps, starts = {}, {}, {}, {}
    for title, settings in SETTINGS.items():
        tower = build_tower(settings)
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            ways = ways_of(tower, folder)
            found, peak = measure(tower, ways, rounds)
            photo = list_photos(root / "Test_set" / "demo_world")[0]
            starts[title] = startup(folder, photo, min(rounds, 3))
        work = operations(tower)
        rates[title] = {way: round(rate, 1) for way, rate in found.items()}
        shares[title] = {way: rate * work / peak for way, rate in found.items()}
        print(
            f"\n{title}: {work / 1e9:.2f} GFLOP a photo, float32 matrix product "
            f"{peak / 1e9:.0f} GFLOP/s, median of {rounds} rounds, batches of {BATCH}\n"
            f"{'':<23} photos/s   vs predict   of peak"
        )
        for way, rate in found.items():
            ratio = rate / found[PREDICT]
            print(f"{way:<23} {rate:8.1f}   {ratio:10.2f}   {shares[title][way]:7.2f}")
        seconds = ", ".join(f"{way} {s} s" for way, s in starts[title].items())
        print(f"first embedding of a fresh process: {seconds}")
        if title == DEMO:
            gallery = root / "Dataset" / "demo_world" / "unseen"
            photos, _, _ = read_gallery(gallery, settings.image_size)
            expected = embed(tower, photos)
            overlaps = {way: round(overlap(f(photos), expected), 4) for way, f in ways.items()}
            print(f"the {NEAREST} nearest of {len(photos)} photos of unseen landmarks, overlap:")
            for way, share in overlaps.items():
                print(f"{way:<23} {share:8.4f}")

    whole = [title for title in SETTINGS if title != DEMO]

    def least_gain(*ways: str) -> float:
        return min(max(rates[t][way] for way in ways) / rates[t][PREDICT] for t in whole)

    result = {
        "vs_predict_fp32": round(least_gain(FLOAT32), 2),
        "vs_predict_best": round(least_gain(FLOAT32, BFLOAT16), 2),
        "share_of_peak": round(min(shares[title][FLOAT32] for title in whole), 3),
        "overlaps": overlaps,
        "startup_seconds": starts,
        "rates": rates,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
