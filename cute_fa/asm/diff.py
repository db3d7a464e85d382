"""What two versions of a kernel differ in: resources, instruction mix, hot loop, and the PTX."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cute_fa.asm.hot import LoopSummary, ptx_loops, sass_loops
from cute_fa.asm.mix import ptx_mix, ptx_mma_shapes, sass_mix, sass_mma_shapes
from cute_fa.asm.resources import resources
from cute_fa.asm.sass import sass
from cute_fa.errors import InvalidArgumentError, MissingToolError
from cute_fa.ptx import parse

_REGISTER = re.compile(r"(%[a-zA-Z]+)\d+")
_LABEL = re.compile(r"\$?\bL__?BB\d+_\d+|\$L_[\w$]+")
_COMMENT = re.compile(r"//.*")
_SIZES = (
    "registers",
    "stack_bytes",
    "local_store_bytes",
    "local_load_bytes",
    "static_smem_bytes",
    "constant_bytes",
    "barriers",
    "code_bytes",
)


@dataclass(frozen=True)
class Version:
    """One of two kernels that are compared.

    Attributes:
        label: what to call it.
        ptx: of a module with one kernel; None if there is none.
        cubin: likewise.
        launch: what no artefact tells, e.g. {"dynamic_smem_bytes": 1024}.
    """

    label: str
    ptx: str | None = None
    cubin: bytes | None = None
    launch: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Difference:
    """What ``diff`` found.

    Attributes:
        labels: of the two versions.
        figures: section → name → (first, second); None where a version does not have it.
        ptx: a unified diff of the two PTX texts; empty if they are the same or one is missing.
        notes: what could not be compared, and why.
    """

    labels: tuple[str, str]
    figures: Mapping[str, Mapping[str, tuple[int | None, int | None]]]
    ptx: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def changed(self) -> dict[str, dict[str, tuple[int | None, int | None]]]:
        """The figures that are not the same."""
        found = {
            section: {name: pair for name, pair in names.items() if pair[0] != pair[1]}
            for section, names in self.figures.items()
        }
        return {section: names for section, names in found.items() if names}

    @property
    def is_empty(self) -> bool:
        """Whether nothing that was compared differs."""
        return not self.changed and not self.ptx

    def as_dict(self) -> dict[str, Any]:
        """Everything, of types that JSON knows."""
        return {
            "labels": list(self.labels),
            "figures": {
                section: {name: list(pair) for name, pair in names.items()}
                for section, names in self.figures.items()
            },
            "ptx": list(self.ptx),
            "notes": list(self.notes),
        }


def diff(
    first: Version, second: Version, *, registers: bool = False, context: int = 3
) -> Difference:
    """Compare two kernels.

    Args:
        registers: keep the numbers of registers and labels in the PTX; they are renamed all over
            by a small change, so that by default only what is done shows.
        context: lines around a change in the diff.

    Raises:
        PtxSyntaxError, InvalidArgumentError: a text or a cubin that cannot be read.
        InvalidArgumentError: they have nothing in common that could be compared.
    """
    notes: list[str] = []
    sides = [_figures(version, notes) for version in (first, second)]
    figures = {
        section: {
            name: (sides[0].get(section, {}).get(name), sides[1].get(section, {}).get(name))
            for name in dict.fromkeys([*sides[0].get(section, {}), *sides[1].get(section, {})])
        }
        for section in dict.fromkeys([*sides[0], *sides[1]])
        if section in sides[0] and section in sides[1]
    }
    if not figures:
        raise InvalidArgumentError(
            "these have nothing in common that could be compared",
            got=f"{first.label} and {second.label}",
            expected="PTX on both sides, or a cubin on both",
        )
    text: tuple[str, ...] = ()
    if first.ptx is not None and second.ptx is not None:
        old, new = (normalised(text, registers) for text in (first.ptx, second.ptx))
        text = tuple(
            difflib.unified_diff(old, new, first.label, second.label, lineterm="", n=context)
        )
    return Difference((first.label, second.label), figures, text, tuple(dict.fromkeys(notes)))


def normalised(ptx: str, registers: bool) -> list[str]:
    """The lines of a PTX text that say what the kernel does: no comments, no line information,
    the kernel's long name short; without the numbers of registers and labels unless asked for."""
    names = list(parse(ptx).kernels)
    for name in sorted(names, key=len, reverse=True):
        ptx = ptx.replace(name, "kernel")
    lines = []
    for line in ptx.splitlines():
        line = _COMMENT.sub("", line).rstrip().expandtabs(4)
        if not registers:
            line = _LABEL.sub("$L", _REGISTER.sub(r"\1", line))
        if line.strip() and not line.lstrip().startswith((".loc", ".file")):
            lines.append(line)
    return lines


def _figures(version: Version, notes: list[str]) -> dict[str, dict[str, int]]:
    """Section → name → figure of one version."""
    found: dict[str, dict[str, int]] = {}
    if version.launch:
        found["launch"] = dict(version.launch)
    if version.cubin is not None:
        used = resources(version.cubin)
        found["resources"] = {name: getattr(used, name) for name in _SIZES}
        for number, count in enumerate(used.role_registers):
            found["resources"][f"setmaxnreg {number}"] = count
        try:
            machine = sass(version.cubin)
        except MissingToolError as error:
            notes.append(f"no SASS: {error.what}; {error.fix}")
        else:
            found["SASS"] = {"instructions": len(machine.code), **sass_mix(machine.code)}
            found["SASS MMA"] = sass_mma_shapes(machine.code)
            found["SASS hot loop"] = _hot(sass_loops(machine))
    if version.ptx is not None:
        entries = list(parse(version.ptx).kernels.values())
        if len(entries) != 1:
            raise InvalidArgumentError(
                "a PTX module to compare must hold one kernel",
                got=f"{len(entries)} in {version.label}",
            )
        body = entries[0].body
        found["PTX"] = {"instructions": len(body), **ptx_mix(body)}
        found["PTX MMA"] = ptx_mma_shapes(body)
        found["PTX hot loop"] = _hot(ptx_loops(entries[0]))
    return found


def _hot(loops: list[LoopSummary]) -> dict[str, int]:
    hot = next((loop for loop in loops if loop.is_hot), None)
    return {} if hot is None else {"instructions": hot.instructions, **hot.mix}
