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
from hysparse_jax.model.transformer import Transformer
from hysparse_jax.training import checkpoint, guard, losses, optim


class TrainState(NamedTuple):
  """Everything a step reads and a checkpoint holds."""

  step: jax.Array                # i32 [], batches consumed
  model: Transformer             # float32 weights
  opt_state: optax.OptState
  guard: guard.GuardState


class Metrics(NamedTuple):
  """What one step reports, still on the device."""

  loss: jax.Array            # f32 [], nats per token, no auxiliary losses
  total: jax.Array           # f32 [], what was differentiated
  grad_norm: jax.Array       # f32 [], before clipping
  lr: jax.Array              # f32 [], learning rate of the step
  ok: jax.Array              # bool [], False: the step was skipped
  consecutive_bad: jax.Array # i32 []
  total_bad: jax.Array       # i32 []
  tokens: jax.Array          # f32 [], sum of the targets' weights
  layers: tuple              # see `hybrid.by_layer`


class Program(NamedTuple):
  """One run, compiled for one mesh."""

  init: callable             # key -> TrainState, sharded
  step: callable             # (TrainState, Batch) -> (TrainState, Metrics); donates the state
  abstract_state: TrainState # of ShapeDtypeStructs with shardings: what a restore targets
  batch_sharding: jax.sharding.NamedSharding


def build(cfg: Config, mesh: jax.sharding.Mesh,
          objective: losses.Objective = losses.next_token) -> Program:
  """Resolves shardings and jits `init` and `step`; call the results under `jax.set_mesh(mesh)`.

  Args:
    cfg: of the run.
    mesh: its devices may be absent ones, then nothing can be run.
    objective: what a step minimises.

  Raises:
    UserError: the mesh cannot split the model or the batch.
  """
  sharding.check_divisible(cfg, mesh)
  tx = optim.make_optimizer(cfg.optim, cfg.train.steps, abstract_model(cfg, mesh))

  def init(key):
    params = Transformer(cfg.model, rngs=nnx.Rngs(key))
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), guard.init())

  abstract = _abstract(init, mesh)
  state_sharding = jax.tree.map(lambda leaf: leaf.sharding, abstract)
  rows = sharding.batch_sharding(mesh)
  everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  return Program(
    init=jax.jit(init, out_shardings=state_sharding),
    step=jax.jit(lambda state, batch: _step(cfg, tx, objective, state, batch),
                 in_shardings=(state_sharding, rows), out_shardings=(state_sharding, everywhere),
                 donate_argnums=0),
    abstract_state=abstract,
    batch_sharding=rows)


def abstract_model(cfg: Config, mesh: jax.sharding.Mesh) -> Transformer:
  """The model with a `jax.ShapeDtypeStruct` and its sharding in place of every weight."""
  return _abstract(lambda key: Transformer(cfg.model, rngs=nnx.Rngs(key)), mesh)


def _abstract(init, mesh):
  """What `init(key)` would return over `mesh`, as `jax.ShapeDtypeStruct`s; nothing is computed."""
  key = jax.eval_shape(lambda: jax.random.key(0))
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    shapes = jax.eval_shape(init, key)
  return checkpoint.abstract_state(shapes, sharding.shardings(shapes, mesh))


@jax.jit
def all_finite(tree):
  """bool []: whether every number in a tree of arrays is finite."""
  return jnp.all(jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)
                            if jnp.issubdtype(leaf.dtype, jnp.floating)]))


def _step(cfg: Config, tx, objective, state: TrainState, batch: Batch):
  with jax.named_scope("gradients"):
    (total, stats), grads = _gradients(cfg, objective, state.model, batch)
  with jax.named_scope("guard"):
    grad_norm = optax.tree.norm(grads)
    ok, scale, guarded = guard.judge(
      state.guard, total, grad_norm, cfg.train.spike_factor,
      min(guard.PATIENCE, cfg.train.max_bad_steps - 1))
    grads = jax.tree.map(lambda grad: grad * scale.astype(grad.dtype), grads)
  with jax.named_scope("optimizer"):
    updates, opt_state = tx.update(grads, state.opt_state, state.model)
    params = optax.apply_updates(state.model, updates)
    if cfg.model.moe is not None and cfg.model.moe.bias_update_rate > 0:
      params = _rebalanced(params, stats.layers, cfg.model.moe.bias_update_rate)
    # The optimizer has counted the good steps alone.
    lr = optim.schedule(cfg.optim, cfg.train.steps, cfg.optim.lr)(
      state.step - state.guard.total_bad)
  with jax.named_scope("guard"):
    new_state = TrainState(
      step=state.step + 1,
      model=guard.select(ok, params, state.model),
      opt_state=guard.select(ok, opt_state, state.opt_state),
      guard=guarded)
  metrics = Metrics(
    loss=stats.nll / jnp.maximum(stats.weight, 1.0), total=total, grad_norm=grad_norm, lr=lr,
    ok=ok, consecutive_bad=guarded.consecutive_bad, total_bad=guarded.total_bad,
    tokens=stats.weight, layers=stats.layers)
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


def _gradients(cfg: Config, objective, params, batch: Batch):
  """The loss, its statistics and gradient over all micro-batches, divided by all their weights."""
  parts = cfg.train.grad_accum
  denominator = jnp.sum(batch.weights)

  def share(params, micro):
    # Auxiliary losses are means, so each micro-batch's share is its part of the mean over parts.
    value, stats = objective(cfg.train, params, micro, denominator * (1.0 / parts))
    return value / parts, stats

  gradient = jax.value_and_grad(share, has_aux=True)
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
