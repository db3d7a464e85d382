"""FA4's own: roles, tensor memory, cubic and threshold. That it is dense attention: test_loops."""

from __future__ import annotations

import math

import pytest
import torch

from cute_fa.exp2 import MAX_RELATIVE_ERROR
from cute_fa.reference import dense, fa4
from cute_fa.reference.fa4 import CORRECTION, LOAD, MMA, SOFTMAX, Event, RescaleCounts, schedule


def _inputs(seqlen_q: int, seqlen_k: int, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    shapes = (2, seqlen_q, 4, 16), (2, seqlen_k, 2, 16), (2, seqlen_k, 2, 24)
    return [torch.randn(s, dtype=torch.float64, generator=generator).to(dtype) for s in shapes]


@pytest.mark.parametrize("num_blocks", [0, 1, 2, 3, 9])
@pytest.mark.parametrize("num_q_tiles", [1, 2])
@pytest.mark.parametrize("stages", [3, 4, 8])
def test_every_event_happens_once(num_blocks, num_q_tiles, stages):
    order = schedule(num_blocks, num_q_tiles, stages)
    assert len(set(order)) == len(order) == num_blocks * (2 + 4 * num_q_tiles)


def test_softmax_of_one_tile_runs_beside_the_products_of_the_other():
    """Two Q tiles: between S and O += PV of one, MMA issues for the other."""
    issued = [(e.action[-2:], e.q_tile) for e in schedule(3, 2, 3) if e.role == MMA]
    first = [("qk", 0), ("qk", 1)]
    steady = [("pv", 0), ("qk", 0), ("pv", 1), ("qk", 1)]
    assert issued == first + 2 * steady + [("pv", 0), ("pv", 1)]


def test_one_tile_alternates_its_blocks():
    """One Q tile: S of the next block is there before P of this one is."""
    order = [(e.action, e.block) for e in schedule(4, 1, 3) if e.role in (MMA, SOFTMAX)]
    for j in range(3):
        assert order.index(("issue_qk", j + 1)) < order.index(("issue_pv", j))


def test_o_is_rescaled_between_its_products():
    order = schedule(5, 2, 3)
    for i in range(2):
        for j in range(1, 5):
            before, after = (order.index(Event(MMA, "issue_pv", i, b)) for b in (j - 1, j))
            assert before < order.index(Event(CORRECTION, "rescale_o", i, j)) < after


@pytest.mark.parametrize("num_q_tiles", [1, 2])
@pytest.mark.parametrize("stages", [3, 4, 7])
def test_equals_dense(num_q_tiles, stages):
    q, k, v = _inputs(50, 70)
    how = {"tile_m": 24, "tile_n": 10, "num_q_tiles": num_q_tiles, "stages": stages}
    out, lse = fa4.forward(q, k, v, causal=True, rescale_threshold=1.0, **how)
    expected, expected_lse = dense.attention(q, k, v, causal=True)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-12, atol=1e-12)


def _early(order: list[Event], action: str, before: str, distance: int) -> list[Event]:
    """``order`` with ``action`` of block j + distance moved before ``before`` of block j."""
    order = list(order)
    for event in [e for e in order if e.action == action and e.block >= distance]:
        order.remove(event)
        anchor = next(
            n
            for n, e in enumerate(order)
            if (e.action, e.block) == (before, event.block - distance)
            and e.q_tile in (event.q_tile, 0)
        )
        order.insert(anchor, event)
    return order


@pytest.mark.parametrize(
    ("action", "before", "words"),
    [("issue_qk", "issue_pv", "its S buffer holds"), ("issue_pv", "softmax", "its S buffer holds")],
)
def test_s_and_p_share_a_place(monkeypatch, action, before, words):
    """S over a P that was not multiplied yet, and a product with a P that is still S."""
    q, k, v = _inputs(20, 60)
    distance = 1 if action == "issue_qk" else 0
    monkeypatch.setattr(fa4, "schedule", lambda *a: _early(schedule(*a), action, before, distance))
    with pytest.raises(RuntimeError, match=words):
        fa4.forward(q, k, v, tile_m=20, tile_n=10, stages=20)


def test_a_slot_must_not_be_overwritten_while_it_is_multiplied(monkeypatch):
    q, k, v = _inputs(20, 60)

    def early_loads(*arguments):
        order = schedule(*arguments)
        return sorted(order, key=lambda e: e.role != LOAD)

    monkeypatch.setattr(fa4, "schedule", early_loads)
    with pytest.raises(StopIteration):
        fa4.forward(q, k, v, tile_m=20, tile_n=10)


def test_cubic():
    """Within its error everywhere; exact at 0, which is every row's largest score, and at −∞."""
    x = torch.linspace(-126, 15, 200001)
    error = (fa4.exp2_cubic(x).double() / torch.exp2(x.double()) - 1).abs().max()
    assert 1e-4 < error < MAX_RELATIVE_ERROR
    exact = torch.tensor([0.0, 1.0, 8.0, -3.0, -126.0, -127.0, -1e4, -math.inf])
    expected = [1.0, 2.0, 256.0, 0.125, 2.0**-126, 0.0, 0.0, 0.0]
    assert fa4.exp2_cubic(exact).tolist() == expected


def test_share_of_the_cubic():
    """3, 6, 6 and 3 of 16 pairs in a row of four chunks: 28.1 %."""
    columns = fa4.is_cubic(128, 6)
    assert columns.reshape(4, 32).sum(-1).tolist() == [6, 12, 12, 6]
    assert (columns[0::2] == columns[1::2]).all()
    assert fa4.is_cubic(32, 16).sum() == 16  # the only chunk is the first and the last
    assert not fa4.is_cubic(128, 0).any()


def _creeping(steps: int, growth: float):
    """One query whose score grows by ``growth`` log2 units per block, from right to left."""
    k = torch.zeros(1, steps, 1, 16, dtype=torch.float64)
    k[0, :, 0, 0] = torch.arange(steps).flip(0) * growth * math.log(2.0)
    q = torch.zeros(1, 1, 1, 16, dtype=torch.float64)
    q[..., 0] = 1.0
    v = torch.randn(
        1, steps, 1, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(2)
    )
    return q, k, v


@pytest.mark.parametrize(("growth", "rescales"), [(7.9, 49), (8.1, 99), (0.52, 6), (-1.0, 0)])
def test_threshold(growth, rescales):
    """A maximum that grows by less than the threshold 100 times is followed when it adds up."""
    q, k, v = _creeping(100, growth)
    counts = RescaleCounts()
    out, lse = fa4.forward(q, k, v, softmax_scale=1.0, tile_m=1, tile_n=1, counts=counts)
    assert (counts.rows, counts.rescaled_rows, counts.rescaled_warps) == (99, rescales, rescales)
    expected, expected_lse = dense.attention(q, k, v, softmax_scale=1.0)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-12, atol=1e-12)


def test_realistic_scores_hardly_ever_rescale():
    """Normal inputs of 16 columns: no row's maximum grows by a factor of 256."""
    q, k, v = _inputs(200, 400, torch.bfloat16)
    counts = RescaleCounts()
    fa4.forward(q, k, v, tile_n=32, counts=counts)
    assert counts.rows > 0 and counts.rescaled_warps == 0
    every = RescaleCounts()
    fa4.forward(q, k, v, tile_n=32, rescale_threshold=0.0, counts=every)
    assert every.rescaled_warps > every.warps // 2
