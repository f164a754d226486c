"""What the GPU kernels derive from the selected blocks, computed once per hybrid block.

The queries of a row are cut into tiles of 8, 16 or 32 tokens. A selection (a token and one of its
selected blocks) is *hot* when enough tokens of its tile selected the same block, and *rare*
otherwise. Hot selections go to a tile kernel (forward.py, forward_split.py), which multiplies the
tile with each block of the tile's list and masks the tokens that did not select it. Rare ones go
to the key-major kernel (forward_rare.py), which packs the tokens that selected one block. The
backward (backward.py) is key-major for both. So every selection runs at the cheaper of two costs,
for recorded, trained and random selections alike.

All of it is integer work in a defined order (sorts of unique keys, no atomics): a plan, and with
it every sum the kernels make, is the same bit for bit on every run. One plan serves the M sparse
layers of a hybrid block, forward and backward. Its arrays lead with [B,K], so that it shards like
the KV.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.checks import NotCoveredError
from pallas_kernels.gpu_padding import BLOCK

_NONE = np.uint32(0xFFFFFFFF)
PACKED_BITS = 32        # of a sort key
_WINDOW = 256           # tiles sorted by length together
_SCATTER = 317          # of the hash that orders scattered lists
_UNLISTED = 1 << 30     # sort key of no list entry


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class PlanConfig:
  """Static choices of a plan.

  `hot_threshold` tokens of a tile must share a block to make it hot: 1 sends every selection to the
  tile kernel, more than `tile_tokens` sends every one to the key-major kernel. A tile whose
  selections fill `dense_tile` of its union (blocks x tokens) is all hot. `*_entries` is how many
  selections of one block a program of the key-major kernels takes. `list_multiple` pads a tile's
  list to the number of blocks that the tile kernel takes in a step. `longest_first` sorts a window
  of tiles by their lists, so that programs side by side take equally long: 3.5 % faster on an H200
  for tiles of 32 tokens, 2.7 % slower for tiles of 8, whose neighbours share more. `scattered`
  orders a list by a hash instead of ascending, so that blocks of one part of a tile come in no runs
  that leave the split kernel's other warpgroups waiting.
  """

  tile_tokens: int = 32
  hot_threshold: int = 8
  list_multiple: int = 2
  forward_entries: int = 256
  backward_entries: int = 512
  dense_tile: float = 0.6
  longest_first: bool = True
  scattered: bool = False

  def __post_init__(self):
    if self.tile_tokens not in (8, 16, 32):
      raise ValueError(f"tile_tokens: got {self.tile_tokens}, want 8, 16 or 32")
    for name in ("hot_threshold", "list_multiple", "forward_entries", "backward_entries"):
      if getattr(self, name) < 1:
        raise ValueError(f"{name}: got {getattr(self, name)}, want at least 1")
    if not 0.0625 <= self.dense_tile <= 1:
      raise ValueError(f"dense_tile: got {self.dense_tile}, want 0.0625 to 1")

  @property
  def has_hot(self):
    """Whether the tile kernel can have work."""
    return self.hot_threshold <= self.tile_tokens

  @property
  def has_rare(self):
    """Whether the key-major forward can have work."""
    return self.hot_threshold > 1


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=("block", "starts", "ends", "first"), meta_fields=())
@dataclasses.dataclass(frozen=True)
class KeyMajorWork:
  """Programs of a key-major kernel: program i takes entries [starts[i], ends[i]) of block[i].

  block, starts, ends i32 [B,K,W]; the programs of block c are first[c] to first[c + 1], those past
  the last one have start == end. first i32 [B,K,C+1].
  """

  block: jax.Array
  starts: jax.Array
  ends: jax.Array
  first: jax.Array


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=("blocks", "words", "counts", "order", "rare", "valid", "entries", "rare_work",
               "all_work"),
  meta_fields=("config", "selected", "offset"))
@dataclasses.dataclass(frozen=True)
class SelectionPlan:
  """Lists of blocks for each tile of queries, and lists of queries for each block.

  blocks  i32 [B,K,L,U]  hot blocks of tile l: first those that hold keys at the tile's own
                         positions (at most 2), then ascending or `scattered`
  words   i32 [B,K,L,U]  bit i: token i of the tile selected the block; 0 beyond the tile's count
  counts  i32 [B,K,L]    steps of `list_multiple` blocks that hold the tile's list
  order   i32 [B,K,L]    the tiles in the order to run them
  rare    i32 [B,K,T]    how many of the token's selections are rare
  valid   i32 [B,K,T]    how many selections the token has
  entries i32 [B,K,T*P]  t * P + slot of every selection, sorted by block, rare ones first, then t;
                         slots number a token's selections, rare ones first, without gaps
  config                 PlanConfig
  selected               P
  offset                 the static query offset, or None where it was traced
  """

  blocks: jax.Array
  words: jax.Array
  counts: jax.Array
  order: jax.Array
  rare: jax.Array
  valid: jax.Array
  entries: jax.Array
  rare_work: KeyMajorWork
  all_work: KeyMajorWork
  config: PlanConfig
  selected: int
  offset: int | None

  @property
  def num_blocks(self):
    """C, key blocks."""
    return self.all_work.first.shape[-1] - 1

  @property
  def own_steps(self):
    """List positions, 1 or 2, that may hold a tile's own positions: where keys need causality."""
    return 1 if self.offset is not None and self.offset % self.config.tile_tokens == 0 else 2


def membership(block_indices, tile_tokens, num_blocks):
  """block_indices i32 [B,K,T,P] -> u32 [B,K,L,C]: bit i: token i of the tile selected the block.

  Sums of distinct powers of two, so the order of the scattered additions does not matter.
  """
  b, k, t, p = block_indices.shape
  tiles = t // tile_tokens
  flat = block_indices.reshape(b * k * tiles, tile_tokens * p)
  bit = jnp.left_shift(jnp.uint32(1), jnp.arange(tile_tokens * p, dtype=jnp.uint32) // p)
  row = jnp.arange(b * k * tiles, dtype=jnp.int32)[:, None]
  words = jnp.zeros((b * k * tiles, num_blocks), jnp.uint32)
  words = words.at[row, jnp.where(flat < 0, num_blocks, flat)].add(bit, mode="drop")
  return words.reshape(b, k, tiles, num_blocks)


def key_major_work(starts, ends, entries_per_program, max_entries):
  """starts, ends i32 [B,K,C] of each block's entries -> KeyMajorWork of a static size."""
  blocks = starts.shape[-1]
  programs = -(-(ends - starts) // entries_per_program)
  first = jnp.pad(jnp.cumsum(programs, axis=-1, dtype=jnp.int32), ((0, 0), (0, 0), (1, 0)))
  index = jnp.arange(max_entries // entries_per_program + blocks, dtype=jnp.int32)
  block = (first[:, :, None, :] <= index[:, None]).sum(-1, dtype=jnp.int32) - 1
  block = jnp.minimum(block, blocks - 1)
  at = lambda x: jnp.take_along_axis(x, block, axis=-1)
  begin = at(starts) + (index - at(first)) * entries_per_program
  end = jnp.minimum(begin + entries_per_program, at(ends))
  live = index < first[..., -1:]
  return KeyMajorWork(
    block, jnp.where(live, begin, 0), jnp.where(live, jnp.maximum(end, begin), 0), first)


def _inverse_index(block_indices, slots, second, num_blocks):
  """Selections of each (b, k) sorted by (block, second class, t), none second where it is None.

  block_indices, slots i32 [B,K,T,P]; second bool [B,K,T,P] puts a selection behind the others of
  its block -> t * P + slot, i32 [B,K,T*P], the valid ones first.
  """
  b, k, t, p = block_indices.shape
  split = 1 if second is None else 2
  rows, entries, classes = b * k, t * p, num_blocks * split
  kind = block_indices * split + (0 if second is None else second.astype(jnp.int32))
  kind = kind.reshape(rows, entries).astype(jnp.uint32)
  valid = block_indices.reshape(rows, entries) >= 0
  token = jnp.arange(entries, dtype=jnp.uint32) // p
  entry = token * p + slots.reshape(rows, entries).astype(jnp.uint32)
  if rows * classes * entries <= 1 << PACKED_BITS:      # row, block, class, entry in one key
    row = jnp.arange(rows, dtype=jnp.uint32)[:, None]
    size = jnp.uint32(classes * entries % (1 << 32))
    # A row's invalid entries take its largest key. Equal keys give equal entries.
    keys = jnp.where(valid, row * size + kind * jnp.uint32(entries) + entry, row * size + size - 1)
    ordered = jnp.sort(keys.reshape(-1)) % jnp.uint32(entries)
    return ordered.astype(jnp.int32).reshape(b, k, entries)

  def sort_row(args):
    kind, valid, entry = args
    if classes * t < 1 << PACKED_BITS:
      keys = jnp.where(valid, kind * jnp.uint32(t) + token, _NONE)
      return lax.sort((keys, entry), num_keys=1)[1]
    return lax.sort((jnp.where(valid, kind, jnp.uint32(classes)), entry), num_keys=2)[1]

  ordered = lax.map(sort_row, (kind, valid, entry))
  return ordered.astype(jnp.int32).reshape(b, k, entries)


def _longest_first(counts, most):
  """Tiles of each head, late windows first, longest first inside a window of tiles.

  Programs that run side by side then take equally long, and stay near each other in T. counts i32
  [B,K,L] are at most `most`.
  """
  tiles = counts.shape[-1]
  window = max(w for w in range(1, min(tiles, _WINDOW) + 1) if tiles % w == 0)
  number = jnp.arange(tiles, dtype=jnp.int32)
  late = tiles // window - 1 - number // window
  key = (late * (most + 1) + most - counts) * window + number % window
  key = jnp.sort(key, axis=-1)
  return (tiles // window - 1 - key // ((most + 1) * window)) * window + key % window


def own_blocks(offsets, tokens, num_keys):
  """i32 [B,T]: the block that holds each query's own position, or the last key where it is past it.

  offsets i32 [B]: the key index of query 0.
  """
  position = offsets[:, None] + jnp.arange(tokens, dtype=jnp.int32)
  return jnp.minimum(position, num_keys - 1) // BLOCK


def build_plan(block_indices, num_keys, query_offset, config):
  """block_indices i32 [B,K,T,P], -1 for none -> SelectionPlan.

  A token may select a block once. Blocks past the token's own position are left out, as no key of
  theirs is visible.

  Raises:
    NotCoveredError: T is no multiple of 64, or P * tile_tokens is over 1024.
  """
  b, k, t, p = block_indices.shape
  tile, num_blocks = config.tile_tokens, -(-num_keys // BLOCK)
  if t % BLOCK:
    raise NotCoveredError(f"block_indices: got T={t}, want a multiple of {BLOCK}")
  if tile * p > 1024:
    raise NotCoveredError(
      f"got {p} selected blocks in tiles of {tile} tokens, want at most 1024 a tile")
  static = isinstance(query_offset, int)
  offsets = jnp.full((b,), query_offset, jnp.int32) if static else query_offset
  tiles = t // tile
  own = own_blocks(offsets, t, num_keys)
  block_indices = jnp.where(block_indices <= own[:, None, :, None], block_indices, -1)
  table = membership(block_indices, tile, num_blocks)
  members = lax.population_count(table).astype(jnp.int32)
  flat = block_indices.reshape(b, k, tiles, tile * p)
  words = jnp.take_along_axis(table, jnp.maximum(flat, 0), axis=-1)
  words = jnp.where(flat < 0, jnp.uint32(0), words)
  dense = members.sum(-1) >= config.dense_tile * tile * (members > 0).sum(-1)
  threshold = jnp.where(dense & config.has_hot, 1, config.hot_threshold)[..., None]
  hot = (words != 0) & (lax.population_count(words).astype(jnp.int32) >= threshold)
  entry = jnp.arange(tile * p, dtype=jnp.int32)

  # Tile lists: each hot block once, by its first member; one sort of unique keys a tile.
  first_own, last_own = (own[:, None, i::tile, None] for i in (0, tile - 1))
  leads = hot & ((words & (~words + 1)) == jnp.left_shift(1, entry // p).astype(jnp.uint32))
  order = flat
  if config.scattered:                      # odd times modulo a power of two: one to one
    order = flat * _SCATTER % (1 << (num_blocks - 1).bit_length())
  order = jnp.where(flat == first_own, 0, jnp.where(flat == last_own, 1, order + 2))
  width = 1
  if config.has_hot:
    width = min(num_blocks, max(tile * p // config.hot_threshold, int(p / config.dense_tile)))
  width = -(-max(width, 1) // config.list_multiple) * config.list_multiple
  entry_bits = (tile * p - 1).bit_length()
  keys = jnp.where(leads, jnp.left_shift(order, entry_bits) + entry, _UNLISTED)
  keys = jnp.pad(keys, ((0, 0),) * 3 + ((0, max(0, width - tile * p)),),
                 constant_values=_UNLISTED)
  keys = jnp.sort(keys, axis=-1)[..., :width]
  live = keys < _UNLISTED
  lead = jnp.where(live, keys & ((1 << entry_bits) - 1), 0)
  blocks = jnp.where(live, jnp.take_along_axis(flat, lead, axis=-1), 0)
  tile_words = jnp.where(live, jnp.take_along_axis(words, lead, axis=-1), 0)
  counts = live.sum(-1, dtype=jnp.int32)
  counts = jnp.maximum(-(-counts // config.list_multiple), 1)
  order = (_longest_first(counts, width // config.list_multiple) if config.longest_first
           else jnp.broadcast_to(jnp.arange(tiles - 1, -1, -1, dtype=jnp.int32), counts.shape))

  # The inverse index: every selection sorted by block, rare ones ahead of hot ones.
  is_rare = ((flat >= 0) & ~hot).reshape(b, k, t, p)
  is_hot = (block_indices >= 0) & ~is_rare
  rare = is_rare.sum(-1, dtype=jnp.int32)
  valid = (block_indices >= 0).sum(-1, dtype=jnp.int32)
  slots = jnp.where(is_rare, jnp.cumsum(is_rare, axis=-1, dtype=jnp.int32),
                    rare[..., None] + jnp.cumsum(is_hot, axis=-1, dtype=jnp.int32)) - 1
  mixed = config.has_hot and config.has_rare
  entries = _inverse_index(block_indices, slots, is_hot if mixed else None, num_blocks)
  sizes = members.sum(2)
  ends = jnp.cumsum(sizes, axis=-1, dtype=jnp.int32)
  starts = ends - sizes
  rare_ends = starts + jnp.where(members < threshold, members, 0).sum(2, dtype=jnp.int32)
  return SelectionPlan(
    blocks, tile_words.astype(jnp.int32), counts, order, rare, valid, entries,
    key_major_work(starts, rare_ends, config.forward_entries, t * p if config.has_rare else 0),
    key_major_work(starts, ends, config.backward_entries, t * p), config, p,
    query_offset if static else None)


def window_plan(batch, kv_heads, tokens, visible, config):
  """The plan of a sliding window: each token selects the blocks that hold its last `window` keys.

  Known in closed form; the kernels mask inside the blocks. All selections are hot, or all are rare
  where the config has no hot ones.

  Args:
    batch: B.
    kv_heads: K.
    tokens: T, a multiple of 64.
    visible: Visibility, with a window.
    config: PlanConfig.
  """
  tile, window = config.tile_tokens, visible.window
  offsets = visible.row_offsets(1 if visible.offsets is None else batch)[:, None]
  num_blocks = -(-visible.num_keys // BLOCK)
  last_block = num_blocks - 1

  # Tile lists: from the block of the tile's last token back to that of its first token's window.
  tiles = jnp.arange(tokens // tile, dtype=jnp.int32)
  begin = offsets + tiles * tile
  high = jnp.minimum((begin + tile - 1) // BLOCK, last_block)
  low = jnp.maximum(begin - (window - 1), 0) // BLOCK
  aligned = visible.offset is not None and visible.offset % tile == 0
  width = min((window - 1 + (0 if aligned else tile - 1) + BLOCK - 1) // BLOCK + 1, num_blocks)
  width = -(-width // config.list_multiple) * config.list_multiple
  listed = high[..., None] - jnp.arange(width, dtype=jnp.int32)
  everyone = -1 if tile == 32 else (1 << tile) - 1
  words = jnp.where(listed >= low[..., None], jnp.int32(everyone), 0)
  counts = jnp.maximum(-(-(high - low + 1) // config.list_multiple), 1)

  # Block c is selected by the tokens of blocks c to c + P - 1, in the slot that counts back to it.
  selected = (window + BLOCK - 2) // BLOCK + 1
  own = (offsets + jnp.arange(tokens, dtype=jnp.int32)) // BLOCK
  valid = jnp.minimum(own, last_block) - jnp.maximum(own - selected + 1, 0) + 1
  valid = jnp.maximum(valid, 0)
  reach = jnp.arange(selected * BLOCK, dtype=jnp.int32)
  block = jnp.arange(num_blocks, dtype=jnp.int32)
  slot = jnp.minimum(reach // BLOCK, last_block - block[:, None])
  token = block[:, None] * BLOCK + reach - offsets[..., None]
  within = lambda position: block * reach.size + jnp.clip(
    position - block * BLOCK, 0, reach.size)
  work = KeyMajorWork(block[None], within(offsets), within(offsets + tokens),
                      jnp.arange(num_blocks + 1, dtype=jnp.int32)[None])
  plan = SelectionPlan(
    jnp.maximum(listed, 0), words, counts, tiles[None],
    jnp.zeros_like(valid) if config.has_hot else valid, valid,
    (token * selected + slot).reshape(offsets.shape[0], -1), work, work, config, selected,
    visible.offset)
  return jax.tree.map(
    lambda x: jnp.broadcast_to(x[:, None], (batch, kv_heads, *x.shape[1:])), plan)
