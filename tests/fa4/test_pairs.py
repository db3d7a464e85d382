"""Pairs of CTAs that share FA4's products, where each has one Q tile (cta_group::2).

Most cases are of narrow heads, which the tile table does not pair: less to compile and to simulate.
"""

from __future__ import annotations

import random
import re
from dataclasses import replace
from typing import Any

import pytest
import torch

import cute_fa
from cute_fa import sim
from cute_fa.bench.model import model_forward
from cute_fa.build import aot, compile, presets
from cute_fa.errors import InvalidArgumentError
from cute_fa.fa4.config import TILE_M
from cute_fa.problem import AttentionProblem, KernelVariant
from cute_fa.sim.hazards import RULES
from cute_fa.testing.inputs import index_coded_inputs, normal_inputs, quantized_inputs
from cute_fa.varlen import Packing, VarlenProblem

POLICIES = ("late", "random")
ALL_RULES = frozenset(RULES)
NARROW: dict[str, Any] = {"num_q_tiles": 1, "is_paired": True, "stages": 3}
BASE = AttentionProblem(1, 300, 200, 1, 1, 64, 64, "float16", causal=True)


def _same_bits(fa4, problem, inputs, how, expected, expected_lse):
    out, lse, launch = fa4.run(problem, inputs, checks=ALL_RULES, **how)
    assert launch.hazards == []
    assert torch.equal(out.nan_to_num(7.0), expected.nan_to_num(7.0)), how
    assert torch.equal(lse.nan_to_num(7.0), expected_lse.nan_to_num(7.0)), how
    return launch


@pytest.mark.parametrize(
    ("dims", "causal"), [((256, 256), False), ((192, 136), True), ((40, 200), False)], ids=str
)
def test_wide_heads_are_paired(fa4, dims, causal):
    """An odd number of Q tiles: the last CTA has no row, and keeps its part all the same."""
    problem = AttentionProblem(1, 270, 200, 1, 1, *dims, "bfloat16", causal=causal)
    config = fa4.config(problem)
    assert config.is_paired and config.tile_m == 2 * TILE_M and config.is_persistent != causal
    inputs = normal_inputs(problem)
    launch = fa4.check(problem, inputs, completion="late", checks=ALL_RULES)
    assert (launch.grid, launch.cluster) == ((4, 1, 1), (2, 1, 1))  # two tiles
    out, lse, _ = fa4.run(problem, inputs)
    _same_bits(fa4, problem, inputs, {"completion": "random", "sms": 2}, out, lse)


def test_the_same_bits_as_without_pairs(fa4):
    """A row sees the same blocks in the same order, whoever computes them."""
    problem = replace(BASE, seqlen_q=520, seqlen_k=470, heads_q=2)
    inputs = normal_inputs(problem)
    out, lse, alone = fa4.run(problem, inputs, **{**NARROW, "is_paired": False})
    launch = _same_bits(fa4, problem, inputs, NARROW, out, lse)
    # Half of K and V each: what is loaded beside Q halves, but for the diagonal's other half.
    assert launch.counters["mma_flops.f16"] >= alone.counters["mma_flops.f16"]
    assert launch.counters["global_bytes_read"] < 0.75 * alone.counters["global_bytes_read"]
    assert launch.counters["global_bytes_written"] == alone.counters["global_bytes_written"]


@pytest.mark.parametrize("completion", POLICIES)
@pytest.mark.parametrize("has_own_o", [True, False])
def test_persistent_pairs(fa4, has_own_o, completion):
    """Tiles of unequal length, some without a key, whose Q nobody multiplies."""
    problem = replace(BASE, seqlen_q=900, seqlen_k=230)
    plan = {**NARROW, "is_persistent": True, "has_own_o": has_own_o}
    how = {"sms": 3, "completion": completion, "checks": ALL_RULES}
    launch = fa4.check(problem, index_coded_inputs(problem), **how, **plan)
    assert launch.grid == (2, 1, 1)  # a pair does not fit on the third SM


SEQUENCES = Packing.of_lengths((1, 0, 300, 70, 513), (200, 30, 65, 0, 190), (1, 0, 300, 0, 513))


@pytest.mark.parametrize("completion", POLICIES)
@pytest.mark.parametrize("is_persistent", [True, False])
def test_packed_sequences(fa4, is_persistent, completion):
    """Both CTAs of a pair find the same tile, and neither writes past its sequence."""
    base = AttentionProblem(1, 1, 1, 4, 2, 64, 64, "float16", causal=True)
    problem = VarlenProblem.of(base, SEQUENCES)
    plan = {**NARROW, "is_persistent": is_persistent, "packed_group": 2}
    fa4.check(problem, completion=completion, sms=4, checks=ALL_RULES, **plan)


MASKS = {
    "full": {},
    "causal": {"causal": True},
    "window": {"window_left": 70, "window_right": 40},
    "softcap": {"softcap": 15.0, "softmax_scale": -0.2},
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("mask", MASKS)
def test_random_problem(fa4, mask, seed):
    """The same bits however copies and products complete, and right by the error budget."""
    rng = random.Random(f"{mask} {seed}")
    group, heads_k = 2, rng.choice((1, 2))
    problem = AttentionProblem(
        batch=rng.choice((1, 2)),
        seqlen_q=rng.choice((1, rng.randint(2, 128), rng.randint(129, 300))),
        seqlen_k=rng.choice((0, 1, rng.randint(2, 128), rng.randint(129, 300))),
        heads_q=heads_k * group,
        heads_k=heads_k,
        head_dim=64,
        head_dim_v=48,
        dtype="bfloat16",
        **MASKS[mask],
    )
    inputs = normal_inputs(problem, seed=seed)
    how = {"sms": rng.randint(2, 5), "seed": seed, **NARROW}
    how["packed_group"] = group if mask == "causal" else 1
    fa4.check(problem, inputs, completion="late", checks=ALL_RULES, **how)
    out, lse, _ = fa4.run(problem, inputs, **how)
    _same_bits(fa4, problem, inputs, {**how, "completion": "random"}, out, lse)


def test_fp8_of_pairs(fa4):
    """A plan that the table does not choose: bytes in the halves of K and V."""
    problem = AttentionProblem(1, 300, 200, 2, 1, 64, 64, "float8_e4m3fn")
    config = fa4.config(problem, **NARROW)
    assert (config.smem_k_bytes, config.smem_v_bytes) == (64 * 64, 128 * 32)
    inputs = quantized_inputs(problem, by_block=True)
    fa4.check(problem, inputs, completion="late", sms=2, checks=ALL_RULES, **NARROW)


@pytest.fixture(scope="module", params=[{}, {"causal": True}], ids=["full", "causal"])
def wide(request):
    return compile("fa4", arch="sm_100a", dtype="bfloat16", head_dim=256, **request.param)


def test_ptx_of_pairs(wide):
    """Every product, commit, load and allocation is of both CTAs; what MMA waits for is in one."""
    ptx, config = wide.ptx, wide.config
    assert config.is_paired
    assert "cta_group::1" not in ptx
    products = re.findall(r"tcgen05\.mma\.cta_group::2", ptx)
    assert len(products) == (config.padded_d + config.tile_n) // 16
    commits = re.findall(r"tcgen05\.commit\.cta_group::2\S*multicast::cluster", ptx)
    assert len(commits) == ptx.count("tcgen05.commit") > 0
    loads = re.findall(r"cp\.async\.bulk\.tensor\.4d\.shared::cluster\.global\S*", ptx)
    assert loads and all("cta_group::2" in load and "multicast" not in load for load in loads)
    # A release in a cluster would be a fence of the whole GPU, for every block.
    remote = re.findall(r"mbarrier\.arrive\S*shared::cluster\S*", ptx)
    assert remote and all(".relaxed.cluster" in arrive for arrive in remote)
    assert ptx.count("barrier.cluster.arrive") == ptx.count("barrier.cluster.wait") == 2


def test_pairs_spill_nothing(wide):
    resources = wide.resources
    assert resources.stack_bytes == resources.spill_store_bytes == 0


def test_a_pair_has_one_q_tile_each(fa4):
    with pytest.raises(InvalidArgumentError, match="one Q tile"):
        fa4.config(BASE, is_paired=True)


def test_only_one_cta_of_a_pair_asks(fa4):
    """The request, and what it waits for, name the whole cluster; the other CTA releases what its
    warps have read before it says that it has room."""
    ptx = fa4.program(fa4.config(BASE, **NARROW, has_launch_control=True)).ptx
    requests = re.findall(r"clusterlaunchcontrol.try_cancel\S*", ptx)
    assert len(requests) == 1 and "multicast::cluster::all" in requests[0]
    assert ptx.count("mbarrier.arrive.release.cluster.shared::cluster") == 1
    assert ptx.count("mbarrier.try_wait.parity.acquire.cluster") == 1


def test_both_sms_of_a_pair_multiply():
    """In the model of the machine: for 128 keys, as long as the products of 128 rows take."""
    problem = AttentionProblem(1, 256, 256, 1, 1, 256, 256, "bfloat16")
    timeline = model_forward(problem, "fa4", "sm_100a").timeline
    cycles = timeline.units["tensor core"] * timeline.cycles
    assert cycles == pytest.approx(4 * 128 * 256 * 256 / timeline.model.tensor_flops[16])
    shared = timeline.units["shared memory"] * timeline.cycles
    assert cycles / 2 < shared < cycles


def test_a_bundle_launches_pairs(tmp_path, monkeypatch):
    """Ahead of time as well: the host code of a bundle's kernel asks for clusters of two."""
    variant = KernelVariant("bfloat16", 256, 256)
    wishes = (presets.Wish(variant, ("fa4",)),)
    table = {"wide": presets.Preset("tests", lambda: iter(wishes))}
    monkeypatch.setattr(presets, "PRESETS", table)
    folder = tmp_path / "wide"
    aot.write_bundle(folder, archs=["sm_100a"], presets=["wide"], with_runtime=False, jobs=1)
    q, k, v = normal_inputs(AttentionProblem(1, 130, 100, 1, 1, 256, 256, "bfloat16"))[:3]
    with sim.Device("sm_100a") as device:
        expected = cute_fa.flash_attn_func(q, k, v, generation="fa4")
        found = cute_fa.load_bundle(folder).flash_attn_func(q, k, v, generation="fa4")
    assert torch.equal(found, expected)
    assert [launch.cluster for launch in device.launches] == [(2, 1, 1), (2, 1, 1)]
