"""Exports a tower to one file and runs it without TensorFlow and Keras.

    export_engine(tower, Path("runs/latest/tower.engine"))
    engine = load_engine(Path("runs/latest/tower.engine"))     # about a second
    embeddings = engine.embed(photos)             # uint8 (n, 64, 64, 3) -> float32 (n, 128)

    engine = packaged_engine(Path("runs/own_photos"))       # for any photographs
    photos = [read_photo(path, engine.image_size, engine.squashes) for path in paths]
    descriptors = engine.embed(photos)                      # of any shapes -> float32 (n, 1280)

A tower that was trained on squashed squares embeds such squares. For photographs in their own
shape, an engine has *views*: the photo is embedded at several sizes, and its descriptor is the mean
of theirs (Radenović, Tolias, Chum, "Fine-tuning CNN Image Retrieval with No Human Annotation",
TPAMI 2018, "Multi-scale representation"). A view is a longest side in pixels, and is mirrored as
well; or, as in the protocols of the public benchmarks, a multiple of the photo's own size.

The file is a ZIP archive of OpenVINO's network and ``manifest.json``, whose checksums find damage;
they don't make a stranger's file safe. Processors with bfloat16 instructions compute in bfloat16 by
default: twice as fast, with nearly the same ranking (``python -m benchmarks.embedding``).
:func:`keras_engine` is for a GPU or a machine without OpenVINO.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import xxhash

from lib.data.decoding import resize
from lib.files import check_stored, checksum, replacing, show_error, show_path
from lib.network.openvino import NETWORK_FILES, compile_network, export_network, import_openvino

if TYPE_CHECKING:  # an exported tower runs without Keras
    import keras

    from lib.network.tower import TowerSettings

PRECISIONS = ("auto", "float32", "bfloat16")
Views = tuple[int, ...] | tuple[float, ...]  # see Engine
ENGINE = "tower.engine"  # name of a run's exported tower
# In the project (lib.files.or_cache), for packaged_engine and embeddings made with it.
OWN_PHOTOS = "runs/own_photos"

_FORMAT = 2
GEM_P, VIEWS = 2.0, (160, 224, 320)  # of the packaged network
PACKAGED = f"EfficientNetLite0, packaged, GeM {GEM_P}, views {VIEWS}"  # its origin
_MOST_VIEWS = 16
_MOST_SIZE = 4096  # side of a photo in pixels; no number of a file is believed unseen
_BATCH = 64  # photos that go through the network together
_BATCH_PIXELS = 16 * 224 * 224  # likewise, of views
STRIDE = 32  # pixels of a photo's side that are one place of the last feature map
_MANIFEST = "manifest.json"


class EngineError(ValueError):
    """A tower can't be exported, or an exported one can't be used."""


@dataclass(frozen=True)
class Engine:
    """Embeds photos with Keras or OpenVINO.

    Attributes:
        compute: a batch of photos, uint8 (n, h, w, 3), to embeddings, float32 (n, d).
        image_size: in pixels; the side of the squashed photos or, with views, the longest side of
            photos that :meth:`embed` can make use of.
        dimension: d.
        fingerprint: identifies the embeddings: equal if tower and views are.
        name: library and precision, such as "openvino bfloat16".
        views: of a photo in its own shape, int, longest sides in pixels, or float, multiples of its
            size; () for one squashed square of ``image_size``.
    """

    compute: Callable[[np.ndarray], np.ndarray]
    image_size: int
    dimension: int
    fingerprint: str
    name: str
    views: Views = ()
    origin: str = ""  # of an exported tower, see export_engine
    dtype: ClassVar = np.dtype("<f4")  # of the embeddings
    task: ClassVar = "embedding"  # for progress bars

    @property
    def squashes(self) -> bool:
        """Whether photos must be squashed to squares of ``image_size``."""
        return not self.views

    def embed(self, photos: Sequence[np.ndarray]) -> np.ndarray:
        """Embed photos, uint8 (h, w, 3) RGB -> float32 (n, d) of unit norm; thread-safe.

        Raises:
            ValueError: photos of another type or, without views, of another shape.
        """
        size = self.image_size
        for photo in photos:
            square = (size, size, 3) if self.squashes else (*photo.shape[:2], 3)
            if photo.dtype != np.uint8 or photo.shape != square:
                wanted = f"({size}, {size}, 3)" if self.squashes else "(h, w, 3)"
                raise ValueError(f"photos must be uint8 {wanted}, not {photo.dtype} {photo.shape}")
        embeddings = np.zeros((len(photos), self.dimension), np.float32)
        if self.squashes:
            for i in range(0, len(photos), _BATCH):
                embeddings[i : i + _BATCH] = self.compute(np.asarray(photos[i : i + _BATCH]))
            return embeddings
        for view in self.views:
            for rows, batch in _batches(photos, view):
                embeddings[rows] += self.compute(batch)
                if isinstance(view, int):
                    embeddings[rows] += self.compute(batch[:, :, ::-1])
        return embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)


def _batches(
    photos: Sequence[np.ndarray], view: int | float
) -> Iterator[tuple[list[int], np.ndarray]]:
    """Photos resized for a view, in batches of one shape, with the photos' numbers."""
    shapes: dict[tuple[int, int], list[int]] = {}
    for number, photo in enumerate(photos):
        # Multiples of the network's stride: no place of a map is computed of padding, and few
        # shapes occur.
        scale = view / max(photo.shape) if isinstance(view, int) else view
        sides = (round(side * scale / STRIDE) for side in photo.shape[:2])
        shapes.setdefault(tuple(max(side, 1) * STRIDE for side in sides), []).append(number)
    for (height, width), numbers in shapes.items():
        most = max(1, _BATCH_PIXELS // (height * width))
        for i in range(0, len(numbers), most):
            rows = numbers[i : i + most]
            yield rows, np.stack([resize(photos[row], (height, width)) for row in rows])


def keras_engine(tower: keras.Model, views: Views = ()) -> Engine:
    """A tower in memory, computing on the device of Keras' backend; for views see Engine."""
    from lib.network.tower import compute_precision, embed, resized  # loads Keras

    at_any_size = resized(tower, None) if views else tower
    longest = (view if isinstance(view, int) else _MOST_SIZE for view in views)
    return Engine(
        compute=lambda photos: embed(at_any_size, photos),
        image_size=max(longest, default=tower.input_shape[1]),
        dimension=tower.output_shape[-1],
        fingerprint=_fingerprint(tower, views),
        name=f"keras {compute_precision(tower)}",
        views=views,
    )


def _fingerprint(tower: keras.Model, views: Views) -> str:
    from lib.network.tower import fingerprint

    own = fingerprint(tower)
    return hashlib.sha256(f"{own} {views}".encode()).hexdigest() if views else own


def export_engine(tower: keras.Model, path: Path, origin: str = "", views: Views = ()) -> None:
    """Write a tower as one file, atomically, on Keras' TensorFlow or PyTorch backend.

    Args:
        tower: from :func:`lib.network.tower.build_tower`.
        path: of the file.
        origin: what the tower is, such as its file's checksum, by which :func:`open_engine` finds
            out whether it was trained anew since.
        views: see :class:`Engine`.

    Raises:
        EngineError: the exported network's embeddings differ from the tower's; nothing is written.
    """
    from lib.network.tower import in_float32, resized  # loads Keras

    tower_in_float32 = in_float32(tower)
    own = keras_engine(tower_in_float32, views)
    with replacing(path) as part, tempfile.TemporaryDirectory() as folder:
        export_network(resized(tower_in_float32, None) if views else tower_in_float32, Path(folder))
        manifest = {
            "format": _FORMAT,
            "fingerprint": own.fingerprint,
            "image_size": own.image_size,
            "views": views,
            "dimension": own.dimension,
            "origin": origin,
            "files": {name: checksum(Path(folder) / name) for name in NETWORK_FILES},
        }
        with zipfile.ZipFile(part, "w") as archive:
            for name in NETWORK_FILES:
                archive.write(Path(folder) / name, name)
            archive.writestr(_MANIFEST, json.dumps(manifest, indent=2) + "\n")
        # Large patches of random colours: noise would give nearly equal embeddings.
        patches = np.random.default_rng(0).integers(0, 256, (4, 5, 5, 3), np.uint8)
        side = own.image_size if own.image_size < _MOST_SIZE else 8 * STRIDE
        place = np.arange(side) * 5 // side
        photos = patches[:, place][:, :, place]
        pairs = load_engine(part, "float32").embed(photos), own.embed(photos)
        cosine = float(np.einsum("nd,nd->n", *pairs).min())
        if not cosine >= 0.9999:
            raise EngineError(
                f"the exported tower's embeddings differ from its own (cosine {cosine:.5f}): "
                "OpenVINO can't run this tower"
            )


def open_engine(run: Path) -> Engine:
    """Load a run's exported tower, after exporting it if it is absent or of another model.

    Raises:
        FileNotFoundError: the run has neither an exported tower nor a model.
        EngineError: the exported tower is damaged.
    """
    engine, model = run / ENGINE, run / "model.keras"
    if not (engine.is_file() or model.is_file()):
        raise FileNotFoundError(
            f"there is no trained model in {show_path(run)}: run `make demo` first, or set run_dir "
            "to a run that has one"
        )
    if model.is_file() and _origin_of(engine) != (origin := checksum(model)):
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # TensorFlow is chatty
        from lib.network.tower import load_tower  # loads Keras

        print("exporting the trained network", file=sys.stderr)
        export_engine(load_tower(model), engine, origin)
    return load_engine(engine)


def packaged_settings(image_size: int = max(VIEWS), gem_p: float = GEM_P) -> TowerSettings:
    """The network of :func:`packaged_engine`, for :func:`lib.network.tower.build_tower`."""
    from lib.network.tower import TowerSettings  # loads Keras

    return TowerSettings(
        image_size,
        embedding_size=0,
        gem_p=gem_p,
        backbone="EfficientNetLite0",
        weights="packaged",
    )


def packaged_engine(folder: Path) -> Engine:
    """Load a network for photographs of anything, after exporting it if ``folder`` lacks it.

    It is EfficientNet-Lite0 with the ImageNet weights of its Python package, GeM pooling with p = 2
    and no projection; ``benchmarks/README.md`` tells what each step is worth on three sets of
    photographs.

    Raises:
        WeightsUnavailableError: the package is absent or damaged.
        EngineError: the exported network is damaged.
    """
    engine = folder / ENGINE
    if _origin_of(engine) != PACKAGED:
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # TensorFlow is chatty
        from lib.network.tower import build_tower  # loads Keras

        print("exporting the pre-trained network", file=sys.stderr)
        folder.mkdir(parents=True, exist_ok=True)
        export_engine(build_tower(packaged_settings()), engine, PACKAGED, VIEWS)
    return load_engine(engine)


def _origin_of(engine: Path) -> str | None:
    """The origin of an exported tower; None if the file says none."""
    # A damaged file raises anything.
    with contextlib.suppress(Exception), zipfile.ZipFile(engine) as archive:
        check_stored(archive)
        return json.loads(archive.read(_MANIFEST))["origin"]
    return None


def load_engine(path: Path, precision: str = "auto", threads: int | None = None) -> Engine:
    """Load a tower that :func:`export_engine` wrote, to run it on the processor.

    ``precision`` and ``threads`` are those of :func:`lib.network.openvino.compile_network`.

    Raises:
        FileNotFoundError: there is no such file.
        EngineError: the file is damaged or is not an exported tower.
        ValueError: an unknown precision.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"unknown precision {precision!r}; choose one of {', '.join(PRECISIONS)}")
    ov, path = import_openvino(), Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"no exported tower at {path}: lib.network.engine.export_engine writes one"
        )
    try:
        with zipfile.ZipFile(path) as archive:
            check_stored(archive)
            manifest = json.loads(archive.read(_MANIFEST))
            network = {name: archive.read(name) for name in NETWORK_FILES}
        found = {name: xxhash.xxh3_128_hexdigest(content) for name, content in network.items()}
        if manifest["format"] != _FORMAT:
            raise ValueError(f"format {manifest['format']}, not {_FORMAT}")
        if manifest["files"] != found:
            raise ValueError("the network has another checksum than the manifest says")
        size, views = manifest["image_size"], tuple(manifest["views"])
        for side in (size, *(v if isinstance(v, int) else STRIDE * v for v in views)):
            if not 1 <= side <= _MOST_SIZE:
                raise ValueError(f"a view of {side} pixels")
        if len(views) > _MOST_VIEWS:
            raise ValueError(f"{len(views)} views")
        model = ov.Core().read_model(*network.values())
        shape = ov.PartialShape([-1, manifest["dimension"]])
        if not model.output(0).partial_shape.compatible(shape):
            raise ValueError(f"dimension {manifest['dimension']}, unlike the network's")
        side = -1 if views else size
        compute, name = compile_network(model, (side, side, 3), precision, threads)
        fields = manifest["dimension"], manifest["fingerprint"], name, views, manifest["origin"]
        return Engine(compute, size, *fields)
    except Exception as error:  # damage raises errors of zipfile, json and OpenVINO
        raise EngineError(
            f"{show_path(path)} is no exported tower, or a damaged one ({show_error(error)}): "
            "export it anew"
        ) from None
