"""The Hopper kernels in the model: one plan for the layers of a hybrid block, one per device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hysparse_jax import sharding
from hysparse_jax.config import MeshConfig, ModelConfig
from hysparse_jax.model.hybrid import _plan
from hysparse_jax.model.transformer import Transformer
from pallas_kernels import plan_blocks
from pallas_kernels.sparse_layer_attention.gpu import op as gpu

MODEL = ModelConfig(
  vocab_size=64, num_layers=7, d_model=64, num_heads=4, num_kv_heads=2, head_dim=64, d_ff=64,
  sparse_per_full=2, selected_tokens=128, window=64, implementation="mosaic_gpu")


def scans(jaxpr, depth=0):
  """(depth, length, jaxpr) of every scan."""
  for equation in jaxpr.eqns:
    inner = depth
    if equation.primitive.name == "scan":
      inner += 1
      yield inner, equation.params["length"], equation.params["jaxpr"].jaxpr
    for value in equation.params.values():
      value = getattr(value, "jaxpr", value)
      if hasattr(value, "eqns"):
        yield from scans(value, inner)


def primitives(jaxpr):
  names = set()
  for equation in jaxpr.eqns:
    names.add(equation.primitive.name)
    for value in equation.params.values():
      value = getattr(value, "jaxpr", value)
      if hasattr(value, "eqns"):
        names |= primitives(value)
  return names


@pytest.mark.parametrize("remat", ["none", "layer", "block"])
def test_the_layers_of_a_block_share_one_plan(monkeypatch, remat):
  # Triton's kernels cannot be traced without a GPU; what stands in uses every part of the plan.
  def stand_in(q, keys_values, gates, sinks, visible, plans, scale):
    return q + sum(jnp.sum(leaf).astype(q.dtype) for leaf in jax.tree.leaves(plans[0]))

  monkeypatch.setattr(gpu, "_layer", stand_in)
  cfg = ModelConfig(**{name: getattr(MODEL, name) for name in MODEL.__dataclass_fields__}
                    | {"remat": remat})
  model = jax.eval_shape(lambda: Transformer(cfg, rngs=nnx.Rngs(0)))
  tokens = jax.ShapeDtypeStruct((1, 128), jnp.int32)
  jaxpr = jax.make_jaxpr(lambda model, tokens: model(tokens))(model, tokens).jaxpr
  found = list(scans(jaxpr))
  blocks = [body for depth, length, body in found if (depth, length) == (1, 2)]
  layers = [body for depth, length, body in found if (depth, length) == (2, 2)]
  assert len(blocks) == 1 and len(layers) == 1
  assert "sort" in primitives(blocks[0]) and "sort" not in primitives(layers[0])


def test_each_device_plans_for_its_own_shard():
  rng = np.random.default_rng(0)
  own = np.arange(128) // 64
  picked = np.stack([np.zeros_like(own), np.where(own > 0, 1, -1)], -1)
  picked = np.where(rng.random((4, 2, 128, 1)) < 0.5, picked, -1).astype(np.int32)
  mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
  with jax.set_mesh(mesh):
    make = functools.partial(_plan, cfg=MODEL, num_keys=128)
    plan = jax.jit(lambda x: sharding.sharded(make, returns="plan", block_indices=x))(picked)
  for b, k in np.ndindex(4, 2):
    at = slice(b, b + 1), slice(k, k + 1)
    expected = plan_blocks(jnp.asarray(picked[at]), num_heads=2, implementation="mosaic_gpu")
    jax.tree.map(lambda got, want, at=at: np.testing.assert_array_equal(got[at], want),
                 plan, expected)


def test_the_reference_needs_no_plan():
  picked = jnp.zeros((1, 2, 64, 1), jnp.int32)
  assert plan_blocks(picked, num_heads=4, implementation="reference") is None
  with pytest.raises(NotImplementedError, match="block_size 32"):
    plan_blocks(picked, num_heads=4, block_size=32, implementation="mosaic_gpu")
  with pytest.raises(ValueError, match="N=3"):
    plan_blocks(picked, num_heads=3)
