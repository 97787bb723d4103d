"""A checkpoint goes on with its own training alone, and damage ends in one kind of error."""

import io
import json
import os
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import keras
import numpy as np
import pytest

from lib.data.dataset import DatasetHandler
from lib.files import replacing
from lib.network.tower import TowerSettings, build_head
from lib.training.checkpoint import CHECKPOINT, Checkpoint, TrainingError, describe_training
from lib.training.stages import MODEL, Stage, train
from tests.training.test_stages import SETTINGS, tiny_tower, watching

SHORT = replace(SETTINGS, stages=(Stage("all", 2, 2, 1e-3),))


def pooled_by(pooling: str) -> keras.Model:
    """Towers of different poolings have the same weights, of the same shapes."""
    trunk = tiny_tower().get_layer("trunk")
    keras.utils.set_random_seed(0)
    head = build_head(trunk.output_shape[1:], TowerSettings(embedding_size=8, pooling=pooling))
    photos = trunk.input
    return keras.Model(photos, head(trunk(photos)), name="tower")


def files_of(run: Path) -> dict[str, bytes]:
    return {p.relative_to(run).as_posix(): p.read_bytes() for p in run.rglob("*") if p.is_file()}


@pytest.fixture
def trained(handler, validation, tmp_path):
    tower = pooled_by("average")
    history = train(tower, handler, validation, SHORT, tmp_path)
    return tower, history, files_of(tmp_path)


# --------------------------------------------------------------------------------------------------
# The identity
# --------------------------------------------------------------------------------------------------


def test_neither_resumed_nor_handed_back_as_the_training_of_something_else(
    handler,
    validation,
    trained,
    tmp_path,
):
    """Before, a run of one set was the result of every other set, and of towers of like shapes."""

    def refusal(tower=None, handler=handler, validation=validation) -> str:
        tower = tower or pooled_by("average")
        weights = tower.get_weights()
        with pytest.raises(TrainingError, match="choose another run_dir, or delete the") as caught:
            train(tower, handler, validation, SHORT, tmp_path)
        for before, after in zip(weights, tower.get_weights(), strict=True):
            np.testing.assert_array_equal(before, after)
        return str(caught.value).partition(" is of ")[2].partition(":")[0]

    assert refusal(pooled_by("max")) == "another network"
    other = pooled_by("average")
    other.get_layer("head").get_layer("projection").kernel.assign_add(np.full((8, 8), 1e-6))
    assert refusal(other) == "other start weights"
    assert refusal(validation=255 - validation) == "other validation pictures"

    catalogue, fewer = handler.catalogue, handler.chosen.copy()
    fewer[np.flatnonzero(fewer)[0]] = False
    others = [DatasetHandler(catalogue, handler.settings, fewer)]
    rows = catalogue.rows.copy()
    image = catalogue.pictures["image"].iloc[np.flatnonzero(handler.chosen)[0]]
    rows.loc[rows["image"] == image, "image"] = bytes(16)
    others.append(DatasetHandler(replace(catalogue, rows=rows), handler.settings, handler.chosen))
    rows = catalogue.rows.assign(group=catalogue.rows["group"].to_numpy()[::-1])
    others.append(DatasetHandler(replace(catalogue, rows=rows), handler.settings, handler.chosen))
    assert [refusal(handler=other) for other in others] == ["other training pictures"] * 3
    both = refusal(pooled_by("max"), others[0])
    assert both == "another network and other training pictures"
    assert files_of(tmp_path) == trained[2]


def test_a_checkpoint_without_settings_that_came_later_is_read_as_theirs_were_off(
    handler, validation, trained, tmp_path
):
    with np.load(tmp_path / CHECKPOINT) as arrays:
        values = dict(arrays)
    facts = json.loads(str(values["facts"]))
    for name in ("pool", "memory"):
        assert facts["identity"]["settings"].pop(name) == 0
    np.savez(tmp_path / CHECKPOINT, **values | {"facts": np.array(json.dumps(facts))})
    assert train(pooled_by("average"), handler, validation, SHORT, tmp_path).equals(trained[1])
    with pytest.raises(TrainingError, match=r"other settings \(pool\)"):
        train(pooled_by("average"), handler, validation, replace(SHORT, pool=9), tmp_path)


def test_the_same_training_is_handed_back_also_to_the_tower_it_left(
    handler,
    validation,
    trained,
    tmp_path,
):
    tower, history, _ = trained
    for again in (pooled_by("average"), tower):
        assert train(again, handler, validation, SHORT, tmp_path).equals(history)
        for found, expected in zip(again.get_weights(), tower.get_weights(), strict=True):
            np.testing.assert_array_equal(found, expected)


def test_after_an_error_the_tower_has_the_weights_it_came_with(
    handler,
    validation,
    tmp_path,
):
    class Interrupt(BaseException):
        pass

    def interrupt(epoch):
        if epoch == 1:
            raise Interrupt

    tower = pooled_by("average")
    before = tower.get_weights()
    with pytest.raises(Interrupt):
        train(tower, watching(handler, interrupt), validation, SHORT, tmp_path)
    for found, expected in zip(tower.get_weights(), before, strict=True):
        np.testing.assert_array_equal(found, expected)
    assert len(train(tower, handler, validation, SHORT, tmp_path)) == 2  # so the same call resumes


# --------------------------------------------------------------------------------------------------
# Damage
# --------------------------------------------------------------------------------------------------


def npz(**members: bytes | np.ndarray) -> bytes:
    """An archive as NumPy writes it, of arrays or of bytes in place of one."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            if not isinstance(content, bytes):
                array, content = content, io.BytesIO()
                np.save(content, array)
                content = content.getvalue()
            archive.writestr(f"{name}.npy", content)
    return file.getvalue()


def test_a_checkpoint_of_the_first_format_is_refused_in_words(
    handler,
    validation,
    tmp_path,
):
    facts = json.dumps({"settings": {"training": {}, "data": {}}, "history": []})
    (tmp_path / CHECKPOINT).write_bytes(npz(facts=np.array(facts), tower_0=np.zeros(3)))
    with pytest.raises(TrainingError, match=r"another version of this project.*: choose another"):
        train(tiny_tower(), handler, validation, SHORT, tmp_path)


def header(text: str) -> bytes:
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


def test_whatever_is_wrong_in_the_file_is_the_one_error(
    handler,
    validation,
    trained,
    tmp_path,
):
    """Before, 6 % of damaged files raised TokenError, struct.error, zlib.error and others."""
    path, tower = tmp_path / CHECKPOINT, pooled_by("average")
    identity = describe_training(tower, handler, validation, SHORT)
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    directory = whole.rindex(b"PK\x05\x06")
    begin = int.from_bytes(whole[directory + 16 : directory + 20], "little")
    damaged = [whole[:n] for n in rng.integers(len(whole), size=50)]
    for first in (0, begin):  # anywhere; and in the directory, which no checksum covers
        for place in rng.integers(first, len(whole), size=400):
            damaged.append(whole[:place] + rng.bytes(1) + whole[place + 1 :])
    facts = np.array('{"format": 2, "identity": {}, "history": []}')
    huge = "{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000,)}\n"
    damaged += [
        npz(facts=facts, tower_0=header(huge)),
        npz(facts=facts, tower_0=header("{'descr': '<f4', (((\n")),
        npz(facts=facts, tower_0=b"\x93NUMPY\x01"),
        npz(facts=facts, tower_0=np.array(["text"])),
        npz(facts=facts, other_0=np.zeros(3)),
        npz(facts=facts),
        npz(facts=np.array('{"format": 2, "history": [[1]]}')),
        npz(facts=np.array("[" * 100_000)),
        npz(tower_0=np.zeros(3)),
    ]
    compressed = io.BytesIO()
    with zipfile.ZipFile(compressed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("tower_0.npy", bytes(10**8))
    damaged.append(compressed.getvalue())
    np.savez_compressed(again := io.BytesIO(), **np.load(io.BytesIO(whole)))
    path.write_bytes(again.getvalue())
    with pytest.raises(TrainingError, match="is compressed or larger than the file"):
        Checkpoint.load(path, tower, identity)  # a small file could fill the memory
    # A name of the archive's directory, which no checksum covers: an array was silently missing.
    path.write_bytes(whole[:begin] + whole[begin:].replace(b"tower_1.npy", b"nower_1.npy"))
    with pytest.raises(TrainingError, match="can't be read"):
        Checkpoint.load(path, tower, identity)
    refused = 0
    for content in damaged:
        path.write_bytes(content)
        try:
            found = Checkpoint.load(path, tower, identity)
        except TrainingError as error:
            assert len(str(error)) < 600
            refused += 1
        else:  # a date or the like
            assert found.history == Checkpoint.load(path, tower, identity).history
    assert refused > 450
    path.unlink()
    path.mkdir()
    with pytest.raises(TrainingError, match="can't be read"):
        Checkpoint.load(path, tower, identity)


# --------------------------------------------------------------------------------------------------
# Two processes
# --------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_a_second_process_is_told_and_touches_nothing(
    shards,
    handler,
    validation,
    tmp_path,
):
    """Before, both trained, and the second first deleted the first one's half-written file."""
    run = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, __file__, run, *shards],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout.readline() == "in the middle\n", process.stderr.read()[-3000:]
        before = files_of(run)
        assert [name for name in before if name.endswith("-checkpoint.npz")]
        with pytest.raises(
            TrainingError, match=r"another process trains in .*run: wait for its end or"
        ):
            train(tiny_tower(), handler, validation, SHORT, run)
        assert files_of(run) == before
        _, errors = process.communicate("go on\n", timeout=120)
    finally:
        process.kill()
    assert process.returncode == 0, errors[-3000:]
    # The lock went with its process.
    assert len(train(tiny_tower(), handler, validation, SHORT, run)) == 2
    assert (run / MODEL).is_file() and not list(run.rglob(".part-*"))


def main(run: str, *shards: str) -> None:
    """Trains, and waits in the middle with a half-written checkpoint."""
    from lib.data.catalogue import build_catalogue, split_landmarks
    from lib.data.dataset import DataSettings

    catalogue = build_catalogue([Path(shard) for shard in shards])
    part = split_landmarks(catalogue, {"train": 0.7, "validation": 0.3}, seed=0)
    of_training = DatasetHandler(
        catalogue, DataSettings(image_size=16, batch_size=4, seed=1), part == "train"
    )
    others = DatasetHandler(catalogue, DataSettings(image_size=16), part == "validation")

    def watch(epoch):
        if epoch == 1:
            try:
                with replacing(Path(run) / CHECKPOINT) as part:
                    part.write_bytes(b"half")
                    print("in the middle", flush=True)
                    raise EOFError(input())
            except EOFError:
                pass

    photos = others.photos(others.validation_triplets(50))
    train(tiny_tower(), watching(of_training, watch), photos, SHORT, Path(run))


if __name__ == "__main__":
    main(*sys.argv[1:])
