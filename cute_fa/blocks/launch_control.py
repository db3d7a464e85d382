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
"""

from __future__ import annotations

from dataclasses import dataclass

import cutlass
from cutlass import cute

from cute_fa.blocks.pipelines import Ring, num_mbarriers
from cute_fa.blocks.plan import ANSWER_BYTES, ANSWER_SLOTS
from cute_fa.blocks.signals import Signal


@dataclass(frozen=True)
class Answers(Ring):
    """What became of requests 0, 1, 2, …; ``consumer_warps`` are all warps of the CTA.

    Attributes:
        memory: 16 bytes per slot.
        begun: the role that is furthest ahead has begun a piece.
    """

    memory: cute.Pointer
    begun: Signal

    def initialise(self) -> None:
        """Set the arrive counts; by one thread, before any other touches the ring."""
        self._initialise(1)
        self.begun.initialise()

    def begin(self) -> None:
        """The warp that is furthest ahead: it begins its next piece."""
        self.begun.arrive(0)

    @cute.jit
    def ask(self, n):
        """The asking warp: make request ``n`` when piece ``n`` has been begun."""
        self.begun.wait(0, n)
        self._await_empty(n)
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive_and_expect_tx(self.full(n), ANSWER_BYTES)
            cute.arch.issue_clc_query(self.full(n), self._answer(n), multicast=False)

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
def ask_for_all(answers: Answers):
    """The asking warp: one request after another until one is refused."""
    n = cutlass.Int32(0)
    is_granted = cutlass.Boolean(True)
    while is_granted:
        answers.ask(n)
        is_granted, _ = answers.answer(n)
        n += 1


def allocate_answers(smem: cutlass.memory.SmemAllocator, warps: int) -> Answers:
    """The ring of a CTA of ``warps`` warps, all of which read every answer."""
    memory = smem.allocate_array(cutlass.Int128, ANSWER_SLOTS, byte_alignment=ANSWER_BYTES)
    mbarriers = smem.allocate_array(cutlass.Int64, num_mbarriers(ANSWER_SLOTS, warps))
    begun = Signal(smem.allocate_array(cutlass.Int64, 1), 1, 1)
    return Answers("answers", mbarriers, ANSWER_SLOTS, warps, memory, begun)
