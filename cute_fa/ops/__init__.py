"""The PyTorch side: argument checks, launches on a GPU or the simulator, and torch operators."""

from cute_fa.ops.bundle import load_bundle
from cute_fa.ops.functional import flash_attn_func
from cute_fa.ops.launch import last_launches
from cute_fa.ops.varlen import flash_attn_varlen_func

__all__ = ["flash_attn_func", "flash_attn_varlen_func", "last_launches", "load_bundle"]
