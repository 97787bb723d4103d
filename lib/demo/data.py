"""Writes the demo world to disk in the formats of the real thing, quirks included.

make_demo_data(project_root())
    Dataset/demo_world/train00.tfrec ... train15.tfrec    triplets, as Kaggle's set has them
    Dataset/demo_world/unseen/<landmark>/<view>.jpg       a labelled gallery of other landmarks
    Test_set/demo_world/*.jpg, ground_truth.csv           one query, 4 positives, 95 distractors
"""

from __future__ import annotations

import csv
import hashlib
import inspect
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import chain, repeat
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from lib.data.photos import GROUND_TRUTH
from lib.data.records import Triplet, shard_name, write_shard
from lib.demo import world as demo_world
from lib.demo.world import render_jpegs  # in a module of its own: light to import in each process
from lib.files import only_writer, read_json, replacing, write_json
from lib.workers import process_pool

FULL_SHARDS = 15  # ... which has 15 shards of equal size, and one for the remainder
_MANIFEST = "world.json"

# Landmarks of the test set and of the unseen gallery have numbers that no shard uses.
_FIRST_UNSEEN, _FIRST_TEST = 1_000_000, 2_000_000


@dataclass(frozen=True)
class DemoSettings:
    """How large the demo world is.

    Attributes:
        seed: all of it follows from the seed.
        landmarks: landmarks in the shards; nearly twice as many triplets.
        unseen_landmarks, unseen_views: size of the labelled gallery.
        distractors: photos of the test set that show other landmarks than the query's.
    """

    seed: int = 7
    landmarks: int = 5000
    unseen_landmarks: int = 100
    unseen_views: int = 5
    distractors: int = 95


class View(NamedTuple):
    """A photo of the demo world: which landmark, and its number among the photos of it."""

    landmark: int
    view: int


def plan_triplets(settings: DemoSettings) -> list[tuple[View, View, View]]:
    """Choose the triplets the way the Kaggle set was made.

    A landmark has from 1 to 40 photos, most have few (real ones up to thousands). Its first two
    photos are anchors, in the order of the landmarks. The positive is drawn from all photos of the
    landmark, the anchor included; the negative from the anchors of all other landmarks.
    """
    rng = np.random.default_rng([settings.seed, 1])
    tail = np.floor(5.0 * rng.pareto(1.1, settings.landmarks) + 0.9)
    photos = np.minimum(1 + tail, 40).astype(int)
    anchors = [View(i, v) for i, n in enumerate(photos) for v in range(min(n, 2))]
    triplets = []
    for anchor in anchors:
        positive = View(anchor.landmark, int(rng.integers(photos[anchor.landmark])))
        negative = anchor
        while negative.landmark == anchor.landmark:
            negative = anchors[rng.integers(len(anchors))]
        triplets.append((anchor, positive, negative))
    return triplets


def _render(seed: int, views: Iterable[View]) -> dict[View, bytes]:
    """Draw photos as JPEG files on all processor cores, with a progress bar."""
    by_landmark: dict[int, list[int]] = {}
    for landmark, view in sorted(set(views)):
        by_landmark.setdefault(landmark, []).append(view)
    jpegs: dict[View, bytes] = {}
    with (
        process_pool() as pool,
        tqdm(total=sum(map(len, by_landmark.values())), desc="drawing", unit=" photos") as bar,
    ):
        drawn = pool.map(
            render_jpegs, repeat(seed), by_landmark, by_landmark.values(), chunksize=16
        )
        for (landmark, numbers), pictures in zip(by_landmark.items(), drawn, strict=True):
            jpegs |= {View(landmark, v): p for v, p in zip(numbers, pictures, strict=True)}
            bar.update(len(numbers))
    return jpegs


def make_demo_data(root: Path, settings: DemoSettings | None = None) -> bool:
    """Write the demo world below ``root``, unless it is there already, whole and by these settings.

    If another process is about to write it, this one waits and finds it.

    Returns:
        whether it was written now. The same settings give the same files, byte for byte, with the
        same version of Pillow.
    """
    settings = settings or DemoSettings()
    dataset_dir, test_set_dir = root / "Dataset" / "demo_world", root / "Test_set" / "demo_world"
    # Written last: a world without it was interrupted. Changed settings or drawing code change it.
    manifest = asdict(settings) | {"drawn_by": _drawing_code_digest()}
    if _is_whole(dataset_dir, test_set_dir, manifest):
        return False
    dataset_dir.parent.mkdir(parents=True, exist_ok=True)
    with only_writer(dataset_dir.parent, busy=None):
        if _is_whole(dataset_dir, test_set_dir, manifest):
            return False
        _write_world(dataset_dir, test_set_dir, settings, manifest)
    return True


def _write_world(
    dataset_dir: Path, test_set_dir: Path, settings: DemoSettings, manifest: dict
) -> None:
    for folder in (dataset_dir, test_set_dir):
        shutil.rmtree(folder, ignore_errors=True)

    plan = plan_triplets(settings)
    unseen = [
        View(_FIRST_UNSEEN + i, v)
        for i in range(settings.unseen_landmarks)
        for v in range(settings.unseen_views)
    ]
    roles = _plan_test_set(settings)
    jpegs = _render(settings.seed, chain(*plan, unseen, roles))
    _write_shards(dataset_dir, plan, jpegs)
    for view in unseen:
        name = f"landmark_{view.landmark - _FIRST_UNSEEN:03d}/{view.view}.jpg"
        _write_bytes(dataset_dir / "unseen" / name, jpegs[view])
    _write_test_set(test_set_dir, roles, jpegs)
    manifest["files"] = _count_files(dataset_dir, test_set_dir)
    write_json(dataset_dir / _MANIFEST, manifest)


def _drawing_code_digest() -> str:
    return hashlib.sha256(inspect.getsource(demo_world).encode()).hexdigest()[:16]


def _count_files(*folders: Path) -> int:
    return sum(path.suffix in (".tfrec", ".jpg", ".csv") for f in folders for path in f.rglob("*"))


def _is_whole(dataset_dir: Path, test_set_dir: Path, manifest: dict) -> bool:
    try:
        found = read_json(dataset_dir / _MANIFEST)
    except (FileNotFoundError, ValueError):
        return False
    return found == manifest | {"files": _count_files(dataset_dir, test_set_dir)}


def _write_shards(folder: Path, plan: list[tuple[View, View, View]], jpegs) -> None:
    size = len(plan) // FULL_SHARDS
    for number in range(FULL_SHARDS + 1):
        end = (number + 1) * size if number < FULL_SHARDS else len(plan)
        triplets = (Triplet(*(jpegs[v] for v in t)) for t in plan[number * size : end])
        write_shard(folder / shard_name(number), triplets)


def _plan_test_set(settings: DemoSettings) -> dict[View, str]:
    """The photos of the test set and their roles, in the order of their names."""
    query, first = View(_FIRST_TEST, 0), _FIRST_TEST + 1
    others = [(View(_FIRST_TEST, v), "positive") for v in range(1, 5)]
    others += [(View(first + i, 0), "distractor") for i in range(settings.distractors)]
    np.random.default_rng([settings.seed, 2]).shuffle(others)
    # The query comes first, so that it is the query without ground truth too.
    return {query: "query"} | dict(others)


def _write_test_set(folder: Path, roles: dict[View, str], jpegs) -> None:
    rows = []
    for number, (view, role) in enumerate(roles.items()):
        rows.append((f"photo_{number:03d}.jpg", role))
        _write_bytes(folder / rows[-1][0], jpegs[view])
    with replacing(folder / GROUND_TRUTH) as part, part.open("w", newline="") as file:
        csv.writer(file).writerows([("image", "role"), *rows])


def _write_bytes(path: Path, content: bytes) -> None:
    # Not atomic each: the manifest, written last, makes the world valid as a whole.
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
