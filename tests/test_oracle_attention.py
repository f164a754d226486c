"""`oracle_attention`: values, gradients and selections against float64 loops of the equations."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pallas_kernels
from pallas_kernels.oracle_attention.shapes import SHAPES
from pallas_kernels.reference import masked_attention
from tests import float64_loops as loops
from tests.attention_inputs import jitted, normal, packed_segments, qkv, small_integers
from tests.tolerances import assert_close

oracle_attention = jitted(pallas_kernels.oracle_attention)


def expected(q, k, v, block_size, num_blocks, segments=None, scale=None, resolution=1e-12):
  batch, tokens, heads, _ = q.shape
  visible = loops.visible_keys(tokens, segments=segments)
  out, log_weights = loops.attention(q, k, v, visible, scale=scale)
  scores = loops.block_scores(log_weights, (batch, tokens, heads), heads // k.shape[2], block_size)
  indices, gap = loops.select(scores, (batch, tokens), k.shape[2], num_blocks, resolution)
  return out, indices, gap


def check(q, k, v, block_size, num_blocks, segments=None, tolerance="attention_f32"):
  out, indices = oracle_attention(
    q, k, v, block_size=block_size, num_blocks=num_blocks,
    segment_ids=None if segments is None else jnp.asarray(segments))
  want, want_indices, gap = expected(q, k, v, block_size, num_blocks, segments)
  assert out.dtype == q.dtype and indices.dtype == jnp.int32
  assert_close(out, want, tolerance)
  assert gap > 2e-6, "the inputs have near-ties that float32 cannot resolve: choose another seed"
  np.testing.assert_array_equal(indices, want_indices)


@pytest.mark.parametrize("name", ["one_token", "one_past_a_block", "one_head", "group_of_one",
                                  "wide_group", "other_value_dim", "odd_block"])
def test_values_and_indices(name):
  shape = SHAPES[name]
  q, k, v = qkv(1, shape.batch, shape.tokens, shape.num_heads, shape.num_kv_heads,
                shape.head_dim, shape.v_dim)
  check(q, k, v, shape.block_size, shape.num_blocks)


@pytest.mark.parametrize("dtype,tolerance", [("bfloat16", "attention_bf16"),
                                             ("float16", "attention_f16")])
def test_half_precision_inputs(dtype, tolerance):
  check(*qkv(2, 2, 70, 4, 2, 16, dtype=dtype), 8, 3, tolerance=tolerance)


@pytest.mark.parametrize("num_blocks", [2, 16])
def test_segments_and_padding(num_blocks):
  segments = packed_segments(3, 2, 90, documents=4, padding=13)
  q, k, v = qkv(3, 2, 90, 4, 2, 16)
  check(q, k, v, 8, num_blocks, segments)
  out, indices = oracle_attention(q, k, v, block_size=8, num_blocks=num_blocks,
                                                 segment_ids=jnp.asarray(segments))
  assert (np.asarray(out)[segments == 0] == 0).all()
  assert (np.asarray(indices).transpose(0, 2, 1, 3)[segments == 0] == -1).all()


def test_a_segment_that_comes_back_is_one_segment():
  segments = np.asarray([[1] * 20 + [2] * 20 + [1] * 20], np.int32)
  check(*qkv(4, 1, 60, 2, 1, 16), 8, 3, segments)
  check(*qkv(4, 1, 60, 2, 1, 16), 8, 12, segments)


def test_planted_ties_go_to_the_lower_block():
  """Keys repeat with period 16, so blocks 0, 2, 4, ... hold equal keys and tie exactly."""
  q = small_integers(5, 1, 64, 2, 8)
  k = jnp.tile(small_integers(6, 1, 16, 1, 8), (1, 4, 1, 1))
  v = normal(7, 1, 64, 1, 8)
  out, indices = oracle_attention(q, k, v, block_size=8, num_blocks=3, scale=1.0)
  # Logits are integers: distinct ones differ by 1, float64 rounding of equal ones by 1e-15.
  want, want_indices, gap = expected(q, k, v, 8, 3, scale=1.0, resolution=1e-6)
  assert gap > 1e-3
  assert_close(out, want, "attention_f32")
  np.testing.assert_array_equal(indices, want_indices)


def test_all_keys_equal_picks_the_first_blocks():
  q, k = small_integers(8, 1, 80, 4, 8), jnp.ones((1, 80, 2, 8))
  _, indices = oracle_attention(q, k, k, block_size=8, num_blocks=3)
  np.testing.assert_array_equal(
    indices[0, 1], [[i if i <= t // 8 else -1 for i in range(3)] for t in range(80)])


def test_weights_that_underflow_keep_their_order():
  """Block i's logits are -200 i: every weight but block 0's is 0 in float32."""
  logits = -200.0 * np.asarray([0, 5, 2, 9, 1, 7])
  k = jnp.asarray(np.repeat(logits, 8), jnp.float32)[None, :, None, None]
  q, v = jnp.ones((1, 48, 1, 1)), normal(9, 1, 48, 1, 1)
  out, indices = oracle_attention(q, k, v, block_size=8, num_blocks=3, scale=1.0)
  np.testing.assert_array_equal(indices[0, 0, 47], [0, 2, 4])
  np.testing.assert_array_equal(indices[0, 0, 31], [0, 1, 2])
  assert_close(out, expected(q, k, v, 8, 3, scale=1.0)[0], "attention_f32")


def test_heads_are_normalised_before_their_maximum():
  """Head 0 has the larger logits, head 1 the larger weight: the block of head 1's peak wins."""
  tokens, width = 24, 2
  k = np.zeros((1, tokens, 1, width), np.float32)
  k[0, :16, 0, 0] = 10.0            # head 0: 16 equal logits of 10, weights 1/24 or so each
  k[0, 17, 0, 1] = 3.0              # head 1: one logit of 3 in block 2, weight about 0.46
  q = np.zeros((1, tokens, 2, width), np.float32)
  q[0, :, 0, 0], q[0, :, 1, 1] = 1.0, 1.0
  v = np.zeros((1, tokens, 1, width), np.float32)
  _, indices = oracle_attention(*map(jnp.asarray, (q, k, v)), block_size=8,
                                               num_blocks=1, scale=1.0)
  assert indices[0, 0, -1, 0] == 2


def test_no_blocks_is_plain_causal_attention():
  q, k, v = qkv(10, 2, 65, 4, 2, 16)
  out, indices = oracle_attention(q, k, v, num_blocks=0)
  assert indices.shape == (2, 2, 65, 0) and indices.dtype == jnp.int32
  assert_close(out, loops.attention(q, k, v, loops.visible_keys(65))[0], "attention_f32")
  assert "top_k" not in str(jax.make_jaxpr(
    lambda *a: pallas_kernels.oracle_attention(*a, num_blocks=0, block_size=8))(q, k, v))


@pytest.mark.parametrize("dtype,tolerance", [("float32", "attention_grad_f32"),
                                             ("bfloat16", "attention_grad_bf16")])
def test_gradients(dtype, tolerance):
  segments = packed_segments(11, 2, 70, padding=9)
  q, k, v = qkv(11, 2, 70, 4, 2, 16, 24, dtype=dtype)
  cotangent = normal(14, 2, 70, 4, 24, dtype=dtype)

  def loss(q, k, v):
    out, indices = oracle_attention(q, k, v, block_size=8, num_blocks=3,
                                                   segment_ids=jnp.asarray(segments))
    return (out.astype(jnp.float32) * cotangent.astype(jnp.float32)).sum(), indices

  grads, _ = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(q, k, v)
  want = loops.gradients(q, k, v, loops.visible_keys(70, segments=segments), cotangent)
  for got, exact in zip(grads, want):
    assert got.dtype == q.dtype
    assert_close(got, exact, tolerance)


@pytest.mark.parametrize("window,sinks", [(None, None), (4, np.asarray([0.3, -1.0]))])
def test_float64_loops_gradients(window, sinks):
  rng = np.random.default_rng(15)
  q, k, v = (rng.normal(size=(1, 7, n, 3)) for n in (2, 1, 1))
  cotangent = rng.normal(size=q.shape)
  segments = np.asarray([[1, 1, 2, 2, 2, 0, 2]])
  visible = loops.visible_keys(7, segments=segments, window=window)
  arguments = [q, k, v] + ([] if sinks is None else [sinks])
  exact = loops.gradients(q, k, v, visible, cotangent, sinks)
  for which, argument in enumerate(arguments):
    numeric = np.zeros_like(argument)
    for place in np.ndindex(argument.shape):
      ends = []
      for step in (1e-5, -1e-5):
        moved = [x.copy() for x in arguments]
        moved[which][place] += step
        ends.append((loops.attention(*moved[:3], visible,
                                     sinks=moved[3] if sinks is not None else None)[0]
                     * cotangent).sum())
      numeric[place] = (ends[0] - ends[1]) / 2e-5
    assert_close(exact[which], numeric, "finite_difference_f64")


def test_chunks_change_nothing(monkeypatch):
  q, k, v = qkv(16, 2, 150, 4, 2, 16)
  segments = jnp.asarray(packed_segments(16, 2, 150, padding=7))

  def run(q, k, v):
    def loss(q, k, v):
      out, indices = oracle_attention(q, k, v, block_size=8, num_blocks=4,
                                                     segment_ids=segments)
      return jnp.sin(out).sum(), (out, indices)
    return jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(q, k, v)

  grads, (out, indices) = run(q, k, v)
  monkeypatch.setattr(masked_attention, "KEPT_SCORES", 0)
  monkeypatch.setattr(masked_attention, "CHUNK_SCORES", 2 * 4 * 150 * 7)
  chunked_grads, (chunked_out, chunked_indices) = run(q, k, v)
  np.testing.assert_array_equal(indices, chunked_indices)
  assert_close(chunked_out, out, "attention_routes_f32")
  for got, want in zip(chunked_grads, grads):
    assert_close(got, want, "attention_grad_f32")


@settings(max_examples=8, deadline=None, derandomize=True)
@given(st.integers(1, 40), st.integers(1, 3), st.integers(1, 3), st.integers(1, 9),
       st.integers(1, 9), st.integers(1, 5), st.booleans(), st.integers(0, 1000))
def test_any_shape(tokens, kv_heads, group, head_dim, block_size, num_blocks, packed, seed):
  """Integer inputs: logits are exact, so ties are real and everything else is far apart."""
  q = small_integers(seed, 1, tokens, kv_heads * group, head_dim, low=-1, high=2)
  k = small_integers(seed + 1, 1, tokens, kv_heads, head_dim, low=-1, high=2)
  v = normal(seed + 2, 1, tokens, kv_heads, head_dim)
  segments = packed_segments(seed, 1, tokens, padding=tokens // 5) if packed else None
  out, indices = oracle_attention(
    q, k, v, block_size=block_size, num_blocks=num_blocks, scale=1.0,
    segment_ids=None if segments is None else jnp.asarray(segments))
  want, want_indices, _ = expected(q, k, v, block_size, num_blocks, segments, scale=1.0)
  assert_close(out, want, "attention_f32")
  if group == 1:     # a row's scores are exact integers minus one number
    _, want_indices, _ = expected(q, k, v, block_size, num_blocks, segments, 1.0, 1e-6)
    np.testing.assert_array_equal(indices, want_indices)
  else:              # scores of different heads may tie only nearly: compare what was picked
    np.testing.assert_array_equal((np.asarray(indices) >= 0).sum(-1), (want_indices >= 0).sum(-1))


MEMORY_PROGRAM = """
import jax, jax.numpy as jnp
import pallas_kernels
from pallas_kernels.oracle_attention.shapes import SHAPES
s = SHAPES["tiny_8k"]
keys = jax.random.split(jax.random.key(0), 3)
q = jax.random.normal(keys[0], (s.batch, s.tokens, s.num_heads, s.head_dim))
k = jax.random.normal(keys[1], (s.batch, s.tokens, s.num_kv_heads, s.head_dim))
v = jax.random.normal(keys[2], (s.batch, s.tokens, s.num_kv_heads, s.head_dim))
def loss(q, k, v):
  out, indices = pallas_kernels.oracle_attention(q, k, v)
  out += pallas_kernels.sparse_layer_attention(
    q, k, v, indices, k, v, jnp.ones((1, 1, 1, 1)), jnp.ones((1, 1, 1, 1)))
  return (out ** 2).sum()
grads = jax.jit(jax.grad(loss, (0, 1, 2)))(q, k, v)
# Not getrusage: its peak starts at that of the process that started this one.
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]
print(all(bool(jnp.isfinite(g).all()) for g in grads), int(peak) * 1024)
"""


def test_8192_tokens_forward_and_backward_fit_in_2_gb():
  run = subprocess.run([sys.executable, "-c", MEMORY_PROGRAM], capture_output=True, text=True,
                       check=False, env=os.environ | {"XLA_FLAGS": ""})
  assert run.returncode == 0, run.stderr
  finite, peak_bytes = run.stdout.split()
  assert finite == "True"
  assert int(peak_bytes) < 2e9


@pytest.mark.parametrize("change,message", [
  (dict(k=jnp.zeros((2, 8, 3, 4)), v=jnp.zeros((2, 8, 3, 4))), "N=4 heads and k has K=3"),
  (dict(k=jnp.zeros((2, 9, 2, 4))), "v has shape [2, 8, 2, 4]; wanted [B=2,S=9,K=2,E]"),
  (dict(k=jnp.zeros((1, 8, 2, 4))), "k has shape [1, 8, 2, 4]; wanted [B=2,S,K,H=4]"),
  (dict(v=jnp.zeros((2, 8, 2))), "v has shape [2, 8, 2]"),
  (dict(q=jnp.zeros((2, 8, 4, 4), jnp.int32)), "q is int32; wanted float32 or bfloat16"),
  (dict(segment_ids=jnp.zeros((2, 8))), "segment_ids is float32; wanted int32"),
  (dict(segment_ids=jnp.zeros((2, 7), jnp.int32)), "segment_ids has shape [2, 7]"),
  (dict(block_size=0), "block_size=0; wanted an integer of at least 1"),
  (dict(num_blocks=-1), "num_blocks=-1; wanted an integer of at least 0"),
  (dict(scale=-1.0), "scale=-1.0"),
  (dict(q=jnp.zeros((2, 0, 4, 4))), "wanted no empty axis"),
])
def test_bad_input_is_one_clear_line(change, message):
  arguments = dict(q=jnp.zeros((2, 8, 4, 4)), k=jnp.zeros((2, 8, 2, 4)),
                   v=jnp.zeros((2, 8, 2, 4))) | change
  with pytest.raises(ValueError) as error:
    pallas_kernels.oracle_attention(**arguments)
  assert message in str(error.value) and "\n" not in str(error.value)


def test_an_implementation_that_does_not_exist():
  x = jnp.zeros((1, 4, 1, 4))
  with pytest.raises(NotImplementedError, match="'warp'.*'reference'"):
    pallas_kernels.oracle_attention(x, x, x, implementation="warp")
