"""TPU kernels of causal and windowed attention, shared by two ops."""
