"""Kernels of `cached_attention` for TPUs."""
