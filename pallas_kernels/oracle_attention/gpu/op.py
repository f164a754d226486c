"""`oracle_attention` on NVIDIA Hopper: a forward kernel, a selection kernel, two backward passes.

Queries go through in chunks, so that the block maxima, which only live between the two forward
kernels, never take more than a few GB. Without segments the backward pass is cuDNN's, fed
with our output and log-sum-exp; with segments it is ours (`mosaic_gpu_backward`).
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels import checks
from pallas_kernels.checks import NotCoveredError
from pallas_kernels.oracle_attention.gpu import backward as mosaic_gpu_backward
from pallas_kernels.oracle_attention.gpu import cudnn_backward
from pallas_kernels.oracle_attention.gpu.forward import BLOCK, TILE_T, forward, visible_tiles
from pallas_kernels.oracle_attention.gpu.select import select

# One launch while everything fits this (80b_32k takes 4.3e9 bytes) ...
WHOLE_BYTES = 4_400_000_000
# ... and launches of this size beyond: 7b_128k in 16, of 15.5 waves of CTAs each.
CHUNK_BYTES = 2_200_000_000
# Launches written out one by one; a loop on the device beyond.
MOST_UNROLLED = 32


def oracle_attention(q, k, v, *, block_size, num_blocks, segment_ids, scale, query_offset=0,
                     kv_segment_ids=None, interpret=None):
  """See `api.py`. Differentiable in q, k and v.

  Under `jax.checkpoint` with a policy that saves the names `oracle_out`, `oracle_lse` and
  `oracle_block_indices`, the backward pass runs no forward kernel again.

  Args:
    q: [B, T, N, H], bf16 or f16, H 64 or 128.
    k: [B, T, K, H].
    v: [B, T, K, H].
    block_size: 64.
    num_blocks: a power of two up to 32, or 0 for plain attention.
    segment_ids: i32 [B, T] or None.
    scale: multiplies the logits.
    interpret: GPU interpret mode parameters, or None to compile.

  Raises:
    NotCoveredError: values that this implementation does not cover.
  """
  checks.queries_are_keys("oracle_attention", query_offset, segment_ids, kv_segment_ids,
                          (q.shape[1], k.shape[1]))
  _check(q, k, v, block_size, num_blocks)
  return _attend(q, k, v, segment_ids, num_blocks, float(scale), interpret)


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


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _attend(q, k, v, segment_ids, num_blocks, scale, interpret):
  out, _, picked = _forward(q, k, v, segment_ids, num_blocks, scale, interpret)
  return out, picked


def _attend_fwd(q, k, v, segment_ids, num_blocks, scale, interpret):
  out, lse, picked = _forward(q, k, v, segment_ids, num_blocks, scale, interpret)
  out, lse = checkpoint_name(out, "oracle_out"), checkpoint_name(lse, "oracle_lse")
  picked = checkpoint_name(picked, "oracle_block_indices")
  return (out, picked), (q, k, v, segment_ids, out, lse)


def _attend_bwd(num_blocks, scale, interpret, residuals, grads):
  q, k, v, segment_ids, out, lse = residuals
  grad_out = grads[0].astype(q.dtype)
  if segment_ids is None and interpret is None:
    grads = cudnn_backward.backward(q, k, v, out, lse, grad_out, scale=scale)
  else:
    grads = mosaic_gpu_backward.backward(
      q, k, v, out, lse, grad_out, scale=scale, segment_ids=segment_ids, interpret=interpret
    )
  return (*grads, None)


_attend.defvjp(_attend_fwd, _attend_bwd)


def chunk_rows(batch, tokens, num_heads):
  """Query rows of one launch: equal multiples of 128 whose block maxima fit the budget."""
  tiles = math.ceil(tokens / TILE_T)
  tile_bytes = 4 * batch * num_heads * tiles * (TILE_T // BLOCK) * TILE_T
  if tiles * tile_bytes <= WHOLE_BYTES:
    return tiles * TILE_T
  launches = math.ceil(tiles / max(CHUNK_BYTES // tile_bytes, 1))
  return math.ceil(tiles / launches) * TILE_T


def _forward(q, k, v, segment_ids, num_blocks, scale, interpret):
  """out [B,T,N,H], lse f32 [B,N,T], picked i32 [B,K,T,P]."""
  B, T, N, _ = q.shape
  K = k.shape[2]
  rows = chunk_rows(B, T, N) if num_blocks else math.ceil(T / TILE_T) * TILE_T
  padding = -T % rows
  if padding:  # later than every query: seen by none that is kept
    q, k, v = (jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))) for x in (q, k, v))
    if segment_ids is not None:
      segment_ids = jnp.pad(segment_ids, ((0, 0), (0, padding)))
  segments = None if segment_ids is None else (segment_ids, *visible_tiles(segment_ids))

  def chunk(offset):
    out, lse, block_max = forward(
      q, k, v, scale=scale, chunk=rows, offset=offset, segments=segments,
      maxima=num_blocks > 0, interpret=interpret,
    )  # fmt: skip
    if not num_blocks:
      return out, lse, jnp.zeros((B, K, 0, rows), jnp.int32)
    picked = select(
      block_max, lse, kv_heads=K, num_blocks=num_blocks, scale=scale, offset=offset,
      first=None if segments is None else segments[1], interpret=interpret,
    )  # fmt: skip
    return out, lse, picked

  launches = (T + padding) // rows
  if launches == 1:
    out, lse, picked = chunk(None)
  else:
    join = lambda x, axis: jnp.moveaxis(x, 0, axis - 1).reshape(
      *x.shape[1 : axis], launches * rows, *x.shape[axis + 1 :]
    )
    out, lse, picked = map(join, _in_turn(chunk, launches, rows), (2, 3, 4))
  return out[:, :T], lse[..., :T], picked[..., :T].transpose(0, 1, 3, 2)


def _in_turn(chunk, launches, rows):
  """chunk(offset i32 [1]) of every launch, stacked; one launch's block maxima live at a time."""
  if launches > MOST_UNROLLED:
    return lax.map(chunk, (jnp.arange(launches, dtype=jnp.int32) * rows)[:, None])
  parts = [chunk(jnp.zeros(1, jnp.int32))]
  for i in range(1, launches):
    offset, parts[-1] = lax.optimization_barrier((jnp.full(1, i * rows, jnp.int32), parts[-1]))
    parts.append(chunk(offset))
  return [jnp.stack(x) for x in zip(*parts)]
