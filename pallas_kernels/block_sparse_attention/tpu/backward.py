"""Block-sparse attention on TPU, backward: one pass, five products, no atomics.

A TPU core runs a head's programs in order, so the gradients of its keys and values are plain sums
in VMEM, float32, read and written block by block in the order of the lists: the same bits on
every run. Segments of the keys are independent, because the final log-sum-exp is known; only the
queries' gradient is handed on from one to the next.

    body w:   scores and dP of body w + 1                  (matrix units)
              P, dS of body w                              (vector units, meanwhile)
              dV += P dO, dK += dS Q, dQ += K dS of body w (matrix units)
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.block_sparse_attention.tpu import schedule
from pallas_kernels.block_sparse_attention.tpu.schedule import f32
from pallas_kernels.tpu import dot


def _accumulate(refs, walk, state, scores, dweights, dtype):
  """Adds one step to the gradients."""
  sizes, tile = walk.sizes, state[0]
  size = sizes.block_size
  entries = walk.entries(state)
  scores = walk.masked(scores, tile, entries)
  lse, delta = walk.lanes(refs.lse, tile), walk.lanes(refs.delta, tile)
  weights, dscores = [], []
  for e, (s, bias) in enumerate(zip(scores, walk.biases(entries))):
    w = jnp.exp2(s + (bias - lse)[None]).reshape(size, sizes.rows)
    ds = w * (dweights[e * size:(e + 1) * size] - delta)
    weights.append(w.astype(dtype))
    dscores.append(ds.astype(dtype))
  weights, dscores = jnp.concatenate(weights, axis=0), jnp.concatenate(dscores, axis=0)
  dv = dot(weights, walk.rows(refs.dout, tile), (1, 0))
  dk = dot(dscores, walk.rows(refs.q, tile), (1, 0))
  refs.acc[tile] += dot(walk.keys(refs.k, entries), dscores, (0, 0))
  for e, (_, row, _) in enumerate(entries):
    at, part = pl.ds(row, size), slice(e * size, (e + 1) * size)
    refs.dv[0, at, :] += dv[part]
    refs.dk[0, at, :] += dk[part]


def _kernel(refs, config, sizes, scale):
  walk = schedule.ListWalk(refs, config, sizes)
  dtype, tiles = refs.k.dtype, config.tiles_per_program

  @pl.when(pl.program_id(1) == 0)
  def _():
    refs.dk[...] = jnp.zeros_like(refs.dk)
    refs.dv[...] = jnp.zeros_like(refs.dv)

  if hasattr(refs, "acc_in"):
    refs.acc[:tiles] = refs.acc_in[0, 0]
    refs.acc[tiles] = jnp.zeros_like(refs.acc[tiles])
  else:
    refs.acc[...] = jnp.zeros_like(refs.acc)

  def products(state):
    entries = walk.entries(state)
    return (dot(walk.keys(refs.k, entries), walk.rows(refs.q, state[0]), (1, 1)),
            dot(walk.keys(refs.v, entries), walk.rows(refs.dout, state[0]), (1, 1)))

  walk.loop((refs.scores, refs.dweights), products,
            lambda state, s, dw: _accumulate(refs, walk, state, s, dw, dtype))
  if hasattr(refs, "acc_out"):
    refs.acc_out[0, 0] = refs.acc[:tiles]
    return

  @pl.loop(0, tiles)
  def _(tile):
    at = pl.ds(pl.multiple_of(tile * sizes.rows, sizes.rows), sizes.rows)
    refs.dq[0, at, :] = (refs.acc[tile] * scale).T.astype(refs.dq.dtype)


def backward(q, k, v, dout, lse, delta, plan, config, *, segment_blocks, scale, segment_ids=None,
             kv_segment_ids=None, interpret=False, vmem_limit=None):
  """Gradients of `forward`.

  Args:
    q, k, v, plan, config, segment_blocks, segment_ids, kv_segment_ids: as there.
    dout: [B*K, T'*G', E] in k's dtype.
    lse: f32 [B*K, C, tiles, R] of `schedule.log2_lse`, of all keys and the sink.
    delta: the same shape, sum over E of out * dout.
    scale: of the logits.

  Returns:
    dq [B*K, T'*G', H] in q's dtype, by q without its scale; dk f32 [B*K,S,H], by k, over
    ln 2; dv f32 [B*K,S,E].
  """
  heads, _, width = v.shape
  head_dim, tiles = q.shape[-1], config.tiles_per_program
  programs = -(-plan.counts.shape[-1] // tiles)
  by_row = lambda sizes: {"dout": (dout, schedule.program_rows(config, sizes, width)),
                          "lse": (lse, schedule.program_lanes(config, sizes)),
                          "delta": (delta, schedule.program_lanes(config, sizes))}
  state, dk, dv = None, [], []
  for last, sizes, operands in schedule.launches(
      q, k, v, plan, config, segment_blocks, segment_ids, kv_segment_ids, by_row):
    rows = sizes.rows
    acc = pl.BlockSpec((1, 1, tiles, head_dim, rows), lambda h, c: (h, c, 0, 0, 0))
    if state is not None:
      operands["acc_in"] = state, acc
    outputs = {"dk": (f32(heads, sizes.key_rows, head_dim),
                      schedule.resident(sizes.key_rows, head_dim, 0)),
               "dv": (f32(heads, sizes.key_rows, width),
                      schedule.resident(sizes.key_rows, width, 0))}
    aliases = None
    if last:
      outputs["dq"] = (jax.ShapeDtypeStruct(q.shape, q.dtype),
                       schedule.program_rows(config, sizes, head_dim))
    else:
      outputs["acc_out"] = f32(heads, programs, tiles, head_dim, rows), acc
      aliases = {"acc_in": "acc_out"} if state is not None else None
    step = (config.steps_per_body, config.blocks_per_step * sizes.block_size, rows)
    scratch = {"scores": pltpu.VMEM(step, jnp.float32), "dweights": pltpu.VMEM(step, jnp.float32),
               "acc": pltpu.VMEM((tiles + 1, head_dim, rows), jnp.float32)}
    results = schedule.call(
      lambda refs, sizes=sizes: _kernel(refs, config, sizes, scale),
      "block_sparse_backward" if last else "block_sparse_backward_part",
      operands, outputs, scratch, (heads, programs), interpret=interpret,
      vmem_limit=vmem_limit, aliases=aliases)
    state = results.get("acc_out")
    dk.append(results["dk"])
    dv.append(results["dv"])
  return results["dq"], jnp.concatenate(dk, axis=1), jnp.concatenate(dv, axis=1)
