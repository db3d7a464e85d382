"""The calling convention that every forward kernel of this library shares, as fake tensors.

One compile against these serves every batch, sequence length, head count and stride: only the dtype
and the two head dims are static. TVM-FFI checks the rest (dtype, rank, equal dimensions, unit last
stride, alignment) on each call.
"""

from __future__ import annotations

import cutlass
from cutlass import cute
from cutlass.cute.runtime import make_fake_compact_tensor, make_fake_stream, make_fake_tensor

from cute_fa.blocks.tiles import CHUNK_BYTES

DTYPES = {"float16": cutlass.Float16, "bfloat16": cutlass.BFloat16}


def fake_forward_arguments(
    dtype: str,
    head_dim: int,
    head_dim_v: int,
    workspace: tuple[tuple[str, tuple[object, ...]], ...] = (),
) -> tuple:
    """Arguments of a forward kernel: tensors, scale, softcap, window left and right, stream.

    mQ (B, Sq, Hq, D), mK (B, Sk, Hk, D), mV (B, Sk, Hk, Dv), mO (B, Sq, Hq, Dv) with a unit last
    stride and other strides in multiples of 16 bytes, 64 bits wide; mLSE (B, Hq, Sq) fp32,
    contiguous. ``workspace`` lists contiguous fp32 tensors by shape, with "B", "Sq", "Hq", "Dv" as
    symbols.
    """
    element = DTYPES[dtype]
    chunk = 8 * CHUNK_BYTES // element.width
    batch, seqlen_q, seqlen_k, heads_q, heads_k = (cute.sym_int() for _ in range(5))

    def strided(*shape):
        strides = tuple(cute.sym_int64(divisibility=chunk) for _ in shape[:-1])
        return make_fake_tensor(element, shape, (*strides, 1), assumed_align=CHUNK_BYTES)

    def contiguous(*shape):
        order = tuple(reversed(range(len(shape))))
        return make_fake_compact_tensor(cutlass.Float32, shape, stride_order=order)

    symbols = {"B": batch, "Sq": seqlen_q, "Hq": heads_q, "Dv": head_dim_v}
    extra = (contiguous(*(symbols[letter] for letter in shape)) for _, shape in workspace)
    return (
        strided(batch, seqlen_q, heads_q, head_dim),
        strided(batch, seqlen_k, heads_k, head_dim),
        strided(batch, seqlen_k, heads_k, head_dim_v),
        strided(batch, seqlen_q, heads_q, head_dim_v),
        contiguous(batch, heads_q, seqlen_q),
        *extra,
        cutlass.Float32(1.0),
        cutlass.Float32(0.0),
        cutlass.Int32(0),
        cutlass.Int32(0),
        make_fake_stream(use_tvm_ffi_env_stream=True),
    )
