"""Block ranges and masks against what a row sees by definition, in small kernels of their own."""

from __future__ import annotations

import random
from functools import cache

import cutlass
import pytest
import torch
from cutlass import cute
from cutlass.cute.runtime import make_fake_compact_tensor

from cute_fa import sim
from cute_fa.blocks.block_range import key_blocks
from cute_fa.blocks.mask import mask_scores
from cute_fa.blocks.mma import tiled_mma_rows
from cute_fa.blocks.seqlen import Band, SeqlenInfo, clamp_window
from cute_fa.problem import AttentionProblem

TILE_M, TILE_N = 32, 16
FEATURES = {
    "none": (False, False),
    "causal": (False, True),
    "left": (True, False),
    "both": (True, True),
}


def _band(case: cute.Tensor, has_left: bool, has_right: bool) -> Band:
    """The band of one case, (m_block, Sq, Sk, left, right)."""
    seqlen = SeqlenInfo(case[1], case[2])
    left = clamp_window(case[3], seqlen) if has_left else None
    right = clamp_window(case[4], seqlen) if has_right else None
    return Band(seqlen, left, right, is_within_k=False)


@cute.kernel
def ranges_kernel(
    cases: cute.Tensor, out: cute.Tensor, left: cutlass.Constexpr, right: cutlass.Constexpr
):
    """out[i] = the block range of cases[i], one thread each."""
    index, _, _ = cute.arch.thread_idx()
    case = cases[index, None]
    blocks = key_blocks(_band(case, left, right), case[0], TILE_M, TILE_N)
    out[index, 0] = blocks.n_start
    out[index, 1] = blocks.n_full_start
    out[index, 2] = blocks.n_full_stop
    out[index, 3] = blocks.n_stop


@cute.jit
def ranges(cases: cute.Tensor, out: cute.Tensor, left: cutlass.Constexpr, right: cutlass.Constexpr):
    ranges_kernel(cases, out, left, right).launch(grid=[1, 1, 1], block=[cases.shape[0], 1, 1])


@cute.kernel
def mask_kernel(
    cases: cute.Tensor, out: cute.Tensor, left: cutlass.Constexpr, right: cutlass.Constexpr
):
    """out[i, n] = tile (m_block, n) of zeros after masking, by a CTA of two warps."""
    tidx, _, _ = cute.arch.thread_idx()
    index, n_block, _ = cute.arch.block_idx()
    case = cases[index, None]
    thr_mma = tiled_mma_rows(cutlass.Float16, 2).get_slice(tidx)
    tScS = thr_mma.partition_C(cute.make_identity_tensor((TILE_M, TILE_N)))
    acc_S = cute.make_rmem_tensor(tScS.shape, cutlass.Float32)
    acc_S.fill(0.0)
    row, column = tScS[0]
    mask_scores(
        acc_S, _band(case, left, right), case[0] * TILE_M + row, n_block * TILE_N + column, 2
    )
    cute.autovec_copy(acc_S, thr_mma.partition_C(out[index, n_block, None, None]))


@cute.jit
def masks(cases: cute.Tensor, out: cute.Tensor, left: cutlass.Constexpr, right: cutlass.Constexpr):
    mask_kernel(cases, out, left, right).launch(
        grid=[cases.shape[0], out.shape[1], 1], block=[64, 1, 1]
    )


def _cases(count: int, has_right: bool) -> list[AttentionProblem]:
    rng = random.Random(7)
    bounds = [0, 1, 5, 15, 16, 33, 200, 2**31 - 1]
    problems = []
    for _ in range(count):
        left, right = rng.choice(bounds), rng.choice(bounds)
        lengths = rng.randint(1, 100), rng.randint(0, 100)
        problems.append((*lengths, left, right if has_right else 0))
    return problems


def _sees(case: tuple[int, ...], has_left: bool, has_right: bool) -> list[tuple[int, int]]:
    """Half-open column range of every row below Sq."""
    seqlen_q, seqlen_k, left, right = case
    problem = AttentionProblem(
        *(1, seqlen_q, seqlen_k, 1, 1, 8, 8, "float16"),
        window_left=left if has_left else None,
        window_right=right if has_right else None,
    )
    return [problem.visible_columns(row) for row in range(seqlen_q)]


@cache
def _run(name: str, function, out_shape: tuple[int, ...], dtype) -> tuple[torch.Tensor, list]:
    has_left, has_right = FEATURES[name]
    cases = []
    for case in _cases(out_shape[0], has_right):
        m_block = random.Random(sum(case)).randrange(-(-case[0] // TILE_M))
        cases.append((m_block, *case))
    table = torch.tensor(cases, dtype=torch.int64).clamp(max=2**31 - 1).to(torch.int32)
    out = torch.zeros(out_shape, dtype=dtype)
    device = sim.Device("sm_80", workers=1)

    def fake(x: torch.Tensor):
        element = cutlass.Int32 if x.dtype == torch.int32 else cutlass.Float32
        order = tuple(reversed(range(x.dim())))
        return make_fake_compact_tensor(element, tuple(x.shape), stride_order=order)

    program = device.compile(
        function, fake(table), fake(out), has_left, has_right, options="--enable-tvm-ffi"
    )
    program(table, out)
    return out, cases


@pytest.mark.parametrize("name", FEATURES)
def test_key_blocks(name):
    """Blocks outside the range hide every score, and those called full hide none."""
    out, cases = _run(name, ranges, (128, 4), torch.int32)
    for (m_block, *case), (start, full_start, full_stop, stop) in zip(
        cases, out.tolist(), strict=True
    ):
        sees = _sees(tuple(case), *FEATURES[name])[m_block * TILE_M : (m_block + 1) * TILE_M]
        assert 0 <= start <= full_start <= full_stop <= stop
        for lo, hi in sees:
            if lo < hi:
                assert start * TILE_N <= lo and hi <= stop * TILE_N
            if full_start < full_stop:
                assert lo <= full_start * TILE_N and full_stop * TILE_N <= hi
        widest = max((hi for lo, hi in sees if lo < hi), default=0)
        assert stop <= -(-max(widest, start * TILE_N) // TILE_N), "a block that no row sees"


@pytest.mark.parametrize("name", FEATURES)
def test_mask_scores(name):
    """−inf exactly where the row does not look, 0 elsewhere, over whole rows of blocks."""
    out, cases = _run(name, masks, (24, 7, TILE_M, TILE_N), torch.float32)
    for (m_block, *case), tiles in zip(cases, out, strict=True):
        rows = tiles.permute(1, 0, 2).reshape(TILE_M, -1)  # (M, 7·N)
        sees = _sees(tuple(case), *FEATURES[name])[m_block * TILE_M : (m_block + 1) * TILE_M]
        for row, (lo, hi) in zip(rows, sees, strict=False):
            expected = torch.full_like(row, float("-inf"))
            expected[lo:hi] = 0.0
            assert torch.equal(row, expected), (m_block, case)
