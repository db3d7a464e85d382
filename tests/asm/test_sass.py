"""Disassembly, and control flow that ptxas is known to write."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from cute_fa.asm import disassemble, sass, tools
from cute_fa.asm.hot import sass_loops
from cute_fa.asm.loops import natural_loops
from cute_fa.asm.sass import SassKernel, parse_sass
from cute_fa.errors import CompileError, InvalidArgumentError, MissingToolError


def assemble(listing: str) -> SassKernel:
    """A kernel from lines of ``[@guard] OPCODE [operands]``, 16 bytes each."""
    instructions = []
    for line in listing.strip().splitlines():
        words = line.split()
        instr = {}
        if words[0].startswith("@"):
            instr["predicate"] = words.pop(0)
        instr["opcode"] = words.pop(0)
        if words:
            instr["operands"] = " ".join(words)
        instructions.append(instr)
    text = json.dumps(
        [{}, [{"function-name": "k", "start": 0, "length": 0, "sass-instructions": instructions}]]
    )
    return parse_sass(text)["k"]


def shape(kernel: SassKernel) -> list[tuple[int, int, tuple[int, ...]]]:
    return [(b.start, b.stop, b.successors) for b in kernel.blocks]


def test_instructions() -> None:
    kernel = assemble("@!UP2 BRA.U UP0,0x20\nHMMA.16816.F32 R4,R8,R12,R4\nEXIT\nNOP\nNOP")
    branch, mma, end = kernel.code
    assert (branch.address, mma.address, end.address) == (0, 16, 32)
    assert (branch.guard, branch.opcode, branch.op) == ("@!UP2", "BRA.U", "BRA")
    assert branch.target == 0x20
    assert mma.target is None
    assert mma.text == "HMMA.16816.F32 R4,R8,R12,R4"
    assert len(kernel.instructions) == 5


def test_a_loop_and_an_exit() -> None:
    kernel = assemble("""
        MOV R0,RZ
        IADD3 R0,R0,0x1,RZ
        @P0 BRA 0x10
        @P1 EXIT
        BRA 0x50
        EXIT
    """)
    assert shape(kernel) == [(0, 1, (1,)), (1, 3, (1, 2)), (3, 5, (3,)), (5, 6, ())]
    assert [(loop.header, loop.depth) for loop in natural_loops(kernel.blocks)] == [(1, 1)]


def test_conditions_may_stand_among_the_operands() -> None:
    kernel = assemble("BRA.U !UP1,0x20\nNOP\nBRA 0x20")
    assert shape(kernel)[0] == (0, 1, (1, 2))
    assert shape(kernel)[2] == (2, 3, (2,))


def test_a_guard_that_is_always_true_is_no_condition() -> None:
    kernel = assemble("@PT BRA 0x20\nNOP\nEXIT")
    assert shape(kernel)[0] == (0, 1, (2,))


# A wait on a barrier whose retries stand behind the code, as ptxas places them. The way back
# from there to 0x20 is a backward branch, but no loop around the code between.
WAIT_AT_THE_END = """
    MOV R0,RZ
    SYNCS.PHASECHK.TRANS64.TRYWAIT P0,[UR4],R0
    @!P0 BRA 0xa0
    HGMMA.64x128x16.F32.BF16 R24,gdesc[UR8],R24
    MUFU.EX2 R2,R3
    BAR.SYNC.DEFER_BLOCKING 0x1
    @P1 BRA 0x10
    STG.E desc[UR4][R2.64],R7
    EXIT
    NOP
    SYNCS.PHASECHK.TRANS64.TRYWAIT P0,[UR4],R0
    @!P0 NANOSLEEP.SYNCS 0x989680
    @!P0 SYNCS.PHASECHK.TRANS64 P0,[UR4],R0
    @!P0 BRA 0xa0
    BRA 0x30
    BRA 0xf0
"""


def test_waits_are_folded_into_the_loop_that_waits() -> None:
    kernel = assemble(WAIT_AT_THE_END)
    loops = natural_loops(kernel.blocks)
    # The main loop, the retries inside it; the trap at the very end cannot be reached.
    assert [loop.depth for loop in loops] == [1, 2]
    (main,) = sass_loops(kernel)
    assert main.where == "0x0010"
    assert main.is_hot
    assert main.folded_waits == 1
    assert main.mix["tensor"] == main.mix["mufu"] == 1
    assert main.mix == main.own_mix | {"sync": main.mix["sync"], "branch": main.mix["branch"]}
    assert "global" not in main.mix


def test_the_hot_loop_is_the_main_loop_not_the_one_around_it() -> None:
    listing = """
        MOV R0,RZ
        HMMA.16816.F32 R4,R8,R12,R4
        HMMA.16816.F32 R4,R8,R12,R4
        HMMA.16816.F32 R4,R8,R12,R4
        HMMA.16816.F32 R4,R8,R12,R4
        @P0 BRA 0x30
        @P1 BRA 0x10
        EXIT
    """
    outer, inner = sass_loops(assemble(listing))
    assert (outer.where, outer.depth, outer.mix["tensor"]) == ("0x0010", 1, 4)
    assert (inner.where, inner.depth, inner.mix["tensor"]) == ("0x0030", 2, 2)
    assert outer.own_mix["tensor"] == 2
    assert (outer.is_hot, inner.is_hot) == (False, True)
    # Without the inner one's work, the outer one is it.
    outer, inner = sass_loops(
        assemble(
            listing.replace("HMMA.16816.F32", "IADD3", 4).replace("IADD3", "HMMA.16816.F32", 2)
        )
    )
    assert (outer.is_hot, inner.is_hot) == (True, False)


def test_a_loop_that_works_is_no_wait_though_it_waits() -> None:
    loops = sass_loops(
        assemble("""
        SYNCS.PHASECHK.TRANS64.TRYWAIT P0,[UR4],R0
        FADD R1,R1,R2
        @!P0 BRA 0x0
        EXIT
    """)
    )
    assert [loop.mix for loop in loops] == [{"fp32": 1, "sync": 1, "branch": 1}]


def test_reconvergence_beyond_the_next_instruction() -> None:
    kernel = assemble("""
        BSSY B0,0x30
        @P0 BRA 0x50
        BSYNC B0
        FADD R1,R1,R2
        EXIT
        MOV R1,R2
        BSYNC B0
        EXIT
    """)
    assert shape(kernel) == [
        (0, 2, (1, 3)),
        (2, 3, (2,)),
        (3, 5, ()),
        (5, 7, (2,)),
        (7, 8, ()),
    ]


def test_a_call_by_address_is_followed_and_one_by_name_is_not() -> None:
    kernel = assemble("""
        @P0 CALL.REL.NOINC 0x40
        CALL.REL.NOINC $__internal_0_$slow
        EXIT
        NOP
        FADD R1,R1,R2
        EXIT
    """)
    assert shape(kernel)[0] == (0, 1, (1, 3))
    assert shape(kernel)[1][2] == ()


def test_an_indirect_branch_reaches_what_nothing_else_reaches() -> None:
    kernel = assemble("""
        BRX R2,-0x10
        FADD R1,R1,R2
        EXIT
        FMUL R1,R1,R2
        EXIT
        NOP
    """)
    assert shape(kernel)[0] == (0, 1, (1, 2))


@pytest.mark.usefixtures("nvdisasm")
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a", "sm_100a", "sm_120a"])
def test_a_compiled_kernel(compile_kernel: Callable, arch: str) -> None:
    cubin = compile_kernel(arch).cubin
    kernel = sass(cubin)
    ops = [instr.op for instr in kernel.code]
    assert ops.count("LDG") == 32
    assert ops.count("STG") == ops.count("MUFU") == ops.count("BAR") == 1
    text = disassemble(cubin)
    assert kernel.name in text
    assert "MUFU.EX2" in text
    (loop,) = [loop for loop in sass_loops(kernel) if loop.is_hot]
    assert loop.mix["mufu"] == loop.mix["local"] == 1
    assert "global" not in loop.mix
    reached = {s for block in kernel.blocks for s in block.successors}
    assert reached <= set(range(len(kernel.blocks)))


def test_a_missing_tool_says_what_to_install(
    compile_kernel: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    tools.find_tool.cache_clear()
    tools.run_on_cubin.cache_clear()
    monkeypatch.setattr(tools.importlib.metadata, "files", lambda name: None)
    monkeypatch.setattr(tools.shutil, "which", lambda name: None)
    try:
        with pytest.raises(MissingToolError, match=r'pip install "cute-fa\[inspect\]"'):
            disassemble(compile_kernel("sm_80").cubin)
    finally:
        tools.find_tool.cache_clear()


@pytest.mark.usefixtures("nvdisasm")
def test_a_cubin_that_the_tool_refuses(compile_kernel: Callable) -> None:
    cubin = bytearray(compile_kernel("sm_80").cubin)
    cubin[48:52] = (0xFFFFFFFF).to_bytes(4, "little")  # e_flags of no architecture
    with pytest.raises(CompileError, match="nvdisasm cannot read this cubin"):
        disassemble(bytes(cubin))


def test_what_is_no_cubin_does_not_reach_the_tool() -> None:
    with pytest.raises(InvalidArgumentError, match="no cubin"):
        disassemble(b"not a cubin")
