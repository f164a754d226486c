"""Which keys a query may attend to, whatever blocks it selected: positions, window, segments."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from pallas_kernels.gpu_padding import BLOCK, pad_tokens


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=("offsets", "segment_ids", "kv_segment_ids"),
  meta_fields=("offset", "num_keys", "beyond", "window"))
@dataclasses.dataclass(frozen=True)
class Visibility:
  """Query t of row b, at key index p = offset + t, sees key j if j <= p, j > p - window, j < S and
  both have the same segment id other than 0.

  offsets         i32 [B], or None where `offset` is known when tracing
  segment_ids     i32 [B,T], T padded to blocks, or None
  kv_segment_ids  i32 [B,S], S padded to blocks, or None
  offset          int, or None where it is traced
  num_keys        S before padding
  beyond          whether a query may have a position past the last key
  window          tokens, or None for all
  """

  offsets: jax.Array | None
  segment_ids: jax.Array | None
  kv_segment_ids: jax.Array | None
  offset: int | None
  num_keys: int
  beyond: bool
  window: int | None

  def row_offsets(self, batch):
    """i32 [B]: the key index of query 0."""
    return jnp.full((batch,), self.offset, jnp.int32) if self.offsets is None else self.offsets

  def masked_steps(self, plan):
    """i32 [B,K,L]: the steps of each tile's list, counted from its start, that need the segment
    mask: up to the last block that does not lie within one segment with the whole tile. At least 1.
    """
    tiles = _segment_of(self.segment_ids, plan.config.tile_tokens)[:, None, :, None]
    keys = _segment_of(self.kv_segment_ids, BLOCK)
    blocks = plan.blocks
    keys = jnp.take_along_axis(keys, blocks.reshape(blocks.shape[0], -1), axis=1)
    mixed = (keys.reshape(blocks.shape) != tiles) | (tiles == 0)
    step = 1 + jnp.arange(blocks.shape[-1], dtype=jnp.int32) // plan.config.list_multiple
    return jnp.where(mixed & (plan.words != 0), step, 1).max(-1)


def _segment_of(ids, size):
  """ids i32 [B,X] -> i32 [B,X/size]: the segment of each run of `size`, 0 where there are more."""
  ids = ids.reshape(ids.shape[0], -1, size)
  return jnp.where((ids == ids[..., :1]).all(-1), ids[..., 0], 0)


def visibility(num_queries, num_keys, query_offset, segment_ids, kv_segment_ids, window=None):
  """The Visibility of an op's arguments, as `api.py` hands them over."""
  static = isinstance(query_offset, int)
  return Visibility(
    None if static else query_offset, pad_tokens(segment_ids), pad_tokens(kv_segment_ids),
    query_offset if static else None, num_keys,
    not static or query_offset + num_queries > num_keys, window)
