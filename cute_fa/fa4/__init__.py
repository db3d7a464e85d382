"""The fourth rung: FlashAttention-4, for Blackwell (sm_100a, sm_103a)."""
