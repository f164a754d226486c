"""The paged Triton kernels compiled on a GPU against the references: values and selections."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from tests.attention_inputs import normal
from tests.paged_inputs import paged, picks, ring
from tests.tolerances import assert_norm_close

pytestmark = pytest.mark.gpu


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
