"""One-way signals on mbarriers: "the n-th use of this slot is ready", without a way back.

For hand-overs between roles whose order already says when a slot may be used again. Arrivals come
from warps, or from the tensor core when it has finished what was issued before (``commit``). Both
order shared memory for whoever waits, and tensor memory where the signal says so.
"""

from __future__ import annotations

from dataclasses import dataclass

import cutlass
from cutlass import cute
from cutlass._mlir.dialects import nvvm
from cutlass.cute.nvgpu import tcgen05
from cutlass.cutlass_dsl import dsl_user_op

from cute_fa.blocks import tmem

LEADING_CTA = 0
"""The CTA of a pair, by its number in the cluster, that issues the products of both."""

BOTH_CTAS = 0b11
"""The CTAs that a commit tells, one bit each."""


@dataclass(frozen=True)
class Signal:
    """``slots`` mbarriers.

    Attributes:
        mbarriers: the first.
        arrivals: warps and commits that make one use ready.
        orders_tmem: whether accesses to tensor memory stand on both sides, which takes a
            tcgen05.fence on each (PTX ISA, canonical synchronisation patterns of tcgen05).
        is_paired: between two CTAs that share products: warps of both arrive at the leading CTA's
            mbarriers, commits at those of both. Orders tensor memory and nothing else.
    """

    mbarriers: cute.Pointer
    slots: cutlass.Constexpr
    arrivals: cutlass.Constexpr
    orders_tmem: cutlass.Constexpr = False
    is_paired: cutlass.Constexpr = False

    def initialise(self) -> None:
        """Set the arrive counts; by one thread, before any other touches the signal."""
        for slot in range(self.slots):
            cute.arch.mbarrier_init(self.mbarriers + slot, self.arrivals)

    def wait(self, slot, use) -> None:
        """Wait for use 0, 1, 2, … of ``slot``; nobody may wait for a use that is two behind."""
        cute.arch.mbarrier_wait(self.mbarriers + slot, use & 1)
        if self.orders_tmem:
            tmem.fence_after_signal()

    @cute.jit
    def wait_for_previous(self, slot, use):
        """Wait for the use before ``use``, if there is one."""
        if use > 0:
            self.wait(slot, use - 1)

    def arrive(self, slot) -> None:
        """A warp: what its threads have done so far is done."""
        self.arrive_at((slot,))

    @cute.jit
    def arrive_at(self, slots):
        """The same for several slots."""
        if cutlass.const_expr(self.orders_tmem):
            tmem.fence_before_signal()
        cute.arch.sync_warp()
        with cute.arch.elect_one():
            for slot in slots:
                if cutlass.const_expr(self.is_paired):
                    arrive_at_leader(self.mbarriers + slot, is_relaxed=True)
                else:
                    cute.arch.mbarrier_arrive(self.mbarriers + slot)

    @cute.jit
    def commit(self, slot):
        """The issuing warp: signal when the products issued so far are complete."""
        commit(self.mbarriers + slot, self.is_paired)


def arrive_at_leader(mbarrier: cute.Pointer, is_relaxed: bool = False) -> None:
    """One arrival at the leading CTA's copy of ``mbarrier``, for ``wait_for_cluster``.

    Args:
        is_relaxed: as in the ISA's patterns for tcgen05: what is handed over is tensor memory,
            which tcgen05.fence orders. PERF(SASS): a release in a cluster is a MEMBAR.ALL.GPU.
    """
    scope = nvvm.MemScopeKind.CLUSTER
    cute.arch.mbarrier_arrive(mbarrier, LEADING_CTA, relaxed=is_relaxed, scope=scope)


@cute.jit
def wait_for_cluster(mbarrier: cute.Pointer, parity: cutlass.Int32):
    """Wait as ``mbarrier_wait`` does, for arrivals from the whole cluster."""
    is_complete = cutlass.Boolean(False)
    while not is_complete:
        is_complete = _has_completed(mbarrier, parity)


@dsl_user_op
def _has_completed(mbarrier: cute.Pointer, parity, *, loc=None, ip=None) -> cutlass.Boolean:
    """mbarrier.try_wait.parity.acquire.cluster"""
    found = nvvm.mbarrier_wait_parity(
        mbarrier.to_llvm_ptr(loc=loc, ip=ip),
        cutlass.Int32(parity).ir_value(loc=loc, ip=ip),
        nvvm.MBarrierWaitKind.TRY,
        scope=nvvm.MemScopeKind.CLUSTER,
        order=nvvm.MemOrderKind.ACQUIRE,
        loc=loc,
        ip=ip,
    )
    return cutlass.Boolean(found)


def sync_cluster(orders_tmem: bool = False) -> None:
    """All threads of a cluster meet. What they wrote is not ordered: mbarriers have a fence of
    their own, and nothing else is for the other CTA.

    Args:
        orders_tmem: whether accesses to tensor memory come before. Behind, none may that is
            asynchronous; giving it back is not.
    """
    if orders_tmem:
        tmem.fence_before_signal()
    cute.arch.cluster_arrive_relaxed()
    cute.arch.cluster_wait()


@cute.jit
def commit(mbarrier: cute.Pointer, is_paired: cutlass.Constexpr = False):
    """Arrive at ``mbarrier`` when the products that this warp has issued so far are complete.

    The elected thread is the one that issued them: it is the same for every elect.sync of a warp.

    Args:
        is_paired: the products are of two CTAs; ``mbarrier`` of each is arrived at.
    """
    with cute.arch.elect_one():
        if cutlass.const_expr(is_paired):
            tcgen05.commit(mbarrier, BOTH_CTAS, tcgen05.CtaGroup.TWO)
        else:
            tcgen05.commit(mbarrier)
