"""Tiny PTX kernels for tests: a body around which registers, addresses and the launch are given."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cute_fa import ptx
from cute_fa.sim.execute import Launch, execute
from cute_fa.sim.memory import GlobalMemory
from cute_fa.sim.wave import LaunchConfig, SimOptions

FRAME = """.version 8.8
.target {arch}
.address_size 64
.extern .shared .align 1024 .b8 smem[];
{module}
.visible .entry tiny(.param .u64 p_in, .param .u64 p_out, .param .u32 p_x)
{{
.reg .pred %p<32>;
.reg .b16 %h<32>;
.reg .b32 %r<128>;
.reg .b64 %rd<64>;
.reg .b32 %tid; .reg .b32 %lane; .reg .b32 %warp; .reg .b32 %index; .reg .b32 %smem;
.reg .b64 %in; .reg .b64 %out; .reg .b64 %in0; .reg .b64 %out0;
{declarations}
ld.param.u64 %in0, [p_in];
ld.param.u64 %out0, [p_out];
mov.u32 %tid, %tid.x;
and.b32 %lane, %tid, 31;
shr.u32 %warp, %tid, 5;
mov.u32 %r0, %ctaid.x;
mov.u32 %r1, %ntid.x;
mad.lo.s32 %index, %r0, %r1, %tid;
mov.u32 %r2, {in_bytes};
mul.wide.u32 %in, %index, %r2;
add.s64 %in, %in, %in0;
mov.u32 %r2, {out_bytes};
mul.wide.u32 %out, %index, %r2;
add.s64 %out, %out, %out0;
mov.u32 %smem, smem;
{body}
ret;
}}
"""
"""Given to the body: %tid %lane %warp; %index over the grid; %in %out: the thread's own bytes;
%in0 %out0: the first byte of all; %smem."""


@dataclass
class Result:
    """What a tiny kernel left: one row of uint32 per thread, and the launch."""

    out: np.ndarray
    launch: Launch
    text: str

    @property
    def rules(self) -> list[str]:
        return [hazard.rule for hazard in self.launch.hazards]

    def line(self, fragment: str, occurrence: int = 0) -> int:
        """1-based line of the text that holds ``fragment``."""
        lines = [n for n, text in enumerate(self.text.splitlines(), 1) if fragment in text]
        return lines[occurrence]


def run(
    body: str,
    data: np.ndarray | None = None,
    *,
    words: int = 1,
    threads: int = 32,
    ctas: int = 1,
    smem_bytes: int = 4096,
    declarations: str = "",
    module: str = "",
    memory: GlobalMemory | None = None,
    cluster: int = 1,
    **options: object,
) -> Result:
    """Run a tiny kernel.

    Args:
        data: input, split evenly over the threads of the grid (``%in``).
        words: 32-bit words of output per thread (``%out``).
        options: of ``SimOptions``; ``strict`` is False unless given.
    """
    total = threads * ctas
    data = np.zeros(4 * total, np.uint8) if data is None else np.ascontiguousarray(data)
    raw = np.zeros(data.nbytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    source = raw[start : start + data.nbytes]
    source[...] = data.reshape(-1).view(np.uint8)
    spare = np.zeros(total * words * 4 + 64, np.uint8)
    start = -spare.ctypes.data % 64
    out = spare[start : start + total * words * 4]
    out[...] = 0xEE
    memory = memory or GlobalMemory()
    bases = [memory.register(x, name=n).base for x, n in ((source, "input"), (out, "output"))]
    params = np.array(bases, np.uint64).tobytes() + np.array([7, 0], np.uint32).tobytes()
    settings = SimOptions(**{"strict": False, **options})  # type: ignore[arg-type]
    text = FRAME.format(
        arch=settings.arch,
        module=module,
        declarations=declarations,
        body=body,
        in_bytes=data.nbytes // total,
        out_bytes=words * 4,
    )
    config = LaunchConfig(
        "tiny", (ctas, 1, 1), (threads, 1, 1), (cluster, 1, 1), smem_bytes, params
    )
    launch = execute(ptx.parse(text), config, memory, settings)
    return Result(out.view(np.uint32).reshape(total, words), launch, text)
