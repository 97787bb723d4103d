"""Small sets get a split, batches and epochs that they can fill; large ones what was asked for."""

from itertools import permutations

import numpy as np
import pytest

from lib.data.catalogue import UNKNOWN, build_catalogue, split_landmarks
from lib.data.dataset import DatasetHandler, DataSettings
from lib.data.plan import fit_batches, hold_back
from lib.data.sampling import SamplingError
from tests.data.test_sampling import catalogue_of
from tools.convert import plan_triplets


def landmarks_of_two(n):
    """A catalogue of n landmarks, two photos each, with all triplets."""
    triplets = [(2 * a, 2 * a + 1, 2 * b) for a, b in permutations(range(n), 2)]
    return catalogue_of(np.repeat(np.arange(n), 2), triplets)


def test_a_large_set_gets_what_is_asked_for(shards, capsys):
    catalogue = build_catalogue(shards)
    part = split_landmarks(catalogue, {"train": 0.8, "validation": 0.2}, seed=0)
    split = hold_back(catalogue, 0.2)
    np.testing.assert_array_equal(split.train, part == "train")
    np.testing.assert_array_equal(split.validation, part == "validation")
    assert fit_batches(catalogue, split.train, 8, 3) == (8, 3)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("n", [4, 5, 7, 16])
@pytest.mark.parametrize("share", [0.0, 0.05, 0.4, 0.9, 1.0])
def test_both_parts_of_a_small_set_can_be_used(n, share):
    """5 landmarks and a share of 0.1 were "1 of the chosen landmarks have two pictures"."""
    catalogue = landmarks_of_two(n)
    split = hold_back(catalogue, share)
    assert not (split.train & split.validation).any() and (split.train | split.validation).all()
    batch_size, steps = fit_batches(catalogue, split.train, 64, 1400)
    settings = DataSettings(batch_size=batch_size)
    handler = DatasetHandler(catalogue, settings, split.train)
    assert 1 <= batch_size <= len(handler.triplets) and steps >= 1
    assert batch_size * steps <= 4 * len(handler.triplets)
    assert len(handler.training_batches(0, steps)) == steps
    held_back = DatasetHandler(catalogue, settings, split.validation).validation_triplets(400)
    assert len(held_back) >= 2


@pytest.mark.parametrize("n", [2, 3])
def test_of_too_few_landmarks_none_is_held_back_and_that_is_said(n, capsys):
    split = hold_back(landmarks_of_two(n), 0.1)
    assert split.train.all() and split.validation.all()
    assert f"Only {n} landmarks have two photos: none can be held back" in capsys.readouterr().out


def test_fewer_than_two_landmarks_are_an_error_that_names_the_parameter():
    one = catalogue_of([0, 0, 1], [(0, 1, 2), (2, 2, 0)])
    with pytest.raises(SamplingError, match="1 of the 2 landmarks in the shards of dataset_dir"):
        hold_back(one, 0.1)


def test_photos_of_unknown_landmarks_do_not_count():
    unknown = catalogue_of([0, 0, UNKNOWN, UNKNOWN], [(0, 1, 2), (2, 2, 3)], [0, 0, 1, 2])
    with pytest.raises(SamplingError, match="add photos"):
        hold_back(unknown, 0.1)


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
def test_an_impossible_share_is_an_error(share):
    with pytest.raises(ValueError, match="validation_share must be from 0 to 1"):
        hold_back(landmarks_of_two(9), share)


def test_few_triplets_are_not_repeated_hundreds_of_times(capsys):
    """25 triplets were trained on for 800 steps of 32."""
    catalogue = landmarks_of_two(5)
    assert fit_batches(catalogue, np.ones(10, bool), 32, 100) == (20, 4)
    assert "20 triplets to train on: 4 batches of 20 an epoch, not 100 of 32" in (
        capsys.readouterr().out
    )


@pytest.mark.parametrize("counts", [(12, 10, 2, 2, 2, 2), (10, 3, 3, 3, 3), (15, 2, 2, 2)])
def test_the_landmarks_with_most_photos_are_not_all_held_back(counts):
    """Of 30 triplets one was left to train on: the first draw held back the large landmarks."""
    landmark = np.repeat(np.arange(len(counts)), counts)
    plan = plan_triplets(landmark, seed=0)
    used, rows = np.unique(plan, return_inverse=True)
    catalogue = catalogue_of(landmark[used], rows.reshape(plan.shape))
    split = hold_back(catalogue, 0.2)
    assert len(DatasetHandler(catalogue, DataSettings(), split.train).triplets) > len(plan) / 4
