"""Attention over the key blocks an oracle layer picked (REFERENCE section 1, sparse branch)."""
