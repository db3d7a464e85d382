"""Loads and stores of every state space, width and vector length, on hand-checked values."""

import numpy as np
import pytest

from cute_fa.errors import UnsupportedError
from cute_fa.sim.memory import GlobalMemory
from tests.sim.tiny import run


def data(nbytes_per_thread, threads=64, seed=0):
    return np.random.default_rng(seed).integers(0, 256, threads * nbytes_per_thread, np.uint8)


VECTORS = [
    ("b8", 1, "h"),
    ("b16", 1, "h"),
    ("b32", 1, "r"),
    ("f32", 1, "r"),
    ("b64", 1, "rd"),
    ("b32", 2, "r"),
    ("b32", 4, "r"),
    ("b64", 2, "rd"),
    ("b16", 4, "h"),
    ("b8", 4, "h"),
    ("b32", 8, "r"),
    ("b64", 4, "rd"),
]


def registers(kind, count):
    names = [f"%{kind}{10 + i}" for i in range(count)]
    return names[0] if count == 1 else "{" + ", ".join(names) + "}"


@pytest.mark.parametrize(("kind", "count", "register"), VECTORS)
@pytest.mark.parametrize("through", ["global", "shared", "generic", "local"])
def test_every_width_passes_through_every_space(kind, count, register, through):
    nbytes = int(kind[1:]) // 8 * count
    source = data(nbytes)
    vector = "" if count == 1 else f".v{count}"
    names = registers(register, count)
    form = f"{vector}.{kind}"
    store_load = {
        "global": "",
        "shared": f"""
            mul.lo.u32 %r3, %tid, {nbytes}; add.u32 %r3, %r3, %smem;
            st.shared{form} [%r3], {names};
            ld.shared{form} {names}, [%r3];""",
        "generic": f"""
            mul.lo.u32 %r3, %tid, {nbytes}; add.u32 %r3, %r3, %smem; cvt.u64.u32 %rd3, %r3;
            st{form} [%rd3], {names};
            ld{form} {names}, [%rd3];""",
        "local": f"""
            st.local{form} [depot+32], {names};
            ld.local{form} {names}, [depot+32];""",
    }[through]
    result = run(
        f"""
        ld.global{form} {names}, [%in];
        {store_load}
        mul.wide.u32 %rd4, %tid, {nbytes}; add.u64 %rd4, %rd4, %out0;
        st.global{form} [%rd4], {names};
        """,
        source,
        words=max(nbytes // 4, 1),
        threads=64,
        declarations=".local .align 32 .b8 depot[64];" if through == "local" else "",
    )
    assert result.rules == []
    assert (result.out.reshape(-1).view(np.uint8)[: len(source)] == source).all()


def test_narrow_loads_extend_into_wider_registers():
    source = np.array([0x80, 0x7F, 0xFF, 0x01] * 32, np.uint8).view(np.int8)
    result = run(
        """
        ld.global.s8 %r3, [%in];   st.global.b32 [%out], %r3;
        ld.global.u8 %r4, [%in];   st.global.b32 [%out+4], %r4;
        ld.global.s16 %rd3, [%in]; st.global.b64 [%out+8], %rd3;
        ld.global.b16 %r5, [%in];  st.global.b32 [%out+16], %r5;
        """,
        source,
        words=5,
    )
    row = result.out[0]
    assert row[0] == 0xFFFFFF80 and row[1] == 0x80
    assert row[2] == 0x7F80 and row[3] == 0
    assert row[4] == 0x7F80
    signed = run(
        "ld.global.s16 %rd3, [%in+2]; st.global.b64 [%out], %rd3;",
        np.array([0x01, 0x00, 0x00, 0x80] * 32, np.uint8),
        words=2,
    )
    assert signed.out[0].tolist() == [0xFFFF8000, 0xFFFFFFFF]


def test_narrow_stores_take_the_low_bits():
    result = run(
        """
        mov.b32 %r3, 0x12345678;
        st.global.b32 [%out], %r3;
        st.global.b8 [%out+4], %r3;
        st.global.b16 [%out+6], %r3;
        st.global.b32 [%out+8], -2;
        st.global.f32 [%out+12], 0f3F800000;
        """,
        words=4,
    )
    assert result.out[5].tolist() == [0x12345678, 0x5678EE78, 0xFFFFFFFE, 0x3F800000]


def test_sinks_and_offsets_in_vector_loads():
    source = np.arange(32 * 4, dtype=np.uint32)
    result = run(
        """
        ld.global.v4.b32 {_, %r3, _, %r4}, [%in];
        ld.global.b32 %r5, [%in+-4];
        st.global.v2.b32 [%out], {%r3, %r4};
        """,
        source,
        words=2,
        strict=False,
    )
    assert result.out[3].tolist() == [13, 15]
    assert result.rules == ["global-out-of-bounds"]
    assert "4 bytes before the start of input" in result.launch.hazards[0].message


@pytest.mark.parametrize(
    "form",
    [
        "ld.global.nc.b32",
        "ld.relaxed.gpu.global.b32",
        "ld.acquire.sys.global.b32",
        "ld.volatile.global.b32",
        "ld.weak.global.cg.b32",
        "ld.global.L1::no_allocate.L2::128B.b32",
        "ld.global.nc.L1::no_allocate.L2::256B.b32",
        "ldu.global.b32",
        "ld.b32",
    ],
)
def test_cache_and_ordering_modifiers_do_not_change_values(form):
    source = np.arange(32, dtype=np.uint32) * 5
    result = run(f"{form} %r3, [%in]; st.global.b32 [%out], %r3;", source)
    assert (result.out[:, 0] == source).all() and result.rules == []


def test_cache_policy_operands_are_accepted():
    source = np.arange(32, dtype=np.uint32)
    result = run(
        """
        createpolicy.fractional.L2::evict_last.b64 %rd3, 1.0;
        ld.global.L2::cache_hint.b32 %r3, [%in], %rd3;
        st.global.L2::cache_hint.b32 [%out], %r3, %rd3;
        """,
        source,
    )
    assert (result.out[:, 0] == source).all()


def test_guarded_accesses_touch_only_their_lanes():
    source = np.arange(32, dtype=np.uint32) + 100
    result = run(
        """
        setp.lt.u32 %p1, %lane, 5;
        mov.b32 %r3, 1;
        mov.b64 %rd3, 0;
        selp.b64 %rd4, %in, %rd3, %p1;
        @%p1 ld.global.b32 %r3, [%rd4];
        @!%p1 mov.b32 %r3, 2;
        @%p1 st.global.b32 [%out], %r3;
        """,
        source,
    )
    assert result.rules == []
    assert result.out[:5, 0].tolist() == [100, 101, 102, 103, 104]
    assert (result.out[5:] == 0xEEEEEEEE).all()


def test_generic_addresses_are_told_apart_per_lane():
    source = np.arange(32, dtype=np.uint32) + 1
    result = run(
        """
        shl.b32 %r3, %lane, 2; add.u32 %r3, %r3, %smem;
        shl.b32 %r4, %lane, 8; st.shared.b32 [%r3], %r4;
        st.local.b32 [depot], 77;
        and.b32 %r5, %lane, 3;
        setp.eq.u32 %p1, %r5, 1; setp.eq.u32 %p2, %r5, 2; setp.eq.u32 %p3, %r5, 3;
        cvt.u64.u32 %rd3, %r3;
        mov.b64 %rd4, depot; cvta.local.u64 %rd4, %rd4;
        mov.b64 %rd5, p_x; cvta.param.u64 %rd5, %rd5;
        mov.b64 %rd6, %in;
        @%p1 mov.b64 %rd6, %rd3;
        @%p2 mov.b64 %rd6, %rd4;
        @%p3 mov.b64 %rd6, %rd5;
        ld.b32 %r6, [%rd6];
        st.global.b32 [%out], %r6;
        """,
        source,
        declarations=".local .align 8 .b8 depot[8];",
    )
    assert result.rules == []
    assert result.out[4:8, 0].tolist() == [5, 5 << 8, 77, 7]


def test_local_memory_belongs_to_each_thread():
    result = run(
        """
        st.local.b32 [depot+4], %tid;
        mov.b64 %rd3, depot;
        bar.sync 0;
        ld.local.b32 %r3, [%rd3+4];
        st.global.b32 [%out], %r3;
        """,
        threads=96,
        ctas=2,
        declarations=".local .align 8 .b8 depot[8];",
    )
    assert (result.out[:, 0] == np.tile(np.arange(96), 2)).all()
    assert result.launch.counters["local_bytes_written"] == 2 * 96 * 4


def test_local_memory_bounds_and_uninitialised_reads():
    body = "ld.local.b32 %r3, [depot+{}]; st.global.b32 [%out], %r3;"
    declarations = ".local .align 8 .b8 depot[16];"
    outside = run("st.local.b32 [depot], 1;" + body.format(16), declarations=declarations)
    assert outside.rules == ["local-out-of-bounds"]
    unwritten = run("st.local.b32 [depot], 1;" + body.format(4), declarations=declarations)
    assert unwritten.rules == ["uninitialised-local-read"]
    skewed = run("st.local.b32 [depot], 1;" + body.format(2), declarations=declarations)
    assert skewed.rules == ["local-misaligned"]
    clean = run("st.local.b32 [depot], 1;" + body.format(0), declarations=declarations)
    assert clean.rules == []


def test_global_variables_and_constants():
    module = ".const .align 4 .b32 table[4] = {10, 20, 30, 40};\n.global .align 4 .b32 total[1];"
    result = run(
        """
        and.b32 %r3, %lane, 3; mul.wide.u32 %rd3, %r3, 4;
        mov.u64 %rd4, table; add.u64 %rd4, %rd4, %rd3;
        ld.const.b32 %r4, [%rd4];
        st.global.b32 [total], %r4;
        ld.global.b32 %r5, [total];
        st.global.v2.b32 [%out], {%r4, %r5};
        """,
        words=2,
        module=module,
    )
    assert result.rules == []
    assert result.out[:4, 0].tolist() == [10, 20, 30, 40]
    assert (result.out[:, 1] == 40).all()  # the last lane's store


def test_last_lane_wins_on_one_shared_address():
    result = run(
        "st.shared.b32 [%smem], %tid; bar.sync 0; ld.shared.b32 %r3, [%smem];"
        "st.global.b32 [%out], %r3;",
    )
    assert (result.out == 31).all() and result.rules == []


def test_counts_of_bytes_and_sectors():
    source = np.zeros(64 * 16, np.uint8)
    result = run(
        """
        ld.global.v4.b32 {%r3,%r4,%r5,%r6}, [%in];
        shl.b32 %r7, %tid, 4; add.u32 %r7, %r7, %smem;
        st.shared.v4.b32 [%r7], {%r3,%r4,%r5,%r6};
        ld.shared.b32 %r8, [%r7];
        setp.lt.u32 %p1, %lane, 2;
        @%p1 st.global.b32 [%out], %r8;
        """,
        source,
        threads=64,
    )
    counters = result.launch.counters
    assert counters["global_bytes_read"] == 64 * 16
    assert counters["global_sectors_read"] == 32
    assert counters["shared_bytes_written"] == 64 * 16
    assert counters["shared_bytes_read"] == 64 * 4
    assert counters["global_bytes_written"] == 4 * 4
    assert counters["global_sectors_written"] == 2


def test_out_of_bounds_reads_are_poison_and_writes_are_dropped():
    memory = GlobalMemory()
    result = run(
        """
        ld.global.b32 %r3, [%in+4096];
        st.global.b32 [%out+8192], %r3;
        st.global.b32 [%out], %r3;
        """,
        np.zeros(32, np.uint32),
        memory=memory,
    )
    assert result.rules == ["global-out-of-bounds", "global-out-of-bounds"]
    assert np.isnan(result.out.view(np.float32)).all()
    hazard = result.launch.hazards[0]
    assert hazard.count == 32 and hazard.ptx_line == result.line("ld.global.b32 %r3")


@pytest.mark.parametrize("form", ["ld.global.v3.b32", "ld.tex.b32", "st.async.shared.b32"])
def test_unknown_forms_are_refused_with_their_line(form):
    with pytest.raises(UnsupportedError, match=form.replace(".", r"\.")):
        run(f"{form} %r3, [%in];")


@pytest.mark.parametrize("policy", ["eager", "random"])
@pytest.mark.parametrize("order", ["volatile", "relaxed.cta", "acquire.cta"])
def test_spinning_on_a_flag_lets_the_other_warp_set_it(policy, order):
    store = "volatile" if order == "volatile" else "release.cta"
    result = run(
        f"""
        st.{store}.shared.b32 [%smem], 0;
        bar.sync 0;
        setp.eq.u32 %p1, %warp, 1; @%p1 bra setter;
        spin:
        ld.{order}.shared.b32 %r3, [%smem];
        setp.ne.u32 %p2, %r3, 9; @%p2 bra spin;
        bra done;
        setter:
        st.{store}.shared.b32 [%smem], 9;
        done:
        st.global.b32 [%out], 1;
        """,
        threads=64,
        completion=policy,
    )
    assert result.rules == [] and (result.out == 1).all()


def test_spinning_on_a_flag_that_nobody_sets_is_a_deadlock():
    result = run(
        """
        st.volatile.shared.b32 [%smem], 0;
        spin:
        ld.volatile.shared.b32 %r3, [%smem];
        setp.ne.u32 %p2, %r3, 9; @%p2 bra spin;
        """
    )
    assert result.rules == ["deadlock"]


def test_128_bit_registers():
    source = np.arange(32 * 4, dtype=np.uint32)
    result = run(
        """
        shl.b32 %r3, %tid, 4; add.u32 %r3, %r3, %smem;
        ld.global.b128 %q, [%in];
        st.shared.b128 [%r3], %q;
        mov.b128 %q, {%in, %in};
        ld.shared.b128 %q, [%r3];
        st.global.b128 [%out], %q;
        """,
        source,
        words=4,
        declarations=".reg .b128 %q;",
        arch="sm_90a",
    )
    assert result.rules == [] and (result.out.reshape(-1) == source).all()
