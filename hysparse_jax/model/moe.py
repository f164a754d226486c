"""Mixture of experts: a softmax router, the k best experts of every token, none dropped.

`Experts` replaces `layers.Mlp` and has its call signature. Rows (one per token and chosen
expert) are sorted by expert and multiplied group by group, so the work is k / E of a dense layer
with all experts. Padding is in no group and in no statistic. Under a mesh the experts are split
over its `expert` axis and their F over `tensor`; the result and every gradient are those of one
device.

Axis letters: B batch, T tokens, S = B T tokens of a device, k experts per token, R = S k rows,
D model, E experts, F ffn of one expert.
"""

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec as P

from hysparse_jax.config import ModelConfig, MoeConfig
from hysparse_jax.errors import UserError
from hysparse_jax.model.layers import scaled_normal, weight, zeros
from hysparse_jax.sharding import BATCH_AXES
from pallas_kernels import implementations

TOKEN_AXES = (*BATCH_AXES, "context")   # the mesh axes that split tokens


class RouterStats(NamedTuple):
  """What a router reports; all float32, over the valid tokens of the whole batch however it is
  sharded; all 0 where there are none."""

  load_balance_loss: jax.Array   # []; 1 when balanced (Switch Transformer, eq. 4, without alpha)
  router_z_loss: jax.Array       # [] (ST-MoE, eq. 5)
  expert_load: jax.Array         # [E], share of the rows of each expert; sums to 1


class Experts(nnx.Module):
  """`sum over the k chosen e of p_e(x) * w_out[e] (silu(w_gate[e] x) * w_up[e] x)`."""

  def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
    """Weights of E experts and their router; `cfg.moe` must be set."""
    D, E, F = cfg.d_model, cfg.moe.num_experts, cfg.moe.d_ff
    self.cfg = cfg.moe
    self.router = weight(rngs, (D, E), ("embed", None), in_axes=(0,), out_axes=(1,))
    self.router_bias = (weight(rngs, (E,), (None,), init=zeros)
                        if cfg.moe.bias_update_rate > 0 else None)
    self.w_gate = weight(rngs, (E, D, F), ("expert", "embed", "mlp"), in_axes=(1,), out_axes=(2,))
    self.w_up = weight(rngs, (E, D, F), ("expert", "embed", "mlp"), in_axes=(1,), out_axes=(2,))
    self.w_out = weight(rngs, (E, F, D), ("expert", "mlp", "embed"), in_axes=(1,), out_axes=(2,),
                        init=scaled_normal((2 * cfg.num_layers * F) ** -0.5))

  def __call__(self, x, valid=None):
    """[B, T, D] -> ([B, T, D] in x's dtype, RouterStats).

    Args:
      x: [B, T, D].
      valid: bool [B, T], False for padding: no expert is given the token, no statistic counts it,
        its output is 0. None: all are valid.

    Raises:
      UserError: the mesh in use does not divide E, F or the batch.
    """
    bias = None if self.router_bias is None else lax.stop_gradient(self.router_bias[...])
    weights = [w[...].astype(x.dtype) for w in (self.w_gate, self.w_up, self.w_out)]
    forward = functools.partial(_forward, cfg=self.cfg)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
      return forward(x, valid, self.router[...], bias, *weights)
    _check_mesh(mesh.shape, x.shape, self.cfg)
    tokens = P(BATCH_AXES, "context", None)
    return jax.shard_map(
      functools.partial(forward, sharded=True),
      in_specs=(tokens, P(BATCH_AXES, "context"), P(), P(), P("expert", None, "tensor"),
                P("expert", None, "tensor"), P("expert", "tensor", None)),
      out_specs=(tokens, P()))(x, valid, self.router[...], bias, *weights)


def updated_router_bias(bias, expert_load, rate: float):
  """Auxiliary-loss-free balancing (DeepSeek-V3, section 2.1.2): one step of the router's bias.

  Args:
    bias: f32 [..., E], added to the probabilities when experts are chosen, never to the weights.
    expert_load: f32 [..., E], `RouterStats.expert_load` of the step.
    rate: how far an expert moves: up when it got fewer rows than its share, down when more.

  Returns:
    f32 [..., E].
  """
  return bias + rate * jnp.sign(1.0 / bias.shape[-1] - expert_load)


def _forward(x, valid, router, bias, w_gate, w_up, w_out, *, cfg: MoeConfig, sharded=False):
  """The layer on one device: of all experts, or of this device's share (`sharded`).

  Args:
    x: [B, T, D], this device's tokens.
    valid: bool [B, T] or None.
    router: f32 [D, E].
    bias: f32 [E] or None.
    w_gate, w_up: [E here, D, F here]; w_out: [E here, F here, D].
    cfg: of the router.
    sharded: inside a shard_map; tokens meet the experts through collectives.
  """
  B, T, D = x.shape
  x = x.reshape(B * T, D)
  with jax.named_scope("router"):
    weights, experts, sums = route(x, None if valid is None else valid.reshape(B * T), router,
                                   bias, cfg)
  if sharded:
    sums = jax.tree.map(lambda a: lax.psum(a, TOKEN_AXES), sums)
    x, weights, experts = (lax.all_gather(a, "expert", tiled=True) for a in (x, weights, experts))
    experts = experts - lax.axis_index("expert") * w_gate.shape[0]
  with jax.named_scope("experts"):
    y = _apply_experts(x, weights, experts, w_gate, w_up, w_out)
  if sharded:
    y = lax.psum(lax.psum_scatter(y, "expert", tiled=True), "tensor")
  return y.reshape(B, T, D), _router_stats(sums, cfg.experts_per_token)


class _Sums(NamedTuple):
  """Sums over valid tokens that `RouterStats` is made of; all float32."""

  tokens: jax.Array    # [], how many
  prob: jax.Array      # [E], of the probabilities
  rows: jax.Array      # [E], rows of each expert
  z: jax.Array         # [], of the squared log-sum-exp


def _router_stats(sums: _Sums, experts_per_token: int) -> RouterStats:
  """Means; the balance loss is `E sum_e load_e prob_e`, whose gradient goes through prob alone."""
  tokens = jnp.maximum(sums.tokens, 1.0)
  load = sums.rows / (tokens * experts_per_token)
  balance = load.size * jnp.sum(load * (sums.prob / tokens))
  return RouterStats(balance, sums.z / tokens, load)


def route(x, valid, router, bias, cfg: MoeConfig):
  """Chooses k experts per token; ties go to the lower expert.

  Args:
    x: [S, D].
    valid: bool [S], or None: all.
    router: f32 [D, E].
    bias: f32 [E] added to the probabilities for the choice alone, or None.
    cfg: k, and whether the k weights are normalised.

  Returns:
    weights f32 [S, k], experts i32 [S, k], E where a token is not valid, and sums over those of
    these S tokens that are.
  """
  E = router.shape[-1]
  logits = jnp.dot(x.astype(jnp.float32), router, precision=lax.Precision.HIGHEST)
  log_z = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
  probs = jnp.exp(logits - log_z)
  scores = probs if bias is None else probs + bias
  experts = lax.top_k(lax.stop_gradient(scores), cfg.experts_per_token)[1]
  if valid is None:
    valid = jnp.ones(x.shape[:1], bool)
  experts = jnp.where(valid[:, None], experts, E)
  # A compare-and-sum instead of a gather: it fuses, and its transpose is no scatter.
  chosen = experts[:, :, None] == jnp.arange(E)
  weights = jnp.sum(jnp.where(chosen, probs[:, None, :], 0.0), axis=-1)
  if cfg.normalize_weights:
    total = jnp.sum(weights, axis=-1, keepdims=True)
    weights = weights / jnp.where(valid[:, None], total, 1.0)
  return weights, experts, _Sums(
    tokens=jnp.sum(valid, dtype=jnp.float32),
    prob=jnp.sum(jnp.where(valid[:, None], probs, 0.0), axis=0),
    rows=jnp.sum(chosen, axis=(0, 1), dtype=jnp.float32),
    z=jnp.sum(jnp.where(valid, jnp.square(log_z[:, 0]), 0.0)))


def _apply_experts(x, weights, experts, w_gate, w_up, w_out):
  """Sorts rows by expert, applies each group's SwiGLU, returns the weighted sums to the tokens.

  Args:
    x: [S, D].
    weights: f32 [S, k].
    experts: i32 [S, k]; one outside [0, E here) is another device's, or padding's, and adds 0.
    w_gate, w_up, w_out: [E here, ...].

  Returns:
    [S, D].
  """
  S, k = experts.shape
  E = w_gate.shape[0]
  group = jnp.where((experts >= 0) & (experts < E), experts, E).reshape(S * k)
  _, order = lax.sort((group, lax.iota(jnp.int32, S * k)), num_keys=1, is_stable=True)
  place = jnp.argsort(order)   # of each (token, choice) among the sorted rows
  group_sizes = jnp.sum(group[:, None] == jnp.arange(E), axis=0, dtype=jnp.int32)

  rows = take_rows(x, order // k, place.reshape(S, k))
  hidden = (jax.nn.silu(grouped_matmul(rows, w_gate, group_sizes))
            * grouped_matmul(rows, w_up, group_sizes))
  rows = grouped_matmul(hidden, w_out, group_sizes)
  rows = take_rows(rows, place, order[:, None]).reshape(S, k, -1)
  return jnp.sum(rows.astype(jnp.float32) * weights[:, :, None], axis=1).astype(x.dtype)


@jax.custom_vjp
def take_rows(x, index, places):
  """`x[index]`, whose transpose is a gather as well, never a scatter.

  Args:
    x: [S, D].
    index: i32 [R].
    places: i32 [S, R / S]; for each row of x, everywhere `index` puts it.

  Returns:
    [R, D].
  """
  del places
  return x[index]


def _take_rows_fwd(x, index, places):
  return x[index], places


def _take_rows_bwd(places, g):
  return jnp.sum(g[places], axis=1, dtype=jnp.float32).astype(g.dtype), None, None


take_rows.defvjp(_take_rows_fwd, _take_rows_bwd)


def grouped_matmul(x, w, group_sizes, *,
                   implementation: Literal["blocked", "ragged_dot"] | None = None):
  """Multiplies each group of rows by its own matrix.

  Args:
    x: [R, D], sorted by group.
    w: [E, D, F].
    group_sizes: i32 [E], rows of each group; their sum may be less than R.
    implementation: "blocked" loops over blocks of rows, and costs what the groups need;
      "ragged_dot" is `lax.ragged_dot`, native on TPU, but E times the work on CPU. None picks by
      the platform that is traced for.

  Returns:
    [R, F] in x's dtype; 0 in the rows after the last group.
  """
  axes = frozenset.union(*map(_varying, (x, w, group_sizes)))
  return _grouped_matmul(*(_vary(a, axes) for a in (x, w, group_sizes)), implementation)


def _varying(a) -> frozenset:
  """The shard_map axes along which `a` differs; none outside a shard_map."""
  return jax.typeof(a).manual_axis_type.varying


def _vary(a, axes):
  """`a` marked as differing along these axes too; the transpose sums over the new ones."""
  new = tuple(sorted(axes - _varying(a)))
  return lax.pcast(a, new, to="varying") if new else a


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _grouped_matmul(x, w, group_sizes, implementation):
  return _pick(implementation, _blocked, _ragged)(x, w, group_sizes)


def _grouped_matmul_fwd(x, w, group_sizes, implementation):
  return _grouped_matmul(x, w, group_sizes, implementation), (x, w, group_sizes)


def _grouped_matmul_bwd(implementation, residuals, g):
  x, w, group_sizes = residuals
  dx = _pick(implementation, _blocked, _ragged)(g, jnp.swapaxes(w, 1, 2), group_sizes)
  dw = _pick(implementation, _blocked_outer, _ragged_outer)(x, g, group_sizes)
  return dx, dw.astype(w.dtype), None


_grouped_matmul.defvjp(_grouped_matmul_fwd, _grouped_matmul_bwd)


def _pick(implementation, blocked, ragged):
  if implementation is None:
    implementation = "blocked" if implementations.platform() == "cpu" else "ragged_dot"
  return {"blocked": blocked, "ragged_dot": ragged}[implementation]


def _ragged(x, w, group_sizes):
  inside = jnp.arange(x.shape[0]) < jnp.sum(group_sizes)
  return jnp.where(inside[:, None], lax.ragged_dot(x, w, group_sizes), 0)


def _ragged_outer(x, g, group_sizes):
  """Sums `x_r g_r^T` over the rows of each group: ([R, D], [R, F]) -> f32 [E, D, F]."""
  dims = lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((0,), (0,)), ((), ())),
    lhs_ragged_dimensions=[0], rhs_group_dimensions=[])
  return lax.ragged_dot_general(x, g, group_sizes, dims, preferred_element_type=jnp.float32)


class _Blocks(NamedTuple):
  """The groups cut into blocks of rows; a block has rows of one group only."""

  size: int           # rows, static
  count: jax.Array    # i32 []
  first: jax.Array    # i32 [E], number of each group's first block
  start: jax.Array    # i32 [E], first row of each group
  end: jax.Array      # i32 [E], row after its last


def _cut(num_rows, group_sizes) -> _Blocks:
  """Blocks of about half the mean group: what the last block of each wastes stays small."""
  E = group_sizes.shape[0]
  size = 8
  while size < 256 and 2 * size * E < num_rows:
    size *= 2
  ends = jnp.cumsum(group_sizes)
  last = jnp.cumsum((group_sizes + size - 1) // size)
  return _Blocks(size, last[-1], jnp.concatenate([jnp.zeros_like(last[:1]), last[:-1]]),
                 ends - group_sizes, ends)


def _block(blocks: _Blocks, i):
  """(group, first row, rows left in the group from there) of block i."""
  e = jnp.sum(blocks.first <= i, dtype=jnp.int32) - 1
  # Empty groups share `first` with the next one, so the last match is the group with rows.
  start = blocks.start[e] + (i - blocks.first[e]) * blocks.size
  return e, start, blocks.end[e] - start


def _blocked(x, w, group_sizes):
  """Block after block in row order: a short block's overhang is overwritten by the next group."""
  R, F = x.shape[0], w.shape[2]
  blocks = _cut(R, group_sizes)
  x = jnp.pad(x, ((0, blocks.size), (0, 0)))

  def step(i, y):
    e, start, _ = _block(blocks, i)
    rows = lax.dynamic_slice_in_dim(x, start, blocks.size)
    return lax.dynamic_update_slice_in_dim(y, jnp.dot(rows, w[e]), start, axis=0)

  y = _vary(jnp.zeros((R + blocks.size, F), x.dtype), _varying(x))
  y = lax.fori_loop(0, blocks.count, step, y)[:R]
  return jnp.where((jnp.arange(R) < jnp.sum(group_sizes))[:, None], y, 0)


def _blocked_outer(x, g, group_sizes):
  """Sums `x_r g_r^T` over the rows of each group: ([R, D], [R, F]) -> f32 [E, D, F]."""
  blocks = _cut(x.shape[0], group_sizes)
  x, g = (jnp.pad(a, ((0, blocks.size), (0, 0))) for a in (x, g))

  def step(i, dw):
    e, start, left = _block(blocks, i)
    x_rows, g_rows = (lax.dynamic_slice_in_dim(a, start, blocks.size) for a in (x, g))
    mine = (jnp.arange(blocks.size) < left)[:, None]
    x_rows, g_rows = jnp.where(mine, x_rows, 0), jnp.where(mine, g_rows, 0)
    update = jnp.dot(x_rows.T, g_rows, preferred_element_type=jnp.float32)
    return dw.at[e].add(update)

  shape = (group_sizes.shape[0], x.shape[1], g.shape[1])
  dw = _vary(jnp.zeros(shape, jnp.float32), _varying(x))
  return lax.fori_loop(0, blocks.count, step, dw)


def _check_mesh(mesh, x_shape, cfg: MoeConfig):
  batch_ways = mesh["data"] * mesh["fsdp"] * mesh["expert"]
  for what, size, ways in (("moe.num_experts", cfg.num_experts, mesh["expert"]),
                           ("moe.d_ff", cfg.d_ff, mesh["tensor"]),
                           ("the batch", x_shape[0], batch_ways),
                           ("the sequence", x_shape[1], mesh["context"])):
    if size % ways:
      raise UserError(f"{what} is {size}, which the mesh {dict(mesh)} cannot split {ways} ways; "
                      f"choose a multiple of {ways}, or another mesh")
