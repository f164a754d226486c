"""Bad steps: which they are, and how one is skipped without a trace.

A step is bad when its loss or gradient norm is not finite, or when the norm stands far above its
average over the good steps so far. Skipping selects the old values (`jnp.where`); nothing is
multiplied by zero, since `0 * nan` is nan. Spikes that follow one another are the ground and not
the batch: skipping would not leave the spot, so after a few the step is taken, with the gradient
scaled to the average norm.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

WARMUP_STEPS = 20     # good steps before a spike can be told from a start
MEMORY_STEPS = 100    # good steps the running average looks back
PATIENCE = 3          # spikes in a row that are skipped, at most


class GuardState(NamedTuple):
  """What `judge` remembers. The average is over good steps only, so bad ones cannot poison it."""

  mean_log_norm: jax.Array     # f32 [], running mean of log(gradient norm)
  good: jax.Array              # i32 [], good steps that entered the mean
  consecutive_bad: jax.Array   # i32 []; a scaled step leaves it as it is
  total_bad: jax.Array         # i32 []


def init() -> GuardState:
  """The state before the first step."""
  zero = jnp.zeros((), jnp.int32)
  return GuardState(jnp.zeros((), jnp.float32), zero, zero, zero)


def average_norm(state: GuardState):
  """f32 []: the geometric mean of recent good gradient norms; 1 before there are any."""
  return jnp.exp(state.mean_log_norm)


def judge(state: GuardState, loss, grad_norm, spike_factor: float, patience: int = PATIENCE):
  """Is this step good, and how is its gradient to be scaled?

  The mean is plain over the first `MEMORY_STEPS` good steps and exponential after, and in logs: a
  norm 9 times the average moves it by 2 %, not 9, and one of a scaled step by what `spike_factor`
  times the average would. A norm of exactly 0 is good but says nothing about scale, and stays out
  of the mean.

  Args:
    state: of the steps before.
    loss: f32 [].
    grad_norm: f32 [], the global norm before clipping.
    spike_factor: a spike above this multiple of `average_norm`, once `WARMUP_STEPS` good steps are
      in; 0 turns that test off.
    patience: bad steps in a row after which a spike is taken, scaled.

  Returns:
    `ok` bool []; `scale` f32 [], 1 but for a spike that is taken; the new state.
  """
  finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
  average = average_norm(state)
  spike = jnp.zeros((), bool)
  if spike_factor:
    spike = finite & (grad_norm > spike_factor * average) & (state.good >= WARMUP_STEPS)
  ok = finite & (~spike | (state.consecutive_bad >= patience))
  scale = jnp.where(ok & spike, average / jnp.where(spike, grad_norm, 1.0), 1.0)
  counts = ok & (grad_norm > 0)
  good = state.good + counts
  seen = jnp.where(spike, spike_factor * average, grad_norm)
  log_norm = jnp.log(jnp.where(counts, seen, 1.0))
  moved = state.mean_log_norm + (log_norm - state.mean_log_norm) / jnp.clip(good, 1, MEMORY_STEPS)
  return ok, scale, GuardState(
    mean_log_norm=jnp.where(counts, moved, state.mean_log_norm),
    good=good,
    consecutive_bad=jnp.where(ok, jnp.where(spike, state.consecutive_bad, 0),
                              state.consecutive_bad + 1),
    total_bad=state.total_bad + ~ok)


def select(ok, new, old):
  """`new` where `ok` (bool []), else `old`, leaf by leaf and bit for bit."""
  return jax.tree.map(lambda n, o: jnp.where(ok, n, o), new, old)
