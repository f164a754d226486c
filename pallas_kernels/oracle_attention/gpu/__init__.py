"""Kernels of `oracle_attention` for NVIDIA GPUs."""
