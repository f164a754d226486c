"""The meaning of `sparse_layer_attention`, in float32 `jax.numpy`."""

import jax.numpy as jnp

from pallas_kernels.block_sparse_attention.reference import block_sparse_attention
from pallas_kernels.sliding_window_attention.reference import sliding_window_attention


def sparse_layer_attention(q, k, v, block_indices, k_local, v_local, gate_sparse, gate_local, *,
                           sinks_sparse, sinks_local, block_size, window, query_offset,
                           local_query_offset, segment_ids, kv_segment_ids, local_kv_segment_ids,
                           scale):
  """gate_sparse * o_sparse + gate_local * o_local  (HySparse, sparse layer); see `api.py`."""
  q32 = q.astype(jnp.float32)      # the branches then answer in float32, and so the sum is
  out = 0.0
  if k is not None:
    sparse = block_sparse_attention(q32, k, v, block_indices, block_size=block_size,
                                    sinks=sinks_sparse, query_offset=query_offset,
                                    segment_ids=segment_ids, kv_segment_ids=kv_segment_ids,
                                    scale=scale)
    out = gated(gate_sparse, sparse)
  if k_local is not None:
    local = sliding_window_attention(q32, k_local, v_local, window=window, sinks=sinks_local,
                                     query_offset=local_query_offset, segment_ids=segment_ids,
                                     kv_segment_ids=local_kv_segment_ids, scale=scale)
    out = out + gated(gate_local, local)
  return out.astype(q.dtype)


def gated(gate, out):
  """gate * out in float32, or out f32 where there is no gate."""
  return out if gate is None else gate.astype(jnp.float32) * out
