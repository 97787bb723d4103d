"""Writes files as PyTorch did before version 1.6, for tests of their reader."""

import pickle

import numpy as np

HEADER = [0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True}]
DTYPES = {"<f2": "HalfStorage", "<f4": "FloatStorage", "<i8": "LongStorage"}


def torch_file(storages: dict[str, np.ndarray], tensors: dict[str, tuple]) -> bytes:
    """A file of named tensors, each as (key of its storage, offset, shape, strides)."""
    items = b"".join(
        plain(name) + tensor(storages[key], key, *view) for name, (key, *view) in tensors.items()
    )
    parts = [pickle.dumps(part, 2) for part in HEADER]
    parts += [b"\x80\x02ccollections\nOrderedDict\n)R(" + items + b"u."]
    parts += [pickle.dumps(list(storages), 2)]
    for numbers in storages.values():
        parts += [len(numbers).to_bytes(8, "little"), numbers.tobytes()]
    return b"".join(parts)


def tensor(storage: np.ndarray, key: str, *view) -> bytes:
    kind = f"ctorch\n{DTYPES[storage.dtype.str]}\n".encode()
    place = (
        b"(" + plain("storage") + kind + plain(key) + plain("cpu") + plain(len(storage)) + b"NtQ"
    )
    arguments = place + b"".join(map(plain, view)) + b"\x89ccollections\nOrderedDict\n)R"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + arguments + b"tR"


def plain(value) -> bytes:
    """The instructions of a pickle that push a value on the stack."""
    return pickle.dumps(value, 2)[2:-1]
