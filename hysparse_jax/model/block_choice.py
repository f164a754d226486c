"""What sparse layers read if not the oracle's own choice: two ablations of `model.block_choice`.

    random     P blocks drawn uniformly from those the token may see, the same at every training
               step and in every layer: what the sparse branch is worth without a choice
    previous   the blocks that the oracle selected for the previous token: what a selection that is
               one token old is worth. It needs the whole row at once, so it does not decode.

Axis letters: B batch, T query, S key, K KV heads, P selected blocks, C key blocks.
"""

import jax.numpy as jnp

from hysparse_jax.config import ModelConfig
from hysparse_jax.model.layers import positions_within
from pallas_kernels.reference.block_selection import select_blocks


def chosen(cfg: ModelConfig, block_indices, num_blocks: int, context):
  """The blocks that the sparse layers read, `model.block_choice` applied.

  Args:
    cfg: of the model.
    block_indices: i32 [B, K, T, .], the oracle's choice.
    num_blocks: P.
    context: TokenContext of the tokens.

  Returns:
    i32 [B, K, T, P].
  """
  if cfg.block_choice == "oracle":
    return block_indices
  shape = context.positions.shape
  if context.page_table is None:
    index, num_blocks_seen = positions_within(None, shape), -(-shape[1] // cfg.block_size)
    first = index - positions_within(context.segment_ids, shape)
  else:
    index, num_blocks_seen = context.positions, context.page_table.shape[1]
    first = jnp.zeros_like(index)
  if cfg.block_choice == "previous":
    return previous_blocks(block_indices, index == first)
  if context.segment_ids is not None:
    first = jnp.where(context.segment_ids == 0, shape[1], first)
  return random_blocks(index, first, cfg.num_kv_heads, num_blocks, cfg.block_size, num_blocks_seen)


def random_blocks(index, first, kv_heads: int, num_blocks: int, block_size: int, total: int):
  """P distinct blocks of those between a token's first key and itself.

  Args:
    index: i32 [B, T], its position in the row.
    first: i32 [B, T], where its document starts; above `index` for padding, which gets none.
    kv_heads: K.
    num_blocks: P.
    block_size: keys per block.
    total: C.

  Returns:
    i32 [B, K, T, P] as `oracle_attention` returns them. A function of token, head and block alone.
  """
  block = jnp.arange(total)
  head = jnp.arange(kv_heads, dtype=jnp.uint32)[:, None, None]
  token = index.astype(jnp.uint32)[:, None, :, None]
  drawn = _mixed(_mixed(token * jnp.uint32(0x9E3779B9) + head) + block.astype(jnp.uint32))
  score = (drawn >> 8).astype(jnp.float32)                          # [B, K, T, C], 24 bits: exact
  index, first = index[:, None, :, None], first[:, None, :, None]
  seen = (block <= index // block_size) & (block >= first // block_size) & (first <= index)
  return select_blocks(jnp.where(seen, score, -jnp.inf), num_blocks)


def previous_blocks(block_indices, opens):
  """Every token's predecessor's blocks; a document's first token keeps its own.

  Args:
    block_indices: i32 [B, K, T, P] of the oracle.
    opens: bool [B, T], the first tokens of documents.

  Returns:
    i32 [B, K, T, P].
  """
  shifted = jnp.roll(block_indices, 1, axis=2)
  return jnp.where(opens[:, None, :, None], block_indices, shifted)


def _mixed(x):
  """Murmur3's 32-bit finaliser."""
  x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
  x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
  return x ^ (x >> 16)
