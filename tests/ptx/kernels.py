"""Small kernels for tests, parsed."""

from __future__ import annotations

from cute_fa import ptx


def kernel_of(body: str, target: str = "sm_80") -> ptx.Kernel:
    """A kernel without parameters, from what stands between its braces."""
    header = f".version 8.8\n.target {target}\n.address_size 64\n"
    return ptx.parse(f"{header}.entry k()\n{{\n{body}\n}}\n").kernels["k"]
