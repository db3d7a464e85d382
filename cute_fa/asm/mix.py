"""Instruction classes, MMA shapes and access widths, of SASS and of PTX alike."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

from cute_fa.asm.sass import SassInstr
from cute_fa.ptx import Instr

# In the order in which a report lists them.
CLASSES = (
    "tensor",
    "tensor memory",
    "mufu",
    "fp32",
    "fp16",
    "fp64",
    "convert",
    "int",
    "uniform",
    "move",
    "warp",
    "shared",
    "async copy",
    "tma",
    "global",
    "local",
    "constant",
    "sync",
    "branch",
    "other",
)

_SASS_CLASSES: dict[str, str] = {
    op: name
    for name, ops in {
        "tensor": "HMMA IMMA DMMA BMMA QMMA OMMA HGMMA IGMMA QGMMA BGMMA",
        "tensor memory": "LDTM STTM UTCCP UTCSHIFT UTCATOMSWS UTCSTSWS UVIRTCOUNT",
        "mufu": "MUFU",
        "fp32": "FADD FMUL FFMA FMNMX FMNMX3 FSETP FSET FSEL FCHK FADD2 FMUL2 FFMA2 FADD32I FMUL32I"
        " FFMA32I FADD3 FSWZADD FCMP FHADD FHFMA",
        "fp16": "HADD2 HMUL2 HFMA2 HMNMX2 HSET2 HSETP2 HADD2_32I HFMA2_MMA",
        "fp64": "DADD DMUL DFMA DSETP DMNMX DSET",
        "convert": "F2F F2FP F2I F2IP I2F I2FP I2I I2IP FRND UF2FP UI2F UI2FP UF2I UI2I UI2IP",
        "move": "MOV MOV32I CS2R S2R S2UR R2UR P2R R2P SEL R2B B2R BMOV RPCMOV MOVM",
        "warp": "SHFL VOTE MATCH REDUX CREDUX ELECT VOTEU",
        "shared": "LDS STS LDSM STSM ATOMS LDSLK STSCUL STAS",
        "async copy": "LDGSTS",
        "tma": "UTMALDG UTMASTG UTMAREDG UTMAPF UTMACCTL UBLKCP UBLKRED UBLKPF REDAS",
        "global": "LDG STG LD ST ATOM ATOMG RED REDG CCTL CCTLL LDGMC",
        "local": "LDL STL",
        "constant": "LDC ULDC LDCU",
        "sync": "BAR SYNCS DEPBAR LDGDEPBAR MEMBAR FENCE ERRBAR WARPSYNC UCGABAR_ARV UCGABAR_WAIT"
        " CGAERRBAR ARRIVES WARPGROUP WARPGROUPSET UTCBAR UTMACMDFLUSH ACQBULK PREEXIT NANOSLEEP"
        " YIELD USETMAXREG USETSHMSZ UGETNEXTWORKID CCTLT ACQSHMINIT",
        "branch": "BRA BRX BRXU JMP JMX CALL RET EXIT BSSY BSYNC BREAK KILL BPT LEPC",
        "int": "IADD IADD3 IMAD IMNMX IABS ISETP LEA LOP LOP3 SHF SHL SHR POPC FLO BREV BMSK SGXT"
        " PRMT VABSDIFF VABSDIFF4 IDP IDP4A ISCADD VIADD VIMNMX VIMNMX3 VIADDMNMX IADD32I LOP32I"
        " PLOP3 PSETP ICMP BFE BFI VHMNMX IMUL LOP3X",
    }.items()
    for op in ops.split()
}
_SASS_MOVES = ("IMAD.MOV", "IMAD.U32")
_TENSOR_CORE_5 = re.compile(r"UTC\w*MMA$")

_PTX_CLASSES: dict[str, str] = {
    op: name
    for name, ops in {
        "tensor": "mma",
        "mufu": "ex2 lg2 rcp rsqrt sqrt sin cos tanh",
        "convert": "cvt",
        "move": "mov selp slct cvta mapa isspacep getctarank",
        "warp": "shfl vote match redux elect activemask movmatrix",
        "shared": "ldmatrix stmatrix",
        "sync": "mbarrier bar barrier fence membar nanosleep griddepcontrol setmaxnreg"
        " clusterlaunchcontrol",
        "branch": "bra brx ret exit call trap brkpt",
    }.items()
    for op in ops.split()
}
_PTX_MEMORY = ("ld", "ldu", "st", "atom", "red", "multimem", "prefetch", "prefetchu", "wmma")
_PTX_SPACES = {"shared": "shared", "local": "local", "const": "constant", "param": "constant"}
_SYNC_WORDS = {"commit_group", "wait_group", "wait_all", "mbarrier"}

_HMMA_SHAPE = re.compile(r"^(8|16)(8)(4|8|16|32|64|128|256)$")
_WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32, "ENL2": 32}
_SHAPE = re.compile(r"m\d+n\d+k\d+")


def sass_class(instr: SassInstr) -> str:
    """The class of a machine instruction, one of CLASSES."""
    op = instr.op
    if instr.opcode.startswith(_SASS_MOVES):
        return "move"
    if op == "HFMA2" and instr.operands.partition(",")[2].startswith("-RZ,RZ,"):
        return "move"  # how ptxas writes a constant into a register
    known = _SASS_CLASSES.get(op)
    if known is not None:
        return known
    if _TENSOR_CORE_5.match(op):
        return "tensor"
    if op.startswith(("TEX", "TLD", "SU", "TXQ")):
        return "other"
    return "uniform" if op.startswith("U") else "other"


def ptx_class(instr: Instr) -> str:
    """The class of a PTX instruction, one of CLASSES."""
    op, parts = instr.op, instr.parts
    known = _PTX_CLASSES.get(op)
    if known is not None:
        return known
    if op == "wgmma":
        return "tensor" if parts[1] == "mma_async" else "sync"
    if op == "tcgen05":
        if parts[1] == "mma":
            return "tensor"
        return "sync" if parts[1].startswith(("commit", "wait", "fence")) else "tensor memory"
    if op == "cp":
        if _SYNC_WORDS & set(parts[2:4]):
            return "sync"
        return "tma" if "bulk" in parts else "async copy"
    if op == "wmma" and parts[1] == "mma":
        return "tensor"
    if op == "prefetch" and parts[1] == "tensormap":
        return "tma"
    if op in _PTX_MEMORY:
        return next((_PTX_SPACES[s] for s in map(_space, parts) if s in _PTX_SPACES), "global")
    types = set(parts[1:])
    if types & {"f32", "f32x2"}:
        return "fp32"
    if types & {"f16", "f16x2", "bf16", "bf16x2"}:
        return "fp16"
    return "fp64" if "f64" in types else "int"


def _space(part: str) -> str:
    return part.partition("::")[0]


def sass_mix(code: Iterable[SassInstr]) -> dict[str, int]:
    """How many instructions of each class, NOPs left out, in the order of CLASSES."""
    return _ordered(Counter(sass_class(instr) for instr in code if instr.op != "NOP"))


def ptx_mix(code: Iterable[Instr]) -> dict[str, int]:
    """How many instructions of each class, in the order of CLASSES."""
    return _ordered(Counter(ptx_class(instr) for instr in code))


def _ordered(counts: Counter[str]) -> dict[str, int]:
    return {name: counts[name] for name in CLASSES if counts[name]}


def sass_mma_shapes(code: Iterable[SassInstr]) -> dict[str, int]:
    """How many tensor instructions of each shape and type, e.g. ``m16n8k16 F32.BF16``.

    The shape of a tcgen05 instruction is in its descriptor, so its opcode stands instead.
    """
    shapes: Counter[str] = Counter()
    for instr in code:
        if sass_class(instr) != "tensor":
            continue
        _, *words = instr.opcode.split(".")
        shape = _HMMA_SHAPE.match(words[0]) if words else None
        if shape:
            m, n, k = shape.groups()
            shapes[" ".join((f"m{m}n{n}k{k}", ".".join(words[1:]))).strip()] += 1
        elif words and words[0].count("x") == 2:
            m, n, k = words[0].split("x")
            shapes[f"m{m}n{n}k{k} {'.'.join(words[1:])}"] += 1
        else:
            shapes[instr.opcode] += 1
    return dict(shapes.most_common())


def ptx_mma_shapes(code: Iterable[Instr]) -> dict[str, int]:
    """How many tensor instructions of each shape and type, as PTX writes them."""
    shapes: Counter[str] = Counter()
    for instr in code:
        if ptx_class(instr) != "tensor":
            continue
        shape = next((part for part in instr.parts if _SHAPE.fullmatch(part)), None)
        if shape:
            types = instr.parts[instr.parts.index(shape) + 1 :]
            shapes[f"{shape} {'.'.join(t for t in types if t not in ('row', 'col'))}"] += 1
        else:
            words = [part for part in instr.parts[2:] if part.startswith(("cta_group", "kind"))]
            shapes[" ".join((f"{instr.op}.{instr.parts[1]}", *words))] += 1
    return dict(shapes.most_common())


def access_bytes(instr: SassInstr) -> int:
    """Bytes that a load or store moves per thread."""
    words = instr.opcode.split(".")[1:]
    return next((_WIDTHS[word] for word in reversed(words) if word in _WIDTHS), 4)


def global_access_widths(code: Iterable[SassInstr]) -> dict[str, dict[int, int]]:
    """Global loads, stores and asynchronous copies by bytes per thread."""
    names = {"LDG": "loads", "STG": "stores", "LDGSTS": "async copies"}
    widths: dict[str, Counter[int]] = {}
    for instr in code:
        if instr.op in names:
            widths.setdefault(names[instr.op], Counter())[access_bytes(instr)] += 1
    return {name: dict(sorted(found.items())) for name, found in sorted(widths.items())}
