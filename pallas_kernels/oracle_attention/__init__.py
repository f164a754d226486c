"""Causal attention that also says which key blocks mattered (HySparse, full layer)."""
