"""What the TPU kernels derive from the selected blocks, computed once per hybrid block.

A tile is `ROWS` rows, tokens x query heads of one KV head. Its list holds every block that one of
its tokens selected (the union), with a bit for each token that did. Lists descend, so that the
blocks which need the causal mask come first and the blocks of a segment of the keys are
adjacent. The static width is the most a tile can select, so no block is left out.

XLA operations that TPUs do well: two sorts of short rows and shifts, no scatter, no atomics; so a
plan, and every sum that follows its order, is the same bit for bit on every run.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.checks import NotCoveredError

ROWS = 128       # of a tile: tokens x query heads of one KV head
_MERGED = 4      # tiles that a dense kernel takes as one


@functools.partial(
  jax.tree_util.register_dataclass, data_fields=("blocks", "words", "counts", "positions"),
  meta_fields=("group", "tile_tokens", "block_size", "tokens", "num_keys", "query_offset"))
@dataclasses.dataclass(frozen=True)
class TilePlan:
  """Union lists and membership of one set of selected blocks; every leaf leads with [B,K].

  Attributes:
    blocks: i32 [B,K,L,U], the union of tile l, descending; 0 beyond its count.
    words: i32 [B,K,L,W,U]; bit i of word w: token 32 w + i of the tile selected the block.
    counts: i32 [B,K,L], blocks in the list.
    positions: i32 [B,K,L], key index of the tile's first token.
    group: query heads to a KV head as the kernels run them, a power of 2.
    tile_tokens: tokens of a tile; L tiles cover `tokens`.
    block_size: keys per block.
    tokens: T.
    num_keys: S.
    query_offset: key index of query 0; None where it is traced.
  """

  blocks: jax.Array
  words: jax.Array
  counts: jax.Array
  positions: jax.Array
  group: int
  tile_tokens: int
  block_size: int
  tokens: int
  num_keys: int
  query_offset: int | None

  @property
  def num_blocks(self):
    """C, blocks of the keys."""
    return -(-self.num_keys // self.block_size)

  @property
  def may_pass_end(self):
    """Whether a query may come after the last key."""
    return self.query_offset is None or self.query_offset + self.tokens > self.num_keys

  def causal_entries(self):
    """How many of a list's first entries may hold keys that are after one of the tile's tokens."""
    tile, size = self.tile_tokens, self.block_size
    if self.query_offset is None:              # tile - 1 keys after the first token, anywhere
      return max((tile + size - 3) // size + 1, 1)
    first = self.query_offset + np.arange(0, self.tokens, tile)
    return max(int(((first + tile - 1) // size - (first + 1) // size).max()) + 1, 1)

  def causal_blocks(self):
    """i32 [B,K,L]: blocks up to the last token of a tile, which a dense kernel visits."""
    return jnp.clip((self.positions + (self.tile_tokens - 1)) // self.block_size + 1, 0,
                    self.num_blocks)

  def share(self):
    """f32 []: listed blocks over the blocks that a causal dense kernel visits."""
    return (self.counts.astype(jnp.float32).sum()
            / jnp.maximum(self.causal_blocks().astype(jnp.float32).sum(), 1.0))

  def dense(self):
    """The same selection as lists of every causal block, for tiles of `_MERGED` times the tokens.

    What is then left to choose is membership: a dense causal kernel with a mask per row.
    """
    merged = _MERGED
    b, k, tiles, width = self.blocks.shape
    blocks, programs = self.num_blocks, -(-tiles // merged)
    wide = dataclasses.replace(self, tile_tokens=self.tile_tokens * merged,
                               positions=self.positions[:, :, ::merged])
    counts = wide.causal_blocks()
    order = counts[..., None] - 1 - jnp.arange(blocks, dtype=jnp.int32)    # [B,K,L',C], descending

    def grouped(x, fill):                                       # [B,K,L,...] -> [B,K,L',merged,...]
      widths = ((0, 0), (0, 0), (0, programs * merged - tiles)) + ((0, 0),) * (x.ndim - 3)
      x = jnp.pad(x, widths, constant_values=fill)
      return x.reshape(b, k, programs, merged, *x.shape[3:])

    live = jnp.arange(width) < self.counts[..., None]
    listed = grouped(jnp.where(live, self.blocks, blocks), blocks)           # [B,K,L',4,U]
    here = listed[..., None] == order[:, :, :, None, None]                         # [B,K,L',4,U,C]
    words = grouped(self.words, 0)[..., None]                                # [B,K,L',4,W,U,1]
    words = jnp.where(here[:, :, :, :, None], words, 0).sum(5)
    if self.tile_tokens >= 32:
      words = words.reshape(b, k, programs, -1, blocks)
    else:                                                       # several tiles to a word
      each = min(32 // self.tile_tokens, merged)
      words = words.reshape(b, k, programs, -1, each, blocks)
      shift = (jnp.arange(each, dtype=jnp.int32) * self.tile_tokens)[:, None]
      words = lax.shift_left(words, jnp.broadcast_to(shift, words.shape)).sum(4)
    return dataclasses.replace(wide, blocks=jnp.maximum(order, 0), words=words, counts=counts)


def padded_group(group):
  """Query heads to a KV head that the kernels run with: the next power of 2.

  Raises:
    NotCoveredError: more than 128.
  """
  if group > 128:
    raise NotCoveredError(
      f"block_sparse_attention on TPU: got G={group} query heads to a KV head, want at most 128")
  return 1 << (group - 1).bit_length()


def _keys(block_indices, tile_tokens, block_size, blocks, offsets):
  """Sort keys of the selected blocks, grouped by tile: i32 [B,K,L,tile*P].

  A key is (C - 1 - block) * tile_tokens + token of the tile. An entry that names no block (of the
  C=`blocks`), or one that the causal mask hides whole, has C * tile_tokens.
  """
  b, k, t, p = block_indices.shape
  tiles = -(-t // tile_tokens)
  token = jnp.arange(t, dtype=jnp.int32)[:, None]
  own = (offsets[:, None, None, None] + token) // block_size
  seen = (block_indices >= 0) & (block_indices <= own) & (block_indices < blocks)
  keys = jnp.where(seen, (blocks - 1 - block_indices) * tile_tokens + token % tile_tokens,
                   blocks * tile_tokens)
  keys = jnp.pad(keys, ((0, 0), (0, 0), (0, tiles * tile_tokens - t), (0, 0)),
                 constant_values=blocks * tile_tokens)
  return keys.reshape(b, k, tiles, tile_tokens * p)


def make_plan(block_indices, group, *, block_size=64, num_keys=None, query_offset=0):
  """The `TilePlan` of some selected blocks.

  Args:
    block_indices: i32 [B,K,T,P], -1 for none; blocks may repeat and need no order.
    group: N // K.
    block_size: keys per block.
    num_keys: S; None: T.
    query_offset: int, or i32 [B]: the key index of query 0.

  Raises:
    NotCoveredError: a group of more than 128.
  """
  group = padded_group(group)
  tile = ROWS // group
  batch, _, tokens = block_indices.shape[:3]
  num_keys = tokens if num_keys is None else num_keys
  num_blocks = -(-num_keys // block_size)
  offsets = jnp.broadcast_to(jnp.asarray(query_offset, jnp.int32), (batch,))
  if not block_indices.shape[-1]:                # none at all: one entry that is none
    block_indices = jnp.full((*block_indices.shape[:-1], 1), -1, jnp.int32)
  keys = _keys(block_indices, tile, block_size, num_blocks, offsets)
  entries = keys.shape[-1]
  picks = block_indices.shape[-1]
  keys = jnp.sort(keys, axis=-1, stable=False)
  rank, token = keys // tile, keys % tile

  def shifted(x, by, fill):
    return jnp.pad(x[..., :-by], ((0, 0),) * 3 + ((by, 0),), constant_values=fill)

  # Each run of one block ors its bits into its last entry, doubling the reach every step.
  bit = lax.shift_left(jnp.int32(1), token % 32)
  words = [jnp.where(token // 32 == w, bit, 0) for w in range(-(-tile // 32))]
  reach = 1
  while reach < min(tile * picks, entries):
    same = shifted(rank, reach, -1) == rank
    words = [word | jnp.where(same, shifted(word, reach, 0), 0) for word in words]
    reach *= 2
  after = jnp.pad(rank[..., 1:], ((0, 0),) * 3 + ((0, 1),), constant_values=-1)
  last = (rank < num_blocks) & (rank != after)
  rank, *words = lax.sort((jnp.where(last, rank, num_blocks), *words), dimension=-1, num_keys=1,
                          is_stable=False)
  width = min(num_blocks, entries)
  counts = last.sum(-1, dtype=jnp.int32)
  live = jnp.arange(width, dtype=jnp.int32) < counts[..., None]
  blocks = jnp.where(live, num_blocks - 1 - rank[..., :width], 0)
  words = jnp.stack([jnp.where(live, word[..., :width], 0) for word in words], axis=3)
  positions = offsets[:, None, None] + jnp.arange(0, tokens, tile, dtype=jnp.int32)
  positions = jnp.broadcast_to(positions, counts.shape)
  return TilePlan(blocks, words, counts, positions, group, tile, block_size, tokens, num_keys,
                  query_offset if isinstance(query_offset, int) else None)
