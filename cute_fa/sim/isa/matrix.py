"""Warp-level matrix instructions: ``ldmatrix``, ``stmatrix``, ``movmatrix``, ``mma.sync``.

PTX ISA 9.7.14.5; block scaling is in :mod:`cute_fa.sim.isa.block_scaled`, matrices of bytes in
:mod:`cute_fa.sim.isa.matrix_bytes`. All warps go through one numpy operation. Products of
``mma.sync`` are exact in float32 and summed in float32 (float64 for f64), accumulators last; the
hardware's order of summation and its truncation are not specified and not reproduced.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from cute_fa import ptx
from cute_fa.sim import accesses, fragments
from cute_fa.sim.isa import Decoded, Mask, effect, register_names
from cute_fa.sim.memory import WORDS

if TYPE_CHECKING:
    from cute_fa.sim.wave import BlockContext

ROW_BYTES = 16
_LANES = np.arange(32)


def addressing_lanes(which: np.ndarray | None, mask: Mask, shape: tuple[int, ...]) -> Mask:
    """The lanes of ``mask`` whose addresses count: ``which`` of a warp's, or all."""
    if which is None:
        return mask
    return np.broadcast_to(which if mask is None else mask & which, shape)


class _MatrixAccess(Decoded):
    """``ldmatrix`` and ``stmatrix``: ``count`` core matrices; lanes 8j … 8j+7 address matrix j."""

    collective = True

    def __init__(self, instr: ptx.Instr, kernel: ptx.Kernel) -> None:
        super().__init__(instr, kernel)
        parts = instr.parts
        counts = [part for part in parts if part in ("x1", "x2", "x4")]
        if len(counts) != 1 or "m8n8" not in parts or parts[-1] != "b16":
            raise self.unsupported("only m8n8 matrices of b16, x1, x2 or x4")
        self.space = accesses.space_of(parts)
        if self.space not in ("shared", "generic"):
            raise self.unsupported(f"state space {self.space}")
        self.count = int(counts[0][1:])
        self.transposed = "trans" in parts
        self._addressing = None if self.count == 4 else 8 * self.count > _LANES

    def lanes(self, mask: Mask, shape: tuple[int, ...]) -> Mask:
        """The lanes whose addresses count."""
        return addressing_lanes(self._addressing, mask, shape)

    def count_bytes(self, ctx: BlockContext, addresses: np.ndarray, mask: Mask, way: str) -> None:
        w, c, _ = addresses.shape
        warps = w * c if mask is None else int(np.count_nonzero(mask.any(axis=-1)))
        ctx.counters.add(f"shared_bytes_{way}", warps * self.count * 8 * ROW_BYTES)


@effect("ldmatrix")
class LdMatrix(_MatrixAccess):
    """``ldmatrix.sync.aligned.m8n8.xN{.trans}.shared.b16`` (PTX ISA 9.7.14.5.15)."""

    counter_class = "ldmatrix"

    def __init__(self, instr: ptx.Instr, kernel: ptx.Kernel) -> None:
        super().__init__(instr, kernel)
        self.dests = register_names(instr.operands[0])
        if len(self.dests) != self.count:
            raise self.unsupported(f"{len(self.dests)} registers for {self.count} matrices")
        self.sources = instr.operands[1:2]

    def run(self, ctx: BlockContext, mask: Mask, *sources: Any) -> tuple[np.ndarray, ...]:
        (addresses,) = sources
        lanes = self.lanes(mask, addresses.shape)
        self.count_bytes(ctx, addresses, mask, "read")
        rows = ctx.subsystem("shared").load(ctx, addresses, ROW_BYTES, lanes)
        words = rows.view(np.uint32).reshape(*rows.shape[:2], 4, 32)[:, :, : self.count]
        if self.transposed:
            words = fragments.transpose_core(words)
        return tuple(words[:, :, j] for j in range(self.count))


@effect("stmatrix")
class StMatrix(_MatrixAccess):
    """``stmatrix.sync.aligned.m8n8.xN{.trans}.shared.b16`` (PTX ISA 9.7.14.5.16)."""

    counter_class = "stmatrix"

    def __init__(self, instr: ptx.Instr, kernel: ptx.Kernel) -> None:
        super().__init__(instr, kernel)
        self.sources = instr.operands[:2]

    def run(self, ctx: BlockContext, mask: Mask, *sources: Any) -> None:
        addresses, values = sources
        values = values if isinstance(values, tuple) else (values,)
        words = np.zeros((*addresses.shape[:2], 4, 32), np.uint32)
        for j, value in enumerate(values):
            words[:, :, j] = value
        if self.transposed:
            words = fragments.transpose_core(words)
        rows = words.reshape(*addresses.shape, 4).view(WORDS[ROW_BYTES])[..., 0]
        lanes = self.lanes(mask, addresses.shape)
        self.count_bytes(ctx, addresses, mask, "written")
        ctx.subsystem("shared").store(ctx, addresses, ROW_BYTES, rows, lanes)


@effect("movmatrix")
class MovMatrix(Decoded):
    """``movmatrix.sync.aligned.m8n8.trans.b16 d, a``: transpose in registers (9.7.14.5.17)."""

    counter_class = "ldmatrix"
    collective = True

    def __init__(self, instr: ptx.Instr, kernel: ptx.Kernel) -> None:
        super().__init__(instr, kernel)
        self.dests = register_names(instr.operands[0])
        self.sources = instr.operands[1:2]

    def run(self, ctx: BlockContext, mask: Mask, *sources: Any) -> tuple[np.ndarray]:
        return (fragments.transpose_core(sources[0]),)


@dataclass(frozen=True)
class MmaForm:
    """What an ``mma.sync`` opcode says: shape, types of D, A, B and C, saturation.

    ``a_registers`` and ``b_registers`` count 32-bit registers (64-bit for f64).
    """

    m: int
    n: int
    k: int
    d: str
    a: str
    b: str
    c: str
    saturate: bool

    @property
    def a_registers(self) -> int:
        return self.m // 8 * self.b_registers

    @property
    def b_registers(self) -> int:
        return self.k // (4 * fragments.ELEMENTS_PER_REGISTER[self.b])

    @property
    def d_registers(self) -> int:
        """Registers of D, and of C."""
        return self.m // 8 * (1 if self.d == "f16" else 2)

    @property
    def operand_types(self) -> str:
        """The type of A and B, or both if they differ."""
        a, b = (kind.removesuffix("_padded") for kind in (self.a, self.b))
        return a if a == b else f"{a}.{b}"

    @property
    def flops(self) -> int:
        """Multiply-adds of one warp, times two."""
        return 2 * self.m * self.n * self.k


_SHAPES: dict[str, tuple[str, ...]] = {
    "f16": ("m16n8k8", "m16n8k16"),
    "bf16": ("m16n8k8", "m16n8k16"),
    "tf32": ("m16n8k4", "m16n8k8"),
    "f64": ("m8n8k4", "m16n8k4", "m16n8k8", "m16n8k16"),
    "int8": ("m8n8k16", "m16n8k16", "m16n8k32"),
    "int4": ("m8n8k32", "m16n8k32", "m16n8k64"),
    "fp8": ("m16n8k16", "m16n8k32"),
    "f8f6f4": ("m16n8k32",),
}
_FAMILY = {"s8": "int8", "u8": "int8", "s4": "int4", "u4": "int4", "e4m3": "fp8", "e5m2": "fp8"}
SMALL_FLOATS = ("e4m3", "e5m2", "e3m2", "e2m3", "e2m1")
_ACCUMULATORS: dict[str, tuple[str, ...]] = {
    "f16": ("f16", "f32"),
    "bf16": ("f32",),
    "tf32": ("f32",),
    "f64": ("f64",),
    "int8": ("s32",),
    "int4": ("s32",),
    "fp8": ("f16", "f32"),
    "f8f6f4": ("f16", "f32"),
}
_FLAGS = frozenset(("mma", "sync", "aligned", "row", "col", "satfinite", "kind::f8f6f4"))


def mma_form(instr: ptx.Instr) -> MmaForm | None:
    """The form of an ``mma.sync``; None if it is not one that the simulator computes."""
    parts = instr.parts
    shape = next((part for part in parts if re.fullmatch(r"m\d+n\d+k\d+", part)), None)
    types = [p for p in parts if p in fragments.DECODERS or p in ("f32", "s32")]
    if shape is None or len(types) != 4 or set(parts) - _FLAGS - {shape, *types}:
        return None
    d, a, b, c = types
    if "kind::f8f6f4" in parts:
        if a not in SMALL_FLOATS or b not in SMALL_FLOATS:
            return None
        a, b, family = in_bytes(a), in_bytes(b), "f8f6f4"
    else:
        family = _FAMILY.get(a, a)
        if _FAMILY.get(b, b) != family:
            return None
    if shape not in _SHAPES.get(family, ()):
        return None
    if d != c or d not in _ACCUMULATORS[family]:
        return None
    if [part for part in parts if part in ("row", "col")] != ["row", "col"]:
        return None
    m, n, k = (int(x) for x in re.findall(r"\d+", shape))
    return MmaForm(m, n, k, d, a, b, c, "satfinite" in parts)


def in_bytes(kind: str) -> str:
    """The operand type of a small float that lies in a byte each (``kind::f8f6f4``)."""
    return "e2m1_padded" if kind == "e2m1" else kind


def multiply(form: MmaForm, a: list[Any], b: list[Any], c: list[Any]) -> list[np.ndarray]:
    """D = A B + C on registers ``(w, c, 32)``.

    Args:
        a, b: uint32 registers (uint64 for f64) in the instruction's order.
        c: float32, float64 or int32 registers; uint32 pairs for f16.

    Returns:
        D's registers, as ``c``.
    """
    left = fragments.operand_matrix(fragments.operand_grid(a, form.m // 8), form.a)
    right = fragments.operand_matrix(fragments.operand_grid(b, 1), form.b)
    products = fragments.split_accumulators(np.matmul(left, right.swapaxes(-1, -2)))
    return accumulate(form, products, c)


def accumulate(form: MmaForm, products: list[np.ndarray], c: list[Any]) -> list[np.ndarray]:
    """Add C to a product, in the accumulator's type and register order."""
    if form.d == "f16":
        addends = fragments.unpack_halves(c)
        return fragments.pack_halves([p + x for p, x in zip(products, addends, strict=True)])
    if form.d == "s32":
        sums = [p.astype(np.int64) + x for p, x in zip(products, c, strict=True)]
        if form.saturate:
            limit = np.iinfo(np.int32)
            sums = [np.clip(x, limit.min, limit.max) for x in sums]
        return [x.astype(np.int32) for x in sums]
    return [p + x for p, x in zip(products, c, strict=True)]


@effect("mma.sync")
class Mma(Decoded):
    """``mma.sync.aligned.<shape>.row.col.<d>.<a>.<b>.<c>`` (PTX ISA 9.7.14.5.14)."""

    counter_class = "mma"
    collective = True

    def __init__(self, instr: ptx.Instr, kernel: ptx.Kernel) -> None:
        super().__init__(instr, kernel)
        form = mma_form(instr)
        if form is None:
            raise self.unsupported("shape or types")
        self.form = form
        self.dests = register_names(instr.operands[0])
        self.sources = instr.operands[1:4]
        accumulator = {"f16": np.uint32, "f32": np.float32, "f64": np.float64, "s32": np.int32}
        word = np.dtype(np.uint64 if form.a == "f64" else np.uint32)
        self.source_dtypes = (word, word, np.dtype(accumulator[form.c]))
        self.dest_dtypes = [np.dtype(accumulator[form.d])] * form.d_registers
        given = [len(o.items) if isinstance(o, ptx.Vector) else 1 for o in instr.operands]
        if given != [form.d_registers, form.a_registers, form.b_registers, form.d_registers]:
            raise self.unsupported(f"{given} registers")
        self.static_counts = {f"mma_flops.{form.operand_types}": form.flops}

    def run(self, ctx: BlockContext, mask: Mask, *sources: Any) -> tuple[np.ndarray, ...]:
        a, b, c = ([*x] if isinstance(x, tuple) else [x] for x in sources)
        return tuple(multiply(self.form, a, b, c))
