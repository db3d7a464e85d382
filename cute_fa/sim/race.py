"""Happens-before: which accesses of which warps are ordered, by vector clocks.

Time is one event counter per wave: each checked access and each release takes the next number, so
numbers grow along every thread and across threads. A warp, or an asynchronous engine, is an
*agent*. For each agent ``b`` and each agent ``a`` of the same cluster, ``seen`` holds the event up
to which everything that ``a`` did is ordered before what ``b`` does next. An access of ``a`` at
event ``e`` is ordered before ``b`` iff ``e < seen[b][a]``; and if ``e`` is below the smallest entry
of ``b``, it is ordered whoever did it. That one comparison decides almost every access.

Synchronisation is two operations: ``release`` takes a snapshot of what agents know, themselves
included; ``acquire`` joins a snapshot into what agents know. A barrier is a release by all who
arrive and an acquire by all who waited; an mbarrier phase, a cluster barrier or a completed
asynchronous operation is the same with other agents.

The lanes of one warp are one agent: races between lanes of a warp are not looked for.
"""

from __future__ import annotations

from array import array

import numpy as np

NEVER = 0xFFFF_FFFF
"""Stamp of bytes that nobody has written."""

IN_FLIGHT = 0xFFFF_0000
"""Stamps from here up (plus the agent) mark bytes that an asynchronous copy is still filling."""

LIVE_BARRIER = 0xFFFF_FFFE
"""Stamp of the bytes of an mbarrier between its initialisation and its invalidation."""

MOST_EVENTS = 1 << 22
"""Events that a wave remembers before it forgets its past: 16 MB of instruction numbers."""

Rect = tuple[int, int, int, int]  # agent rows r0:r1, CTA slots c0:c1

_NO_INSTRUCTION = 0xFFFF_FFFF


class Clocks:
    """The vector clocks of one wave.

    A *stamp* is an access as one uint32: ``event * agents + agent``. ``seen`` holds stamps too
    (``event * agents``), so that they compare directly.

    Args:
        warps: warps per CTA; agent rows ``0 … warps-1``.
        ranks: rank of each slot's CTA in its cluster, ``(R,)``.
        cluster_size: CTAs per cluster; clocks relate the agents of one cluster.
        engines: asynchronous agents per CTA; agent rows ``warps …``.
        generic: how many of them, the last ones, write by the generic proxy.
        proxies: also keep what is ordered by a proxy fence: ``seen`` then has ``agents`` more
            columns, which travel with releases and acquires (see :meth:`fence`).
        maps: the same for fences between the generic and the tensor map proxy.
        announced: also keep what warps pass on of tensor memory behind a fence, in as many.
        tensor: also keep what is ordered for accesses to tensor memory, in ``agents`` columns more:
            at least what is ordered for others, since tensor memory has fences of its own, and
            completed matrix products, which say nothing about other memory.

    Attributes:
        rows: agents per CTA.
        agents: agents per cluster: agent ``row + rank * rows``.
        columns: entries per agent in ``seen``: ``agents`` for each kind of order.
        fenced, maps, tensor: the columns of ``seen`` about fences of the async and the tensor map
            proxy, and about tensor memory; None without.
        announced: the columns of what each agent passes on as behind a ``tcgen05`` fence.
        agent: id of each row and slot, uint32 ``(rows, R)``.
        seen: uint32 ``(rows, R, agents)``; an agent's own entry is ``IN_FLIGHT``: always ordered.
        floor: uint32 ``(rows, R)``: smallest entry of each ``seen``.
    """

    def __init__(
        self,
        warps: int,
        ranks: np.ndarray,
        cluster_size: int = 1,
        engines: int = 0,
        proxies: bool = False,
        tensor: bool = False,
        announced: bool = False,
        maps: bool = False,
        generic: int = 0,
    ) -> None:
        self.rows = warps + engines
        self.agents = self.rows * cluster_size
        slots = len(ranks)
        rows = np.arange(self.rows, dtype=np.uint32)[:, None]
        self.agent = rows + ranks.astype(np.uint32)[None] * np.uint32(self.rows)
        self.columns = self.agents
        self.fenced = self._more_columns(proxies)
        self.maps = self._more_columns(maps)
        self.tensor = self._more_columns(tensor)
        self.announced = self._more_columns(announced)
        self.seen = np.zeros((self.rows, slots, self.columns), np.uint32)
        column = np.arange(self.columns, dtype=np.uint32)
        self._own = column == self.agent[..., None]
        if self.tensor is not None:
            self._own |= column == self.agent[..., None] + np.uint32(self.tensor.start)
        self._by_engine = np.zeros(self.columns, bool)
        if self.fenced is not None:
            row = column[: self.agents] % self.rows
            self._by_engine[self.fenced] = (row >= warps) & (row < self.rows - generic)
        self._restart(0)
        self._events = array("I", [_NO_INSTRUCTION])
        self._most_events = min(IN_FLIGHT // self.agents - 1, MOST_EVENTS)
        self._has_forgotten = False

    def _more_columns(self, wanted: bool) -> slice | None:
        """Columns for another kind of order behind those that there are."""
        if not wanted:
            return None
        self.columns += self.agents
        return slice(self.columns - self.agents, self.columns)

    @property
    def full(self) -> bool:
        """No event number is left: the history has to be forgotten."""
        return len(self._events) >= self._most_events

    def access(self, instruction: int) -> np.uint32:
        """Take the next event for an access by instruction ``body[instruction]``.

        Returns:
            the event's stamp without the agent.
        """
        self._events.append(instruction)
        return np.uint32((len(self._events) - 1) * self.agents)

    def instruction(self, stamp: int) -> int | None:
        """Index in the kernel's body of the instruction that made the access."""
        event = stamp // self.agents
        if event >= len(self._events) or self._events[event] == _NO_INSTRUCTION:
            return None
        return self._events[event]

    def forget(self) -> None:
        """Start a new history in which everything so far is ordered before everything to come.

        Races between the two sides are missed; nothing is reported that is not one.
        """
        self._has_forgotten = True
        del self._events[2:]
        self._restart(2 * self.agents)

    def _restart(self, limit: int) -> None:
        """Order everything before ``limit`` for everybody; the async proxy's writes need no
        proxy fence."""
        self.seen[...] = limit
        self.seen[self._own] = IN_FLIGHT
        self.seen[..., self._by_engine] = IN_FLIGHT
        self.floor = self.seen[..., : self.agents].min(axis=-1)

    def release(self, rect: Rect, members: np.ndarray | None = None) -> np.ndarray:
        """What agents know, their own accesses until now included, joined over each CTA.

        Args:
            rect: the agents, as rows and slots.
            members: bool ``(rows, slots)`` over ``rect``; None: all.

        Returns:
            snapshot, uint32 ``(slots of rect, columns)``; zeros where a slot has no member.
        """
        r0, r1, c0, c1 = rect
        self._events.append(_NO_INSTRUCTION)
        limit = np.uint32(len(self._events) * self.agents)
        known = np.where(self._own[r0:r1, c0:c1], limit, self.seen[r0:r1, c0:c1])
        if members is not None:
            known[~members] = 0
        return known.max(axis=0)

    def acquire(self, rect: Rect, snapshot: np.ndarray, members: np.ndarray | None = None) -> None:
        """Order everything in ``snapshot`` before what the agents do next.

        Args: as for :meth:`release`; ``snapshot`` broadcasts to ``(slots of rect, columns)``.
        """
        r0, r1, c0, c1 = rect
        seen = self.seen[r0:r1, c0:c1]
        if self._has_forgotten:  # a snapshot from before may be ahead of the new count
            snapshot = np.minimum(snapshot, np.uint32(len(self._events) * self.agents))
        if members is None:
            np.maximum(seen, snapshot[None], out=seen)
        else:
            np.maximum(seen, snapshot[None], out=seen, where=members[..., None])
        self.floor[r0:r1, c0:c1] = seen[..., : self.agents].min(axis=-1)

    def fence(self, rect: Rect, members: np.ndarray, columns: slice) -> None:
        """A proxy fence: what is ordered before the agents now is so for another proxy too.

        Args:
            columns: those of the proxy, ``fenced`` or ``maps``.
        """
        r0, r1, c0, c1 = rect
        self._events.append(_NO_INSTRUCTION)
        limit = np.uint32(len(self._events) * self.agents)
        seen = self.seen[r0:r1, c0:c1]
        own = self._own[r0:r1, c0:c1, : self.agents]
        known = np.where(own, limit, seen[..., : self.agents])
        fenced = seen[..., columns]
        np.maximum(fenced, known, out=fenced, where=members[..., None])
