"""Block-sparse attention forward for Hopper whose warpgroups skip blocks they did not select.

For 16 query heads to a KV head: 64 rows of the tensor cores are 4 tokens x 16 heads, and what 4
tokens select is little more than what each selects. A program takes 16 tokens as four subtiles of
64 rows, one to a warpgroup. Every block that is hot in the tile (plan.py) is loaded once; a
warpgroup multiplies the ones that its own tokens selected and skips the others. So the tensor cores
pay for unions of 4 tokens, and the L2 cache for unions of 16:

    out[t,n] = sum over blocks c hot in the tile with t in members(c), visible keys j of c:  p v_j

Four warpgroups out of step with each other keep the tensor cores busy, so none of them overlaps
its own products with its own softmax, and 128 registers a thread hold what it needs. They take
turns at starting the loads: a warpgroup for producing alone would leave the others 112.

Where |q| |k| bounds every score of a subtile by _SAFE (in base 2), weights are exp2(score): float32
sums neither overflow nor vanish, and the softmax needs no maximum. Other subtiles keep a running
maximum. bfloat16 weights have float32's range; float16 always keeps the maximum.

Rows of a subtile that did not select a block are masked as in forward.py, by what they subtract.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import compat, hopper
from pallas_kernels.block_sparse_attention.gpu.forward import M_FLOOR, PROGRAMS, ROWS
from pallas_kernels.gpu_padding import BLOCK
from pallas_kernels.softmax import EMPTY_LSE, LN2, LOG2E, MASKED

_FULL, _ROW, _COLUMN = hopper.TILE, hopper.ROWS, hopper.COLS
WARPGROUPS = 4                              # each with a subtile of its own
LANES = 8                                   # sums kept of a row: 2 columns in each of 4 threads
_SAFE = 80.0                                # weights in 2 ** -80 to 2 ** 80; float32: -126 to 127


@dataclasses.dataclass(frozen=True)
class SplitConfig:
  """Sizes of the split forward; the defaults are for H200 (measured: LOG.md).

  Queries take 64 KiB of shared memory and a slot 32, at H = 128.
  """

  slots: int = 5                            # blocks of K and V in shared memory
  prefetch_depth: int = 2                   # steps from the start of a block's loads to its own
  programs: int = PROGRAMS

  def __post_init__(self):
    if self.slots not in (2, 3, 4, 5):
      raise ValueError(f"slots: got {self.slots}, want 2 to 5")
    if not 0 < self.prefetch_depth < self.slots:
      raise ValueError(f"prefetch_depth: got {self.prefetch_depth}, want 1 to {self.slots - 1}, "
                       "one less than slots")


def tile_tokens(group):
  """Tokens of a program's tile for `group` query heads to a KV head, 8 or 16."""
  return WARPGROUPS * ROWS // group


def largest_keys(k, scale, dtype):
  """f32 [B,K]: the largest |k|^2 of k [B,T,K,H] in units of squared base-2 scores per |q|^2.

  Infinite for float16 weights, of which 2 ** 16 overflows: no score is small enough then.
  """
  if dtype == jnp.float16:
    return jnp.full((k.shape[0], k.shape[2]), jnp.inf, jnp.float32)
  return (k.astype(jnp.float32) ** 2).sum(-1).max(1) * (scale * LOG2E) ** 2


def needs_no_maximum(queries, norms, largest_key, interpret):
  """Whether |q| |k| bounds all base-2 scores of a warpgroup's rows by _SAFE.

  queries: ref [ROWS,H]; norms: f32 [ROWS] of shared memory to use; largest_key: of `largest_keys`.
  """
  x = compat.load(queries, _FULL, interpret, optimized=True).astype(jnp.float32)
  norms[...] = (x * x).sum(axis=1)
  plgpu.commit_smem()
  most = norms[0]
  for i in range(1, ROWS):
    most = jnp.maximum(most, norms[i])
  return most * largest_key <= _SAFE ** 2


def _split_kernel(q_ref, k_ref, v_ref, blocks_ref, words_ref, counts_ref, order_ref, sink_ref,
                  key_ref, offset_ref, segment_ref, row_segment_ref, masked_ref, out_ref, lse_ref,
                  scratch, *, shape, tiles, config, scale, programs, own_steps, visible, interpret):
  """The body: see the module. Rows of a subtile are token-major.

  A program runs tiles program, program + programs, ... and numbers their listed blocks through.
  Block i takes slot i % slots, and warpgroup i % 4 starts its loads when it is `prefetch_depth`
  blocks away itself, once all have passed block i - slots. `free` has more barriers than slots, so
  that each is waited for by one warpgroup, at each of its phases.

  Args:
    q_ref: [B,T,N,H], and out_ref.
    k_ref: [B,S,K,H], and v_ref.
    blocks_ref: i32 [B*K*L,U], and words_ref.
    counts_ref: i32 [B*K*L], and order_ref.
    sink_ref: f32 [K,ROWS], base 2.
    key_ref: f32 [B,K] of `largest_keys`.
    offset_ref: i32 [B], or None where the offset is static.
    segment_ref: i32 [B,S] or None.
    row_segment_ref: i32 [B,L,4,ROWS] or None.
    masked_ref: i32 [B*K*L], steps that compare segments, or None.
    lse_ref: f32 [B,K,L,4,ROWS].
    scratch: shared memory and barriers, as `split_forward` lists them.
    shape: (K, G, H).
    tiles: L.
    config: SplitConfig.
    scale: of the logits.
    programs: of the grid.
    own_steps: of the plan: list positions whose keys need the causal mask.
    visible: Visibility.
    interpret: GPU interpret mode parameters or None.
  """
  kv_heads, group, head_dim = shape
  tokens, each = tile_tokens(group), ROWS // group
  slots, prefetch_depth = config.slots, config.prefetch_depth
  cycle = math.lcm(slots, WARPGROUPS)
  q_smem, k_smem, v_smem, norms_smem, q_ready, ready, free = scratch
  program = lax.axis_index("program")
  wg = lax.axis_index("wg")
  items = counts_ref.shape[0]
  rounds = lax.div(jnp.int32(items + programs - 1) - program, jnp.int32(programs))

  def row_of(index):
    """The tile of a round, counted through batches and KV heads."""
    item = jnp.minimum(program + index * programs, items - 1)
    return lax.div(item, jnp.int32(tiles)) * tiles + order_ref[item]

  def place(row):
    """batch, KV head and tile of a row."""
    head = lax.div(row, jnp.int32(tiles))
    return (lax.div(head, jnp.int32(kv_heads)), lax.rem(head, jnp.int32(kv_heads)),
            lax.rem(row, jnp.int32(tiles)))

  def steps_of(row):
    return jnp.maximum(counts_ref[row], max(prefetch_depth, own_steps))

  def spread(row):
    return lax.broadcast_in_dim(row, (ROWS, BLOCK), (0,))

  def widen(row):
    return lax.broadcast_in_dim(row, (ROWS, head_dim), (0,))

  def splat(value, layout, shape=(ROWS,)):
    return compat.cast(lax.broadcast_in_dim(value, shape, ()), layout, interpret)

  def iota(layout, shape, dim):
    return compat.cast(lax.broadcasted_iota(jnp.int32, shape, dim), layout, interpret)

  token = lax.div(iota(_ROW, (ROWS,), 0), splat(jnp.int32(group), _ROW))

  def boxes(row):
    """Pairs of (rows of shared, rows of device memory): a token's heads are side by side."""
    batch, kv, tile = place(row)
    heads = pl.ds(kv * group, group)
    for i in range(each):
      yield (wg, pl.ds(i * group, group)), (batch, tile * tokens + wg * each + i, heads)

  def load_queries(row):
    for shared, device in boxes(row):
      plgpu.copy_gmem_to_smem(q_ref.at[device], q_smem.at[shared], q_ready.at[wg])

  def wait_free(number):
    """Waits until all have passed the block whose slot the program's `number`-th takes."""
    plgpu.barrier_wait(free.at[lax.rem(number + (cycle - slots), jnp.int32(cycle))])

  def bring(number, row, position):
    """Starts the loads of a row's listed block, the program's `number`-th, if it is our turn."""
    @pl.when(lax.rem(number, jnp.int32(WARPGROUPS)) == wg)
    def _():
      batch, kv, _ = place(row)
      block = blocks_ref[row, position]
      slot = lax.rem(number, jnp.int32(slots))
      pl.when(number >= slots)(lambda: wait_free(number))
      for gmem, smem in ((k_ref, k_smem), (v_ref, v_smem)):
        plgpu.copy_gmem_to_smem(
          gmem.at[batch, pl.ds(block * BLOCK, BLOCK), kv], smem.at[slot], ready.at[slot])

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

  def hide_positions(scores, row, block):
    """The scores of a block with those of invisible positions masked."""
    batch, _, tile = place(row)
    offset = visible.offset if offset_ref is None else offset_ref[batch]
    position = token + splat(tile * tokens + wg * each + offset, _ROW)
    if visible.beyond:
      position = jnp.minimum(position, visible.num_keys - 1)
    see = spread(position) >= iota(_FULL, (ROWS, BLOCK), 1) + block * BLOCK
    return jnp.where(see, scores, MASKED)

  def hide_segments(scores, row, block):
    """The scores of a block with those of other segments masked."""
    batch, _, tile = place(row)
    theirs = compat.load(segment_ref.at[batch, pl.ds(block * BLOCK, BLOCK)], _COLUMN, interpret)
    theirs = lax.broadcast_in_dim(theirs, (ROWS, BLOCK), (1,))
    mine = spread(compat.load(row_segment_ref.at[batch, tile, wg], _ROW, interpret))
    return jnp.where((mine == theirs) & (mine != 0), scores, MASKED)

  def attend(state, queries, row, step, slot, mine, safe, masked):
    """One block of a subtile, some of whose tokens selected it: bits of `mine`."""
    acc, m, l = state
    scores = scores_of(queries, slot)
    if masked:
      scores = hide_positions(scores, row, blocks_ref[row, step])
      if segment_ref is not None:
        scores = hide_segments(scores, row, blocks_ref[row, step])
    bit = lax.bitwise_and(lax.shift_right_logical(splat(mine, _ROW), token), jnp.ones_like(token))
    selected = bit == 1

    def track(acc, m, l):
      m_block = scores.max(axis=1) * (scale * LOG2E)
      m_new = jnp.maximum(m, jnp.where(selected, m_block, M_FLOOR))
      alpha = jnp.exp2(m - m_new)
      l = l * lax.broadcast_in_dim(alpha, l.shape, (0,))
      return acc * widen(alpha), m_new, l

    acc, m, l = lax.cond(safe, lambda *state: state, track, acc, m, l)
    subtract = jnp.where(selected, m, -MASKED)
    weights = jnp.exp2(scores * (scale * LOG2E) - spread(subtract))
    for i in range(0, BLOCK, LANES):        # one sum a lane: their own sum waits for the tile's end
      l = l + weights[:, i:i + LANES]
    low = weights.astype(q_ref.dtype)
    acc, l, m, low = lax.optimization_barrier((acc, l, m, low))
    return add_values(acc, low, slot), m, l

  def finish(state, sink):
    """The normalised output and its log-sum-exp, the sink counted."""
    acc, m, l = state
    l = l.sum(axis=1)
    m_new = jnp.maximum(m, sink)
    alpha = jnp.exp2(m - m_new)
    l = l * alpha + jnp.exp2(sink - m_new)
    some = l > 0
    l = jnp.where(some, l, 1.0)
    lse = jnp.where(some, m_new * LN2 + jnp.log(l), EMPTY_LSE)
    return acc * widen(jnp.where(some, alpha / l, 0.0)), lse

  def run_tile(index, carry):
    base, row = carry
    steps = steps_of(row)
    following_row = row_of(index + 1)
    more = index + 1 < rounds
    queries = q_smem.at[wg]

    def run_step(step, carry, masked=False):
      """One step; `masked`: the plan's own steps, and with segments others that compare them."""
      state, word = carry
      number, target = base + step, step + prefetch_depth
      inside = target < steps

      @pl.when(inside | more)
      def _():
        bring(base + target, jnp.where(inside, row, following_row),
              jnp.where(inside, target, target - steps))
      slot = lax.rem(number, jnp.int32(slots))
      following = words_ref[row, jnp.minimum(step + 1, steps - 1)]
      plgpu.barrier_wait(ready.at[slot])
      mine = lax.bitwise_and(
        lax.shift_right_logical(word, wg * each), jnp.int32((1 << each) - 1))
      state = lax.cond(
        mine != 0,
        lambda *state: attend(state, queries, row, step, slot, mine, safe, masked),
        lambda *state: state, *state)
      plgpu.barrier_arrive(free.at[lax.rem(number, jnp.int32(cycle))])
      return state, following

    word = words_ref[row, 0]
    plgpu.barrier_wait(q_ready.at[wg])
    batch, kv, tile = place(row)
    safe = needs_no_maximum(
      queries, norms_smem.at[wg], key_ref[batch, kv], interpret)
    state = (splat(jnp.float32(0), _FULL, (ROWS, head_dim)),
             splat(jnp.where(safe, jnp.float32(0), jnp.float32(M_FLOOR)), _ROW),
             splat(jnp.float32(0), _FULL, (ROWS, LANES)))
    run_masked = functools.partial(run_step, masked=True)
    masked_steps, carry = own_steps, (state, word)
    if segment_ref is None:
      for step in range(own_steps):
        carry = run_masked(jnp.int32(step), carry)
    else:
      masked_steps = jnp.maximum(masked_ref[row], own_steps)
      carry = lax.fori_loop(0, masked_steps, run_masked, carry)
    state, _ = lax.fori_loop(masked_steps, steps, run_step, carry)
    out, lse = finish(state, compat.load(sink_ref.at[kv], _ROW, interpret))
    lse_ref[batch, kv, tile, wg] = lse
    q_smem[wg] = out.astype(q_ref.dtype)
    plgpu.commit_smem()
    for shared, device in boxes(row):
      plgpu.copy_smem_to_gmem(q_smem.at[shared], out_ref.at[device])
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    pl.when(more)(lambda: load_queries(following_row))
    return base + steps, following_row

  start = row_of(jnp.int32(0))
  load_queries(start)
  for number in range(prefetch_depth):
    bring(jnp.int32(number), start, jnp.int32(number))
  total, _ = lax.fori_loop(0, rounds, run_tile, (jnp.int32(0), start))
  for i in range(slots):                    # see every block passed before the program ends
    number = total + i

    @pl.when((lax.rem(number, jnp.int32(WARPGROUPS)) == wg) & (number >= slots))
    def _(number=number):
      wait_free(number)
  plgpu.wait_smem_to_gmem(0)


def split_forward(q, k, v, plan, visible, *, scale, sinks, config=None, interpret=None):
  """Attention over the hot selections of `plan`.

  Args:
    q: [B,T,N,H] bfloat16 or float16, T a multiple of 64, H 64 or 128, N / K 8 or 16.
    k: [B,S,K,H], S a multiple of 64.
    v: [B,S,K,H].
    plan: SelectionPlan whose tiles are `tile_tokens` long.
    visible: Visibility without a window.
    scale: of the logits.
    sinks: f32 [N] or None: they join the denominator.
    config: SplitConfig, None for its defaults.
    interpret: compat.InterpretGPUParams() to run on CPU.

  Returns:
    out [B,T,N,H], 0 where a row sees no hot key, and its natural lse f32 [B,T,N], `EMPTY_LSE` where
    there is no sink either.
  """
  config = config or SplitConfig()
  b, t, n, h = q.shape
  kv_heads = k.shape[2]
  group = n // kv_heads
  tokens, each = tile_tokens(group), ROWS // group
  tiles = t // tokens
  if (plan.config.tile_tokens, plan.config.list_multiple) != (tokens, 1):
    raise ValueError(f"plan: got tiles of {plan.config.tile_tokens} tokens in steps of "
                     f"{plan.config.list_multiple} blocks, want {tokens} and 1")
  sink_rows = jnp.full((n,), -jnp.inf, jnp.float32) if sinks is None else sinks * LOG2E
  sink_rows = jnp.tile(sink_rows.astype(jnp.float32).reshape(kv_heads, group), (1, each))
  extra = {}
  if visible.offsets is not None:
    extra["offset_ref"] = visible.offsets
  if visible.segment_ids is not None:
    extra["segment_ref"] = visible.kv_segment_ids
    extra["row_segment_ref"] = jnp.repeat(
      visible.segment_ids.reshape(b, tiles, WARPGROUPS, each), group, axis=-1)
    extra["masked_ref"] = visible.masked_steps(plan).reshape(-1)
  items = b * kv_heads * tiles
  least = max(config.prefetch_depth, plan.own_steps)      # steps that every tile runs
  lists = [jnp.pad(x.reshape(items, -1), ((0, 0), (0, max(0, least - x.shape[-1]))))
           for x in (plan.blocks, plan.words)]
  programs = min(config.programs, items)
  scratch = (
    hopper.swizzled((WARPGROUPS, ROWS, h), q.dtype, interpret),
    hopper.swizzled((config.slots, BLOCK, h), q.dtype, interpret),
    hopper.swizzled((config.slots, BLOCK, h), q.dtype, interpret),
    plgpu.SMEM((WARPGROUPS, ROWS), jnp.float32),
    plgpu.Barrier(num_arrivals=each, num_barriers=WARPGROUPS),
    plgpu.Barrier(num_arrivals=2, num_barriers=config.slots),
    plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=math.lcm(config.slots, WARPGROUPS)))

  def body(*refs):
    inputs, rest = refs[:9], refs[9 + len(extra):]
    given = dict.fromkeys(("offset_ref", "segment_ref", "row_segment_ref", "masked_ref"))
    given |= zip(extra, refs[9:])
    _split_kernel(*inputs, *given.values(), *rest[:2], rest[2:], shape=(kv_heads, group, h),
                  tiles=tiles, config=config, scale=scale, programs=programs,
                  own_steps=plan.own_steps, visible=visible, interpret=interpret)

  out, lse = compat.mosaic_gpu_kernel(
    body,
    out=(jax.ShapeDtypeStruct(q.shape, q.dtype),
         jax.ShapeDtypeStruct((b, kv_heads, tiles, WARPGROUPS, ROWS), jnp.float32)),
    scratch=scratch, interpret=interpret, grid=(programs,), grid_names=("program",),
    num_threads=WARPGROUPS, thread_name="wg",
    compiler_options={"unsafe_no_auto_barriers": not interpret, "reduction_scratch_bytes": 512},
  )(q, k, v, *lists, plan.counts.reshape(items), plan.order.reshape(items), sink_rows,
    largest_keys(k, scale, q.dtype), *extra.values())
  lse = jnp.swapaxes(lse.reshape(b, kv_heads, t, group), 1, 2)
  return out, lse.reshape(b, t, n)
