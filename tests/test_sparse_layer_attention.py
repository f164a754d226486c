"""`sparse_layer_attention`: the gated sum of two float64 loops, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels.sparse_layer_attention.shapes import SHAPES
from tests import float64_loops as loops
from tests.attention_inputs import jitted, normal, packed_segments, qkv, random_blocks
from tests.tolerances import assert_close

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


@pytest.mark.parametrize("change,message", [
  (dict(gate_sparse=jnp.zeros((1, 8, 4, 3))),
   "gate_sparse has shape [1, 8, 4, 3]; wanted [1, 8, 4, 4], any axis 1"),
  (dict(gate_local=0.5), "gate_local is a float"),
  (dict(k_local=jnp.zeros((1, 8, 1, 4))), "k_local has shape [1, 8, 1, 4]"),
  (dict(sinks_local=jnp.zeros(2)), "sinks_local has shape [2]; wanted [N=4]"),
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
