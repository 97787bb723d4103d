"""Writes the demo world to disk in the file formats of the Kaggle set.

make_demo_data(project_root())
    Dataset/demo_world/train00.tfrec ... train15.tfrec    triplets, with the Kaggle set's quirks
    Dataset/demo_world/unseen/<landmark>/<view>.jpg       a labelled gallery of other landmarks
    Test_set/demo_world/*.jpg, ground_truth.csv           one query, 4 positives, 95 distractors

``Dataset/demo_world/world.json`` lists the files with their checksums. Files not listed there are
never changed.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import inspect
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import chain, groupby, repeat
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from lib.data.records import Triplet, shard_name, write_shard
from lib.data.sampling import draw_triplets
from lib.data.test_set import GROUND_TRUTH
from lib.demo import buildings, world
from lib.demo.world import render_jpegs
from lib.files import (
    checksum,
    only_writer,
    read_json,
    remove_half_written,
    replacing,
    show_path,
    write_json,
)
from lib.workers import process_pool

FULL_SHARDS = 15  # of equal size, as in the Kaggle set; another holds the remainder

_DATASET, _TEST_SET = "Dataset/demo_world", "Test_set/demo_world"
_MANIFEST, _TRUTH = f"{_DATASET}/world.json", f"{_TEST_SET}/{GROUND_TRUTH}"

# First landmark of the unseen gallery and of the test set, beyond those of the shards.
_FIRST_UNSEEN, _FIRST_TEST = 1_000_000, 2_000_000


@dataclass(frozen=True)
class DemoSettings:
    """Seed and size of the demo world.

    Attributes:
        seed: determines all shapes, photos and triplets.
        landmarks: number of landmarks in the shards, which hold nearly twice as many triplets.
        unseen_landmarks, unseen_views: landmarks of the labelled gallery, and photos of each.
        distractors: number of test photos that show other landmarks than the query's.
    """

    seed: int = 7
    landmarks: int = 2000
    unseen_landmarks: int = 60
    unseen_views: int = 5
    distractors: int = 95


class View(NamedTuple):
    """A photo of the demo world: its landmark, and its number among the landmark's photos."""

    landmark: int
    view: int


def plan_triplets(settings: DemoSettings) -> list[tuple[View, View, View]]:
    """Draw triplets by :func:`lib.data.sampling.draw_triplets`.

    A landmark has 1 to 40 photos, most have few (real ones up to thousands).
    """
    rng = np.random.default_rng([settings.seed, 1])
    tail = np.floor(5.0 * rng.pareto(1.1, settings.landmarks) + 0.9)
    photos = np.minimum(1 + tail, 40).astype(int)
    views = [View(i, v) for i, n in enumerate(photos) for v in range(n)]
    plan = draw_triplets(np.repeat(np.arange(len(photos)), photos), rng)
    return [tuple(views[photo] for photo in triplet) for triplet in plan]


def _render(seed: int, views: Iterable[View]) -> dict[View, bytes]:
    """Draw photos as JPEG files on all cores, with a progress bar."""
    views = sorted(set(views))
    by_landmark = {i: [v.view for v in of] for i, of in groupby(views, lambda v: v.landmark)}
    with process_pool() as pool:
        drawn = pool.map(
            render_jpegs, repeat(seed), by_landmark, by_landmark.values(), chunksize=16
        )
        jpegs = tqdm(chain.from_iterable(drawn), "drawing", total=len(views), unit=" photos")
        return dict(zip(views, jpegs, strict=True))


def make_demo_data(root: Path, settings: DemoSettings | None = None) -> bool:
    """Write the demo world below ``root``, unless it is there and undamaged.

    If another process is writing it, this one waits for it. All files are written again when the
    settings or the drawing code changed, or a file is missing or damaged. With the same version of
    Pillow, equal settings give equal files, byte for byte.

    Returns:
        whether files were written.

    Raises:
        FileExistsError: a needed name belongs to a file that this function did not write.
    """
    settings = settings or DemoSettings()
    code = (inspect.getsource(buildings) + inspect.getsource(world)).encode()
    wanted = asdict(settings) | {"drawn_by": hashlib.sha256(code).hexdigest()[:16]}
    (root / "Dataset").mkdir(parents=True, exist_ok=True)
    with only_writer(root / "Dataset", busy=None):
        found = _read_manifest(root)
        files = found.pop("files", {})
        if found == wanted and all(
            (root / name).is_file() and checksum(root / name) == digest
            for name, digest in files.items()
        ):
            return False
        _write_world(root, settings, wanted, [_MANIFEST, *files] if found else [])
    return True


def _read_manifest(root: Path) -> dict:
    """Read settings and, as "files", the checksum of each; empty without a usable manifest."""
    try:
        manifest = read_json(root / _MANIFEST)
        if not isinstance(manifest["files"], dict):  # older manifests hold the number of files
            sizes = {name: manifest[name] for name in asdict(DemoSettings())}
            shards, photos, _ = _plan_files(DemoSettings(**sizes))
            manifest["files"] = dict.fromkeys([*shards, *photos, _TRUTH])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return {}
    return manifest


def _write_world(root: Path, settings: DemoSettings, wanted: dict, own: list[str]) -> None:
    """Write all files; those named in ``own`` may be replaced."""
    shards, photos, roles = _plan_files(settings)
    names = [*shards, *photos, _TRUTH]
    paths = {root / name: name for name in [_MANIFEST, *names]}
    folders = {folder for path in paths for folder in path.parents if root in folder.parents}
    foreign = [folder for folder in folders if folder.exists() and not folder.is_dir()]
    strangers = [path for path, name in paths.items() if name not in own or path.is_dir()]
    foreign += [path for path in strangers if os.path.lexists(path)]
    if foreign:
        raise FileExistsError(
            f"the demo world needs the name {show_path(foreign[0])}, which holds something else "
            f"(in all {len(foreign)} such names): move or delete it"
        )
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
        remove_half_written(folder)
    # The names are stored first: after an interruption, the next call knows its own files.
    write_json(root / _MANIFEST, wanted | {"files": dict.fromkeys([*own, *names])})
    for name in set(own) - {_MANIFEST, *names}:
        (root / name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # the folder is not empty
            (root / name).parent.rmdir()

    jpegs = _render(settings.seed, chain(*chain(*shards.values()), photos.values()))
    for name, plan in shards.items():
        write_shard(root / name, (Triplet(*(jpegs[view] for view in views)) for views in plan))
    for name, view in photos.items():
        (root / name).unlink(missing_ok=True)  # it may be a link to a file elsewhere
        (root / name).write_bytes(jpegs[view])
    with replacing(root / _TRUTH) as part, part.open("w", newline="") as file:
        csv.writer(file).writerows([("image", "role"), *roles])
    write_json(root / _MANIFEST, wanted | {"files": {n: checksum(root / n) for n in names}})


def _plan_files(
    settings: DemoSettings,
) -> tuple[dict[str, list], dict[str, View], list[tuple[str, str]]]:
    """Plan the triplets of each shard, the view of each photo, and the ground truth's rows."""
    plan = plan_triplets(settings)
    names = [f"{_DATASET}/{shard_name(number)}" for number in range(FULL_SHARDS + 1)]
    size = len(plan) // FULL_SHARDS
    shards = {name: plan[i * size : (i + 1) * size] for i, name in enumerate(names[:-1])}
    shards[names[-1]] = plan[FULL_SHARDS * size :]
    photos = {
        f"{_DATASET}/unseen/landmark_{i:03d}/{v}.jpg": View(_FIRST_UNSEEN + i, v)
        for i in range(settings.unseen_landmarks)
        for v in range(settings.unseen_views)
    }
    others = [(View(_FIRST_TEST, v), "positive") for v in range(1, 5)]
    others += [(View(_FIRST_TEST + 1 + i, 0), "distractor") for i in range(settings.distractors)]
    np.random.default_rng([settings.seed, 2]).shuffle(others)
    # The query sorts first, since without ground truth the first photo is the query.
    query = (View(_FIRST_TEST, 0), "query")
    roles = []
    for number, (view, role) in enumerate([query, *others]):
        roles.append((f"photo_{number:03d}.jpg", role))
        photos[f"{_TEST_SET}/{roles[-1][0]}"] = view
    return shards, photos, roles
