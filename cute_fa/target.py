"""What a kernel is compiled for: an architecture as a value, so that no GPU is needed.

Sizes are per SM or per block, in bytes, from the CUDA C++ Programming Guide's table of
technical specifications per compute capability (held against the traits table of NVIDIA's
libcudacxx, ``cuda/__device/arch_traits.h``). SM counts belong to a part, not to an architecture.
"""

from __future__ import annotations

from dataclasses import dataclass

from cute_fa.errors import InvalidArgumentError, InvalidTypeError

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
        max_blocks_per_sm: resident blocks of one SM.
        sm_count: SMs of the best-known part, the default of schedulers and of the simulator.
        part: the part that ``sm_count`` is of.
    """

    arch: str
    compute_capability: tuple[int, int]
    smem_per_block_bytes: int
    smem_per_sm_bytes: int
    max_threads_per_sm: int
    max_blocks_per_sm: int
    sm_count: int
    part: str

    registers_per_sm: int = 65536
    smem_reserved_per_block_bytes: int = KIB

    @property
    def major(self) -> int:
        """Of the compute capability: 8, 9, 10 …"""
        return self.compute_capability[0]

    @property
    def capability_text(self) -> str:
        """The compute capability as people write it, e.g. ``9.0``."""
        return "{}.{}".format(*self.compute_capability)

    @property
    def is_architecture_specific(self) -> bool:
        """Whether the code may use what only this architecture has (an ``a`` target)."""
        return self.arch.endswith("a")

    @property
    def has_wgmma(self) -> bool:
        """Whether warpgroups multiply from shared memory (PTX ISA, wgmma): sm_90a alone."""
        return self.major == 9 and self.is_architecture_specific

    @property
    def has_tcgen05(self) -> bool:
        """Whether there is tensor memory (PTX ISA, tcgen05)."""
        return self.major in (10, 11) and self.is_architecture_specific


# arch, capability, KiB per block, KiB per SM, threads per SM, blocks per SM, SMs, part
_TABLE: tuple[tuple[str, tuple[int, int], int, int, int, int, int, str], ...] = (
    ("sm_80", (8, 0), 163, 164, 2048, 32, 108, "A100"),
    ("sm_86", (8, 6), 99, 100, 1536, 16, 82, "RTX 3090"),
    ("sm_87", (8, 7), 163, 164, 1536, 16, 16, "Jetson AGX Orin"),
    ("sm_89", (8, 9), 99, 100, 1536, 24, 128, "RTX 4090"),
    ("sm_90", (9, 0), 227, 228, 2048, 32, 132, "H100 SXM"),
    ("sm_90a", (9, 0), 227, 228, 2048, 32, 132, "H100 SXM"),
    ("sm_100a", (10, 0), 227, 228, 2048, 32, 148, "B200"),
    ("sm_103a", (10, 3), 227, 228, 2048, 32, 148, "B300"),
    ("sm_110a", (11, 0), 227, 228, 1536, 24, 20, "Jetson T5000"),
    ("sm_120a", (12, 0), 99, 100, 1536, 24, 170, "RTX 5090"),
    ("sm_121a", (12, 1), 99, 100, 1536, 24, 48, "DGX Spark"),
)

TARGETS: dict[str, Target] = {
    arch: Target(arch, cc, block_kib * KIB, sm_kib * KIB, threads, blocks, sms, part)
    for arch, cc, block_kib, sm_kib, threads, blocks, sms, part in _TABLE
}

_FAMILIES = {
    "ampere": "sm_80",
    "ada": "sm_89",
    "hopper": "sm_90a",
    "blackwell": "sm_100a",
}


def get_target(arch: str | int | Target) -> Target:
    """The Target named ``arch``; takes ``sm_90a``, ``sm90a``, ``90a``, ``9.0``, ``hopper``.

    A bare number means the plain architecture where one exists (``90`` is sm_90) and else the
    architecture-specific one (``100`` is sm_100a).

    Raises:
        InvalidTypeError: neither a name, a number nor a Target.
        InvalidArgumentError: the name is not in the table.
    """
    if isinstance(arch, Target):
        return arch
    if isinstance(arch, bool) or not isinstance(arch, (str, int)):
        raise InvalidTypeError(
            "arch is not the name of an architecture",
            got=f"{arch!r} ({type(arch).__name__})",
            expected=f"one of {', '.join(TARGETS)} (or {', '.join(_FAMILIES)})",
            fix="pass its name, as in arch='sm_90a'",
        )
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
        fix="kernels for sm_80 run on every GPU since Ampere; cute-fa list says what each serves",
    )


def target_of_capability(capability: tuple[int, int]) -> Target:
    """The Target that serves a GPU of this compute capability with all its instructions.

    Where an architecture-specific target exists it is chosen (``sm_90a`` for (9, 0)): such code
    runs only on exactly that capability, which is the one at hand.

    Raises:
        InvalidArgumentError: no target in the table has this capability.
    """
    matches = [t for t in TARGETS.values() if t.compute_capability == tuple(capability)]
    if not matches:
        major, minor = capability
        raise InvalidArgumentError(
            "no target is known for this GPU",
            got=f"compute capability {major}.{minor}",
            expected="one of " + ", ".join(sorted({t.capability_text for t in TARGETS.values()})),
            fix="move the tensors to the CPU to run them in the simulator",
        )
    return max(matches, key=lambda t: len(t.arch))


def runs_on(built: str, target: Target) -> bool:
    """Whether a binary for ``built`` (e.g. "sm_100f") runs on the target.

    As the CUDA compatibility rules say: a plain architecture runs on later minor versions of its
    major version, ``f`` on its family, ``a`` on nothing else.
    """
    built = built.replace("sm_101", "sm_110")  # the first name of Thor's architecture
    if built == target.arch:
        return True
    digits = built.removeprefix("sm_").rstrip("af")
    major, minor = int(digits[:-1]), int(digits[-1])
    same_major = major == target.major and minor <= target.compute_capability[1]
    return same_major and not built.endswith("a")
