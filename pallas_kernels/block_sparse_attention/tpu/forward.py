"""Block-sparse attention on TPU, forward: tiles of queries against the union of their blocks.

Scores are kept transposed, keys in sublanes and (token, head) rows in lanes: the softmax reduces
over sublanes, membership is one [1,R] row a block, and log-sum-exp comes out in lanes. One KV
head's keys and values stay in VMEM and are sliced by block number.

    body w:   scores of body w + 1      (matrix units; or fewer steps ahead, see `ListWalk.loop`)
              softmax of body w         (vector units, meanwhile)
              values of body w          (matrix units, as weights become ready)

Each tile has its running maximum, sum and accumulator in VMEM, because a body mixes tiles. Keys
beyond VMEM come in segments, one launch each, which hand on the three: the softmax goes on where
it stopped, so the result is that of one pass.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.block_sparse_attention.tpu import schedule
from pallas_kernels.block_sparse_attention.tpu.schedule import f32
from pallas_kernels.softmax import EMPTY_LSE, INITIAL_MAX, LN2
from pallas_kernels.tpu import dot

STATE = ("acc", "m", "l")     # f32 [tiles+1, E, R], [tiles+1, 8, R] twice: l in eight partial sums


def _attend(refs, walk, state, scores, dtype):
  """Softmax and values of one step: updates the tile's running maximum, sum and accumulator."""
  sizes, tile = walk.sizes, state[0]
  entries = walk.entries(state)
  scores = walk.masked(scores, tile, entries)
  biases = walk.biases(entries)
  m = scores[0].max(0) + biases[0]
  for s, bias in zip(scores[1:], biases[1:]):
    m = jnp.maximum(m, s.max(0) + bias)
  m_before = refs.m[tile]
  m = jnp.maximum(m_before, jnp.broadcast_to(m.max(0, keepdims=True), m_before.shape))
  refs.m[tile] = m
  alpha = jnp.exp2(m_before - m)
  weights = [jnp.exp2(s + (bias - m)[None]) for s, bias in zip(scores, biases)]
  refs.l[tile] = refs.l[tile] * alpha + sum(w.sum(0) for w in weights)
  weights = [w.reshape(sizes.block_size, sizes.rows).astype(dtype) for w in weights]
  values = dot(walk.keys(refs.v, entries), jnp.concatenate(weights, axis=0), (0, 0))
  acc = refs.acc[tile].reshape(-1, 8, sizes.rows) * alpha[None]
  refs.acc[tile] = acc.reshape(values.shape) + values


def _start(refs, walk):
  """A tile's state before its first key: nothing, its sinks, or what an earlier launch left."""
  tiles = walk.config.tiles_per_program
  if hasattr(refs, "acc_in"):
    for name in STATE:
      getattr(refs, name)[:tiles] = getattr(refs, name + "_in")[0, 0]
      getattr(refs, name)[tiles] = jnp.zeros_like(getattr(refs, name)[tiles])
    return
  shape = refs.m.shape
  refs.acc[...] = jnp.zeros_like(refs.acc)
  if not hasattr(refs, "sinks"):
    refs.m[...] = jnp.full(shape, INITIAL_MAX, jnp.float32)
    refs.l[...] = jnp.zeros(shape, jnp.float32)
    return
  sinks = refs.sinks[0]                                    # [1,R]
  m = jnp.maximum(sinks, INITIAL_MAX)
  one_row = lax.broadcasted_iota(jnp.int32, shape[1:], 0) == 0
  refs.m[...] = jnp.broadcast_to(m[None], shape)
  refs.l[...] = jnp.broadcast_to(jnp.where(one_row, jnp.exp2(sinks - m), 0.0)[None], shape)


def normalized(acc, m, row_sum):
  """(acc [E,R] over the row sums, natural log-sum-exp [1,R]) of maxima [1,R] and sums [1,R].

  A row that saw nothing has 0 and `EMPTY_LSE`.
  """
  seen = row_sum > 0
  row_sum = jnp.where(seen, row_sum, 1.0)
  lse = jnp.where(seen, (m + jnp.log2(row_sum)) * LN2, EMPTY_LSE)
  return acc * jnp.where(seen, 1.0 / row_sum, 0.0), lse


def _finish(refs, walk, epilogue):
  """Writes the results of a program's tiles, or their state for the next segment of the keys."""
  tiles, rows = walk.config.tiles_per_program, walk.sizes.rows
  if hasattr(refs, "acc_out"):
    for name in STATE:
      getattr(refs, name + "_out")[0, 0] = getattr(refs, name)[:tiles]
    return

  together = 1 if epilogue is None else math.gcd(tiles, epilogue.together)

  @pl.loop(0, tiles, unroll=together)
  def _(tile):
    out, lse = normalized(refs.acc[tile], refs.m[tile][:1],
                          refs.l[tile].sum(0, keepdims=True))
    refs.lse[0, 0, pl.ds(tile, 1), :] = lse
    at = pl.ds(pl.multiple_of(tile * rows, rows), rows)
    if epilogue is not None:
      epilogue.finish(refs, walk, tile, at, out)
    else:
      refs.out[0, at, :] = out.T.astype(refs.out.dtype)


def _kernel(refs, config, sizes, epilogue):
  walk = schedule.ListWalk(refs, config, sizes)

  def scores(state):
    entries = walk.entries(state)
    return (dot(walk.keys(refs.k, entries), walk.rows(refs.q, state[0]), (1, 1)),)

  _start(refs, walk)
  if epilogue is not None:
    epilogue.start(refs)
  walk.loop((refs.scores,), scores, lambda state, s: _attend(refs, walk, state, s, refs.v.dtype))
  _finish(refs, walk, epilogue)


def _state_specs(tiles, shapes):
  return {name: pl.BlockSpec((1, 1, tiles, *shape), lambda h, c: (h, c, 0, 0, 0))
          for name, shape in shapes.items()}


def forward(q, k, v, plan, config, *, segment_blocks, sinks=None, segment_ids=None,
            kv_segment_ids=None, epilogue=None, interpret=False, vmem_limit=None):
  """Attention of each row over its tile's list.

  Args:
    q: [B*K, T'*G', H] rows (`schedule.to_rows`), times scale * log2(e); T' whole programs.
    k: [B*K, S, H], S whole segments; v: [B*K, S, E].
    plan: TilePlan; config: LoopConfig that fits it.
    segment_blocks: blocks of keys resident in VMEM.
    sinks: f32 [K,G'] times log2(e), or None.
    segment_ids: i32 [B,T] or None.
    kv_segment_ids: i32 [B,S] or None; given with segment_ids.
    epilogue: what finishes a tile in the last launch instead of writing `out`; see the op
      `sparse_layer_attention`.

  Returns:
    {"out": [B*K, T'*G', E] in v's dtype, "lse": f32 [B*K, C, tiles, R], natural}, or the
    epilogue's outputs with lse.
  """
  heads, _, width = v.shape
  kv_heads, tiles = plan.counts.shape[1], config.tiles_per_program
  programs = -(-plan.counts.shape[-1] // tiles)
  state = None
  for last, sizes, operands in schedule.launches(
      q, k, v, plan, config, segment_blocks, segment_ids, kv_segment_ids):
    rows = sizes.rows
    shapes = {"acc": (width, rows), "m": (8, rows), "l": (8, rows)}
    specs = _state_specs(tiles, shapes)
    if state is not None:
      operands |= {f"{name}_in": (state[f"{name}_out"], specs[name]) for name in STATE}
    elif sinks is not None:
      lanes = jnp.tile(sinks, (1, sizes.tile_tokens))[:, None]
      operands["sinks"] = lanes, pl.BlockSpec((1, 1, rows), lambda h, c: (h % kv_heads, 0, 0))
    scratch = {"scores": pltpu.VMEM(
      (config.steps_per_body, config.blocks_per_step * sizes.block_size, rows), jnp.float32)}
    scratch |= {name: pltpu.VMEM((tiles + 1, *shape), jnp.float32)
                for name, shape in shapes.items()}
    if not last:
      outputs = {f"{name}_out": (f32(heads, programs, tiles, *shapes[name]), specs[name])
                 for name in STATE}
      aliases = {f"{name}_in": f"{name}_out" for name in STATE} if state is not None else None
    else:
      aliases = None
      outputs = {"lse": (f32(heads, programs, tiles, rows),
                         schedule.program_lanes(config, sizes))}
      if epilogue is None:
        outputs["out"] = (jax.ShapeDtypeStruct((*q.shape[:2], width), v.dtype),
                          schedule.program_rows(config, sizes, width))
      else:
        operands |= epilogue.operands(config, sizes)
        outputs |= epilogue.outputs(config, sizes)
        scratch |= epilogue.scratch(config, sizes)
    state = schedule.call(
      lambda refs, sizes=sizes, last=last: _kernel(
        refs, config, sizes, epilogue if last else None),
      "block_sparse_forward" if last else "block_sparse_forward_part",
      operands, outputs, scratch, (heads, programs), interpret=interpret,
      vmem_limit=vmem_limit, aliases=aliases)
  return state
