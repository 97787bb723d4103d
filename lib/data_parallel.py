"""Several processes that train one model together, as Keras' JAX backend does it.

    jax.distributed.initialize(...)                 # of whoever starts them, see lib/cluster/ray.py
    with together(seed=1):
        tower = load_tower(path)
        train(tower, handler, validation, settings, run)       # the same call in every process

Each process holds all weights and computes its rows of every batch. The loss sees the embeddings of
the whole batch, so mining and negatives are those of one process, and so are gradients and the
statistics of batch normalizations: what differs is the order of sums, and so their rounding.

Without :func:`together` there is one process, and the functions here do nothing.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator

import keras
import numpy as np

# A model's copy for this process alone. It is kept, so that it is compiled once.
_COPIES: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def together(seed: int) -> Iterator[int]:
    """Models made in the block are trained by all processes of ``jax.distributed``.

    Args:
        seed: of Keras' random numbers, the same in all of them: weights must not differ, not even
            those that a model has before its file is read.

    Yields:
        the number of this process, from 0.

    Raises:
        RuntimeError: Keras does not run on JAX.
    """
    if keras.backend.backend() != "jax":
        raise RuntimeError(
            f"several processes train on Keras' JAX backend, not on {keras.backend.backend()}: "
            "set KERAS_BACKEND=jax"
        )
    import jax

    before = keras.distribution.distribution()
    # Every process makes its own rows of a batch, so Keras has nothing to divide.
    keras.distribution.set_distribution(keras.distribution.DataParallel(auto_shard_dataset=False))
    keras.utils.set_random_seed(seed)
    try:
        yield jax.process_index()
    finally:
        keras.distribution.set_distribution(before)


def own_rows(rows: int) -> slice:
    """The rows of a batch that this process computes.

    Raises:
        ValueError: the batch can't be divided evenly among the devices of all processes.
    """
    distribution = keras.distribution.distribution()
    if distribution is None:
        return slice(None)
    import jax

    devices = distribution.device_mesh.devices.size
    if rows % devices:
        raise ValueError(
            f"a batch of {rows} can't be divided evenly among {devices} devices: choose a "
            f"batch_size that is a multiple of {devices}"
        )
    each = rows // jax.process_count()
    return slice(jax.process_index() * each, (jax.process_index() + 1) * each)


def as_the_first(values: dict[str, float]) -> dict[str, float]:
    """The first process's values, in every process.

    Processes that decide by numbers of their own, which may differ in the last digit, would part.
    """
    if keras.distribution.distribution() is None:
        return values
    # As bytes: JAX would make float32 of them.
    whole = from_the_first(np.array(list(values.values()), np.float64).tobytes())
    return dict(zip(values, np.frombuffer(whole, np.float64).tolist(), strict=True))


def from_the_first(content: bytes) -> bytes:
    """The first process's bytes, in every process of ``jax.distributed``; a collective."""
    from jax.experimental.multihost_utils import broadcast_one_to_all

    length = int(broadcast_one_to_all(np.int32(len(content))))
    mine = np.zeros(length, np.uint8)
    if len(content) == length:  # of the others, what they gave does not matter
        mine[:] = np.frombuffer(content, np.uint8)
    return np.asarray(broadcast_one_to_all(mine)).astype(np.uint8).tobytes()


@contextlib.contextmanager
def by_itself(model: keras.Model) -> Iterator[keras.Model]:
    """For what each process computes on its own, such as an evaluation.

    Yields:
        the model, or a copy of it whose weights are this process's alone.
    """
    distribution = keras.distribution.distribution()
    if distribution is None:
        yield model
        return
    keras.distribution.set_distribution(None)
    try:
        if model not in _COPIES:
            _COPIES[model] = keras.models.clone_model(model)
        _COPIES[model].set_weights(model.get_weights())
        yield _COPIES[model]
    finally:
        keras.distribution.set_distribution(distribution)
