"""The tower that embeds a photo, and the Siamese model that trains it.

    photo uint8 RGB -> the backbone's own preprocessing -> backbone -> GeM -> projection -> L2 norm

    tower = build_tower(TowerSettings(image_size=64))
    embeddings = embed(tower, photos)             # uint8 (n, 64, 64, 3) -> float32 (n, 128)
    siamese = Siamese(tower, MetricLoss(InfoNCE()))    # (n, 3, 64, 64, 3) -> (n, 3, 128)

Preprocessing is part of the tower, so it is the same in training, evaluation and search. All
computes with ``keras.ops``, on Keras' TensorFlow, JAX and PyTorch backends.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import json
import logging
import socket
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import keras
import numpy as np
from keras import ops

from lib.files import check_stored, replacing, show_error, show_path
from lib.network import efficientnet_lite, hub
from lib.network.efficientnet_lite import PACKAGES
from lib.network.hub import WeightsUnavailableError
from lib.network.losses import MetricLoss, distillation_loss
from lib.network.openvino import fast_precision
from lib.network.pooling import GeM, make_pooling

# The last layer of ResNet50's stages. A place of the map has 2^stage pixels on each side.
STAGES = {3: "conv3_block4_out", 4: "conv4_block6_out", 5: "conv5_block3_out"}

# Constructors of networks: all of keras.applications, which alone begin with a capital letter, and
# those whose weights come with a package.
BACKBONES = {name: c for name, c in vars(keras.applications).items() if name[0].isupper()}
BACKBONES |= {name: getattr(efficientnet_lite, name) for name in PACKAGES}
BACKBONES = dict(sorted(BACKBONES.items()))

# Entries of a Keras configuration that :func:`structure` leaves out: names, which Keras numbers
# within a process, and what follows from other entries or does not change the embeddings.
_NO_STRUCTURE = {"name", "module", "registered_name", "build_config", "dtype", "trainable"}
_REFERENCES = {"keras_history", "input_layers", "output_layers"}  # to layers, by name

POLICIES = ("float32", "mixed_bfloat16")
PRETRAINED = ("imagenet", "packaged", "hub")  # what ``weights`` may name besides a file


@functools.cache  # adds the filter once
def _silence_retracing() -> None:
    """TensorFlow mistakes several networks, each traced once, for one traced again and again."""
    logging.getLogger("tensorflow").addFilter(
        lambda record: "triggered tf.function retracing" not in record.getMessage()
    )


@dataclass(frozen=True)
class TowerSettings:
    """The settings of a tower.

    Attributes:
        image_size: side of the square input photo in pixels.
        embedding_size: dimension of the embedding. 0: no projection; the embedding is the pooled
            feature map at unit norm, which needs no training.
        pooling: "gem", "gem-per-channel", "average", "max" or "rmac"; of a vision transformer, also
            "class", its class token, and no GeM.
        gem_p, gem_p_trainable, gem_p_rate: GeM's initial exponent, whether it is learned, and at
            which multiple of the learning rate.
        backbone: one of ``BACKBONES``, the networks of ``keras.applications`` and
            :mod:`lib.network.efficientnet_lite`; or "hub:" and a preset of :mod:`lib.network.hub`.
        width: multiple of a MobileNet's usual number of channels (its ``alpha``).
        last_stage: the stage of ResNet50 whose feature map is pooled, 3 to 5 (the whole backbone).
        weights: pre-trained on ImageNet, "imagenet" (fetched once by Keras) or, for an
            EfficientNet-Lite, "packaged" (from a Python package); of a preset, "hub"; the path of a
            Keras weights file; or "" for random weights.
        precision: of the backbone: "float32", or "mixed_bfloat16", which computes in bfloat16 and
            keeps the weights in float32. The head computes in float32 either way.
    """

    image_size: int = 128
    embedding_size: int = 128
    pooling: str = "gem"
    gem_p: float = 3.0
    gem_p_trainable: bool = True
    gem_p_rate: float = 1.0
    backbone: str = "ResNet50"
    width: float = 1.0
    last_stage: int = 5
    weights: str = "imagenet"
    precision: str = "float32"

    def __post_init__(self):
        if self.backbone not in BACKBONES and not self.of_hub:
            raise ValueError(
                f"there is no backbone {self.backbone!r}; choose one of {', '.join(BACKBONES)}, or "
                "a preset of keras-hub, such as hub:dinov2_small"
            )
        own = "packaged" if self.backbone in PACKAGES else "hub" if self.of_hub else "imagenet"
        is_file = self.weights not in ("", *PRETRAINED)
        if self.weights in {*PRETRAINED} - {own} or (self.of_hub and is_file):
            raise ValueError(
                f'the pre-trained weights of {self.backbone} are weights="{own}", '
                f"not {self.weights!r}"
            )
        options = {} if self.of_hub else inspect.signature(BACKBONES[self.backbone]).parameters
        if self.width != 1 and "alpha" not in options:
            raise ValueError(f"{self.backbone} has one width only: leave width at 1")
        if self.pooling == "class" and not self.of_hub:
            raise ValueError(f'{self.backbone} has no class token: pooling="class" is not for it')
        if self.pooling.startswith("gem") and self.of_hub:
            raise ValueError(
                f"the tokens of {self.backbone} are signed, and GeM counts negative values as "
                'zero: choose pooling="class" or "average"'
            )
        if self.backbone != "ResNet50" and self.last_stage != 5:
            raise ValueError(f"{self.backbone} is taken whole: leave last_stage at 5")
        if self.embedding_size < 0:
            raise ValueError(f"embedding_size must not be negative, got {self.embedding_size}")
        if self.precision not in POLICIES:
            raise ValueError(f"precision must be one of {POLICIES}, got {self.precision!r}")
        if self.last_stage not in STAGES:
            raise ValueError(f"last_stage must be one of {sorted(STAGES)}, got {self.last_stage}")
        if self.image_size < 2**self.last_stage:
            raise ValueError(
                f"image_size must be at least {2**self.last_stage}, got {self.image_size}"
            )

    @property
    def of_hub(self) -> bool:
        """Whether the backbone is one of :mod:`lib.network.hub`."""
        return self.backbone.startswith(hub.PREFIX)


def other_weights(settings: TowerSettings) -> TowerSettings:
    """The settings to go on with where a tower's weights can't be had.

    In place of a download, EfficientNet-Lite0 with the weights of its package (pooled by GeM where
    there is no class token any more) or, for photos below 32 pixels, which are too small for them,
    random ones; else random weights.
    """
    small = settings.image_size < 32
    if not settings.of_hub and (settings.weights != "imagenet" or small):
        return replace(settings, weights="")
    packaged = {"backbone": "EfficientNetLite0", "weights": "" if small else "packaged"}
    if settings.pooling == "class":
        packaged["pooling"] = "gem"
    return replace(settings, width=1.0, last_stage=5, **packaged)


@keras.saving.register_keras_serializable(package="image_retrieval")
class Preprocessing(keras.layers.Layer):
    """The ``preprocess_input`` of the module of a network of ``BACKBONES``.

    Input RGB from 0 to 255, uint8 or float (n, h, w, 3); output float32 of the same shape: for
    ResNet50, BGR order minus ImageNet's mean colour, not scaled.
    """

    def __init__(self, backbone: str, name: str = "preprocessing", **kwargs):
        super().__init__(name=name, **kwargs)
        self.backbone = backbone
        self._preprocess = inspect.getmodule(BACKBONES[backbone]).preprocess_input

    def call(self, photos):
        return self._preprocess(ops.cast(photos, "float32"))

    def get_config(self):
        return super().get_config() | {"backbone": self.backbone}


def build_tower(settings: TowerSettings) -> keras.Model:
    """Build the network that embeds a photo.

    Input uint8 RGB (n, image_size, image_size, 3); output float32 (n, embedding_size) of unit L2
    norm. ``tower.get_layer("trunk")`` computes feature maps, ``tower.get_layer("head")`` embeddings
    from them.

    Raises:
        WeightsUnavailableError: the weights can't be fetched or read.
        ImportError: keras-hub is not installed, for a backbone from there.
        ValueError: GeM pooling of a backbone with signed maps; photos of a size that does not fit
            the backbone.
    """
    with computing_in(settings.precision):
        backbone = build_backbone(settings)
        own = hub.preprocessing if settings.of_hub else Preprocessing
        trunk = _build_trunk(settings.image_size, own(settings.backbone), backbone)
    if _is_signed(trunk) and settings.pooling.startswith("gem"):
        raise ValueError(
            f"the feature maps of {settings.backbone} are signed (about half of the activations "
            'are negative), and GeM counts negative ones as zero: choose pooling="average"'
        )
    head = build_head(trunk.output_shape[1:], settings)
    return keras.Model(trunk.input, head(trunk(trunk.input)), name="tower")


def _is_signed(trunk: keras.Model) -> bool:
    """Whether about half of its maps' values are negative, as of ConvNeXt and of transformers.

    Other backbones end with activations, which go no lower than -0.375.
    """
    last = trunk.get_layer("backbone").layers[-1]
    return hub.has_tokens(trunk) or isinstance(last, keras.layers.LayerNormalization)


def _build_trunk(
    image_size: int | None, preprocessing: keras.layers.Layer, backbone: keras.Model
) -> keras.Model:
    photos = keras.Input((image_size, image_size, 3), dtype="uint8", name="photos")
    return keras.Model(photos, backbone(preprocessing(photos)), name="trunk")


def fast_policy() -> str:
    """The policy, of ``POLICIES``, that trains fast here: some processors only emulate bfloat16."""
    on_gpu = "cpu" not in str(ops.zeros(1).device).lower()
    return "mixed_bfloat16" if on_gpu or fast_precision() == "bfloat16" else "float32"


@contextlib.contextmanager
def computing_in(precision: str) -> Iterator[None]:
    """Layers made in the block compute in ``precision``, a Keras dtype policy."""
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(precision)
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)


def build_head(map_shape: tuple[int, int, int], settings: TowerSettings) -> keras.Model:
    """Build the head: pooling, projection, L2 normalization.

    Input float (n, *map_shape), map_shape (h, w, c); output float32 (n, embedding_size or c).
    """
    _silence_retracing()
    maps = keras.Input(map_shape, name="feature_maps")
    exponent = (settings.gem_p, settings.gem_p_trainable, settings.gem_p_rate)
    # The map of a class token has one place.
    pooling = "average" if settings.pooling == "class" else settings.pooling
    x = make_pooling(pooling, *exponent)(maps)
    if size := settings.embedding_size:
        x = keras.layers.Dense(size, use_bias=False, name="projection")(x)
        # ReLU maps are positive, so all embeddings would point the same way. Batch normalization
        # subtracts their mean; without a learned shift it can't add one back.
        x = keras.layers.BatchNormalization(
            momentum=0.9, center=False, scale=False, name="centring"
        )(x)
    x = keras.layers.UnitNormalization(dtype="float32", name="l2_normalization")(x)
    return keras.Model(maps, x, name="head")


def frozen_trunk(tower: keras.Model, gem_p: float = 3.0) -> keras.Model:
    """The tower's trunk under GeM and L2 normalization alone: what is there without a trained head.

    uint8 (n, s, s, 3) -> float32 (n, c). Every training should beat it. Signed maps are averaged in
    place of GeM.
    """
    trunk = tower.get_layer("trunk")
    pooling = "average" if _is_signed(trunk) else "gem"
    settings = TowerSettings(embedding_size=0, pooling=pooling, gem_p=gem_p, gem_p_trainable=False)
    return keras.Sequential([trunk, build_head(trunk.output_shape[1:], settings)], name="frozen")


def build_backbone(settings: TowerSettings) -> keras.Model:
    """Build the backbone, from preprocessed photos to maps; errors as in :func:`build_tower`."""
    if settings.of_hub:
        one_token, load_weights = settings.pooling == "class", settings.weights == "hub"
        return hub.build(settings.backbone, settings.image_size, one_token, load_weights)
    size, options = settings.image_size, {} if settings.width == 1 else {"alpha": settings.width}
    build = functools.partial(
        BACKBONES[settings.backbone], include_top=False, input_shape=(size, size, 3), **options
    )
    own_file = settings.weights not in ("", *PRETRAINED)
    if own_file and not Path(settings.weights).is_file():
        name = show_path(Path(settings.weights))
        raise WeightsUnavailableError(f"there is no weights file {name}")
    if settings.weights == "packaged":
        try:
            whole = build(weights="packaged")
        except (ImportError, OSError, ValueError) as error:
            raise WeightsUnavailableError(show_error(error)) from None
    else:
        whole = build(weights=None)
    if settings.weights == "imagenet":
        timeout = socket.getdefaulttimeout()
        socket.setdefaulttimeout(30)  # seconds; without it, an unresponsive network hangs forever
        try:
            whole = build(weights="imagenet")
        except Exception as error:  # of urllib, socket or Keras
            raise WeightsUnavailableError(
                f"the ImageNet weights of {settings.backbone} could not be fetched "
                f"({show_error(error)}): connect to the network once, or name a weights file"
            ) from None
        finally:
            socket.setdefaulttimeout(timeout)
    elif not settings.weights:
        _prepare_random_weights(whole)
    last = STAGES[settings.last_stage] if settings.backbone == "ResNet50" else whole.layers[-1].name
    backbone = keras.Model(whole.input, whole.get_layer(last).output, name="backbone")
    if not own_file:
        return backbone
    for network in (backbone, whole):  # the file may be of either
        try:
            network.load_weights(settings.weights)
            return backbone
        except (OSError, ValueError) as error:
            reason = show_error(error)
    raise WeightsUnavailableError(
        f"{show_path(Path(settings.weights))} holds no Keras weights of {settings.backbone} "
        f"without top ({reason})"
    )


def _prepare_random_weights(network: keras.Model) -> None:
    """Make a network (mostly ResNet50) trainable from random weights in minutes."""
    for layer in network.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            # With Keras' default of 0.99, moving averages need several hundred steps.
            layer.momentum = 0.9
            if layer.name.endswith("_3_bn"):
                # Each residual block starts as the identity (Goyal et al., "Accurate, Large
                # Minibatch SGD", 2017, section 5.1).
                layer.gamma.assign(np.zeros(layer.gamma.shape))


class Siamese(keras.Model):
    """One tower for all photos of a batch, and the loss over all their embeddings.

    Stored triplets uint8 (n, 3, h, w, 3) become float32 (n, 3, d), in the order anchor, positive,
    negative; P x K batches (m, h, w, 3) become (m, d). A head as the tower takes feature maps. The
    loss's weights (ArcFace's centres, a memory) and random state are saved with the model.

    Where batches have a teacher's descriptors, in the place of Keras' sample weights, distillation
    takes ``teacher_share`` of the loss, from 0 to 1.
    """

    def __init__(self, tower: keras.Model, loss: MetricLoss, teacher_share: float = 0.0):
        super().__init__(name="siamese")
        _silence_retracing()
        self.tower, self.metric_loss, self.teacher_share = tower, loss, teacher_share
        loss.build((None,), (None, tower.output_shape[-1]))
        self.built = True

    def call(self, photos, training=None):
        shape = self.tower.input_shape[1:]
        batch = ops.reshape(photos, (-1, *shape))
        embeddings = self.tower(batch, training=training)
        return ops.reshape(embeddings, (-1, *photos.shape[1 : -len(shape)], embeddings.shape[-1]))

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        loss = self.metric_loss(y, y_pred, training=training)
        if sample_weight is not None:
            of_teacher = distillation_loss(y_pred, sample_weight)
            loss = (1 - self.teacher_share) * loss + self.teacher_share * of_teacher
        return sum(self.losses, loss)  # self.losses: regularization


def resized(tower: keras.Model, image_size: int | None) -> keras.Model:
    """A tower for photos of another size (None: any), with a copy of the weights.

    Raises:
        ValueError: the backbone is a transformer, and the size None or no multiple of its patches.
    """
    old = tower.get_layer("trunk")
    if hub.has_tokens(old):
        backbone = hub.resized(old.get_layer("backbone"), image_size)
    else:
        pixels = keras.Input((image_size, image_size, 3))
        backbone = keras.models.clone_model(old.get_layer("backbone"), input_tensors=pixels)
        backbone.set_weights(old.get_layer("backbone").get_weights())
    trunk = _build_trunk(image_size, old.get_layer("preprocessing"), backbone)
    maps = keras.Input(trunk.output_shape[1:], name="feature_maps")
    head = keras.models.clone_model(tower.get_layer("head"), input_tensors=maps)
    head.set_weights(tower.get_layer("head").get_weights())
    return keras.Model(trunk.input, head(trunk(trunk.input)), name="tower")


def embed(tower: keras.Model, photos: np.ndarray) -> np.ndarray:
    """Embed photos: uint8 (n, h, w, 3) RGB at the tower's size -> float32 (n, d) of unit norm."""
    if len(photos) == 0:
        return np.empty((0, *tower.output_shape[1:]), dtype=np.float32)
    return np.asarray(tower.predict(photos, batch_size=128, verbose=0), dtype=np.float32)


def feature_maps(tower: keras.Model, photos: np.ndarray) -> np.ndarray:
    """The trunk's maps: uint8 (..., s, s, 3) -> float16 (..., h, w, c); see :func:`to_float16`."""
    maps = to_float16(embed(tower.get_layer("trunk"), photos.reshape(-1, *photos.shape[-3:])))
    return maps.reshape(*photos.shape[:-3], *maps.shape[1:])


def to_float16(maps: np.ndarray) -> np.ndarray:
    """Feature maps as float16; a ValueError if one is NaN or beyond its range."""
    peak, largest = np.abs(maps).max(initial=0), float(np.finfo(np.float16).max)
    if not peak <= largest:
        raise ValueError(f"the trunk's feature maps reach {peak}, float16 ends at {largest:.0f}")
    return maps.astype(np.float16)


def layers_of(model: keras.Model) -> Iterator[keras.layers.Layer]:
    """The layers of a model, with nested models replaced by their layers."""
    for layer in model.layers:
        yield from layers_of(layer) if isinstance(layer, keras.Model) else [layer]


def compute_precision(model: keras.Model) -> str:
    """The lowest precision that any layer computes in: "bfloat16", "float16" or "float32"."""
    precisions = {layer.compute_dtype for layer in layers_of(model)}
    return next((p for p in ("bfloat16", "float16") if p in precisions), "float32")


def in_float32(model: keras.Model) -> keras.Model:
    """The model computing in float32 (a copy if need be), as OpenVINO needs it."""
    if compute_precision(model) == "float32":
        return model
    copy = keras.models.clone_model(
        model,
        clone_function=lambda x: x.from_config(x.get_config() | {"dtype": "float32"}),
        recursive=True,
    )
    copy.set_weights(model.get_weights())
    return copy


def gem_exponent(tower: keras.Model) -> float:
    """The exponent p of a tower's or head's GeM layer, the mean over channels; NaN without GeM."""
    found = [ops.convert_to_numpy(x.p) for x in layers_of(tower) if isinstance(x, GeM)]
    return float(np.mean(found)) if found else float("nan")


def fingerprint(model: keras.Model) -> str:
    """SHA-256 over a model's structure and weights, 64 hexadecimal digits.

    It is equal in every precision, on all Keras backends, and after saving and loading. Everything
    made with a model stores it, since embeddings of different models can't be compared.
    """
    digest = hashlib.sha256(structure(model).encode())
    for weight in model.weights:
        digest.update(np.ascontiguousarray(ops.convert_to_numpy(weight)).tobytes())
    return digest.hexdigest()


def structure(model: keras.Model) -> str:
    """A model's layers, their settings and connections as JSON, without dtypes and Keras' names."""
    return json.dumps(_without_names(model.get_config()), sort_keys=True)


def _without_names(config, places: dict[str, int] | None = None, is_reference: bool = False):
    if isinstance(config, dict):
        if "layers" in config:
            places = {layer["config"]["name"]: i for i, layer in enumerate(config["layers"])}
        return {
            key: _without_names(value, places, key in _REFERENCES)
            for key, value in config.items()
            if key not in _NO_STRUCTURE
        }
    if isinstance(config, list | tuple):
        return [_without_names(value, places, is_reference) for value in config]
    return places.get(config, config) if is_reference else config


def save_tower(tower: keras.Model, path: Path) -> None:
    """Save a tower as one ``.keras`` file, atomically."""
    with replacing(path) as part:
        tower.save(part)


def load_tower(path: Path) -> keras.Model:
    """Load a tower that :func:`save_tower` wrote, without running any code from the file.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: keras-hub is not installed, for a tower with a backbone from there.
        ValueError: the file is not a tower of this project.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"no trained model at {path}: run notebook 02_triplet_training first, or set run_dir "
            "to a run that has one"
        )
    _silence_retracing()
    try:
        with zipfile.ZipFile(path) as archive:
            check_stored(archive)
        return keras.saving.load_model(path, compile=False, safe_mode=True)
    except Exception as error:  # of zipfile, h5py, json or Keras
        if "parent module keras_hub" in str(error):
            hub.import_keras_hub()
        raise ValueError(
            f"{show_path(path)} is not a saved tower of this project: {show_error(error)}"
        ) from error
