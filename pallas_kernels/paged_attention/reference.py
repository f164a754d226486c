"""The meaning of the paged ops, in float32 `jax.numpy`.

What no query may see can hold anything, NaN included: the unused slots of a sequence's last page,
the pages and table entries after it, and ring slots that were never written.
"""

import jax.numpy as jnp

from pallas_kernels.reference.block_selection import attend_and_select
from pallas_kernels.reference.masked_attention import masked_attention


def paged_oracle_attention(q, k_pages, v_pages, page_table, lengths, *, layer, num_blocks, scale):
  """`oracle_attention` of the last token over its gathered pages; see `api.py`."""
  page_size = k_pages.shape[3]
  tokens = jnp.arange(page_table.shape[1] * page_size, dtype=jnp.int32)
  visible = tokens < lengths[:, None]                                    # [B,U*S]

  def gather(pages):      # [C,R,K,S,H] -> f32 [B,U*S,K,H]
    pages = pages[layer, jnp.clip(page_table, 0, pages.shape[1] - 1)].swapaxes(2, 3)
    keys = pages.reshape(pages.shape[0], -1, *pages.shape[3:])
    return jnp.where(visible[..., None, None], keys, 0).astype(jnp.float32)

  out, block_indices = attend_and_select(
    q[:, None].astype(jnp.float32) * scale, gather(k_pages), gather(v_pages),
    visible[:, None, None], block_size=page_size, num_blocks=num_blocks)
  return out[:, 0].astype(q.dtype), block_indices[:, 0]


def paged_sparse_layer_attention(q, k_pages, v_pages, block_indices, page_table, lengths, k_ring,
                                 v_ring, gate_sparse, gate_local, *, sinks_sparse, sinks_local,
                                 layer, ring_layer, scale):
  """gate_sparse * o_sparse + gate_local * o_local  (HySparse, sparse layer); see `api.py`.

  ring_layer: i32 [], of rings [L,B,K,W,.].
  """
  queries = q[:, None].astype(jnp.float32) * scale
  out = jnp.zeros((*q.shape[:2], (v_ring if v_pages is None else v_pages).shape[-1]), jnp.float32)
  if k_pages is not None and block_indices.shape[2]:
    out = _gated(gate_sparse, _selected(queries, k_pages, v_pages, block_indices, page_table,
                                        lengths, sinks_sparse, layer))
  if k_ring is not None:
    written = jnp.arange(k_ring.shape[3], dtype=jnp.int32) < lengths[:, None]
    out = out + _gated(gate_local, _attend(
      queries, k_ring[ring_layer], v_ring[ring_layer], written[:, None], sinks_local))
  return out.astype(q.dtype)


def _selected(queries, k_pages, v_pages, block_indices, page_table, lengths, sinks, layer):
  """The sparse branch: reads the P selected pages only."""
  batch, kv_heads, _ = block_indices.shape
  page_size = k_pages.shape[3]
  slots = block_indices[..., None] * page_size + jnp.arange(page_size, dtype=jnp.int32)
  visible = (block_indices >= 0)[..., None] & (slots < lengths[:, None, None, None])
  pages = jnp.take_along_axis(page_table, block_indices.clip(0, page_table.shape[1] - 1).reshape(
    batch, -1), axis=1).reshape(block_indices.shape).clip(0, k_pages.shape[1] - 1)
  heads = jnp.arange(kv_heads)[:, None]
  gather = lambda x: x[layer, pages, heads].reshape(batch, kv_heads, -1, x.shape[-1])
  return _attend(queries, gather(k_pages), gather(v_pages),
                 visible.reshape(batch, kv_heads, -1), sinks)


def _attend(queries, k, v, visible, sinks):
  """out f32 [B,N,E] of queries f32 [B,1,N,H] over k [B,K,S,H], v [B,K,S,E]; visible [B,K or 1,S].
  """
  keys, values = (jnp.where(visible[..., None], x, 0).astype(jnp.float32).swapaxes(1, 2)
                  for x in (k, v))
  return masked_attention(queries, keys, values, visible[:, :, None], sinks=sinks)[0][:, 0]


def _gated(gate, out):
  return out if gate is None else gate.astype(jnp.float32) * out
