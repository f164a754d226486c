"""The attention ops of HySparse: one public function each, one `implementation` argument."""

from pallas_kernels.block_sparse_attention.api import block_sparse_attention, plan_blocks
from pallas_kernels.oracle_attention.api import oracle_attention
from pallas_kernels.paged_attention.api import (
  paged_oracle_attention,
  paged_sparse_layer_attention,
)
from pallas_kernels.sliding_window_attention.api import sliding_window_attention
from pallas_kernels.sparse_layer_attention.api import (
  hybrid_sparse_attention,
  sparse_layer_attention,
)

__all__ = [
  "block_sparse_attention",
  "hybrid_sparse_attention",
  "oracle_attention",
  "paged_oracle_attention",
  "paged_sparse_layer_attention",
  "plan_blocks",
  "sliding_window_attention",
  "sparse_layer_attention",
]
