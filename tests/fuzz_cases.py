"""The files that ``python -m tests.fuzz`` damages, made by the library itself, and their readers.

Imports are inside the functions, so that a single reader loads only what it needs.
"""

import contextlib
import functools
import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np

MODEL = "0" * 32

# What readers import; a process that has it forks the others, see tests/fuzz.py.
LIBRARIES = (
    *("lib.app.upload", "lib.evaluation.ground_truth", "lib.network.engine", "scipy.io"),
    *("lib.search.embedding", "lib.search.photo_index", "lib.training.checkpoint"),
    *("tools.convert", "tools.labelled", "tools.pipeline"),
)

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


class Case(NamedTuple):
    """What a reader is tried on.

    Attributes:
        files: that are damaged, one at a time, all in the folder of the case.
        read: takes the path of the damaged file in a copy of that folder.
        error: the only type that ``read`` may raise.
        exact: whether a result must equal that of the whole file; then it is guarded by a checksum.
    """

    files: list[Path]
    read: Callable[[Path], Any]
    error: type[Exception]
    exact: bool = True


def make_pictures(folder: Path) -> list[Path]:
    """A small picture in every format and in the odd ways of some of them."""
    import pillow_heif
    from PIL import Image

    pillow_heif.register_heif_opener()

    rng = np.random.default_rng(0)
    rgb = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8)).resize((80, 60))
    clear = rgb.convert("RGBA")
    clear.putalpha(Image.linear_gradient("L").resize(rgb.size))
    deep = Image.fromarray(rng.integers(0, 2**16, (60, 80), np.uint16))
    exif = Image.Exif()
    exif[0x112] = 6
    several = {"save_all": True, "append_images": [clear.rotate(90)]}
    pictures = {
        "a.jpg": (rgb, {"exif": exif}),
        "progressive.jpg": (rgb, {"progressive": True}),
        "cmyk.jpg": (rgb.convert("CMYK"), {}),
        "clear.png": (clear, {}),
        "deep.png": (deep, {}),
        "palette.png": (rgb.quantize(20), {"transparency": 3}),
        "a.webp": (clear, {"exif": exif}),
        "several.webp": (clear, several | {"lossless": True}),
        "a.avif": (rgb, {}),
        "a.heic": (rgb, {"exif": exif}),
        "several.heic": (clear, several | {"thumbnails": [32]}),
        "deep.heic": (deep, {}),
        "several.gif": (clear, several),
        "a.bmp": (rgb, {}),
        "a.tif": (deep, {}),
        **{f"{c}.tif": (rgb, {"compression": c}) for c in ("tiff_lzw", "tiff_deflate", "jpeg")},
    }
    for name, (picture, options) in pictures.items():
        picture.save(folder / name, **options)
    return [folder / name for name in pictures]


def photo(folder: Path) -> Case:
    from lib.data.photos import PhotoError, read_photo

    return Case(make_pictures(folder), lambda path: read_photo(path, 32).shape, PhotoError)


def upload(folder: Path) -> Case:
    from lib.app.upload import UploadError, read_upload

    def read(path: Path):
        return read_upload(path.read_bytes(), 32).pixels.shape

    return Case(make_pictures(folder), read, UploadError)


def converted_photo(folder: Path) -> Case:
    from tools.convert import Failure, encode_photo

    def read(path: Path):
        result = encode_photo(path, 32, 90)
        if isinstance(result, Failure):
            raise ValueError(result.reason[:100])

    return Case(make_pictures(folder), read, ValueError)


@functools.cache
def triplets(count: int = 4) -> list:
    from PIL import Image

    from lib.data.records import Triplet

    rng = np.random.default_rng(1)

    def jpeg(n: int) -> bytes:
        picture = Image.fromarray(rng.integers(0, 256, (4, 5, 3), np.uint8)).resize((50, 40))
        picture.save(file := io.BytesIO(), "JPEG")
        return file.getvalue()

    return [
        Triplet(*map(jpeg, range(3)), (f"a{i}", f"b{i}", f"c{i}"), (f"{i}", f"{i}", f"{i + 1}"))
        for i in range(count)
    ]


def shard(folder: Path) -> Case:
    """The frames of records; damaged records are left out, the others are as they were."""
    from lib.data.catalogue import CatalogueError, build_catalogue
    from lib.data.records import RecordError, read_triplets, write_shard

    whole = {image: record for record in triplets() for image in record.pictures}
    write_shard(folder / "train00.tfrec", triplets())

    def read(path: Path):
        try:
            rows = build_catalogue([path]).rows
            with path.open("rb") as file:
                for position, length in zip(rows["position"], rows["length"], strict=True):
                    file.seek(position)
                    assert file.read(length) in whole
        except CatalogueError:
            pass
        assert all(record in triplets() for record in read_triplets(path))

    return Case([folder / "train00.tfrec"], read, RecordError)


def record(folder: Path) -> Case:
    """What is in a record, with right checksums: pictures that are accepted can be decoded."""
    from lib.data.catalogue import CatalogueError, build_catalogue
    from lib.data.decoding import decode
    from lib.data.records import read_picture, serialize_triplet, write_shard

    (folder / "message").write_bytes(serialize_triplet(triplets()[0]))

    def read(path: Path):
        with mock.patch("lib.data.records.serialize_triplet", bytes):
            write_shard(path.with_name("train00.tfrec"), [path.read_bytes()])
        for place in build_catalogue([path.with_name("train00.tfrec")]).places:
            assert decode(read_picture(place), 32).shape == (32, 32, 3)

    return Case([folder / "message"], read, CatalogueError)


def catalogue(folder: Path) -> Case:
    from lib.data.catalogue import CatalogueError, load_catalogue, open_catalogue
    from lib.data.records import write_shard

    write_shard(folder / "train00.tfrec", triplets(20))
    open_catalogue(folder)
    read = lambda path: load_catalogue(path).rows.to_csv()  # noqa: E731
    return Case([folder / "landmarks.parquet"], read, CatalogueError)


def index(folder: Path, signed: bool = False) -> Case:
    """The files of an index; ``signed``: its manifest, with a right checksum."""
    from lib.search.index_files import MANIFEST, UnusableIndexError, checksum_of_manifest
    from lib.search.kinds import IndexSettings
    from lib.search.photo_index import PhotoIndex

    vectors = np.random.default_rng(2).standard_normal((200, 8), np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    names = [f"{i}.jpg" for i in range(len(vectors))]
    built = PhotoIndex.build(vectors[:150], names[:150], MODEL, IndexSettings("IVF4,Flat"))
    built.save(folder)
    built.add(names[150:], vectors[150:])
    built.remove(names[::7])

    def read(path: Path):
        if signed:
            with contextlib.suppress(ValueError, TypeError, RecursionError):
                manifest = json.loads(path.read_text())
                manifest["xxh3"] = checksum_of_manifest(manifest)
                path.write_text(json.dumps(manifest))
        found, similarities = PhotoIndex.load(path.parent, MODEL).search(vectors[:3], 5)
        return None if signed else (found, similarities.tolist())

    files = [folder / MANIFEST] if signed else [p for p in folder.iterdir() if p.suffix != ".lock"]
    files = sorted(path for path in files if path.name != ".lock")
    return Case(files, read, UnusableIndexError)


def tiny_tower():
    import keras

    keras.utils.set_random_seed(0)
    photos = keras.Input((16, 16, 3), dtype="uint8")
    maps = keras.layers.Conv2D(4, 3)(keras.layers.Rescaling(1 / 255)(photos))
    means = keras.layers.GlobalAveragePooling2D()(maps)
    return keras.Model(photos, keras.layers.UnitNormalization()(means))


def engine(folder: Path) -> Case:
    from lib.network.engine import EngineError, export_engine, load_engine

    export_engine(tiny_tower(), folder / "tower.engine")
    grey = np.full((1, 16, 16, 3), 100, np.uint8)

    def read(path: Path):
        found = load_engine(path, "float32", threads=1)
        return found.embed(grey).tolist(), found.fingerprint

    return Case([folder / "tower.engine"], read, EngineError)


def torch_tensors(folder: Path) -> Case:
    from lib.network.torch_file import read_tensors
    from tests.torch_format import torch_file

    storages = {"a": np.arange(60, dtype=np.float32), "b": np.array([3])}
    views = {f"t{i}": ("a", i, (3, 4), (i + 1, 10)) for i in range(5)} | {"n": ("b", 0, (), ())}
    (folder / "tensors.pth").write_bytes(torch_file(storages, views))
    read = lambda path: sum(x.sum() for x in read_tensors(path).values())  # noqa: E731
    return Case([folder / "tensors.pth"], read, ValueError, exact=False)


def checkpoint(folder: Path) -> Case:
    import keras

    from lib.training.checkpoint import Checkpoint, TrainingError

    tower, loss = tiny_tower(), keras.layers.Dense(3)
    loss.build((1, 4))
    optimizer = keras.optimizers.Adam()
    optimizer.build(tower.trainable_variables)
    parts = ("network", "start", "training pictures", "validation pictures")
    parts += ("teacher's descriptors",)
    identity = {"settings": {"seed": 3, "stages": [["all", 2]]}} | dict.fromkeys(parts, MODEL)
    history = [{"epoch": i, "stage": "all", "val_map": 0.5, "loss": 0.25} for i in range(3)]
    saved = Checkpoint(folder / "checkpoint.npz", identity, history)
    saved.take_best(tower, loss)
    saved.save(tower, loss, optimizer)

    def read(path: Path):
        found = Checkpoint.load(path, tower, identity)
        values = {name: [v.tobytes() for v in of] for name, of in found.values.items()}
        return found.history, values

    return Case([folder / "checkpoint.npz"], read, TrainingError)


def test_set_csv(folder: Path) -> Case:
    from lib.data.test_set import TestSetError, read_test_set

    files = make_pictures(folder)[:4]
    lines = [f"{path.name},{'distractor' if i else 'query'}" for i, path in enumerate(files)]
    (folder / "ground_truth.csv").write_text("\n".join(["image,role", *lines, ""]))
    read = lambda path: read_test_set(path.parent, 16).query  # noqa: E731
    return Case([folder / "ground_truth.csv"], read, TestSetError, exact=False)


def landmarks_csv(folder: Path) -> Case:
    from lib.evaluation.ground_truth import GroundTruthError, read_landmarks

    gallery = [f"{i:016x}" for i in range(30)]
    lines = [f"q{i},{' '.join(gallery[i : i + 4])},Private" for i in range(20)]
    text = "\n".join(["id,images,Usage", *lines, "q20,None,Ignored", ""])
    (folder / "solution.csv").write_text(text)

    def read(path: Path):
        return read_landmarks(path, gallery, "Private")

    return Case([folder / "solution.csv"], read, GroundTruthError, exact=False)


def labels_csv(folder: Path) -> Case:
    from tools.labelled import ConversionError, read_csv

    (folder / "a" / "b" / "c").mkdir(parents=True)
    names = [f"abc{i}" for i in range(20)]
    for name in names:
        (folder / "a" / "b" / "c" / f"{name}.jpg").touch()
    lines = [f"{name},https://example.org/{i}.jpg,{i // 4}" for i, name in enumerate(names)]
    (folder / "train.csv").write_text("\n".join(["id,url,landmark_id", *lines, ""]))
    read = lambda path: read_csv(path, path.parent)  # noqa: E731
    return Case([folder / "train.csv"], read, ConversionError, exact=False)


def mat(folder: Path) -> Case:
    from scipy.io import savemat

    from lib.evaluation.ground_truth import GroundTruthError, read_revisited

    numbers = {"bbx": [1.5, 2, 30, 40], "easy": [1, 2], "hard": [3], "junk": []}
    content = {"imlist": [f"i{i}" for i in range(9)], "qimlist": ["a", "b"], "gnd": [numbers] * 2}
    for compressed in (False, True):
        savemat(folder / f"{compressed}.mat", content, do_compression=compressed)
    files = sorted(folder.glob("*.mat"))
    return Case(files, read_revisited, GroundTruthError, exact=False)


def profile(folder: Path) -> Case:
    from lib.files import project_root
    from lib.programs import UsageError
    from tools.pipeline import notebook_parameters, read_profile

    source = project_root() / "profiles" / "gldv2.yaml"
    shutil.copy(source, folder)
    known = {}
    for notebook in (project_root() / "notebooks").glob("*.ipynb"):
        known |= notebook_parameters(notebook)
    read = lambda path: read_profile(path, known)  # noqa: E731
    return Case([folder / source.name], read, UsageError, exact=False)


def embedding_job(folder: Path) -> Case:
    """The state of an embedding job: it goes on to the same result, or says that it can't."""
    from lib.network.engine import Engine
    from lib.search.embedding import EmbeddingJobError, PhotoSource, embed_job

    def compute(photos: np.ndarray) -> np.ndarray:
        vectors = photos[:, 0, 0].astype(np.float32) + 1
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    def picture(number: int, size: int, squash: bool) -> np.ndarray:
        return np.full((size, size, 3), [number, 20, 255 - number], np.uint8)

    source = PhotoSource([f"{i}.jpg" for i in range(20)], picture, MODEL)
    tower = Engine(compute, 8, 3, MODEL, "fuzz")

    def read(path: Path):
        result = embed_job(tower, source, path.parent, 4, lambda *_: None)
        return result.embeddings.tolist(), result.names, result.skipped

    read(folder / "job.json")
    files = [folder / name for name in ("job.json", "progress.jsonl", "embeddings.npy")]
    return Case(files, read, EmbeddingJobError)


def conversion(folder: Path) -> Case:
    """The state of a conversion, finished or not: as for an embedding job."""
    from tools.convert import ConversionSettings, convert, verify
    from tools.labelled import ConversionError, read_folder

    for landmark in "abc":
        (folder.parent / "source" / landmark).mkdir(parents=True)
        make_pictures(folder.parent / "source" / landmark)
    (folder.parent / "source" / "a" / "bad.jpg").write_text("no picture")
    photos = read_folder(folder.parent / "source")
    settings = ConversionSettings(size=16, records_per_shard=16)
    convert(photos, folder, settings)

    def read(path: Path):
        if path.name == "skipped.csv":  # is read again only by a conversion that goes on
            for name in ("shards.json", "train02.tfrec"):
                path.with_name(name).unlink()
        convert(photos, path.parent, settings)
        report = verify(path.parent)
        # The words of skipped.csv have no checksum.
        return report.records if path.name == "skipped.csv" else report

    names = ("conversion.json", "skipped.csv", "shards.json", "train00.tfrec")
    return Case([folder / name for name in names], read, ConversionError)


def bad_reader(folder: Path) -> Case:
    """A reader with every fault but slowness, to try the trial itself."""
    for name in ("crash", "error", "memory", "result"):
        (folder / name).write_bytes(bytes(100))

    def read(path: Path):
        if path.read_bytes() == bytes(100):
            return None
        if path.name == "crash":
            os._exit(3)
        if path.name == "error":
            raise KeyError(3)
        return None if path.name == "memory" and np.ones(2**27 + 2**26).all() else path

    return Case(sorted(folder.iterdir()), read, ValueError)


manifest = functools.partial(index, signed=True)
READERS = (
    *("photo", "upload", "converted_photo", "shard", "record", "catalogue", "index", "manifest"),
    *("engine", "checkpoint", "test_set_csv", "landmarks_csv", "labels_csv", "mat", "profile"),
    *("embedding_job", "conversion", "torch_tensors"),
)
