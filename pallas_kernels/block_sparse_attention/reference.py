"""The meaning of `block_sparse_attention`, in float32 `jax.numpy`."""

import jax.numpy as jnp

from pallas_kernels.reference.block_selection import picked_keys
from pallas_kernels.reference.masked_attention import (
  causal_arrays,
  causal_chunks,
  causal_mask,
  masked_attention,
  query_chunks,
)

GATHER_FROM = 16     # times the selection that a row must be long for its keys to be copied


def block_sparse_attention(q, k, v, block_indices, *, block_size, sinks, query_offset,
                           segment_ids, kv_segment_ids, scale):
  """Attention of query t over the keys j <= query_offset + t of its selected blocks; see `api.py`.

      p[t,n,j] = exp(s[t,n,j]) / (exp(sink_n) + sum_j' exp(s[t,n,j']))      (HySparse, sparse layer)
      out[t,n] = sum_j p[t,n,j] v_j
  """
  queries, keys = causal_arrays(q, k, v, query_offset=query_offset, segment_ids=segment_ids,
                                kv_segment_ids=kv_segment_ids, scale=scale)
  queries["blocks"] = block_indices.transpose(0, 2, 1, 3)
  picked = block_indices.shape[3] * block_size
  if 0 < GATHER_FROM * picked < k.shape[1]:
    return _gathered(queries, keys, block_size, sinks).astype(q.dtype)

  def attend(queries, keys):
    visible = causal_mask(queries, keys)
    visible &= picked_keys(queries["blocks"].transpose(0, 2, 1, 3), keys["k"].shape[1], block_size)
    out, _ = masked_attention(queries["q"], keys["k"], keys["v"], visible, sinks=sinks)
    return out.astype(q.dtype)

  return causal_chunks(attend, queries, keys, num_heads=q.shape[2], offset=query_offset)


def _gathered(queries, keys, block_size, sinks):
  """The same where rows are much longer than a selection: each query's X selected keys, copied."""
  batch, num_keys, kv_heads = keys["k"].shape[:3]

  def attend(queries, keys):
    blocks = queries["blocks"]                                              # [B,t,K,P]
    at = (blocks[..., None] * block_size + jnp.arange(block_size)).reshape(*blocks.shape[:3], -1)
    at = jnp.where(jnp.repeat(blocks, block_size, axis=-1) < 0, num_keys, at).swapaxes(2, 3)
    visible = (at < num_keys) & (at <= queries["position"][..., None, None])   # [B,t,X,K]
    at = at.clip(0, num_keys - 1)
    if keys["segment"] is not None:
      segment, own = keys["segment"][jnp.arange(batch)[:, None, None, None], at], queries["segment"]
      visible &= (segment == own[..., None, None]) & (segment != 0)

    def rows(x):                                                            # [B*t,X,K,.]
      picked = jnp.take_along_axis(x, at.reshape(batch, -1, kv_heads)[..., None], axis=1)
      return picked.reshape(-1, *at.shape[2:], x.shape[-1])

    flat = lambda x: x.reshape(-1, 1, *x.shape[2:])
    visible = visible.reshape(-1, *at.shape[2:]).swapaxes(1, 2)[:, :, None]    # [B*t,K,1,X]
    out, _ = masked_attention(flat(queries["q"]), rows(keys["k"]), rows(keys["v"]), visible,
                              sinks=sinks)
    return out.reshape(*queries["q"].shape[:3], -1)

  picked = queries["blocks"].shape[3] * block_size
  copied = batch * picked * kv_heads * (keys["k"].shape[-1] + keys["v"].shape[-1])
  return query_chunks(attend, queries, keys, num_heads=queries["q"].shape[2], row_scores=copied)
