"""Tile-union block-sparse attention forward for Hopper, in Pallas Mosaic GPU.

A program takes `tile_tokens` consecutive tokens x the G heads of a KV head = 128 query rows, and
walks the tile's list of hot blocks (`index_plan.py`): a producer warpgroup brings K and V blocks
by data-dependent TMA loads, two consumer warpgroups of 64 rows (half of the heads each, all the
tokens) alternate between the tensor cores and the softmax.

    out[t,n] = sum over blocks c hot in the tile with t in members(c), keys j <= t of c:  p v_j

Membership costs nothing per score: rows that did not pick a block subtract a huge number instead
of their running maximum, so their weights underflow to 0. Only a list's first step, which holds
the tile's own block, compares key and query positions.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import compat

ROWS = 64                                   # query rows of a warpgroup: the M of wgmma
BLOCK = 64                                  # keys of a block
_LOW = -1e20                                # running maximum before any key: finite on purpose
_MASKED = -1e30                             # score of an invisible key
_LOG2E = math.log2(math.e)
_FULL = plgpu.Layout.WGMMA
_ROW = plgpu.Layout.WGMMA.reduce(1)
_COLUMN = plgpu.Layout.WGMMA.reduce(0)


@dataclasses.dataclass(frozen=True)
class UnionConfig:
  """Tile sizes of the union forward; the defaults are for H200 (measured: LOG.md)."""

  blocks_per_step: int = 2
  stages: int = 2                           # steps of K and V in flight
  programs: int = 132                       # one a multiprocessor of an H100 or H200

  def __post_init__(self):
    if self.blocks_per_step not in (1, 2):
      raise ValueError(f"blocks_per_step: got {self.blocks_per_step}, want 1 or 2")
    shared_kib = 64 + self.stages * self.blocks_per_step * 32      # at H = 128
    if self.stages < 2 or shared_kib > 224:
      raise ValueError(f"stages: got {self.stages} of {self.blocks_per_step} blocks, want at "
                       "least 2 and at most 224 KiB in all")


def tile_tokens(group):
  """Tokens of a tile for `group` query heads to a KV head (already padded to 4, 8 or 16)."""
  return 2 * ROWS // group


def _union_kernel(q_ref, k_ref, v_ref, blocks_ref, words_ref, counts_ref, order_ref, sink_ref,
                  segment_ref, row_segment_ref, out_ref, lse_ref, scratch, *, shape, config,
                  programs, scale, window, interpret):
  """The body: see the module. `shape` is (K, G, H); rows of a warpgroup are head-major.

  A program runs tiles program, program + programs, ...: its producer fetches the next tile's
  queries and first blocks while the consumers finish and store the last one.
  """
  kv_heads, group, _ = shape
  tokens = tile_tokens(group)
  half = group // 2                         # heads of a warpgroup
  per_step, stages = config.blocks_per_step, config.stages
  keys = per_step * BLOCK
  (q_smem, k_smem, v_smem, lse_smem, q_ready, q_free, k_ready, v_ready, k_free, v_free,
   turn) = scratch
  batches, _, tiles = lse_ref.shape[:3]
  program = lax.axis_index("program")
  wg = lax.axis_index("wg")
  items = batches * kv_heads * tiles
  rounds = lax.div(jnp.int32(items + programs - 1) - program, jnp.int32(programs))

  def place(index):
    """batch, KV head and tile of a round."""
    item = jnp.minimum(program + index * programs, items - 1)
    head = lax.div(item, jnp.int32(tiles))
    batch, kv = lax.div(head, jnp.int32(kv_heads)), lax.rem(head, jnp.int32(kv_heads))
    return batch, kv, order_ref[batch, kv, lax.rem(item, jnp.int32(tiles))]

  def take_turn():
    plgpu.barrier_arrive(turn)
    plgpu.barrier_wait(turn)

  def spread(row):
    return lax.broadcast_in_dim(row, (ROWS, BLOCK), (0,))

  def splat(value, layout, shape=(ROWS,)):
    return compat.cast(lax.broadcast_in_dim(value, shape, ()), layout, interpret)

  def iota(layout, shape, dim):
    return compat.cast(lax.broadcasted_iota(jnp.int32, shape, dim), layout, interpret)

  def read_step(at, step):
    listed = [at + (step * per_step + i,) for i in range(per_step)]
    return tuple(blocks_ref[i] for i in listed) + tuple(words_ref[i] for i in listed)

  def read_tile(index):
    at = place(index)
    return at + (counts_ref[at],) + read_step(at, 0)

  def slot_of(step):
    return lax.rem(step, jnp.int32(stages))

  @pl.when(wg < 2)
  def _consume():
    plgpu.set_max_registers(232, action="increase")
    row_iota = iota(_ROW, (ROWS,), 0)
    token = lax.bitwise_and(row_iota, splat(jnp.int32(tokens - 1), _ROW))

    def scores_of(queries, slot):
      if interpret:                         # interpret mode knows wgmma in part: plain products
        take_turn()
        return jnp.dot(queries[...], k_smem[slot].T, preferred_element_type=jnp.float32)

      def run(acc):
        plgpu.wgmma(acc, queries, plgpu.transpose_ref(k_smem.at[slot], (1, 0)))
        take_turn()
        return acc[...]
      return pl.run_scoped(run, plgpu.ACC((ROWS, keys), jnp.float32))

    def run_tile(index, carry):
      base, batch, kv, tile, steps, *listed = carry
      at = batch, kv, tile
      token0 = tile * tokens
      buffer = lax.rem(index, jnp.int32(2))
      following_tile = read_tile(index + 1)
      queries = q_smem.at[buffer, wg]

      def run_step(step, carry, first=False):
        acc, row_max, row_sum, listed = carry
        slot = slot_of(base + step)
        following = read_step(at, jnp.minimum(step + 1, steps - 1))
        scores = scores_of(queries, slot)
        plgpu.barrier_arrive(k_free.at[slot])
        parts, picked, new_max = [], [], row_max
        for i in range(per_step):
          part = scores[:, i * BLOCK:(i + 1) * BLOCK]
          key0 = listed[i] * BLOCK
          if first or window is not None or segment_ref is not None:
            key = iota(_FULL, (ROWS, BLOCK), 1) + key0
            visible = spread(token + token0) >= key
            if window is not None:
              visible &= spread(token + token0) < key + window
            if segment_ref is not None:
              key_segment = compat.load(
                segment_ref.at[batch, pl.ds(key0, BLOCK)], _COLUMN, interpret)
              row_segment = compat.load(row_segment_ref.at[batch, tile], _ROW, interpret)
              key_segment = lax.broadcast_in_dim(key_segment, (ROWS, BLOCK), (1,))
              row_segment = spread(row_segment)
              visible &= (row_segment == key_segment) & (row_segment != 0)
            part = jnp.where(visible, part, _MASKED)
          word = splat(listed[per_step + i], _ROW)
          bit = lax.bitwise_and(lax.shift_right_logical(word, token), jnp.ones_like(token))
          parts.append(part)
          picked.append(bit == 1)
          high = part.max(axis=1) * (scale * _LOG2E)
          new_max = jnp.maximum(new_max, jnp.where(picked[-1], high, _LOW))
        shrink = jnp.exp2(row_max - new_max)
        weights = []
        for part, pick in zip(parts, picked):
          subtract = jnp.where(pick, new_max, -_MASKED)
          weights.append(jnp.exp2(part * (scale * _LOG2E) - spread(subtract)))
        row_sum = row_sum * shrink
        acc = acc * lax.broadcast_in_dim(shrink, acc.shape, (0,))
        low = [w.astype(q_ref.dtype) for w in weights]
        for w in weights:
          row_sum = row_sum + w.sum(axis=1)
        if first:                           # the last tile's output has left its buffer by now
          @pl.when(index > 0)
          def _():
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            plgpu.barrier_arrive(q_free.at[(1 - buffer) * 2 + wg])
        acc, row_sum, new_max, *low = lax.optimization_barrier((acc, row_sum, new_max, *low))
        plgpu.barrier_arrive(turn)
        plgpu.barrier_wait(v_ready.at[slot])
        plgpu.barrier_wait(turn)

        def add_values(acc_ref):
          for i, weight in enumerate(low):
            values = v_smem.at[slot, pl.ds(i * BLOCK, BLOCK)]
            if interpret:
              acc_ref += jnp.dot(weight, values[...], preferred_element_type=jnp.float32)
            else:
              plgpu.wgmma(acc_ref, weight, values)

          @pl.when(step + 1 < steps)
          def _():
            plgpu.barrier_wait(k_ready.at[slot_of(base + step + 1)])
          return acc_ref if interpret else None

        acc = add_values(acc) if interpret else pl.run_state(add_values)(plgpu.ACC.init(acc))
        plgpu.barrier_arrive(v_free.at[slot])
        return acc, new_max, row_sum, following

      carry = (splat(jnp.float32(0), _FULL, (ROWS, q_smem.shape[-1])),
               splat(jnp.float32(_LOW), _ROW), splat(jnp.float32(0), _ROW), tuple(listed))
      plgpu.barrier_wait(q_ready.at[buffer * 2 + wg])
      plgpu.barrier_wait(k_ready.at[slot_of(base)])
      carry = run_step(jnp.int32(0), carry, first=True)
      acc, row_max, row_sum, _ = lax.fori_loop(1, steps, run_step, carry)
      sink = compat.load(sink_ref.at[kv, wg], _ROW, interpret)
      new_max = jnp.maximum(row_max, sink)
      shrink = jnp.exp2(row_max - new_max)
      row_max, row_sum = new_max, row_sum * shrink + jnp.exp2(sink - new_max)
      some = row_sum > 0
      inverse = jnp.where(some, shrink / jnp.where(some, row_sum, 1.0), 0.0)
      acc = acc * lax.broadcast_in_dim(inverse, acc.shape, (0,))
      lse = row_max + jnp.log(jnp.where(some, row_sum, 1.0)) * _LOG2E
      q_smem[buffer, wg] = acc.astype(q_ref.dtype)
      lse_smem[wg] = jnp.where(some, lse, _MASKED)
      plgpu.commit_smem()
      for g in range(half):
        plgpu.copy_smem_to_gmem(
          q_smem.at[buffer, wg, pl.ds(g * tokens, tokens)],
          out_ref.at[batch, pl.ds(token0, tokens), kv * group + wg * half + g])
      plgpu.copy_smem_to_gmem(lse_smem.at[wg], lse_ref.at[batch, kv, tile, wg])
      return (base + steps,) + following_tile

    pl.when(wg == 1)(take_turn)
    lax.fori_loop(0, rounds, run_tile, (jnp.int32(0),) + read_tile(jnp.int32(0)))
    pl.when(wg == 0)(take_turn)
    plgpu.wait_smem_to_gmem(0)

  @pl.when(wg == 2)
  def _produce():
    plgpu.set_max_registers(40, action="decrease")

    def load_tile(index, carry):
      base, batch, kv, tile, steps, *listed = carry
      at = batch, kv, tile
      buffer = lax.rem(index, jnp.int32(2))
      following_tile = read_tile(index + 1)
      for half_index in range(2):
        @pl.when(index >= 2)
        def _(half_index=half_index):
          plgpu.barrier_wait(q_free.at[buffer * 2 + half_index])
        for g in range(half):
          plgpu.copy_gmem_to_smem(
            q_ref.at[batch, pl.ds(tile * tokens, tokens), kv * group + half_index * half + g],
            q_smem.at[buffer, half_index, pl.ds(g * tokens, tokens)],
            q_ready.at[buffer * 2 + half_index])

      def load(step, listed):
        slot = slot_of(base + step)
        following = read_step(at, jnp.minimum(step + 1, steps - 1))
        for gmem, smem, ready, free in ((k_ref, k_smem, k_ready, k_free),
                                        (v_ref, v_smem, v_ready, v_free)):
          @pl.when(base + step >= stages)
          def _(free=free):
            plgpu.barrier_wait(free.at[slot])
          for i in range(per_step):
            plgpu.copy_gmem_to_smem(gmem.at[batch, pl.ds(listed[i] * BLOCK, BLOCK), kv],
                                    smem.at[slot, pl.ds(i * BLOCK, BLOCK)], ready.at[slot])
        return following

      lax.fori_loop(0, steps, load, tuple(listed))
      return (base + steps,) + following_tile

    total, *_ = lax.fori_loop(
      0, rounds, load_tile, (jnp.int32(0),) + read_tile(jnp.int32(0)))
    for slot in range(stages):              # see every load consumed before the program ends
      @pl.when(slot < total)
      def _(slot=slot):
        plgpu.barrier_wait(k_free.at[slot])
        plgpu.barrier_wait(v_free.at[slot])

    @pl.when(rounds > 1)
    def _():
      for half_index in range(2):
        plgpu.barrier_wait(q_free.at[lax.rem(rounds, jnp.int32(2)) * 2 + half_index])


def union_forward(q, k, v, plan, *, scale, sinks=None, segment_ids=None, window=None, config=None,
                  interpret=None):
  """Attention over the hot picks of `plan`, and of those keys over the last `window` only.

  q [B,T,N,H], k, v [B,T,K,H] bf16 or f16, H 64 or 128, N / K in {4, 8, 16}; sinks f32 [N] join
  the denominator -> out [B,T,N,H] (0 where a row sees no hot key), lse f32 [B,T,N] in base 2
  (-1e30 there). `interpret`: compat.InterpretGPUParams() to run on CPU.
  """
  config = config or UnionConfig()
  b, t, n, h = q.shape
  kv_heads = k.shape[2]
  group = n // kv_heads
  tokens = tile_tokens(group)
  tiles = t // tokens
  if plan.config.tile_tokens != tokens or plan.config.list_multiple != config.blocks_per_step:
    raise ValueError(f"plan: got tiles of {plan.config.tile_tokens} tokens in steps of "
                     f"{plan.config.list_multiple} blocks, want {tokens} and "
                     f"{config.blocks_per_step}")
  sink_rows = jnp.full((n,), -jnp.inf, jnp.float32) if sinks is None else sinks * _LOG2E
  sink_rows = jnp.repeat(sink_rows.astype(jnp.float32), tokens).reshape(kv_heads, 2, ROWS)
  segments = ()
  if segment_ids is not None:
    row_segments = jnp.tile(segment_ids.reshape(b, tiles, 1, tokens), (1, 1, group // 2, 1))
    segments = (segment_ids, row_segments.reshape(b, tiles, ROWS))
  tiled = () if interpret else (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
  keys = config.blocks_per_step * BLOCK
  loads = config.blocks_per_step
  programs = min(config.programs, b * kv_heads * tiles)
  scratch = (
    plgpu.SMEM((2, 2, ROWS, h), q.dtype, transforms=tiled),
    plgpu.SMEM((config.stages, keys, h), q.dtype, transforms=tiled),
    plgpu.SMEM((config.stages, keys, h), q.dtype, transforms=tiled),
    plgpu.SMEM((2, ROWS), jnp.float32),
    plgpu.Barrier(num_arrivals=group // 2, num_barriers=4),
    plgpu.Barrier(num_arrivals=1, num_barriers=4),
    plgpu.Barrier(num_arrivals=loads, num_barriers=config.stages),
    plgpu.Barrier(num_arrivals=loads, num_barriers=config.stages),
    plgpu.Barrier(num_arrivals=2, num_barriers=config.stages),
    plgpu.Barrier(num_arrivals=2, num_barriers=config.stages),
    plgpu.Barrier(num_arrivals=2))

  def body(*refs):
    inputs, rest = refs[:8], refs[8 + len(segments):]
    segment_refs = refs[8:8 + len(segments)] or (None, None)
    _union_kernel(*inputs, *segment_refs, *rest[:2], rest[2:], shape=(kv_heads, group, h),
                  config=config, programs=programs, scale=scale, window=window,
                  interpret=interpret)

  out, lse = compat.mosaic_gpu_kernel(
    body,
    out=(jax.ShapeDtypeStruct(q.shape, q.dtype),
         jax.ShapeDtypeStruct((b, kv_heads, tiles, 2, ROWS), jnp.float32)),
    scratch=scratch, interpret=interpret, grid=(programs,),
    grid_names=("program",), num_threads=3, thread_name="wg",
  )(q, k, v, plan.blocks, plan.words, plan.counts, plan.order, sink_rows, *segments)
  lse = lse.reshape(b, kv_heads, tiles, group, tokens).transpose(0, 2, 4, 1, 3)
  return out, lse.reshape(b, t, n)
