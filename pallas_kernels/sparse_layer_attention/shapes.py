"""The sizes this op is tested and measured at."""

from pallas_kernels.named_shapes import PAPER, TRAINING, AttentionShape

SHAPES = {
  **PAPER,
  **TRAINING,
  "one_token": AttentionShape(batch=2, tokens=1, num_blocks=2),
  "small": AttentionShape(batch=2, tokens=90, head_dim=16, block_size=8, num_blocks=3, window=20),
  "other_value_dim": AttentionShape(tokens=70, num_heads=3, num_kv_heads=1, head_dim=16,
                                    value_head_dim=24, block_size=16, num_blocks=2, window=9),
}
