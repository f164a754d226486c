"""The Hopper kernels of `oracle_attention`: GPU interpret mode, lowered for CUDA, on a device.

GPU interpret mode fills memory that nothing has written with NaN, block maxima of tiles that a
query does not visit included.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import compat
from pallas_kernels.oracle_attention import reference
from pallas_kernels.oracle_attention.gpu import op
from pallas_kernels.oracle_attention.gpu.select import ascending_network, select
from pallas_kernels.oracle_attention.gpu.tile_ranges import visibility
from tests import float64_loops
from tests.tolerances import assert_close, assert_rows_close

INTERPRET = compat.InterpretGPUParams()
TOLERANCE = {"bfloat16": "attention{}_rows_bf16", "float16": "attention{}_rows_f16"}


def _inputs(B, T, N, K, H, dtype, seed=0, keys=None):
  S = T if keys is None else keys
  rngs = jax.random.split(jax.random.key(seed), 4)
  return [jax.random.normal(rng, (B, rows, n, H), dtype)
          for rng, rows, n in zip(rngs, (T, S, S, T), (N, K, K, N))]


def _segments(B, T):
  """Two documents, padding, one more; the borders fall inside 128-token tiles."""
  borders = [0, 0.4 * T, 0.7 * T, 0.8 * T]
  ids = np.searchsorted(borders, np.arange(T), side="right")
  return jnp.asarray(np.broadcast_to(np.where(ids == 3, 0, ids), (B, T)), jnp.int32)


def _rows(x, starts, count):
  """x[b, starts[b] : starts[b] + count], the last entry repeated after the end."""
  index = np.minimum(np.asarray(starts)[:, None] + np.arange(count), x.shape[1] - 1)
  return jnp.asarray(np.stack([np.asarray(row)[i] for row, i in zip(x, index)]))


@functools.partial(jax.jit, static_argnames=("interpret", "num_blocks", "offset", "kernel"))
def _run(q, k, v, grad_out, offsets, ids, kv_ids, *, num_blocks, offset, kernel, interpret=None):
  options = dict(block_size=64, num_blocks=num_blocks, segment_ids=ids, kv_segment_ids=kv_ids,
                 query_offset=offsets if offset is None else offset, scale=q.shape[-1] ** -0.5)
  if kernel:
    function = functools.partial(op.oracle_attention, interpret=interpret, **options)
  else:
    function = functools.partial(reference.oracle_attention, **options)
  (out, indices), vjp = jax.vjp(function, q, k, v)
  no_grad = np.zeros(indices.shape, jax.dtypes.float0)
  return out, indices, vjp((grad_out.astype(out.dtype), no_grad))


def _kernel(arrays, offset, segments, num_blocks, interpret):
  static = isinstance(offset, int)
  return _run(*arrays, None if static else offset, *segments, num_blocks=num_blocks,
              offset=offset if static else None, kernel=True, interpret=interpret)


def _compare(arrays, offset, segments, num_blocks, interpret):
  """Kernel against the reference in float32; returns what the kernel gave."""
  out, indices, grads = _kernel(arrays, offset, segments, num_blocks, interpret)
  static = isinstance(offset, int)
  want, want_indices, want_grads = _run(
    *(x.astype(jnp.float32) for x in arrays), None if static else offset, *segments,
    num_blocks=num_blocks, offset=offset if static else None, kernel=False)
  name = TOLERANCE[arrays[0].dtype.name]
  assert_rows_close(out, want, name.format(""))
  np.testing.assert_array_equal(indices, want_indices)
  for grad, expected in zip(grads, want_grads):
    assert_rows_close(grad, expected, name.format("_grad"))
  if segments[0] is not None:
    hidden = np.asarray(segments[0] == 0)
    assert not np.asarray(out, np.float32)[hidden].any()
    assert (np.asarray(indices).transpose(0, 2, 1, 3)[hidden] == -1).all()
  return out, indices, grads


def _packed(B, S, starts, count):
  """(ids of `count` queries from starts[b] on, ids of the S keys)."""
  kv_ids = _segments(B, S)
  return _rows(kv_ids, starts, count), kv_ids


@pytest.mark.parametrize("segmented", [False, True])
def test_interpreted_matches_reference(segmented):
  segments = _packed(1, 200, [0], 200) if segmented else (None, None)
  _compare(_inputs(1, 200, 2, 1, 64, jnp.bfloat16), 0, segments, 2, INTERPRET)


@pytest.mark.parametrize("queries, keys, offset, segmented", [
  (65, 300, 170, False),              # causality cuts through two key tiles
  (70, 200, 150, False),              # the last 20 queries stand after the last key
  (65, 300, [0, 190], True),          # traced, another offset in each row
])
def test_interpreted_queries_at_an_offset(queries, keys, offset, segmented):
  B = 1 if isinstance(offset, int) else len(offset)
  starts = np.broadcast_to(offset, (B,))
  arrays = _inputs(B, queries, 2, 1, 64, jnp.bfloat16, keys=keys)
  segments = _packed(B, keys, starts, queries) if segmented else (None, None)
  offset = offset if isinstance(offset, int) else jnp.asarray(offset, jnp.int32)
  _compare(arrays, offset, segments, 2, INTERPRET)


def _check_cuts(arrays, segments, counts, interpret):
  """Queries cut anywhere: the same bits, but for dk and dv, which add up in another order."""
  q, k, v, grad_out = arrays
  zero = np.zeros(q.shape[0], np.int32)
  out, indices, (dq, dk, dv) = _kernel(arrays, jnp.asarray(zero), segments, 2, interpret)
  sums, start = [0.0, 0.0], 0
  for count in counts:
    cut = slice(start, start + count)
    ids = (None, None) if segments[0] is None else (segments[0][:, cut], segments[1])
    part = _kernel((q[:, cut], k, v, grad_out[:, cut]), jnp.asarray(zero + start), ids, 2,
                   interpret)
    np.testing.assert_array_equal(part[0], out[:, cut])
    np.testing.assert_array_equal(part[1], indices[:, :, cut])
    np.testing.assert_array_equal(part[2][0], dq[:, cut])
    sums = [total + x.astype(jnp.float32) for total, x in zip(sums, part[2][1:])]
    start += count
  assert start == q.shape[1]
  for total, whole in zip(sums, (dk, dv)):
    assert_rows_close(total, whole, TOLERANCE[q.dtype.name].format("_grad"))


def test_interpreted_cuts_equal_the_whole():
  _check_cuts(_inputs(1, 137, 1, 1, 64, jnp.bfloat16, keys=200),
              (_segments(1, 200)[:, :137], _segments(1, 200)), (7, 65, 65), INTERPRET)


def test_interpreted_launches_of_few_rows(monkeypatch):
  monkeypatch.setattr(op, "launch_rows", lambda *_: 128)
  _run.clear_cache()      # traced for other launches
  _compare(_inputs(1, 200, 1, 1, 64, jnp.float16, keys=230), 30, (None, None), 1, INTERPRET)
  _run.clear_cache()


def test_keys_after_every_query_are_never_read():
  """A cache's unwritten end is NaN here: results are those without it, and its gradients are 0."""
  arrays = q, k, v, grad_out = _inputs(1, 60, 1, 1, 64, jnp.float16, keys=300)
  poisoned = [x.at[:, 128:].set(jnp.nan) for x in (k, v)]
  got = _kernel((q, *poisoned, grad_out), 68, (None, None), 1, INTERPRET)
  assert all(not np.asarray(x[:, 128:], np.float32).any() for x in got[2][1:])
  got = (*got[:2], (got[2][0], *(x[:, :128] for x in got[2][1:])))
  short = (q, *(x[:, :128] for x in arrays[1:3]), grad_out)
  jax.tree.map(np.testing.assert_array_equal, got,
               _kernel(short, 68, (None, None), 1, INTERPRET))


def test_log_sum_exp_is_natural_and_empty_rows_are_minus_infinity():
  q, k, v, _ = _inputs(1, 130, 1, 1, 64, jnp.float16, seed=3)
  ids, kv_ids = _packed(1, 130, [0], 130)
  _, lse, _ = op._forward(q, k, v, None, ids, kv_ids, op.Options(0, 0.125, 0, INTERPRET))
  assert lse.dtype == jnp.float32 and lse.shape == (1, 1, 130)
  scores = 0.125 * np.einsum("qh,kh->qk", *(np.asarray(x[0, :, 0], np.float64) for x in (q, k)))
  visible = float64_loops.visible_keys(130, segments=np.asarray(ids))
  want = [np.log(np.exp(scores[t, visible(0, 0, t)]).sum()) if visible(0, 0, t) else -np.inf
          for t in range(130)]
  np.testing.assert_array_equal(np.isneginf(lse[0, 0]), np.isneginf(want))
  seen = np.isfinite(want)
  assert 0 < seen.sum() < 130
  assert_close(np.asarray(lse[0, 0])[seen], np.asarray(want)[seen], "attention_f32")


def test_ties_go_to_the_lower_block():
  rng = np.random.default_rng(0)
  B, N, C, T, P = 1, 2, 4, 256, 2
  block_max = rng.integers(-2, 2, (B, N, C, T)).astype(np.float32)
  block_max[:, :, np.arange(C)[:, None] > np.arange(T) // 64] = -np.inf
  block_max[..., 2:, :128] = np.nan      # what no query of the first tile visits
  lse = rng.integers(0, 2, (B, N, T)).astype(np.float32)
  empty = rng.random(T) < 0.1
  block_max[..., empty], lse[..., empty] = -np.inf, -np.inf
  ranges = visibility(0, None, None, B, T, T).key_ranges
  picked = select(jnp.asarray(block_max), jnp.asarray(lse), ranges, jnp.zeros(1, jnp.int32),
                  kv_heads=1, num_blocks=P, scale=1.0, interpret=INTERPRET)
  with np.errstate(invalid="ignore"):
    score = (block_max - lse[:, :, None]).max(1)[0]
  for t in range(T):
    order = sorted(np.flatnonzero(score[:, t] > -np.inf), key=lambda c, t=t: (-score[c, t], c))
    expected = sorted(order[:P]) + [-1] * (P - len(order))
    assert list(np.asarray(picked)[0, 0, :, t]) == expected


@pytest.mark.parametrize("queries, keys, offsets", [
  (1024, 1024, 0), (700, 1000, [0, 300]), (65, 1000, [130, 990]), (1, 1, 0), (300, 100, [0, 64]),
])
@pytest.mark.parametrize("documents", [None, "sorted", "any"])
def test_tile_ranges_against_a_loop(queries, keys, offsets, documents):
  rng = np.random.default_rng(1)
  B = 2
  starts = np.broadcast_to(offsets, (B,))
  traced = offsets if isinstance(offsets, int) else jnp.asarray(offsets, jnp.int32)
  position = starts[:, None, None] + np.arange(queries)[:, None]
  see = position >= np.arange(keys)
  ids = kv_ids = None
  if documents:
    kv_ids = np.repeat(rng.integers(0, 5, (B, -(-keys // 32))), 32, axis=1)[:, :keys]
    if documents == "sorted":
      kv_ids = np.sort(kv_ids)
    ids = np.asarray(_rows(kv_ids, starts, queries))
    see = see & (ids[:, :, None] == kv_ids[:, None]) & (ids != 0)[:, :, None]
    ids, kv_ids = (jnp.asarray(x, jnp.int32) for x in (ids, kv_ids))
  visible = visibility(traced, ids, kv_ids, B, queries, keys)
  for of_queries, pairs in ((True, see), (False, see.transpose(0, 2, 1))):
    table = np.asarray(visible.key_ranges if of_queries else visible.query_ranges)
    rows, cols = pairs.shape[1:]
    assert table.shape == (B, -(-rows // 128), 4)
    for b, i in np.ndindex(table.shape[:2]):
      begin, plain_begin, plain_end, end = map(int, table[b, i])
      assert 0 <= begin <= plain_begin <= plain_end <= end <= -(-cols // 128)
      tile = pairs[b, i * 128:(i + 1) * 128]
      assert not tile[:, :begin * 128].any() and not tile[:, end * 128:].any()
      assert tile[:, plain_begin * 128:plain_end * 128].all()
      if documents == "any":
        continue
      # Where documents follow each other, no tile is visited or masked without need.
      tiles = [tile[:, j * 128:(j + 1) * 128] for j in range(-(-cols // 128))]
      touched = [j for j, pair in enumerate(tiles) if pair.any()]
      if touched:
        assert (begin, end) == (touched[0], touched[-1] + 1)
      # Padding among the keys needs a mask; rows of padding queries are dropped.
      keys = [pair.shape[int(of_queries)] for pair in tiles]
      full = [j for j in touched if keys[j] == 128 and tiles[j].all()]
      if not of_queries or len(tile) == 128:
        assert plain_end - plain_begin == len(full)
  assert visible.aligned == isinstance(offsets, int)
  key_ranges = np.asarray(visible.key_ranges)
  assert (key_ranges[..., 3] > key_ranges[..., 0]).all()      # the forward needs a first tile


@pytest.mark.parametrize("n", [1, 2, 16, 32])
def test_network_sorts(n):
  for seed in range(20):
    x = np.random.default_rng(seed).integers(0, 9, n)
    expected = np.sort(x)
    for lo, hi in ascending_network(n):
      x[lo], x[hi] = min(x[lo], x[hi]), max(x[lo], x[hi])
    np.testing.assert_array_equal(x, expected)


def test_launches_are_bounded():
  for queries, keys, heads in ((131_072, 131_072, 32), (131_072, 131_072, 64),
                               (1_048_576, 1_048_576, 8), (16_384, 1_048_576, 64)):
    rows = op.launch_rows(1, queries, keys, heads)
    assert rows % 128 == 0
    assert rows * heads * (keys // 64) * 4 <= op.CHUNK_BYTES
  assert op.launch_rows(1, 32_768, 32_768, 64) == 32_768
  assert op.launch_rows(1, 100, 100, 2) == 128


@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize("head_dim, offset", [(64, 0), (128, 0), (64, "traced"), (128, 70)])
def test_lowers_for_cuda(segmented, head_dim, offset):
  shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.bfloat16)
  i32 = lambda *s: jax.ShapeDtypeStruct(s, jnp.int32)
  T = 1024 if offset == 0 else 512
  q, k = shape(1, T, 8, head_dim), shape(1, 1024, 2, head_dim)
  traced = offset == "traced"
  text = _run.trace(
    q, k, k, q, i32(1) if traced else None, *((i32(1, T), i32(1, 1024)) if segmented else
                                              (None, None)),
    num_blocks=16, offset=None if traced else offset, kernel=True,
  ).lower(lowering_platforms=("cuda",)).as_text()  # fmt: skip
  # Forward and selection once each; our backward is two kernels.
  assert ("fmhaSoftmaxBackward" in text) == (offset == 0)
  assert text.count("custom_call @mosaic_gpu_v2") == (2 if offset == 0 and not segmented else 4)
  assert ("stablehlo.case" in text) == (offset == 0 and segmented)


def test_one_segment_a_row():
  whole = jnp.asarray([[3, 3], [1, 1]])
  assert op.one_segment(whole, whole)
  for ids, kv_ids in (([[3, 3], [1, 2]], whole), (whole, [[3, 3], [1, 2]]),
                      ([[0, 0], [1, 1]], [[0, 0], [1, 1]])):
    assert not op.one_segment(jnp.asarray(ids), jnp.asarray(kv_ids))


@pytest.mark.parametrize("names, kernels", [
  ((), 3),  # forward and selection, then forward again
  (("oracle_out", "oracle_lse", "oracle_block_indices"), 2),
])
def test_saved_names_spare_the_forward_under_remat(names, kernels):
  q = jax.ShapeDtypeStruct((1, 512, 2, 64), jnp.bfloat16)

  def loss(q):
    out, picked = op.oracle_attention(
      q, q, q, block_size=64, num_blocks=4, query_offset=0, segment_ids=None, kv_segment_ids=None,
      scale=0.1)
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
    op.oracle_attention(q, k, v, query_offset=0, segment_ids=None, kv_segment_ids=None, scale=0.1,
                        **options)


@pytest.mark.gpu
def test_one_document_a_row_takes_the_plain_backward():
  arrays = _inputs(2, 1500, 8, 2, 128, jnp.bfloat16)
  ids = jnp.broadcast_to(jnp.asarray([[1], [7]], jnp.int32), (2, 1500))
  _compare(arrays, 0, (ids, ids), 16, None)
  text = _run.lower(*arrays, None, ids, ids, num_blocks=16, offset=0, kernel=True).as_text()
  assert "fmhaSoftmaxBackward" in text


@pytest.mark.gpu
@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize("B, T, S, N, K, H, dtype, offset", [
  (1, 2048, 2048, 4, 1, 128, "bfloat16", 0), (2, 1500, 1500, 8, 8, 64, "float16", 0),
  (2, 1472, 1472, 16, 1, 128, "bfloat16", 0), (1, 1333, 1333, 16, 2, 64, "float16", 0),
  (2, 65, 1333, 8, 2, 64, "float16", 1200), (2, 300, 1333, 8, 2, 128, "bfloat16", [0, 1100]),
])
def test_compiled_matches_reference(B, T, S, N, K, H, dtype, offset, segmented):
  arrays = _inputs(B, T, N, K, H, jnp.dtype(dtype), keys=S)
  segments = _packed(B, S, np.broadcast_to(offset, (B,)), T) if segmented else (None, None)
  offset = offset if isinstance(offset, int) else jnp.asarray(offset, jnp.int32)
  once = _compare(arrays, offset, segments, 16, None)
  again = _kernel(arrays, offset, segments, 16, None)
  jax.tree.map(np.testing.assert_array_equal, once[:2], again[:2])
  # cuDNN's backward, used for plain causal attention, promises no order of additions.
  if segmented or not isinstance(offset, int) or offset:
    jax.tree.map(np.testing.assert_array_equal, once[2], again[2])


@pytest.mark.gpu
@pytest.mark.parametrize("segmented", [False, True])
def test_compiled_cuts_equal_the_whole(segmented):
  _check_cuts(_inputs(2, 1500, 8, 2, 128, jnp.bfloat16),
              (_segments(2, 1500),) * 2 if segmented else (None, None),
              (1, 7, 64, 65, 800, 563), None)
