"""The sizes these ops are tested and measured at: `tokens` is the longest sequence's length."""

from pallas_kernels.named_shapes import AttentionShape

SHAPES = {
  "80b": AttentionShape(tokens=131_072, num_heads=64, num_kv_heads=4, head_dim=128),
  "7b": AttentionShape(tokens=131_072, num_heads=32, num_kv_heads=8, head_dim=128),
  "small": AttentionShape(batch=3, tokens=400, num_heads=8, num_kv_heads=2, head_dim=16,
                          num_blocks=3, window=20),
  "wide_values": AttentionShape(batch=2, tokens=200, num_heads=3, num_kv_heads=3, head_dim=16,
                                value_head_dim=24, num_blocks=2, window=7),
}
