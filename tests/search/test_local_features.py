"""Local features: what is found, how it is stored, and that any picture has a result."""

import cv2
import numpy as np
import pytest

from lib.search.embedding import JOB, embed_job, photos_below
from lib.search.local_features import (
    LONGEST,
    MOST,
    ROW_BYTES,
    LocalFeatures,
    local_features,
    packed,
    unpacked,
)
from tests.conftest import textured


def test_root_sift_is_the_root_of_the_shares_of_sift():
    photo = textured(1)
    grey = cv2.cvtColor(photo, cv2.COLOR_RGB2GRAY)
    sift = cv2.SIFT_create(nfeatures=MOST, contrastThreshold=0.02)
    points, descriptors = sift.detectAndCompute(grey, None)
    found = local_features(photo)
    points, descriptors = points[:MOST], descriptors[:MOST]
    assert len(found.points) == len(points) > 100 and found.size == photo.shape[1::-1]
    np.testing.assert_allclose(found.points, [point.pt for point in points])
    shares = descriptors / descriptors.sum(axis=1, keepdims=True)
    assert np.abs(found.descriptors / 512 - np.sqrt(shares)).max() < 0.5 / 512 + 1e-6
    norms = np.linalg.norm(found.descriptors / 512, axis=1)
    assert np.abs(norms - 1).max() < 0.02  # Hellinger: a unit vector


def test_a_row_gives_the_features_back():
    found = local_features(textured(2))
    row = packed(found)
    assert row.shape == (ROW_BYTES,) and row.dtype == np.uint8 and ROW_BYTES <= 160_000
    back = unpacked(row)
    np.testing.assert_array_equal(back.descriptors, found.descriptors)
    assert np.abs(back.points - found.points).max() <= 0.5 / 64 and back.size == found.size


@pytest.mark.parametrize(
    "shape", [(1, 1), (1, 4000), (4000, 1), (2, 2), (7, 9), (480, 640), (1500, 2100)]
)
@pytest.mark.parametrize("kind", ["black", "noise", "gradient"])
def test_any_picture_has_features_or_none(shape, kind, rng):
    photo = np.zeros((*shape, 3), np.uint8)
    if kind == "noise":
        photo = rng.integers(0, 256, photo.shape, np.uint8)
    elif kind == "gradient":
        photo[:] = np.linspace(0, 255, shape[1]).astype(np.uint8)[:, None]
    found = local_features(photo)
    assert len(found.points) == len(found.descriptors) <= MOST
    assert found.descriptors.shape[1:] == (128,) and found.descriptors.dtype == np.uint8
    assert max(found.size) <= LONGEST
    assert kind != "black" or not len(found.points)
    assert kind != "noise" or shape != (480, 640) or len(found.points) == MOST
    width, height = found.size
    assert (found.points >= 0).all() and (found.points <= (width, height)).all()
    np.testing.assert_array_equal(unpacked(packed(found)).descriptors, found.descriptors)


def test_a_job_keeps_the_rows_of_unchanged_photos(tmp_path, monkeypatch):
    folder, job = tmp_path / "photos", tmp_path / "job"
    folder.mkdir()
    for number in range(5):
        cv2.imwrite(str(folder / f"{number}.png"), textured(number))
    rows, names, _ = embed_job(LocalFeatures(), photos_below(folder), job)
    assert rows.dtype == np.uint8 and rows.shape == (5, ROW_BYTES)
    before, asked = dict(zip(names, np.array(rows), strict=True)), []
    counted = LocalFeatures.embed
    monkeypatch.setattr(
        LocalFeatures, "embed", lambda self, p: (asked.append(len(p)), counted(self, p))[1]
    )
    (folder / "1.png").rename(folder / "moved.png")
    (folder / "2.png").unlink()
    cv2.imwrite(str(folder / "new.png"), textured(9))
    rows, names, _ = embed_job(LocalFeatures(), photos_below(folder), job, batch_size=128)
    assert sum(asked) == 1  # the new one
    after = dict(zip(names, rows, strict=True))
    np.testing.assert_array_equal(after["moved.png"], before["1.png"])
    for name in ("0.png", "3.png", "4.png"):
        np.testing.assert_array_equal(after[name], before[name])
    np.testing.assert_array_equal(
        after["new.png"], packed(local_features(cv2.imread(str(folder / "new.png"))[:, :, ::-1]))
    )
    assert '"dtype": "|u1"' in (job / JOB).read_text()


def test_features_are_the_same_each_time():
    photo = textured(3)
    first = packed(local_features(photo))
    for row in LocalFeatures().embed([photo] * 6):
        np.testing.assert_array_equal(row, first)
    assert LocalFeatures().embed([]).shape == (0, ROW_BYTES)
