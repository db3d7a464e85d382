"""ldmatrix, stmatrix, movmatrix and mma.sync, run as PTX, against index arithmetic in float64."""

import numpy as np
import pytest

from cute_fa.errors import UnsupportedError
from cute_fa.sim import fragments
from tests.sim.tiny import run


def names(start, count, prefix="r"):
    return "{" + ", ".join(f"%{prefix}{start + i}" for i in range(count)) + "}"


TO_SHARED = """
    ld.global.v4.b32 {%r3, %r4, %r5, %r6}, [%in];
    shl.b32 %r7, %tid, 4; add.u32 %r7, %r7, %smem;
    st.shared.v4.b32 [%r7], {%r3, %r4, %r5, %r6};
    bar.sync 0;
"""


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("trans", ["", ".trans"])
def test_ldmatrix(count, trans):
    rows = np.random.default_rng(count).integers(0, 1 << 16, (64, 8), np.uint16)
    result = run(
        f"""{TO_SHARED}
        // lane i of warp w gives row (5 i + 32 w) % 64
        mul.lo.u32 %r8, %lane, 5; mad.lo.u32 %r8, %warp, 32, %r8; and.b32 %r8, %r8, 63;
        shl.b32 %r8, %r8, 4; add.u32 %r8, %r8, %smem;
        ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {names(10, count)}, [%r8];
        st.global.v4.b32 [%out], {names(10, 4)};
        """,
        rows,
        words=4,
        threads=64,
    )
    assert result.rules == []
    halves = result.out.view(np.uint16).reshape(2, 32, 4, 2)
    for warp in range(2):
        for matrix in range(count):
            source = [(5 * (8 * matrix + i) + 32 * warp) % 64 for i in range(8)]
            expected = rows[source].T if trans else rows[source]
            for lane in range(32):
                row, column = lane // 4, 2 * (lane % 4)
                assert (halves[warp, lane, matrix] == expected[row, column : column + 2]).all()
    assert result.launch.counters["shared_bytes_read"] == 2 * count * 128


def test_ldmatrix_of_fewer_matrices_ignores_the_other_lanes_addresses():
    body = (
        TO_SHARED
        + """
        mov.b32 %r8, 3; setp.lt.u32 %p1, %lane, {lanes};
        @%p1 mov.b32 %r8, %r7;
        ldmatrix.sync.aligned.m8n8.x2.shared.b16 {{%r10, %r11}}, [%r8];
        st.global.b32 [%out], %r10;
        """
    ).replace("{%r3, %r4, %r5, %r6}", "{{%r3, %r4, %r5, %r6}}")
    rows = np.zeros((32, 8), np.uint16)
    assert run(body.format(lanes=16), rows).rules == []
    assert run(body.format(lanes=15), rows).rules == ["shared-out-of-bounds"]


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("trans", ["", ".trans"])
def test_stmatrix_is_the_inverse_of_ldmatrix(count, trans):
    values = np.random.default_rng(count).integers(0, 1 << 32, (32, 4), np.uint32)
    result = run(
        f"""
        ld.global.v4.b32 {names(10, 4)}, [%in];
        shl.b32 %r8, %lane, 4; add.u32 %r8, %r8, %smem;
        stmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 [%r8], {names(10, count)};
        bar.sync 0;
        setp.lt.u32 %p1, %lane, {8 * count};
        @%p1 ld.shared.v4.b32 {names(20, 4)}, [%r8];
        @%p1 st.global.v4.b32 [%out], {names(20, 4)};
        """,
        values,
        words=4,
        arch="sm_90a",
    )
    assert result.rules == []
    halves = values.view(np.uint16).reshape(32, 4, 2)
    for matrix in range(count):
        stored = np.zeros((8, 8), np.uint16)
        for lane in range(32):
            stored[lane // 4, 2 * (lane % 4) : 2 * (lane % 4) + 2] = halves[lane, matrix]
        got = result.out[8 * matrix : 8 * matrix + 8].view(np.uint16)
        assert (got == (stored.T if trans else stored)).all()


def test_movmatrix_transposes():
    matrix = np.arange(64, dtype=np.uint16)
    result = run(
        """
        ld.global.b32 %r3, [%in];
        movmatrix.sync.aligned.m8n8.trans.b16 %r4, %r3;
        st.global.b32 [%out], %r4;
        """,
        matrix,
    )
    assert (result.out.view(np.uint16).reshape(8, 8) == matrix.reshape(8, 8).T).all()


MMAS = [
    ("m16n8k8", "f32", "f16", "f16"),
    ("m16n8k16", "f32", "f16", "f16"),
    ("m16n8k8", "f16", "f16", "f16"),
    ("m16n8k16", "f16", "f16", "f16"),
    ("m16n8k8", "f32", "bf16", "bf16"),
    ("m16n8k16", "f32", "bf16", "bf16"),
    ("m16n8k4", "f32", "tf32", "tf32"),
    ("m16n8k8", "f32", "tf32", "tf32"),
    ("m8n8k4", "f64", "f64", "f64"),
    ("m16n8k4", "f64", "f64", "f64"),
    ("m16n8k8", "f64", "f64", "f64"),
    ("m16n8k16", "f64", "f64", "f64"),
    ("m8n8k16", "s32", "s8", "s8"),
    ("m16n8k16", "s32", "u8", "s8"),
    ("m16n8k32", "s32", "s8", "u8"),
    ("m16n8k32", "s32", "u8", "u8"),
    ("m16n8k16", "f32", "e4m3", "e4m3"),
    ("m16n8k32", "f32", "e4m3", "e5m2"),
    ("m16n8k32", "f16", "e5m2", "e5m2"),
]
BITS = {"f16": 16, "bf16": 16, "tf32": 32, "f64": 64, "s8": 8, "u8": 8, "e4m3": 8, "e5m2": 8}


def encode(values, kind):
    """Small integers in any operand type, as unsigned bit patterns."""
    if kind in ("s8", "u8"):
        return values.astype(np.int8).view(np.uint8)
    if kind == "f64":
        return values.astype(np.float64).view(np.uint64)
    if kind == "f16":
        return values.astype(np.float16).view(np.uint16)
    raw = values.astype(np.float32).view(np.uint32)
    if kind == "bf16":
        return (raw >> 16).astype(np.uint16)
    if kind == "tf32":
        return raw
    exponent_bits, mantissa_bits = {"e4m3": (4, 3), "e5m2": (5, 2)}[kind]
    bias = (1 << (exponent_bits - 1)) - 1
    exponent = (raw >> 23 & 255).astype(np.int64) - 127 + bias
    mantissa = raw >> (23 - mantissa_bits) & ((1 << mantissa_bits) - 1)
    code = (raw >> 31) << 7 | exponent << mantissa_bits | mantissa
    return np.where(values == 0, 0, code).astype(np.uint8)


def pack(matrix, kind, row_blocks):
    """An operand (rows x k) as registers ``[lane][register]`` by the positions of its elements."""
    per = fragments.ELEMENTS_PER_REGISTER[kind]
    bits = BITS[kind]
    word = np.uint64 if bits == 64 else np.uint32
    count = matrix.size // 32 // per
    codes = encode(matrix, kind)
    out = np.zeros((32, count), word)
    for lane in range(32):
        for register in range(count):
            for element in range(per):
                row, k = fragments.operand_position(
                    lane, register, element, row_blocks=row_blocks, per_register=per
                )
                out[lane, register] |= word(int(codes[row, k]) << (bits * element))
    return out


@pytest.mark.parametrize(("shape", "d", "a", "b"), MMAS)
def test_mma(shape, d, a, b):
    m, k = (int(x) for x in shape.replace("m", "").replace("n8k", " ").split())
    rng = np.random.default_rng(k)
    low, high = (0, 4) if "u8" in (a, b) else (-3, 4)
    warps = 2
    matrix_a = rng.integers(low, high, (warps, m, k))
    matrix_b = rng.integers(low, high, (warps, k, 8))
    matrix_c = rng.integers(-50, 50, (warps, m, 8))
    word = np.uint64 if d == "f64" else np.uint32
    rows = []
    for w in range(warps):
        left, right = pack(matrix_a[w], a, m // 8), pack(matrix_b[w].T, b, 1)
        addend = np.zeros((32, m // 4), word)
        for lane in range(32):
            for i in range(m // 4):
                value = matrix_c[w][fragments.accumulator_position(lane, i)]
                typed = {"f32": np.float32, "f16": np.float32, "f64": np.float64, "s32": np.int32}
                addend[lane, i] = np.array(value, typed[d]).view(word)
        if d == "f16":
            halves = addend.view(np.float32).astype(np.float16)
            addend = halves.view(np.uint32)
        rows.append(np.concatenate([left, right, addend], axis=1))
    data = np.concatenate(rows)
    na, nb = m * k // 32 * BITS[a] // (64 if d == "f64" else 32), rows[0].shape[1]
    nd = addend.shape[1]
    nb -= na + nd
    prefix, size, kind = ("rd", 8, "b64") if d == "f64" else ("r", 4, "b32")
    loads = "\n".join(
        f"ld.global.{kind} %{prefix}{10 + i}, [%in+{size * i}];" for i in range(na + nb + nd)
    )
    stores = "\n".join(f"st.global.{kind} [%out+{size * i}], %{prefix}{40 + i};" for i in range(nd))
    operands = ", ".join(
        [
            names(40, nd, prefix),
            names(10, na, prefix),
            names(10 + na, nb, prefix),
            names(10 + na + nb, nd, prefix),
        ]
    )
    result = run(
        f"{loads}\nmma.sync.aligned.{shape}.row.col.{d}.{a}.{b}.{d} {operands};\n{stores}",
        data,
        words=nd * size // 4,
        threads=32 * warps,
        arch="sm_90a",
    )
    assert result.rules == []
    expected = matrix_a @ matrix_b + matrix_c
    typed = {"f32": np.float32, "f16": np.float16, "f64": np.float64, "s32": np.int32}[d]
    got = result.out.view(typed).reshape(warps, 32, -1)
    for lane in range(32):
        for i in range(m // 4):
            row, column = fragments.accumulator_position(lane, i)
            assert (got[:, lane, i] == expected[:, row, column]).all()
    name = f"mma_flops.{a}" if a == b else f"mma_flops.{a}.{b}"
    assert result.launch.counters[name] == warps * 2 * m * 8 * k


def test_integer_accumulators_wrap_or_saturate():
    body = """
        mov.b32 %r3, 0x7f7f7f7f; mov.b32 %r4, 0x7fffff00;
        mma.sync.aligned.m8n8k16.row.col{flag}.s32.s8.s8.s32
            {{%r5, %r6}}, {{%r3}}, {{%r3}}, {{%r4, %r4}};
        st.global.v2.b32 [%out], {{%r5, %r6}};
    """
    wrapped = run(body.format(flag=""), words=2)
    total = 0x7FFFFF00 + 16 * 127 * 127
    assert (wrapped.out == total).all() and total > 0x7FFFFFFF
    saturated = run(body.format(flag=".satfinite"), words=2)
    assert (saturated.out == 0x7FFFFFFF).all()


def test_tf32_ignores_the_low_mantissa_bits():
    result = run(
        """
        mov.b32 %r3, 0x3f801fff; mov.b32 %r4, 0;
        mma.sync.aligned.m16n8k4.row.col.f32.tf32.tf32.f32
            {%r5, %r6, %r7, %r8}, {%r3, %r3}, {%r3}, {%r4, %r4, %r4, %r4};
        st.global.b32 [%out], %r5;
        """,
    )
    assert (result.out.view(np.float32) == 4.0).all()


@pytest.mark.parametrize(
    "form",
    [
        "mma.sync.aligned.m16n8k8.row.col.f32.f16.bf16.f32",
        "mma.sync.aligned.m16n8k32.row.col.f32.f16.f16.f32",
        "mma.sync.aligned.m16n8k16.row.row.f32.f16.f16.f32",
        "mma.sync.aligned.m8n8k4.row.col.f32.f16.f16.f32",
        "mma.sp.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32",
    ],
)
def test_forms_that_do_not_exist_are_refused(form):
    with pytest.raises(UnsupportedError, match="line"):
        run(f"{form} {names(3, 4)}, {names(7, 4)}, {names(11, 2)}, {names(3, 4)};")


def test_matrix_instructions_report_bad_rows():
    body = TO_SHARED + (
        "add.u32 %r8, %r7, {skew}; ldmatrix.sync.aligned.m8n8.x4.shared.b16 "
        "{{%r10, %r11, %r12, %r13}}, [%r8]; st.global.b32 [%out], %r10;"
    )
    body = body.replace("{%r3, %r4, %r5, %r6}", "{{%r3, %r4, %r5, %r6}}")
    rows = np.zeros((32, 8), np.uint16)
    assert run(body.format(skew=0), rows).rules == []
    assert run(body.format(skew=8), rows).rules == ["shared-misaligned"]
    assert run(body.format(skew=16), rows).rules == ["uninitialised-shared-read"]
    assert run(body.format(skew=4096), rows).rules == ["shared-out-of-bounds"]
