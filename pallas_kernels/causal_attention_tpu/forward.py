"""Causal or windowed attention on TPU, forward; beside it the best key blocks of every query.

Scores are computed transposed: keys down the sublanes, queries along the lanes. Row maxima, row
sums and block maxima are then elementwise operations on vector registers, the logarithm of the
sum is a plain row, and blocks are selected for 128 queries at once. The block maxima of a query
tile stay in VMEM until the last key; no score ever reaches HBM.

q, k, v and out keep their [B,T,heads,H] order: a tile of a head is a slice of lanes. Logits are in
units of log 2. Grid: (B, K, rows of equal length, steps): see `GridWalk`.

The queries may be any range of the sequence: query t of row b has key index offset[b] + t.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tpu
from pallas_kernels.causal_attention_tpu import block_topk
from pallas_kernels.softmax import EMPTY_LSE, INITIAL_MAX, LN2, LOG2E, MASKED
from pallas_kernels.tpu import dot

PREFETCH_DEPTH = 2             # key parts whose logits are computed ahead of their softmax
FIRST, FREE, DIAGONAL, LAST, POSITION = range(5)      # rows of `tile_bounds`


@dataclasses.dataclass(frozen=True)
class ForwardTiles:
  """The sizes of one grid step.

  Attributes:
    block_q: queries per tile, a multiple of 128 (lanes).
    block_kv: keys per tile, a multiple of 128.
    heads: query heads of the group per step.
    block_kv_compute: keys per matmul, a multiple of 128 that divides `block_kv`.
    unroll: whether heads share one schedule instead of a loop over them.

  Counted, not timed, for v5e and v6e at the defaults (experiments/LOG.md).
  """

  block_q: int = 512
  block_kv: int = 1024
  heads: int = 4
  block_kv_compute: int = 512
  unroll: bool = True

  def __post_init__(self):
    for name in ("block_q", "block_kv", "block_kv_compute"):
      if getattr(self, name) % 128 or getattr(self, name) < 128:
        raise ValueError(f"{name}={getattr(self, name)}; wanted a multiple of 128")
    if self.block_kv % self.block_kv_compute:
      raise ValueError(f"block_kv_compute={self.block_kv_compute}; wanted a divisor of "
                       f"block_kv={self.block_kv}")


def column(row):
  """[1, n] -> [n, 1] for 32-bit values, n a multiple of 128."""
  return jnp.broadcast_to(row, (tpu.SUBLANES, row.shape[1])).T[:, :1]


def visible(first_query, first_key, shape, window, num_keys, query_segments, key_segments):
  """bool [keys, queries]: may the query see the key?

  Args:
    first_query: key index of the tile's first query.
    first_key: index of the tile's first key.
    shape: (keys, queries).
    window: tokens, or None.
    num_keys: S, where queries may come after the last key and the tile may be padded; or None.
    query_segments: i32 [1, queries] or None.
    key_segments: i32 [1, keys] or None.
  """
  # One array of differences; the distance of the tiles is a scalar.
  behind = lax.broadcasted_iota(jnp.int32, shape, 1) - lax.broadcasted_iota(jnp.int32, shape, 0)
  distance = first_key - first_query
  keep = behind >= distance
  if window is not None:
    keep &= behind < distance + window
  if num_keys is not None:
    keep &= lax.broadcasted_iota(jnp.int32, shape, 0) < num_keys - first_key
  if query_segments is not None:
    keep &= (query_segments == column(key_segments)) & (query_segments != 0)
  return keep


@dataclasses.dataclass(frozen=True)
class GridWalk:
  """Assigns to every grid step (row, step) a query tile, a part of the group and a key tile.

  Where the offset of the queries is known and there is no window, a row of the grid is two query
  tiles, one from either end of the range: together they see as many key tiles as any other two, so
  that no step is idle. (With an odd number of tiles the last one has a row of its own.) Else each
  query tile has a row, as long as the longest may be.

  Attributes:
    tiles: `ForwardTiles`.
    num_tiles: query tiles.
    num_key_tiles: key tiles.
    parts: parts of the group, each of which sweeps over a tile's keys.
    window: tokens, or None.
    query_offset: key index of query 0; None where it is traced.
  """

  tiles: ForwardTiles
  num_tiles: int
  num_key_tiles: int
  parts: int
  window: int | None = None
  query_offset: int | None = 0

  @property
  def paired(self):
    """Whether a row of the grid is two query tiles."""
    return self.window is None and self.query_offset is not None

  def grid(self):
    """(rows, steps)."""
    if not self.paired:
      return self.num_tiles, self.parts * self.sweep(None)
    rows = -(-self.num_tiles // 2)
    seen = lambda i: 0 if i < 0 else min(
      self.num_key_tiles,
      -(-(self.query_offset + (i + 1) * self.tiles.block_q) // self.tiles.block_kv))
    return rows, self.parts * max(sum(map(seen, self._pair(row))) for row in range(rows))

  def _pair(self, row):
    """Two query tiles, the first of which may be -1."""
    return row - self.num_tiles % 2, self.num_tiles - 1 - row

  def sweep(self, query_tile):
    """Key tiles that one part of a query tile steps over: all it may see, and no fewer."""
    block_q, block_kv = self.tiles.block_q, self.tiles.block_kv
    if self.window is not None:
      return min(self.num_key_tiles, (block_q + self.window - 2) // block_kv + 2)
    if self.query_offset is None:
      return self.num_key_tiles
    end = self.query_offset + (query_tile + 1) * block_q
    seen = lax.div(end + (block_kv - 1), block_kv)
    if self.query_offset + self.num_tiles * block_q > self.num_key_tiles * block_kv:
      seen = jnp.minimum(seen, self.num_key_tiles)
    if self.query_offset and self.num_tiles % 2:
      seen = jnp.where(query_tile < 0, 0, seen)
    return seen

  def at(self, row, step):
    """(query tile, part, which step of the sweep over its keys)."""
    i = row
    if self.paired:
      early, late = self._pair(row)
      begin = self.parts * self.sweep(early)
      i = jnp.where(step >= begin, late, early)
      step = jnp.where(step >= begin, step - begin, step)
    sweep = self.sweep(i)
    part = sum(((step >= n * sweep).astype(jnp.int32) for n in range(1, self.parts)), jnp.int32(0))
    return i, part, step - part * sweep


def tile_bounds(offsets, num_queries, num_keys, tiles, window=None, segment_ids=None,
                kv_segment_ids=None):
  """The key tiles of every query tile, i32 [5, B, query tiles], by row:

      FIRST      the first one to visit, never after LAST
      FREE       the first one that needs no mask of segments
      DIAGONAL   the first one that holds a key after the tile's first query, or padding
      LAST       the last one to visit
      POSITION   not a tile: the key index of the first query

  From FREE up to DIAGONAL every query of the tile sees every key, if there is no window. With
  segments, FIRST is where the range of segment numbers first meets that of the queries: exact for
  documents numbered in order, as packing makes them, and safe for others.

  Args:
    offsets: i32 [B], the key index of query 0 of each row.
    num_queries: T, a multiple of `tiles.block_q`.
    num_keys: S, without padding.
    tiles: `ForwardTiles` or `BackwardTiles`.
    window: tokens, or None.
    segment_ids: i32 [B,T] or None.
    kv_segment_ids: i32 [B, S rounded up to whole tiles] or None.
  """
  block_q, block_kv = tiles.block_q, tiles.block_kv
  position = offsets[:, None] + jnp.arange(0, num_queries, block_q, dtype=jnp.int32)
  last = jnp.clip((position + (block_q - 1)) // block_kv, 0, (num_keys - 1) // block_kv)
  diagonal = jnp.clip((position + 1) // block_kv, 0, num_keys // block_kv)
  first = jnp.zeros_like(diagonal)
  if window is not None:
    first = jnp.maximum(position - (window - 1), 0) // block_kv
  free = first if window is None else diagonal
  if segment_ids is not None:
    meet, same = _segment_tiles(segment_ids, kv_segment_ids, tiles)
    first = jnp.maximum(
      first, jnp.where(meet.any(axis=2), jnp.minimum(meet.argmax(axis=2), diagonal), diagonal))
    key_tiles = jnp.arange(meet.shape[2])
    same |= key_tiles >= diagonal[:, :, None]
    from_here_on = jnp.flip(jnp.cumprod(jnp.flip(same, axis=2), axis=2), axis=2)
    free = jnp.maximum(free, len(key_tiles) - from_here_on.sum(axis=2))
  first = jnp.minimum(first, last)
  return jnp.stack([first, free, diagonal, last, position]).astype(jnp.int32)


def _segment_tiles(segment_ids, kv_segment_ids, tiles):
  """Two bool [B, query tiles, key tiles]: may they share a segment; are both wholly in one."""
  limits = jnp.iinfo(jnp.int32)

  def ends(segments, size):
    padding = segments == 0                # masked both as query and as key
    split = lambda x: x.reshape(len(x), -1, size)
    lowest = split(jnp.where(padding, limits.max, segments)).min(axis=2)
    highest = split(jnp.where(padding, limits.min, segments)).max(axis=2)
    return lowest, highest, (lowest == highest) & ~split(padding).any(axis=2)

  q_low, q_high, q_one = (x[:, :, None] for x in ends(segment_ids, tiles.block_q))
  k_low, k_high, k_one = (x[:, None] for x in ends(kv_segment_ids, tiles.block_kv))
  return (k_low <= q_high) & (q_low <= k_high), q_one & k_one & (q_low == k_low)


def first_position(bounds_ref, b, i, tiles, query_offset):
  """Key index of the first query of tile i: computed where the offset is known, else read."""
  if query_offset is None:
    return bounds_ref[POSITION, b, i]
  return query_offset + i * tiles.block_q


# jit, because a pallas_call by itself is never dropped when its results are not used, which under
# jax.checkpoint would run the forward kernel again in the backward pass.
@functools.partial(jax.jit, static_argnames=(
  "num_keys", "query_offset", "scale", "tiles", "window", "block_size", "num_blocks",
  "may_pass_end", "interpret"))
def forward(q, k, v, *, num_keys, query_offset, offsets, may_pass_end, scale, tiles,
            segment_ids=None, kv_segment_ids=None, sinks=None, window=None, block_size=64,
            num_blocks=0, interpret=False):
  """Attention of whole tiles.

  Args:
    q: [B,T,N,H] float32 or bfloat16, T a multiple of `tiles.block_q`, H of 128.
    k: [B,S,K,H], S a multiple of `tiles.block_kv`.
    v: [B,S,K,H].
    num_keys: keys without the padding of the last tile.
    query_offset: key index of query 0, or None: `offsets` is traced.
    offsets: i32 [B], the same of each row.
    may_pass_end: whether a query (padding apart) may come after the last key.
    scale: of the logits.
    tiles: `ForwardTiles`; `heads` divides G.
    segment_ids: i32 [B,T] or None.
    kv_segment_ids: i32 [B,S] or None, 0 where a key is padding.
    sinks: f32 [N] or None.
    window: tokens, or None.
    block_size: keys per block; `tiles.block_kv` a multiple of 8 blocks. Used with `num_blocks`.
    num_blocks: P; 0 for attention alone.
    interpret: False, or `tpu.interpret_params()`.

  Returns:
    out [B,T,N,H] in q's dtype, lse f32 [B,N,T] (natural, sinks included; -inf in a row that sees
    nothing), picked i32 [B,K,P,T] or None.
  """
  B, T, N, H = q.shape
  S, K = k.shape[1:3]
  G = N // K
  parts = G // tiles.heads
  walk = GridWalk(tiles, T // tiles.block_q, S // tiles.block_kv, parts, window, query_offset)
  bounds = tile_bounds(offsets, T, num_keys, tiles, window, segment_ids, kv_segment_ids)

  def key_tile(b, row, step, bounds):
    i, _, step = walk.at(row, step)
    return jnp.minimum(bounds[FIRST, b, i] + step, bounds[LAST, b, i])

  def query_tile(row, step):
    return walk.at(row, step)[0]

  def heads_at(b, h, row, step, bounds):
    i, part, _ = walk.at(row, step)
    return b, i, h * parts + part

  heads_spec = pl.BlockSpec((1, tiles.block_q, tiles.heads * H), heads_at)
  key_spec = pl.BlockSpec((1, tiles.block_kv, H), lambda b, h, row, step, bounds: (
    b, key_tile(b, row, step, bounds), h))
  operands = [q.reshape(B, T, N * H), k.reshape(B, S, K * H), v.reshape(B, S, K * H)]
  in_specs = [heads_spec, key_spec, key_spec]
  if segment_ids is not None:
    operands += [segment_ids[:, None], kv_segment_ids[:, None]]
    in_specs += [
      pl.BlockSpec((1, 1, tiles.block_q), lambda b, h, row, step, bounds: (
        b, 0, query_tile(row, step))),
      pl.BlockSpec((1, 1, tiles.block_kv), lambda b, h, row, step, bounds: (
        b, 0, key_tile(b, row, step, bounds)))]
  if sinks is not None:
    operands.append(sinks)
    in_specs.append(pl.BlockSpec(memory_space=pltpu.SMEM))

  # One array for the selected blocks and the bits of lse: every output of a kernel costs scalar
  # work in every grid step.
  notes = num_blocks + G
  out_shape = [jax.ShapeDtypeStruct((B, T, N * H), q.dtype),
               jax.ShapeDtypeStruct((B, K, notes, T), jnp.int32)]
  out_specs = [heads_spec, pl.BlockSpec(
    (1, 1, notes, tiles.block_q),
    lambda b, h, row, step, bounds: (b, h, 0, query_tile(row, step)))]
  scratch = [pltpu.VMEM((tiles.heads, 1, tiles.block_q), jnp.float32)] * 2
  scratch.append(pltpu.VMEM((tiles.heads, H, tiles.block_q), jnp.float32))
  if num_blocks:
    rows = -(-S // block_size // block_topk.ROWS) * block_topk.ROWS
    scratch.append(pltpu.VMEM((tiles.heads, rows, tiles.block_q), jnp.float32))
    if parts > 1:
      scratch.append(pltpu.VMEM((rows, tiles.block_q), jnp.float32))

  out, notes = pl.pallas_call(
    functools.partial(
      _kernel, walk=walk, scale=scale, block_size=block_size, num_blocks=num_blocks,
      num_keys=num_keys if may_pass_end and num_keys < S else None,
      segmented=segment_ids is not None, sunk=sinks is not None),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1, grid=(B, K, *walk.grid()),
      in_specs=in_specs, out_specs=out_specs, scratch_shapes=scratch),
    out_shape=out_shape,
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"),
      vmem_limit_bytes=tpu.vmem_limit()),
    interpret=interpret,
    name="oracle_attention_forward" if num_blocks else "attention_forward",
  )(bounds, *operands)
  lse = lax.bitcast_convert_type(notes[:, :, num_blocks:], jnp.float32)
  return (out.reshape(B, T, N, H), lse.reshape(B, N, T),
          notes[:, :, :num_blocks] if num_blocks else None)


def _kernel(
    bounds_ref,      # i32 [5, B, query tiles] in SMEM, of `tile_bounds`
    q_ref,           # [1, block_q, heads*H]
    k_ref,           # [1, block_kv, H]
    v_ref,           # [1, block_kv, H]
    *refs,           # segments i32 [1, 1, block_q] and [1, 1, block_kv], sinks f32 [N] in SMEM;
                     # out [1, block_q, heads*H], notes i32 [1, 1, P+G, block_q]; scratch
    walk, scale, block_size, num_blocks, num_keys, segmented, sunk):
  tiles, parts, window, refs = walk.tiles, walk.parts, walk.window, list(refs)
  query_segments_ref, key_segments_ref = (refs.pop(0), refs.pop(0)) if segmented else (None, None)
  sinks_ref = refs.pop(0) if sunk else None
  out_ref, notes_ref, *refs = refs
  m_s, l_s, acc_s, *maxima = refs    # f32 [heads, 1, block_q] twice, [heads, H, block_q]; maxima
  H = k_ref.shape[2]
  b, h = pl.program_id(0), pl.program_id(1)
  i, part, step = walk.at(pl.program_id(2), pl.program_id(3))
  first, last = bounds_ref[FIRST, b, i], bounds_ref[LAST, b, i]
  j = first + step
  position = first_position(bounds_ref, b, i, tiles, walk.query_offset)
  lanes = lambda g: pl.ds(g * H if isinstance(g, int) else pl.multiple_of(g * H, H), H)

  @pl.when(step == 0)
  def _():
    acc_s[...] = jnp.zeros_like(acc_s)
    if not sunk:
      m_s[...] = jnp.full_like(m_s, INITIAL_MAX)
      l_s[...] = jnp.zeros_like(l_s)
      return
    l_s[...] = jnp.ones_like(l_s)
    head = (h * parts + part) * tiles.heads
    for g in range(tiles.heads):
      m_s[g] = jnp.full(m_s.shape[1:], sinks_ref[head + g] * LOG2E)

  def logits(g, keys, masked):
    s = dot(k_ref[0, keys, :], q_ref[0, :, lanes(g)], (1, 1)) * (scale * LOG2E)   # [keys, queries]
    if not masked:
      return s
    segments = (None, None)
    if segmented:
      segments = query_segments_ref[0], key_segments_ref[0, :, keys]
    first_key = j * tiles.block_kv + keys.start
    return jnp.where(visible(position, first_key, s.shape, window, num_keys, *segments), s, MASKED)

  def absorb(g, keys, s):
    """Takes the logits of some keys into block maxima, maximum, sum and output of a head."""
    maxima_of_s = s
    if num_blocks:
      blocks = keys.size // block_size
      first_block = (j * tiles.block_kv + keys.start) // block_size
      maxima_of_s = block_topk.block_maxima(s, block_size)
      maxima[0][g, pl.ds(pl.multiple_of(first_block, blocks), blocks), :] = maxima_of_s
    m_before = m_s[g]
    m = jnp.maximum(m_before, maxima_of_s.max(axis=0, keepdims=True))
    alpha = jnp.exp2(m_before - m)
    p = jnp.exp2(s - m)
    l_s[g] = l_s[g] * alpha + p.sum(axis=0, keepdims=True)
    m_s[g] = m
    v = v_ref[0, keys, :]
    acc_s[g] = acc_s[g] * alpha + dot(v, p.astype(v.dtype), (0, 0))              # [H, queries]

  def attend(masked):
    width = tiles.block_kv_compute
    key_parts = [pl.ds(a, width) for a in range(0, tiles.block_kv, width)]
    # Under a causal mask only the last tile or two are masked: not worth the code of all heads.
    if not tiles.unroll or (masked and window is None):
      def head(g, _):
        for keys in key_parts:
          absorb(g, keys, logits(g, keys, masked))
        return 0
      lax.fori_loop(0, tiles.heads, head, 0)
      return
    # The matrix units work on the logits of the next two parts while the vector units are at the
    # softmax of this one.
    work = [(g, keys) for g in range(tiles.heads) for keys in key_parts]
    ready = [logits(*w, masked) for w in work[:PREFETCH_DEPTH]]
    for n, (g, keys) in enumerate(work):
      if n + PREFETCH_DEPTH < len(work):
        ready.append(logits(*work[n + PREFETCH_DEPTH], masked))
      absorb(g, keys, ready.pop(0))

  if window is not None:
    pl.when(j <= last)(lambda: attend(True))
  else:
    free = (j >= bounds_ref[FREE, b, i]) & (j < bounds_ref[DIAGONAL, b, i])
    pl.when(free)(lambda: attend(False))
    pl.when(~free & (j <= last))(lambda: attend(True))

  @pl.when(j == last)
  def _():
    lses = []                                         # log2, finite where a row sees nothing
    for g in range(tiles.heads):
      seen = l_s[g] > 0
      row_sum = jnp.where(seen, l_s[g], 1.0)
      lses.append(jnp.where(seen, m_s[g] + jnp.log2(row_sum), 0.0))
      notes_ref[0, 0, pl.ds(num_blocks + part * tiles.heads + g, 1), :] = (
        lax.bitcast_convert_type(jnp.where(seen, lses[g] * LN2, EMPTY_LSE), jnp.int32))
      out = acc_s[g] / row_sum
      out_ref[0, :, lanes(g)] = out.T.astype(out_ref.dtype)
    if not num_blocks:
      return
    blocks = tiles.block_kv // block_size
    span = first * blocks, (last + 1) * blocks
    score_ref = maxima[0].at[0] if parts == 1 else maxima[1]
    block_topk.group_scores(maxima[0], lses, score_ref, *span,
                                 rest=None if parts == 1 else part > 0)
    pl.when(part == parts - 1)(
      lambda: block_topk.pick(score_ref, notes_ref.at[0, 0, pl.ds(0, num_blocks)], *span))
