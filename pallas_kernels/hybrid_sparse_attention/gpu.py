"""The attention of a sparse layer on NVIDIA GPUs: both branches' kernels, gated and summed."""

import jax.numpy as jnp

from pallas_kernels.block_sparse_attention.gpu import block_sparse_attention
from pallas_kernels.sliding_window_attention.gpu import sliding_window_attention


def hybrid_sparse_attention(q, k_shared, v_shared, block_indices, k_local, v_local, gate_sparse,
                            gate_local, *, sinks_sparse=None, sinks_local=None, block_size=64,
                            window=128, segment_ids=None, scale=None, plan=None):
  """The op of `api.py`; `plan` as in `block_sparse_attention`. The gates and the sum are XLA's."""
  sparse = block_sparse_attention(
    q, k_shared, v_shared, block_indices, block_size=block_size, sinks=sinks_sparse,
    segment_ids=segment_ids, scale=scale, plan=plan)
  local = sliding_window_attention(
    q, k_local, v_local, window=window, sinks=sinks_local, segment_ids=segment_ids, scale=scale)
  gated = (gate_sparse.astype(jnp.float32) * sparse.astype(jnp.float32)
           + gate_local.astype(jnp.float32) * local.astype(jnp.float32))
  return gated.astype(q.dtype)
