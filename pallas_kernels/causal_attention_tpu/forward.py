"""Causal or windowed attention on TPU, forward; beside it the best key blocks of every query.

Scores are computed transposed: keys down the sublanes, queries along the lanes. Row maxima, row
sums and block maxima are then elementwise operations on vector registers, the logarithm of the
sum is a plain row, and blocks are picked for 128 queries at once. The block maxima of a query tile
stay in VMEM until the last key; no score ever reaches HBM.

q, k, v and out keep their [B,T,heads,H] order: a tile of a head is a slice of lanes. Logits are in
units of log 2. Grid: (B, K, rows of equal length, steps): see `Walk`.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tpu
from pallas_kernels.causal_attention_tpu import block_topk as tpu_block_picks
from pallas_kernels.causal_attention_tpu.block_topk import HIDDEN, LOWEST

LOG2E = math.log2(math.e)
AHEAD = 2                      # pieces whose logits are computed ahead of their softmax


@dataclasses.dataclass(frozen=True)
class ForwardTiles:
  """The sizes of one grid step.

  Attributes:
    queries: per tile, a multiple of 128 (lanes).
    keys: per tile, a multiple of 128.
    heads: of the group, per step.
    piece: keys per matmul, a multiple of 128 that divides `keys`.
    unroll: heads side by side in one schedule instead of a loop over them.

  Counted, not timed, for v5e and v6e at the defaults (experiments/LOG.md).
  """

  queries: int = 512
  keys: int = 1024
  heads: int = 4
  piece: int = 512
  unroll: bool = True

  def __post_init__(self):
    for name in ("queries", "keys", "piece"):
      if getattr(self, name) % 128 or getattr(self, name) < 128:
        raise ValueError(f"{name}={getattr(self, name)}; wanted a multiple of 128")
    if self.keys % self.piece:
      raise ValueError(f"piece={self.piece}; wanted a divisor of keys={self.keys}")


def precision(dtype):
  """float32 matmuls in full: the matrix unit's default would round them to bfloat16."""
  return lax.Precision.HIGHEST if dtype == jnp.float32 else lax.Precision.DEFAULT


def dot(a, b, contract):
  """f32 matmul of two 2-D arrays over one axis of each."""
  return lax.dot_general(a, b, ((contract[:1], contract[1:]), ((), ())),
                         precision=precision(a.dtype), preferred_element_type=jnp.float32)


def column(row):
  """[1, n] -> [n, 1] for 32-bit values, n a multiple of 128."""
  return jnp.broadcast_to(row, (tpu.SUBLANES, row.shape[1])).T[:, :1]


def visible(first_query, first_key, shape, window, query_segments, key_segments):
  """bool [keys, queries]: may the query see the key?

  Args:
    first_query: its position; first_key: likewise.
    shape: (keys, queries).
    window: or None.
    query_segments: i32 [1, queries] or None.
    key_segments: i32 [1, keys] or None.
  """
  # One array of differences; the distance of the tiles is a scalar.
  behind = lax.broadcasted_iota(jnp.int32, shape, 1) - lax.broadcasted_iota(jnp.int32, shape, 0)
  distance = first_key - first_query
  keep = behind >= distance
  if window is not None:
    keep &= behind < distance + window
  if query_segments is not None:
    keep &= (query_segments == column(key_segments)) & (query_segments != 0)
  return keep


def last_key_tile(query_tile, tiles):
  """The last key tile that any query of the tile may see."""
  return ((query_tile + 1) * tiles.queries - 1) // tiles.keys


def first_diagonal_tile(query_tile, tiles):
  """Key tiles before this one lie before every query of the tile."""
  return query_tile * tiles.queries // tiles.keys


@dataclasses.dataclass(frozen=True)
class Walk:
  """Which tiles a grid step (row, step) is about.

  A row of the grid is two query tiles, one from either end of the sequence: together they see as
  many key tiles as any other two, so that no step of a causal grid is idle. (With an odd number
  of tiles the last one has a row of its own.) Under a window each tile has a row.

  Attributes:
    tiles: `ForwardTiles`.
    num_tiles: query tiles.
    parts: of the group, each of which sweeps over a tile's keys.
    window: tokens, or None.
  """

  tiles: ForwardTiles
  num_tiles: int
  parts: int
  window: int | None

  def grid(self):
    """(rows, steps)."""
    if self.window is not None:
      return self.num_tiles, self.parts * self.sweep(None)
    rows = -(-self.num_tiles // 2)
    return rows, self.parts * max(
      sum(-(-(i + 1) * self.tiles.queries // self.tiles.keys) for i in self._pair(row))
      for row in range(rows))

  def _pair(self, row):
    """Two query tiles, the first of which may be -1."""
    return row - self.num_tiles % 2, self.num_tiles - 1 - row

  def sweep(self, query_tile):
    """Key tiles that one part of a query tile steps over: all it may see, and no fewer."""
    if self.window is None:
      return lax.div((query_tile + 1) * self.tiles.queries + (self.tiles.keys - 1), self.tiles.keys)
    return min(self.num_tiles * self.tiles.queries // self.tiles.keys,
               (self.tiles.queries + self.window - 2) // self.tiles.keys + 2)

  def at(self, row, step):
    """(query tile, part, which step of the sweep over its keys)."""
    i = row
    if self.window is None:
      early, late = self._pair(row)
      begin = self.parts * self.sweep(early)
      i = jnp.where(step >= begin, late, early)
      step = jnp.where(step >= begin, step - begin, step)
    sweep = self.sweep(i)
    part = sum(((step >= n * sweep).astype(jnp.int32) for n in range(1, self.parts)), jnp.int32(0))
    return i, part, step - part * sweep


def key_tile_bounds(batch, tokens, tiles, window, segment_ids):
  """i32 [2, B, query tiles]: the first key tile to visit, and the first that needs no mask.

  From the second on, up to the diagonal, every query of the tile sees every key. With segments, the
  first is where the range of segment numbers first meets that of the queries: exact for documents
  numbered in order, as packing makes them, and safe for others.

  Args:
    batch: B.
    tokens: T, a multiple of both tile sizes.
    tiles: has `.queries` and `.keys`.
    window: or None.
    segment_ids: i32 [B, T] or None.
  """
  query_tiles = jnp.arange(tokens // tiles.queries, dtype=jnp.int32)
  diagonal = first_diagonal_tile(query_tiles, tiles)
  first = jnp.zeros_like(diagonal)
  if window is not None:
    first = jnp.maximum(query_tiles * tiles.queries - (window - 1), 0) // tiles.keys
  unmasked = first if window is None else diagonal
  if segment_ids is not None:
    meet, same = _segment_tiles(segment_ids, tiles)
    first = jnp.maximum(
      first, jnp.where(meet.any(axis=2), jnp.minimum(meet.argmax(axis=2), diagonal), diagonal))
    key_tiles = jnp.arange(meet.shape[2])
    same |= key_tiles >= diagonal[:, None]
    from_here_on = jnp.flip(jnp.cumprod(jnp.flip(same, axis=2), axis=2), axis=2)
    unmasked = jnp.maximum(unmasked, len(key_tiles) - from_here_on.sum(axis=2))
  return jnp.stack([jnp.broadcast_to(x, (batch, len(query_tiles))).astype(jnp.int32)
                    for x in (first, unmasked)])


def _segment_tiles(segment_ids, tiles):
  """Two bool [B, query tiles, key tiles]: may they share a segment; are both wholly in one."""
  limits = jnp.iinfo(jnp.int32)
  padding = segment_ids == 0             # sees nothing and is seen by nobody

  def ends(size):
    split = lambda x: x.reshape(len(x), -1, size)
    lowest = split(jnp.where(padding, limits.max, segment_ids)).min(axis=2)
    highest = split(jnp.where(padding, limits.min, segment_ids)).max(axis=2)
    return lowest, highest, (lowest == highest) & ~split(padding).any(axis=2)

  q_low, q_high, q_one = (x[:, :, None] for x in ends(tiles.queries))
  k_low, k_high, k_one = (x[:, None] for x in ends(tiles.keys))
  return (k_low <= q_high) & (q_low <= k_high), q_one & k_one & (q_low == k_low)


# jit, because a pallas_call by itself is never dropped when its results are not used, which under
# jax.checkpoint would run the forward kernel again in the backward pass.
@functools.partial(jax.jit, static_argnames=(
  "scale", "tiles", "window", "block_size", "num_blocks", "interpret"))
def forward(q, k, v, *, scale, tiles, segment_ids=None, sinks=None, window=None, block_size=64,
            num_blocks=0, interpret=False):
  """Attention of whole tiles.

  Args:
    q: [B,T,N,H] float32 or bfloat16, T a multiple of both tile sizes, H of 128.
    k: [B,T,K,H].
    v: [B,T,K,H].
    scale: of the logits.
    tiles: `ForwardTiles`; `heads` divides G.
    segment_ids: i32 [B,T] or None.
    sinks: f32 [N] or None.
    window: tokens, or None.
    block_size: keys per block; `tiles.keys` a multiple of 8 blocks. Used with `num_blocks`.
    num_blocks: P; 0 for attention alone.
    interpret: False, or `tpu.interpret_params()`.

  Returns:
    out [B,T,N,H] in q's dtype, lse f32 [B,N,T] (natural, sinks included; 0 in a row that sees
    nothing), picked i32 [B,K,P,T] or None.
  """
  B, T, N, H = q.shape
  K = k.shape[2]
  G = N // K
  parts = G // tiles.heads
  walk = Walk(tiles, T // tiles.queries, parts, window)
  bounds = key_tile_bounds(B, T, tiles, window, segment_ids)

  def key_tile(b, row, step, bounds):
    i, _, step = walk.at(row, step)
    return jnp.minimum(bounds[0, b, i] + step, last_key_tile(i, tiles))

  def query_tile(row, step):
    return walk.at(row, step)[0]

  def heads_at(b, h, row, step, bounds):
    i, part, _ = walk.at(row, step)
    return b, i, h * parts + part

  heads_spec = pl.BlockSpec((1, tiles.queries, tiles.heads * H), heads_at)
  key_spec = pl.BlockSpec((1, tiles.keys, H), lambda b, h, row, step, bounds: (
    b, key_tile(b, row, step, bounds), h))
  operands = [q.reshape(B, T, N * H), k.reshape(B, T, K * H), v.reshape(B, T, K * H)]
  in_specs = [heads_spec, key_spec, key_spec]
  if segment_ids is not None:
    operands += [segment_ids[:, None], segment_ids[:, None]]
    in_specs += [
      pl.BlockSpec((1, 1, tiles.queries), lambda b, h, row, step, bounds: (
        b, 0, query_tile(row, step))),
      pl.BlockSpec((1, 1, tiles.keys), lambda b, h, row, step, bounds: (
        b, 0, key_tile(b, row, step, bounds)))]
  if sinks is not None:
    operands.append(sinks)
    in_specs.append(pl.BlockSpec(memory_space=pltpu.SMEM))

  # One array for the picked blocks and the bits of lse: every output of a kernel costs scalar work
  # in every grid step.
  notes = num_blocks + G
  out_shape = [jax.ShapeDtypeStruct((B, T, N * H), q.dtype),
               jax.ShapeDtypeStruct((B, K, notes, T), jnp.int32)]
  out_specs = [heads_spec, pl.BlockSpec(
    (1, 1, notes, tiles.queries),
    lambda b, h, row, step, bounds: (b, h, 0, query_tile(row, step)))]
  scratch = [pltpu.VMEM((tiles.heads, 1, tiles.queries), jnp.float32)] * 2
  scratch.append(pltpu.VMEM((tiles.heads, H, tiles.queries), jnp.float32))
  if num_blocks:
    rows = -(-T // block_size // tpu_block_picks.ROWS) * tpu_block_picks.ROWS
    scratch.append(pltpu.VMEM((tiles.heads, rows, tiles.queries), jnp.float32))
    if parts > 1:
      scratch.append(pltpu.VMEM((rows, tiles.queries), jnp.float32))

  out, notes = pl.pallas_call(
    functools.partial(
      _kernel, walk=walk, scale=scale, block_size=block_size, num_blocks=num_blocks,
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


def _kernel(bounds_ref, q_ref, k_ref, v_ref, *refs, walk, scale, block_size, num_blocks, segmented,
            sunk):
  tiles, parts, window, refs = walk.tiles, walk.parts, walk.window, list(refs)
  query_segments_ref, key_segments_ref = (refs.pop(0), refs.pop(0)) if segmented else (None, None)
  sinks_ref = refs.pop(0) if sunk else None
  out_ref, notes_ref, max_s, sum_s, acc_s, *maxima = refs
  H = k_ref.shape[2]
  b, h = pl.program_id(0), pl.program_id(1)
  i, part, step = walk.at(pl.program_id(2), pl.program_id(3))
  first, last = bounds_ref[0, b, i], last_key_tile(i, tiles)
  j = first + step
  lanes = lambda g: pl.ds(g * H if isinstance(g, int) else pl.multiple_of(g * H, H), H)

  @pl.when(step == 0)
  def _():
    acc_s[...] = jnp.zeros_like(acc_s)
    if not sunk:
      max_s[...] = jnp.full_like(max_s, LOWEST)
      sum_s[...] = jnp.zeros_like(sum_s)
      return
    sum_s[...] = jnp.ones_like(sum_s)
    head = (h * parts + part) * tiles.heads
    for g in range(tiles.heads):
      max_s[g] = jnp.full(max_s.shape[1:], sinks_ref[head + g] * LOG2E)

  def logits(g, keys, masked):
    s = dot(k_ref[0, keys, :], q_ref[0, :, lanes(g)], (1, 1)) * (scale * LOG2E)   # [keys, queries]
    if not masked:
      return s
    segments = (None, None)
    if segmented:
      segments = query_segments_ref[0], key_segments_ref[0, :, keys]
    corner = i * tiles.queries, j * tiles.keys + keys.start
    return jnp.where(visible(*corner, s.shape, window, *segments), s, HIDDEN)

  def absorb(g, keys, s):
    """Takes the logits of some keys into block maxima, maximum, sum and output of a head."""
    top = s
    if num_blocks:
      blocks = keys.size // block_size
      first_block = (j * tiles.keys + keys.start) // block_size
      top = tpu_block_picks.block_maxima(s, block_size)
      maxima[0][g, pl.ds(pl.multiple_of(first_block, blocks), blocks), :] = top
    before = max_s[g]
    now = jnp.maximum(before, top.max(axis=0, keepdims=True))
    shrink = jnp.exp2(before - now)
    p = jnp.exp2(s - now)
    sum_s[g] = sum_s[g] * shrink + p.sum(axis=0, keepdims=True)
    max_s[g] = now
    v = v_ref[0, keys, :]
    acc_s[g] = acc_s[g] * shrink + dot(v, p.astype(v.dtype), (0, 0))              # [H, queries]

  def attend(masked):
    pieces = [pl.ds(a, tiles.piece) for a in range(0, tiles.keys, tiles.piece)]
    # Under a causal mask only the last tile or two are masked: not worth the code of all heads.
    if not tiles.unroll or (masked and window is None):
      def head(g, _):
        for keys in pieces:
          absorb(g, keys, logits(g, keys, masked))
        return 0
      lax.fori_loop(0, tiles.heads, head, 0)
      return
    # The matrix units work on the logits of the next two pieces while the vector units are at the
    # softmax of this one.
    work = [(g, keys) for g in range(tiles.heads) for keys in pieces]
    ready = [logits(*w, masked) for w in work[:AHEAD]]
    for n, (g, keys) in enumerate(work):
      if n + AHEAD < len(work):
        ready.append(logits(*work[n + AHEAD], masked))
      absorb(g, keys, ready.pop(0))

  if window is not None:
    pl.when(j <= last)(lambda: attend(True))
  else:
    free = (j >= bounds_ref[1, b, i]) & (j < first_diagonal_tile(i, tiles))
    pl.when(free)(lambda: attend(False))
    pl.when(~free & (j <= last))(lambda: attend(True))

  @pl.when(j == last)
  def _():
    lses = []
    for g in range(tiles.heads):
      total = sum_s[g]
      seen = total > 0
      lses.append(jnp.where(seen, max_s[g] + jnp.log2(jnp.where(seen, total, 1.0)), 0.0))
      notes_ref[0, 0, pl.ds(num_blocks + part * tiles.heads + g, 1), :] = (
        lax.bitcast_convert_type(lses[g] / LOG2E, jnp.int32))
      out = acc_s[g] / jnp.where(seen, total, 1.0)
      out_ref[0, :, lanes(g)] = out.T.astype(out_ref.dtype)
    if not num_blocks:
      return
    blocks = tiles.keys // block_size
    span = first * blocks, (last + 1) * blocks
    score_ref = maxima[0].at[0] if parts == 1 else maxima[1]
    tpu_block_picks.group_scores(maxima[0], lses, score_ref, *span,
                                 rest=None if parts == 1 else part > 0)
    pl.when(part == parts - 1)(
      lambda: tpu_block_picks.pick(score_ref, notes_ref.at[0, 0, pl.ds(0, num_blocks)], *span))
