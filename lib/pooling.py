"""Pooling: from a feature map, one vector per place, to one descriptor per picture.

Generalized-mean pooling (Radenović, Tolias, Chum, "Fine-tuning CNN Image Retrieval with No Human
Annotation", TPAMI 2018, equation 3) spans the two classical ways: p = 1 is the average of a channel
over all places, p -> infinity its maximum.

    gem(feature_maps, p=3.0)      # (n, h, w, c) -> (n, c)
"""

from __future__ import annotations

import keras
from keras import ops

POOLINGS = ("gem", "average", "max")


def gem(feature_maps, p, eps: float = 1e-6):
    """Generalized mean over the places of a feature map: (mean of x^p)^(1/p).

    Args:
        feature_maps: float (n, h, w, c). Values below ``eps`` count as ``eps``: the maps come out
            of a ReLU, and the p-th root has no finite slope at 0.
        p: exponent, a number or a scalar tensor, at least 1.
        eps: the smallest activation, the paper's 1e-6.

    Returns:
        float (n, c), each value between the channel's average and its maximum.
    """
    # Divided by its maximum, x^p can neither overflow nor vanish altogether, whatever p is.
    x = ops.maximum(feature_maps, eps)
    peak = ops.stop_gradient(ops.max(x, axis=(1, 2), keepdims=True))
    mean = ops.mean(ops.power(x / peak, p), axis=(1, 2))
    return ops.squeeze(peak, axis=(1, 2)) * ops.power(mean, 1.0 / p)


def contribution(feature_maps, p: float):
    """What share of the sum that GeM takes the root of comes from each place.

    Args:
        feature_maps: float (n, h, w, c), not negative.
        p: GeM's exponent. At 1 all places have their say; the larger, the fewer decide.

    Returns:
        float (n, h, w), the mean over the channels of x^p over its sum; each map sums to 1.
    """
    x = ops.maximum(feature_maps, 1e-6)
    power = ops.power(x / ops.max(x, axis=(1, 2), keepdims=True), p)
    return ops.mean(power / ops.sum(power, axis=(1, 2), keepdims=True), axis=-1)


@keras.saving.register_keras_serializable(package="image_retrieval")
class GeM(keras.layers.Layer):
    """GeM pooling with one exponent for all channels.

    Args:
        p: exponent to start from; the paper's 3.
        p_trainable: whether training may change it.

    Input float (n, h, w, c), output float32 (n, c). It computes in float32 whatever the policy,
    for a third power leaves the range of half precision early.
    """

    def __init__(self, p: float = 3.0, p_trainable: bool = True, **kwargs):
        super().__init__(**{"dtype": "float32"} | kwargs)
        if p < 1:
            raise ValueError(f"GeM's exponent p must be at least 1 (the average), got {p}")
        self.initial_p = float(p)
        self.p_trainable = p_trainable

    def build(self, input_shape):
        self.p = self.add_weight(
            name="p",
            shape=(),
            initializer=keras.initializers.Constant(self.initial_p),
            constraint=AtLeastOne(),
            trainable=self.p_trainable,
        )

    def call(self, feature_maps):
        return gem(feature_maps, self.p)

    def compute_output_shape(self, input_shape):
        return (input_shape[0], input_shape[-1])

    def get_config(self):
        return super().get_config() | {"p": self.initial_p, "p_trainable": self.p_trainable}


@keras.saving.register_keras_serializable(package="image_retrieval")
class AtLeastOne(keras.constraints.Constraint):
    """Keeps GeM's exponent from falling below the average's."""

    def __call__(self, p):
        return ops.maximum(p, 1.0)


def make_pooling(kind: str, p: float = 3.0, p_trainable: bool = True) -> keras.layers.Layer:
    """The pooling layer ``kind``, (n, h, w, c) -> (n, c).

    Args:
        kind: "gem", "average" or "max".
        p: exponent of "gem" to start from; the others have none.
        p_trainable: whether "gem" learns its exponent.

    Raises:
        ValueError: an unknown kind.
    """
    match kind:
        case "gem":
            return GeM(p, p_trainable, name="pooling")
        case "average":
            return keras.layers.GlobalAveragePooling2D(dtype="float32", name="pooling")
        case "max":
            return keras.layers.GlobalMaxPooling2D(dtype="float32", name="pooling")
    raise ValueError(f"unknown pooling {kind!r}; choose one of {', '.join(POOLINGS)}")
