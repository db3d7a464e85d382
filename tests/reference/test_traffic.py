"""The HBM traffic formulas, against a count over every (row, column) and against the theory."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest

from cute_fa.problem import AttentionProblem
from cute_fa.reference.dense import visible_mask
from cute_fa.reference.traffic import fa1_hbm_traffic, fa2_hbm_traffic, fa3_hbm_traffic


@dataclass(frozen=True)
class Tiles:
    tile_m: int
    tile_n: int
    packed_group: int = 1


def _problem(seqlen_q, seqlen_k, **features) -> AttentionProblem:
    shape = {"batch": 2, "heads_q": 6, "heads_k": 3, "head_dim": 32, "head_dim_v": 64}
    return AttentionProblem(
        seqlen_q=seqlen_q, seqlen_k=seqlen_k, dtype="bfloat16", **{**shape, **features}
    )


def _visits(problem: AttentionProblem, tiles: Tiles) -> dict[int, list[int]]:
    """n_blocks by m_block that hold a visible score, looked up in the mask itself."""
    mask = visible_mask(
        problem.seqlen_q,
        problem.seqlen_k,
        causal=problem.causal,
        window_size=(problem.window_left, problem.window_right),
    )
    return {
        m // tiles.tile_m: [
            n // tiles.tile_n
            for n in range(0, problem.seqlen_k, tiles.tile_n)
            if mask[m : m + tiles.tile_m, n : n + tiles.tile_n].any()
        ]
        for m in range(0, problem.seqlen_q, tiles.tile_m)
    }


MASKS = [
    {},
    {"causal": True},
    {"window_left": 5},
    {"window_right": 9},
    {"window_left": 20, "window_right": 3},
    {"window_left": 0, "causal": True},
]


LENGTHS = [(64, 64), (37, 90), (90, 37), (1, 50), (50, 1), (0, 9), (9, 0)]


@pytest.mark.parametrize("features", MASKS, ids=str)
@pytest.mark.parametrize(
    "lengths", [(64, 64), (37, 90), (90, 37), (1, 50), (50, 1), (0, 9), (9, 0)]
)
def test_counts_of_the_loops(lengths, features):
    """Each loop walked block by block, adding up what a step moves."""
    problem, tiles = _problem(*lengths, **features), Tiles(16, 24)
    visits = _visits(problem, tiles)
    q_row, kv_row = 2 * problem.head_dim, 2 * (problem.head_dim + problem.head_dim_v)
    carried_row, result_row = 4 * problem.head_dim_v + 8, 2 * problem.head_dim_v + 4
    fa1_read = fa1_written = fa2_read = fa2_written = 0
    loaded = set()
    for m_block, n_blocks in visits.items():
        rows = min(tiles.tile_m, problem.seqlen_q - m_block * tiles.tile_m)
        fa2_read += rows * q_row if n_blocks else 0
        fa2_written += rows * result_row
        fa1_written += rows * result_row
        for n_block in n_blocks:
            columns = min(tiles.tile_n, problem.seqlen_k - n_block * tiles.tile_n)
            fa2_read += columns * kv_row
            fa1_read += columns * kv_row * (n_block not in loaded) + rows * q_row
            loaded.add(n_block)
            if n_block != n_blocks[0]:
                fa1_read += rows * carried_row
                fa1_written += rows * carried_row
    heads = problem.batch * problem.heads_q
    fa1, fa2 = fa1_hbm_traffic(problem, tiles), fa2_hbm_traffic(problem, tiles)
    assert (fa1.read, fa1.written) == (heads * fa1_read, heads * fa1_written)
    assert (fa2.read, fa2.written) == (heads * fa2_read, heads * fa2_written)


def test_fa1_by_hand():
    """Sq = Sk = 4, tiles 2 × 2, D = Dv = 8, one head: two passes, one of them carried over."""
    problem = AttentionProblem(1, 4, 4, 1, 1, 8, 8, "float16")
    traffic = fa1_hbm_traffic(problem, Tiles(2, 2))
    q, kv, carried, result = 4 * 16, 4 * 32, 4 * (32 + 8), 4 * (16 + 4)
    assert traffic.read == kv + 2 * q + carried
    assert traffic.written == carried + result


def test_one_tile_is_ideal():
    """When everything fits on the chip at once, both generations move each tensor once."""
    problem = _problem(64, 64, heads_q=3)
    for count in (fa1_hbm_traffic, fa2_hbm_traffic):
        assert count(problem, Tiles(64, 64)).total == problem.ideal_hbm_bytes()


def test_fa1_bytes_fall_as_tiles_grow():
    """Θ(N²d²/M): without the one-time part, bytes are proportional to passes, ⌈N / tile_n⌉ − 1."""
    problem = _problem(2048, 2048)
    once = fa1_hbm_traffic(problem, Tiles(64, 2048)).total
    per_pass = fa1_hbm_traffic(problem, Tiles(64, 1024)).total - once
    for tile_n in (32, 64, 128, 256, 512):
        extra = fa1_hbm_traffic(problem, Tiles(64, tile_n)).total - once
        assert extra == per_pass * (2048 // tile_n - 1)
    # tile_m only says how many rows travel together
    assert fa1_hbm_traffic(problem, Tiles(16, 128)) == fa1_hbm_traffic(problem, Tiles(128, 128))


def test_fa2_moves_less_at_the_same_tiles():
    """Square tiles and D = Dv = d: a pass of FA1 moves 2d + 2·(4d + 8) bytes per row, one of FA2
    2·2d, so FA1 ≈ 2.5 times FA2 once passes dominate; FA2 writes nothing but its results."""
    problem = _problem(4096, 4096, head_dim=64, head_dim_v=64)
    fa1, fa2 = (count(problem, Tiles(64, 64)) for count in (fa1_hbm_traffic, fa2_hbm_traffic))
    assert 2.3 < fa1.total / fa2.total < 2.7
    rows = problem.batch * problem.heads_q * problem.seqlen_q
    assert fa2.written == rows * (2 * 64 + 4)
    assert fa1.written == fa2.written + 63 * rows * (4 * 64 + 8)


def test_fa1_beats_standard_attention_when_tiles_are_large():
    """The paper's claim, Nd·N/Bc < N²: at d = 64 in half of an A100's shared memory."""
    problem = _problem(4096, 4096, head_dim=64, head_dim_v=64, heads_k=6)
    assert fa1_hbm_traffic(problem, Tiles(32, 256)).total < problem.standard_hbm_bytes() / 2


@pytest.mark.parametrize("features", MASKS, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_packed_heads_share_a_pass(lengths, features):
    """FA3: with one head a tile, FA2's counts and Q for tiles that see nothing; with two, the K/V
    of half as many passes over tiles of half as many queries."""
    problem = _problem(*lengths, **features)
    visits = _visits(problem, Tiles(8, 24))
    columns = [min(24, problem.seqlen_k - n * 24) for n_blocks in visits.values() for n in n_blocks]
    q = 12 * problem.seqlen_q * 2 * problem.head_dim
    kv_row = 2 * (problem.head_dim + problem.head_dim_v)
    packed = fa3_hbm_traffic(problem, Tiles(16, 24, 2))
    assert packed.read == q + 6 * sum(columns) * kv_row
    assert packed.written == fa2_hbm_traffic(problem, Tiles(16, 24)).written
    apart, fa2 = fa3_hbm_traffic(problem, Tiles(8, 24)), fa2_hbm_traffic(problem, Tiles(8, 24))
    blind = sum(min(8, problem.seqlen_q - m * 8) for m, n_blocks in visits.items() if not n_blocks)
    assert apart.read - fa2.read == 12 * blind * 2 * problem.head_dim
    assert apart.written == fa2.written


def test_fp8_reads_half_as_much_and_writes_as_much():
    """O of FP8 inputs is bfloat16."""
    wide = _problem(300, 200)
    half = replace(wide, dtype="float8_e4m3fn")
    of_wide, of_half = (fa3_hbm_traffic(p, Tiles(128, 64)) for p in (wide, half))
    assert 2 * of_half.read == of_wide.read
    assert of_half.written == of_wide.written
