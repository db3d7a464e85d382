"""Fused grids of mma.sync against the instructions one by one."""

import numpy as np
import pytest

from cute_fa import ptx
from cute_fa.sim import program as program_module
from cute_fa.sim.program import Program
from tests.sim.tiny import FRAME, run

MMA = "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"
DECLARATIONS = """
.reg .b32 %a<64>; .reg .b32 %b<64>; .reg .f32 %c<128>;
"""


def registers(name, start, count):
    return "{" + ", ".join(f"%{name}{start + i}" for i in range(count)) + "}"


def mma(d, a, b, c=None):
    """``d`` and ``c`` count accumulators, ``a`` and ``b`` fragments."""
    c = d if c is None else c
    parts = registers("c", 4 * d, 4), registers("a", 4 * a, 4), registers("b", 2 * b, 2)
    return f"{MMA} {', '.join(parts)}, {registers('c', 4 * c, 4)};"


def setup(fragments_a, fragments_b, accumulators):
    """Distinct small bf16 integers in every fragment, so that sums are exact."""
    lines = []
    for name, count in (("a", 4 * fragments_a), ("b", 2 * fragments_b)):
        for i in range(count):
            # two bf16 among -2, -1, 1, 2 by lane and register: 0x3F80 and 0x4000 with a sign
            lines.append(
                f"mad.lo.u32 %r9, %index, {2 * i + 3}, {7 * i + (11 if name == 'b' else 0)};"
                f"shr.u32 %r8, %r9, 3; and.b32 %r7, %r9, 0x80008000;"
                f"and.b32 %r6, %r8, 1; shl.b32 %r6, %r6, 7; sub.s32 %r6, 0x4000, %r6;"
                f"mul.lo.u32 %r6, %r6, 0x10001; or.b32 %{name}{i}, %r6, %r7;"
            )
    for i in range(4 * accumulators):
        lines.append(f"cvt.rn.f32.u32 %c{i}, %lane; add.f32 %c{i}, %c{i}, 0f40A00000;")
    return "\n".join(lines)


def store(accumulators):
    return "\n".join(f"st.global.f32 [%out+{4 * i}], %c{i};" for i in range(4 * accumulators))


def outputs(body, accumulators, monkeypatch, *, fused):
    if not fused:
        monkeypatch.setattr(program_module, "fuse_products", lambda source: None)
    monkeypatch.setattr(program_module, "_PROGRAMS", type(program_module._PROGRAMS)())
    result = run(
        body, words=4 * accumulators, threads=64, ctas=2, declarations=DECLARATIONS, strict=True
    )
    monkeypatch.undo()
    return result.out.view(np.float32)


def fused_calls(body):
    text = FRAME.format(
        arch="sm_80", module="", declarations=DECLARATIONS, body=body, in_bytes=4, out_bytes=4
    )
    module = ptx.parse(text)
    program = Program(module, module.kernels["tiny"])
    statements = [s for b in program.blocks for s in program.source(b.index).statements]
    grids = sum(s.expr.startswith("mma_grid") for s in statements)
    single = sum(s.product is not None for s in statements)
    return grids, single


def check(body, accumulators, monkeypatch, grids, single):
    """Fused and unfused agree, and as many calls were fused as expected."""
    assert fused_calls(body) == (grids, single)
    plain = outputs(body, accumulators, monkeypatch, fused=False)
    assert (outputs(body, accumulators, monkeypatch, fused=True) == plain).all()
    assert len(np.unique(plain)) > 10
    return plain


def test_a_whole_grid_is_one_product(monkeypatch):
    # 2 x 3 accumulators over 4 steps along k: A fragments 2*k + i, B fragments 3*k + j
    steps = [
        mma(3 * i + j, 2 * k + i, 3 * k + j) for k in range(4) for i in range(2) for j in range(3)
    ]
    check(setup(8, 12, 6) + "\n".join(steps) + store(6), 6, monkeypatch, 1, 0)


def test_zero_accumulators_are_not_added(monkeypatch):
    zero = "\n".join(f"mov.f32 %c{i}, 0f00000000;" for i in range(8))
    steps = [mma(j, k, 2 * k + j) for k in range(3) for j in range(2)]
    body = setup(3, 6, 2) + zero + "\n".join(steps) + store(2)
    check(body, 2, monkeypatch, 1, 0)


def test_a_grid_with_a_missing_corner_goes_by_rows(monkeypatch):
    corners = [(0, 0), (0, 1), (1, 0)]
    steps = [mma(2 * i + j, 2 * k + i, 2 * k + j) for k in range(2) for i, j in corners]
    check(setup(4, 4, 4) + "\n".join(steps) + store(4), 4, monkeypatch, 2, 0)


def test_an_intermediate_that_is_used_ends_the_chain(monkeypatch):
    body = setup(2, 2, 2) + "\n".join(
        [mma(0, 0, 0), "add.f32 %c4, %c0, %c0;", mma(0, 1, 1)]
    )  # fmt: skip
    check(body + store(2), 2, monkeypatch, 0, 2)


def test_a_product_that_feeds_another_ones_operand_stays_before_it(monkeypatch):
    first = [mma(0, 0, 0), mma(0, 1, 1)]
    convert = ["cvt.rn.bf16x2.f32 %a8, %c1, %c0;", "cvt.rn.bf16x2.f32 %a9, %c3, %c2;"]
    convert += ["mov.b32 %a10, %a8; mov.b32 %a11, %a9;"]
    second = [mma(1, 2, 0), mma(1, 2, 1)]
    body = setup(3, 2, 2) + "\n".join(first + convert + second) + store(2)
    check(body, 2, monkeypatch, 2, 0)


def test_chains_with_dependent_operands_are_not_put_into_one_grid(monkeypatch):
    """Two chains share B, but the second one's A is made of the first one's result."""
    first = [mma(0, 0, 0), mma(0, 1, 1)]
    convert = ["cvt.rn.bf16x2.f32 %a8, %c1, %c0; mov.b32 %a9, %a8; mov.b32 %a10, %a8;"]
    convert += ["mov.b32 %a11, %a8; mov.b32 %a12, %a8; mov.b32 %a13, %a8; mov.b32 %a14, %a8;"]
    convert += ["mov.b32 %a15, %a9;"]
    second = [mma(1, 2, 0), mma(1, 3, 1)]
    body = setup(4, 2, 2) + "\n".join(first + convert + second) + store(2)
    plain = outputs(body, 2, monkeypatch, fused=False)
    assert (outputs(body, 2, monkeypatch, fused=True) == plain).all()


def test_loads_between_the_steps_do_not_matter(monkeypatch):
    body = setup(2, 2, 1)
    body += mma(0, 0, 0) + "ld.global.b32 %r20, [%in]; add.s32 %r20, %r20, 1;" + mma(0, 1, 1)
    check(body + store(1), 1, monkeypatch, 1, 0)


def test_guarded_products_are_left_alone(monkeypatch):
    body = setup(2, 2, 1) + "setp.lt.u32 %p1, %warp, 1;"
    body += "@%p1 " + mma(0, 0, 0) + "@%p1 " + mma(0, 1, 1)
    plain = outputs(body + store(1), 1, monkeypatch, fused=False)
    assert (outputs(body + store(1), 1, monkeypatch, fused=True) == plain).all()
    assert fused_calls(body + store(1)) == (0, 0)


@pytest.mark.parametrize("completion", ["eager", "random"])
def test_partial_rectangles(completion, monkeypatch):
    """Only one warp of two takes the branch with the products."""
    steps = "\n".join(mma(0, k, k) for k in range(2))
    body = setup(2, 2, 1) + f"setp.eq.u32 %p1, %warp, 1; @%p1 bra SKIP; {steps} SKIP:" + store(1)
    one = run(body, words=4, threads=64, declarations=DECLARATIONS, completion=completion)
    assert one.rules == []
    lane = np.arange(32, dtype=np.float32) + 5
    out = one.out.view(np.float32)
    assert (out[32:] == lane[:, None]).all()
    assert (out[:32] != lane[:, None]).any()
