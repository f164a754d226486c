"""The meaning of `hybrid_sparse_attention`, in float32 `jax.numpy`."""

import jax.numpy as jnp

from pallas_kernels.block_sparse_attention.reference import block_sparse_attention
from pallas_kernels.sliding_window_attention.reference import sliding_window_attention


def hybrid_sparse_attention(q, k_shared, v_shared, block_indices, k_local, v_local, gate_sparse,
                            gate_local, *, sinks_sparse, sinks_local, block_size, window,
                            segment_ids, scale):
  """gate_sparse * o_sparse + gate_local * o_local  (HySparse, sparse layer); see `api.py`."""
  q32 = q.astype(jnp.float32)      # the branches then answer in float32, and so the sum is
  sparse = block_sparse_attention(q32, k_shared, v_shared, block_indices, block_size=block_size,
                                  sinks=sinks_sparse, segment_ids=segment_ids, scale=scale)
  local = sliding_window_attention(q32, k_local, v_local, window=window, sinks=sinks_local,
                                   segment_ids=segment_ids, scale=scale)
  gated = gate_sparse.astype(jnp.float32) * sparse + gate_local.astype(jnp.float32) * local
  return gated.astype(q.dtype)
