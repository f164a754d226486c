"""The Hopper kernels of `oracle_attention`: GPU interpret mode, lowered for CUDA, on a device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import compat
from pallas_kernels.oracle_attention import reference
from pallas_kernels.oracle_attention.gpu import forward as mosaic_gpu_forward
from pallas_kernels.oracle_attention.gpu import op as mosaic_gpu
from pallas_kernels.oracle_attention.gpu.select import ascending_network, select

INTERPRET = compat.InterpretGPUParams()
# ||x - ref|| / ||ref||: p and ds enter the tensor cores in 8 (11) bits, the result is rounded too.
NORM_TOLERANCE = {"bfloat16": 4e-3, "float16": 6e-4}


def _inputs(B, T, N, K, H, dtype, seed=0):
  keys = jax.random.split(jax.random.key(seed), 4)
  return [jax.random.normal(key, (B, T, n, H), dtype) for key, n in zip(keys, (N, K, K, N))]


def _segments(B, T):
  """Two documents, padding, one more; the borders fall inside 128-token tiles."""
  borders = [0, 0.4 * T, 0.7 * T, 0.8 * T]
  ids = np.searchsorted(borders, np.arange(T), side="right")
  return jnp.asarray(np.broadcast_to(np.where(ids == 3, 0, ids), (B, T)), jnp.int32)


@functools.partial(jax.jit, static_argnums=0)
def _run(op, q, k, v, grad_out):
  (out, picked), vjp = jax.vjp(op, q, k, v)
  no_grad = np.zeros(picked.shape, jax.dtypes.float0)
  return out, picked, vjp((grad_out.astype(out.dtype), no_grad))


def _relative(x, ref):
  return float(jnp.linalg.norm(x.astype(jnp.float32) - ref) / jnp.linalg.norm(ref))


def _compare(arrays, segment_ids, num_blocks, interpret):
  q, k, v, grad_out = arrays
  options = {"block_size": 64, "num_blocks": num_blocks, "segment_ids": segment_ids}
  options["scale"] = q.shape[-1] ** -0.5
  kernel = functools.partial(mosaic_gpu.oracle_attention, interpret=interpret, **options)
  out, picked, grads = _run(kernel, q, k, v, grad_out)
  exact = functools.partial(reference.oracle_attention, **options)
  f32 = [x.astype(jnp.float32) for x in arrays]
  ref_out, ref_picked, ref_grads = _run(exact, *f32)
  limit = NORM_TOLERANCE[q.dtype.name]
  assert _relative(out, ref_out) < limit
  np.testing.assert_array_equal(picked, ref_picked)
  for grad, ref in zip(grads, ref_grads):
    assert _relative(grad, ref) < limit
  if segment_ids is not None:
    hidden = np.asarray(segment_ids == 0)
    assert not np.asarray(out, np.float32)[hidden].any()
    assert (np.asarray(picked).transpose(0, 2, 1, 3)[hidden] == -1).all()
  return out, picked, grads


@pytest.mark.parametrize("segmented", [False, True])
def test_interpreted_matches_reference(segmented):
  segment_ids = _segments(1, 200) if segmented else None
  _compare(_inputs(1, 200, 2, 1, 64, jnp.bfloat16), segment_ids, 2, INTERPRET)


def test_chunked_queries(monkeypatch):
  monkeypatch.setattr(mosaic_gpu, "chunk_rows", lambda *_: 128)
  _compare(_inputs(1, 200, 1, 1, 64, jnp.float16), None, 1, INTERPRET)


def test_ties_go_to_the_lower_block():
  rng = np.random.default_rng(0)
  B, N, C, T, P = 1, 2, 4, 256, 2
  block_max = rng.integers(-2, 2, (B, N, C, T)).astype(np.float32)
  block_max[:, :, np.arange(C)[:, None] > np.arange(T) // 64] = -np.inf
  lse = rng.integers(0, 2, (B, N, T)).astype(np.float32)
  picked = select(jnp.asarray(block_max), jnp.asarray(lse), kv_heads=1, num_blocks=P, scale=1.0,
                  interpret=INTERPRET)
  score = (block_max - lse[:, :, None]).max(1)[0]
  for t in range(T):
    order = sorted(np.flatnonzero(score[:, t] > -np.inf), key=lambda c, t=t: (-score[c, t], c))
    expected = sorted(order[:P]) + [-1] * (P - len(order))
    assert list(np.asarray(picked)[0, 0, :, t]) == expected


def test_visible_tiles_against_a_loop():
  rng = np.random.default_rng(1)
  ids = np.repeat(rng.integers(0, 4, (2, 32)), 32, axis=1).astype(np.int32)
  ids[0] = np.sort(ids[0])
  first, plain, last = map(np.asarray, mosaic_gpu_forward.visible_tiles(jnp.asarray(ids)))
  see = (ids[:, :, None] == ids[:, None]) & (ids != 0)[:, :, None]
  see = see.reshape(2, 8, 128, 8, 128)
  for b in range(2):
    for q in range(8):
      assert not see[b, q, :, : first[b, q]].any()
      assert see[b, q, :, plain[b, q] : q].all()
      assert first[b, q] <= plain[b, q] <= q
      assert not see[b, last[b, q] + 1 :, :, q].any()


@pytest.mark.parametrize("n", [1, 2, 16, 32])
def test_network_sorts(n):
  for seed in range(20):
    x = np.random.default_rng(seed).integers(0, 9, n)
    expected = np.sort(x)
    for lo, hi in ascending_network(n):
      x[lo], x[hi] = min(x[lo], x[hi]), max(x[lo], x[hi])
    np.testing.assert_array_equal(x, expected)


def test_chunks_are_bounded():
  for tokens, heads in ((131_072, 32), (131_072, 64), (1_048_576, 8)):
    rows = mosaic_gpu.chunk_rows(1, tokens, heads)
    assert rows % 128 == 0
    assert rows * heads * (tokens // 64) * 4 <= mosaic_gpu.CHUNK_BYTES
  assert mosaic_gpu.chunk_rows(1, 32_768, 64) == 32_768
  assert mosaic_gpu.chunk_rows(1, 100, 2) == 128


@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_lowers_for_cuda(segmented, head_dim):
  shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.bfloat16)
  q, k = shape(1, 1024, 8, head_dim), shape(1, 1024, 2, head_dim)
  ids = jax.ShapeDtypeStruct((1, 1024), jnp.int32) if segmented else None

  def step(q, k, v, ids):
    op = functools.partial(mosaic_gpu.oracle_attention, block_size=64, num_blocks=16,
                           segment_ids=ids, scale=0.1)
    return _run(op, q, k, v, q)

  text = jax.jit(step).trace(q, k, k, ids).lower(lowering_platforms=("cuda",)).as_text()
  assert ("fmhaSoftmaxBackward" in text) != segmented
  # Forward and selection once each; our backward is two kernels.
  assert text.count("custom_call @mosaic_gpu_v2") == (4 if segmented else 2)


@pytest.mark.parametrize("names, kernels", [
  ((), 3),  # forward and selection, then forward again
  (("oracle_out", "oracle_lse", "oracle_block_indices"), 2),
])
def test_saved_names_spare_the_forward_under_remat(names, kernels):
  q = jax.ShapeDtypeStruct((1, 512, 2, 64), jnp.bfloat16)

  def loss(q):
    out, picked = mosaic_gpu.oracle_attention(
      q, q, q, block_size=64, num_blocks=4, segment_ids=None, scale=0.1)
    return jnp.sin(out.astype(jnp.float32)).sum() + picked.sum()

  policy = jax.checkpoint_policies.save_only_these_names(*names)
  step = jax.jit(jax.value_and_grad(jax.checkpoint(loss, policy=policy)))
  text = step.trace(q).lower(lowering_platforms=("cuda",)).as_text()
  assert text.count("custom_call @mosaic_gpu_v2") == kernels


def test_cudnn_backward_is_the_known_one(monkeypatch):
  primitive, causal = compat.cudnn_attention_backward()
  assert causal.name == "CAUSAL" and hasattr(primitive, "bind")
  monkeypatch.setattr(compat, "_CUDNN_BACKWARD_ARGUMENTS", ["query"])
  with pytest.raises(NotImplementedError, match="compat.py"):
    compat.cudnn_attention_backward()


@pytest.mark.parametrize("change, name", [
  ({"dtype": jnp.float32}, "dtypes"),
  ({"H": 32}, "head dim"),
  ({"block_size": 32}, "block_size"),
  ({"num_blocks": 3}, "num_blocks"),
])
def test_what_is_not_covered_is_named(change, name):
  q, k, v, _ = _inputs(1, 128, 2, 1, change.get("H", 64), change.get("dtype", jnp.bfloat16))
  options = {"block_size": 64, "num_blocks": 2} | {
    key: value for key, value in change.items() if key in ("block_size", "num_blocks")}
  with pytest.raises(NotImplementedError, match=name):
    mosaic_gpu.oracle_attention(q, k, v, segment_ids=None, scale=0.1, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize("shape", [
  (1, 2048, 4, 1, 128, "bfloat16"), (2, 1500, 8, 8, 64, "float16"),
  (2, 1472, 16, 1, 128, "bfloat16"), (1, 1333, 16, 2, 64, "float16"),
])
def test_compiled_matches_reference(shape, segmented):
  *sizes, dtype = shape
  arrays = _inputs(*sizes, jnp.dtype(dtype))
  segment_ids = _segments(*sizes[:2]) if segmented else None
  once = _compare(arrays, segment_ids, 16, None)
  again = _compare(arrays, segment_ids, 16, None)
  jax.tree.map(np.testing.assert_array_equal, once[:2], again[:2])
  if segmented:  # cuDNN's backward, used without segments, promises no order of additions
    jax.tree.map(np.testing.assert_array_equal, once[2], again[2])
