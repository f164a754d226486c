"""`oracle_attention` on NVIDIA Hopper: a forward kernel, a selection kernel, two backward passes.

Queries go through in launches of bounded size, so that the block maxima, which exist only between
the two forward kernels, never take more than a few GB. The backward pass is cuDNN's, fed with our
output and log-sum-exp, for plain causal attention: as many queries as keys, offset 0, no segments
or one in each row, which the device looks up. For everything else it is ours (`backward.py`).
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.checks import NotCoveredError
from pallas_kernels.oracle_attention.gpu import backward, cudnn_backward
from pallas_kernels.oracle_attention.gpu.forward import BLOCK, forward
from pallas_kernels.oracle_attention.gpu.select import select
from pallas_kernels.oracle_attention.gpu.tile_ranges import TILE, visibility

# One launch while everything fits this (80b_32k takes 4.3e9 bytes) ...
WHOLE_BYTES = 4_400_000_000
# ... and launches of this size beyond: 7b_128k in 16, of 15.5 waves of CTAs each.
CHUNK_BYTES = 2_200_000_000
# Launches written out one by one; a loop on the device beyond.
MOST_UNROLLED = 32


class Options(NamedTuple):
  """What a call fixes at trace time."""

  num_blocks: int
  scale: float
  offset: int | None        # None: an array
  interpret: Any            # GPU interpret mode parameters, or None to compile


def oracle_attention(q, k, v, *, block_size, num_blocks, query_offset, segment_ids,
                     kv_segment_ids, scale, interpret=None):
  """See `api.py`. Differentiable in q, k and v.

  Under `jax.checkpoint` with a policy that saves the names `oracle_out`, `oracle_lse` and
  `oracle_block_indices`, the backward pass runs no forward kernel again.

  Args:
    q: [B, T, N, H], bf16 or f16, H 64 or 128.
    k: [B, S, K, H].
    v: [B, S, K, H].
    block_size: 64.
    num_blocks: a power of two up to 32, or 0 for plain attention.
    query_offset: int, or i32 [B].
    segment_ids: i32 [B, T] or None.
    kv_segment_ids: i32 [B, S] or None.
    scale: multiplies the logits.
    interpret: GPU interpret mode parameters, or None to compile.

  Raises:
    NotCoveredError: values that this implementation does not cover.
  """
  _check(q, k, v, block_size, num_blocks)
  static = isinstance(query_offset, int)
  options = Options(num_blocks, float(scale), query_offset if static else None, interpret)
  return _attend(q, k, v, None if static else query_offset, segment_ids, kv_segment_ids, options)


def _check(q, k, v, block_size, num_blocks):
  def covered(ok, name, got, wanted):
    if not ok:
      raise NotCoveredError(
        f"oracle_attention mosaic_gpu: {name}={got}; wanted {wanted}; use "
        'implementation="reference"'
      )

  dtypes = {jnp.dtype(x.dtype).name for x in (q, k, v)}
  covered(dtypes in ({"bfloat16"}, {"float16"}), "dtypes", sorted(dtypes), "one of bf16, f16")
  covered(q.shape[-1] in (64, 128), "head dim", q.shape[-1], "64 or 128")
  covered(v.shape[-1] == q.shape[-1], "value head dim", v.shape[-1], f"{q.shape[-1]} as in q and k")
  covered(block_size == BLOCK, "block_size", block_size, BLOCK)
  covered(num_blocks in (0, 1, 2, 4, 8, 16, 32), "num_blocks", num_blocks, "0 or 2^0 ... 2^5")


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _attend(q, k, v, offset, segment_ids, kv_segment_ids, options):
  out, _, block_indices = _forward(q, k, v, offset, segment_ids, kv_segment_ids, options)
  return out, block_indices


def _attend_fwd(q, k, v, offset, segment_ids, kv_segment_ids, options):
  out, lse, block_indices = _forward(q, k, v, offset, segment_ids, kv_segment_ids, options)
  out, lse = checkpoint_name(out, "oracle_out"), checkpoint_name(lse, "oracle_lse")
  block_indices = checkpoint_name(block_indices, "oracle_block_indices")
  return (out, block_indices), (q, k, v, offset, segment_ids, kv_segment_ids, out, lse)


def _attend_bwd(options, residuals, grads):
  q, k, v, offset, segment_ids, kv_segment_ids, out, lse = residuals
  grad_out = grads[0].astype(q.dtype)
  operands = q, k, v, out, lse, grad_out
  ours = functools.partial(
    backward.backward, segment_ids=segment_ids, kv_segment_ids=kv_segment_ids,
    query_offset=offset if options.offset is None else options.offset, scale=options.scale,
    interpret=options.interpret)
  with jax.named_scope("oracle_attention_backward"):
    if options.offset != 0 or q.shape[1] != k.shape[1] or options.interpret is not None:
      grads = ours(*operands)
    else:
      cudnn = functools.partial(cudnn_backward.backward, scale=options.scale)
      grads = (cudnn(*operands) if segment_ids is None else
               lax.cond(one_segment(segment_ids, kv_segment_ids), cudnn, ours, *operands))
  return (*grads, None, None, None)


_attend.defvjp(_attend_fwd, _attend_bwd)


def one_segment(segment_ids, kv_segment_ids):
  """bool []: every row's queries and keys, i32 [B, T] and [B, S], have one nonzero segment id."""
  first = segment_ids[:, :1]
  return ((segment_ids == first) & (first != 0)).all() & (kv_segment_ids == first).all()


def launch_rows(batch, num_queries, num_keys, num_heads):
  """Query rows of one launch: equal multiples of 128 whose block maxima fit the budget."""
  tiles = math.ceil(num_queries / TILE)
  blocks = math.ceil(num_keys / TILE) * (TILE // BLOCK)
  tile_bytes = 4 * batch * num_heads * blocks * TILE
  if tiles * tile_bytes <= WHOLE_BYTES:
    return tiles * TILE
  launches = math.ceil(tiles / max(CHUNK_BYTES // tile_bytes, 1))
  return math.ceil(tiles / launches) * TILE


def _forward(q, k, v, offset, segment_ids, kv_segment_ids, options):
  """out [B, T, N, H], lse f32 [B, N, T], block_indices i32 [B, K, T, P]."""
  B, T, N, _ = q.shape
  S, K = k.shape[1:3]
  num_blocks, scale, interpret = options.num_blocks, options.scale, options.interpret
  rows = launch_rows(B, T, S, N) if num_blocks else math.ceil(T / TILE) * TILE
  launches = math.ceil(T / rows)
  visible = visibility(offset if options.offset is None else options.offset, segment_ids,
                       kv_segment_ids, B, T, S, query_multiple=rows)
  q, k, v = (jnp.pad(x, ((0, 0), (0, -x.shape[1] % multiple), (0, 0), (0, 0)))
             for x, multiple in ((q, rows), (k, TILE), (v, TILE)))

  def launch(q_start):
    with jax.named_scope("oracle_attention_forward"):
      out, lse, block_max = forward(
        q, k, v, visible=visible, q_start=q_start, num_rows=rows, scale=scale,
        maxima=num_blocks > 0, interpret=interpret)
    if not num_blocks:
      return out, lse, jnp.zeros((B, K, 0, rows), jnp.int32)
    with jax.named_scope("oracle_attention_select"):
      block_indices = select(
        block_max, lse, visible.key_ranges, q_start, kv_heads=K, num_blocks=num_blocks,
        scale=scale, interpret=interpret)
    return out, lse, block_indices

  if launches == 1:
    out, lse, block_indices = launch(jnp.zeros(1, jnp.int32))
  else:
    join = lambda x, axis: jnp.moveaxis(x, 0, axis - 1).reshape(
      *x.shape[1 : axis], launches * rows, *x.shape[axis + 1 :]
    )
    out, lse, block_indices = map(join, _in_turn(launch, launches, rows), (2, 3, 4))
  return out[:, :T], lse[..., :T], block_indices[..., :T].transpose(0, 1, 3, 2)


def _in_turn(launch, launches, rows):
  """launch(q_start i32 [1]) of every launch, stacked; the block maxima of one exist at a time."""
  if launches > MOST_UNROLLED:
    return lax.map(launch, (jnp.arange(launches, dtype=jnp.int32) * rows)[:, None])
  parts = [launch(jnp.zeros(1, jnp.int32))]
  for i in range(1, launches):
    q_start, parts[-1] = lax.optimization_barrier((jnp.full(1, i * rows, jnp.int32), parts[-1]))
    parts.append(launch(q_start))
  return [jnp.stack(x) for x in zip(*parts)]
