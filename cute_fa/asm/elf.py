"""The parts of a cubin: an ELF64 file with NVIDIA's sections (standard library only)."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

from cute_fa.errors import InvalidArgumentError

_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_SECTION = struct.Struct("<IIQQQQIIQQ")
_SYMBOL = struct.Struct("<IBBHQQ")
_MACHINE_CUDA = 190
_SHT_SYMTAB = 2
_SHT_NOBITS = 8
# Since this version of the cubin format the architecture stands in another byte of e_flags.
_ABI_VERSION_NEW = 8


@contextmanager
def damage_refused() -> Iterator[None]:
    """Take what reading a damaged cubin runs into for what it is.

    Raises:
        InvalidArgumentError: instead of a number out of range, bytes that are no text, and so on.
    """
    try:
        yield
    except (struct.error, IndexError, ValueError, OverflowError) as error:
        if isinstance(error, InvalidArgumentError):
            raise
        raise InvalidArgumentError(
            "this cubin is cut short or damaged",
            got=f"{type(error).__name__}: {error}",
            expected="sections, names and symbols that lie within the file",
            fix="compile it again",
        ) from None


def _is_bytes(data: object) -> bool:
    return isinstance(data, (bytes, bytearray, memoryview))


@dataclass(frozen=True)
class Section:
    """One section; ``data`` is empty where the file holds none (NOBITS)."""

    name: str
    type: int
    flags: int
    size: int
    info: int
    data: bytes


@dataclass(frozen=True)
class Symbol:
    """One symbol; ``section`` is the index of its section."""

    name: str
    value: int
    size: int
    section: int


class Cubin:
    """A parsed cubin.

    Raises:
        InvalidArgumentError: the bytes are no little-endian ELF64 file for CUDA, or a damaged one.
    """

    def __init__(self, data: bytes) -> None:
        if not _is_bytes(data) or bytes(data[:4]) != b"\x7fELF":
            start = f" starting with {bytes(data[:12])!r}" if _is_bytes(data) else ""
            raise InvalidArgumentError(
                "this is no cubin",
                got=f"{type(data).__name__}{start}",
                expected=r"the bytes of an ELF file, which start with b'\x7fELF'",
                fix="pass the file's contents, not its path",
            )
        self._data = bytes(data)
        with damage_refused():
            self._read_header()
            self.symbols = tuple(self._read_symbols())

    def _read_header(self) -> None:
        (ident, _, machine, _, _, _, offset, self.flags, _, _, _, size, count, names) = (
            _HEADER.unpack_from(self._data)
        )
        if ident[4:6] != b"\x02\x01" or machine != _MACHINE_CUDA:
            raise InvalidArgumentError(
                "this ELF file is not for a CUDA device",
                got=f"class {ident[4]}, data {ident[5]}, machine {machine}",
                expected=f"class 2, data 1, machine {_MACHINE_CUDA}",
                fix="pass a file that ptxas or cute-fa compile -o wrote",
            )
        self.abi_version = ident[8]
        raw = [_SECTION.unpack_from(self._data, offset + i * size) for i in range(count)]
        strings = raw[names][4]
        self.sections = tuple(
            Section(
                name=self._string(strings + entry[0]),
                type=entry[1],
                flags=entry[2],
                size=entry[5],
                info=entry[7],
                data=b"" if entry[1] == _SHT_NOBITS else self._bytes(entry[4], entry[5]),
            )
            for entry in raw
        )
        self._symbol_strings = next((raw[e[6]][4] for e in raw if e[1] == _SHT_SYMTAB), 0)

    def _bytes(self, offset: int, size: int) -> bytes:
        if offset + size > len(self._data):
            raise ValueError(f"bytes {offset} to {offset + size} of {len(self._data)}")
        return self._data[offset : offset + size]

    def _string(self, offset: int) -> str:
        return self._data[offset : self._data.index(b"\0", offset)].decode()

    @property
    def sm(self) -> int:
        """The architecture's number, e.g. 90 for sm_90 and for sm_90a."""
        return (self.flags >> 8 if self.abi_version >= _ABI_VERSION_NEW else self.flags) & 0xFF

    def _read_symbols(self) -> Iterator[Symbol]:
        table = next((s for s in self.sections if s.type == _SHT_SYMTAB), None)
        for name, _, _, index, value, size in _SYMBOL.iter_unpack(table.data if table else b""):
            yield Symbol(self._string(self._symbol_strings + name), value, size, index)

    @cached_property
    def kernels(self) -> tuple[str, ...]:
        """Names of the entry functions: those with code and launch information."""
        names = {section.name for section in self.sections}
        prefix = ".text."
        return tuple(
            section.name[len(prefix) :]
            for section in self.sections
            if section.name.startswith(prefix)
            and f".nv.info.{section.name[len(prefix) :]}" in names
        )

    def section(self, name: str) -> Section | None:
        return next((section for section in self.sections if section.name == name), None)

    def kernel(self, name: str | None) -> str:
        """``name`` if there is such a kernel; without a name the only kernel.

        Raises:
            InvalidArgumentError: no such kernel, or several and none named.
        """
        if name is None and len(self.kernels) == 1:
            return self.kernels[0]
        if name is None or name not in self.kernels:
            raise InvalidArgumentError(
                "the cubin holds no kernel of that name" if name else "which kernel of the cubin?",
                got=repr(name),
                expected=f"one of {', '.join(self.kernels) or 'none'}",
                fix="name one of these" if self.kernels else "pass a cubin that holds a kernel",
            )
        return name
