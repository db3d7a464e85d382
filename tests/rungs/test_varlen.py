"""Packed sequences on every rung that takes them: each by itself, and nobody else's rows.

Outputs are NaN before each call, and so are the rows of q, k and v that do not count: a row that is
written or read in a neighbour's place shows.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from cute_fa.build.registry import KERNELS
from cute_fa.problem import AttentionProblem
from cute_fa.reference.traffic import fa1_hbm_traffic, fa2_hbm_traffic
from cute_fa.testing.cases import random_problems
from cute_fa.testing.inputs import (
    extreme_inputs,
    index_coded_inputs,
    make_inputs,
    normal_inputs,
    one_hot_inputs,
)
from cute_fa.varlen import Packing, VarlenProblem
from tests.rungs.bench import Bench

BASE = AttentionProblem(1, 1, 1, 4, 2, 64, 64, "float16")
RUNGS = [entry.generation for entry in KERNELS if "varlen" in entry.features]


@pytest.fixture(params=RUNGS)
def rung(request) -> Bench:
    return request.getfixturevalue(request.param)


# Sequences of every kind, in an order that puts long ones beside empty ones: one row, a whole tile
# and one row more or less of it (64, 128, 192 rows of queries; 64 and 128 keys), no queries, no
# keys, neither, more queries than keys, and one key for many queries.
LENGTHS_Q = (1, 129, 0, 64, 0, 70, 193, 5, 128)
LENGTHS_K = (200, 64, 30, 65, 0, 0, 128, 300, 1)
# What counts of them: all, none, the last row but one, one row.
USED_Q = (1, 128, 0, 0, 0, 69, 193, 1, 127)
USED_K = (199, 64, 1, 65, 0, 0, 3, 0, 1)

PACKINGS = {
    "all": Packing.of_lengths(LENGTHS_Q, LENGTHS_K),
    "used q": Packing.of_lengths(LENGTHS_Q, LENGTHS_K, seqused_q=USED_Q),
    "used k": Packing.of_lengths(LENGTHS_Q, LENGTHS_K, seqused_k=USED_K),
    "used both": Packing.of_lengths(LENGTHS_Q, LENGTHS_K, USED_Q, USED_K),
}
MASKS = {
    "full": {},
    "causal": {"causal": True},
    "window": {"window_left": 33, "window_right": 7},
}


# Each pair is a compile; ``all`` and ``used both`` under a causal mask serve other tests too.
PAIRS = [("all", "causal"), ("used q", "window"), ("used k", "full"), ("used both", "causal")]


@pytest.mark.parametrize(("packing", "mask"), PAIRS)
def test_every_row_reads_its_own_sequence(rung, packing, mask):
    """V's integers tell sequence, column and head; each row picks one of its own, exactly."""
    problem = VarlenProblem.of(replace(BASE, **MASKS[mask]), PACKINGS[packing])
    rung.check(problem, index_coded_inputs(problem))


def test_one_hot(rung):
    problem = VarlenProblem.of(replace(BASE, causal=True), PACKINGS["used both"])
    rung.check(problem, one_hot_inputs(problem))


def test_extreme_scores(rung):
    problem = VarlenProblem.of(replace(BASE, causal=True), PACKINGS["used both"])
    rung.check(problem, extreme_inputs(problem, magnitude=-1e3))


@pytest.mark.parametrize("layout", ["heads_first", "sliced", "packed", "same_heads"])
def test_strides(rung, layout):
    problem = VarlenProblem.of(replace(BASE, causal=True), PACKINGS["all"])
    rung.check(problem, normal_inputs(problem, layouts=(layout, layout, layout)))


@pytest.mark.parametrize("completion", ["late", "random"])
def test_completion_policies(rung, completion):
    """No bit changes with the order in which copies, products and warps finish."""
    problem = VarlenProblem.of(replace(BASE, causal=True), PACKINGS["used both"])
    inputs = normal_inputs(problem)
    out, lse, _ = rung.run(problem, inputs)
    other_out, other_lse, launch = rung.run(problem, inputs, completion=completion, seed=3)
    assert launch.hazards == []
    assert torch.equal(out.nan_to_num(nan=7.0), other_out.nan_to_num(nan=7.0))
    assert torch.equal(lse.nan_to_num(nan=7.0), other_lse.nan_to_num(nan=7.0))


def test_equal_lengths_give_what_a_dense_call_gives(rung):
    """Bit for bit: only where a sequence begins is told in another way."""
    dense = replace(BASE, batch=3, seqlen_q=70, seqlen_k=140, causal=True)
    q, k, v, _ = inputs = normal_inputs(dense)
    out, lse, _ = rung.run(dense, inputs)
    packed = VarlenProblem.of(dense, Packing.of_lengths((70,) * 3, (140,) * 3))
    flat = inputs._replace(q=q.flatten(0, 1), k=k.flatten(0, 1), v=v.flatten(0, 1))
    packed_out, packed_lse, _ = rung.run(packed, flat)
    assert torch.equal(packed_out, out.flatten(0, 1))
    assert torch.equal(packed_lse, lse.transpose(0, 1).flatten(1, 2))


def test_offsets_beyond_32_bits(rung):
    """Rows of K 2²⁵ elements apart: the second sequence begins 2³¹ elements from the first."""
    packing = Packing.of_lengths((3, 9), (66, 10))
    problem = VarlenProblem.of(replace(BASE, heads_q=1, heads_k=1, causal=True), packing)
    inputs = index_coded_inputs(problem)
    far = torch.empty(76 << 25, dtype=inputs.k.dtype).as_strided(inputs.k.shape, (1 << 25, 64, 1))
    far.copy_(inputs.k)
    rung.check(problem, inputs._replace(k=far))


TRAFFIC = {"fa1": fa1_hbm_traffic, "fa2": fa2_hbm_traffic}


@pytest.mark.parametrize("generation", TRAFFIC)
def test_traffic_is_that_of_the_sequences(request, generation):
    """And of the lengths: two borders and a seqused of each side, read by every thread."""
    rung = request.getfixturevalue(generation)
    problem = VarlenProblem.of(replace(BASE, causal=True), PACKINGS["used both"])
    _, _, launch = rung.run(problem, normal_inputs(problem))
    config = rung.config(problem)
    each = [TRAFFIC[generation](sequence, config) for sequence in problem.sequences()]
    lengths = 6 * 4 * config.num_threads * math.prod(launch.grid)
    assert launch.counters.global_bytes_read == sum(one.read for one in each) + lengths
    assert launch.counters.global_bytes_written == sum(one.written for one in each)


def test_head_dims(rung):
    """The widest D and a padded Dv; the tile tables' other rows are tested dense."""
    base = replace(BASE, head_dim=256, head_dim_v=40, dtype="bfloat16", causal=True)
    packing = Packing.of_lengths((70, 0, 33, 5), (90, 20, 130, 0), seqused_k=(90, 3, 129, 0))
    rung.check(VarlenProblem.of(base, packing))


# Three problems from seed 2027, one under each way that copies may complete; test_random.py has
# more for the rungs with asynchronous products.
RANDOM = random_problems(3, 2027, varlen=True, max_seqlen=140, head_dims=(64, 96, 128))


@pytest.mark.parametrize("generation", ["fa1", "fa2"])
@pytest.mark.parametrize("case", RANDOM, ids=str)
def test_random_problem(request, generation, case):
    rung = request.getfixturevalue(generation)
    completion = ("eager", "late", "random")[RANDOM.index(case)]
    rung.check(case.problem, make_inputs(case), completion=completion, seed=case.seed)
