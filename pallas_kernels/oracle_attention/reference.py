"""The meaning of `oracle_attention`, in float32 `jax.numpy`."""

import jax.numpy as jnp

from pallas_kernels.reference.block_selection import attend_and_select
from pallas_kernels.reference.masked_attention import causal_arrays, causal_chunks, causal_mask

NEVER = jnp.iinfo(jnp.int32).max     # the position of padding keys: after every query


def oracle_attention(q, k, v, *, block_size, num_blocks, query_offset, segment_ids,
                     kv_segment_ids, scale):
  """Causal attention and each query's best key blocks; see `api.py`.

  With p the softmax weights, group k the G query heads of KV head k, query t at key index
  t' = query_offset + t:

      out[t,n]  = sum_{j <= t'} p[t,n,j] v_j
      S[k,t,i]  = max_{n in group k} max_{j in block i, j <= t'} p[t,n,j]       (HySparse, oracle)

  and `block_indices[k,t]` are the `num_blocks` blocks of largest S. S is compared as
  log S = max_n (max_j s[t,n,j] - logsumexp_j s[t,n,j]) in float32, which orders blocks whose
  weight underflows; float32-equal values are ties, and ties go to the lower block.
  """
  queries, keys = causal_arrays(q, k, v, query_offset=query_offset, segment_ids=segment_ids,
                                kv_segment_ids=kv_segment_ids, scale=scale)
  if num_blocks:
    keys = pad_keys(keys, -k.shape[1] % block_size)

  def attend(queries, keys):
    out, picked = attend_and_select(queries["q"], keys["k"], keys["v"], causal_mask(queries, keys),
                                    block_size=block_size, num_blocks=num_blocks)
    return out.astype(q.dtype), picked

  out, block_indices = causal_chunks(attend, queries, keys, num_heads=q.shape[2],
                                     offset=query_offset,
                                     key_multiple=block_size if num_blocks else 1)
  return out, block_indices.transpose(0, 2, 1, 3)


def pad_keys(keys, padding):
  """The keys of `causal_arrays` with `padding` more that no query sees."""
  fill = {"k": 0, "v": 0, "position": NEVER, "segment": 0}
  return {name: None if x is None else
          jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2), constant_values=fill[name])
          for name, x in keys.items()}
