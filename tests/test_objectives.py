"""The loss is an argument of the step: a custom objective is what gets minimised and reported."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hysparse_jax import config, sharding
from hysparse_jax.data.batches import Batch
from hysparse_jax.training import losses
from hysparse_jax.training import step as train_step
from tests.tolerances import assert_close

CFG = config.Config(
  model=config.ModelConfig(
    num_layers=2, d_model=16, num_heads=2, num_kv_heads=1, head_dim=8, d_ff=16, sparse_per_full=1,
    block_size=8, selected_tokens=8, window=8, vocab_size=32, dtype="float32"),
  data=config.DataConfig(seq_len=16, batch_size=4),
  optim=config.OptimConfig(lr=1e-2, warmup_steps=1, schedule="constant"),
  train=config.TrainConfig(steps=10, grad_accum=2, spike_factor=0.0))


def next_but_one(cfg: config.TrainConfig, model, batch, denominator):
  """The squared error of the logit of the token after the next: no loss that the package has."""
  del cfg
  hidden, layers = model.hidden(batch.tokens, batch.segment_ids, batch.positions)
  logits = jnp.take_along_axis(model.logits(hidden), batch.targets[..., None], axis=-1)[..., 0]
  error = jnp.sum(batch.weights * jnp.square(logits - 3.0))
  return error / denominator, losses.LossStats(error, jnp.sum(batch.weights), layers)


def a_batch():
  tokens = np.random.default_rng(0).integers(0, 32, (4, 17))
  ones = np.ones((4, 16), np.int32)
  weights = np.random.default_rng(1).uniform(0, 2, (4, 16)).astype(np.float32)
  return Batch(tokens[:, :-1].astype(np.int32), tokens[:, 1:].astype(np.int32), ones,
               np.broadcast_to(np.arange(16, dtype=np.int32), (4, 16)), weights)


@pytest.fixture(scope="module")
def steps():
  """{objective: (state before, its Metrics by step)} of five steps on one batch."""
  mesh = sharding.make_mesh(config.MeshConfig(fsdp=1), jax.devices()[:1])
  found = {}
  with jax.set_mesh(mesh):
    for objective in (next_but_one, losses.next_token):
      program = train_step.build(CFG, mesh, objective)
      state = program.init(jax.random.key(0))
      before, results = jax.device_get(state.model), []
      for _ in range(5):
        state, result = program.step(state, jax.device_put(a_batch(), program.batch_sharding))
        results.append(jax.device_get(result))
      found[objective] = before, results
  return found


def test_a_custom_objective_is_differentiated_and_reported(steps):
  before, results = steps[next_but_one]
  batch = a_batch()
  whole = lambda model: next_but_one(CFG.train, model, batch, batch.weights.sum())[0]
  value, grads = jax.jit(jax.value_and_grad(whole))(before)
  norm = np.sqrt(sum(float(jnp.sum(jnp.square(leaf))) for leaf in jax.tree.leaves(grads)))
  assert_close(results[0].total, value, "same_sum_f32")      # two micro-batches, one mean
  assert_close(results[0].loss, value, "same_sum_f32")
  assert_close(results[0].grad_norm, norm, "gradient_f32")
  assert_close(results[0].tokens, batch.weights.sum(), "same_sum_f32")
  fallen = [float(result.total) for result in results]
  assert fallen == sorted(fallen, reverse=True) and fallen[-1] < 0.9 * fallen[0]


def test_the_default_is_the_next_token(steps):
  before, results = steps[losses.next_token]
  batch = a_batch()
  value, _ = jax.jit(losses.next_token, static_argnums=0)(CFG.train, before, batch)
  assert_close(results[0].total, value, "same_sum_f32")
  assert float(results[0].total) != float(steps[next_but_one][1][0].total)


def test_the_rate_of_a_step_is_in_its_metrics(steps):
  for _, results in steps.values():
    assert_close([float(result.lr) for result in results], [1e-2] * 5, "schedule")
