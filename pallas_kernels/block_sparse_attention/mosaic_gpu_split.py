"""Block-sparse attention forward for Hopper whose warpgroups skip what they did not pick.

For many query heads to a KV head: 64 rows of the tensor cores are 4 tokens x 16 heads, and what 4
tokens pick is little more than what each picks. A program takes 16 such tokens (8 x G = 8: 32) as
four subtiles of 64 rows, two to a consumer warpgroup. A producer warpgroup brings every block that
some token of the tile picked, once; a subtile multiplies the ones that its own tokens picked, and
passes over the others. So the tensor cores pay for unions of 4 tokens and the L2 cache for unions
of 16, and no pick needs the packed pass:

    out[t,n] = sum over blocks c picked by t, keys j <= t of c:  p v_j

With a `LocalBranch` the same program first attends to the window, parks that output in device
memory (its own thread reads it back, so no fence), and at the end gates and adds both:

    out = gate_sparse * out_sparse + gate_local * out_local

Elementwise gates travel through the same ring of shared memory as the keys and values.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import compat, hopper
from pallas_kernels.block_sparse_attention import mosaic_gpu as union

ROWS, BLOCK = union.ROWS, union.BLOCK
_LOW, _MASKED, _LOG2E = union._LOW, union._MASKED, union._LOG2E
_FULL, _ROW, _COLUMN = union._FULL, union._ROW, union._COLUMN
SUBTILES = 2                                # of a consumer warpgroup


@dataclasses.dataclass(frozen=True)
class SplitConfig:
  """Sizes of the split forward; the defaults are for H200 (measured: LOG.md)."""

  slots: int = 4                            # blocks of K and V in flight
  programs: int = 132                       # one a multiprocessor of an H100 or H200
  consumer_registers: int = 240
  producer_registers: int = 24
  order: str = "together"                   # of a warpgroup's two subtiles: turn, joint, together
  query_buffers: int = 1
  auto_barriers: bool = False

  def __post_init__(self):
    if not 2 <= self.slots <= 7 - 2 * self.query_buffers:
      raise ValueError(f"slots: got {self.slots}, want 2 to 5 (of 32 KiB, beside 64 KiB)")
    if 2 * self.consumer_registers + self.producer_registers > 504:
      raise ValueError(f"registers: got 2 x {self.consumer_registers} + "
                       f"{self.producer_registers}, want at most 504 (65,536 / 128)")


@dataclasses.dataclass(frozen=True)
class LocalBranch:
  """The window branch of a sparse layer.

  k, v [B,T,K,H]; sinks f32 [N] or None; gate_sparse, gate_local [B,T,N,H] in q's dtype or
  [B,T,N,1]; `keep`: store every tile's out_sparse, for a backward pass.
  """

  k: jax.Array
  v: jax.Array
  sinks: jax.Array | None
  window: int
  gate_sparse: jax.Array
  gate_local: jax.Array
  keep: bool


class SplitOutputs(NamedTuple):
  """What `split_forward` returns; the last three with a local branch only.

  out [B,T,N,H]: of the sparse branch, or with a local branch gated and summed. lse f32 [B,T,N]:
  of the sparse branch, base 2, -1e30 where a row sees no key. out_local [B,K,T,G,H] and lse_local
  f32 [B,T,N] before the gates; out_sparse [B,K,T,G,H]: undefined for tiles whose picks are all
  hot unless `keep`, None where neither that nor rare picks can occur.
  """

  out: jax.Array
  lse: jax.Array
  out_local: jax.Array | None = None
  lse_local: jax.Array | None = None
  out_sparse: jax.Array | None = None


def tile_tokens(group):
  """Tokens of a program's tile for `group` (8 or 16) query heads to a KV head."""
  return 2 * SUBTILES * ROWS // group


def _split_kernel(refs, scratch, *, shape, config, programs, scale, window, interpret):
  """The body: see the module. `shape` is (K, G, H); rows of a subtile are token-major.

  `refs` holds by name the operands and outputs, None where there is none. Consumers take the
  tile's queries themselves, as soon as the last output has left the buffer they share.
  """
  kv_heads, group, head_dim = shape
  tokens, each = tile_tokens(group), ROWS // group
  slots = config.slots
  q_smem, k_smem, v_smem, q_ready, ready, free, gates_ready = scratch
  local, elementwise = refs["k_local"] is not None, gates_ready is not None
  q_ref, out_ref, segment_ref = refs["q"], refs["out"], refs["segments"]
  dtype = q_ref.dtype
  batches, _, tiles = refs["lse"].shape[:3]
  program, wg = lax.axis_index("program"), lax.axis_index("wg")
  items = batches * kv_heads * tiles
  rounds = lax.div(jnp.int32(items + programs - 1) - program, jnp.int32(programs))
  window_blocks = (window + 62) // 64 + 1 if local else 0
  gate_items = 2 * SUBTILES if elementwise else 0

  def place(index):
    """batch, KV head and tile of a round."""
    item = jnp.minimum(program + index * programs, items - 1)
    head = lax.div(item, jnp.int32(tiles))
    batch, kv = lax.div(head, jnp.int32(kv_heads)), lax.rem(head, jnp.int32(kv_heads))
    return batch, kv, refs["order"][batch, kv, lax.rem(item, jnp.int32(tiles))]

  def own_block(tile):
    return lax.div(tile * tokens, jnp.int32(BLOCK))

  def windowed(tile):
    """Blocks of the window that exist."""
    return jnp.minimum(window_blocks, own_block(tile) + 1) if local else jnp.int32(0)

  def slot_of(item):
    return lax.rem(item, jnp.int32(slots))

  def spread(row):
    return lax.broadcast_in_dim(row, (ROWS, BLOCK), (0,))

  def widen(row):
    return lax.broadcast_in_dim(row, (ROWS, head_dim), (0,))

  def splat(value, layout, shape=(ROWS,)):
    return compat.cast(lax.broadcast_in_dim(value, shape, ()), layout, interpret)

  def iota(layout, shape, dim):
    return compat.cast(lax.broadcasted_iota(jnp.int32, shape, dim), layout, interpret)

  def token_boxes(at, sub, gmem, smem, barrier):
    """Copies rows of a subtile: the heads of one token are side by side."""
    batch, kv, tile = at
    for i in range(each):
      plgpu.copy_gmem_to_smem(
        gmem.at[batch, tile * tokens + sub * each + i, pl.ds(kv * group, group)],
        smem.at[pl.ds(i * group, group)], barrier)

  @pl.when(wg < 2)
  def _consume():
    plgpu.set_max_registers(config.consumer_registers, action="increase")
    token = lax.div(iota(_ROW, (ROWS,), 0), splat(jnp.int32(group), _ROW))
    subs = [wg * SUBTILES + s for s in range(SUBTILES)]

    now = {}

    def load_queries(at, buffer):
      for s, sub in enumerate(subs):
        token_boxes(at, sub, q_ref, q_smem.at[wg, buffer, s],
                    q_ready.at[wg * config.query_buffers + buffer])

    def scores_of(s, slot, at):
      if interpret:                         # interpret mode knows wgmma in part: plain products
        return jnp.dot(q_smem[wg, now["buffer"], s], k_smem[slot].T, preferred_element_type=jnp.float32)

      def run(acc):
        plgpu.wgmma(acc, q_smem.at[wg, now["buffer"], s], plgpu.transpose_ref(k_smem.at[slot], (1, 0)))
        return acc[...]
      return pl.run_scoped(run, plgpu.ACC((ROWS, BLOCK), jnp.float32))

    def add_values(acc, weights, slot):
      if interpret:
        return acc + jnp.dot(weights, v_smem[slot], preferred_element_type=jnp.float32)
      return pl.run_state(
        lambda ref: plgpu.wgmma(ref, weights, v_smem.at[slot]))(plgpu.ACC.init(acc))

    def weigh(scores, row_max, row_sum, at, s, block, word, masked, window):
      """Weights of a subtile's scores, the new (row_max, row_sum) and how the old ones shrink.

      word None: all tokens of the subtile picked the block.
      """
      batch, _, tile = at
      if masked or segment_ref is not None:
        row = token + splat(tile * tokens + subs[s] * each, _ROW)
        key = iota(_FULL, (ROWS, BLOCK), 1) + block * BLOCK
        visible = spread(row) >= key
        if window is not None:
          visible &= spread(row) < key + window
        if segment_ref is not None:
          theirs = compat.load(
            segment_ref.at[batch, pl.ds(block * BLOCK, BLOCK)], _COLUMN, interpret)
          mine = spread(compat.load(
            refs["row_segments"].at[batch, tile, subs[s]], _ROW, interpret))
          theirs = lax.broadcast_in_dim(theirs, (ROWS, BLOCK), (1,))
          visible &= (mine == theirs) & (mine != 0)
        scores = jnp.where(visible, scores, _MASKED)
      high = scores.max(axis=1) * (scale * _LOG2E)
      if word is None:
        subtract = new_max = jnp.maximum(row_max, high)
      else:
        bits = lax.shift_right_logical(word, subs[s] * each)
        bit = lax.shift_right_logical(splat(bits, _ROW), token)
        picked = lax.bitwise_and(bit, jnp.ones_like(bit)) == 1
        new_max = jnp.maximum(row_max, jnp.where(picked, high, _LOW))
        subtract = jnp.where(picked, new_max, -_MASKED)
      shrink = jnp.exp2(row_max - new_max)
      weights = jnp.exp2(scores * (scale * _LOG2E) - spread(subtract))
      return weights, new_max, row_sum * shrink + weights.sum(axis=1), shrink

    def attend(state, at, s, slot, *block):
      """One block of a subtile: scores, weights and the weighted values, in turn."""
      acc, row_max, row_sum = state
      weights, row_max, row_sum, shrink = weigh(
        scores_of(s, slot, at), row_max, row_sum, at, s, *block)
      acc, low = acc * widen(shrink), weights.astype(dtype)
      acc, row_sum, row_max, low = lax.optimization_barrier((acc, row_sum, row_max, low))
      return add_values(acc, low, slot), row_max, row_sum

    def attend_together(states, at, slot, *block):
      """One block of both subtiles, each stage of both before the next stage."""
      (acc0, max0, sum0), (acc1, max1, sum1) = states
      if interpret:
        scores = [scores_of(s, slot, at) for s in range(SUBTILES)]
      else:
        def products(first, second):
          keys = plgpu.transpose_ref(k_smem.at[slot], (1, 0))
          plgpu.wgmma(first, q_smem.at[wg, now["buffer"], 0], keys)
          plgpu.wgmma(second, q_smem.at[wg, now["buffer"], 1], keys)
          return first[...], second[...]

        scores = pl.run_scoped(products, *[plgpu.ACC((ROWS, BLOCK), jnp.float32)] * 2)
      weights0, max0, sum0, shrink0 = weigh(scores[0], max0, sum0, at, 0, *block)
      weights1, max1, sum1, shrink1 = weigh(scores[1], max1, sum1, at, 1, *block)
      acc0, acc1 = acc0 * widen(shrink0), acc1 * widen(shrink1)
      low0, low1 = weights0.astype(dtype), weights1.astype(dtype)
      acc0, acc1, low0, low1 = lax.optimization_barrier((acc0, acc1, low0, low1))
      if interpret:
        acc0, acc1 = add_values(acc0, low0, slot), add_values(acc1, low1, slot)
      else:
        def values(acc_refs):
          plgpu.wgmma(acc_refs[0], low0, v_smem.at[slot])
          plgpu.wgmma(acc_refs[1], low1, v_smem.at[slot])

        acc0, acc1 = pl.run_state(values)((plgpu.ACC.init(acc0), plgpu.ACC.init(acc1)))
      return (acc0, max0, sum0), (acc1, max1, sum1)

    def attend_both(states, at, slot, *block):
      """One block of both subtiles: the second's weights while the first's values are added."""
      if config.order == "together":
        return attend_together(states, at, slot, *block)
      if interpret:
        return tuple(attend(state, at, s, slot, *block) for s, state in enumerate(states))
      (acc0, max0, sum0), (acc1, max1, sum1) = states
      weights, max0, sum0, shrink = weigh(scores_of(0, slot, at), max0, sum0, at, 0, *block)
      acc0, low = acc0 * widen(shrink), weights.astype(dtype)
      acc0, sum0, max0, low = lax.optimization_barrier((acc0, sum0, max0, low))

      def run(state_refs):
        acc_ref, max_ref, sum_ref, shrink_ref, weights_ref = state_refs

        def products(scores_ref):
          plgpu.wgmma(scores_ref, q_smem.at[wg, now["buffer"], 1], plgpu.transpose_ref(k_smem.at[slot], (1, 0)))
          plgpu.wgmma(acc_ref, low, v_smem.at[slot])
          return plgpu.wgmma_accumulator_load(scores_ref, wait_n=1)

        scores = pl.run_scoped(products, plgpu.ACC((ROWS, BLOCK), jnp.float32))
        weights_ref[...], max_ref[...], sum_ref[...], shrink_ref[...] = weigh(
          scores, max_ref[...], sum_ref[...], at, 1, *block)

      acc0, max1, sum1, shrink, weights = pl.run_state(run)(
        (plgpu.ACC.init(acc0), max1, sum1, sum1, splat(jnp.float32(0), _FULL, (ROWS, BLOCK))))
      acc1 = add_values(acc1 * widen(shrink), weights.astype(dtype), slot)
      return (acc0, max0, sum0), (acc1, max1, sum1)

    def nothing():
      return tuple((splat(jnp.float32(0), _FULL, (ROWS, head_dim)),
                    splat(jnp.float32(_LOW), _ROW), splat(jnp.float32(0), _ROW))
                   for _ in range(SUBTILES))

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

    def run_window(at, base):
      sink = compat.load(refs["sink_local"].at[at[1]], _ROW, interpret)

      def step(i, states):
        slot = slot_of(base + i)
        plgpu.barrier_wait(ready.at[slot])
        block = own_block(at[2]) - i, None, True, window
        if config.order != "turn":
          states = attend_both(states, at, slot, *block)
        else:
          states = tuple(attend(state, at, s, slot, *block) for s, state in enumerate(states))
        plgpu.barrier_arrive(free.at[slot])
        return states

      states = lax.fori_loop(0, windowed(at[2]), step, nothing())
      for s, state in enumerate(states):
        out, lse = finish(state, sink)
        refs["out_local"][(*at, subs[s])] = out.astype(dtype)
        refs["lse_local"][(*at, subs[s])] = lse

    def run_picks(at, base, steps, block, word, then):
      def step(i, carry, masked=False):
        states, block, word = carry
        slot = slot_of(base + i)
        following = jnp.minimum(i + 1, steps - 1)
        following = refs["blocks"][(*at, following)], refs["words"][(*at, following)]
        plgpu.barrier_wait(ready.at[slot])
        block_args = at, slot, block, word, masked, None
        any_picked = [
          lax.bitwise_and(lax.shift_right_logical(word, sub * each),
                          jnp.int32((1 << each) - 1)) != 0 for sub in subs]
        only = lambda states, s: tuple(
          attend(state, at, s, slot, *block_args[2:]) if i == s else state
          for i, state in enumerate(states))
        if config.order != "turn" and not masked:
          which = any_picked[0].astype(jnp.int32) + 2 * any_picked[1].astype(jnp.int32)
          states = lax.switch(
            which, [lambda *states: states, lambda *states: only(states, 0),
                    lambda *states: only(states, 1),
                    lambda *states: attend_both(states, *block_args)], *states)
        else:
          for s, picked in enumerate(any_picked):
            states = lax.cond(
              picked, lambda *states, s=s: only(states, s), lambda *states: states, *states)
        plgpu.barrier_arrive(free.at[slot])
        return (states, *following)

      carry = step(jnp.int32(0), (nothing(), block, word), masked=True)
      then()
      return lax.fori_loop(1, steps, step, carry)[0]

    def gated(out, at, s, base):
      """out_sparse -> the layer's output, once the subtile's gates are there."""
      parked = compat.load(refs["out_local"].at[(*at, subs[s])], _FULL, interpret)
      parked = parked.astype(jnp.float32)
      if not elementwise:
        row = lambda name: widen(compat.load(refs[name].at[(*at, subs[s])], _ROW, interpret))
        return out * row("gate_sparse") + parked * row("gate_local")
      slot = slot_of(base + subs[s])
      plgpu.barrier_wait(gates_ready.at[subs[s]])
      read = lambda smem: compat.cast(smem[slot].astype(jnp.float32), _FULL, interpret)
      return out * read(k_smem) + parked * read(v_smem)

    def pass_over(base, mine):
      """Frees the other warpgroup's gates; not before they came, or a slot's phase is skipped."""
      if gate_items:
        @pl.when(wg == mine)
        def _():
          for sub in range((1 - mine) * SUBTILES, (2 - mine) * SUBTILES):
            plgpu.barrier_wait(gates_ready.at[sub])
            plgpu.barrier_arrive(free.at[slot_of(base + sub)])

    def run_tile(index, carry):
      base, batch, kv, tile, steps, block, word = carry
      at = batch, kv, tile
      following_tile = read_tile(index + 1)
      buffers = config.query_buffers
      buffer = now["buffer"] = lax.rem(index, jnp.int32(buffers))
      sink = compat.load(refs["sink"].at[kv], _ROW, interpret)
      plgpu.barrier_wait(q_ready.at[wg * buffers + buffer])
      if local:
        run_window(at, base)
        base = base + windowed(tile)

      def load_following():
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        @pl.when(index + 1 < rounds)
        def _():
          load_queries(following_tile[:3], lax.rem(index + 1, jnp.int32(buffers)))

      states = run_picks(at, base, steps, block, word,
                         load_following if buffers == 2 else lambda: None)
      base = base + steps
      pass_over(base, 1)
      for s, state in enumerate(states):
        out, lse = finish(state, sink)
        refs["lse"][(*at, subs[s])] = lse
        if refs["store"] is not None:
          @pl.when(refs["store"][at] != 0)
          def _(out=out, s=s):
            refs["out_sparse"][(*at, subs[s])] = out.astype(dtype)
        if local:
          out = gated(out, at, s, base)
          if elementwise:
            plgpu.barrier_arrive(free.at[slot_of(base + subs[s])])
        q_smem[wg, buffer, s] = out.astype(dtype)
      plgpu.commit_smem()
      for s, sub in enumerate(subs):
        for i in range(each):
          plgpu.copy_smem_to_gmem(
            q_smem.at[wg, buffer, s, pl.ds(i * group, group)],
            out_ref.at[batch, tile * tokens + sub * each + i, pl.ds(kv * group, group)])
      if buffers == 1:
        load_following()
      pass_over(base, 0)
      return (base + gate_items,) + following_tile

    def read_tile(index):
      at = place(index)
      return (*at, refs["counts"][at], refs["blocks"][(*at, 0)], refs["words"][(*at, 0)])

    first = read_tile(jnp.int32(0))
    load_queries(first[:3], 0)
    lax.fori_loop(0, rounds, run_tile, (jnp.int32(0),) + first)
    plgpu.wait_smem_to_gmem(0)

  @pl.when(wg == 2)
  def _produce():
    plgpu.set_max_registers(config.producer_registers, action="decrease")

    def take(item):
      """The slot of an item of the ring, once the item before it there was consumed."""
      slot = slot_of(item)

      @pl.when(item >= slots)
      def _():
        plgpu.barrier_wait(free.at[slot])

      if not interpret:                     # no warp may fall behind by two phases of a barrier
        hopper.named_barrier_sync(8, 128)
      return slot

    def bring(item, k_ref, v_ref, batch, kv, block):
      slot = take(item)
      for gmem, smem in ((k_ref, k_smem), (v_ref, v_smem)):
        plgpu.copy_gmem_to_smem(
          gmem.at[batch, pl.ds(block * BLOCK, BLOCK), kv], smem.at[slot], ready.at[slot])

    def load_tile(index, carry):
      base, batch, kv, tile, steps, block = carry
      at = batch, kv, tile
      following_tile = read_tile(index + 1)
      if local:
        def bring_window(i, _):
          bring(base + i, refs["k_local"], refs["v_local"], batch, kv, own_block(tile) - i)
          return _
        lax.fori_loop(0, windowed(tile), bring_window, jnp.int32(0))
        base = base + windowed(tile)

      def bring_block(step, block):
        following = refs["blocks"][(*at, jnp.minimum(step + 1, steps - 1))]
        bring(base + step, refs["k"], refs["v"], batch, kv, block)
        return following

      lax.fori_loop(0, steps, bring_block, block)
      base = base + steps
      for sub in range(gate_items):
        slot = take(base + sub)
        for name, smem in (("gate_sparse", k_smem), ("gate_local", v_smem)):
          token_boxes(at, sub, refs[name], smem.at[slot], gates_ready.at[sub])
      return (base + gate_items,) + following_tile

    def read_tile(index):
      at = place(index)
      return (*at, refs["counts"][at], refs["blocks"][(*at, 0)])

    total, *_ = lax.fori_loop(
      0, rounds, load_tile, (jnp.int32(0),) + read_tile(jnp.int32(0)))
    for slot in range(slots):               # see every load consumed before the program ends
      @pl.when(slot < total)
      def _(slot=slot):
        plgpu.barrier_wait(free.at[slot])


def split_forward(q, k, v, plan, *, scale, sinks=None, segment_ids=None, local=None, config=None,
                  interpret=None):
  """Attention over the hot picks of `plan`, whose tiles are `tile_tokens` long -> SplitOutputs.

  q [B,T,N,H], k, v [B,T,K,H] bf16 or f16, H 64 or 128, N / K 8 or 16; sinks f32 [N] join the
  denominator; `local`: a LocalBranch. `interpret`: compat.InterpretGPUParams() to run on CPU.
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

  def sink_rows(sinks):
    rows = jnp.full((n,), -jnp.inf, jnp.float32) if sinks is None else sinks * _LOG2E
    rows = jnp.tile(rows.astype(jnp.float32).reshape(kv_heads, 1, group),
                    (1, each, 1))
    return rows.reshape(kv_heads, ROWS)

  def rows_of(x):
    """[B,T,N] -> [B,K,L,subtiles,64], as the kernel's rows run."""
    x = jnp.swapaxes(x.reshape(b, t, kv_heads, group), 1, 2)
    return x.reshape(b, kv_heads, tiles, subtiles, ROWS)

  def by_token(x):
    """The inverse of `rows_of`."""
    return jnp.swapaxes(x.reshape(b, kv_heads, t, group), 1, 2).reshape(b, t, n)

  operands = dict(q=q, k=k, v=v, blocks=plan.blocks, words=plan.words, counts=plan.counts,
                  order=plan.order, sink=sink_rows(sinks))
  if segment_ids is not None:
    operands["segments"] = segment_ids
    operands["row_segments"] = jnp.repeat(
      segment_ids.reshape(b, tiles, subtiles, each), group, axis=-1)
  rows = (b, kv_heads, tiles, subtiles, ROWS)
  outputs = dict(out=jax.ShapeDtypeStruct(q.shape, q.dtype),
                 lse=jax.ShapeDtypeStruct(rows, jnp.float32))
  elementwise = local is not None and local.gate_sparse.shape[-1] != 1
  if local is not None:
    gates = local.gate_sparse, local.gate_local
    if not elementwise:
      gates = [rows_of(gate[..., 0].astype(jnp.float32)) for gate in gates]
    operands |= dict(k_local=local.k, v_local=local.v, sink_local=sink_rows(local.sinks),
                     gate_sparse=gates[0], gate_local=gates[1])
    outputs |= dict(out_local=jax.ShapeDtypeStruct((*rows, h), q.dtype),
                    lse_local=jax.ShapeDtypeStruct(rows, jnp.float32))
    if local.keep or plan.config.has_rare:
      store = (plan.rare.reshape(b, kv_heads, tiles, tokens) > 0).any(-1) | local.keep
      operands["store"] = store.astype(jnp.int32)
      outputs["out_sparse"] = jax.ShapeDtypeStruct((*rows, h), q.dtype)
  programs = min(config.programs, b * kv_heads * tiles)
  scratch = (
    hopper.swizzled((2, config.query_buffers, SUBTILES, ROWS, h), q.dtype, interpret),
    hopper.swizzled((config.slots, BLOCK, h), q.dtype, interpret),
    hopper.swizzled((config.slots, BLOCK, h), q.dtype, interpret),
    plgpu.Barrier(num_arrivals=SUBTILES * each, num_barriers=2 * config.query_buffers),
    plgpu.Barrier(num_arrivals=2, num_barriers=config.slots),
    plgpu.Barrier(num_arrivals=2, num_barriers=config.slots))
  if elementwise:
    scratch += (plgpu.Barrier(num_arrivals=2 * each, num_barriers=subtiles),)

  def body(*given):
    refs = dict.fromkeys(("k_local", "segments", "store"))
    refs |= dict(zip((*operands, *outputs), given))
    rest = given[len(operands) + len(outputs):]
    _split_kernel(refs, rest if elementwise else (*rest, None), shape=(kv_heads, group, h),
                  config=config, programs=programs, scale=scale,
                  window=None if local is None else local.window, interpret=interpret)

  results = compat.mosaic_gpu_kernel(
    body, out=tuple(outputs.values()), scratch=scratch, interpret=interpret, grid=(programs,),
    grid_names=("program",), num_threads=3, thread_name="wg",
    compiler_options={"unsafe_no_auto_barriers": not interpret and not config.auto_barriers},
  )(*operands.values())
  got = dict(zip(outputs, results))
  for name in ("lse", "lse_local"):
    if name in got:
      got[name] = by_token(got[name])
  for name in ("out_local", "out_sparse"):
    if name in got:
      got[name] = got[name].reshape(b, kv_heads, t, group, h)
  return SplitOutputs(**got)
