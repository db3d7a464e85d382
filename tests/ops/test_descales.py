"""Descales of FP8 inputs: what is refused, what None stands for, and the operator."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import cute_fa
from cute_fa.errors import InvalidArgumentError, InvalidTypeError, UnsupportedError
from cute_fa.ops import descales as descales_module
from cute_fa.ops.checks import Options, check_call
from cute_fa.ops.descales import Descales, as_arguments, check_values
from cute_fa.ops.descales import ones as left_out
from cute_fa.ops.varlen_checks import Lengths, check_varlen_call
from cute_fa.varlen import Packing

FP8 = torch.float8_e4m3fn
OPTIONS = Options(arch="sm_90a")


def qkv(dtype: torch.dtype = FP8, dim: int = 64) -> tuple[torch.Tensor, ...]:
    """Two batches of 200 queries in four heads and 300 keys in two."""
    q, k = torch.ones(2, 200, 4, dim).to(dtype), torch.ones(2, 300, 2, dim).to(dtype)
    return q, k, k


def ones(*shape: int) -> torch.Tensor:
    return torch.ones(shape)


BLOCKS = Descales(ones(2, 2, 2), ones(2, 2, 3), ones(2, 2, 3))


def test_what_later_calls_use_is_there_in_every_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream does not wait for what another has been told to write."""
    device, is_capturing, waited = torch.device("cuda", 0), False, []
    memory = torch.ones(1, 1)
    stream = SimpleNamespace(synchronize=lambda: waited.append(device))
    monkeypatch.setattr(descales_module, "_one_on", {})
    monkeypatch.setattr(torch, "ones", lambda *shape, device: memory.clone())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: is_capturing)
    for_now = left_out(2, 3, device)  # by this call and in its stream alone
    is_capturing = True
    captured = left_out(2, 3, device, is_kept=True)
    assert waited == []
    is_capturing = False
    kept = [left_out(2, heads, device, is_kept=True) for heads in (3, 4)]
    assert waited == [device]
    is_capturing = True
    later = left_out(5, 3, device, is_kept=True)
    assert len({x.data_ptr() for x in (*kept, later)}) == 1 and waited == [device]
    assert len({x.data_ptr() for x in (for_now, captured, later)}) == 3
    assert later.shape == (5, 3) and bool((later == 1.0).all())


@pytest.mark.parametrize(
    ("descales", "error", "words"),
    [
        (Descales(q=2.0), InvalidTypeError, "q_descale is not an fp32 tensor"),
        (Descales(k=ones(2, 2).double()), InvalidTypeError, "k_descale is not an fp32 tensor"),
        (Descales(v=ones(2, 2).to("meta")), InvalidArgumentError, "another device"),
        (Descales(q=ones(2, 4)), InvalidArgumentError, r"\(B, Hk\) = \(2, 2\)"),
        (BLOCKS._replace(q=ones(2, 2, 3)), InvalidArgumentError, "q_descale has the wrong shape"),
        (BLOCKS._replace(k=ones(2, 2)), InvalidArgumentError, "k_descale has the wrong shape"),
        (BLOCKS._replace(v=None), InvalidArgumentError, "some are missing"),
        (Descales(k=-ones(2, 2)), InvalidArgumentError, "positive, finite"),
        (Descales(v=ones(2, 2) / 0), InvalidArgumentError, "positive, finite"),
    ],
)
def test_wrong_descales_are_refused(descales, error, words):
    with pytest.raises(error, match=words):
        check_call(*qkv(), OPTIONS, descales=descales)


def test_descales_decide_the_kernel():
    assert not check_call(*qkv(), OPTIONS).variant.has_block_descales
    per_head = Descales(ones(2, 2), None, ones(2, 2))
    assert not check_call(*qkv(), OPTIONS, descales=per_head).variant.has_block_descales
    call = check_call(*qkv(), OPTIONS, descales=BLOCKS)
    assert call.variant.has_block_descales and call.generation == "fa3"


def test_fp8_goes_to_hopper_by_itself():
    assert check_call(*qkv(), Options()).target.arch == "sm_90a"
    with pytest.raises(UnsupportedError, match="16-bit"):
        check_call(*qkv(), Options(generation="fa2"))


def test_16_bit_inputs_have_no_descales():
    with pytest.raises(InvalidArgumentError, match="belongs to FP8 inputs"):
        cute_fa.flash_attn_func(*qkv(dtype=torch.float16), q_descale=ones(2, 2))


def test_head_dims_are_multiples_of_16():
    with pytest.raises(InvalidArgumentError, match="not a multiple of 16"):
        cute_fa.flash_attn_func(*qkv(dim=72))


def packed_lengths() -> Lengths:
    """Two sequences of 10 and 190 queries, 130 and 170 keys."""
    borders = [torch.tensor(x, dtype=torch.int32) for x in ((0, 10, 200), (0, 130, 300))]
    return Lengths(*borders, 190, 170)


def packed_qkv(dtype: torch.dtype = FP8) -> tuple[torch.Tensor, ...]:
    return tuple(x[0] for x in qkv(dtype))


@pytest.mark.parametrize(
    ("descales", "words"),
    [
        (Descales(q=ones(1, 2)), r"\(B, Hk\) = \(2, 2\)"),
        (BLOCKS, r"longest sequence\), \(2, 2, 2\) for k_descale"),
        (BLOCKS._replace(q=ones(2, 2, 1)), "q_descale has the wrong shape"),
        (Descales(ones(2, 2, 2), ones(2, 2, 2), -ones(2, 2, 2)), "positive, finite"),
        (Descales(k=ones(2, 2) / 0), "positive, finite"),
    ],
)
def test_wrong_descales_of_packed_sequences_are_refused(descales, words):
    with pytest.raises(InvalidArgumentError, match=words):
        check_varlen_call(*packed_qkv(), packed_lengths(), OPTIONS, descales=descales)


def test_blocks_behind_a_sequence_may_hold_anything():
    """The first sequence has one block of queries, and two of keys, of which one counts."""
    q, k, v = (ones(2, 2, 2) for _ in range(3))
    q[0, :, 1] = k[0, :, 1] = v[0, :, 1] = torch.nan
    borders = ((0, 10, 200), (0, 130, 300))
    check_values(Descales(q, k, v), Packing(*borders, None, (128, 170)))
    with pytest.raises(InvalidArgumentError, match="k_descale holds"):
        check_values(Descales(q, k, v), Packing(*borders))


def test_older_generations_refuse_packed_sequences_in_fp8():
    for generation in ("fa1", "fa2"):
        with pytest.raises(UnsupportedError, match="multiplies 16-bit inputs only"):
            check_varlen_call(*packed_qkv(), packed_lengths(), Options(generation=generation))
    with pytest.raises(InvalidTypeError, match="float16 or bfloat16 or float8_e4m3fn"):
        check_varlen_call(*packed_qkv(torch.float32), packed_lengths(), Options())


def test_none_stands_for_ones_without_memory_of_their_own():
    given = ones(2, 3)
    one = left_out(2, 3, torch.device("cpu"))
    assert one.eq(1).all() and one.shape == (2, 3) and one.stride() == (0, 0)
    for descales, expected in ((Descales(q=given), (given, one, one)), (Descales(), (one,) * 3)):
        arguments = as_arguments(descales.more, one)
        assert all(x is y for x, y in zip(arguments, expected, strict=True))


def test_the_operator_takes_them():
    """Shapes and dtype of a traced call, and the same checks."""
    q, k, v = (x.to("meta") for x in qkv())
    descales = [x.to("meta") for x in BLOCKS]
    named = dict(zip(("q_descale", "k_descale", "v_descale"), descales, strict=True))
    out, lse = cute_fa.flash_attn_func(q, k, v, return_lse=True, **named)
    assert out.shape == (2, 200, 4, 64) and out.dtype == torch.bfloat16
    assert lse.shape == (2, 4, 200) and lse.dtype == torch.float32
    with pytest.raises(InvalidArgumentError, match="wrong shape"):
        cute_fa.flash_attn_func(q, k, v, q_descale=descales[0][:1])


def test_the_operator_of_packed_sequences_takes_them():
    q, k, v = (x.to("meta") for x in packed_qkv())
    lengths = vars(packed_lengths())
    lengths = {name: x.to("meta") if hasattr(x, "to") else x for name, x in lengths.items()}
    descale = ones(2, 2, 2).to("meta")
    named = {"q_descale": descale, "k_descale": descale, "v_descale": descale}
    out, lse = cute_fa.flash_attn_varlen_func(q, k, v, return_lse=True, **lengths, **named)
    assert out.shape == (200, 4, 64) and out.dtype == torch.bfloat16
    assert lse.shape == (4, 200) and lse.dtype == torch.float32
    with pytest.raises(InvalidArgumentError, match="wrong shape"):
        cute_fa.flash_attn_varlen_func(q, k, v, q_descale=descale[:1], **lengths)


def test_a_compiled_call_is_the_call():
    q = torch.randn(1, 20, 1, 64, generator=torch.Generator().manual_seed(0)).to(FP8)
    descale = torch.full((1, 1), 0.5)

    def call(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return cute_fa.flash_attn_func(x, x, x, q_descale=scale, v_descale=scale, causal=True)

    compiled = torch.compile(call, backend="eager", fullgraph=True)
    assert torch.equal(compiled(q, descale), call(q, descale))
