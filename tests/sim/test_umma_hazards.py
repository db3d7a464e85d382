"""What goes wrong around tcgen05.mma and .commit is reported; what is right is not."""

from __future__ import annotations

import numpy as np
import pytest

from cute_fa.sim.umma_descriptors import SharedDescriptor
from tests.sim.tensor_core import (
    A_AT,
    B_AT,
    BARRIER,
    FILL,
    SETUP,
    SMEM,
    WAIT,
    commit,
    image_of,
    instruction,
    matrix,
    mma,
    tile,
)
from tests.sim.tiny import Result, run

N = 32
LEFT, RIGHT = tile(A_AT, 128, False, 128), tile(B_AT, 128, False, N)
IDESC = instruction("f16", 128, N, "f16", "f16")
ALLOC = (
    "setp.eq.u32 %p6, %warp, 0;\n"
    f"add.u32 %r40, %smem, {BARRIER + 8};\n"
    "@%p6 tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r40], 32;\n"
)
FENCE = "fence.proxy.async.shared::cta;\n"
SYNC = f"bar.sync 0;\nld.shared.u32 %r41, [%smem+{BARRIER + 8}];\n"


def product(idesc: int = IDESC, a: int = 0, b: int = 0, **how: object) -> str:
    """A product into the columns that were allocated."""
    left, right = a or LEFT.encode(), b or RIGHT.encode()
    return mma("f16", idesc, str(left), right, **{"d": "%r41", **how})  # type: ignore[arg-type]


MMA = product()
REGISTERS = ", ".join(f"%d{i}" for i in range(N))
LOAD = (
    "shl.b32 %r42, %warp, 21;\nadd.u32 %r42, %r42, %r41;\n"
    f"tcgen05.ld.sync.aligned.32x32b.x{N}.b32 {{{REGISTERS}}}, [%r42];\n"
    "tcgen05.wait::ld.sync.aligned;\n"
)
STORE = "".join(f"st.global.u32 [%out+{4 * i}], %d{i};\n" for i in range(N))
FREE = "bar.sync 0;\n@%p6 tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r41, 32;\n"
BEFORE = FILL + SETUP + ALLOC + FENCE + SYNC
AFTER = LOAD + STORE + FREE


def kernel(body: str, **options: object) -> Result:
    settings: dict[str, object] = {"arch": "sm_100a", "threads": 128, "smem_bytes": SMEM + 64}
    settings |= {"words": N, "declarations": f".reg .b32 %d<{N}>;", **options}
    return run(body, image_of("f16", "f16"), **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("completion", ["eager", "late", "random"])
def test_a_right_kernel_is_clean(completion: str) -> None:
    got = kernel(BEFORE + MMA + commit() + WAIT + AFTER, completion=completion, seed=4)
    assert got.rules == []
    image = image_of("f16", "f16")
    want = matrix(image, "f16", LEFT, 128, False, 16) @ matrix(image, "f16", RIGHT, N, False, 16).T
    np.testing.assert_array_equal(got.out.view(np.float32), want)


OTHER_THREAD = commit().replace("%p1", "%p7")
BUGS = {
    "no commit": ("tensor-uncommitted", BEFORE + MMA + FREE),
    "read before the wait": (
        "tmem-read-before-completion",
        BEFORE + MMA + commit() + LOAD + WAIT + STORE + FREE,
    ),
    "another thread commits": (
        "tmem-read-before-completion",
        BEFORE + "setp.eq.u32 %p7, %tid, 32;\n" + MMA + "bar.sync 0;\n" + OTHER_THREAD + WAIT
        + AFTER,
    ),
    "no proxy fence": (
        "missing-proxy-fence",
        FILL + SETUP + ALLOC + SYNC + MMA + commit() + WAIT + AFTER,
    ),
    "no barrier": (
        "shared-race",
        SETUP + ALLOC + SYNC + FILL + FENCE + MMA + commit() + "bar.sync 0;\n" + WAIT + AFTER,
    ),
    "operand overwritten": (
        "overwrite-while-reading",
        BEFORE + MMA + "@%p1 st.shared.u32 [%smem], 0;\n" + commit() + WAIT + AFTER,
    ),
    "operand overwritten after the commit": (
        "overwrite-while-reading",
        BEFORE + MMA + commit() + "bar.sync 0;\n" + "st.shared.u32 [%smem], 0;\n" + WAIT + AFTER,
    ),
    "columns of nobody": (
        "tmem-unallocated",
        BEFORE + "add.u32 %r46, %r41, 8;" + product(d="%r46") + commit() + WAIT
        + AFTER,
    ),
    "a matrix outside": (
        "shared-out-of-bounds",
        BEFORE + product(b=RIGHT.encode() + 8000) + commit() + WAIT
        + AFTER,
    ),
    "groups mixed": (
        "tensor-cta-group",
        BEFORE + MMA + commit() + WAIT + LOAD + STORE + FREE + "@%p2 bra MIXED;\nret;\nMIXED:\n"
        + "tcgen05.relinquish_alloc_permit.cta_group::2.sync.aligned;\n",
    ),
    "a pair without a second CTA": (
        "tensor-cta-group",
        (BEFORE + product(group=2) + commit(2)
         + WAIT + AFTER).replace("cta_group::1", "cta_group::2"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("completion", ["eager", "late"])
@pytest.mark.parametrize("bug", BUGS)
def test_bugs_are_reported(bug: str, completion: str) -> None:
    rule, body = BUGS[bug]
    got = kernel(body, completion=completion)
    if bug == "operand overwritten after the commit" and completion == "eager":
        rule = "shared-race"  # it has been read, and nobody has waited for that
    assert rule in got.rules
    if bug == "read before the wait" and completion == "late":
        assert set(got.out.reshape(-1)) == {0x7FC0DEAD}


def test_a_deadlock_names_what_no_commit_tracks() -> None:
    got = kernel(BEFORE + MMA + WAIT + AFTER)
    assert got.rules[0] == "deadlock"
    line = got.line("tcgen05.mma")
    assert f"no commit tracks [{line}]" in got.launch.hazards[0].message


def mutated(**fields: object) -> int:
    return SharedDescriptor(**{**LEFT.__dict__, **fields}).encode()


DESCRIPTORS = {
    "M = 96": (instruction("f16", 96, N, "f16", "f16"), LEFT.encode(), "M = 96"),
    "N = 260": (IDESC | 63 << 17, LEFT.encode(), "N = 504"),
    "types": (IDESC | 7 << 7, LEFT.encode(), "undefined element types"),
    "bf16 into f16": (
        instruction("f16", 128, N, "bf16", "bf16", "f16"), LEFT.encode(), "f16 accumulators",
    ),
    "saturated floats": (IDESC | 1 << 3, LEFT.encode(), "saturation"),
    "swizzle 3": (IDESC, LEFT.encode() | 3 << 61, "swizzling mode"),
    "no version": (IDESC, mutated(constants=(0, 0)), "must be 0b001"),
    "bits 53-60": (IDESC, mutated(constants=(1, 4)), "bits 53-60"),
    "absolute": (IDESC, mutated(absolute=True), "absolute leading address"),
    "atoms of 32 bytes": (
        IDESC | 1 << 15, mutated(atom=32), "transposed operand of 16-bit elements",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", DESCRIPTORS)
def test_bad_descriptors_are_reported(case: str) -> None:
    idesc, a, text = DESCRIPTORS[case]
    got = kernel(BEFORE + product(idesc, a) + commit() + WAIT + FREE)
    assert got.rules == ["tensor-descriptor"]
    assert text in got.launch.hazards[0].message


def test_reserved_bits_are_reported_and_change_nothing() -> None:
    results = [
        kernel(BEFORE + product(idesc) + commit() + WAIT + AFTER)
        for idesc in (IDESC, IDESC | 1 << 29)
    ]
    assert [result.rules for result in results] == [[], ["tensor-reserved-bits"]]
    assert results[1].launch.hazards[0].severity == "warning"
    np.testing.assert_array_equal(results[0].out, results[1].out)


def test_an_accumulator_at_a_lane_that_its_layout_does_not_begin_at() -> None:
    body = "add.u32 %r46, %r41, 1048576;" + product(d="%r46")
    got = kernel(BEFORE + body + commit() + WAIT + FREE)
    assert got.rules == ["tensor-descriptor"]


def test_scale_factors_that_differ_between_partitions() -> None:
    idesc = instruction("mxf8f6f4", 128, 32, "e4m3", "e4m3")
    body = BEFORE.replace("[%r40], 32", "[%r40], 64")
    body += (
        "shl.b32 %r42, %warp, 21;\nadd.u32 %r42, %r42, %r41;\nadd.u32 %r42, %r42, 32;\n"
        "add.u32 %r43, %warp, 0x7f7f7f7f;\n"
        f"tcgen05.st.sync.aligned.32x32b.x8.b32 [%r42], {{{', '.join(['%r43'] * 8)}}};\n"
        "tcgen05.wait::st.sync.aligned;\ntcgen05.fence::before_thread_sync;\nbar.sync 0;\n"
        "tcgen05.fence::after_thread_sync;\nadd.u32 %r44, %r41, 32;\nadd.u32 %r45, %r41, 36;\n"
    )
    form = "mxf8f6f4.block_scale.block32"
    body += mma(form, idesc, str(LEFT.encode()), RIGHT.encode(), d="%r41", more="[%r44], [%r45], ")
    body += commit() + WAIT + FREE.replace("%r41, 32", "%r41, 64")
    assert kernel(body).rules == ["tensor-scale-factors"]


def test_descriptors_survive_a_round_trip() -> None:
    desc = SharedDescriptor(1024 + 512, 256, 2048, 3, 128, 32)
    assert SharedDescriptor.decode(desc.encode()) == desc
