"""The ablations' blocks: uniform over what a token may see, and the previous token's."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hysparse_jax.config import ModelConfig
from hysparse_jax.errors import UserError
from hysparse_jax.model import block_choice
from hysparse_jax.model.decoder_layer import TokenContext
from hysparse_jax.model.hybrid import FullLayer
from hysparse_jax.model.layers import positions_within

CFG = ModelConfig(num_layers=3, d_model=16, num_heads=4, num_kv_heads=2, head_dim=8, d_ff=16,
                  sparse_per_full=1, block_size=4, selected_tokens=12, window=8, dtype="float32")
SEGMENTS = np.repeat([[1, 2, 0], [1, 1, 0]], [18, 25, 5], axis=1)
T = SEGMENTS.shape[1]


STARTS = np.array([[0] * 18 + [18] * 25 + [T] * 5, [0] * 43 + [T] * 5])


def test_random_blocks_are_distinct_causal_and_uniform():
  tokens, picks = 4096, 3
  index = jnp.broadcast_to(jnp.arange(tokens), (1, tokens))
  picked = np.asarray(block_choice.random_blocks(index, 0 * index, 2, picks, 64, tokens // 64))
  assert picked.shape == (1, 2, tokens, picks)
  own = np.arange(tokens) // 64
  assert (picked <= own[:, None]).all()
  full = picked[:, :, 64 * picks:]
  assert (np.diff(full, axis=-1) > 0).all() and (full >= 0).all()
  first = picked[0, 0, 64:128]                       # two blocks to see, both picked
  np.testing.assert_array_equal(first, np.tile([0, 1, -1], (64, 1)))
  # The last 2048 tokens see 33 to 64 blocks: each of the first 32 is picked by 3 / blocks of them.
  late = picked[0, :, 2048:]
  share = np.array([(late == block).any(-1).mean() for block in range(32)])
  expected = np.mean(picks / (own[2048:] + 1))
  assert np.abs(share - expected).max() < 4.5 * (expected / late[..., 0].size) ** 0.5
  assert (picked[0, 0] != picked[0, 1]).any()        # heads differ


def test_random_blocks_stay_in_their_document():
  index = jnp.broadcast_to(jnp.arange(T), SEGMENTS.shape)
  picked = np.asarray(block_choice.random_blocks(index, jnp.asarray(STARTS), 2, 3, 4, T // 4))
  assert (picked[:, :, 43:] == -1).all()
  inside = picked[0, :, 18:43]
  assert (inside[inside >= 0] >= 18 // 4).all()
  assert (inside[:, 3 * 4:] >= 0).all()              # enough blocks seen: all three are picked


def test_previous_blocks():
  picked = jnp.arange(2 * 1 * 6 * 2).reshape(2, 1, 6, 2)
  opens = jnp.array([[1, 0, 0, 1, 0, 0], [1, 0, 0, 0, 1, 0]], bool)
  found = block_choice.previous_blocks(picked, opens)
  np.testing.assert_array_equal(found[0, 0, :, 0], [0, 0, 2, 6, 6, 8])
  np.testing.assert_array_equal(found[1, 0, :, 0], [12, 12, 14, 16, 20, 20])


@pytest.mark.parametrize("choice", ["oracle", "random", "previous"])
def test_the_full_layer_hands_on_what_was_chosen(choice):
  cfg = dataclasses.replace(CFG, block_choice=choice)
  layer = FullLayer(cfg, rngs=nnx.Rngs(0))
  x = jax.random.normal(jax.random.key(1), (2, T, 16))
  segments = jnp.asarray(SEGMENTS)
  context = TokenContext(positions_within(segments, SEGMENTS.shape), segments)
  out, shared, _, _ = layer(x, context, 3)
  oracle = FullLayer(CFG, rngs=nnx.Rngs(0))
  expected_out, expected, _, _ = oracle(x, context, 3)
  picked, best = shared.block_indices, expected.block_indices
  np.testing.assert_array_equal(out, expected_out)   # the layer's own output does not change
  if choice == "oracle":
    np.testing.assert_array_equal(picked, best)
  elif choice == "previous":
    np.testing.assert_array_equal(picked[0, :, 19:43], best[0, :, 18:42])
    np.testing.assert_array_equal(picked[0, :, [0, 18]], best[0, :, [0, 18]])
  else:
    index = jnp.broadcast_to(jnp.arange(T), SEGMENTS.shape)
    np.testing.assert_array_equal(
      picked, block_choice.random_blocks(index, jnp.asarray(STARTS), 2, 3, 4, T // 4))
    assert (picked != best).any()


def test_a_choice_needs_sparse_layers():
  with pytest.raises(UserError, match="block_choice='random' needs attention='hysparse'"):
    ModelConfig(attention="swa", block_choice="random")
