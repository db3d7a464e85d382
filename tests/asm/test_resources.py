"""Resources read from cubins, held against NVIDIA's own tools and against hand-made ELF files."""

from __future__ import annotations

import random
import re
import struct
from collections.abc import Callable

import pytest

from cute_fa.asm import ctas_per_sm, occupancy, resources, sass
from cute_fa.asm.elf import Cubin
from cute_fa.asm.mix import access_bytes
from cute_fa.asm.resources import Resources
from cute_fa.asm.tools import run_on_cubin
from cute_fa.errors import InvalidArgumentError
from cute_fa.target import KIB, TARGETS

ARCHS = ("sm_80", "sm_90a", "sm_100a", "sm_120a")
RESERVED_BYTES = 1024


@pytest.fixture(params=ARCHS)
def arch(request: pytest.FixtureRequest) -> str:
    return request.param


def test_resources_of_a_kernel(compile_kernel: Callable, arch: str) -> None:
    found = resources(compile_kernel(arch).cubin)
    assert found.arch == arch.rstrip("a")
    assert found.kernel == Cubin(compile_kernel(arch).cubin).kernels[0]
    assert 16 <= found.registers <= 255
    # 32 floats per thread live in local memory: each stored once, one load in the loop.
    assert found.stack_bytes >= 32 * 4
    assert found.local_store_bytes == 32 * 4
    assert found.local_load_bytes == 4
    assert found.uses_local_memory
    assert found.static_smem_bytes == 0
    assert found.param_bytes == 32
    assert found.constant_bytes > found.param_bytes
    assert found.max_threads == 256
    assert found.barriers == 1
    assert found.role_registers == ()
    assert found.code_bytes % 128 == 0


@pytest.mark.usefixtures("cuobjdump")
def test_they_agree_with_cuobjdump(compile_kernel: Callable, arch: str) -> None:
    cubin = compile_kernel(arch).cubin
    found = resources(cubin)
    printed = run_on_cubin("cuobjdump", cubin, "--dump-resource-usage")
    theirs = {name: int(value) for name, value in re.findall(r"(\w+(?:\[0\])?):(\d+)", printed)}
    assert theirs["REG"] == found.registers
    assert theirs["STACK"] == found.stack_bytes
    assert theirs["CONSTANT[0]"] == found.constant_bytes
    # cuobjdump counts what the driver reserves, where a kernel has shared memory at all.
    assert theirs["SHARED"] in (found.static_smem_bytes, found.static_smem_bytes + RESERVED_BYTES)


@pytest.mark.usefixtures("nvdisasm")
def test_local_bytes_agree_with_the_disassembly(compile_kernel: Callable, arch: str) -> None:
    cubin = compile_kernel(arch).cubin
    found = resources(cubin)
    code = sass(cubin).code
    assert sum(access_bytes(i) for i in code if i.op == "STL") == found.local_store_bytes > 0
    assert sum(access_bytes(i) for i in code if i.op == "LDL") == found.local_load_bytes > 0


@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a"])
def test_registers_of_roles(compile_kernel: Callable, arch: str) -> None:
    assert resources(compile_kernel(arch, roles=True).cubin).role_registers == (40, 232)


@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a"])
@pytest.mark.usefixtures("nvdisasm")
def test_registers_of_roles_agree_with_the_disassembly(compile_kernel: Callable, arch: str) -> None:
    cubin = compile_kernel(arch, roles=True).cubin
    operands = [i.operands.split(",")[-1] for i in sass(cubin).code if i.op == "USETMAXREG"]
    assert tuple(int(o, 16) for o in operands) == resources(cubin).role_registers


def section_header(name: int, kind: int, flags: int, offset: int, size: int, link: int) -> bytes:
    return struct.pack("<IIQQQQIIQQ", name, kind, flags, 0, offset, size, link, 0, 4, 24)


def hand_made_cubin(
    *, smem: int, reserved_cap: int | None, has_reserved_section: bool, abi_version: int = 8
) -> bytes:
    """The smallest cubin of kernel ``k`` for sm_80 or sm_90 whose resources are known by heart."""
    symbols = [(b"", 0), (b"k", 0)]
    if reserved_cap is not None:
        symbols.append((b".nv.reservedSmem.cap", reserved_cap))
    strings = b"\0"
    table = b""
    for name, value in symbols:
        table += struct.pack("<IBBHQQ", len(strings) if name else 0, 0, 0, 0, value, 0)
        strings += name + b"\0"
    record = struct.Struct("<BBHII")
    info = record.pack(4, 0x2F, 8, 1, 96) + record.pack(4, 0x12, 8, 1, 48)
    info += record.pack(4, 0x2F, 8, 0, 7)  # of another symbol
    own = struct.pack("<BBH", 3, 0x19, 200) + struct.pack("<BBHIII", 4, 0x05, 12, 8, 4, 2)
    own += struct.pack("<BBBB", 2, 0x4C, 5, 0) + struct.pack("<BBH", 1, 0x35, 0)
    sections: list[tuple[bytes, int, bytes, int]] = [
        (b"", 0, b"", 0),
        (b".symtab", 2, table, 2),
        (b".strtab", 3, strings, 0),
        (b".nv.info", 0x70000000, info, 1),
        (b".nv.info.k", 0x70000000, own, 1),
        (b".text.k", 1, bytes(128), 0),
        (b".nv.shared.k", 8, bytes(smem), 0),
    ]
    if has_reserved_section:
        sections.append((b".nv.shared.reserved.0", 8, b"", 0))
    names = b""
    offsets = []
    for name, *_ in sections:
        offsets.append(len(names))
        names += name + b"\0"
    name_of_names = len(names)
    names += b".shstrtab\0"
    body = b""
    headers = b""
    for offset, (_, kind, data, link) in zip(offsets, sections, strict=True):
        headers += section_header(offset, kind, 0, 64 + len(body), len(data), link)
        body += b"" if kind == 8 else data
    headers += section_header(name_of_names, 3, 0, 64 + len(body), len(names), 0)
    body += names
    ident = b"\x7fELF\x02\x01\x01\x41" + bytes([abi_version]) + bytes(7)
    flags = 0x6005A04 if abi_version >= 8 else 0x500550
    return (
        struct.pack(
            "<16sHHIQQQIHHHHHH",
            *(ident, 2, 190, 1, 0, 0, 64 + len(body), flags, 64, 0, 0, 64),
            *(len(sections) + 1, len(sections)),
        )
        + body
        + headers
    )


def test_every_field_of_a_hand_made_cubin() -> None:
    cubin = hand_made_cubin(smem=3072, reserved_cap=None, has_reserved_section=True)
    assert resources(cubin, "k") == Resources(
        kernel="k",
        arch="sm_90",
        registers=96,
        role_registers=(),
        stack_bytes=48,
        local_store_bytes=0,
        local_load_bytes=0,
        static_smem_bytes=2048,
        constant_bytes=0,
        param_bytes=200,
        max_threads=64,
        barriers=5,
        code_bytes=128,
    )


@pytest.mark.parametrize(
    ("smem", "cap", "section", "expected"),
    [
        (512, None, False, 512),  # sm_80: nothing is reserved
        (0, None, True, 0),
        (1024, None, True, 0),
        (1536, None, True, 512),
        (1536, 1024, True, 512),
        (4096, 2048, True, 2048),
    ],
)
def test_static_shared_memory_is_without_what_the_driver_reserves(
    smem: int, cap: int | None, section: bool, expected: int
) -> None:
    cubin = hand_made_cubin(smem=smem, reserved_cap=cap, has_reserved_section=section)
    assert resources(cubin).static_smem_bytes == expected


def test_the_older_format_says_its_architecture_elsewhere() -> None:
    cubin = hand_made_cubin(smem=0, reserved_cap=None, has_reserved_section=False, abi_version=7)
    assert resources(cubin).arch == "sm_80"


def test_any_damage_is_refused_or_harmless() -> None:
    """Never another exception: where a number is wrong, and where the file ends."""
    whole = hand_made_cubin(smem=0, reserved_cap=None, has_reserved_section=False)
    generator, refused = random.Random(3), 0
    for _ in range(400):
        end = generator.choice((len(whole), generator.randrange(len(whole))))
        damaged = bytearray(whole[:end])
        at = generator.randrange(len(damaged) or 1)
        damaged[at : at + 8] = generator.randbytes(min(8, len(damaged) - at))
        try:
            resources(damaged)
        except InvalidArgumentError as error:
            refused += 1
            assert error.got is not None and error.expected is not None and error.fix
    assert refused > 200
    for no_bytes in (3, None, "path.cubin"):
        with pytest.raises(InvalidArgumentError, match="this is no cubin"):
            Cubin(no_bytes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"", "no cubin"),
        (b"/tmp/kernel.cubin", "contents, not its path"),
        (b"\x7fELF", "cut short"),
        (hand_made_cubin(smem=0, reserved_cap=None, has_reserved_section=False)[:100], "cut short"),
        (b"\x7fELF\x01\x01\x01" + bytes(60), "not for a CUDA device"),
        (b"\x7fELF\x02\x01\x01" + bytes(60), "not for a CUDA device"),
    ],
)
def test_what_is_no_cubin_is_refused(data: bytes, match: str) -> None:
    with pytest.raises(InvalidArgumentError, match=match):
        resources(data)


def test_a_kernel_that_is_not_there_is_named_with_those_that_are() -> None:
    cubin = hand_made_cubin(smem=0, reserved_cap=None, has_reserved_section=False)
    with pytest.raises(InvalidArgumentError, match=r"(?s)'other'.*one of k"):
        resources(cubin, "other")


def using(registers: int, static_smem_bytes: int = 0) -> Resources:
    return Resources(
        kernel="k",
        arch="sm_80",
        registers=registers,
        role_registers=(),
        stack_bytes=0,
        local_store_bytes=0,
        local_load_bytes=0,
        static_smem_bytes=static_smem_bytes,
        constant_bytes=0,
        param_bytes=0,
        max_threads=None,
        barriers=0,
        code_bytes=0,
    )


@pytest.mark.parametrize(
    ("arch", "threads", "registers", "static", "dynamic", "expected"),
    [
        # 164 KiB / (48 + 1) KiB
        ("sm_80", 128, 128, 0, 48 * KIB, (3, "shared memory")),
        ("sm_80", 128, 128, 8 * KIB, 40 * KIB, (3, "shared memory")),
        # 16384 / (168 · 32) = 3 warps in each partition, 12 in all, 4 per block
        ("sm_80", 128, 168, 0, 16 * KIB, (3, "registers")),
        # 161 is rounded up to 168
        ("sm_80", 128, 161, 0, 16 * KIB, (3, "registers")),
        # 16384 / (80 · 32) = 6 warps in each partition: 24, though 65536 / 2560 is 25
        ("sm_80", 32, 80, 0, 0, (24, "registers")),
        ("sm_80", 256, 32, 0, 0, (8, "threads")),
        ("sm_86", 256, 32, 0, 0, (6, "threads")),
        ("sm_86", 32, 32, 0, 0, (16, "blocks")),
        ("sm_89", 32, 32, 0, 0, (24, "blocks")),
        ("sm_90a", 384, 168, 0, 227 * KIB, (1, "registers")),
        ("sm_90a", 256, 64, 0, 227 * KIB, (1, "shared memory")),
        ("sm_120a", 128, 64, 0, 49 * KIB, (2, "shared memory")),
        # 33 threads take two warps
        ("sm_80", 33, 255, 0, 0, (4, "registers")),
        ("sm_86", 128, 64, 0, 120 * KIB, (0, "shared memory")),
        ("sm_80", 1024, 255, 0, 0, (0, "registers")),
    ],
)
def test_occupancy(
    arch: str,
    threads: int,
    registers: int,
    static: int,
    dynamic: int,
    expected: tuple[int, str],
) -> None:
    used = using(registers, static)
    found = occupancy(used, dynamic, threads, arch)
    assert (found.ctas, found.limited_by) == expected
    assert found.ctas == min(found.limits.values())
    assert ctas_per_sm(used, dynamic, threads, TARGETS[arch]) == found.ctas


def test_every_target_has_its_number_of_blocks() -> None:
    for arch in TARGETS:
        assert occupancy(using(1), 0, 32, arch).limits["blocks"] in (16, 24, 32)


@pytest.mark.parametrize(("threads", "dynamic"), [(0, 0), (128, -1)])
def test_impossible_launches_are_refused(threads: int, dynamic: int) -> None:
    with pytest.raises(InvalidArgumentError, match="no launch"):
        occupancy(using(32), dynamic, threads, "sm_80")
