"""The meaning of `block_sparse_attention`, in float32 `jax.numpy`."""

from pallas_kernels.reference.block_selection import picked_keys
from pallas_kernels.reference.masked_attention import (
  causal_arrays,
  causal_chunks,
  causal_mask,
  masked_attention,
)


def block_sparse_attention(q, k, v, block_indices, *, block_size, sinks, query_offset,
                           segment_ids, kv_segment_ids, scale):
  """Attention of query t over the keys j <= query_offset + t of its selected blocks; see `api.py`.

      p[t,n,j] = exp(s[t,n,j]) / (exp(sink_n) + sum_j' exp(s[t,n,j']))      (HySparse, sparse layer)
      out[t,n] = sum_j p[t,n,j] v_j
  """
  queries, keys = causal_arrays(q, k, v, query_offset=query_offset, segment_ids=segment_ids,
                                kv_segment_ids=kv_segment_ids, scale=scale)
  queries["blocks"] = block_indices.transpose(0, 2, 1, 3)

  def attend(queries, keys):
    visible = causal_mask(queries, keys)
    visible &= picked_keys(queries["blocks"].transpose(0, 2, 1, 3), keys["k"].shape[1], block_size)
    out, _ = masked_attention(queries["q"], keys["k"], keys["v"], visible, sinks=sinks)
    return out.astype(q.dtype)

  return causal_chunks(attend, queries, keys, num_heads=q.shape[2], offset=query_offset)
