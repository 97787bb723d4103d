"""Big sets of descriptors like those of the demo world, for benchmarks of search.

    world = read_world()                                    # real ones: float32 (15,275, 512)
    model = fit(world.descriptors, world.landmarks)
    vectors = model.sample(762_000, seed=0)

    python -m benchmarks.big_sets     # compares a set of the same size with the real one

White noise would be the wrong test: in 512 dimensions all of its points are equally far from each
other, so nothing can be left out of a search and nothing compressed. Real descriptors share a mean,
have most of their variance in a few dimensions, and lie in clusters, the landmarks. So a sampled
descriptor is

    mean_c + between_c^(1/2) z_landmark + spread_landmark * within^(1/2) z_photo,      of unit norm,

z from a normal distribution, with the covariances between and within the landmarks of the demo
world (the components of variance of one-way analysis: Searle, Casella, McCulloch, "Variance
Components", 1992, chapter 3). Landmarks lie in clusters themselves, so theirs is a mixture, of
components c. Each landmark's spread is drawn from those of real landmarks, and their sizes have the
demo world's Pareto tail without its bound of 40 photos.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import faiss
import numpy as np

from lib.storage import project_root

LARGEST = 10_000  # photos of a landmark; the most that Google Landmarks v2 has of one
_ROWS = 65_536  # sampled at a time


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
    from lib.dataset import DatasetHandler, DataSettings
    from lib.demo_data import make_demo_data
    from lib.landmarks import open_catalogue
    from lib.model import TowerSettings, build_tower, embed

    root = project_root()
    make_demo_data(root)
    handler = DatasetHandler(open_catalogue(root / "Dataset" / "demo_world"), DataSettings(32))
    weights = str(root / "weights" / "demo_resnet50.weights.h5")
    tower = build_tower(
        TowerSettings(image_size=32, embedding_size=0, last_stage=3, weights=weights)
    )
    pictures = handler.catalogue.pictures
    blocks = np.array_split(np.arange(len(pictures)), -(-len(pictures) // 1024))
    descriptors = np.concatenate([embed(tower, handler.photos(block)) for block in blocks])
    return World(descriptors, pictures["landmark"].to_numpy())


@dataclass(frozen=True)
class DescriptorModel:
    """A distribution of descriptors: a mixture of normal ones for landmarks, and photos round them.

    Attributes:
        shares: float (c,), of the landmarks in each component of the mixture.
        means: float32 (c, d), of the components.
        between: float32 (c, d, d), matrices that normal numbers are multiplied by: square roots of
            the covariances of the landmarks in a component.
        within: float32 (d, d), the same of the photos of a landmark.
        spreads: float32 (m,), how far photos of a landmark scatter, relative to ``within``.
    """

    shares: np.ndarray
    means: np.ndarray
    between: np.ndarray
    within: np.ndarray
    spreads: np.ndarray

    def sample(self, n: int, seed: int, sizes: np.ndarray | None = None) -> np.ndarray:
        """Draw descriptors.

        Args:
            n: how many.
            seed: of the draw. Equal arguments give equal descriptors.
            sizes: int (m,), photos of each landmark, at least n in all; drawn with a heavy tail if
                None.

        Returns:
            float32 (n, d) of unit norm, in random order.
        """
        rng = np.random.default_rng(seed)
        if sizes is None:  # one landmark for each photo would be more than enough
            tail = np.floor(5.0 * rng.pareto(1.1, n) + 0.9)
            sizes = 1 + np.minimum(tail, LARGEST - 1).astype(np.int64)
        sizes = sizes[: np.searchsorted(np.cumsum(sizes), n) + 1]
        landmark = rng.permutation(np.repeat(np.arange(len(sizes)), sizes)[:n])
        d = self.means.shape[1]
        component = rng.choice(len(self.shares), len(sizes), p=self.shares)
        centres = np.empty((len(sizes), d), np.float32)
        for c, (mean, root) in enumerate(zip(self.means, self.between, strict=True)):
            rows = np.flatnonzero(component == c)
            centres[rows] = rng.standard_normal((len(rows), d), np.float32) @ root + mean
        spread = rng.choice(self.spreads, len(sizes))
        vectors = np.empty((n, d), np.float32)
        for start in range(0, n, _ROWS):
            block, which = vectors[start : start + _ROWS], landmark[start : start + _ROWS]
            block[:] = rng.standard_normal(block.shape, np.float32) @ self.within
            block *= spread[which, None]
            block += centres[which]
            block /= np.linalg.norm(block, axis=1, keepdims=True)
        return vectors


def fit(descriptors: np.ndarray, landmarks: np.ndarray, components: int = 64) -> DescriptorModel:
    """Estimate the distribution.

    Args:
        descriptors: float32 (n, d).
        landmarks: int (n,), which show the same; some landmarks must have several.
        components: of the mixture, found by k-means among the landmarks' means.
    """
    x = np.asarray(descriptors, np.float64)
    _, landmark, counts = np.unique(landmarks, return_inverse=True, return_counts=True)
    centres = np.zeros((len(counts), x.shape[1]))
    np.add.at(centres, landmark, x)
    centres /= counts[:, None]
    residuals = x - centres[landmark]
    several = counts > 1
    within = residuals.T @ residuals / np.sum(counts - 1)
    scatter = np.bincount(landmark, weights=np.sum(residuals**2, axis=1))[several]
    spreads = np.sqrt(scatter / (counts[several] - 1) / np.trace(within))

    kmeans = faiss.Kmeans(x.shape[1], components, seed=0)
    kmeans.train(centres.astype(np.float32))
    component = kmeans.index.search(centres.astype(np.float32), 1)[1][:, 0]
    means, roots = np.empty((components, x.shape[1]), np.float32), []
    for c in range(components):
        inside = component == c
        means[c] = centres[inside].mean(axis=0)
        deviations = centres[inside] - means[c]
        # The mean of a landmark's photos scatters by its photos, too.
        noise = within * np.mean(1 / counts[inside])
        roots.append(_root(deviations.T @ deviations / np.sum(inside) - noise))
    return DescriptorModel(
        shares=np.bincount(component, minlength=components) / len(component),
        means=means,
        between=np.stack(roots),
        within=_root(within),
        spreads=spreads.astype(np.float32),
    )


@contextlib.contextmanager
def sample_file(n: int) -> Iterator[np.ndarray]:
    """Sampled descriptors, float32 (n, 512), in a mapped file that is deleted after the block."""
    runs = project_root() / "runs"
    runs.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="sample-", dir=runs) as folder:
        path = Path(folder) / "vectors.npy"
        np.save(path, fit(*read_world()).sample(n, seed=0))
        yield np.load(path, mmap_mode="r")


def _root(covariance: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(covariance)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    return root.astype(np.float32)


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
