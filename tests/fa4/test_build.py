"""What the compiler makes of FA4: products, copies, registers, and its softmax loop."""

from __future__ import annotations

import re

import pytest

from cute_fa.asm.tools import find_tool
from cute_fa.build import compile
from cute_fa.errors import MissingToolError
from cute_fa.fa4.config import REGISTERS

MASKS = {
    "full": {},
    "causal": {"causal": True},
    "window-softcap": {"window_size": (64, 64), "softcap": 15.0},
}


def _compile(head_dim: int, mask: str, **how):
    return compile(
        "fa4",
        **{"arch": "sm_100a", "dtype": "bfloat16", "head_dim": head_dim, **how, **MASKS[mask]},
    )


@pytest.mark.parametrize(
    ("head_dim", "mask"),
    [(64, "full"), (128, "causal"), (128, "full"), (128, "window-softcap"), (256, "full")],
)
def test_spills_nothing(head_dim, mask):
    """And each role gets the registers that the plan gives it."""
    compiled = _compile(head_dim, mask)
    config, resources = compiled.config, compiled.resources
    assert resources.stack_bytes == resources.spill_store_bytes == 0
    assert tuple(resources.role_registers.values()) == REGISTERS[config.num_q_tiles]


@pytest.mark.parametrize(("head_dim", "mask"), [(64, "full"), (128, "full"), (256, "full")])
def test_ptx_is_what_the_tiles_imply(head_dim, mask):
    """S for the first steps and in the loop, O in the loop: whole k-steps, issued once each."""
    compiled = _compile(head_dim, mask)
    config, ptx = compiled.config, compiled.ptx
    products = re.findall(r"tcgen05\.mma\.cta_group::1\.kind::f16\S* \[%r\d+\], (\[?%)", ptx)
    from_tmem = sum(operand.startswith("[") for operand in products)
    assert from_tmem == config.tile_n // 16
    assert len(products) - from_tmem == 2 * config.padded_d // 16
    panels = config.padded_d // 64
    # Q's tiles; K first and in the loop (with one Q tile, also its second block); V in the loop.
    loads = config.num_q_tiles + (4 if config.num_q_tiles == 1 else 3)
    assert ptx.count("cp.async.bulk.tensor.4d.shared::cta.global") == panels * loads
    stores = ptx.count("cp.async.bulk.tensor.4d.global.shared::cta")
    assert stores == panels * config.num_q_tiles
    assert "ld.global" not in ptx and "wgmma" not in ptx and "mma.sync" not in ptx
    assert ptx.count("tcgen05.alloc") == ptx.count("tcgen05.dealloc") == 1


def _bodies(sass: str, tile_n: int) -> list[list[str]]:
    """Mnemonics from the loads of a row of S to its last store of P, masked and not masked."""
    names = re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?([A-Za-z0-9_.]+)", sass, re.MULTILINE)
    chunks = tile_n // 32
    loads = [n for n, name in enumerate(names) if name == "LDTM.x32"]
    stores = [n for n, name in enumerate(names) if name == "STTM.x16"]
    starts = loads[::chunks]
    ends = [[s for s in stores if s > start][chunks - 1] for start in starts]
    return [names[start : end + 1] for start, end in zip(starts, ends, strict=True)]


@pytest.mark.parametrize(
    ("head_dim", "mask", "arch", "cubics"),
    [(128, "causal", "sm_100a", 24), (64, "full", "sm_103a", 0)],
)
def test_softmax_loop(head_dim, mask, arch, cubics):
    """Per row of 128 scores: packed FMAs, three-input maxima, one conversion for two, and as many
    exponentials of either kind as the plan says; the factor's may stand elsewhere."""
    try:
        find_tool("nvdisasm")
    except MissingToolError as error:
        pytest.skip(str(error))
    compiled = _compile(head_dim, mask, arch=arch)
    bodies = _bodies(compiled.sass, compiled.config.tile_n)
    assert len(bodies) == 2
    for body in bodies:
        count = {name: body.count(name) for name in set(body)}
        assert count["MUFU.EX2"] - (128 - cubics) in (0, 1)
        # The scale and anchor of 64 pairs, three steps of each cubic, and maybe the sums.
        assert count["FFMA2"] - (64 + 3 * cubics // 2) in (0, 1)
        # Two new values an instruction, and one clamp for each cubic.
        assert count["FMNMX3"] == 63 and count["FMNMX"] <= cubics + 2
        packed = sum(n for name, n in count.items() if name.startswith("F2FP"))
        assert packed == 64
        assert not {"LDL", "STL", "LDS"} & set(body)
        # Nothing is moved about for the sake of packing.
        assert sum(n for name, n in count.items() if "MOV" in name) <= 4
