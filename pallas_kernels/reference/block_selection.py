"""Selects each query's key blocks, and masks the keys that selected blocks make visible."""

import jax
import jax.numpy as jnp

from pallas_kernels.reference.masked_attention import masked_attention


def attend_and_select(q, k, v, visible, *, block_size, num_blocks):
  """`masked_attention`, and the best blocks of each query.

  Args:
    q: f32 [B,T,N,H], already scaled.
    k: f32 [B,S,K,H], S a multiple of `block_size` unless `num_blocks` is 0.
    v: f32 [B,S,K,E].
    visible: bool, broadcastable to [B,K,T,S].
    block_size: keys per block.
    num_blocks: P; 0 does no selection work.

  Returns:
    out f32 [B,T,N,E], and i32 [B,T,K,P] as `select_blocks` orders them.
  """
  batch, num_queries = q.shape[:2]
  num_keys, kv_heads = k.shape[1:3]
  if not num_blocks:
    out, _ = masked_attention(q, k, v, visible)
    return out, jnp.zeros((batch, num_queries, kv_heads, 0), jnp.int32)
  # With at most P blocks every candidate is selected, whatever its weight.
  compete = num_keys > num_blocks * block_size
  out, log_weights = masked_attention(q, k, v, visible, block_size=block_size if compete else None)
  if not compete:
    candidates = visible.reshape(*visible.shape[:-1], -1, block_size).any(axis=-1)
    log_weights = jnp.where(candidates, 0.0, -jnp.inf)
  picked = select_blocks(log_weights, num_blocks).transpose(0, 2, 1, 3)
  return out, jnp.broadcast_to(picked, (batch, num_queries, kv_heads, num_blocks))


def select_blocks(log_weights, num_blocks):
  """The blocks of largest weight, in ascending order (HySparse paper).

  Fewer than P candidates: all of them. Equal weights: the lower block first.

  Args:
    log_weights: f32 [...,C]; -inf marks a block that is no candidate.
    num_blocks: P, at least 1.

  Returns:
    i32 [...,P], ascending, -1 pads at the end. No gradient.
  """
  total = log_weights.shape[-1]
  log_weights = jax.lax.stop_gradient(log_weights)
  if total > num_blocks:
    best, picked = jax.lax.top_k(log_weights, num_blocks)      # equal values: lower index first
    picked = jnp.sort(jnp.where(best > -jnp.inf, picked, total), axis=-1)
    return jnp.where(picked == total, -1, picked)
  candidate = log_weights > -jnp.inf
  # Candidate number p goes to place p.
  place = jnp.where(candidate, jnp.cumsum(candidate, axis=-1) - 1, -1)
  here = place[..., None, :] == jnp.arange(num_blocks)[:, None]         # [...,P,C]
  blocks = jnp.arange(total, dtype=jnp.int32)
  return jnp.where(here, blocks, -1).max(axis=-1)


def picked_keys(block_indices, num_keys, block_size):
  """bool [B,K,T,S]: is the key inside one of the query's selected blocks?

  Args:
    block_indices: i32 [B,K,T,P]; entries outside 0..C-1 select nothing.
    num_keys: S.
    block_size: keys per block.
  """
  blocks = jnp.arange(-(-num_keys // block_size), dtype=block_indices.dtype)
  picked = (block_indices[..., :, None] == blocks).any(axis=-2)
  return jnp.repeat(picked, block_size, axis=-1)[..., :num_keys]
