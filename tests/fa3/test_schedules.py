"""Persistent CTAs: tile after tile through the same rings, on devices with few SMs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cute_fa.problem import AttentionProblem
from cute_fa.reference.traffic import fa3_hbm_traffic
from cute_fa.testing.inputs import index_coded_inputs, normal_inputs
from cute_fa.varlen import Packing, VarlenProblem

# 2 · 2 · 3 tiles of 192 rows, of 1 to 4 blocks, some of which see no key at all.
BASE = AttentionProblem(2, 500, 450, 2, 1, 64, 64, "float16", causal=True)
SINGLE = {"is_persistent": False, "has_own_o": False}


@pytest.mark.parametrize("sms", [1, 5, 132], ids=lambda n: f"{n}sms")
def test_dense(fa3, sms):
    """Every tile on one SM, two or three to each, or one to each: the same tiles, bit for bit."""
    inputs = index_coded_inputs(BASE)
    launch = fa3.check(BASE, inputs, sms=sms)
    assert launch.grid == (min(sms, 12), 1, 1)
    traffic = fa3_hbm_traffic(BASE, fa3.config(BASE))
    assert launch.counters.global_bytes_read == traffic.read
    assert launch.counters.global_bytes_written == traffic.written


@pytest.mark.parametrize("sms", [1, 5], ids=lambda n: f"{n}sms")
@pytest.mark.parametrize("dim", [64, 128], ids=["strips of O", "O in Q's strips"])
def test_dense_without_a_mask(fa3, dim, sms):
    """Tiles of one length: as many CTAs as SMs, or tiles if those are fewer."""
    problem = replace(BASE, causal=False, head_dim=dim, head_dim_v=dim)
    config = fa3.config(problem)
    assert config.is_persistent and config.has_own_o == (dim == 64)
    tiles = 2 * 2 * -(-500 // config.tile_m)
    launch = fa3.check(problem, index_coded_inputs(problem), sms=sms, completion="random")
    assert launch.grid == (min(sms, tiles), 1, 1)
    traffic = fa3_hbm_traffic(problem, config)
    assert launch.counters.global_bytes_read == traffic.read
    assert launch.counters.global_bytes_written == traffic.written


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_both_schedules_give_the_same_bits(fa3, causal):
    problem = replace(BASE, causal=causal)
    inputs = normal_inputs(problem)
    out, lse, launch = fa3.run(problem, inputs, **SINGLE)
    assert launch.grid == (12, 1, 1)
    other_out, other_lse, _ = fa3.run(problem, inputs, sms=3)
    assert torch.equal(out, other_out) and torch.equal(lse, other_lse)


def test_single_tiles(fa3):
    """What no plan does by itself."""
    fa3.check(BASE, index_coded_inputs(BASE), **SINGLE)


@pytest.mark.parametrize(
    "changes",
    [
        {"has_own_o": False},
        {"has_turns": False, "stages": 3},
    ],
    ids=lambda changes: "-".join(f"{k}={v}" for k, v in changes.items()),
)
def test_other_plans(fa3, changes):
    """O that leaves from Q's strips; no turns, and three stages, whose parities turn at other
    uses."""
    fa3.check(BASE, index_coded_inputs(BASE), sms=2, completion="random", **changes)


def test_no_room_for_strips_of_o(fa3):
    """Tiles whose Q has to wait until the last O has left the strip."""
    problem = replace(BASE, head_dim=256, head_dim_v=256, batch=1, seqlen_q=260, seqlen_k=200)
    assert not fa3.config(problem).has_own_o
    fa3.check(problem, sms=2, completion="random", seed=1)


# The longest tile is short beside the rest, so that there are as many CTAs as SMs; and it is not.
PACKINGS = {
    "short": Packing.of_lengths((30, 200, 0, 1, 193), (30, 20, 5, 129, 300)),
    "one long": Packing.of_lengths((3, 700, 1), (0, 700, 5)),
    "used": Packing.of_lengths((300, 9, 200), (300, 40, 130), (200, 0, 193), (129, 7, 0)),
}


@pytest.mark.parametrize("name", PACKINGS)
def test_packed_sequences(fa3, name):
    problem = VarlenProblem.of(replace(BASE, causal=True), PACKINGS[name])
    fa3.check(problem, index_coded_inputs(problem), sms=3, completion="random")


def test_packed_sequences_one_tile_per_cta(fa3):
    problem = VarlenProblem.of(replace(BASE, causal=True), PACKINGS["used"])
    fa3.check(problem, index_coded_inputs(problem), **SINGLE)


def test_many_packed_sequences(fa3):
    """More than one warp can count at a time, some of them empty, a long one behind them."""
    lengths = [n % 4 for n in range(70)] + [250]
    problem = VarlenProblem.of(
        replace(BASE, heads_q=1, causal=True), Packing.of_lengths(lengths, [n + 1 for n in lengths])
    )
    fa3.check(problem, index_coded_inputs(problem), sms=3)
