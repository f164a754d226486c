"""The TPU kernels at named shapes, as functions of abstract arrays: to compile, to count, to time.

A new op is one row of `CASES`: a function from a shape to the op with its options, and its arrays.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.block_sparse_attention.tpu import op as sparse_tpu
from pallas_kernels.oracle_attention.tpu import op as oracle_tpu
from pallas_kernels.paged_attention.tpu import op as paged_tpu
from pallas_kernels.sliding_window_attention.tpu import op as window_tpu
from pallas_kernels.sparse_layer_attention.tpu import op as layer_tpu

from ..bench import splash


def _qkv(shape, dtype):
  array = lambda heads, width: jax.ShapeDtypeStruct(
    (shape.batch, shape.tokens, heads, width), dtype)
  return (array(shape.num_heads, shape.head_dim), array(shape.num_kv_heads, shape.head_dim),
          array(shape.num_kv_heads, shape.v_dim))


def _sinks(shape):
  return jax.ShapeDtypeStruct((shape.num_heads,), jnp.float32)


def _oracle(shape, dtype, num_blocks=None):
  def op(q, k, v, **where):
    return oracle_tpu.oracle_attention(
      q, k, v, block_size=shape.block_size, scale=shape.head_dim ** -0.5,
      num_blocks=shape.num_blocks if num_blocks is None else num_blocks, **where)
  return op, _qkv(shape, dtype)


def _window(shape, dtype):
  def op(q, k, v, sinks, **where):
    return window_tpu.sliding_window_attention(
      q, k, v, window=shape.window, sinks=sinks, scale=shape.head_dim ** -0.5, **where)
  return op, (*_qkv(shape, dtype), _sinks(shape))


def selected(shape, num_keys=None, query_offset=0):
  """Block indices, and a plan of the right sizes that holds none: building one is XLA's work."""
  indices = jnp.zeros((shape.batch, shape.num_kv_heads, shape.tokens, shape.num_blocks), jnp.int32)
  make = functools.partial(sparse_tpu.make_plan, group=shape.num_heads // shape.num_kv_heads,
                           block_size=shape.block_size, num_keys=num_keys,
                           query_offset=query_offset)
  return indices, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(make, indices))


def _block_sparse(shape, dtype, dense=None):
  def op(q, k, v, sinks, **where):
    indices, plan = selected(shape, k.shape[1], where["query_offset"])
    return sparse_tpu.block_sparse_attention(
      q, k, v, indices, block_size=shape.block_size, sinks=sinks, plan=plan,
      options=sparse_tpu.Options(dense=dense), **where)
  return op, (*_qkv(shape, dtype), _sinks(shape))


def _sparse_layer(shape, dtype, dense=None):
  """Elementwise gates, and sinks in both branches."""
  def op(q, k, v, k_local, v_local, gate_sparse, gate_local, sinks_sparse, sinks_local, **where):
    indices, plan = selected(shape, k.shape[1], where["query_offset"])
    return layer_tpu.sparse_layer_attention(
      q, k, v, indices, k_local, v_local, gate_sparse, gate_local, sinks_sparse=sinks_sparse,
      sinks_local=sinks_local, block_size=shape.block_size, window=shape.window,
      local_query_offset=where["query_offset"], local_kv_segment_ids=where["kv_segment_ids"],
      plan=plan, options=sparse_tpu.Options(dense=dense), **where)
  q, k, v = _qkv(shape, dtype)
  gate = jax.ShapeDtypeStruct((*q.shape[:3], shape.v_dim), dtype)
  return op, (q, k, v, k, v, gate, gate, _sinks(shape), _sinks(shape))


def _block_sparse_plan(shape, dtype):
  """What is built once per hybrid block."""
  del dtype
  def op(block_indices, **where):
    del where
    return sparse_tpu.make_plan(block_indices, shape.num_heads // shape.num_kv_heads,
                                block_size=shape.block_size)
  return op, (jax.ShapeDtypeStruct(
    (shape.batch, shape.num_kv_heads, shape.tokens, shape.num_blocks), jnp.int32),)


def _paged(shape, dtype):
  """Queries, a layer of a stack of two, with room for `shape.tokens` in every row, i32 operands."""
  i32 = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.int32)
  array = lambda *sizes: jax.ShapeDtypeStruct(sizes, dtype)
  room = -(-shape.tokens // shape.block_size)
  pages = lambda width: array(2, shape.batch * room, shape.num_kv_heads, shape.block_size, width)
  return (array(shape.batch, shape.num_heads, shape.head_dim), pages(shape.head_dim),
          pages(shape.v_dim), i32(shape.batch, room), i32(shape.batch), i32())


def _paged_oracle(shape, dtype):
  def op(q, k_pages, v_pages, page_table, lengths, layer, **where):
    del where
    return paged_tpu.paged_oracle_attention(
      q, k_pages, v_pages, page_table, lengths, layer=layer, num_blocks=shape.num_blocks,
      scale=shape.head_dim ** -0.5)
  return op, _paged(shape, dtype)


def _paged_sparse_layer(shape, dtype):
  """Elementwise gates, and sinks in both branches."""
  def op(q, k_pages, v_pages, page_table, lengths, layer, block_indices, k_ring, v_ring,
         gate_sparse, gate_local, sinks_sparse, sinks_local, **where):
    del where
    return paged_tpu.paged_sparse_layer_attention(
      q, k_pages, v_pages, block_indices, page_table, lengths, k_ring, v_ring, gate_sparse,
      gate_local, sinks_sparse=sinks_sparse, sinks_local=sinks_local, layer=layer,
      ring_layer=layer, scale=shape.head_dim ** -0.5)
  ring = lambda width: jax.ShapeDtypeStruct(
    (2, shape.batch, shape.num_kv_heads, shape.window, width), dtype)
  blocks = jax.ShapeDtypeStruct((shape.batch, shape.num_kv_heads, shape.num_blocks), jnp.int32)
  gate = jax.ShapeDtypeStruct((shape.batch, shape.num_heads, shape.v_dim), dtype)
  return op, (*_paged(shape, dtype), blocks, ring(shape.head_dim), ring(shape.v_dim), gate, gate,
              _sinks(shape), _sinks(shape))


def _splash(shape, dtype):
  """The public peer, B=1; under a vjp its forward saves the lse."""
  def op(q, k, v, **where):
    del where
    return splash.causal_attention(shape)(q, k, v)
  return op, _qkv(shape, dtype)


CASES = {
  "oracle_attention": _oracle,
  "causal_attention": functools.partial(_oracle, num_blocks=0),   # the same without maxima
  "sliding_window_attention": _window,
  "block_sparse_attention": _block_sparse,
  "block_sparse_attention_dense": functools.partial(_block_sparse, dense=True),
  "block_sparse_plan": _block_sparse_plan,
  "hybrid_sparse_attention": _sparse_layer,
  "hybrid_sparse_attention_lists": functools.partial(_sparse_layer, dense=False),
  "paged_oracle_attention": _paged_oracle,
  "paged_sparse_layer_attention": _paged_sparse_layer,
  "splash_attention": _splash,
}


def case(op, shape, which, dtype="bfloat16", segmented=False, num_keys=None):
  """A picklable function and its abstract arrays.

  Args:
    op: a key of `CASES`.
    shape: `named_shapes.AttentionShape`.
    which: "fwd", or "fwd_bwd" for the outputs and the gradients of every array.
    dtype: of q, k and v.
    segmented: whether the last array is segment_ids i32 [B,T].
    num_keys: S of a range of the queries, whose offsets i32 [B] are then the last array; None: T.
  """
  arrays = list(CASES[op](shape, jnp.dtype(dtype))[1])
  if num_keys is not None:
    for i in range(1, 5 if op.startswith("hybrid") else 3):        # keys and values
      x = arrays[i]
      arrays[i] = jax.ShapeDtypeStruct((x.shape[0], num_keys, *x.shape[2:]), x.dtype)
  if which == "fwd_bwd":
    q, _, v = arrays[:3]
    arrays.append(jax.ShapeDtypeStruct((*q.shape[:3], v.shape[3]), q.dtype))
  if segmented:
    arrays.append(jax.ShapeDtypeStruct((shape.batch, shape.tokens), jnp.int32))
  if num_keys is not None:
    arrays.append(jax.ShapeDtypeStruct((shape.batch,), jnp.int32))
  return functools.partial(_run, op, shape, which, dtype, segmented, num_keys is not None), arrays


def _run(op, shape, which, dtype, segmented, ranged, *arrays):
  *arrays, query_offset = arrays if ranged else (*arrays, 0)
  *arrays, segment_ids = arrays if segmented else (*arrays, None)
  run = functools.partial(CASES[op](shape, jnp.dtype(dtype))[0], segment_ids=segment_ids,
                          kv_segment_ids=segment_ids, query_offset=query_offset)
  if which == "fwd":
    return run(*arrays)
  out, pullback = jax.vjp(run, *arrays[:-1])
  if not isinstance(out, tuple):
    return out, pullback(arrays[-1])
  nothing = [np.zeros(x.shape, jax.dtypes.float0) for x in out[1:]]      # of indices
  return out, pullback((arrays[-1], *nothing))
