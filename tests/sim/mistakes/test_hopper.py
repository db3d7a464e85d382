"""What people get wrong with TMA, mbarriers, wgmma and clusters, in CuTe DSL on sm_90a."""

from __future__ import annotations

import pytest
import torch

from tests.sim.mistakes.hopper import (
    COLUMNS,
    MAP_BYTES,
    MMA_K,
    MMA_M,
    MMA_N,
    MMA_TILES,
    ROWS,
    THREADS,
    TILES,
    ChangedMap,
    ClusterExchange,
    ClusterSignal,
    Registers,
    TmaScale,
    WarpgroupGemm,
)
from tests.sim.mistakes.judge import Data, Mistake, assert_reported, assert_sound

ARCH = "sm_90a"
EXPECTED = {
    TmaScale: lambda x: 2 * x,
    WarpgroupGemm: lambda a, b: a.float() @ b.float().T,
    ChangedMap: lambda x, maps: x,
    ClusterExchange: lambda x: x.view(2, -1).flip(0).reshape(-1),
    ClusterSignal: lambda x: x,
    Registers: lambda x: x,
}

MISTAKES = (
    Mistake(TmaScale, "no wait for the tile", ("read-before-arrival",)),
    Mistake(TmaScale, "a wait for the other parity", ("read-before-arrival", "deadlock")),
    Mistake(TmaScale, "no bytes announced", ("read-before-arrival", "mbarrier-transactions")),
    Mistake(TmaScale, "half the bytes announced", ("read-before-arrival", "mbarrier-transactions")),
    Mistake(TmaScale, "twice the bytes announced", ("deadlock",)),
    Mistake(TmaScale, "bytes announced after the copy", ("deadlock",)),
    Mistake(TmaScale, "every lane announces", ("mbarrier-underflow",)),
    Mistake(TmaScale, "no wait for the empty slot", ("shared-race",)),
    Mistake(TmaScale, "one slot filled in every round", ("write-while-copy-in-flight",)),
    Mistake(TmaScale, "a slot released before it is read", ("shared-race",)),
    Mistake(TmaScale, "a slot is never released", ("deadlock",)),
    Mistake(TmaScale, "an empty barrier that counts threads", ("deadlock",)),
    Mistake(TmaScale, "an empty barrier that counts one warp", ("mbarrier-overrun",)),
    Mistake(TmaScale, "a barrier without mbarrier_init", ("mbarrier-uninitialised",)),
    Mistake(TmaScale, "no mbarrier_init_fence", ("mbarrier-init-fence",)),
    Mistake(TmaScale, "no barrier behind mbarrier_init", ("mbarrier-unordered",)),
    Mistake(TmaScale, "no proxy fence before the store", ("missing-proxy-fence",)),
    Mistake(TmaScale, "no barrier before the store", ("shared-race",)),
    Mistake(TmaScale, "staging rewritten while the store reads", ("overwrite-while-reading",)),
    Mistake(TmaScale, "exit before the store has read", ("exit-with-pending-reads",)),
    Mistake(TmaScale, "no commit of the store", ("overwrite-while-reading",)),
    Mistake(WarpgroupGemm, "no proxy fence before the product", ("missing-proxy-fence",)),
    Mistake(WarpgroupGemm, "no barrier before the product", ("shared-race",)),
    Mistake(WarpgroupGemm, "no warpgroup.fence", ("wgmma-fence",)),
    Mistake(WarpgroupGemm, "no warpgroup.commit_group", ("wgmma-unwaited",)),
    Mistake(WarpgroupGemm, "no warpgroup.wait_group", ("wgmma-unwaited",)),
    Mistake(
        WarpgroupGemm,
        "operands refilled before the product is complete",
        ("overwrite-while-reading",),
    ),
    Mistake(ChangedMap, "a changed map that is not released", ("missing-tensormap-fence",)),
    Mistake(ChangedMap, "a changed map that is not acquired", ("missing-tensormap-fence",)),
    Mistake(ChangedMap, "a map acquired before it is changed", ("missing-tensormap-fence",)),
    Mistake(ClusterExchange, "a CTA barrier where a cluster barrier was meant", ("shared-race",)),
    Mistake(ClusterExchange, "a relaxed arrive", ("shared-race",)),
    Mistake(ClusterExchange, "the peer leaves before it is read", ("exited-cta-access",)),
    Mistake(ClusterExchange, "a cluster barrier for one CTA", ("shared-race", "deadlock")),
    Mistake(ClusterExchange, "arrive twice", ("cluster-barrier",)),
    Mistake(ClusterExchange, "wait without arrive", ("cluster-barrier",)),
    Mistake(ClusterExchange, "a rank that the cluster does not have", ("shared-bad-rank",)),
    Mistake(
        ClusterSignal,
        "an arrival that may come before mbarrier_init",
        ("mbarrier-uninitialised", "mbarrier-unordered"),
    ),
    Mistake(ClusterSignal, "the peer leaves before the arrival", ("exited-cta-access",)),
    Mistake(Registers, "nobody gives registers away", ("deadlock", "register-budget")),
    Mistake(Registers, "more registers than there are", ("deadlock", "register-budget")),
)


def tensors(program: type) -> Data:
    def numbers(*shape: int) -> torch.Tensor:
        count = torch.tensor(shape).prod().item()
        return torch.arange(count, dtype=torch.float32).remainder(17).reshape(shape)

    if program is WarpgroupGemm:
        operands = [numbers(rows, MMA_TILES * MMA_K).half() for rows in (MMA_M, MMA_N)]
        return *operands, torch.full((MMA_M, MMA_N), float("nan"))
    if program is ChangedMap:
        x = numbers(ROWS, COLUMNS)
        return x, torch.zeros(MAP_BYTES // 8, dtype=torch.int64), torch.full_like(x, float("nan"))
    shapes = {
        TmaScale: (TILES * ROWS, COLUMNS),
        ClusterExchange: (2 * THREADS,),
        ClusterSignal: (2 * THREADS,),
        Registers: (2 * THREADS,),
    }
    x = numbers(*shapes[program])
    return x, torch.full_like(x, float("nan"))


@pytest.mark.parametrize("program", EXPECTED, ids=lambda program: program.__name__)
def test_the_sound_program_is_clean(program: type) -> None:
    assert_sound(ARCH, program, lambda: tensors(program), EXPECTED[program])


@pytest.mark.parametrize("mistake", MISTAKES, ids=str)
def test_the_mistake_is_reported(mistake: Mistake) -> None:
    assert_reported(ARCH, mistake, lambda: tensors(mistake.program))
