"""Attention over the last `window` tokens (REFERENCE section 1, local branch)."""
