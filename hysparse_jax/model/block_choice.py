"""What sparse layers read if not the oracle's own choice: two ablations of `model.block_choice`.

    random     P blocks drawn uniformly from those the token may see, the same at every training
               step and in every layer: what the sparse branch is worth without a choice
    previous   the blocks that the oracle picked for the previous token: what a selection that is
               one token old is worth

Axis letters: B batch, T query, K KV heads, P picked blocks, C key blocks.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.reference.block_selection import select_blocks


def random_blocks(index, first, kv_heads: int, num_blocks: int, block_size: int, total: int):
  """P distinct blocks of those between a token's first key and itself.

  Args:
    index: i32 [B, T], where the token stands in its row.
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


def previous_blocks(picked, opens, before=None):
  """Every token's predecessor's picks; a document's first token keeps its own.

  Args:
    picked: i32 [B, K, T, P] of the oracle.
    opens: bool [B, T], the first tokens of documents.
    before: i32 [B, K, P], the picks of the token before the first one; None: there is none.

  Returns:
    i32 [B, K, T, P].
  """
  before = picked[:, :, 0] if before is None else before
  shifted = jnp.concatenate([before[:, :, None], picked[:, :, :-1]], axis=2)
  return jnp.where(opens[:, None, :, None], picked, shifted)


def document_starts(segment_ids, shape):
  """i32 [B, T]: where a token's document starts in its row; T for padding (segment 0)."""
  if segment_ids is None:
    return jnp.zeros(shape, jnp.int32)
  index = jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32), shape)
  changed = jnp.concatenate([jnp.ones_like(segment_ids[:, :1], bool),
                             segment_ids[:, 1:] != segment_ids[:, :-1]], axis=1)
  start = jax.lax.cummax(jnp.where(changed, index, 0), axis=1)
  return jnp.where(segment_ids == 0, shape[1], start)


def _mixed(x):
  """Murmur3's 32-bit finaliser."""
  x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
  x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
  return x ^ (x >> 16)
