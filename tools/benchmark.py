"""Measures a network on a public benchmark: ``python -m tools.benchmark NAME``.

    python -m tools.benchmark roxford5k --whiten rparis6k
    python -m tools.benchmark folder:photos --network runs/latest

The names are those of :mod:`tools.official`. The set is fetched, every photo is embedded in its own
shape (longest side 1,024 pixels, at three scales), every query ranks the gallery, and the rankings
are judged by the set's own definition. What is done is kept: after an interruption the same command
goes on. The result, with its settings, versions and checksums, is a run of its own, which
``python -m tools.report`` shows.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lib.data.photos import NoPhotosError, find_photos
from lib.evaluation import metrics
from lib.evaluation.ground_truth import GroundTruth
from lib.files import checksum, naming, only_writer, project_root, show_path
from lib.network.engine import Engine, export_engine, load_engine, packaged_settings
from lib.network.whitening import Whitening, learn_pca_whitening
from lib.programs import UsageError, as_path, program
from lib.runs import record_metrics
from lib.search.embedding import embed_job
from lib.search.geometry import verify_all
from lib.search.local_features import LocalFeatures, unpacked
from lib.search.rerank import expand_queries, rerank_superglobal
from tools import official
from tools.environment import record_environment
from tools.fetch import fetch, is_unpacked, unpack

SCALES = (0.5**0.5, 1.0, 2.0**0.5)
RERANKINGS = ("none", "query-expansion", "superglobal", "geometry")
VERIFIED = 100  # photos of each ranking, by geometry
LEAST = 5  # inliers that move a photo up
_NUMBERS = 2**27  # scores in memory at a time
_DISTRACTORS = "http://ptak.felk.cvut.cz/revisitop/revisitop1m/jpg/revisitop1m.{}.tar.gz"
_ARCHIVES, _EACH = 100, 10_000  # of revisitop1m, and photos in one


@dataclass(frozen=True, eq=False)
class Described:
    """The photos of a task as descriptors, float32 of unit norm; the rows follow the names.

    Attributes:
        gallery: (n, d), maybe memory-mapped; distractors come last.
        names: of the gallery's photos, without the distractors.
        queries: (q, d); None: the queries are photos of the gallery.
        asked: names of the queries.
    """

    gallery: np.ndarray
    names: list[str]
    queries: np.ndarray | None
    asked: list[str]


def open_network(name: str, out: Path, scales: tuple[float, ...]) -> Engine:
    """The network to measure, exported to ``out`` once.

    Args:
        name: "packaged"; a backbone of lib.network.tower.BACKBONES, with ImageNet's weights, pooled
            by GeM; a preset of lib.network.hub, "hub:...", by its class token; a run's folder, or a
            model file, for a trained tower.
        scales: see lib.network.engine. A vision transformer embeds squares in place of them.

    Raises:
        UsageError: there is no such network.
    """
    path = Path(name)
    path = path / "model.keras" if path.is_dir() else path
    origin = f"{checksum(path) if path.is_file() else name} {scales}"
    file = out / f"{hashlib.sha256(origin.encode()).hexdigest()[:16]}.engine"
    if not file.is_file():
        from lib.network import hub  # loads Keras
        from lib.network import tower as towers

        if path.is_file():
            tower = towers.load_tower(path)
        elif name == "packaged":
            tower = towers.build_tower(packaged_settings())
        elif name in towers.BACKBONES:
            chosen = {"backbone": name, "weights": "imagenet", "embedding_size": 0}
            tower = towers.build_tower(towers.TowerSettings(image_size=224, **chosen))
        elif name.startswith(hub.PREFIX):
            chosen = {"backbone": name, "weights": "hub", "pooling": "class", "embedding_size": 0}
            tower = towers.build_tower(towers.TowerSettings(image_size=224, **chosen))
        else:
            raise UsageError(
                f"--network {name}: it is neither packaged, nor a backbone such as ResNet50 or "
                "hub:dinov2_small, nor a run's folder or a model file"
            )
        print(f"exporting {name}", file=sys.stderr)
        views = () if hub.has_tokens(tower.get_layer("trunk")) else scales
        export_engine(tower, file, origin, views)
    return load_engine(file)


def describe(
    engine: Engine, task: official.Task, out: Path, distractors: np.ndarray | None
) -> Described:
    """Embed the photos of a task; goes on where it was interrupted.

    Raises:
        UsageError: a query can't be read.
    """
    gallery = embed_job(engine, task.gallery, out / "gallery", 32)
    _show_skipped(gallery.skipped)
    queries = None if task.queries is None else embed_job(engine, task.queries, out / "queries", 32)
    if queries is not None and len(queries.names) < len(task.queries):
        raise UsageError(f"a query can't be read: {queries.skipped[0]}")
    rows = gallery.embeddings
    if distractors is not None:
        rows = np.concatenate([rows, distractors])
    asked = gallery.names if queries is None else queries.names
    return Described(rows, gallery.names, None if queries is None else queries.embeddings, asked)


def _show_skipped(skipped: list[str]) -> None:
    for message in skipped[:9]:
        print(f"left out: {message}", file=sys.stderr)
    if len(skipped) > 9:
        print(f"and {len(skipped) - 9} more", file=sys.stderr)


def embed_distractors(engine: Engine, data: Path, out: Path, longest: int) -> np.ndarray:
    """Embed the million distractors of Oxford and Paris revisited, archive by archive.

    An archive is fetched, unpacked, embedded and deleted before the next one, so that the disk
    holds one of them at a time.
    """
    size = 4 * engine.dimension * _EACH * _ARCHIVES / 1e9
    print(
        f"{_EACH * _ARCHIVES:,} distractors, each as long as a photo of the gallery, in "
        f"{_ARCHIVES} archives of about 1.6 GB, one after the other; their descriptors take "
        f"{size:.1f} GB of disk, and of memory in the end",
        file=sys.stderr,
    )
    parts = []
    for number in range(1, _ARCHIVES + 1):
        place, job = data / "revisitop1m" / str(number), out / "distractors" / str(number)
        archive = official.Remote(_DISTRACTORS.format(number))
        if not (job / "whole").is_file():
            if not is_unpacked(archive.name, place):
                unpack(fetch(archive, place.parent), place)
            paths, _ = find_photos(place)
            source = official.photos_at(paths, [path.name for path in paths], longest)
            _show_skipped(embed_job(engine, source, job, 32).skipped)
            (job / "whole").touch()
        (place.parent / archive.name).unlink(missing_ok=True)
        if is_unpacked(archive.name, place):  # not somebody's own photos
            shutil.rmtree(place)
        with naming(job / "embeddings.npy"):
            parts.append(np.load(job / "embeddings.npy", mmap_mode="r"))
    return np.concatenate(parts)


def whitened(described: Described, whitening: Whitening) -> Described:
    """The same photos with whitened descriptors."""
    queries = None if described.queries is None else whitening.apply(described.queries)
    gallery = whitening.apply(described.gallery)
    return Described(gallery, described.names, queries, described.asked)


def rank(
    described: Described, rows: np.ndarray, depth: int | None, reranking: str, pairs: Any = None
) -> np.ndarray:
    """Rank the gallery for some queries.

    Args:
        described: the photos.
        rows: int (q,), numbers of the queries among those of ``described``.
        depth: how many photos to rank; None: all.
        reranking: one of RERANKINGS.
        pairs: takes a query's number and numbers of photos, and returns their inliers; for
            "geometry".

    Returns:
        int64 (q, depth), numbers of photos, the best first. A query that is in the gallery is the
        first of its own ranking.
    """
    gallery, own = described.gallery, described.queries is None
    queries = np.asarray((gallery if own else described.queries)[rows], np.float32)
    ranks = []
    step = max(1, _NUMBERS // len(gallery))
    for start in range(0, len(rows), step):
        some, numbers = queries[start : start + step], rows[start : start + step]
        if reranking in ("none", "geometry"):
            scores = some @ gallery.T
        elif own:  # no query is among the photos that it is expanded by
            scores = np.stack(
                [_alone(some[[i]], gallery, n, reranking) for i, n in enumerate(numbers)]
            )
        else:
            scores = _reranked(some, gallery, reranking)
        if own:
            scores[np.arange(len(some)), numbers] = np.inf
        ranks += [np.argsort(-of, kind="stable")[:depth].copy() for of in scores]
    ranks = np.array(ranks)
    if reranking == "geometry":
        for place, query in enumerate(rows):
            first = ranks[place, own : own + VERIFIED]
            inliers = pairs(query, first)
            better = np.argsort(np.where(inliers >= LEAST, -inliers, 0), kind="stable")
            ranks[place, own : own + VERIFIED] = first[better]
    return ranks


def _reranked(queries: np.ndarray, gallery: np.ndarray, reranking: str) -> np.ndarray:
    if reranking == "superglobal":
        return rerank_superglobal(queries, gallery)
    return expand_queries(queries, gallery, k=10) @ gallery.T


def _alone(query: np.ndarray, gallery: np.ndarray, number: int, reranking: str) -> np.ndarray:
    scores = _reranked(query, np.delete(gallery, number, axis=0), reranking)[0]
    return np.insert(scores, number, 0.0)


class Verified:
    """Inliers of a query and photos of the gallery, from local features that are found once."""

    def __init__(self, task: official.Task, out: Path):
        self._gallery = embed_job(LocalFeatures(), task.gallery, out / "gallery_features", 32)
        self._queries = self._gallery
        if task.queries is not None:
            self._queries = embed_job(LocalFeatures(), task.queries, out / "query_features", 32)

    def __call__(self, query: int, photos: np.ndarray) -> np.ndarray:
        others = (
            unpacked(self._gallery.embeddings[photo])
            for photo in photos
            if photo < len(self._gallery.names)  # a distractor keeps its place
        )
        found = iter(verify_all(unpacked(self._queries.embeddings[query]), others))
        known = photos < len(self._gallery.names)
        return np.array([next(found).inliers if one else 0 for one in known])


def evaluate(
    task: official.Task, described: Described, reranking: str, out: Path
) -> dict[str, pd.DataFrame]:
    """A table of the measures for each level, with a row for each query."""
    truths = task.truths(described.names)
    number_of = {name: number for number, name in enumerate(described.asked)}
    pairs = Verified(task, out) if reranking == "geometry" else None
    tables, ranked = {}, {}
    for level, truth in truths.items():
        rows = np.array([number_of[query] for query in truth.queries])
        key = rows.tobytes()
        if key not in ranked:  # levels share their queries
            ranked = {key: rank(described, rows, task.depth, reranking, pairs)}
        tables[level] = metrics.query_table(ranked[key], _with(truth, described), task.protocol)
    return tables


def _with(truth: GroundTruth, described: Described) -> GroundTruth:
    """A ground truth for the gallery as it was embedded, with the distractors after it."""
    place = {name: number for number, name in enumerate(described.names)}
    to = np.array([place[name] for name in truth.gallery])
    more = [f"distractor {n}" for n in range(len(described.gallery) - len(described.names))]
    positives, junk = ([to[numbers] for numbers in of] for of in (truth.positives, truth.junk))
    return GroundTruth(truth.queries, described.names + more, positives, junk)


def learn(engine: Engine, options: argparse.Namespace, out: Path) -> Whitening:
    """Learn a PCA whitening from the photos of another set.

    Raises:
        UsageError: it is the set that is measured.
    """
    name = options.whiten
    if _identity(name) == _identity(options.name):
        raise UsageError(f"--whiten {name}: a whitening must not be learned on what is measured")
    other = official.open_set(name, options.data, options.size)
    photos = embed_job(engine, other.gallery, out / f"whitening_{_key(name)}", 32).embeddings
    return learn_pca_whitening(np.asarray(photos), min(options.dimensions, *photos.shape))


def _identity(name: str) -> str:
    kind, _, folder = name.partition(":")
    return f"{kind}:{Path(folder).expanduser().resolve()}" if folder else name


def _key(name: str) -> str:
    """A name for a folder."""
    digest = hashlib.sha256(name.encode()).hexdigest()[:6]
    return "".join(c if c.isalnum() else "_" for c in Path(name).name) + f"_{digest}"


@program()
def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tools.benchmark", description=__doc__)
    parser.add_argument("name", help=", ".join([*official.OPENERS, "folder:PATH"]))
    sets = {"type": as_path, "default": project_root() / "Dataset" / "benchmarks"}
    parser.add_argument("--data", **sets, help="folder of the sets; default: Dataset/benchmarks")
    help_ = "packaged (default), a backbone with ImageNet's weights, hub:PRESET of keras-hub, "
    help_ += "a run's folder, a model file"
    parser.add_argument("--network", default="packaged", help=help_)
    parser.add_argument("--size", type=int, default=1024, help="longest side in pixels")
    scales = {"type": float, "nargs": "+", "default": SCALES, "metavar": "SCALE"}
    parser.add_argument("--scales", **scales, help="at which a photo is embedded")
    parser.add_argument("--whiten", default="", help="set to learn a whitening from")
    parser.add_argument("--dimensions", type=int, default=512, help="after the whitening, at most")
    parser.add_argument("--rerank", choices=RERANKINGS, default="none")
    parser.add_argument("--distractors", action="store_true", help="the million of revisitop1m")
    parser.add_argument("--out", type=as_path, help="default: runs/benchmarks/NAME")
    options = parser.parse_args(arguments)
    if not 32 <= options.size <= 4096 or not all(0.1 <= scale <= 4 for scale in options.scales):
        parser.error("--size must be from 32 to 4096, --scales from 0.1 to 4")
    if options.dimensions < 1:
        parser.error(f"--dimensions must be at least 1, not {options.dimensions}")

    out = options.out or project_root() / "runs" / "benchmarks" / _key(options.name)
    start = time.monotonic()
    try:
        task = official.open_set(options.name, options.data, options.size)
    except (official.OfficialError, NoPhotosError) as error:
        raise UsageError(str(error)) from None
    out.mkdir(parents=True, exist_ok=True)
    busy = f"another benchmark writes into {show_path(out)}: choose another folder with --out"
    with only_writer(out / "figures", RuntimeError(busy)):
        record_environment(out, options.name)
        engine = open_network(options.network, out, tuple(options.scales))
        jobs = out / f"{engine.fingerprint[:16]}_{options.size}"
        more = (
            embed_distractors(engine, options.data, jobs, options.size)
            if options.distractors
            else None
        )
        described = describe(engine, task, jobs, more)
        if options.whiten:
            described = whitened(described, learn(engine, options, jobs))
        tables = evaluate(task, described, options.rerank, jobs)
        result = summarize(options, task, engine, described, tables)
        result["minutes"] = (time.monotonic() - start) / 60
        record_metrics(out, benchmark=result)
    print(comparison(task, described, tables, options.network))
    print(f"\n{show_path(out / 'metrics.json')}; python -m tools.report {show_path(out)}")
    return 0


def summarize(options, task: official.Task, engine: Engine, described: Described, tables) -> dict:
    """The result, in a form for JSON."""
    return {
        "set": task.name,
        "photos": len(described.names),
        "queries": {level: len(table) for level, table in tables.items()},
        "distractors": len(described.gallery) - len(described.names),
        "settings": {
            "network": options.network,
            "size": engine.image_size if engine.squashes else options.size,
            "scales": list(engine.views),
            "whitened by": options.whiten or "nothing",
            "dimension": described.gallery.shape[1],
            "rerank": options.rerank,
            "engine": engine.name,
        },
        "checksums": {"network": engine.fingerprint, "photos": task.gallery.digest},
        "measures": {
            level: {
                measure: metrics.interval(table[measure])._asdict()
                for measure in table
                if measure != "n_positives"
            }
            for level, table in tables.items()
        },
        "published mAP": [
            {"system": system, **of, "source": source}
            for system, of, source in published(task, described)
        ],
    }


def published(task: official.Task, described: Described) -> list[official.Published]:
    """What is published of the same task, with or without the million distractors."""
    more = len(described.gallery) > len(described.names)
    return (official.PUBLISHED_1M if more else official.PUBLISHED).get(task.name, [])


def comparison(
    task: official.Task, described: Described, tables: dict[str, pd.DataFrame], network: str
) -> str:
    """The mAP in per cent for each level, beside what is published."""
    measure = next(iter(task.protocol))
    own = {level: 100 * table[measure].mean() for level, table in tables.items()}
    rows = [(f"{network} (this run)", own, ""), *published(task, described)]
    table = pd.DataFrame(
        [{"m" + measure: system, **of, "source": source} for system, of, source in rows]
    )
    levels = [level for level in own if level in table]
    return table[["m" + measure, *levels, "source"]].to_string(
        index=False, float_format="{:.1f}".format, na_rep="-"
    )


if __name__ == "__main__":
    sys.exit(main())
