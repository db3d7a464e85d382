"""``cuTensorMapEncodeTiled`` as the stand-in for the runtime hands it over."""

from __future__ import annotations

import ctypes

from cute_fa.errors import InvalidArgumentError
from cute_fa.sim.tensor_map import ELEMENT_BYTES, TYPES, TensorMap, driver_type, encode

_SWIZZLES = (0, 32, 64, 128)  # CUtensorMapSwizzle; the variants of 128 bytes are not simulated


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
    if not 1 <= rank <= 5 or not 0 <= request.swizzle < len(_SWIZZLES):
        raise InvalidArgumentError(
            "a tensor map that is not simulated",
            got=f"rank {rank}, swizzle {request.swizzle}",
            expected="1 to 5 dimensions, swizzles of 0, 32, 64 and 128 bytes",
        )
    kind = driver_type(request.data_type)
    element = ELEMENT_BYTES[TYPES.index(kind)]
    return encode(
        TensorMap(
            address=request.address,
            kind=kind,
            element=element,
            extents=tuple(request.extents[i] for i in range(rank)),
            strides=(element, *(request.strides[i] for i in range(rank - 1))),
            box=tuple(request.box[i] for i in range(rank)),
            steps=tuple(request.steps[i] for i in range(rank)),
            swizzle=_SWIZZLES[request.swizzle],
            fill_nan=bool(request.fill),
        )
    )
