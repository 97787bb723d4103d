"""Pre-training the demo's backbone: its batches, going on after an interruption, and its file."""

from dataclasses import replace
from itertools import islice

import numpy as np
import pandas as pd
import pytest

import tools.pretraining
from lib.data.photos import read_gallery
from lib.demo.data import DemoSettings
from lib.demo.world import draw_views
from lib.evaluation.metrics import average_precision, leave_one_out
from lib.files import only_writer, project_root
from lib.network.pooling import gem
from lib.network.tower import (
    STAGES,
    TowerSettings,
    build_backbone,
    build_tower,
    compute_precision,
    fast_policy,
)
from tools.pretraining import (
    CURVE,
    WEIGHTS,
    PretrainingSettings,
    pretrain,
    rendered_batches,
    save_backbone,
)

TINY = PretrainingSettings(
    small_size=32,
    small_steps=4,
    size=40,
    steps=2,
    landmarks=4,
    views=2,
    drawn_views=3,
    fresh=2,
    window=6,
    embedding_size=8,
    steps_per_round=2,
)


def test_a_batch_holds_views_of_landmarks_and_depends_on_its_step_alone():
    from_start = rendered_batches(TINY, 0)
    batches = list(islice(from_start, 4))
    from_start.close()
    from_third = rendered_batches(TINY, 3)
    photos, groups = next(from_third)
    from_third.close()
    np.testing.assert_array_equal(photos, batches[3][0])
    np.testing.assert_array_equal(groups, batches[3][1])

    assert photos.shape == (8, 128, 128, 3) and photos.dtype == np.uint8
    assert len(np.unique(groups)) == 4 and (groups[::2] == groups[1::2]).all()
    assert groups.min() >= 6 and groups.max() < 12  # the window has moved by 2 a step
    for group in np.unique(groups):
        views = draw_views(TINY.seed, int(group), [0, 1, 2])
        found = [[(photo == view).all() for view in views] for photo in photos[groups == group]]
        assert np.sum(found) == 2 and np.sum(found, axis=0).max() == 1  # two different views


def test_its_world_is_not_the_demos():
    assert PretrainingSettings().seed != DemoSettings().seed


@pytest.mark.long
def test_an_interrupted_pre_training_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(tools.pretraining, "VALIDATION_LANDMARKS", 3)
    # A small part of the ResNet50: most of the time goes into compiling it, five times.
    monkeypatch.setitem(STAGES, 3, "conv2_block1_out")
    tower, curve = pretrain(TINY, tmp_path / "straight")
    assert curve["steps"].tolist() == [2, 4, 6]
    assert curve["image_size"].tolist() == [32, 32, 40]
    assert tower.input_shape == (None, 40, 40, 3)
    # It was bfloat16 on every machine, also on those that only emulate it.
    assert compute_precision(tower) == fast_policy().removeprefix("mixed_")

    class Interrupt(Exception):
        pass

    def failing(settings, first_step):
        yield from islice(rendered_batches(settings, first_step), 3)
        raise Interrupt

    with monkeypatch.context() as patch, pytest.raises(Interrupt):
        patch.setattr(tools.pretraining, "rendered_batches", failing)
        pretrain(TINY, tmp_path / "broken")
    assert len(pd.read_csv(tmp_path / "broken" / CURVE)) == 1
    resumed, again = pretrain(TINY, tmp_path / "broken")
    np.testing.assert_allclose(again["loss"], curve["loss"], rtol=1e-3)
    for a, b in zip(tower.get_weights(), resumed.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-2)

    with pytest.raises(ValueError, match="pre-training with other settings"):
        pretrain(replace(TINY, steps=3), tmp_path / "broken")
    other = {"float32": "mixed_bfloat16", "mixed_bfloat16": "float32"}[fast_policy()]
    with monkeypatch.context() as patch, pytest.raises(ValueError, match=r"settings \(precision\)"):
        patch.setattr(tools.pretraining, "fast_policy", lambda: other)
        pretrain(TINY, tmp_path / "broken")
    with only_writer(tmp_path / "broken", None), pytest.raises(ValueError, match="another process"):
        pretrain(TINY, tmp_path / "broken")

    save_backbone(tower, TINY, tmp_path / "half.weights.h5")
    trained = tower.get_layer("trunk").get_layer("backbone")
    # Two bytes a weight, and up to 2 kB a tensor for its place in the file.
    largest = 2 * trained.count_params() + 2000 * len(trained.weights)
    assert (tmp_path / "half.weights.h5").stat().st_size < largest
    settings = TowerSettings(40, 8, last_stage=3, weights=str(tmp_path / "half.weights.h5"))
    loaded = build_backbone(settings)
    for a, b in zip(trained.get_weights(), loaded.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6)
    # It became infinite without a word.
    trained.weights[0].assign(trained.weights[0] * 0 + 1e5)
    with pytest.raises(ValueError, match="65504"):
        save_backbone(tower, TINY, tmp_path / "half.weights.h5")


@pytest.mark.long
def test_the_shipped_weights_know_landmarks_they_have_not_seen(small_world):
    path = project_root() / WEIGHTS
    assert path.stat().st_size <= 50e6
    photos, labels, _ = read_gallery(small_world / "Dataset" / "demo_world" / "unseen", 48)
    precision = {}
    for weights in ("", str(path)):
        tower = build_tower(TowerSettings(48, 8, last_stage=3, weights=weights))
        maps = tower.get_layer("trunk").predict(photos, verbose=0)
        descriptors = np.array(gem(maps, 3.0))
        descriptors /= np.linalg.norm(descriptors, axis=1, keepdims=True)
        precision[weights] = average_precision(leave_one_out(descriptors, labels)).mean()
    assert precision[str(path)] > 0.8 > 0.6 > precision[""]
