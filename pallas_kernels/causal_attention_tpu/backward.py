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
from pallas_kernels.causal_attention_tpu.forward import (
  DIAGONAL,
  FIRST,
  FREE,
  LAST,
  first_position,
  tile_bounds,
  visible,
)
from pallas_kernels.softmax import EMPTY_LSE, LOG2E, MASKED
from pallas_kernels.tpu import dot


@dataclasses.dataclass(frozen=True)
class BackwardTiles:
  """The sizes of one grid step and of one chunk.

  Attributes:
    block_q: queries per tile, a multiple of 128 (lanes).
    block_kv: keys per tile of the inner loop, a multiple of 128.
    chunk: keys that stay in VMEM, a multiple of `block_kv`.
    heads: query heads of the group per step.
    unroll: heads side by side in one schedule.
  """

  block_q: int = 512
  block_kv: int = 512
  chunk: int = 8192
  heads: int = 4
  unroll: int = 1

  def __post_init__(self):
    for name in ("block_q", "block_kv"):
      if getattr(self, name) % 128 or getattr(self, name) < 128:
        raise ValueError(f"{name}={getattr(self, name)}; wanted a multiple of 128")
    if self.chunk % self.block_kv:
      raise ValueError(f"chunk={self.chunk}; wanted a multiple of block_kv={self.block_kv}")


def backward(q, k, v, out, lse, grad_out, *, num_keys, query_offset, offsets, may_pass_end, scale,
             tiles, segment_ids=None, kv_segment_ids=None, window=None, interpret=False):
  """(dq, dk, dv) of whole tiles, and delta.

  Args:
    q: [B,T,N,H] float32 or bfloat16, T a multiple of `tiles.block_q`, H of 128.
    k: [B,S,K,H], S a multiple of `tiles.chunk`.
    v: [B,S,K,H].
    out: [B,T,N,H] of the forward pass.
    lse: f32 [B,N,T] of the forward pass, natural, sinks included, -inf where a row sees nothing.
    grad_out: [B,T,N,H].
    num_keys: keys without the padding of the last chunk.
    query_offset: key index of query 0, or None: `offsets` is traced.
    offsets: i32 [B], the same of each row.
    may_pass_end: whether a query (padding apart) may come after the last key.
    scale: of the logits.
    tiles: `BackwardTiles`.
    segment_ids: i32 [B,T] or None.
    kv_segment_ids: i32 [B,S] or None, 0 where a key is padding.
    window: tokens, or None.
    interpret: False, or `tpu.interpret_params()`.

  Returns:
    dq, dk, dv in the dtypes of q, k, v, and delta f32 [B,N,T] = sum_h out grad_out.
  """
  B, T, N, H = q.shape
  S, K = k.shape[1:3]
  delta = jnp.einsum("btnh,btnh->bnt", out.astype(jnp.float32), grad_out.astype(jnp.float32),
                     precision="highest")
  lse = jnp.where(lse == EMPTY_LSE, 0.0, lse)       # finite: such a row's keys are all masked
  bounds = tile_bounds(offsets, T, num_keys, tiles, window, segment_ids, kv_segment_ids)
  by_head = lambda x: x.reshape(B, K, N // K // tiles.heads, tiles.heads, T)
  flat = lambda x: x.reshape(*x.shape[:2], -1)
  operands = [flat(q), flat(k), flat(v), flat(grad_out.astype(q.dtype)), by_head(lse),
              by_head(delta)]
  if segment_ids is not None:
    operands += [segment_ids[:, None], kv_segment_ids[:, None]]
  chunks, num_tiles, steps = S // tiles.chunk, T // tiles.block_q, T // tiles.block_q
  if window is not None and chunks > 1:       # the query tiles that see a chunk
    aligned = query_offset is not None and not (query_offset % tiles.block_q
                                                or tiles.chunk % tiles.block_q)
    steps = min(steps, (tiles.chunk + window - 2) // tiles.block_q + 1 + (not aligned))
  call = functools.partial(
    _chunk, bounds, operands, tiles=tiles, query_offset=query_offset, steps=steps, scale=scale,
    window=window, num_kv_heads=K, interpret=interpret,
    num_keys=num_keys if may_pass_end and num_keys < S else None)
  if chunks == 1:      # every query tile comes by, for its dq to be written
    dq, dk, dv = call(jnp.zeros(1 + B, jnp.int32), None)
  else:
    def one(dq, c):
      first = jnp.clip((c * tiles.chunk - offsets) // tiles.block_q, 0, num_tiles - 1)
      dq, dk, dv = call(jnp.concatenate([c[None], first]), dq)
      return dq, (dk, dv)
    dq, (dk, dv) = lax.scan(one, jnp.zeros(operands[0].shape, jnp.float32),
                            jnp.arange(chunks, dtype=jnp.int32))
    dk, dv = (jnp.moveaxis(x, 0, 1) for x in (dk, dv))
  return dq.astype(q.dtype).reshape(q.shape), dk.reshape(k.shape), dv.reshape(v.shape), delta


def _chunk(bounds, operands, chunk, dq, *, tiles, query_offset, steps, scale, window, num_kv_heads,
           num_keys, interpret):
  """dq (plus the given one), and dk, dv [B, chunk, K*H] of one key chunk.

  chunk: i32 [1+B], its number, and the first query tile that may see it in each row.
  """
  B, T, width = operands[0].shape
  K = num_kv_heads
  H = operands[1].shape[2] // K
  parts = width // (K * H * tiles.heads)
  num_tiles = T // tiles.block_q

  def tile(b, i, chunk):
    return jnp.minimum(chunk[1 + b] + i, num_tiles - 1)

  heads_spec = pl.BlockSpec(
    (1, tiles.block_q, tiles.heads * H),
    lambda b, h, s, i, bounds, chunk: (b, tile(b, i, chunk), h * parts + s))
  key_spec = pl.BlockSpec((1, tiles.chunk, H),
                          lambda b, h, s, i, bounds, chunk: (b, chunk[0], h))
  row_spec = pl.BlockSpec((1, 1, 1, tiles.heads, tiles.block_q),
                          lambda b, h, s, i, bounds, chunk: (b, h, s, 0, tile(b, i, chunk)))
  in_specs = [heads_spec, key_spec, key_spec, heads_spec, row_spec, row_spec]
  segmented = len(operands) > len(in_specs)
  if segmented:
    in_specs += [
      pl.BlockSpec((1, 1, tiles.block_q),
                   lambda b, h, s, i, bounds, chunk: (b, 0, tile(b, i, chunk))),
      pl.BlockSpec((1, 1, tiles.chunk), lambda b, h, s, i, bounds, chunk: (b, 0, chunk[0]))]
  aliases = {}
  if dq is not None:
    aliases = {2 + len(operands): 0}
    operands, in_specs = [*operands, dq], [*in_specs, heads_spec]
  dk_spec = pl.BlockSpec((1, tiles.chunk, H), lambda b, h, s, i, bounds, chunk: (b, 0, h))
  dk_shape = jax.ShapeDtypeStruct((B, tiles.chunk, K * H), operands[1].dtype)
  return pl.pallas_call(
    functools.partial(_kernel, tiles=tiles, query_offset=query_offset, scale=scale,
                      window=window, num_tiles=num_tiles, num_keys=num_keys, segmented=segmented,
                      add=dq is not None),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=2, grid=(B, K, parts, steps), in_specs=in_specs,
      out_specs=[heads_spec, dk_spec, dk_spec],
      scratch_shapes=[pltpu.VMEM((tiles.heads, H, tiles.block_q), jnp.float32),
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


def _kernel(
    bounds_ref,      # i32 [5, B, query tiles] in SMEM, of `tile_bounds`
    chunk_ref,       # i32 [1+B] in SMEM: the chunk, each row's first query tile
    q_ref,           # [1, block_q, heads*H]
    k_ref,           # [1, chunk, H]
    v_ref,           # [1, chunk, H]
    grad_ref,        # [1, block_q, heads*H]
    lse_ref,         # f32 [1, 1, 1, heads, block_q]
    delta_ref,       # f32 [1, 1, 1, heads, block_q]
    *refs,           # segments i32 [1, 1, block_q] and [1, 1, chunk], dq so far [1, block_q,
                     # heads*H]; dq, dk and dv [1, chunk, H]; scratch
    tiles, query_offset, scale, window, num_tiles, num_keys, segmented, add):
  refs = list(refs)
  query_segments_ref, key_segments_ref = (refs.pop(0), refs.pop(0)) if segmented else (None, None)
  dq_in_ref = refs.pop(0) if add else None
  dq_ref, dk_ref, dv_ref, dq_s, dk_s, dv_s = refs     # dq_s f32 [heads, H, block_q]
  H = k_ref.shape[2]
  b, _, part, step = (pl.program_id(a) for a in range(4))
  per_chunk = tiles.chunk // tiles.block_kv
  i = chunk_ref[1 + b] + step
  known = i if query_offset is not None else jnp.minimum(i, num_tiles - 1)   # later ones are idle
  position = first_position(bounds_ref, b, known, tiles, query_offset)
  lanes = lambda g: pl.ds(g * H if isinstance(g, int) else pl.multiple_of(g * H, H), H)

  @pl.when((part == 0) & (step == 0))
  def _():
    dk_s[...] = jnp.zeros_like(dk_s)
    dv_s[...] = jnp.zeros_like(dv_s)

  def attend(j, masked):
    local = pl.multiple_of((j - chunk_ref[0] * per_chunk) * tiles.block_kv, tiles.block_kv)
    keys = pl.ds(local, tiles.block_kv)

    def head(g, _):
      q, grad = q_ref[0, :, lanes(g)], grad_ref[0, :, lanes(g)]
      k, v = k_ref[0, keys, :], v_ref[0, keys, :]
      row = pl.ds(g, 1)
      s = dot(k, q, (1, 1)) * (scale * LOG2E)                              # [keys, queries]
      if masked:
        segments = (None, None)
        if segmented:
          segments = query_segments_ref[0], key_segments_ref[0, :, keys]
        keep = visible(position, j * tiles.block_kv, s.shape, window, num_keys, *segments)
        s = jnp.where(keep, s, MASKED)
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
    start = jnp.maximum(bounds_ref[FIRST, b, i], chunk_ref[0] * per_chunk)
    stop = jnp.minimum(bounds_ref[LAST, b, i] + 1, (chunk_ref[0] + 1) * per_chunk)
    dq_s[...] = jnp.zeros_like(dq_s)
    if window is None:       # tiles start..free and diagonal..stop need a mask, those between none
      free = jnp.clip(bounds_ref[FREE, b, i], start, stop)
      diagonal = jnp.clip(bounds_ref[DIAGONAL, b, i], free, stop)
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
