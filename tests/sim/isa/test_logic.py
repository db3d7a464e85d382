"""Logic, shifts and bit fields against Python's integers and the ISA's pseudocode."""

import numpy as np
import pytest

from tests.sim.isa.evaluate import combinations, evaluate

DTYPES = {16: np.uint16, 32: np.uint32, 64: np.uint64}
WORDS = {
    16: [0, 1, 0x8000, 0xFFFF, 0x1234, 0x7FFF],
    32: [0, 1, 0x80000000, 0xFFFFFFFF, 0x12345678, 0x7FFFFFFF, 0x00FF00FF],
    64: [0, 1, 1 << 63, (1 << 64) - 1, 0x123456789ABCDEF0, (1 << 63) - 1, 1 << 32],
}
AMOUNTS = [0, 1, 5, 15, 16, 17, 31, 32, 33, 63, 64, 65, 255, 256, 1 << 31, (1 << 32) - 1]


def mask(width):
    return (1 << width) - 1


def signed(value, width):
    return value - (1 << width) if value >> (width - 1) & 1 else value


@pytest.mark.parametrize("width", [16, 32, 64])
def test_bitwise(width):
    a, b = combinations(WORDS[width], WORDS[width], dtype=DTYPES[width])
    kind = f"b{width}"
    body = f"""
        and.{kind} %x, %a, %b; or.{kind} %y, %a, %b; xor.{kind} %z, %a, %b;
        not.{kind} %n, %a; cnot.{kind} %c, %a;
    """
    outputs = dict.fromkeys("xyznc", kind)
    got = evaluate(body, {"a": (kind, a), "b": (kind, b)}, outputs)
    assert (got["x"] == a & b).all()
    assert (got["y"] == a | b).all()
    assert (got["z"] == a ^ b).all()
    assert (got["n"] == ~a).all()
    assert (got["c"] == (a == 0)).all()


def test_predicates():
    a, b = np.array([0, 0, 1, 1], np.uint32), np.array([0, 1, 0, 1], np.uint32)
    body = """
        and.pred %x, %a, %b; or.pred %y, %a, %b; xor.pred %z, %a, %b; not.pred %n, %a;
    """
    got = evaluate(body, {"a": ("pred", a), "b": ("pred", b)}, dict.fromkeys("xyzn", "pred"))
    assert got["x"].tolist() == [0, 0, 0, 1]
    assert got["y"].tolist() == [0, 1, 1, 1]
    assert got["z"].tolist() == [0, 1, 1, 0]
    assert got["n"].tolist() == [1, 1, 0, 0]


@pytest.mark.parametrize("width", [16, 32, 64])
def test_shift_amounts_are_clamped_to_the_width(width):
    a, n = combinations(WORDS[width], AMOUNTS, dtype=np.uint64)
    inputs = {"a": (f"b{width}", a.astype(DTYPES[width])), "n": ("b32", n.astype(np.uint32))}
    body = f"shl.b{width} %x, %a, %n; shr.u{width} %y, %a, %n; shr.s{width} %z, %a, %n;"
    got = evaluate(body, inputs, dict.fromkeys("xyz", f"b{width}"))
    for row, (value, amount) in enumerate(zip(a.tolist(), n.tolist(), strict=True)):
        shift = min(amount, width)
        assert int(got["x"][row]) == value << shift & mask(width)
        assert int(got["y"][row]) == value >> shift
        assert int(got["z"][row]) == signed(value, width) >> shift & mask(width)


@pytest.mark.parametrize("amount", [0, 1, 31, 32, 40])
def test_literal_shift_amounts(amount):
    a = np.array(WORDS[32], np.uint32)
    body = f"shl.b32 %x, %a, {amount}; shr.s32 %y, %a, {amount}; shr.b32 %z, %a, {amount};"
    got = evaluate(body, {"a": ("b32", a)}, {"x": "b32", "y": "b32", "z": "b32"})
    for row, value in enumerate(a.tolist()):
        assert int(got["x"][row]) == value << amount & mask(32)
        assert int(got["y"][row]) == signed(value, 32) >> amount & mask(32)
        assert int(got["z"][row]) == value >> amount


@pytest.mark.parametrize("mode", ["wrap", "clamp"])
def test_funnel_shifts(mode):
    a, b, n = combinations(WORDS[32], WORDS[32], AMOUNTS, dtype=np.uint32)
    inputs = {"a": ("b32", a), "b": ("b32", b), "n": ("b32", n)}
    body = f"shf.l.{mode}.b32 %x, %a, %b, %n; shf.r.{mode}.b32 %y, %a, %b, %n;"
    got = evaluate(body, inputs, {"x": "b32", "y": "b32"})
    for row in range(len(a)):
        shift = int(n[row]) & 31 if mode == "wrap" else min(int(n[row]), 32)
        joined = int(b[row]) << 32 | int(a[row])
        assert int(got["x"][row]) == joined << shift >> 32 & mask(32)
        assert int(got["y"][row]) == joined >> shift & mask(32)


@pytest.mark.parametrize("table", [0x00, 0x80, 0xE8, 0x96, 0xC0, 0xFE, 0x1A, 0xFF, 0xF0])
def test_lop3_is_its_truth_table(table):
    rng = np.random.default_rng(table)
    a, b, c = rng.integers(0, 1 << 32, (3, 64), dtype=np.uint32)
    inputs = {"a": ("b32", a), "b": ("b32", b), "c": ("b32", c)}
    got = evaluate(f"lop3.b32 %x, %a, %b, %c, {table};", inputs, {"x": "b32"})["x"]
    for bit in range(32):
        rows = (a >> bit & 1) * 4 + (b >> bit & 1) * 2 + (c >> bit & 1)
        assert ((got >> bit & 1) == (table >> rows & 1)).all()


def test_lop3_with_a_predicate_joins_whether_the_word_is_nonzero():
    a = np.array([0, 1, 2, 3], np.uint32)
    q = np.array([0, 1, 0, 1], np.uint32)
    body = "lop3.or.b32 %x|%p, %a, %a, %a, 0xF0, %q; lop3.and.b32 %y|%s, %a, 1, 0, 0xC0, %q;"
    outputs = {"x": "b32", "p": "pred", "y": "b32", "s": "pred"}
    got = evaluate(body, {"a": ("b32", a), "q": ("pred", q)}, outputs)
    assert got["x"].tolist() == [0, 1, 2, 3]
    assert got["p"].tolist() == [0, 1, 1, 1]
    assert got["y"].tolist() == [0, 1, 0, 1]
    assert got["s"].tolist() == [0, 1, 0, 1]


def permute(a, b, picks):
    joined = (b << 32 | a).to_bytes(8, "little")
    out = []
    for pick in picks:
        byte = joined[pick & 7]
        out.append((0xFF if byte & 0x80 else 0) if pick & 8 else byte)
    return int.from_bytes(bytes(out), "little")


MODES = {
    "f4e": lambda s: [s, s + 1, s + 2, s + 3],
    "b4e": lambda s: [s, s - 1 & 7, s - 2 & 7, s - 3 & 7],
    "rc8": lambda s: [s] * 4,
    "ecl": lambda s: [max(s, i) for i in range(4)],
    "ecr": lambda s: [min(s, i) for i in range(4)],
    "rc16": lambda s: [2 * (s & 1), 2 * (s & 1) + 1] * 2,
}


def test_prmt_selects_bytes_and_replicates_signs():
    words = [0x83828180, 0x07060504, 0xFF00AA55]
    selectors = [0x3210, 0x7654, 0x0000, 0xBA98, 0xFEDC, 0x5140, 0xF123]
    a, b, s = combinations(words, words, selectors, dtype=np.uint32)
    inputs = {"a": ("b32", a), "b": ("b32", b), "s": ("b32", s)}
    got = evaluate("prmt.b32 %x, %a, %b, %s;", inputs, {"x": "b32"})["x"]
    for row in range(len(a)):
        picks = [int(s[row]) >> 4 * i & 15 for i in range(4)]
        assert int(got[row]) == permute(int(a[row]), int(b[row]), picks)


@pytest.mark.parametrize("mode", sorted(MODES))
def test_prmt_modes(mode):
    s = np.arange(4, dtype=np.uint32)
    inputs = {"s": ("b32", s)}
    body = f"prmt.b32.{mode} %x, 0x83828180, 0x87868584, %s;"
    got = evaluate(body, inputs, {"x": "b32"})["x"]
    for row in range(4):
        assert int(got[row]) == permute(0x83828180, 0x87868584, MODES[mode](row))


@pytest.mark.parametrize("width", [32, 64])
def test_counting_and_reversal(width):
    rng = np.random.default_rng(width)
    few = np.array([*WORDS[width], *(1 << i for i in range(width))], DTYPES[width])
    a = np.concatenate([few, rng.integers(0, mask(width), 50, dtype=DTYPES[width])])
    body = f"""
        popc.b{width} %x, %a; clz.b{width} %y, %a; brev.b{width} %z, %a;
        bfind.u{width} %u, %a; bfind.s{width} %s, %a; bfind.shiftamt.u{width} %t, %a;
    """
    outputs = {"x": "b32", "y": "b32", "z": f"b{width}", "u": "b32", "s": "b32", "t": "b32"}
    got = evaluate(body, {"a": (f"b{width}", a)}, outputs)
    for row, value in enumerate(a.tolist()):
        digits = f"{value:0{width}b}"
        assert int(got["x"][row]) == digits.count("1")
        assert int(got["y"][row]) == width - value.bit_length()
        assert int(got["z"][row]) == int(digits[::-1], 2)
        assert int(got["u"][row]) == (value.bit_length() - 1) & mask(32)
        flipped = ~value & mask(width) if value >> (width - 1) else value
        assert int(got["s"][row]) == (flipped.bit_length() - 1) & mask(32)
        shift = width - value.bit_length() if value else mask(32)
        assert int(got["t"][row]) == shift


def field(a, pos, length, width, is_signed):
    """The pseudocode of ``bfe``."""
    pos, length, msb = pos & 255, length & 255, width - 1
    sign = 0 if not is_signed or length == 0 else a >> min(pos + length - 1, msb) & 1
    out = 0
    for i in range(width):
        bit = a >> pos + i & 1 if i < length and pos + i <= msb else sign
        out |= bit << i
    return out


@pytest.mark.parametrize("kind", ["u32", "s32", "u64", "s64"])
def test_bit_field_extract(kind):
    width = int(kind[1:])
    places = [0, 1, 7, 31, 32, 63, 64, 255, 256]
    a, p, n = combinations(WORDS[width][1:5], places, places, dtype=np.uint64)
    inputs = {
        "a": (f"b{width}", a.astype(DTYPES[width])),
        "p": ("b32", p.astype(np.uint32)),
        "n": ("b32", n.astype(np.uint32)),
    }
    got = evaluate(f"bfe.{kind} %x, %a, %p, %n;", inputs, {"x": f"b{width}"})["x"]
    for row in range(len(a)):
        expected = field(int(a[row]), int(p[row]), int(n[row]), width, kind[0] == "s")
        assert int(got[row]) == expected, (hex(a[row]), p[row], n[row])


@pytest.mark.parametrize("width", [32, 64])
def test_bit_field_insert(width):
    places = [0, 1, 7, 31, 32, 63, 64, 255]
    a, p, n = combinations(WORDS[width][:5], places, places, dtype=np.uint64)
    b = a[::-1].copy()
    inputs = {
        "a": (f"b{width}", a.astype(DTYPES[width])),
        "b": (f"b{width}", b.astype(DTYPES[width])),
        "p": ("b32", p.astype(np.uint32)),
        "n": ("b32", n.astype(np.uint32)),
    }
    got = evaluate(f"bfi.b{width} %x, %a, %b, %p, %n;", inputs, {"x": f"b{width}"})["x"]
    for row in range(len(a)):
        expected = int(b[row])
        for i in range(min(int(n[row]), width)):
            place = int(p[row]) + i
            if place < width:
                expected = expected & ~(1 << place) | (int(a[row]) >> i & 1) << place
        assert int(got[row]) == expected


def nth_set(value, base, offset):
    """The pseudocode of ``fns``."""
    if offset == 0:
        return base if value >> base & 1 else mask(32)
    position, left = base, abs(offset)
    while 0 <= position < 32:
        left -= value >> position & 1
        if left == 0:
            return position
        position += 1 if offset > 0 else -1
    return mask(32)


def test_find_nth_set():
    offsets = [0, 1, 2, 3, mask(32), mask(32) - 1]
    a, base, n = combinations([0, 1, 0xF0F0, mask(32)], [0, 4, 15, 31], offsets, dtype=np.uint32)
    inputs = {"a": ("b32", a), "b": ("b32", base), "n": ("b32", n)}
    got = evaluate("fns.b32 %x, %a, %b, %n;", inputs, {"x": "b32"})["x"]
    for row in range(len(a)):
        assert int(got[row]) == nth_set(int(a[row]), int(base[row]), signed(int(n[row]), 32))


@pytest.mark.parametrize("mode", ["wrap", "clamp"])
def test_extension_and_masks(mode):
    places = [0, 1, 8, 31, 32, 33, 40]
    a, n = combinations(WORDS[32], places, dtype=np.uint32)
    body = f"""
        szext.{mode}.u32 %x, %a, %n; szext.{mode}.s32 %y, %a, %n;
        bmsk.{mode}.b32 %z, %n, %n;
    """
    got = evaluate(body, {"a": ("b32", a), "n": ("b32", n)}, dict.fromkeys("xyz", "b32"))
    for row in range(len(a)):
        place = int(n[row]) & 31 if mode == "wrap" else min(int(n[row]), 32)
        low = int(a[row]) & mask(place)
        assert int(got["x"][row]) == low
        top = place > 0 and low >> (place - 1) & 1
        assert int(got["y"][row]) == (low | (mask(32) & ~mask(place) if top else 0))
        assert int(got["z"][row]) == mask(place) << place & mask(32)
