"""200 random shapes on a Hopper GPU, forward and gradients: the oracle and the sparse layer.

Half of the draws are the oracle's, whose picks must be the float32 reference's unless two blocks
tie to within float32's rounding of a logit; the other half run `sparse_layer_attention`, that is
`block_sparse_attention` and `sliding_window_attention` with sinks and gates, on picks of a random
width. Each runs twice and must answer in the same bits (but for cuDNN's backward).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from experiments.bench.check import TIE, log_weights
from pallas_kernels.reference.block_selection import select_blocks
from tests.tolerances import TOLERANCES, assert_norm_close, assert_rows_close

pytestmark = pytest.mark.gpu


def draw(seed):
  """A random call: arrays and options."""
  rng = np.random.default_rng(seed)
  batch, tokens = int(rng.integers(1, 3)), int(rng.integers(1, 1500))
  kv_heads, group = int(rng.choice([1, 2, 3])), int(rng.choice([1, 2, 4, 8, 16]))
  head_dim, picks = int(rng.choice([64, 128])), int(rng.choice([1, 2, 4, 8, 16]))
  dtype = rng.choice(["bfloat16", "float16"])
  array = lambda heads: jnp.asarray(
    rng.standard_normal((batch, tokens, heads, head_dim)), jnp.dtype(str(dtype)))
  q, k, v, dout = array(kv_heads * group), array(kv_heads), array(kv_heads), array(kv_heads * group)
  segments = None
  if rng.random() < 0.5:
    borders = np.sort(rng.integers(0, tokens + 1, (batch, 3)))
    ids = (np.arange(tokens)[None, :, None] >= borders[:, None]).sum(-1)
    segments = jnp.asarray(ids, jnp.int32)      # starts as padding unless a border is at 0
  return rng, q, k, v, dout, segments, picks


def cut(rng, seed, q, dout, segments):
  """Some queries of each row: q, dout, segments and offset; all of them for every other seed.

  The offset is an int, or i32 [B], for one of each row; queries may stand after the last key.
  """
  if seed % 2:
    return q, dout, segments, 0
  batch, tokens = q.shape[:2]
  count = int(rng.integers(1, tokens + 1))
  starts = rng.integers(0, tokens, batch)
  if seed % 4:
    starts[:] = starts[0]
  if segments is not None:
    rows = np.minimum(starts[:, None] + np.arange(count), tokens - 1)
    segments = jnp.take_along_axis(segments, jnp.asarray(rows), 1)
  offset = int(starts[0]) if seed % 4 else jnp.asarray(starts, jnp.int32)
  return q[:, :count], dout[:, :count], segments, offset


def check_picks(picked, scores):
  """Ascending, -1 last, and the reference's choice wherever float32 can tell the blocks apart."""
  picked, scores = np.asarray(picked), np.asarray(scores)
  want = np.asarray(select_blocks(jnp.asarray(scores), picked.shape[-1]))
  assert (want >= 0).sum() == (picked >= 0).sum()
  for at in zip(*np.nonzero((picked != want).any(-1))):
    got, expected = set(picked[at].tolist()), set(want[at].tolist())
    assert sorted(got - {-1}) == [x for x in picked[at] if x >= 0]
    gap = scores[at][sorted(expected - got)].max() - scores[at][sorted(got - expected)].min()
    assert gap < TIE, f"{at}: got {sorted(got)}, want {sorted(expected)}, {gap} apart"


@pytest.mark.parametrize("seed", range(100))
def test_oracle_attention(seed):
  rng, q, k, v, dout, kv_segments, picks = draw(seed)
  q, dout, segments, offset = cut(rng, seed, q, dout, kv_segments)

  def run(implementation, q, k, v, dout):
    (out, picked), pullback = jax.vjp(lambda q, k, v: pallas_kernels.oracle_attention(
      q, k, v, num_blocks=picks, query_offset=offset, segment_ids=segments,
      kv_segment_ids=kv_segments, implementation=implementation), q, k, v)
    grads = pullback((dout.astype(out.dtype), np.zeros(picked.shape, jax.dtypes.float0)))
    return out, picked, grads

  kernel = jax.jit(lambda *x: run("mosaic_gpu", *x))
  out, picked, grads = kernel(q, k, v, dout)
  again = kernel(q, k, v, dout)
  same = jax.tree.map(lambda x, y: bool((x == y).all()), (out, picked, grads), again)
  assert same[0] and same[1]
  if segments is not None or not isinstance(offset, int) or offset:
    assert all(same[2])      # ours; cuDNN promises no order of additions
  single = [x.astype(jnp.float32) for x in (q, k, v, dout)]
  want, _, want_grads = jax.jit(lambda *x: run("reference", *x))(*single)
  check_picks(picked, jax.jit(functools.partial(log_weights, query_offset=offset))(
    q, k, segments, kv_segments))
  bits = {"bfloat16": "bf16", "float16": "f16"}[q.dtype.name]
  assert_rows_close(out, want, f"attention_rows_{bits}")
  # A gradient may cancel to nothing (one visible key: dq = 0); its terms are of the size of dout.
  for got, expected in zip(grads, want_grads):
    assert_rows_close(got, expected, f"attention_grad_rows_any_shape_{bits}", size=0.1)


@pytest.mark.parametrize("seed", range(100, 200))
def test_sparse_layer_attention(seed):
  rng, q, k, v, dout, segments, picks = draw(seed)
  batch, tokens, heads, head_dim = q.shape
  kv_heads, window = k.shape[2], int(rng.choice([1, 64, 100, 128]))
  blocks = -(-tokens // 64)
  scores = rng.standard_normal((batch, kv_heads, tokens, blocks)).astype(np.float32)
  scores[..., np.arange(blocks) > np.arange(tokens)[:, None] // 64] = -np.inf
  scores[rng.random(scores.shape) < 0.3] = -np.inf        # some rows pick less, some nothing
  indices = select_blocks(jnp.asarray(scores), picks)
  array = lambda n: jnp.asarray(rng.standard_normal((batch, tokens, n, head_dim)), q.dtype)
  sinks = lambda: jnp.asarray(rng.standard_normal(heads), jnp.float32)
  gates = jax.nn.sigmoid(array(heads)), jax.nn.sigmoid(array(heads))
  inputs = (q, k, v, array(kv_heads), array(kv_heads), *gates, sinks(), sinks())

  def run(implementation, dout, q, k, v, k_local, v_local, *rest):
    op = lambda q, k, v, *local: pallas_kernels.sparse_layer_attention(
      q, k, v, indices, *local, window=window, segment_ids=segments, implementation=implementation)
    out, pullback = jax.vjp(op, q, k, v, k_local, v_local, *rest)
    return out, pullback(dout.astype(out.dtype))

  kernel = jax.jit(lambda *x: run("mosaic_gpu", *x))
  got, again = kernel(dout, *inputs), kernel(dout, *inputs)
  assert all(jax.tree.leaves(jax.tree.map(lambda x, y: bool((x == y).all()), got, again)))
  single = [x.astype(jnp.float32) for x in (dout, *inputs)]
  want = jax.jit(lambda *x: run("reference", *x))(*single)
  norm = f"gpu_sparse_grad_{q.dtype.name}_norm"
  limit = TOLERANCES[norm][1]
  *values, dsparse, dlocal = jax.tree.leaves(got)
  *expected, want_dsparse, want_dlocal = jax.tree.leaves(want)
  for value, exact in zip(values, expected):
    assert_norm_close(value, exact, norm)
  # A sink's gradient is a sum of -p_sink out dout that cancels; its summands' rounding does not.
  branch = jax.jit(functools.partial(branches, indices, segments, window))
  for value, exact, size in zip((dsparse, dlocal), (want_dsparse, want_dlocal), branch(*single)):
    error = np.linalg.norm(np.asarray(value, np.float64) - np.asarray(exact, np.float64))
    assert error < limit * max(size, np.linalg.norm(exact))


def branches(indices, segments, window, dout, q, k, v, k_local, v_local, *rest):
  """The norm of each branch's p_sink * out * gated dout."""
  gates, sinks = rest[:2], rest[2:]
  reference = dict(segment_ids=segments, implementation="reference")
  ops = (lambda v, sinks: pallas_kernels.block_sparse_attention(
           q, k, v, indices, sinks=sinks, **reference),
         lambda v, sinks: pallas_kernels.sliding_window_attention(
           q, k_local, v, window=window, sinks=sinks, **reference))
  sizes = []
  for op, values, gate, sink in zip(ops, (v, v_local), gates, sinks):
    seen = op(jnp.ones_like(values), sink)      # what the keys hold of the softmax
    sizes.append(jnp.linalg.norm((1 - seen) * op(values, sink) * gate * dout))
  return sizes
