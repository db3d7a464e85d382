"""Basic blocks and liveness, on kernels small enough to work out by hand."""

from __future__ import annotations

import itertools
import random

from cute_fa import ptx
from tests.ptx.kernels import kernel_of

LOOP = """
.version 8.8
.target sm_80
.address_size 64
.visible .entry k(.param .b32 count, .param .b64 out)
{
.reg .pred %p<4>;
.reg .b32 %r<10>;
.reg .b64 %rd<2>;
ld.param.b32 %r1, [count];
ld.param.b64 %rd1, [out];
mov.b32 %r2, 0;
mov.b32 %r3, 0;
setp.eq.s32 %p1, %r1, 0;
@%p1 bra $L_EXIT;
$L_LOOP:
$L_UNUSED:
mul.lo.s32 %r4, %r2, %r2;
@%p1 mov.b32 %r3, %r4;
bar.sync 0;
add.s32 %r2, %r2, 1;
setp.lt.s32 %p2, %r2, %r1;
@%p2 bra $L_LOOP;
$L_EXIT:
@!%p1 st.global.b32 [%rd1], %r3;
ret;
$L_DEAD:
bra $L_DEAD;
}
"""


def shape(blocks: ptx.Blocks) -> list[tuple[int, int, tuple[int, ...]]]:
    return [(b.start, b.stop, b.successors) for b in blocks]


def test_blocks_end_at_branches_and_start_at_targets() -> None:
    kernel = ptx.parse(LOOP).kernels["k"]
    blocks = ptx.basic_blocks(kernel)
    assert shape(blocks) == [
        (0, 6, (1, 2)),
        (6, 12, (2, 1)),
        (12, 14, ()),
        (14, 15, (3,)),
    ]
    assert [b.index for b in blocks] == [0, 1, 2, 3]
    assert blocks.predecessors == ((), (0, 1), (0, 1), (3,))
    assert blocks.starting_at(12).index == 2


def test_blocks_end_after_chosen_instructions() -> None:
    kernel = ptx.parse(LOOP).kernels["k"]
    blocks = ptx.basic_blocks(kernel, lambda instr: instr.op == "bar")
    assert shape(blocks)[1:3] == [(6, 9, (2,)), (9, 12, (3, 1))]


def test_every_branch_form() -> None:
    text = """
    .reg .pred p;
    .reg .b32 r;
    table: .branchtargets A, B, A;
    brx.idx r, table;
    A:
    @p bra B;
    @p exit;
    bra.uni C;
    B:
    trap;
    C:
    @p ret;"""
    kernel = kernel_of(text)
    assert kernel.branch_targets == {"table": ("A", "B", "A")}
    assert "table" not in kernel.labels
    assert shape(ptx.basic_blocks(kernel)) == [
        (0, 1, (1, 4)),
        (1, 2, (2, 4)),
        (2, 3, (3,)),
        (3, 4, (5,)),
        (4, 5, ()),
        (5, 6, (6,)),
        (6, 7, ()),
    ]


def test_liveness_around_a_loop() -> None:
    kernel = ptx.parse(LOOP).kernels["k"]
    live = ptx.liveness(kernel, ptx.basic_blocks(kernel))
    assert live[0] == (frozenset(), {"%r1", "%r2", "%r3", "%rd1", "%p1"})
    # %r3 lives through the loop: the guarded move may leave it as it was. %r4 and %p2 do not.
    assert live[1] == (
        {"%r1", "%r2", "%r3", "%rd1", "%p1"},
        {"%r1", "%r2", "%r3", "%rd1", "%p1"},
    )
    assert live[2] == ({"%r3", "%rd1", "%p1"}, frozenset())
    assert live[3] == (frozenset(), frozenset())


def test_an_unguarded_write_kills() -> None:
    text = LOOP.replace("@%p1 mov.b32 %r3, %r4;", "mov.b32 %r3, %r4;")
    kernel = ptx.parse(text).kernels["k"]
    live = ptx.liveness(kernel, ptx.basic_blocks(kernel))
    assert "%r3" not in live[1][0]
    assert "%r3" in live[1][1]


def random_kernel(seed: int) -> ptx.Kernel:
    rng = random.Random(seed)
    lines = [".reg .pred %p<3>;\n.reg .b32 %r<6>;"]
    for number in range(8):
        lines.append(f"L{number}:")
        for _ in range(rng.randrange(4)):
            guard = rng.choice(["", "", "@%p1 ", "@!%p2 "])
            d, a, b = (rng.randrange(6) for _ in range(3))
            lines.append(f"{guard}add.s32 %r{d}, %r{a}, %r{b};")
        jump = rng.choice(["", "bra", "@%p0 bra", "@!%p1 bra"])
        if jump:
            lines.append(f"{jump} L{rng.randrange(8)};")
    lines.append("st.global.b32 [0], %r0;\nret;")
    return kernel_of("\n".join(lines))


def live_by_search(kernel: ptx.Kernel, register: str, start: int) -> bool:
    """Whether some path from instruction ``start`` reads ``register`` before killing it."""
    seen = set()
    pending = [start]
    while pending:
        at = pending.pop()
        if at in seen:
            continue
        seen.add(at)
        instr = kernel.body[at]
        if register in ptx.uses(instr):
            return True
        if register in ptx.defs(instr) and instr.guard is None:
            continue
        if instr.op == "bra":
            pending.append(kernel.labels[instr.operands[0].name])
        if instr.op not in ("bra", "ret") or instr.guard is not None:
            pending.append(at + 1)
    return False


def test_liveness_agrees_with_a_search_of_all_paths() -> None:
    found = 0
    for seed in range(60):
        kernel = random_kernel(seed)
        blocks = ptx.basic_blocks(kernel)
        live = ptx.liveness(kernel, blocks)
        for block, register in itertools.product(blocks, kernel.registers):
            expected = live_by_search(kernel, register, block.start)
            assert (register in live[block.index][0]) == expected, (seed, block, register)
            found += expected
        for block in blocks:
            into = [live[s][0] for s in block.successors]
            assert live[block.index][1] == frozenset().union(*into)
    assert found > 500
