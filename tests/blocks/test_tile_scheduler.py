"""The tile schedule on the device, against ``reference.schedule`` and all tiles that there are."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import ClassVar

import cutlass
import pytest
import torch
from cutlass import cute
from cutlass.cute.runtime import make_fake_compact_tensor, make_fake_stream

from cute_fa import sim
from cute_fa.blocks.plan import TmaForwardPlan
from cute_fa.blocks.seqlen import Window
from cute_fa.blocks.tile_scheduler import TileSchedule, WorkTile, for_each_tile, tile_schedule
from cute_fa.problem import AttentionProblem
from cute_fa.reference.schedule import Schedule, break_even, dense_schedule, packed_schedule
from cute_fa.reference.schedule import single as one_tile_each
from cute_fa.target import get_target

HEAD_DIM, ROUNDS = 64, 250


@dataclass(frozen=True, kw_only=True)
class Plan(TmaForwardPlan):
    """Tiles as FA3 has them, three boxes high unless said otherwise."""

    rung: ClassVar[str] = "FA9"
    box_rows: ClassVar[int] = 64

    dtype: str = "float16"
    head_dim: int = HEAD_DIM
    head_dim_v: int = HEAD_DIM
    is_causal: bool = True
    is_persistent: bool = True
    boxes: int = 3

    @property
    def tile_m(self) -> int:
        return self.box_rows * self.boxes


class Listing:
    """A kernel that writes (row tile, head, sequence) of the n-th tile of each CTA."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    @cute.jit
    def __call__(self, mQ: cute.Tensor, mK: cute.Tensor, mOut: cute.Tensor, stream, *lengths):
        plan = self.plan
        zero = cutlass.Int32(0)
        schedule = tile_schedule(plan, mQ, mK, Window.of(plan, zero, zero), lengths)
        self.kernel(schedule, mOut).launch(grid=schedule.grid, block=[32, 1, 1], stream=stream)

    @cute.kernel
    def kernel(self, schedule: TileSchedule, mOut: cute.Tensor):
        cta, _, _ = cute.arch.block_idx()

        def note(work: WorkTile, n: cutlass.Int32) -> cutlass.Int32:
            return _note(mOut, cta, work, n)

        for_each_tile(schedule, note, cutlass.Int32(0))


@cute.jit
def _note(mOut: cute.Tensor, cta: cutlass.Int32, work: WorkTile, n: cutlass.Int32) -> cutlass.Int32:
    if cute.arch.lane_idx() == 0:
        mOut[cta, n, 0] = work.m_block
        mOut[cta, n, 1] = work.head
        mOut[cta, n, 2] = work.batch
    return n + 1


@cache
def _program(plan: Plan):
    def int32(*shape):
        order = tuple(reversed(range(len(shape))))
        return make_fake_compact_tensor(cutlass.Int32, shape, stride_order=order)

    def tensor():
        outer = () if plan.is_varlen else (cute.sym_int(),)
        shape = (*outer, cute.sym_int(), cute.sym_int(), HEAD_DIM)
        order = tuple(reversed(range(len(shape))))
        return make_fake_compact_tensor(cutlass.Float16, shape, stride_order=order)

    borders = cute.sym_int()
    lengths = (int32(borders), int32(borders), None, None, cutlass.Int32(0))
    return sim.Device("sm_90a", workers=1).compile(
        Listing(plan),
        *(tensor(), tensor(), int32(cute.sym_int(), ROUNDS, 3)),
        make_fake_stream(use_tvm_ffi_env_stream=True),
        *(lengths if plan.is_varlen else ()),
        options="--enable-tvm-ffi",
    )


def _device_lists(plan: Plan, sms: int, q, k, *lengths) -> list[list[tuple[int, ...]]]:
    """Of each CTA, (sequence, head, row tile) of its tiles, in order."""
    device = sim.Device(replace(get_target("sm_90a"), sm_count=sms), workers=1)
    out = torch.full((700, ROUNDS, 3), -1, dtype=torch.int32)
    program = _program(plan)
    device.bind(program.compiled, program.ptx)(q, k, out, *lengths)
    (launch,) = device.launches
    rows = out[: launch.grid[0]].tolist()
    return [[tuple(reversed(tile)) for tile in cta if tile[0] >= 0] for cta in rows]


def _expected(schedule: Schedule) -> list[list[tuple[int, ...]]]:
    return [
        [(tile.batch, tile.head, tile.m_block) for tile in schedule.of_cta(cta)]
        for cta in range(schedule.num_ctas)
    ]


# batch, queries, keys, heads, heads of K/V. Ragged ends; one tile; sections that do not divide the
# heads (32 MiB hold 2, 6 or 13 heads of these keys), with groups of 1 and 4.
DENSE = [
    (2, 1000, 1000, 3, 1),
    (1, 1, 5, 1, 1),
    (1, 700, 60_000, 7, 7),
    (3, 500, 20_000, 12, 3),
    (2, 300, 10_000, 9, 9),
]


@pytest.mark.parametrize("shape", DENSE, ids=str)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("sms", [2, 5])
def test_dense(shape, causal, sms):
    batch, seqlen_q, seqlen_k, heads_q, heads_k = shape
    problem = AttentionProblem(
        *(batch, seqlen_q, seqlen_k, heads_q, heads_k, HEAD_DIM, HEAD_DIM, "float16"), causal=causal
    )
    plan = Plan(is_causal=causal)
    q = torch.empty(batch, seqlen_q, heads_q, HEAD_DIM, dtype=torch.float16)
    k = torch.empty(batch, seqlen_k, heads_k, HEAD_DIM, dtype=torch.float16)
    schedule = dense_schedule(problem, plan, sms)
    got = _device_lists(plan, sms, q, k)
    assert got == _expected(schedule)
    tiles = [tile for cta in got for tile in cta]
    count = batch * heads_q * -(-seqlen_q // plan.tile_m)
    assert len(set(tiles)) == len(tiles) == count


def test_dense_single():
    """Without persistence CTA n has entry n, the longest tiles first."""
    q, k = (torch.empty(2, s, 3, HEAD_DIM, dtype=torch.float16) for s in (700, 900))
    got = _device_lists(Plan(is_persistent=False), 2, q, k)
    assert [len(cta) for cta in got] == [1] * 24
    assert [cta[0][2] for cta in got] == [3] * 6 + [2] * 6 + [1] * 6 + [0] * 6


PACKED = {
    "few": (500, 0, 1, 193),
    "many": tuple(n * 37 % 400 for n in range(75)),
    "empty in front": (0,) * 40 + (300, 5),
    "one long": (3000, 1),
    "none": (0, 0),
}


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("is_persistent", [True, False])
def test_packed_sequences(name, group, is_persistent):
    """75 sequences are more than two warps' worth; what lies beyond the list is nobody's."""
    lengths, heads = PACKED[name], 4
    plan = Plan(is_varlen=True, packed_group=group, is_persistent=is_persistent)
    base = AttentionProblem(1, 1, 7, heads, 1, HEAD_DIM, HEAD_DIM, "float16", causal=True)
    problems = [replace(base, seqlen_q=length) for length in lengths]
    total, longest = sum(lengths), max(max(lengths), 1)
    schedule = packed_schedule(problems, total, longest, plan, 3)
    borders = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    q = torch.empty(total, heads, HEAD_DIM, dtype=torch.float16)
    k = torch.empty(7, 1, HEAD_DIM, dtype=torch.float16)
    got = _device_lists(plan, 3, q, k, borders, borders, None, None, longest)
    if is_persistent:
        assert got == _expected(schedule)
    tiles = [tile for cta in got for tile in cta]
    assert tiles == [t for cta in _expected(schedule) for t in cta] or not is_persistent
    assert len(set(tiles)) == len(tiles) == len(schedule.tiles)


def test_many_heads_of_one_key():
    """L2 would hold 2^17 such K and V; times 2^14 heads of Q each, that is 2^31."""
    heads, sms = 1 << 14, 132
    problem = AttentionProblem(
        *(1, 1, 1, heads, 1, HEAD_DIM, HEAD_DIM, "float16"),
        causal=True,
    )
    q, k = (torch.empty(1, 1, h, HEAD_DIM, dtype=torch.float16) for h in (heads, 1))
    got = _device_lists(Plan(), sms, q, k)
    assert got == _expected(dense_schedule(problem, Plan(), sms))
    assert len(got) == sms and sum(map(len, got)) == heads


def test_the_bound_on_packed_lengths_may_be_large():
    """As many sequences of the longest length as there are would have 2.2e9 tiles."""
    count, length, longest, sms = 207, 5, 2_000_000_000, 3
    plan = Plan(is_varlen=True)
    base = AttentionProblem(1, length, 7, 1, 1, HEAD_DIM, HEAD_DIM, "float16", causal=True)
    schedule = packed_schedule([base] * count, count * length, longest, plan, sms)
    borders = torch.arange(0, count * length + 1, length, dtype=torch.int32)
    q = torch.empty(count * length, 1, HEAD_DIM, dtype=torch.float16)
    k = torch.empty(7, 1, HEAD_DIM, dtype=torch.float16)
    got = _device_lists(plan, sms, q, k, borders, borders, None, None, longest)
    assert got == _expected(schedule)
    assert sum(map(len, got)) == count


# -- what schedules cost: the figures of FA3's README

SHAPES = [(512, 32), (1024, 16), (2048, 8), (4096, 4), (8192, 2), (16384, 1)]


@pytest.mark.parametrize(("seqlen", "batch"), SHAPES)
def test_persistence_under_a_causal_mask_pays_if_a_start_costs_half_a_block(seqlen, batch):
    """16k tokens, 16 heads of 128, 132 SMs: to and fro over one list, or in pairs, loses at most
    3.1 % of balance, which the starts that overlap outweigh at half a block each or less."""
    problem = AttentionProblem(batch, seqlen, seqlen, 16, 16, 128, 128, "float16", causal=True)
    schedule = dense_schedule(problem, Plan(boxes=2), 132)
    assert schedule.makespan() <= 1.032 * schedule.ideal
    assert break_even(schedule) <= 0.6
    assert one_tile_each(schedule).makespan() >= schedule.ideal


def test_tiles_of_one_length_lose_nothing():
    """Without a mask both schedules take as many rounds; a persistent one has one start per SM."""
    problem = AttentionProblem(8, 2048, 2048, 16, 16, 128, 128, "float16")
    schedule = dense_schedule(problem, Plan(is_causal=False, boxes=2, tile_n=176), 132)
    assert schedule.makespan() == one_tile_each(schedule).makespan()
    assert break_even(schedule) == 0.0
