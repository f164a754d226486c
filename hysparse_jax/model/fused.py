"""Weights that read the same input, side by side: how a decoded token wants them.

With one token per sequence a step takes as long as its weights take to read, and one large product
reads them faster than several small ones: on an H100 2.8 TB/s against 2.0. So a model that decodes
is fused once: a layer's wq, wk, wv and gates become `w_in`, an MLP's w_gate and w_up `w_gate_up`.
What is computed stays the same. Training and checkpoints never see this form.

Axis letters: D model, X all outputs, F ffn; the axes of stacked layers lead.
"""

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx

from hysparse_jax.model.layers import Mlp


@functools.partial(jax.jit, static_argnums=0)
def _side_by_side(lead: int, *weights):
  """[..., D, X]: weights with `lead` axes up to D, one after the other."""
  return jnp.concatenate([w.reshape(*w.shape[:lead], -1) for w in weights], axis=-1)


def fused(model):
  """A copy of a Transformer with its products fused; the arrays that stay are shared.

  Its heads must not be split over a mesh: the outputs of `w_in` are of many kinds.
  """
  model = jax.tree.map(lambda leaf: leaf, model)
  for hybrid_blocks in model.stack.groups:
    for layer in hybrid_blocks.parts:
      branches = [branch for branch in (getattr(layer, "sparse", None),
                                        getattr(layer, "local", None)) if branch is not None]
      _fuse(layer, "w_in", layer.wq[...].ndim - 2,
            [(layer, name) for name in ("wq", "wk", "wv") if hasattr(layer, name)]
            + [(branch, "gate") for branch in branches if branch.gate is not None])
      if isinstance(layer.mlp, Mlp):
        _fuse(layer.mlp, "w_gate_up", layer.mlp.w_gate[...].ndim - 1,
              [(layer.mlp, "w_gate"), (layer.mlp, "w_up")])
  return model


def _fuse(module, name, lead, parts):
  setattr(module, name, nnx.Param(_side_by_side(lead, *(getattr(of, n)[...] for of, n in parts))))
  for of, part in parts:
    if part == "gate":
      of.gate = None
    else:
      delattr(of, part)


def split(z, *shapes):
  """z [B, T, X] -> [B, T, *shape] for each shape, from the start; they add up to X."""
  out, start = [], 0
  for shape in shapes:
    size = math.prod(shape)
    out.append(z[..., start:start + size].reshape(*z.shape[:2], *shape))
    start += size
  return out
