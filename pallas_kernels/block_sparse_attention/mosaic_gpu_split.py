"""Block-sparse attention forward for Hopper whose warpgroups skip what they did not pick.

For 16 query heads to a KV head: 64 rows of the tensor cores are 4 tokens x 16 heads, and what 4
tokens pick is little more than what each picks. A program takes 16 tokens as four subtiles of 64
rows, two to a consumer warpgroup. A producer warpgroup brings every block that is hot in the tile
(`index_plan.py`), once; a subtile multiplies the ones that its own tokens picked and passes over
the others. So the tensor cores pay for unions of 4 tokens, and the L2 cache for unions of 16:

    out[t,n] = sum over blocks c hot in the tile with t in members(c), keys j <= t of c:  p v_j

Rows of a subtile that did not pick a block are masked as in mosaic_gpu.py, by what they subtract.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import compat, hopper
from pallas_kernels.block_sparse_attention import mosaic_gpu as union

ROWS, BLOCK = union.ROWS, union.BLOCK
_LOW, _MASKED, _LOG2E = union._LOW, union._MASKED, union._LOG2E
_FULL, _ROW, _COLUMN = hopper.TILE, hopper.ROWS, hopper.COLS
SUBTILES = 2                                # of a consumer warpgroup


@dataclasses.dataclass(frozen=True)
class SplitConfig:
  """Sizes of the split forward; the defaults are for H200 (measured: LOG.md).

  Queries take 128 KiB of shared memory (two tiles of 256 rows) and a slot 32, at H = 128.
  """

  slots: int = 3                            # blocks of K and V in flight
  programs: int = 132                       # one a multiprocessor of an H100 or H200

  def __post_init__(self):
    if self.slots not in (2, 3):
      raise ValueError(f"slots: got {self.slots}, want 2 or 3")


def tile_tokens(group):
  """Tokens of a program's tile for `group` query heads to a KV head, 8 or 16."""
  return 2 * SUBTILES * ROWS // group


def _split_kernel(q_ref, k_ref, v_ref, blocks_ref, words_ref, counts_ref, order_ref, sink_ref,
                  segment_ref, row_segment_ref, out_ref, lse_ref, scratch, *, shape, config,
                  programs, scale, interpret):
  """The body: see the module. `shape` is (K, G, H); rows of a subtile are token-major.

  A program runs tiles program, program + programs, ...: its consumers fetch the next tile's
  queries, into the other of two buffers, once the last tile's output has left that one.
  """
  kv_heads, group, head_dim = shape
  tokens, each = tile_tokens(group), ROWS // group
  slots = config.slots
  q_smem, k_smem, v_smem, q_ready, ready, free = scratch
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

  def slot_of(step):
    return lax.rem(step, jnp.int32(slots))

  def spread(row):
    return lax.broadcast_in_dim(row, (ROWS, BLOCK), (0,))

  def widen(row):
    return lax.broadcast_in_dim(row, (ROWS, head_dim), (0,))

  def splat(value, layout, shape=(ROWS,)):
    return compat.cast(lax.broadcast_in_dim(value, shape, ()), layout, interpret)

  def iota(layout, shape, dim):
    return compat.cast(lax.broadcasted_iota(jnp.int32, shape, dim), layout, interpret)

  @pl.when(wg < 2)
  def _consume():
    plgpu.set_max_registers(240, action="increase")
    token = lax.div(iota(_ROW, (ROWS,), 0), splat(jnp.int32(group), _ROW))
    subtiles = [wg * SUBTILES + s for s in range(SUBTILES)]

    def boxes(at, buffer):
      """Pairs of (rows of shared, rows of device memory): a token's heads are side by side."""
      batch, kv, tile = at
      heads = pl.ds(kv * group, group)
      for s, subtile in enumerate(subtiles):
        for i in range(each):
          yield ((wg, buffer, s, pl.ds(i * group, group)),
                 (batch, tile * tokens + subtile * each + i, heads))

    def load_queries(at, buffer):
      for shared, device in boxes(at, buffer):
        plgpu.copy_gmem_to_smem(q_ref.at[device], q_smem.at[shared], q_ready.at[wg * 2 + buffer])

    def scores_of(queries, slot):
      if interpret:                         # interpret mode knows wgmma in part: plain products
        return jnp.dot(queries[...], k_smem[slot].T, preferred_element_type=jnp.float32)

      def run(acc):
        plgpu.wgmma(acc, queries, plgpu.transpose_ref(k_smem.at[slot], (1, 0)))
        return acc[...]
      return pl.run_scoped(run, plgpu.ACC((ROWS, BLOCK), jnp.float32))

    def add_values(acc, weights, slot):
      if interpret:
        return acc + jnp.dot(weights, v_smem[slot], preferred_element_type=jnp.float32)
      return pl.run_state(
        lambda ref: plgpu.wgmma(ref, weights, v_smem.at[slot]))(plgpu.ACC.init(acc))

    def visible(at, subtile, block):
      batch, _, tile = at
      row = token + splat(tile * tokens + subtile * each, _ROW)
      see = spread(row) >= iota(_FULL, (ROWS, BLOCK), 1) + block * BLOCK
      if segment_ref is not None:
        theirs = compat.load(
          segment_ref.at[batch, pl.ds(block * BLOCK, BLOCK)], _COLUMN, interpret)
        theirs = lax.broadcast_in_dim(theirs, (ROWS, BLOCK), (1,))
        mine = spread(compat.load(row_segment_ref.at[batch, tile, subtile], _ROW, interpret))
        see &= (mine == theirs) & (mine != 0)
      return see

    def attend(state, queries, at, subtile, slot, block, word, first):
      """One block of a subtile, some of whose tokens picked it."""
      acc, row_max, row_sum = state
      scores = scores_of(queries, slot)
      if first or segment_ref is not None:
        scores = jnp.where(visible(at, subtile, block), scores, _MASKED)
      bits = splat(lax.shift_right_logical(word, subtile * each), _ROW)
      bit = lax.bitwise_and(lax.shift_right_logical(bits, token), jnp.ones_like(token))
      picked = bit == 1
      high = scores.max(axis=1) * (scale * _LOG2E)
      new_max = jnp.maximum(row_max, jnp.where(picked, high, _LOW))
      subtract = jnp.where(picked, new_max, -_MASKED)
      shrink = jnp.exp2(row_max - new_max)
      weights = jnp.exp2(scores * (scale * _LOG2E) - spread(subtract))
      row_sum = row_sum * shrink + weights.sum(axis=1)
      acc, low = acc * widen(shrink), weights.astype(q_ref.dtype)
      acc, row_sum, new_max, low = lax.optimization_barrier((acc, row_sum, new_max, low))
      return add_values(acc, low, slot), new_max, row_sum

    def finish(state, sink):
      """The normalised output and its log-sum-exp, the sink counted."""
      acc, row_max, row_sum = state
      new_max = jnp.maximum(row_max, sink)
      shrink = jnp.exp2(row_max - new_max)
      row_sum = row_sum * shrink + jnp.exp2(sink - new_max)
      some = row_sum > 0
      safe = jnp.where(some, row_sum, 1.0)
      lse = jnp.where(some, new_max + jnp.log(safe) * _LOG2E, _MASKED)
      return acc * widen(jnp.where(some, shrink / safe, 0.0)), lse

    def run_tile(index, carry):
      base, batch, kv, tile, steps, *listed = carry
      at = batch, kv, tile
      buffer = lax.rem(index, jnp.int32(2))
      following_tile = read_tile(index + 1)

      def run_step(step, carry, first=False):
        states, block, word = carry
        slot = slot_of(base + step)
        following = jnp.minimum(step + 1, steps - 1)
        following = blocks_ref[(*at, following)], words_ref[(*at, following)]
        plgpu.barrier_wait(ready.at[slot])
        done = []
        for s, (state, subtile) in enumerate(zip(states, subtiles)):
          mine = lax.bitwise_and(
            lax.shift_right_logical(word, subtile * each), jnp.int32((1 << each) - 1))
          done.append(lax.cond(
            mine != 0,
            lambda *state, s=s, subtile=subtile: attend(
              state, q_smem.at[wg, buffer, s], at, subtile, slot, block, word, first),
            lambda *state: state, *state))
        plgpu.barrier_arrive(free.at[slot])
        return (tuple(done), *following)

      nothing = (splat(jnp.float32(0), _FULL, (ROWS, head_dim)), splat(jnp.float32(_LOW), _ROW),
                 splat(jnp.float32(0), _ROW))
      sink = compat.load(sink_ref.at[kv], _ROW, interpret)
      plgpu.barrier_wait(q_ready.at[wg * 2 + buffer])
      carry = run_step(jnp.int32(0), ((nothing,) * SUBTILES, *listed), first=True)
      plgpu.wait_smem_to_gmem(0, wait_read_only=True)    # the last tile's output left its buffer

      @pl.when(index + 1 < rounds)
      def _():
        load_queries(following_tile[:3], 1 - buffer)

      states = lax.fori_loop(1, steps, run_step, carry)[0]
      for s, (state, subtile) in enumerate(zip(states, subtiles)):
        out, lse = finish(state, sink)
        lse_ref[(*at, subtile)] = lse
        q_smem[wg, buffer, s] = out.astype(q_ref.dtype)
      plgpu.commit_smem()
      for shared, device in boxes(at, buffer):
        plgpu.copy_smem_to_gmem(q_smem.at[shared], out_ref.at[device])
      return (base + steps,) + following_tile

    def read_tile(index):
      at = place(index)
      return (*at, counts_ref[at], blocks_ref[(*at, 0)], words_ref[(*at, 0)])

    start = read_tile(jnp.int32(0))
    load_queries(start[:3], jnp.int32(0))
    lax.fori_loop(0, rounds, run_tile, (jnp.int32(0),) + start)
    plgpu.wait_smem_to_gmem(0)

  @pl.when(wg == 2)
  def _produce():
    plgpu.set_max_registers(24, action="decrease")

    def load_tile(index, carry):
      base, batch, kv, tile, steps, block = carry
      at = batch, kv, tile
      following_tile = read_tile(index + 1)

      def load(step, block):
        slot = slot_of(base + step)
        following = blocks_ref[(*at, jnp.minimum(step + 1, steps - 1))]

        @pl.when(base + step >= slots)
        def _():
          plgpu.barrier_wait(free.at[slot])

        if not interpret:                   # no warp may fall behind by two phases of a barrier
          hopper.named_barrier_sync(8, 128)
        for gmem, smem in ((k_ref, k_smem), (v_ref, v_smem)):
          plgpu.copy_gmem_to_smem(
            gmem.at[batch, pl.ds(block * BLOCK, BLOCK), kv], smem.at[slot], ready.at[slot])
        return following

      lax.fori_loop(0, steps, load, block)
      return (base + steps,) + following_tile

    def read_tile(index):
      at = place(index)
      return (*at, counts_ref[at], blocks_ref[(*at, 0)])

    total, *_ = lax.fori_loop(
      0, rounds, load_tile, (jnp.int32(0),) + read_tile(jnp.int32(0)))
    for slot in range(slots):               # see every load consumed before the program ends
      @pl.when(slot < total)
      def _(slot=slot):
        plgpu.barrier_wait(free.at[slot])


def split_forward(q, k, v, plan, *, scale, sinks=None, segment_ids=None, config=None,
                  interpret=None):
  """Attention over the hot picks of `plan`, whose tiles are `tile_tokens` long.

  q [B,T,N,H], k, v [B,T,K,H] bf16 or f16, H 64 or 128, N / K 8 or 16; sinks f32 [N] join the
  denominator -> out [B,T,N,H] (0 where a row sees no hot key), lse f32 [B,T,N] in base 2
  (-1e30 there). `interpret`: compat.InterpretGPUParams() to run on CPU.
  """
  config = config or SplitConfig()
  b, t, n, h = q.shape
  kv_heads = k.shape[2]
  group = n // kv_heads
  tokens, each = tile_tokens(group), ROWS // group
  tiles, subtiles = t // tokens, 2 * SUBTILES
  if (plan.config.tile_tokens, plan.config.list_multiple) != (tokens, 1):
    raise ValueError(f"plan: got tiles of {plan.config.tile_tokens} tokens in steps of "
                     f"{plan.config.list_multiple} blocks, want {tokens} and 1")
  sink_rows = jnp.full((n,), -jnp.inf, jnp.float32) if sinks is None else sinks * _LOG2E
  sink_rows = jnp.tile(sink_rows.astype(jnp.float32).reshape(kv_heads, group), (1, each))
  segments = ()
  if segment_ids is not None:
    row_segments = jnp.repeat(segment_ids.reshape(b, tiles, subtiles, each), group, axis=-1)
    segments = (segment_ids, row_segments)
  programs = min(config.programs, b * kv_heads * tiles)
  scratch = (
    hopper.swizzled((2, 2, SUBTILES, ROWS, h), q.dtype, interpret),
    hopper.swizzled((config.slots, BLOCK, h), q.dtype, interpret),
    hopper.swizzled((config.slots, BLOCK, h), q.dtype, interpret),
    plgpu.Barrier(num_arrivals=SUBTILES * each, num_barriers=4),
    plgpu.Barrier(num_arrivals=2, num_barriers=config.slots),
    plgpu.Barrier(num_arrivals=2, num_barriers=config.slots))

  def body(*refs):
    inputs, rest = refs[:8], refs[8 + len(segments):]
    segment_refs = refs[8:8 + len(segments)] or (None, None)
    _split_kernel(*inputs, *segment_refs, *rest[:2], rest[2:], shape=(kv_heads, group, h),
                  config=config, programs=programs, scale=scale, interpret=interpret)

  out, lse = compat.mosaic_gpu_kernel(
    body,
    out=(jax.ShapeDtypeStruct(q.shape, q.dtype),
         jax.ShapeDtypeStruct((b, kv_heads, tiles, subtiles, ROWS), jnp.float32)),
    scratch=scratch, interpret=interpret, grid=(programs,), grid_names=("program",),
    num_threads=3, thread_name="wg",
    compiler_options={"unsafe_no_auto_barriers": not interpret},
  )(q, k, v, plan.blocks, plan.words, plan.counts, plan.order, sink_rows, *segments)
  lse = jnp.swapaxes(lse.reshape(b, kv_heads, t, group), 1, 2)
  return out, lse.reshape(b, t, n)
