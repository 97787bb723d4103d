"""The demo world has the quirks of the real set, and colours do not give its landmarks away."""

import csv
import io
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from unittest.mock import Mock

import numpy as np
import pytest
from PIL import Image

import lib.demo.data
from lib.data.photos import jpeg_quality
from lib.data.records import read_triplets
from lib.demo.buildings import build_landmark
from lib.demo.data import DemoSettings, make_demo_data, plan_triplets
from lib.demo.world import draw_view
from lib.evaluation.baselines import colour_histogram, raw_pixels
from lib.evaluation.metrics import average_precision, leave_one_out
from tests.conftest import SMALL_WORLD


def test_equal_arguments_draw_equal_pixels_and_others_different_ones():
    photo = draw_view(build_landmark(1, 2), 3)
    assert photo.shape == (128, 128, 3) and photo.dtype == np.uint8
    np.testing.assert_array_equal(photo, draw_view(build_landmark(1, 2), 3))
    for other in (draw_view(build_landmark(1, 2), 4), draw_view(build_landmark(1, 3), 3)):
        assert np.abs(photo.astype(int) - other).mean() > 5


def test_every_landmark_stands_on_the_ground_and_fits_its_sphere():
    for number in range(40):
        landmark = build_landmark(0, number)
        assert landmark.vertices[:, 2].min() == 0
        centre = np.array([0, 0, landmark.height / 2])
        radius = np.linalg.norm(landmark.vertices - centre, axis=1).max()
        assert radius == pytest.approx(1.0)
        assert (np.diff(landmark.starts) >= 3).all()
        assert len(landmark.vertices) == landmark.starts[-1]


@pytest.mark.long
def test_colours_and_raw_pixels_do_not_find_landmarks():
    photos = np.stack(
        [draw_view(build_landmark(5, number), view) for number in range(60) for view in range(5)]
    )
    labels = np.repeat(np.arange(60), 5)
    for describe in (colour_histogram, raw_pixels):
        hits = leave_one_out(describe(photos), labels)
        assert average_precision(hits).mean() < 0.15, describe.__name__


def test_landmarks_differ_in_shape():
    """Drawn by the same camera in the same light, two landmarks are different pictures."""
    plain = [build_landmark(0, number) for number in range(20)]
    heights = {round(landmark.height, 6) for landmark in plain}
    faces = {len(landmark.faces) for landmark in plain}
    assert len(heights) == 20 and len(faces) > 15


def test_triplets_are_planned_like_the_kaggle_set():
    plan = plan_triplets(DemoSettings(landmarks=2000))
    anchors = [anchor for anchor, _, _ in plan]
    assert anchors == sorted(anchors)  # in the order of the landmarks, at most two of each
    assert len(set(anchors)) == len(anchors)
    of_landmark = np.bincount([anchor.landmark for anchor in anchors])
    assert set(of_landmark) == {1, 2} and (of_landmark == 1).mean() < 0.1
    assert all(positive.landmark == anchor.landmark for anchor, positive, _ in plan)
    assert all(negative.landmark != anchor.landmark for anchor, _, negative in plan)
    assert {negative for _, _, negative in plan} <= set(anchors)
    assert 0.15 < np.mean([anchor == positive for anchor, positive, _ in plan]) < 0.5


def test_the_files_have_the_kaggle_format(small_world, shards):
    assert [path.name for path in shards] == [f"train{i:02d}.tfrec" for i in range(16)]
    triplets = [list(read_triplets(shard)) for shard in shards]
    plan = plan_triplets(SMALL_WORLD)
    assert {len(t) for t in triplets[:15]} == {len(plan) // 15}
    assert len(triplets[15]) == len(plan) % 15
    for jpeg in triplets[0][0].pictures:
        image = Image.open(io.BytesIO(jpeg))
        assert (image.size, image.mode, image.format) == ((128, 128), "RGB", "JPEG")
        assert jpeg_quality(image) == 94
    stored = [t.anchor == t.positive for shard in triplets for t in shard]
    assert stored == [anchor == positive for anchor, positive, _ in plan]


def test_the_test_set_has_one_query_four_positives_and_distractors(small_world):
    folder = small_world / "Test_set" / "demo_world"
    rows = list(csv.DictReader((folder / "ground_truth.csv").open()))
    roles = [row["role"] for row in rows]
    assert len(rows) == len(list(folder.glob("*.jpg"))) == 25
    assert [roles.count(r) for r in ("query", "positive", "distractor")] == [1, 4, 20]
    assert min(rows, key=lambda row: row["image"])["role"] == "query"


TINY = DemoSettings(landmarks=20, unseen_landmarks=2, unseen_views=2, distractors=3)


def files_below(folder) -> dict:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*.*")}


def test_a_whole_world_is_kept_and_a_damaged_one_made_anew(tmp_path):
    assert make_demo_data(tmp_path, TINY)
    first = files_below(tmp_path)
    assert not make_demo_data(tmp_path, TINY)
    (tmp_path / "Test_set" / "demo_world" / "photo_001.jpg").unlink()
    assert make_demo_data(tmp_path, TINY)
    assert files_below(tmp_path) == first  # byte for byte
    # A file of the same size with other content was taken for whole, as only files were counted.
    with (tmp_path / "Dataset" / "demo_world" / "train03.tfrec").open("rb+") as file:
        file.write(b"damaged")
    assert make_demo_data(tmp_path, TINY)
    assert files_below(tmp_path) == first


def test_files_of_others_stay(tmp_path):
    """Any difference in the number of files removed both folders with all that was in them."""
    make_demo_data(tmp_path, TINY)
    first = files_below(tmp_path)
    others = {
        "Dataset/demo_world/notes.csv": b"mine",
        "Dataset/demo_world/unseen/landmark_001/mine.jpg": b"mine",
        "Test_set/demo_world/holiday/beach.jpg": b"mine",
    }
    for name, content in others.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    assert not make_demo_data(tmp_path, TINY)
    smaller = replace(TINY, unseen_landmarks=1, distractors=1)
    assert make_demo_data(tmp_path, smaller)
    found = files_below(tmp_path)
    assert others.items() <= found.items()
    # What it wrote itself and no longer needs is gone.
    assert "Dataset/demo_world/unseen/landmark_001/0.jpg" not in found
    assert "Test_set/demo_world/photo_007.jpg" not in found
    assert make_demo_data(tmp_path, TINY)
    assert files_below(tmp_path) == first | others


@pytest.mark.parametrize("name", ["train00.tfrec", "unseen", "world.json"])
def test_a_file_in_the_way_is_named_and_kept(tmp_path, name):
    taken = tmp_path / "Dataset" / "demo_world" / name
    taken.parent.mkdir(parents=True)
    taken.write_bytes(b"mine")
    with pytest.raises(FileExistsError, match=rf"{name}.*move or delete it"):
        make_demo_data(tmp_path, TINY)
    assert taken.read_bytes() == b"mine" and not (tmp_path / "Test_set").exists()


def test_a_file_linked_elsewhere_is_not_written_through(tmp_path):
    make_demo_data(tmp_path, TINY)
    photo, mine = tmp_path / "Test_set" / "demo_world" / "photo_001.jpg", tmp_path / "mine.jpg"
    mine.write_bytes(b"mine")
    photo.unlink()
    photo.symlink_to(mine)
    assert make_demo_data(tmp_path, TINY)
    assert mine.read_bytes() == b"mine" and photo.read_bytes()[:2] == b"\xff\xd8"


@pytest.mark.long
def test_an_interrupted_world_and_one_of_an_earlier_version_are_completed(tmp_path, monkeypatch):
    make_demo_data(tmp_path, TINY)
    first = files_below(tmp_path)
    path = tmp_path / "Dataset" / "demo_world" / "world.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest | {"files": 26, "drawn_by": "earlier"}))
    assert make_demo_data(tmp_path, TINY)
    assert files_below(tmp_path) == first

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(lib.demo.data, "write_shard", Mock(side_effect=KeyboardInterrupt))
        make_demo_data(tmp_path, replace(TINY, seed=1))
    assert make_demo_data(tmp_path, TINY)
    assert files_below(tmp_path) == first


def test_two_at_once_make_one_world(tmp_path):
    with ThreadPoolExecutor(2) as threads:
        made = list(threads.map(make_demo_data, [tmp_path] * 2, [TINY] * 2))
    assert sorted(made) == [False, True]
    assert not make_demo_data(tmp_path, TINY)  # it is whole
