"""A search index on a Milvus server, for more photos than fit on one machine.

    index = MilvusIndex.build(embeddings, names, fingerprint(tower), "http://milvus:19530")
    names, similarities = index.search(query_embeddings, k=5)

It is used like a :class:`lib.search.photo_index.PhotoIndex`. Milvus spreads a collection over its
machines and replaces those that die. Photos are written by name (*upsert*), so sending them again
after an error makes no duplicates. pymilvus comes with the extra ``milvus`` (``make cluster``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lib.search.exact import checked
from lib.search.photo_index import UnusableIndexError, checked_vectors

_MODEL, _FORMAT_KEY, _FORMAT = "image_retrieval.model", "image_retrieval.format", "1"
_LONGEST_NAME = 1024  # bytes
_ROWS = 1_000  # per message: 2 MB with 512 dimensions; Milvus allows 64 MB
_MOST_FOUND = 16_384  # Milvus' limit of k


@dataclass(frozen=True)
class MilvusSettings:
    """The type of a collection's index, and its parameters."""

    # Milvus' index_type: "FLAT" is exact; "HNSW", "IVF_SQ8", "DISKANN" and others are approximate.
    kind: str = "FLAT"
    build: dict[str, Any] = field(default_factory=dict)  # such as {"M": 32, "efConstruction": 200}
    search: dict[str, Any] = field(default_factory=dict)  # such as {"ef": 128}
    shards: int = 1  # number of parts over which writes are spread


class MilvusIndex:
    """An index of named photos in a Milvus collection; made by :meth:`build` or :meth:`load`."""

    def __init__(self, client: Any, collection: str, dimension: int, search: dict[str, Any]):
        self._client, self._collection = client, collection
        self.dimension, self._search = dimension, search

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
        """Create a collection.

        Args:
            embeddings: float32 (n, d) of unit norm, may be memory-mapped; n may be 0.
            names: n unique names of up to 1024 bytes.
            model: :func:`lib.network.tower.fingerprint` of the tower that made the embeddings.
            uri: of the server, "http://host:19530"; or a path ending in ``.db``, for Milvus Lite,
                which runs in this process, for tests and prototypes.
            collection: its name on the server.
            settings: of the index.
            token: "user:password" or an API key, if the server requires it.

        Raises:
            ValueError: as :meth:`lib.search.photo_index.PhotoIndex.build`, or a name is too long.
            UnusableIndexError: the collection already exists.
            ImportError: pymilvus is not installed.
        """
        vectors, names = checked_vectors(embeddings, names)
        client = _connect(uri, token)
        if client.has_collection(collection):
            client.close()
            raise UnusableIndexError(
                f"Milvus already has a collection {collection!r}: load it, or choose another name"
            )
        from pymilvus import DataType

        schema = client.create_schema(auto_id=False, enable_dynamic_field=False)
        schema.add_field("name", DataType.VARCHAR, is_primary=True, max_length=_LONGEST_NAME)
        schema.add_field("embedding", DataType.FLOAT_VECTOR, dim=vectors.shape[1])
        kind = client.prepare_index_params(
            "embedding", index_type=settings.kind, metric_type="IP", params=settings.build
        )
        client.create_collection(
            collection,
            schema=schema,
            index_params=kind,
            num_shards=settings.shards,
            # A search finds everything added before it, as in a PhotoIndex.
            consistency_level="Strong",
            properties={_MODEL: model, _FORMAT_KEY: _FORMAT},
        )
        index = cls(client, collection, vectors.shape[1], settings.search)
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
        """Open a collection that :meth:`build` made, with its arguments.

        Args:
            model: fingerprint of the tower that will embed the queries.
            settings: only ``search`` is used.

        Raises:
            FileNotFoundError: there is no such collection.
            UnusableIndexError: it was not made by :meth:`build`, or by another model.
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
                    f"the embeddings of the collection {collection!r} are those of another model "
                    f"({properties[_MODEL][:12]}..., not {model[:12]}...): build it again"
                )
            client.load_collection(collection)
            (field,) = (f for f in found["fields"] if f["name"] == "embedding")
            return cls(client, collection, int(field["params"]["dim"]), settings.search)
        except BaseException:
            client.close()
            raise

    def __len__(self) -> int:
        (row,) = self._client.query(
            self._collection, filter="", output_fields=["count(*)"], consistency_level="Strong"
        )
        return int(row["count(*)"])

    def search(self, queries: np.ndarray, k: int) -> tuple[list[list[str]], np.ndarray]:
        """Find photos as :meth:`lib.search.photo_index.PhotoIndex.search`.

        Raises:
            ValueError: k is not from 1 to 16384, or the queries are not (q, d) of unit norm.
            RuntimeError: an approximate search found fewer photos for some queries than for others.
        """
        queries = checked(queries, "queries", self.dimension)
        if not 1 <= k <= _MOST_FOUND:
            raise ValueError(f"k must be from 1 to {_MOST_FOUND}, got {k}")
        found = []
        for rows in _slices(len(queries)):
            found += self._client.search(
                self._collection,
                data=list(queries[rows]),
                limit=k,
                search_params={"metric_type": "IP", "params": self._search},
                consistency_level="Strong",
            )
        counts = {len(hits) for hits in found}
        if len(counts) > 1:
            raise RuntimeError(
                f"Milvus found {min(counts)} to {max(counts)} photos per query in place of {k}: "
                "raise the search parameters in MilvusSettings(search=...)"
            )
        names = [[hit["name"] for hit in hits] for hits in found]
        similarities = np.array([[hit["distance"] for hit in hits] for hits in found], np.float32)
        return names, similarities.reshape(len(queries), max(counts, default=0))

    def add(self, names: Sequence[str], embeddings: np.ndarray) -> None:
        """Add photos, or replace those of the same name; Milvus has stored them when this returns.

        Raises:
            ValueError: as :meth:`build`, or the dimension differs.
        """
        vectors, names = checked_vectors(embeddings, names)
        checked(vectors[:1], dimension=self.dimension)
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
        """Remove photos by name.

        Raises:
            ValueError: a name is not in the index; then nothing is removed.
        """
        names = list(names)
        for rows in _slices(len(names)):
            found = self._client.get(self._collection, ids=names[rows], output_fields=["name"])
            if missing := set(names[rows]) - {row["name"] for row in found}:
                raise ValueError(f"the index has no photo {min(missing)!r}")
        for rows in _slices(len(names)):
            self._client.delete(self._collection, ids=names[rows])

    def close(self) -> None:
        """Close the connection; the collection stays."""
        self._client.close()


def _slices(n: int) -> Iterator[slice]:
    return (slice(start, start + _ROWS) for start in range(0, n, _ROWS))


def _connect(uri: str, token: str) -> Any:
    try:
        from pymilvus import MilvusClient
    except ModuleNotFoundError as error:
        how = "it comes with the extra milvus, by `make cluster` or pip install '.[milvus]'"
        raise ImportError(f"{error.name} is not installed: {how}") from None
    # pymilvus would reuse an old connection, and gRPC shares the retry delay among all connections
    # to an address: a restarted server would seem gone for a while.
    options = {"grpc.use_local_subchannel_pool": 1}
    return MilvusClient(uri, token=token, dedicated=True, grpc_options=options)
