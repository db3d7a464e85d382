"""TMA and bulk copies against brute force from the ISA's formulas, under every policy."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from cute_fa.errors import InvalidArgumentError
from cute_fa.sim.isa import UnsupportedInstruction
from cute_fa.sim.memory import GlobalMemory
from cute_fa.sim.tensor_map import TensorMap, decode, encode, swizzled_chunks
from tests.sim.test_mbarrier import init, wait
from tests.sim.tiny import Result, run

POLICIES = pytest.mark.parametrize("completion", ["eager", "late", "random"])
BAR = 8192  # where the mbarrier lies, behind the data


def aligned(nbytes: int) -> np.ndarray:
    raw = np.zeros(nbytes + 128, np.uint8)
    start = -raw.ctypes.data % 128
    return raw[start : start + nbytes]


class Tensor:
    """A dense random tensor in global memory, extents innermost first, and its map."""

    def __init__(self, extents: tuple[int, ...], box: tuple[int, ...], **fields: object) -> None:
        kind = str(fields.pop("kind", "f16"))
        element = {"f16": 2, "bf16": 2, "f32": 4, "u8": 1, "s32": 4}[kind]
        pitch = -(-extents[0] * element // 16) * 16
        strides = [element]
        for extent in extents[:-1]:
            strides.append(pitch if len(strides) == 1 else strides[-1] * extent)
        size = strides[-1] * extents[-1] + 64
        self.data = aligned(size)
        rng = np.random.default_rng(0)
        self.data[...] = rng.integers(0, 64, size, np.uint8)
        steps = fields.pop("steps", (1,) * len(extents))
        self.map = TensorMap(
            self.data.ctypes.data,
            kind,
            element,
            extents,
            tuple(strides),
            box,
            steps,  # type: ignore[arg-type]
            int(fields.pop("swizzle", 0)),  # type: ignore[call-overload]
            bool(fields.pop("fill_nan", False)),
        )
        self.memory = GlobalMemory()
        self.memory.register(self.data, name="tensor")

    def element(self, position: tuple[int, ...]) -> bytes | None:
        """The element at a position, or None outside."""
        if any(not 0 <= p < e for p, e in zip(position, self.map.extents, strict=True)):
            return None
        at = sum(p * s for p, s in zip(position, self.map.strides, strict=True))
        return self.data[at : at + self.map.element].tobytes()

    def box(self, corner: tuple[int, ...], start: int) -> dict[int, bytes | None]:
        """Element by shared byte address, by the formulas of PTX ISA 5.5."""
        tensor = self.map
        bits = {0: 0, 32: 1, 64: 2, 128: 3}[tensor.swizzle]
        out = {}
        ranges = [range(n) for n in reversed(tensor.counts)]
        for number, index in enumerate(itertools.product(*ranges)):
            address = start + number * tensor.element
            address ^= (address >> 7 & (1 << bits) - 1) << 4
            steps = zip(corner, reversed(index), tensor.steps, strict=True)
            out[address] = self.element(tuple(c + i * s for c, i, s in steps))
        return out


def program(body: str, tensor: Tensor, **options: object) -> Result:
    """The tensor map lies at ``%in0``; the mbarrier at ``%smem + BAR``."""
    data = np.zeros(2048, np.uint8)
    data[:128] = np.frombuffer(encode(tensor.map), np.uint8)
    settings = {"arch": "sm_90a", "smem_bytes": 16384, "memory": tensor.memory, **options}
    return run(body, data, **settings)  # type: ignore[arg-type]


def load(tensor: Tensor, corner: tuple[int, ...], at: int = 0) -> str:
    rank = tensor.map.rank
    coords = ", ".join(f"%r{20 + i}" for i in range(rank))
    moves = "".join(f"mov.u32 %r{20 + i}, {c};\n" for i, c in enumerate(corner))
    return f"""
    {moves}
    @%p0 mbarrier.arrive.expect_tx.shared.b64 _, [%smem+{BAR}], {tensor.map.box_bytes};
    @%p0 cp.async.bulk.tensor.{rank}d.shared::cta.global.tile.mbarrier::complete_tx::bytes
        [%smem+{at}], [%in0, {{{coords}}}], [%smem+{BAR}];
    """


def dump(words: int) -> str:
    """Copy ``words`` words of shared memory per thread to the output."""
    lines = ["mul.lo.u32 %r40, %tid, 4; add.u32 %r40, %r40, %smem;"]
    for i in range(words):
        lines.append(f"ld.shared.u32 %r41, [%r40+{i * 128}];")
        lines.append(f"st.global.u32 [%out+{i * 4}], %r41;")
    return "\n".join(lines)


def dumped(result: Result) -> bytes:
    return np.ascontiguousarray(result.out.T).tobytes()


CASES = {
    "1d": (Tensor, (100,), (32,), (16,), {}),
    "1d before the start": (Tensor, (100,), (32,), (-8,), {}),
    "2d 128B": (Tensor, (64, 20), (64, 8), (0, 3), {"swizzle": 128}),
    "2d 64B": (Tensor, (64, 20), (32, 8), (16, 3), {"swizzle": 64}),
    "2d 32B": (Tensor, (64, 20), (16, 16), (16, 3), {"swizzle": 32}),
    "2d past the end": (Tensor, (60, 20), (64, 16), (32, 11), {"swizzle": 128}),
    "2d NaN": (Tensor, (60, 20), (64, 8), (32, 17), {"fill_nan": True}),
    "2d outside": (Tensor, (60, 20), (64, 8), (64, 0), {}),
    "3d f32": (Tensor, (12, 5, 3), (8, 4, 2), (4, 3, -1), {"kind": "f32"}),
    "4d u8": (Tensor, (32, 5, 3, 2), (16, 2, 2, 2), (16, 4, 1, 1), {"kind": "u8"}),
    "5d": (Tensor, (16, 3, 4, 2, 3), (8, 2, 2, 1, 2), (8, 2, 3, 1, 2), {}),
    "steps": (Tensor, (64, 20), (32, 8), (-2, 1), {"steps": (2, 3)}),
}


@POLICIES
@pytest.mark.parametrize("case", CASES)
def test_loads_agree_with_brute_force(case: str, completion: str) -> None:
    make, extents, box, corner, fields = CASES[case]
    tensor = make(extents, box, **fields)
    words = -(-tensor.map.box_bytes // 128)
    body = init(1, f"+{BAR}") + load(tensor, corner) + wait(0, f"+{BAR}")
    body += dump(words) if tensor.map.box_bytes % 128 == 0 else ""
    got = program(body, tensor, words=words, completion=completion)
    assert got.rules == []
    if tensor.map.box_bytes % 128 == 0:
        out = dumped(got)
        missing = b"\xff" if tensor.map.fill_nan else b"\x00"
        for address, value in tensor.box(corner, 0).items():
            size = tensor.map.element
            assert out[address : address + size] == (value or missing * size)
    inside = sum(value is not None for value in tensor.box(corner, 0).values())
    assert got.launch.counters["global_bytes_read"] == inside * tensor.map.element


@POLICIES
def test_addresses_wrap_around(completion: str) -> None:
    """Rows 5 to 10 of a ragged matrix as a box of eight: dimensions behind the rows bring the copy
    back from the end of a first dimension of 2**30 rows, by 2**64 bytes (as Triton and quack do).
    """
    tensor, rows, first, count = Tensor((64, 20), (64, 8)), 1 << 30, 5, 6
    ragged = (64, rows, (1 << 31) - 1, (1 << 31) - 1)
    pitch = tensor.map.strides[1]
    strides = (2, pitch, (1 << 34) - pitch, pitch)
    box = (64, 8, 1, 1)
    tensor.map = replace(tensor.map, extents=ragged, strides=strides, box=box, steps=(1,) * 4)
    corner = (0, rows - count, rows, first + count)
    body = init(1, f"+{BAR}") + load(tensor, corner) + wait(0, f"+{BAR}") + dump(8)
    got = program(body, tensor, words=8, completion=completion)
    assert got.rules == []
    out = np.frombuffer(dumped(got), np.uint8).reshape(8, 128)
    want = tensor.data[: 20 * 128].reshape(20, 128)[first : first + count]
    assert (out[:count] == want).all() and not out[count:].any()
    assert got.launch.counters["global_bytes_read"] == count * 128


@POLICIES
@pytest.mark.parametrize("operator", [None, "add", "max"])
def test_stores_and_reductions(operator: str | None, completion: str) -> None:
    """A box that hangs over two edges; every lane stores, the copy is made once."""
    tensor = Tensor((60, 20), (64, 8), swizzle=128)
    before = tensor.data.copy()
    form = f"cp.reduce.async.bulk.tensor.2d.global.shared::cta.{operator}.tile"
    form = form if operator else "cp.async.bulk.tensor.2d.global.shared::cta.tile"
    guard = "@%p0 " if operator else ""
    body = f"""
    setp.eq.u32 %p0, %tid, 0;
    mov.u32 %r20, -4; mov.u32 %r21, 14;
    mul.lo.u32 %r40, %tid, 32; add.u32 %r40, %r40, %smem;
    mul.lo.u32 %r41, %tid, 65537;
    st.shared.v4.u32 [%r40], {{%r41, %r41, %r41, %r41}};
    st.shared.v4.u32 [%r40+16], {{%r41, %r41, %r41, %r41}};
    fence.proxy.async.shared::cta;
    bar.sync 0;
    {guard}{form}.bulk_group.L2::cache_hint [%in0, {{%r20, %r21}}], [%smem], %rd9;
    cp.async.bulk.commit_group;
    cp.async.bulk.wait_group 0;
    """
    got = program(body, tensor, completion=completion, seed=5)
    assert got.rules == []
    shared = np.repeat(np.arange(32, dtype=np.uint16), 16)
    want = before.copy()
    for address, position in zip(
        tensor.box((-4, 14), 0), itertools.product(range(14, 22), range(-4, 60)), strict=True
    ):
        row, column = position
        if 0 <= row < 20 and 0 <= column < 60:
            at = row * tensor.map.strides[1] + 2 * column
            old = before[at : at + 2].view(np.float16)[0]
            new = shared[address // 2 : address // 2 + 1].view(np.float16)[0]
            value = {None: new, "add": old + new, "max": max(old, new)}[operator]
            want[at : at + 2] = np.array([value], np.float16).view(np.uint8)
    np.testing.assert_array_equal(tensor.data, want)
    assert got.launch.counters["tensor_copies"] == 1
    assert got.launch.counters["bulk_repeats"] == (0 if operator else 31)


def test_multicast_reaches_every_cta_of_the_mask() -> None:
    tensor = Tensor((64, 8), (64, 8), swizzle=128)
    body = (
        init(1, f"+{BAR}")
        + f"""
    @%p0 mbarrier.arrive.expect_tx.shared.b64 _, [%smem+{BAR}], 1024;
    fence.mbarrier_init.release.cluster;
    barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;
    mov.u32 %r20, 0; mov.u32 %r21, 0;
    mov.u32 %r10, %cluster_ctarank;
    setp.eq.and.u32 %p1, %r10, 1, %p0;
    mov.b16 %h1, 3;
    @%p1 cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes\
.multicast::cluster
        [%smem], [%in0, {{%r20, %r21}}], [%smem+{BAR}], %h1;
    """
        + wait(0, f"+{BAR}")
        + dump(8)
        + "barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;"
    )
    for completion in ("eager", "late"):
        got = program(body, tensor, words=8, ctas=2, cluster=2, completion=completion)
        assert got.rules == []
        halves = got.out.reshape(2, 32, 8)
        assert np.array_equal(halves[0], halves[1])
        assert got.launch.counters["global_bytes_read"] == 1024


@POLICIES
def test_bulk_copies_in_between_and_out(completion: str) -> None:
    """Global → shared → the other CTA's shared → global, 256 bytes."""
    tensor = Tensor((256,), (16,), kind="u8")
    tensor.data[:256] = np.arange(256)
    body = (
        init(1, f"+{BAR}")
        + init(1, f"+{BAR + 8}")
        + f"""
    fence.mbarrier_init.release.cluster;
    barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;
    mov.u64 %rd1, {tensor.map.address};
    mov.u32 %r12, 256;
    mov.u32 %r10, %cluster_ctarank;
    xor.b32 %r11, %r10, 1;
    @%p0 mbarrier.arrive.expect_tx.shared.b64 _, [%smem+{BAR}], 256;
    @%p0 mbarrier.arrive.expect_tx.shared.b64 _, [%smem+{BAR + 8}], 256;
    @%p0 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes
        [%smem], [%rd1], %r12, [%smem+{BAR}];
    """
        + wait(0, f"+{BAR}")
        + f"""
    mapa.shared::cluster.u32 %r13, %smem, %r11;
    add.u32 %r14, %r13, {BAR + 8};
    add.u32 %r13, %r13, 1024;
    @%p0 cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes
        [%r13], [%smem], %r12, [%r14];
    """
        + wait(0, f"+{BAR + 8}")
        + """
    mul.wide.u32 %rd3, %r10, 256; add.s64 %rd3, %rd3, %out0;
    @%p0 cp.async.bulk.global.shared::cta.bulk_group [%rd3], [%smem+1024], %r12;
    @%p0 cp.async.bulk.commit_group;
    @%p0 cp.async.bulk.wait_group 0;
    barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;
    """
    )
    got = program(body, tensor, words=2, ctas=2, cluster=2, completion=completion, seed=2)
    assert got.rules == []
    assert got.out.reshape(-1).view(np.uint8).tolist() == [*range(256), *range(256)]


def test_bulk_reduction_adds_floats() -> None:
    body = """
    setp.eq.u32 %p0, %tid, 0;
    cvt.rn.f32.u32 %r9, %tid;
    shl.b32 %r10, %tid, 2; add.u32 %r10, %r10, %smem;
    st.shared.b32 [%r10], %r9;
    st.global.b32 [%out], %r9;
    fence.proxy.async.shared::cta;
    bar.sync 0;
    mov.u32 %r12, 128;
    @%p0 cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%out0], [%smem], %r12;
    @%p0 cp.async.bulk.commit_group;
    @%p0 cp.async.bulk.wait_group 0;
    """
    got = run(body, arch="sm_90a")
    assert got.rules == []
    assert got.out[:, 0].view(np.float32).tolist() == [2.0 * i for i in range(32)]


def test_cp_async_arrives_on_an_mbarrier() -> None:
    body = (
        init(32, f"+{BAR}")
        + f"""
    shl.b32 %r10, %tid, 4; add.u32 %r10, %r10, %smem;
    cp.async.cg.shared.global [%r10], [%in], 16;
    cp.async.mbarrier.arrive.noinc.shared.b64 [%smem+{BAR}];
    """
        + wait(0, f"+{BAR}")
        + "ld.shared.u32 %r11, [%r10]; st.global.u32 [%out], %r11;"
    )
    data = np.arange(128, dtype=np.uint32)
    for completion in ("eager", "late", "random"):
        got = run(body, data, arch="sm_90a", smem_bytes=16384, completion=completion)
        assert got.rules == []
        assert got.out[:, 0].tolist() == [4 * i for i in range(32)]


SMALL = Tensor((64, 8), (64, 8), swizzle=128)
LOADED = init(1, f"+{BAR}") + load(SMALL, (0, 0))
STORE = """
    mov.u32 %r20, 0; mov.u32 %r21, 0;
    @%p0 cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%in0, {%r20, %r21}], [%smem];
    @%p0 cp.async.bulk.commit_group;
"""
FILL = """
    setp.eq.u32 %p0, %tid, 0;
    mul.lo.u32 %r40, %tid, 32; add.u32 %r40, %r40, %smem;
    st.shared.v4.u32 [%r40], {%r41, %r41, %r41, %r41};
    st.shared.v4.u32 [%r40+16], {%r41, %r41, %r41, %r41};
"""
OTHERS = STORE.replace("[%smem]", "[%smem+1024]")  # what warp 1 has filled
FENCE = "fence.proxy.async.shared::cta;\n"
WAIT_READ = "cp.async.bulk.wait_group.read 0;\n"
BUGS = {
    "read before arrival": ("read-before-arrival", LOADED + "ld.shared.u32 %r3, [%smem+64];"),
    "no fence": ("missing-proxy-fence", FILL + "bar.sync 0;" + STORE + WAIT_READ),
    "no barrier": ("shared-race", FILL + FENCE + OTHERS + WAIT_READ),
    "overwrite": (
        "overwrite-while-reading",
        FILL + FENCE + "bar.sync 0;" + STORE + "@%p0 st.shared.u32 [%smem], 7;" + WAIT_READ,
    ),
    "exit": ("exit-with-pending-reads", FILL + FENCE + "bar.sync 0;" + STORE),
    "too few bytes": (
        "deadlock",
        (LOADED + wait(0, f"+{BAR}")).replace(f"[%smem+{BAR}], 1024", f"[%smem+{BAR}], 1040"),
    ),
    "misaligned": ("shared-misaligned", init(1, f"+{BAR}") + load(SMALL, (0, 0), at=64)),
    "no mbarrier": (
        "mbarrier-uninitialised",
        "setp.eq.u32 %p0, %tid, 0;" + load(SMALL, (0, 0)),
    ),
    "two copies": (
        "write-while-copy-in-flight",
        LOADED
        + load(SMALL, (0, 0))
        .replace("@%p0 mbarrier.arrive.ex", "@%p0 mbarrier.ex")
        .replace("expect_tx.shared.b64 _,", "expect_tx.relaxed.cta.shared.b64"),
    ),
    "over an mbarrier": ("mbarrier-access", init(1, "+512") + LOADED),
    "init not fenced": (
        "mbarrier-init-fence",
        LOADED.replace("fence.mbarrier_init.release.cluster;", ""),
    ),
    "not a map": ("tensor-map", LOADED.replace("[%in0, ", "[%in0+256, ")),
}


@pytest.mark.parametrize("completion", ["eager", "late"])
@pytest.mark.parametrize("bug", BUGS)
def test_bugs_are_reported(bug: str, completion: str) -> None:
    rule, body = BUGS[bug]
    threads = 64 if bug == "no barrier" else 32
    assert program(body, SMALL, threads=threads, completion=completion).rules[0] == rule


@pytest.mark.parametrize(
    ("completion", "rule"), [("eager", "copy-never-awaited"), ("late", "exited-cta-access")]
)
def test_copies_that_nobody_waits_for(completion: str, rule: str) -> None:
    assert program(LOADED, SMALL, completion=completion).rules[0] == rule


def test_the_fence_may_stand_behind_the_barrier() -> None:
    body = FILL + "bar.sync 0;" + FENCE + OTHERS + WAIT_READ
    assert program(body, SMALL, threads=64).rules == []


@pytest.mark.parametrize("seed", range(8))
def test_maps_survive_a_round_trip(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rank = int(rng.integers(1, 6))
    tensor = TensorMap(
        int(rng.integers(1 << 40)) * 16,
        "bf16",
        2,
        tuple(int(x) for x in rng.integers(1, 1 << 32, rank)),
        (2, *(int(x) * 16 for x in rng.integers(1, 1 << 36, rank - 1))),
        (32, *(int(x) for x in rng.integers(1, 257, rank - 1))),
        (1, *(int(x) for x in rng.integers(1, 9, rank - 1))),
        64,
        bool(seed % 2),
    )
    assert decode(encode(tensor)) == tensor
    with pytest.raises(InvalidArgumentError, match="swizzle"):
        encode(replace(tensor, box=(64, *tensor.box[1:])))


def test_swizzle_is_on_absolute_addresses() -> None:
    assert swizzled_chunks(1024 + 128, 32, 128).tolist() == [73, 72]
    assert swizzled_chunks(1024 + 128, 32, 0).tolist() == [72, 73]


def test_im2col_is_refused_by_name() -> None:
    body = """cp.async.bulk.tensor.3d.shared::cta.global.im2col.mbarrier::complete_tx::bytes
        [%smem], [%in0, {%r1, %r2, %r3}], [%smem], {%h1};"""
    with pytest.raises(UnsupportedInstruction, match="im2col"):
        program(body, SMALL)


def test_a_wave_that_forgets_its_past_remembers_what_copies_still_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from cute_fa.sim import race

    again = "st.shared.u32 [%r40+8192], %r41; bar.sync 0;\n" * 20  # more events than are kept
    begin = FILL + FENCE + "bar.sync 0;" + STORE + again
    monkeypatch.setattr(race, "MOST_EVENTS", 12)
    assert program(begin + WAIT_READ, SMALL, completion="late").rules == []
    bug = program(begin + "@%p0 st.shared.u32 [%smem], 7;" + WAIT_READ, SMALL, completion="late")
    assert bug.rules == ["overwrite-while-reading"]
