"""The reader of PyTorch's old files: views, damage, and pickles that would call something."""

import pickle

import numpy as np
import pytest

from lib.network.torch_file import read_tensors
from tests.torch_format import HEADER, torch_file

NUMBERS = np.arange(24, dtype=np.float32)


@pytest.fixture
def read(tmp_path):
    def read(content: bytes) -> dict[str, np.ndarray]:
        (tmp_path / "weights.pth").write_bytes(content)
        return read_tensors(tmp_path / "weights.pth")

    return read


def test_views_of_a_storage_have_its_offset_shape_and_strides(read):
    """Reading them as if they were contiguous gave a network that computes noise."""
    counts = np.array([7], dtype=np.int64)
    views = {
        "whole": ("a", 0, (2, 3, 4), (12, 4, 1)),
        "transposed": ("a", 0, (4, 2, 3), (1, 12, 4)),
        "row": ("a", 12, (4,), (1,)),
        "column": ("a", 1, (6,), (4,)),
        "repeated": ("a", 5, (2, 3), (0, 0)),
        "count": ("b", 0, (), ()),
        "none": ("a", 24, (0, 3), (3, 1)),
    }
    found = read(torch_file({"a": NUMBERS, "b": counts}, views))
    assert list(found) == list(views)
    whole = NUMBERS.reshape(2, 3, 4)
    np.testing.assert_array_equal(found["whole"], whole)
    np.testing.assert_array_equal(found["transposed"], whole.transpose(2, 0, 1))
    np.testing.assert_array_equal(found["row"], whole[1, 0])
    np.testing.assert_array_equal(found["column"], NUMBERS[1::4])
    np.testing.assert_array_equal(found["repeated"], np.full((2, 3), 5))
    assert found["count"].shape == () and found["count"] == 7
    assert found["none"].shape == (0, 3)
    assert [x.dtype for x in (found["whole"], found["count"])] == [np.float32, np.int64]
    assert not found["whole"].flags.writeable


@pytest.mark.parametrize(
    "view",
    [
        (0, (25,), (1,)),
        (1, (24,), (1,)),
        (0, (4, 6), (6, 2)),
        (-1, (3,), (1,)),
        (3, (3,), (-1,)),
        (0, (-2,), (1,)),
        (0, (2**40,), (0,)),  # of a single number, and as large as no memory
        (0, (2, 2), (2**62, 2**62)),  # their sum overflows
        (0, (3,), ()),
        (0, "abc", (1, 1, 1)),
        (0.0, (3,), (1,)),
    ],
)
def test_views_that_reach_beyond_their_storage_are_refused(read, view):
    with pytest.raises(ValueError, match=r"weights\.pth is not a PyTorch file"):
        read(torch_file({"a": NUMBERS}, {"x": ("a", *view)}))


def test_a_file_that_ends_early_or_late_is_refused(read):
    content = torch_file({"a": NUMBERS}, {"x": ("a", 0, (24,), (1,))})
    assert list(read(content)) == ["x"]
    for damaged in [content[:end] for end in range(0, len(content), 7)] + [content + b"\0"]:
        with pytest.raises(ValueError, match="or it is damaged") as caught:
            read(damaged)
        assert "\n" not in str(caught.value)
    with pytest.raises(OSError, match=r"absent\.pth"):
        read_tensors("absent.pth")


def test_storages_and_descriptions_must_agree(read):
    content = torch_file({"a": NUMBERS}, {"x": ("a", 0, (24,), (1,))})
    for old, new in [
        (pickle.dumps(["a"], 2), pickle.dumps(["b"], 2)),
        (pickle.dumps(["a"], 2), pickle.dumps([], 2)),
        (b"FloatStorage", b"LongStorage"),
        (b"FloatStorage", b"QuantStorage"),
        (pickle.dumps(1001, 2), pickle.dumps(1002, 2)),
        ((24).to_bytes(8, "little"), (23).to_bytes(8, "little")),
        ((24).to_bytes(8, "little"), (2**63).to_bytes(8, "little")),
    ]:
        assert content.count(old) == 1
        with pytest.raises(ValueError, match="or it is damaged"):
            read(content.replace(old, new))


class Calls:
    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


def test_pickles_that_name_other_functions_call_none(read, tmp_path):
    header = b"".join(pickle.dumps(part, 2) for part in HEADER)
    target = tmp_path / "called"
    for function, *arguments in [(open, str(target), "w"), (eval, "1"), (np.ones, 3)]:
        evil = pickle.dumps(Calls(function, *arguments), 2)
        for content in (evil, header + evil):  # the first pickle, or the fourth
            with pytest.raises(ValueError, match="which is no part of a tensor"):
                read(content)
    assert not target.exists()
    # Room for four billion objects.
    with pytest.raises(ValueError, match="LONG_BINPUT 4294967295"):
        read(b"\x80\x02Nr\xff\xff\xff\xff.")
    # Copies of copies.
    with pytest.raises(ValueError, match="or it is damaged"):
        read(header + b"\x80\x02ccollections\nOrderedDict\n]\x85R.")
    for other in (b"", b"PK\3\4" + bytes(100), b"not a pickle", pickle.dumps(["a"] * 100)):
        with pytest.raises(ValueError, match=r"weights\.pth is not a PyTorch file"):
            read(other)


@pytest.mark.long
def test_what_pytorch_writes_is_read(tmp_path):
    torch = pytest.importorskip("torch", reason="needs PyTorch: make backends")
    whole = torch.arange(24, dtype=torch.float32).reshape(2, 3, 4)
    tensors = {"whole": whole, "view": whole.permute(2, 0, 1)[1:], "half": whole.half()}
    tensors |= {"count": torch.tensor(7), "double": whole.double()[:, ::2]}
    torch.save(tensors, tmp_path / "weights.pth", _use_new_zipfile_serialization=False)
    found = read_tensors(tmp_path / "weights.pth")
    assert list(found) == list(tensors)
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.numpy().dtype
        np.testing.assert_array_equal(found[name], tensor.numpy())
