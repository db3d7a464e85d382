"""What a kernel is compiled for: an architecture as a value, so that no GPU is needed.

Sizes are per SM or per block, in bytes, from the CUDA C++ Programming Guide's table of
technical specifications per compute capability.
"""

from __future__ import annotations

from dataclasses import dataclass

from cute_fa.errors import InvalidArgumentError

KIB = 1024


@dataclass(frozen=True)
class Target:
    """One GPU architecture.

    Attributes:
        arch: the name that the compiler takes, e.g. ``sm_90a``.
        compute_capability: (major, minor).
        smem_per_block_bytes: dynamic shared memory that one block may ask for.
        smem_per_sm_bytes: shared memory of one SM, all resident blocks together.
        max_threads_per_sm: resident threads of one SM.
        sm_count: SMs of the best-known part, the default of schedulers and of the simulator.
        part: the part that ``sm_count`` is of.
    """

    arch: str
    compute_capability: tuple[int, int]
    smem_per_block_bytes: int
    smem_per_sm_bytes: int
    max_threads_per_sm: int
    sm_count: int
    part: str

    registers_per_sm: int = 65536
    smem_reserved_per_block_bytes: int = KIB

    @property
    def major(self) -> int:
        return self.compute_capability[0]

    @property
    def has_wgmma(self) -> bool:
        return self.major == 9

    @property
    def has_tcgen05(self) -> bool:
        return self.major in (10, 11)


def _target(
    arch: str, cc: tuple[int, int], block_kib: int, sm_kib: int, threads: int, sms: int, part: str
) -> Target:
    return Target(arch, cc, block_kib * KIB, sm_kib * KIB, threads, sms, part)


TARGETS: dict[str, Target] = {
    t.arch: t
    for t in (
        _target("sm_80", (8, 0), 163, 164, 2048, 108, "A100"),
        _target("sm_86", (8, 6), 99, 100, 1536, 84, "RTX 3090"),
        _target("sm_87", (8, 7), 163, 164, 1536, 16, "Jetson Orin"),
        _target("sm_89", (8, 9), 99, 100, 1536, 128, "RTX 4090"),
        _target("sm_90", (9, 0), 227, 228, 2048, 132, "H100"),
        _target("sm_90a", (9, 0), 227, 228, 2048, 132, "H100"),
        _target("sm_100a", (10, 0), 227, 228, 2048, 148, "B200"),
        _target("sm_103a", (10, 3), 227, 228, 2048, 148, "B300"),
        _target("sm_120a", (12, 0), 99, 100, 1536, 170, "RTX 5090"),
        _target("sm_121a", (12, 1), 99, 100, 1536, 48, "DGX Spark"),
    )
}

_FAMILIES = {
    "ampere": "sm_80",
    "ada": "sm_89",
    "hopper": "sm_90a",
    "blackwell": "sm_100a",
}


def get_target(arch: str | Target) -> Target:
    """The Target named ``arch``; takes ``sm_90a``, ``sm90a``, ``90a``, ``9.0``, ``hopper``.

    A bare number means the plain architecture where one exists (``90`` is sm_90) and else the
    architecture-specific one (``100`` is sm_100a).

    Raises:
        InvalidArgumentError: the name is not in the table.
    """
    if isinstance(arch, Target):
        return arch
    name = str(arch).strip().lower()
    if name in _FAMILIES:
        return TARGETS[_FAMILIES[name]]
    digits = name.removeprefix("sm").removeprefix("_").replace(".", "")
    for candidate in (f"sm_{digits}", f"sm_{digits}a"):
        if candidate in TARGETS:
            return TARGETS[candidate]
    raise InvalidArgumentError(
        "unknown architecture",
        got=repr(arch),
        expected=f"one of {', '.join(TARGETS)} (or {', '.join(_FAMILIES)})",
    )
