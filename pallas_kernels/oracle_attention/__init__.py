"""Causal attention that also says which key blocks mattered (REFERENCE section 1, full layer)."""
