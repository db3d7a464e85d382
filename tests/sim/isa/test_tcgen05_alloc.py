"""tcgen05.alloc, dealloc and relinquish_alloc_permit (PTX ISA 9.7.16.7.1)."""

from __future__ import annotations

import numpy as np
import pytest

from cute_fa.sim.hazards import HazardError
from tests.sim.tiny import Result, run
from tests.sim.tmem_programs import SLOT, alloc, dealloc

POLICIES = pytest.mark.parametrize("completion", ["eager", "late", "random"])


def program(body: str, **options: object) -> Result:
    settings: dict[str, object] = {"threads": 64, "arch": "sm_100a", **options}
    return run(body, **settings)  # type: ignore[arg-type]


def make(columns: int | str, at: int = SLOT, group: int = 1) -> str:
    """The executing warps allocate."""
    return (
        f"add.u32 %r30, %smem, {at};\n"
        f"tcgen05.alloc.cta_group::{group}.sync.aligned.shared::cta.b32 [%r30], {columns};\n"
    )


def free(address: str, columns: int, group: int = 1) -> str:
    return f"tcgen05.dealloc.cta_group::{group}.sync.aligned.b32 {address}, {columns};\n"


ONE_WARP = "setp.ne.u32 %p1, %warp, 0;\n@%p1 bra END;\n"


@pytest.mark.parametrize("columns", [32, 64, 128, 256, 512])
def test_addresses_of_one_cta_after_another(columns: int) -> None:
    got = program(alloc(columns) + "st.global.u32 [%out], %taddr;\n" + dealloc(columns), ctas=3)
    assert got.rules == []
    assert (got.out == 0).all()


def test_allocations_follow_one_another() -> None:
    body = ONE_WARP + make(128) + make(64, SLOT + 4) + make(32, SLOT + 8)
    body += "".join(f"ld.shared.u32 %r{10 + i}, [%smem+{SLOT + 4 * i}];\n" for i in range(3))
    body += free("%r11", 64) + make(64, SLOT + 12) + f"ld.shared.u32 %r13, [%smem+{SLOT + 12}];\n"
    body += "st.global.v4.u32 [%out], {%r10, %r11, %r12, %r13};\n"
    body += free("%r13", 64) + free("%r12", 32) + free("%r10", 128) + "END:\n"
    got = program(body, words=4)
    # 128 columns at 0; 64 and 32 behind them; the freed 64 are handed out again
    np.testing.assert_array_equal(got.out[0], [0, 128, 192, 128])
    assert got.rules == ["tmem-allocation-order"]  # 64 columns after 32
    assert got.launch.hazards[0].severity == "warning"


def test_the_random_policy_puts_columns_anywhere() -> None:
    body = alloc(64) + "st.global.u32 [%out], %taddr;\n" + dealloc(64)
    got = program(body, ctas=8, completion="random", seed=3)
    assert got.rules == []
    places = set(got.out[::64, 0].tolist())
    assert len(places) > 2
    assert all(place % 64 == 0 and place <= 448 for place in places)


@POLICIES
def test_waits_until_columns_are_free(completion: str) -> None:
    """Both warps want all columns; the second has them when the first gives them back."""
    body = "mul.lo.u32 %r9, %warp, 4; add.u32 %r31, %smem, %r9;\n"
    body += f"add.u32 %r30, %r31, {SLOT};\n"
    body += "tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r30], 512;\n"
    body += "ld.shared.u32 %r10, [%r30];\n"
    body += "mov.u32 %r11, %tid;\n"
    body += "and.b32 %r12, %warp, 3; shl.b32 %r12, %r12, 21; add.u32 %r12, %r12, %r10;\n"
    body += "tcgen05.st.sync.aligned.32x32b.x1.b32 [%r12], {%r11};\n"
    body += "tcgen05.wait::st.sync.aligned;\n"
    body += "tcgen05.ld.sync.aligned.32x32b.x1.b32 {%r13}, [%r12];\n"
    body += "tcgen05.wait::ld.sync.aligned;\n"
    body += "st.global.u32 [%out], %r13;\n" + free("%r10", 512)
    got = program(body, completion=completion, ctas=2)
    assert got.rules == []
    np.testing.assert_array_equal(got.out[:, 0], np.tile(np.arange(64), 2))


def test_nobody_gives_columns_back() -> None:
    """Two warps, 256 + 512 columns: the second waits for ever."""
    body = "setp.eq.u32 %p1, %warp, 0;\n"
    body += "mov.u32 %r9, 512;\n@%p1 mov.u32 %r9, 512;\n" + make("%r9") + "bar.sync 0;\n"
    got = program(body)
    assert "deadlock" in got.rules
    report = next(h.message for h in got.launch.hazards if h.rule == "deadlock")
    assert "waits for 512 columns of tensor memory" in report
    assert "512 of 512 are in use" in report


@pytest.mark.parametrize("columns", [0, 16, 48, 96, 1024])
def test_column_counts_that_are_not_allowed(columns: int) -> None:
    got = program(ONE_WARP + make(columns) + "END:\n")
    assert got.rules == ["tmem-allocation"]
    assert f"{columns} columns" in got.launch.hazards[0].message


def test_allocation_after_giving_up_the_right() -> None:
    body = ONE_WARP + "tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned;\n"
    body += make(32) + f"ld.shared.u32 %r10, [%smem+{SLOT}];\n" + free("%r10", 32) + "END:\n"
    got = program(body)
    assert got.rules == ["tmem-allocation"]
    other = got.launch.hazards[0].other
    assert other is not None
    assert "relinquish" in str(other)


def test_columns_that_are_never_given_back() -> None:
    got = program(ONE_WARP + make(64) + "END:\n", ctas=2)
    assert got.rules == ["tmem-leak"]
    hazard = got.launch.hazards[0]
    assert hazard.count == 2
    assert hazard.ptx_line == got.line("tcgen05.alloc")
    with pytest.raises(HazardError, match="tmem-leak"):
        program(ONE_WARP + make(64) + "END:\n", strict=True)


@pytest.mark.parametrize(
    ("address", "columns", "message"),
    [
        ("32", 64, "no allocation begins at address 0x20"),
        ("0", 32, "32 columns of an allocation of 64"),
        (str(1 << 21), 64, "no allocation begins"),
    ],
)
def test_deallocating_something_else(address: str, columns: int, message: str) -> None:
    got = program(ONE_WARP + make(64) + free(address, columns) + "END:\n")
    assert got.rules == ["tmem-allocation", "tmem-leak"]
    assert message in got.launch.hazards[0].message


def test_deallocating_twice() -> None:
    got = program(ONE_WARP + make(64) + free("0", 64) + free("0", 64) + "END:\n")
    assert got.rules == ["tmem-allocation"]


def test_another_warp_may_deallocate() -> None:
    body = alloc(64) + "bar.sync 0;\nsetp.eq.u32 %p1, %warp, 0;\n@%p1 bra END;\n"
    assert program(body + free("%taddr", 64) + "END:\n").rules == []


def test_lanes_disagree_about_the_count() -> None:
    body = ONE_WARP + "mov.u32 %r9, 32; setp.eq.u32 %p2, %lane, 3;\n@%p2 mov.u32 %r9, 64;\n"
    got = program(body + make("%r9") + free("0", 32) + "END:\n")
    assert got.rules == ["tmem-operands"]


def test_allocation_by_part_of_a_warp() -> None:
    body = "setp.ne.u32 %p1, %tid, 0;\n@%p1 bra END;\n" + make(32) + free("0", 32) + "END:\n"
    assert "divergent-collective" in program(body, threads=32).rules


def test_cta_groups_are_mixed() -> None:
    body = ONE_WARP + make(32) + free("0", 32)
    body += "tcgen05.relinquish_alloc_permit.cta_group::2.sync.aligned;\nEND:\n"
    assert "tensor-cta-group" in program(body).rules


def test_the_written_address_is_an_ordinary_write() -> None:
    """Nothing orders the store of the address before another warp's load of it."""
    body = ONE_WARP.replace("END", "OTHER") + make(32) + free("0", 32) + "bra END;\nOTHER:\n"
    body += f"ld.shared.u32 %r10, [%smem+{SLOT}];\nEND:\n"
    got = program(body)
    assert set(got.rules) & {"shared-race", "uninitialised-shared-read"}


PAIR = {"ctas": 4, "cluster": 2}


@POLICIES
def test_a_pair_allocates_together(completion: str) -> None:
    """One warp of each CTA; both get the same columns."""
    body = alloc(128, group=2) + "st.global.u32 [%out], %taddr;\n"
    body += "barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;\n"
    got = program(body + dealloc(128, group=2), completion=completion, **PAIR)
    assert got.rules == []
    by_cta = got.out.reshape(4, 64)
    assert (by_cta == by_cta[:, :1]).all()
    np.testing.assert_array_equal(by_cta[0::2, 0], by_cta[1::2, 0])


def test_half_a_pair_waits_for_the_other() -> None:
    body = "mov.u32 %r20, %cluster_ctarank; setp.ne.u32 %p2, %r20, 0;\n@%p2 bra END;\n"
    got = program(body + ONE_WARP + make(32, group=2) + "END:\n", **PAIR)
    assert "deadlock" in got.rules


def test_a_pair_disagrees() -> None:
    body = "mov.u32 %r20, %cluster_ctarank; shl.b32 %r21, 32, %r20;\n" + ONE_WARP
    body += make("%r21", group=2) + "END:\n"
    got = program(body, **PAIR)
    assert "tmem-allocation" in got.rules
    assert "ask for 64 and 32 columns" in got.launch.hazards[0].message


def test_a_pair_in_a_cluster_of_one() -> None:
    got = program(ONE_WARP + make(32, group=2) + free("0", 32, 2) + "END:\n")
    assert "tmem-allocation" in got.rules


ORDER = "barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;\n"


@POLICIES
def test_pairs_may_block_until_both_deallocate(completion: str) -> None:
    """Table 48: one CTA synchronises before dealloc, the other after; it hangs if that blocks."""
    body = alloc(32, group=2) + "mov.u32 %r20, %cluster_ctarank; setp.eq.u32 %p2, %r20, 0;\n"
    body += "@%p2 bra FIRST;\n@%others bra MEET;\n" + free("%taddr", 32, 2) + "MEET:\n"
    body += ORDER + "bra END;\n"
    body += "FIRST:\n" + ORDER + "@%others bra END;\n" + free("%taddr", 32, 2) + "END:\n"
    hangs = []
    for seed in range(4):
        got = program(body, completion=completion, seed=seed, **PAIR)
        hangs.append("deadlock" in got.rules)
    if completion == "eager":
        assert not any(hangs)
    elif completion == "late":
        assert all(hangs)
    else:
        assert any(hangs)
