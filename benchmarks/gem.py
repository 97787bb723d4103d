"""How good GeM is on photographs, by its exponent, with the frozen packaged network.

    python -m benchmarks.gem PHOTOS ... [--write]

Each PHOTOS holds a folder of photos for each landmark. Each photo is squashed to 224 pixels; every
photo is a query, its gallery all the others. Prints the mAP for each exponent, and the difference
to p = 1, the average, query by query. ``--write`` keeps it in ``benchmarks/results/gem.json``, with
nothing of the photographs.
"""

from __future__ import annotations

import argparse
import os
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from tqdm import tqdm

from benchmarks.photo_sets import against_first, print_rows, read_sets
from lib.evaluation.metrics import average_precision, leave_one_out
from lib.files import project_root, write_json
from lib.network.engine import packaged_settings
from lib.network.pooling import gem
from lib.network.tower import build_tower, feature_maps
from lib.programs import as_path, program

SIZE = 224  # pixels
EXPONENTS = (1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 7.0, 10.0)


def sweep(maps: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
    """The average precision of each photo as the query, float (n,), by exponent; p = 1 first."""
    precision = {}
    for p in tqdm(EXPONENTS, unit=" exponents", leave=False):
        blocks = np.array_split(maps, -(-len(maps) // 128))
        pooled = [np.asarray(gem(block.astype(np.float32), p)) for block in blocks]
        vectors = np.concatenate(pooled)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        precision[f"{p:g}"] = average_precision(leave_one_out(vectors, labels))
    return precision


@program()
def main(given: list[str] | None = None) -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gem", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("photos", type=as_path, nargs="+", metavar="PHOTOS")
    parser.add_argument(
        "--write", action="store_true", help="keep the result in benchmarks/results"
    )
    arguments = parser.parse_args(given)
    tower, sets = build_tower(packaged_settings(SIZE)), {}
    for name, photos, labels in read_sets(arguments.photos, SIZE):
        rows = against_first(sweep(feature_maps(tower, photos), labels), labels)
        sets[name] = {"photos": len(labels), "landmarks": len(set(labels)), "exponents": rows}
        print_rows(name, rows, "the average", "p = ")
    if arguments.write:
        command = f"python -m benchmarks.gem {' '.join(s.upper() for s in sets)} --write"
        versions = {"keras": keras.__version__, "numpy": np.__version__}
        result = {"command": command, "size": SIZE, "versions": versions, "sets": sets}
        write_json(project_root() / "benchmarks" / "results" / "gem.json", result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
