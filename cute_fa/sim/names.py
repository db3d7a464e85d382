"""Patterns for the names in generated code (see ``codegen``)."""

from __future__ import annotations

import re

VALUE = re.compile(r"\bv\d+\b")
"""A value computed in the block."""

ROW = re.compile(r"\b(R[phrd]\d+)_\w\d\b")
"""A view of a register-file row; group 1 names the row."""

WORD = re.compile(r"\w+")
