"""Exports Keras networks to OpenVINO and runs them on the processor.

    export_network(tower, folder)                           # network.xml and network.bin
    network = import_openvino().Core().read_model(folder / "network.xml")
    compute, name = compile_network(network, (64, 64, 3))   # name: "openvino bfloat16"
    embeddings = compute(photos)                            # uint8 (n, 64, 64, 3) -> float32

Importing this module loads neither OpenVINO nor Keras.
"""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import keras

NETWORK_FILES = ("network.xml", "network.bin")

_PRECISIONS = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}


def import_openvino():
    """Import OpenVINO without its telemetry, which uses the network and the home folder."""
    sys.modules.setdefault("openvino_telemetry", None)  # as if that package were not installed
    import openvino

    return openvino


def fast_precision() -> str:
    """The precision that OpenVINO prefers on this processor: "float32" or "bfloat16"."""
    hint = import_openvino().Core().get_property("CPU", "INFERENCE_PRECISION_HINT")
    return _PRECISIONS[hint.get_type_name()]


def export_network(model: keras.Model, folder: Path) -> Path:
    """Write a Keras model as ``network.xml``, whose path is returned, and ``network.bin``.

    The model must compute in float32, on Keras' TensorFlow or PyTorch backend.
    """
    path = Path(folder) / NETWORK_FILES[0]
    import_openvino()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracer's warnings are not about this network
        model.export(str(path), format="openvino", verbose=False)
    return path


def compile_network(
    network, shape: tuple[int, ...], precision: str = "auto", threads: int | None = None
) -> tuple[Callable[[np.ndarray], np.ndarray], str]:
    """Compile a network for the processor.

    Args:
        network: read by OpenVINO, with one input, (n, *shape), and one output.
        precision: "float32", "bfloat16", or "auto": :func:`fast_precision`.
        threads: number, at least 1, for processes that share a machine; None: one per core, bound.

    Returns:
        the function from a batch, uint8 (n, *shape), to float32 (n, ...), which threads may share;
        and its name, such as "openvino bfloat16".
    """
    ov = import_openvino()
    network.reshape([-1, *shape])  # the PyTorch backend exports the input without its shape
    hints = {ours: theirs for theirs, ours in _PRECISIONS.items()}
    asked = {} if precision == "auto" else {"INFERENCE_PRECISION_HINT": hints[precision]}
    if threads:
        # With pinning, the threads of several processes would all run on the first cores.
        asked |= {"INFERENCE_NUM_THREADS": threads, "ENABLE_CPU_PINNING": False}
    compiled = ov.Core().compile_model(network, "CPU", asked)
    request, lock = compiled.create_infer_request(), threading.Lock()

    def compute(batch: np.ndarray) -> np.ndarray:
        with lock:
            request.infer({0: np.ascontiguousarray(batch)}, share_inputs=True)
            return request.get_output_tensor(0).data.copy()  # the next call overwrites it

    hint = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
    return compute, f"openvino {_PRECISIONS[hint]}"
