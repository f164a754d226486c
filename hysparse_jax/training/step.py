"""The state of a run and the one jitted step that advances it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from hysparse_jax import sharding
from hysparse_jax.config import Config
from hysparse_jax.data.batches import Batch
from hysparse_jax.model import moe
from hysparse_jax.model import transformer as model
from hysparse_jax.training import checkpoint, guard, optim


class TrainState(NamedTuple):
  """Everything a step reads and a checkpoint holds."""

  step: jax.Array                # i32 [], batches consumed
  model: model.Transformer       # float32 weights
  opt_state: optax.OptState
  guard: guard.GuardState


class Metrics(NamedTuple):
  """What one step reports, still on the device."""

  loss: jax.Array            # f32 [], nats per token, no auxiliary losses
  total: jax.Array           # f32 [], what was differentiated
  grad_norm: jax.Array       # f32 [], before clipping
  ok: jax.Array              # bool [], False: the step was skipped
  consecutive_bad: jax.Array # i32 []
  total_bad: jax.Array       # i32 []
  tokens: jax.Array          # f32 [], targets that counted
  layers: tuple              # see `hybrid.by_layer`


class Program(NamedTuple):
  """One run, compiled for one mesh."""

  init: callable             # key -> TrainState, sharded
  step: callable             # (TrainState, Batch) -> (TrainState, Metrics); donates the state
  abstract_state: TrainState # of ShapeDtypeStructs with shardings: what a restore targets
  batch_sharding: jax.sharding.NamedSharding


def build(cfg: Config, mesh: jax.sharding.Mesh) -> Program:
  """Resolves shardings and jits `init` and `step`; call the results under `jax.set_mesh(mesh)`.

  Raises:
    UserError: the mesh cannot split the model or the batch.
  """
  sharding.check_divisible(cfg, mesh)

  def new_model(key):
    return model.Transformer(cfg.model, rngs=nnx.Rngs(key))

  key = jax.eval_shape(lambda: jax.random.key(0))      # nothing runs: the devices may be absent
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    abstract_model = jax.eval_shape(new_model, key)
  tx = optim.make_optimizer(cfg.optim, cfg.train.steps, abstract_model)

  def init(key):
    params = new_model(key)
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), guard.init())

  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    abstract = jax.eval_shape(init, key)
  state_sharding = sharding.shardings(abstract, mesh)
  rows = sharding.batch_sharding(mesh)
  everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  return Program(
    init=jax.jit(init, out_shardings=state_sharding),
    step=jax.jit(lambda state, batch: _step(cfg, tx, state, batch),
                 in_shardings=(state_sharding, rows), out_shardings=(state_sharding, everywhere),
                 donate_argnums=0),
    abstract_state=checkpoint.abstract_state(abstract, state_sharding),
    batch_sharding=rows)


def _step(cfg: Config, tx, state: TrainState, batch: Batch):
  (total, stats), grads = _gradients(cfg, state.model, batch)
  grad_norm = optax.tree.norm(grads)
  ok, guarded = guard.judge(state.guard, total, grad_norm, cfg.train.spike_factor)
  updates, opt_state = tx.update(grads, state.opt_state, state.model)
  params = optax.apply_updates(state.model, updates)
  if cfg.model.moe is not None and cfg.model.moe.bias_update_rate > 0:
    params = _rebalanced(params, stats.layers, cfg.model.moe.bias_update_rate)
  new_state = TrainState(
    step=state.step + 1,
    model=guard.select(ok, params, state.model),
    opt_state=guard.select(ok, opt_state, state.opt_state),
    guard=guarded)
  metrics = Metrics(
    loss=stats.nll / jnp.maximum(stats.weight, 1.0), total=total, grad_norm=grad_norm, ok=ok,
    consecutive_bad=guarded.consecutive_bad, total_bad=guarded.total_bad, tokens=stats.weight,
    layers=stats.layers)
  return new_state, metrics


def _rebalanced(params, layers, rate: float):
  """The model with every router's bias moved by its layer's load (`moe.updated_router_bias`)."""
  params = jax.tree.map(lambda leaf: leaf, params)      # a copy: modules are values
  for blocks, all_stats in zip(params.stack.groups, layers):
    for part, stats in zip(blocks.parts, all_stats):
      bias = part.mlp.router_bias
      part.mlp.router_bias = bias.replace(
        moe.updated_router_bias(bias[...], stats.router.expert_load, rate))
  return params


def _gradients(cfg: Config, params, batch: Batch):
  """The loss, its statistics and gradient over all micro-batches, divided by all their weights."""
  parts = cfg.train.grad_accum
  denominator = jnp.sum(batch.weights)

  def objective(params, micro):
    # Auxiliary losses are means, so each micro-batch's share is its part of the mean over parts.
    value, stats = model.loss(params, micro, z_loss=cfg.train.z_loss, chunk=cfg.train.loss_chunk,
                              denominator=denominator * (1.0 / parts))
    return value / parts, stats

  gradient = jax.value_and_grad(objective, has_aux=True)
  if parts == 1:
    return gradient(params, batch)
  # Rows are dealt round robin, so that each device splits its own rows and none moves.
  micro = jax.tree.map(
    lambda x: jnp.swapaxes(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 0, 1), batch)

  def accumulate(total, part):
    return jax.tree.map(jnp.add, total, gradient(params, part)), None

  zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(
    gradient, params, jax.tree.map(lambda x: x[0], micro)))
  ((total, stats), grads), _ = jax.lax.scan(accumulate, zero, micro)
  mean = jax.tree.map(lambda x: x / parts, stats.layers)
  return (total, stats._replace(layers=mean)), grads
