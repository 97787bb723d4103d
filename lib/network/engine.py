"""Exports a tower to one file and runs it without TensorFlow and Keras.

    export_engine(tower, Path("runs/latest/tower.engine"))
    engine = load_engine(Path("runs/latest/tower.engine"))     # about a second
    embeddings = engine.embed(photos)             # uint8 (n, 64, 64, 3) -> float32 (n, 128)

The file is a ZIP archive of OpenVINO's network and ``manifest.json``, whose checksums find damage;
they don't make a stranger's file safe. Processors with bfloat16 instructions compute in bfloat16 by
default: twice as fast, with nearly the same ranking (``python -m benchmarks.embedding``).
:func:`keras_engine` is for a GPU or a machine without OpenVINO.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import xxhash

from lib.files import check_stored, checksum, replacing, show_error, show_path
from lib.network.openvino import NETWORK_FILES, compile_network, export_network, import_openvino

if TYPE_CHECKING:  # an exported tower runs without Keras
    import keras

PRECISIONS = ("auto", "float32", "bfloat16")
ENGINE = "tower.engine"  # name of a run's exported tower

_FORMAT = 1
_MOST_SIZE = 4096  # side of a photo in pixels; no number of a file is believed unseen
_BATCH = 64  # photos that go through the network together
_MANIFEST = "manifest.json"


class EngineError(ValueError):
    """A tower can't be exported, or an exported one can't be used."""


@dataclass(frozen=True)
class Engine:
    """Embeds photos with Keras or OpenVINO.

    Attributes:
        compute: up to 64 photos, uint8 (n, s, s, 3), to embeddings, float32 (n, d).
        image_size, dimension: s, in pixels, and d.
        fingerprint: :func:`lib.network.tower.fingerprint` of the tower.
        name: library and precision, such as "openvino bfloat16".
    """

    compute: Callable[[np.ndarray], np.ndarray]
    image_size: int
    dimension: int
    fingerprint: str
    name: str

    def embed(self, photos: np.ndarray) -> np.ndarray:
        """Embed photos, uint8 (n, s, s, 3) RGB -> float32 (n, d) of unit norm; thread-safe.

        Raises:
            ValueError: photos of another type or shape.
        """
        size = self.image_size
        if photos.dtype != np.uint8 or photos.shape[1:] != (size, size, 3):
            raise ValueError(
                f"photos must be uint8 (n, {size}, {size}, 3), not {photos.dtype} {photos.shape}"
            )
        parts = [self.compute(photos[i : i + _BATCH]) for i in range(0, len(photos), _BATCH)]
        return np.concatenate([np.empty((0, self.dimension), np.float32), *parts])


def keras_engine(tower: keras.Model) -> Engine:
    """A tower in memory, computing on the device of Keras' backend."""
    from lib.network.tower import compute_precision, embed, fingerprint  # loads Keras

    return Engine(
        compute=lambda photos: embed(tower, photos),
        image_size=tower.input_shape[1],
        dimension=tower.output_shape[-1],
        fingerprint=fingerprint(tower),
        name=f"keras {compute_precision(tower)}",
    )


def export_engine(tower: keras.Model, path: Path, model: Path | None = None) -> None:
    """Write a tower as one file, atomically, on Keras' TensorFlow or PyTorch backend.

    Args:
        tower: from :func:`lib.network.tower.build_tower`.
        path: of the file.
        model: the file that the tower was loaded from, by which :func:`open_engine` finds out
            whether it was trained anew since.

    Raises:
        EngineError: the exported network's embeddings differ from the tower's; nothing is written.
    """
    from lib.network.tower import embed, fingerprint, in_float32  # loads Keras

    tower_in_float32 = in_float32(tower)
    with replacing(path) as part, tempfile.TemporaryDirectory() as folder:
        export_network(tower_in_float32, Path(folder))
        manifest = {
            "format": _FORMAT,
            "fingerprint": fingerprint(tower),
            "image_size": tower.input_shape[1],
            "dimension": tower.output_shape[-1],
            "model": checksum(model) if model else "",
            "files": {name: checksum(Path(folder) / name) for name in NETWORK_FILES},
        }
        with zipfile.ZipFile(part, "w") as archive:
            for name in NETWORK_FILES:
                archive.write(Path(folder) / name, name)
            archive.writestr(_MANIFEST, json.dumps(manifest, indent=2) + "\n")
        # Large patches of random colours: noise would give nearly equal embeddings.
        patches = np.random.default_rng(0).integers(0, 256, (4, 5, 5, 3), np.uint8)
        place = np.arange(manifest["image_size"]) * 5 // manifest["image_size"]
        photos = patches[:, place][:, :, place]
        pairs = load_engine(part, "float32").embed(photos), embed(tower_in_float32, photos)
        cosine = float(np.einsum("nd,nd->n", *pairs).min())
        if not cosine >= 0.9999:
            raise EngineError(
                f"the exported tower's embeddings differ from its own (cosine {cosine:.5f}): "
                "OpenVINO can't run this tower"
            )


def open_engine(run: Path) -> Engine:
    """Load a run's exported tower, after exporting it if it is absent or of another model.

    Raises:
        FileNotFoundError: the run has neither an exported tower nor a model.
        EngineError: the exported tower is damaged.
    """
    engine, model = run / ENGINE, run / "model.keras"
    if not (engine.is_file() or model.is_file()):
        raise FileNotFoundError(
            f"there is no trained model in {show_path(run)}: run `make demo` first, or set run_dir "
            "to a run that has one"
        )
    if model.is_file() and _model_of(engine) != checksum(model):
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # TensorFlow is chatty
        from lib.network.tower import load_tower  # loads Keras

        print("exporting the trained network", file=sys.stderr)
        export_engine(load_tower(model), engine, model)
    return load_engine(engine)


def _model_of(engine: Path) -> str | None:
    """The checksum of the model that was exported; None if the file says none."""
    # A damaged file raises anything.
    with contextlib.suppress(Exception), zipfile.ZipFile(engine) as archive:
        check_stored(archive)
        return json.loads(archive.read(_MANIFEST))["model"]
    return None


def load_engine(path: Path, precision: str = "auto", threads: int | None = None) -> Engine:
    """Load a tower that :func:`export_engine` wrote, to run it on the processor.

    ``precision`` and ``threads`` are those of :func:`lib.network.openvino.compile_network`.

    Raises:
        FileNotFoundError: there is no such file.
        EngineError: the file is damaged or is not an exported tower.
        ValueError: an unknown precision.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"unknown precision {precision!r}; choose one of {', '.join(PRECISIONS)}")
    ov, path = import_openvino(), Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"no exported tower at {path}: lib.network.engine.export_engine writes one"
        )
    try:
        with zipfile.ZipFile(path) as archive:
            check_stored(archive)
            manifest = json.loads(archive.read(_MANIFEST))
            network = {name: archive.read(name) for name in NETWORK_FILES}
        found = {name: xxhash.xxh3_128_hexdigest(content) for name, content in network.items()}
        if manifest["format"] != _FORMAT:
            raise ValueError(f"format {manifest['format']}, not {_FORMAT}")
        if manifest["files"] != found:
            raise ValueError("the network has another checksum than the manifest says")
        size = manifest["image_size"]
        if not 1 <= size <= _MOST_SIZE:
            raise ValueError(f"image_size {size}")
        model = ov.Core().read_model(*network.values())
        shape = ov.PartialShape([-1, manifest["dimension"]])
        if not model.output(0).partial_shape.compatible(shape):
            raise ValueError(f"dimension {manifest['dimension']}, unlike the network's")
        compute, name = compile_network(model, (size, size, 3), precision, threads)
        return Engine(compute, size, manifest["dimension"], manifest["fingerprint"], name)
    except Exception as error:  # damage raises errors of zipfile, json and OpenVINO
        raise EngineError(
            f"{show_path(path)} is no exported tower, or a damaged one ({show_error(error)}): "
            "export it anew"
        ) from None
