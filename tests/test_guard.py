import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from hysparse_jax.config import ModelConfig, OptimConfig
from hysparse_jax.model.layers import Mlp
from hysparse_jax.training import guard, optim
from tests.tolerances import assert_close

FACTOR = 10.0


def judged(norms, state=None, loss=1.0, factor=FACTOR):
  """Feeds gradient norms one by one; returns the verdicts and the last state."""
  state = guard.init() if state is None else state
  judge = jax.jit(guard.judge, static_argnums=3)
  verdicts = []
  for norm in norms:
    ok, _, state = judge(state, jnp.float32(loss), jnp.float32(norm), factor)
    verdicts.append(bool(ok))
  return verdicts, state


def settled():
  return judged([2.0] * 30)[1]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_norm_or_loss_that_is_not_finite_is_bad_from_the_first_step(bad):
  assert judged([bad])[0] == [False]
  assert judged([1.0], loss=bad)[0] == [False]
  assert judged([bad], factor=0.0)[0] == [False]


def test_a_spike_is_bad_only_above_the_factor_and_after_the_warm_up():
  state = settled()
  assert judged([19.9], state)[0] == [True]
  assert judged([20.1], state)[0] == [False]
  assert judged([1e30], state, factor=0.0)[0] == [True]
  early = judged([2.0] * (guard.WARMUP_STEPS - 1))[1]
  assert judged([1e4, 1.0], early)[0] == [True, True]
  assert judged([1e4], judged([2.0] * guard.WARMUP_STEPS)[1])[0] == [False]


def test_bad_steps_are_counted_and_leave_the_average_alone():
  before = settled()
  verdicts, after = judged([np.nan, 1e6, np.inf, np.nan], before)
  assert verdicts == [False] * 4
  assert (int(after.consecutive_bad), int(after.total_bad)) == (4, 4)
  assert np.array_equal(after.mean_log_norm, before.mean_log_norm)
  assert int(after.good) == int(before.good) == 30
  verdicts, again = judged([2.0, np.nan], after)
  assert verdicts == [True, False]
  assert (int(again.consecutive_bad), int(again.total_bad)) == (1, 5)


def test_the_average_is_geometric_then_forgets():
  _, state = judged([1.0, 4.0, 16.0])
  assert_close(guard.average_norm(state), 4.0, "schedule")
  _, state = judged([1.0] * guard.MEMORY_STEPS)
  _, state = judged([np.e] * 50, state)
  wanted = 1 - (1 - 1 / guard.MEMORY_STEPS)**50
  assert_close(state.mean_log_norm, wanted, "guard_mean")


def test_a_zero_gradient_is_good_and_says_nothing_about_scale():
  before = settled()
  verdicts, after = judged([0.0, 0.0, 3.0], before)
  assert verdicts == [True] * 3
  assert int(after.good) == 31 and float(guard.average_norm(after)) > 2.0
  assert int(judged([0.0] * 40)[1].good) == 0


def test_spikes_in_a_row_are_taken_scaled_to_the_average_after_a_few_skips():
  verdicts, state = judged([1e3] * 20, settled())
  assert verdicts == [False] * guard.PATIENCE + [True] * (20 - guard.PATIENCE)
  ok, scale, after = guard.judge(state, jnp.float32(1), jnp.float32(1e3), FACTOR)
  assert bool(ok)
  assert_close(scale * 1e3, guard.average_norm(state), "schedule")
  assert int(after.consecutive_bad) == guard.PATIENCE          # so the next spike is taken too
  assert float(guard.average_norm(after)) > float(guard.average_norm(state))
  ok, scale, after = guard.judge(state, jnp.float32(1), jnp.float32(2.0), FACTOR)
  assert bool(ok) and float(scale) == 1.0 and int(after.consecutive_bad) == 0
  assert not guard.judge(state, jnp.float32(1), jnp.float32(np.inf), FACTOR)[0]
  assert guard.judge(settled(), jnp.float32(1), jnp.float32(1e3), FACTOR, 0)[0]


def as_bits(tree):
  return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_exactly_the_bad_steps_change_nothing(optimizer):
  params = Mlp(ModelConfig(d_model=8, d_ff=12), rngs=nnx.Rngs(0))
  tx = optim.make_optimizer(OptimConfig(optimizer=optimizer, warmup_steps=0), 100, params)
  x = jax.random.normal(jax.random.key(1), (2, 4, 8))

  @jax.jit
  def step(state, scale, shift):
    params, opt_state, watch = state
    loss, grads = jax.value_and_grad(
      lambda p: jnp.sum(jnp.square(p(x)[0] - x)) * scale + shift)(params)
    ok, _, watch = guard.judge(watch, loss, optax.tree.norm(grads), FACTOR)
    updates, moved = tx.update(grads, opt_state, params)
    new = guard.select(ok, (optax.apply_updates(params, updates), moved), (params, opt_state))
    return (*new, watch), ok

  faults = {25: (np.nan, 0.0), 30: (1.0, np.inf), 35: (50.0, 0.0), 36: (1e30, 0.0),
            37: (np.inf, 0.0)}
  state = (params, tx.init(params), guard.init())
  for number in range(45):
    new, ok = step(state, *faults.get(number, (1.0, 0.0)))
    assert bool(ok) == (number not in faults), number
    if number in faults:
      assert as_bits(new[:2]) == as_bits(state[:2]), number
      assert int(new[2].good) == int(state[2].good)
    else:
      assert as_bits(new[0]) != as_bits(state[0])
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(new))
    assert int(new[2].consecutive_bad) == {25: 1, 30: 1, 35: 1, 36: 2, 37: 3}.get(number, 0)
    state = new
  assert int(state[2].total_bad) == 5


def test_select_keeps_every_dtype_and_bit():
  old = {"f": jnp.float32([-0.0, np.nan, 1e-45]), "b": jnp.bfloat16(3), "i": jnp.int32(7),
         "k": jax.random.key(3), "flag": jnp.bool_(True)}
  new = {"f": jnp.float32([1, 2, 3]), "b": jnp.bfloat16(np.nan), "i": jnp.int32(8),
         "k": jax.random.key(4), "flag": jnp.bool_(False)}
  pure = lambda tree: {**tree, "k": jax.random.key_data(tree["k"])}
  for ok, wanted in ((True, new), (False, old)):
    got = jax.jit(guard.select)(ok, new, old)
    assert jax.tree.map(lambda leaf: leaf.dtype, got) == jax.tree.map(lambda leaf: leaf.dtype, old)
    assert as_bits(pure(got)) == as_bits(pure(wanted))
