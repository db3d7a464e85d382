"""tcgen05.ld and st: every shape and repeat factor against formulas of PTX ISA 9.7.16.2.3.1."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from cute_fa.sim.isa import UnsupportedInstruction
from tests.sim.tensor_core import tensor_memory
from tests.sim.tiny import Result, run
from tests.sim.tmem_programs import alloc, dealloc, declare, load_in, store_out, vector

REGISTERS = {"32x32b": 1, "16x64b": 1, "16x128b": 2, "16x256b": 4, "16x32bx2": 1}
FORMS = [
    (shape, repeat)
    for shape, registers in REGISTERS.items()
    for repeat in (1, 2, 4, 8, 16, 32, 64, 128)
    if repeat * registers <= 128
]
SPLIT = 200  # columns between the two accesses of .16x32bx2, past the end of the first


def cell_of(shape: str, thread: int, register: int) -> tuple[int, int]:
    """Lane and column of a register of a thread, from the figures of 9.7.16.2.3.1.1 to .5.

    The figures draw a 16-lane shape as two groups of eight lanes. Threads 4i … 4i+3 hold what lanes
    i and i + 8 have in the columns of one repeat.
    """
    group, inside = thread // 4, thread % 4
    if shape == "32x32b":
        return thread, register
    if shape == "16x32bx2":
        return thread % 16, register
    if shape == "16x64b":  # even threads the upper lanes, odd ones the lower, two each
        return group + 8 * (inside % 2), 2 * register + inside // 2
    if shape == "16x128b":  # r0 upper lanes, r1 lower lanes
        return group + 8 * (register % 2), 4 * (register // 2) + inside
    # .16x256b: r0 and r1 adjacent in the upper lanes, r2 and r3 in the lower
    half, pair = divmod(register % 4, 2)
    return group + 8 * half, 8 * (register // 4) + 2 * inside + pair


def cells_of(
    shape: str, repeat: int, *, packed: bool, half: int
) -> Iterator[tuple[int, int, int, int, int]]:
    """(thread, register, warp, lane of tensor memory, column) for four warps."""
    for thread in range(128):
        warp, t = divmod(thread, 32)
        for register in range(repeat * REGISTERS[shape]):
            lane, column = cell_of(shape, t, register)
            column *= 2 if packed else 1
            if shape == "16x32bx2" and t >= 16:
                column += SPLIT
            yield thread, register, warp, 32 * warp + 16 * half + lane, column


def pattern(shape: tuple[int, ...], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 1 << 32, shape, np.uint32)


def operands(shape: str, data: str, *, store: bool, half: int = 0) -> str:
    """``r, [taddr]`` with the offset where the shape has one."""
    address = f"[%own+{half << 20}]"
    split = f", {SPLIT}" if shape == "16x32bx2" else ""
    return f"{address}{split}, {data}" if store else f"{data}, {address}{split}"


OWN = ".reg .b32 %own; and.b32 %own, %warp, 3; shl.b32 %own, %own, 21;\n"


@pytest.mark.parametrize("packed", [False, True], ids=["b32", "16b"])
@pytest.mark.parametrize(("shape", "repeat"), FORMS)
def test_load_layout(shape: str, repeat: int, packed: bool) -> None:
    count = repeat * REGISTERS[shape]
    half = 0 if shape == "32x32b" else repeat % 3 % 2
    form = f"tcgen05.ld.sync.aligned.{shape}.x{repeat}{'.pack::16b' if packed else ''}.b32"
    body = OWN + f"{form} {operands(shape, vector('v', count), store=False, half=half)};\n"
    before = pattern((1, 512, 128), repeat)
    with tensor_memory(before):
        got = run(
            body + store_out("v", count),
            words=count,
            threads=128,
            declarations=declare("v", count),
            arch="sm_100a",
            checks=False,
        )
    assert got.rules == []
    want = np.zeros((128, count), np.uint32)
    for thread, register, _, lane, column in cells_of(shape, repeat, packed=packed, half=half):
        want[thread, register] = before[0, column, lane]
        if packed:
            high = int(before[0, column + 1, lane]) & 0xFFFF
            want[thread, register] = int(before[0, column, lane]) & 0xFFFF | high << 16
    np.testing.assert_array_equal(got.out, want)
    assert got.launch.counters["tmem_bytes_read"] == 128 * 4 * count


@pytest.mark.parametrize("packed", [False, True], ids=["b32", "16b"])
@pytest.mark.parametrize(("shape", "repeat"), FORMS)
def test_store_layout(shape: str, repeat: int, packed: bool) -> None:
    count = repeat * REGISTERS[shape]
    half = 0 if shape == "32x32b" else repeat % 3 % 2
    form = f"tcgen05.st.sync.aligned.{shape}.x{repeat}{'.unpack::16b' if packed else ''}.b32"
    body = OWN + load_in("v", count)
    body += f"{form} {operands(shape, vector('v', count), store=True, half=half)};\n"
    body += "tcgen05.wait::st.sync.aligned;\n"
    values = pattern((128, count), repeat)
    completion = ("eager", "late", "random")[count % 3]
    with tensor_memory() as seen:
        got = run(
            body,
            values,
            threads=128,
            declarations=declare("v", count),
            arch="sm_100a",
            checks=False,
            completion=completion,
        )
    assert got.rules == []
    want = np.zeros((512, 128), np.uint32)
    for thread, register, _, lane, column in cells_of(shape, repeat, packed=packed, half=half):
        value = int(values[thread, register])
        if packed:
            want[column, lane], want[column + 1, lane] = value & 0xFFFF, value >> 16
        else:
            want[column, lane] = value
    np.testing.assert_array_equal(seen[0][0], want)
    assert got.launch.counters["tmem_bytes_written"] == 128 * 4 * count


REDUCTIONS = [
    ("f32", "max", ""),
    ("f32", "min", ""),
    ("f32", "max", ".NaN"),
    ("f32", "min", ".abs"),
    ("f32", "max", ".abs.NaN"),
    ("u32", "max", ""),
    ("u32", "min", ""),
    ("s32", "max", ""),
    ("s32", "min", ""),
]


def reduced(row: np.ndarray, operator: str, flags: str) -> np.ndarray:
    """One thread's registers reduced one by one, by the rules of ``min`` and ``max``."""
    if row.dtype != np.float32:
        return max(row) if operator == "max" else min(row)
    if ".abs" in flags:
        row = np.abs(row)
    if ".NaN" in flags and np.isnan(row).any():
        return np.array(0x7FFFFFFF, np.uint32).view(np.float32)
    row = row[~np.isnan(row)]
    return max(row) if operator == "max" else min(row)


@pytest.mark.parametrize("shape", ["32x32b", "16x32bx2"])
@pytest.mark.parametrize(("kind", "operator", "flags"), REDUCTIONS)
def test_reducing_load(kind: str, operator: str, flags: str, shape: str) -> None:
    rng = np.random.default_rng(3)
    before = rng.normal(size=(1, 512, 128)).astype(np.float32).view(np.uint32)
    if kind != "f32":
        before = rng.integers(0, 1 << 32, (1, 512, 128), np.uint32)
    else:
        before[0, 5, ::7] = 0x7FC00001  # a NaN now and then
    form = f"tcgen05.ld.red.sync.aligned.{shape}.x8.{kind}.{operator}{flags}"
    if flags:  # the ISA's order; compilers put the type first
        form = f"tcgen05.ld.red.sync.aligned.{shape}.x8.{operator}{flags}.{kind}"
    split = f", {SPLIT}" if shape == "16x32bx2" else ""
    body = OWN + f"{form} {vector('v', 8)}, %v8, [%own]{split};\n" + store_out("v", 9)
    with tensor_memory(before):
        got = run(
            body,
            words=9,
            threads=128,
            declarations=declare("v", 9),
            arch="sm_103a",
            checks=False,
        )
    assert got.rules == []
    dtype = {"f32": np.float32, "u32": np.uint32, "s32": np.int32}[kind]
    loaded = np.zeros((128, 8), np.uint32)
    for thread, register, _, lane, column in cells_of(shape, 8, packed=False, half=0):
        loaded[thread, register] = before[0, column, lane]
    np.testing.assert_array_equal(got.out[:, :8], loaded)
    rows = loaded.view(dtype)
    want = np.array([reduced(row, operator, flags) for row in rows], dtype)
    np.testing.assert_array_equal(got.out[:, 8], want.view(np.uint32))


def test_reducing_load_is_no_instruction_of_sm_100a() -> None:
    body = OWN + f"tcgen05.ld.red.sync.aligned.32x32b.x2.max.f32 {vector('v', 2)}, %v2, [%own];\n"
    with tensor_memory():
        got = run(body, declarations=declare("v", 3), arch="sm_100a")
    assert "tmem-operands" in got.rules
    assert "sm_103" in got.launch.hazards[0].message


@pytest.mark.parametrize(
    "form",
    [
        "tcgen05.ld.sync.aligned.32x32b.x3.b32",
        "tcgen05.ld.sync.aligned.16x256b.x64.b32",
        "tcgen05.ld.sync.aligned.8x32b.x1.b32",
        "tcgen05.ld.red.sync.aligned.32x32b.x1.max.f32",
        "tcgen05.ld.red.sync.aligned.16x64b.x2.max.f32",
        "tcgen05.ld.red.sync.aligned.32x32b.x2.max.abs.u32",
        "tcgen05.ld.sync.aligned.32x32b.x2.unpack::16b.b32",
    ],
)
def test_forms_that_do_not_exist_are_refused(form: str) -> None:
    extra = ", %v200" if ".red" in form else ""
    body = OWN + f"{form} {vector('v', 2)}{extra}, [%own];\n"
    with pytest.raises(UnsupportedInstruction):
        run(body, declarations=declare("v", 256), arch="sm_103a")


def test_wrong_number_of_registers_is_refused() -> None:
    with pytest.raises(UnsupportedInstruction, match="3 registers, not 4"):
        run(OWN + f"tcgen05.ld.sync.aligned.32x32b.x4.b32 {vector('r', 3)}, [%own];\n")


def each_warp(address: str, **options: object) -> Result:
    """Four warps load one column of their own at an address made from ``%own``."""
    body = alloc() + f"tcgen05.st.sync.aligned.32x32b.x1.b32 [%own+{address}], {{%tid}};\n"
    body += "tcgen05.wait::st.sync.aligned;\n"
    body += f"tcgen05.ld.sync.aligned.32x32b.x1.b32 {{%r20}}, [%own+{address}];\n"
    body += "st.global.u32 [%out], %r20;\n" + dealloc()
    return run(body, threads=128, arch="sm_100a", **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("completion", ["eager", "late", "random"])
def test_what_was_stored_is_loaded(completion: str) -> None:
    got = each_warp("7", completion=completion, ctas=3)
    assert got.rules == []
    np.testing.assert_array_equal(got.out[:, 0], np.tile(np.arange(128), 3))


def test_foreign_lanes() -> None:
    """Each warp names the lanes of the next one: warp 3 the lanes of nobody, past the last."""
    got = each_warp(str(32 << 16))
    assert set(got.rules) == {"tmem-lane-access"}
    assert got.launch.hazards[0].warp == 0
    assert got.launch.hazards[0].address == 32 << 16
    assert (got.out == 0x7FC0DEAD).all()  # nothing was loaded


def test_lanes_in_the_middle_of_a_quarter() -> None:
    assert set(each_warp(str(16 << 16)).rules) == {"tmem-operands"}


def test_lanes_that_are_left_to_the_hardware() -> None:
    """Addresses that name lane 0 in every warp mean the warp's own lanes; it is a warning."""
    body = alloc() + "tcgen05.st.sync.aligned.32x32b.x1.b32 [%taddr], {%tid};\n"
    body += "tcgen05.wait::st.sync.aligned;\n"
    body += "tcgen05.ld.sync.aligned.32x32b.x1.b32 {%r20}, [%own];\n"
    got = run(body + "st.global.u32 [%out], %r20;\n" + dealloc(), threads=128, arch="sm_100a")
    assert set(got.rules) == {"tmem-lane-implied"}
    assert all(hazard.severity == "warning" for hazard in got.launch.hazards)
    np.testing.assert_array_equal(got.out[:, 0], np.arange(128))


def test_columns_that_are_not_allocated() -> None:
    got = each_warp("64")
    assert set(got.rules) == {"tmem-unallocated"}
    assert "columns that are not allocated" in got.launch.hazards[0].message


def test_columns_past_the_last() -> None:
    assert set(each_warp("512").rules) == {"tmem-out-of-bounds"}


def test_lanes_of_a_warp_give_different_addresses() -> None:
    body = alloc() + "add.u32 %r10, %own, %lane;\n"
    body += "tcgen05.ld.sync.aligned.32x32b.x1.b32 {%r20}, [%r10];\n" + dealloc()
    got = run(body, threads=128, arch="sm_100a")
    assert "tmem-operands" in got.rules
    assert "different tensor memory addresses" in got.launch.hazards[0].message


def test_part_of_a_warp() -> None:
    body = alloc() + "setp.lt.u32 %p1, %lane, 16;\n"
    body += "@%p1 tcgen05.ld.sync.aligned.32x32b.x1.b32 {%r20}, [%own];\n" + dealloc()
    assert "divergent-collective" in run(body, threads=128, arch="sm_100a").rules


def test_warps_and_ctas_with_columns_of_their_own() -> None:
    """Eight warps, three CTAs, every one with another column: pieces of every kind."""
    body = alloc(128) + "mov.u32 %r9, %ctaid.x;\n"
    body += "mad.lo.u32 %r10, %warp, 4, %r9; add.u32 %r10, %r10, %own;\n"
    body += "tcgen05.st.sync.aligned.32x32b.x1.b32 [%r10], {%index};\n"
    body += "tcgen05.wait::st.sync.aligned;\n"
    body += "tcgen05.ld.sync.aligned.32x32b.x1.b32 {%r20}, [%r10];\n"
    body += "st.global.u32 [%out], %r20;\n" + dealloc(128)
    got = run(body, threads=256, ctas=3, arch="sm_100a")
    assert got.rules == []
    np.testing.assert_array_equal(got.out[:, 0], np.arange(768))


def test_guarded_loads_leave_other_warps_alone() -> None:
    """Warps 1 and 2 load under a guard; the registers of 0 and 3 keep what they had."""
    body = alloc() + "tcgen05.st.sync.aligned.32x32b.x1.b32 [%own], {%tid};\n"
    body += "tcgen05.wait::st.sync.aligned; mov.u32 %r20, 7;\n"
    body += "add.u32 %r10, %warp, 1; and.b32 %r10, %r10, 2; setp.ne.u32 %p1, %r10, 0;\n"
    body += "@%p1 tcgen05.ld.sync.aligned.32x32b.x1.b32 {%r20}, [%own];\n"
    body += "st.global.u32 [%out], %r20;\n" + dealloc()
    got = run(body, threads=128, arch="sm_100a")
    assert got.rules == []
    want = np.arange(128)
    want[:32] = want[96:] = 7
    np.testing.assert_array_equal(got.out[:, 0], want)
