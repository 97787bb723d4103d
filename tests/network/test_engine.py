"""Exported towers: the tower's own embeddings, from one file, without TensorFlow and Keras."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from threading import Thread

import numpy as np
import pytest

from lib.data.decoding import resize
from lib.network import engine as engines
from lib.network.engine import EngineError, export_engine, keras_engine, load_engine
from lib.network.openvino import fast_precision, import_openvino
from lib.network.tower import (
    TowerSettings,
    build_tower,
    embed,
    fingerprint,
    load_tower,
    resized,
    save_tower,
)
from tests.conftest import one_block

SETTINGS = {"image_size": 32, "last_stage": 3, "embedding_size": 16}


def make_tower(**settings):
    return build_tower(TowerSettings(**SETTINGS, weights="", **settings))


@pytest.fixture(scope="module")
def tower():
    with one_block():
        return make_tower()


@pytest.fixture(scope="module")
def exported(tower, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("engine") / "tower.engine"
    save_tower(tower, path.with_suffix(".keras"))
    export_engine(load_tower(path.with_suffix(".keras")), path)
    return path


@pytest.fixture(scope="module")
def photos(small_world) -> np.ndarray:
    """More than one batch of the demo world's photos."""
    from lib.data.photos import list_photos, read_photos

    paths = list_photos(small_world / "Test_set" / "demo_world")
    return np.tile(read_photos(paths, 32)[0], (3, 1, 1, 1))


def least_cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.einsum("nd,nd->n", a, b).min())


@pytest.mark.parametrize(("precision", "least"), [("float32", 0.9999), ("bfloat16", 0.999)])
def test_an_exported_tower_embeds_as_the_tower_does(tower, exported, photos, precision, least):
    engine = load_engine(exported, precision)
    embeddings = engine.embed(photos)
    assert len(photos) > 64 and embeddings.shape == (len(photos), 16)
    assert embeddings.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-3)
    assert least_cosine(embeddings, embed(tower, photos)) >= least
    assert (engine.image_size, engine.dimension) == (32, 16)
    assert engine.fingerprint == fingerprint(tower)
    assert engine.name == "openvino float32" or precision == "bfloat16"


def test_auto_is_what_the_processor_is_fast_in(exported):
    assert load_engine(exported).name == f"openvino {fast_precision()}"


def test_an_engine_computes_on_as_many_threads_as_it_is_given(exported, photos, monkeypatch):
    core, compiled = type(import_openvino().Core()), []
    compile_model = core.compile_model

    def remembered(*args):
        compiled.append(compile_model(*args))
        return compiled[-1]

    monkeypatch.setattr(core, "compile_model", remembered)
    expected = load_engine(exported, "float32").embed(photos)
    np.testing.assert_allclose(
        load_engine(exported, "float32", threads=1).embed(photos), expected, atol=1e-5
    )
    assert compiled[1].get_property("INFERENCE_NUM_THREADS") == 1
    assert not compiled[1].get_property("ENABLE_CPU_PINNING")


def test_a_tower_in_memory_has_the_same_interface(tower, photos):
    engine = keras_engine(tower)
    assert least_cosine(engine.embed(photos), embed(tower, photos)) > 0.999999
    assert engine.embed(photos[:0]).shape == (0, 16)
    assert (engine.image_size, engine.dimension) == (32, 16)
    assert (engine.fingerprint, engine.name) == (fingerprint(tower), "keras float32")


@pytest.mark.long
def test_a_tower_in_mixed_precision_is_exported_in_float32(photos, tmp_path):
    mixed = make_tower(precision="mixed_bfloat16")
    assert keras_engine(mixed).name == "keras bfloat16"
    export_engine(mixed, tmp_path / "a")
    engine = load_engine(tmp_path / "a", "float32")
    assert least_cosine(engine.embed(photos), embed(mixed, photos)) > 0.999
    assert engine.fingerprint == fingerprint(mixed)


@pytest.mark.long
@pytest.mark.parametrize("settings", [{"pooling": "rmac"}, {"pooling": "gem-per-channel"}])
def test_other_heads_are_exported_too(settings, photos, tmp_path):
    tower = make_tower(**settings)
    export_engine(tower, tmp_path / "a")
    embeddings = load_engine(tmp_path / "a", "float32").embed(photos[:5])
    assert least_cosine(embeddings, embed(tower, photos[:5])) > 0.9999


QUERY = """
import sys
from pathlib import Path
import numpy as np
from lib.search.embedding import embed_job, photos_below
from lib.network.engine import load_engine
from lib.data.photos import read_photo

engine = load_engine(Path(sys.argv[1]), "float32")
np.save(sys.argv[3], engine.embed(read_photo(Path(sys.argv[2]), engine.image_size)[None]))
print(sorted({"tensorflow", "keras", "pandas", "openvino_telemetry"} & {
    name for name, module in sys.modules.items() if module
}))
"""


def test_a_process_that_embeds_imports_neither_tensorflow_nor_keras(
    tower, exported, photos, small_world, tmp_path
):
    photo = min((small_world / "Test_set" / "demo_world").glob("*.jpg"))
    arguments = map(str, (exported, photo, tmp_path / "a.npy"))
    done = subprocess.run(
        [sys.executable, "-c", QUERY, *arguments], capture_output=True, text=True, cwd=Path.cwd()
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
    assert least_cosine(np.load(tmp_path / "a.npy"), embed(tower, photos[:1])) > 0.9999


def test_threads_may_share_an_engine(exported, photos):
    engine = load_engine(exported, "float32")
    parts = np.array_split(photos, 4)
    expected, found = [engine.embed(part) for part in parts], [None] * 4

    def work(i: int) -> None:
        for _ in range(3):
            found[i] = engine.embed(parts[i])

    threads = [Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def rewrite(path: Path, name: str, content: bytes, method: int = zipfile.ZIP_STORED) -> None:
    """Replace one of an archive's files; its own checksum is right then."""
    with zipfile.ZipFile(path) as archive:
        files = {n: archive.read(n) for n in archive.namelist()}
    with zipfile.ZipFile(path, "w", method) as archive:
        for n, old in files.items():
            archive.writestr(n, content if n == name else old)


def garble(path: Path, method: int) -> None:
    """Compress the archive, and damage the compressed bytes of its manifest."""
    rewrite(path, "", b"", method)
    with zipfile.ZipFile(path) as archive:
        start = archive.getinfo("manifest.json").header_offset + 43
    content = path.read_bytes()
    path.write_bytes(content[: start + 20] + b"\xff" * 40 + content[start + 60 :])


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:-1000]),
        lambda path: path.write_bytes(path.read_bytes()[:-1000] + bytes(1000)),
        lambda path: path.write_bytes(path.read_bytes().replace(b"Convolution", b"Convulsion!", 1)),
        lambda path: rewrite(path, "network.bin", bytes(100)),
        lambda path: rewrite(path, "network.xml", b"<net/>"),
        lambda path: rewrite(path, "manifest.json", b"[]"),
        lambda path: rewrite(path, "manifest.json", b'{"format": 99}'),
        lambda path: rewrite(path, "manifest.json", b'{"format": '),
        lambda path: rewrite(path, "manifest.json", b"[" * 100_000),
        lambda path: rewrite(path, "network.bin", bytes(10**6), zipfile.ZIP_DEFLATED),
        # These were errors of zlib and lzma, which nobody expects of load_engine.
        lambda path: garble(path, zipfile.ZIP_DEFLATED),
        lambda path: garble(path, zipfile.ZIP_LZMA),
    ],
)
def test_a_damaged_file_is_refused(exported, tmp_path, damage):
    path = tmp_path / "tower.engine"
    path.write_bytes(exported.read_bytes())
    damage(path)
    with pytest.raises(EngineError, match=r"tower\.engine is no exported tower, or a damaged one"):
        load_engine(path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("image_size", value) for value in (10**9, 0, "32")),
        *(("views", value) for value in ([5000], [0], [32] * 17, ["a"], 3)),
        ("dimension", 17),
    ],
)
def test_numbers_of_a_manifest_are_not_believed(exported, tmp_path, name, value):
    """They became the shapes of arrays."""
    path = tmp_path / "tower.engine"
    path.write_bytes(exported.read_bytes())
    with zipfile.ZipFile(path) as archive:
        manifest = json.loads(archive.read("manifest.json"))
    rewrite(path, "manifest.json", json.dumps(manifest | {name: value}).encode())
    with pytest.raises(EngineError, match=r"tower\.engine is no exported tower, or a damaged one"):
        load_engine(path)


def test_any_flipped_byte_of_the_weights_is_found(exported, tmp_path, rng):
    content = exported.read_bytes()
    for place in rng.integers(len(content) // 10, len(content) * 9 // 10, 5).tolist():
        flipped = bytes([content[place] ^ 1])
        (tmp_path / "a").write_bytes(content[:place] + flipped + content[place + 1 :])
        with pytest.raises(EngineError, match="export it anew"):
            load_engine(tmp_path / "a")


def test_what_makes_no_sense_is_refused(exported, photos, tmp_path):
    with pytest.raises(ValueError, match="unknown precision 'int4'; choose one of auto"):
        load_engine(exported, "int4")
    with pytest.raises(FileNotFoundError, match="no exported tower"):
        load_engine(tmp_path / "absent")
    engine = load_engine(exported)
    with pytest.raises(ValueError, match=r"must be uint8 \(32, 32, 3\), not float64"):
        engine.embed(photos / 255)
    with pytest.raises(ValueError, match=r"not uint8 \(32, 3\)"):
        engine.embed(photos[0])


def test_a_network_that_computes_something_else_is_not_written(tower, tmp_path, monkeypatch):
    (tmp_path / "a").write_text("an older one")
    right = engines.export_network
    with one_block():
        wrong = make_tower(pooling="max")
    monkeypatch.setattr(engines, "export_network", lambda model, folder: right(wrong, folder))
    with pytest.raises(EngineError, match=r"differ from its own \(cosine .*OpenVINO can't run"):
        export_engine(tower, tmp_path / "a")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["an older one"]


def test_a_network_that_was_trained_on_is_exported_again(tmp_path, monkeypatch):
    """A page or notebook after another training went on with the network before it."""
    exported = []
    monkeypatch.setattr("lib.network.tower.load_tower", lambda path: path)
    monkeypatch.setattr(engines, "load_engine", lambda path: path)

    def export(tower, path, origin):
        exported.append(tower)
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("manifest.json", json.dumps({"origin": origin}))

    monkeypatch.setattr(engines, "export_engine", export)
    model, engine = tmp_path / "model.keras", tmp_path / engines.ENGINE
    model.write_text("one")
    for _ in range(2):
        engines.open_engine(tmp_path)
    assert exported == [model]
    model.write_text("two")
    os.utime(model, (0, 0))  # as a backup has it: older than what was exported
    engines.open_engine(tmp_path)
    assert exported == [model, model]
    model.unlink()
    assert engines.open_engine(tmp_path) == engine and len(exported) == 2


def test_photos_in_their_own_shape(tmp_path, rng):
    """Each view is embedded by the tower at that size; the mean of all is the descriptor."""
    settings = TowerSettings(image_size=32, last_stage=3, embedding_size=0, weights="")
    with one_block():
        tower = build_tower(settings)
    export_engine(tower, tmp_path / "a", views=(32, 64))
    engine = load_engine(tmp_path / "a", "float32")
    photos = [rng.integers(0, 256, (*shape, 3), np.uint8) for shape in ((64, 48), (20, 90), (7, 7))]
    found = engine.embed(photos)
    for photo, descriptor in zip(photos, found, strict=True):
        expected = np.zeros(engine.dimension)
        for longest in (32, 64):
            sides = [round(longest * side / max(photo.shape) / 32) for side in photo.shape[:2]]
            view = resize(photo, tuple(32 * max(side, 1) for side in sides))
            at_size = resized(tower, None)
            expected += embed(at_size, np.stack([view, view[:, ::-1]])).sum(axis=0)
        np.testing.assert_allclose(descriptor, expected / np.linalg.norm(expected), atol=1e-4)
    np.testing.assert_allclose(keras_engine(tower, (32, 64)).embed(photos), found, atol=1e-4)
    assert engine.image_size == 64 and not engine.squashes
    prints = {keras_engine(tower, views).fingerprint for views in ((), (32,), (32, 64))}
    assert len(prints) == 3 and engine.fingerprint in prints
    with pytest.raises(ValueError, match=r"must be uint8 \(h, w, 3\), not uint8 \(7, 7\)"):
        engine.embed([photos[2][..., 0]])
    assert engine.embed([]).shape == (0, engine.dimension)
