"""A whole model on the GPU, bfloat16 with kernels, against the reference attention in float32.

Loss and the gradient of every parameter, for HySparse and both baselines, on packed rows whose
documents start at multiples of the block size. Documents of at most P blocks test everything but
the choice: every visible block is selected in either precision. A document of more blocks tests
the choice too, within what near-ties between blocks may change.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hysparse_jax.config import ModelConfig
from hysparse_jax.model.transformer import Transformer
from tests.tolerances import assert_leaf_close

BLOCK = 64
BASE = ModelConfig(
  vocab_size=512, num_layers=5, d_model=256, num_heads=8, num_kv_heads=2, head_dim=64, d_ff=512,
  sparse_per_full=3, block_size=BLOCK, selected_tokens=16 * BLOCK, window=128, qk_norm=True,
  remat="layer", dtype="bfloat16")
SHORT = ((1000, 129, 640, 64), (1, 63, 950, 513, 200))      # tokens of each row's documents
LONG = ((1990,), (1300, 300, 65))


def packed(documents, tokens):
  """i32 [B, T]: document numbers from 1, each at a multiple of BLOCK; 0 between and behind them."""
  segment_ids = np.zeros((len(documents), tokens), np.int32)
  for row, lengths in zip(segment_ids, documents):
    start = 0
    for number, length in enumerate(lengths, 1):
      row[start:start + length] = number
      start += -(-length // BLOCK) * BLOCK
    assert start <= tokens
  return segment_ids


def loss_and_gradients(cfg, weights, tokens, segment_ids):
  """Mean next-token loss within documents, and its gradient by leaf name; `weights`: f32 leaves."""
  empty = jax.eval_shape(lambda: Transformer(cfg, rngs=nnx.Rngs(0)))
  net = jax.tree.unflatten(jax.tree.structure(empty), weights)
  counts = (segment_ids[:, 1:] == segment_ids[:, :-1]) & (segment_ids[:, 1:] != 0)

  @jax.jit
  def run(net):
    def loss(net):
      logits = net(tokens, segment_ids)[:, :-1]
      taken = jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
      losses = jax.nn.logsumexp(logits, axis=-1) - taken
      return jnp.sum(jnp.where(counts, losses, 0.0)) / counts.sum()

    return jax.value_and_grad(loss)(net)

  value, gradients = jax.block_until_ready(run(net))
  return float(value), {jax.tree_util.keystr(path): np.asarray(leaf, np.float64)
                        for path, leaf in jax.tree_util.tree_leaves_with_path(gradients)}


def compare(cfg, documents, implementation, tolerance, tokens=2048):
  """Asserts loss and gradients of `implementation` in cfg.dtype against float32's reference."""
  rng = np.random.default_rng(7)
  segment_ids = packed(documents, tokens)
  ids = rng.integers(0, cfg.vocab_size, segment_ids.shape, dtype=np.int32)
  ids[:, 1::2] = ids[:, ::2]                       # something to predict
  weights = jax.tree.leaves(jax.jit(lambda: Transformer(cfg, rngs=nnx.Rngs(0)))())
  got = loss_and_gradients(
    dataclasses.replace(cfg, implementation=implementation), weights, ids, segment_ids)
  exact = dataclasses.replace(cfg, implementation="reference", dtype="float32")
  with jax.default_matmul_precision("highest"):
    want = loss_and_gradients(exact, weights, ids, segment_ids)
  assert got[0] == pytest.approx(want[0], abs=3e-3)
  assert got[1].keys() == want[1].keys()
  for name, leaf in want[1].items():
    assert np.abs(leaf).max() > 0, f"{name} has no gradient"
    assert_leaf_close(got[1][name], leaf, tolerance, name)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("attention", ["hysparse", "full", "swa"])
def test_all_visible_blocks_selected(attention, head_dim):
  cfg = dataclasses.replace(BASE, attention=attention, head_dim=head_dim)
  compare(cfg, SHORT, "mosaic_gpu", "model_bf16")


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim, num_kv_heads", [(64, 2), (128, 1)])
def test_hysparse_chooses_its_blocks(head_dim, num_kv_heads):
  cfg = dataclasses.replace(BASE, head_dim=head_dim, num_kv_heads=num_kv_heads)
  compare(cfg, LONG, "mosaic_gpu", "model_bf16_near_ties")
