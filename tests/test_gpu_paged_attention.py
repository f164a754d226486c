"""The paged Triton kernels against the references: interpreted on CPU, compiled on a GPU."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from tests import triton_interpreter
from tests.attention_inputs import jitted, normal
from tests.paged_inputs import paged, picks, ring
from tests.tolerances import assert_norm_close

oracle = jitted(pallas_kernels.paged_oracle_attention)
sparse_layer = jitted(pallas_kernels.paged_sparse_layer_attention)


@pytest.fixture(scope="module")
def on_cpu():
  if jax.default_backend() != "cpu":
    pytest.skip("the interpreter runs on CPU")
  patch = pytest.MonkeyPatch()
  triton_interpreter.install(patch)
  yield
  patch.undo()


def interpreted(lengths, heads, kv_heads, head_dim, seed=11, **given):
  return paged(seed, lengths, heads, kv_heads, head_dim, dtype="float16", **given)


def check_full(x, num_blocks, config):
  """The interpreted kernels against the reference: values, selection."""
  from pallas_kernels.paged_attention.gpu import full

  out, indices = full.paged_oracle_attention(
    x.q, *x.cache, *x.where, layer=x.layer, num_blocks=num_blocks, scale=0.125, config=config)
  want, want_indices = oracle(x.q.astype(jnp.float32), *x.cache, *x.where, layer=x.layer,
                              num_blocks=num_blocks, scale=0.125)
  assert out.dtype == jnp.float16
  assert_norm_close(out, want, "gpu_sparse_float16_norm")
  np.testing.assert_array_equal(indices, want_indices)


@pytest.mark.parametrize("programs", [1, 5, 64])
@pytest.mark.parametrize("lengths,heads,kv_heads,head_dim,num_blocks", [
  ([1, 63, 64, 65, 0, 400], 8, 2, 64, 3),     # G = 4; runs that cross rows and heads
  ([300], 16, 1, 128, 16),                    # fewer blocks than are selected
  ([130, 1], 3, 3, 64, 1),
  ([129], 2, 2, 64, 0),                       # no selection
])
def test_full_kernels(on_cpu, lengths, heads, kv_heads, head_dim, num_blocks, programs):
  from pallas_kernels.paged_attention.gpu import full

  check_full(interpreted(lengths, heads, kv_heads, head_dim), num_blocks,
             full.FullConfig(programs=programs))


def test_a_pair_in_more_parts_than_are_merged_at_once(on_cpu):
  from pallas_kernels.paged_attention.gpu import full

  check_full(interpreted([64 * 70], 1, 1, 64), 5, full.FullConfig(programs=70))


def test_full_kernels_break_ties_to_the_lower_block(on_cpu):
  """Small integers make every logit exact; equal pages tie, and so do heads."""
  from pallas_kernels.paged_attention.gpu import full

  rng = np.random.default_rng(0)
  page = rng.integers(-2, 3, (3, 64, 1, 64))[rng.integers(0, 3, 12)].reshape(1, 768, 1, 64)
  k = jnp.asarray(page, jnp.float16)
  x = interpreted([768], 4, 1, 64, k=k)
  x = dataclasses.replace(x, q=jnp.asarray(rng.integers(-1, 2, x.q.shape), jnp.float16))
  check_full(x, 4, full.FullConfig(programs=3))


@pytest.mark.parametrize("tiles", [1, 2, 5, None])
@pytest.mark.parametrize("lengths,heads,kv_heads,head_dim,num_blocks,window", [
  ([1, 64, 65, 0, 300], 4, 1, 64, 4, 128),
  ([300], 16, 1, 128, 3, 100),
  ([130, 20], 3, 3, 64, 1, 64),
])
def test_sparse_kernels(on_cpu, lengths, heads, kv_heads, head_dim, num_blocks, window, tiles):
  x = interpreted(lengths, heads, kv_heads, head_dim)
  run = functools.partial(compare_sparse, x, lengths, num_blocks, window, tiles)
  run(elementwise=True, sinks=True)
  run(elementwise=False, sinks=False)


def compare_sparse(x, lengths, num_blocks, window, tiles, elementwise, sinks):
  from pallas_kernels.paged_attention.gpu import sparse

  heads, kv_heads = x.q.shape[1], x.k.shape[2]
  rings = [ring(normal(seed, *kv.shape), lengths, window, "float16")
           for seed, kv in ((21, x.k), (22, x.v))]
  gates = [jax.nn.sigmoid(normal(seed, len(lengths), heads, x.v.shape[3] if elementwise else 1,
                                 dtype="float16")) for seed in (23, 24)]
  gates = gates if elementwise else [gates[0], None]
  options = dict(layer=x.layer, ring_layer=jnp.int32(1), scale=0.125,
                 sinks_sparse=normal(25, heads) if sinks else None,
                 sinks_local=normal(26, heads) if sinks else None)
  blocks = picks(27, lengths, kv_heads, num_blocks)
  out = sparse.paged_sparse_layer_attention(
    x.q, *x.cache, blocks, *x.where, *rings, *gates, config=sparse.SparseConfig(tiles=tiles),
    **options)
  want = sparse_layer(x.q.astype(jnp.float32), *x.cache, blocks, *x.where, *rings, *gates,
                      **options)
  assert out.dtype == jnp.float16
  assert_norm_close(out, want, "gpu_sparse_float16_norm")


@pytest.mark.parametrize("branch", ["sparse", "local"])
@pytest.mark.parametrize("tiles", [1, None])
def test_sparse_kernels_of_one_branch(on_cpu, branch, tiles):
  from pallas_kernels.paged_attention.gpu import sparse

  lengths = [300, 65]
  x = interpreted(lengths, 4, 2, 64)
  none = dict(layer=None, ring_layer=None, scale=0.125, sinks_sparse=None, sinks_local=None)
  if branch == "sparse":
    arguments = (*x.cache, picks(1, lengths, 2, 3), *x.where, None, None, None, None)
    none |= dict(layer=x.layer, sinks_sparse=normal(2, 4))
  else:
    arguments = (None, None, None, None, x.lengths, *(ring(y, lengths, 128, "float16")
                                                      for y in (x.k, x.v)), None, None)
    none |= dict(ring_layer=jnp.int32(1), sinks_local=normal(2, 4))
  out = sparse.paged_sparse_layer_attention(x.q, *arguments, **none,
                                            config=sparse.SparseConfig(tiles=tiles))
  want = sparse_layer(x.q.astype(jnp.float32), *arguments, **none)
  assert_norm_close(out, want, "gpu_sparse_float16_norm")


def both(op, q, *arguments, **options):
  """What the kernels give, and what the reference gives in float32."""
  static = {k: v for k, v in options.items() if isinstance(v, int | float)}
  traced = {k: v for k, v in options.items() if k not in static}
  run = lambda q, which: jax.jit(functools.partial(op, implementation=which, **static))(
    q, *arguments, **traced)
  return run(q, "triton"), run(q.astype(jnp.float32), "reference")


def scores_of(x):
  """The importance of every block, f32 [B,K,C]; -inf past the row's end."""
  q, k = (np.asarray(y, np.float32) for y in (x.q, x.k))
  batch, longest, kv_heads, head_dim = k.shape
  q = q.reshape(batch, kv_heads, -1, head_dim)
  logits = np.einsum("bkgh,bskh->bkgs", q, k) * head_dim ** -0.5
  seen = np.arange(longest) < np.asarray(x.lengths)[:, None]
  logits = np.where(seen[:, None, None], logits, -np.inf)
  top = logits.max(-1, keepdims=True)
  lse = top + np.log(np.exp(logits - top).sum(-1, keepdims=True))
  pad = -longest % 64
  scores = np.pad(logits - lse, [(0, 0)] * 3 + [(0, pad)], constant_values=-np.inf)
  return scores.reshape(*scores.shape[:3], -1, 64).max((2, 4))


@pytest.mark.gpu
@pytest.mark.parametrize("lengths,heads,kv_heads,head_dim,dtype", [
  ([1, 63, 64, 65, 128, 5000], 64, 4, 128, "bfloat16"),
  ([20_000, 3], 32, 8, 128, "bfloat16"),
  ([3000, 1500, 4096], 8, 8, 64, "float16"),
  ([700], 16, 2, 256, "bfloat16"),
  ([9000] * 33, 8, 2, 64, "bfloat16"),
])
def test_full(lengths, heads, kv_heads, head_dim, dtype):
  x = paged(1, lengths, heads, kv_heads, head_dim, dtype=dtype)
  (out, indices), (want, want_indices) = both(
    pallas_kernels.paged_oracle_attention, x.q, *x.cache, *x.where, layer=x.layer, num_blocks=16)
  assert_norm_close(out, want, f"gpu_sparse_{dtype}_norm")
  scores = scores_of(x)
  indices, want_indices = np.asarray(indices), np.asarray(want_indices)
  np.testing.assert_array_equal(indices >= 0, want_indices >= 0)
  differ = 0
  for at in np.ndindex(indices.shape[:2]):
    mine, theirs = (set(y[at][y[at] >= 0].tolist()) for y in (indices, want_indices))
    assert sorted(mine) == indices[at][indices[at] >= 0].tolist()
    differ += len(mine - theirs)
    for a, b in zip(sorted(mine - theirs), sorted(theirs - mine)):     # only what float32 ties
      assert abs(scores[at][a] - scores[at][b]) < 1e-5
  assert differ <= 2
  again, _ = both(pallas_kernels.paged_oracle_attention, x.q, *x.cache, *x.where, layer=x.layer,
                  num_blocks=16)
  jax.tree.map(np.testing.assert_array_equal, again, (out, jnp.asarray(indices)))


@pytest.mark.gpu
@pytest.mark.parametrize("lengths,heads,kv_heads,head_dim,window,dtype", [
  ([1, 63, 64, 65, 128, 5000], 64, 4, 128, 128, "bfloat16"),
  ([20_000, 3], 32, 8, 128, 128, "bfloat16"),
  ([3000, 1500, 4096], 8, 8, 64, 100, "float16"),
  ([700], 16, 2, 256, 128, "bfloat16"),
  ([2000] * 33, 64, 4, 128, 128, "bfloat16"),
])
@pytest.mark.parametrize("gated", [True, False])
def test_sparse_layer(lengths, heads, kv_heads, head_dim, window, dtype, gated):
  x = paged(2, lengths, heads, kv_heads, head_dim, dtype=dtype)
  rings = [ring(normal(seed, *kv.shape), lengths, window, dtype)
           for seed, kv in ((3, x.k), (4, x.v))]
  gates = [jax.nn.sigmoid(normal(seed, len(lengths), heads, width, dtype=dtype)) if gated else None
           for seed, width in ((5, head_dim), (6, 1))]
  sinks = [normal(seed, heads) if gated else None for seed in (7, 8)]
  out, want = both(
    pallas_kernels.paged_sparse_layer_attention, x.q, *x.cache, picks(9, lengths, kv_heads, 16),
    *x.where, *rings, *gates, *sinks, layer=x.layer, ring_layer=jnp.int32(1))
  assert_norm_close(out, want, f"gpu_sparse_{dtype}_norm")
