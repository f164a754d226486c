import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from hysparse_jax import sharding
from hysparse_jax.config import MeshConfig, OptimConfig
from hysparse_jax.model.layers import ones, scaled_normal, stacked, weight
from hysparse_jax.training import optim
from tests.tolerances import assert_close

MUON = OptimConfig(optimizer="muon", schedule="constant", warmup_steps=0, lr=1e-2, muon_lr=0.5,
                   weight_decay=0.0, clip_norm=0.0)
ADAMW = OptimConfig(schedule="constant", warmup_steps=0, lr=1e-2, weight_decay=0.1, clip_norm=0.0)


class Experts(nnx.Module):
  def __init__(self, *, rngs):
    self.w = weight(rngs, (3, 12, 8), ("expert", "embed", "mlp"), in_axes=(1,), out_axes=(2,))


class Layer(nnx.Module):
  def __init__(self, *, rngs):
    self.norm = weight(rngs, (12,), ("embed",), init=ones)
    self.wq = weight(rngs, (12, 4, 2), ("embed", "heads", None), in_axes=(0,), out_axes=(1, 2))
    self.experts = Experts(rngs=rngs)


class Block(nnx.Module):
  def __init__(self, *, rngs):
    self.wo = weight(rngs, (4, 2, 12), ("heads", None, "embed"), in_axes=(0, 1), out_axes=(2,))
    self.w_up = weight(rngs, (12, 20), ("embed", "mlp"), in_axes=(0,), out_axes=(1,))
    self.sinks = weight(rngs, (4,), ("heads",), init=ones)
    self.sparse = stacked(Layer, 2, rngs)


class Model(nnx.Module):
  def __init__(self, *, rngs):
    self.embed = weight(rngs, (16, 12), ("vocab", "embed"), init=scaled_normal(1.0))
    self.head = weight(rngs, (12, 16), ("embed", "vocab"), in_axes=(0,), out_axes=(1,))
    self.blocks = stacked(Block, 2, rngs)


@functools.cache
def model():
  return Model(rngs=nnx.Rngs(0))


def gradient(params, seed):
  leaves, structure = jax.tree.flatten(params)
  keys = jax.random.split(jax.random.key(seed), len(leaves))
  return jax.tree.unflatten(structure, [jax.random.normal(key, leaf.shape)
                                        for key, leaf in zip(keys, leaves)])


def one_update(cfg, params, grads):
  tx = optim.make_optimizer(cfg, 100, params)
  return jax.jit(tx.update)(grads, tx.init(params), params)


def leaf_name(path):
  return jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")


def by_name(tree):
  return {leaf_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


LABELS = {"embed": "adamw", "head": "adamw", "blocks/w_up": "muon", "blocks/wo": "muon",
          "blocks/sinks": "adamw", "blocks/sparse/norm": "adamw", "blocks/sparse/wq": "muon",
          "blocks/sparse/experts/w": "muon"}


def test_partition_takes_every_matrix_and_nothing_else():
  assert by_name(optim.partition(model())) == LABELS
  assert by_name(optim.partition(jax.eval_shape(model))) == LABELS


# Of every matrix weight: leading dims that count separate matrices, then which dims after them
# are rows and which are columns.
MATRICES = {"blocks/w_up": ((2,), (1,), (2,)), "blocks/wo": ((2,), (1, 2), (3,)),
            "blocks/sparse/wq": ((2, 2), (2,), (3, 4)),
            "blocks/sparse/experts/w": ((2, 2, 3), (3,), (4,))}


def as_matrices(array, name):
  batch, rows, columns = MATRICES[name]
  assert array.shape[:len(batch)] == batch
  size = lambda axes: math.prod(array.shape[axis] for axis in axes)
  return np.asarray(array).reshape(-1, size(rows), size(columns))


def test_muon_orthogonalises_each_stacked_matrix_as_if_alone():
  params = model()
  grads = gradient(params, 1)
  updates, _ = one_update(MUON, params, grads)
  updates, grads = by_name(updates), by_name(grads)
  alone = optax.contrib.muon(0.5, beta=0.95)
  run_alone = jax.jit(lambda g: alone.update(g, alone.init(g), g)[0])
  assert {name for name, label in LABELS.items() if label == "muon"} == set(MATRICES)
  assert {updates[name].ndim for name in MATRICES} == {3, 4, 5}
  for name in MATRICES:
    for update, grad in zip(as_matrices(updates[name], name), as_matrices(grads[name], name)):
      assert_close(update, run_alone(grad), "muon_slice")
      rows, columns = update.shape
      values = np.linalg.svd(update, compute_uv=False) / (0.5 * max(1, columns / rows) ** 0.5)
      assert values.min() > 0.6 and values.max() < 1.3, (name, values)


def test_what_muon_leaves_follows_adamw():
  params, grads = model(), gradient(model(), 1)
  updates, _ = one_update(MUON, params, grads)
  for name, label in LABELS.items():
    if label == "adamw":
      g = np.asarray(by_name(grads)[name], np.float64)
      assert_close(by_name(updates)[name], -1e-2 * g / (abs(g) + 1e-8), "adamw_step")


def test_adamw_equals_the_equations_over_three_steps():
  params = model()
  tx = optim.make_optimizer(ADAMW, 100, params)
  state, update = tx.init(params), jax.jit(tx.update)
  mean = variance = 0.0
  for step in range(3):
    grads = gradient(params, step)
    updates, state = update(grads, state, params)
    g = {name: np.asarray(leaf, np.float64) for name, leaf in by_name(grads).items()}
    mean = {name: 0.1 * g[name] + (0.9 * mean[name] if step else 0.0) for name in g}
    variance = {name: 0.05 * g[name]**2 + (0.95 * variance[name] if step else 0.0) for name in g}
    for name, update_of in by_name(updates).items():
      vector = name.split("/")[-1] in ("norm", "sinks", "embed")
      w = np.asarray(by_name(params)[name], np.float64)
      first = mean[name] / (1 - 0.9**(step + 1))
      second = variance[name] / (1 - 0.95**(step + 1))
      wanted = -1e-2 * (first / (second**0.5 + 1e-8) + (0.0 if vector else 0.1) * w)
      assert_close(update_of, wanted, "adamw_step")
    params = optax.apply_updates(params, updates)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_only_matrices_decay_each_at_its_own_rate(optimizer):
  params = model()
  cfg = OptimConfig(optimizer=optimizer, schedule="constant", warmup_steps=0, lr=1e-2, muon_lr=0.5,
                    weight_decay=0.1)
  updates, _ = one_update(cfg, params, jax.tree.map(jnp.zeros_like, params))
  for name, update in by_name(updates).items():
    rate = 0.5 if optimizer == "muon" and LABELS[name] == "muon" else 1e-2
    rate = 0.0 if name.split("/")[-1] in ("norm", "sinks", "embed") else rate
    assert_close(update, -rate * 0.1 * np.asarray(by_name(params)[name]), "adamw_step")


@pytest.mark.parametrize("clip_norm, factor", [(0.0, 1.0), (2.0, 2.0 / 60.0), (100.0, 1.0)])
def test_clipping_scales_the_global_norm(clip_norm, factor):
  params = model()
  grads = gradient(params, 2)
  norm = np.sqrt(sum(np.sum(np.asarray(leaf, np.float64)**2) for leaf in jax.tree.leaves(grads)))
  grads = jax.tree.map(lambda leaf: leaf * (60.0 / norm).astype(jnp.float32), grads)
  cfg = OptimConfig(clip_norm=clip_norm)
  _, state = one_update(cfg, params, grads)
  moments = [leaf.mu for leaf in jax.tree.leaves(
    state, is_leaf=lambda node: isinstance(node, optax.ScaleByAdamState)) if hasattr(leaf, "mu")]
  assert len(moments) == 1
  for name, moment in by_name(moments[0]).items():
    assert_close(moment, 0.1 * factor * np.asarray(by_name(grads)[name]), "adamw_step")


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_moments_are_float32_and_sharded_like_their_parameters(optimizer):
  params = jax.eval_shape(model)
  tx = optim.make_optimizer(OptimConfig(optimizer=optimizer), 100, params)
  state = jax.eval_shape(tx.init, params)
  mesh = sharding.make_mesh(MeshConfig(fsdp=2, tensor=2, expert=2))
  wanted = {name: place.spec for name, place in by_name(sharding.shardings(params, mesh)).items()}
  seen = {}
  places = jax.tree.leaves(sharding.shardings(state, mesh))
  for (path, leaf), place in zip(jax.tree_util.tree_leaves_with_path(state), places, strict=True):
    name = leaf_name(path)
    match = [param for param in wanted if name.endswith(f"u/{param}")]
    if match:
      param = max(match, key=len)
      assert leaf.dtype == jnp.float32 and place.spec == wanted[param], name
      seen[param] = seen.get(param, 0) + 1
  assert seen == {name: 1 if optimizer == "muon" and LABELS[name] == "muon" else 2
                  for name in wanted}


def test_sharded_muon_equals_unsharded():
  params = model()
  grads = gradient(params, 3)
  tx = optim.make_optimizer(OptimConfig(optimizer="muon", warmup_steps=1), 100, params)
  expected, _ = jax.jit(tx.update)(grads, tx.init(params), params)
  mesh = sharding.make_mesh(MeshConfig(fsdp=4, tensor=2))
  place = lambda tree: jax.device_put(tree, sharding.shardings(tree, mesh))
  actual, _ = jax.jit(tx.update)(place(grads), place(tx.init(params)), place(params))
  for name, update in by_name(actual).items():
    assert_close(update, by_name(expected)[name], "muon_slice")


def rates(steps, **fields):
  curve = optim.schedule(OptimConfig(**fields), steps, 2.0)
  return np.asarray(jax.vmap(curve)(jnp.arange(steps + 5)))


def test_wsd_rises_stays_and_falls_to_its_last_value():
  got = rates(20, warmup_steps=4, decay_fraction=0.25, final_lr_fraction=0.1)
  wanted = [0.5, 1.0, 1.5, 2.0] + [2.0] * 11 + [2.0 - 1.8 * k / 5 for k in range(1, 6)] + [0.2] * 5
  assert_close(got, wanted, "schedule")


def test_cosine_falls_over_all_that_follows_the_rise():
  got = rates(12, schedule="cosine", warmup_steps=2, final_lr_fraction=0.5)
  fall = [1.5 + 0.5 * np.cos(np.pi * k / 10) for k in range(1, 11)]
  assert_close(got, [1.0, 2.0] + fall + [1.0] * 5, "schedule")


def test_constant_stays_and_no_warmup_starts_at_the_peak():
  assert_close(rates(8, schedule="constant", warmup_steps=0), [2.0] * 13, "schedule")
  assert_close(rates(8, schedule="wsd", warmup_steps=0, decay_fraction=0.0), [2.0] * 13, "schedule")
  assert_close(rates(4, schedule="cosine", warmup_steps=4), [0.5, 1.0, 1.5, 2.0] + [2.0] * 5,
               "schedule")
