"""What a training step minimises: the next-token loss, and the type of anything in its place."""

import functools
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

from hysparse_jax.config import TrainConfig
from hysparse_jax.data.batches import Batch
from hysparse_jax.model.hybrid import by_layer
from hysparse_jax.model.transformer import Transformer


class LossStats(NamedTuple):
  """Sums over one batch, so that micro-batches and hosts can be added up."""

  nll: jax.Array       # f32 [], sum of weights * negative log-likelihood, nats
  weight: jax.Array    # f32 [], sum of weights
  layers: tuple        # statistics of the stack, see `hybrid.by_layer`


class Objective(Protocol):
  """The scalar that `step.build` differentiates by the model."""

  def __call__(self, cfg: TrainConfig, model: Transformer, batch: Batch,
               denominator: jax.Array) -> tuple[jax.Array, LossStats]:
    """The loss of one micro-batch.

    Args:
      cfg: the run's settings of the loss, among others.
      model: float32 weights.
      batch: `jax.Array` fields, i32 and f32 [B, T].
      denominator: f32 [], what a sum over weighted tokens is divided by to make it this
        micro-batch's share of the mean over the whole batch.

    Returns:
      f32 [], and the statistics that are logged as `loss`, `tokens` and by layer.
    """


def next_token(cfg: TrainConfig, model: Transformer, batch: Batch, denominator=None):
  """The weighted mean next-token loss in nats, plus the auxiliary losses the configs ask for.

      sum_t w_t (nll_t + z_loss * logsumexp_t^2) / denominator + router losses of `model.cfg.moe`

  Args:
    cfg: `z_loss` weighs the squared logsumexp (PaLM, section 5); `loss_chunk` is how many tokens
      per row have their logits in memory at once, a divisor of T, 0: all.
    model: a Transformer.
    batch: see `Batch`.
    denominator: f32 []; None: the sum of this batch's weights.

  Returns:
    f32 [] and `LossStats`.
  """
  with jax.named_scope("forward"):
    hidden, layers = model.hidden(batch.tokens, batch.segment_ids, batch.positions)
  with jax.named_scope("loss"):
    nll, z = token_losses(model, hidden, batch.targets, cfg.loss_chunk)
    weight_sum = jnp.sum(batch.weights)
    nll, z = jnp.sum(nll * batch.weights), jnp.sum(z * batch.weights)
    denominator = weight_sum if denominator is None else denominator
    total = (nll + cfg.z_loss * z) / jnp.maximum(denominator, 1.0)
    return total + router_losses(model, layers), LossStats(nll, weight_sum, layers)


def router_losses(model: Transformer, layers: tuple):
  """f32 []: the mean over layers of the weighted balance and z-losses; 0 without experts."""
  moe = model.cfg.moe
  if moe is None:
    return jnp.zeros((), jnp.float32)
  routers = [layer.router for layer in by_layer(model.cfg, layers)]
  return sum(moe.load_balance_weight * router.load_balance_loss
             + moe.router_z_weight * router.router_z_loss for router in routers) / len(routers)


def token_losses(model: Transformer, hidden, targets, chunk: int = 0):
  """The losses of single tokens, unweighted.

  Args:
    model: its head is used.
    hidden: [B, T, D], normed.
    targets: i32 [B, T].
    chunk: tokens per row whose logits exist at once, a divisor of T; 0: all.

  Returns:
    Negative log-likelihood in nats and squared logsumexp, both f32 [B, T].
  """
  def losses(hidden, targets):
    logits = model.logits(hidden)
    lse = jax.nn.logsumexp(logits, axis=-1)
    target = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return lse - target, jnp.square(lse)

  T = targets.shape[1]
  if chunk in (0, T):
    return losses(hidden, targets)
  split = lambda x: jnp.moveaxis(x.reshape(x.shape[0], T // chunk, chunk, *x.shape[2:]), 1, 0)
  join = lambda x: jnp.moveaxis(x, 0, 1).reshape(x.shape[1], T)
  nll, z = jax.lax.map(jax.checkpoint(lambda args: losses(*args)), (split(hidden), split(targets)))
  return join(nll), join(z)


@functools.partial(jax.jit, static_argnames="chunk")
def evaluate_batch(model: Transformer, batch: Batch, chunk: int = 0):
  """The token losses f32 [B, T] in nats of one batch, no gradient."""
  hidden, _ = model.hidden(batch.tokens, batch.segment_ids, batch.positions)
  return token_losses(model, hidden, batch.targets, chunk)[0]
