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
from pallas_kernels.reference.block_selection import select_blocks
from pallas_kernels.reference.masked_attention import masked_attention
from tests.tolerances import TOLERANCES, assert_norm_close

pytestmark = pytest.mark.gpu

# ||got - want|| / ||want||, as in the two ops' own tests: 8 (11) bits of operands and results.
NORM_TOLERANCE = {"bfloat16": 1e-2, "float16": 1.4e-3}
# Float32 sums of 128 products in another order, on logits of up to some 6.
TIE = 2e-5


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


def relative(got, want):
  got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
  assert np.isfinite(got).all()
  return np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-30)


def log_weights(q, k, segments):
  """f32 [B,K,T,C]: the logarithm of each block's largest softmax weight, -inf for no candidate."""
  batch, tokens = q.shape[:2]
  pad = -tokens % 64
  q, k = (jnp.pad(x.astype(jnp.float32), ((0, 0), (0, pad), (0, 0), (0, 0))) for x in (q, k))
  position = jnp.arange(tokens + pad)
  visible = (position[:, None] >= position) & (position < tokens)
  visible = jnp.broadcast_to(visible, (batch, 1, *visible.shape))
  if segments is not None:
    ids = jnp.pad(segments, ((0, 0), (0, pad)))
    visible &= ((ids[:, :, None] == ids[:, None]) & (ids != 0)[:, None])[:, None]
  _, scores = masked_attention(q * q.shape[-1] ** -0.5, k, k, visible, block_size=64)
  return scores[:, :, :tokens]


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
  _, q, k, v, dout, segments, picks = draw(seed)

  def run(implementation, q, k, v, dout):
    (out, picked), pullback = jax.vjp(lambda q, k, v: pallas_kernels.oracle_attention(
      q, k, v, num_blocks=picks, segment_ids=segments, implementation=implementation), q, k, v)
    grads = pullback((dout.astype(out.dtype), np.zeros(picked.shape, jax.dtypes.float0)))
    return out, picked, grads

  kernel = jax.jit(lambda *x: run("mosaic_gpu", *x))
  out, picked, grads = kernel(q, k, v, dout)
  again = kernel(q, k, v, dout)
  same = jax.tree.map(lambda x, y: bool((x == y).all()), (out, picked, grads), again)
  assert same[0] and same[1]
  if segments is not None:
    assert all(same[2])
  single = [x.astype(jnp.float32) for x in (q, k, v, dout)]
  want, _, want_grads = jax.jit(lambda *x: run("reference", *x))(*single)
  check_picks(picked, jax.jit(log_weights)(q, k, segments))
  limit = NORM_TOLERANCE[q.dtype.name]
  assert relative(out, want) < limit
  for got, expected in zip(grads, want_grads):
    assert relative(got, expected) < limit


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
