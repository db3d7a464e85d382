"""Query heads that share row tiles: when, what it changes, and what is refused."""

from __future__ import annotations

import pytest
import torch

from cute_fa import flash_attn_func, flash_attn_varlen_func
from cute_fa.errors import InvalidTypeError, UnsupportedError
from cute_fa.ops import last_launches


def _tensors(seqlen_q: int, heads_q: int, heads_k: int = 1):
    generator = torch.Generator().manual_seed(7)

    def normal(rows: int, heads: int) -> torch.Tensor:
        return torch.randn(1, rows, heads, 64, generator=generator).to(torch.bfloat16)

    return normal(seqlen_q, heads_q), normal(90, heads_k), normal(90, heads_k)


def _ctas(pack_gqa: bool | None, q, k, v) -> tuple[int, torch.Tensor, torch.Tensor]:
    out, lse = flash_attn_func(
        q, k, v, causal=True, generation="fa3", arch="sm_90a", return_lse=True, pack_gqa=pack_gqa
    )
    (launch,) = last_launches()
    return launch.grid[0], out, lse


def test_few_queries_are_packed_and_nothing_changes():
    """8 heads of 5 queries are one tile of 40 rows, not eight of 5."""
    results = {choice: _ctas(choice, *_tensors(5, 8)) for choice in (None, True, False)}
    assert [results[choice][0] for choice in (None, True, False)] == [1, 1, 8]
    for _, out, lse in results.values():
        torch.testing.assert_close(out, results[False][1], rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(lse, results[False][2], rtol=0, atol=1e-5)


def test_full_tiles_and_odd_groups_are_not_packed_unasked():
    """2 heads of 192 queries are two tiles either way; 3 heads do not divide a box of 64 rows."""
    assert _ctas(None, *_tensors(192, 2))[0] == 2
    assert _ctas(None, *_tensors(5, 3))[0] == 3


def test_packed_sequences():
    q, k, v = (x[0] for x in _tensors(5, 8))
    borders_q, borders_k = (torch.tensor(x, dtype=torch.int32) for x in ([0, 2, 5], [0, 40, 90]))

    def run(pack_gqa: bool | None) -> torch.Tensor:
        return flash_attn_varlen_func(
            *(q, k, v),
            cu_seqlens_q=borders_q,
            cu_seqlens_k=borders_k,
            max_seqlen_q=3,
            max_seqlen_k=50,
            generation="fa3",
            pack_gqa=pack_gqa,
        )

    apart = run(False)
    ctas = last_launches()[0].grid[0]
    torch.testing.assert_close(run(None), apart, rtol=1e-2, atol=1e-2)
    assert last_launches()[0].grid[0] < ctas


@pytest.mark.parametrize(
    ("generation", "heads", "words"),
    [("fa3", 3, "a divisor of 64"), ("fa2", 8, "row tiles of its own")],
)
def test_what_cannot_be_packed_is_refused_when_asked_for(generation, heads, words):
    with pytest.raises(UnsupportedError, match=words):
        flash_attn_func(*_tensors(5, heads), generation=generation, pack_gqa=True)


def test_one_head_per_kv_head_has_nothing_to_pack():
    assert flash_attn_func(*_tensors(5, 1), generation="fa2", pack_gqa=True).shape == (1, 5, 1, 64)


def test_pack_gqa_is_a_flag():
    with pytest.raises(InvalidTypeError, match="pack_gqa is not a bool"):
        flash_attn_func(*_tensors(5, 8), pack_gqa=1)  # type: ignore[arg-type]
