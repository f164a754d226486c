"""The meaning of `sliding_window_attention`, in float32 `jax.numpy`."""

import jax
import jax.numpy as jnp

from pallas_kernels.reference.masked_attention import (
  causal_arrays,
  causal_chunks,
  causal_mask,
  masked_attention,
)
from pallas_kernels.reference.windowed_attention import windowed_attention


def sliding_window_attention(q, k, v, *, window, sinks, query_offset, segment_ids, kv_segment_ids,
                             scale):
  """Attention of query t over the keys t' - window < j <= t', t' = query_offset + t; see `api.py`.

      p[t,n,j] = exp(s[t,n,j]) / (exp(sink_n) + sum_j' exp(s[t,n,j']))      (HySparse, local branch)
      out[t,n] = sum_j p[t,n,j] v_j
  """
  queries, keys = causal_arrays(q, k, v, query_offset=query_offset, segment_ids=segment_ids,
                                kv_segment_ids=kv_segment_ids, scale=scale)
  if window >= k.shape[1]:      # a band reaches as many keys as there are: bands save nothing
    def attend(queries, keys):
      return masked_attention(queries["q"], keys["k"], keys["v"],
                              causal_mask(queries, keys, window), sinks=sinks)[0].astype(q.dtype)

    return causal_chunks(attend, queries, keys, num_heads=q.shape[2], offset=query_offset)
  fill = {"k": 0, "v": 0, "position": -1, "segment": 0}
  keys = {name: None if x is None else
          _reach(x, query_offset, window - 1, q.shape[1], fill[name]) for name, x in keys.items()}
  return windowed_attention(queries, keys, window=window, sinks=sinks).astype(q.dtype)


def _reach(x, offset, before, count, fill):
  """Rows offset - before .. offset + count - 1 of x [B,S,...]; `fill` where x has none."""
  if isinstance(offset, int):
    pads = [(0, 0, 0)] * x.ndim
    pads[1] = (before - offset, offset + count - x.shape[1], 0)     # negative ones cut
    return jax.lax.pad(x, jnp.asarray(fill, x.dtype), pads)
  reach = before + count
  x = jnp.pad(x, [(0, 0), (before, reach)] + [(0, 0)] * (x.ndim - 2), constant_values=fill)
  start = jnp.clip(offset, 0, x.shape[1] - reach)                   # beyond the keys: only `fill`
  return jax.vmap(lambda row, at: jax.lax.dynamic_slice_in_dim(row, at, reach))(x, start)
