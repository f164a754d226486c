"""The sizes these ops are tested and measured at: `tokens` is the length of the cache."""

from pallas_kernels.named_shapes import PAPER, TRAINING, AttentionShape

SHAPES = {
  **PAPER,
  **TRAINING,
  "small": AttentionShape(batch=3, tokens=90, head_dim=16, block_size=8, num_blocks=3, window=20),
  "one_head": AttentionShape(batch=2, tokens=71, num_heads=1, num_kv_heads=1, head_dim=16,
                             value_head_dim=24, block_size=16, num_blocks=2, window=7),
}
