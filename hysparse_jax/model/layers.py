"""Weights with names, and the small functions every layer is made of.

Axis letters: B batch, T tokens, D model, N query heads, K KV heads, H head dim, F ffn, V vocab.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from hysparse_jax.config import ModelConfig


def weight(rngs: nnx.Rngs, shape, names, *, in_axes=(), out_axes=(), init=None) -> nnx.Param:
  """A float32 parameter that knows its logical axes and which of them a matmul contracts.

  Args:
    shape: ints.
    names: a logical axis name or None per dim (`hysparse_jax.sharding.RULES`). Dims that stacking
      adds later stand in front and are not named.
    in_axes: the dims a matmul contracts; the default init is normal with variance 1 / their size.
    out_axes: the dims it produces. Together they say what a matrix is, to the initialiser and to
      Muon; both empty for vectors and tables.
    init: `(key, shape) -> f32 array` instead of the default.
  """
  if init is None:
    fan_in = math.prod(shape[a] for a in in_axes)
    init = lambda key, shape: jax.random.normal(key, shape, jnp.float32) * fan_in**-0.5
  return nnx.Param(init(rngs.params(), shape), out_sharding=tuple(names), eager_sharding=False,
                   in_axes=tuple(in_axes), out_axes=tuple(out_axes))


def zeros(key, shape):
  """Initialiser: zeros."""
  del key
  return jnp.zeros(shape, jnp.float32)


def ones(key, shape):
  """Initialiser: ones."""
  del key
  return jnp.ones(shape, jnp.float32)


def scaled_normal(std: float):
  """Initialiser: normal with the given standard deviation."""
  return lambda key, shape: jax.random.normal(key, shape, jnp.float32) * std


def stacked(layer, count: int, rngs: nnx.Rngs):
  """`count` copies of `layer(rngs=...)`: one module with a leading stack axis on every leaf."""
  return jax.lax.map(lambda key: layer(rngs=nnx.Rngs(key)),
                     jax.random.split(rngs.params(), count))


def unstacked(module, index: int):
  """Copy `index` of what `stacked` made."""
  return jax.tree.map(lambda leaf: leaf[index], module)


def rms_norm(x, gain, eps: float):
  """`x / rms(x) * gain` over the last axis, in float32, returned in x's dtype."""
  x32 = x.astype(jnp.float32)
  scale = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
  return (x32 * scale * gain).astype(x.dtype)


def rotary(x, positions, base: float):
  """Rotates channel pairs `(i, i + H/2)` by `position * base ** (-2i / H)`.

  Args:
    x: [B, T, N, H].
    positions: i32 [B, T].

  Returns:
    [B, T, N, H] in x's dtype; computed in float32.
  """
  half = x.shape[-1] // 2
  frequency = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
  angle = positions[..., None, None].astype(jnp.float32) * frequency
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  low, high = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([low * cos - high * sin, high * cos + low * sin], -1).astype(x.dtype)


class Mlp(nnx.Module):
  """SwiGLU: `w_out (silu(w_gate x) * w_up x)`."""

  def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
    D, F = cfg.d_model, cfg.d_ff
    self.w_gate = weight(rngs, (D, F), ("embed", "mlp"), in_axes=(0,), out_axes=(1,))
    self.w_up = weight(rngs, (D, F), ("embed", "mlp"), in_axes=(0,), out_axes=(1,))
    self.w_out = weight(rngs, (F, D), ("mlp", "embed"), in_axes=(0,), out_axes=(1,),
                        init=scaled_normal((2 * cfg.num_layers * F) ** -0.5))

  def __call__(self, x):
    """[B, T, D] -> ([B, T, D], None); the second is where a mixture reports its router."""
    w_gate, w_up, w_out = (w[...].astype(x.dtype) for w in (self.w_gate, self.w_up, self.w_out))
    hidden = jax.nn.silu(jnp.einsum("btd,df->btf", x, w_gate)) * jnp.einsum(
      "btd,df->btf", x, w_up)
    return jnp.einsum("btf,fd->btd", hidden, w_out), None
