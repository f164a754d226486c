"""Sliding-window attention in bands: what the window hides is mostly never computed."""

import math

import jax
import jax.numpy as jnp

from pallas_kernels.reference.masked_attention import (
  CHUNK_SCORES,
  KEPT_SCORES,
  causal_mask,
  masked_attention,
)

BAND = (64, 256)  # fewest and most queries per band: small matmuls against computed-but-hidden keys


def windowed_attention(queries, keys, *, window, sinks):
  """Attention of each query over the keys of its segment at `position - window < p <= position`.

  Args:
    queries: {"q": f32 [B,T,N,H] scaled, "position": i32 [B,T], "segment": i32 [B,T] or None}.
    keys: {"k": f32 [B,S,K,H], "v": f32 [B,S,K,E], "position": i32 [B,S], "segment": i32 [B,S] or
      None}, S = T + window - 1: key `i + window - 1` is at the position of query `i`.
      A key at a negative position is hidden from every query.
    window: tokens a query sees, itself included.
    sinks: f32 [N] or None.

  Returns:
    out f32 [B,T,N,E].
  """
  batch, num_queries, num_heads, _ = queries["q"].shape

  def attend(arrays):
    query, key = arrays
    visible = causal_mask(query, key, window) & (key["position"] >= 0)[:, None, None, :]
    return masked_attention(query["q"], key["k"], key["v"], visible, sinks=sinks)[0]

  band = max(BAND[0], min(window // 2, BAND[1]))
  if num_queries <= band:
    return attend((queries, keys))
  num_bands = math.ceil(num_queries / band)
  lookback = math.ceil((window - 1) / band)      # earlier bands that a band's queries reach into
  front = lookback * band - (window - 1)
  queries = jax.tree.map(lambda x: _bands(x, 0, num_bands, band), queries)
  keys = {name: None if x is None else
          _bands(x, front, num_bands + lookback, band, fill=-1 if name == "position" else 0)
          for name, x in keys.items()}
  keys = jax.tree.map(lambda x: jnp.concatenate(
    [x[:, i:i + num_bands] for i in range(lookback + 1)], axis=2), keys)

  band_scores = batch * num_heads * band * band * (lookback + 1)
  if band_scores * num_bands <= KEPT_SCORES:      # every band is a row of one larger batch
    out = attend(jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), (queries, keys)))
    out = out.reshape(batch, num_bands, *out.shape[1:])
  else:
    by_band = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (queries, keys))
    out = jax.lax.map(jax.checkpoint(attend), by_band,
                      batch_size=min(max(CHUNK_SCORES // band_scores, 1), num_bands))
    out = jnp.moveaxis(out, 0, 1)
  return out.reshape(batch, num_bands * band, *out.shape[3:])[:, :num_queries]


def _bands(x, front, num_bands, band, fill=0):
  """[B,T,...] -> [B,num_bands,band,...], with `front` rows of `fill` before, the rest behind."""
  behind = num_bands * band - front - x.shape[1]
  x = jnp.pad(x, [(0, 0), (front, behind)] + [(0, 0)] * (x.ndim - 2), constant_values=fill)
  return x.reshape(x.shape[0], num_bands, band, *x.shape[2:])
