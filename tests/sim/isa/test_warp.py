"""Warp-level communication against scalar models of the ISA's pseudocode."""

import numpy as np
import pytest

from cute_fa.sim.isa.warp import lane_bits
from tests.sim.tiny import run

LANES = np.arange(32)


def shuffle_model(mode, values, b, c, lane):
    """The pseudocode of ``shfl`` (PTX ISA 9.7.9.6) for one lane."""
    bval, cval, segment = b & 31, c & 31, c >> 8 & 31
    most = (lane & segment) | (cval & ~segment)
    least = lane & segment
    if mode == "up":
        j = lane - bval
        good = j >= most
    elif mode == "down":
        j = lane + bval
        good = j <= most
    elif mode == "bfly":
        j = lane ^ bval
        good = j <= most
    else:
        j = least | (bval & ~segment)
        good = j <= most
    return values[j if good else lane], good


@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
@pytest.mark.parametrize("c", [0, 31, 7199, 0x1800, 0x101F])
@pytest.mark.parametrize("b", [0, 1, 3, 16, 31])
def test_shuffle_modes_segments_and_clamps(mode, b, c):
    values = (LANES * 7 + 3).astype(np.uint32)
    result = run(
        f"""
        ld.global.b32 %r3, [%in];
        shfl.sync.{mode}.b32 %r4|%p1, %r3, {b}, {c}, -1;
        mov.b32 %r6, {b}; mov.b32 %r7, {c};
        shfl.sync.{mode}.b32 %r5, %r3, %r6, %r7, 0xffffffff;
        selp.b32 %r8, 1, 0, %p1;
        st.global.b32 [%out], %r4;
        st.global.b32 [%out+4], %r8;
        st.global.b32 [%out+8], %r5;
        """,
        values,
        words=3,
    )
    assert result.rules == []
    for lane in range(32):
        value, good = shuffle_model(mode, values, b, c, lane)
        assert result.out[lane].tolist() == [value, int(good), value]


def test_shuffle_with_a_different_source_per_lane_and_several_warps():
    values = np.arange(96, dtype=np.uint32)
    result = run(
        """
        ld.global.b32 %r3, [%in];
        mad.lo.u32 %r4, %lane, 5, 3;
        shfl.sync.idx.b32 %r5|_, %r3, %r4, 31, -1;
        st.global.b32 [%out], %r5;
        """,
        values,
        threads=96,
    )
    expected = [(i // 32) * 32 + (i % 32 * 5 + 3) % 32 for i in range(96)]
    assert result.out[:, 0].tolist() == expected


def test_reading_from_an_absent_lane_and_being_outside_the_mask_are_hazards():
    body = """
        setp.lt.u32 %p1, %lane, 16;
        @!%p1 bra done;
        shfl.sync.idx.b32 %r4, %lane, {source}, 31, {mask};
        st.global.b32 [%out], %r4;
        done:
    """
    clean = run(body.format(source=3, mask=0xFFFF))
    assert clean.rules == [] and (clean.out[:16, 0] == 3).all()
    absent = run(body.format(source=20, mask=0xFFFF))
    assert absent.rules == ["shuffle-inactive-lane"]
    assert "lane 20" in absent.launch.hazards[0].message
    outside = run(body.format(source=3, mask=0xFF))
    assert outside.rules == ["membermask"] and outside.launch.hazards[0].count == 8


def test_votes():
    result = run(
        """
        setp.lt.u32 %p1, %lane, 5; setp.lt.u32 %p2, %lane, 64;
        vote.sync.ballot.b32 %r3, %p1, -1;
        vote.sync.ballot.b32 %r4, !%p1, 0xffffffff;
        vote.sync.all.pred %p3, %p1, -1;  vote.sync.all.pred %p4, %p2, -1;
        vote.sync.any.pred %p5, %p1, -1;  vote.sync.any.pred %p6, !%p2, -1;
        vote.sync.uni.pred %p7, %p1, -1;  vote.sync.uni.pred %p8, !%p2, -1;
        selp.b32 %r5, 1, 0, %p3; selp.b32 %r6, 2, 0, %p4; or.b32 %r5, %r5, %r6;
        selp.b32 %r6, 4, 0, %p5; or.b32 %r5, %r5, %r6; selp.b32 %r6, 8, 0, %p6;
        or.b32 %r5, %r5, %r6; selp.b32 %r6, 16, 0, %p7; or.b32 %r5, %r5, %r6;
        selp.b32 %r6, 32, 0, %p8; or.b32 %r5, %r5, %r6;
        st.global.b32 [%out], %r3; st.global.b32 [%out+4], %r4; st.global.b32 [%out+8], %r5;
        """,
        words=3,
        threads=64,
    )
    assert (result.out == [0x1F, 0xFFFFFFE0, 2 + 4 + 32]).all()


def test_votes_of_part_of_a_warp():
    result = run(
        """
        setp.lt.u32 %p1, %lane, 8; @!%p1 bra done;
        setp.gt.u32 %p2, %lane, 5;
        vote.sync.ballot.b32 %r3, %p2, 0xff;
        vote.sync.all.pred %p3, %p1, 0xff; selp.b32 %r4, 1, 0, %p3;
        activemask.b32 %r5;
        st.global.b32 [%out], %r3; st.global.b32 [%out+4], %r4; st.global.b32 [%out+8], %r5;
        done:
        """,
        words=3,
    )
    assert result.rules == []
    assert (result.out[:8] == [0xC0, 1, 0xFF]).all()


@pytest.mark.parametrize("kind", ["b32", "b64"])
def test_match(kind):
    values = np.array([3, 7, 3, 9] * 8, np.uint64 if kind == "b64" else np.uint32)
    register = "%rd3" if kind == "b64" else "%r3"
    result = run(
        f"""
        ld.global.{kind} {register}, [%in];
        match.any.sync.{kind} %r4, {register}, -1;
        match.all.sync.{kind} %r5|%p1, {register}, -1;
        selp.b32 %r6, 1, 0, %p1;
        mov.b{kind[1:]} {register}, 5;
        match.all.sync.{kind} %r7|%p2, {register}, -1;
        st.global.v4.b32 [%out], {{%r4, %r5, %r6, %r7}};
        """,
        values,
        words=4,
    )
    for lane in range(32):
        same = sum(1 << i for i in range(32) if values[i] == values[lane])
        assert result.out[lane].tolist() == [same, 0, 0, 0xFFFFFFFF]


REDUCTIONS = [
    ("add", "u32", lambda x: np.add.reduce(x)),
    ("min", "u32", lambda x: x.min()),
    ("max", "u32", lambda x: x.max()),
    ("add", "s32", lambda x: np.add.reduce(x.view(np.int32))),
    ("min", "s32", lambda x: x.view(np.int32).min()),
    ("max", "s32", lambda x: x.view(np.int32).max()),
    ("and", "b32", lambda x: np.bitwise_and.reduce(x)),
    ("or", "b32", lambda x: np.bitwise_or.reduce(x)),
    ("xor", "b32", lambda x: np.bitwise_xor.reduce(x)),
]


@pytest.mark.parametrize(("operator", "kind", "model"), REDUCTIONS)
@pytest.mark.parametrize("taking", [32, 9])
def test_redux_of_whole_and_partial_warps(operator, kind, model, taking):
    values = np.random.default_rng(1).integers(0, 1 << 32, 64, np.uint32)
    result = run(
        f"""
        ld.global.b32 %r3, [%in];
        setp.lt.u32 %p1, %lane, {taking}; @!%p1 bra done;
        redux.sync.{operator}.{kind} %r4, %r3, {(1 << taking) - 1};
        st.global.b32 [%out], %r4;
        done:
        """,
        values,
        threads=64,
    )
    for warp in range(2):
        lanes = slice(32 * warp, 32 * warp + taking)
        expected = int(model(values[lanes])) & 0xFFFFFFFF
        assert (result.out[lanes, 0] == expected).all()


def test_redux_f32_minima_with_abs_and_nan():
    values = np.linspace(-3, 4, 32).astype(np.float32)
    values[5] = np.nan
    result = run(
        """
        ld.global.f32 %r3, [%in];
        redux.sync.min.f32 %r4, %r3, -1;
        redux.sync.max.NaN.f32 %r5, %r3, -1;
        redux.sync.max.abs.f32 %r6, %r3, -1;
        redux.sync.min.abs.NaN.f32 %r7, %r3, 0xffffffff;
        st.global.v4.b32 [%out], {%r4, %r5, %r6, %r7};
        """,
        values,
        words=4,
        arch="sm_100a",
    )
    row = result.out[0].view(np.float32)
    assert row[0] == np.float32(-3) and np.isnan(row[1]) and row[2] == 4 and np.isnan(row[3])


def test_elect_chooses_the_lowest_member():
    result = run(
        """
        setp.ge.u32 %p1, %lane, 3; @!%p1 bra done;
        elect.sync %r3|%p2, 0xfffffff8;
        selp.b32 %r4, 1, 0, %p2;
        st.global.b32 [%out], %r3; st.global.b32 [%out+4], %r4;
        done:
        """,
        words=2,
        arch="sm_90a",
    )
    assert result.rules == []
    assert (result.out[3:, 0] == 3).all()
    assert result.out[3:, 1].tolist() == [1] + [0] * 28


def test_masks_of_lanes_in_any_order_in_memory():
    """Masks of part of the CTAs are views, whose lanes need not lie side by side."""
    lanes = np.random.default_rng(0).random((2, 3, 32)) < 0.5
    expected = (lanes * (np.uint64(1) << np.arange(32, dtype=np.uint64))).sum(-1, keepdims=True)
    for order in ((0, 1, 2), (2, 1, 0), (1, 2, 0)):
        stored = np.ascontiguousarray(lanes.transpose(order)).transpose(np.argsort(order))
        np.testing.assert_array_equal(lane_bits(stored), expected)
