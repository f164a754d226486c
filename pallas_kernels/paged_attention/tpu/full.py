"""Decoding through a full layer on TPU: attention over every page, and the P best pages.

A program takes some KV heads of one row, whose part of a page is one piece of memory, and walks the
row's pages, several to a step, their copies one step ahead. It reads the pages that the row has and
no others, so rows of any lengths may stand together. The largest logit that each query head has in
each page stays in VMEM; at the end, when the log-sum-exp is known, the pages' weights are made of
them, f32 [B,K,C]: all that is written besides the output. The P best are selected from these.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tpu
from pallas_kernels.reference.block_selection import select_blocks
from pallas_kernels.softmax import INITIAL_MAX, MASKED
from pallas_kernels.tpu import LANES, dot


@dataclasses.dataclass(frozen=True)
class FullTiles:
  """What a program takes at a time.

  Attributes:
    kv_heads: of a program, a divisor of K.
    pages: of a step: a power of two up to 128, so that their maxima share one row of lanes.
    page_tokens: S, of a page.
  """

  kv_heads: int
  pages: int
  page_tokens: int

  @property
  def tokens(self):
    """Of a step."""
    return self.pages * self.page_tokens


def paged_oracle_attention(q, k_pages, v_pages, page_table, lengths, *, layer, num_blocks, scale,
                           tiles, interpret=False):
  """See `api.py`; q [B,K,G,H] has its heads by KV head, out [B,K,G,E] too.

  Args:
    tiles: `FullTiles`.
    interpret: `tpu.interpret_params()`, or False to compile.
  """
  batch, kv_heads, rows, width = q.shape
  v_width, room = v_pages.shape[-1], page_table.shape[1]
  score_rows = -(-room // LANES)
  heads = tiles.kv_heads
  mine = lambda *shape: pl.BlockSpec((None, heads, *shape), lambda b, h, *_: (b, h, 0, 0))
  anywhere = pl.BlockSpec(memory_space=pl.ANY)
  f32 = lambda *shape: pltpu.VMEM((heads, *shape), jnp.float32)
  buffer = lambda width: pltpu.VMEM((2, heads, tiles.tokens, width), k_pages.dtype)
  lengths = jnp.minimum(lengths, room * tiles.page_tokens)
  inside = lambda x, axis: jnp.clip(x, 0, k_pages.shape[axis] - 1)      # nothing left to check
  out, weights = pl.pallas_call(
    functools.partial(_kernel, tiles=tiles, scale=scale),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=2, grid=(batch, kv_heads // heads),
      in_specs=[pl.BlockSpec((None, 1, room), lambda b, h, *_: (b, 0, 0),
                             memory_space=pltpu.SMEM), mine(rows, width), anywhere, anywhere],
      out_specs=[mine(rows, v_width), mine(score_rows, LANES)],
      scratch_shapes=[buffer(width), buffer(v_width), pltpu.SemaphoreType.DMA((2, 2)),
                      f32(rows, LANES), f32(rows, LANES), f32(rows, v_width),
                      f32(score_rows, rows, LANES)]),
    out_shape=[jax.ShapeDtypeStruct((batch, kv_heads, rows, v_width), q.dtype),
               jax.ShapeDtypeStruct((batch, kv_heads, score_rows, LANES), jnp.float32)],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=tpu.vmem_limit(),
      disable_bounds_checks=True),
    interpret=interpret, name="paged_oracle_attention",
  )(lengths, inside(layer, 0)[None], inside(page_table, 1)[:, None], q, k_pages, v_pages)
  if not num_blocks:
    return out, jnp.zeros((batch, kv_heads, 0), jnp.int32)
  candidate = jnp.arange(room, dtype=jnp.int32) * tiles.page_tokens < lengths[:, None, None]
  weights = weights.reshape(batch, kv_heads, -1)[..., :room]
  return out, select_blocks(jnp.where(candidate, weights, -jnp.inf), num_blocks)


def _kernel(length_ref,           # SMEM i32 [B]
            layer_ref,            # SMEM i32 [1]
            table_ref,            # SMEM i32 [1,U]
            q_ref,                # [h,G,H], h the program's KV heads
            k_pages, v_pages,     # [C,R,K,S,H], [C,R,K,S,E], where they are
            out_ref,              # [h,G,E]
            weight_ref,           # f32 [h,C/128,128], of pages
            k_ref, v_ref,         # [2,h,X,H], [2,h,X,E]: two steps of X tokens
            semaphores,           # [2,2]: step, keys or values
            m_ref, l_ref,         # f32 [h,G,128], every lane the same
            acc_ref,              # f32 [h,G,E]
            max_ref,              # f32 [h,C/128,G,128], of the logits in a page
            *, tiles, scale):
  size = tiles.page_tokens
  length = length_ref[pl.program_id(0)]
  heads = pl.ds(pl.program_id(1) * tiles.kv_heads, tiles.kv_heads)
  pages = pl.cdiv(length, size)
  steps = pl.cdiv(pages, tiles.pages)
  tokens_of = lambda i: pl.ds(pl.multiple_of(i * size, size), size)
  m_ref[...] = jnp.full_like(m_ref, INITIAL_MAX)
  l_ref[...] = jnp.zeros_like(l_ref)
  acc_ref[...] = jnp.zeros_like(acc_ref)
  max_ref[...] = jnp.full_like(max_ref, MASKED)

  def each_copy(step, act):
    """Starts or awaits the copies of a step: of the pages that the row has."""
    slot, first = lax.rem(step, 2), step * tiles.pages

    def copy(i, _):
      page = table_ref[0, first + i]
      for n, (source, target) in enumerate(((k_pages, k_ref), (v_pages, v_ref))):
        act(pltpu.make_async_copy(source.at[layer_ref[0], page, heads],
                                  target.at[slot, :, tokens_of(i)], semaphores.at[slot, n]))
      return 0

    lax.fori_loop(0, jnp.minimum(pages - first, tiles.pages), copy, 0)

  def attend(step):
    slot, first = lax.rem(step, 2), step * tiles.pages
    seen = length - first * size

    # Values of tokens that are not there: the softmax gives them 0, but 0 * NaN is NaN.
    def clear(i, _):
      v = v_ref[slot, :, tokens_of(i)]
      token = i * size + lax.broadcasted_iota(jnp.int32, v.shape, 1)
      v_ref[slot, :, tokens_of(i)] = jnp.where(token < seen, v.astype(jnp.float32), 0.0).astype(
        v.dtype)
      return 0

    lax.fori_loop(jnp.minimum(lax.div(seen, size), tiles.pages), tiles.pages, clear, 0)
    token = lax.broadcasted_iota(jnp.int32, (1, tiles.tokens), 1)
    score_row, lane = lax.div(first, LANES), lax.rem(first, LANES)
    lanes = lax.broadcasted_iota(jnp.int32, m_ref.shape[1:], 1)
    for h in range(tiles.kv_heads):
      s = dot(q_ref[h], k_ref[slot, h], (1, 1)) * scale                  # [G,X]
      s = jnp.where(token < seen, s, MASKED)
      m_before = m = m_ref[h]
      kept = max_ref[h, score_row]
      for i in range(tiles.pages):
        of_page = s[:, i * size:(i + 1) * size].max(axis=1, keepdims=True)
        kept = jnp.where(lanes == lane + i, of_page, kept)
        m = jnp.maximum(m, of_page)
      max_ref[h, score_row] = kept
      alpha, p = jnp.exp(m_before - m), jnp.exp(s - m[:, :1])
      m_ref[h] = m
      l_ref[h] = l_ref[h] * alpha + p.sum(axis=1, keepdims=True)
      acc_ref[h] = acc_ref[h] * alpha[:, :1] + dot(p.astype(v_ref.dtype), v_ref[slot, h], (1, 0))

  pl.when(steps > 0)(lambda: each_copy(jnp.int32(0), lambda copy: copy.start()))

  def body(step, _):
    pl.when(step + 1 < steps)(lambda: each_copy(step + 1, lambda copy: copy.start()))
    each_copy(step, lambda copy: copy.wait())
    attend(step)
    return 0

  lax.fori_loop(0, steps, body, 0)
  for h in range(tiles.kv_heads):
    l = jnp.where(l_ref[h] > 0, l_ref[h], 1.0)                           # idle rows give 0
    out_ref[h] = (acc_ref[h] / l[:, :1]).astype(out_ref.dtype)
    weight_ref[h] = (max_ref[h] - (m_ref[h] + jnp.log(l))).max(axis=1)
