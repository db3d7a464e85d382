"""``mov``, parameters, special registers and address-space queries."""

import numpy as np
import pytest

from cute_fa import ptx
from cute_fa.sim import addresses
from cute_fa.sim.execute import execute
from cute_fa.sim.memory import GlobalMemory
from cute_fa.sim.wave import LaunchConfig, SimOptions
from tests.sim.isa.evaluate import evaluate


def launch(body, params="", data=b"", *, words=1, module="", arch="sm_90a", **extents):
    """Run a body that stores ``words`` of b32 at %out; gives (threads, words) in launch order."""
    shape = {"grid": (1, 1, 1), "block": (32, 1, 1), "cluster": (1, 1, 1), "smem_bytes": 0}
    grid, block, cluster, smem_bytes = (shape | extents).values()
    threads = int(np.prod(block)) * int(np.prod(grid))
    out = np.zeros((threads, words), np.uint32)
    text = f"""
    .version 8.8
    .target {arch}
    .address_size 64
    {module}
    .visible .entry k(.param .u64 out{", " + params if params else ""})
    {{
    .reg .pred %p<8>; .reg .b16 %h<16>; .reg .b32 %r<64>; .reg .b64 %rd<32>; .reg .b64 %out;
    .reg .b32 %n<8>;
    mov.u32 %n0, %tid.x; mov.u32 %n1, %tid.y; mov.u32 %n2, %tid.z;
    mad.lo.u32 %n0, %n1, {block[0]}, %n0; mad.lo.u32 %n0, %n2, {block[0] * block[1]}, %n0;
    mov.u32 %n3, %ctaid.x; mov.u32 %n4, %ctaid.y; mov.u32 %n5, %ctaid.z;
    mad.lo.u32 %n3, %n4, {grid[0]}, %n3; mad.lo.u32 %n3, %n5, {grid[0] * grid[1]}, %n3;
    mad.lo.u32 %n0, %n3, {int(np.prod(block))}, %n0;
    ld.param.b64 %rd31, [out];
    mad.wide.u32 %out, %n0, {4 * words}, %rd31;
    {body}
    ret;
    }}
    """
    memory = GlobalMemory()
    base = memory.register(out).base
    raw = base.to_bytes(8, "little") + data
    module_ = ptx.parse(text)
    config = LaunchConfig("k", grid, block, cluster, smem_bytes, raw)
    result = execute(module_, config, memory, SimOptions(arch=arch))
    return out, result


def test_packing_and_unpacking():
    a = np.array([0x11223344], np.uint32)
    b = np.array([0x55667788], np.uint32)
    w = np.array([0x0102030405060708], np.uint64)
    body = """
        .reg .b16 %l, %g; .reg .b16 %q0, %q1, %q2, %q3; .reg .b32 %lo, %hi;
        mov.b32 {%l, %g}, %a; mov.b32 %x, {%g, %l};
        mov.b64 %y, {%a, %b}; mov.b64 {%lo, %hi}, %w; mov.b32 %z, %hi; mov.b64 {%u, _}, %w;
        mov.b64 {%q0, %q1, %q2, %q3}, %w; mov.b64 %v, {%q3, %q2, %q1, %q0};
    """
    inputs = {"a": ("b32", a), "b": ("b32", b), "w": ("b64", w)}
    outputs = {"x": "b32", "y": "b64", "z": "b32", "u": "b32", "v": "b64"}
    got = evaluate(body, inputs, outputs)
    assert int(got["x"][0]) == 0x33441122
    assert int(got["y"][0]) == 0x5566778811223344
    assert int(got["z"][0]) == 0x01020304
    assert int(got["u"][0]) == 0x05060708
    assert int(got["v"][0]) == 0x0708050603040102


def test_128_bit_registers():
    a = np.array([0x1111, 5], np.uint64)
    b = np.array([0x2222, 6], np.uint64)
    body = """
        .reg .b128 %q<3>;
        mov.b128 %q0, {%a, %b}; mov.b128 %q1, %q0; mov.b128 {%x, %y}, %q1;
    """
    got = evaluate(body, {"a": ("b64", a), "b": ("b64", b)}, {"x": "b64", "y": "b64"})
    assert got["x"].tolist() == a.tolist()
    assert got["y"].tolist() == b.tolist()


def test_swapping_registers_through_moves():
    """The stores at a block's end are a parallel copy."""
    a = np.arange(32, dtype=np.uint32)
    b = a + 100
    body = """
        .reg .b32 %t; mov.b32 %x, %a; mov.b32 %y, %b;
        bra NEXT; NEXT: mov.b32 %t, %x; mov.b32 %x, %y; mov.b32 %y, %t; bra LAST; LAST:
    """
    got = evaluate(body, {"a": ("b32", a), "b": ("b32", b)}, {"x": "b32", "y": "b32"})
    assert (got["x"] == b).all()
    assert (got["y"] == a).all()


def test_an_old_value_survives_its_register():
    a = np.arange(32, dtype=np.uint32)
    body = """
        mov.b32 %x, %a; bra NEXT;
        NEXT: mov.b32 %y, %x; add.s32 %x, %x, 7; sub.s32 %z, %x, %y; bra LAST; LAST:
    """
    got = evaluate(body, {"a": ("b32", a)}, {"x": "b32", "y": "b32", "z": "b32"})
    assert (got["x"] == a + 7).all()
    assert (got["y"] == a).all()
    assert (got["z"] == 7).all()


def test_guarded_moves_keep_the_other_lanes():
    a = np.arange(32, dtype=np.uint32)
    body = """
        .reg .pred %q; setp.lt.u32 %q, %a, 10; mov.b32 %x, 5; @%q mov.b32 %x, %a;
        mov.b32 %y, %a; @!%q add.s32 %y, %y, 100; mov.b32 %z, 1; @%q mov.b32 %z, 2;
    """
    got = evaluate(body, {"a": ("b32", a)}, {"x": "b32", "y": "b32", "z": "b32"})
    assert (got["x"] == np.where(a < 10, a, 5)).all()
    assert (got["y"] == np.where(a < 10, a, a + 100)).all()
    assert (got["z"] == np.where(a < 10, 2, 1)).all()


def test_parameters_of_all_widths_and_vectors():
    params = ".param .b8 c, .param .b16 h, .param .b32 w, .param .align 8 .b8 v[16]"
    data = bytes([0x80, 0, 0x34, 0x12]) + (0xDEADBEEF).to_bytes(4, "little") + bytes(range(16))
    body = """
        ld.param.u8 %h1, [c]; cvt.u32.u16 %r1, %h1; st.global.b32 [%out], %r1;
        ld.param.s8 %h2, [c]; cvt.s32.s16 %r2, %h2; st.global.b32 [%out+4], %r2;
        ld.param.u16 %h3, [h]; cvt.u32.u16 %r3, %h3; st.global.b32 [%out+8], %r3;
        ld.param.b32 %r4, [w]; st.global.b32 [%out+12], %r4;
        ld.param.v2.b32 {%r5, %r6}, [v+8];
        st.global.b32 [%out+16], %r5; st.global.b32 [%out+20], %r6;
        mov.b64 %rd1, v; ld.param.b32 %r7, [%rd1+4]; st.global.b32 [%out+24], %r7;
        ld.param.u8 %r8, [c]; st.global.b32 [%out+28], %r8;
    """
    out, _ = launch(body, params, data, words=8)
    expected = [0x80, 0xFFFFFF80, 0x1234, 0xDEADBEEF, 0x0B0A0908, 0x0F0E0D0C, 0x07060504, 0x80]
    assert (out == np.array(expected, np.uint32)).all()


def test_a_parameter_read_at_a_lane_dependent_address():
    params = ".param .align 4 .b8 table[128]"
    data = np.arange(32, dtype=np.uint32)[::-1].tobytes()
    body = """
        mov.u32 %r1, %laneid; mov.b64 %rd1, table; mad.wide.u32 %rd2, %r1, 4, %rd1;
        ld.param.b32 %r2, [%rd2]; st.global.b32 [%out], %r2;
    """
    out, _ = launch(body, params, data)
    assert (out[:, 0] == np.arange(32)[::-1]).all()


def test_thread_and_cta_coordinates():
    grid, block = (3, 2, 2), (5, 4, 3)
    names = [f"%{what}.{axis}" for what in ("tid", "ntid", "ctaid", "nctaid") for axis in "xyz"]
    body = " ".join(
        f"mov.u32 %r{i}, {name}; st.global.b32 [%out+{4 * i}], %r{i};"
        for i, name in enumerate(names)
    )
    out, _ = launch(body, grid=grid, block=block, words=12)
    row = 0
    for cz, cy, cx in np.ndindex(grid[::-1]):
        for tz, ty, tx in np.ndindex(block[::-1]):
            assert out[row].tolist() == [tx, ty, tz, *block, cx, cy, cz, *grid]
            row += 1


def test_warp_level_registers():
    names = ["%laneid", "%warpid", "%nwarpid", "%lanemask_eq", "%lanemask_lt", "%lanemask_le"]
    names += ["%lanemask_gt", "%lanemask_ge"]
    body = " ".join(
        f"mov.u32 %r{i}, {name}; st.global.b32 [%out+{4 * i}], %r{i};"
        for i, name in enumerate(names)
    )
    out, _ = launch(body, block=(96, 1, 1), words=8)
    for thread in range(96):
        lane, full = thread % 32, 0xFFFFFFFF
        below = (1 << lane) - 1
        expected = [lane, thread // 32, 3, 1 << lane, below, below | 1 << lane]
        expected += [full & ~(below | 1 << lane), full & ~below]
        assert out[thread].tolist() == expected


def test_cluster_registers():
    names = [f"%{what}.{axis}" for what in ("clusterid", "cluster_ctaid") for axis in "xy"]
    names += ["%cluster_ctarank", "%cluster_nctarank", "%nclusterid.x", "%cluster_nctaid.y"]
    body = " ".join(
        f"mov.u32 %r{i}, {name}; st.global.b32 [%out+{4 * i}], %r{i};"
        for i, name in enumerate(names)
    )
    out, _ = launch(body, grid=(4, 6, 1), block=(1, 1, 1), cluster=(2, 3, 1), words=8)
    for row, (y, x) in enumerate(np.ndindex(6, 4)):
        rank = x % 2 + 2 * (y % 3)
        assert out[row].tolist() == [x // 2, y // 3, x % 2, y % 3, rank, 6, 2, 3]


def test_shared_addresses_carry_the_rank_and_mapa_changes_it():
    body = """
        mov.u32 %r1, smem; st.global.b32 [%out], %r1;
        mov.b32 %r2, 1; mapa.shared::cluster.u32 %r3, %r1, %r2; st.global.b32 [%out+4], %r3;
        cvt.u64.u32 %rd1, %r1; getctarank.u64 %r4, %rd1; st.global.b32 [%out+8], %r4;
        isspacep.shared::cta %p1, %rd1; selp.b32 %r5, 1, 0, %p1; st.global.b32 [%out+12], %r5;
        mapa.u64 %rd2, %rd1, %r2; isspacep.shared::cta %p2, %rd2; selp.b32 %r6, 1, 0, %p2;
        st.global.b32 [%out+16], %r6;
        isspacep.shared::cluster %p3, %rd2; selp.b32 %r7, 1, 0, %p3; st.global.b32 [%out+20], %r7;
        isspacep.global %p4, %out; selp.b32 %r8, 1, 0, %p4; st.global.b32 [%out+24], %r8;
        isspacep.global %p5, %rd1; selp.b32 %r9, 1, 0, %p5; st.global.b32 [%out+28], %r9;
    """
    module = ".extern .shared .align 1024 .b8 smem[];"
    out, _ = launch(body, grid=(2, 1, 1), block=(1, 1, 1), cluster=(2, 1, 1), words=8,
                    smem_bytes=64, module=module)  # fmt: skip
    for rank in range(2):
        own, peer = (addresses.shared_address(r, addresses.SHARED_BASE) for r in (rank, 1))
        assert out[rank].tolist() == [own, peer, rank, 1, rank == 1, 1, 1, 0]


def test_static_shared_variables_lie_before_the_dynamic_ones():
    module = """
        .shared .align 4 .b8 small[12]; .shared .align 16 .b8 table[32];
        .extern .shared .align 128 .b8 dynamic[];
    """
    body = """
        mov.u32 %r1, small; mov.u32 %r2, table; mov.u32 %r3, dynamic; mov.u32 %r4, table+8;
        st.global.b32 [%out], %r1; st.global.b32 [%out+4], %r2; st.global.b32 [%out+8], %r3;
        st.global.b32 [%out+12], %r4;
        mov.u32 %r5, %dynamic_smem_size; st.global.b32 [%out+16], %r5;
    """
    out, _ = launch(body, block=(1, 1, 1), words=5, smem_bytes=256, module=module)
    base = addresses.SHARED_BASE
    small, table, dynamic, inside, size = out[0].tolist()
    assert small == base
    assert table == base + 16
    assert dynamic % 1024 == 0
    assert dynamic >= table + 32
    assert inside == table + 8
    assert size == 256


def test_global_variables_are_initialised_and_keep_their_values_within_a_launch():
    module = ".global .align 4 .u32 table[4] = {10, 20, 30, 40};"
    body = """
        mov.u32 %r1, %tid.x; mov.b64 %rd1, table; mad.wide.u32 %rd2, %r1, 4, %rd1;
        ld.global.b32 %r2, [%rd2]; st.global.b32 [%out], %r2;
    """
    out, _ = launch(body, block=(4, 1, 1), module=module)
    assert out[:, 0].tolist() == [10, 20, 30, 40]


def test_clocks_never_go_back():
    body = """
        mov.u32 %r1, %clock; mov.u64 %rd1, %clock64; bra NEXT; NEXT: mov.u32 %r2, %clock;
        mov.u64 %rd2, %globaltimer; setp.ge.u64 %p1, %rd2, %rd1; selp.b32 %r3, 1, 0, %p1;
        sub.s32 %r4, %r2, %r1; st.global.b32 [%out], %r3; st.global.b32 [%out+4], %r4;
    """
    out, _ = launch(body, block=(1, 1, 1), words=2)
    assert out[0, 0] == 1
    assert 0 < out[0, 1] < 1000


@pytest.mark.parametrize("space", ["global", "shared", "local", "param"])
def test_cvta_is_the_identity(space):
    body = f"""
        mov.b64 %rd1, 0x1234; cvta.{space}.u64 %rd2, %rd1; cvta.to.{space}.u64 %rd3, %rd2;
        st.global.b64 [%out], %rd3;
    """
    out, _ = launch(body, block=(1, 1, 1), words=2)
    assert out[0].tolist() == [0x1234, 0]


def test_bytes_of_words_in_8_bit_registers():
    """As inline assembly does around conversions of pairs of 4-bit floats."""
    words = np.array([0x04030201, 0xFF80007F, 0], np.uint32)
    body = """
        { .reg .b8 b0, b1, b2, b3; .reg .b16 low, high;
        mov.b32 {b0, b1, b2, b3}, %a;
        mov.b32 %x, {b3, b2, b1, b0};
        mov.b16 low, {b0, b1}; mov.b16 {b2, b3}, low; mov.b16 high, {b3, b2};
        mov.b32 %y, {high, low}; }
    """
    got = evaluate(body, {"a": ("b32", words)}, {"x": "b32", "y": "b32"})
    assert got["x"].tolist() == words.byteswap().tolist()
    low = words.astype(np.uint16)
    assert got["y"].tolist() == (low.byteswap() | low.astype(np.uint32) << 16).tolist()
