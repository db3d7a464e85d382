"""What a kernel's host function asks the device that it launches on."""

from __future__ import annotations

import cutlass
from cutlass._mlir.dialects import llvm
from cutlass.cute import ffi
from cutlass.cutlass_dsl import T, dsl_user_op

MULTIPROCESSOR_COUNT = 16
"""cudaDevAttrMultiProcessorCount."""


@dsl_user_op
def multiprocessor_count(*, loc=None, ip=None) -> cutlass.Int32:
    """SMs of the current device, asked at each launch: the same code serves every part.

    The two calls are the DSL runtime's own (libcute_dsl_runtime), which compiled host code links to
    for its launches anyway.
    """
    pointer = llvm.PointerType.get()
    one = cutlass.Int32(1).ir_value(loc=loc, ip=ip)
    slot = llvm.alloca(pointer, one, T.i32(), loc=loc, ip=ip)
    get_device = ffi(name="_cudaGetDevice", params_types=[pointer], return_type=T.i32())
    get_attribute = ffi(
        name="_cudaDeviceGetAttribute",
        params_types=[pointer, T.i32(), T.i32()],
        return_type=T.i32(),
    )
    get_device(slot)
    device = llvm.load(T.i32(), slot, loc=loc, ip=ip)
    get_attribute(slot, cutlass.Int32(MULTIPROCESSOR_COUNT), cutlass.Int32(device))
    return cutlass.Int32(llvm.load(T.i32(), slot, loc=loc, ip=ip))
