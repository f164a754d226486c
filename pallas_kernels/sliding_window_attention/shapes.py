"""The sizes this op is tested and measured at."""

from pallas_kernels.named_shapes import PAPER, TRAINING, AttentionShape

SHAPES = {
  **PAPER,
  **TRAINING,
  "one_token": AttentionShape(batch=2, tokens=1),
  "window_of_one": AttentionShape(tokens=70, window=1),
  "window_of_two": AttentionShape(tokens=130, window=2, head_dim=16),
  "one_past_a_band": AttentionShape(batch=2, tokens=65, window=64),
  "several_bands": AttentionShape(tokens=200, num_heads=2, num_kv_heads=1, head_dim=16, window=33),
  "window_beyond_band": AttentionShape(tokens=300, num_heads=2, num_kv_heads=1, head_dim=16,
                                       window=150),
  "window_beyond_tokens": AttentionShape(tokens=70, window=1000),
  "group_of_one": AttentionShape(tokens=70, num_heads=1, num_kv_heads=1, head_dim=16, window=9),
  "other_value_dim": AttentionShape(tokens=70, head_dim=24, value_head_dim=256, window=20),
}
