"""Hazards: what a simulated program did that the PTX memory and execution model leaves undefined.

A hazard is found by a rule. ``RULES`` lists every rule with its severity and one sentence on what
it means; ``SimOptions.checks`` takes their names. Hazards of the same rule at the same pair of PTX
lines are one hazard with a count.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from cute_fa.errors import CuteFAError, InvalidArgumentError

if TYPE_CHECKING:
    from cute_fa.ptx import Instr
    from cute_fa.sim.execute import Launch
    from cute_fa.sim.wave import BlockContext, Wave

ERROR = "error"
WARNING = "warning"


@dataclass(frozen=True)
class Rule:
    """One kind of hazard.

    ``optional`` rules need bookkeeping beside the access and can be switched off; the others are
    found by looking an address or a barrier up, which the simulator cannot do without. ``strict``
    ones are off unless they are named: sound programs break them.
    """

    name: str
    severity: str
    meaning: str
    optional: bool = False
    strict: bool = False


_RULES = (
    Rule("deadlock", ERROR, "no thread can run on, and some wait"),
    Rule("livelock", ERROR, "threads run for ever without getting anywhere"),
    Rule("trap", ERROR, "the program stopped itself"),
    Rule(
        "divergent-collective",
        ERROR,
        "a .sync or .aligned instruction was executed by part of the threads that must take part",
    ),
    Rule("global-out-of-bounds", ERROR, "an access outside every known global allocation"),
    Rule("global-misaligned", ERROR, "a global address that is not a multiple of the access size"),
    Rule("global-read-only-write", ERROR, "a write to memory that was given as read-only"),
    Rule(
        "uninitialised-global-read",
        ERROR,
        "a read of global bytes that nobody has written",
        optional=True,
    ),
    Rule("shared-out-of-bounds", ERROR, "an access outside the shared memory of the CTA"),
    Rule("shared-misaligned", ERROR, "a shared address that is not a multiple of the access size"),
    Rule("shared-bad-rank", ERROR, "a shared::cluster address names a CTA that does not exist"),
    Rule("local-out-of-bounds", ERROR, "an access outside the thread's local memory"),
    Rule("local-misaligned", ERROR, "a local address that is not a multiple of the access size"),
    Rule("param-out-of-bounds", ERROR, "a read outside the kernel's parameters"),
    Rule("param-write", ERROR, "a write to the kernel's parameters"),
    Rule(
        "uninitialised-shared-read",
        # Legal: the value is indeterminate, and a program may throw it away (ragged row tiles do).
        WARNING,
        "a read of shared memory that nobody has written",
        optional=True,
    ),
    Rule(
        "uninitialised-local-read",
        ERROR,
        "a read of local memory that the thread has not written",
        optional=True,
    ),
    Rule(
        "shared-race",
        ERROR,
        "two warps access the same shared bytes, at least one writes, and nothing orders them",
        optional=True,
    ),
    Rule(
        "read-before-arrival",
        ERROR,
        "a read of shared memory that an asynchronous copy is still filling",
        optional=True,
    ),
    Rule(
        "write-while-copy-in-flight",
        ERROR,
        "a write to shared memory that an asynchronous copy is still filling",
        optional=True,
    ),
    Rule("copy-size", ERROR, "the source size of a cp.async exceeds its copy size"),
    Rule("barrier-id", ERROR, "a barrier number outside 0 to 15"),
    Rule("barrier-count", ERROR, "a barrier thread count that the CTA cannot reach or is not ×32"),
    Rule("barrier-count-mismatch", ERROR, "two thread counts for one use of a barrier"),
    Rule("barrier-kind-mismatch", ERROR, "reductions and plain arrivals mixed on one barrier"),
    Rule(
        "missing-proxy-fence",
        ERROR,
        "shared memory written by threads is accessed by the async proxy without a proxy fence",
        optional=True,
    ),
    Rule(
        "missing-tensormap-fence",
        ERROR,
        "a tensor map that the kernel has changed is used without its proxy fences in between",
        optional=True,
    ),
    Rule(
        "unfenced-async-overwrite",
        # The mbarrier that hands the bytes back orders the two for all that is known of hardware,
        # and the usual pipelines of TMA and ldmatrix have no fence there.
        WARNING,
        "shared memory read by threads is overwritten by the async proxy without a proxy fence",
        optional=True,
        strict=True,
    ),
    Rule(
        "overwrite-while-reading",
        ERROR,
        "a write to shared memory that a bulk copy or a wgmma is still reading",
        optional=True,
    ),
    Rule("bulk-operands", ERROR, "operands of a bulk or tensor copy that the ISA does not allow"),
    Rule("tensor-map", ERROR, "a tensor map that no host function would have encoded"),
    Rule("exit-with-pending-reads", ERROR, "a thread exits while its bulk copies still read"),
    Rule("copy-never-awaited", ERROR, "a kernel ends and nobody has waited for one of its copies"),
    Rule("exited-cta-access", ERROR, "shared memory of a CTA whose threads have all exited"),
    Rule("mbarrier-uninitialised", ERROR, "an mbarrier operation before mbarrier.init"),
    Rule("mbarrier-reinit", ERROR, "mbarrier.init on an mbarrier that is in use"),
    Rule("mbarrier-count", ERROR, "an mbarrier count or transaction count out of its range"),
    Rule("mbarrier-underflow", ERROR, "more arrivals in a phase than the mbarrier expects"),
    Rule("mbarrier-overrun", ERROR, "a phase goes on before anyone has seen the last one complete"),
    Rule("mbarrier-stale-token", ERROR, "a wait on a phase two or more behind"),
    Rule(
        "mbarrier-transactions", ERROR, "bytes announced to an mbarrier and copied differ at exit"
    ),
    Rule("mbarrier-access", ERROR, "an ordinary access to an mbarrier that is in use"),
    Rule(
        "mbarrier-init-fence",
        ERROR,
        "an mbarrier's init is not fenced for the async proxy and the cluster before they use it",
    ),
    Rule("mbarrier-unordered", ERROR, "an mbarrier is used by what its init is not ordered before"),
    Rule("cluster-barrier", ERROR, "barrier.cluster.arrive and .wait that do not alternate"),
    Rule("register-balance", WARNING, "registers are released by setmaxnreg and nobody takes them"),
    Rule("register-budget", ERROR, "setmaxnreg against the register rules of PTX ISA 9.7.19.5"),
    Rule("wgmma-operands", ERROR, "wgmma operands that the ISA does not allow"),
    Rule("wgmma-fence", ERROR, "wgmma registers written before without wgmma.fence in between"),
    Rule("wgmma-unwaited", ERROR, "registers of a wgmma accessed before its wait_group"),
    Rule("tmem-out-of-bounds", ERROR, "an access past lane 127 or column 511 of tensor memory"),
    Rule("tmem-unallocated", ERROR, "an access to columns of tensor memory that nobody allocated"),
    Rule("tmem-lane-access", ERROR, "a warp accesses lanes of tensor memory that it may not touch"),
    Rule("tmem-lane-implied", WARNING, "an address of tensor memory without the warp's own lanes"),
    Rule("tmem-operands", ERROR, "operands of a tensor memory instruction that the ISA excludes"),
    Rule("tmem-allocation", ERROR, "tcgen05.alloc or dealloc against the rules of their use"),
    Rule("tmem-allocation-order", WARNING, "a CTA allocates more columns than it did before"),
    Rule("tmem-leak", ERROR, "tensor memory that is still allocated when its CTA exits"),
    Rule(
        "uninitialised-tmem-read",
        # Legal, as for shared memory.
        WARNING,
        "a read of tensor memory that nobody has written since it was allocated",
        optional=True,
    ),
    Rule(
        "tmem-race",
        ERROR,
        "two accesses to tensor memory, one of them a write, that nothing orders",
        optional=True,
    ),
    Rule(
        "tmem-read-before-completion",
        ERROR,
        "a read of tensor memory that the tensor core is still writing",
        optional=True,
    ),
    Rule(
        "tmem-write-before-completion",
        ERROR,
        "a write to tensor memory that the tensor core is still reading or writing",
        optional=True,
    ),
    Rule(
        "tmem-unwaited-store",
        ERROR,
        "an access to tensor memory whose tcgen05.st has not been waited for",
        optional=True,
    ),
    Rule(
        "tmem-unwaited-load",
        ERROR,
        "a write to tensor memory whose tcgen05.ld has not been waited for",
        optional=True,
    ),
    Rule(
        "tmem-load-order",
        # The ISA asks for the wait all the same, 9.7.16.6.4.5.
        WARNING,
        "a write to tensor memory after a tcgen05.ld that was used but not waited for",
        optional=True,
    ),
    Rule(
        "missing-tcgen05-fence",
        ERROR,
        "tensor memory accesses ordered by relaxed synchronisation without the tcgen05 fences",
        optional=True,
    ),
    Rule(
        "unfenced-tcgen05",
        # Release and acquire order tensor memory, too (9.7.16.6.3); every canonical pattern of
        # 9.7.16.6.4 has the fences.
        WARNING,
        "tensor memory accesses of two warps without the tcgen05 fences between them",
        optional=True,
        strict=True,
    ),
    Rule(
        "unsynchronised-lanes",
        # A finding about the text: whether other lanes made the access is not known.
        WARNING,
        "an mbarrier arrival by some lanes of a warp without a warp barrier since its last access",
        optional=True,
        strict=True,
    ),
    Rule("cluster-launch", ERROR, "cluster launch control against the rules of PTX ISA 9.7.13.17"),
    Rule("tensor-descriptor", ERROR, "a tcgen05 descriptor or address that the ISA does not allow"),
    Rule(
        "tensor-reserved-bits",
        # Shipped programs set bit 29, which later architectures give a meaning.
        WARNING,
        "a tcgen05 instruction descriptor sets bits that the ISA reserves",
    ),
    Rule("tensor-cta-group", ERROR, "CTA groups mixed in one kernel, or a pair that is none"),
    Rule("tensor-scale-factors", ERROR, "scale factors that differ between lane partitions"),
    Rule("tensor-uncommitted", ERROR, "a thread exits with tcgen05 work that no commit tracks"),
    Rule("mma-operands", ERROR, "operands of mma.sync that the ISA does not allow"),
    Rule("membermask", ERROR, "a warp instruction is executed by a lane outside its member mask"),
    Rule("shuffle-inactive-lane", ERROR, "shfl reads from a lane that does not take part"),
)

RULES: dict[str, Rule] = {rule.name: rule for rule in _RULES}


@dataclass(frozen=True)
class AccessSite:
    """The other half of a conflict: who accessed the same bytes before, and where."""

    what: str
    ptx_line: int | None = None
    ptx_text: str | None = None
    source: str | None = None
    warp: int | None = None
    cta: tuple[int, ...] | None = None

    def render(self) -> list[str]:
        """The lines of a report."""
        where = f"  after: {self.what}"
        if self.cta is not None:
            where += f" by CTA {_triple(self.cta)}"
        if self.warp is not None:
            where += f"{' ' if self.cta is not None else ' by '}warp {self.warp}"
        lines = [where]
        if self.ptx_text is not None:
            lines.append(f"         PTX line {self.ptx_line}: {self.ptx_text}")
        if self.source is not None:
            lines.append(f"         source: {self.source}")
        return lines


@dataclass(frozen=True)
class Hazard:
    """One finding. ``str()`` gives the multi-line report.

    Attributes:
        rule: a name of ``RULES``.
        severity: "error" (undefined by the PTX ISA) or "warning".
        message: what happened, with the numbers.
        kernel: the kernel's name.
        ptx_line: 1-based line of the PTX text.
        ptx_text: the instruction.
        source: ``file:line`` of the program that the PTX was compiled from, when known.
        cta: (x, y, z) of the CTA; warp and lane of the first thread it happened to.
        address: the address in its state space.
        other: the access that it conflicts with.
        count: how many times the same pair of lines was found.
    """

    rule: str
    message: str
    severity: str = ERROR
    kernel: str | None = None
    ptx_line: int | None = None
    ptx_text: str | None = None
    source: str | None = None
    cta: tuple[int, ...] | None = None
    warp: int | None = None
    lane: int | None = None
    address: int | None = None
    other: AccessSite | str | None = None
    count: int = 1

    @property
    def key(self) -> tuple[str, int | None, int | None]:
        """What makes two findings the same: the rule and the pair of PTX lines."""
        other = self.other.ptx_line if isinstance(self.other, AccessSite) else None
        return self.rule, self.ptx_line, other

    def render(self) -> str:
        """The report: what, where, and who."""
        times = f"  (found {self.count} times)" if self.count > 1 else ""
        lines = [f"{self.severity}: {self.rule}: {self.message}{times}"]
        if self.kernel is not None:
            lines.append(f"  kernel: {self.kernel}")
        if self.ptx_text is not None:
            lines.append(f"  PTX line {self.ptx_line}: {self.ptx_text}")
        if self.source is not None:
            lines.append(f"  source: {self.source}")
        thread = []
        if self.cta is not None:
            thread.append(f"CTA {_triple(self.cta)}")
        if self.warp is not None:
            thread.append(f"warp {self.warp}")
        if self.lane is not None:
            thread.append(f"lane {self.lane}")
        if self.address is not None:
            thread.append(f"address {self.address:#x}")
        if thread:
            lines.append("  where: " + ", ".join(thread))
        if isinstance(self.other, AccessSite):
            lines += self.other.render()
        elif self.other is not None:
            lines.append(f"  other: {self.other}")
        if self.rule in RULES:
            lines.append(f"  rule:  {RULES[self.rule].meaning}")
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.render()


def _triple(cta: tuple[int, ...]) -> str:
    return "(" + ", ".join(str(int(x)) for x in cta) + ")"


class HazardError(CuteFAError):
    """Raised on the first error when the simulator is strict.

    ``hazard`` is the finding; ``launch`` what the launch had counted and found until then.
    """

    launch: Launch | None = None

    def __init__(self, hazard: Hazard) -> None:
        self.hazard = hazard
        super().__init__(
            hazard.render(),
            fix="mend the program, or pass strict=False to collect hazards and run on",
        )

    def __reduce__(self) -> tuple[type[HazardError], tuple[Hazard]]:
        return type(self), (self.hazard,)


def selected_rules(checks: bool | Iterable[str]) -> frozenset[str]:
    """The optional rules that ``SimOptions.checks`` asks for.

    Raises:
        InvalidArgumentError: for a name that is not a rule.
    """
    optional = frozenset(name for name, rule in RULES.items() if rule.optional)
    if isinstance(checks, bool):
        usual = frozenset(name for name in optional if not RULES[name].strict)
        return usual if checks else frozenset()
    names = frozenset([checks] if isinstance(checks, str) else checks)
    unknown = sorted(names - set(RULES))
    if unknown:
        raise InvalidArgumentError(
            "an unknown hazard rule was asked for",
            got=", ".join(map(repr, unknown)),
            expected="True, False, or names among " + ", ".join(RULES),
        )
    return names & optional


def add(found: list[Hazard], hazard: Hazard) -> bool:
    """Add a finding to a list; True if it is the first of its rule and pair of PTX lines."""
    for index, known in enumerate(found):
        if known.key == hazard.key:
            found[index] = replace(known, count=known.count + hazard.count)
            return False
    found.append(hazard)
    return True


def site(wave: Wave, instr: Instr, what: str, warp: int | None, slot: int | None) -> AccessSite:
    """The description of an earlier access by a warp of the CTA in ``slot``."""
    cta = None if slot is None else cta_in(wave, slot)
    source = wave.module.source_of(instr)
    return AccessSite(what, instr.line, instr.text, source, warp, cta)


def cta_in(wave: Wave, slot: int) -> tuple[int, int, int]:
    """blockIdx of the CTA in a slot of a wave."""
    x, y, z = (int(i) for i in wave.cta_ids[slot])
    return x, y, z


def report(
    wave: Wave, rule: str, message: str, instr: Instr | None, slot: int, **where: Any
) -> None:
    """Record a hazard, unless its rule is not looked for.

    Args:
        instr: the instruction to blame, if there is one.
        slot: the CTA's slot of the wave.
        where: what else is known, as fields of ``Hazard``.

    Raises:
        HazardError: if it is new, an error, and the simulator is strict.
    """
    known = RULES[rule]
    if known.optional and not wave.options.checks_rule(rule):
        return
    if instr is not None:
        where |= {"ptx_line": instr.line, "ptx_text": instr.text}
        where["source"] = wave.module.source_of(instr)
    cta, kernel = cta_in(wave, slot), wave.kernel.name
    hazard = Hazard(rule, message, known.severity, kernel, cta=cta, **where)
    if add(wave.hazards, hazard) and wave.options.strict and hazard.severity == ERROR:
        raise HazardError(hazard)


def report_lanes(
    ctx: BlockContext,
    rule: str,
    message: str,
    lanes: np.ndarray,
    addresses: np.ndarray | None = None,
    other: AccessSite | None = None,
    instr: Instr | None = None,
) -> None:
    """Record a hazard of some lanes of the running instruction, located at the first of them.

    Args:
        lanes: bool ``(w, c, 32)`` over ``ctx.rect``; how many are set is the hazard's count.
        addresses: the lanes' addresses, same shape.
        instr: the instruction to blame, by default the one that runs.
    """
    first = int(np.argmax(lanes))
    w, c, lane = (int(i) for i in np.unravel_index(first, lanes.shape))
    report(
        ctx.wave,
        rule,
        message,
        instr or ctx.instr,
        ctx.rect[2] + c,
        warp=ctx.rect[0] + w,
        lane=lane,
        address=None if addresses is None else int(addresses[w, c, lane]),
        other=other,
        count=int(np.count_nonzero(lanes)),
    )
