"""`block_sparse_attention`: values and gradients against float64 loops of the equations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pallas_kernels
from pallas_kernels.block_sparse_attention.shapes import SHAPES
from pallas_kernels.reference import masked_attention
from tests import float64_loops as loops
from tests.attention_inputs import jitted, normal, packed_segments, qkv, random_blocks
from tests.tolerances import assert_close

block_sparse_attention = jitted(pallas_kernels.block_sparse_attention)


def expected(q, k, v, blocks, block_size, segments=None, sinks=None):
  visible = loops.visible_keys(q.shape[1], segments=segments, blocks=blocks,
                               block_size=block_size)
  return loops.attention(q, k, v, visible, sinks=sinks)[0]


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("name", ["one_token", "one_past_a_block", "one_head", "group_of_one",
                                  "wide_group", "other_value_dim", "odd_block"])
def test_values(name, sinks):
  s = SHAPES[name]
  q, k, v = qkv(1, s.batch, s.tokens, s.num_heads, s.num_kv_heads, s.head_dim, s.v_dim)
  blocks = random_blocks(4, s.batch, s.num_kv_heads, s.tokens, s.num_blocks, s.block_size)
  sinks = normal(5, s.num_heads) if sinks else None
  out = block_sparse_attention(
    q, k, v, jnp.asarray(blocks), block_size=s.block_size, sinks=sinks)
  assert out.dtype == q.dtype
  assert_close(out, expected(q, k, v, blocks, s.block_size, sinks=sinks), "attention_f32")


@pytest.mark.parametrize("dtype,tolerance", [("bfloat16", "attention_bf16"),
                                             ("float16", "attention_f16")])
def test_half_precision_inputs(dtype, tolerance):
  q, k, v = qkv(2, 2, 70, 4, 2, 16, dtype=dtype)
  blocks, sinks = random_blocks(3, 2, 2, 70, 3, 8), normal(4, 4)
  out = block_sparse_attention(q, k, v, jnp.asarray(blocks), block_size=8,
                                              sinks=sinks)
  assert out.dtype == q.dtype
  assert_close(out, expected(q, k, v, blocks, 8, sinks=sinks), tolerance)


@pytest.mark.parametrize("sinks", [False, True])
def test_rows_that_see_nothing_give_zero(sinks):
  q, k, v = qkv(6, 1, 40, 2, 1, 8)
  blocks = np.full((1, 1, 40, 2), -1, np.int32)
  blocks[0, 0, 3] = [2, 3]      # blocks wholly after the query: causally empty
  blocks[0, 0, 20] = [1, -1]
  out = block_sparse_attention(q, k, v, jnp.asarray(blocks), block_size=8,
                                              sinks=normal(7, 2) if sinks else None)
  seen = np.abs(np.asarray(out[0])).sum((-1, -2)) > 0
  np.testing.assert_array_equal(np.flatnonzero(seen), [20])


def test_every_block_picked_is_plain_causal_attention():
  q, k, v = qkv(8, 2, 65, 4, 2, 16)
  everything = jnp.broadcast_to(jnp.arange(9, dtype=jnp.int32), (2, 2, 65, 9))
  out = block_sparse_attention(q, k, v, everything, block_size=8)
  plain, _ = jitted(pallas_kernels.oracle_attention)(q, k, v, num_blocks=0)
  assert_close(out, plain, "attention_routes_f32")


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("dtype,tolerance", [("float32", "attention_grad_f32"),
                                             ("bfloat16", "attention_grad_bf16")])
def test_gradients(dtype, tolerance, chunked, monkeypatch):
  if chunked:
    monkeypatch.setattr(masked_attention, "KEPT_SCORES", 0)
    monkeypatch.setattr(masked_attention, "CHUNK_SCORES", 2 * 4 * 70 * 7)
  segments = packed_segments(9, 2, 70, padding=9)
  q, k, v = qkv(9, 2, 70, 4, 2, 16, 24, dtype=dtype)
  sinks, blocks = normal(12, 4), random_blocks(13, 2, 2, 70, 3, 8)
  cotangent = normal(14, 2, 70, 4, 24, dtype=dtype)

  def loss(q, k, v, sinks):
    out = block_sparse_attention(q, k, v, jnp.asarray(blocks), block_size=8,
                                                sinks=sinks, segment_ids=jnp.asarray(segments))
    return (out.astype(jnp.float32) * cotangent.astype(jnp.float32)).sum(), out

  grads, out = jax.jit(jax.grad(loss, (0, 1, 2, 3), has_aux=True))(q, k, v, sinks)
  assert_close(out, expected(q, k, v, blocks, 8, segments, sinks),
               "attention_f32" if dtype == "float32" else "attention_bf16")
  visible = loops.visible_keys(70, segments=segments, blocks=blocks, block_size=8)
  for got, exact in zip(grads, loops.gradients(q, k, v, visible, cotangent, sinks)):
    assert_close(got, exact, tolerance)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(st.integers(1, 40), st.integers(1, 3), st.integers(1, 3), st.integers(1, 20),
       st.integers(1, 9), st.integers(1, 5), st.booleans(), st.integers(0, 1000))
def test_any_shape(tokens, kv_heads, group, head_dim, block_size, picks, packed, seed):
  q, k, v = qkv(seed, 1, tokens, kv_heads * group, kv_heads, head_dim)
  blocks = random_blocks(seed, 1, kv_heads, tokens, picks, block_size)
  segments = packed_segments(seed, 1, tokens, padding=tokens // 5) if packed else None
  sinks = normal(seed + 3, kv_heads * group)
  out = block_sparse_attention(
    q, k, v, jnp.asarray(blocks), block_size=block_size, sinks=sinks,
    segment_ids=None if segments is None else jnp.asarray(segments))
  assert_close(out, expected(q, k, v, blocks, block_size, segments, sinks), "attention_f32")


@pytest.mark.parametrize("change,message", [
  (dict(block_indices=jnp.zeros((2, 2, 7, 3), jnp.int32)),
   "block_indices has shape [2, 2, 7, 3]; wanted [B=2,K=2,T=8,P]"),
  (dict(block_indices=jnp.zeros((2, 2, 8, 3))), "block_indices is float32; wanted int32"),
  (dict(sinks=jnp.zeros(3)), "sinks has shape [3]; wanted [N=4]"),
  (dict(sinks=jnp.zeros(4, jnp.bfloat16)), "sinks is bfloat16; wanted float32"),
  (dict(sinks=0.0), "sinks is a float; wanted an array [N]"),
])
def test_bad_input_is_one_clear_line(change, message):
  arguments = dict(q=jnp.zeros((2, 8, 4, 4)), k=jnp.zeros((2, 8, 2, 4)), v=jnp.zeros((2, 8, 2, 4)),
                   block_indices=jnp.zeros((2, 2, 8, 3), jnp.int32)) | change
  with pytest.raises(ValueError) as error:
    pallas_kernels.block_sparse_attention(**arguments)
  assert message in str(error.value) and "\n" not in str(error.value)
