"""What each fix against the original pipeline is worth on real photographs.

    python -m benchmarks.ladder PHOTOS --weights FILE

PHOTOS holds a folder of photos for each landmark, FILE the ImageNet weights, without top, of Keras'
MobileNet of width 0.25 for 224 pixels (``mobilenet_2_5_224_tf_no_top.h5``). This network is frozen;
heads are trained on its feature maps (7 x 7 x 256), see :mod:`lib.studies.fixes`. All arms see the
photos at 224 pixels and read them in the same way, so that the faults of the pipeline are measured,
not its size of 128.

The landmarks are dealt into folds. Each fold's landmarks are searched once, by heads trained on
those of all other folds: every photo of the fold is a query, its gallery all the other photos of
the fold. The learning rate of an arm is chosen for each fold anew, on a fifth of its training
landmarks, with the first seed.

Prints a table and, as its last line, one JSON object: the gain of the whole recipe over the
original and over the frozen trunk. Writes ``benchmarks/results/ladder_<name>.json``: ``summary`` as
made by :func:`lib.studies.fixes.summarize`, and the command with its settings. Nothing of the
photographs is kept.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import sys
from dataclasses import asdict, replace
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import pandas as pd

from lib.data.photos import read_gallery
from lib.files import project_root, show_path, write_json
from lib.programs import as_path, program
from lib.studies.fixes import (
    FIXES,
    FROZEN,
    FULL,
    ORIGINAL,
    RIGHT,
    LadderData,
    LadderSettings,
    landmark_folds,
    photo_maps,
    run_ladder,
    summarize,
)

IMAGE_SIZE, ALPHA = 224, 0.25


def read_data(folder: Path, weights: Path, folds: int) -> LadderData:
    """Photos of a folder per landmark, as the frozen MobileNet sees them."""
    photos, labels, skipped = read_gallery(folder, IMAGE_SIZE)
    for message in skipped:
        print("skipped:", message)
    backbone = keras.applications.MobileNet(
        alpha=ALPHA,
        input_shape=(IMAGE_SIZE, IMAGE_SIZE, 3),
        include_top=False,
        weights=str(weights),
    )
    maps = photo_maps(backbone, keras.applications.mobilenet.preprocess_input, photos)
    return LadderData(maps, labels, landmark_folds(labels, folds, seed=0))


def make_result(
    data: LadderData, table: pd.DataFrame, settings: LadderSettings, weights: Path
) -> dict:
    """What was measured, and how; nothing of it depends on where things lie on this machine."""
    landmarks = [len(set(data.labels[test])) for test in data.test]
    rates = table.dropna().groupby("arm")["learning_rate"].unique()
    rows = summarize(table).reset_index().to_dict("records")
    # JSON knows no NaN, which stands where there is nothing to compare with.
    rows = [{k: None if pd.isna(v) else v for k, v in row.items()} for row in rows]
    return {
        "protocol": "leave-one-out among the photos of each fold's landmarks, by heads that are "
        "trained on the landmarks of the other folds",
        "photos": len(data.labels),
        "landmarks": len(set(data.labels)),
        "queries": int(table.loc[table["average_precision"].notna(), "query"].nunique()),
        "folds": {"photos": data.test.sum(axis=1).tolist(), "landmarks": landmarks},
        "trunk": {
            "network": f"Keras MobileNet, alpha {ALPHA}, {IMAGE_SIZE} px, ImageNet, frozen",
            "weights_sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
            "maps": list(data.maps[RIGHT].shape[1:]),
        },
        "fixes": FIXES,
        "settings": asdict(settings),
        "learning_rates": {arm: sorted(map(float, chosen)) for arm, chosen in rates.items()},
        "versions": {
            "python": platform.python_version(),
            "keras": keras.__version__,
            "backend": keras.backend.backend(),
            "numpy": np.__version__,
        },
        "summary": rows,
    }


@program()
def main(given: list[str] | None = None) -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("photos", type=as_path, metavar="PHOTOS", help="a folder per landmark")
    parser.add_argument("--weights", type=as_path, required=True, metavar="FILE")
    parser.add_argument("--name", default="", help="of the result; by default the folder's")
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=5, help="how many")
    arguments = parser.parse_args(given)

    settings = replace(LadderSettings(), seeds=tuple(range(arguments.seeds)))
    name = arguments.name or arguments.photos.resolve().name
    data = read_data(arguments.photos, arguments.weights, arguments.folds)
    table = run_ladder(data, settings)
    command = f"python -m benchmarks.ladder PHOTOS --weights FILE --name {name}"
    command += f" --folds {arguments.folds} --seeds {arguments.seeds}"
    result = {"name": name, "command": command}
    result |= make_result(data, table, settings, arguments.weights)
    path = project_root() / "benchmarks" / "results" / f"ladder_{name}.json"
    write_json(path, result)

    summary = pd.DataFrame(result["summary"]).set_index("arm")
    print(summary.drop(columns=["kind", "fix"]).astype(float, errors="ignore").round(3).to_string())
    print(show_path(path), "written")
    best = summary["map"]
    gains = {"original": best[FULL] - best[ORIGINAL], "frozen_trunk": best[FULL] - best[FROZEN]}
    print(json.dumps({f"full_vs_{name}": round(gain, 4) for name, gain in gains.items()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
