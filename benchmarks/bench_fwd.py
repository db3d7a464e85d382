#!/usr/bin/env python3
"""Time the forward on a GPU beside PyTorch's back ends and other libraries; ``cute-fa bench``.

    python benchmarks/bench_fwd.py [--set all] [--dtype float16,bfloat16] [-o DIR] …

Shapes and FLOPs as in the FlashAttention papers. Each result is checked before it is timed; the
competitors take turns; the L2 cache is overwritten before each call; medians with their spread,
the GPU's clocks and throttle reasons, and the speed of a matrix product of the same run are kept
as JSON, CSV and plots. ``--host`` times what a call costs on the host and needs no GPU.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cute_fa.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["bench", *sys.argv[1:]]))
