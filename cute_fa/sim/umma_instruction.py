"""tcgen05 instruction descriptors: types, shapes and signs of a product (PTX ISA 9.7.16.4.2).

Three formats of 32 bits: one for the kinds without block scaling, one for ``mxf8f6f4``, one for
``mxf4`` and ``mxf4nvf4``. ``faults`` holds a decoded descriptor against the tables of shapes
(9.7.16.2.1), of transposition and negation (9.7.16.10.1) and of scale factors (9.7.16.10.7.1).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

_FLOAT8 = {0: "e4m3", 1: "e5m2", 3: "e2m3", 4: "e3m2", 5: "e2m1"}
_INPUTS: dict[str, dict[int, str]] = {
    "f16": {0: "f16", 1: "bf16"},
    "tf32": {2: "tf32"},
    "f8f6f4": _FLOAT8,
    "i8": {0: "u8", 1: "s8"},
    "mxf8f6f4": _FLOAT8,
    "mxf4": {1: "e2m1"},
    "mxf4nvf4": {1: "e2m1"},
}
_OUTPUTS: dict[str, dict[int, str]] = {
    "f16": {0: "f16", 1: "f32"},
    "tf32": {1: "f32"},
    "f8f6f4": {0: "f16", 1: "f32"},
    "i8": {2: "s32"},
}
DEPTH = {"f16": 16, "tf32": 8, "f8f6f4": 32, "i8": 32, "mxf8f6f4": 32, "mxf4": 64, "mxf4nvf4": 64}
"""K of the dense product of each kind; 96 with bit 31 of the 4-bit kinds."""

BLOCK_SCALED = frozenset(("mxf8f6f4", "mxf4", "mxf4nvf4"))
PACKED4 = frozenset(("mxf4", "mxf4nvf4"))

_SCALES: dict[str, dict[int, tuple[str, ...]]] = {
    "mxf8f6f4": {1: ("ue8m0",)},
    "mxf4": {2: ("ue8m0",)},
    "mxf4nvf4": {2: ("ue8m0",), 4: ("ue8m0", "ue4m3")},
}


@dataclass(frozen=True)
class InstructionDescriptor:
    """A decoded instruction descriptor.

    Attributes:
        kind: as in ``.kind::``; d, a, b: element types, "?" for a code that is not defined.
        m, n, k: shape over the whole CTA pair.
        scale: type of the scale factors, or None; a_scale, b_scale: their sub-column ids.
        max_shift: largest column shift of ``.ws``: 0, 8, 16 or 32.
        reserved: bits that are set and must not be.
    """

    kind: str
    m: int
    n: int
    k: int
    d: str
    a: str
    b: str
    negate_a: bool
    negate_b: bool
    transpose_a: bool
    transpose_b: bool
    sparse: bool
    saturate: bool = False
    scale: str | None = None
    a_scale: int = 0
    b_scale: int = 0
    max_shift: int = 0
    reserved: int = 0

    @property
    def sign(self) -> int:
        """Of the product."""
        return -1 if self.negate_a != self.negate_b else 1

    def faults(self, *, pair: bool, ws: bool, scale_vector: int = 0) -> list[str]:
        """Everything that the ISA does not allow, but for reserved bits.

        Args:
            pair: ``.cta_group::2``; ws: ``.ws``.
            scale_vector: N of ``.scale_vec::NX``; 0 without block scaling.
        """
        found = []
        if "?" in (self.d, self.a, self.b):
            found.append(f"undefined element types (D {self.d}, A {self.a}, B {self.b})")
        if self.d == "f16" and "bf16" in (self.a, self.b):
            found.append("f16 accumulators with bf16 inputs")
        found += self._shape_faults(pair, ws)
        found += self._operand_faults(pair)
        if self.kind in BLOCK_SCALED:
            found += self._scale_faults(scale_vector)
        if self.max_shift and not ws:
            found.append("a maximum shift (bits 30-31) without .ws")
        return found

    def _shape_faults(self, pair: bool, ws: bool) -> list[str]:
        scaled = self.kind in BLOCK_SCALED
        if ws and (pair or scaled):
            return [".ws with .cta_group::2 or with block scaling"]
        if ws:
            rows: tuple[int, ...] = (32, 64, 128)
        elif pair:
            rows = (128, 256)
        else:
            rows = (128,) if scaled else (64, 128)
        found = []
        if self.m not in rows:
            found.append(f"M = {self.m}, expected one of {rows}")
        step = (32 if self.kind == "i8" else 16) if pair else 8
        legal = step <= self.n <= 256 and self.n % step == 0
        if ws:
            legal = self.n in (64, 128, 256)
        elif self.kind == "i8" and not pair and self.n > 32:
            legal = legal and self.n % 16 == 0
        if not legal:
            found.append(f"N = {self.n}")
        return found

    def _operand_faults(self, pair: bool) -> list[str]:
        found = []
        if self.kind == "i8" and (self.negate_a or self.negate_b):
            found.append("negated integers")
        if self.saturate and self.kind != "i8":
            found.append("saturation (bit 3) of floats")
        for name, kind, transposed in (
            ("A", self.a, self.transpose_a),
            ("B", self.b, self.transpose_b),
        ):
            if transposed and kind in ("e2m3", "e3m2", "e2m1"):
                found.append(f"a transposed {name} of {kind}")
        if self.transpose_b and self.kind in ("f8f6f4", "mxf8f6f4", "i8"):
            step = 32 if pair else 16
            if self.n % step:
                found.append(
                    f"N = {self.n} with a transposed 8-bit B, expected a multiple of {step}"
                )
        return found

    def _scale_faults(self, scale_vector: int) -> list[str]:
        found = []
        legal = _SCALES[self.kind]
        if scale_vector not in legal:
            found.append(f".scale_vec::{scale_vector}X with .kind::{self.kind}")
        elif self.scale not in legal[scale_vector]:
            found.append(f"scale factors of {self.scale} with .scale_vec::{scale_vector}X")
        for name, number in (("A", self.a_scale), ("B", self.b_scale)):
            if scale_vector in (2, 4) and (number % 2 or (scale_vector == 4 and number)):
                found.append(f"scale factor id {number} of {name} with .scale_vec::{scale_vector}X")
        return found


@lru_cache(maxsize=1024)
def decode(bits: int, kind: str) -> InstructionDescriptor:
    """Decode 32 bits for an instruction of ``.kind::kind``."""
    common: dict[str, Any] = {
        "kind": kind,
        "n": (bits >> 17 & 63) << 3,
        "sparse": bool(bits >> 2 & 1),
        "negate_a": bool(bits >> 13 & 1),
        "negate_b": bool(bits >> 14 & 1),
        "transpose_a": bool(bits >> 15 & 1),
        "transpose_b": bool(bits >> 16 & 1),
        "a": _INPUTS[kind].get(bits >> 7 & 7, "?"),
    }
    if kind not in BLOCK_SCALED:
        return InstructionDescriptor(
            **common,
            m=(bits >> 24 & 31) << 4,
            k=DEPTH[kind],
            d=_OUTPUTS[kind].get(bits >> 4 & 3, "?"),
            b=_INPUTS[kind].get(bits >> 10 & 7, "?"),
            saturate=bool(bits >> 3 & 1),
            max_shift=(0, 8, 16, 32)[bits >> 30 & 3],
            reserved=bits & (1 << 6 | 1 << 23 | 1 << 29),
        )
    packed = kind in PACKED4
    scale = "ue8m0" if bits >> 23 & 1 else "ue4m3"
    reserved = 0b11 | 1 << 3 | 1 << 6 | 0b111 << 24
    reserved |= (1 << 12 | 0b11 << 15) if packed else 1 << 31
    return InstructionDescriptor(
        **common,
        m=(bits >> 27 & 3) << 7,
        k=96 if packed and bits >> 31 else DEPTH[kind],
        d="f32",
        b=_INPUTS[kind].get(bits >> 10 & (3 if packed else 7), "?"),
        scale=scale,
        a_scale=bits >> 29 & 3,
        b_scale=bits >> 4 & 3,
        reserved=bits & reserved,
    )
