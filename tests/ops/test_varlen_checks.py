"""Bad lengths are refused before anything is compiled; good ones state their problem."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from cute_fa import flash_attn_varlen_func
from cute_fa.errors import CuteFAError, InvalidArgumentError, InvalidTypeError, UnsupportedError
from cute_fa.ops.checks import Options
from cute_fa.ops.varlen_checks import Lengths, check_lengths, check_varlen_call
from cute_fa.varlen import Packing

pytestmark = pytest.mark.usefixtures("nothing_is_compiled")


def int32(*numbers):
    return torch.tensor(numbers, dtype=torch.int32)


def half(*shape, **kind):
    return torch.zeros(*shape, dtype=torch.float16, **kind)


def call(**changes):
    """Three sequences of 5, 0 and 7 queries and 2, 4 and 9 keys, with some arguments changed."""
    arguments = {
        "q": half(12, 4, 16),
        "k": half(15, 2, 16),
        "v": half(15, 2, 24),
        "cu_seqlens_q": int32(0, 5, 5, 12),
        "cu_seqlens_k": int32(0, 2, 6, 15),
        "max_seqlen_q": 7,
        "max_seqlen_k": 9,
        **changes,
    }
    q, k, v = (arguments.pop(name) for name in "qkv")
    options = {
        name: arguments.pop(name)
        for name in ("causal", "window_size", "generation", "arch", "backend")
        if name in arguments
    }
    return check_varlen_call(q, k, v, Lengths(**arguments), Options(**options), device=None)


def test_a_good_call_states_its_problem():
    found = call(causal=True, seqused_k=int32(2, 0, 9), generation="fa2")
    problem = found.problem
    assert (problem.total_q, problem.total_k) == (12, 15)
    assert problem.packing == Packing((0, 5, 5, 12), (0, 2, 6, 15), None, (2, 0, 9))
    padded = problem.padded
    assert (padded.batch, padded.seqlen_q, padded.seqlen_k) == (3, 7, 9)
    assert (padded.heads_q, padded.heads_k, padded.head_dim, padded.head_dim_v) == (4, 2, 16, 24)
    variant = problem.variant
    assert variant.is_varlen and variant.has_seqused_k and not variant.has_seqused_q
    assert variant.causal and found.has_work and found.backend == "sim"


def test_longest_lengths_are_upper_bounds():
    assert call(max_seqlen_q=2**31 - 1, max_seqlen_k=100).has_work


def test_keys_behind_the_last_sequence_are_nobodys():
    assert call(cu_seqlens_k=int32(0, 2, 6, 14)).problem.total_k == 15


FLAT = torch.zeros(4, dtype=torch.int32)

BAD = {
    "int64": ({"cu_seqlens_q": int32(0, 5, 5, 12).long()}, InvalidTypeError, "to(torch.int32)"),
    "float": ({"seqused_k": torch.ones(3)}, InvalidTypeError, "seqused_k is not of dtype int32"),
    "list": ({"cu_seqlens_k": [0, 2, 6, 15]}, InvalidTypeError, "cu_seqlens_k is not a tensor"),
    "none": ({"cu_seqlens_q": None}, InvalidTypeError, "cu_seqlens_q is not a tensor"),
    "meta": (
        {"seqused_q": torch.zeros(3, dtype=torch.int32, device="meta")},
        InvalidArgumentError,
        "seqused_q is on another device",
    ),
    "matrix": ({"cu_seqlens_q": FLAT[None]}, InvalidArgumentError, "not a row of numbers"),
    "scalar": ({"seqused_q": int32(1)[0]}, InvalidArgumentError, "expected: (batch,)"),
    "strided": (
        {"cu_seqlens_q": torch.zeros(8, dtype=torch.int32)[::2]},
        InvalidArgumentError,
        "cu_seqlens_q is not contiguous",
    ),
    "batches": ({"cu_seqlens_k": int32(0, 15)}, InvalidArgumentError, "4 and 2 numbers"),
    "no batch": (
        {"cu_seqlens_q": int32(), "cu_seqlens_k": int32()},
        InvalidArgumentError,
        "batch + 1 of each",
    ),
    "used batch": ({"seqused_k": int32(1, 2)}, InvalidArgumentError, "another batch than cu_"),
    "bool longest": ({"max_seqlen_q": True}, InvalidTypeError, "max_seqlen_q is not an integer"),
    "float longest": ({"max_seqlen_k": 9.0}, InvalidTypeError, "max_seqlen_k is not an integer"),
    "tensor longest": ({"max_seqlen_k": int32(9)[0]}, InvalidTypeError, "would wait for the GPU"),
    "negative longest": ({"max_seqlen_q": -1}, InvalidArgumentError, "max_seqlen_q is no length"),
    "huge longest": ({"max_seqlen_q": 2**31}, InvalidArgumentError, "0 to 2147483647"),
    # What only the numbers themselves say:
    "short longest q": ({"max_seqlen_q": 6}, InvalidArgumentError, "expected: at least 7"),
    "short longest k": ({"max_seqlen_k": 8}, InvalidArgumentError, "max_seqlen_k is smaller"),
    "no longest": ({"max_seqlen_k": 0}, InvalidArgumentError, "max_seqlen_k is smaller"),
    "falls": ({"cu_seqlens_q": int32(0, 5, 4, 12)}, InvalidArgumentError, "cu_seqlens_q falls"),
    "starts late": (
        {"cu_seqlens_k": int32(1, 2, 6, 15)},
        InvalidArgumentError,
        "does not begin with 0",
    ),
    "beyond k": ({"cu_seqlens_k": int32(0, 2, 6, 16)}, InvalidArgumentError, "rows of k"),
    "beyond q": ({"cu_seqlens_q": int32(0, 5, 5, 13)}, InvalidArgumentError, "rows of q"),
    "rows of nobody": (
        {"cu_seqlens_q": int32(0, 5, 5, 11)},
        InvalidArgumentError,
        "belong to no sequence",
    ),
    "used too much": ({"seqused_q": int32(5, 1, 7)}, InvalidArgumentError, "seqused_q[1]"),
    "used negative": ({"seqused_k": int32(2, -1, 9)}, InvalidArgumentError, "seqused_k[1]"),
    # As for dense tensors:
    "rank": (
        {"q": half(1, 12, 4, 16)},
        InvalidArgumentError,
        "flash_attn_func takes",
    ),
    "heads": (
        {"v": half(15, 4, 24)},
        InvalidArgumentError,
        "key and value heads differ",
    ),
    "rows": (
        {"v": half(14, 2, 24)},
        InvalidArgumentError,
        "key and value lengths differ",
    ),
    "dim": (
        {"q": half(12, 4, 24)},
        InvalidArgumentError,
        "query and key head dims differ",
    ),
    "dtype": ({"q": torch.zeros(12, 4, 16)}, InvalidTypeError, "float16 or bfloat16"),
    "window": ({"window_size": (-2, 0)}, InvalidArgumentError, "window_size"),
    "generation": ({"generation": "fa9"}, InvalidArgumentError, "unknown generation"),
    "arch": ({"generation": "fa3", "arch": "sm_80"}, UnsupportedError, "fa3 does not serve"),
    "backend": ({"backend": "cuda"}, InvalidArgumentError, "does not run cpu tensors"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_arguments(what):
    changes, kind, message = BAD[what]
    with pytest.raises(kind) as caught:
        call(**changes)
    text = str(caught.value)
    assert message in text, text
    assert "got:" in text and ("expected:" in text or "to mend:" in text), text


def test_more_rows_than_int32_can_number():
    long = half(1, 1, 16).expand(2**31, 1, 16)
    borders = int32(0, 1)
    with pytest.raises(UnsupportedError, match="k has more rows than int32"):
        check_lengths(long[:1], long, Lengths(borders, borders, 1, 1))


@pytest.mark.parametrize(
    "changes",
    [
        {"q": half(0, 4, 16), "cu_seqlens_q": int32(0, 0, 0, 0)},
        {"q": half(12, 0, 16)},
        {
            "k": half(0, 2, 16),
            "v": half(0, 2, 24),
            "cu_seqlens_k": int32(0, 0, 0, 0),
            "max_seqlen_k": 0,
        },
        {"seqused_k": int32(0, 0, 0), "max_seqlen_k": 0},
        {"seqused_q": int32(0, 0, 0), "max_seqlen_q": 0},
        {
            "q": half(0, 4, 16),
            "cu_seqlens_q": int32(0),
            "cu_seqlens_k": int32(0),
        },
    ],
    ids=["no rows", "no heads", "no keys", "no used keys", "no used rows", "no sequence"],
)
def test_empty_problems_have_no_work_but_are_checked(changes):
    assert not call(**changes).has_work
    with pytest.raises(CuteFAError, match="unknown generation"):
        call(**changes, generation="fa9")


def test_no_number_is_read_from_a_gpu(monkeypatch):
    """On CUDA tensors the lengths stay where they are: reading them would wait for the GPU."""
    q = half(12, 4, 16)
    k = half(15, 2, 16)
    wrong = int32(0, 99, 5, 12)
    monkeypatch.setattr(
        "cute_fa.ops.checks.choose_backend_and_target",
        lambda q, options, device: ("cuda", SimpleNamespace(arch="sm_80")),
    )
    monkeypatch.setattr("cute_fa.ops.checks.choose_generation", lambda *_: "fa2")

    def read(*_):
        raise AssertionError("a length was read")

    for name in ("tolist", "item", "__bool__", "__int__", "cpu"):
        monkeypatch.setattr(torch.Tensor, name, read)
    lengths = Lengths(wrong, wrong, 7, 9, int32(1, 2, 3), int32(1, 2, 3))
    found = check_varlen_call(q, k, k, lengths, Options(), device=None)
    assert found.problem.packing is None and found.has_work


def test_gradients_are_refused():
    q = half(5, 1, 16, requires_grad=True)
    borders = int32(0, 5)
    lengths = {"cu_seqlens_q": borders, "cu_seqlens_k": borders}
    with pytest.raises(UnsupportedError, match="q requires a gradient"):
        flash_attn_varlen_func(q, q, q, **lengths, max_seqlen_q=5, max_seqlen_k=5)


@pytest.mark.parametrize("name", ["causal", "deterministic", "return_lse"])
def test_flags_are_bools(name):
    q = half(5, 1, 16)
    borders = int32(0, 5)
    lengths = {"cu_seqlens_q": borders, "cu_seqlens_k": borders}
    with pytest.raises(InvalidTypeError, match=f"{name} is not a bool"):
        flash_attn_varlen_func(q, q, q, **lengths, max_seqlen_q=5, max_seqlen_k=5, **{name: 1})
