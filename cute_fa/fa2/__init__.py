"""FlashAttention-2: one CTA per query tile, K/V streamed past it. Start with README.md."""
