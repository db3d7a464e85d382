"""What tests of tcgen05 products share: kernels that issue them, and brute force from the ISA.

The kernels have no ``tcgen05.alloc`` and ``tcgen05.ld``: tensor memory is filled before the launch
and looked at afterwards, so that these tests speak of the products alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import numpy as np

from cute_fa.sim.isa import minifloat
from cute_fa.sim.tensor_memory import TensorMemory
from cute_fa.sim.umma_descriptors import SharedDescriptor
from cute_fa.sim.wave import Wave
from tests.sim.test_wgmma import BYTES, FILL, READY, SMEM, place, random_bytes, values_of
from tests.sim.tiny import Result, run

BASE = 1024  # of the dynamic shared memory
A_AT, B_AT = 0, 32768
BARRIER = SMEM  # offset of the mbarrier behind the operands
SMALL = {"e2m3": 6, "e3m2": 6, "e2m1": 4}  # bits of elements below a byte
CODES = {
    "f16": {"f16": 0, "bf16": 1},
    "tf32": {"tf32": 2},
    "f8f6f4": {"e4m3": 0, "e5m2": 1, "e2m3": 3, "e3m2": 4, "e2m1": 5},
    "i8": {"u8": 0, "s8": 1},
}
CODES["mxf8f6f4"] = CODES["f8f6f4"]
CODES["mxf4"] = CODES["mxf4nvf4"] = {"e2m1": 1}
OUTPUTS = {"f16": 0, "f32": 1, "s32": 2}


def instruction(
    kind: str, m: int, n: int, a: str, b: str, d: str = "f32", *, transpose: str = "", **bits: int
) -> int:
    """An instruction descriptor (PTX ISA 9.7.16.4.2); ``transpose`` names A, B or both."""
    value = CODES[kind][a] << 7 | CODES[kind][b] << 10 | n >> 3 << 17
    value |= ("A" in transpose) << 15 | ("B" in transpose) << 16
    if kind.startswith("mx"):
        value |= m >> 7 << 27 | bits.pop("ue8m0", 1) << 23
        value |= bits.pop("b_scale", 0) << 4 | bits.pop("a_scale", 0) << 29
    else:
        value |= m >> 4 << 24 | OUTPUTS[d] << 4
    for position in bits.values():
        value |= 1 << position
    return value


def tile(
    at: int, swizzle: int, transposed: bool, rows: int, *, atom: int = 16, k_bytes: int = 32
) -> SharedDescriptor:
    """A canonical tile: its atoms along the rows first."""
    if not swizzle:
        return SharedDescriptor(BASE + at, 128 * (rows // 8) + 128, 128)
    lines = 8 * 16 // atom
    leading = 16 if not transposed else lines * swizzle * 8
    return SharedDescriptor(BASE + at, leading, lines * swizzle, 0, swizzle, atom)


def address(desc: SharedDescriptor, row: int, k: int, size: int, transposed: bool) -> int:
    """Shared address of one element (canonical layouts, element by element)."""
    if desc.atom == 16:
        return place(desc, row, k, size, transposed)
    wide = 128 // size
    offset = row % wide * size + row // wide * desc.leading + k % 4 * 128 + k // 4 * desc.stride
    where = desc.start + offset
    return where ^ (where >> 7 & 3) << 5


def small_element(image: np.ndarray, kind: str, base: int, index: int, packed: bool) -> float:
    """Element ``index`` of a run of 4- or 6-bit elements that begins at ``base``."""
    bits = SMALL[kind]
    if packed:
        position = index * bits
    else:
        position = index // 16 * 128 + index % 16 * bits
    word = int.from_bytes(image[base : base + 64].tobytes(), "little")
    return float(minifloat.decode(np.array(word >> position & (1 << bits) - 1), kind))


def matrix(
    image: np.ndarray, kind: str, desc: SharedDescriptor, rows: int, transposed: bool, k: int
) -> np.ndarray:
    """An operand, element by element: float64 ``(rows, k)``."""
    out = np.empty((rows, k))
    for row in range(rows):
        for column in range(k):
            if kind in SMALL:
                packed = k == 64
                per_chunk = 32 if packed else 16
                chunk = address(desc, row, column // per_chunk * 16, 1, False) - BASE
                rest = column % per_chunk
                out[row, column] = small_element(image, kind, chunk, rest, packed)
            else:
                size = BYTES[kind]
                at = address(desc, row, column, size, transposed) - BASE
                out[row, column] = values_of(kind, image[at : at + size])[0]
    return out


def image_of(a: str, b: str, seed: int = 1) -> np.ndarray:
    """Shared memory: A's bytes, then B's."""
    rng = np.random.default_rng(seed)
    parts = []
    for number, kind in enumerate((a, b)):
        if kind in SMALL:
            parts.append(rng.integers(0, 256, SMEM, np.uint8))
        else:
            parts.append(random_bytes(kind, SMEM, seed + number))
    return np.concatenate([parts[0][:B_AT], parts[1][B_AT:]])


def cell(m: int, n: int, row: int, column: int, *, pair: bool, ws: bool) -> tuple[int, int, int]:
    """(CTA, lane, column) of an element of D (9.7.16.10.5; lanes of layout F begin at 0)."""
    rows = m // 2 if pair else m
    cta, r = divmod(row, rows)
    if rows == 128:
        return cta, r, column
    if rows == 64 and not pair and not ws:
        return cta, r // 16 * 32 + r % 16, column
    count = 128 // rows
    return cta, r + rows * (column // (n // count)), column % (n // count)


def accumulators(cells: np.ndarray, m: int, n: int, d: str, column: int = 0, **how: bool):
    """D out of tensor memory ``(R, 512, 128)``, element by element: float64 ``(m, n)``."""
    out = np.empty((m, n))
    for row in range(m):
        for j in range(n):
            cta, lane, at = cell(m, n, row, j, pair=how.get("pair", False), ws=how.get("ws", False))
            word = cells[cta, column + at, lane : lane + 1].copy()
            if d == "f16":
                out[row, j] = word.view(np.float16)[0]
            else:
                out[row, j] = word.view(np.int32 if d == "s32" else np.float32)[0]
    return out


@contextmanager
def tensor_memory(before: np.ndarray | None = None) -> Iterator[list[np.ndarray]]:
    """All columns allocated, filled with ``before``; yields a list that gets the cells' state."""
    seen: list[np.ndarray] = []
    start = TensorMemory.on_wave_start

    def begin(self: TensorMemory, wave: Wave) -> None:
        start(self, wave)
        self.allocated[...] = True
        self.cells[...] = 0 if before is None else before
        seen.append(self.cells)

    with patch.object(TensorMemory, "on_wave_start", begin):
        yield seen


SETUP = f"""
setp.eq.u32 %p1, %tid, 0;
@%p1 mbarrier.init.shared.b64 [%smem+{BARRIER}], 1;
@%p1 fence.mbarrier_init.release.cluster;
mov.u32 %r20, 0;
setp.ne.u32 %p2, %r20, 0;
setp.eq.u32 %p3, %r20, 0;
"""
WAIT = f"""
WAIT:
mbarrier.try_wait.parity.shared.b64 %p4, [%smem+{BARRIER}], 0;
@!%p4 bra WAIT;
"""


def commit(group: int = 1) -> str:
    return (
        f"add.u32 %r21, %smem, {BARRIER};\n"
        f"@%p1 tcgen05.commit.cta_group::{group}.mbarrier::arrive::one.shared::cluster.b64 [%r21];"
    )


def mma(
    kind: str,
    idesc: int,
    a: str,
    b: int,
    *,
    d: int | str = 0,
    accumulate: bool = False,
    group: int = 1,
    more: str = "",
    tail: str = "",
    form: str = "",
) -> str:
    """One product by thread 0; ``a`` is a descriptor's number, or the register of an address."""
    left = f"[{a}]" if a.startswith("%") else "%rd20"
    first = "" if a.startswith("%") else f"mov.u64 %rd20, {a};\n"
    enable = "%p3" if accumulate else "%p2"
    return (
        f"{first}mov.u64 %rd21, {b};\nmov.u32 %r22, {d};\nmov.u32 %r23, {idesc};\n"
        f"@%p1 tcgen05.mma{form}.cta_group::{group}.kind::{kind} "
        f"[%r22], {left}, %rd21, %r23, {more}{enable}{tail};\n"
    )


LEADER = """
setp.eq.and.u32 %p1, %r30, 0, %p1;
barrier.cluster.arrive.aligned;
barrier.cluster.wait.aligned;
"""
"""Makes ``%p1`` thread 0 of the first CTA; both CTAs' operands are there."""


def end(group: int) -> str:
    """Commit, wait for it in the first CTA, and let the others wait for that."""
    first = "setp.eq.u32 %p5, %r30, 0;\n@!%p5 bra DONE;\n"
    all_done = "DONE:\nbarrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;\n"
    return commit(group) + first + WAIT + all_done


def launch(body: str, image: np.ndarray, *, ctas: int = 1, **options: object) -> Result:
    """Fill each CTA's shared memory with its part of the image and run the body.

    The body finds thread 0 in ``%p1`` and its rank in ``%r30``.
    """
    settings: dict[str, object] = {"arch": "sm_100a", "threads": 128, "smem_bytes": SMEM + 64}
    settings |= {"cluster": ctas, "ctas": ctas, "checks": False, **options}
    own = f"mov.u32 %r30, %cluster_ctarank;\nmul.wide.u32 %rd9, %r30, {SMEM};\n"
    own += "add.s64 %in0, %in0, %rd9;\n"
    return run(own + FILL + SETUP + READY + body, image, **settings)  # type: ignore[arg-type]
