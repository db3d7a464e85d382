"""What the compiler makes of FA3: no spills, the intended wgmma and TMA, and the overlap."""

from __future__ import annotations

import re

import pytest

from cute_fa.asm.tools import find_tool
from cute_fa.build import compile
from cute_fa.errors import MissingToolError

MASKS = {
    "full": {},
    "causal": {"causal": True},
    "window-softcap": {"window_size": (64, 64), "softcap": 15.0},
    "varlen": {"varlen": True},
    "varlen-window-packed": {
        "varlen": True,
        "seqused_q": True,
        "seqused_k": True,
        "window_size": (64, 64),
        "packed_group": 8,
    },
    "fp8": {"dtype": "float8_e4m3fn"},
    "fp8-causal": {"dtype": "float8_e4m3fn", "causal": True},
    "fp8-window-softcap-blocks": {
        "dtype": "float8_e4m3fn",
        "window_size": (64, 64),
        "softcap": 15.0,
        "block_descales": True,
    },
}
MASKS["fp8-varlen-window-softcap-blocks"] = {
    **MASKS["fp8-window-softcap-blocks"],
    "varlen": True,
    "seqused_q": True,
    "seqused_k": True,
}
# Where most is alive beside the accumulators. Kernels that are run are looked at as well
# (tests/rungs/bench.py), and rungs/test_spills.py has the whole table.
GRID = [
    *((dim, dim, "window-softcap") for dim in (128, 256)),
    *((dim, dim, "varlen-window-packed") for dim in (64, 256)),
    *((dim, dim, "fp8-window-softcap-blocks") for dim in (128, 192)),
    (256, 256, "fp8-varlen-window-softcap-blocks"),
]


def _compile(head_dim: int, head_dim_v: int, mask: str):
    features = {"dtype": "bfloat16" if head_dim % 64 else "float16", **MASKS[mask]}
    return compile("fa3", arch="sm_90a", head_dim=head_dim, head_dim_v=head_dim_v, **features)


@pytest.mark.parametrize(("head_dim", "head_dim_v", "mask"), GRID)
def test_spills_nothing(head_dim, head_dim_v, mask):
    compiled = _compile(head_dim, head_dim_v, mask)
    config, resources = compiled.config, compiled.resources
    assert resources.stack_bytes == resources.spill_store_bytes == 0
    roles = tuple(resources.role_registers.values())
    assert roles == (config.producer_registers, config.consumer_registers)


@pytest.mark.parametrize(("head_dim", "mask", "bodies"), [(64, "full", 1), (128, "causal", 2)])
def test_ptx_is_what_the_tiles_imply(head_dim, mask, bodies):
    """Products of the first block, of each loop body, and of the last block; loads by panels."""
    compiled = _compile(head_dim, head_dim, mask)
    config, ptx = compiled.config, compiled.ptx
    dtype = "f16" if config.dtype == "float16" else "bf16"
    products = re.findall(r"wgmma\.mma_async\.sync\.aligned\.(m64n\d+k16)\.f32\.(\S+) ", ptx)
    shape_qk, shape_pv = f"m64n{config.tile_n}k16", f"m64n{config.padded_dv}k16"
    steps = (1 + bodies) * (config.padded_d // 16), (1 + bodies) * (config.tile_n // 16)
    assert len(products) == sum(steps)
    assert {kind for _, kind in products} == {f"{dtype}.{dtype}"}
    if shape_qk != shape_pv:
        shapes = [shape for shape, _ in products]
        assert (shapes.count(shape_qk), shapes.count(shape_pv)) == steps
    panels = config.padded_d // 64
    # Q's strips; K first and in the loop; V in the loop and last.
    assert ptx.count("cp.async.bulk.tensor.4d.shared::cta.global") == panels * (
        config.num_consumers + 4
    )
    assert ptx.count("cp.async.bulk.tensor.4d.global.shared::cta") == panels
    assert "ld.global" not in ptx and "cp.async.cg" not in ptx
    assert ptx.count("setmaxnreg.dec") == ptx.count("setmaxnreg.inc") == 1


@pytest.mark.parametrize(("mask", "dims"), [("varlen", 4), ("varlen-window-packed", 5)])
def test_packed_sequences_and_heads_are_boxes_too(mask, dims):
    """Tails and groups cost no instruction: as many copies as for dense tiles, of a dimension more
    for Q and O if heads are packed, and no predicated loads. Lengths are all that threads load."""
    ptx = _compile(128, 128, mask).ptx
    loads = "cp.async.bulk.tensor.{}d.shared::cta.global"
    keys = 2 * 4  # two panels; K and V of the first or last block, and of the loop
    queries = 2 * 2  # two panels of two strips
    if dims == 4:
        assert ptx.count(loads.format(4)) == keys + queries
    else:
        assert (ptx.count(loads.format(4)), ptx.count(loads.format(5))) == (keys, queries)
    assert ptx.count(f"cp.async.bulk.tensor.{dims}d.global.shared::cta") == 2
    assert set(re.findall(r"ld\.global\S*", ptx)) == {"ld.global.b32"}
    assert "cp.async.c" not in ptx


def test_fp8_products_take_keys_as_they_come():
    """Twice the depth of 16-bit products; V through ldmatrix and stmatrix, by two warps; and P from
    the accumulators without a shuffle: all there are reduce a row over its quad."""
    compiled = _compile(128, 128, "fp8")
    config, ptx = compiled.config, compiled.ptx
    products = re.findall(r"wgmma\.mma_async\S*\.(m64n\d+k32)\.f32\.e4m3\.e4m3 ", ptx)
    assert len(products) == ptx.count("wgmma.mma_async") == 2 * (128 // 32 + config.tile_n // 32)
    assert "QGMMA" in compiled.sass and "HGMMA" not in compiled.sass
    turned = (config.tile_n // 32) * (config.padded_dv // 16 // 2)
    assert ptx.count("ldmatrix.sync.aligned.m8n8.x4.trans") == ptx.count("ldmatrix") == turned
    assert ptx.count("prmt.b32") >= 4 * turned
    of_o = config.padded_dv // 16
    assert ptx.count("stmatrix.sync.aligned.m8n8.x4.shared") == turned + of_o
    # Two for each row's maximum in a block, and for its l at the end; four make numbers uniform.
    rows, softmaxes = 2, 2
    assert ptx.count("shfl.sync.bfly") == rows * 2 * (softmaxes + 1)
    assert ptx.count("shfl.sync.idx") == ptx.count("shfl.sync") - ptx.count("shfl.sync.bfly") == 4
    assert ptx.count("cvt.rn.satfinite.e4m3x2.f32") == softmaxes * config.tile_n // 4
    # Loads of V do not wait for one another: a warp issues in order.
    under_way = re.findall(r"LDSM|STSM", compiled.sass)[: 2 * turned]
    assert under_way == ["LDSM", "LDSM", "STSM", "STSM"] * (turned // 2)


def _events(sass: str) -> list[str]:
    """wgmma waits, exponentials and arrivals of a kernel, in order."""
    names = {
        "gsb0, 0x1": "wait 1",
        "gsb0, 0x0": "wait 0",
        "MUFU.EX2": "ex2",
        "SYNCS.ARRIVE": "arrive",
    }
    found = re.findall(
        r"WARPGROUP\.DEPBAR\.LE (gsb0, 0x[01])|(MUFU\.EX2)|(SYNCS\.ARRIVE)|([HQ]GMMA)", sass
    )
    return [names.get("".join(match), "gemm") for match in found]


@pytest.mark.parametrize(
    ("head_dim", "mask", "bodies"),
    [
        *((128, "full", 1), (64, "causal", 2), (256, "causal", 2)),
        *((128, "fp8", 1), (64, "fp8-causal", 2)),
    ],
)
def test_softmax_runs_while_pv_is_in_flight(head_dim, mask, bodies):
    """In every loop body all exponentials stand between the two waits, in the machine code, and
    behind the word that K has been read."""
    try:
        find_tool("nvdisasm")
    except MissingToolError as error:
        pytest.skip(str(error))
    compiled = _compile(head_dim, head_dim, mask)
    events = _events(compiled.sass)
    gemms = re.findall(r"[HQ]GMMA\S* .*", compiled.sass)
    # One completion per product and one arrival per turn: a compiler that serialises wgmma, which
    # it does without an error, makes one of each per instruction.
    assert sum("gsb0" in line for line in gemms) == 2 * (1 + bodies)
    assert compiled.sass.count("WARPGROUP.ARRIVE") == 2 + bodies
    starts = [i for i, event in enumerate(events) if event == "wait 1"]
    assert len(starts) == bodies
    for start in starts:
        stop = events.index("wait 0", start)
        exponentials = ["ex2"] * (compiled.config.tile_n // 2 + 2)
        assert events[start + 1 : stop] == ["arrive", *exponentials]
    assert events.count("ex2") == (1 + bodies) * (compiled.config.tile_n // 2 + 2)
