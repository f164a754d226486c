"""`sliding_window_attention` on TPU against the reference, in strict TPU interpret mode."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels.sliding_window_attention import reference
from pallas_kernels.sliding_window_attention.tpu import op as mosaic_tpu
from tests import tpu_interpret
from tests.attention_inputs import normal, packed_segments, qkv
from tests.tpu_interpret import race_detectors  # noqa: F401  (a fixture)

SCALE = 0.1

# batch, tokens, heads, kv_heads, head dim, v dim, dtype, window, padded tokens or None, sinks
CASES = {
  "group of 1, ragged": (2, 290, 1, 1, 64, 64, "float32", 33, None, False),
  "group of 4, documents": (1, 250, 4, 1, 128, 128, "bfloat16", 128, 30, True),
  "group of 8, wide": (1, 150, 8, 1, 256, 256, "float32", 1, 11, True),
  "group of 16": (1, 256, 16, 1, 64, 64, "bfloat16", 100, None, True),
  "two kv heads, other v dim": (1, 180, 6, 2, 40, 72, "float32", 150, 7, True),
}


def both(window, segments=None, interpret=tpu_interpret.INTERPRET):
  """Kernel and reference as compiled functions (q, k, v[, sinks]) -> (out, None)."""
  segments = None if segments is None else jnp.asarray(segments)
  options = dict(window=window, scale=SCALE, query_offset=0, segment_ids=segments,
                 kv_segment_ids=segments)

  def compiled(op, **more):
    return jax.jit(lambda q, k, v, sinks=None: (op(q, k, v, sinks=sinks, **options, **more), None))

  return (compiled(mosaic_tpu.sliding_window_attention, interpret=interpret),
          compiled(reference.sliding_window_attention))


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(case, monkeypatch):
  B, T, N, K, H, E, dtype, window, padding, sunk = CASES[case]
  tpu_interpret.small_tiles(monkeypatch)
  segments = None if padding is None else packed_segments(3, B, T, padding=padding)
  inputs = qkv(1, B, T, N, K, H, E, dtype=dtype) + ((normal(6, N),) if sunk else ())
  cotangent = normal(5, B, T, N, E, dtype=dtype)
  cores = tpu_interpret.TWO_CORES if B * K > 1 else tpu_interpret.INTERPRET
  kernel, plain = both(window, segments, cores)
  (out, _), grads = tpu_interpret.value_and_grads(kernel, inputs, cotangent)
  (want, _), want_grads = tpu_interpret.value_and_grads(
    plain, tpu_interpret.as_float32(inputs), cotangent)
  assert out.dtype == dtype
  tpu_interpret.assert_like_reference(out, want, dtype)
  for x, grad, want_grad in zip(inputs, grads, want_grads):
    assert grad.dtype == x.dtype
    tpu_interpret.assert_like_reference(grad, want_grad, dtype, grad=True)
  if segments is not None:
    assert (np.asarray(out)[segments == 0] == 0).all()


@pytest.mark.parametrize("tokens, window", [(1, 128), (600, 128), (300, 1000)])
def test_default_tiles(tokens, window):
  inputs = (*qkv(2, 1, tokens, 2, 1, 16), normal(6, 2))
  kernel, plain = both(window)
  out, _ = kernel(*inputs)
  tpu_interpret.assert_like_reference(out, plain(*inputs)[0], "float32")


def test_tokens_far_outside_the_window_are_not_read():
  """Key tiles no query of a tile can see are never multiplied: NaN there stays there."""
  q, k, v = qkv(15, 1, 1100, 1, 1, 8)
  out, _ = both(128)[0](q, k.at[0, 0].set(jnp.nan), v)
  poisoned = np.flatnonzero(np.isnan(np.asarray(out[0])).any((-1, -2)))
  assert 0 in poisoned and poisoned.max() < 256 + 128


@pytest.mark.parametrize("change, message", [
  (dict(dtype="float16"), "q, k, v are float16; wanted all bfloat16 or all float32"),
  (dict(head_dim=264), "head dim 264; wanted at most 256"),
])
def test_what_is_not_covered_is_named(change, message):
  x = jnp.zeros((1, 16, 1, change.get("head_dim", 8)), change.get("dtype", "float32"))
  with pytest.raises(NotImplementedError) as error:
    pallas_kernels.sliding_window_attention(x, x, x, implementation="mosaic_tpu")
  assert message in str(error.value) and "\n" not in str(error.value)
