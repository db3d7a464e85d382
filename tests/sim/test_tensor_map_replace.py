"""Kernels that change tensor maps: every field, and the way from shared to global memory."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from cute_fa.errors import UnsupportedError
from cute_fa.sim.tensor_map import TensorMap, decode, encode
from tests.sim.test_mbarrier import init, wait
from tests.sim.test_tensor_copy import BAR, Tensor, dump, dumped, program
from tests.sim.tiny import run

BEFORE = TensorMap(1 << 20, "f16", 2, (64, 32), (2, 256), (64, 8), (1, 1), 128)
FIELDS = {
    "global_address.b64": ("0x1234567890", {"address": 0x1234567890}),
    "global_dim.b32 0": ("100", {"extents": (100, 32)}),
    "global_dim.b32 1": ("7", {"extents": (64, 7)}),
    "global_stride.b64 0": ("0x3000000010", {"strides": (2, 0x3000000010)}),
    "box_dim.b32 0": ("32", {"box": (32, 8)}),
    "box_dim.b32 1": ("256", {"box": (64, 256)}),
    "element_stride.b32 1": ("2", {"steps": (1, 2)}),
    "swizzle_mode.b32": ("0", {"swizzle": 0}),
    "swizzle_atomicity.b32": ("1", {"atom": 32}),
    "fill_mode.b32": ("1", {"fill_nan": True}),
    "elemtype.b32": ("10", {"kind": "bf16"}),
}
MAP = np.zeros(256, np.uint8)
MAP[:128] = np.frombuffer(encode(BEFORE), np.uint8)
IN_SHARED = """
    setp.eq.u32 %p0, %tid, 0;
    shl.b32 %r5, %tid, 2; cvt.u64.u32 %rd5, %r5; add.u64 %rd6, %in0, %rd5; add.u32 %r6, %smem, %r5;
    ld.global.b32 %r7, [%rd6]; st.shared.b32 [%r6], %r7; bar.sync 0;
"""


def replaced(field: str, value: str, space: str, place: str) -> str:
    name, _, ordinal = field.partition(" ")
    name, kind = name.split(".")
    operands = f"[{place}], " + (f"{ordinal}, " if ordinal else "")
    return f"@%p0 tensormap.replace.tile.{name}{space}.b1024.{kind} {operands}{value};\n"


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize(("space", "place"), [(".shared::cta", "%smem"), (".global", "%in0")])
def test_every_field(field: str, space: str, place: str) -> None:
    value, change = FIELDS[field]
    read = "ld.shared.b32 %r8, [%r6];" if place == "%smem" else "ld.global.b32 %r8, [%rd6];"
    body = replaced(field, value, space, place) + "bar.sync 0;" + read
    result = run(IN_SHARED + body + "st.global.b32 [%out], %r8;", MAP.copy(), arch="sm_90a")
    assert result.rules == []
    assert decode(result.out.tobytes()) == replace(BEFORE, **change)


def test_rank() -> None:
    flat = TensorMap(1 << 20, "f16", 2, (64,), (2,), (64,), (1,), 128)
    body = replaced("rank.b32", "0", ".shared::cta", "%smem") + "bar.sync 0;"
    body += "ld.shared.b32 %r8, [%r6]; st.global.b32 [%out], %r8;"
    result = run(IN_SHARED + body, MAP.copy(), arch="sm_90a")
    assert decode(result.out.tobytes()) == flat


@pytest.mark.parametrize("completion", ["eager", "late", "random"])
def test_a_map_made_in_shared_memory_serves_a_copy(completion: str) -> None:
    """Half as many rows as the host said: the box's other rows are outside."""
    tensor = Tensor((64, 8), (64, 8))
    body = (
        init(1, f"+{BAR}")
        + IN_SHARED
        + replaced("global_dim.b32 1", "4", ".shared::cta", "%smem")
        + f"""
    bar.warp.sync -1; add.u64 %rd7, %in0, 1024;
    tensormap.cp_fenceproxy.global.shared::cta.tensormap::generic.release.gpu.sync.aligned
        [%rd7], [%smem], 128;
    fence.proxy.tensormap::generic.acquire.gpu [%rd7], 128;
    mov.u32 %r20, 0;
    @%p0 mbarrier.arrive.expect_tx.shared.b64 _, [%smem+{BAR}], 1024;
    @%p0 cp.async.bulk.tensor.2d.shared::cta.global.tile.mbarrier::complete_tx::bytes
        [%smem+1024], [%rd7, {{%r20, %r20}}], [%smem+{BAR}];
    """
        + wait(0, f"+{BAR}")
        + dump(8).replace(
            "add.u32 %r40, %r40, %smem", "add.u32 %r40, %r40, %smem; add.u32 %r40, %r40, 1024"
        )
    )
    result = program(body, tensor, words=8, completion=completion, seed=1)
    assert result.rules == []
    got = np.frombuffer(dumped(result), np.uint8).reshape(8, 128)
    assert (got[:4] == tensor.data[: 4 * 128].reshape(4, 128)).all() and not got[4:].any()


RELEASE = "fence.proxy.tensormap::generic.release.gpu;\n"
ACQUIRE = "fence.proxy.tensormap::generic.acquire.gpu [%in0], 128;\n"
CHANGE = replaced("global_dim.b32 1", "4", ".global", "%in0") + "bar.warp.sync -1;\n"
COPY = f"""
    mov.u32 %r20, 0;
    setp.eq.u32 %p2, %tid, {{thread}};
    @%p2 mbarrier.arrive.expect_tx.shared.b64 _, [%smem+{BAR}], 1024;
    @%p2 cp.async.bulk.tensor.2d.shared::cta.global.tile.mbarrier::complete_tx::bytes
        [%smem], [%in0, {{{{%r20, %r20}}}}], [%smem+{BAR}];
"""
THREADS_MEET = "bar.sync 0;\n"
FIRST_WARP, SECOND_WARP = (
    f"setp.eq.u32 %p3, %warp, {warp};\n@!%p3 bra SKIP{warp};\n{{}}SKIP{warp}:\n"
    for warp in range(2)
)
IN_ANOTHER_WARP = {
    "the reader acquires": (None, RELEASE, THREADS_MEET, ACQUIRE),
    "somebody else releases": (None, "", THREADS_MEET + RELEASE, ACQUIRE),
    "the writer acquires": (None, RELEASE + ACQUIRE, THREADS_MEET, ""),
    "no fences": ("generic.release", "", THREADS_MEET, ""),
    "no release": ("generic.release", "", THREADS_MEET, ACQUIRE),
    "no acquire": ("generic.acquire", RELEASE, THREADS_MEET, ""),
    "an acquire before the release": ("generic.acquire", ACQUIRE + RELEASE, THREADS_MEET, ""),
    "nothing orders the two": ("nothing orders", RELEASE, "", ACQUIRE),
}


@pytest.mark.parametrize("case", IN_ANOTHER_WARP)
@pytest.mark.parametrize("completion", ["eager", "late", "random"])
def test_a_change_has_to_be_fenced_before_another_warp_copies(case: str, completion: str) -> None:
    """Warp 0 changes the map, warp 1 copies with it; fences at three places in between."""
    words, by_writer, between, by_reader = IN_ANOTHER_WARP[case]
    body = (
        init(1, f"+{BAR}")
        + FIRST_WARP.format(CHANGE + by_writer)
        + between
        + SECOND_WARP.format(by_reader + COPY.format(thread=32))
        + wait(0, f"+{BAR}")
    )
    got = program(body, Tensor((64, 8), (64, 8)), threads=64, completion=completion, seed=1)
    assert got.rules == ([] if words is None else ["missing-tensormap-fence"])
    if words is not None:
        first = got.launch.hazards[0]
        lines = got.line("tensormap.replace"), got.line("cp.async.bulk.tensor")
        assert words in first.message and first.other is not None
        assert {first.ptx_line, first.other.ptx_line} == set(lines)


def test_a_second_change_needs_its_own_fences() -> None:
    fenced = CHANGE + RELEASE + ACQUIRE
    begin = init(1, f"+{BAR}") + FIRST_WARP
    end = COPY.format(thread=0) + wait(0, f"+{BAR}")
    tensor = Tensor((64, 8), (64, 8))
    again = program(begin.format(fenced + CHANGE) + end, tensor)
    assert again.rules == ["missing-tensormap-fence"]
    assert program(begin.format(fenced + CHANGE + RELEASE + ACQUIRE) + end, tensor).rules == []


@pytest.mark.parametrize("acquire", [True, False])
def test_a_copied_map_is_released_and_has_to_be_acquired(acquire: bool) -> None:
    fence = "fence.proxy.tensormap::generic.acquire.cta [%in0], 128;\n" if acquire else ""
    body = (
        init(1, f"+{BAR}")
        + IN_SHARED.replace("setp.eq.u32 %p0, %tid, 0;", "")
        + replaced("global_dim.b32 1", "4", ".shared::cta", "%smem")
        + "bar.warp.sync -1;\ntensormap.cp_fenceproxy.global.shared::cta.tensormap::generic"
        + ".release.cta.sync.aligned [%in0], [%smem], 128;\n"
        + fence
        + COPY.format(thread=0).replace("[%smem],", "[%smem+1024],")
        + wait(0, f"+{BAR}")
    )
    got = program(body, Tensor((64, 8), (64, 8)))
    assert got.rules == ([] if acquire else ["missing-tensormap-fence"])


@pytest.mark.parametrize(
    "line",
    [
        "fence.proxy.tensormap::generic.acquire.gpu [%in0], 64;",
        "fence.proxy.tensormap::generic.acq_rel.gpu;",
        "tensormap.replace.tile.swizzle_mode.shared::cta.b1024.b32 [%smem], 4;",
        "tensormap.replace.tile.colour.shared::cta.b1024.b32 [%smem], 4;",
        "tensormap.replace.tile.global_dim.shared::cta.b1024.b32 [%smem], %r1, %r2;",
    ],
)
def test_what_does_not_exist_is_refused(line: str) -> None:
    with pytest.raises(UnsupportedError, match="line"):
        run(line, arch="sm_90a")
