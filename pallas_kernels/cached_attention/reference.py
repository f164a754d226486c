"""The meaning of the cached ops, in float32 `jax.numpy`.

Slots that no query may see can hold anything, NaN included: they are replaced by zeros first,
because 0 * NaN is NaN in a masked sum.
"""

import jax.numpy as jnp

from pallas_kernels.reference.block_selection import attend_and_select, picked_keys
from pallas_kernels.reference.masked_attention import masked_attention, query_chunks
from pallas_kernels.reference.windowed_attention import windowed_attention


def cached_oracle_attention(q, k, v, query_positions, *, block_size, num_blocks, scale,
                            layer=None):
  """`oracle_attention` of queries at given positions over slots 0..position; see `api.py`."""
  k, v = _written(k, v, query_positions, layer)
  if num_blocks:
    padding = [(0, 0), (0, -k.shape[1] % block_size), (0, 0), (0, 0)]
    k, v = jnp.pad(k, padding), jnp.pad(v, padding)
  slots = jnp.arange(k.shape[1], dtype=jnp.int32)

  def attend(queries, keys):
    visible = slots <= queries["position"][:, None, :, None]
    out, picked = attend_and_select(queries["q"], keys["k"], keys["v"], visible,
                                    block_size=block_size, num_blocks=num_blocks)
    return out.astype(q.dtype), picked

  queries = {"q": q.astype(jnp.float32) * scale, "position": query_positions}
  out, block_indices = query_chunks(attend, queries, {"k": k, "v": v}, num_heads=q.shape[2])
  return out, block_indices.transpose(0, 2, 1, 3)


def cached_block_sparse_attention(q, k, v, block_indices, query_positions, *, block_size, sinks,
                                  scale, layer=None):
  """`block_sparse_attention` of queries at given positions over cached slots; see `api.py`.

  One query per row (T=1) gathers its P blocks and costs the same whatever the cache's length.
  """
  queries = {"q": q.astype(jnp.float32) * scale, "position": query_positions,
             "blocks": block_indices.transpose(0, 2, 1, 3)}
  if q.shape[1] == 1:
    return _gathered_attention(queries, k, v, block_size, sinks, layer).astype(q.dtype)
  k, v = _written(k, v, query_positions, layer)
  slots = jnp.arange(k.shape[1], dtype=jnp.int32)

  def attend(queries, keys):
    visible = slots <= queries["position"][:, None, :, None]
    visible &= picked_keys(queries["blocks"].transpose(0, 2, 1, 3), k.shape[1], block_size)
    out, _ = masked_attention(queries["q"], keys["k"], keys["v"], visible, sinks=sinks)
    return out.astype(q.dtype)

  return query_chunks(attend, queries, {"k": k, "v": v}, num_heads=q.shape[2])


def cached_sliding_window_attention(q, k_ring, v_ring, k_new, v_new, query_positions, *, window,
                                    sinks, scale):
  """`sliding_window_attention` of new tokens over a ring of the last W and themselves.

  Slot s of the ring holds the newest position p < query_positions[:,0] with p % W == s. The ring
  is turned into order and its oldest position, which no query sees, is left out.
  """
  first = query_positions[:, :1]
  past = first - jnp.arange(window - 1, 0, -1, dtype=jnp.int32)        # [B,W-1], oldest first
  seen = (past >= 0)[..., None, None]
  slots = (past % window)[..., None, None]

  def in_order(ring, new):
    old = jnp.where(seen, jnp.take_along_axis(ring, slots, axis=1), 0)
    return jnp.concatenate([old, new], axis=1).astype(jnp.float32)

  queries = {"q": q.astype(jnp.float32) * scale, "position": query_positions, "segment": None}
  keys = {"k": in_order(k_ring, k_new), "v": in_order(v_ring, v_new),
          "position": jnp.concatenate([past, query_positions], axis=1), "segment": None}
  return windowed_attention(queries, keys, window=window, sinks=sinks).astype(q.dtype)


def _written(k, v, query_positions, layer):
  """k and v [B,S,K,.] in float32, with every slot after the last query's position set to 0."""
  if layer is not None:
    k, v = k[layer], v[layer]
  slots = jnp.arange(k.shape[1], dtype=jnp.int32)
  written = (slots <= query_positions.max(axis=1, keepdims=True))[..., None, None]
  return tuple(jnp.where(written, x, 0).astype(jnp.float32) for x in (k, v))


def _gathered_attention(queries, k, v, block_size, sinks, layer):
  """The T=1 path: k, v [B,S,K,H] are read at the selected blocks' slots only."""
  batch, num_keys, kv_heads, _ = k.shape[-4:]
  blocks = queries["blocks"][:, 0]                                     # [B,K,P]
  slots = blocks[..., None] * block_size + jnp.arange(block_size, dtype=jnp.int32)
  position = queries["position"][:, :, None, None]
  visible = (blocks[..., None] >= 0) & (slots < num_keys) & (slots <= position)
  slots, visible = slots.reshape(batch, kv_heads, -1), visible.reshape(batch, kv_heads, -1)

  def gather(x):      # [B,S,K,H], or [C,B,S,K,H] with a layer -> [B,P*block_size,K,H]
    rows = jnp.arange(batch)[:, None, None]
    heads = jnp.arange(kv_heads)[:, None]
    at = rows, jnp.clip(slots, 0, num_keys - 1), heads
    x = x[at] if layer is None else x[layer, *at]
    return jnp.where(visible[..., None], x, 0).astype(jnp.float32).transpose(0, 2, 1, 3)

  return masked_attention(queries["q"], gather(k), gather(v), visible[:, :, None], sinks=sinks)[0]
