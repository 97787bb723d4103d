"""An index on Milvus, for more photos than one machine holds; it is used as a PhotoIndex is.

    index = MilvusIndex.build(embeddings, names, fingerprint(tower), "http://milvus:19530")
    index = MilvusIndex.load(fingerprint(tower), "http://milvus:19530")
    names, similarities = index.search(query_embeddings, k=5)
    index.add(more_names, more_embeddings)       # kept by Milvus when this returns
    index.remove(names[0])

Milvus divides a collection among its machines, and replaces those that die. A path that ends in
``.db`` in place of the URI opens Milvus Lite, Milvus' engine in this process over one folder: for
tests and prototypes, where Faiss (:mod:`lib.search.photo_index`) is the engine to use.

Photos are written by name (*upsert*): what is sent once more, since the answer was lost, does not
come twice. The Parquet files of :func:`lib.cluster.ray.embed` stay the source of truth, from which
a collection can be built anew.

pymilvus comes with the extra ``milvus`` (``make cluster``), and is imported when it is needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lib.search.photo_index import UnusableIndexError, checked_vectors

_MODEL, _FORMAT_KEY, _FORMAT = "image_retrieval.model", "image_retrieval.format", "1"
_LONGEST_NAME = 1024  # bytes
_ROWS = 1_000  # in one message; with 512 dimensions 2 MB, where 64 MB are allowed
_MOST_FOUND = 16_384  # Milvus' limit for k


@dataclass(frozen=True)
class MilvusSettings:
    """The kind of a collection's index, and how it is searched.

    Attributes:
        kind: Milvus' ``index_type``: "FLAT" compares every photo; "HNSW", "IVF_SQ8", "DISKANN" and
            others do not.
        build: parameters of that kind, such as {"M": 32, "efConstruction": 200}.
        search: parameters of a search, such as {"ef": 128}.
        shards: parts that writing is divided among.
    """

    kind: str = "FLAT"
    build: dict[str, Any] = field(default_factory=dict)
    search: dict[str, Any] = field(default_factory=dict)
    shards: int = 1


class MilvusIndex:
    """Photos by name, to be found by embeddings of unit norm, in a collection of Milvus.

    Attributes:
        model: fingerprint of the model that made the embeddings.
        dimension: of the embeddings.
        settings: kind and search.
    """

    def __init__(
        self, client: Any, collection: str, model: str, dimension: int, settings: MilvusSettings
    ):
        """Use :meth:`build` or :meth:`load`."""
        self._client, self._collection = client, collection
        self.model, self.dimension, self.settings = model, dimension, settings

    @classmethod
    def build(
        cls,
        embeddings: np.ndarray,
        names: Sequence[str],
        model: str,
        uri: str,
        collection: str = "photos",
        settings: MilvusSettings = MilvusSettings(),
        token: str = "",
    ) -> MilvusIndex:
        """Make a collection of embeddings.

        Args:
            embeddings: float32 (n, d) of unit norm; it may be memory-mapped. n may be 0.
            names: n unique names of up to 1024 bytes.
            model: :func:`lib.network.tower.fingerprint` of the tower that made the embeddings.
            uri: of Milvus, "http://host:19530"; or a path that ends in ``.db``, for Milvus Lite.
            collection: its name there.
            settings: the kind of index.
            token: "user:password" or a key, where Milvus asks for one.

        Raises:
            ValueError: as :meth:`lib.search.photo_index.PhotoIndex.build` does; or a name that is
                too long.
            UnusableIndexError: the collection is there already.
            ImportError: pymilvus is not installed.
        """
        vectors, names = checked_vectors(embeddings, names)
        client = _connect(uri, token)
        if client.has_collection(collection):
            client.close()
            raise UnusableIndexError(
                f"Milvus has a collection {collection!r} already: load it, or choose another name"
            )
        from pymilvus import DataType

        schema = client.create_schema(auto_id=False, enable_dynamic_field=False)
        schema.add_field("name", DataType.VARCHAR, is_primary=True, max_length=_LONGEST_NAME)
        schema.add_field("embedding", DataType.FLOAT_VECTOR, dim=vectors.shape[1])
        kind = client.prepare_index_params()
        kind.add_index(
            "embedding",
            index_type=settings.kind,
            metric_type="IP",
            params=settings.build,
        )
        client.create_collection(
            collection,
            schema=schema,
            index_params=kind,
            num_shards=settings.shards,
            # A search sees what has been added before it, as with a PhotoIndex.
            consistency_level="Strong",
            properties={_MODEL: model, _FORMAT_KEY: _FORMAT},
        )
        index = cls(client, collection, model, vectors.shape[1], settings)
        index._write(names, vectors)
        return index

    @classmethod
    def load(
        cls,
        model: str,
        uri: str,
        collection: str = "photos",
        settings: MilvusSettings = MilvusSettings(),
        token: str = "",
    ) -> MilvusIndex:
        """Open a collection that :meth:`build` made.

        Args:
            model: fingerprint of the tower that will embed the queries.
            uri, collection, token: see :meth:`build`.
            settings: of the search.

        Raises:
            FileNotFoundError: there is no such collection.
            UnusableIndexError: it was not made here, or by another model.
            ImportError: pymilvus is not installed.
        """
        client = _connect(uri, token)
        try:
            if not client.has_collection(collection):
                raise FileNotFoundError(f"Milvus has no collection {collection!r}")
            found = client.describe_collection(collection)
            properties = found.get("properties", {})
            if properties.get(_FORMAT_KEY) != _FORMAT:
                raise UnusableIndexError(
                    f"the collection {collection!r} was not made by this project: choose another"
                )
            if properties[_MODEL] != model:
                raise UnusableIndexError(
                    f"the collection {collection!r} was made by another model "
                    f"({properties[_MODEL][:12]}... and not {model[:12]}...): their embeddings "
                    "can't be compared; build it anew"
                )
            client.load_collection(collection)
            (field,) = (f for f in found["fields"] if f["name"] == "embedding")
            return cls(client, collection, model, int(field["params"]["dim"]), settings)
        except BaseException:
            client.close()
            raise

    def __len__(self) -> int:
        (row,) = self._client.query(
            self._collection, filter="", output_fields=["count(*)"], consistency_level="Strong"
        )
        return int(row["count(*)"])

    def search(self, queries: np.ndarray, k: int) -> tuple[list[list[str]], np.ndarray]:
        """Find the k photos nearest to each query, the nearest first.

        Args:
            queries: float32 (q, d).
            k: how many, up to 16384; more than there are photos gives all of them.

        Returns:
            names, q lists of min(k, n); and their cosine similarities, float32 (q, min(k, n)).

        Raises:
            ValueError: k out of its range, or queries of another dimension than the index.
            RuntimeError: an index of another kind than "FLAT" found fewer than there are.
        """
        queries = np.ascontiguousarray(queries, dtype=np.float32)
        if not 1 <= k <= _MOST_FOUND:
            raise ValueError(f"k must be from 1 to {_MOST_FOUND}, got {k}")
        if queries.ndim != 2 or queries.shape[1] != self.dimension:
            raise ValueError(
                f"queries must be (q, {self.dimension}) for this index, not {queries.shape}"
            )
        found = []
        for rows in _slices(len(queries)):
            found += self._client.search(
                self._collection,
                data=list(queries[rows]),
                limit=k,
                search_params={"metric_type": "IP", "params": self.settings.search},
                consistency_level="Strong",
            )
        counts = {len(hits) for hits in found}
        if len(counts) > 1:
            raise RuntimeError(
                f"Milvus found {min(counts)} to {max(counts)} photos for each query where {k} were "
                "asked for: raise the parameters of the search"
            )
        names = [[hit["name"] for hit in hits] for hits in found]
        similarities = np.array([[hit["distance"] for hit in hits] for hits in found], np.float32)
        return names, similarities.reshape(len(queries), max(counts, default=0))

    def add(self, names: Sequence[str], embeddings: np.ndarray) -> None:
        """Add photos, or replace those of the same name; kept by Milvus when this returns.

        Unlike a PhotoIndex it takes names that it has: to send the same photos once more, after an
        error or a kill, leaves each of them there once.

        Args:
            names: n unique names.
            embeddings: float32 (n, d) of unit norm, by the same model.

        Raises:
            ValueError: as :meth:`build` does; or another dimension.
        """
        vectors, names = checked_vectors(embeddings, names)
        if vectors.shape[1] != self.dimension:
            raise ValueError(
                f"embeddings must be (n, {self.dimension}) for this index, not {vectors.shape}"
            )
        self._write(names, vectors)

    def _write(self, names: list[str], vectors: np.ndarray) -> None:
        for name in names:
            if len(name.encode()) > _LONGEST_NAME:
                raise ValueError(f"{name[:40]!r}... is longer than {_LONGEST_NAME} bytes")
        for rows in _slices(len(names)):
            pairs = zip(names[rows], vectors[rows], strict=True)
            self._client.upsert(
                self._collection, [{"name": name, "embedding": vector} for name, vector in pairs]
            )

    def remove(self, names: Sequence[str]) -> None:
        """Remove photos.

        Args:
            names: photos of the index.

        Raises:
            ValueError: a name that the index does not have; nothing has been removed.
        """
        names = list(names)
        for rows in _slices(len(names)):
            found = self._client.get(self._collection, ids=names[rows], output_fields=["name"])
            if missing := set(names[rows]) - {row["name"] for row in found}:
                raise ValueError(f"the index has no photo {min(missing)!r}")
        for rows in _slices(len(names)):
            self._client.delete(self._collection, ids=names[rows])

    def close(self) -> None:
        """Let go of Milvus; what was added stays there."""
        self._client.close()


def _slices(n: int) -> Iterator[slice]:
    for start in range(0, n, _ROWS):
        yield slice(start, min(start + _ROWS, n))


def _connect(uri: str, token: str) -> Any:
    try:
        from pymilvus import MilvusClient
    except ModuleNotFoundError as error:
        raise ImportError(
            f"{error.name} is not installed: it comes with the extra milvus, by `make cluster` or "
            "pip install '.[milvus]'"
        ) from None
    # A connection of its own, that begins anew. Else pymilvus gives out one that it has kept, and
    # gRPC lets all connections to an address wait for each other's next try: for a while after a
    # server has come back it would seem gone.
    options = {"grpc.use_local_subchannel_pool": 1}
    return MilvusClient(uri, token=token, dedicated=True, grpc_options=options)
