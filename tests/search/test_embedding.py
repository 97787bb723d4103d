"""Embedding photos: all in a known order, and unreadable ones do not stop the others."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from itertools import count
from pathlib import Path

import keras
import numpy as np
import pytest
from PIL import Image

from lib.data.catalogue import open_catalogue
from lib.data.photos import NoPhotosError, PhotoError, read_photo
from lib.network.engine import Engine, keras_engine
from lib.network.tower import embed
from lib.search.embedding import (
    EMBEDDINGS,
    JOB,
    PROGRESS,
    TAKEN,
    EmbeddingJobError,
    PhotoSource,
    embed_folder,
    embed_job,
    photos_below,
    photos_in_shards,
)


@pytest.fixture(scope="module")
def tower() -> keras.Model:
    """Embeds a photo as the direction of its mean colour."""
    photos = keras.Input((8, 8, 3), dtype="uint8")
    means = keras.layers.GlobalAveragePooling2D()(keras.layers.Rescaling(1 / 255)(photos))
    return keras.Model(photos, keras.layers.UnitNormalization()(means))


def save(path, colour, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 30), colour).save(path, **options)


def test_all_photos_below_a_folder_are_embedded_by_name(tmp_path, tower):
    colours = {f"{i:02d}.png": (9 * i + 1, 5, 200 - i) for i in range(7)}
    colours |= {"rome/a.jpg": (255, 0, 0), "rome/old/b.JPG": (0, 255, 0)}
    for name, colour in colours.items():
        save(tmp_path / name, colour)
    save(tmp_path / ".hidden" / "c.jpg", (0, 0, 0))
    (tmp_path / "notes.txt").write_text("no photo")
    (tmp_path / "rome" / "broken.jpg").write_text("no photo either")
    (tmp_path / "loop").symlink_to(tmp_path)
    embeddings, names, skipped = embed_folder(tower, tmp_path, batch_size=3)
    assert names == sorted(colours)
    # Files that were left out were not reported.
    broken, *left_out = skipped
    assert "rome/broken.jpg is not a readable picture" in broken
    reasons = ["1 hidden files and folders", "1 links to folders"]
    assert left_out == [f"left out: {reason}" for reason in reasons]
    for name, embedding in zip(names, embeddings, strict=True):
        mean = read_photo(tmp_path / name, 8).reshape(-1, 3).mean(axis=0)
        np.testing.assert_allclose(embedding, mean / np.linalg.norm(mean), atol=1e-5)


def test_a_folder_without_a_readable_photo_is_named(tmp_path, tower):
    with pytest.raises(NoPhotosError, match=r"there is no folder .*absent"):
        embed_folder(tower, tmp_path / "absent")
    with pytest.raises(NoPhotosError, match="holds no photos"):
        embed_folder(tower, tmp_path)
    (tmp_path / "a.jpg").write_text("no photo")
    with pytest.raises(NoPhotosError, match=r"none of the photos.*a\.jpg is not a readable"):
        embed_folder(tower, tmp_path)


# --------------------------------------------------------------------------------------------------
# Kinds of pictures: red above, blue below, whatever the file makes of it
# --------------------------------------------------------------------------------------------------


def two_colours(size=(40, 40)) -> Image.Image:
    image = Image.new("RGB", size, (0, 0, 255))
    image.paste((255, 0, 0), (0, 0, size[0], size[1] // 2))
    return image


def transparent() -> Image.Image:
    """White can be seen, green can't; on white nothing could."""
    image = Image.new("RGBA", (40, 40), (0, 255, 0, 0))
    image.paste((255, 255, 255, 255), (0, 0, 40, 20))
    return image


def deep(dtype) -> Image.Image:
    """Grey in 16 bits: 200 of 255 above, 100 below."""
    return Image.fromarray(
        np.repeat([200 * 257, 100 * 257], 20)[:, None].repeat(40, 1).astype(dtype)
    )


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


RED, BLUE, WHITE, GREY, BLACK = (255, 0, 0), (0, 0, 255), (255,) * 3, (76,) * 3, (0,) * 3

KINDS = {
    "colour.jpg": (two_colours(), {}, RED, BLUE),
    "upside_down.jpg": (two_colours().rotate(180), {"exif": turned(3)}, RED, BLUE),
    "on_its_side.jpg": (two_colours().rotate(90), {"exif": turned(6)}, RED, BLUE),
    "on_its_side.png": (two_colours().rotate(90), {"exif": turned(6)}, RED, BLUE),
    "on_its_side.webp": (two_colours().rotate(90), {"exif": turned(6)}, RED, BLUE),
    "cmyk.jpg": (two_colours().convert("CMYK"), {}, RED, BLUE),
    "cmyk_large.jpg": (two_colours((900, 700)).convert("CMYK"), {}, RED, BLUE),
    "grey.jpg": (two_colours().convert("L"), {}, GREY, (29, 29, 29)),
    "grey.png": (two_colours().convert("L"), {}, GREY, (29, 29, 29)),
    "black_and_white.png": (
        two_colours().convert("L").point(lambda v: 255 * (v > 50), "1"),
        {},
        WHITE,
        (0, 0, 0),
    ),
    "palette.png": (two_colours().convert("P"), {}, RED, BLUE),
    "palette.gif": (two_colours().convert("P"), {}, RED, BLUE),
    "palette_alpha.png": (two_colours().quantize(2), {"transparency": 0}, None, None),
    "alpha.png": (transparent(), {}, WHITE, BLACK),
    "alpha.webp": (transparent(), {"lossless": True, "exact": True}, WHITE, BLACK),
    "grey_alpha.png": (transparent().convert("LA"), {}, WHITE, BLACK),
    "grey16.png": (deep(np.uint16), {}, (200,) * 3, (100,) * 3),
    "grey16.tif": (deep(np.uint16), {}, (200,) * 3, (100,) * 3),
    "grey32.tif": (deep(np.int32), {}, (200,) * 3, (100,) * 3),
    "colour.bmp": (two_colours(), {}, RED, BLUE),
} | {
    f"animated.{kind}": (
        two_colours(),
        {"save_all": True, "append_images": [Image.new("RGB", (40, 40), "green")]},
        RED,
        BLUE,
    )
    for kind in ("gif", "webp", "png")
}


@pytest.mark.parametrize("name", KINDS)
def test_any_kind_of_picture_is_seen_as_people_see_it(tmp_path, name):
    image, options, above, below = KINDS[name]
    image.save(tmp_path / name, **options)
    photo = read_photo(tmp_path / name, 16)
    assert photo.shape == (16, 16, 3) and photo.dtype == np.uint8
    if above is None:  # one of the two colours became transparent
        assert sorted(tuple(photo[row, 8]) for row in (3, 12))[1] == WHITE
    else:
        np.testing.assert_allclose(photo[3, 8], above, atol=6)
        np.testing.assert_allclose(photo[12, 8], below, atol=6)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")  # as lib.data.photos does
def test_a_bomb_is_named_and_a_large_photo_is_not_one(tmp_path, tower):
    Image.new("1", (10_000, 10_000)).save(tmp_path / "a.png")
    two_colours((12_000, 9_000)).save(tmp_path / "b.jpg", quality=30)
    Image.new("1", (20_000, 10_000)).save(tmp_path / "bomb.png")
    _, names, skipped = embed_folder(tower, tmp_path)
    assert names == ["a.png", "b.jpg"]
    assert len(skipped) == 1 and "bomb.png is not a readable picture" in skipped[0]


@pytest.mark.parametrize("name", ["colour.jpg", "palette.png", "alpha.webp", "palette.gif"])
def test_no_damage_stops_the_others(tmp_path, rng, name):
    """A damaged file is read or is a PhotoError, whatever its decoder raises."""
    image, options, _, _ = KINDS[name]
    image.save(tmp_path / name, **options)
    content = (tmp_path / name).read_bytes()
    failed = 0
    for _ in range(100):
        damaged = bytearray(content[: rng.integers(1, len(content) + 1)])
        for place in rng.integers(len(damaged), size=3):
            damaged[place] = rng.integers(256)
        (tmp_path / name).write_bytes(damaged)
        try:
            assert read_photo(tmp_path / name, 16).shape == (16, 16, 3)
        except PhotoError as error:
            failed += name in str(error)
    assert failed > 20


# --------------------------------------------------------------------------------------------------
# Jobs
# --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def engine(tower) -> Engine:
    return keras_engine(tower)


def numbered(n: int = 50, calls=None, digest: str = "some") -> PhotoSource:
    """Pictures whose colour is their number; each seventh can't be read."""

    def read(number: int, size: int, squash: bool = True) -> np.ndarray:
        if calls is not None:
            calls.append(number)
        if number % 7 == 3:
            raise PhotoError(f"number {number} can't be read")
        return np.full((size, size, 3), (number % 256, 99, 255 - number % 256), np.uint8)

    return PhotoSource([f"picture {i}" for i in range(n)], read, digest)


def expected_of(engine: Engine, n: int = 50) -> np.ndarray:
    good = [i for i in range(n) if i % 7 != 3]
    return engine.embed(np.stack([numbered().read(i, engine.image_size) for i in good]))


def test_a_job_embeds_all_that_can_be_read_in_order(tmp_path, engine, tower):
    found = embed_job(engine, numbered(), tmp_path / "out", batch_size=8)
    assert found.names == [f"picture {i}" for i in range(50) if i % 7 != 3]
    assert found.skipped == [f"number {i} can't be read" for i in range(3, 50, 7)]
    assert isinstance(found.embeddings, np.memmap) and found.embeddings.dtype == np.float32
    np.testing.assert_allclose(found.embeddings, expected_of(engine), atol=1e-6)
    photos = np.stack([numbered().read(i, 8) for i in range(3)])
    np.testing.assert_allclose(found.embeddings[:3], embed(tower, photos), atol=1e-6)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        ".lock", EMBEDDINGS, JOB, PROGRESS,
    ]  # fmt: skip


def test_a_job_of_files_gives_what_the_folder_gives(tmp_path, engine, tower):
    for i in range(9):
        save(tmp_path / "photos" / f"{i % 3}" / f"{i}.png", (30 * i, 80, 9))
    (tmp_path / "photos" / "0" / "broken.jpg").write_text("no photo")
    (tmp_path / "photos" / "0" / "phone.jxl").touch()  # the job did not say that it is left out
    expected = embed_folder(tower, tmp_path / "photos")
    below = embed_job(engine, photos_below(tmp_path / "photos"), tmp_path / "a", 4)
    np.testing.assert_allclose(below.embeddings, expected.embeddings, atol=1e-6)
    assert below[1:] == expected[1:]
    source = photos_below(tmp_path / "photos")
    (tmp_path / "photos" / below.names[0]).unlink()
    without = embed_job(engine, source, tmp_path / "b", 4)
    np.testing.assert_allclose(without.embeddings, expected.embeddings[1:], atol=1e-6)
    assert without.names == below.names[1:]
    assert len(without.skipped) == 3 and below.names[0] in without.skipped[0]
    assert without.skipped[-1] == below.skipped[-1] == "left out: 1 .jxl files"


def test_pictures_of_shards_are_embedded_by_their_hash(small_world, tmp_path, engine):
    catalogue = open_catalogue(small_world / "Dataset" / "demo_world")
    some = np.array([5, 0, 70, 9])
    found = embed_job(engine, photos_in_shards(catalogue, some), tmp_path / "some")
    assert found.names == [catalogue.pictures["image"][i].hex() for i in some]
    whole = embed_job(engine, photos_in_shards(catalogue), tmp_path / "all")
    assert len(whole.names) == len(catalogue.pictures)
    np.testing.assert_allclose(whole.embeddings[some], found.embeddings, atol=1e-6)


def test_a_finished_job_is_found_again(tmp_path, engine):
    calls = []
    first = embed_job(engine, numbered(calls=calls), tmp_path, 8)
    content = (tmp_path / EMBEDDINGS).read_bytes()
    again = embed_job(engine, numbered(calls=calls), tmp_path, 8)
    assert sorted(calls) == list(range(50))
    assert again[1:] == first[1:] and (tmp_path / EMBEDDINGS).read_bytes() == content


@pytest.mark.parametrize("n", [0, 1])
def test_a_job_without_a_readable_picture_has_no_rows(tmp_path, engine, n):
    def read(number, size, squash=True):
        raise PhotoError("can't be read")

    found = embed_job(engine, PhotoSource(["a"] * n, read, "none"), tmp_path)
    assert found.embeddings.shape == (0, 3) and found.names == [] and len(found.skipped) == n


def cut(path, size):
    path.write_bytes(path.read_bytes()[:size])


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: cut(folder / EMBEDDINGS, -1),
        lambda folder: cut(folder / EMBEDDINGS, 0),
        lambda folder: cut(folder / EMBEDDINGS, 50),
        lambda folder: flip(folder / EMBEDDINGS, 300),
        lambda folder: flip(folder / EMBEDDINGS, 80),
        lambda folder: cut(folder / PROGRESS, -1),
        lambda folder: cut(folder / PROGRESS, 500),
        lambda folder: flip(folder / PROGRESS, 15),
        lambda folder: (folder / PROGRESS).write_text("[1]\n{}\n"),
        lambda folder: (folder / PROGRESS).write_text("[" * 100_000),  # was a RecursionError
        lambda folder: (folder / PROGRESS).unlink(),
        lambda folder: (folder / EMBEDDINGS).unlink(),
    ],
)
def test_damage_is_found_and_repaired(tmp_path, engine, damage):
    first = embed_job(engine, numbered(), tmp_path, 8)
    content = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    damage(tmp_path)
    again = embed_job(engine, numbered(), tmp_path, 8)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == content
    assert again[1:] == first[1:]


def test_a_folder_is_of_one_job(tmp_path, engine):
    embed_job(engine, numbered(), tmp_path, 8)
    with pytest.raises(EmbeddingJobError, match=r"another job \(it differs in pictures\)"):
        embed_job(engine, numbered(51), tmp_path, 8)
    with pytest.raises(EmbeddingJobError, match=r"differs in digest\): choose another folder"):
        embed_job(engine, numbered(digest="other"), tmp_path, 8)
    (tmp_path / JOB).write_text("{")
    with pytest.raises(EmbeddingJobError, match="not valid JSON"):
        embed_job(engine, numbered(), tmp_path, 8)
    (tmp_path / JOB).unlink()
    with pytest.raises(EmbeddingJobError, match=r"embeddings without a job\.json"):
        embed_job(engine, numbered(), tmp_path, 8)


def test_a_job_of_another_network_or_precision_is_told_apart(tmp_path, engine, monkeypatch):
    monkeypatch.chdir(tmp_path)  # outside the project its messages had been "no environment.yml"
    embed_job(engine, numbered(), tmp_path / "out", 8)
    half = replace(engine, name="keras bfloat16")
    with pytest.raises(EmbeddingJobError, match=r"out holds another job \(it differs in engine\)"):
        embed_job(half, numbered(), tmp_path / "out", 8)
    other = replace(engine, fingerprint="0" * 64)
    with pytest.raises(EmbeddingJobError, match=r"in tower\): made by another network"):
        embed_job(other, numbered(), tmp_path / "out", 8)


def test_links_between_folders_end_and_stay_inside(tmp_path, tower):
    save(tmp_path / "outside" / "secret.jpg", (0, 0, 255))
    save(tmp_path / "photos" / "a.png", (255, 0, 0))
    # One link to the folder itself had made 41 photos of one, and two had not ended.
    for name, target in {"loop": ".", "loop2": ".", "out": tmp_path / "outside"}.items():
        (tmp_path / "photos" / name).symlink_to(target, target_is_directory=True)
    assert photos_below(tmp_path / "photos").names == ["a.png"]


def test_a_job_is_of_one_folder_of_photos(tmp_path, engine):
    for name in ("photos", "others"):
        save(tmp_path / name / "a.png", (1, 2, 3))
        os.utime(tmp_path / name / "a.png", (1, 1))
    embed_job(engine, photos_below(tmp_path / "photos"), tmp_path / "out")
    with pytest.raises(EmbeddingJobError, match="differs in folder"):
        embed_job(engine, photos_below(tmp_path / "others"), tmp_path / "out")


@pytest.mark.parametrize("step", ["replacing", ".npy", ".jsonl", "write_json", "embed", ".bin"])
def test_an_interrupted_takeover_loses_no_row(tmp_path, engine, monkeypatch, step):
    """The job stops at a step of the takeover, then one more photo changes."""
    photos, out, embedded, unlink = tmp_path / "photos", tmp_path / "out", [], Path.unlink
    for i in range(20):
        save(photos / f"{i:02d}.png", (10 * i, 99, 7))
    first = embed_job(engine, photos_below(photos), out, 4)
    rows = np.array(first.embeddings)

    def stop(*_, **__):
        raise KeyboardInterrupt

    def compute(pictures):
        embedded.extend(pictures[:, 0, 0, 0].tolist())
        return engine.compute(pictures)

    save(photos / "07.png", (70, 99, 7), compress_level=0)  # other bytes, the same pixels
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        if step in ("replacing", "write_json"):
            patch.setattr(f"lib.search.embedding.{step}", stop)
        elif step != "embed":  # a file is not removed
            name = {".npy": EMBEDDINGS, ".jsonl": PROGRESS, ".bin": TAKEN}[step]
            patch.setattr(
                Path, "unlink", lambda path, **o: (stop if path.name == name else unlink)(path, **o)
            )
        stopped = replace(engine, compute=stop if step == "embed" else compute)
        embed_job(stopped, photos_below(photos), out, 4)
    save(photos / "15.png", (150, 99, 7), compress_level=0)  # other bytes, the same pixels
    found = embed_job(replace(engine, compute=compute), photos_below(photos), out, 4)
    assert sorted(embedded) == [70, 150]
    np.testing.assert_allclose(found.embeddings, rows, atol=1e-6)
    assert found.names == first.names
    assert sorted(path.name for path in out.iterdir()) == [".lock", EMBEDDINGS, JOB, PROGRESS]


def test_rows_that_were_set_aside_are_checked(tmp_path, engine):
    save(tmp_path / "photos" / "a.png", (1, 2, 3))
    out, source = tmp_path / "out", photos_below(tmp_path / "photos")
    expected = np.array(embed_job(engine, source, out).embeddings)
    for content in (b"", b"[1]\n", b"{}", bytes(1000), b'{"names": ["a.png"], "skipped": []}\n'):
        (out / TAKEN).write_bytes(content)
        (out / PROGRESS).unlink()
        found = embed_job(engine, source, out)
        np.testing.assert_array_equal(found.embeddings, expected)


def test_an_error_of_the_engine_loses_nothing(tmp_path, engine):
    calls, batches = [], count()

    def compute(photos):
        if next(batches) == 3:
            raise MemoryError
        return engine.compute(photos)

    failing = Engine(compute, 8, 3, engine.fingerprint, engine.name)
    with pytest.raises(MemoryError):
        embed_job(failing, numbered(), tmp_path, 8)
    found = embed_job(engine, numbered(calls=calls), tmp_path, 8)
    assert min(calls) == 24
    np.testing.assert_allclose(found.embeddings, expected_of(engine), atol=1e-6)


# No Keras, and so no threads of its own that a fork would lose.
KILLED = """
import json, os, random, signal, sys, time
import filelock  # embed_job imports it when needed: no kill may come before it starts
from pathlib import Path
import numpy as np
from lib.search.embedding import PhotoSource, embed_job
from lib.network.engine import Engine
from lib.data.photos import PhotoError

folder, n = Path(sys.argv[1]), 3000

def read(number, size, squash=True):
    if number % 7 == 3:
        raise PhotoError(f"number {number}")
    return np.full((size, size, 3), (number % 256, number // 256, 9), np.uint8)

def compute(photos):
    time.sleep(0.001)
    with open(folder / "embedded", "a") as file:
        file.write("." * len(photos))
    means = photos.mean(axis=(1, 2)).astype(np.float32)
    return means / np.linalg.norm(means, axis=1, keepdims=True)

source = PhotoSource([f"picture {i}" for i in range(n)], read, "some")
engine = Engine(compute, 8, 3, "0" * 64, "numpy float32")

def work(out, seconds):
    "In a process of its own that is killed after a while; returns whether it was."
    process = os.fork()
    if process == 0:
        sys.stdout = sys.stderr = open(os.devnull, "w")
        try:
            embed_job(engine, source, out, 8)
        except BaseException:
            os._exit(1)
        os._exit(0)
    if seconds:
        time.sleep(seconds)
        os.kill(process, signal.SIGKILL)
    status = os.waitpid(process, 0)[1]
    assert status in (0, signal.SIGKILL), status
    return status == signal.SIGKILL

def content(out):
    return {path.name: path.read_bytes() for path in out.iterdir()}

start = time.perf_counter()
assert not work(folder / "at once", 0)
whole = time.perf_counter() - start
rng = random.Random(0)
kills, lines = 0, [0]
for _ in range(20):
    kills += work(folder / "killed", rng.uniform(0.0001, whole / 8))
    progress = folder / "killed" / "progress.jsonl"
    lines.append(progress.read_bytes().count(b"\\n") if progress.exists() else 0)
assert lines == sorted(lines)  # nothing lost
assert not work(folder / "killed", 0)
assert content(folder / "killed") == content(folder / "at once")
print(json.dumps({"kills": kills, "stages": len(set(lines))}))

# The same, while one more photo of a folder changes before each kill.
states = dict.fromkeys(source.names, "0")

def changed(number):
    global source
    states[f"picture {number}"] = "1"
    source = PhotoSource(
        source.names, read, f"state {number}", {}, dict(states), folder=folder
    )

changed(0)
assert not work(folder / "killed again", 0)
changed(1)
start = time.perf_counter()
assert not work(folder / "killed again", 0)
whole = time.perf_counter() - start
(folder / "embedded").write_text("")
for number in range(20):
    changed(140 * number + 2)
    work(folder / "killed again", rng.uniform(0.0001, whole))
assert not work(folder / "killed again", 0)
for name in ("embeddings.npy", "job.json", "progress.jsonl"):
    assert (folder / "killed again" / name).exists()
assert not (folder / "killed again" / "taken.bin").exists()
rows = [np.load(folder / name / "embeddings.npy") for name in ("killed again", "at once")]
assert (rows[0] == rows[1]).all()
# Each of them once, and once more if it was killed before the row was written.
assert 20 <= len((folder / "embedded").read_text()) <= 40, (folder / "embedded").read_text()
"""


@pytest.mark.long
def test_twenty_kills_lose_and_double_nothing(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    # The kills come during the job, unless the machine is much faster than when this was timed.
    assert result["kills"] >= 10 and result["stages"] > 3
    found = np.load(tmp_path / "killed" / EMBEDDINGS)
    assert found.shape == (sum(i % 7 != 3 for i in range(3000)), 3)


def test_links_neither_loop_nor_lead_outside_of_the_folder(tmp_path):
    # A link to the folder itself gave each photo 41 times; another let photos from outside in.
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    for folder in (inside, outside):
        folder.mkdir()
        Image.new("RGB", (8, 8)).save(folder / "a.jpg")
    (inside / "loop").symlink_to(inside)
    (inside / "out").symlink_to(outside)
    assert photos_below(inside).names == ["a.jpg"]
