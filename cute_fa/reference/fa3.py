"""FlashAttention-3 (2024), sections 3.1 and 3.2, in plain PyTorch: FA2's loop, run asynchronously.

The arithmetic is FA2's. What is new is who does it when, and that is written out here as a list of
events, which ``forward`` then obeys:

    LOAD fills rings of K and V blocks, as deep as ``stages``, ahead of the consumers.
    Each consumer owns a strip of the tile's rows. It *issues* products, which run by themselves,
    and *awaits* them later: while O += P V of one block runs, it takes the softmax of the next.
    Consumers issue in turns, so that one's softmax runs beside another's products.

A product here is computed when it is awaited, from what its operands hold *then*: the latest moment
that the hardware may choose. A schedule that overwrites P, or a ring slot, too early gives a wrong
result, not a lucky one. Use n of the rings is the n-th block from the right.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from cute_fa.reference.events import interleave
from cute_fa.reference.operands import Operands, attention_by

NEG_INF = float("-inf")
LOAD = -1


@dataclass(frozen=True)
class Event:
    """One step of one role.

    Attributes:
        actor: LOAD, or the number of a consumer.
        action: what it does; the methods of ``_Tile`` have these names.
        use: the block that it does it to, counted from the right.
    """

    actor: int
    action: str
    use: int


def load_events(num_blocks: int) -> list[Event]:
    """LOAD's program: K one block ahead of V, the order in which they are needed."""
    if num_blocks == 0:
        return []
    events = [Event(LOAD, "load_k", 0)]
    for n in range(1, num_blocks):
        events += [Event(LOAD, "load_k", n), Event(LOAD, "load_v", n - 1)]
    return [*events, Event(LOAD, "load_v", num_blocks - 1)]


def consumer_events(consumer: int, num_blocks: int) -> list[Event]:
    """A consumer's program; "issue_…" and "await_…" of one product enclose what overlaps it."""
    if num_blocks == 0:
        return []
    steps = [("take_turn", 0), ("issue_qk", 0), ("pass_turn", 0), ("await_qk", 0), ("softmax", 0)]
    steps += [("keep_p", 0)]
    for n in range(1, num_blocks):
        steps += [("take_turn", n), ("issue_qk", n), ("issue_pv", n - 1), ("pass_turn", n)]
        steps += [("await_qk", n), ("softmax", n)]
        steps += [("await_pv", n - 1), ("rescale_o", n), ("keep_p", n)]
    last = num_blocks - 1
    steps += [("take_turn", num_blocks), ("issue_pv", last), ("pass_turn", num_blocks)]
    steps += [("await_pv", last)]
    return [Event(consumer, action, use) for action, use in steps]


def schedule(num_blocks: int, num_consumers: int, stages: int) -> list[Event]:
    """One legal order of everybody's events: round robin, each waiting for what it must.

    LOAD waits for a free slot, consumers for a loaded block and for their turn.

    Raises:
        RuntimeError: nobody can go on.
    """
    programs: dict[object, deque[Event]] = {LOAD: deque(load_events(num_blocks))}
    programs |= {w: deque(consumer_events(w, num_blocks)) for w in range(num_consumers)}

    def released(action: str, use: int, done: set[Event]) -> bool:
        return all(Event(w, action, use) in done for w in range(num_consumers))

    def may_run(event: Event, done: set[Event]) -> bool:
        use, actor = event.use, event.actor
        if event.action == "load_k":
            return use < stages or released("await_qk", use - stages, done)
        if event.action == "load_v":
            return use < stages or released("await_pv", use - stages, done)
        if event.action == "issue_qk":
            return Event(LOAD, "load_k", use) in done
        if event.action == "issue_pv":
            return Event(LOAD, "load_v", use) in done
        if event.action == "take_turn":
            before = Event(actor - 1, "pass_turn", use)
            if actor == 0:
                before = Event(num_consumers - 1, "pass_turn", use - 1)
            return before in done or (actor == 0 and use == 0)
        return True

    return interleave(programs, may_run)


class _Tile:
    """The state of one row tile: rings, and per consumer the strip, its registers, its products."""

    def __init__(self, problem: _Problem, rows: slice, blocks: list[slice], stages: int) -> None:
        self.problem, self.blocks, self.stages = problem, blocks, stages
        self.ring_k: list[tuple[int, Tensor] | None] = [None] * stages
        self.ring_v: list[tuple[int, Tensor] | None] = [None] * stages
        self.strips = [_Strip(problem, strip) for strip in problem.strips(rows)]

    def run(self, event: Event) -> None:
        getattr(self, event.action)(event.actor, event.use)

    def load_k(self, _: int, use: int) -> None:
        self.ring_k[use % self.stages] = (use, self.problem.k[:, :, self.blocks[use]])

    def load_v(self, _: int, use: int) -> None:
        self.ring_v[use % self.stages] = (use, self.problem.v[:, :, self.blocks[use]])

    def take_turn(self, consumer: int, use: int) -> None:
        pass

    def pass_turn(self, consumer: int, use: int) -> None:
        pass

    def issue_qk(self, consumer: int, use: int) -> None:
        # S = Q Kᵀ   (M, N) = (M, D) @ (D, N)
        strip = self.strips[consumer]
        strip.qk = lambda: strip.q @ _held(self.ring_k, use).mT

    def await_qk(self, consumer: int, use: int) -> None:
        strip = self.strips[consumer]
        strip.s, strip.qk = strip.qk(), _not_issued

    def softmax(self, consumer: int, use: int) -> None:
        self.strips[consumer].softmax(self.blocks[use])

    def keep_p(self, consumer: int, use: int) -> None:
        strip = self.strips[consumer]
        strip.p = strip.s.to(self.problem.p_dtype).to(strip.s.dtype)

    def issue_pv(self, consumer: int, use: int) -> None:
        # O += P V   (M, Dv) = (M, N) @ (N, Dv)
        strip = self.strips[consumer]
        strip.pv = lambda: strip.acc_o + strip.p @ _held(self.ring_v, use)

    def await_pv(self, consumer: int, use: int) -> None:
        strip = self.strips[consumer]
        strip.acc_o, strip.pv = strip.pv(), _not_issued

    def rescale_o(self, consumer: int, use: int) -> None:
        strip = self.strips[consumer]
        strip.acc_o = strip.rescale[..., None] * strip.acc_o


def _held(ring: list[tuple[int, Tensor] | None], use: int) -> Tensor:
    """What the slot of ``use`` holds now; it must still be that block."""
    held = ring[use % len(ring)]
    if held is None or held[0] != use:
        raise RuntimeError(f"the slot of block {use} holds {held and held[0]}")
    return held[1]


def _not_issued() -> Tensor:
    raise RuntimeError("a product is awaited that was not issued")


class _Problem:
    """Inputs by head, and what every strip needs of them."""

    def __init__(self, operands: Operands, num_consumers: int) -> None:
        self.q, self.k, self.v, self.scale, self.softcap, self.visible, self.p_dtype = operands
        self.num_consumers = num_consumers

    def score(self, s: Tensor) -> Tensor:
        """Scores of raw products."""
        if self.softcap > 0.0:
            return self.softcap * torch.tanh(self.scale * s / self.softcap)
        return self.scale * s

    def strips(self, rows: slice) -> list[slice]:
        """``rows`` in as many runs as there are consumers; the last may be short or empty."""
        height = -(-(rows.stop - rows.start) // self.num_consumers)
        starts = [min(rows.start + w * height, rows.stop) for w in range(self.num_consumers + 1)]
        return [slice(a, b) for a, b in pairwise(starts)]


class _Strip:
    """One consumer's registers: S, P, O, m, l and the products in flight."""

    def __init__(self, problem: _Problem, rows: slice) -> None:
        self.problem, self.rows = problem, rows
        self.q = problem.q[:, :, rows]  # (B, Hq, M, D)
        self.acc_o = self.q.new_zeros(*self.q.shape[:-1], problem.v.shape[-1])  # (B, Hq, M, Dv)
        self.row_max = self.q.new_full(self.q.shape[:-1], NEG_INF)  # (B, Hq, M)
        self.row_sum = self.q.new_zeros(self.q.shape[:-1])  # (B, Hq, M)
        self.s = self.p = self.rescale = self.q.new_empty(0)
        self.qk: Callable[[], Tensor] = _not_issued
        self.pv: Callable[[], Tensor] = _not_issued

    def softmax(self, columns: slice) -> None:
        """S ← P;  m' = max(m, rowmax S), l' = e^(m − m') l + rowsum P; O's factor is kept."""
        seen = self.problem.visible[self.rows, columns]  # (M, N)
        scores = self.problem.score(self.s).masked_fill(~seen, NEG_INF)
        new_max = torch.maximum(self.row_max, scores.amax(dim=-1))
        anchor = torch.where(new_max == NEG_INF, 0.0, new_max)  # −inf − (−inf) is no number
        self.rescale = torch.exp(self.row_max - anchor)
        self.s = torch.exp(scores - anchor[..., None])
        self.row_sum = self.rescale * self.row_sum + self.s.sum(dim=-1)
        self.row_max = new_max

    def finish(self, out: Tensor, lse: Tensor) -> None:
        """O / l and m + ln l into this strip's rows of ``out`` and ``lse``."""
        inverse = torch.where(self.row_sum == 0.0, 1.0, 1.0 / self.row_sum)
        out[:, :, self.rows] = inverse[..., None] * self.acc_o
        lse[:, :, self.rows] = self.row_max + torch.log(self.row_sum)  # −inf − inf: nothing seen


@attention_by
def forward(
    operands: Operands,
    *,
    tile_m: int = 128,
    tile_n: int = 128,
    num_consumers: int = 2,
    stages: int = 2,
) -> tuple[Tensor, Tensor]:
    """Attention and its log-sum-exp by FA3's schedule.

    Args:
        num_consumers: strips that a row tile is cut into.
        stages: depth of the K ring and of the V ring.
    """
    visible = operands.visible
    seqlen_q, seqlen_k = visible.shape
    problem = _Problem(operands, num_consumers)
    out = problem.q.new_empty(*problem.q.shape[:-1], problem.v.shape[-1])  # (B, Hq, Sq, Dv)
    lse = problem.q.new_empty(problem.q.shape[:-1])  # (B, Hq, Sq)
    for m_start in range(0, seqlen_q, tile_m):
        rows = slice(m_start, min(m_start + tile_m, seqlen_q))
        columns = [slice(n, n + tile_n) for n in reversed(range(0, seqlen_k, tile_n))]
        blocks = [block for block in columns if visible[rows, block].any()]
        tile = _Tile(problem, rows, blocks, stages)
        for event in schedule(len(blocks), num_consumers, stages):
            tile.run(event)
        for strip in tile.strips:
            strip.finish(out, lse)
    return out, lse
