"""One new token per sequence: the paged ops, which read the cache where it lies.

Axis letters: B batch, N query heads, K KV heads, H head dim of queries and keys, E of values,
P selected blocks.
"""


import pallas_kernels as ops
from hysparse_jax.config import ModelConfig
from hysparse_jax.model.cache import GroupCache, Ring
from hysparse_jax.sharding import sharded


def full_layer(cfg: ModelConfig, q, cache: GroupCache, layer, context, num_blocks: int):
  """out [B, 1, N, E] and block_indices i32 [B, K, 1, P] of q [B, 1, N, H], its own KV cached."""
  def op(q, **operands):
    out, block_indices = ops.paged_oracle_attention(
      q[:, 0], num_blocks=num_blocks, implementation=cfg.implementation, **operands)
    return out[:, None], block_indices[:, :, None]

  return sharded(op, returns=("out", "block_indices"), q=q, k_pages=cache.k_pages,
                 v_pages=cache.v_pages, page_table=context.page_table, lengths=context.lengths,
                 layer=layer)


def sparse_layer(cfg: ModelConfig, q, shared, ring: Ring | None, layer, ring_layer, context,
                 branches):
  """out [B, 1, N, E] of q [B, 1, N, H], its own KV in the ring.

  Args:
    cfg: of the model.
    q: the queries.
    shared: `SharedKV` of pages and block_indices i32 [B, K, 1, P]; None: no sparse branch.
    ring: None: no local branch.
    layer: i32 [], of the pages.
    ring_layer: i32 [], of the ring.
    context: TokenContext.
    branches: gates [B, 1, N, .] and sinks of both branches by name, None where there is none.
  """
  def op(q, block_indices, gate_sparse, gate_local, **operands):
    squeezed = lambda x, axis=1: None if x is None else x.squeeze(axis)
    return ops.paged_sparse_layer_attention(
      q[:, 0], block_indices=squeezed(block_indices, 2), gate_sparse=squeezed(gate_sparse),
      gate_local=squeezed(gate_local), implementation=cfg.implementation, **operands)[:, None]

  pages = dict.fromkeys(("k_pages", "v_pages", "block_indices", "page_table", "layer"))
  if shared is not None:
    pages = dict(k_pages=shared.k, v_pages=shared.v, block_indices=shared.block_indices,
                 page_table=context.page_table, layer=layer)
  local = dict.fromkeys(("k_ring", "v_ring", "ring_layer"))
  if ring is not None:
    local = dict(k_ring=ring.k, v_ring=ring.v, ring_layer=ring_layer)
  return sharded(op, q=q, lengths=context.lengths, **pages, **local, **branches)
