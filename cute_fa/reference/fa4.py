"""FlashAttention-4 (2026), forward, in plain PyTorch: roles of warps around one tensor memory.

Over FA3 there are four changes, and they are written out here as the kernel has them:

    Roles       MMA alone issues products; SOFTMAX turns S into P; CORRECTION rescales O. Two Q
                tiles are in flight, so that one's softmax runs beside the other's products.
    Tensor      S, P and O live there. P lies in the upper half of its S: whoever reads S after P
    memory      was written, or P after the next S, reads rubbish.
    Exponent    Some of the exponentials are a cubic on the FMA pipe (``cute_fa.exp2``).
    Threshold   What is subtracted from exponents follows a row's maximum only when that has grown
                by more than ``rescale_threshold`` in log2 units; else O needs no rescaling.

As in ``fa3`` a schedule is a list of events, which ``forward`` obeys. A product is computed when
its result is awaited, from what its operands hold *then*, after those issued before it: the latest
that the tensor core may do it. Block j is the j-th from the right.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cute_fa.exp2 import (
    CHUNK_COLUMNS,
    COEFFICIENTS,
    MANTISSA_BITS,
    MIN_EXPONENT,
    polynomial_pairs,
)
from cute_fa.reference.events import interleave
from cute_fa.reference.operands import Operands, attention_by

NEG_INF = float("-inf")
LOG2_E = math.log2(math.e)
S_BUFFERS = 2

LOAD, MMA, SOFTMAX, CORRECTION = "load", "mma", "softmax", "correction"


@dataclass(frozen=True)
class Event:
    """One step of one role.

    Attributes:
        role: LOAD, MMA, SOFTMAX or CORRECTION; there is one SOFTMAX per Q tile.
        action: what it does; the methods of ``_Tile`` have these names.
        q_tile: the Q tile that it does it to; 0 for K and V.
        block: and the block.
    """

    role: str
    action: str
    q_tile: int
    block: int


def programs(num_blocks: int, num_q_tiles: int) -> dict[object, deque[Event]]:
    """What each role does, in its order; MMA is one round of S buffers ahead with S = QKᵀ."""
    ahead = S_BUFFERS // num_q_tiles
    q_tiles, blocks = range(num_q_tiles), range(num_blocks)
    load, mma, correction = [], [], []
    for j in range(-ahead, num_blocks):
        if j >= 0:
            load.append(Event(LOAD, "load_v", 0, j))
        if 0 <= j + ahead < num_blocks:
            load.append(Event(LOAD, "load_k", 0, j + ahead))
        for i in q_tiles:
            if j >= 0:
                mma.append(Event(MMA, "issue_pv", i, j))
            if 0 <= j + ahead < num_blocks:
                mma.append(Event(MMA, "issue_qk", i, j + ahead))
            if j >= 0:
                correction.append(Event(CORRECTION, "rescale_o", i, j))
    roles: dict[object, deque[Event]] = {
        LOAD: deque(load),
        MMA: deque(mma),
        CORRECTION: deque(correction),
    }
    for i in q_tiles:
        roles[SOFTMAX, i] = deque(Event(SOFTMAX, "softmax", i, j) for j in blocks)
    return roles


def schedule(num_blocks: int, num_q_tiles: int, stages: int) -> list[Event]:
    """One legal order of everybody's events: round robin, each waiting for what it must.

    Raises:
        RuntimeError: nobody can go on.
    """
    roles = programs(num_blocks, num_q_tiles)
    loads = list(roles[LOAD])
    slots = {event: n for n, event in enumerate(loads)}
    last = num_q_tiles - 1

    def is_released(load: Event, done: set[Event]) -> bool:
        """The last product with that block has been awaited: by the next role that needs it."""
        if load.action == "load_k":
            return Event(SOFTMAX, "softmax", last, load.block) in done
        following = Event(CORRECTION, "rescale_o", last, load.block + 1)
        return following in done or load.block == num_blocks - 1

    def may_run(event: Event, done: set[Event]) -> bool:
        i, j = event.q_tile, event.block
        if event.role == LOAD:
            n = slots[event]
            return n < stages or is_released(loads[n - stages], done)
        if event.action == "issue_qk":
            return Event(LOAD, "load_k", 0, j) in done
        if event.action == "issue_pv":
            has_p = Event(SOFTMAX, "softmax", i, j) in done
            has_o = Event(CORRECTION, "rescale_o", i, j) in done
            return has_p and has_o and Event(LOAD, "load_v", 0, j) in done
        if event.action == "softmax":
            return Event(MMA, "issue_qk", i, j) in done
        has_factor = j == 0 or Event(SOFTMAX, "softmax", i, j) in done
        return has_factor and (j == 0 or Event(MMA, "issue_pv", i, j - 1) in done)

    return interleave(roles, may_run)


@dataclass
class RescaleCounts:
    """How often O had to be rescaled; ``forward`` adds to it.

    Attributes:
        rows: pairs of a row and a block after its first.
        rescaled_rows: those whose factor was not 1.
        warps: pairs of 32 rows, which a warp holds, and a block after their first.
        rescaled_warps: those with a factor that was not 1: what the kernel does.
    """

    rows: int = 0
    rescaled_rows: int = 0
    warps: int = 0
    rescaled_warps: int = 0

    def add(self, factors: Tensor) -> None:
        """One block's factors (B, Hq, M)."""
        changed = factors != 1.0
        self.rows += changed.numel()
        self.rescaled_rows += int(changed.sum())
        for start in range(0, changed.shape[-1], 32):
            of_warp = changed[..., start : start + 32].any(dim=-1)
            self.warps += of_warp.numel()
            self.rescaled_warps += int(of_warp.sum())


def exp2_cubic(x: Tensor) -> Tensor:
    """2ˣ of fp32 numbers as the kernel's FMA pipe computes it, bit for bit.

    An fp32 fma is a product and a sum in fp64, rounded once more at the end.
    """
    x = x.clamp_min(MIN_EXPONENT)
    exponent = torch.round(x)  # to even, as the addition of 1.5·2²³ does
    fraction = x - exponent
    power = torch.full_like(x, COEFFICIENTS[-1])
    for coefficient in reversed(COEFFICIENTS[:-1]):
        constant = torch.tensor(coefficient, dtype=x.dtype).double()
        power = (power.double() * fraction.double() + constant).to(x.dtype)
    bits = power.view(torch.int32) + (exponent.to(torch.int32) << MANTISSA_BITS)
    return bits.view(torch.float32)


def is_cubic(num_columns: int, pairs_per_chunk: int) -> Tensor:
    """(N,) bool: the columns of a block whose exponentials are ``exp2_cubic``."""
    num_chunks = num_columns // CHUNK_COLUMNS
    columns = torch.zeros(num_columns, dtype=torch.bool)
    for chunk in range(num_chunks):
        for pair in polynomial_pairs(chunk, num_chunks, pairs_per_chunk):
            first = chunk * CHUNK_COLUMNS + 2 * pair
            columns[first : first + 2] = True
    return columns


def exp2_of_block(x: Tensor, cubic: Tensor) -> Tensor:
    """2ˣ of one block, (…, N) or fewer columns; ``cubic`` (N,) as ``is_cubic`` gives it."""
    cubic = cubic[: x.shape[-1]]
    power = torch.exp2(x)
    return torch.where(cubic, exp2_cubic(x), power) if cubic.any() else power


@dataclass(frozen=True)
class _Plan:
    """What all tiles have in common."""

    q: Tensor  # (B, Hq, Sq, D)
    k: Tensor  # (B, Hq, Sk, D)
    v: Tensor  # (B, Hq, Sk, Dv)
    visible: Tensor  # (Sq, Sk) bool
    p_dtype: torch.dtype
    scale_log2: float
    cap_factor: float | None  # of tanh's argument
    tile_n: int
    stages: int
    threshold: float
    cubic: Tensor  # (N,) bool
    counts: RescaleCounts


@dataclass
class _QTile:
    """One Q tile's rows: statistics in registers, O in tensor memory."""

    rows: slice
    q: Tensor  # (B, Hq, M, D)
    acc_o: Tensor  # (B, Hq, M, Dv)
    anchor: Tensor  # (B, Hq, M), in log2 units
    row_sum: Tensor  # (B, Hq, M)
    factor: Tensor  # (B, Hq, M), of the latest block


@dataclass
class _Tile:
    """The state of one CTA: the ring, tensor memory, and the tensor core's queue."""

    plan: _Plan
    q_tiles: list[_QTile]
    blocks: list[slice]
    ring: list[tuple[Event, Tensor] | None] = field(default_factory=list)
    buffers: list[tuple[str, int, Tensor] | None] = field(default_factory=lambda: [None] * 2)
    queue: deque[tuple[Event, int]] = field(default_factory=deque)
    loaded: int = 0

    def run(self, event: Event) -> None:
        getattr(self, event.action)(event)

    def load_k(self, event: Event) -> None:
        self._fill(event, self.plan.k[:, :, self.blocks[event.block]])

    def load_v(self, event: Event) -> None:
        self._fill(event, self.plan.v[:, :, self.blocks[event.block]])

    def _fill(self, event: Event, block: Tensor) -> None:
        """The next slot of the ring; a product that still needs what it held will miss it."""
        slot = self.loaded % self.plan.stages
        if len(self.ring) <= slot:
            self.ring.append(None)
        self.ring[slot] = (event, block)
        self.loaded += 1

    def issue_qk(self, event: Event) -> None:
        self.queue.append((event, self._slot("load_k", event.block)))

    def issue_pv(self, event: Event) -> None:
        self.queue.append((event, self._slot("load_v", event.block)))

    def _slot(self, action: str, block: int) -> int:
        wanted = Event(LOAD, action, 0, block)
        return next(n for n, held in enumerate(self.ring) if held and held[0] == wanted)

    def softmax(self, event: Event) -> None:
        """P = 2^(S·scale − anchor) over S, the factor for CORRECTION; l ← l · factor + rowsum P."""
        self._await(Event(MMA, "issue_qk", event.q_tile, event.block))
        plan, tile = self.plan, self.q_tiles[event.q_tile]
        columns = self.blocks[event.block]
        scores = self._take("S", event)
        if plan.cap_factor is not None:
            scores = torch.tanh(scores * plan.cap_factor)
        scores = scores.masked_fill(~plan.visible[tile.rows, columns], NEG_INF)
        largest = torch.maximum(tile.anchor, scores.amax(dim=-1) * plan.scale_log2)
        is_near = largest - tile.anchor <= plan.threshold  # false if nothing was or is seen
        anchor = torch.where(is_near, tile.anchor, largest)
        finite = torch.where(anchor == NEG_INF, 0.0, anchor)
        # A row that has seen nothing has nothing to rescale: its O and l are 0.
        stays = is_near | (tile.anchor == NEG_INF)
        tile.factor = torch.where(stays, 1.0, torch.exp2(tile.anchor - finite))
        # One fma: a product and a sum in fp64, rounded once.
        x = (scores.double() * plan.scale_log2 - finite[..., None].double()).to(scores.dtype)
        p = exp2_of_block(x, plan.cubic)
        tile.row_sum = tile.factor * tile.row_sum + p.sum(dim=-1)
        tile.anchor = anchor
        if event.block > 0:
            plan.counts.add(tile.factor)
        self._put("P", event, p.to(plan.p_dtype).to(p.dtype))

    def rescale_o(self, event: Event) -> None:
        tile = self.q_tiles[event.q_tile]
        if event.block > 0:
            self._await(Event(MMA, "issue_pv", event.q_tile, event.block - 1))
            tile.acc_o = tile.factor[..., None] * tile.acc_o

    def finish(self, out: Tensor, lse: Tensor) -> None:
        """O / l and (anchor + log2 l) · ln 2 of all rows."""
        while self.queue:
            self._execute(*self.queue.popleft())
        for tile in self.q_tiles:
            inverse = torch.where(tile.row_sum == 0.0, 1.0, 1.0 / tile.row_sum)
            out[:, :, tile.rows] = inverse[..., None] * tile.acc_o
            lse[:, :, tile.rows] = (tile.anchor + torch.log2(tile.row_sum)) / LOG2_E

    def _await(self, wanted: Event) -> None:
        """Let the tensor core do its work up to ``wanted``, if it has not done so already."""
        while any(event == wanted for event, _ in self.queue):
            self._execute(*self.queue.popleft())

    def _execute(self, event: Event, slot: int) -> None:
        tile = self.q_tiles[event.q_tile]
        load = "load_k" if event.action == "issue_qk" else "load_v"
        held, block = self.ring[slot] or (None, tile.q)
        if held != Event(LOAD, load, 0, event.block):
            raise RuntimeError(f"{event}: its slot of the ring holds {held}")
        if event.action == "issue_qk":
            # S = Q Kᵀ   (M, N) = (M, D) @ (D, N)
            self._put("S", event, tile.q @ block.mT)
        elif event.block == 0:
            # O = P V   (M, Dv) = (M, N) @ (N, Dv)
            tile.acc_o = self._take("P", event) @ block
        else:
            tile.acc_o = tile.acc_o + self._take("P", event) @ block

    def _buffer(self, event: Event) -> int:
        return event.q_tile if len(self.q_tiles) == S_BUFFERS else event.block % S_BUFFERS

    def _put(self, name: str, event: Event, value: Tensor) -> None:
        """S or P into its S buffer: what was there is gone."""
        self.buffers[self._buffer(event)] = (name, event.block, value)

    def _take(self, name: str, event: Event) -> Tensor:
        held = self.buffers[self._buffer(event)]
        if held is None or held[:2] != (name, event.block):
            raise RuntimeError(f"{event}: its S buffer holds {held and held[:2]}, not {name}")
        return held[2]


def _tile(plan: _Plan, rows_of_tile: slice, num_q_tiles: int, blocks: list[slice]) -> _Tile:
    """A tile whose rows are cut into Q tiles; the last may be short or empty."""
    seqlen_q = plan.q.shape[2]
    height = -(-(rows_of_tile.stop - rows_of_tile.start) // num_q_tiles)
    q_tiles = []
    for i in range(num_q_tiles):
        start = rows_of_tile.start + i * height
        rows = slice(min(start, seqlen_q), min(start + height, seqlen_q))
        q = plan.q[:, :, rows]
        shape = q.shape[:-1]
        acc_o = q.new_zeros(*shape, plan.v.shape[-1])
        anchor, row_sum, factor = q.new_full(shape, NEG_INF), q.new_zeros(shape), q.new_ones(shape)
        q_tiles.append(_QTile(rows, q, acc_o, anchor, row_sum, factor))
    return _Tile(plan, q_tiles, blocks)


@attention_by
def forward(
    operands: Operands,
    *,
    tile_m: int = 256,
    tile_n: int = 128,
    num_q_tiles: int = 2,
    stages: int = 3,
    pairs_per_chunk: int = 4,
    rescale_threshold: float = 8.0,
    counts: RescaleCounts | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention and its log-sum-exp by FA4's schedule.

    Args:
        num_q_tiles: what a tile of ``tile_m`` rows is cut into, 1 or 2.
        stages: depth of the ring that K and V share.
        pairs_per_chunk: of the 16 pairs of 32 scores, those whose exponentials are cubics; none of
            fp64 inputs, which are for exact comparisons.
        rescale_threshold: growth of a row's maximum that O is not rescaled for, in log2 units.
        counts: where to count rescales.
    """
    mQ, mK, mV, scale, softcap, visible, dtype = operands
    seqlen_q, seqlen_k = visible.shape
    # The kernel's factors are fp32; a negative scale negates Q.
    in_fp32 = torch.tensor(scale, dtype=mQ.dtype)
    magnitude = in_fp32.abs() * LOG2_E if scale != 0 else torch.tensor(2.0**-126)
    plan = _Plan(
        q=mQ * (-1.0 if scale < 0 and softcap == 0 else 1.0),
        k=mK,
        v=mV,
        visible=visible,
        p_dtype=dtype,
        scale_log2=float(magnitude) if softcap == 0 else softcap * LOG2_E,
        cap_factor=scale / softcap if softcap > 0 else None,
        tile_n=tile_n,
        stages=stages,
        threshold=rescale_threshold,
        cubic=is_cubic(tile_n, pairs_per_chunk if mQ.dtype == torch.float32 else 0),
        counts=counts or RescaleCounts(),
    )
    out = plan.q.new_empty(*plan.q.shape[:-1], mV.shape[-1])  # (B, Hq, Sq, Dv)
    lse = plan.q.new_empty(plan.q.shape[:-1])  # (B, Hq, Sq)
    for start in range(0, seqlen_q, tile_m):
        rows = slice(start, start + tile_m)
        columns = [slice(n, n + tile_n) for n in reversed(range(0, seqlen_k, tile_n))]
        blocks = [block for block in columns if visible[rows, block].any()]
        tile = _tile(plan, rows, num_q_tiles, blocks)
        for event in schedule(len(blocks), num_q_tiles, stages):
            tile.run(event)
        tile.finish(out, lse)
    return out, lse
