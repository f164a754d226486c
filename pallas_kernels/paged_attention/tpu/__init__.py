"""Kernels of `paged_attention` for TPUs."""
