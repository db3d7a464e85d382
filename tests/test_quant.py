"""FP8 quantisation: scales per head and per block, and the rotation that spreads outliers."""

from __future__ import annotations

import pytest
import torch

from cute_fa import quant
from cute_fa.errors import InvalidArgumentError, InvalidTypeError


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
        (lambda x: quant.quantize_qkv(x, x[..., :8], x), InvalidArgumentError, "do not fit"),
        (
            lambda x: quant.dequantize(*quant.quantize(x), block_rows=4),
            InvalidArgumentError,
            "wrong number of dimensions",
        ),
    ],
)
def test_wrong_arguments_are_refused(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call(torch.zeros(1, 8, 2, 16))
