"""The gated sum of the sparse and the local branch (REFERENCE section 1, sparse layer)."""
