"""The registry's row of the tests' own kernel."""

from __future__ import annotations

from cute_fa.build.registry import KernelEntry
from cute_fa.target import TARGETS

TINY = KernelEntry(
    generation="tiny",
    direction="fwd",
    archs=tuple(arch for arch in TARGETS if arch != "sm_87"),
    kernel="tiny_kernel:Scale",
    arguments="tiny_kernel:fake_arguments",
    pick="tiny_config:pick_fwd",
    sources=("tiny_kernel", "tiny_config"),
    summary="y = factor · x",
    features=(),
    automatic=False,
)
