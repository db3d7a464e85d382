"""The PyTorch side: argument checks, launches on a GPU or the simulator, and torch operators."""

from cute_fa.ops.functional import flash_attn_func
from cute_fa.ops.launch import last_launches

__all__ = ["flash_attn_func", "last_launches"]
