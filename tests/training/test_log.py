"""What a training shows: read back with TensorBoard's own reader, and by hand."""

import io

import numpy as np
import pandas as pd
import pytest
from google.protobuf import text_format
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.projector.projector_config_pb2 import ProjectorConfig

from lib.training.log import HARDEST, HISTORY, TENSORBOARD, TrainingLog, hardest_triplets

SIDE = 4


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


@pytest.fixture
def validation(rng) -> np.ndarray:
    return rng.integers(0, 256, (20, 3, SIDE, SIDE, 3), dtype=np.uint8)


@pytest.fixture
def embeddings(rng) -> np.ndarray:
    return unit(rng.normal(size=(20, 3, 5))).astype(np.float32)


def rows(*losses: float) -> list[dict]:
    return [
        {"epoch": i, "stage": 1, "loss": loss, "val_map": loss / 10, "p": float("nan")}
        for i, loss in enumerate(losses, start=1)
    ]


def write(log: TrainingLog, history: list[dict], embeddings: np.ndarray, is_best=True) -> None:
    with log.progress("1 head", steps=2):
        log.write(history, embeddings, is_best=is_best)


def read(run) -> EventAccumulator:
    accumulator = EventAccumulator(str(run / TENSORBOARD))
    accumulator.Reload()
    return accumulator


def test_tensorboard_reads_every_epoch_once_also_one_that_was_done_again(
    validation, embeddings, tmp_path
):
    history = rows(3, 2, 1)
    log = TrainingLog(tmp_path, validation)
    for epoch in (1, 2, 3):
        write(log, history[:epoch], embeddings)
    # Killed before the checkpoint of epoch 3 was written, and gone on with from epoch 2.
    history = rows(3, 2, 1.5, 1)
    log = TrainingLog(tmp_path, validation)
    for epoch in (3, 4):
        write(log, history[:epoch], embeddings)
    found = read(tmp_path)
    assert set(found.Tags()["scalars"]) == {"training/loss", "validation/map"}  # p is not a number
    for tag, column in (("training/loss", "loss"), ("validation/map", "val_map")):
        points = [(point.step, point.value) for point in found.Scalars(tag)]
        assert points == [(row["epoch"], pytest.approx(row[column])) for row in history]
    assert found.file_version == 2
    assert [image.step for image in found.Images("validation/hardest_triplets")] == [1, 2, 3, 4]
    pd.testing.assert_frame_equal(
        pd.read_csv(tmp_path / HISTORY), pd.DataFrame(history), check_dtype=False
    )


def test_the_hardest_triplets_are_drawn_row_by_row(validation, embeddings, tmp_path):
    write(TrainingLog(tmp_path, validation), rows(1), embeddings)
    distance = np.linalg.norm(embeddings[:, :1] - embeddings[:, 1:], axis=-1)
    worst_first = sorted(range(20), key=lambda i: distance[i, 1] ** 2 - distance[i, 0] ** 2)
    assert hardest_triplets(embeddings).tolist() == worst_first
    image = read(tmp_path).Images("validation/hardest_triplets")[0]
    pixels = np.asarray(Image.open(io.BytesIO(image.encoded_image_string)))
    assert (image.width, image.height) == (3 * SIDE, HARDEST * SIDE)
    assert pixels.shape == (HARDEST * SIDE, 3 * SIDE, 3)
    for row, triplet in enumerate(worst_first[:HARDEST]):
        for role in range(3):
            place = pixels[row * SIDE : (row + 1) * SIDE, role * SIDE : (role + 1) * SIDE]
            np.testing.assert_array_equal(place, validation[triplet, role])


def test_the_projector_shows_anchors_and_positives_of_the_best_epoch(
    validation, embeddings, tmp_path
):
    log = TrainingLog(tmp_path, validation)
    write(log, rows(2), embeddings)
    write(log, rows(2, 1), -embeddings, is_best=False)
    folder = tmp_path / TENSORBOARD
    config = text_format.Parse((folder / "projector_config.pbtxt").read_text(), ProjectorConfig())
    (shown,) = config.embeddings
    points = np.loadtxt(folder / shown.tensor_path, delimiter="\t")
    np.testing.assert_allclose(points, embeddings[:, :2].reshape(40, 5), rtol=1e-4)
    table = pd.read_csv(folder / shown.metadata_path, sep="\t")
    assert table["landmark"].tolist() == np.repeat(np.arange(20), 2).tolist()
    assert table["role"].tolist() == ["anchor", "positive"] * 20
    assert list(shown.sprite.single_image_dim) == [SIDE, SIDE]
    sprite = np.asarray(Image.open(folder / shown.sprite.image_path))
    assert sprite.shape == (7 * SIDE, 7 * SIDE, 3)  # 7 x 7 is the first square with 40 places
    for i, photo in enumerate(validation[:, :2].reshape(40, SIDE, SIDE, 3)):
        top, left = SIDE * (i // 7), SIDE * (i % 7)
        np.testing.assert_array_equal(sprite[top : top + SIDE, left : left + SIDE], photo)


def test_large_photos_become_thumbnails(rng, tmp_path):
    photos = np.full((2, 3, 100, 100, 3), 7, np.uint8)
    embeddings = unit(rng.normal(size=(2, 3, 5)))
    write(TrainingLog(tmp_path, photos), rows(1), embeddings)
    sprite = np.asarray(Image.open(tmp_path / TENSORBOARD / "projector" / "sprite.png"))
    assert sprite.shape == (128, 128, 3) and (sprite == 7).all()


def test_the_bar_counts_steps_and_shows_loss_and_map(validation, embeddings, tmp_path, capsys):
    log = TrainingLog(tmp_path, validation)
    with log.progress("2 all", steps=4, done=1):
        for batch in range(2):
            log.on_train_batch_end(batch)
        log.write(rows(1.5), embeddings, is_best=True)
    shown = capsys.readouterr().err
    assert "2 all" in shown and "3/4" in shown and "loss=1.500, val_map=0.150" in shown
