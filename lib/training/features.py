"""Computes a frozen trunk's feature maps once and keeps them on disk, to train the head.

    cache = build_cache(tower.get_layer("trunk"), handler, Path("runs/features"), variants=2)
    for maps, groups in cache.batches(epoch=0, steps=100):
        ...                              # float16 (batch, 3, 4, 4, 2048), int32 (batch, 3)

An epoch of the head then needs no photo. Variant 0 of a picture is the picture as stored, as in
evaluation; the others are augmented. Training draws a variant each time it uses a picture.

A cache is a folder named by a hash of everything that its maps depend on: network, weights, engine,
pictures and augmentation. It holds the maps as memory-mapped ``.npy`` files of 256 MB, and
``manifest.json`` with their sizes and checksums. It may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import keras
import numpy as np
from tqdm import tqdm

from lib.data.catalogue import UNKNOWN
from lib.data.dataset import DatasetHandler, PlannedBatches
from lib.data.sampling import SamplingError
from lib.files import (
    checksum,
    only_writer,
    read_json,
    remove_half_written,
    replacing,
    show_error,
    show_path,
    write_json,
)
from lib.network.openvino import compile_network, export_network, fast_precision, import_openvino
from lib.network.tower import fingerprint, in_float32, to_float16

MANIFEST = "manifest.json"
ENGINES = ("auto", "keras", "openvino")

_FORMAT = 1
_SHARD_BYTES = 256 * 2**20
_BATCH = 64  # photos in each forward pass
_THREADS = os.cpu_count() or 1


class FeatureCacheError(RuntimeError):
    """Feature maps can't be computed or kept; the message says what to change."""


class FrozenTrunk:
    """The forward pass of a trunk whose weights do not change, on the fastest engine.

    On a CPU, OpenVINO is somewhat faster than Keras in float32, and more than twice as fast in
    bfloat16 (``python -m benchmarks.train_step``). It reads networks of the TensorFlow and PyTorch
    backends.

    Args:
        trunk: uint8 photos (n, s, s, 3) -> maps (n, h, w, c). OpenVINO keeps the weights of the
            first call.
        engine: "keras", "openvino", or "auto": OpenVINO on a CPU if it can read the network.

    Attributes:
        name: engine and precision, such as "openvino bfloat16".
    """

    def __init__(self, trunk: keras.Model, engine: str = "auto"):
        if engine not in ENGINES:
            raise ValueError(f"unknown engine {engine!r}; choose one of {', '.join(ENGINES)}")
        if engine == "auto":
            readable = keras.backend.backend() in ("tensorflow", "torch")
            on_processor = all("cpu" in str(w.value.device).lower() for w in trunk.weights)
            engine = "openvino" if readable and on_processor else "keras"
        self._trunk, self._engine = trunk, engine
        precision = fast_precision() if engine == "openvino" else trunk.outputs[0].dtype
        self.name = f"{engine} {precision}"

    def __call__(self, photos: np.ndarray) -> np.ndarray:
        """Compute maps, uint8 (n, s, s, 3) -> float16 (n, h, w, c); not thread-safe.

        Raises:
            FeatureCacheError: a value is NaN or beyond float16's range.
        """
        maps = np.empty((len(photos), *self._trunk.output_shape[1:]), np.float16)
        for start in range(0, len(photos), _BATCH):
            found = self._compute(photos[start : start + _BATCH])
            try:
                maps[start : start + _BATCH] = to_float16(found)
            except ValueError as error:
                raise FeatureCacheError(str(error)) from None
        return maps

    @cached_property
    def _compute(self):
        if self._engine == "keras":
            return lambda photos: np.asarray(self._trunk.predict_on_batch(photos), np.float32)
        with tempfile.TemporaryDirectory() as folder:
            path = export_network(in_float32(self._trunk), folder)
            network = import_openvino().Core().read_model(path)
            return compile_network(network, self._trunk.input_shape[1:])[0]


@dataclass(eq=False, repr=False)
class FeatureCache:
    """The feature maps of a handler's training pictures, from :func:`build_cache`.

    Attributes:
        pictures: int64 (n,), rows of the catalogue's pictures, in ascending order.
        map_shape: (h, w, c).
    """

    handler: DatasetHandler
    folder: Path
    pictures: np.ndarray
    variants: int
    map_shape: tuple[int, int, int]

    def __post_init__(self):
        # Files hold whole batches, so that a photo's augmentation does not depend on their size.
        row = self.variants * self.bytes_per_map
        self._rows_per_file = max(_SHARD_BYTES // (row * _BATCH), 1) * _BATCH
        self._row = np.full(len(self.handler.catalogue.pictures), -1)
        self._row[self.pictures] = np.arange(len(self.pictures))

    def __getstate__(self) -> dict:
        """Leave the open files out of a pickle: another process opens them itself."""
        return {name: value for name, value in vars(self).items() if name != "_maps"}

    @property
    def bytes_per_map(self) -> int:
        return 2 * math.prod(self.map_shape)

    @property
    def bytes(self) -> int:
        return len(self.pictures) * self.variants * self.bytes_per_map

    @property
    def files(self) -> dict[str, slice]:
        """The name of each file, with the slice of ``pictures`` in it."""
        n = self._rows_per_file
        count = math.ceil(len(self.pictures) / n)
        return {f"maps{i:04d}.npy": slice(i * n, (i + 1) * n) for i in range(count)}

    @cached_property
    def _maps(self) -> list[np.ndarray]:
        return [np.load(self.folder / name, mmap_mode="r") for name in self.files]

    def maps(self, pictures: np.ndarray, variant: np.ndarray | int) -> np.ndarray:
        """Read maps, float16 (..., h, w, c), of pictures, int (...), in variants, int or int (...).

        Raises:
            KeyError: a picture is not in the cache.
        """
        rows = self._row[pictures]
        if (rows < 0).any():
            missing = np.unique(pictures[rows < 0])
            first = f"{len(missing)} pictures (first: {missing[0]})"
            raise KeyError(f"{first} are none of those that the feature cache's handler trains on")
        files, places = np.divmod(rows, self._rows_per_file)
        variants = np.broadcast_to(variant, rows.shape)
        maps = np.empty((*rows.shape, *self.map_shape), np.float16)
        for i in np.ndindex(rows.shape):
            maps[i] = self._maps[files[i]][places[i], variants[i]]
        return maps

    def batches(self, epoch: int, steps: int) -> FeatureBatches:
        """Return an epoch of :meth:`lib.data.dataset.DatasetHandler.training_batches`, as maps."""
        return FeatureBatches(self, self.handler.training_batches(epoch, steps).plan, epoch)


class FeatureBatches(PlannedBatches):
    """Batches of feature maps, float16 (..., h, w, c), each of a variant drawn at random."""

    def __init__(self, cache: FeatureCache, plan: np.ndarray, epoch: int):
        super().__init__(cache.handler, plan, epoch)
        self._cache = cache
        self._group = cache.handler.catalogue.pictures["group"].to_numpy(np.int32)

    def _make(self, pictures: np.ndarray, rng: np.random.Generator) -> tuple:
        variants = rng.integers(self._cache.variants, size=pictures.shape)
        pictures, variants = pictures[self._rows], variants[self._rows]
        return self._cache.maps(pictures, variants), self._group[pictures]


def build_cache(
    trunk: keras.Model,
    handler: DatasetHandler,
    folder: Path,
    variants: int = 2,
    engine: str = "auto",
) -> FeatureCache:
    """Compute the feature maps that training can need, or open the cache that has them.

    An interrupted or killed build resumes when called again. Damaged files are recomputed.

    Args:
        trunk: from a tower, at the handler's image size.
        handler: the cache holds the pictures of its usable triplets or, for P x K batches, those of
            its landmarks with at least two pictures.
        folder: holds all caches.
        variants: of each picture, at least 1.
        engine: see :class:`FrozenTrunk`.

    Raises:
        FeatureCacheError: too little free space (checked first); another process builds the same
            cache; float16 can't hold the maps; or the folder can't be written.
        SamplingError: there is nothing to train on.
        ValueError: an unknown engine, no variants, several of them without augmentation, or a trunk
            of another image size.
    """
    taken, served = trunk.input_shape[1], handler.settings.image_size
    if variants < 1 or (variants > 1 and handler.settings.augmentation is None):
        raise ValueError(f"{variants} variants: at least 1, and no other without augmentation")
    if taken != served:
        raise ValueError(f"the trunk takes photos of {taken} pixels, the handler serves {served}")
    pictures = _pictures_to_train_on(handler)
    frozen = FrozenTrunk(trunk, engine)
    made_of = _identity(trunk, frozen.name, handler, pictures, variants)
    name = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:16]
    cache = FeatureCache(handler, Path(folder) / name, pictures, variants, trunk.output_shape[1:])
    remove_half_written(cache.folder)
    whole = _whole_files(cache)
    if len(whole) == len(cache.files):
        return cache
    shown = show_path(cache.folder)
    busy = FeatureCacheError(f"another process builds the feature cache {shown}: wait for its end")
    try:
        cache.folder.mkdir(parents=True, exist_ok=True)
        with only_writer(cache.folder, busy):
            _build(cache, frozen, made_of, whole)
    except OSError as error:
        if error.filename in map(str, handler.catalogue.shards):
            raise
        raise FeatureCacheError(
            f"the feature cache {shown} can't be written ({error.strerror or error}): make room "
            "on the disk or choose another folder, and run the same once more"
        ) from error
    return cache


def _identity(
    trunk: keras.Model, engine: str, handler: DatasetHandler, pictures: np.ndarray, variants: int
) -> dict:
    """Return everything that the bytes of a cache depend on."""
    settings = handler.settings
    hashes = handler.catalogue.pictures["image"].to_numpy()[pictures]
    return {
        "format": _FORMAT,
        "file_bytes": _SHARD_BYTES,
        "pictures": hashlib.sha256(b"".join(hashes)).hexdigest(),
        "trunk": fingerprint(trunk),
        "engine": engine,
        "image_size": settings.image_size,
        "variants": variants,
        # A single variant is the picture itself, whatever the augmentation.
        "augmentation": asdict(settings.augmentation) if variants > 1 else None,
        "seed": settings.seed if variants > 1 else None,
    }


def _pictures_to_train_on(handler: DatasetHandler) -> np.ndarray:
    """Return all pictures that the handler's batches can contain, in ascending order."""
    if handler.settings.pictures_per_landmark:
        table = handler.catalogue.pictures
        known = table.loc[handler.chosen & (table["landmark"] != UNKNOWN), "landmark"]
        pictures = known.index[known.map(known.value_counts()) >= 2].to_numpy(np.int64)
    else:
        pictures = np.unique(handler.triplets)
    if not len(pictures):
        raise SamplingError("there are no pictures to train on: use more shards")
    return pictures


def _whole_files(cache: FeatureCache) -> dict[str, dict]:
    """Return the manifest's entries of the files that exist with the listed size and checksum."""
    path = cache.folder / MANIFEST
    if not path.is_file():
        return {}
    try:
        listed = read_json(path)["files"].items()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        print(
            f"{show_path(path)} is damaged ({show_error(error)}): the feature cache is built anew"
        )
        return {}
    whole = {}
    for name, entry in tqdm(listed, desc="checking features", unit=" files", leave=False):
        file = cache.folder / name
        if file.is_file() and entry == _entry(file):
            whole[name] = entry
        else:
            tqdm.write(f"{show_path(file)} is missing or damaged: it is computed anew")
    return whole


def _entry(file: Path) -> dict:
    return {"bytes": file.stat().st_size, "xxh3": checksum(file)}


def _build(cache: FeatureCache, frozen: FrozenTrunk, made_of: dict, whole: dict) -> None:
    """Print the size, check that the disk has room, and compute all files that are not whole."""
    todo = {name: rows for name, rows in cache.files.items() if name not in whole}
    missing = cache.variants * sum(len(cache.pictures[rows]) for rows in todo.values())
    total = len(cache.pictures) * cache.variants
    needed, free = missing * cache.bytes_per_map, shutil.disk_usage(cache.folder).free
    have = f", {(cache.bytes - needed) / 1e9:.2f} GB of them there" if whole else ""
    print(
        f"feature cache: {len(cache.pictures)} pictures x {cache.variants} variants x "
        f"{cache.bytes_per_map} bytes = {cache.bytes / 1e9:.2f} GB{have}; "
        f"{free / 1e9:.2f} GB free; by {frozen.name}",
        flush=True,
    )
    if needed > free:
        files = cache.folder.parent.glob("*/maps*.npy")
        others = sum(file.stat().st_size for file in files if file.parent != cache.folder)
        delete = f", or delete the other caches there ({others / 1e9:.2f} GB)" if others else ""
        raise FeatureCacheError(
            f"the feature cache needs {needed / 1e9:.2f} GB more in "
            f"{show_path(cache.folder.parent)}, where {free / 1e9:.2f} GB are free: choose fewer "
            f"variants or another folder{delete}"
        )
    with tqdm(total=total, initial=total - missing, desc="features", unit=" photos") as bar:
        for name, rows in todo.items():
            _write_file(cache, frozen, cache.folder / name, rows, bar)
            whole[name] = _entry(cache.folder / name)
            # After each file, since a resume keeps only the files in the manifest.
            write_json(cache.folder / MANIFEST, {"made_of": made_of, "files": whole})


def _write_file(
    cache: FeatureCache, frozen: FrozenTrunk, path: Path, rows: slice, bar: tqdm
) -> None:
    """Compute and write one file, float16 (pictures, variants, h, w, c)."""
    handler, pictures = cache.handler, cache.pictures[rows]

    def variants_of(start: int) -> list[np.ndarray]:
        some = pictures[start : start + _BATCH]
        seeds = [[handler.settings.seed, v, rows.start + start] for v in range(1, cache.variants)]
        varied = [handler.batch(some, np.random.default_rng(seed))[0] for seed in seeds]
        return [handler.photos(some), *varied]

    shape = (len(pictures), cache.variants, *cache.map_shape)
    header = {"descr": "<f2", "fortran_order": False, "shape": shape}
    with replacing(path) as part, part.open("wb") as file, ThreadPoolExecutor(1) as reader:
        np.lib.format.write_array_header_1_0(file, header)
        ahead = reader.submit(variants_of, 0)
        for start in range(0, len(pictures), _BATCH):
            photos = ahead.result()
            # Read the next photos while the network computes; at the end there are none.
            ahead = reader.submit(variants_of, start + _BATCH)
            # Through a memory map, a full disk would crash the process and raise no error.
            file.write(np.stack([frozen(variant) for variant in photos], axis=1))
            bar.update(cache.variants * len(photos[0]))
