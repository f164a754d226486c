"""Kernels of `sparse_layer_attention` for NVIDIA GPUs."""
