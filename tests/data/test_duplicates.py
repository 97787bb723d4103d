"""Near-duplicates are found whichever bits differ."""

import subprocess
import sys

import numpy as np
import pytest

from lib.data.duplicates import near_duplicates
from lib.files import project_root


def test_near_duplicates_against_brute_force(rng):
    hashes = rng.integers(0, 2**64, size=300, dtype=np.uint64)
    for i in range(0, 120, 2):  # plant pairs that differ in 0 to 5 bits
        bits = rng.permutation(64)[: i // 2 % 6]
        hashes[i + 1] = hashes[i] ^ np.uint64(sum(1 << int(b) for b in bits))
    for most in range(4):
        expected = [
            [a, b]
            for a in range(300)
            for b in range(a + 1, 300)
            if int(hashes[a] ^ hashes[b]).bit_count() <= most
        ]
        assert len(expected) == 10 * (most + 1)
        assert near_duplicates(hashes, most).tolist() == expected
    with pytest.raises(ValueError, match="from 0 to 3"):
        near_duplicates(hashes, 4)


def test_the_data_package_loads_neither_faiss_nor_seaborn_nor_keras():
    # The catalogue imported Faiss by way of lib.search, so sampling did, too.
    code = "import sys, lib.data.catalogue, lib.data.sampling, tools.convert, lib.data.photos; "
    code += "sys.exit(sorted({'faiss', 'seaborn', 'keras', 'tensorflow'} & {*sys.modules}) or 0)"
    assert subprocess.run([sys.executable, "-c", code], cwd=project_root()).returncode == 0
