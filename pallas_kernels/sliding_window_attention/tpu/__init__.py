"""Kernels of `sliding_window_attention` for TPUs."""
