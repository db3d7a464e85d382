"""The clusters of a grid that have not been started: cluster launch control takes them away.

A running CTA may cancel the launch of a cluster and do its work itself (PTX ISA 9.7.13.17). Every
cluster of a grid is either started or cancelled, once.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from cute_fa.ptx import Kernel

_REFUSAL = 0.2  # of the requests that could be granted, under the random policy

Corner = tuple[int, int, int]


@lru_cache(maxsize=64)
def cancels(kernel: Kernel) -> bool:
    """Whether a kernel asks for clusters that have not been started."""
    return any(instr.opcode.startswith("clusterlaunchcontrol.try_cancel") for instr in kernel.body)


class PendingGrid:
    """The clusters that are neither started nor cancelled, by blockIdx of their first CTA.

    Args:
        waves: blockIdx of the CTAs of each wave, ``(R, 3)``, whole clusters in rank order.
        cluster: CTAs in a cluster.
    """

    def __init__(self, waves: Sequence[np.ndarray], cluster: int) -> None:
        self._cluster = cluster
        self._pending: dict[Corner, None] = {
            _corner(ids[start]): None for ids in waves for start in range(0, len(ids), cluster)
        }

    def __len__(self) -> int:
        return len(self._pending)

    def start(self, cta_ids: np.ndarray) -> np.ndarray:
        """Start the clusters of a wave that have not been cancelled; returns their CTAs."""
        clusters = cta_ids.reshape(-1, self._cluster, 3)
        kept = [ids for ids in clusters if _corner(ids[0]) in self._pending]
        for ids in kept:
            del self._pending[_corner(ids[0])]
        return np.concatenate(kept) if kept else cta_ids[:0]

    def cancel(self, rng: np.random.Generator | None) -> Corner | None:
        """Cancel a cluster: the next one, or with ``rng`` any one, or none."""
        if not self._pending or (rng is not None and rng.random() < _REFUSAL):
            return None
        index = 0 if rng is None else int(rng.integers(len(self._pending)))
        corner = list(self._pending)[index]
        del self._pending[corner]
        return corner


def _corner(cta_id: np.ndarray) -> Corner:
    x, y, z = (int(i) for i in cta_id)
    return x, y, z
