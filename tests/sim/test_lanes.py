"""Lane sets against plain boolean arrays."""

import numpy as np
import pytest

from cute_fa.sim.lanes import LaneSpace

SHAPE = (4, 3, 32)


def random_masks(count, seed=0):
    """Masks of many kinds: sparse, dense, whole warps, rectangles."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        kind = rng.integers(4)
        if kind == 0:
            yield rng.random(SHAPE) < rng.random()
        elif kind == 1:
            yield np.broadcast_to(rng.random(SHAPE[:2])[:, :, None] < 0.5, SHAPE)
        elif kind == 2:
            mask = np.zeros(SHAPE, bool)
            w, c = np.sort(rng.integers(0, 5, 2)), np.sort(rng.integers(0, 4, 2))
            mask[w[0] : w[1], c[0] : c[1]] = True
            yield mask
        else:
            yield np.broadcast_to(rng.random(32) < 0.5, SHAPE)


def as_mask(lanes):
    return np.zeros(SHAPE, bool) if lanes is None else lanes.full_mask()


@pytest.mark.parametrize("seed", range(4))
def test_sets_behave_as_masks(seed):
    space = LaneSpace(*SHAPE[:2])
    masks = [m for m in random_masks(20, seed) if m.any()]
    sets = [space.from_mask(m) for m in masks]
    for mask, lanes in zip(masks, sets, strict=True):
        assert (lanes.full_mask() == mask).all()
        assert lanes.lanes == mask.sum()
        assert lanes.warps == mask.any(axis=2).sum()
        assert sorted(lanes.each_warp()) == [tuple(i) for i in np.argwhere(mask.any(axis=2))]
        w0, w1, c0, c1 = lanes.rect
        assert (lanes.mask is None) == mask[w0:w1, c0:c1].all()
        assert (lanes.dense_mask() == mask[w0:w1, c0:c1]).all()
        assert mask[w0].any() and mask[w1 - 1].any()
        assert mask[:, c0].any() and mask[:, c1 - 1].any()
    for a, x in zip(masks, sets, strict=True):
        for b, y in zip(masks, sets, strict=True):
            assert (as_mask(x.union(y)) == (a | b)).all()
            assert (as_mask(x.minus(y)) == (a & ~b)).all()


def test_equal_sets_are_one_object():
    space = LaneSpace(4, 3)
    for mask in random_masks(20):
        assert space.from_mask(mask) is space.from_mask(mask.copy())
    left, right = space.rectangle(0, 2, 0, 3), space.rectangle(2, 4, 0, 3)
    assert left.union(right) is space.everything()
    assert left.union(right) is left.union(right)


def test_empty_sets_are_none():
    space = LaneSpace(2, 2)
    assert space.from_mask(np.zeros((2, 2, 32), bool)) is None
    assert space.everything().minus(space.everything()) is None


def test_uniform_splits_return_the_set_itself():
    lanes = LaneSpace(4, 3).rectangle(1, 3, 0, 2)
    yes, no = np.ones(lanes.shape, bool), np.zeros(lanes.shape, bool)
    assert lanes.split(yes) == (lanes, None)
    assert lanes.split(no) == (None, lanes)
    assert lanes.within(None) is lanes
    assert lanes.within(no) is None


@pytest.mark.parametrize("shape", [(2, 2, 32), (1, 2, 1), (2, 1, 1), (1, 1, 32), (1, 1, 1)])
def test_splits_take_anything_that_broadcasts_to_the_rectangle(shape):
    space = LaneSpace(4, 3)
    mask = np.zeros(SHAPE, bool)
    mask[1:3, 0:2, ::2] = True
    lanes = space.from_mask(mask)
    where = np.random.default_rng(1).random(shape) < 0.5
    taken, left = lanes.split(where)
    chosen = np.broadcast_to(where, lanes.shape) & lanes.dense_mask()
    assert as_mask(taken)[1:3, 0:2].sum() == chosen.sum()
    assert (as_mask(taken) | as_mask(left) == mask).all()
    assert not (as_mask(taken) & as_mask(left)).any()


def test_sets_cannot_be_changed():
    mask = np.zeros((2, 2, 32), bool)
    mask[0, 0, 3] = True
    lanes = LaneSpace(2, 2).from_mask(mask)
    mask[0, 0, 4] = True
    assert lanes.lanes == 1
    with pytest.raises(ValueError, match="read-only"):
        lanes.mask[0, 0, 5] = True
