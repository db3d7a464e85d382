"""One PTX instruction on many operand values, and exact references for rounding."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np

from tests.sim.tiny import run

UNSIGNED = {"pred": np.uint32, "b16": np.uint16, "b32": np.uint32, "b64": np.uint64}


def evaluate(body, inputs, outputs, *, arch="sm_80", threads=None, **options):
    """Run ``body`` once per element of the inputs.

    Args:
        body: PTX that reads registers ``%a``, ``%b``, … named by ``inputs`` and writes those of
            ``outputs``.
        inputs: {name: (register type, values)}; types pred, b16, b32, b64; values any dtype of
            that width, all of one length.
        outputs: {name: register type}.

    Returns:
        {name: unsigned array}; predicates as 0 and 1.
    """
    count = len(next(iter(inputs.values()))[1]) if inputs else threads or 32
    threads = -(-count // 32) * 32
    assert threads <= 1024, "more values than threads"
    data = np.zeros((threads, max(len(inputs), 1)), np.uint64)
    declarations, load, store = [], [], []
    for slot, (name, (kind, values)) in enumerate(inputs.items()):
        raw = np.ascontiguousarray(values)
        if kind != "pred":
            raw = raw.view(UNSIGNED[kind])
        data[:count, slot] = raw.astype(np.uint64)
        declarations.append(f".reg .{kind} %{name};")
        if kind == "pred":
            load.append(f"ld.global.b32 %r9, [%in+{8 * slot}]; setp.ne.b32 %{name}, %r9, 0;")
        else:
            load.append(f"ld.global.{kind} %{name}, [%in+{8 * slot}];")
    for slot, (name, kind) in enumerate(outputs.items()):
        if name not in inputs:
            declarations.append(f".reg .{kind} %{name};")
        if kind == "pred":
            store.append(f"selp.b32 %r9, 1, 0, %{name}; st.global.b32 [%out+{8 * slot}], %r9;")
        else:
            store.append(f"st.global.{kind} [%out+{8 * slot}], %{name};")
    result = run(
        "\n".join([*load, body, *store]),
        data,
        words=2 * len(outputs),
        threads=threads,
        declarations="\n".join(declarations),
        arch=arch,
        strict=True,
        **options,
    )
    out = {}
    for slot, (name, kind) in enumerate(outputs.items()):
        pair = np.ascontiguousarray(result.out[:count, 2 * slot : 2 * slot + 2])
        out[name] = pair.view(np.uint64)[:, 0].astype(UNSIGNED[kind])
    return out


def combinations(*lists, dtype):
    """Every combination of several value lists, as one array per list."""
    return [np.array(column, dtype) for column in zip(*itertools.product(*lists), strict=True)]


# --- exact rounding -------------------------------------------------------------------------------

FORMATS = {"f16": (11, -14, 15), "bf16": (8, -126, 127), "f32": (24, -126, 127)}
"""Significand bits (the hidden one included), least and greatest exponent of normal numbers."""


def round_exact(value, kind, mode="rn"):
    """A Fraction rounded to a format, as a float; infinities where it overflows."""
    bits, least, most = FORMATS[kind]
    if value == 0:
        return 0.0
    size = abs(value)
    exponent = max(math.floor(math.log2(size)) if size < 2**1000 else most, least)
    while exponent > least and size < Fraction(2) ** exponent:
        exponent -= 1
    while size >= Fraction(2) ** (exponent + 1):
        exponent += 1
    quantum = Fraction(2) ** (exponent - bits + 1)
    units = size / quantum
    whole = units.numerator // units.denominator
    rest = units - whole
    up = {
        "rn": rest > Fraction(1, 2) or (rest == Fraction(1, 2) and whole % 2 == 1),
        "rz": False,
        "rm": value < 0 and rest > 0,
        "rp": value > 0 and rest > 0,
    }[mode]
    result = (whole + up) * quantum
    limit = (2 - Fraction(2) ** (1 - bits)) * Fraction(2) ** most
    if result > limit:
        to_infinity = mode == "rn" or (mode == "rp" and value > 0) or (mode == "rm" and value < 0)
        result = math.inf if to_infinity else limit
    return math.copysign(float(result), value)


_EDGE_WORDS = """
    00000000 80000000 00000001 80000001 007FFFFF 00800000 80800000 3F800000 BF800000 3F800001
    3F7FFFFF 40490FDB C2C80000 33800000 4B800001 7F7FFFFF FF7FFFFF 7F800000 FF800000 7FC00000
    00400000
"""
F32_EDGES = np.array([int(word, 16) for word in _EDGE_WORDS.split()], np.uint32).view(np.float32)
"""Zeros, subnormals, the smallest normal, numbers around one, large ones, infinities, NaN."""


def same_floats(actual, expected):
    """Elements equal bit for bit, any NaN equal to any NaN."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    unsigned = np.dtype(f"u{actual.dtype.itemsize}")
    equal = actual.view(unsigned) == expected.astype(actual.dtype).view(unsigned)
    return equal | (np.isnan(actual) & np.isnan(expected))
