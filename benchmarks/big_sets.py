"""Big sets of descriptors like those of the demo world, for benchmarks of search.

    with sample_file(762_000) as vectors:      # float32 (762,000, 512), mapped
        ...

    python -m benchmarks.big_sets     # compares a set of the same size with the real one

They are sampled by :mod:`lib.studies.descriptor_model`, which says why white noise would not do.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import faiss
import numpy as np

from lib.files import project_root
from lib.studies.descriptor_model import fit


class World(NamedTuple):
    """The demo world's pictures.

    Attributes:
        descriptors: float32 (n, 512) of unit norm.
        landmarks: int (n,).
    """

    descriptors: np.ndarray
    landmarks: np.ndarray


def read_world() -> World:
    """Descriptors of all pictures in the demo world's shards; it is drawn if it isn't there."""
    # Here, as TensorFlow takes seconds and memory that a benchmark without it saves.
    from lib.data.catalogue import open_catalogue
    from lib.data.dataset import DatasetHandler, DataSettings
    from lib.demo.data import make_demo_data
    from lib.network.tower import TowerSettings, build_tower, embed

    root = project_root()
    make_demo_data(root)
    handler = DatasetHandler(open_catalogue(root / "Dataset" / "demo_world"), DataSettings(96))
    tower = build_tower(
        TowerSettings(
            image_size=96, embedding_size=0, backbone="EfficientNetLite0", weights="packaged"
        )
    )
    pictures = handler.catalogue.pictures
    blocks = np.array_split(np.arange(len(pictures)), -(-len(pictures) // 1024))
    descriptors = np.concatenate([embed(tower, handler.photos(block)) for block in blocks])
    return World(descriptors, pictures["landmark"].to_numpy())


@contextlib.contextmanager
def sample_file(n: int) -> Iterator[np.ndarray]:
    """Sampled descriptors, float32 (n, 512), in a mapped file that is deleted after the block."""
    runs = project_root() / "runs"
    runs.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="sample-", dir=runs) as folder:
        path = Path(folder) / "vectors.npy"
        np.save(path, fit(*read_world()).sample(n, seed=0))
        yield np.load(path, mmap_mode="r")


def describe(vectors: np.ndarray, queries: int = 1000, lists: int = 256) -> dict[str, float]:
    """What decides how hard a set is to search.

    Args:
        vectors: float32 (n, d) of unit norm; the last ones are the queries for the others.
        queries: how many.
        lists: of the inverted file whose recall is measured.

    Returns:
        the similarity to the 1st and the 10th neighbour and to a random vector (medians), the share
        of variance in the first 16 and 64 principal components, and recall@10 of "IVF,Flat" with 4
        and 16 of its lists visited, and of 4 bits for each 8 dimensions alone.
    """
    queries, base = vectors[-queries:], vectors[:-queries]
    flat = faiss.IndexFlatIP(base.shape[1])
    flat.add(base)
    similarities, exact = flat.search(queries, 10)
    values = np.linalg.eigvalsh(np.cov(base[:20_000].T))[::-1]
    result = {
        "similarity_1st": float(np.median(similarities[:, 0])),
        "similarity_10th": float(np.median(similarities[:, 9])),
        "similarity_random": float(np.median(queries @ base[:1000].T)),
        "variance_in_16": float(values[:16].sum() / values.sum()),
        "variance_in_64": float(values[:64].sum() / values.sum()),
    }

    def recall(index: faiss.Index) -> float:
        found = index.search(queries, 10)[1]
        return float(np.mean([np.isin(a, b).mean() for a, b in zip(exact, found, strict=True)]))

    ip = faiss.METRIC_INNER_PRODUCT
    index = faiss.index_factory(base.shape[1], f"IVF{lists},Flat", ip)
    index.train(base)
    index.add(base)
    for probes in (4, 16):
        index.nprobe = probes
        result[f"recall_ivf_{probes}_lists"] = recall(index)
    index = faiss.index_factory(base.shape[1], "PQ64x4fs", ip)
    index.train(base)
    index.add(base)
    result["recall_pq_alone"] = recall(index)
    return result


def main() -> None:
    """Compare real descriptors with as many sampled ones."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.big_sets")
    parser.parse_args()
    world = read_world()
    model = fit(*world)
    order = np.random.default_rng(0).permutation(len(world.descriptors))
    sizes = np.unique(world.landmarks, return_counts=True)[1]
    sets = {
        "real": world.descriptors[order],
        "sampled": model.sample(len(order), seed=1, sizes=sizes),
    }
    sides = {name: describe(vectors) for name, vectors in sets.items()}
    print(f"{len(order)} descriptors of 512 dimensions\n{'':<22} {'real':>8} {'sampled':>8}")
    for name, value in sides["real"].items():
        print(f"{name:<22} {value:8.3f} {sides['sampled'][name]:8.3f}")
    print(json.dumps({side: {k: round(v, 4) for k, v in of.items()} for side, of in sides.items()}))


if __name__ == "__main__":
    main()
