"""Cluster launch control: a CTA that stays asks for the next CTA of the grid, and does its work.

The grid has a CTA for every piece of work. The hardware starts as many as fit; one that runs may
cancel the launch of one that does not yet (``try_cancel``, PTX ISA "clusterlaunchcontrol"). The
answer, 16 bytes, comes to shared memory: whose launch was cancelled, or that none was, after which
a CTA must not ask again. Nobody has to know how many SMs there are, or how long pieces take.

One warp asks and every warp of the CTA reads the answers, which are a ring like any other:

    furthest ahead   begin()   of piece n
    asker            ask(n)
    everybody        answer(n)

Request n is made when the role that is furthest ahead begins piece n (``begin``): the answer has
the time of a piece to come, and nothing is taken from other CTAs before it is needed.

Of a pair of CTAs, which do the same pieces, the leading one asks for both: an answer comes to each,
once each has room for it.
"""

from __future__ import annotations

from dataclasses import dataclass

import cutlass
from cutlass import cute

from cute_fa.blocks.pipelines import Ring, num_mbarriers
from cute_fa.blocks.plan import ANSWER_BYTES, ANSWER_SLOTS
from cute_fa.blocks.signals import Signal, arrive_at_leader, wait_for_cluster


@dataclass(frozen=True)
class Answers(Ring):
    """What became of requests 0, 1, 2, …; ``consumer_warps`` are all warps of the CTA.

    Attributes:
        memory: 16 bytes per slot.
        begun: the role that is furthest ahead has begun a piece; of a pair, in the leading CTA, and
            the other CTA has room for the answer.
        leads: of a pair of CTAs, whether this is the one that asks; None: there is no pair.
    """

    memory: cute.Pointer
    begun: Signal
    leads: cutlass.Boolean | None = None

    def initialise(self) -> None:
        """Set the arrive counts; by one thread, before any other touches the ring."""
        self._initialise(1)
        self.begun.initialise()

    @cute.jit
    def begin(self):
        """The warp that is furthest ahead: it begins its next piece."""
        if cutlass.const_expr(self.leads is None) or self.leads:
            self.begun.arrive(0)

    @cute.jit
    def ask(self, n):
        """The asking warp: make request ``n`` when piece ``n`` has been begun."""
        self._await_empty(n)
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive_and_expect_tx(self.full(n), ANSWER_BYTES)
        if cutlass.const_expr(self.leads is None):
            self.begun.wait(0, n)
            self._request(n, multicast=False)
        elif self.leads:
            wait_for_cluster(self.begun.mbarriers, n & 1)
            self._request(n, multicast=True)
        else:
            with cute.arch.elect_one():
                arrive_at_leader(self.begun.mbarriers)

    @cute.jit
    def _request(self, n, multicast: cutlass.Constexpr):
        with cute.arch.elect_one():
            cute.arch.issue_clc_query(self.full(n), self._answer(n), multicast=multicast)

    @cute.jit
    def answer(self, n) -> tuple[cutlass.Boolean, cutlass.Int32]:
        """A whole warp: (whether request ``n`` was granted, blockIdx.x of the CTA that was)."""
        self.wait(n)
        index, _, _, is_granted = cute.arch.clc_response(self._answer(n))
        # The next answer in this place is written through the async proxy.
        cute.arch.fence_view_async_shared()
        cute.arch.sync_warp()
        self.release(n)
        return is_granted != 0, index

    def _answer(self, n) -> cute.Pointer:
        return self.memory + self.slot(n)


@cute.jit
def read_all(answers: Answers, asks: cutlass.Constexpr = False):
    """A warp that has no part in any piece: the answers, as their ring expects of every warp, until
    one is a refusal.

    Args:
        asks: this is the asking warp.
    """
    n = cutlass.Int32(0)
    is_granted = cutlass.Boolean(True)
    while is_granted:
        if cutlass.const_expr(asks):
            answers.ask(n)
        is_granted, _ = answers.answer(n)
        n += 1


def allocate_answers(
    smem: cutlass.memory.SmemAllocator, warps: int, leads: cutlass.Boolean | None = None
) -> Answers:
    """The ring of a CTA of ``warps`` warps, all of which read every answer.

    Args:
        leads: of a pair of CTAs, whether this is the leading one.
    """
    memory = smem.allocate_array(cutlass.Int128, ANSWER_SLOTS, byte_alignment=ANSWER_BYTES)
    mbarriers = smem.allocate_array(cutlass.Int64, num_mbarriers(ANSWER_SLOTS, warps))
    begun = Signal(smem.allocate_array(cutlass.Int64, 1), 1, 1 if leads is None else 2)
    return Answers("answers", mbarriers, ANSWER_SLOTS, warps, 1, memory, begun, leads)
