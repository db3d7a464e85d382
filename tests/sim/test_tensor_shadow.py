"""Order of accesses to tensor memory: one small program for every way to get it wrong."""

from __future__ import annotations

import numpy as np
import pytest

from cute_fa.sim import hazards
from cute_fa.sim.tensor_stamps import RULES
from cute_fa.sim.umma_descriptors import SharedDescriptor
from tests.sim.tiny import Result, run
from tests.sim.tmem_programs import alloc, dealloc

POLICIES = pytest.mark.parametrize("completion", ["eager", "late", "random"])
BAR, OTHER_BAR, SECOND_BAR = 3072, 3080, 3088
WIDE = SharedDescriptor(1024 + 4096, 2048, 128).encode()
DESCRIPTOR = SharedDescriptor(1024, 4096, 128).encode()  # shared memory begins at 1024

START = f"""
setp.eq.u32 %p1, %tid, 0;
@%p1 mbarrier.init.shared.b64 [%smem+{BAR}], 1;
@%p1 mbarrier.init.shared.b64 [%smem+{OTHER_BAR}], 128;
@%p1 mbarrier.init.shared.b64 [%smem+{SECOND_BAR}], 1;
@%p1 fence.mbarrier_init.release.cluster;
setp.eq.u32 %p7, %tid, 128;
mov.u32 %r40, 1;
"""
FILL_SHARED = """
shl.b32 %r41, %tid, 3; add.u32 %r41, %r41, %smem;
st.shared.v2.u32 [%r41], {%tid, %tid};
shl.b32 %r41, %tid, 4; add.u32 %r41, %r41, %smem;
st.shared.v4.u32 [%r41+4096], {%tid, %tid, %tid, %tid};
fence.proxy.async.shared::cta;
"""

ST = "tcgen05.st.sync.aligned.32x32b.x1.b32 [%own], {%r40};\n"
LD = "tcgen05.ld.sync.aligned.32x32b.x1.b32 {%r42}, [%own];\n"
USE = "add.u32 %r43, %r42, 1;\n"
WAIT_ST = "tcgen05.wait::st.sync.aligned;\n"
WAIT_LD = "tcgen05.wait::ld.sync.aligned;\n"
AFTER = "tcgen05.fence::after_thread_sync;\n"
SYNC = "bar.sync 1;\n"
CP = f"mov.u64 %rd20, {DESCRIPTOR};\n@%p1 tcgen05.cp.cta_group::1.128x128b [%taddr], %rd20;\n"
WIDE_CP = f"mov.u64 %rd20, {WIDE};\n@%p1 tcgen05.cp.cta_group::1.128x256b [%taddr], %rd20;\n"
SHIFT = "@%p1 tcgen05.shift.cta_group::1.down [%taddr];\n"
COMMIT = (
    f"add.u32 %r44, %smem, {BAR};\n"
    "@%p1 tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%r44];\n"
)
AGAIN = (CP + COMMIT).replace("%p1", "%p7").replace(str(BAR), str(SECOND_BAR))
"""The same by the first thread of warp 4, for a barrier of its own."""


def wait_on(offset: int = BAR, form: str = "", label: str = "W") -> str:
    return (
        f"{label}: mbarrier.try_wait.parity{form}.shared::cta.b64 %p4, [%smem+{offset}], 0;\n"
        f"@!%p4 bra {label};\n"
    )


def arrive(form: str = "") -> str:
    return f"mbarrier.arrive{form}.shared::cta.b64 _, [%smem+{OTHER_BAR}];\n"


def program(
    first: str, between: str = SYNC, second: str = "", before: str = ST + WAIT_ST, **options: object
) -> Result:
    """Warps 0 to 3 do ``first``, everybody ``between``, warps 4 to 7 ``second``.

    Both warpgroups reach the same lanes. ``before`` is done by warps 0 to 3 ahead of a barrier.
    """
    body = START + FILL_SHARED + alloc() + "setp.lt.u32 %p2, %warp, 4;\n"
    body += f"@!%p2 bra READY;\n{before}READY:\nbar.sync 0;\n"
    body += f"@!%p2 bra MIDDLE;\n{first}MIDDLE:\n{between}@%p2 bra LAST;\n{second}LAST:\n"
    settings: dict[str, object] = {"threads": 256, "arch": "sm_100a", "smem_bytes": 8192, **options}
    return run(body + dealloc(), **settings)  # type: ignore[arg-type]


CLEAN = {
    "a store is waited for, and the barrier orders it": (ST + WAIT_ST, SYNC, LD + USE + WAIT_LD),
    "a load is waited for before the cells are written": (LD + WAIT_LD, SYNC, ST + WAIT_ST),
    "a store and a load of one warp": (ST + WAIT_ST + LD + WAIT_LD + ST + WAIT_ST, SYNC, ""),
    "a copy is committed and waited for": (CP + COMMIT, wait_on(), LD + WAIT_LD),
    "a copy, and what is stored over it": (CP + COMMIT, wait_on(), ST + WAIT_ST),
    "a copy after a load": (LD + WAIT_LD + "bar.sync 2, 128;\n" + CP + COMMIT, wait_on(), ""),
    "copies follow one another": (CP + CP + COMMIT, wait_on(), LD + WAIT_LD),
    "a shift follows a copy": (WIDE_CP + SHIFT + COMMIT, wait_on(), LD + WAIT_LD),
    "an mbarrier orders a store": (
        ST + WAIT_ST + arrive(),
        "",
        wait_on(OTHER_BAR) + LD + WAIT_LD,
    ),
    "fences order what relaxed operations synchronise": (
        ST + WAIT_ST + "tcgen05.fence::before_thread_sync;\n" + arrive(".relaxed.cluster"),
        "",
        wait_on(OTHER_BAR, ".relaxed.cluster")
        + "tcgen05.fence::after_thread_sync;\n"
        + LD
        + WAIT_LD,
    ),
    "copies of two warps in order": (
        CP + COMMIT,
        SYNC,
        AGAIN + wait_on() + wait_on(SECOND_BAR, label="V") + LD + WAIT_LD,
    ),
    "a relaxed wait for a commit, then the fence": (
        CP + COMMIT,
        "",
        wait_on(BAR, ".relaxed.cluster") + AFTER + LD + WAIT_LD,
    ),
}
"""(first, between, second) of programs with nothing wrong."""


@POLICIES
@pytest.mark.parametrize("name", CLEAN)
def test_programs_in_order(name: str, completion: str) -> None:
    for seed in range(3 if completion == "random" else 1):
        got = program(*CLEAN[name], completion=completion, seed=seed)
        assert got.rules == [], str(got.launch.hazards[0])


WRONG = {
    "load before wait::st in the same warp": ("tmem-unwaited-store", ST + LD + USE, SYNC, ""),
    "store twice without a wait": ("tmem-unwaited-store", ST + ST + WAIT_ST, SYNC, ""),
    "no wait::st before the barrier": ("tmem-unwaited-store", ST, SYNC, LD + WAIT_LD),
    "wait::st behind the arrival": (
        "tmem-race",
        ST + arrive() + WAIT_ST,
        "",
        wait_on(OTHER_BAR) + LD + WAIT_LD,
    ),
    "no barrier between store and load": ("tmem-race", ST + WAIT_ST, "", LD + WAIT_LD),
    "no barrier between load and store": ("tmem-race", LD + WAIT_LD, "", ST + WAIT_ST),
    "stores of two warps": ("tmem-race", ST + WAIT_ST, "", ST + WAIT_ST),
    "no wait::ld, and the register is not used": (
        "tmem-unwaited-load",
        LD,
        SYNC,
        ST + WAIT_ST,
    ),
    "the register is used after the barrier only": (
        "tmem-unwaited-load",
        LD + SYNC + USE + "bar.sync 4, 128;\n",
        "",
        SYNC + ST + WAIT_ST,
    ),
    "load before the copy is waited for": (
        "tmem-read-before-completion",
        CP + COMMIT,
        SYNC,
        LD + WAIT_LD + wait_on(),
    ),
    "load without a commit": (
        "tmem-read-before-completion",
        CP,
        SYNC,
        LD + WAIT_LD,
    ),
    "store before the copy is waited for": (
        "tmem-write-before-completion",
        CP + COMMIT,
        SYNC,
        ST + WAIT_ST + wait_on(),
    ),
    "copy over cells that another warp loads": (
        "tmem-race",
        LD + WAIT_LD + CP + COMMIT,
        wait_on(),
        "",
    ),
    "copy over cells of a load that nobody waited for": (
        "tmem-unwaited-load",
        LD + "bar.sync 2, 128;\n" + CP + COMMIT,
        wait_on(),
        "",
    ),
    "shift of cells that have not been waited for": (
        "tmem-unwaited-store",
        "tcgen05.st.sync.aligned.32x32b.x8.b32 [%own], "
        "{%r40, %r40, %r40, %r40, %r40, %r40, %r40, %r40};\n"
        "bar.sync 2, 128;\n" + SHIFT + COMMIT,
        wait_on(),
        "",
    ),
    "two warps issue copies in no order": (
        "tmem-race",
        CP + COMMIT,
        "",
        AGAIN + wait_on(),
    ),
    "relaxed arrival without the fence before it": (
        "missing-tcgen05-fence",
        ST + WAIT_ST + arrive(".relaxed.cluster"),
        "",
        wait_on(OTHER_BAR) + LD + WAIT_LD,
    ),
    "relaxed wait without the fence behind it": (
        "missing-tcgen05-fence",
        ST + WAIT_ST + arrive(),
        "",
        wait_on(OTHER_BAR, ".relaxed.cluster") + LD + WAIT_LD,
    ),
    "relaxed wait for a commit without the fence behind it": (
        "missing-tcgen05-fence",
        CP + COMMIT,
        "",
        wait_on(BAR, ".relaxed.cluster") + LD + WAIT_LD,
    ),
}
"""rule, first, between, second."""


@pytest.mark.parametrize("name", WRONG)
def test_programs_out_of_order(name: str) -> None:
    rule, first, between, second = WRONG[name]
    for completion in ("eager", "late"):
        got = program(first, between, second, completion=completion)
        assert rule in got.rules, f"{completion}: {got.rules}"


def test_warps_store_to_the_same_cells_in_one_instruction() -> None:
    body = alloc() + ST + WAIT_ST
    got = run("mov.u32 %r40, 1;\n" + body + dealloc(), threads=256, arch="sm_100a")
    assert set(got.rules) <= {"tmem-unwaited-store", "tmem-race"}
    assert got.rules
    assert got.launch.hazards[0].warp == 4


def test_load_whose_registers_were_used() -> None:
    """The load is over; the ISA wants the wait all the same: a warning, once for the pair."""
    got = program(LD + USE, SYNC, ST + WAIT_ST)
    assert got.rules == ["tmem-load-order"]
    hazard = got.launch.hazards[0]
    assert hazard.severity == "warning"
    assert isinstance(hazard.other, hazards.AccessSite)
    assert hazard.other.ptx_line == got.line("tcgen05.ld")
    assert program(LD + USE + COPY_OVER, wait_on()).rules == ["tmem-load-order"]


COPY_OVER = "bar.sync 2, 128;\n" + CP + COMMIT


def test_used_load_without_a_barrier() -> None:
    assert "tmem-race" in program(LD + USE, "", ST + WAIT_ST).rules


def test_report_names_both_sides() -> None:
    got = program(ST + WAIT_ST, "", LD + WAIT_LD)
    hazard = next(h for h in got.launch.hazards if h.rule == "tmem-race")
    assert hazard.ptx_line == got.line("tcgen05.ld")
    assert isinstance(hazard.other, hazards.AccessSite)
    assert hazard.other.ptx_line == got.line("tcgen05.st", 1)
    assert (hazard.warp, hazard.other.warp) == (4, 0)
    assert hazard.address == 0


def test_cells_that_nobody_wrote() -> None:
    got = program(LD + WAIT_LD, before="")
    assert got.rules == ["uninitialised-tmem-read"]
    assert got.launch.hazards[0].severity == "warning"
    shifted = program(SHIFT + COMMIT, wait_on())  # one column of eight was written
    assert shifted.rules == ["uninitialised-tmem-read"]


def test_freed_columns_are_unwritten_again() -> None:
    again = "bar.sync 2, 128;\n@%others bra MORE;\n"
    again += "tcgen05.dealloc.cta_group::1.sync.aligned.b32 %taddr, 64;\n"
    again += "tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%slot], 64;\n"
    got = program(again + "MORE:\nbar.sync 2, 128;\n" + LD + WAIT_LD)
    assert got.rules == ["uninitialised-tmem-read"]


def test_columns_freed_under_a_store() -> None:
    """Warp 0 gives the columns back; nothing orders the stores of warps 4 to 7 before that."""
    body = "mov.u32 %r40, 1;\n" + alloc() + "setp.lt.u32 %p2, %warp, 4;\n@%p2 bra FREE;\n"
    body += ST + WAIT_ST + "bra END;\nFREE:\n@%others bra END;\n"
    body += "tcgen05.dealloc.cta_group::1.sync.aligned.b32 %taddr, 64;\nEND:\n"
    rules = set()
    for seed in range(6):
        rules |= set(run(body, threads=256, arch="sm_100a", completion="random", seed=seed).rules)
    assert "tmem-race" in rules or "tmem-unwaited-store" in rules


def test_a_copy_on_its_way_is_loaded_as_poison() -> None:
    late = program(CP + LD + "st.global.u32 [%out], %r42;\n" + COMMIT, wait_on(), completion="late")
    assert late.out[0, 0] == 0x7FC0DEAD
    done = program(CP + COMMIT, wait_on(), LD + "st.global.u32 [%out], %r42;\n", completion="late")
    assert done.rules == []
    assert done.out[128, 0] == 0  # thread 0's word


def test_rules_can_be_switched_off() -> None:
    wrong = ST + LD + USE + WAIT_ST  # an unwaited store, and nothing else
    assert program(wrong, checks=frozenset()).rules == []
    assert program(wrong, checks=False).rules == []
    assert program(wrong, checks=frozenset(["tmem-race"])).rules == []
    only = frozenset(["tmem-unwaited-store"])
    assert program(wrong, checks=only).rules == ["tmem-unwaited-store"]
    assert all(hazards.RULES[rule].optional for rule in RULES)


def test_a_pair_is_ordered_by_its_cluster_barrier() -> None:
    """One CTA copies into both; the peer's warps load behind the commit and a cluster barrier."""
    fill = START + FILL_SHARED + alloc(group=2) + "setp.lt.u32 %p2, %warp, 4;\n"
    fill += "mov.u32 %r30, %cluster_ctarank; setp.eq.and.u32 %p1, %r30, 0, %p1;\n"
    cluster = "barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;\n"
    copy = (CP + COMMIT).replace("cta_group::1", "cta_group::2")
    wait = "setp.eq.u32 %p5, %r30, 0;\n@!%p5 bra MEET;\n" + wait_on() + "MEET:\n"
    load = "@!%p2 bra LAST;\n" + LD + WAIT_LD + "LAST:\n"
    settings = {"threads": 256, "arch": "sm_100a", "smem_bytes": 8192, "ctas": 2, "cluster": 2}
    for completion in ("eager", "late"):
        for name, middle, expected in (
            ("ordered", wait + cluster, []),
            ("too early", cluster + wait, ["tmem-read-before-completion"]),
        ):
            body = fill + cluster + copy + middle + load + cluster + dealloc(group=2)
            got = run(body, completion=completion, **settings)  # type: ignore[arg-type]
            assert got.rules == expected, name


BEFORE = "tcgen05.fence::before_thread_sync;\n"
FENCED = {
    "store and load": (ST + WAIT_ST + BEFORE, SYNC, AFTER + LD + WAIT_LD),
    "load and store": (LD + WAIT_LD + BEFORE, SYNC, AFTER + ST + WAIT_ST),
    "store and copy": (
        ST + WAIT_ST + BEFORE + "bar.sync 2, 128;\n" + AFTER + CP + COMMIT,
        wait_on(),
        "",
    ),
    "copy and load, the commit being a fence": (CP + COMMIT, wait_on(), AFTER + LD + WAIT_LD),
    "a barrier that others pass on": (
        ST + WAIT_ST + BEFORE + arrive(),
        "",
        wait_on(OTHER_BAR) + "bar.sync 3, 128;\n" + AFTER + LD + WAIT_LD,
    ),
}
"""(first, between, second): by the strict rule every fence of these is needed."""


@pytest.mark.parametrize("name", FENCED)
def test_strict_fences(name: str) -> None:
    """By the strict rule release and acquire are not enough; usually they are."""
    every = frozenset(hazards.RULES)
    before = ST + WAIT_ST + BEFORE
    first, between, second = FENCED[name]
    assert program(AFTER + first, between, second, before=before, checks=every).rules == []
    for number, part in enumerate((first, second)):
        for fence in (BEFORE, AFTER):
            if fence not in part:
                continue
            less = [first, second]
            less[number] = part.replace(fence, "")
            text = AFTER + less[0], between, less[1]
            wrong = program(*text, before=before, checks=every)
            assert set(wrong.rules) == {"unfenced-tcgen05"}
            assert wrong.launch.hazards[0].severity == "warning"
            assert program(*text, before=before).rules == []


@pytest.mark.parametrize("arrival", ["", ".relaxed.cluster"])
@pytest.mark.parametrize("wait", ["", ".relaxed.cluster"])
def test_strict_fences_around_relaxed_operations(arrival: str, wait: str) -> None:
    """Fences on both sides are what the strict rule asks for, whatever lies between them."""
    every = frozenset(hazards.RULES)
    first = AFTER + ST + WAIT_ST + BEFORE + arrive(arrival)
    second = wait_on(OTHER_BAR, wait) + AFTER + LD + WAIT_LD
    before = ST + WAIT_ST + BEFORE
    assert program(first, "", second, before=before, checks=every).rules == []
    for text in (
        (first.replace(BEFORE, ""), second),
        (first, second.replace(AFTER, "")),
    ):
        found = program(text[0], "", text[1], before=before, checks=every).rules
        assert found and set(found) <= {"unfenced-tcgen05", *RULES}


def test_many_events() -> None:
    """The clocks forget their past in between; nothing is reported that is not wrong."""
    from unittest.mock import patch

    loop = "mov.u32 %r50, 0;\nLOOP:\n" + ST + WAIT_ST + LD + WAIT_LD
    loop += "add.u32 %r50, %r50, 1; setp.lt.u32 %p6, %r50, 40;\n@%p6 bra LOOP;\n"
    with patch("cute_fa.sim.race.MOST_EVENTS", 50):
        assert program(loop, SYNC, LD + WAIT_LD).rules == []


def test_every_rule_has_a_program() -> None:
    named = {rule for rule, *_ in WRONG.values()}
    named |= {"uninitialised-tmem-read", "tmem-load-order", "unfenced-tcgen05"}
    assert named == set(RULES)


def test_lanes_of_a_half_are_apart() -> None:
    """Two warps that access different halves of the same quarter's lanes do not meet."""
    lower = "tcgen05.st.sync.aligned.16x64b.x1.b32 [%own], {%r40};\n"
    upper = lower.replace("[%own]", f"[%own+{16 << 16}]")
    assert program(lower + WAIT_ST, "", upper + WAIT_ST).rules == []
    assert "tmem-race" in program(lower + WAIT_ST, "", lower + WAIT_ST).rules
    np.testing.assert_array_equal(program(lower + WAIT_ST, "", "").rules, [])
