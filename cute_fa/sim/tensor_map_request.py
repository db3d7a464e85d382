"""``cuTensorMapEncodeTiled`` as the stand-in for the runtime hands it over."""

from __future__ import annotations

import ctypes

from cute_fa.errors import InvalidArgumentError
from cute_fa.sim.tensor_map import (
    ELEMENT_BYTES,
    PACKED,
    TYPES,
    TensorMap,
    driver_type,
    encode,
)

# CUtensorMapSwizzle → span and atom; 5 exchanges 8-byte halves, which is not simulated.
_SWIZZLES = {0: (0, 16), 1: (32, 16), 2: (64, 16), 3: (128, 16), 4: (128, 32), 6: (128, 64)}


class TensorMapRequest(ctypes.Structure):
    """The structure of the same name in ``runtime.c``."""

    _fields_ = [
        ("map", ctypes.c_void_p),
        ("address", ctypes.c_uint64),
        ("extents", ctypes.POINTER(ctypes.c_uint64)),
        ("strides", ctypes.POINTER(ctypes.c_uint64)),
        ("box", ctypes.POINTER(ctypes.c_uint32)),
        ("steps", ctypes.POINTER(ctypes.c_uint32)),
        ("data_type", ctypes.c_int),
        ("rank", ctypes.c_int),
        ("swizzle", ctypes.c_int),
        ("fill", ctypes.c_int),
    ]


def encode_request(request: TensorMapRequest) -> bytes:
    """The 128 bytes of the map that is asked for.

    Raises:
        InvalidArgumentError: for what the driver would refuse, and for what is not simulated.
    """
    rank = request.rank
    if not 1 <= rank <= 5 or request.swizzle not in _SWIZZLES:
        raise InvalidArgumentError(
            "a tensor map that is not simulated",
            got=f"rank {rank}, swizzle {request.swizzle}",
            expected="1 to 5 dimensions, swizzles of 0, 32, 64 and 128 bytes without flips",
        )
    kind = driver_type(request.data_type)
    element = ELEMENT_BYTES[TYPES.index("f32" if kind == "tf32" else kind)]
    bits = PACKED[kind][0] if kind in PACKED else 8  # counted in bytes
    swizzle, atom = _SWIZZLES[request.swizzle]
    extents, box = ([x[i] for i in range(rank)] for x in (request.extents, request.box))
    return encode(
        TensorMap(
            address=request.address,
            kind=kind,
            element=element,
            extents=(extents[0] * bits // 8, *extents[1:]),
            strides=(element, *(request.strides[i] for i in range(rank - 1))),
            box=(box[0] * bits // 8, *box[1:]),
            steps=tuple(request.steps[i] for i in range(rank)),
            swizzle=swizzle,
            fill_nan=bool(request.fill),
            atom=atom,
        )
    )
