"""What the tests of TPU kernels share: strict interpret mode, small tiles, comparisons."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import compat, tpu
from pallas_kernels.causal_attention_tpu import tiles as tpu_attention
from pallas_kernels.causal_attention_tpu.backward import BackwardTiles
from pallas_kernels.causal_attention_tpu.forward import ForwardTiles
from tests.tolerances import assert_close

INTERPRET = tpu.interpret_params()
TWO_CORES = tpu.interpret_params(cores=2)      # as a v5p has


def small_tiles(monkeypatch, block_q=128, block_kv=128, chunk=256, heads=2):
  """Makes short sequences span several tiles, chunks and parts of a group."""
  monkeypatch.setattr(tpu_attention, "LARGEST_FORWARD",
                      ForwardTiles(block_q, block_kv, heads, block_kv))
  monkeypatch.setattr(tpu_attention, "LARGEST_BACKWARD",
                      BackwardTiles(block_q, block_q, chunk, heads))


@pytest.fixture(autouse=True)
def race_detectors(monkeypatch):
  """The race detector of every kernel that a test runs; a race in any of them fails the test.

  JAX keeps the last kernel's alone, which would say nothing of a forward kernel once a backward
  kernel has run. Autouse in every test module that imports it.
  """
  interpreter, detectors = compat.tpu_interpreter(), []
  make = interpreter.RaceDetectionState

  def keep(**options):
    detectors.append(make(**options))
    return detectors[-1]

  monkeypatch.setattr(interpreter, "RaceDetectionState", keep)
  yield detectors
  assert not any(detector.races_found for detector in detectors)


@functools.partial(jax.jit, static_argnums=0)
def value_and_grads(op, inputs, cotangent):
  """(out, aux), gradients of every input; op returns (out, aux) and is traced once per object."""
  out, pullback, aux = jax.vjp(op, *inputs, has_aux=True)
  return (out, aux), pullback(cotangent.astype(out.dtype))


def assert_like_reference(got, want, dtype, grad=False):
  """Elementwise for float32; where q, k, v, and so the weights, are bfloat16, in the Euclidean norm
  of the whole and of the worst row.

  Args:
    got: result or gradient of the kernel; want: of the reference in float32.
    dtype: of q, k and v.
    grad: whether it is a gradient.
  """
  assert got.shape == want.shape
  if dtype == "float32":
    assert_close(got, want, "attention_grad_f32" if grad else "attention_f32")
    return
  got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
  error = got - want
  assert_close(np.linalg.norm(error) / np.linalg.norm(want), 0.0, "mxu_bf16_norm")
  if got.ndim > 1:                 # a row is what one query or key of one head has
    rows = np.linalg.norm(want, axis=-1)
    typical = np.sqrt(np.mean(rows ** 2))
    worst = (np.linalg.norm(error, axis=-1) / np.maximum(rows, typical)).max()
    assert_close(worst, 0.0, "mxu_bf16_row")


def as_float32(arrays):
  return [x.astype(jnp.float32) for x in arrays]
