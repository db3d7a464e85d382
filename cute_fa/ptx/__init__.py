"""PTX text as data: instructions, operands, basic blocks and liveness. Standard library only."""

from cute_fa.ptx.cfg import Block, Blocks, basic_blocks
from cute_fa.ptx.dataflow import defs, liveness, uses
from cute_fa.ptx.declarations import initial_bytes
from cute_fa.ptx.module import Guard, Instr, Kernel, Module, Param, Variable
from cute_fa.ptx.operands import (
    Address,
    FloatImm,
    Imm,
    Negated,
    Operand,
    Pair,
    Reg,
    Sink,
    Special,
    Symbol,
    TensorAddress,
    Vector,
    register_names,
)
from cute_fa.ptx.parser import parse
from cute_fa.ptx.syntax import PtxSyntaxError

__all__ = [
    "Address",
    "Block",
    "Blocks",
    "FloatImm",
    "Guard",
    "Imm",
    "Instr",
    "Kernel",
    "Module",
    "Negated",
    "Operand",
    "Pair",
    "Param",
    "PtxSyntaxError",
    "Reg",
    "Sink",
    "Special",
    "Symbol",
    "TensorAddress",
    "Variable",
    "Vector",
    "basic_blocks",
    "defs",
    "initial_bytes",
    "liveness",
    "parse",
    "register_names",
    "uses",
]
