"""FP8 quantisation: scales per head and per block, and the rotation that spreads outliers."""

from __future__ import annotations

import pytest
import torch

from cute_fa import quant
from cute_fa.errors import InvalidArgumentError, InvalidTypeError
from cute_fa.problem import AttentionProblem
from cute_fa.testing.inputs import length_arguments
from cute_fa.varlen import Packing, VarlenProblem


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("block_rows", [None, 16, 64])
def test_every_group_uses_the_whole_range_and_rounds_by_half_a_step(block_rows: int | None) -> None:
    x = normal(2, 100, 4, 32) * torch.tensor([1e-3, 1.0, 50.0, 3e4])[:, None]
    stored, descale = quant.quantize(x, heads_k=4, block_rows=block_rows)
    assert stored.dtype == torch.float8_e4m3fn
    assert descale.shape == ((2, 4) if block_rows is None else (2, 4, -(-100 // block_rows)))
    size = block_rows or 100
    for start in range(0, 100, size):
        block = stored[:, start : start + size].float().abs().amax(dim=(1, 3))
        assert block.eq(448.0).all()
    back = quant.dequantize(stored, descale, block_rows=block_rows)
    # e4m3: 3 bits after the leading one; below 2^-6 steps are 2^-9.
    step = quant.expand_descale(descale, 100, 4, block_rows=block_rows) * 2.0**-9
    assert ((back - x).abs() <= torch.maximum(x.abs() * 2.0**-4, step / 2)).all()


def test_the_smallest_numbers_have_a_scale() -> None:
    """A descale of 0 would scale nothing."""
    x = torch.full((1, 2, 1, 8), 1e-45)
    stored, descale = quant.quantize(x)
    assert descale.min() > 0.0 and not stored.float().any()


def test_query_heads_of_a_group_share_a_scale() -> None:
    x = normal(1, 8, 6, 16)
    x[:, :, 4] *= 100.0
    _, descale = quant.quantize(x, heads_k=2)
    assert torch.equal(
        descale, torch.stack([x[:, :, :3], x[:, :, 3:]]).abs().amax((2, 3, 4)).T / 448
    )


def test_groups_without_numbers_have_scale_one() -> None:
    stored, descale = quant.quantize(torch.zeros(1, 5, 2, 8), block_rows=4)
    assert stored.float().eq(0).all() and descale.eq(1).all()
    stored, descale = quant.quantize(torch.zeros(1, 0, 2, 8))
    assert stored.shape == (1, 0, 2, 8) and torch.equal(descale, torch.ones(1, 2))


LENGTHS_Q, LENGTHS_K = (70, 0, 9, 130, 0), (5, 40, 0, 129, 3)
USED_Q, USED_K = (64, 0, 9, 1, 0), (5, 17, 0, 128, 0)


def lengths_of(is_used: bool) -> tuple[Packing, dict]:
    used = (USED_Q, USED_K) if is_used else (None, None)
    packing = Packing.of_lengths(LENGTHS_Q, LENGTHS_K, *used)
    shape = AttentionProblem(1, 1, 1, 4, 2, 32, 16, "bfloat16")
    return packing, length_arguments(VarlenProblem.of(shape, packing))


@pytest.mark.parametrize("is_used", [False, True])
@pytest.mark.parametrize("block_rows", [None, 64])
def test_packed_sequences_are_quantised_one_by_one(block_rows: int | None, is_used: bool) -> None:
    """As each would be by itself, whatever stands in rows that do not count or beside it."""
    packing, lengths = lengths_of(is_used)
    total_q, total_k = sum(LENGTHS_Q), sum(LENGTHS_K) + 6
    sizes = torch.arange(1, 5)[:, None] * torch.arange(1, total_q + 1)[:, None, None]
    q = normal(total_q, 4, 32) * sizes
    k, v = normal(total_k, 2, 32, seed=1), normal(total_k, 2, 16, seed=2)
    for x, rows in ((q, packing.rows_q), (k, packing.rows_k), (v, packing.rows_k)):
        counts = torch.zeros(len(x), dtype=torch.bool)
        for each in rows:
            counts[each.start : each.stop] = True
        x[~counts] = torch.nan
    packed = quant.quantize_varlen_qkv(q, k, v, **lengths, block_rows=block_rows, seed=3)
    shapes = [tuple(descale.shape) for descale in packed[3:]]
    blocks_q, blocks_k = (1, 2) if is_used else (3, 3)  # of 64 rows in the longest sequence
    by_block = [(5, 2, blocks_q), (5, 2, blocks_k), (5, 2, blocks_k)]
    assert shapes == ([(5, 2)] * 3 if block_rows is None else by_block)
    for b, (rows_q, rows_k) in enumerate(zip(packing.rows_q, packing.rows_k, strict=True)):
        of = [slice(rows.start, rows.stop) for rows in (rows_q, rows_k, rows_k)]
        own = quant.quantize_qkv(
            *(x[None, rows] for x, rows in zip((q, k, v), of, strict=True)),
            block_rows=block_rows,
            seed=3,
        )
        for x, rows, expected in zip(packed[:3], of, own[:3], strict=True):
            assert torch.equal(x[rows].float(), expected[0].float())
        for descale, expected in zip(packed[3:], own[3:], strict=True):
            if block_rows is None:
                assert torch.equal(descale[b], expected[0])
            else:
                blocks = expected.shape[2]
                assert torch.equal(descale[b, :, :blocks], expected[0])
                assert descale[b, :, blocks:].eq(1).all()


def test_no_packed_sequences_are_no_descales() -> None:
    none = torch.zeros(1, dtype=torch.int32)
    x = torch.ones(3, 2, 16)
    packed = quant.quantize_varlen_qkv(
        *(x, x, x), cu_seqlens_q=none, cu_seqlens_k=none, max_seqlen_q=0, max_seqlen_k=0
    )
    assert packed.q.float().eq(0).all() and packed.q_descale.shape == (0, 2, 0)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"cu_seqlens_q": [0, 8]}, InvalidTypeError, "cu_seqlens_q is not a tensor of integers"),
        ({"cu_seqlens_q": torch.zeros(0).int()}, InvalidArgumentError, "cu_seqlens_q does not"),
        ({"cu_seqlens_k": torch.zeros(3).int()}, InvalidArgumentError, r"shape \(2,\)"),
        ({"seqused_k": torch.zeros(2).int()}, InvalidArgumentError, r"shape \(1,\)"),
        ({"max_seqlen_k": 7}, InvalidArgumentError, "at least 8"),
        ({"block_rows": 0}, InvalidArgumentError, "block_rows"),
    ],
)
def test_wrong_lengths_are_refused(change, error, message) -> None:
    x, borders = torch.zeros(8, 2, 16), torch.tensor([0, 8])
    lengths = {"cu_seqlens_q": borders, "cu_seqlens_k": borders}
    options = {**lengths, "max_seqlen_q": 8, "max_seqlen_k": 8, **change}
    with pytest.raises(error, match=message):
        quant.quantize_varlen_qkv(x, x, x, **options)
    with pytest.raises(InvalidArgumentError, match="three dimensions"):
        quant.quantize_varlen_qkv(x[None], x, x, **options)


@pytest.mark.parametrize("dim", [8, 64, 96, 192, 256])
def test_the_rotation_is_orthogonal_and_depends_on_its_seed(dim: int) -> None:
    matrix = quant.rotate(torch.eye(dim, dtype=torch.float64), seed=3).double()
    assert torch.allclose(matrix @ matrix.T, torch.eye(dim, dtype=torch.float64), atol=1e-6)
    run = dim & -dim
    assert torch.allclose(matrix[matrix != 0].abs(), torch.tensor(run**-0.5).double())
    assert (matrix != 0).sum(dim=1).eq(run).all()
    assert not torch.equal(matrix, quant.rotate(torch.eye(dim), seed=4).double())


def test_the_rotation_leaves_scores_unchanged_and_spreads_an_outlier() -> None:
    q, k = normal(1, 20, 2, 64), normal(1, 30, 2, 64, seed=1)
    k[0, 3, 1, 7] = 1000.0
    scores = torch.einsum("bihd,bjhd->bhij", q, k)
    rotated = torch.einsum("bihd,bjhd->bhij", quant.rotate(q, seed=5), quant.rotate(k, seed=5))
    assert torch.allclose(scores, rotated, atol=2e-3)
    assert quant.rotate(k, seed=5).abs().max() < 1000.0 / 64**0.5 + 5.0


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: quant.quantize(x[0]), InvalidArgumentError, "four dimensions"),
        (lambda x: quant.quantize(x.int()), InvalidTypeError, "floating-point"),
        (lambda x: quant.quantize(x, heads_k=3), InvalidArgumentError, "do not divide"),
        (lambda x: quant.quantize(x, block_rows=0), InvalidArgumentError, "block_rows"),
        (lambda x: quant.rotate(x.int()), InvalidTypeError, "floating-point"),
        (lambda x: quant.rotate(x, seed=2**63), InvalidArgumentError, "more than 64 bits"),
        (lambda x: quant.rotate(x, seed="a"), InvalidTypeError, "seed is not an integer"),
        (lambda x: quant.quantize(x, block_rows=1.5), InvalidTypeError, "block_rows is not an"),
        (lambda x: quant.quantize(x, block_rows=True), InvalidTypeError, "block_rows is not an"),
        (lambda x: quant.quantize_qkv(x, x[..., :8], x), InvalidArgumentError, "do not fit"),
        (
            lambda x: quant.dequantize(*quant.quantize(x), block_rows=4),
            InvalidArgumentError,
            "wrong number of dimensions",
        ),
        (
            lambda x: quant.dequantize(*quant.quantize(x, block_rows=4), block_rows=2),
            InvalidArgumentError,
            "2 blocks of 2 rows for 8",
        ),
        (lambda x: quant.expand_descale(x[0, 0], 8, 3), InvalidArgumentError, "do not divide"),
        (lambda x: quant.rotate(x[..., :0]), InvalidArgumentError, "no columns"),
        (lambda x: quant.rotate(x.sum()), InvalidArgumentError, "no columns"),
    ],
)
def test_wrong_arguments_are_refused(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call(torch.zeros(1, 8, 2, 16))


def test_signs_are_those_of_torchs_generator_and_belong_to_the_caller() -> None:
    for seed in (0, 5, -1):
        drawn = torch.randint(0, 2, (64,), generator=torch.Generator().manual_seed(seed))
        for _ in range(2):
            signs = torch.ops.cute_fa.random_signs(64, seed, torch.device("cpu"))
            assert torch.equal(signs, 2 * drawn - 1)
            signs.zero_()
    fake = torch.ops.cute_fa.random_signs(64, 0, torch.device("meta"))
    assert fake.shape == signs.shape and fake.dtype == signs.dtype and fake.is_meta


def are_equal(x: torch.Tensor, y: torch.Tensor) -> bool:
    return x.dtype == y.dtype and torch.equal(x.float(), y.float())


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_quantisation_is_the_quantisation(backend: str) -> None:
    q, k, v = (normal(1, 100, 2, 64, seed=seed).bfloat16() for seed in range(3))

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> quant.QuantizedQKV:
        return quant.quantize_qkv(q, k, v, block_rows=32, seed=3)

    compiled = torch.compile(call, backend=backend, fullgraph=True, dynamic=False)
    for inputs in ((q, k, v), (v, q, k)):
        assert all(map(are_equal, compiled(*inputs), call(*inputs)))


def test_a_compiled_quantisation_of_packed_sequences_is_the_quantisation() -> None:
    q, k, v = (normal(100, 2, 64, seed=seed) for seed in range(3))
    borders = torch.tensor([0, 30, 30, 90], dtype=torch.int32)
    lengths = {"cu_seqlens_q": borders, "cu_seqlens_k": borders}

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> quant.QuantizedQKV:
        return quant.quantize_varlen_qkv(q, k, v, **lengths, max_seqlen_q=60, max_seqlen_k=60)

    compiled = torch.compile(call, backend="eager", fullgraph=True)
    assert all(map(are_equal, compiled(q, k, v), call(q, k, v)))
