"""Causal or windowed attention on TPU, backward: one pass, five products, fixed order of additions.

Keys go through in chunks whose K, V, dK and dV stay in VMEM while every query tile that sees the
chunk comes by once; inside a grid step the key tiles of the chunk are a loop with exact bounds. dQ
of a tile is complete after one chunk if there is only one; with more it is a float32 array in HBM
that each chunk's call reads, adds to and writes in place. So memory is linear in T.

Scores are transposed as in the forward pass; a TPU core runs its grid in order, so every sum has
one order and the result is the same bits every time.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tpu
from pallas_kernels.causal_attention_tpu.block_topk import HIDDEN
from pallas_kernels.causal_attention_tpu.forward import (
  LOG2E,
  dot,
  first_diagonal_tile,
  key_tile_bounds,
  last_key_tile,
  visible,
)


@dataclasses.dataclass(frozen=True)
class BackwardTiles:
  """The sizes of one grid step and of one chunk.

  Attributes:
    queries: per tile, a multiple of 128 (lanes).
    keys: per tile of the inner loop, a multiple of 128.
    chunk: keys that stay in VMEM, a multiple of `keys` and of `queries`.
    heads: of the group, per step.
    unroll: heads side by side in one schedule.
  """

  queries: int = 512
  keys: int = 512
  chunk: int = 8192
  heads: int = 4
  unroll: int = 1

  def __post_init__(self):
    for name in ("queries", "keys"):
      size = getattr(self, name)
      if size % 128 or size < 128 or self.chunk % size:
        raise ValueError(f"{name}={size}, chunk={self.chunk}; wanted a multiple of 128 that "
                         "divides the chunk")


def backward(q, k, v, out, lse, grad_out, *, scale, tiles, segment_ids=None, window=None,
             interpret=False):
  """(dq, dk, dv) of whole tiles, and delta.

  Args:
    q: [B,T,N,H] float32 or bfloat16, T a multiple of `tiles.chunk`, H of 128.
    k: [B,T,K,H].
    v: [B,T,K,H].
    out: [B,T,N,H] of the forward pass.
    lse: f32 [B,N,T] of the forward pass, natural, sinks included.
    grad_out: [B,T,N,H].
    scale: of the logits.
    tiles: `BackwardTiles`.
    segment_ids: i32 [B,T] or None.
    window: tokens, or None.
    interpret: False, or `tpu.interpret_params()`.

  Returns:
    dq, dk, dv in the dtypes of q, k, v, and delta f32 [B,N,T] = sum_h out grad_out.
  """
  B, T, N, H = q.shape
  K = k.shape[2]
  delta = jnp.einsum("btnh,btnh->bnt", out.astype(jnp.float32), grad_out.astype(jnp.float32),
                     precision="highest")
  bounds = key_tile_bounds(B, T, tiles, window, segment_ids)
  by_head = lambda x: x.reshape(B, K, N // K // tiles.heads, tiles.heads, T)
  flat = lambda x: x.reshape(B, T, -1)
  operands = [flat(q), flat(k), flat(v), flat(grad_out.astype(q.dtype)), by_head(lse),
              by_head(delta)]
  if segment_ids is not None:
    operands += [segment_ids[:, None], segment_ids[:, None]]
  chunks = T // tiles.chunk
  call = functools.partial(_chunk, bounds, operands, tiles=tiles, scale=scale, window=window,
                           num_kv_heads=K, chunks=chunks, interpret=interpret)
  if chunks == 1:
    dq, dk, dv = call(jnp.zeros(1, jnp.int32), None)
  else:
    def one(dq, c):
      dq, dk, dv = call(c[None], dq)
      return dq, (dk, dv)
    dq, (dk, dv) = lax.scan(one, jnp.zeros(operands[0].shape, jnp.float32),
                            jnp.arange(chunks, dtype=jnp.int32))
    dk, dv = (jnp.moveaxis(x, 0, 1) for x in (dk, dv))
  return dq.astype(q.dtype).reshape(q.shape), dk.reshape(k.shape), dv.reshape(v.shape), delta


def _chunk(bounds, operands, chunk, dq, *, tiles, scale, window, num_kv_heads, chunks, interpret):
  """dq (plus the given one), and dk, dv [B, chunk, K*H] of the key chunk `chunk` i32 [1]."""
  B, T, width = operands[0].shape
  K = num_kv_heads
  H = operands[1].shape[2] // K
  parts = width // (K * H * tiles.heads)
  num_tiles = T // tiles.queries
  tiles_per_chunk = tiles.chunk // tiles.queries
  steps = num_tiles
  if window is not None:
    steps = min(steps, (tiles.chunk + window - 2) // tiles.queries + 1)

  def tile(i, chunk):
    return jnp.minimum(chunk[0] * tiles_per_chunk + i, num_tiles - 1)

  heads_spec = pl.BlockSpec(
    (1, tiles.queries, tiles.heads * H),
    lambda b, h, s, i, bounds, chunk: (b, tile(i, chunk), h * parts + s))
  key_spec = pl.BlockSpec((1, tiles.chunk, H),
                          lambda b, h, s, i, bounds, chunk: (b, chunk[0], h))
  row_spec = pl.BlockSpec((1, 1, 1, tiles.heads, tiles.queries),
                          lambda b, h, s, i, bounds, chunk: (b, h, s, 0, tile(i, chunk)))
  in_specs = [heads_spec, key_spec, key_spec, heads_spec, row_spec, row_spec]
  segmented = len(operands) > len(in_specs)
  if segmented:
    in_specs += [
      pl.BlockSpec((1, 1, tiles.queries),
                   lambda b, h, s, i, bounds, chunk: (b, 0, tile(i, chunk))),
      pl.BlockSpec((1, 1, tiles.chunk), lambda b, h, s, i, bounds, chunk: (b, 0, chunk[0]))]
  aliases = {}
  if dq is not None:
    aliases = {2 + len(operands): 0}
    operands, in_specs = [*operands, dq], [*in_specs, heads_spec]
  dk_spec = pl.BlockSpec((1, tiles.chunk, H), lambda b, h, s, i, bounds, chunk: (b, 0, h))
  dk_shape = jax.ShapeDtypeStruct((B, tiles.chunk, K * H), operands[1].dtype)
  return pl.pallas_call(
    functools.partial(_kernel, tiles=tiles, scale=scale, window=window,
                      num_tiles=num_tiles, segmented=segmented, add=dq is not None),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=2, grid=(B, K, parts, steps), in_specs=in_specs,
      out_specs=[heads_spec, dk_spec, dk_spec],
      scratch_shapes=[pltpu.VMEM((tiles.heads, H, tiles.queries), jnp.float32),
                      pltpu.VMEM((tiles.chunk, H), jnp.float32),
                      pltpu.VMEM((tiles.chunk, H), jnp.float32)]),
    out_shape=[jax.ShapeDtypeStruct((B, T, width),
                                    operands[0].dtype if dq is None else jnp.float32),
               dk_shape, dk_shape],
    input_output_aliases=aliases,
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
      vmem_limit_bytes=tpu.vmem_limit()),
    interpret=interpret, name="attention_backward",
  )(bounds, chunk, *operands)


def _kernel(bounds_ref, chunk_ref, q_ref, k_ref, v_ref, grad_ref, lse_ref, delta_ref, *refs, tiles,
            scale, window, num_tiles, segmented, add):
  refs = list(refs)
  query_segments_ref, key_segments_ref = (refs.pop(0), refs.pop(0)) if segmented else (None, None)
  dq_in_ref = refs.pop(0) if add else None
  dq_ref, dk_ref, dv_ref, dq_s, dk_s, dv_s = refs
  H = k_ref.shape[2]
  b, _, part, step = (pl.program_id(a) for a in range(4))
  per_chunk = tiles.chunk // tiles.keys
  i = chunk_ref[0] * (tiles.chunk // tiles.queries) + step
  lanes = lambda g: pl.ds(g * H if isinstance(g, int) else pl.multiple_of(g * H, H), H)

  @pl.when((part == 0) & (step == 0))
  def _():
    dk_s[...] = jnp.zeros_like(dk_s)
    dv_s[...] = jnp.zeros_like(dv_s)

  def attend(j, masked):
    local = pl.multiple_of((j - chunk_ref[0] * per_chunk) * tiles.keys, tiles.keys)
    keys = pl.ds(local, tiles.keys)

    def head(g, _):
      q, grad = q_ref[0, :, lanes(g)], grad_ref[0, :, lanes(g)]
      k, v = k_ref[0, keys, :], v_ref[0, keys, :]
      row = pl.ds(g, 1)
      s = dot(k, q, (1, 1)) * (scale * LOG2E)                              # [keys, queries]
      if masked:
        segments = (None, None)
        if segmented:
          segments = query_segments_ref[0], key_segments_ref[0, :, keys]
        corner = i * tiles.queries, j * tiles.keys
        s = jnp.where(visible(*corner, s.shape, window, *segments), s, HIDDEN)
      p = jnp.exp2(s - lse_ref[0, 0, 0, row, :] * LOG2E)
      dv_s[keys, :] += dot(p.astype(grad.dtype), grad, (1, 0))
      ds = p * (dot(v, grad, (1, 1)) - delta_ref[0, 0, 0, row, :])
      ds = ds.astype(q.dtype)
      dk_s[keys, :] += dot(ds, q, (1, 0))
      dq_s[g] += dot(k, ds, (0, 0))                                        # [H, queries]
      return 0

    lax.fori_loop(0, tiles.heads, head, 0, unroll=1 if masked and window is None else tiles.unroll)
    return 0

  @pl.when(i < num_tiles)
  def _():
    start = jnp.maximum(bounds_ref[0, b, i], chunk_ref[0] * per_chunk)
    stop = jnp.minimum(last_key_tile(i, tiles) + 1, (chunk_ref[0] + 1) * per_chunk)
    dq_s[...] = jnp.zeros_like(dq_s)
    if window is None:       # tiles start..free and diagonal..stop need a mask, those between none
      free = jnp.clip(bounds_ref[1, b, i], start, stop)
      diagonal = jnp.clip(first_diagonal_tile(i, tiles), free, stop)
      lax.fori_loop(free, diagonal, lambda j, _: attend(j, False), 0)
      stop -= diagonal - free
      tile = lambda n: jnp.where(n < free, n, n + diagonal - free)
      lax.fori_loop(start, stop, lambda n, _: attend(tile(n), True), 0)
    else:
      lax.fori_loop(start, stop, lambda j, _: attend(j, True), 0)
    for g in range(tiles.heads):
      dq = (dq_s[g] * scale).T
      if add:
        dq += dq_in_ref[0, :, lanes(g)]
      dq_ref[0, :, lanes(g)] = dq.astype(dq_ref.dtype)

  @pl.when((part == pl.num_programs(2) - 1) & (step == pl.num_programs(3) - 1))
  def _():
    dk_ref[0] = (dk_s[...] * scale).astype(dk_ref.dtype)
    dv_ref[0] = dv_s[...].astype(dv_ref.dtype)
