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
from jax import lax

_NONE = jnp.uint32(0xFFFFFFFF)


@dataclasses.dataclass(frozen=True)
class PlanConfig:
  """Static choices of a plan.

  `hot_threshold` tokens of a tile must share a block to make it hot: 1 sends every pick to the
  union kernel, more than `tile_tokens` sends every pick to the key-major one. `*_entries` is how
  many picks of one block a program of the key-major kernels takes. `list_multiple` pads a
  tile's list to the number of blocks that the union kernel takes in a step.
  """

  tile_tokens: int = 32
  hot_threshold: int = 8
  list_multiple: int = 2
  forward_entries: int = 256
  backward_entries: int = 512

  def __post_init__(self):
    if self.tile_tokens not in (8, 16, 32):
      raise ValueError(f"tile_tokens: got {self.tile_tokens}, want 8, 16 or 32")
    for name in ("hot_threshold", "list_multiple", "forward_entries", "backward_entries"):
      if getattr(self, name) < 1:
        raise ValueError(f"{name}: got {getattr(self, name)}, want at least 1")

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
  data_fields=("blocks", "words", "counts", "rare", "valid", "entries", "rare_work", "all_work"),
  meta_fields=("config", "picks"))
@dataclasses.dataclass(frozen=True)
class IndexPlan:
  """Tile unions, membership words and the inverse index of one set of picks.

  blocks i32 [B,K,L,U]  hot blocks of tile l, the tile's own block first, then ascending
  words  i32 [B,K,L,U]  bit i: token i of the tile picked it; 0 beyond the tile's count
  counts i32 [B,K,L]    steps of `list_multiple` blocks that hold the tile's list
  rare   i32 [B,K,T]    bit p: pick p of the token is rare
  valid  i32 [B,K,T]    bit p: the token has a pick p
  entries i32 [B*K*T*P] t * P + p of every pick, sorted by (b, k, block), rare ones first, then t
  """

  blocks: jax.Array
  words: jax.Array
  counts: jax.Array
  rare: jax.Array
  valid: jax.Array
  entries: jax.Array
  rare_work: KeyMajorWork
  all_work: KeyMajorWork
  config: PlanConfig
  picks: int


def membership(block_indices, tile_tokens):
  """block_indices i32 [B,K,T,P] -> u32 [B,K,L,tile*P]: which tokens of the tile share a pick.

  Compares every pick of a tile with every other: tile * P squared integer compares, which is
  less work on a GPU than sorting the tile and running down the runs.
  """
  b, k, t, p = block_indices.shape
  flat = block_indices.reshape(b, k, t // tile_tokens, tile_tokens * p)
  bit = jnp.left_shift(jnp.uint32(1), jnp.arange(tile_tokens * p, dtype=jnp.uint32) // p)
  same = (flat[..., :, None] == flat[..., None, :]) & (flat[..., :, None] >= 0)
  return jnp.where(same, bit, jnp.uint32(0)).sum(-1, dtype=jnp.uint32)


def key_major_work(starts, ends, entries_per_program, max_entries):
  """starts, ends i32 [groups] of each group's entries -> KeyMajorWork of a static size."""
  programs = -(-(ends - starts) // entries_per_program)
  first = jnp.concatenate([jnp.zeros((1,), jnp.int32), jnp.cumsum(programs, dtype=jnp.int32)])
  width = max_entries // entries_per_program + starts.shape[0]
  index = jnp.arange(width, dtype=jnp.int32)
  group = jnp.searchsorted(first, index, side="right").astype(jnp.int32) - 1
  group = jnp.minimum(group, starts.shape[0] - 1)
  begin = starts[group] + (index - first[group]) * entries_per_program
  end = jnp.minimum(begin + entries_per_program, ends[group])
  live = index < first[-1]
  return KeyMajorWork(
    group, jnp.where(live, begin, 0), jnp.where(live, jnp.maximum(end, begin), 0), first)


def _inverse_index(block_indices, second, split, num_blocks):
  """Picks sorted by (b, k, block, second class, t), and where each class of a block starts.

  block_indices i32 [B,K,T,P]; second bool [B,K,T,P] puts a pick behind the others of its block
  (when split is 2) -> entries i32 [B*K*T*P], bounds i32 [B*K*C, split + 1].
  """
  b, k, t, p = block_indices.shape
  rows, picks, classes = b * k, t * p, num_blocks * split
  kind = block_indices * split + (second.astype(jnp.int32) if split == 2 else 0)
  kind = kind.reshape(rows, picks).astype(jnp.uint32)
  valid = block_indices.reshape(rows, picks) >= 0
  number = jnp.arange(picks, dtype=jnp.uint32)
  total = valid.sum(1, dtype=jnp.int32)
  row = jnp.arange(rows, dtype=jnp.uint32)[:, None]
  edges = jnp.arange(classes, dtype=jnp.uint32)
  if rows * classes * picks <= 1 << 32:           # everything in one 32-bit key, one flat sort
    keys = (row * classes + kind) * jnp.uint32(picks) + number
    ordered = jnp.sort(jnp.where(valid, keys, _NONE).reshape(-1))
    left = jnp.searchsorted(ordered, ((row * classes + edges) * jnp.uint32(picks)).reshape(-1))
    left = jnp.minimum(left.astype(jnp.int32), total.sum())
    right = jnp.concatenate([left[1:], total.sum()[None]])
    entries = ordered % jnp.uint32(picks)
  elif classes * t < 1 << 32:                     # a sort for each KV head, the pick as payload
    def sort_row(args):
      kind, valid = args
      keys = jnp.where(valid, kind * jnp.uint32(t) + number // p, _NONE)
      ordered, pick = lax.sort((keys, number % p), num_keys=1)
      return (ordered % jnp.uint32(t)) * p + pick, jnp.searchsorted(ordered, edges * jnp.uint32(t))
    entries, left = lax.map(sort_row, (kind, valid))
    base = jnp.arange(rows, dtype=jnp.int32)[:, None] * picks
    left = jnp.minimum(left.astype(jnp.int32), total[:, None])
    right = jnp.concatenate([left[:, 1:], total[:, None]], axis=1) + base
    left = left + base
  else:
    raise NotImplementedError(
      f"inverse index: got {num_blocks} blocks and T={t}, whose product does not fit 31 bits")
  left, right = left.reshape(-1, split), right.reshape(-1, split)
  return (entries.astype(jnp.int32).reshape(-1),
          jnp.concatenate([left, right[:, -1:]], axis=1))


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
  words = membership(block_indices, tile)
  hot = (lax.population_count(words) >= config.hot_threshold) & (words != 0)
  flat = block_indices.reshape(b, k, tiles, tile * p)
  entry = jnp.arange(tile * p, dtype=jnp.int32)

  # Union lists: each hot block once, by its first member; one sort of unique keys a tile.
  own = (jnp.arange(tiles, dtype=jnp.int32) * tile // 64)[:, None]
  leads = hot & ((words & (~words + 1)) == jnp.left_shift(1, entry // p).astype(jnp.uint32))
  order = jnp.where(flat == own, 0, flat + 1)
  width = min(num_blocks, tile * p // config.hot_threshold if config.has_hot else 1)
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

  # The inverse index: every pick sorted by block, rare ones ahead of hot ones.
  is_rare = ((flat >= 0) & ~hot).reshape(b, k, t, p)
  bit = 1 << jnp.arange(p, dtype=jnp.int32)
  rare = jnp.where(is_rare, bit, 0).sum(-1, dtype=jnp.int32)
  valid = jnp.where(block_indices >= 0, bit, 0).sum(-1, dtype=jnp.int32)
  split = 2 if config.has_hot and config.has_rare else 1
  entries, bounds = _inverse_index(block_indices, ~is_rare, split, num_blocks)
  most = b * k * t * p
  rare_end = bounds[:, 1] if config.has_rare else bounds[:, 0]
  return IndexPlan(
    blocks, tile_words.astype(jnp.int32), counts, rare, valid, entries,
    key_major_work(bounds[:, 0], rare_end, config.forward_entries,
                   most if config.has_rare else 0),
    key_major_work(bounds[:, 0], bounds[:, -1], config.backward_entries, most), config, p)
