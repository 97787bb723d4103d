"""What benchmarks on folders of photographs share: reading the sets, comparing ways, a table.

for name, photos, labels in read_sets(folders, 224):
    rows = against_first({"frozen": precision, "trained": other}, labels)
    print_rows(name, rows, "the frozen network")
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from lib.data.photos import read_gallery
from lib.evaluation.metrics import compare, interval


def read_sets(folders: Sequence[Path], size: int) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Each folder's name, its photos, uint8 (n, size, size, 3), and the landmark of each."""
    for folder in folders:
        photos, labels, skipped = read_gallery(folder, size)
        for message in skipped:
            print("skipped:", message)
        yield Path(folder).resolve().name, photos, labels


def against_first(precision: Mapping[str, np.ndarray], labels: np.ndarray) -> dict[str, dict]:
    """mAP of each way with its interval, and the difference to the first, query by query.

    Args:
        precision: way -> the average precision of each photo as the query, float (n,).
    """
    first = next(iter(precision.values()))
    rows = {}
    for way, of in precision.items():
        difference, p_value = compare(first, of, groups=labels)
        rows[way] = {
            "map": interval(of, groups=labels)._asdict(),
            "difference": difference._asdict(),
            "p_value": p_value,
        }
    return rows


def print_rows(name: str, rows: Mapping[str, dict], first: str, before: str = "") -> None:
    """A line for each way, in per cent; ``before`` stands before the way's name."""
    width = max(map(len, rows))
    for way, row in rows.items():
        value, difference = row["map"], row["difference"]
        print(f"{name}: {before}{way:<{width}} mAP {100 * value['value']:.1f}", end=" ")
        print(f"[{100 * value['low']:.1f}, {100 * value['high']:.1f}],", end=" ")
        print(f"against {first} {100 * difference['value']:+.1f}")
