"""Reads the tensors of a PyTorch file in the format before version 1.6, without PyTorch.

    tensors = read_tensors(path)         # {"_conv_stem.weight": float32 (32, 3, 3, 3), ...}

The file is a row of pickles (a magic number, the version of the format, the number sizes of the
machine, the tensors' descriptions, the storages' keys), then each storage: its count of numbers,
eight bytes, and the numbers. A tensor is a view of a storage: an offset, a shape and a stride for
each axis, counted in numbers. Many are not contiguous. (PyTorch, ``torch/serialization.py``,
``_legacy_load``.)

A pickle can name any function to call. Here it can name three, see ``_Unpickler``.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lib.files import show_error, show_path

_MAGIC = 0x1950A86A20F9469CFC6C
_VERSION = 1001
_DTYPES = {"FloatStorage": "<f4", "DoubleStorage": "<f8", "HalfStorage": "<f2"}
_DTYPES |= {"IntStorage": "<i4", "LongStorage": "<i8"}


class _Tensor(NamedTuple):
    dtype: str
    key: str  # of its storage
    count: int  # of the storage's numbers
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """Read a file of named tensors, such as a network's ``state_dict``.

    Takes memory in proportion to the file's size and runs nothing that the file names.

    Returns:
        the tensors in the file's order, as read-only views of the storages: float16, float32,
        float64, int32 or int64, of any shape and strides.

    Raises:
        OSError: the file can't be read.
        ValueError: it is damaged, or another format, or holds more than tensors.
    """
    data = Path(path).read_bytes()
    try:
        return _read(data)
    except Exception as error:  # pickles raise nearly anything
        raise ValueError(
            f"{show_path(path)} is not a PyTorch file of tensors in the format before version 1.6, "
            f"or it is damaged: {show_error(error)[:200]}"
        ) from None


def _read(data: bytes) -> dict[str, np.ndarray]:
    file = io.BytesIO(data)
    if (magic := _load(file)) != _MAGIC:
        raise ValueError(f"it begins with {str(magic)[:30]}, not with the format's number")
    version, machine = _load(file), _load(file)
    if version != _VERSION or machine["little_endian"] is not True:
        raise ValueError(f"version {version}, from a machine with {machine}")
    tensors = {str(name): _Tensor(*tensor) for name, tensor in _load(file).items()}
    described = {tensor.key: tensor for tensor in tensors.values()}
    keys, storages = _load(file), {}
    place = file.tell()
    for key in keys:
        dtype, count = described[key].dtype, described[key].count
        if int.from_bytes(data[place : place + 8], "little") != count:
            raise ValueError(f"storage {key} has not the {count} numbers that a tensor says")
        storages[key] = np.frombuffer(data, dtype, count, place + 8)  # checks the file's length
        place += 8 + storages[key].nbytes
    if len(storages) != len(keys) or place != len(data):
        raise ValueError("it does not end with its last storage")
    return {name: _view(storages[tensor.key], tensor) for name, tensor in tensors.items()}


def _view(storage: np.ndarray, tensor: _Tensor) -> np.ndarray:
    _, _, count, offset, shape, strides = tensor
    if storage.dtype != tensor.dtype or len(storage) != count or math.prod(shape) > count:
        raise ValueError(f"a tensor {shape} does not fit its storage of {len(storage)} numbers")
    # NumPy checks that a view stays within its storage; numbers this small can't overflow there.
    if not all(0 <= number <= count for number in (offset, *shape, *strides)):
        raise ValueError(f"a tensor {shape} has offset {offset} and strides {strides}")
    size = storage.itemsize
    steps = [size * stride for stride in strides]
    return np.ndarray(shape, storage.dtype, storage, size * offset, steps)


def _load(file: io.BytesIO) -> Any:
    """Load the next pickle, after a look at its instructions."""
    start, size = file.tell(), len(file.getbuffer())
    for instruction, argument, _ in pickletools.genops(file):
        # The numbers of memorized objects count up. The unpickler makes room for all up to one.
        if "PUT" in instruction.name and argument > size:
            raise ValueError(f"the pickle has an instruction {instruction.name} {argument}")
    file.seek(start)
    return _Unpickler(file).load()


class _Unpickler(pickle.Unpickler):
    """Knows ordered dictionaries, ``_rebuild_tensor_v2``, and storages by their names."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return lambda: OrderedDict()  # without arguments, which it would copy
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, shape, strides, *_: (*storage, offset, shape, strides)
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        raise pickle.UnpicklingError(f"it names {module}.{name}, which is no part of a tensor")

    def persistent_load(self, pid: Any) -> tuple[str, str, int]:
        _, dtype, key, _, count, view = pid
        if view is not None or dtype not in _DTYPES.values():
            raise pickle.UnpicklingError(f"unknown storage {key}")
        return dtype, key, count
