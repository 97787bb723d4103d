"""Which pictures meet in a batch."""

import numpy as np
import pandas as pd
import pytest

from lib.data.catalogue import UNKNOWN, Catalogue, build_catalogue, split_landmarks
from lib.data.sampling import (
    SamplingError,
    draw_triplets,
    hard_negatives,
    landmark_batches,
    triplet_batches,
    usable_triplets,
)
from tests.conftest import unit


def catalogue_of(landmarks, triplets=((0, 1, 2),), groups=None) -> Catalogue:
    """A catalogue of pictures 0, 1, ... of the given landmarks, and of some triplets."""
    numbers = np.ravel(triplets)
    missing = np.setdiff1d(np.arange(len(landmarks)), numbers)
    assert not len(missing), "every picture must occur, in order of its number"
    groups = landmarks if groups is None else groups
    rows = pd.DataFrame({"image": numbers, "role": np.tile(np.arange(3), len(triplets))})
    rows["landmark"], rows["group"] = np.array(landmarks)[numbers], np.array(groups)[numbers]
    rows[["shard", "record", "offset"]] = 0
    return Catalogue([], rows, pd.DataFrame())


@pytest.fixture(scope="module")
def world(shards):
    return build_catalogue(shards)


@pytest.fixture(scope="module")
def training(world):
    return split_landmarks(world, {"train": 0.8, "validation": 0.2}, seed=1) == "train"


def test_usable_triplets_by_hand():
    triplets = [
        (0, 1, 2),  # good
        (0, 0, 2),  # degenerate
        (0, 1, 3),  # the negative is of the anchor's landmark
        (2, 4, 5),  # the negative may be: the same group
        (2, 4, 6),  # the negative is held back
    ]
    catalogue = catalogue_of([0, 0, 1, 0, 1, 2, 3], triplets, [0, 0, 1, 0, 1, 1, 2])
    chosen = np.array([True] * 6 + [False])
    assert usable_triplets(catalogue, chosen).tolist() == [[0, 1, 2]]


def test_a_pass_uses_every_triplet_once_and_then_begins_again(world, training, rng):
    usable = usable_triplets(world, training)
    plan = triplet_batches(world, training, steps=len(usable), batch_size=2, rng=rng)
    assert plan.shape == (len(usable), 2, 3)
    flat = plan.reshape(-1, 3)
    for one_pass in (flat[: len(usable)], flat[len(usable) :]):
        np.testing.assert_array_equal(
            one_pass[np.lexsort(one_pass.T)], usable[np.lexsort(usable.T)]
        )
    assert not np.array_equal(flat[: len(usable)], flat[len(usable) :])


@pytest.mark.parametrize("block", [1, 2**23])
def test_negatives_are_the_nearest_pictures_of_other_groups(rng, monkeypatch, block):
    monkeypatch.setattr("lib.data.sampling._BLOCK", block)
    vectors = unit(rng.normal(size=(60, 8))).astype(np.float32)
    group = rng.permutation(np.arange(60) // 4)
    pool, anchors = rng.permutation(60)[:40], np.tile(rng.permutation(60)[:10], (20, 5, 1))
    found = hard_negatives(anchors, pool, group, lambda pictures: vectors[pictures], rng)
    assert found.shape == anchors.shape and found.dtype == np.int64
    for anchor in anchors[0, 0]:
        hardest = {}  # the nearest picture of each other group, the nearest of all first
        for picture in sorted(pool, key=lambda one: -(vectors[one] @ vectors[anchor])):
            if group[picture] != group[anchor]:
                hardest.setdefault(group[picture], picture)
        assert {*found[anchors == anchor]} == {*list(hardest.values())[:5]}


def test_a_pool_of_few_landmarks_gives_what_it_has(rng):
    group, vectors = np.array([0, 0, 1, 1]), np.eye(4, dtype=np.float32)
    arguments = (np.arange(4), group, vectors.__getitem__, rng)
    assert {*hard_negatives(np.zeros(9, int), *arguments)} == {2}  # a tie: the first
    with pytest.raises(SamplingError, match=r"pool of 2 .* set a larger pool, or pool=0"):
        hard_negatives(np.array([0, 3]), np.array([2, 3]), *arguments[1:])


def test_nothing_held_back_is_seen(world, training, rng):
    plans = [
        triplet_batches(world, training, 40, 8, rng),
        landmark_batches(world, training, 40, 8, 3, rng),
    ]
    for plan in plans:
        assert training[plan].all()


def test_landmark_batches_hold_p_landmarks_with_k_pictures_each(world, training, rng):
    pictures = world.pictures
    plan = landmark_batches(world, training, steps=30, p=6, k=3, rng=rng)
    assert plan.shape == (30, 18)
    sizes = pictures[training].groupby("landmark").size()
    for batch in plan:
        landmark = pictures["landmark"].to_numpy()[batch].reshape(6, 3)
        assert (landmark == landmark[:, :1]).all() and (landmark != UNKNOWN).all()
        assert len(set(pictures["group"].to_numpy()[batch])) == 6  # surely different landmarks
        for members, of in zip(batch.reshape(6, 3), landmark[:, 0], strict=True):
            assert len(set(members)) == min(3, sizes[of])


def test_every_group_has_its_turn_before_any_comes_again(rng):
    landmarks = np.repeat(np.arange(9), 3)
    triplets = [(3 * i, 3 * i + 1, 3 * i + 2) for i in range(9)]
    catalogue = catalogue_of(landmarks, triplets)
    plan = landmark_batches(catalogue, np.ones(27, bool), steps=3, p=3, k=2, rng=rng)
    assert sorted(set(landmarks[plan.ravel()])) == list(range(9))


def test_the_same_seed_gives_the_same_plan(world, training):
    def plans(seed):
        return [
            make(world, training, 20, 4, *k, np.random.default_rng(seed))
            for make, k in ((triplet_batches, ()), (landmark_batches, (2,)))
        ]

    for first, again, other in zip(plans(7), plans(7), plans(8), strict=True):
        np.testing.assert_array_equal(first, again)
        assert not np.array_equal(first, other)


def test_too_few_pictures_are_an_error(rng):
    same = catalogue_of([0, 1], [(0, 0, 1), (0, 0, 1)])
    with pytest.raises(SamplingError, match="none of the 2 triplets is usable"):
        triplet_batches(same, np.ones(2, bool), 1, 1, rng)
    with pytest.raises(SamplingError, match="there are 0: use more shards"):
        landmark_batches(same, np.ones(2, bool), 1, 2, 2, rng)
    with pytest.raises(SamplingError, match="at least 2 pictures in a batch, not 1"):
        landmark_batches(same, np.ones(2, bool), 1, 1, 1, rng)


def test_triplets_are_drawn_as_kaggles_were():
    labels = np.array(["b", "a", "b", "b", "c", "a", "b"])  # a: 2 photos, b: 4, c: 1
    first_two = [1, 5, 0, 2, 4]
    draws = [draw_triplets(labels, np.random.default_rng(seed)) for seed in range(400)]
    for triplets in draws:
        assert triplets[:, 0].tolist() == first_two
        np.testing.assert_array_equal(labels[triplets[:, 1]], labels[triplets[:, 0]])
        assert (labels[triplets[:, 2]] != labels[triplets[:, 0]]).all()
        assert set(triplets[:, 2]) <= set(first_two)
    # The anchor itself is as likely a positive as any other photo of its landmark.
    degenerate = np.mean([triplets[:, 0] == triplets[:, 1] for triplets in draws], axis=0)
    np.testing.assert_allclose(degenerate, [1 / 2, 1 / 2, 1 / 4, 1 / 4, 1], atol=0.08)
    with pytest.raises(SamplingError, match="1 landmarks make no triplet"):
        draw_triplets(labels[:1], np.random.default_rng(0))
