"""The fault surveys of the rungs' kernels: what is run, under which rules, and what may survive.

The rungs' ``test_faults.py`` assert on them; ``tools/fault_table.py`` prints their tables.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from cute_fa.problem import AttentionProblem
from cute_fa.sim.addresses import SHARED_BASE
from cute_fa.sim.device import Device
from cute_fa.sim.hazards import RULES
from cute_fa.target import Target, get_target
from cute_fa.testing.fault_survey import Call, Survey, survey
from cute_fa.testing.faults import Fault
from tests.faults import Redundant, dense_call
from tests.rungs.bench import Bench, Program


def _all(kernel: KernelSurvey) -> Callable[[Fault], bool]:
    return lambda fault: True


@dataclass(frozen=True)
class KernelSurvey:
    """One kernel of a rung under all its faults.

    Attributes:
        target: the simulated device. One SM, where a persistent CTA has to take all row tiles.
        problems: the kernel runs on each; together they execute every instruction.
        plan: fields of the rung's plan that are not as the table has them.
        redundant: the faults that survive, and why.
        has_strict_rules: the strict rules of the simulator are on, too.
        choose: makes, of the survey, the choice of the faults that it is about.
    """

    generation: str
    target: Target
    problems: tuple[AttentionProblem, ...]
    plan: dict[str, Any] = field(default_factory=dict)
    redundant: tuple[Redundant, ...] = ()
    has_strict_rules: bool = False
    choose: Callable[[KernelSurvey], Callable[[Fault], bool]] = _all

    @property
    def config(self) -> Any:
        return Bench(self.generation, self.target.arch).config(self.problems[0], **self.plan)

    @property
    def program(self) -> Program:
        return Bench(self.generation, self.target.arch).program(self.config)

    def calls(self) -> list[Call]:
        return [dense_call(self.program, self.config, problem) for problem in self.problems]

    def run(self, only: Callable[[Fault], bool] = lambda fault: True, **how: Any) -> Survey:
        """Try the faults that it is about, of these ``only`` some; ``how`` as for ``survey``.

        The faulty kernels' code should be kept out of the cache on disk (CUTE_FA_CACHE=0).
        """
        belongs = self.choose(self)
        return survey(
            self.target,
            self.calls(),
            only=lambda fault: belongs(fault) and only(fault),
            checks=frozenset(RULES) if self.has_strict_rules else True,
            **how,
        )


# --- FA1, FA2 -------------------------------------------------------------------------------------

FA1 = KernelSurvey(
    "fa1",
    get_target("sm_80"),
    # Several blocks on both sides and three chunks of O: every barrier's two sides are reached.
    (AttentionProblem(1, 70, 130, 1, 1, 32, 96, "float16", causal=True),),
    {"tile_m": 32, "tile_n": 64, "tile_dv": 32},
)
FA2 = KernelSurvey(
    "fa2",
    get_target("sm_80"),
    # Two row tiles; masked and unmasked blocks in both, more of each than the rings have slots; and
    # a negative scale, because only then is Q changed in shared memory before the first barrier.
    (AttentionProblem(1, 200, 600, 1, 1, 64, 64, "float16", causal=True, softmax_scale=-0.2),),
)

# --- FA3 ------------------------------------------------------------------------------------------

# Masked and unmasked blocks, more of each than the rings have slots; a negative scale, because only
# then do threads write to Q.
_PERSISTENT = AttentionProblem(
    1, 300, 430, 1, 1, 64, 64, "float16", causal=True, softmax_scale=-0.2
)
_SINGLE = AttentionProblem(1, 200, 430, 1, 1, 64, 64, "float16", softmax_scale=-0.2)
_STRIP_BARRIER = Redundant(
    "barrier",
    r"bar\.sync %r, 128",
    1,
    "The strip's barrier between the threads' writes to Q and the products that read it: all warps "
    "of the consumer also pass the turn's barrier before they issue the first product.",
)
_LAST_TURN = Redundant(
    "barrier",
    r"bar\.sync %r, 256",
    1,
    "Consumer 0's last wait for its turn only takes back an arrival: the CTA ends there.",
)
_FIRST_WAIT = (
    "The producer's first wait for an empty slot, peeled off its loop: a literal 1 is the parity "
    "of the phase before the first, which a fresh mbarrier counts as complete."
)
_HELD_Q = r"mbarrier\.try_wait\S* P1, \[%r\], %r, 10000000"
_FOR_PTXAS = (
    "The wait behind the release of K is there for the branch that it is to ptxas, once in each "
    "body of a block: the consumer has awaited this Q before the tile's first block, and gives it "
    "up after the last, so that the phase waited for is over all the while. "
)
FA3_FOR_PTXAS = (
    Redundant("wait", _HELD_Q, 3, _FOR_PTXAS + "(With the other parity it never ends.)"),
    Redundant(
        "stage",
        _HELD_Q,
        2,
        _FOR_PTXAS + "So it is for the other consumer's strip, or that Q is still to come: because "
        "of the turns the other one is at most a block ahead, in this tile. But from the tile's "
        "last block, here in the third body, it may be a tile ahead, if there is one: a deadlock.",
    ),
)
"""Faults in what synchronises nothing."""
FA3_PERSISTENT = KernelSurvey(
    "fa3",
    replace(get_target("sm_90a"), sm_count=1),
    (_PERSISTENT,),
    {"tile_n": 64, "num_consumers": 2, "is_persistent": True},  # less code than the table's plans
    (
        _STRIP_BARRIER,
        _LAST_TURN,
        Redundant(
            "stage",
            r"mbarrier\.arrive\.shared\.b64 %rd, \[%r\+\d+\], %r",
            1,
            "Two slots whose empty barriers are exchanged: slots are released in order, so the "
            "producer waits for the younger of two uses first, and the older one is then released.",
        ),
        *FA3_FOR_PTXAS,
    ),
)
FA3_SINGLE = replace(
    FA3_PERSISTENT,
    problems=(_SINGLE,),
    plan=FA3_PERSISTENT.plan | {"is_persistent": False, "has_own_o": False},
    redundant=(
        replace(
            _STRIP_BARRIER,
            at_most=2,
            why=_STRIP_BARRIER.why
            + " And the one before O takes Q's place: a warp comes there when its last product is "
            "complete; groups of a warpgroup complete as a whole and in order, so S = Q Kᵀ, which "
            "reads Q for all four warps, was complete before.",
        ),
        replace(
            _LAST_TURN,
            at_most=2,
            why=_LAST_TURN.why + " And turns order nothing but who issues products first.",
        ),
        Redundant("wait", r"mbarrier\.try_wait\S* P1, \[%r\], 1, 10000000", 1, _FIRST_WAIT),
        Redundant(
            "stage",
            r"mbarrier\.try_wait\S* P1, \[%r\], 1, 10000000",
            1,
            _FIRST_WAIT + " The other slot's barrier is as fresh.",
        ),
        FA3_PERSISTENT.redundant[2],
        *(replace(argument, at_most=2) for argument in FA3_FOR_PTXAS),  # no body of masked blocks
        Redundant(
            "arrive",
            r"mbarrier\.arrive\.shared\.b64 %rd, \[%r\+\d+\], %r",
            1,
            "The release of V after the last product: a CTA of one tile fills that slot no more.",
        ),
    ),
)
_LAST_LOADS = (
    " And LOAD's last waits, but for one, for the other CTA's arrivals and copies: each of its "
    "warps frees the last V last. The ISA promises no order of arrivals from elsewhere."
)
FA3_PAIRED = replace(
    FA3_PERSISTENT,
    target=replace(FA3_PERSISTENT.target, sm_count=2),
    # Three row tiles of 256 rows, and the second CTA has no row of the last.
    problems=(replace(_PERSISTENT, seqlen_q=550, head_dim=128, head_dim_v=128),),
    plan=FA3_PERSISTENT.plan | {"is_paired": True},
    redundant=(
        _STRIP_BARRIER,
        _LAST_TURN,
        *(
            replace(argument, at_most=argument.at_most + more, why=argument.why + _LAST_LOADS)
            for argument, more in zip(FA3_FOR_PTXAS, (3, 1), strict=True)
        ),
        Redundant("parity", _HELD_Q, 1, _LAST_LOADS.strip() + " The phase before it is over."),
    ),
    has_strict_rules=True,
)

# --- FA4 ------------------------------------------------------------------------------------------

# Masked and unmasked blocks, more of each than the ring has slots; the steeper scale is there
# because O then has to be rescaled.
_CAUSAL = AttentionProblem(1, 600, 300, 1, 1, 32, 32, "float16", causal=True, softmax_scale=-0.2)
_STEEP = replace(_CAUSAL, softmax_scale=-3.0)
# The last tile that a CTA takes has keys, unlike above: what is read last is O in tensor memory.
_KEYS_FOR_ALL = replace(_CAUSAL, seqlen_q=400, seqlen_k=420)
_FA4_PLAN = {"tile_n": 64, "stages": 3, "is_persistent": True}  # less code than the table's plans
_IN_ORDER = (
    "Slots of two Q tiles exchanged on one side: both are signalled and waited for one after the "
    "other, in the same order by everybody, so that waiting for the other one first, or signalling "
    "it first, only delays."
)
_NO_KEYS = (
    "MMA's waits for the two Q tiles of a row tile without keys: it multiplies nothing, and the "
    "correction waits for the same bytes before it puts O in their place. What they are for is to "
    "tell the next tile's phase from this one's, and here tiles without keys are the last: only "
    "sections of heads or packed sequences have others after them."
)
_PERMIT = Redundant(
    "allocation",
    r"tcgen05\.relinquish_alloc_permit\..*",
    1,
    "A hint: it lets other CTAs of the SM allocate, and there are none.",
)
FA4_PERSISTENT = KernelSurvey(
    "fa4",
    replace(get_target("sm_100a"), sm_count=1),
    (_CAUSAL, _STEEP, _KEYS_FOR_ALL),
    _FA4_PLAN,
    (
        _PERMIT,
        Redundant("wait", r"mbarrier\.try_wait\..*", 2, _NO_KEYS),
        Redundant("stage", r"mbarrier\..*", 5, _IN_ORDER + " " + _NO_KEYS),
    ),
    has_strict_rules=True,
)

_DRAIN = (
    "LOAD's last waits, for commits that may still come: those of the last product, which the "
    "simulator completes last, are those of the slot that it waits for last. The ISA promises no "
    "order of commits to different mbarriers."
)
FA4_PAIRED = KernelSurvey(
    "fa4",
    replace(FA4_PERSISTENT.target, sm_count=2),
    FA4_PERSISTENT.problems,
    _FA4_PLAN | {"num_q_tiles": 1, "is_paired": True, "has_own_o": True},
    (
        _PERMIT,
        Redundant("wait", r"mbarrier\.try_wait\..*", 2, _DRAIN),
        Redundant(
            "stage", r"mbarrier\.try_wait\..*", 3, _DRAIN + " In which order is all the same."
        ),
        Redundant(
            "barrier",
            r"bar\.warp\.sync -1",
            1,
            "Before EPILOGUE's arrival at o_gone: the lane that arrives is the one that has issued "
            "the copy and waited for it.",
        ),
    ),
    has_strict_rules=True,
)

_NEARBY = 8  # instructions between a query of an answer and the end of what belongs to it


def _of_launch_control(kernel: KernelSurvey) -> Callable[[Fault], bool]:
    """The requests, the answers' ring and the signal that a piece is begun."""
    (call,) = kernel.calls()
    device = Device(kernel.target, trace=True, workers=1)
    call(device)
    trace = device.launches[-1].trace
    assert trace is not None
    asker = kernel.config.scheduler_warp
    used = {
        address
        for places in trace.shared_addresses(range(asker, asker + 1)).values()
        for address in places.get("barrier", ())
        if address >= SHARED_BASE  # smaller ones are numbers of named barriers
    }
    queries = [i.index for i in trace.kernel.body if "query_cancel" in i.opcode]

    def belongs(fault: Fault) -> bool:
        if fault.barriers:
            return not used.isdisjoint(fault.barriers)
        is_near = any(0 < fault.index - query <= _NEARBY for query in queries)
        return is_near and fault.kind in ("fence", "barrier")

    return belongs


FA4_LAUNCH_CONTROL = KernelSurvey(
    "fa4",
    FA4_PERSISTENT.target,
    # Five tiles of one block; under the random policy one CTA takes all that it is granted.
    (AttentionProblem(1, 1100, 60, 1, 1, 32, 32, "float16", softmax_scale=-0.2),),
    _FA4_PLAN | {"is_persistent": False, "has_launch_control": True},
    (
        Redundant(
            "fence",
            r"fence\.proxy\.async\.shared::cta",
            2,
            "Of the asking warp and of the one that is furthest ahead: their reads of an answer "
            "are known, by the next announcement and by the signal that a piece is begun, to warps "
            "that fence behind the next answer, and these come before the slot is filled again.",
        ),
    ),
    has_strict_rules=True,
    choose=_of_launch_control,
)

FA4_PAIRED_LAUNCH_CONTROL = replace(
    FA4_LAUNCH_CONTROL,
    target=FA4_PAIRED.target,
    plan=FA4_PAIRED.plan | {"is_persistent": False, "has_launch_control": True},
    redundant=(
        Redundant(
            "stage",
            r"mbarrier\..*",
            2,
            "The slots of two answers exchanged where the other CTA's MMA warp, which has no work, "
            "waits for or releases one: it only reads on a request later, and what it releases too "
            "early is asked for again behind a request that waits for what it releases too late.",
        ),
    ),
)

SURVEYS: dict[str, KernelSurvey] = {
    "fa1": FA1,
    "fa2": FA2,
    "fa3 persistent": FA3_PERSISTENT,
    "fa3 one tile per CTA": FA3_SINGLE,
    "fa3 pairs of CTAs": FA3_PAIRED,
    "fa4 persistent": FA4_PERSISTENT,
    "fa4 pairs of CTAs": FA4_PAIRED,
    "fa4 launch control": FA4_LAUNCH_CONTROL,
    "fa4 launch control of pairs": FA4_PAIRED_LAUNCH_CONTROL,
}
