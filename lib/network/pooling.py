"""Pooling layers, from a feature map to one descriptor per photo: GeM, R-MAC, average, max.

GeM: Radenović, Tolias, Chum, "Fine-tuning CNN Image Retrieval with No Human Annotation", TPAMI
2018, equation 3. With p = 1 it is the average of a channel, with p -> infinity its maximum.
R-MAC: Tolias, Sicre, Jégou, "Particular Object Retrieval with Integral Max-Pooling of CNN
Activations", ICLR 2016. It takes the maximum of each of several overlapping regions.

    gem(feature_maps, p=3.0)                      # (n, h, w, c) -> (n, c)
    make_pooling("rmac")(feature_maps)            # the same as a layer
"""

from __future__ import annotations

import keras
from keras import ops

EPSILON = 1e-6  # smallest activation, as in the paper: the gradient of log 0 is infinite
LARGEST_P = 100.0  # GeM is then at least 97 % of the maximum, over 4 x 4 places
SHORTEST = 1e-4  # else zero: L2 normalization's gradient, 1 / length, would overflow float16


def gem(feature_maps, p):
    """Generalized mean over the places of a feature map: (mean of x^p)^(1/p).

    Float (n, h, w, c) -> float (n, c), at least float32. Values below 1e-6 count as 1e-6. The
    exponent p, at least 1, is a number, a scalar tensor, or (c,), one exponent per channel.
    """
    # x^p = exp(p log x) is several times faster than a power and its gradient. logsumexp subtracts
    # the maximum before exp, so nothing overflows or vanishes, whatever p is.
    logs = _log(feature_maps)
    p = ops.convert_to_tensor(p, dtype=logs.dtype)
    height, width = ops.shape(logs)[1:3]
    places = ops.cast(height * width, logs.dtype)
    return ops.exp((ops.logsumexp(p * logs, axis=(1, 2)) - ops.log(places)) / p)


def contribution(feature_maps, p: float):
    """Each place's share of GeM's sum, the mean over the channels; the larger p, the fewer decide.

    Float (n, h, w, c) -> float (n, h, w), of which each map sums to 1.
    """
    return ops.mean(ops.softmax(p * _log(feature_maps), axis=(1, 2)), axis=-1)


def _log(feature_maps):
    x = ops.convert_to_tensor(feature_maps)
    x = ops.cast(x, keras.backend.result_type(x.dtype, "float32"))
    return ops.log(ops.maximum(x, EPSILON))


@keras.saving.register_keras_serializable(package="image_retrieval")
class GeM(keras.layers.Layer):
    """GeM pooling with one exponent for all channels, or one for each.

    Args:
        p: exponent to start from, 1 (the average) to 100 (nearly the maximum); the paper's 3.
        p_trainable: whether training may change it, within these bounds.
        per_channel: one exponent for each channel; the paper got better results with a shared one.
        p_rate: multiple of the learning rate for p, above 0. A step of Adam has about the size of
            the learning rate: right for weights of 0.1, it hardly moves a 3.

    Input float (n, h, w, c), output float32 (n, c).
    """

    def __init__(
        self,
        p: float = 3.0,
        p_trainable: bool = True,
        per_channel: bool = False,
        p_rate: float = 1.0,
        **kwargs,
    ):
        super().__init__(**{"dtype": "float32"} | kwargs)
        if not 1 <= p <= LARGEST_P:
            raise ValueError(f"GeM's p must be at least 1 and at most {LARGEST_P:g}, got {p}")
        if not p_rate > 0:
            raise ValueError(f"GeM's p_rate must be above 0, got {p_rate}")
        self.initial_p, self.p_trainable, self.per_channel = float(p), p_trainable, per_channel
        self.p_rate = float(p_rate)

    def build(self, input_shape):
        self.scaled_p = self.add_weight(
            name="p",
            shape=(input_shape[-1],) if self.per_channel else (),
            initializer=keras.initializers.Constant(self.initial_p / self.p_rate),
            constraint=lambda p: ops.clip(p, 1.0 / self.p_rate, LARGEST_P / self.p_rate),
            trainable=self.p_trainable,
        )

    @property
    def p(self):
        """The exponent: a scalar tensor, or (c,)."""
        return self.scaled_p * self.p_rate

    def set_p(self, p: float) -> None:
        """Set the exponent, of all channels alike."""
        self.scaled_p.assign(ops.full(self.scaled_p.shape, p / self.p_rate))

    def call(self, feature_maps):
        return gem(feature_maps, self.p)

    def get_config(self):
        config = {
            "p": self.initial_p,
            "p_trainable": self.p_trainable,
            "per_channel": self.per_channel,
        }
        if self.p_rate != 1:  # else fingerprints of towers made before would change
            config["p_rate"] = self.p_rate
        return super().get_config() | config


def rmac_regions(height: int, width: int, levels: int = 3) -> list[tuple[int, int, int]]:
    """The square regions of R-MAC.

    Level l of ``levels`` (the paper's 3) has regions of side 2 min(height, width) / (l + 1),
    rounded down, spread evenly: l along the short side and l + m - 1 along the long one. m is 1 for
    a square map, else that of 2 to 7 which brings the overlap of the largest regions closest to
    40 %. A level whose side would be less than one place is left out.

    Returns:
        (top, left, side) of each region, in places. On a small map, regions may coincide.
    """
    short, long = sorted((height, width))
    m = 1
    if long > short:
        # m regions of side `short` along `long` have m - 1 steps of (long - short) / (m - 1).
        m = min(range(2, 8), key=lambda m: abs(1 - (long - short) / (m - 1) / short - 0.4))
    regions = []
    for level in range(1, levels + 1):
        if side := 2 * short // (level + 1):
            tops, lefts = (
                [i * (length - side) // max(count - 1, 1) for i in range(count)]
                for length in (height, width)
                for count in [level + m - 1 if length > short else level]
            )
            regions += [(top, left, side) for top in tops for left in lefts]
    return regions


@keras.saving.register_keras_serializable(package="image_retrieval")
class RMac(keras.layers.Layer):
    """R-MAC pooling: the L2-normalized maxima of all regions are summed and L2-normalized again.

    The paper whitens each region's vector before the sum; here the head's learned projection takes
    that part. Vectors shorter than 1e-4 count as zero.

    Input float (n, h, w, c), output float32 (n, c).

    Raises:
        ValueError: fewer than one of the ``levels`` of :func:`rmac_regions`, or unknown h or w.
    """

    def __init__(self, levels: int = 3, **kwargs):
        super().__init__(**{"dtype": "float32"} | kwargs)
        if levels < 1:
            raise ValueError(f"R-MAC needs at least one level, got {levels}")
        self.levels = levels

    def build(self, input_shape):
        if None in input_shape[1:3]:
            raise ValueError(f"R-MAC needs maps of fixed height and width, got {input_shape}")
        self.regions = rmac_regions(*input_shape[1:3], self.levels)

    def call(self, feature_maps):
        maxima = [
            ops.max(feature_maps[:, top : top + side, left : left + side], axis=(1, 2))
            for top, left, side in self.regions
        ]
        return _unit(ops.sum(_unit(ops.stack(maxima, axis=1)), axis=1))

    def get_config(self):
        return super().get_config() | {"levels": self.levels}


def _unit(vectors):
    # ops.normalize has a NaN gradient at zero (a region without activations) on JAX and PyTorch.
    squares = ops.sum(ops.square(vectors), axis=-1, keepdims=True)
    alive = squares > SHORTEST**2
    return ops.where(alive, vectors / ops.sqrt(ops.where(alive, squares, 1.0)), 0.0)


# name -> a function (p, p_trainable, p_rate) -> layer
POOLINGS = {
    "gem": lambda p, moves, rate: GeM(p, moves, False, rate, name="pooling"),
    "gem-per-channel": lambda p, moves, rate: GeM(p, moves, True, rate, name="pooling"),
    "average": lambda *_: keras.layers.GlobalAveragePooling2D(dtype="float32", name="pooling"),
    "max": lambda *_: keras.layers.GlobalMaxPooling2D(dtype="float32", name="pooling"),
    "rmac": lambda *_: RMac(name="pooling"),
}


def make_pooling(
    kind: str, p: float = 3.0, p_trainable: bool = True, p_rate: float = 1.0
) -> keras.layers.Layer:
    """The pooling layer ``kind`` of ``POOLINGS``, (n, h, w, c) -> float32 (n, c), named "pooling".

    ``p``, ``p_trainable`` and ``p_rate`` are :class:`GeM`'s; the others have no exponent.

    Raises:
        ValueError: an unknown kind, or p out of GeM's range.
    """
    if kind not in POOLINGS:
        raise ValueError(f"unknown pooling {kind!r}; choose one of {', '.join(POOLINGS)}")
    return POOLINGS[kind](p, p_trainable, p_rate)
