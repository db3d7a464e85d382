#!/usr/bin/env python3
"""Check and time a bundle of kernels on the GPU of this machine, in under eight minutes.

    python tools/gpu_check.py BUNDLE [-o report.json] [--tune | --tune-only]

Every kernel that the GPU runs: its results against the fp64 reference and exact answers, again and
again bit by bit, and against what the simulator computed when the bundle was made; then the
benchmark beside other libraries. ``--tune`` lets the candidate configurations of the bundle compete
and writes the winners into it; ``--tune-only`` does just that, and a check that follows is about
the winners. Needs torch, apache-tvm-ffi and cute_fa; no compiler. Exit codes: 0 all passed, 1 a
check failed, 2 bad usage, 3 no GPU.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cute_fa.gpu_check.run import main

if __name__ == "__main__":
    sys.exit(main())
