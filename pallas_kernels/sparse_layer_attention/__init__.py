"""The gated sum of the sparse and the local branch (HySparse, sparse layer)."""
