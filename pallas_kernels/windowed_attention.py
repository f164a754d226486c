"""Sliding-window attention in bands: what the window hides is mostly never computed."""

import math

import jax
import jax.numpy as jnp

from pallas_kernels.masked_attention import (
  CHUNK_SCORES,
  KEPT_SCORES,
  masked_attention,
  same_segment,
)

BAND = (64, 256)  # fewest and most queries per band: small matmuls against computed-but-hidden keys


def windowed_attention(queries, keys, *, window, sinks):
  """Attention of each query over the keys of its segment at `position - window < p <= position`.

  Args:
    queries: {"q": f32 [B,T,N,H] scaled, "position": i32 [B,T], "segment": i32 [B,T] or None}.
    keys: {"k": f32 [B,S,K,H], "v": f32 [B,S,K,E], "position": i32 [B,S], "segment": i32 [B,S] or
      None}, S = T + window - 1: key `i + window - 1` stands at the position of query `i`.
      Negative positions are seen by nobody.
    window: tokens a query sees, itself included.
    sinks: f32 [N] or None.

  Returns:
    out f32 [B,T,N,E].
  """
  batch, num_queries, num_heads, _ = queries["q"].shape
  band = min(max(BAND[0], min(window // 2, BAND[1])), num_queries)
  num_bands = math.ceil(num_queries / band)
  lookback = math.ceil((window - 1) / band)      # earlier bands that a band's queries reach into
  queries = jax.tree.map(lambda x: _bands(x, 0, num_bands, band), queries)
  front = lookback * band - (window - 1)
  keys = {name: None if x is None else
          _bands(x, front, num_bands + lookback, band, fill=-1 if name == "position" else 0)
          for name, x in keys.items()}
  keys = jax.tree.map(lambda x: jnp.concatenate(
    [x[i:i + num_bands] for i in range(lookback + 1)], axis=2), keys)

  def attend(arrays):
    query, key = arrays
    query_position = query["position"][:, None, :, None]
    key_position = key["position"][:, None, None, :]
    visible = (key_position <= query_position) & (key_position > query_position - window)
    visible &= (key_position >= 0) & same_segment(query["segment"], key["segment"])
    return masked_attention(query["q"], key["k"], key["v"], visible, sinks=sinks)[0]

  band_scores = batch * num_heads * band * band * (lookback + 1)
  if band_scores * num_bands <= KEPT_SCORES:
    out = jax.vmap(attend)((queries, keys))
  else:
    out = jax.lax.map(jax.checkpoint(attend), (queries, keys),
                      batch_size=min(max(CHUNK_SCORES // band_scores, 1), num_bands))
  out = jnp.moveaxis(out, 0, 1)
  return out.reshape(batch, num_bands * band, *out.shape[3:])[:, :num_queries]


def _bands(x, front, num_bands, band, fill=0):
  """[B,T,...] -> [num_bands,B,band,...], with `front` rows of `fill` before, the rest behind."""
  behind = num_bands * band - front - x.shape[1]
  x = jnp.pad(x, [(0, 0), (front, behind)] + [(0, 0)] * (x.ndim - 2), constant_values=fill)
  return jnp.moveaxis(x.reshape(x.shape[0], num_bands, band, *x.shape[2:]), 1, 0)
