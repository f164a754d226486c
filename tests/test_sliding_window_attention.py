"""`sliding_window_attention`: values and gradients against float64 loops of the equations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pallas_kernels
from pallas_kernels.reference import windowed_attention
from pallas_kernels.sliding_window_attention.shapes import SHAPES
from tests import float64_loops as loops
from tests.attention_inputs import jitted, normal, packed_segments, qkv
from tests.tolerances import assert_close

sliding_window_attention = jitted(pallas_kernels.sliding_window_attention)


def expected(q, k, v, window, segments=None, sinks=None):
  visible = loops.visible_keys(q.shape[1], segments=segments, window=window)
  return loops.attention(q, k, v, visible, sinks=sinks)[0]


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("name", ["one_token", "window_of_one", "window_of_two", "one_past_a_band",
                                  "several_bands", "window_beyond_band", "window_beyond_tokens",
                                  "group_of_one", "other_value_dim"])
def test_values(name, sinks):
  s = SHAPES[name]
  q, k, v = qkv(1, s.batch, s.tokens, s.num_heads, s.num_kv_heads, s.head_dim, s.v_dim)
  sinks = normal(5, s.num_heads) if sinks else None
  out = sliding_window_attention(
    q, k, v, window=s.window, sinks=sinks)
  assert out.dtype == q.dtype
  assert_close(out, expected(q, k, v, s.window, sinks=sinks), "attention_f32")


@pytest.mark.parametrize("dtype,tolerance", [("bfloat16", "attention_bf16"),
                                             ("float16", "attention_f16")])
def test_half_precision_inputs(dtype, tolerance):
  q, k, v = qkv(2, 2, 70, 4, 2, 16, dtype=dtype)
  out = sliding_window_attention(q, k, v, window=20)
  assert out.dtype == q.dtype
  assert_close(out, expected(q, k, v, 20), tolerance)


@pytest.mark.parametrize("sinks", [False, True])
def test_padding_gives_zero_and_is_not_seen(sinks):
  q, k, v = qkv(3, 1, 40, 2, 1, 8)
  segments = np.asarray([[1] * 10 + [0] * 5 + [1] * 10 + [2] * 10 + [0] * 5], np.int32)
  sinks = normal(4, 2) if sinks else None
  out = sliding_window_attention(q, k, v, window=16, sinks=sinks,
                                                segment_ids=jnp.asarray(segments))
  assert (np.asarray(out)[segments == 0] == 0).all()
  assert_close(out, expected(q, k, v, 16, segments, sinks), "attention_f32")


@pytest.mark.parametrize("banded_map", [False, True])
@pytest.mark.parametrize("dtype,tolerance", [("float32", "attention_grad_f32"),
                                             ("bfloat16", "attention_grad_bf16")])
def test_gradients(dtype, tolerance, banded_map, monkeypatch):
  if banded_map:
    monkeypatch.setattr(windowed_attention, "KEPT_SCORES", 0)
    monkeypatch.setattr(windowed_attention, "CHUNK_SCORES", 2 * 2 * 4 * 64 * 128)
  segments = packed_segments(9, 2, 200, padding=9)
  q, k, v = qkv(9, 2, 200, 4, 2, 8, 12, dtype=dtype)
  sinks, cotangent = normal(12, 4), normal(14, 2, 200, 4, 12, dtype=dtype)

  def loss(q, k, v, sinks):
    out = sliding_window_attention(q, k, v, window=33, sinks=sinks,
                                                  segment_ids=jnp.asarray(segments))
    return (out.astype(jnp.float32) * cotangent.astype(jnp.float32)).sum(), out

  grads, out = jax.jit(jax.grad(loss, (0, 1, 2, 3), has_aux=True))(q, k, v, sinks)
  assert_close(out, expected(q, k, v, 33, segments, sinks),
               "attention_f32" if dtype == "float32" else "attention_bf16")
  visible = loops.visible_keys(200, segments=segments, window=33)
  for got, exact in zip(grads, loops.gradients(q, k, v, visible, cotangent, sinks)):
    assert_close(got, exact, tolerance)


def test_tokens_outside_the_window_are_not_read():
  """A NaN key poisons exactly the queries whose band reaches it, never one past the look-back."""
  q, k, v = qkv(15, 1, 640, 1, 1, 8)
  out = sliding_window_attention(q, k.at[0, 300].set(jnp.nan), v, window=128)
  poisoned = np.flatnonzero(np.isnan(np.asarray(out[0])).any((-1, -2)))
  assert 300 in poisoned and poisoned.min() >= 256 and poisoned.max() < 300 + 128 + 64


@settings(max_examples=8, deadline=None, derandomize=True)
@given(st.integers(1, 150), st.integers(1, 2), st.integers(1, 3), st.integers(1, 20),
       st.integers(1, 160), st.booleans(), st.integers(0, 1000))
def test_any_shape(tokens, kv_heads, group, head_dim, window, packed, seed):
  q, k, v = qkv(seed, 1, tokens, kv_heads * group, kv_heads, head_dim)
  segments = packed_segments(seed, 1, tokens, padding=tokens // 5) if packed else None
  out = sliding_window_attention(
    q, k, v, window=window, segment_ids=None if segments is None else jnp.asarray(segments))
  assert_close(out, expected(q, k, v, window, segments), "attention_f32")


def test_bad_input_is_one_clear_line():
  x = jnp.zeros((1, 4, 1, 4))
  with pytest.raises(ValueError, match="window=0; wanted an integer of at least 1"):
    pallas_kernels.sliding_window_attention(x, x, x, window=0)
  with pytest.raises(NotImplementedError, match="'warp'.*'reference'"):
    pallas_kernels.sliding_window_attention(x, x, x, implementation="warp")
