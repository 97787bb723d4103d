"""Lists the descriptors and re-rankings that the study of post-processing compares.

recipe = Recipe((128, 181), mirrored=True, whitening="pca", dimension=64)
method = rerankings(Options(128, ((128, 181),)))["query expansion"]
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

from lib.search.rerank import (
    augment_gallery,
    encode_reciprocal,
    expand_queries,
    neighbour_graph,
    rerank_diffusion,
    rerank_k_reciprocal,
    rerank_superglobal,
)

# Side of the photo in pixels, whether it is mirrored, GeM's exponent (None: the tower's).
View = tuple[int, bool, float | None]
PLAIN = "no re-ranking"


@dataclass(frozen=True)
class Recipe:
    """How a photo's descriptor is computed.

    Attributes:
        image_sizes: sides of the views in pixels.
        mirrored: whether a mirrored view of each size is added.
        gem_p: GeM's exponent; None: the tower's own.
        scale_p: exponent of the mean over the views, see :func:`lib.search.descriptors.aggregate`.
        whitening: "", "pca" or "supervised", see :mod:`lib.network.whitening`.
        dimension: dimensions that the whitening keeps, capped at their number; None: all.
    """

    image_sizes: tuple[int, ...]
    mirrored: bool = False
    gem_p: float | None = None
    scale_p: float = 1.0
    whitening: str = ""
    dimension: int | None = None

    @property
    def views(self) -> list[View]:
        """The views that the descriptor aggregates."""
        sides = (False, True) if self.mirrored else (False,)
        return [(size, side, self.gem_p) for size in self.image_sizes for side in sides]


@dataclass(frozen=True)
class Options:
    """The settings to choose from.

    Attributes:
        image_size: side in pixels at which the tower was trained.
        image_sizes: sets of sizes to embed at.
        gem_ps: exponents of GeM, besides the tower's own.
        scale_ps: exponents of the mean over views.
        dimensions: of whitened descriptors.
        neighbours: numbers of neighbours for the re-rankings, from about the photos per landmark to
            several times that.
        candidates: numbers of photos that SuperGlobal re-ranks.
    """

    image_size: int
    image_sizes: tuple[tuple[int, ...], ...]
    gem_ps: tuple[float, ...] = (2.0, 4.6)
    scale_ps: tuple[float, ...] = (2.0, 10.0, float("inf"))
    dimensions: tuple[int, ...] = (32, 64, 128, 256)
    neighbours: tuple[int, ...] = (1, 2, 4, 8)
    candidates: tuple[int, ...] = (20, 100)

    @property
    def views(self) -> list[View]:
        """All views that any recipe uses."""
        sizes = sorted({self.image_size, *(s for sizes in self.image_sizes for s in sizes)})
        return list(product(sizes, (False, True), (None, *self.gem_ps)))

    def steps(self) -> dict[str, list[dict[str, Any]]]:
        """List the steps that improve descriptors: name -> alternative changes of the recipe."""
        return {
            "mirrored": _grid(mirrored=(True,)),
            "sizes": _grid(image_sizes=self.image_sizes),
            "other p (GeM+)": _grid(gem_p=self.gem_ps),
            "scale GeM": _grid(scale_p=self.scale_ps),
            "whitening": _grid(whitening=("pca", "supervised"), dimension=self.dimensions),
        }


@dataclass(frozen=True)
class Reranking:
    """A re-ranking method; the defaults give the plain search.

    Attributes:
        settings: the settings to choose from.
        prepare: (gallery (n, d), settings) -> data computed once per gallery.
        scores: (queries (q, d), gallery, prepared data, settings) -> float32 (q, n).
    """

    settings: list[dict[str, Any]]
    prepare: Callable[[np.ndarray, dict], Any] = lambda gallery, settings: None
    scores: Callable[[np.ndarray, np.ndarray, Any, dict], np.ndarray] = (
        lambda queries, gallery, prepared, settings: queries @ gallery.T
    )


def rerankings(options: Options) -> dict[str, Reranking]:
    """List the re-rankings of :mod:`lib.search.rerank` by name."""
    ks = options.neighbours
    expansion = _grid(k=ks, alpha=(0.0, 3.0))
    return {
        PLAIN: Reranking([{}]),
        "query expansion": Reranking(
            expansion, scores=lambda q, g, _, s: expand_queries(q, g, **s) @ g.T
        ),
        "database augmentation": Reranking(
            expansion,
            prepare=lambda g, s: augment_gallery(g, **s),
            scores=lambda q, g, augmented, s: q @ augmented.T,
        ),
        "augmentation and expansion": Reranking(
            expansion,
            prepare=lambda g, s: augment_gallery(g, **s),
            scores=lambda q, g, augmented, s: expand_queries(q, augmented, **s) @ augmented.T,
        ),
        "k-reciprocal": Reranking(
            _grid(k1=[2 * k for k in ks[1:]], k2=(1, 3), lam=(0.3, 0.6)),
            prepare=lambda g, s: encode_reciprocal(g, s["k1"], s["k2"]),
            scores=lambda q, g, encoding, s: rerank_k_reciprocal(q, g, encoding, s["lam"]),
        ),
        "diffusion": Reranking(
            _grid(graph_k=[2 * k for k in ks], k=ks[:3], alpha=(0.8, 0.99)),
            prepare=lambda g, s: neighbour_graph(g, s["graph_k"]),
            scores=lambda q, g, graph, s: rerank_diffusion(
                q, g, graph, s["k"], alpha=s["alpha"], tolerance=1e-4
            ),
        ),
        "SuperGlobal": Reranking(
            _grid(top=options.candidates, k=ks, beta=(0.15, 0.5)),
            scores=lambda q, g, _, s: rerank_superglobal(q, g, **s),
        ),
    }


def _grid(**values: Iterable) -> list[dict[str, Any]]:
    return [dict(zip(values, chosen, strict=True)) for chosen in product(*values.values())]
