"""Which 128-token tiles of keys and queries meet, and which of those need no mask.

Query t of row b has the key index `query_offset[b] + t` and sees no key after it. With segment ids
it sees only keys of its own nonzero segment. The kernels visit one contiguous range of tiles each,
and inside it one contiguous range without any mask; both come from the smallest and largest
segment id of every tile. Documents in a row one after the other give exact ranges. A segment that
returns later gives ranges that are larger than needed, and those tiles are masked.
"""

import dataclasses

import jax
import jax.numpy as jnp

TILE = 128      # queries or keys
BEGIN, PLAIN_BEGIN, PLAIN_END, END = range(4)


@dataclasses.dataclass(frozen=True)
class Visibility:
  """Arrays and sizes from which the kernels of one call build their masks.

  T' and S' are the numbers of queries and keys, padded to multiples of 128.

  Attributes:
    offset: i32 [B], key index of query 0.
    key_ranges: i32 [B, T'/128, 4]: the key tiles [BEGIN, END) that a tile of queries visits, at
      least one; all queries see all keys of the tiles [PLAIN_BEGIN, PLAIN_END).
    query_ranges: i32 [B, S'/128, 4]: the same of the query tiles that see a tile of keys, maybe
      none.
    segment_ids: i32 [B, T'] or None.
    kv_segment_ids: i32 [B, S'] or None.
    num_keys: S, without padding.
    aligned: every offset is known to be a multiple of 128, so that causality alone masks no more
      than one tile in `key_ranges`.
  """

  offset: jax.Array
  key_ranges: jax.Array
  query_ranges: jax.Array
  segment_ids: jax.Array | None
  kv_segment_ids: jax.Array | None
  num_keys: int
  aligned: bool

  @property
  def segmented(self):
    """Whether there are segment ids."""
    return self.segment_ids is not None

  @property
  def ids(self):
    """The segment arrays as kernel operands: both or none."""
    return [self.segment_ids, self.kv_segment_ids] if self.segmented else []


def visibility(query_offset, segment_ids, kv_segment_ids, batch, num_queries, num_keys,
               query_multiple=TILE):
  """The `Visibility` of one call.

  Args:
    query_offset: int, or i32 [B].
    segment_ids: i32 [B, T] or None.
    kv_segment_ids: i32 [B, S] or None.
    batch: B.
    num_queries: T.
    num_keys: S.
    query_multiple: T' is a multiple of it, itself a multiple of 128.
  """
  aligned = isinstance(query_offset, int) and query_offset % TILE == 0
  offset = jnp.broadcast_to(jnp.asarray(query_offset, jnp.int32), (batch,))
  query_tiles = -(-num_queries // query_multiple) * (query_multiple // TILE)
  key_tiles = -(-num_keys // TILE)
  if segment_ids is not None:
    # Rows of padding queries are dropped: their ids must only not spoil the tile's.
    segment_ids = jnp.pad(segment_ids, ((0, 0), (0, query_tiles * TILE - num_queries)), "edge")
    kv_segment_ids = jnp.pad(kv_segment_ids, ((0, 0), (0, key_tiles * TILE - num_keys)))

  query, key = jnp.arange(query_tiles, dtype=jnp.int32), jnp.arange(key_tiles, dtype=jnp.int32)
  # The key index of a tile's first and last query, no further than the last key.
  low = jnp.minimum(offset[:, None] + query * TILE, num_keys - 1)
  high = offset[:, None] + jnp.minimum(query * TILE + TILE - 1, num_queries - 1)
  high = jnp.maximum(jnp.minimum(high, num_keys - 1), 0)
  reach = high // TILE
  plain_end = (low + 1) // TILE
  if segment_ids is None:
    key_ranges = [jnp.zeros_like(reach), jnp.zeros_like(reach), plain_end, reach + 1]
    last_query = offset[:, None] + num_queries - 1
    begin = -((offset[:, None] + TILE - 1 - key * TILE) // TILE)
    begin = jnp.where(last_query < key * TILE, query_tiles, begin)
    plain_begin = -((offset[:, None] + 1 - (key + 1) * TILE) // TILE)
    plain_begin = jnp.where((key + 1) * TILE <= num_keys, plain_begin, query_tiles)
    end = jnp.full_like(begin, query_tiles)
    query_ranges = [begin, plain_begin, end, end]
  else:
    lowest, highest, alone = _id_bounds(segment_ids)
    kv_lowest, kv_highest, kv_alone = _id_bounds(kv_segment_ids)
    of_query, of_key = (slice(None), slice(None), None), (slice(None), None, slice(None))
    meet = (kv_lowest[of_key] <= highest[of_query]) & (kv_highest[of_key] >= lowest[of_query])
    meet &= key <= reach[of_query]                                            # [B, T'/128, S'/128]
    plain = kv_alone[of_key] & alone[of_query] & (kv_lowest[of_key] == lowest[of_query])
    plain &= key < plain_end[of_query]
    any_key = meet.any(2)
    begin = jnp.where(any_key, jnp.argmax(meet, 2), reach)
    end = jnp.where(any_key, key_tiles - jnp.argmax(meet[:, :, ::-1], 2), reach + 1)
    mixed = ~plain & (key < plain_end[of_query])
    plain_begin = jnp.where(mixed.any(2), key_tiles - jnp.argmax(mixed[:, :, ::-1], 2), 0)
    key_ranges = [begin, plain_begin, plain_end, end]
    any_query = meet.any(1)
    begin = jnp.where(any_query, jnp.argmax(meet, 1), query_tiles)
    end = jnp.where(any_query, query_tiles - jnp.argmax(meet[:, ::-1], 1), query_tiles)
    plain_begin = jnp.where(plain.any(1), jnp.argmax(plain, 1), end)
    stops = ~plain & (query[:, None] >= plain_begin[:, None])
    plain_end = jnp.where(stops.any(1), jnp.argmax(stops, 1), query_tiles)
    query_ranges = [begin, plain_begin, plain_end, end]
  return Visibility(offset, _table(key_ranges, key_tiles), _table(query_ranges, query_tiles),
                    segment_ids, kv_segment_ids, num_keys, aligned)


def _id_bounds(ids):
  """The lowest and highest nonzero id of each tile, and whether it holds one nonzero id only."""
  tiles = ids.reshape(ids.shape[0], -1, TILE)
  info = jnp.iinfo(jnp.int32)
  lowest = jnp.where(tiles == 0, info.max, tiles).min(-1)
  highest = jnp.where(tiles == 0, info.min, tiles).max(-1)
  return lowest, highest, (tiles == tiles[..., :1]).all(-1) & (tiles[..., 0] != 0)


def _table(ranges, limit):
  """i32 [B, tiles, 4] with 0 <= BEGIN <= PLAIN_BEGIN <= PLAIN_END <= END <= limit."""
  begin, plain_begin, plain_end, end = (jnp.asarray(x, jnp.int32) for x in ranges)
  end = jnp.clip(end, 0, limit)
  begin = jnp.clip(begin, 0, end)
  plain_end = jnp.clip(plain_end, begin, end)
  return jnp.stack([begin, jnp.clip(plain_begin, begin, plain_end), plain_end, end], -1)
