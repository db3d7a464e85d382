"""wgmma against brute force from the ISA's layouts, under every completion policy, and its bugs."""

from __future__ import annotations

import numpy as np
import pytest

from cute_fa.sim.descriptors import Descriptor
from cute_fa.sim.isa import UnsupportedInstruction, minifloat
from tests.sim.tiny import Result, run

POLICIES = pytest.mark.parametrize("completion", ["eager", "late", "random"])
BASE = 1024  # of the dynamic shared memory: the first shared byte
A_AT, B_AT = 0, 32768
SMEM = 98304
BITS = {0: 0, 32: 1, 64: 2, 128: 3}
BYTES = {"f16": 2, "bf16": 2, "tf32": 4, "e4m3": 1, "e5m2": 1, "s8": 1, "u8": 1}


def values_of(kind: str, raw: np.ndarray) -> np.ndarray:
    """Decode elements, one by one where numpy has no such type."""
    if kind == "f16":
        return raw.view(np.float16).astype(np.float64)
    if kind == "bf16":
        return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    if kind == "tf32":
        return (raw.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64)
    if kind in ("s8", "u8"):
        return raw.view(np.int8 if kind == "s8" else np.uint8).astype(np.float64)
    return minifloat.decode(raw, kind).astype(np.float64)


def random_bytes(kind: str, nbytes: int, seed: int) -> np.ndarray:
    """Bytes of small numbers, whose products and sums are exact."""
    rng = np.random.default_rng(seed)
    numbers = rng.integers(-3, 4, nbytes // BYTES[kind])
    if kind == "f16":
        return numbers.astype(np.float16).view(np.uint8)
    if kind in ("bf16", "tf32"):
        wide = numbers.astype(np.float32).view(np.uint32)
        return (wide if kind == "tf32" else (wide >> 16).astype(np.uint16)).view(np.uint8)
    if kind in ("s8", "u8"):
        return rng.integers(0, 256, nbytes, np.uint8)
    codes = {"e4m3": [0, 0x38, 0x40, 0xB8, 0xC0, 0x30], "e5m2": [0, 0x3C, 0x40, 0xBC, 0xC0, 0x38]}
    return rng.choice(np.array(codes[kind], np.uint8), nbytes)


def place(desc: Descriptor, row: int, k: int, size: int, mn_major: bool) -> int:
    """Shared address of one element (PTX ISA 9.7.15.5.1, canonical layouts, element by element)."""
    span, per = desc.swizzle, 16 // size
    if not mn_major and span:
        offset = row % 8 * span + row // 8 * desc.stride + k * size
    elif not mn_major:
        offset = row % 8 * 16 + row // 8 * desc.stride + k % per * size + k // per * desc.leading
    elif span:
        wide = span // size
        offset = row % wide * size + row // wide * desc.leading
        offset += k % 8 * span + k // 8 * desc.stride
    else:
        offset = row % per * size + row // per * desc.stride + k % 8 * 16 + k // 8 * desc.leading
    address = desc.start + offset
    return address ^ (address >> 7 & (1 << BITS[span]) - 1) << 4


def matrix(image: np.ndarray, kind: str, desc: Descriptor, rows: int, mn_major: bool) -> np.ndarray:
    size = BYTES[kind]
    out = np.empty((rows, 32 // size))
    for row in range(rows):
        for k in range(32 // size):
            at = place(desc, row, k, size, mn_major) - BASE
            out[row, k] = values_of(kind, image[at : at + size])[0]
    return out


def accumulators(result: Result, n: int, d: str) -> np.ndarray:
    """D as the registers of 128 threads say: (64, n)."""
    out = np.empty((64, n))
    for thread in range(128):
        warp, lane = divmod(thread, 32)
        words = result.out[thread]
        values = words.view({"f32": np.float32, "s32": np.int32, "f16": np.float16}[d])
        for i, value in enumerate(values[: n // 2]):
            row = 16 * warp + lane // 4 + 8 * (i // 2 % 2)
            out[row, 8 * (i // 4) + 2 * (lane % 4) + i % 2] = value
    return out


FILL = f"""
mul.lo.u32 %r10, %tid, {SMEM // 128};
add.u32 %r11, %r10, %smem;
cvt.u64.u32 %rd10, %r10;
add.s64 %rd10, %rd10, %in0;
mov.u32 %r12, 0;
COPY:
ld.global.v4.u32 {{%r13, %r14, %r15, %r16}}, [%rd10];
st.shared.v4.u32 [%r11], {{%r13, %r14, %r15, %r16}};
add.u32 %r11, %r11, 16; add.s64 %rd10, %rd10, 16; add.u32 %r12, %r12, 16;
setp.lt.u32 %p9, %r12, {SMEM // 128};
@%p9 bra COPY;
"""
READY = "fence.proxy.async.shared::cta; bar.sync 0;\n"


def registers(n: int, d: str) -> list[str]:
    return [f"%d{i}" for i in range(n // (4 if d == "f16" else 2))]


def start(n: int, d: str, value: str = "0") -> str:
    return (
        "".join(f"mov.b32 {name}, {value};\n" for name in registers(n, d))
        + "wgmma.fence.sync.aligned;\n"
    )


def product(
    n: int, types: str, a: str, b: str, literals: str = "", scale: str = "1", prefix: str = ""
) -> str:
    d, kind, _ = types.split(".")
    depth = 32 // BYTES[kind]
    names = ", ".join(registers(n, d))
    tail = f", {literals}" if literals else ""
    form = f"wgmma.mma_async.sync.aligned.m64n{n}k{depth}{prefix}.{types}"
    return f"setp.ne.b32 %p8, {scale}, 0;\n{form} {{{names}}}, {a}, {b}, %p8{tail};\n"


END = "wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;\n"


def store(n: int, d: str) -> str:
    return "".join(
        f"st.global.u32 [%out+{4 * i}], {name};\n" for i, name in enumerate(registers(n, d))
    )


def program(body: str, image: np.ndarray, n: int, d: str, **options: object) -> Result:
    settings: dict[str, object] = {"arch": "sm_90a", "threads": 128, "smem_bytes": SMEM}
    declared = f".reg .b32 %d<{n // 2}>; .reg .b64 %da; .reg .b64 %db; .reg .b32 %a<4>;"
    settings |= {"declarations": declared, "words": len(registers(n, d)), **options}
    return run(body, image, **settings)  # type: ignore[arg-type]


def image_of(kind_a: str, kind_b: str) -> np.ndarray:
    image = random_bytes(kind_a, SMEM, 1)
    image[B_AT:] = random_bytes(kind_b, SMEM - B_AT, 2)
    return image


def layout(at: int, swizzle: int, mn_major: bool, rows: int) -> Descriptor:
    """A canonical tile: its atoms along the rows first."""
    if swizzle:
        leading = 8 * swizzle * 2 if mn_major else 16
        return Descriptor(BASE + at, leading, 8 * swizzle, 0, swizzle)
    return Descriptor(BASE + at, 128 * (rows // 8) + 128, 128, 0, 0)


LAYOUTS = [
    (types, n, swizzle, trans_a, trans_b)
    for types in ("f32.f16.f16", "f32.bf16.bf16")
    for n, swizzle, trans_a, trans_b in (
        (64, 128, False, False),
        (24, 64, False, False),
        (8, 32, False, True),
        (16, 0, False, False),
        (128, 128, True, True),
        (64, 64, True, False),
        (32, 32, True, True),
        (40, 0, True, True),
        (256, 128, False, True),
    )
] + [
    ("f16.f16.f16", 64, 128, False, False),
    ("f32.tf32.tf32", 32, 128, False, False),
    ("f32.e4m3.e4m3", 48, 64, False, False),
    ("f32.e5m2.e4m3", 16, 32, False, False),
    ("f16.e4m3.e5m2", 16, 0, False, False),
    ("s32.s8.s8", 24, 128, False, False),
    ("s32.u8.s8", 24, 128, False, False),
]


@pytest.mark.parametrize(("types", "n", "swizzle", "trans_a", "trans_b"), LAYOUTS)
def test_layouts(types: str, n: int, swizzle: int, trans_a: bool, trans_b: bool) -> None:
    d, a, b = types.split(".")
    image = image_of(a, b)
    left, right = layout(A_AT, swizzle, trans_a, 64), layout(B_AT, swizzle, trans_b, n)
    literals = "" if d == "s32" else "1, -1"
    if a in ("f16", "bf16"):
        literals += f", {int(trans_a)}, {int(trans_b)}"
    body = FILL + READY + f"mov.u64 %da, {left.encode()}; mov.u64 %db, {right.encode()};"
    body += start(n, d) + product(n, types, "%da", "%db", literals) + END + store(n, d)
    got = program(body, image, n, d)
    assert got.rules == []
    want = matrix(image, a, left, 64, trans_a) @ matrix(image, b, right, n, trans_b).T
    np.testing.assert_array_equal(accumulators(got, n, d), want if d == "s32" else -want)


@POLICIES
@pytest.mark.parametrize("kind", ["f16", "tf32", "e4m3", "s8"])
def test_a_from_registers_accumulates_over_chains_and_groups(kind: str, completion: str) -> None:
    """Four products in two groups, the second still pending when the first is waited for."""
    n, d = 16, "s32" if kind == "s8" else "f32"
    types = f"{d}.{kind}.{kind}"
    image = image_of(kind, kind)
    right = [layout(B_AT + 32 * i, 128, False, n) for i in range(4)]
    literals = {"s8": "", "f16": "1, 1, 0"}.get(kind, "1, 1")
    body = FILL + READY
    body += "shl.b32 %r20, %tid, 4; add.u32 %r20, %r20, %smem;\n"
    body += "ld.shared.v4.u32 {%a0, %a1, %a2, %a3}, [%r20];\n"
    body += start(n, d, "7" if d == "s32" else "0f40E00000")
    for i, desc in enumerate(right):
        body += f"mov.u64 %db, {desc.encode()};"
        body += product(n, types, "{%a0, %a1, %a2, %a3}", "%db", literals)
        if i == 1:
            body += "wgmma.commit_group.sync.aligned;\n"
    body += "wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 1;\n"
    body += "wgmma.wait_group.sync.aligned 0;\n" + store(n, d)
    got = program(body, image, n, d, completion=completion, seed=1)
    assert got.rules == []
    left = np.empty((64, 32 // BYTES[kind]))
    size = BYTES[kind]
    for thread in range(128):
        warp, lane = divmod(thread, 32)
        for j in range(4):
            row = 16 * warp + lane // 4 + 8 * (j % 2)
            for e in range(4 // size):
                at = 16 * thread + 4 * j + size * e
                k = (4 // size) * (lane % 4) + (16 // size) * (j // 2) + e
                left[row, k] = values_of(kind, image[at : at + size])[0]
    want = 7.0 + sum(left @ matrix(image, kind, desc, n, False).T for desc in right)
    np.testing.assert_array_equal(accumulators(got, n, d), want)


@POLICIES
def test_scale_d_false_starts_afresh(completion: str) -> None:
    image = image_of("f16", "f16")
    desc = [layout(A_AT, 128, False, 64), layout(B_AT, 128, False, 8)]
    body = FILL + READY + f"mov.u64 %da, {desc[0].encode()}; mov.u64 %db, {desc[1].encode()};"
    body += start(8, "f32", "0f7F800000")
    body += product(8, "f32.f16.f16", "%da", "%db", "1, 1, 0, 0", scale="0")
    body += product(8, "f32.f16.f16", "%da", "%db", "1, 1, 0, 0")
    body += END + store(8, "f32")
    got = program(body, image, 8, "f32", completion=completion)
    assert got.rules == []
    once = matrix(image, "f16", desc[0], 64, False) @ matrix(image, "f16", desc[1], 8, False).T
    np.testing.assert_array_equal(accumulators(got, 8, "f32"), 2 * once)
    assert got.launch.counters["mma_flops.f16"] == 2 * 2 * 64 * 8 * 16


def test_many_warpgroups_and_ctas_at_once() -> None:
    image = np.tile(image_of("f16", "f16"), 3)
    desc = [layout(A_AT, 128, False, 64), layout(B_AT, 128, False, 8)]
    fill = FILL.replace(str(SMEM // 128), str(SMEM // 256))
    body = fill + READY + f"mov.u64 %da, {desc[0].encode()}; mov.u64 %db, {desc[1].encode()};"
    body += start(8, "f32") + product(8, "f32.f16.f16", "%da", "%db", "1, 1, 0, 0")
    body += END + store(8, "f32")
    got = program(body, image, 8, "f32", threads=256, ctas=3)
    assert got.rules == []
    first = got.out[:128]
    assert all(np.array_equal(first, got.out[i : i + 128]) for i in range(0, 768, 128))
    assert np.any(first)


DESC = [layout(A_AT, 128, False, 64), layout(B_AT, 128, False, 8)]
SET = f"mov.u64 %da, {DESC[0].encode()}; mov.u64 %db, {DESC[1].encode()};\n"
MMA = product(8, "f32.f16.f16", "%da", "%db", "1, 1, 0, 0")
COMMIT = "wgmma.commit_group.sync.aligned;\n"
BUGS = {
    "read before the wait": (
        "wgmma-unwaited",
        FILL + READY + SET + start(8, "f32") + MMA + COMMIT + "mov.b32 %r3, %d0;" + END,
    ),
    "no wait": ("wgmma-unwaited", FILL + READY + SET + start(8, "f32") + MMA + COMMIT),
    "no commit": (
        "wgmma-unwaited",
        FILL + READY + SET + start(8, "f32") + MMA + "wgmma.wait_group.sync.aligned 0;\n",
    ),
    "no wgmma.fence": (
        "wgmma-fence",
        FILL + READY + SET + start(8, "f32") + "mov.b32 %d1, 0;" + MMA + END,
    ),
    "no proxy fence": (
        "missing-proxy-fence",
        FILL + "bar.sync 0;" + SET + start(8, "f32") + MMA + END,
    ),
    "no barrier": (
        "shared-race",
        FILL + "fence.proxy.async.shared::cta;" + SET + start(8, "f32") + MMA + END,
    ),
    "operand overwritten": (
        "overwrite-while-reading",
        FILL + READY + SET + start(8, "f32") + MMA + COMMIT + "st.shared.u32 [%smem], 0;" + END,
    ),
    "warps disagree": (
        "wgmma-operands",
        FILL + READY + SET + "setp.eq.u32 %p1, %warp, 2; @%p1 add.s64 %db, %db, 2;\n"
        + start(8, "f32") + MMA + END,
    ),
    "outside": (
        "shared-out-of-bounds",
        FILL + READY + SET + "add.s64 %db, %db, 8000;\n" + start(8, "f32") + MMA + END,
    ),
}  # fmt: skip


@pytest.mark.parametrize("completion", ["eager", "late"])
@pytest.mark.parametrize("bug", BUGS)
def test_bugs_are_reported(bug: str, completion: str) -> None:
    rule, body = BUGS[bug]
    got = program(body, image_of("f16", "f16"), 8, "f32", completion=completion)
    assert got.rules[0] == rule


def test_late_completion_poisons_the_accumulator_until_the_wait() -> None:
    body = FILL + READY + SET + start(8, "f32") + MMA + COMMIT
    body += store(8, "f32") + "wgmma.wait_group.sync.aligned 0;\n"
    got = program(body, image_of("f16", "f16"), 8, "f32", completion="late")
    assert set(got.out.reshape(-1)) == {0x7FC0DEAD}


def test_descriptors_survive_a_round_trip() -> None:
    desc = Descriptor(1024 + 512, 256, 2048, 3, 64)
    assert Descriptor.decode(desc.encode()) == desc


@pytest.mark.parametrize(
    "form", ["m64n8k16.f32.f16.bf16", "m64n12k16.f32.f16.f16", "m64n8k8.f32.f16.f16"]
)
def test_forms_that_do_not_exist_are_refused(form: str) -> None:
    body = f"wgmma.mma_async.sync.aligned.{form} {{%d0, %d1, %d2, %d3}}, %da, %db, 1, 1, 1, 0, 0;"
    with pytest.raises(UnsupportedInstruction, match="mma_async"):
        program(body, image_of("f16", "f16"), 8, "f32")
