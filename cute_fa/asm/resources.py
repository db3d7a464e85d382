"""What ptxas gave a kernel, read from the cubin itself.

Sources: the attributes of ``.nv.info`` and ``.nv.info.<kernel>`` (EIATTR_*, as nvdisasm names
them), section sizes, and the words of three instructions in the code, whose encoding has been
the same from sm_80 to sm_121 (the tests hold it against nvdisasm).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from cute_fa.asm.elf import Cubin, damage_refused

# EIATTR codes.
_MAX_THREADS = 0x05
_REQUIRED_THREADS = 0x10
_FRAME_SIZE = 0x11
_MIN_STACK_SIZE = 0x12
_CBANK_PARAM_SIZE = 0x19
_REGISTER_COUNT = 0x2F
_NUM_BARRIERS = 0x4C
_BARRIER_FLAGS_SHIFT, _BARRIER_FLAGS_MASK = 20, 0x7F
# EIFMT codes: no value, a byte, 16 bits, or a 16-bit length before the value.
_FORMAT_BYTE, _FORMAT_HALF, _FORMAT_SIZED = 2, 3, 4

# Shared memory that the driver keeps for itself counts into a kernel's section where the
# architecture has it (sm_90 on); the newer format says how much.
_RESERVED_SECTION = ".nv.shared.reserved.0"
_RESERVED_SYMBOL = ".nv.reservedSmem.cap"
_RESERVED_BYTES = 1024

# The low nine bits of an instruction's word: what it does, whatever its operands' kinds.
_OPCODE_MASK = 0x1FF
_LOAD_LOCAL = 0x183
_STORE_LOCAL = 0x187
_SET_MAX_REGISTERS = 0x1C8
_INSTRUCTION = struct.Struct("<QQ")
_SIZE_SHIFT, _SIZE_MASK = 9, 7
_ACCESS_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 8, 6: 16}


@dataclass(frozen=True)
class Resources:
    """Resources of one compiled kernel; bytes, and 32-bit registers per thread.

    Attributes:
        kernel: its name in the cubin.
        arch: e.g. ``sm_90``; the cubin does not tell ``sm_90`` from ``sm_90a``.
        registers: per thread, at launch.
        role_registers: what each ``setmaxnreg`` of the code asks for, in order of the code;
            empty if all warps keep ``registers``.
        stack_bytes: local memory per thread: spilled registers and local arrays.
        local_store_bytes, local_load_bytes: bytes that the code's local stores and loads move
            per thread if each runs once; what ptxas reports as spills, and local arrays too.
        static_smem_bytes: shared memory per block that the code declares itself.
        constant_bytes: of the kernel's own constant bank, parameters included.
        param_bytes: kernel parameters.
        max_threads: threads per block that the kernel was compiled for, or None.
        barriers: hardware barriers per block.
        code_bytes: size of the machine code.
    """

    kernel: str
    arch: str
    registers: int
    role_registers: tuple[int, ...]
    stack_bytes: int
    local_store_bytes: int
    local_load_bytes: int
    static_smem_bytes: int
    constant_bytes: int
    param_bytes: int
    max_threads: int | None
    barriers: int
    code_bytes: int

    @property
    def uses_local_memory(self) -> bool:
        """Whether anything was spilled or lives in a local array."""
        return bool(self.stack_bytes or self.local_store_bytes or self.local_load_bytes)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "role_registers": list(self.role_registers)}


def resources(cubin: bytes, kernel: str | None = None) -> Resources:
    """Read ``kernel``'s resources; the name may be left out where the cubin holds one kernel.

    Raises:
        InvalidArgumentError: no cubin or a damaged one, or no such kernel in it.
    """
    elf = Cubin(cubin)
    with damage_refused():
        return _resources(elf, elf.kernel(kernel))


def _resources(elf: Cubin, name: str) -> Resources:
    common = _function_attributes(elf, name)
    own = dict(_attributes(_data(elf, f".nv.info.{name}")))
    code = _data(elf, f".text.{name}")
    stores, loads, role_registers = _scan(code)
    return Resources(
        kernel=name,
        arch=f"sm_{elf.sm}",
        registers=common.get(_REGISTER_COUNT, 0),
        role_registers=role_registers,
        stack_bytes=max(common.get(_MIN_STACK_SIZE, 0), common.get(_FRAME_SIZE, 0)),
        local_store_bytes=stores,
        local_load_bytes=loads,
        static_smem_bytes=_static_smem(elf, name),
        constant_bytes=_size(elf, f".nv.constant0.{name}"),
        param_bytes=int.from_bytes(own.get(_CBANK_PARAM_SIZE, b""), "little"),
        max_threads=_threads(own.get(_REQUIRED_THREADS) or own.get(_MAX_THREADS)),
        barriers=_barriers(elf, name, own),
        code_bytes=len(code),
    )


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    """(EIATTR code, value) of each record of an ``.nv.info`` section."""
    at = 0
    while at + 4 <= len(data):
        form, code = data[at], data[at + 1]
        if form == _FORMAT_SIZED:
            size = int.from_bytes(data[at + 2 : at + 4], "little")
            yield code, data[at + 4 : at + 4 + size]
            at += 4 + size
        else:
            value = data[at + 2 : at + 4]
            yield code, {_FORMAT_BYTE: value[:1], _FORMAT_HALF: value}.get(form, b"")
            at += 4


def _function_attributes(elf: Cubin, kernel: str) -> dict[int, int]:
    """The ``.nv.info`` attributes that are (symbol, value) pairs and concern ``kernel``."""
    found = {}
    for code, value in _attributes(_data(elf, ".nv.info")):
        if len(value) == 8:
            symbol, number = struct.unpack("<II", value)
            if symbol < len(elf.symbols) and elf.symbols[symbol].name == kernel:
                found[code] = number
    return found


def _static_smem(elf: Cubin, kernel: str) -> int:
    size = _size(elf, f".nv.shared.{kernel}")
    reserved = next((s.value for s in elf.symbols if s.name == _RESERVED_SYMBOL), None)
    if reserved is None:
        reserved = _RESERVED_BYTES if elf.section(_RESERVED_SECTION) else 0
    return max(size - reserved, 0)


def _barriers(elf: Cubin, kernel: str, attributes: dict[int, bytes]) -> int:
    """Barrier count: an attribute in the newer format, section flags in the older."""
    if _NUM_BARRIERS in attributes:
        return int.from_bytes(attributes[_NUM_BARRIERS], "little")
    code = elf.section(f".text.{kernel}")
    return code.flags >> _BARRIER_FLAGS_SHIFT & _BARRIER_FLAGS_MASK if code else 0


def _scan(code: bytes) -> tuple[int, int, tuple[int, ...]]:
    """(bytes of local stores, bytes of local loads, operands of USETMAXREG)."""
    stores = loads = 0
    role_registers = []
    for low, high in _INSTRUCTION.iter_unpack(code[: len(code) // 16 * 16]):
        opcode = low & _OPCODE_MASK
        if opcode == _STORE_LOCAL:
            stores += _ACCESS_BYTES.get(high >> _SIZE_SHIFT & _SIZE_MASK, 0)
        elif opcode == _LOAD_LOCAL:
            loads += _ACCESS_BYTES.get(high >> _SIZE_SHIFT & _SIZE_MASK, 0)
        elif opcode == _SET_MAX_REGISTERS:
            role_registers.append(low >> 32)
    return stores, loads, tuple(role_registers)


def _threads(value: bytes | None) -> int | None:
    if not value or len(value) < 12:
        return None
    x, y, z = struct.unpack("<III", value[:12])
    return int(x * y * z)


def _data(elf: Cubin, name: str) -> bytes:
    section = elf.section(name)
    return section.data if section else b""


def _size(elf: Cubin, name: str) -> int:
    section = elf.section(name)
    return section.size if section else 0
