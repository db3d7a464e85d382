"""Zero-column masks of ``tcgen05.mma.ws`` (PTX ISA 9.7.16.4.3)."""

from __future__ import annotations

from functools import lru_cache

import numpy as np


@lru_cache(maxsize=256)
def zero_columns(bits: int, m: int, n: int) -> bytes | None:
    """The columns of B that count as zero, as ``n`` bytes of 0 and 1; None for none.

    The mask has 128 / m sub-masks. Each is a sequence of runs of ones and zeros in turn; it begins
    with ones if its *first span* bit is set, and its first *start count* elements are skipped. Runs
    of ones (columns left out) are one longer than *skip span*, runs of zeros (columns used) one
    longer than *use span*: so the ISA's examples have it.
    """
    if not bits >> 39 & 1:
        return None
    ones, zeros = (bits >> 40 & 0xFF) + 1, (bits >> 48 & 0xFF) + 1
    parts = 128 // m
    width = n // parts
    masks = []
    for part in range(parts):
        start = bits >> 8 * part & 0xFF
        first = bits >> (32 + part) & 1
        position = np.arange(start, start + width) % (ones + zeros)
        masks.append(position < ones if first else position >= zeros)
    return np.concatenate(masks).tobytes()
