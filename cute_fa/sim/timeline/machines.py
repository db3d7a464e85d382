"""What the model knows of each GPU: throughputs and latencies of one SM, in cycles.

Sources, by the letter behind each line:

* P: CUDA C++ Programming Guide, table "Throughput of Native Arithmetic Instructions" (results per
  clock cycle per SM) and the table of technical specifications.
* W: the data sheet's dense tensor peak, divided by SMs and by the clock that it is stated for:
  A100 312 TFLOP/s, 108 SMs, 1.41 GHz; H100 SXM 989.4, 132, 1.83; B200 2250, 148, 1.85.
* F: the FlashAttention-4 paper's roofline of one SM: tensor core 8192 FLOP, exponentials 16, shared
  memory 128 bytes per cycle.
* M: published microbenchmarks, rounded: Luo et al., "Dissecting the NVIDIA Hopper Architecture
  through Microbenchmarking and Multiple Level Analysis" (arXiv 2501.12084), for A100 and H100.
* A: assumed. No figure that we could check is public; the order of magnitude is what matters.

Nothing here is fitted to a measurement of this project's kernels.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from cute_fa.errors import InvalidArgumentError

SCHEDULERS = 4  # P: warp schedulers of an SM; warp w of a CTA belongs to scheduler w % 4


@dataclass(frozen=True)
class MachineModel:
    """One SM of a GPU.

    Attributes:
        clock_ghz: the clock for which the data sheet's tensor peak is stated.
        results: results per cycle and SM of each kind of instruction; a warp's 32 results occupy a
            scheduler's share of the unit for 128 / results cycles.
        latency: cycles until the result of an instruction of that kind may be used.
        tensor_flops: FLOP per cycle and SM by width of the operands in bits.
        tensor_latency: from a product's last cycle to the end of the wait for it.
        shared_bytes: per cycle and SM, for threads and tensor core together.
        tmem_read_bytes, tmem_write_bytes: per cycle and SM; 0 without tensor memory.
        tmem_latency: of a load or store of tensor memory.
        copy_bytes: per cycle and SM between L2 and shared memory.
        copy_latency: from a bulk copy's issue to its last byte, beside the transfer.
        global_latency: of a thread's load that hits in L2.
        barrier_latency: from the last arrival at a named barrier to the waiting warps' next
            instruction; mbarrier_latency: the same for an mbarrier.
    """

    name: str
    arch: str
    clock_ghz: float
    results: dict[str, int]
    latency: dict[str, int]
    tensor_flops: dict[int, int]
    tensor_latency: int
    shared_bytes: int
    copy_bytes: int
    copy_latency: int
    global_latency: int
    barrier_latency: int
    mbarrier_latency: int
    tmem_read_bytes: int = 0
    tmem_write_bytes: int = 0
    tmem_latency: int = 0
    sm_count: int = field(default=1)

    @property
    def peak_tflops(self) -> float:
        """16-bit tensor peak of the whole GPU at ``clock_ghz``."""
        return self.tensor_flops[16] * self.sm_count * self.clock_ghz * 1e-3


_RESULTS = {
    "fma": 128,  # P: f32 add, multiply, multiply-add
    "imad": 64,  # P: 32-bit integer multiply-add
    "alu": 64,  # P: compare, minimum, maximum, integer add, shift, logic
    "mufu": 16,  # P, F: exp2, log2, reciprocal, …
    "convert": 64,  # P: between 32-bit types and others
    "shuffle": 32,  # P: warp shuffle
    "vote": 64,  # P: warp vote; elect
}
_LATENCY = {
    "fma": 4,  # M
    "imad": 4,  # M
    "alu": 5,  # M
    "mufu": 18,  # M
    "convert": 8,  # A
    "shuffle": 23,  # M
    "vote": 6,  # A
    "shared": 29,  # M
    "mma": 33,  # M: mma.sync m16n8k16 of 16-bit inputs
}

A100 = MachineModel(
    name="A100",
    arch="sm_80",
    clock_ghz=1.41,  # W
    results={**_RESULTS, "convert": 16},  # P
    latency=_LATENCY,
    tensor_flops={16: 2048},  # W
    tensor_latency=0,
    shared_bytes=128,  # P: 32 banks of 4 bytes
    copy_bytes=64,  # A: L2 to one SM
    copy_latency=400,  # A
    global_latency=260,  # M: hit in L2
    barrier_latency=20,  # A
    mbarrier_latency=20,  # A
    sm_count=108,  # P
)
H100 = replace(
    A100,
    name="H100 SXM",
    arch="sm_90a",
    clock_ghz=1.83,  # W
    results=_RESULTS,
    tensor_flops={16: 4096, 8: 8192},  # W
    tensor_latency=18,  # M: what a wgmma takes beyond its share of the tensor core
    copy_latency=600,  # A
    sm_count=132,  # P
)
B200 = replace(
    H100,
    name="B200",
    arch="sm_100a",
    clock_ghz=1.85,  # W
    tensor_flops={16: 8192, 8: 16384, 4: 32768},  # W, F
    tensor_latency=30,  # A
    tmem_read_bytes=512,  # A: 128 bytes per cycle for each of the four warps of a warpgroup
    tmem_write_bytes=512,  # A
    tmem_latency=20,  # A
    sm_count=148,  # P
)
B300 = replace(
    B200,
    name="B300",
    arch="sm_103a",
    results={**_RESULTS, "mufu": 32},  # F: twice the exponentials of B200
)

MACHINES: dict[str, MachineModel] = {m.arch: m for m in (A100, H100, B200, B300)}


def machine_of(arch: str) -> MachineModel:
    """The model for an architecture.

    Raises:
        InvalidArgumentError: there is none.
    """
    if arch not in MACHINES:
        raise InvalidArgumentError(
            "no machine model for this architecture", got=arch, expected=", ".join(MACHINES)
        )
    return MACHINES[arch]
