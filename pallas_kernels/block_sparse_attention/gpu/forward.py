"""Block-sparse attention forward for Hopper over whole tiles of queries, in Pallas Mosaic GPU.

A program takes `tile_tokens` consecutive tokens x the G heads of a KV head = 128 query rows, and
loops over the tile's list of hot blocks (plan.py): a producer warpgroup brings K and V blocks
by data-dependent TMA loads, two consumer warpgroups of 64 rows (half of the heads each, all the
tokens) alternate between the tensor cores and the softmax.

    out[t,n] = sum over blocks c hot in the tile with t in members(c), visible keys j of c:  p v_j

Membership costs nothing per score: rows that did not select a block subtract a huge number instead
of their running maximum, so their weights underflow to 0. Only a list's first step, which holds
the blocks of the tile's own positions, compares key and query positions, and only its first
`masked_steps` (visibility.py), mostly one, compare segments.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import compat, hopper
from pallas_kernels.gpu_padding import BLOCK
from pallas_kernels.softmax import EMPTY_LSE, LN2, LOG2E, MASKED

ROWS = 64                                   # query rows of a warpgroup: the M of wgmma
# Blocks of a step: 64 x 128 scores a warpgroup. A list's first step thus holds both blocks that a
# tile's own positions may span.
BLOCKS_PER_STEP = 2
STAGES = 2                                  # steps of K and V in flight: 128 KiB at H = 128
PROGRAMS = 132                              # one a multiprocessor of an H100 or H200
M_FLOOR = -1e20                             # running maximum before any key: finite on purpose
_FULL, _ROW, _COLUMN = hopper.TILE, hopper.ROWS, hopper.COLS


def tile_tokens(group):
  """Tokens of a tile for `group` query heads to a KV head (already padded to 4, 8 or 16)."""
  return 2 * ROWS // group


def _tile_kernel(q_ref, k_ref, v_ref, blocks_ref, words_ref, counts_ref, order_ref, sink_ref,
                 offset_ref, segment_ref, row_segment_ref, masked_ref, out_ref, lse_ref, scratch,
                 *, shape, programs, scale, visible, interpret):
  """The body: see the module. Rows of a warpgroup are head-major.

  A program runs tiles program, program + programs, ...: its producer fetches the next tile's
  queries and first blocks while the consumers finish and store the last one.

  Args:
    q_ref: [B,T,N,H], and out_ref.
    k_ref: [B,S,K,H], and v_ref.
    blocks_ref: i32 [B,K,L,U], and words_ref.
    counts_ref: i32 [B,K,L], and order_ref.
    sink_ref: f32 [K,2,ROWS], base 2.
    offset_ref: i32 [B], or None where the offset is static.
    segment_ref: i32 [B,S] or None.
    row_segment_ref: i32 [B,L,ROWS] or None.
    masked_ref: i32 [B,K,L], steps that compare segments, or None.
    lse_ref: f32 [B,K,L,2,ROWS].
    scratch: shared memory and barriers, as `tile_forward` lists them.
    shape: (K, G, H).
    programs: of the grid.
    scale: of the logits.
    visible: Visibility.
    interpret: GPU interpret mode parameters or None.
  """
  kv_heads, group, _ = shape
  tokens = tile_tokens(group)
  half = group // 2                         # heads of a warpgroup
  per_step, keys = BLOCKS_PER_STEP, BLOCKS_PER_STEP * BLOCK
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
    return lax.rem(step, jnp.int32(STAGES))

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
      position0 = token0 + (visible.offset if offset_ref is None else offset_ref[batch])
      buffer = lax.rem(index, jnp.int32(2))
      following_tile = read_tile(index + 1)
      queries = q_smem.at[buffer, wg]

      def key_positions(block):
        return iota(_FULL, (ROWS, BLOCK), 1) + block * BLOCK

      def hide_positions(part, block):
        """The scores of one block with those of invisible positions masked."""
        position, key = token + position0, key_positions(block)
        bound = jnp.minimum(position, visible.num_keys - 1) if visible.beyond else position
        see = spread(bound) >= key
        if visible.window is not None:
          see &= spread(position) < key + visible.window
        return jnp.where(see, part, MASKED)

      def hide_segments(part, block):
        """The scores of one block with those of other segments masked."""
        mine = spread(compat.load(row_segment_ref.at[batch, tile], _ROW, interpret))
        theirs = compat.load(
          segment_ref.at[batch, pl.ds(block * BLOCK, BLOCK)], _COLUMN, interpret)
        theirs = lax.broadcast_in_dim(theirs, (ROWS, BLOCK), (1,))
        return jnp.where((mine == theirs) & (mine != 0), part, MASKED)

      def run_step(step, carry, masked=False):
        """One step; `masked`: the first one, and with segments others that compare them."""
        acc, m, l, listed = carry
        slot = slot_of(base + step)
        following = read_step(at, jnp.minimum(step + 1, steps - 1))
        scores = scores_of(queries, slot)
        plgpu.barrier_arrive(k_free.at[slot])
        parts = tuple(scores[:, i * BLOCK:(i + 1) * BLOCK] for i in range(per_step))
        if masked or visible.window is not None:
          parts = tuple(map(hide_positions, parts, listed[:per_step]))
        if masked and segment_ref is not None:
          parts = tuple(map(hide_segments, parts, listed[:per_step]))
        selected, m_new = [], m
        for part, word in zip(parts, listed[per_step:], strict=True):
          bit = lax.bitwise_and(
            lax.shift_right_logical(splat(word, _ROW), token), jnp.ones_like(token))
          selected.append(bit == 1)
          m_part = part.max(axis=1) * (scale * LOG2E)
          m_new = jnp.maximum(m_new, jnp.where(selected[-1], m_part, M_FLOOR))
        alpha = jnp.exp2(m - m_new)
        weights = []
        for part, is_selected in zip(parts, selected, strict=True):
          subtract = jnp.where(is_selected, m_new, -MASKED)
          weights.append(jnp.exp2(part * (scale * LOG2E) - spread(subtract)))
        l = l * alpha
        acc = acc * lax.broadcast_in_dim(alpha, acc.shape, (0,))
        low = [w.astype(q_ref.dtype) for w in weights]
        for w in weights:
          l = l + w.sum(axis=1)
        if masked:                          # the last tile's output has left its buffer by now
          @pl.when((index > 0) & (step == 0))
          def _():
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            plgpu.barrier_arrive(q_free.at[(1 - buffer) * 2 + wg])
        acc, l, m_new, *low = lax.optimization_barrier((acc, l, m_new, *low))
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
        return acc, m_new, l, following

      carry = (splat(jnp.float32(0), _FULL, (ROWS, q_smem.shape[-1])),
               splat(jnp.float32(M_FLOOR), _ROW), splat(jnp.float32(0), _ROW), tuple(listed))
      plgpu.barrier_wait(q_ready.at[buffer * 2 + wg])
      plgpu.barrier_wait(k_ready.at[slot_of(base)])
      run_masked = functools.partial(run_step, masked=True)
      if segment_ref is None:
        masked_steps, carry = 1, run_masked(jnp.int32(0), carry)
      else:
        masked_steps = masked_ref[at]
        carry = lax.fori_loop(0, masked_steps, run_masked, carry)
      acc, m, l, _ = lax.fori_loop(masked_steps, steps, run_step, carry)
      sink = compat.load(sink_ref.at[kv, wg], _ROW, interpret)
      m_new = jnp.maximum(m, sink)
      alpha = jnp.exp2(m - m_new)
      l = l * alpha + jnp.exp2(sink - m_new)
      some = l > 0
      inverse = jnp.where(some, alpha / jnp.where(some, l, 1.0), 0.0)
      acc = acc * lax.broadcast_in_dim(inverse, acc.shape, (0,))
      lse = m_new * LN2 + jnp.log(jnp.where(some, l, 1.0))
      q_smem[buffer, wg] = acc.astype(q_ref.dtype)
      lse_smem[wg] = jnp.where(some, lse, EMPTY_LSE)
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
          @pl.when(base + step >= STAGES)
          def _(free=free):
            plgpu.barrier_wait(free.at[slot])
          for i in range(per_step):
            plgpu.copy_gmem_to_smem(
              gmem.at[batch, pl.ds(listed[i] * BLOCK, BLOCK), kv],
              smem.at[slot, pl.ds(i * BLOCK, BLOCK)], ready.at[slot])
        return following

      lax.fori_loop(0, steps, load, tuple(listed))
      return (base + steps,) + following_tile

    total, *_ = lax.fori_loop(
      0, rounds, load_tile, (jnp.int32(0),) + read_tile(jnp.int32(0)))
    for slot in range(STAGES):              # see every load consumed before the program ends
      @pl.when(slot < total)
      def _(slot=slot):
        plgpu.barrier_wait(k_free.at[slot])
        plgpu.barrier_wait(v_free.at[slot])

    @pl.when(rounds > 1)
    def _():
      for half_index in range(2):
        plgpu.barrier_wait(q_free.at[lax.rem(rounds, jnp.int32(2)) * 2 + half_index])


def tile_forward(q, k, v, plan, visible, *, scale, sinks, programs=PROGRAMS, interpret=None):
  """Attention over the hot selections of `plan`.

  Args:
    q: [B,T,N,H] bfloat16 or float16, T a multiple of 64, H 64 or 128, N / K in {4, 8, 16}.
    k: [B,S,K,H], S a multiple of 64.
    v: [B,S,K,H].
    plan: SelectionPlan whose tiles are `tile_tokens` long.
    visible: Visibility.
    scale: of the logits.
    sinks: f32 [N] or None: they join the denominator.
    programs: of the grid.
    interpret: compat.InterpretGPUParams() to run on CPU.

  Returns:
    out [B,T,N,H], 0 where a row sees no hot key, and its natural lse f32 [B,T,N], `EMPTY_LSE` where
    there is no sink either.
  """
  b, t, n, h = q.shape
  kv_heads = k.shape[2]
  group = n // kv_heads
  tokens = tile_tokens(group)
  tiles = t // tokens
  if (plan.config.tile_tokens, plan.config.list_multiple) != (tokens, BLOCKS_PER_STEP):
    raise ValueError(f"plan: got tiles of {plan.config.tile_tokens} tokens in steps of "
                     f"{plan.config.list_multiple} blocks, want {tokens} and {BLOCKS_PER_STEP}")
  sink_rows = jnp.full((n,), -jnp.inf, jnp.float32) if sinks is None else sinks * LOG2E
  sink_rows = jnp.repeat(sink_rows.astype(jnp.float32), tokens).reshape(kv_heads, 2, ROWS)
  extra = {}
  if visible.offsets is not None:
    extra["offset_ref"] = visible.offsets
  if visible.segment_ids is not None:
    row_segments = jnp.tile(
      visible.segment_ids.reshape(b, tiles, 1, tokens), (1, 1, group // 2, 1))
    extra["segment_ref"] = visible.kv_segment_ids
    extra["row_segment_ref"] = row_segments.reshape(b, tiles, ROWS)
    extra["masked_ref"] = visible.masked_steps(plan)
  keys = BLOCKS_PER_STEP * BLOCK
  programs = min(programs, b * kv_heads * tiles)
  scratch = (
    hopper.swizzled((2, 2, ROWS, h), q.dtype, interpret),
    hopper.swizzled((STAGES, keys, h), q.dtype, interpret),
    hopper.swizzled((STAGES, keys, h), q.dtype, interpret),
    plgpu.SMEM((2, ROWS), jnp.float32),
    plgpu.Barrier(num_arrivals=group // 2, num_barriers=4),
    plgpu.Barrier(num_arrivals=1, num_barriers=4),
    plgpu.Barrier(num_arrivals=BLOCKS_PER_STEP, num_barriers=STAGES),
    plgpu.Barrier(num_arrivals=BLOCKS_PER_STEP, num_barriers=STAGES),
    plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
    plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
    plgpu.Barrier(num_arrivals=2))

  def body(*refs):
    inputs, rest = refs[:8], refs[8 + len(extra):]
    given = dict.fromkeys(("offset_ref", "segment_ref", "row_segment_ref", "masked_ref"))
    given |= zip(extra, refs[8:])
    _tile_kernel(*inputs, *given.values(), *rest[:2], rest[2:], shape=(kv_heads, group, h),
                 programs=programs, scale=scale, visible=visible, interpret=interpret)

  out, lse = compat.mosaic_gpu_kernel(
    body,
    out=(jax.ShapeDtypeStruct(q.shape, q.dtype),
         jax.ShapeDtypeStruct((b, kv_heads, tiles, 2, ROWS), jnp.float32)),
    scratch=scratch, interpret=interpret, grid=(programs,),
    grid_names=("program",), num_threads=3, thread_name="wg",
  )(q, k, v, plan.blocks, plan.words, plan.counts, plan.order, sink_rows, *extra.values())
  lse = lse.reshape(b, kv_heads, tiles, group, tokens).transpose(0, 2, 4, 1, 3)
  return out, lse.reshape(b, t, n)
