"""The third rung: FlashAttention-3, for Hopper."""
