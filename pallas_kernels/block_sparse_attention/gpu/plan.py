"""What a set of picked blocks means to the kernels, worked out once per hybrid block.

A (token, pick) pair is *hot* when enough tokens of its query tile picked the same block, and
*rare* otherwise. Hot picks go to the tile-union kernel (mosaic_gpu.py), which multiplies the
whole tile with the block and masks by membership; rare picks go to the key-major kernel
(triton.py), which packs the tokens that picked one block and pays for exactly those. The data
decides for every pick, so walks, trained models and random selections each run at the cheaper
of the two costs without a switch between them.

Everything here is integer work in a defined order (sorts of unique keys, no atomics), so a plan,
and with it every sum the kernels make, is the same bit for bit on every run. One plan serves
the M sparse layers of a hybrid block, forward and backward.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

_NONE = np.uint32(0xFFFFFFFF)
PACKED_BITS = 32        # of a sort key that holds (row, block, class, token, slot)
_WINDOW = 256           # tiles sorted by length together
_SCATTER = 317          # of the hash that orders scattered lists


@dataclasses.dataclass(frozen=True)
class PlanConfig:
  """Static choices of a plan.

  `hot_threshold` tokens of a tile must share a block to make it hot: 1 sends every pick to the
  union kernel, more than `tile_tokens` sends every pick to the key-major one. A tile whose picks
  fill `dense_tile` of its union (blocks x tokens) is all hot. `*_entries` is how many picks of one
  block a program of the key-major kernels takes. `list_multiple` pads a tile's list to the number
  of blocks that the union kernel takes in a step. `longest_first` sorts a window of tiles by their
  lists, so that programs side by side take equally long: 3.5 % faster on an H200 for tiles of 32
  tokens, 2.7 % slower for tiles of 8, whose neighbours share more. `scattered`: a list's blocks in
  the order of a hash instead of ascending, so that blocks of one part of a tile come in no runs
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
    """Whether the union kernel can have work."""
    return self.hot_threshold <= self.tile_tokens

  @property
  def has_rare(self):
    """Whether the key-major forward can have work."""
    return self.hot_threshold > 1


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=("group", "starts", "ends", "first"), meta_fields=())
@dataclasses.dataclass(frozen=True)
class KeyMajorWork:
  """Programs of a key-major kernel: program i takes entries [starts[i], ends[i]) of group[i].

  group, starts, ends i32 [W], where group = (b * K + k) * C + block; programs past the last one
  have start == end. first i32 [B*K*C + 1]: group g is programs first[g] to first[g + 1].
  """

  group: jax.Array
  starts: jax.Array
  ends: jax.Array
  first: jax.Array


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=("blocks", "words", "counts", "order", "rare", "valid", "entries", "rare_work",
               "all_work"),
  meta_fields=("config", "picks"))
@dataclasses.dataclass(frozen=True)
class IndexPlan:
  """Tile unions, membership words and the inverse index of one set of picks.

  blocks i32 [B,K,L,U]  hot blocks of tile l, the tile's own block first, then ascending or
                        `scattered`
  words  i32 [B,K,L,U]  bit i: token i of the tile picked it; 0 beyond the tile's count
  counts i32 [B,K,L]    steps of `list_multiple` blocks that hold the tile's list
  order  i32 [B,K,L]    the tiles in the order to run them
  rare   i32 [B,K,T]    how many of the token's picks are rare
  valid  i32 [B,K,T]    how many picks the token has
  entries i32 [B*K*T*P] t * P + slot of every pick, sorted by (b, k, block), rare ones first, then
                        t; slots number a token's picks, rare ones first, without gaps
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
  picks: int


def membership(block_indices, tile_tokens, num_blocks):
  """block_indices i32 [B,K,T,P] -> u32 [B,K,L,C]: bit i: token i of the tile picked the block.

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
  """starts, ends i32 [groups] of each group's entries -> KeyMajorWork of a static size."""
  programs = -(-(ends - starts) // entries_per_program)
  first = jnp.concatenate([jnp.zeros((1,), jnp.int32), jnp.cumsum(programs, dtype=jnp.int32)])
  width = max_entries // entries_per_program + starts.shape[0]
  index = jnp.arange(width, dtype=jnp.int32)
  group = jnp.searchsorted(first, index, side="right", method="compare_all") - 1
  group = jnp.minimum(group.astype(jnp.int32), starts.shape[0] - 1)
  begin = starts[group] + (index - first[group]) * entries_per_program
  end = jnp.minimum(begin + entries_per_program, ends[group])
  live = index < first[-1]
  return KeyMajorWork(
    group, jnp.where(live, begin, 0), jnp.where(live, jnp.maximum(end, begin), 0), first)


def _inverse_index(block_indices, slots, second, num_blocks):
  """Picks sorted by (b, k, block, second class, t); no pick is second where `second` is None.

  block_indices, slots i32 [B,K,T,P]; second bool [B,K,T,P] puts a pick behind the others of its
  block -> t * P + slot, u32 [B*K*T*P], of which the first sum(valid) hold.
  """
  b, k, t, p = block_indices.shape
  split = 1 if second is None else 2
  rows, picks, classes = b * k, t * p, num_blocks * split
  kind = block_indices * split + (0 if second is None else second.astype(jnp.int32))
  kind = kind.reshape(rows, picks).astype(jnp.uint32)
  valid = block_indices.reshape(rows, picks) >= 0
  slots = slots.reshape(rows, picks).astype(jnp.uint32)
  token = jnp.arange(picks, dtype=jnp.uint32) // p
  row = jnp.arange(rows, dtype=jnp.uint32)[:, None]
  if rows * classes * picks <= 1 << PACKED_BITS:    # everything in one 32-bit key, one flat sort
    keys = (row * classes + kind) * jnp.uint32(picks) + (token * p + slots)
    return jnp.sort(jnp.where(valid, keys, _NONE).reshape(-1)) % jnp.uint32(picks)
  if classes * t >= 1 << 32:
    raise NotImplementedError(
      f"inverse index: got {num_blocks} blocks and T={t}, whose product does not fit 31 bits")

  def append(entries, args):                      # a sort for each KV head, the pick as payload
    kind, valid, slots, base = args
    keys = jnp.where(valid, kind * jnp.uint32(t) + token, _NONE)
    ordered, slots = lax.sort((keys, slots), num_keys=1)
    ordered = (ordered % jnp.uint32(t)) * p + slots
    return lax.dynamic_update_slice(entries, ordered, (base,)), None

  total = valid.sum(1, dtype=jnp.int32)           # a row's invalid tail is written over
  base = jnp.cumsum(total) - total
  entries = jnp.zeros((rows * picks,), jnp.uint32)
  return lax.scan(append, entries, (kind, valid, slots, base))[0]


def _longest_first(counts):
  """Tiles of each head, late windows first, longest first inside a window of tiles.

  Programs that run side by side then take equally long, and stay near each other in T.
  """
  tiles = counts.shape[-1]
  window = max(w for w in range(1, min(tiles, _WINDOW) + 1) if tiles % w == 0)
  number = jnp.arange(tiles, dtype=jnp.int32)
  # counts are at most 256 steps (512 picks of a tile); key: window, then steps, then tile
  key = ((tiles // window - 1 - number // window) * 512 + 511 - counts) * window + number % window
  position = jnp.sort(key, axis=-1)
  return (tiles // window - 1 - position // (512 * window)) * window + position % window


def build_plan(block_indices, num_blocks, config=None):
  """block_indices i32 [B,K,T,P], -1 for none -> IndexPlan.

  A block may be picked once by a token. T must be a multiple of 64, P * tile_tokens at most 512.
  """
  config = config or PlanConfig()
  b, k, t, p = block_indices.shape
  tile = config.tile_tokens
  if t % 64:
    raise NotImplementedError(f"block_indices: got T={t}, want a multiple of 64")
  if tile * p > 512:
    raise NotImplementedError(f"got {p} picks in tiles of {tile} tokens, want at most 512 a tile")
  tiles = t // tile
  table = membership(block_indices, tile, num_blocks)
  members = lax.population_count(table).astype(jnp.int32)
  flat = block_indices.reshape(b, k, tiles, tile * p)
  words = jnp.take_along_axis(table, jnp.maximum(flat, 0), axis=-1)
  words = jnp.where(flat < 0, jnp.uint32(0), words)
  dense = members.sum(-1) >= config.dense_tile * tile * (members > 0).sum(-1)
  threshold = jnp.where(dense & config.has_hot, 1, config.hot_threshold)[..., None]
  hot = (words != 0) & (lax.population_count(words).astype(jnp.int32) >= threshold)
  entry = jnp.arange(tile * p, dtype=jnp.int32)

  # Union lists: each hot block once, by its first member; one sort of unique keys a tile.
  own = (jnp.arange(tiles, dtype=jnp.int32) * tile // 64)[:, None]
  leads = hot & ((words & (~words + 1)) == jnp.left_shift(1, entry // p).astype(jnp.uint32))
  order = flat
  if config.scattered:                      # odd times modulo a power of two: one to one
    order = flat * _SCATTER % (1 << (num_blocks - 1).bit_length())
  order = jnp.where(flat == own, 0, order + 1)
  width = 1
  if config.has_hot:
    width = min(num_blocks, max(tile * p // config.hot_threshold, int(p / config.dense_tile)))
  width = -(-max(width, 1) // config.list_multiple) * config.list_multiple
  keys = jnp.where(leads, order * 512 + entry, jnp.int32(1 << 30))
  keys = jnp.pad(keys, ((0, 0),) * 3 + ((0, max(0, width - tile * p)),),
                 constant_values=1 << 30)
  keys = jnp.sort(keys, axis=-1)[..., :width]
  live = keys < 1 << 30
  pick = jnp.where(live, keys & 511, 0)
  blocks = jnp.where(live, jnp.take_along_axis(flat, pick, axis=-1), 0)
  tile_words = jnp.where(live, jnp.take_along_axis(words, pick, axis=-1), 0)
  counts = live.sum(-1, dtype=jnp.int32)
  counts = jnp.maximum(-(-counts // config.list_multiple), 1)
  order = _longest_first(counts) if config.longest_first else jnp.broadcast_to(
    jnp.arange(tiles - 1, -1, -1, dtype=jnp.int32), counts.shape)

  # The inverse index: every pick sorted by block, rare ones ahead of hot ones.
  is_rare = ((flat >= 0) & ~hot).reshape(b, k, t, p)
  is_hot = (block_indices >= 0) & ~is_rare
  rare = is_rare.sum(-1, dtype=jnp.int32)
  valid = (block_indices >= 0).sum(-1, dtype=jnp.int32)
  slots = jnp.where(is_rare, jnp.cumsum(is_rare, axis=-1, dtype=jnp.int32),
                    rare[..., None] + jnp.cumsum(is_hot, axis=-1, dtype=jnp.int32)) - 1
  mixed = config.has_hot and config.has_rare
  entries = _inverse_index(block_indices, slots, is_hot if mixed else None, num_blocks)
  ends = jnp.cumsum(members.sum(2).reshape(-1), dtype=jnp.int32)
  starts = jnp.concatenate([jnp.zeros((1,), jnp.int32), ends[:-1]])
  rare_ends = starts + jnp.where(
    members < threshold, members, 0).sum(2, dtype=jnp.int32).reshape(-1)
  most = b * k * t * p
  return IndexPlan(
    blocks, tile_words.astype(jnp.int32), counts, order, rare, valid, entries.astype(jnp.int32),
    key_major_work(starts, rare_ends, config.forward_entries, most if config.has_rare else 0),
    key_major_work(starts, ends, config.backward_entries, most), config, p)


def window_plan(batch, kv_heads, tokens, window, config):
  """The plan of a sliding window: each token picks the blocks that hold its last `window` keys.

  The same for every row and known in closed form; the kernels mask inside the blocks.
  """
  tile, per_step = config.tile_tokens, config.list_multiple
  blocks = tokens // 64
  picks = min((window + 62) // 64 + 1, blocks)
  steps = -(-picks // per_step)
  shape = (batch, kv_heads)
  tiles = jnp.arange(tokens // tile, dtype=jnp.int32)
  back = jnp.arange(steps * per_step, dtype=jnp.int32)
  listed = (tiles * tile // 64)[:, None] - back
  everyone = -1 if tile == 32 else (1 << tile) - 1
  words = jnp.where((listed >= 0) & (back < picks), jnp.int32(everyone), 0)
  own = jnp.arange(tokens, dtype=jnp.int32) // 64
  # Block c is picked by the tokens of blocks c, c + 1, ...: as its number of blocks back.
  reach = jnp.arange(picks * 64, dtype=jnp.int32)
  block = jnp.arange(blocks, dtype=jnp.int32)[:, None]
  entries = (block * 64 + reach) * picks + reach // 64
  rows = batch * kv_heads * blocks
  column = jnp.tile(jnp.arange(blocks, dtype=jnp.int32), batch * kv_heads)
  starts = column * (picks * 64)
  ends = starts + jnp.minimum(picks * 64, tokens - column * 64)
  work = KeyMajorWork(jnp.arange(rows, dtype=jnp.int32), starts, ends,
                      jnp.arange(rows + 1, dtype=jnp.int32))
  spread = lambda x: jnp.broadcast_to(x, (*shape, *x.shape))
  return IndexPlan(
    spread(jnp.maximum(listed, 0)), spread(words),
    spread(jnp.full(tiles.shape, steps, jnp.int32)), spread(tiles),
    spread(jnp.zeros_like(own)), spread(jnp.minimum(own + 1, picks)), entries.reshape(-1),
    work, work, dataclasses.replace(config, hot_threshold=1), picks)
