"""The meaning of `sliding_window_attention`, in float32 `jax.numpy`."""

import jax.numpy as jnp

from pallas_kernels.reference.windowed_attention import windowed_attention


def sliding_window_attention(q, k, v, *, window, sinks, segment_ids, scale):
  """Attention of query t over the keys t - window < j <= t; see `api.py`.

      p[t,n,j] = exp(s[t,n,j]) / (exp(sink_n) + sum_j' exp(s[t,n,j']))      (HySparse, local branch)
      out[t,n] = sum_j p[t,n,j] v_j
  """
  batch, num_queries = q.shape[:2]
  dtype = q.dtype
  q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
  window = min(window, num_queries)
  position = jnp.broadcast_to(jnp.arange(num_queries, dtype=jnp.int32), (batch, num_queries))
  queries = {"q": q * scale, "position": position, "segment": segment_ids}

  def before(x, fill=0):      # the window - 1 positions before the first token hold nothing
    return jnp.pad(x, [(0, 0), (window - 1, 0)] + [(0, 0)] * (x.ndim - 2), constant_values=fill)

  keys = {"k": before(k), "v": before(v), "position": before(position, -1),
          "segment": None if segment_ids is None else before(segment_ids)}
  return windowed_attention(queries, keys, window=window, sinks=sinks).astype(dtype)
