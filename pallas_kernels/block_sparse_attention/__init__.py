"""Attention over the key blocks an oracle layer picked (HySparse, sparse branch)."""
