"""FA3's own: who does what when. That the result is dense attention: test_loops too."""

from __future__ import annotations

import pytest
import torch

from cute_fa.reference import dense, fa3
from cute_fa.reference.fa3 import LOAD, Event, consumer_events, schedule


def _positions(order: list[Event]) -> dict[Event, int]:
    positions = {event: i for i, event in enumerate(order)}
    assert len(positions) == len(order), "an event happens twice"
    return positions


def _inputs(seqlen_q: int, seqlen_k: int):
    generator = torch.Generator().manual_seed(1)
    shapes = (2, seqlen_q, 4, 16), (2, seqlen_k, 2, 16), (2, seqlen_k, 2, 24)
    return [torch.randn(s, dtype=torch.float64, generator=generator) for s in shapes]


@pytest.mark.parametrize("num_blocks", [0, 1, 2, 3, 9])
@pytest.mark.parametrize("num_consumers", [1, 2, 3])
@pytest.mark.parametrize("stages", [2, 3])
def test_every_event_happens_once(num_blocks, num_consumers, stages):
    positions = _positions(schedule(num_blocks, num_consumers, stages))
    for n in range(num_blocks):
        assert Event(LOAD, "load_k", n) in positions
        assert Event(LOAD, "load_v", n) in positions
        for w in range(num_consumers):
            assert Event(w, "softmax", n) in positions
            assert Event(w, "await_pv", n) in positions


def test_softmax_runs_beside_the_product_before_it():
    """The overlap inside a warpgroup (section 3.2): O += P V(n−1) is in flight all along."""
    order = consumer_events(0, 6)
    positions = _positions(order)
    for n in range(1, 6):
        issued, awaited = (
            positions[Event(0, action, n - 1)] for action in ("issue_pv", "await_pv")
        )
        assert issued < positions[Event(0, "softmax", n)] < awaited
        assert awaited < positions[Event(0, "rescale_o", n)] < positions[Event(0, "keep_p", n)]


def test_consumers_issue_in_turns():
    """The ping-pong between warpgroups (section 3.1): 0, 1, 2, 0, 1, 2, …"""
    turns = [e for e in schedule(5, 3, 2) if e.action == "take_turn"]
    assert [e.actor for e in turns] == [0, 1, 2] * 6
    assert [e.use for e in turns] == [turn for turn in range(6) for _ in range(3)]


def test_a_slot_is_filled_again_only_when_all_are_done_with_it():
    order = schedule(8, 2, 2)
    positions = _positions(order)
    for n in range(2, 8):
        for w in range(2):
            assert positions[Event(w, "await_qk", n - 2)] < positions[Event(LOAD, "load_k", n)]
            assert positions[Event(w, "await_pv", n - 2)] < positions[Event(LOAD, "load_v", n)]


@pytest.mark.parametrize("num_consumers", [1, 2, 3])
@pytest.mark.parametrize("stages", [1, 2, 4])
def test_equals_dense(num_consumers, stages):
    q, k, v = _inputs(50, 70)
    how = {"tile_m": 24, "tile_n": 10, "num_consumers": num_consumers, "stages": stages}
    out, lse = fa3.forward(q, k, v, causal=True, **how)
    expected, expected_lse = dense.attention(q, k, v, causal=True)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-12, atol=1e-12)


def _swapped(order: list[Event], first: str, second: str) -> list[Event]:
    """``order`` with every ``first`` of a use moved right before the ``second`` before it."""
    order = list(order)
    for event in [e for e in order if e.action == first and e.use > 0]:
        order.remove(event)
        order.insert(order.index(Event(event.actor, second, event.use - 1)), event)
    return order


def test_p_must_not_be_overwritten_while_it_is_multiplied(monkeypatch):
    """Products are as late as they may be: a schedule that keeps P too early is wrong here."""
    q, k, v = _inputs(20, 60)
    monkeypatch.setattr(fa3, "schedule", lambda *a: _swapped(schedule(*a), "keep_p", "await_pv"))
    out, _ = fa3.forward(q, k, v, tile_m=20, tile_n=10)
    expected, _ = dense.attention(q, k, v)
    assert (out - expected).abs().max() > 1e-3


def test_a_slot_must_not_be_overwritten_while_it_is_multiplied(monkeypatch):
    q, k, v = _inputs(20, 60)

    def early_loads(*arguments):
        order = schedule(*arguments)
        loads = [e for e in order if e.actor == LOAD]
        return loads + [e for e in order if e.actor != LOAD]

    monkeypatch.setattr(fa3, "schedule", early_loads)
    with pytest.raises(RuntimeError, match="the slot of block 0 holds"):
        fa3.forward(q, k, v, tile_m=20, tile_n=10)
