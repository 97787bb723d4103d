"""The network: one tower that embeds a photo, and the Siamese model that trains it on triplets.

    photo uint8 RGB -> the backbone's own preprocessing -> ResNet50 -> GeM -> projection -> L2 norm

    tower = build_tower(TowerSettings(image_size=64))
    embeddings = embed(tower, photos)             # uint8 (n, 64, 64, 3) -> float32 (n, 128)
    siamese = Siamese(tower, MetricLoss(LossSettings()))    # (n, 3, 64, 64, 3) -> (n, 3, 128)

Preprocessing is a part of the tower, so training, evaluation and search can't differ in it. The
module uses ``keras.ops`` alone and runs on Keras' TensorFlow, JAX and PyTorch backends.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import keras
import numpy as np
from keras import ops

from lib.losses import MetricLoss
from lib.pooling import make_pooling
from lib.storage import replacing, show_path

# The end of each of ResNet50's stages: name of the layer, pixels of the photo per place of the map.
STAGES = {
    3: ("conv3_block4_out", 8),
    4: ("conv4_block6_out", 16),
    5: ("conv5_block3_out", 32),
}

PRECISIONS = ("float32", "mixed_bfloat16")


class WeightsUnavailableError(OSError):
    """Pre-trained weights could not be had; the message says why in one line."""


@dataclass(frozen=True)
class TowerSettings:
    """What a tower is made of.

    Attributes:
        image_size: side of the square input photo in pixels.
        embedding_size: dimension of the embedding.
        pooling: "gem", "gem-per-channel", "average", "max" or "rmac".
        gem_p: GeM's exponent to start from.
        gem_p_trainable: whether GeM's exponent is learned.
        last_stage: the stage of ResNet50 whose feature map is pooled: 5 is the whole backbone, with
            one place per 32 x 32 pixels. A photo of 64 pixels leaves pooling 2 x 2 places there,
            and 8 x 8 after stage 3.
        weights: "imagenet" (fetched once by Keras), the path of a Keras weights file, or "" for
            random weights.
        precision: of the backbone: "float32", or "mixed_bfloat16", which computes in bfloat16 and
            keeps the weights in float32. The head computes in float32 either way.
    """

    image_size: int = 128
    embedding_size: int = 128
    pooling: str = "gem"
    gem_p: float = 3.0
    gem_p_trainable: bool = True
    last_stage: int = 5
    weights: str = "imagenet"
    precision: str = "float32"

    def __post_init__(self):
        if self.precision not in PRECISIONS:
            raise ValueError(
                f"precision must be one of {', '.join(PRECISIONS)}, got {self.precision!r}"
            )
        if self.last_stage not in STAGES:
            raise ValueError(f"last_stage must be one of {sorted(STAGES)}, got {self.last_stage}")
        smallest = STAGES[self.last_stage][1]
        if self.image_size < smallest:
            raise ValueError(f"image_size must be at least {smallest}, got {self.image_size}")


@keras.saving.register_keras_serializable(package="image_retrieval")
class ResNetPreprocessing(keras.layers.Layer):
    """RGB pixels from 0 to 255 -> what ResNet50's ImageNet weights expect.

    That is Keras' own ``preprocess_input``: BGR order, ImageNet's mean colour subtracted, no
    division. Input uint8 or float (n, h, w, 3), output float32 of the same shape.
    """

    def call(self, photos):
        return keras.applications.resnet.preprocess_input(ops.cast(photos, "float32"))

    def compute_output_spec(self, photos):
        return keras.KerasTensor(photos.shape, dtype="float32")


def build_tower(settings: TowerSettings) -> keras.Model:
    """Build the network that embeds a photo: a trunk (preprocessing, ResNet50) and a head.

    Input uint8 RGB (n, image_size, image_size, 3); output float32 (n, embedding_size) of unit L2
    norm. ``tower.get_layer("trunk")`` gives the feature maps, ``tower.get_layer("head")`` makes
    embeddings of them.

    Raises:
        WeightsUnavailableError: the weights asked for can't be fetched or read.
    """
    photos = keras.Input(
        (settings.image_size, settings.image_size, 3), dtype="uint8", name="photos"
    )
    with computing_in(settings.precision):
        maps = build_backbone(settings)(ResNetPreprocessing(name="preprocessing")(photos))
    trunk = keras.Model(photos, maps, name="trunk")
    head = build_head(trunk.output_shape[1:], settings)
    return keras.Model(photos, head(trunk(photos)), name="tower")


@contextlib.contextmanager
def computing_in(precision: str) -> Iterator[None]:
    """Layers that are made in the block compute in ``precision`` (a Keras dtype policy)."""
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(precision)
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)


def build_head(map_shape: tuple[int, int, int], settings: TowerSettings) -> keras.Model:
    """Build what makes embeddings of feature maps: pooling, projection, L2 normalization.

    Input float (n, h, w, c) with ``map_shape`` (h, w, c); output float32 (n, embedding_size).
    """
    maps = keras.Input(map_shape, name="feature_maps")
    x = make_pooling(settings.pooling, settings.gem_p, settings.gem_p_trainable)(maps)
    # ReLU maps are all positive: uncentred, every two embeddings point the same way. The batch
    # normalization takes their common mean away, so that the space is used from the first step;
    # without a shift and scale of its own it can't put one back.
    x = keras.layers.Dense(settings.embedding_size, use_bias=False, name="projection")(x)
    x = keras.layers.BatchNormalization(momentum=0.9, center=False, scale=False, name="centring")(x)
    x = keras.layers.UnitNormalization(dtype="float32", name="l2_normalization")(x)
    return keras.Model(maps, x, name="head")


def build_backbone(settings: TowerSettings) -> keras.Model:
    """Build ResNet50 up to the stage asked for: preprocessed photos to feature maps.

    Raises:
        WeightsUnavailableError: the weights asked for can't be fetched or read.
    """
    resnet = keras.applications.ResNet50(
        include_top=False, weights=None, input_shape=(settings.image_size, settings.image_size, 3)
    )
    if settings.weights == "imagenet":
        timeout = socket.getdefaulttimeout()
        socket.setdefaulttimeout(30)  # seconds of silence; a network that swallows everything hangs
        try:
            resnet = keras.applications.ResNet50(
                include_top=False, weights="imagenet", input_shape=resnet.input_shape[1:]
            )
        except Exception as error:  # urllib's, the socket's or Keras' own: all mean the same here
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise WeightsUnavailableError(
                f"the ImageNet weights of ResNet50 could not be fetched ({reason}); with a network "
                "Keras downloads them once, or set weights to the path of a weights file"
            ) from None
        finally:
            socket.setdefaulttimeout(timeout)
    elif not settings.weights:
        _prepare_random_weights(resnet)
    end, _ = STAGES[settings.last_stage]
    backbone = keras.Model(resnet.input, resnet.get_layer(end).output, name="resnet50")
    if settings.weights not in ("", "imagenet"):
        _load_weights(resnet, backbone, settings.weights)
    return backbone


def _load_weights(resnet: keras.Model, backbone: keras.Model, path: str) -> None:
    """Load a file of ``backbone``, or of the whole ``resnet`` that it is the start of."""
    try:
        backbone.load_weights(path)
        return
    except (OSError, ValueError):
        pass  # not a file of this part; what is wrong with it, the whole network will tell
    try:
        resnet.load_weights(path)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise WeightsUnavailableError(
            f"{show_path(Path(path))} holds no weights of Keras' ResNet50 without top ({reason})"
        ) from None


def _prepare_random_weights(resnet: keras.Model) -> None:
    """Make ResNet50 trainable from random weights in minutes."""
    for layer in resnet.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            # Keras' 0.99 needs several hundred steps before the moving averages are of any use.
            layer.momentum = 0.9
            if layer.name.endswith("_3_bn"):
                # Each residual branch starts at zero, its block as the identity: the signal passes
                # the untrained network unharmed (Goyal et al., "Accurate, Large Minibatch SGD",
                # 2017, section 5.1).
                layer.gamma.assign(np.zeros(layer.gamma.shape))


class Siamese(keras.Model):
    """One tower shared by all photos of a batch, and the loss that looks at all their embeddings.

    All photos pass through the tower as one batch, which is both the definition of shared weights
    and the fast way. Stored triplets uint8 (n, 3, h, w, 3) become float32 (n, 3, d), in the order
    anchor, positive, negative; P x K batches (m, h, w, 3) become (m, d). Either way there is one
    output, so that the loss sees what it has to compare.

    Args:
        tower: from :func:`build_tower`, or a head, over feature maps in place of photos.
        loss: of the groups and the embeddings of a batch. Its weights (ArcFace's centres) and its
            random state are the model's, and so are trained and saved with it.
    """

    def __init__(self, tower: keras.Model, loss: MetricLoss):
        super().__init__(name="siamese")
        self.tower, self.metric_loss = tower, loss
        loss.build((None,), (None, tower.output_shape[-1]))
        self.built = True

    def call(self, photos, training=None):
        shape = self.tower.input_shape[1:]
        batch = ops.reshape(photos, (-1, *shape))
        embeddings = self.tower(batch, training=training)
        return ops.reshape(embeddings, (-1, *photos.shape[1 : -len(shape)], embeddings.shape[-1]))

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        return self.metric_loss(y, y_pred)


def embed(tower: keras.Model, photos: np.ndarray, batch_size: int = 128) -> np.ndarray:
    """Embed photos: uint8 (n, h, w, 3) RGB at the tower's size -> float32 (n, d) of unit norm."""
    if len(photos) == 0:
        return np.empty((0, tower.output_shape[-1]), dtype=np.float32)
    return np.asarray(tower.predict(photos, batch_size=batch_size, verbose=0), dtype=np.float32)


def feature_maps(tower: keras.Model, photos: np.ndarray) -> np.ndarray:
    """The trunk's maps: uint8 (..., s, s, 3) -> float16 (..., h, w, c), half the memory."""
    batch = photos.reshape(-1, *photos.shape[-3:])
    maps = tower.get_layer("trunk").predict(batch, batch_size=128, verbose=0)
    return np.asarray(maps, dtype=np.float16).reshape(*photos.shape[:-3], *maps.shape[1:])


def gem_exponent(tower: keras.Model) -> float:
    """The exponent p of a tower's or head's GeM layer, the mean of one per channel.

    NaN if it pools in another way.
    """
    head = tower if tower.name == "head" else tower.get_layer("head")
    p = getattr(head.get_layer("pooling"), "p", None)
    return float("nan") if p is None else float(np.mean(ops.convert_to_numpy(p)))


def fingerprint(tower: keras.Model) -> str:
    """SHA-256 over a model's structure and weights, 64 hexadecimal digits.

    Embeddings of two models can't be compared; an index keeps the fingerprint of the model that
    made it.
    """
    structure = [(type(layer).__name__, layer.name) for layer in tower.layers]
    digest = hashlib.sha256(json.dumps([tower.input_shape, structure]).encode())
    for weight in tower.weights:
        digest.update(np.ascontiguousarray(ops.convert_to_numpy(weight)).tobytes())
    return digest.hexdigest()


def save_tower(tower: keras.Model, path: Path) -> None:
    """Save a tower as one ``.keras`` file, atomically."""
    with replacing(path) as part:
        tower.save(part)


def load_tower(path: Path) -> keras.Model:
    """Load a tower that :func:`save_tower` wrote, without running any code from the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not a tower of this project.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"no trained model at {path}: run notebook 02_triplet_training first, or set run_dir "
            "to a run that has one"
        )
    try:
        return keras.saving.load_model(path, compile=False, safe_mode=True)
    except Exception as error:  # zipfile's, h5py's, json's or Keras' own
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} is not a saved tower of this project: {reason}") from error
