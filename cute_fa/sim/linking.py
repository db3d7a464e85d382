"""Host code that the DSL links in memory calls the simulator's runtime by names of its own.

MLIR's execution engines look symbols up in everything that the process has loaded globally, and
load their own libraries that way. The stand-in and NVIDIA's runtime define the same names, so
whichever came first would serve simulated and real programs alike. The stand-in that an engine
loads therefore has a prefix on its names, which modules and objects call once they are linked; what
the DSL keeps of them, and exports, is as it was.
"""

from __future__ import annotations

import functools
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from cute_fa.sim.patching import Patches
from cute_fa.sim.runtime import NAME_PREFIX, runtime

_SYMBOL_TABLE = 2  # SHT_SYMTAB
_UNDEFINED = 0  # SHN_UNDEF

# What host code calls of the DSL's runtime library; runtime.c defines what of it is known.
_RUNTIME_NAME = re.compile(r"_cu[a-zA-Z]|cuda_dialect_|CuteDSLRT_")


def install(patches: Patches) -> None:
    """Patch the DSL's ways to link into this process: a module, and the object made of one."""
    from cutlass._mlir._mlir_libs._cutlass_ir import _execution_engine
    from cutlass.base_dsl import compiler, env_manager
    from cutlass.base_dsl.export import ExternalBinaryModule

    link = compiler.Compiler.jit

    @functools.wraps(link)
    def jit(self: Any, module: Any, *args: Any, **kwargs: Any) -> Any:
        with _prefixed_names(module):
            return link(self, module, *args, **kwargs)

    patches.set(compiler.Compiler, "jit", jit)

    engines: Any = _execution_engine  # a binary module without type information
    link_object = engines.BinaryExecutionEngine

    def engine(data: bytes, *args: Any) -> Any:
        return link_object(prefixed_object(data) if data else data, *args)

    patches.set(engines, "BinaryExecutionEngine", engine)
    patches.set(ExternalBinaryModule.load_provider, "execution_engine_constructor", engine)
    patches.set(env_manager, "get_prefix_dsl_libs", lambda prefix: str(runtime().prefixed_path))


def prefixed_object(data: bytes) -> bytes:
    """A relocatable ELF64 object whose undefined runtime symbols carry ``NAME_PREFIX``.

    A section header has 64 bytes (type at 4, offset at 24, size at 32, link at 40) and a symbol 24
    (name at 0, section at 6). The new names go into a copy of the string table at the end.
    """
    result = bytearray(data)
    (headers,) = struct.unpack_from("<Q", data, 40)
    (count,) = struct.unpack_from("<H", data, 60)
    for header in range(headers, headers + 64 * count, 64):
        (kind,) = struct.unpack_from("<I", data, header + 4)
        if kind != _SYMBOL_TABLE:
            continue
        start, size, link = struct.unpack_from("<QQI", data, header + 24)
        strings = headers + 64 * link
        names_start, names_size = struct.unpack_from("<QQ", data, strings + 24)
        names = bytearray(data[names_start : names_start + names_size])
        for symbol in range(start, start + size, 24):
            name_at, section = struct.unpack_from("<I2xH", data, symbol)
            name = bytes(names[name_at : names.index(0, name_at)]).decode()
            if section == _UNDEFINED and _RUNTIME_NAME.match(name):
                struct.pack_into("<I", result, symbol, len(names))
                names += (NAME_PREFIX + name).encode() + b"\0"
        struct.pack_into("<QQ", result, strings + 24, len(result), len(names))
        result += names
    return bytes(result)


@contextmanager
def _prefixed_names(module: Any) -> Iterator[None]:
    """Let an MLIR module (LLVM dialect) call the prefixed runtime functions meanwhile."""
    functions = _runtime_functions(module)
    for function, name in functions:
        _rename(module, function, name, NAME_PREFIX + name)
    try:
        yield
    finally:
        for function, name in functions:
            _rename(module, function, NAME_PREFIX + name, name)


def _runtime_functions(module: Any) -> list[tuple[Any, str]]:
    """The declarations of runtime functions, which the module never defines, and their names."""
    declarations = [
        (op, op.attributes["sym_name"].value)
        for op in module.body.operations
        if op.name == "llvm.func" and not op.regions[0].blocks
    ]
    return [(op, name) for op, name in declarations if _RUNTIME_NAME.match(name)]


def _rename(module: Any, function: Any, old: str, new: str) -> None:
    from cutlass._mlir import ir

    mlir: Any = ir  # its classes come from a binary module without type information
    table = mlir.SymbolTable
    table.replace_all_symbol_uses(old, new, module.operation)
    table.set_symbol_name(function, new)
