"""A tower as an engine: exported to one file, and run from it without TensorFlow and Keras.

    export_engine(tower, Path("runs/latest/tower.engine"))
    engine = load_engine(Path("runs/latest/tower.engine"))     # a second, not ten
    embeddings = engine.embed(photos)             # uint8 (n, 64, 64, 3) -> float32 (n, 128)

The network in the file is OpenVINO's, preprocessing inside. On a processor that multiplies bfloat16
it computes in that, if not told otherwise: twice as fast, with nearly the same ranking, which
``python -m benchmarks.embedding`` measures. :func:`keras_engine` gives a tower in memory the same
interface, on a GPU or where there is no OpenVINO.

The file is a ZIP archive of ``network.xml``, ``network.bin`` and ``manifest.json``.
"""

from __future__ import annotations

import json
import sys
import tempfile
import threading
import warnings
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import xxhash

from lib.files import checksum, replacing, show_path

if TYPE_CHECKING:  # what runs an exported tower does without Keras
    import keras

PRECISIONS = ("auto", "float32", "bfloat16")
ENGINE = "tower.engine"  # name of a run's exported tower

_FORMAT = 1
_BATCH = 64  # photos that go through the network together
_MANIFEST, _NETWORK = "manifest.json", ("network.xml", "network.bin")
_LEAST_COSINE = 0.9999  # of the exported tower's embeddings and the tower's own, in float32
_OPENVINO_NAMES = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}


class EngineError(ValueError):
    """A tower can't be exported, or an exported one can't be used; the message says why."""


@dataclass(frozen=True)
class Engine:
    """Embeds photos, whatever computes it.

    Attributes:
        compute: from up to 64 photos, uint8 (n, s, s, 3), to embeddings, float32 (n, d).
        image_size: s, side of the square photos in pixels.
        dimension: d, of the embeddings.
        fingerprint: of the tower, see :func:`lib.network.tower.fingerprint`.
        name: what computes, such as "openvino bfloat16".
    """

    compute: Callable[[np.ndarray], np.ndarray]
    image_size: int
    dimension: int
    fingerprint: str
    name: str

    def embed(self, photos: np.ndarray) -> np.ndarray:
        """Embed photos; threads may share an engine and wait for each other.

        Args:
            photos: uint8 (n, s, s, 3) RGB.

        Returns:
            float32 (n, d) of unit norm.

        Raises:
            ValueError: photos of another type or shape.
        """
        size = self.image_size
        if photos.dtype != np.uint8 or photos.shape[1:] != (size, size, 3):
            raise ValueError(
                f"photos must be uint8 (n, {size}, {size}, 3), not {photos.dtype} {photos.shape}"
            )
        embeddings = np.empty((len(photos), self.dimension), np.float32)
        for start in range(0, len(photos), _BATCH):
            some = slice(start, start + _BATCH)
            embeddings[some] = self.compute(photos[some])
        return embeddings


def keras_engine(tower: keras.Model) -> Engine:
    """A tower in memory as an engine, on whatever Keras' backend computes on."""
    from lib.network.tower import embed, fingerprint

    return Engine(
        compute=lambda photos: embed(tower, photos),
        image_size=tower.input_shape[1],
        dimension=tower.output_shape[-1],
        fingerprint=fingerprint(tower),
        name=f"keras {_precision(tower)}",
    )


def export_engine(tower: keras.Model, path: Path) -> None:
    """Write a tower as one file, atomically, for :func:`load_engine`.

    Before the file gets its name, it is read again and embeds some pictures as the tower does.

    Args:
        tower: from :func:`lib.network.tower.load_tower`, on Keras' TensorFlow or PyTorch backend.
        path: of the file; it may end as one likes.

    Raises:
        EngineError: the exported network computes something else than the tower.
    """
    from lib.network.tower import embed, fingerprint

    tower_in_float32 = _in_float32(tower)
    with replacing(path) as part:
        with tempfile.TemporaryDirectory() as folder:
            export_network(tower_in_float32, Path(folder))
            manifest = {
                "format": _FORMAT,
                "fingerprint": fingerprint(tower),
                "image_size": tower.input_shape[1],
                "dimension": tower.output_shape[-1],
                "files": {name: checksum(Path(folder) / name) for name in _NETWORK},
            }
            with zipfile.ZipFile(part, "w") as archive:
                for name in _NETWORK:
                    archive.write(Path(folder) / name, name)
                archive.writestr(_MANIFEST, json.dumps(manifest, indent=2) + "\n")
        photos = _pictures(tower.input_shape[1])
        pairs = load_engine(part, "float32").embed(photos), embed(tower_in_float32, photos)
        cosine = float(np.einsum("nd,nd->n", *pairs).min())
        if not cosine >= _LEAST_COSINE:
            raise EngineError(
                f"the exported tower's embeddings differ from its own (cosine {cosine:.5f}): "
                "OpenVINO can't run this tower"
            )


def load_engine(path: Path, precision: str = "auto", threads: int | None = None) -> Engine:
    """Load a tower that :func:`export_engine` wrote, to run it on the processor.

    Args:
        path: of the file.
        precision: "float32", "bfloat16", or "auto": what this processor is fast in.
        threads: to compute on, at least 1; None: one for each core, and bound to it. Where several
            processes compute side by side, each should have its share.

    Raises:
        FileNotFoundError: there is no such file.
        EngineError: the file is damaged, or no exported tower.
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
            manifest = json.loads(archive.read(_MANIFEST))
            xml, weights = (archive.read(name) for name in _NETWORK)
        found = {
            name: xxhash.xxh3_128_hexdigest(content)
            for name, content in zip(_NETWORK, (xml, weights), strict=True)
        }
        if manifest["format"] != _FORMAT:
            raise ValueError(f"format {manifest['format']}, not {_FORMAT}")
        if manifest["files"] != found:
            raise ValueError("the network has another checksum than the manifest says")
        size = manifest["image_size"]
        compute, name = compile_network(
            ov.Core().read_model(xml, weights), (size, size, 3), precision, threads
        )
        return Engine(compute, size, manifest["dimension"], manifest["fingerprint"], name)
    except (OSError, zipfile.BadZipFile, ValueError, KeyError, TypeError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise EngineError(
            f"{show_path(path)} is no exported tower, or a damaged one ({reason}): export it anew"
        ) from None


# --------------------------------------------------------------------------------------------------
# OpenVINO
# --------------------------------------------------------------------------------------------------


def import_openvino():
    """OpenVINO, kept from reporting its use over the network and writing to the home folder."""
    sys.modules.setdefault("openvino_telemetry", None)  # as if that package were not installed
    import openvino

    return openvino


def fast_precision() -> str:
    """What OpenVINO computes in, if not told otherwise: what the processor does fast."""
    core = import_openvino().Core()
    return _keras_name(core.get_property("CPU", "INFERENCE_PRECISION_HINT"))


def export_network(model: keras.Model, folder: Path) -> Path:
    """Write a Keras model's forward pass as OpenVINO's ``network.xml`` and ``network.bin``.

    Args:
        model: on Keras' TensorFlow or PyTorch backend; one in mixed precision is exported in
            float32.
        folder: to write to.

    Returns:
        the path of ``network.xml``.
    """
    path = Path(folder) / _NETWORK[0]
    import_openvino()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracer's, which are not about this network
        _in_float32(model).export(str(path), format="openvino", verbose=False)
    return path


def compile_network(
    network, shape: tuple[int, ...], precision: str = "auto", threads: int | None = None
) -> tuple[Callable[[np.ndarray], np.ndarray], str]:
    """Make a network ready to compute.

    Args:
        network: as OpenVINO has read it, of one input and one output.
        shape: of one row of the input, without the batch.
        precision, threads: as for :func:`load_engine`.

    Returns:
        the function from a batch, uint8 (n, *shape), to float32 (n, ...), which threads may share;
        and its name, engine and precision.
    """
    ov = import_openvino()
    network.reshape([-1, *shape])  # PyTorch's has lost it
    asked = {} if precision == "auto" else {"INFERENCE_PRECISION_HINT": _OPENVINO_NAMES[precision]}
    if threads:
        # Bound to cores, the threads of all processes would be on the first ones.
        asked |= {"INFERENCE_NUM_THREADS": threads, "ENABLE_CPU_PINNING": False}
    compiled = ov.Core().compile_model(network, "CPU", asked)
    request, lock = compiled.create_infer_request(), threading.Lock()

    def compute(batch: np.ndarray) -> np.ndarray:
        with lock:
            request.infer({0: np.ascontiguousarray(batch)}, share_inputs=True)
            return request.get_output_tensor(0).data.copy()  # the next call writes there

    return compute, f"openvino {_keras_name(compiled.get_property('INFERENCE_PRECISION_HINT'))}"


def _keras_name(element_type) -> str:
    """Keras' name of one of OpenVINO's types."""
    names = {short: name for name, short in _OPENVINO_NAMES.items()}
    return names[element_type.get_type_name()]


def _precision(model: keras.Model) -> str:
    """What a model computes in: half precision if any of its layers does."""
    precisions = {layer.compute_dtype for layer in _layers(model)}
    return next((p for p in ("bfloat16", "float16") if p in precisions), "float32")


def _layers(model: keras.Model) -> Iterator[keras.layers.Layer]:
    """The layers of a model and of the models in it."""
    for layer in model.layers:
        yield layer
        if hasattr(layer, "layers"):
            yield from _layers(layer)


def _in_float32(model: keras.Model) -> keras.Model:
    """The same network without casts to half precision, which OpenVINO can't read."""
    if _precision(model) == "float32":
        return model
    import keras

    def clone(layer: keras.layers.Layer) -> keras.layers.Layer:
        return layer.from_config(layer.get_config() | {"dtype": "float32"})

    copy = keras.models.clone_model(model, clone_function=clone, recursive=True)
    copy.set_weights(model.get_weights())
    return copy


def _pictures(size: int) -> np.ndarray:
    """A few pictures to compare by, uint8 (4, size, size, 3): random colours in large patches."""
    patches = np.random.default_rng(0).integers(0, 256, (4, 5, 5, 3), np.uint8)
    place = np.arange(size) * 5 // size
    return np.ascontiguousarray(patches[:, place][:, :, place])
