"""Pairs of CTAs that load K and V for one another: a plan that the tile table does not choose."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch

from cute_fa.errors import InvalidArgumentError
from cute_fa.problem import AttentionProblem
from cute_fa.reference.traffic import fa3_hbm_traffic
from cute_fa.sim.hazards import RULES
from cute_fa.testing.inputs import index_coded_inputs, normal_inputs, quantized_inputs
from cute_fa.varlen import Packing, VarlenProblem

ALL_RULES = frozenset(RULES)
PAIRED: dict[str, Any] = {"is_paired": True, "tile_n": 64}
BASE = AttentionProblem(1, 300, 330, 2, 1, 128, 128, "bfloat16")
SEQUENCES = Packing.of_lengths((1, 0, 300, 70, 257), (200, 30, 65, 0, 190), (1, 0, 300, 0, 257))
# name → problem and, beside PAIRED, what of the plan is not as picked
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "full": (BASE, {}),
    "causal, O in Q's place": (replace(BASE, causal=True), {"has_own_o": False}),
    "one tile per pair": (BASE, {"is_persistent": False, "has_own_o": False}),
    "packed sequences and heads": (
        VarlenProblem.of(replace(BASE, causal=True), SEQUENCES),
        {"packed_group": 2},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_same_bits_as_without_pairs(fa3, name):
    """However copies and products complete, and right; also when a pair takes several tiles, and
    when its second CTA has no row."""
    problem, changes = CASES[name]
    inputs = normal_inputs(problem)
    alone = {**PAIRED, **changes, "is_paired": False}
    out, lse, launch = fa3.run(problem, inputs, **alone)
    fa3.assert_right(problem, inputs, out.clone(), lse.clone(), launch)
    for how in ({}, {"completion": "late", "sms": 2}, {"completion": "random", "sms": 4}):
        paired = {**PAIRED, **changes, **how}
        own, own_lse, launch = fa3.run(problem, inputs, checks=ALL_RULES, **paired)
        assert launch.hazards == [] and launch.cluster == (2, 1, 1)
        assert torch.equal(own.nan_to_num(7.0), out.nan_to_num(7.0)), how
        assert torch.equal(own_lse.nan_to_num(7.0), lse.nan_to_num(7.0)), how


def test_fp8(fa3):
    """V is turned by each CTA for itself."""
    problem = AttentionProblem(1, 300, 200, 1, 1, 256, 256, "float8_e4m3fn", causal=True)
    inputs = quantized_inputs(problem)
    launch = fa3.check(problem, inputs, completion="late", checks=ALL_RULES, **PAIRED)
    assert launch.cluster == (2, 1, 1)


@pytest.mark.parametrize("causal", [False, True])
def test_both_ctas_need_k_and_v_once(fa3, causal):
    """What is read is what a tile of 256 rows would read; each row picks its key exactly."""
    problem = replace(BASE, seqlen_q=500, causal=causal)
    launch = fa3.check(problem, index_coded_inputs(problem), **PAIRED)
    config = fa3.config(problem, **PAIRED)
    assert config.tile_m == 2 * config.cta_rows == 256
    traffic = fa3_hbm_traffic(problem, config)
    assert launch.counters["global_bytes_read"] == traffic.read
    assert launch.counters["global_bytes_written"] == traffic.written


def test_ptx_of_pairs(fa3):
    """Every load of K and V goes to both CTAs and is half of a block; slots are released in both,
    without the fence of a release in a cluster."""
    config = fa3.config(BASE, **PAIRED)
    ptx = fa3.program(config).ptx
    loads = re.findall(r"cp\.async\.bulk\.tensor\.4d\.shared::cluster\.global\S*", ptx)
    shared = [load for load in loads if ".multicast::cluster" in load]
    # K first and in the loop, V in the loop and last, one panel each.
    assert len(shared) == 4
    assert ptx.count("mapa.shared::cluster") >= ptx.count("mbarrier.arrive.shared::cluster") > 0
    assert ".release.cluster" not in ptx.replace("fence.mbarrier_init.release.cluster", "")
    assert ptx.count("barrier.cluster.arrive") == ptx.count("barrier.cluster.wait") == 1


def test_half_a_block_is_whole_panels(fa3):
    with pytest.raises(InvalidArgumentError, match="panels of K and of V"):
        fa3.config(replace(BASE, head_dim=64, head_dim_v=64), is_paired=True)
