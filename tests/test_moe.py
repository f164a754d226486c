"""The mixture against a loop over tokens in float64, against itself on meshes, and its edges."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hysparse_jax.config import MeshConfig, ModelConfig, MoeConfig
from hysparse_jax.errors import UserError
from hysparse_jax.model import moe
from hysparse_jax.model.layers import Mlp
from hysparse_jax.sharding import make_mesh
from pallas_kernels import implementations
from tests.tolerances import assert_close


def make(E=8, k=2, F=8, D=16, **fields):
  cfg = ModelConfig(d_model=D, moe=MoeConfig(E, k, F, **fields))
  return moe.Experts(cfg, rngs=nnx.Rngs(0))


def inputs(B=8, T=12, D=16, seed=1):
  return jax.random.normal(jax.random.key(seed), (B, T, D))


@jax.jit
def apply(layer, x):
  return layer(x)


@jax.jit
def apply_valid(layer, x, valid):
  return layer(x, valid)


def loop(layer, x, bias=None):
  """The layer token by token in float64, from the papers' equations."""
  cfg = layer.cfg
  router, w_gate, w_up, w_out = (np.asarray(w[...], np.float64) for w in (
    layer.router, layer.w_gate, layer.w_up, layer.w_out))
  x = np.asarray(x, np.float64)
  y = np.zeros_like(x)
  E = cfg.num_experts
  counts, probs, z = np.zeros(E), np.zeros(E), []
  for b, t in np.ndindex(x.shape[:2]):
    logits = x[b, t] @ router
    p = np.exp(logits - logits.max())
    p /= p.sum()
    score = p if bias is None else p + np.asarray(bias, np.float64)
    chosen = sorted(range(E), key=lambda e: (-score[e], e))[:cfg.experts_per_token]
    norm = sum(p[e] for e in chosen) if cfg.normalize_weights else 1.0
    for e in chosen:
      gate, up = x[b, t] @ w_gate[e], x[b, t] @ w_up[e]
      y[b, t] += p[e] / norm * ((gate / (1 + np.exp(-gate)) * up) @ w_out[e])
    counts[chosen] += 1
    probs += p
    z.append(np.log(np.exp(logits).sum()) ** 2)
  load = counts / counts.sum()
  return y, E * load @ (probs / len(z)), np.mean(z), load


def assert_tree_close(actual, expected, name):
  jax.tree.map(lambda a, b: assert_close(a, b, name), actual, expected)


@pytest.mark.parametrize("k,normalize", [(1, False), (2, True), (3, False), (8, True)])
def test_equals_the_token_loop(k, normalize):
  layer, x = make(k=k, normalize_weights=normalize), inputs()
  y, stats = apply(layer, x)
  assert_tree_close((y, *stats), loop(layer, x), "moe_f32")
  assert abs(float(jnp.sum(stats.expert_load)) - 1) < 1e-6


def test_bfloat16_stays_close_and_stays_bfloat16():
  layer, x = make(), inputs().astype(jnp.bfloat16)
  y, stats = apply(layer, x)
  assert y.dtype == jnp.bfloat16
  assert all(a.dtype == jnp.float32 for a in stats)
  assert_close(y, loop(layer, x)[0], "moe_bf16")


def test_gradients_equal_finite_differences():
  layer, x = make(E=4), inputs(B=2, T=5)

  def loss(layer, x):
    y, stats = layer(x)
    return jnp.sum(jnp.sin(y)) + 0.1 * stats.load_balance_loss + 0.01 * stats.router_z_loss

  def loop_loss(layer, x):
    y, balance, z, _ = loop(layer, x)
    return np.sum(np.sin(y)) + 0.1 * balance + 0.01 * z

  grads = jax.jit(jax.grad(loss, argnums=(0, 1)))(layer, x)
  rng = np.random.default_rng(0)
  leaves, treedef = jax.tree.flatten((layer, x))
  for i, (leaf, grad) in enumerate(zip(leaves, jax.tree.leaves(grads), strict=True)):
    direction = rng.standard_normal(leaf.shape)
    step = 1e-5
    shifted = []
    for sign in (1, -1):
      moved = np.asarray(leaf, np.float64) + sign * step * direction
      with jax.enable_x64(True):
        shifted.append(loop_loss(*jax.tree.unflatten(
          treedef, [*leaves[:i], jnp.asarray(moved), *leaves[i + 1:]])))
    slope = (shifted[0] - shifted[1]) / (2 * step)
    assert_close(np.sum(np.asarray(grad, np.float64) * direction), slope, "moe_slope")


def test_ties_go_to_the_lower_expert():
  layer = make(E=8, k=3)
  layer.router[...] = jnp.zeros((16, 8))
  _, stats = apply(layer, inputs())
  assert_close(stats.expert_load, np.array([1, 1, 1, 0, 0, 0, 0, 0]) / 3, "moe_f32")
  assert_close(stats.load_balance_loss, 1.0, "moe_f32")


def test_bias_chooses_but_does_not_weigh():
  layer, x = make(bias_update_rate=1e-3), inputs()
  bias = jnp.zeros(8).at[5].set(10.0)
  layer.router_bias[...] = bias
  y, stats = apply(layer, x)
  assert_tree_close((y, *stats), loop(layer, x, bias), "moe_f32")
  assert float(stats.expert_load[5]) == 0.5
  grads = jax.jit(jax.grad(lambda m: jnp.sum(jnp.sin(m(x)[0]))))(layer)
  assert not np.any(grads.router_bias[...]) and np.any(grads.router[...])


def test_bias_update_balances_a_lopsided_router():
  layer, x = make(bias_update_rate=0.01), inputs(T=32) + 0.5
  layer.router[...] = layer.router[...].at[:, 0].add(0.3)
  before = load = apply(layer, x)[1].expert_load
  for _ in range(80):
    layer.router_bias[...] = moe.updated_router_bias(layer.router_bias[...], load, 0.01)
    load = apply(layer, x)[1].expert_load
  assert float(jnp.max(before)) > 0.25
  assert float(jnp.max(load)) < 0.18
  assert_close(moe.updated_router_bias(jnp.zeros(4), jnp.array([.7, .25, .05, 0.]), 0.1),
               [-0.1, 0.0, 0.1, 0.1], "moe_f32")


SIZES = {
  "even": [8, 8, 8, 8],
  "empty_first_middle_last": [0, 13, 0, 0, 40, 3, 0],
  "one_takes_all": [0, 64, 0, 0],
  "rows_beyond_the_groups": [5, 0, 20],
  "nothing": [0, 0, 0],
  "many_experts": [1, 0] * 256,
}


@pytest.mark.parametrize("implementation", ["blocked", "ragged_dot", None])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_grouped_matmul(sizes, implementation):
  R, D, F, E = max(sum(sizes), 64), 6, 10, len(sizes)
  rng = np.random.default_rng(3)
  x, w, g = (rng.standard_normal(s).astype(np.float32) for s in ((R, D), (E, D, F), (R, F)))
  owner = np.repeat(np.arange(E), sizes)
  used = len(owner)
  y = np.zeros((R, F))
  y[:used] = np.einsum("rd,rdf->rf", x[:used].astype(np.float64), w[owner])
  dx, dw = np.zeros((R, D)), np.zeros((E, D, F))
  dx[:used] = np.einsum("rf,rdf->rd", g[:used].astype(np.float64), w[owner])
  np.add.at(dw, owner, np.einsum("rd,rf->rdf", x[:used].astype(np.float64), g[:used]))

  @jax.jit
  def both_passes(x, w, g):
    out, pull = jax.vjp(
      lambda x, w: moe.grouped_matmul(x, w, jnp.array(sizes, jnp.int32),
                                      implementation=implementation), x, w)
    return out, *pull(g)

  assert_tree_close(both_passes(x, w, g), (y, dx, dw), "moe_f32")


def test_rows_beyond_the_groups_are_never_read():
  sizes = jnp.array([3, 0, 20], jnp.int32)
  x = jnp.ones((64, 4)).at[23:].set(jnp.nan)
  out, pull = jax.vjp(lambda x, w: moe.grouped_matmul(x, w, sizes), x, jnp.ones((3, 4, 5)))
  dx, dw = pull(jnp.ones((64, 5)).at[23:].set(jnp.nan))
  assert_close(jnp.sum(out), 23 * 5 * 4, "moe_f32")
  assert_close(jnp.sum(dx), 23 * 5 * 4, "moe_f32")
  assert_close(jnp.sum(dw, (1, 2)), [60, 0, 400], "moe_f32")


def test_cost_is_k_over_e_of_dense():
  """FLOPs the compiled CPU program runs: row blocks times a block, not E times the rows."""
  R, D, F, E = 2048, 32, 32, 64
  sizes = np.bincount(np.random.default_rng(0).integers(0, E, R), minlength=E)
  blocks = moe._cut(R, jnp.asarray(sizes, jnp.int32))
  assert int(blocks.count) * blocks.size < 1.6 * R
  text = jax.jit(lambda x, w, s: moe.grouped_matmul(x, w, s)).lower(
    jnp.zeros((R, D)), jnp.zeros((E, D, F)), jnp.asarray(sizes, jnp.int32)).compile().as_text()
  assert "while" in text and f"f32[{E},{R}" not in text


def test_padding_enters_no_statistic_and_costs_no_expert_rows(monkeypatch):
  """The same 24 tokens in rows of 32 and of 128: statistics, gradients and rows of experts."""
  layer = make(E=8, k=2)
  layer.router[...] = layer.router[...] * 3.0
  tokens = np.asarray(inputs(B=8, T=24))

  def padded(length):
    """Padding is one vector, as the embedding of token 0 is: all of it prefers the same experts."""
    x = np.full((8, length, 16), 0.7, np.float32)
    x[:, :24] = tokens
    return jnp.asarray(x), jnp.arange(length)[None] < jnp.full((8, 1), 24)

  def loss(layer, x, valid):
    y, stats = layer(x, valid)
    total = jnp.sum(jnp.sin(y)) + stats.load_balance_loss + stats.router_z_loss
    return total, (y, stats)

  step = jax.jit(jax.value_and_grad(loss, has_aux=True))
  (_, (alone, expected)), expected_grads = step(layer, jnp.asarray(tokens), None)
  assert_tree_close((alone, *expected), loop(layer, tokens), "moe_f32")
  for length in (32, 128):
    x, valid = padded(length)
    (_, (y, stats)), grads = step(layer, x, valid)
    assert_tree_close(stats, expected, "moe_f32")
    assert_tree_close(grads, expected_grads, "moe_f32")
    assert_close(y[:, :24], alone, "moe_f32")
    assert not np.any(y[:, 24:])
    counted = apply(layer, x)[1]                 # with padding counted, the balance depends on it
    assert abs(float(counted.load_balance_loss) - float(expected.load_balance_loss)) > 0.05

  rows = []
  matmul = moe.grouped_matmul
  monkeypatch.setattr(moe, "grouped_matmul", lambda x, w, sizes: rows.append(int(sizes.sum()))
                      or matmul(x, w, sizes))
  layer(*padded(128))
  assert rows == [8 * 24 * 2] * 3


def test_poisoned_padding_reaches_nothing():
  layer, x = make(), inputs()
  valid = jnp.arange(12)[None] < jnp.array([[12], [3], [0], [7], [12], [1], [5], [9]])
  loss = lambda layer, x: sum(map(jnp.sum, jax.tree.leaves(
    (jnp.where(valid[..., None], layer(x, valid)[0], 0), layer(x, valid)[1]))))
  gradient = jax.jit(jax.value_and_grad(loss))
  clean = gradient(layer, x)
  assert_tree_close(gradient(layer, jnp.where(valid[..., None], x, 1e4)), clean, "moe_f32")
  nothing = apply_valid(layer, x, jnp.zeros((8, 12), bool))[1]
  assert all(not np.any(leaf) for leaf in nothing)


MESHES = [dict(expert=4), dict(expert=2, tensor=2), dict(data=2, expert=2, tensor=2),
          dict(fsdp=2, expert=4), dict(data=2, fsdp=2, tensor=2)]


def loss_and_outputs(layer, x, valid):
  y, stats = layer(x, valid)
  total = jnp.sum(jnp.sin(y)) + stats.load_balance_loss + stats.router_z_loss
  return total, (y, stats)


@functools.cache
def mesh_case():
  """A lopsided router (some experts starve), its inputs, the step and what one device gives.

  Devices hold different numbers of valid tokens, so that a mean of means would differ.
  """
  layer, x = make(E=8, k=3), inputs(B=8, T=6)
  valid = jnp.arange(6)[None] < jnp.array([[6], [1], [0], [6], [3], [6], [2], [5]])
  layer.router[...] = layer.router[...].at[:, :2].multiply(3.0)
  step = jax.jit(jax.value_and_grad(loss_and_outputs, argnums=(0, 1), has_aux=True))
  return layer, x, valid, step, step(layer, x, valid)


@pytest.mark.parametrize("axes", MESHES, ids=lambda a: "-".join(f"{k}{v}" for k, v in a.items()))
def test_a_mesh_changes_nothing(axes):
  layer, x, valid, step, expected = mesh_case()
  devices = jax.devices()[:math.prod(axes.values())]
  with jax.set_mesh(make_mesh(MeshConfig(**{"fsdp": 1, **axes}), devices)):
    actual = step(layer, x, valid)
  assert_tree_close(actual, expected, "moe_f32")


def test_a_mesh_that_does_not_divide_is_one_line():
  mesh = make_mesh(MeshConfig(expert=4, fsdp=1), jax.devices()[:4])
  six, eight, x = make(E=6), make(E=8), inputs()
  with jax.set_mesh(mesh):
    with pytest.raises(UserError, match="moe.num_experts is 6, .* 4 ways"):
      jax.eval_shape(six, x)
    with pytest.raises(UserError, match="the batch is 3, .* 4 ways"):
      jax.eval_shape(eight, jax.ShapeDtypeStruct((3, 4, 16), jnp.float32))


def test_takes_the_place_of_mlp():
  cfg = ModelConfig(d_model=16, d_ff=8, moe=MoeConfig(1, 1, 8))
  dense, experts = Mlp(cfg, rngs=nnx.Rngs(0)), moe.Experts(cfg, rngs=nnx.Rngs(1))
  for name in ("w_gate", "w_up", "w_out"):
    getattr(experts, name)[...] = getattr(dense, name)[...][None]
  x = inputs()
  assert_close(apply(experts, x)[0], dense(x)[0], "moe_f32")


def test_every_moe_field_changes_the_program():
  x = inputs(B=2)

  def program(cfg):
    layer = jax.eval_shape(
      lambda: moe.Experts(ModelConfig(d_model=16, moe=cfg), rngs=nnx.Rngs(0)))
    return apply.lower(layer, x).as_text()

  base = MoeConfig(8, 2, 8)
  for change in (dict(num_experts=16), dict(experts_per_token=3), dict(d_ff=16),
                 dict(normalize_weights=False), dict(bias_update_rate=0.1)):
    assert program(dataclasses.replace(base, **change)) != program(base), change


@pytest.mark.parametrize("platform, chosen", [
  ("tpu", "ragged_dot"), ("gpu", "ragged_dot"), ("cpu", "blocked")])
def test_the_platform_traced_for_chooses_the_implementation(platform, chosen, monkeypatch):
  def both_passes(implementation):
    return jax.make_jaxpr(lambda x, w, sizes: jax.grad(
      lambda x, w: jnp.sum(moe.grouped_matmul(x, w, sizes, implementation=implementation)),
      argnums=(0, 1))(x, w))(jnp.zeros((64, 4)), jnp.zeros((3, 4, 5)), jnp.zeros(3, jnp.int32))

  monkeypatch.setattr(implementations, "platform", lambda: platform)
  assert str(both_passes(None)) == str(both_passes(chosen))
  assert str(both_passes("blocked")) != str(both_passes("ragged_dot"))
