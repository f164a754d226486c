"""`sparse_layer_attention`: the gated sum of two float64 loops, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels.sparse_layer_attention.shapes import SHAPES
from tests import float64_loops as loops
from tests.attention_inputs import (
  jitted,
  normal,
  packed_segments,
  qkv,
  query_positions,
  random_blocks,
)
from tests.tolerances import assert_close, assert_rows_close

sparse_layer_attention = jitted(pallas_kernels.sparse_layer_attention)


def inputs(s, seed, dtype="float32"):
  q, k, v = qkv(seed, s.batch, s.tokens, s.num_heads, s.num_kv_heads, s.head_dim, s.v_dim, dtype)
  _, k_local, v_local = qkv(seed + 3, s.batch, s.tokens, s.num_heads, s.num_kv_heads, s.head_dim,
                            s.v_dim, dtype)
  blocks = random_blocks(seed, s.batch, s.num_kv_heads, s.tokens, s.num_blocks, s.block_size)
  return q, k, v, blocks, k_local, v_local


def branches(s, q, k, v, blocks, k_local, v_local, sinks, segments):
  sparse = loops.visible_keys(s.tokens, segments, blocks=blocks, block_size=s.block_size)
  local = loops.visible_keys(s.tokens, segments, window=s.window)
  return (loops.attention(q, k, v, sparse, sinks[0])[0],
          loops.attention(q, k_local, v_local, local, sinks[1])[0], sparse, local)


@pytest.mark.parametrize("name", ["one_token", "small", "other_value_dim"])
@pytest.mark.parametrize("gates", ["elementwise", "per_head", "one"])
def test_values(name, gates):
  s = SHAPES[name]
  q, k, v, blocks, k_local, v_local = inputs(s, 1)
  shape = {"elementwise": (s.batch, s.tokens, s.num_heads, s.v_dim),
           "per_head": (s.batch, s.tokens, s.num_heads, 1), "one": (1, 1, 1, 1)}[gates]
  gate_sparse, gate_local = jax.nn.sigmoid(normal(7, *shape)), jax.nn.sigmoid(normal(8, *shape))
  sinks = (normal(9, s.num_heads), normal(10, s.num_heads))
  out = sparse_layer_attention(
    q, k, v, jnp.asarray(blocks), k_local, v_local, gate_sparse, gate_local, *sinks,
    block_size=s.block_size, window=s.window)
  sparse, local, _, _ = branches(s, q, k, v, blocks, k_local, v_local, sinks, None)
  assert_close(out, np.asarray(gate_sparse, np.float64) * sparse
               + np.asarray(gate_local, np.float64) * local, "attention_f32")


def test_half_precision_is_rounded_once():
  s = SHAPES["small"]
  q, k, v, blocks, k_local, v_local = inputs(s, 2, "bfloat16")
  gate = jax.nn.sigmoid(normal(7, 1, s.tokens, s.num_heads, 1, dtype="bfloat16"))
  out = sparse_layer_attention(
    q, k, v, jnp.asarray(blocks), k_local, v_local, gate, 1 - gate, block_size=s.block_size,
    window=s.window)
  sparse, local, _, _ = branches(s, q, k, v, blocks, k_local, v_local, (None, None), None)
  assert out.dtype == jnp.bfloat16
  assert_close(out, np.asarray(gate, np.float64) * sparse
               + np.asarray(1 - gate, np.float64) * local, "attention_bf16")


@pytest.mark.parametrize("per_head", [False, True])
def test_gradients(per_head):
  s = SHAPES["small"]
  q, k, v, blocks, k_local, v_local = inputs(s, 3)
  segments = packed_segments(3, s.batch, s.tokens, padding=11)
  gate_shape = (s.batch, s.tokens, s.num_heads, 1 if per_head else s.v_dim)
  gates = jax.nn.sigmoid(normal(7, *gate_shape)), jax.nn.sigmoid(normal(8, *gate_shape))
  sinks = (normal(9, s.num_heads), normal(10, s.num_heads))
  cotangent = normal(11, s.batch, s.tokens, s.num_heads, s.v_dim)

  def loss(q, k, v, k_local, v_local, gate_sparse, gate_local, sinks_sparse, sinks_local):
    out = sparse_layer_attention(
      q, k, v, jnp.asarray(blocks), k_local, v_local, gate_sparse, gate_local, sinks_sparse,
      sinks_local, block_size=s.block_size, window=s.window, segment_ids=jnp.asarray(segments))
    return (out * cotangent).sum()

  got = jax.jit(jax.grad(loss, tuple(range(9))))(q, k, v, k_local, v_local, *gates, *sinks)
  sparse, local, see_sparse, see_local = branches(s, q, k, v, blocks, k_local, v_local, sinks,
                                                  segments)
  wide = np.asarray(cotangent, np.float64)
  gate_sparse, gate_local = (np.asarray(g, np.float64) for g in gates)
  dq, dk, dv, dsinks = loops.gradients(q, k, v, see_sparse, wide * gate_sparse, sinks[0])
  dq_local, dk_local, dv_local, dsinks_local = loops.gradients(
    q, k_local, v_local, see_local, wide * gate_local, sinks[1])
  dgates = [(wide * branch).sum(-1, keepdims=True) if per_head else wide * branch
            for branch in (sparse, local)]
  want = (dq + dq_local, dk, dv, dk_local, dv_local, *dgates, dsinks, dsinks_local)
  for actual, exact in zip(got, want):
    assert_close(actual, exact, "attention_grad_f32")


LAYERS = {                     # branches, gates, sinks, and the two query offsets
  "window_layer": (("local",), (), (), (5, None)),
  "window_layer_with_gate_and_sinks": (("local",), ("local",), ("local",), (0, None)),
  "sparse_branch_alone": (("sparse",), ("sparse",), ("sparse",), (37, None)),
  "sparse_branch_plain": (("sparse",), (), (), (37, None)),
  "one_gate": (("sparse", "local"), ("local",), ("sparse",), (37, None)),
  "no_gates_local_offset": (("sparse", "local"), (), ("local",), (37, 11)),
  "traced_offsets": (("sparse", "local"), ("sparse", "local"), ("sparse", "local"),
                     (np.asarray([37, 60], np.int32), np.asarray([11, 0], np.int32))),
}


@pytest.mark.parametrize("name", sorted(LAYERS))
def test_absent_branches_gates_and_local_offsets(name):
  """Values and the gradient of every given array, with segments of both key sets."""
  branch_names, gate_names, sink_names, offsets = LAYERS[name]
  batch, tokens, heads, kv_heads, width, block_size, window = 2, 14, 4, 2, 8, 8, 9
  num_keys = {"sparse": 80, "local": 40}
  offset = {"sparse": offsets[0], "local": offsets[0] if offsets[1] is None else offsets[1]}
  q = normal(1, batch, tokens, heads, width)
  arrays, segments, visible = {"q": q}, None, {}
  # Document 1 up to a key, 2 after it, and padding among both.
  segments = np.where(np.arange(tokens) < 4, 1, 2)[None].repeat(batch, 0).astype(np.int32)
  segments[1, 6] = 0
  kv_segments, blocks = {}, None
  for seed, branch in enumerate(branch_names):
    suffix = "" if branch == "sparse" else "_local"
    _, arrays["k" + suffix], arrays["v" + suffix] = qkv(
      10 * seed + 2, batch, tokens, heads, kv_heads, width, 12, keys=num_keys[branch])
    at = query_positions(offset[branch], batch, tokens)
    kv_segments[branch] = np.where(np.arange(num_keys[branch]) < at[:, 4:5], 1, 2).astype(np.int32)
    kv_segments[branch][:, 8:10] = 0
    limit = dict(window=window)
    if branch == "sparse":
      whole = random_blocks(4, batch, kv_heads, num_keys[branch], 5, block_size)
      blocks = np.stack([whole[b][:, at[b]] for b in range(batch)])
      limit = dict(blocks=blocks, block_size=block_size)
    visible[branch] = loops.visible_keys(tokens, segments, positions=at, num_keys=num_keys[branch],
                                         kv_segments=kv_segments[branch], **limit)
    if branch in gate_names:
      arrays[f"gate_{branch}"] = jax.nn.sigmoid(normal(7 + seed, batch, tokens, heads, 12))
    if branch in sink_names:
      arrays[f"sinks_{branch}"] = normal(9 + seed, heads)
  cotangent = normal(20, batch, tokens, heads, 12)

  def loss(arrays):
    absent = dict(k=None, v=None, k_local=None, v_local=None)
    out = pallas_kernels.sparse_layer_attention(
      **absent | arrays, block_indices=None if blocks is None else jnp.asarray(blocks),
      block_size=block_size, window=window, query_offset=offsets[0],
      local_query_offset=offsets[1], segment_ids=segments,
      kv_segment_ids=kv_segments.get("sparse"), local_kv_segment_ids=kv_segments.get("local"))
    return (out * cotangent).sum(), out

  grads, out = jax.jit(jax.grad(loss, has_aux=True))(arrays)
  want, exact = 0.0, {"q": 0.0}
  wide = np.asarray(cotangent, np.float64)
  for branch in branch_names:
    suffix = "" if branch == "sparse" else "_local"
    k, v = arrays["k" + suffix], arrays["v" + suffix]
    gate = np.asarray(arrays.get(f"gate_{branch}", 1.0), np.float64)
    sinks = arrays.get(f"sinks_{branch}")
    branch_out, _ = loops.attention(q, k, v, visible[branch], sinks)
    want = want + gate * branch_out
    dq, exact["k" + suffix], exact["v" + suffix], dsinks = loops.gradients(
      q, k, v, visible[branch], wide * gate, sinks)
    exact["q"] = exact["q"] + dq
    exact |= {f"gate_{branch}": wide * branch_out} if branch in gate_names else {}
    exact |= {f"sinks_{branch}": dsinks} if branch in sink_names else {}
  assert np.abs(want).max() > 0.5
  assert_rows_close(out, want, "attention_rows_f32")
  assert grads.keys() == exact.keys()
  for leaf, got in grads.items():
    assert_rows_close(got, exact[leaf], "attention_grad_rows_f32")


def test_the_former_name_is_the_same_function():
  assert pallas_kernels.hybrid_sparse_attention is pallas_kernels.sparse_layer_attention


NO_SPARSE = dict(k=None, v=None, block_indices=None)


@pytest.mark.parametrize("change,message", [
  (dict(gate_sparse=jnp.zeros((1, 8, 4, 3))),
   "gate_sparse has shape [1, 8, 4, 3]; wanted [1, 8, 4, 4], any axis 1"),
  (dict(gate_local=0.5), "gate_local is a float"),
  (dict(k_local=jnp.zeros((1, 8, 1, 4))), "k_local has shape [1, 8, 1, 4]"),
  (dict(sinks_local=jnp.zeros(2)), "sinks_local has shape [2]; wanted [N=4]"),
  (dict(v=None), "give k, v and block_indices together, or None for all three"),
  (dict(v_local=None), "give k_local and v_local together, or None for both"),
  (NO_SPARSE | dict(k_local=None, v_local=None), "neither k nor k_local; give one of the branches"),
  (NO_SPARSE, "got gate_sparse without its branch; leave it out"),
  (NO_SPARSE | dict(gate_sparse=None, kv_segment_ids=jnp.ones((1, 8), jnp.int32)),
   "got kv_segment_ids without its branch; leave it out"),
  (dict(k_local=None, v_local=None, gate_local=None, local_query_offset=0),
   "got local_query_offset without its branch; leave it out"),
  (dict(local_query_offset=-2), "local_query_offset=-2; wanted at least 0"),
  (dict(k_local=jnp.zeros((1, 9, 2, 4)), v_local=jnp.zeros((1, 9, 2, 4)),
        segment_ids=jnp.ones((1, 8), jnp.int32)),
   "got segment_ids without local_kv_segment_ids for T=8 queries and L=9 keys"),
])
def test_bad_input_is_one_clear_line(change, message):
  kv = jnp.zeros((1, 8, 2, 4))
  arguments = dict(q=jnp.zeros((1, 8, 4, 4)), k=kv, v=kv,
                   block_indices=jnp.zeros((1, 2, 8, 1), jnp.int32), k_local=kv, v_local=kv,
                   gate_sparse=jnp.zeros((1, 1, 1, 1)),
                   gate_local=jnp.zeros((1, 1, 1, 1))) | change
  with pytest.raises(ValueError) as error:
    pallas_kernels.sparse_layer_attention(**arguments)
  assert message in str(error.value) and "\n" not in str(error.value)
