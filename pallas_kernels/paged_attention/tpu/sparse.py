"""Decoding through a sparse layer on TPU: selected pages, window ring, sinks and gates.

A program takes one KV head of one row. Its P pages and its ring are blocks of the call, so that the
next program's are copied while this one computes; which page a block is comes from prefetched
scalars.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tpu
from pallas_kernels.softmax import INITIAL_MAX, MASKED
from pallas_kernels.tpu import dot


def paged_sparse_layer_attention(q, k_pages, v_pages, block_indices, page_table, lengths, k_ring,
                                 v_ring, gate_sparse, gate_local, *, sinks_sparse, sinks_local,
                                 layer, ring_layer, scale, interpret=False):
  """See `api.py`; q [B,K,G,H], gates [B,K,G,E or 1] and sinks [K,G,1] have their heads by KV head,
  out [B,K,G,E] too.

  Args:
    interpret: `tpu.interpret_params()`, or False to compile.
  """
  batch, kv_heads, rows, width = q.shape
  operands = {"q": (q, _row(rows, width))}
  pages = seen = at_layer = at_ring = jnp.zeros(1, jnp.int32)
  picks = 0
  # Clipped, what a block that is not seen names is legal too: any page will do for it.
  inside = lambda x, size: jnp.clip(x, 0, size - 1)
  if k_pages is not None:
    picks, size = block_indices.shape[2], k_pages.shape[3]
    at_layer = inside(layer, k_pages.shape[0])[None]
    seen = jnp.where(block_indices < 0, 0, lengths[:, None, None] - block_indices * size)
    known = inside(block_indices, page_table.shape[1]).reshape(batch, -1)
    pages = inside(jnp.take_along_axis(page_table, known, axis=1), k_pages.shape[1]).reshape(-1)
    seen = seen.reshape(-1)
    for name, x in (("k", k_pages), ("v", v_pages)):
      for i in range(picks):
        operands[f"{name}{i}"] = x, _page(i, picks, kv_heads, *x.shape[3:])
  if k_ring is not None:
    at_ring = inside(ring_layer, k_ring.shape[0])[None]
    for name, x in (("k_ring", k_ring), ("v_ring", v_ring)):
      operands[name] = x, pl.BlockSpec(
        (None, None, None, *x.shape[3:]),
        lambda b, h, pages, seen, lengths, layer, ring_layer: (ring_layer[0], b, h, 0, 0))
  for name, x in (("gate_sparse", gate_sparse), ("gate_local", gate_local)):
    if x is not None:
      operands[name] = x, _row(*x.shape[2:])
  for name, x in (("sinks_sparse", sinks_sparse), ("sinks_local", sinks_local)):
    if x is not None:
      operands[name] = x, pl.BlockSpec((None, *x.shape[1:]), lambda b, h, *_: (h, 0, 0))
  v_width = (v_ring if v_pages is None else v_pages).shape[-1]
  arrays, in_specs = zip(*operands.values())
  return pl.pallas_call(
    functools.partial(_kernel, names=tuple(operands), picks=picks, scale=scale),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=5, grid=(batch, kv_heads), in_specs=in_specs,
      out_specs=_row(rows, v_width)),
    out_shape=jax.ShapeDtypeStruct((batch, kv_heads, rows, v_width), q.dtype),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=tpu.vmem_limit(),
      disable_bounds_checks=True),
    interpret=interpret, name="paged_sparse_layer_attention",
  )(pages, seen, lengths, at_layer, at_ring, *arrays)


def _row(*shape):
  """Spec of one row's and KV head's part of an array [B,K,.,.]."""
  return pl.BlockSpec((None, None, *shape), lambda b, h, *_: (b, h, 0, 0))


def _page(i, picks, kv_heads, *shape):
  """Spec of one KV head's part of its row's selected page i, of pages [C,R,K,.,.]."""
  return pl.BlockSpec(
    (None, None, None, *shape),
    lambda b, h, pages, seen, lengths, layer, ring_layer: (
      layer[0], pages[(b * kv_heads + h) * picks + i], h, 0, 0))


def _kernel(page_ref, seen_ref,   # SMEM i32 [B*K*P]: pages, and how many of their tokens are seen
            length_ref,           # SMEM i32 [B]
            layer_ref, ring_layer_ref, *refs, names, picks, scale):
  """refs: [G,H] of q; [S,H], [S,E] of pages; [W,H], [W,E] of the ring; [G,E or 1], [G,1] of gates
  and sinks; out [G,E].
  """
  del page_ref, layer_ref, ring_layer_ref                 # of the index maps
  *refs, out_ref = refs
  refs = dict(zip(names, refs))
  b, h = pl.program_id(0), pl.program_id(1)
  first = (b * pl.num_programs(1) + h) * picks

  def branch(keys, values, seen, kind):
    """gate * attention, f32 [G,E], over the first seen[i] rows of keys[i] and values[i]."""
    scores = []
    for k, n in zip(keys, seen):
      s = dot(refs["q"][...], refs[k][...], (1, 1)) * scale
      scores.append(jnp.where(lax.broadcasted_iota(jnp.int32, (1, s.shape[1]), 1) < n, s, MASKED))
    sinks = refs.get(f"sinks_{kind}")
    m = jnp.full((out_ref.shape[0], 1), INITIAL_MAX) if sinks is None else sinks[...]
    m = jnp.maximum(m, functools.reduce(jnp.maximum, scores).max(axis=1, keepdims=True))
    weights = [jnp.exp(s - m) for s in scores]
    l = sum(weights).sum(axis=1, keepdims=True)
    if sinks is not None:
      l += jnp.exp(sinks[...] - m)
    acc = 0.0
    for p, name, n in zip(weights, values, seen):
      v = refs[name][...]
      token = lax.broadcasted_iota(jnp.int32, v.shape, 0)
      v = jnp.where(token < n, v.astype(jnp.float32), 0.0).astype(v.dtype)   # 0 * NaN is NaN
      acc += dot(p.astype(v.dtype), v, (1, 0))
    out = acc / jnp.where(l > 0, l, 1.0)
    gate = refs.get(f"gate_{kind}")
    return out if gate is None else out * gate[...].astype(jnp.float32)

  out = jnp.zeros(out_ref.shape, jnp.float32)
  if picks:
    out += branch([f"k{i}" for i in range(picks)], [f"v{i}" for i in range(picks)],
                  [seen_ref[first + i] for i in range(picks)], "sparse")
  if "k_ring" in refs:
    out += branch(["k_ring"], ["v_ring"], [length_ref[b]], "local")
  out_ref[...] = out.astype(out_ref.dtype)
