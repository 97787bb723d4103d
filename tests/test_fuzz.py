"""Damaged files from outside end in the reader's own type of error, or are read rightly."""

import subprocess
import sys

import numpy as np
import pytest

from lib.files import project_root
from tests.fuzz import attack, damaged
from tests.fuzz_cases import READERS


def test_the_same_seed_makes_the_same_files():
    data = bytes(range(256)) * 8
    files = [[damaged(data, np.random.default_rng(seed)) for seed in range(100)] for _ in range(2)]
    assert files[0] == files[1]
    assert len(set(files[0])) > 90


@pytest.mark.long
@pytest.mark.parametrize(
    ("readers", "files"),
    # Each .mat file takes a process that imports SciPy.
    [([name for name in READERS if name != "mat"], 60), (["mat"], 15)],
    ids=["all but mat", "mat"],
)
def test_no_reader_is_harmed_by_damaged_files(readers, files):
    """``python -m tests.fuzz`` tries 2,000 files for each reader."""
    command = [sys.executable, "-m", "tests.fuzz", "--files", str(files), "--readers", *readers]
    result = subprocess.run(command, cwd=project_root(), capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    for name in readers:
        assert f"{name} " in result.stdout


@pytest.mark.long
def test_what_goes_wrong_is_counted():
    """A crash, much memory, a wrong error and a wrong result, of a reader made for that."""
    counts = attack("bad_reader", 0, range(16), None)
    del counts["slow"]  # on a busy machine
    assert set(counts) == {"crashed", "memory", "wrong error", "wrong result", "read"}
    assert sum(counts.values()) - counts["memory"] == 16
