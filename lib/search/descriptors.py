"""Descriptors from several views of a photo, and those that a tower learns from a teacher.

    views = np.concatenate([describe_views(tower, photos_at[size]) for size in (24, 32, 48)])
    descriptors = aggregate(views)                     # float32 (n, d) of unit norm

A trained network embeds several views of each photo, and their descriptors are averaged. Each view
costs one pass of its size: sizes of 0.7, 1 and 1.4 times the tower's, mirrored too, take 2 x (0.5 +
1 + 2) = 7 times as long as one view. Several exponents share a pass. A search costs the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import keras
import numpy as np

from lib.data.dataset import DatasetHandler
from lib.network.engine import Engine
from lib.network.pooling import GeM
from lib.network.tower import embed, resized
from lib.network.whitening import learn_pca_whitening
from lib.search.embedding import embed_job, photos_in_shards

_MOST_TO_LEARN = 20_000  # descriptors that a whitening is learned from, and applied to at a time


def describe_views(
    tower: keras.Model, photos: np.ndarray, gem_ps: Sequence[float | None] = (None,)
) -> np.ndarray:
    """Embed photos as they are and mirrored (left and right exchanged), pooled with each exponent.

    Args:
        tower: from :func:`lib.network.tower.build_tower`, trained at any size.
        photos: uint8 (n, size, size, 3) RGB, read at that size, as enlarged ones show no more.
        gem_ps: exponents to pool with; None is the tower's own. A larger one than in training, such
            as 4.6 for 3, is SuperGlobal's GeM+ (Shao et al., "Global Features are All You Need for
            Image Retrieval and Reranking", ICCV 2023, section 3.1).

    Returns:
        float32 (2 p, n, d), of unit norm, by exponent, then plain and mirrored.

    Raises:
        ValueError: an exponent for a tower without GeM pooling.
    """
    at_size = _with_exponents(resized(tower, photos.shape[1]), gem_ps)
    sides = np.stack([embed(at_size, photos), embed(at_size, photos[:, :, ::-1])])
    return sides.transpose(2, 0, 1, 3).reshape(-1, len(photos), sides.shape[-1])


def _with_exponents(tower: keras.Model, gem_ps: Sequence[float | None]) -> keras.Model:
    """A tower that pools with each of the exponents: uint8 photos -> float32 (n, p, d)."""
    trunk, head = tower.get_layer("trunk"), tower.get_layer("head")
    maps = trunk(tower.input)
    descriptors = []
    for number, p in enumerate(gem_ps):
        own = keras.models.clone_model(head)
        own.set_weights(head.get_weights())
        if p is not None:
            if not isinstance(own.get_layer("pooling"), GeM):
                raise ValueError("this tower has no GeM pooling, whose exponent could be set")
            own.get_layer("pooling").set_p(p)
        descriptors.append(keras.Model(own.input, own.output, name=f"head_{number}")(maps))
    return keras.Model(tower.input, keras.ops.stack(descriptors, axis=1))


def aggregate(views: np.ndarray, p: float = 1.0) -> np.ndarray:
    """Average several views of each photo to one descriptor, by their generalized mean.

    p = 1 is the usual mean direction (Radenović, Tolias, Chum, "Fine-tuning CNN Image Retrieval
    with No Human Annotation", TPAMI 2018, "Multi-scale representation"). A larger p is
    SuperGlobal's scale GeM (see :func:`describe_views`, section 3.1), infinity the maximum. Powers
    need values of at least 0, so the smallest value of each dimension in the whole set is
    subtracted before and added again afterwards.

    Args:
        views: float (v, n, d) of unit norm.
        p: at least 1; infinity is allowed.

    Returns:
        float32 (n, d) of unit norm.

    Raises:
        ValueError: p below 1.
    """
    if not p >= 1:
        raise ValueError(f"p must be at least 1, got {p}")
    views = np.asarray(views, dtype=np.float64)
    if np.isinf(p):
        mean = views.max(axis=0)
    else:
        lowest = views.min(axis=(0, 1))
        mean = ((views - lowest) ** p).mean(axis=0) ** (1 / p) + lowest
    norms = np.linalg.norm(mean, axis=1, keepdims=True)
    return np.divide(mean, norms, out=mean, where=norms > 0).astype(np.float32)


def teacher_descriptors(
    teacher: Engine, handler: DatasetHandler, dimension: int, folder: Path
) -> np.ndarray:
    """What a tower can learn from a stronger network, for :func:`lib.training.stages.train`.

    Args:
        teacher: may have views, as they cost nothing later.
        handler: its chosen pictures are embedded, and a PCA whitening is learned from 20,000 of
            them at most.
        dimension: of the tower's embeddings, at most that of the teacher's.
        folder: of the job, which resumes there, see :func:`lib.search.embedding.embed_job`.

    Returns:
        float32 (pictures, dimension), of unit norm for the chosen pictures that can be read, else
        zeros, which teach nothing.

    Raises:
        ValueError: the teacher has fewer dimensions, or too few pictures are chosen.
        EmbeddingJobError: as :func:`lib.search.embedding.embed_job`.
    """
    if dimension > teacher.dimension:
        raise ValueError(
            f"the teacher's descriptors have {teacher.dimension} dimensions, fewer than the "
            f"{dimension} of the embeddings: choose embedding_size={teacher.dimension} at most"
        )
    chosen = np.flatnonzero(handler.chosen)
    source = photos_in_shards(handler.catalogue, chosen)
    embeddings, names, _ = embed_job(teacher, source, folder)
    some = np.sort(np.random.default_rng(0).permutation(len(names))[:_MOST_TO_LEARN])
    whitening = learn_pca_whitening(embeddings[some], dimension)
    number = dict(zip(source.names, chosen, strict=True))
    rows = np.array([number[name] for name in names])
    descriptors = np.zeros((len(handler.catalogue.pictures), dimension), np.float32)
    for start in range(0, len(rows), _MOST_TO_LEARN):  # all at once may exceed the memory
        part = slice(start, start + _MOST_TO_LEARN)
        descriptors[rows[part]] = whitening.apply(embeddings[part])
    return descriptors
