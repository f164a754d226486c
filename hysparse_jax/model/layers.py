"""Weights with names, and the small functions every layer is made of.

Axis letters: B batch, T tokens, D model, N query heads, K KV heads, H head dim, F ffn, V vocab.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from hysparse_jax.config import ModelConfig, RopeConfig
from pallas_kernels import implementations


def weight(rngs: nnx.Rngs, shape, names, *, in_axes=(), out_axes=(), init=None) -> nnx.Param:
  """A float32 parameter with the names of its logical axes and those that a matmul contracts.

  Args:
    shape: ints.
    names: a logical axis name or None per dim (`hysparse_jax.sharding.RULES`). Dims that stacking
      adds later come first and are not named.
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


def rotary(x, positions, rope: RopeConfig):
  """Turns channel pairs `(i, i + R/2)` of the first R channels by `position * frequency[i]`.

  Args:
    x: [B, T, N, H].
    positions: i32 [B, T].
    rope: R = fraction * H, and the frequencies.

  Returns:
    [B, T, N, H] in x's dtype; computed in float32.
  """
  turned = rope.rotated_channels(x.shape[-1])
  if not turned:
    return x
  angle = positions[..., None, None].astype(jnp.float32) * rope_frequencies(rope, turned)
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  x32 = x.astype(jnp.float32)
  low, high = jnp.split(x32[..., :turned], 2, axis=-1)
  parts = [low * cos - high * sin, high * cos + low * sin, x32[..., turned:]]
  return (jnp.concatenate(parts, axis=-1) * rope_temperature(rope)).astype(x.dtype)


def rope_frequencies(rope: RopeConfig, channels: int):
  """f32 [R/2] for R = `channels`: radians per token of each channel pair.

      none   theta_i = base ** (-2i / R)
      ntk    the same with base * factor ** (R / (R - 2)): the slowest pair turns factor times
             slower, the fastest as before (NTK-aware interpolation)
      yarn   theta_i / factor for pairs that turn less than beta_slow times in `original_tokens`
             tokens, theta_i for those that turn more than beta_fast times, a linear blend over the
             pairs between (YaRN, section 3.2, with the authors' rounding of the two bounds)
  """
  half = channels // 2
  base = rope.base * (rope.factor ** (channels / (channels - 2)) if rope.scaling == "ntk" else 1)
  pair = jnp.arange(half, dtype=jnp.float32)
  frequency = base ** (-pair / half)
  if rope.scaling != "yarn":
    return frequency

  def pair_that_turns(times):
    return half * math.log(rope.original_tokens / (2 * math.pi * times)) / math.log(rope.base)

  first = max(math.floor(pair_that_turns(rope.beta_fast)), 0)
  last = min(math.ceil(pair_that_turns(rope.beta_slow)), channels - 1)
  stretched = jnp.clip((pair - first) / max(last - first, 1e-3), 0.0, 1.0)
  return frequency * (1 - stretched + stretched / rope.factor)


def rope_temperature(rope: RopeConfig) -> float:
  """What queries and keys are each multiplied by: sqrt(1/t) = 0.1 ln(factor) + 1 (YaRN, eq. 22)."""
  return 0.1 * math.log(rope.factor) + 1.0 if rope.scaling == "yarn" else 1.0


def positions_within(segment_ids, shape):
  """i32 [B, T]: how far each token is from the start of its document, or of its row (None)."""
  index = jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32), shape)
  if segment_ids is None:
    return index
  first = jnp.concatenate([jnp.ones_like(segment_ids[:, :1], bool),
                           segment_ids[:, 1:] != segment_ids[:, :-1]], axis=1)
  return index - jax.lax.cummax(jnp.where(first, index, 0), axis=1)


def product(equation: str, x, w, **options):
  """`jnp.einsum` of x [B, T, ...] and a weight, which is rounded to x's dtype.

  XLA for GPUs turns the product of a single row into a reduction, and that of one with a large
  table into a float32 one: both read the weight at a third of the memory's rate or less. Two rows
  are a matrix product, so a single one is multiplied twice.
  """
  w = w.astype(x.dtype)
  if math.prod(x.shape[:2]) == 1 and implementations.platform() == "gpu":
    return jnp.einsum(equation, jnp.concatenate([x, x]), w, **options)[:1]
  return jnp.einsum(equation, x, w, **options)


def valid_mean(x, valid):
  """Mean of x [B, T, ...] over the tokens of `valid` bool [B, T] (None: all) and the other axes."""
  per_token = jnp.mean(x, axis=tuple(range(2, x.ndim)), dtype=jnp.float32)
  if valid is None:
    return jnp.mean(per_token)
  return jnp.sum(per_token * valid) / jnp.maximum(jnp.sum(valid, dtype=jnp.float32), 1.0)


def rematerialised(cfg: ModelConfig, level: str, function, **kwargs):
  """`function`, recomputed in the backward pass if `cfg.remat` says so at this level.

  The selected blocks are always saved: recomputed scores could differ in the last bit, and then
  forward and backward would attend to different blocks. So are, where a kernel names them, its
  output and log-sum-exp, which spare the backward pass a second run of the forward kernel.
  """
  if cfg.remat != level:
    return function
  keep = jax.checkpoint_policies.save_only_these_names(
    "block_indices", "oracle_block_indices", "oracle_out", "oracle_lse")
  return jax.checkpoint(function, policy=keep, prevent_cse=False, **kwargs)


class Mlp(nnx.Module):
  """SwiGLU: `w_out (silu(w_gate x) * w_up x)`."""

  def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
    D, F = cfg.d_model, cfg.d_ff
    self.w_gate = weight(rngs, (D, F), ("embed", "mlp"), in_axes=(0,), out_axes=(1,))
    self.w_up = weight(rngs, (D, F), ("embed", "mlp"), in_axes=(0,), out_axes=(1,))
    self.w_out = weight(rngs, (F, D), ("mlp", "embed"), in_axes=(0,), out_axes=(1,),
                        init=scaled_normal((2 * cfg.num_layers * F) ** -0.5))

  def __call__(self, x, valid=None):
    """[B, T, D] -> ([B, T, D], None); the second is where a mixture reports its router.

    `valid` bool [B, T] says which tokens a mixture's statistics are taken over.
    """
    del valid
    linear = lambda x, w: product("btd,df->btf", x, w[...])
    if hasattr(self, "w_gate_up"):     # `fused`
      gate, up = jnp.split(linear(x, self.w_gate_up), 2, axis=-1)
    else:
      gate, up = linear(x, self.w_gate), linear(x, self.w_up)
    return linear(jax.nn.silu(gate) * up, self.w_out), None
