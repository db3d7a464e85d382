"""Generated block functions against a scalar interpreter, on random programs."""

import numpy as np
import pytest

from cute_fa import ptx
from cute_fa.sim.isa import UnsupportedInstruction
from cute_fa.sim.program import Program, prepare
from cute_fa.sim.render import render
from tests.sim.tiny import FRAME, run

REGISTERS = 6
PREDICATES = 3
MASK = 0xFFFFFFFF


class RandomProgram:
    """Blocks of register arithmetic with guards, forward branches and bounded loops."""

    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)
        self.blocks = [self._block() for _ in range(int(self.rng.integers(3, 8)))]
        self.ends = [self._end(i) for i in range(len(self.blocks))]

    def _pick(self, count):
        return int(self.rng.integers(count))

    def _operand(self):
        if self.rng.random() < 0.2:
            return ("literal", int(self.rng.integers(0, 1 << 32)))
        return ("register", self._pick(REGISTERS))

    def _block(self):
        kinds = ["add", "sub", "xor", "mul", "mov", "mov", "selp", "setp", "shl", "uniform"]
        out = []
        for _ in range(self._pick(12)):
            guard = None
            if self.rng.random() < 0.3:
                guard = (self._pick(PREDICATES), bool(self._pick(2)))
            kind = kinds[self._pick(len(kinds))]
            target = self._pick(PREDICATES if kind == "setp" else REGISTERS)
            out.append((guard, kind, target, self._operand(), self._operand(), self._pick(3)))
        return out

    def _end(self, index):
        """(predicate, negated, target block) of a branch, or None to fall through."""
        if index + 1 >= len(self.blocks) or self.rng.random() < 0.3:
            return None
        return (self._pick(PREDICATES), bool(self._pick(2)), index + 1 + self._pick(2))

    def text(self):
        lines = [f"mov.b32 %r{10 + i}, {1000 + i};" for i in range(REGISTERS)]
        lines.append("mov.b32 %r10, %index; mul.lo.s32 %r11, %index, 77;")
        lines += [f"setp.gt.u32 %p{i}, %lane, {7 + 9 * i};" for i in range(PREDICATES)]
        lines.append("mov.b32 %r30, 0;")
        for index, block in enumerate(self.blocks):
            lines.append(f"B{index}:")
            lines += [self._line(instr) for instr in block]
            if self.ends[index] is not None:
                predicate, negated, target = self.ends[index]
                lines.append(f"@{'!' if negated else ''}%p{predicate} bra B{target};")
        lines.append(f"B{len(self.blocks)}:")
        # The whole thing twice: registers flow around a loop.
        lines.append("add.s32 %r30, %r30, 1; setp.lt.u32 %p9, %r30, 2; @%p9 bra B0;")
        lines += [f"st.global.b32 [%out+{4 * i}], %r{10 + i};" for i in range(REGISTERS)]
        return "\n".join(lines)

    def _line(self, instr):
        guard, kind, target, a, b, p = instr
        prefix = "" if guard is None else f"@{'!' if guard[1] else ''}%p{guard[0]} "
        x, y = (str(v) if k == "literal" else f"%r{10 + v}" for k, v in (a, b))
        return (
            prefix
            + {
                "add": f"add.s32 %r{10 + target}, {x}, {y};",
                "sub": f"sub.s32 %r{10 + target}, {x}, {y};",
                "xor": f"xor.b32 %r{10 + target}, {x}, {y};",
                "mul": f"mul.lo.u32 %r{10 + target}, {x}, {y};",
                "mov": f"mov.b32 %r{10 + target}, {x};",
                "selp": f"selp.b32 %r{10 + target}, {x}, {y}, %p{p};",
                "setp": f"setp.lt.u32 %p{target}, {x}, {y};",
                "shl": f"shl.b32 %r{10 + target}, {x}, {p};",
                "uniform": f"add.s32 %r{10 + target}, %r0, {p};",
            }[kind]
        )

    def interpret(self, cta, thread, threads):
        """The registers that one thread ends with."""
        index = cta * threads + thread
        r = [1000 + i for i in range(REGISTERS)]
        r[0], r[1] = index, index * 77 & MASK
        p = [thread % 32 > 7 + 9 * i for i in range(PREDICATES)]
        for _ in range(2):
            at = 0
            while at < len(self.blocks):
                for instr in self.blocks[at]:
                    self._execute(instr, r, p, cta)
                end, at = self.ends[at], at + 1
                if end is not None and p[end[0]] != end[1]:
                    at = end[2]
        return r

    @staticmethod
    def _execute(instr, r, p, cta):
        guard, kind, target, a, b, q = instr
        if guard is not None and p[guard[0]] == guard[1]:
            return
        x, y = (v if k == "literal" else r[v] for k, v in (a, b))
        if kind == "setp":
            p[target] = x < y
            return
        r[target] = (
            MASK
            & {
                "add": x + y,
                "sub": x - y,
                "xor": x ^ y,
                "mul": x * y,
                "mov": x,
                "selp": x if p[q] else y,
                "shl": x << q,
                "uniform": cta + q,
            }[kind]
        )


@pytest.mark.parametrize("seed", range(40))
def test_random_programs(seed):
    program = RandomProgram(seed)
    threads, ctas = 64, 3
    for completion in ("eager", "random") if seed % 4 == 0 else ("eager",):
        result = run(
            program.text(), words=REGISTERS, threads=threads, ctas=ctas, completion=completion
        )
        for cta in range(ctas):
            for thread in range(threads):
                expected = program.interpret(cta, thread, threads)
                assert result.out[cta * threads + thread].tolist() == expected


def kernel_program(body, declarations=""):
    text = FRAME.format(
        arch="sm_80", module="", declarations=declarations, body=body, in_bytes=4, out_bytes=4
    )
    return prepare(ptx.parse(text), "tiny")


def sources(program, *, masked=False):
    blocks = range(len(program.blocks))
    return "\n".join(render(program.source(index), masked=masked) for index in blocks)


def test_full_blocks_compute_into_the_register_file_and_masked_ones_store_under_the_mask():
    body = """
        ld.global.b32 %r3, [%in]; bra NEXT;
        NEXT: add.f32 %r3, %r3, %r3; bra LAST; LAST: st.global.b32 [%out], %r3;
    """
    program = kernel_program(body)
    row = program.location("%r3").row
    view = f"Rr{row}_f4"
    assert f"add({view}, {view}, out={view})" in sources(program)
    assert f"copyto({view}, t0, where=mask)" in sources(program, masked=True)


def test_results_that_nobody_needs_are_not_computed():
    body = "ld.global.b32 %r3, [%in]; mul.lo.s32 %r4, %r3, 12345; st.global.b32 [%out], %r3;"
    assert "Ku4_3039" not in sources(kernel_program(body))
    assert "Ki4_3039" not in sources(kernel_program(body))


def test_temporaries_share_a_few_names():
    body = "ld.global.b32 %r3, [%in];" + "xor.b32 %r3, %r3, %lane; add.s32 %r3, %r3, 5;" * 50
    text = sources(kernel_program(body + "st.global.b32 [%out], %r3;"))
    names = {word for word in text.replace("(", " ").replace(",", " ").split() if word[0] == "t"}
    assert sum(name[1:].isdigit() for name in names) < 12


def test_every_unsupported_instruction_is_listed_at_once():
    body = """
        frobnicate.b32 %r3, %r4;
        mov.b32 %r5, %pm0;
        add.s32 %r3, %r3, 1;
        tex.2d.v4.f32.f32 {%r3, %r4, %r5, %r6}, [t, {%r7, %r8}];
    """
    with pytest.raises(UnsupportedInstruction) as caught:
        kernel_program(body)
    message = str(caught.value)
    assert "frobnicate.b32 %r3, %r4" in message
    assert "tex.2d" in message
    assert "line " in message
    assert "2 PTX instructions" in message
    with pytest.raises(UnsupportedInstruction, match="special register %pm0"):
        kernel_program("mov.b32 %r5, %pm0;")


def test_a_form_is_listed_once_however_often_it_occurs():
    with pytest.raises(UnsupportedInstruction) as caught:
        kernel_program("frobnicate.b32 %r3, %r4;" * 3)
    assert str(caught.value).count("frobnicate") == 1


@pytest.mark.parametrize(
    "instruction",
    [
        "add.s64 %rd1, %r1, %rd2;",  # a register narrower than the type
        "mov.b32 %h1, %r1;",  # a destination narrower than the type
        "add.s32 %r1, %p1, %r2;",  # a predicate as a number
        "and.pred %p1, %r1, %p2;",
        "fma.rm.f64 %rd1, %rd2, %rd3, %rd4;",
        "cvt.rs.bf16.f32 %h1, %r1;",
    ],
)
def test_ill_typed_and_unimplemented_forms_are_refused(instruction):
    with pytest.raises(UnsupportedInstruction, match=instruction.split()[0]):
        kernel_program(instruction)


def test_programs_are_kept_by_their_text():
    body = "st.global.b32 [%out], %tid;"
    first = kernel_program(body)
    assert kernel_program(body) is first
    assert isinstance(first, Program)
    assert kernel_program(body + " ") is not first
