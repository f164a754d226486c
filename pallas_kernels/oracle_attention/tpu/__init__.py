"""Kernels of `oracle_attention` for TPUs."""
