"""Trains one model with several processes together, on Keras' JAX backend.

    jax.distributed.initialize(...)                          # as lib/cluster/ray.py does
    with together(seed=1) as number:
        train(tower, handler, validation, settings, run)     # ``run``: a folder for each process

Each process holds all weights and computes its share of the rows of every batch. The loss sees the
embeddings of the whole batch, so mining, gradients and batch statistics equal those of a single
process up to rounding.
"""

from __future__ import annotations

import contextlib
import json
import weakref
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np

# Copies of models for this process alone, kept so that each is compiled once.
_COPIES: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def together(seed: int) -> Iterator[int]:
    """Train models with all processes of ``jax.distributed``; yield this process's number.

    The seed of Keras' random numbers and the start weights must be equal in all processes.

    Raises:
        RuntimeError: Keras does not run on JAX.
    """
    if (backend := keras.backend.backend()) != "jax":
        needed = "several processes train on Keras' JAX backend"
        raise RuntimeError(f"{needed}, not on {backend}: set KERAS_BACKEND=jax")
    import jax

    before = keras.distribution.distribution()
    # Each process loads only its own rows of a batch, so Keras must not divide batches again.
    keras.distribution.set_distribution(keras.distribution.DataParallel(auto_shard_dataset=False))
    keras.utils.set_random_seed(seed)
    try:
        yield jax.process_index()
    finally:
        keras.distribution.set_distribution(before)


def own_rows(rows: int) -> slice:
    """Return the rows of a batch that this process computes.

    Raises:
        ValueError: all devices of all processes can't share them evenly.
    """
    distribution = keras.distribution.distribution()
    if distribution is None:
        return slice(None)
    import jax

    devices = distribution.device_mesh.devices.size
    if rows % devices:
        uneven = f"a batch of {rows} can't be divided evenly among {devices} devices"
        raise ValueError(f"{uneven}: choose a batch_size that is a multiple of {devices}")
    each, number = rows // jax.process_count(), jax.process_index()
    return slice(number * each, (number + 1) * each)


def as_the_first(values: Any) -> Any:
    """Return the first process's values, such as JSON can hold, in every process.

    Metrics can differ in the last bit; decisions based on them would diverge between processes.
    """
    if keras.distribution.distribution() is None:
        return values
    return json.loads(from_the_first(json.dumps(values).encode()))  # JAX would round to float32


def from_the_first(content: bytes) -> bytes:
    """Return the first process's bytes; all processes of ``jax.distributed`` must call it."""
    from jax.experimental.multihost_utils import broadcast_one_to_all

    # Other processes' content is ignored, but must have the same length.
    length = int(broadcast_one_to_all(np.int32(len(content))))
    mine = np.frombuffer(content[:length].ljust(length), np.uint8)
    return np.asarray(broadcast_one_to_all(mine)).astype(np.uint8).tobytes()


@contextlib.contextmanager
def by_itself(model: keras.Model) -> Iterator[keras.Model]:
    """Yield the model; within :func:`together`, a copy that this process can evaluate alone."""
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
