"""The sizes this op is tested and measured at."""

from pallas_kernels.named_shapes import PAPER, TRAINING, AttentionShape

SHAPES = {
  **PAPER,
  **TRAINING,
  "one_token": AttentionShape(batch=2, tokens=1),
  "one_past_a_block": AttentionShape(batch=2, tokens=65, num_blocks=1),
  "one_head": AttentionShape(tokens=100, num_heads=1, num_kv_heads=1, head_dim=16, block_size=16,
                             num_blocks=2),
  "group_of_one": AttentionShape(tokens=70, num_heads=3, num_kv_heads=3, head_dim=16,
                                 block_size=8, num_blocks=4),
  "wide_group": AttentionShape(tokens=70, num_heads=8, num_kv_heads=1, head_dim=256,
                               block_size=16, num_blocks=2),
  "other_value_dim": AttentionShape(batch=2, tokens=70, head_dim=24, value_head_dim=16,
                                    block_size=16, num_blocks=2),
  "odd_block": AttentionShape(tokens=71, block_size=7, num_blocks=3),
}
