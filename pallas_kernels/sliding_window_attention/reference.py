"""The meaning of `sliding_window_attention`, in float32 `jax.numpy`."""

import jax
import jax.numpy as jnp

from pallas_kernels.reference.masked_attention import positions
from pallas_kernels.reference.windowed_attention import windowed_attention


def sliding_window_attention(q, k, v, *, window, sinks, query_offset, segment_ids, kv_segment_ids,
                             scale):
  """Attention of query t over the keys t' - window < j <= t', t' = query_offset + t; see `api.py`.

      p[t,n,j] = exp(s[t,n,j]) / (exp(sink_n) + sum_j' exp(s[t,n,j']))      (HySparse, local branch)
      out[t,n] = sum_j p[t,n,j] v_j
  """
  batch, num_queries = q.shape[:2]
  num_keys = k.shape[1]
  dtype = q.dtype
  q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
  window = min(window, num_queries + num_keys if not isinstance(query_offset, int)
               else query_offset + num_queries)
  queries = {"q": q * scale, "position": positions(query_offset, batch, num_queries),
             "segment": segment_ids}
  reach = lambda x, fill=0: _reach(x, query_offset, window - 1, num_queries, fill)
  keys = {"k": reach(k), "v": reach(v), "position": reach(positions(0, batch, num_keys), -1),
          "segment": None if kv_segment_ids is None else reach(kv_segment_ids)}
  return windowed_attention(queries, keys, window=window, sinks=sinks).astype(dtype)


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
