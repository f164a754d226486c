"""The backbone: layers, the hybrid stack, experts, the KV cache."""
