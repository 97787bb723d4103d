"""The Faiss index: photos by name, found by the embedding of a query photo.

    index = PhotoIndex.build(embeddings, names, fingerprint(tower))
    index.save(run / "gallery.index")
    index = PhotoIndex.load(run / "gallery.index", fingerprint(tower))
    names, similarities = index.search(query_embeddings, k=5)

This is the one module that imports Faiss.
"""

from __future__ import annotations

import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

import faiss
import numpy as np

from lib.storage import replacing, show_path

if sys.platform == "darwin":
    # Faiss and TensorFlow each bring an OpenMP runtime; on macOS two of them crash each other.
    faiss.omp_set_num_threads(1)


class UnusableIndexError(ValueError):
    """An index file is damaged, or was made by another model."""


class PhotoIndex:
    """An exact index (every embedding is compared) over embeddings of unit norm.

    Attributes:
        names: n names, in the order of the embeddings.
        model: fingerprint of the model that made the embeddings.
    """

    def __init__(self, index: faiss.Index, names: Sequence[str], model: str):
        if index.ntotal != len(names):
            raise ValueError(f"{index.ntotal} embeddings, but {len(names)} names")
        self._index = index
        self.names = list(names)
        self.model = model

    @classmethod
    def build(cls, embeddings: np.ndarray, names: Sequence[str], model: str) -> PhotoIndex:
        """Index embeddings.

        Args:
            embeddings: float32 (n, d) of unit norm, for the inner product to be the cosine.
            names: n names.
            model: :func:`lib.model.fingerprint` of the tower that made the embeddings.

        Raises:
            ValueError: embeddings that are not (n, d), finite and of unit norm, or n != names.
        """
        embeddings = np.ascontiguousarray(embeddings, dtype=np.float32)
        if embeddings.ndim != 2:
            raise ValueError(f"embeddings must be (n, d), not {embeddings.shape}")
        norms = np.linalg.norm(embeddings, axis=1)
        if not np.allclose(norms, 1.0, atol=1e-3):
            worst = int(np.argmax(np.abs(norms - 1.0))) if np.isfinite(norms).all() else "nan"
            raise ValueError(f"embeddings must have unit norm (row {worst} has not)")
        index = faiss.IndexFlatIP(embeddings.shape[1])
        index.add(embeddings)
        return cls(index, names, model)

    def __len__(self) -> int:
        return len(self.names)

    def search(self, queries: np.ndarray, k: int) -> tuple[list[list[str]], np.ndarray]:
        """Find the k photos nearest to each query, the nearest first.

        Args:
            queries: float32 (q, d).
            k: how many; more than there are photos gives all of them.

        Returns:
            names, q lists of min(k, n); and their cosine similarities, float32 (q, min(k, n)),
            from -1 to 1.

        Raises:
            ValueError: k below 1, or queries of another dimension than the index.
        """
        queries = np.ascontiguousarray(queries, dtype=np.float32)
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        if queries.ndim != 2 or queries.shape[1] != self._index.d:
            raise ValueError(
                f"queries must be (q, {self._index.d}) for this index, not {queries.shape}"
            )
        # Faiss fills up missing results with number -1, which would be the last name.
        similarities, numbers = self._index.search(queries, min(k, len(self)))
        return [[self.names[i] for i in row] for row in numbers], similarities

    def save(self, path: Path) -> None:
        """Write embeddings, names and fingerprint as one file, atomically."""
        with replacing(path) as part, part.open("wb") as file:
            np.savez(
                file,
                index=faiss.serialize_index(self._index),
                names=np.array(self.names, dtype=np.str_),
                model=np.array(self.model),
            )

    @classmethod
    def load(cls, path: Path, model: str) -> PhotoIndex:
        """Read an index that :meth:`save` wrote.

        Args:
            path: the file.
            model: fingerprint of the tower that will embed the queries.

        Raises:
            FileNotFoundError: no such file.
            UnusableIndexError: damaged, no index at all, or made by another model.
        """
        where = show_path(path)
        try:
            # The archive's checksums find a damaged file before Faiss gets to parse it.
            with np.load(path, allow_pickle=False) as archive:
                content, names = archive["index"], archive["names"].tolist()
                made_by = str(archive["model"])
        except (zipfile.BadZipFile, ValueError, KeyError, EOFError) as error:
            raise UnusableIndexError(
                f"{where} is no index of this project, or a damaged one ({error}): build it anew"
            ) from None
        if made_by != model:
            raise UnusableIndexError(
                f"{where} was made by another model ({made_by[:12]}... and not {model[:12]}...): "
                "their embeddings can't be compared; build it anew"
            )
        return cls(faiss.deserialize_index(content), names, made_by)


def near_duplicates(perceptual_hashes: np.ndarray, most: int = 3) -> np.ndarray:
    """Pairs of pictures whose perceptual hashes differ in few bits.

    Args:
        perceptual_hashes: uint64 (n,), as in a catalogue.
        most: bits that may differ, from 0 to 3.

    Returns:
        int64 (m, 2), each pair once, the smaller number first, in ascending order.

    Raises:
        ValueError: ``most`` beyond 3.
    """
    if not 0 <= most <= 3:
        raise ValueError(f"most must be from 0 to 3, got {most}")
    codes = np.asarray(perceptual_hashes, dtype=">u8").view(np.uint8).reshape(-1, 8)
    # Where at most 3 bits differ, one of 4 quarters of the hash must agree: pictures are compared
    # only within the bucket of a quarter.
    index = faiss.IndexBinaryMultiHash(64, 4, 16)
    index.add(codes)
    starts, _, found = index.range_search(codes, most + 1)
    pairs = np.stack(
        [np.repeat(np.arange(len(codes)), np.diff(starts.astype(np.int64))), found], axis=1
    )
    return np.unique(pairs[pairs[:, 0] < pairs[:, 1]], axis=0)
