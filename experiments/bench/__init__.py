"""Timings of kernels and training steps."""
