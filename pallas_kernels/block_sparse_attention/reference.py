"""The meaning of `block_sparse_attention`, in float32 `jax.numpy`."""

import jax.numpy as jnp

from pallas_kernels.reference.block_selection import picked_keys
from pallas_kernels.reference.masked_attention import (
  causal_chunks,
  masked_attention,
  positions,
  same_segment,
)


def block_sparse_attention(q, k, v, block_indices, *, block_size, sinks, query_offset,
                           segment_ids, kv_segment_ids, scale):
  """Attention of query t over the keys j <= query_offset + t of its selected blocks; see `api.py`.

      p[t,n,j] = exp(s[t,n,j]) / (exp(sink_n) + sum_j' exp(s[t,n,j']))      (HySparse, sparse layer)
      out[t,n] = sum_j p[t,n,j] v_j
  """
  batch, num_queries, num_heads, _ = q.shape
  dtype = q.dtype
  q, k, v = (x.astype(jnp.float32) for x in (q, k, v))      # here: gradients add up in float32
  queries = {"q": q * scale, "position": positions(query_offset, batch, num_queries),
             "segment": segment_ids, "blocks": block_indices.transpose(0, 2, 1, 3)}
  keys = {"k": k, "v": v, "position": positions(0, batch, k.shape[1]), "segment": kv_segment_ids}

  def attend(queries, keys):
    visible = keys["position"][:, None, None, :] <= queries["position"][:, None, :, None]
    visible &= same_segment(queries["segment"], keys["segment"])
    visible &= picked_keys(queries["blocks"].transpose(0, 2, 1, 3), keys["k"].shape[1], block_size)
    out, _ = masked_attention(queries["q"], keys["k"], keys["v"], visible, sinks=sinks)
    return out.astype(dtype)

  return causal_chunks(attend, queries, keys, num_heads=num_heads, offset=query_offset)
