"""Attention over the last `window` tokens (HySparse, local branch)."""
