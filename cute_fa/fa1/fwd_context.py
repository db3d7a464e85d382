"""What the parts of the FA1 step share."""

from __future__ import annotations

from dataclasses import dataclass

import cutlass
from cutlass import cute

from cute_fa.blocks.seqlen import Band
from cute_fa.fa1.config import Fa1FwdConfig


@dataclass(frozen=True)
class HeadTensors:
    """One query head's tensors in HBM; the last three live from one K/V block to the next."""

    gQ: cute.Tensor  # (Sq, D)
    gK: cute.Tensor  # (Sk, D)
    gV: cute.Tensor  # (Sk, Dv)
    gO: cute.Tensor  # (Sq, Dv)
    gLSE: cute.Tensor  # (Sq) fp32, natural log
    gOaccum: cute.Tensor  # (Sq, Dv) fp32, normalised over the keys seen so far
    gRowMax: cute.Tensor  # (Sq) fp32, m in log2 units
    gRowSum: cute.Tensor  # (Sq) fp32, l


@dataclass(frozen=True)
class SharedTensors:
    sQ: cute.Tensor  # (M, D, 1)
    sK: cute.Tensor  # (N, D, 1)
    sV: cute.Tensor  # (N, tile_dv, chunks): each chunk swizzled by itself, as an operand of its own
    sPartialO: cute.Tensor  # (warps, M, tile_dv) fp32
    sWarpMax: cute.Tensor  # (warps, M) fp32
    sWarpSum: cute.Tensor  # (warps, M) fp32
    sScaleOld: cute.Tensor  # (M) fp32
    sScaleNew: cute.Tensor  # (M) fp32


@dataclass(frozen=True)
class Visit:
    """One step of the double loop. First and last are those of this Q block over its K/V blocks;
    masked means that some score of the step is hidden."""

    m_block: cutlass.Int32
    n_block: cutlass.Int32
    is_first: cutlass.Boolean
    is_last: cutlass.Boolean
    is_masked: cutlass.Boolean


@dataclass(frozen=True)
class Fa1Context:
    config: Fa1FwdConfig
    band: Band
    gmem: HeadTensors
    smem: SharedTensors
    score_scale: cutlass.Float32
    softcap_log2: cutlass.Float32
    tidx: cutlass.Int32
    lane: cutlass.Int32
    warp_idx: cutlass.Int32
