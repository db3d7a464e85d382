"""The calling convention that every forward kernel of this library shares, as fake tensors.

One compile against these serves every batch, sequence length, head count and stride: only the dtype
and the two head dims are static. TVM-FFI checks the rest (dtype, rank, equal dimensions, unit last
stride, alignment) on each call.

    dense    mQ (B, Sq, Hq, D)  mK (B, Sk, Hk, D)  mV (B, Sk, Hk, Dv)  mO (B, Sq, Hq, Dv)
             mLSE (B, Hq, Sq)  *workspace  softmax_scale  softcap  window_left  window_right  stream
    varlen   mQ (Tq, Hq, D)  mK (Tk, Hk, D)  mV (Tk, Hk, Dv)  mO (Tq, Hq, Dv)
             mLSE (Hq, Tq)  *workspace  softmax_scale  softcap  window_left  window_right  stream
             cu_seqlens_q  cu_seqlens_k  seqused_q | None  seqused_k | None  max_seqlen_q

The stream comes from TVM-FFI's environment and is not passed. A kernel's ``__call__`` takes what
follows it as ``*lengths``, for ``blocks.seqlen.sequences``. Of e4m3 inputs the output is bfloat16,
and their descales, q, k, v (B, Hk) fp32 with any strides, or (B, Hk, blocks) for a kernel of block
descales, stand before the lengths.
"""

from __future__ import annotations

import cutlass
from cutlass import cute
from cutlass.cute.runtime import make_fake_compact_tensor, make_fake_stream, make_fake_tensor

from cute_fa.blocks.plan import ForwardPlan, TmaForwardPlan
from cute_fa.blocks.tiles import CHUNK_BYTES
from cute_fa.problem import out_dtype

DTYPES = {
    "float16": cutlass.Float16,
    "bfloat16": cutlass.BFloat16,
    "float8_e4m3fn": cutlass.Float8E4M3FN,
}


def fake_forward_arguments(config: ForwardPlan) -> tuple:
    """Symbolic arguments to compile a forward kernel with, in the module's order.

    mQ, mK, mV and mO have a unit last stride and other strides in multiples of 16 bytes, 64 bits
    wide; the LSE and the ``config``'s workspace are fp32 and contiguous. The lengths are int32:
    cu_seqlens (B + 1,) and seqused (B,) contiguous, max_seqlen_q.
    """
    element = DTYPES[config.dtype]
    batch, seqlen_q, seqlen_k, heads_q, heads_k = (cute.sym_int() for _ in range(5))
    outer = () if config.is_varlen else (batch,)

    def strided(*shape, dtype=element):
        shape = (*outer, *shape)
        chunk = 8 * CHUNK_BYTES // dtype.width
        strides = tuple(cute.sym_int64(divisibility=chunk) for _ in shape[:-1])
        return make_fake_tensor(dtype, shape, (*strides, 1), assumed_align=CHUNK_BYTES)

    def contiguous(*shape, dtype=cutlass.Float32):
        order = tuple(reversed(range(len(shape))))
        return make_fake_compact_tensor(dtype, shape, stride_order=order)

    def strided_freely(*shape):
        strides = tuple(cute.sym_int64() for _ in shape)
        return make_fake_tensor(cutlass.Float32, shape, strides, assumed_align=4)

    workspace = config.workspace(batch, seqlen_q, heads_q)
    lengths: tuple = ()
    if config.is_varlen:
        borders = cute.sym_int()  # B + 1
        used_q, used_k = (
            contiguous(batch, dtype=cutlass.Int32) if is_used else None
            for is_used in (config.has_seqused_q, config.has_seqused_k)
        )
        lengths = (
            contiguous(borders, dtype=cutlass.Int32),
            contiguous(borders, dtype=cutlass.Int32),
            used_q,
            used_k,
            cutlass.Int32(0),
        )
    descales: tuple = ()
    if isinstance(config, TmaForwardPlan) and config.is_fp8:
        by_block = config.has_block_descales
        descales = tuple(
            strided_freely(batch, heads_k, *((cute.sym_int(),) if by_block else ()))
            for _ in range(3)
        )
    return (
        strided(seqlen_q, heads_q, config.head_dim),
        strided(seqlen_k, heads_k, config.head_dim),
        strided(seqlen_k, heads_k, config.head_dim_v),
        strided(seqlen_q, heads_q, config.head_dim_v, dtype=DTYPES[out_dtype(config.dtype)]),
        contiguous(*outer, heads_q, seqlen_q),
        *(contiguous(*buffer.shape) for buffer in workspace),
        cutlass.Float32(1.0),
        cutlass.Float32(0.0),
        cutlass.Int32(0),
        cutlass.Int32(0),
        make_fake_stream(use_tvm_ffi_env_stream=True),
        *descales,
        *lengths,
    )
