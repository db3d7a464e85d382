"""Atomics and reductions, serialised in lane order, against a scalar loop."""

import numpy as np
import pytest

from tests.sim.tiny import run

M32 = 0xFFFFFFFF

INTEGERS = [
    ("add", "u32", lambda old, b: old + b),
    ("min", "u32", min),
    ("max", "u32", max),
    ("min", "s32", lambda old, b: min(signed(old), signed(b))),
    ("max", "s32", lambda old, b: max(signed(old), signed(b))),
    ("and", "b32", lambda old, b: old & b),
    ("or", "b32", lambda old, b: old | b),
    ("xor", "b32", lambda old, b: old ^ b),
    ("exch", "b32", lambda old, b: b),
    ("inc", "u32", lambda old, b: 0 if old >= b else old + 1),
    ("dec", "u32", lambda old, b: b if old == 0 or old > b else old - 1),
]


def signed(x):
    return x - (1 << 32) if x >> 31 else x


@pytest.mark.parametrize(("operator", "kind", "model"), INTEGERS)
@pytest.mark.parametrize("space", ["shared", "global"])
def test_integer_atomics_take_turns_in_lane_order(operator, kind, model, space):
    rng = np.random.default_rng(3)
    counts = operator in ("inc", "dec")
    values = rng.integers(1, 6, 64) if counts else rng.integers(0, 1 << 32, 64)
    start = 3 if counts else 0x40000001
    place = "%r5" if space == "shared" else "%rd5"
    result = run(
        f"""
        and.b32 %r4, %lane, 1; shl.b32 %r4, %r4, 2; add.u32 %r5, %smem, %r4;
        cvt.u64.u32 %rd5, %r4; add.u64 %rd5, %rd5, scratch;
        ld.global.b32 %r3, [%in];
        setp.lt.u32 %p1, %tid, 2; mov.b32 %r6, {start};
        @%p1 st.{space}.b32 [{place}], %r6;
        bar.sync 0;
        atom.{space}.{operator}.{kind} %r7, [{place}], %r3;
        bar.sync 0;
        ld.{space}.b32 %r8, [{place}];
        st.global.v2.b32 [%out], {{%r7, %r8}};
        """,
        values.astype(np.uint32),
        words=2,
        threads=64,
        module=".global .align 8 .b32 scratch[2];",
    )
    assert result.rules == []
    memory = [start, start]
    for thread in range(64):
        place_ = thread & 1
        assert result.out[thread, 0] == memory[place_]
        memory[place_] = model(memory[place_], int(values[thread])) & M32
    assert (result.out[:, 1] == [memory[t & 1] for t in range(64)]).all()


def test_compare_and_swap():
    result = run(
        """
        st.shared.b32 [%smem], 0; bar.sync 0;
        add.u32 %r3, %tid, 1;
        atom.shared.cas.b32 %r4, [%smem], %tid, %r3;
        bar.sync 0;
        ld.shared.b32 %r5, [%smem];
        st.global.v2.b32 [%out], {%r4, %r5};
        """,
        words=2,
    )
    assert (result.out == np.stack([np.arange(32), np.full(32, 32)], axis=1)).all()
    wide = run(
        """
        mov.b64 %rd3, 5; st.shared.b64 [%smem], %rd3; bar.sync 0;
        mov.b64 %rd4, 6;
        atom.acq_rel.gpu.shared.cas.b64 %rd5, [%smem], %rd3, %rd4;
        st.global.b64 [%out], %rd5;
        """,
        words=2,
    )
    assert wide.out[:, 0].tolist() == [5] + [6] * 31


def test_64_bit_add_and_max():
    result = run(
        """
        mov.b64 %rd3, 0xfffffffff; st.shared.b64 [%smem], %rd3; st.shared.b64 [%smem+8], %rd3;
        bar.sync 0;
        cvt.u64.u32 %rd4, %tid;
        atom.shared.add.u64 %rd5, [%smem], %rd4;
        mov.b64 %rd6, -1;
        atom.shared.max.s64 %rd7, [%smem+8], %rd6;
        ld.shared.b64 %rd8, [%smem]; ld.shared.b64 %rd9, [%smem+8];
        st.global.v2.b64 [%out], {%rd8, %rd9};
        """,
        words=4,
    )
    assert result.out.view(np.uint64)[0].tolist() == [0xFFFFFFFFF + 496, 0xFFFFFFFFF]


def test_float_reductions_round_after_every_turn():
    values = (np.random.default_rng(0).standard_normal(64) * 1e3).astype(np.float32)
    result = run(
        """
        ld.global.f32 %r3, [%in];
        mov.f32 %r5, 0f00000000; st.shared.f32 [%smem], %r5; bar.sync 0;
        red.shared.add.f32 [%smem], %r3;
        bar.sync 0; ld.shared.f32 %r4, [%smem]; st.global.f32 [%out], %r4;
        """,
        values,
        threads=64,
    )
    total = np.float32(0)
    for value in values:
        total = np.float32(total + value)
    assert (result.out.view(np.float32) == total).all()


def test_global_float_add_flushes_subnormals_and_shared_does_not():
    tiny = np.full(32, 1e-40, np.float32)
    module = ".global .align 4 .f32 total[1];"
    body = """
        ld.global.f32 %r3, [%in]; setp.eq.u32 %p1, %lane, 0; mov.b32 %r5, 0;
        {store}
        @%p1 red.{space}.add.f32 [{place}], %r3;
        ld.{space}.f32 %r4, [{place}]; st.global.f32 [%out], %r4;
    """
    on_shared = run(
        body.format(space="shared", place="%smem", store="st.shared.b32 [%smem], %r5;"), tiny
    )
    on_global = run(body.format(space="global", place="total", store=""), tiny, module=module)
    assert (on_shared.out.view(np.float32) == tiny[0]).all()
    assert (on_global.out == 0).all()


@pytest.mark.parametrize("kind", ["f16x2", "bf16x2"])
def test_packed_halves(kind):
    narrow = np.float16 if kind == "f16x2" else None
    values = np.arange(64, dtype=np.float32).reshape(32, 2)
    if narrow:
        packed = values.astype(np.float16).view(np.uint32)[:, 0]
    else:
        halves = (values.view(np.uint32) >> 16).astype(np.uint16)
        packed = halves.view(np.uint32)[:, 0]
    result = run(
        f"""
        ld.global.b32 %r3, [%in];
        st.shared.b32 [%smem], 0; bar.sync 0;
        red.shared.add.noftz.{kind} [%smem], %r3;
        ld.shared.b32 %r4, [%smem]; st.global.b32 [%out], %r4;
        """,
        packed,
    )
    total = np.zeros(2, np.float32)
    for pair in values:
        total = total + pair
        if narrow:
            total = total.astype(np.float16).astype(np.float32)
        else:
            bits = total.view(np.uint32)
            bits = (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000
            total = bits.astype(np.uint32).view(np.float32)
    if narrow:
        expected = total.astype(np.float16).view(np.uint32)[0]
    else:
        expected = (total.view(np.uint32) >> 16).astype(np.uint16).view(np.uint32)[0]
    assert (result.out == expected).all()


def test_vector_reduction_to_global():
    values = np.arange(128, dtype=np.float32)
    result = run(
        """
        ld.global.v4.f32 {%r3, %r4, %r5, %r6}, [%in];
        red.global.add.v4.f32 [totals], {%r3, %r4, %r5, %r6};
        red.relaxed.gpu.global.add.v2.f32 [totals], {%r3, %r4};
        ld.global.v4.f32 {%r3, %r4, %r5, %r6}, [totals];
        st.global.v4.f32 [%out], {%r3, %r4, %r5, %r6};
        """,
        values,
        words=4,
        module=".global .align 16 .f32 totals[4];",
        arch="sm_90a",
    )
    sums = values.reshape(32, 4).sum(axis=0)
    expected = sums * [2, 2, 1, 1]
    assert (result.out.view(np.float32) == expected).all()


def test_reductions_by_several_ctas_add_up():
    result = run(
        """
        red.release.gpu.global.add.s32 [count], 1;
        atom.global.inc.u32 %r3, [count+4], 1000;
        st.global.b32 [%out], %r3;
        """,
        threads=64,
        ctas=3,
        module=".global .align 8 .b32 count[2];",
    )
    assert sorted(result.out[:, 0].tolist()) == list(range(192))


def test_atomics_by_different_warps_do_not_race_but_plain_stores_do():
    body = """
        setp.eq.u32 %p1, %tid, 0; mov.b32 %r5, 0;
        @%p1 st.shared.b32 [%smem], %r5;
        bar.sync 0;
        {access}
        bar.sync 0;
        ld.shared.b32 %r4, [%smem]; st.global.b32 [%out], %r4;
    """
    clean = run(body.format(access="red.shared.add.u32 [%smem], 1;"), threads=128)
    assert clean.rules == [] and (clean.out == 128).all()
    racy = run(body.format(access="st.shared.b32 [%smem], %tid;"), threads=128)
    assert racy.rules == ["shared-race"]
    mixed = run(
        body.format(
            access="setp.lt.u32 %p2, %tid, 32; @%p2 red.shared.add.u32 [%smem], 1;"
            "@!%p2 ld.shared.b32 %r6, [%smem];"
        ),
        threads=64,
    )
    assert mixed.rules == ["shared-race"]


def test_shared_atomics_report_bad_addresses():
    outside = run("red.shared.add.u32 [%smem+4096], 1;")
    assert outside.rules == ["shared-out-of-bounds"]
    unset = run("red.shared.add.u32 [%smem], 1;")
    assert unset.rules == ["uninitialised-shared-read"]
    skewed = run("red.global.add.u32 [%out+2], 1;")
    assert skewed.rules == ["global-misaligned"]
