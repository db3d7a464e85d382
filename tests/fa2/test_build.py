"""What the compiler makes of FA2: no spills, and just the instructions that the tiles imply."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from cute_fa.asm.tools import find_tool
from cute_fa.build import compile
from cute_fa.errors import MissingToolError

MASKS = {
    "full": {},
    "causal": {"causal": True},
    "window-softcap": {"window_size": (64, 64), "softcap": 15.0},
}
MASKS["varlen-window-softcap"] = {
    **MASKS["window-softcap"],
    "varlen": True,
    "seqused_q": True,
    "seqused_k": True,
}
# sm_80's table under the heaviest mask, and other code generators where it comes closest to its 255
# registers. dtypes in turn: they differ in one opcode. Kernels that are run are looked at as well
# (tests/rungs/bench.py), and rungs/test_spills.py has the rest.
GRID = [
    *(("sm_80", dim, "window-softcap") for dim in (32, 64, 96, 128, 192, 256)),
    *((arch, 128, "causal") for arch in ("sm_80", "sm_86", "sm_90a", "sm_100a", "sm_120a")),
    # Lengths from memory cost a few registers more.
    ("sm_80", 256, "varlen-window-softcap"),
]


def _compile(arch: str, head_dim: int, mask: str):
    dtype = "bfloat16" if head_dim % 64 else "float16"
    return compile("fa2", arch=arch, dtype=dtype, head_dim=head_dim, **MASKS[mask])


@pytest.mark.parametrize(("arch", "head_dim", "mask"), GRID)
def test_spills_nothing(arch, head_dim, mask):
    compiled = _compile(arch, head_dim, mask)
    resources = compiled.resources
    assert f".target {arch}" in compiled.ptx
    assert resources.stack_bytes == 0
    assert resources.registers <= 65536 // compiled.config.num_threads
    assert ".local" not in compiled.ptx and "st.local" not in compiled.ptx


def _expected(config, bodies: int) -> Counter:
    """Instructions of a CTA's code, for ``bodies`` copies of the loop body."""
    warp_m = config.tile_m // 16 // config.num_warps  # 16-row blocks of a warp
    d, dv, n = config.padded_d // 16, config.padded_dv // 16, config.tile_n // 16
    chunks_q, chunks_k, chunks_v = (
        tile // 16 // config.num_threads
        for tile in (
            2 * config.tile_m * config.padded_d,
            config.smem_k_bytes,
            config.smem_v_bytes,
        )
    )
    stages, rows = config.stages, 2 * warp_m
    return Counter(
        {
            "mma": bodies * (warp_m * 2 * n * d + warp_m * 2 * dv * n),
            "ldmatrix": bodies * (warp_m * d + n * d),
            "ldmatrix.trans": bodies * dv * n,
            "cp.async": chunks_q
            + stages * chunks_k
            + (stages - 1) * chunks_v
            + bodies * (chunks_k + chunks_v),
            "ex2": bodies * rows * (config.tile_n // 4 + 1),
            "st.global.v4": 2 * config.tile_m * config.padded_dv // 16 // config.num_threads,
        }
    )


PTX_OPCODES = {
    "mma": r"\bmma\.sync",
    "ldmatrix": r"\bldmatrix\S*x4\.shared",
    "ldmatrix.trans": r"\bldmatrix\S*x4\.trans",
    "cp.async": r"\bcp\.async\.cg",
    "ex2": r"\bex2\.",
    "st.global.v4": r"\bst\.global\.v4\.b32",
}
SASS_OPCODES = {
    "mma": r"\bHMMA\.16816",
    "ldmatrix": r"\bLDSM\.16\.M88\.4",
    "ldmatrix.trans": r"\bLDSM\.16\.MT88\.4",
    "cp.async": r"\bLDGSTS\.",
    "ex2": r"\bMUFU\.EX2",
    "st.global.v4": r"\bSTG\.E\.128",
}


def _count(text: str, opcodes: dict[str, str]) -> Counter:
    return Counter({name: len(re.findall(regex, text)) for name, regex in opcodes.items()})


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_ptx_is_what_the_tiles_imply(head_dim):
    """A causal kernel has two loop bodies; nothing is loaded, multiplied or stored piecemeal."""
    compiled = _compile("sm_80", head_dim, "causal")
    assert _count(compiled.ptx, PTX_OPCODES) == _expected(compiled.config, bodies=2)


def test_sass_is_what_the_tiles_imply():
    """ptxas neither spills nor duplicates: the same counts in the machine code."""
    try:
        find_tool("nvdisasm")
    except MissingToolError as error:
        pytest.skip(str(error))
    compiled = _compile("sm_80", 128, "causal")
    assert _count(compiled.sass, SASS_OPCODES) == _expected(compiled.config, bodies=2)
    assert not re.search(r"\b(LDL|STL)\b", compiled.sass)
