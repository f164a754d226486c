"""Models with weights that NumPy drew: compiling the initialiser takes longer than most tests."""

import jax
import numpy as np
from flax import nnx

from hysparse_jax.model.transformer import Transformer


def drawn(cfg, seed=0):
  """A `Transformer` with the initialiser's shapes and scales: norms 1, sinks and biases 0."""
  rng = np.random.default_rng(seed)

  def draw(path, leaf):
    name = jax.tree_util.keystr(path)
    shape, names, contracted = leaf.shape, leaf.out_sharding, leaf.in_axes
    if not contracted and "embedding" not in name:
      return jax.numpy.full(shape, float("norm" in name), np.float32)
    stacked = len(shape) - len(names)
    fan_in = np.prod([shape[stacked + axis] for axis in contracted])
    depth = 2 * cfg.num_layers if names[-1] == "embed" else 1          # what the residual adds up
    std = (fan_in * depth) ** -0.5 if contracted else 0.02
    return jax.numpy.asarray(rng.standard_normal(shape, np.float32) * np.float32(std))

  abstract = jax.eval_shape(lambda: Transformer(cfg, rngs=nnx.Rngs(0)))
  leaves = jax.tree_util.tree_leaves_with_path(abstract, is_leaf=lambda x: isinstance(x, nnx.Param))
  return jax.tree.unflatten(jax.tree.structure(abstract), [draw(*leaf) for leaf in leaves])
