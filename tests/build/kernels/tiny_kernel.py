"""The tests' own kernel, ``y = factor · x`` on fp32 vectors; compiles in a fraction of a second.

``config.fault`` makes it misbehave; ``config.log`` is a file that gets a line per compile: process
id, and whether torch is loaded.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import cutlass
import cutlass.cute as cute
from cutlass.cute.runtime import make_fake_compact_tensor, make_fake_stream
from tiny_config import TinyConfig


class Scale:
    def __init__(self, config: TinyConfig) -> None:
        self.config = config
        if config.log:
            with Path(config.log).open("a") as log:
                log.write(f"{os.getpid()} {sys.modules.get('torch') is not None}\n")
        if config.fault == "crash":
            os.kill(os.getpid(), signal.SIGKILL)
        if config.fault == "raise":
            raise ValueError("the kernel is \x1b[31mbroken\x1b[0m")

    @cute.jit
    def __call__(self, x: cute.Tensor, y: cute.Tensor, stream):
        threads = self.config.num_threads
        self.kernel(x, y).launch(
            grid=[cute.ceil_div(cute.size(x), threads), 1, 1],
            block=[threads, 1, 1],
            stream=stream,
        )

    @cute.kernel
    def kernel(self, x: cute.Tensor, y: cute.Tensor):
        thread, _, _ = cute.arch.thread_idx()
        block, _, _ = cute.arch.block_idx()
        index = block * self.config.num_threads + thread
        if index < cute.size(x):
            y[index] = x[index] * self.config.factor


def fake_arguments(config: TinyConfig) -> tuple:
    size = cute.sym_int()
    x, y = (make_fake_compact_tensor(cutlass.Float32, (size,), stride_order=(0,)) for _ in range(2))
    return x, y, make_fake_stream(use_tvm_ffi_env_stream=True)
