"""Vector clocks: what releases and acquires order, on the bare data structure."""

import numpy as np
import pytest

from cute_fa.sim.race import IN_FLIGHT, Clocks


def clocks(warps=4, slots=3, cluster=1):
    return Clocks(warps, np.arange(slots, dtype=np.uint32) % cluster, cluster)


def ordered(c, stamp, by, reader, slot=0):
    """Whether an access of agent ``by`` with the event stamp is ordered before ``reader``."""
    return bool(stamp + by < c.seen[reader, slot, by])


def test_nothing_is_ordered_at_first_but_ones_own_accesses():
    c = clocks()
    stamp = c.access(7)
    assert not ordered(c, stamp, by=1, reader=0)
    assert ordered(c, stamp, by=2, reader=2)
    assert (c.floor == 0).all()


def test_a_barrier_orders_what_came_before_and_nothing_after():
    c = clocks()
    before = c.access(1)
    everybody = (0, 4, 0, 3)
    c.acquire(everybody, c.release(everybody))
    after = c.access(2)
    for reader in range(4):
        for writer in range(4):
            assert ordered(c, before, writer, reader)
            assert ordered(c, after, writer, reader) == (writer == reader)
    assert (before < c.floor).all() and (after >= c.floor).all()


def test_arrivals_pass_on_what_they_learnt_from_others():
    c = clocks(slots=1)
    stamp = c.access(1)  # by warp 0
    first = c.release((0, 1, 0, 1))
    c.acquire((1, 2, 0, 1), first)
    second = c.release((1, 2, 0, 1))
    c.acquire((2, 3, 0, 1), second)
    assert ordered(c, stamp, by=0, reader=2)
    assert not ordered(c, stamp, by=0, reader=3)


def test_a_release_does_not_cover_later_accesses_of_the_releasing_warp():
    c = clocks(slots=1)
    snapshot = c.release((0, 1, 0, 1))
    late = c.access(1)
    c.acquire((1, 2, 0, 1), snapshot)
    assert not ordered(c, late, by=0, reader=1)


def test_members_limit_who_releases_and_who_acquires():
    c = clocks(slots=2)
    stamp = c.access(1)
    members = np.array([[True, False], [False, False], [True, True], [False, True]])
    snapshot = c.release((0, 4, 0, 2), members)
    c.acquire((0, 4, 0, 2), snapshot, members)
    assert ordered(c, stamp, by=0, reader=2, slot=0)
    assert not ordered(c, stamp, by=1, reader=2, slot=0)
    assert not ordered(c, stamp, by=0, reader=1, slot=0)
    assert ordered(c, stamp, by=2, reader=3, slot=1)
    assert not ordered(c, stamp, by=0, reader=3, slot=1)


def test_slots_do_not_order_each_other():
    c = clocks(slots=2)
    stamp = c.access(1)
    c.acquire((0, 4, 0, 1), c.release((0, 4, 0, 1)))
    assert ordered(c, stamp, by=0, reader=1, slot=0)
    assert not ordered(c, stamp, by=0, reader=1, slot=1)


def test_agents_of_a_cluster_know_each_other_by_rank():
    c = clocks(warps=2, slots=4, cluster=2)
    assert c.agents == 4
    assert c.agent.tolist() == [[0, 2, 0, 2], [1, 3, 1, 3]]
    stamp = c.access(1)
    snapshot = c.release((0, 2, 0, 2)).max(axis=0, keepdims=True)  # both CTAs of cluster 0
    c.acquire((0, 2, 0, 2), snapshot)
    assert ordered(c, stamp, by=3, reader=0, slot=0)
    assert ordered(c, stamp, by=0, reader=1, slot=1)
    assert not ordered(c, stamp, by=3, reader=0, slot=2)


def test_events_name_their_instructions():
    c = clocks()
    first, second = c.access(11), c.access(22)
    c.release((0, 1, 0, 1))
    assert c.instruction(int(first) + 3) == 11
    assert c.instruction(int(second)) == 22
    assert c.instruction(int(second) + c.agents) is None


def test_forgetting_orders_the_past_before_the_future():
    c = clocks()
    old = 1 * c.agents
    c.access(1)
    c.forget()
    fresh = c.access(2)
    for reader in range(4):
        assert ordered(c, old, by=(reader + 1) % 4, reader=reader)
        assert not ordered(c, fresh, by=(reader + 1) % 4, reader=reader)


@pytest.mark.parametrize("seed", range(5))
def test_random_programs_agree_with_a_happens_before_graph(seed):
    """Random accesses and pairwise synchronisations, checked by reachability in a graph."""
    rng = np.random.default_rng(seed)
    warps = 5
    c = clocks(warps, slots=1)
    last = [None] * warps  # node of each warp's last action
    edges: dict[int, set[int]] = {}
    accesses: list[tuple[int, int, int]] = []  # node, warp, stamp

    def node(*predecessors):
        edges[len(edges)] = {p for p in predecessors if p is not None}
        return len(edges) - 1

    snapshots = []
    for _ in range(120):
        warp, action = int(rng.integers(warps)), rng.integers(3)
        rect = (warp, warp + 1, 0, 1)
        if action == 0:
            last[warp] = node(last[warp])
            accesses.append((last[warp], warp, int(c.access(0))))
        elif action == 1:
            last[warp] = node(last[warp])
            snapshots.append((last[warp], c.release(rect)))
        elif snapshots:
            source, snapshot = snapshots[rng.integers(len(snapshots))]
            last[warp] = node(last[warp], source)
            c.acquire(rect, snapshot)

    def reachable(start):
        seen, todo = set(), [start]
        while todo:
            n = todo.pop()
            if n is not None and n not in seen:
                seen.add(n)
                todo += edges[n]
        return seen

    for reader in range(warps):
        past = reachable(last[reader])
        for access, warp, stamp in accesses:
            assert ordered(c, stamp, warp, reader) == (access in past or warp == reader)
        stamps = [s + w for n, w, s in accesses]
        for s, (n, w, _) in zip(stamps, accesses, strict=True):
            if s < c.floor[reader, 0]:
                assert n in past or w == reader
    assert (c.floor < IN_FLIGHT).all()
