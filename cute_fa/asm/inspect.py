"""One kernel on one screen: identity, resources, instruction mix, loops, red flags."""

from __future__ import annotations

import hashlib
import textwrap
from dataclasses import dataclass
from typing import Any

from cute_fa.asm.flags import (
    Flag,
    match_flags,
    ptx_flags,
    resource_flags,
    role_register_flags,
    sass_flags,
)
from cute_fa.asm.hot import LoopSummary, hot_code, ptx_loops, sass_loops
from cute_fa.asm.mix import (
    global_access_widths,
    ptx_mix,
    ptx_mma_shapes,
    sass_mix,
    sass_mma_shapes,
)
from cute_fa.asm.occupancy import Occupancy, occupancy
from cute_fa.asm.resources import Resources, resources
from cute_fa.asm.sass import sass
from cute_fa.errors import InvalidArgumentError, MissingToolError
from cute_fa.ptx import Kernel, Module, parse
from cute_fa.target import Target, get_target

_WIDTH = 80
_LABEL = 18
_HASH_DIGITS = 12


@dataclass(frozen=True)
class CodeSummary:
    """One of the two texts of a kernel, PTX or SASS.

    Attributes:
        instructions: how many, padding left out.
        mix: by class.
        mma_shapes: tensor instructions by shape and type.
        loops: those that do work, outer before inner.
        global_widths: accesses of global memory by bytes per thread (SASS only).
    """

    instructions: int
    mix: dict[str, int]
    mma_shapes: dict[str, int]
    loops: tuple[LoopSummary, ...]
    global_widths: dict[str, dict[int, int]]

    @property
    def hot_loop(self) -> LoopSummary | None:
        return next((loop for loop in self.loops if loop.is_hot), None)

    def as_dict(self) -> dict[str, Any]:
        return {
            "instructions": self.instructions,
            "mix": self.mix,
            "mma_shapes": self.mma_shapes,
            "loops": [loop.as_dict() for loop in self.loops],
            "global_widths": self.global_widths,
        }


@dataclass(frozen=True)
class Inspection:
    """What inspect_kernel found.

    Attributes:
        kernel: its name.
        target: the architecture that it was asked for.
        ptx_version: of the PTX ISA, as text.
        ptx_target: what the PTX says it is for.
        ptx_sha256, cubin_sha256: digests of the artefacts; None without a cubin.
        threads, dynamic_smem_bytes: of the launch.
        resources, occupancy: None without a cubin.
        ptx, sass: what the code holds; ``sass`` is None without a cubin or a disassembler, and
            ``sass_missing`` says why and how to get it.
        flags: warnings before notes.
    """

    kernel: str
    target: str
    ptx_version: str
    ptx_target: str
    ptx_sha256: str
    cubin_sha256: str | None
    threads: int
    dynamic_smem_bytes: int
    resources: Resources | None
    occupancy: Occupancy | None
    ptx: CodeSummary
    sass: CodeSummary | None
    sass_missing: str | None
    flags: tuple[Flag, ...]

    def as_dict(self) -> dict[str, Any]:
        """Everything, of types that JSON knows."""
        return {
            "kernel": self.kernel,
            "target": self.target,
            "ptx_version": self.ptx_version,
            "ptx_target": self.ptx_target,
            "ptx_sha256": self.ptx_sha256,
            "cubin_sha256": self.cubin_sha256,
            "threads": self.threads,
            "dynamic_smem_bytes": self.dynamic_smem_bytes,
            "resources": self.resources.as_dict() if self.resources else None,
            "occupancy": dict(vars(self.occupancy)) if self.occupancy else None,
            "ptx": self.ptx.as_dict(),
            "sass": self.sass.as_dict() if self.sass else None,
            "sass_missing": self.sass_missing,
            "flags": [flag.as_dict() for flag in self.flags],
        }

    def render(self) -> str:
        """A plain-text screen, at most 80 columns wide where words allow it."""
        return _render(self)


def inspect_kernel(
    ptx: str,
    cubin: bytes | None,
    *,
    threads: int,
    dynamic_smem_bytes: int,
    target: str | Target,
    kernel: str | None = None,
) -> Inspection:
    """Analyse a compiled kernel.

    Args:
        ptx: its PTX.
        cubin: its machine code; without it, resources and SASS are left out.
        threads: per block, as launched.
        dynamic_smem_bytes: per block, as launched.
        target: the architecture that it was compiled for.
        kernel: which of the module's kernels; needed only where there are several.

    Raises:
        PtxSyntaxError: the PTX is not well-formed.
        InvalidArgumentError: no such kernel, no cubin, or an unknown target.
    """
    arch = get_target(target)
    module = parse(ptx)
    entry = _pick(module, kernel)
    found = resources(cubin, entry.name) if cubin is not None else None
    fits = occupancy(found, dynamic_smem_bytes, threads, arch) if found else None
    flags = [*match_flags(module, found, arch.arch), *ptx_flags(entry)]
    if found is not None and fits is not None:
        flags += resource_flags(found, fits, threads)
        flags += role_register_flags(entry, found)
    code = None
    missing: str | None = "no cubin was given"
    if cubin is not None:
        try:
            machine = sass(cubin, entry.name)
        except MissingToolError as error:
            missing = f"{error.what}: {error.fix}"
        else:
            missing = None
            flags += sass_flags(machine.code, hot_code(machine))
            code = CodeSummary(
                instructions=len(machine.code),
                mix=sass_mix(machine.code),
                mma_shapes=sass_mma_shapes(machine.code),
                loops=tuple(sass_loops(machine)),
                global_widths=global_access_widths(machine.code),
            )
    return Inspection(
        kernel=entry.name,
        target=arch.arch,
        ptx_version=".".join(map(str, module.version)),
        ptx_target=module.target,
        ptx_sha256=hashlib.sha256(ptx.encode()).hexdigest(),
        cubin_sha256=hashlib.sha256(cubin).hexdigest() if cubin is not None else None,
        threads=threads,
        dynamic_smem_bytes=dynamic_smem_bytes,
        resources=found,
        occupancy=fits,
        ptx=CodeSummary(
            instructions=len(entry.body),
            mix=ptx_mix(entry.body),
            mma_shapes=ptx_mma_shapes(entry.body),
            loops=tuple(ptx_loops(entry)),
            global_widths={},
        ),
        sass=code,
        sass_missing=missing,
        flags=tuple(sorted(flags, key=lambda flag: flag.severity, reverse=True)),
    )


def _pick(module: Module, name: str | None) -> Kernel:
    if name is None and len(module.kernels) == 1:
        return next(iter(module.kernels.values()))
    if name is None or name not in module.kernels:
        raise InvalidArgumentError(
            "the PTX holds no kernel of that name" if name else "which kernel of the PTX?",
            got=repr(name),
            expected=f"one of {', '.join(module.kernels) or 'none'}",
        )
    return module.kernels[name]


def _render(found: Inspection) -> str:
    lines = [
        *_row("kernel", found.kernel),
        *_row("target", f"{found.target} (PTX ISA {found.ptx_version}, {found.ptx_target})"),
        *_row("ptx", f"{found.ptx.instructions} instructions, {_short(found.ptx_sha256)}"),
    ]
    if found.sass and found.cubin_sha256:
        lines += _row(
            "sass", f"{found.sass.instructions} instructions, {_short(found.cubin_sha256)}"
        )
    else:
        lines += _row("sass", f"not shown: {found.sass_missing}")
    lines += ["", "resources", *_resource_rows(found)]
    for title, code in (("SASS", found.sass), ("PTX", found.ptx)):
        if code is not None:
            lines += ["", f"{title} instructions by class", *_mix_rows(code.mix)]
            shapes = (f"{count} × {shape}" for shape, count in code.mma_shapes.items())
            lines += _row("  MMA", ", ".join(shapes) or "none")
            for name, widths in code.global_widths.items():
                sizes = (f"{count} × {width} B" for width, count in widths.items())
                lines += _row(f"  global {name}", ", ".join(sizes))
    shown, title = (found.sass, "SASS") if found.sass else (found.ptx, "PTX")
    lines += ["", f"{title} loops (waits folded; * the hot one)", *_loop_rows(shown.loops)]
    lines += ["", "red flags"]
    for flag in found.flags:
        lines += _row(f"  {flag.severity}", f"{flag.message} [{flag.rule}]")
    if not found.flags:
        lines.append("  none")
    return "\n".join(lines)


def _resource_rows(found: Inspection) -> list[str]:
    used, fits = found.resources, found.occupancy
    threads = _row("  threads", f"{found.threads} per block")
    if used is None or fits is None:
        return [*threads, *_row("  shared memory", f"{found.dynamic_smem_bytes} B dynamic")]
    registers = f"{used.registers} per thread"
    if used.role_registers:
        registers += f", by role {', '.join(map(str, used.role_registers))}"
    limits = ", ".join(f"{name} {count}" for name, count in fits.limits.items())
    return [
        *threads,
        *_row("  registers", registers),
        *_row(
            "  stack",
            f"{used.stack_bytes} B per thread (local stores {used.local_store_bytes} B, "
            f"loads {used.local_load_bytes} B)",
        ),
        *_row(
            "  shared memory",
            f"{used.static_smem_bytes} B static + {found.dynamic_smem_bytes} B dynamic",
        ),
        *_row("  barriers", str(used.barriers)),
        *_row("  constants", f"{used.constant_bytes} B, {used.param_bytes} B of it parameters"),
        *_row("  blocks per SM", f"{fits.ctas}, limited by {fits.limited_by} ({limits})"),
    ]


def _mix_rows(mix: dict[str, int]) -> list[str]:
    total = sum(mix.values())
    rows = [
        f"  {name:<{_LABEL - 2}}{count:>6} {count / total:>6.1%}" for name, count in mix.items()
    ]
    half = -(-len(rows) // 2)
    left, right = rows[:half], [*rows[half:], ""]
    return [f"{a:<{_WIDTH // 2}}{b}".rstrip() for a, b in zip(left, right, strict=False)]


def _loop_rows(loops: tuple[LoopSummary, ...]) -> list[str]:
    if not loops:
        return ["  none"]
    rows = []
    for loop in loops:
        label = f"{'*' if loop.is_hot else ' '} {'  ' * (loop.depth - 1)}{loop.where}"
        words = [f"{loop.instructions} instructions"]
        words += [f"{name} {count}" for name, count in loop.mix.items()]
        if loop.folded_waits:
            words.append(f"{loop.folded_waits} waits folded")
        rows += _row(label, ", ".join(words))
    return rows


def _row(label: str, text: str) -> list[str]:
    """``label`` and ``text`` beside it, wrapped."""
    width = max(_LABEL, len(label) + 1)
    wrapped = textwrap.wrap(
        text, _WIDTH - width, break_long_words=False, break_on_hyphens=False
    ) or [""]
    return [f"{label:<{width}}{wrapped[0]}", *(f"{'':<{width}}{line}" for line in wrapped[1:])]


def _short(digest: str) -> str:
    return f"sha256 {digest[:_HASH_DIGITS]}"
