"""Block-sparse attention forward for Hopper whose warpgroups skip what they did not pick.

For 16 query heads to a KV head: 64 rows of the tensor cores are 4 tokens x 16 heads, and what 4
tokens pick is little more than what each picks. A program takes 16 tokens as four subtiles of 64
rows, one to a warpgroup. Every block that is hot in the tile (`index_plan.py`) is brought once;
a warpgroup multiplies the ones that its own tokens picked and passes over the others. So the
tensor cores pay for unions of 4 tokens, and the L2 cache for unions of 16:

    out[t,n] = sum over blocks c hot in the tile with t in members(c), keys j <= t of c:  p v_j

Four warpgroups out of step with each other keep the tensor cores busy, so none of them overlaps
its own products with its own softmax, and 128 registers a thread hold what it needs. They take
turns at starting the loads: a warpgroup for producing alone would leave the others 112.

Where |q| |k| bounds every score of a subtile by _SAFE (in base 2), weights are exp2(score): float32
sums neither overflow nor vanish, and the softmax needs no maximum. Other subtiles keep a running
maximum. bfloat16 weights have float32's range; float16 always keeps the maximum.

Rows of a subtile that did not pick a block are masked as in mosaic_gpu.py, by what they subtract.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import compat, hopper
from pallas_kernels.block_sparse_attention.gpu import forward as union

ROWS, BLOCK = union.ROWS, union.BLOCK
_LOW, _MASKED, _LOG2E = union._LOW, union._MASKED, union._LOG2E
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
  ahead: int = 2                            # steps from the start of a block's loads to its own
  programs: int = 132                       # one a multiprocessor of an H100 or H200

  def __post_init__(self):
    if self.slots not in (2, 3, 4, 5):
      raise ValueError(f"slots: got {self.slots}, want 2 to 5")
    if not 0 < self.ahead < self.slots:
      raise ValueError(f"ahead: got {self.ahead}, want 1 to {self.slots - 1}, one less than slots")


def tile_tokens(group):
  """Tokens of a program's tile for `group` query heads to a KV head, 8 or 16."""
  return WARPGROUPS * ROWS // group


def largest_keys(k, scale, dtype):
  """f32 [B,K]: the largest |k|^2 of k [B,T,K,H] in units of squared base-2 scores per |q|^2.

  Infinite for float16 weights, of which 2 ** 16 overflows: no score is small enough then.
  """
  if dtype == jnp.float16:
    return jnp.full((k.shape[0], k.shape[2]), jnp.inf, jnp.float32)
  return (k.astype(jnp.float32) ** 2).sum(-1).max(1) * (scale * _LOG2E) ** 2


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
                  key_ref, segment_ref, row_segment_ref, out_ref, lse_ref, scratch, *, shape,
                  tiles, config, programs, scale, interpret):
  """The body: see the module. `shape` is (K, G, H); rows of a subtile are token-major.

  A program runs tiles program, program + programs, ... and numbers their listed blocks through.
  Block i takes slot i % slots, and warpgroup i % 4 starts its loads when it is `ahead` blocks away
  itself, once all have passed block i - slots. `free` has more barriers than slots, so that each
  is waited for by one warpgroup, at each of its phases.
  """
  kv_heads, group, head_dim = shape
  tokens, each = tile_tokens(group), ROWS // group
  slots, ahead = config.slots, config.ahead
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
    return jnp.maximum(counts_ref[row], ahead)

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

  def visible(row, block):
    batch, _, tile = place(row)
    position = token + splat(tile * tokens + wg * each, _ROW)
    see = spread(position) >= iota(_FULL, (ROWS, BLOCK), 1) + block * BLOCK
    if segment_ref is not None:
      theirs = compat.load(
        segment_ref.at[batch, pl.ds(block * BLOCK, BLOCK)], _COLUMN, interpret)
      theirs = lax.broadcast_in_dim(theirs, (ROWS, BLOCK), (1,))
      mine = spread(compat.load(row_segment_ref.at[batch, tile, wg], _ROW, interpret))
      see &= (mine == theirs) & (mine != 0)
    return see

  def attend(state, queries, row, step, slot, mine, safe, first):
    """One block of a subtile, some of whose tokens picked it: bits of `mine`."""
    acc, row_max, row_sum = state
    scores = scores_of(queries, slot)
    if first or segment_ref is not None:
      scores = jnp.where(visible(row, blocks_ref[row, step]), scores, _MASKED)
    bit = lax.bitwise_and(lax.shift_right_logical(splat(mine, _ROW), token), jnp.ones_like(token))
    picked = bit == 1

    def track(acc, row_max, row_sum):
      high = scores.max(axis=1) * (scale * _LOG2E)
      new_max = jnp.maximum(row_max, jnp.where(picked, high, _LOW))
      shrink = jnp.exp2(row_max - new_max)
      row_sum = row_sum * lax.broadcast_in_dim(shrink, row_sum.shape, (0,))
      return acc * widen(shrink), new_max, row_sum

    acc, row_max, row_sum = lax.cond(safe, lambda *state: state, track, acc, row_max, row_sum)
    subtract = jnp.where(picked, row_max, -_MASKED)
    weights = jnp.exp2(scores * (scale * _LOG2E) - spread(subtract))
    for i in range(0, BLOCK, LANES):        # one sum a lane: their own sum waits for the tile's end
      row_sum = row_sum + weights[:, i:i + LANES]
    low = weights.astype(q_ref.dtype)
    acc, row_sum, row_max, low = lax.optimization_barrier((acc, row_sum, row_max, low))
    return add_values(acc, low, slot), row_max, row_sum

  def finish(state, sink):
    """The normalised output and its log-sum-exp, the sink counted."""
    acc, row_max, row_sum = state
    row_sum = row_sum.sum(axis=1)
    new_max = jnp.maximum(row_max, sink)
    shrink = jnp.exp2(row_max - new_max)
    row_sum = row_sum * shrink + jnp.exp2(sink - new_max)
    some = row_sum > 0
    safe = jnp.where(some, row_sum, 1.0)
    lse = jnp.where(some, new_max + jnp.log(safe) * _LOG2E, _MASKED)
    return acc * widen(jnp.where(some, shrink / safe, 0.0)), lse

  def run_tile(index, carry):
    base, row = carry
    steps = steps_of(row)
    following_row = row_of(index + 1)
    more = index + 1 < rounds
    queries = q_smem.at[wg]

    def run_step(step, carry, first=False):
      state, word = carry
      number, target = base + step, step + ahead
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
        lambda *state: attend(state, queries, row, step, slot, mine, safe, first),
        lambda *state: state, *state)
      plgpu.barrier_arrive(free.at[lax.rem(number, jnp.int32(cycle))])
      return state, following

    word = words_ref[row, 0]
    plgpu.barrier_wait(q_ready.at[wg])
    batch, kv, tile = place(row)
    safe = needs_no_maximum(
      queries, norms_smem.at[wg], key_ref[batch, kv], interpret)
    state = (splat(jnp.float32(0), _FULL, (ROWS, head_dim)),
             splat(jnp.where(safe, jnp.float32(0), jnp.float32(_LOW)), _ROW),
             splat(jnp.float32(0), _FULL, (ROWS, LANES)))
    carry = run_step(jnp.int32(0), (state, word), first=True)
    state, _ = lax.fori_loop(1, steps, run_step, carry)
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
  for number in range(ahead):
    bring(jnp.int32(number), start, jnp.int32(number))
  total, _ = lax.fori_loop(0, rounds, run_tile, (jnp.int32(0), start))
  for i in range(slots):                    # see every block passed before the program ends
    number = total + i

    @pl.when((lax.rem(number, jnp.int32(WARPGROUPS)) == wg) & (number >= slots))
    def _(number=number):
      wait_free(number)
  plgpu.wait_smem_to_gmem(0)


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
  tiles = t // tokens
  if (plan.config.tile_tokens, plan.config.list_multiple) != (tokens, 1):
    raise ValueError(f"plan: got tiles of {plan.config.tile_tokens} tokens in steps of "
                     f"{plan.config.list_multiple} blocks, want {tokens} and 1")
  sink_rows = jnp.full((n,), -jnp.inf, jnp.float32) if sinks is None else sinks * _LOG2E
  sink_rows = jnp.tile(sink_rows.astype(jnp.float32).reshape(kv_heads, group), (1, each))
  segments = ()
  if segment_ids is not None:
    row_segments = jnp.repeat(segment_ids.reshape(b, tiles, WARPGROUPS, each), group, axis=-1)
    segments = (segment_ids, row_segments)
  items = b * kv_heads * tiles
  lists = [jnp.pad(x.reshape(items, -1), ((0, 0), (0, max(0, config.ahead - x.shape[-1]))))
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
    inputs, rest = refs[:9], refs[9 + len(segments):]
    segment_refs = refs[9:9 + len(segments)] or (None, None)
    _split_kernel(*inputs, *segment_refs, *rest[:2], rest[2:], shape=(kv_heads, group, h),
                  tiles=tiles, config=config, programs=programs, scale=scale,
                  interpret=interpret)

  out, lse = compat.mosaic_gpu_kernel(
    body,
    out=(jax.ShapeDtypeStruct(q.shape, q.dtype),
         jax.ShapeDtypeStruct((b, kv_heads, tiles, WARPGROUPS, ROWS), jnp.float32)),
    scratch=scratch, interpret=interpret, grid=(programs,), grid_names=("program",),
    num_threads=WARPGROUPS, thread_name="wg",
    compiler_options={"unsafe_no_auto_barriers": not interpret, "reduction_scratch_bytes": 512},
  )(q, k, v, *lists, plan.counts.reshape(items), plan.order.reshape(items), sink_rows,
    largest_keys(k, scale, q.dtype), *segments)
  lse = jnp.swapaxes(lse.reshape(b, kv_heads, t, group), 1, 2)
  return out, lse.reshape(b, t, n)
