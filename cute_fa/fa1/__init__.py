"""First rung: FlashAttention (2022), K/V outer and Q inner, on mma.sync and cp.async."""
