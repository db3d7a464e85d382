"""Red flags: what a reader of a kernel's machine code should look at first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from cute_fa.asm.mix import access_bytes
from cute_fa.asm.occupancy import Occupancy
from cute_fa.asm.resources import Resources
from cute_fa.asm.sass import SassInstr
from cute_fa.ptx import Kernel, Module

_VECTOR_BYTES = 16


@dataclass(frozen=True)
class Flag:
    """One finding; a ``warning`` costs speed or is wrong, a ``note`` may be meant."""

    severity: str
    rule: str
    message: str

    def as_dict(self) -> dict[str, str]:
        return asdict(self)


def resource_flags(resources: Resources, occupancy: Occupancy, threads: int) -> list[Flag]:
    """Local memory, launches that cannot work, threads other than compiled for."""
    flags = []
    if resources.uses_local_memory:
        flags.append(
            Flag(
                "warning",
                "local-memory",
                f"{resources.stack_bytes} bytes of stack per thread; the code stores "
                f"{resources.local_store_bytes} and loads {resources.local_load_bytes} bytes of "
                "local memory: spilled registers or arrays with a run-time index",
            )
        )
    if not occupancy.ctas:
        flags.append(
            Flag("warning", "does-not-fit", f"not even one block fits: {occupancy.limited_by}")
        )
    if resources.max_threads is not None and threads > resources.max_threads:
        flags.append(
            Flag(
                "warning",
                "too-many-threads",
                f"launched with {threads} threads, compiled for at most {resources.max_threads}",
            )
        )
    return flags


def match_flags(module: Module, resources: Resources | None, arch: str) -> list[Flag]:
    """PTX, cubin and the architecture asked for must be the same."""
    flags = []
    if module.target != arch:
        flags.append(
            Flag("warning", "other-target", f"the PTX is for {module.target}, not for {arch}")
        )
    if resources is not None and module.target.rstrip("af") != resources.arch:
        flags.append(
            Flag(
                "warning",
                "other-target",
                f"the PTX is for {module.target}, the cubin for {resources.arch}",
            )
        )
    return flags


def role_register_flags(kernel: Kernel, resources: Resources) -> list[Flag]:
    """ptxas drops setmaxnreg, with no error, from kernels compiled without launch bounds."""
    asked = sum(instr.op == "setmaxnreg" for instr in kernel.body)
    if not asked or resources.role_registers:
        return []
    return [
        Flag(
            "warning",
            "setmaxnreg-dropped",
            f"the PTX holds {asked} setmaxnreg and the cubin none: give the kernel the number of "
            "threads and of blocks per SM that it is launched with",
        )
    ]


def sass_flags(code: Sequence[SassInstr], hot: Sequence[SassInstr]) -> list[Flag]:
    """Narrow global accesses and barriers, above all in the hot loop."""
    flags = []
    in_hot_loop = {instr.address for instr in hot}
    for op, name in (("LDG", "loads"), ("STG", "stores"), ("LDGSTS", "async copies")):
        accesses = [instr for instr in code if instr.op == op]
        narrow = [instr for instr in accesses if access_bytes(instr) < _VECTOR_BYTES]
        hot_narrow = sum(instr.address in in_hot_loop for instr in narrow)
        if narrow:
            widths = sorted({access_bytes(instr) for instr in narrow})
            flags.append(
                Flag(
                    "warning" if hot_narrow else "note",
                    "narrow-global-access",
                    f"{len(narrow)} of {len(accesses)} global {name} move "
                    f"{', '.join(map(str, widths))} bytes per thread instead of {_VECTOR_BYTES}"
                    + (f"; {hot_narrow} of them in the hot loop" if hot_narrow else ""),
                )
            )
    barriers = sum(instr.op == "BAR" for instr in hot)
    if barriers:
        flags.append(
            Flag("note", "barriers-in-hot-loop", f"{barriers} block-wide barriers in the hot loop")
        )
    return flags


def ptx_flags(kernel: Kernel) -> list[Flag]:
    """What PTX alone can tell: local variables and calls."""
    flags = []
    local = sum(variable.nbytes for variable in kernel.local_vars.values())
    if local:
        flags.append(
            Flag("note", "local-variables", f"{local} bytes of local variables in the PTX")
        )
    calls = sum(instr.op == "call" for instr in kernel.body)
    if calls:
        flags.append(Flag("note", "calls", f"{calls} function calls in the PTX"))
    return flags
