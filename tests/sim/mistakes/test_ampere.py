"""What people get wrong with cp.async, barriers, shuffles and bounds, in CuTe DSL on sm_80."""

from __future__ import annotations

import pytest
import torch

from tests.sim.mistakes import ampere
from tests.sim.mistakes.judge import Data, Mistake, assert_reported, assert_sound

ARCH = "sm_80"
SIZES = {
    ampere.RingCopy: ampere.TILES * ampere.TILE,
    ampere.Exchange: ampere.THREADS,
    ampere.WarpSums: ampere.THREADS,
    ampere.Shift: 2 * ampere.THREADS - 7,
}
EXPECTED = {
    ampere.RingCopy: lambda x: x.view(ampere.TILES, -1).flip(1).reshape(-1),
    ampere.Exchange: lambda x: x + x.view(2, 64).flip(0).reshape(-1),
    ampere.WarpSums: lambda x: x.sum().expand(len(x)),
    ampere.Shift: lambda x: torch.cat((x[1:], torch.zeros(1))),
}

MISTAKES = (
    Mistake(ampere.RingCopy, "no cp_async_wait_group", ("read-before-arrival",)),
    Mistake(ampere.RingCopy, "a wait that leaves a group pending", ("read-before-arrival",)),
    Mistake(ampere.RingCopy, "no cp_async_commit_group", ("read-before-arrival",)),
    Mistake(ampere.RingCopy, "no barrier behind the wait", ("shared-race", "read-before-arrival")),
    Mistake(ampere.RingCopy, "no barrier before the refill", ("shared-race",)),
    Mistake(ampere.RingCopy, "a store into a slot being filled", ("write-while-copy-in-flight",)),
    Mistake(
        ampere.RingCopy, "two warps fill one place", ("write-while-copy-in-flight", "shared-race")
    ),
    Mistake(ampere.RingCopy, "an address that is not 16-byte aligned", ("global-misaligned",)),
    Mistake(ampere.Exchange, "no barrier", ("shared-race",)),
    Mistake(ampere.Exchange, "a warp barrier where a CTA barrier was meant", ("shared-race",)),
    Mistake(ampere.Exchange, "arrivals where waits were meant", ("shared-race",)),
    Mistake(ampere.Exchange, "a barrier for some lanes of a warp", ("shared-race",)),
    Mistake(
        ampere.Exchange,
        "a barrier of their own for half of a warp's lanes",
        ("divergent-collective",),
    ),
    Mistake(ampere.Exchange, "a barrier for some warps", ("deadlock",)),
    Mistake(ampere.Exchange, "a barrier of too few threads", ("shared-race",), ("eager", "late")),
    Mistake(ampere.Exchange, "a barrier of too many threads", ("barrier-count",)),
    Mistake(ampere.Exchange, "two counts for one barrier", ("barrier-count-mismatch",)),
    Mistake(ampere.Exchange, "two barriers where one was meant", ("deadlock",)),
    Mistake(ampere.Exchange, "an index past shared memory", ("shared-out-of-bounds",)),
    Mistake(ampere.Exchange, "two warps write one place", ("shared-race",)),
    Mistake(ampere.Exchange, "the last warp writes nothing", ("uninitialised-shared-read",)),
    Mistake(ampere.WarpSums, "a shuffle by some lanes", ("divergent-collective",)),
    Mistake(ampere.WarpSums, "no barrier before the last sum", ("shared-race",)),
    Mistake(ampere.Shift, "no bounds on the load", ("global-out-of-bounds",)),
    Mistake(ampere.Shift, "no bounds on the store", ("global-out-of-bounds",)),
    Mistake(ampere.Shift, "a bound that is off by one", ("global-out-of-bounds",)),
)


def tensors(program: type) -> Data:
    x = torch.arange(SIZES[program], dtype=torch.float32)
    return x, torch.full_like(x, float("nan"))


@pytest.mark.parametrize("program", SIZES, ids=lambda program: program.__name__)
def test_the_sound_program_is_clean(program: type) -> None:
    assert_sound(ARCH, program, lambda: tensors(program), EXPECTED[program])


@pytest.mark.parametrize("mistake", MISTAKES, ids=str)
def test_the_mistake_is_reported(mistake: Mistake) -> None:
    assert_reported(ARCH, mistake, lambda: tensors(mistake.program))
