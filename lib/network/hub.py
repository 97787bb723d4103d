"""Vision transformers of keras-hub as backbones: DINOv2, DINOv3, CLIP's, SigLIP's and SigLIP 2's.

    network = build("hub:dinov2_small", 224, class_token=True)
    network(preprocessing("hub:dinov2_small")(photos))     # (n, 224, 224, 3) -> (n, 1, 1, 384)

After ``hub:`` comes the name of a preset, which keras-hub fetches once, or the path of a folder
that holds one (``save_to_preset`` of a backbone and of its image converter writes it). keras-hub is
the extra ``hub`` (``make hub``); only these functions import it.

Oquab et al., "DINOv2: Learning Robust Visual Features without Supervision", TMLR 2024; Siméoni et
al., "DINOv3", 2025; Radford et al., "Learning Transferable Visual Models From Natural Language
Supervision", ICML 2021; Zhai et al., "Sigmoid Loss for Language Image Pre-Training", ICCV 2023.
"""

from __future__ import annotations

import math

import keras
from keras import ops

from lib.files import show_error

PREFIX = "hub:"
FAMILIES = ("DINOV2Backbone", "DINOV3Backbone", "CLIPVisionEncoder", "SigLIPVisionEncoder")


class WeightsUnavailableError(OSError):
    """Pre-trained weights can't be fetched or read."""


def import_keras_hub():
    """Import keras-hub; an ImportError says how to install it."""
    try:
        import keras_hub
    except ImportError as error:
        raise ImportError(
            f"backbones that begin with {PREFIX} need keras-hub, which can't be imported "
            f"({show_error(error)}): `make hub` or pip install --no-deps keras-hub regex tokenizers"
        ) from None
    return keras_hub


@keras.saving.register_keras_serializable(package="image_retrieval")
class TokenMap(keras.layers.Layer):
    """The patch tokens of a transformer as a map, or its first token, that of the class, alone.

    Args:
        skipped: tokens (class and registers) before those of the patches; None: the first token.

    Input float (n, t, c), the patches row by row; output (n, h, w, c), h = w, or (n, 1, 1, c).
    """

    def __init__(self, skipped: int | None, **kwargs):
        super().__init__(**kwargs)
        self.skipped = skipped

    def build(self, input_shape):
        # Here, since TensorFlow does not know the number of tokens when it traces ``call``.
        self._side = 1 if self.skipped is None else math.isqrt(input_shape[1] - self.skipped)

    def call(self, tokens):
        tokens = tokens[:, :1] if self.skipped is None else tokens[:, self.skipped :]
        return ops.reshape(tokens, (-1, self._side, self._side, tokens.shape[-1]))

    def get_config(self):
        return super().get_config() | {"skipped": self.skipped}


def has_tokens(trunk: keras.Model) -> bool:
    """Whether the maps of a tower's trunk are tokens: signed, and of photos of one size alone."""
    return isinstance(trunk.get_layer("backbone").layers[-1], TokenMap)


def preprocessing(backbone: str) -> keras.layers.Rescaling:
    """The preset's own rescaling and offset of colours; errors of the preset as in :func:`build`.

    RGB from 0 to 255, uint8 or float (n, h, w, 3) -> float32 of the same shape.
    """
    own = _from_preset(import_keras_hub().layers.ImageConverter, backbone)
    scale, offset = (1.0 if own.scale is None else own.scale), own.offset or 0.0
    return keras.layers.Rescaling(scale, offset, dtype="float32", name="preprocessing")


def build(
    backbone: str, image_size: int, class_token: bool = False, load_weights: bool = True
) -> keras.Model:
    """Build the vision transformer of a preset, after its last layer normalization.

    Args:
        backbone: "hub:" and a preset's name or folder.
        image_size: a multiple of the side of its patches, in pixels. If it is not the preset's, the
            embeddings of positions are resized bicubically; DINOv3 has none.
        class_token: give the class token in place of the patches; of SigLIP, which has none, the
            result of its attention pooling.
        load_weights: the preset's, else random ones.

    Returns:
        preprocessed photos (n, image_size, image_size, 3) -> float (n, h, w, c), h = w = image_size
        / patch, or (n, 1, 1, c). It computes in Keras' dtype policy.

    Raises:
        ImportError: keras-hub is not installed.
        WeightsUnavailableError: the preset can't be fetched or read.
        ValueError: it is of another family than ``FAMILIES``, or image_size does not fit.
    """
    network = _from_preset(import_keras_hub().models.Backbone, backbone, load_weights=load_weights)
    network = getattr(network, "vision_encoder", network)  # without CLIP's encoder of texts
    family = type(network)
    if family.__name__ not in FAMILIES:
        raise ValueError(f"{backbone} is a {family.__name__}, not one of {', '.join(FAMILIES)}")
    _check_size(image_size, network.patch_size)
    sizes = {"image_shape": (image_size, image_size, 3), "dtype": keras.config.dtype_policy()}
    is_dinov2 = family.__name__ == "DINOV2Backbone"
    if is_dinov2:  # else it keeps the positions of two sizes, and resizes them anew when loaded
        sizes["position_embedding_shape"] = sizes["image_shape"]
    own = family.from_config(network.get_config() | sizes)
    _copy_weights(network, own)
    if is_dinov2:
        positions = own.embeddings.position_embeddings
        own.embeddings.interpolated_position_embeddings.assign(positions)
        own.embeddings.trainable = False
    tokens, skipped = own.output, 1 + getattr(own, "num_register_tokens", 0)
    if family.__name__ == "SigLIPVisionEncoder":
        pooled = keras.layers.Reshape((1, own.hidden_dim))(tokens)
        tokens, skipped = pooled if class_token else own.post_layer_norm.output, 0
    maps = TokenMap(None if class_token else skipped, name="token_map")(tokens)
    return keras.Model(own.inputs[0], maps, name="backbone")


def stays_fixed(layer: keras.layers.Layer) -> bool:
    """Whether training must not change a layer: keras-hub saves DINOv2's positions inexactly.

    Its ``save_own_variables`` (0.32) writes the positions of before, unless their sum has fallen.
    """
    return type(layer).__name__ == "DINOV2Embedding"


def resized(backbone: keras.Model, image_size: int | None) -> keras.Model:
    """A copy of a network of :func:`build` for photos of another size.

    Raises:
        ValueError: ``image_size`` is None, or not a multiple of the side of the patches.
    """
    if image_size is None:
        raise ValueError(
            "a vision transformer takes photos of one size: name an image_size, and leave out views"
        )

    def at_size(layer):
        config = layer.get_config()
        if "patch_size" in config:
            _check_size(image_size, config["patch_size"])
        shapes = dict.fromkeys(("image_shape", "position_embedding_shape"), (image_size,) * 2)
        shapes["image_size"] = image_size
        return layer.from_config(config | {k: v for k, v in shapes.items() if k in config})

    pixels = keras.Input((image_size, image_size, 3))
    copy = keras.models.clone_model(backbone, input_tensors=pixels, clone_function=at_size)
    _copy_weights(backbone, copy)
    return copy


def _check_size(image_size: int, patch: int) -> None:
    if image_size % patch:
        raise ValueError(
            f"image_size must be a multiple of {patch}, the side of the network's patches, got "
            f"{image_size}: choose {image_size // patch * patch + patch}"
        )


def _copy_weights(source: keras.Model, target: keras.Model) -> None:
    """Copy the weights of a network to the same network for another size of photos."""
    antialias = any(getattr(x, "antialias_in_interpolation", False) for x in source.layers)
    for old, new in zip(source.weights, target.weights, strict=True):
        if new.name == "position_ids":  # of CLIP and SigLIP; a new CLIP has zeros here
            new.assign(ops.reshape(ops.arange(new.shape[1], dtype=new.dtype), new.shape))
        else:
            new.assign(old if old.shape == new.shape else _at_grid(old, new.shape, antialias))


def _at_grid(positions, shape: tuple[int, ...], antialias: bool):
    """Resize embeddings of positions, (..., [1 +] g * g, c), as keras-hub does for DINOv2."""
    rows = ops.reshape(positions, (-1, shape[-1]))
    old, new = (math.isqrt(count) for count in (rows.shape[0], shape[-2]))
    extra = rows.shape[0] - old * old  # 1 for the class token
    grid = ops.reshape(rows[extra:], (1, old, old, -1))
    grid = ops.image.resize(grid, (new, new), interpolation="bicubic", antialias=antialias)
    return ops.reshape(ops.concatenate([rows[:extra], ops.reshape(grid, (new * new, -1))]), shape)


def _from_preset(loader, backbone: str, **options):
    preset = backbone.removeprefix(PREFIX)
    try:
        return loader.from_preset(preset, **options)
    except Exception as error:  # of requests, kagglehub, keras-hub, h5py or json
        raise WeightsUnavailableError(
            f"keras-hub could not load the preset {preset} ({show_error(error)}): connect to the "
            f"network once, or name a folder that holds it with its image converter, {PREFIX}PATH"
        ) from None
