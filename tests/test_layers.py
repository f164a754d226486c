"""Rotary embedding and its stretched forms, held to formulas written out in float64 NumPy."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hysparse_jax.config import ModelConfig, MoeConfig, RopeConfig
from hysparse_jax.errors import UserError
from hysparse_jax.model.layers import rope_frequencies, rotary, valid_mean
from hysparse_jax.model.transformer import Transformer
from tests.tolerances import assert_close
from tests.weights import drawn

X = np.asarray(jax.random.normal(jax.random.key(0), (2, 5, 3, 16)), np.float64)
POSITIONS = np.array([[0, 1, 2, 3, 4], [7, 8, 900, 901, 902]])


def turned(x, frequencies):
  """Pairs (i, i + R/2) of the first R channels as complex numbers, each turned by its angle."""
  half = len(frequencies)
  pairs = x[..., :half] + 1j * x[..., half:2 * half]
  pairs = pairs * np.exp(1j * POSITIONS[:, :, None, None] * np.asarray(frequencies))
  return np.concatenate([pairs.real, pairs.imag, x[..., 2 * half:]], -1)


def check(rope, frequencies, times=1.0):
  found = rotary(jnp.asarray(X, jnp.float32), jnp.asarray(POSITIONS), rope)
  assert_close(found, times * turned(X, frequencies), "rotary_f32")


def test_plain_and_partial():
  check(RopeConfig(base=500.0), [500.0 ** (-i / 8) for i in range(8)])
  check(RopeConfig(base=500.0, fraction=0.25), [500.0 ** (-i / 2) for i in range(2)])


def test_nope_changes_nothing():
  x = jnp.asarray(X, jnp.bfloat16)
  assert (rotary(x, jnp.asarray(POSITIONS), RopeConfig(fraction=0.0)) == x).all()


def test_ntk_keeps_the_fastest_pair_and_stretches_the_slowest():
  plain = [1e4 ** (-i / 8) for i in range(8)]
  stretched = [(1e4 * 8.0 ** (16 / 14)) ** (-i / 8) for i in range(8)]
  assert stretched[0] == plain[0]
  np.testing.assert_allclose(stretched[7], plain[7] / 8.0, rtol=1e-12)
  check(RopeConfig(scaling="ntk", factor=8.0), stretched)


def test_yarn_by_turns():
  """A pair's turns in a training row say whether it is kept, stretched or blended."""
  rope = RopeConfig(scaling="yarn", factor=4.0, original_tokens=4096, beta_fast=16.0, beta_slow=2.0)
  plain = [1e4 ** (-i / 32) for i in range(32)]
  pair_of = lambda turns: 32 * math.log(4096 / (turns * 2 * math.pi)) / math.log(1e4)
  first, last = math.floor(pair_of(16.0)), math.ceil(pair_of(2.0))
  assert (first, last) == (12, 21)
  expected = [f if i <= first else f / 4 if i >= last else
              f * (1 - (i - first) / (last - first)) + f / 4 * (i - first) / (last - first)
              for i, f in enumerate(plain)]
  found = rope_frequencies(rope, 64)
  assert_close(found, expected, "rotary_f32")
  for frequency, given in zip(plain, np.asarray(found)):
    turns = 4096 * frequency / (2 * math.pi)
    if turns > 17:
      np.testing.assert_allclose(given, frequency, rtol=1e-5)
    if turns < 1.5:
      np.testing.assert_allclose(given, frequency / 4, rtol=1e-5)


def test_yarn_raises_the_logits_temperature():
  """q k / t with sqrt(1/t) = 0.1 ln(s) + 1 (YaRN, eq. 22), channels that do not turn included."""
  rope = RopeConfig(scaling="yarn", factor=4.0, original_tokens=64, fraction=0.5)
  half = np.asarray(rope_frequencies(rope, 8), np.float64)
  check(rope, half, times=0.1 * math.log(4.0) + 1)


def test_a_stretched_rope_needs_channels():
  with pytest.raises(UserError, match="stretches 2 channels; it needs at least 4"):
    ModelConfig(head_dim=8, rope=RopeConfig(scaling="ntk", factor=2.0, fraction=0.25))


def test_the_mean_leaves_padding_out():
  x = jnp.asarray(X, jnp.float32)
  valid = jnp.array([[True] * 5, [True, True, False, False, False]])
  assert_close(valid_mean(x, None), X.mean(), "same_sum_f32")
  assert_close(valid_mean(x, valid), np.concatenate([X[0], X[1, :2]]).mean(), "same_sum_f32")
  assert valid_mean(x, jnp.zeros((2, 5), bool)) == 0


def test_drawn_weights_are_like_the_initialisers():
  """What `tests.weights.drawn` gives other tests: the same tree, shapes, dtypes and scales."""
  cfg = ModelConfig(num_layers=3, pattern="window full sparse", d_model=64, num_heads=4,
                    num_kv_heads=2, head_dim=32, qk_norm=True, block_size=8, selected_tokens=16,
                    vocab_size=128, moe=MoeConfig(4, 2, 32, bias_update_rate=0.1))
  real, mine = jax.jit(lambda: Transformer(cfg, rngs=nnx.Rngs(0)))(), drawn(cfg)
  assert jax.tree.structure(mine) == jax.tree.structure(real)
  for (path, got), want in zip(jax.tree_util.tree_leaves_with_path(mine), jax.tree.leaves(real)):
    assert (got.aval.str_short(), got.weak_type) == (want.aval.str_short(), want.weak_type)
    np.testing.assert_allclose([got.mean(), got.std()], [want.mean(), want.std()], rtol=0.1,
                               atol=0.1 * float(jnp.abs(want).max()), err_msg=str(path))
    assert abs(got.std() - want.std()) <= 0.1 * want.std(), path
