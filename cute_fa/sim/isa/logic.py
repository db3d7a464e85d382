"""Logic, shifts and bit fields: PTX ISA sections 9.7.8 and the bit operations of 9.7.1."""

from __future__ import annotations

from typing import Any

import numpy as np

from cute_fa.sim.isa import library, pure
from cute_fa.sim.isa.types import BITS, DTYPE, INTEGERS

Array = np.ndarray
U1, U2, U4, U8 = np.uint8, np.uint16, np.uint32, np.uint64
I4 = np.int32


# --- semantics ------------------------------------------------------------------------------------


@library
def shift_left(a: Array, amount: Array) -> Array:
    """``shl``: amounts of the width and above give 0 (9.7.8.8)."""
    width = a.dtype.itemsize * 8
    shifted = a << (amount & U4(width - 1)).astype(a.dtype)
    return np.where(amount < width, shifted, a.dtype.type(0))


@library
def shift_right(a: Array, amount: Array) -> Array:
    """``shr``: amounts are clamped to the width; signed types fill with the sign (9.7.8.9)."""
    width = a.dtype.itemsize * 8
    if a.dtype.kind == "i":
        return a >> np.minimum(amount, U4(width - 1)).astype(a.dtype)
    shifted = a >> (amount & U4(width - 1)).astype(a.dtype)
    return np.where(amount < width, shifted, a.dtype.type(0))


@library
def funnel_left(a: Array, b: Array, amount: Array, wrap: bool) -> Array:
    """``shf.l``: upper word of {b,a} shifted left; wrap: amount & 31, clamp: min(32) (9.7.8.7)."""
    n = _funnel_amount(amount, wrap)
    joined = (b.astype(U8) << U8(32)) | a
    return ((joined << n) >> U8(32)).astype(U4)


@library
def funnel_right(a: Array, b: Array, amount: Array, wrap: bool) -> Array:
    """``shf.r``: lower word of {b,a} shifted right (9.7.8.7)."""
    n = _funnel_amount(amount, wrap)
    joined = (b.astype(U8) << U8(32)) | a
    return (joined >> n).astype(U4)


def _funnel_amount(amount: Array, wrap: bool) -> Array:
    limited = amount & U4(31) if wrap else np.minimum(amount, U4(32))
    return limited.astype(U8)


@library
def cnot(a: Array) -> Array:
    """``cnot``: 1 where a is 0, else 0 (9.7.8.5)."""
    return (a == 0).astype(a.dtype)


@library
def lop3(a: Array, b: Array, c: Array, table: int) -> Array:
    """``lop3``: bitwise function of three inputs by its truth table (9.7.8.6).

    Bit ``4*A + 2*B + C`` of the table is the result for input bits A, B, C.
    """
    result = (a & b & c) & U4(0)
    inputs = (a, b, c)
    for row in range(8):
        if table >> row & 1:
            terms = [x if row >> (2 - i) & 1 else ~x for i, x in enumerate(inputs)]
            result = result | (terms[0] & terms[1] & terms[2])
    return result


@library
def permute_bytes(a: Array, b: Array, selector: Array, mode: str) -> Array:
    """``prmt``: pick four bytes out of {b,a} (9.7.9.7 ``prmt``)."""
    joined = (b.astype(U8) << U8(32)) | a
    if mode == "":
        picks = [(selector >> U4(4 * i)) & U4(0xF) for i in range(4)]
    else:
        low = (selector & U4(3)).astype(np.int64)
        table = np.array(_PERMUTE_MODES[mode], U4)[low]
        picks = [table[..., i] for i in range(4)]
    result = np.zeros((), U4)
    for i, pick in enumerate(picks):
        byte = (joined >> ((pick & U4(7)).astype(U8) << U8(3))).astype(U1)
        replicate = (pick & U4(8)) != 0
        sign = (byte.view(np.int8) >> np.int8(7)).view(U1)
        result = result | (np.where(replicate, sign, byte).astype(U4) << U4(8 * i))
    return result


_PERMUTE_MODES: dict[str, list[list[int]]] = {
    "f4e": [[0, 1, 2, 3], [1, 2, 3, 4], [2, 3, 4, 5], [3, 4, 5, 6]],
    "b4e": [[0, 7, 6, 5], [1, 0, 7, 6], [2, 1, 0, 7], [3, 2, 1, 0]],
    "rc8": [[0] * 4, [1] * 4, [2] * 4, [3] * 4],
    "ecl": [[0, 1, 2, 3], [1, 1, 2, 3], [2, 2, 2, 3], [3, 3, 3, 3]],
    "ecr": [[0, 0, 0, 0], [0, 1, 1, 1], [0, 1, 2, 2], [0, 1, 2, 3]],
    "rc16": [[0, 1, 0, 1], [2, 3, 2, 3], [0, 1, 0, 1], [2, 3, 2, 3]],
}


@library
def count_ones(a: Array) -> Array:
    """``popc``: number of set bits, as u32 (9.7.1.14)."""
    x = a.astype(U8)
    x = x - ((x >> U8(1)) & U8(0x5555555555555555))
    x = (x & U8(0x3333333333333333)) + ((x >> U8(2)) & U8(0x3333333333333333))
    x = (x + (x >> U8(4))) & U8(0x0F0F0F0F0F0F0F0F)
    return ((x * U8(0x0101010101010101)) >> U8(56)).astype(U4)


@library
def leading_zeros(a: Array) -> Array:
    """``clz``: zeros above the highest set bit; the width for 0 (9.7.1.15)."""
    width = a.dtype.itemsize * 8
    x = a.astype(U8)
    for shift in (1, 2, 4, 8, 16, 32):
        x = x | (x >> U8(shift))
    return U4(width) - count_ones(x)


@library
def find_top_bit(a: Array, shift_amount: bool) -> Array:
    """``bfind``: index of the highest bit that differs from the sign; -1 if none (9.7.1.16)."""
    width = a.dtype.itemsize * 8
    unsigned = np.dtype(f"u{a.dtype.itemsize}")
    raw = np.where(a < 0, ~a, a).view(unsigned) if a.dtype.kind == "i" else a
    zeros = leading_zeros(raw)
    found = zeros if shift_amount else U4(width - 1) - zeros
    return np.where(zeros == U4(width), U4(0xFFFFFFFF), found)


@library
def reverse_bits(a: Array) -> Array:
    """``brev``: the bits in reverse order (9.7.1.18)."""
    kind = a.dtype.type
    width = a.dtype.itemsize * 8
    x = a.astype(U8)
    for shift, mask in _REVERSAL:
        x = ((x >> U8(shift)) & U8(mask)) | ((x & U8(mask)) << U8(shift))
    return (x >> U8(64 - width)).astype(kind)


_REVERSAL = (
    (1, 0x5555555555555555),
    (2, 0x3333333333333333),
    (4, 0x0F0F0F0F0F0F0F0F),
    (8, 0x00FF00FF00FF00FF),
    (16, 0x0000FFFF0000FFFF),
    (32, 0x00000000FFFFFFFF),
)


@library
def extract_field(a: Array, position: Array, length: Array) -> Array:
    """``bfe``: ``length`` bits from ``position``, sign-filled for signed types (9.7.1.19)."""
    width = a.dtype.itemsize * 8
    unsigned = np.dtype(f"u{a.dtype.itemsize}")
    pos, size = position & U4(0xFF), length & U4(0xFF)
    raw = a.view(unsigned)
    valid = _low_mask(np.minimum(size, U4(width) - np.minimum(pos, U4(width))), unsigned)
    field = shift_right(raw, pos) & valid
    if a.dtype.kind == "u":
        return field
    top = np.minimum(pos + np.maximum(size, U4(1)) - U4(1), U4(width - 1))
    sign = (raw >> top.astype(unsigned)) & unsigned.type(1)
    return np.where((sign != 0) & (size != 0), field | ~valid, field).view(a.dtype)


def _low_mask(count: Array, dtype: np.dtype) -> Array:
    """``count`` ones at the bottom, all ones from the width on."""
    ones = np.full(np.shape(count), ~dtype.type(0), dtype)
    return ~shift_left(ones, count)


@library
def insert_field(a: Array, b: Array, position: Array, length: Array) -> Array:
    """``bfi``: put the low ``length`` bits of a into b at ``position`` (9.7.1.20)."""
    pos, size = position & U4(0xFF), length & U4(0xFF)
    mask = shift_left(_low_mask(size, a.dtype), pos)
    return (b & ~mask) | (shift_left(a, pos) & mask)


@library
def find_nth_set(mask: Array, base: Array, offset: Array) -> Array:
    """``fns``: position of the n-th set bit from ``base``, upward or downward (9.7.1.17)."""
    mask, base, steps = np.broadcast_arrays(mask, base, offset.view(I4))
    out = np.full(mask.shape, 0xFFFFFFFF, U4)
    for index in np.ndindex(mask.shape):
        out[index] = _find_nth_set(int(mask[index]), int(base[index]), int(steps[index]))
    return out


def _find_nth_set(mask: int, base: int, offset: int) -> int:
    if offset == 0:
        return base if mask >> base & 1 else 0xFFFFFFFF
    position = base
    left = abs(offset)
    while 0 <= position < 32:
        if mask >> position & 1:
            left -= 1
            if left == 0:
                return position
        position += 1 if offset > 0 else -1
    return 0xFFFFFFFF


@library
def extend_from(a: Array, position: Array, wrap: bool) -> Array:
    """``szext``: sign- or zero-extend from bit ``position`` - 1 (9.7.1.21)."""
    pos = position & U4(31) if wrap else np.minimum(position, U4(32))
    unsigned = a.view(U4)
    mask = _low_mask(pos, np.dtype(U4))
    low = unsigned & mask
    if a.dtype.kind == "u":
        return low
    sign = (unsigned >> np.maximum(pos, U4(1)) - U4(1)) & U4(1)
    return np.where((sign != 0) & (pos != 0), low | ~mask, low).view(I4)


@library
def bit_mask(position: Array, count: Array, wrap: bool) -> Array:
    """``bmsk``: ``count`` ones starting at ``position`` (9.7.1.22)."""
    if wrap:
        return shift_left(_low_mask(count & U4(31), np.dtype(U4)), position & U4(31))
    size, pos = np.minimum(count, U4(32)), np.minimum(position, U4(32))
    return shift_left(_low_mask(size, np.dtype(U4)), pos)


# --- emitters -------------------------------------------------------------------------------------

_LOGIC = {"and": "bitwise_and", "or": "bitwise_or", "xor": "bitwise_xor"}


@pure("and", "or", "xor", types=(*BITS, "pred"), modifiers="")
def emit_logic(e: Any) -> None:
    """``and|or|xor.type d, a, b`` (9.7.8.1 to 9.7.8.3)."""
    dtype = DTYPE[e.type]
    e.dst(f"{_LOGIC[e.parts[0]]}({e.src(1, dtype)}, {e.src(2, dtype)})", dtype, ufunc=True)


@pure("not", types=(*BITS, "pred"), modifiers="")
def emit_not(e: Any) -> None:
    """``not.type d, a`` (9.7.8.4); on predicates too."""
    dtype = DTYPE[e.type]
    e.dst(f"invert({e.src(1, dtype)})", dtype, ufunc=True)


@pure("cnot", types=BITS, modifiers="")
def emit_cnot(e: Any) -> None:
    """``cnot.type d, a`` (9.7.8.5)."""
    dtype = DTYPE[e.type]
    e.dst(f"cnot({e.src(1, dtype)})", dtype)


@pure("lop3")
def emit_lop3(e: Any) -> None:
    """``lop3.b32 d, a, b, c, table`` or ``lop3.or|and.b32 d|p, a, b, c, table, q`` (9.7.8.6)."""
    table = e.immediate(4) & 0xFF
    call = f"lop3({e.src(1, 'u4')}, {e.src(2, 'u4')}, {e.src(3, 'u4')}, {table})"
    if len(e.operands) == 5:
        e.dst(call, "u4")
        return
    word = e.let(call)
    pair = e.operands[0]
    e.dst(word, "u4", operand=pair.first)
    nonzero = f"not_equal({word}, {e.constant(0, 'u4')})"
    joined = f"{_LOGIC[e.parts[1]]}({nonzero}, {e.src(5, 'b1')})"
    e.dst(joined, "b1", operand=pair.second)


@pure("shl", types=BITS, modifiers="")
def emit_shl(e: Any) -> None:
    """``shl.type d, a, b`` (9.7.8.8); a literal amount below the width is a plain shift."""
    _emit_shift(e, "left_shift", "shift_left", DTYPE[e.type])


@pure("shr", types=(*BITS, *INTEGERS), modifiers="")
def emit_shr(e: Any) -> None:
    """``shr.type d, a, b`` (9.7.8.9)."""
    _emit_shift(e, "right_shift", "shift_right", DTYPE[e.type])


def _emit_shift(e: Any, ufunc: str, function: str, dtype: str) -> None:
    amount = e.literal(2)
    if amount is not None and 0 <= amount < 8 * int(dtype[1]):
        e.dst(f"{ufunc}({e.src(1, dtype)}, {e.constant(amount, dtype)})", dtype, ufunc=True)
    else:
        e.dst(f"{function}({e.src(1, dtype)}, {e.src(2, 'u4')})", dtype)


@pure("shf")
def emit_shf(e: Any) -> None:
    """``shf.l|r.wrap|clamp.b32 d, a, b, c`` (9.7.8.7)."""
    function = "funnel_left" if e.parts[1] == "l" else "funnel_right"
    arguments = f"{e.src(1, 'u4')}, {e.src(2, 'u4')}, {e.src(3, 'u4')}"
    e.dst(f"{function}({arguments}, {e.parts[2] == 'wrap'})", "u4")


@pure("prmt")
def emit_prmt(e: Any) -> None:
    """``prmt.b32{.mode} d, a, b, c`` (9.7.9.7)."""
    mode = e.parts[2] if len(e.parts) > 2 else ""
    arguments = f"{e.src(1, 'u4')}, {e.src(2, 'u4')}, {e.src(3, 'u4')}"
    e.dst(f"permute_bytes({arguments}, {mode!r})", "u4")


@pure("popc", "clz", types=("b32", "b64"))
def emit_count(e: Any) -> None:
    """``popc|clz.type d, a``: the result is always 32 bits (9.7.1.14, 9.7.1.15)."""
    function = "count_ones" if e.parts[0] == "popc" else "leading_zeros"
    e.dst(f"{function}({e.src(1, DTYPE[e.type])})", "u4")


@pure("bfind", types=("u32", "s32", "u64", "s64"))
def emit_bfind(e: Any) -> None:
    """``bfind{.shiftamt}.type d, a`` (9.7.1.16)."""
    e.dst(f"find_top_bit({e.src(1, DTYPE[e.type])}, {'shiftamt' in e.parts})", "u4")


@pure("brev", types=("b32", "b64"))
def emit_brev(e: Any) -> None:
    """``brev.type d, a`` (9.7.1.18)."""
    dtype = DTYPE[e.type]
    e.dst(f"reverse_bits({e.src(1, dtype)})", dtype)


@pure("bfe", types=("u32", "s32", "u64", "s64"))
def emit_bfe(e: Any) -> None:
    """``bfe.type d, a, pos, len`` (9.7.1.19)."""
    dtype = DTYPE[e.type]
    e.dst(f"extract_field({e.src(1, dtype)}, {e.src(2, 'u4')}, {e.src(3, 'u4')})", dtype)


@pure("bfi", types=("b32", "b64"))
def emit_bfi(e: Any) -> None:
    """``bfi.type d, a, b, pos, len`` (9.7.1.20)."""
    dtype = DTYPE[e.type]
    first = f"{e.src(1, dtype)}, {e.src(2, dtype)}"
    e.dst(f"insert_field({first}, {e.src(3, 'u4')}, {e.src(4, 'u4')})", dtype)


@pure("fns", types=("b32",))
def emit_fns(e: Any) -> None:
    """``fns.b32 d, mask, base, offset`` (9.7.1.17)."""
    e.dst(f"find_nth_set({e.src(1, 'u4')}, {e.src(2, 'u4')}, {e.src(3, 'u4')})", "u4")


@pure("szext", types=("u32", "s32"))
def emit_szext(e: Any) -> None:
    """``szext.wrap|clamp.type d, a, b`` (9.7.1.21)."""
    dtype = DTYPE[e.type]
    e.dst(f"extend_from({e.src(1, dtype)}, {e.src(2, 'u4')}, {e.parts[1] == 'wrap'})", dtype)


@pure("bmsk", types=("b32",))
def emit_bmsk(e: Any) -> None:
    """``bmsk.wrap|clamp.b32 d, a, b`` (9.7.1.22)."""
    e.dst(f"bit_mask({e.src(1, 'u4')}, {e.src(2, 'u4')}, {e.parts[1] == 'wrap'})", "u4")
