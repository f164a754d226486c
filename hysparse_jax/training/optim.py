"""AdamW and Muon with one schedule shape, read off the weights' own metadata.

`layers.weight` records which dims of a parameter a matmul contracts (`in_axes`) and which it
produces (`out_axes`), relative to the unstacked shape. That says what a matrix is: what
Newton-Schulz orthogonalises under Muon and what weight decay shrinks. Stack and expert dims are
neither, so they are a batch of separate matrices.
"""

import math

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from hysparse_jax.config import OptimConfig

MUON_MOMENTUM = 0.95     # Nesterov; Jordan et al., "Muon", 2024


def schedule(cfg: OptimConfig, steps: int, peak: float) -> optax.Schedule:
  """The learning rate as a function of the number of steps already taken.

  Every kind rises linearly and is at `peak` from step `warmup_steps - 1` (step 0 already moves).
  Then `wsd` stays and falls linearly over the last `decay_fraction` of the run, `cosine` falls
  over all that is left, `constant` stays. The falling ones are at `final_lr_fraction * peak` at
  step `steps - 1` and after.

  Args:
    steps: length of the run.
    peak: the highest value.

  Returns:
    `i32 [] -> f32 []`.
  """
  decay_steps = {"wsd": round(cfg.decay_fraction * steps), "cosine": steps - cfg.warmup_steps,
                 "constant": 0}[cfg.schedule]

  def learning_rate(count):
    done = jnp.asarray(count, jnp.float32) + 1
    rise = jnp.minimum(1.0, done / max(cfg.warmup_steps, 1))
    if decay_steps == 0:
      return peak * rise
    progress = jnp.clip((done - (steps - decay_steps)) / decay_steps, 0.0, 1.0)
    left = 0.5 * (1 + jnp.cos(jnp.pi * progress)) if cfg.schedule == "cosine" else 1 - progress
    return peak * rise * (cfg.final_lr_fraction + (1 - cfg.final_lr_fraction) * left)

  return learning_rate


def partition(params):
  """`"muon"` or `"adamw"` for every parameter, in a tree of the same structure.

  Muon takes what has both `in_axes` and `out_axes`, except tables over the vocabulary (embedding
  and head): their rows are looked up or scored one by one (Jordan et al. leave them to AdamW too).
  """
  return _each(lambda metadata, value: _label(metadata), params)


def make_optimizer(cfg: OptimConfig, steps: int, params) -> optax.GradientTransformation:
  """Global-norm clipping, then AdamW for everything, or Muon for matrices and AdamW for the rest.

  Muon's update of a matrix is its orthogonalised Nesterov momentum times
  `sqrt(max(1, fan_out / fan_in))` (Jordan et al.) times `muon_lr`: its singular values are near
  `scale * muon_lr` however large the gradient is, so `muon_lr` is not comparable with `lr`. Both
  rates follow the same schedule. Decay is decoupled, `rate * weight_decay * w`, and touches only
  parameters with `in_axes`. Moments are float32 and mirror their parameters, names included, so
  `sharding.shardings` places them alike.

  Args:
    steps: length of the run, for the schedule.
    params: the model or its `jax.eval_shape`; only metadata and paths are read.
  """
  decay = optax.stateless(lambda updates, params: _each(
    lambda metadata, update, value:
      update + cfg.weight_decay * value if metadata.get("in_axes") else update, updates, params))
  adamw = optax.chain(
    optax.scale_by_adam(cfg.b1, cfg.b2, cfg.eps, mu_dtype=jnp.float32), decay,
    optax.scale_by_learning_rate(schedule(cfg, steps, cfg.lr)))
  muon = optax.chain(
    optax.contrib.scale_by_muon(beta=MUON_MOMENTUM, mu_dtype=jnp.float32,
                                weight_dimension_numbers=lambda tree: _each(_matrix_dims, tree)),
    optax.stateless(lambda updates, _: _each(_width_scaled, updates)), decay,
    optax.scale_by_learning_rate(schedule(cfg, steps, cfg.muon_lr)))
  if cfg.optimizer == "adamw":
    rule = adamw
  else:
    labels = jax.tree.leaves(partition(params))
    rule = _split({"adamw": adamw, "muon": muon}, labels)
  return optax.chain(optax.clip_by_global_norm(cfg.clip_norm), rule) if cfg.clip_norm else rule


def _is_variable(node) -> bool:
  return isinstance(node, nnx.Variable)


def _each(function, *trees):
  """Maps `function(metadata, *values)` over the parameters of trees of one structure."""
  def visit(node, *others):
    if not _is_variable(node):
      return function({}, node, *others)
    values = (other.get_value() for other in (node, *others))
    return node.replace(function(node.get_metadata(), *values))

  return jax.tree.map(visit, *trees, is_leaf=_is_variable)


def _label(metadata) -> str:
  is_matrix = metadata.get("in_axes") and metadata.get("out_axes")
  return "muon" if is_matrix and "vocab" not in metadata["out_sharding"] else "adamw"


def _matrix_dims(metadata, value) -> optax.contrib.MuonDimensionNumbers:
  """Which dims of a possibly stacked parameter are a matrix's rows and columns."""
  stack = value.ndim - len(metadata["out_sharding"])
  return optax.contrib.MuonDimensionNumbers(
    reduction_axis=tuple(stack + axis for axis in metadata["in_axes"]),
    output_axis=tuple(stack + axis for axis in metadata["out_axes"]))


def _width_scaled(metadata, update):
  dims = _matrix_dims(metadata, update)
  fan_in, fan_out = (math.prod(update.shape[axis] for axis in axes) for axes in dims)
  return update * max(1.0, fan_out / fan_in) ** 0.5


def _split(rules: dict, labels: list) -> optax.GradientTransformation:
  """Each parameter under the rule its label names; the state is one dict of parameters per rule.

  Unlike `optax.partition` it leaves no placeholders behind: everything in the state is an array or
  a whole parameter, so shardings resolve and checkpoints read like those of a model.
  """
  def named(tree):
    nodes = jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_variable)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): node for path, node in nodes}

  def groups(tree):
    out = {name: {} for name in rules}
    for label, (path, node) in zip(labels, named(tree).items(), strict=True):
      out[label][path] = node
    return out

  def init(params):
    return {name: rules[name].init(group) for name, group in groups(params).items()}

  def update(grads, state, params):
    grads_of, params_of, updates, new_state = groups(grads), groups(params), {}, {}
    for name, rule in rules.items():
      group, new_state[name] = rule.update(grads_of[name], state[name], params_of[name])
      updates |= group
    structure = jax.tree.structure(grads, is_leaf=_is_variable)
    return jax.tree.unflatten(structure, [updates[path] for path in named(grads)]), new_state

  return optax.GradientTransformation(init, update)
