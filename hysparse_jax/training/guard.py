"""Bad steps: which they are, and how one is skipped without a trace.

A step is bad when its loss or gradient norm is not finite, or when the norm stands far above its
average over the good steps so far. Skipping selects the old values (`jnp.where`); nothing is
multiplied by zero, since `0 * nan` is nan.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

WARMUP_STEPS = 20     # good steps before a spike can be told from a start
MEMORY_STEPS = 100    # good steps the running average looks back


class GuardState(NamedTuple):
  """What `judge` remembers. The average is over good steps only, so bad ones cannot poison it."""

  mean_log_norm: jax.Array     # f32 [], running mean of log(gradient norm)
  good: jax.Array              # i32 [], good steps that entered the mean
  consecutive_bad: jax.Array   # i32 []
  total_bad: jax.Array         # i32 []


def init() -> GuardState:
  """The state before the first step."""
  zero = jnp.zeros((), jnp.int32)
  return GuardState(jnp.zeros((), jnp.float32), zero, zero, zero)


def average_norm(state: GuardState):
  """f32 []: the geometric mean of recent good gradient norms; 1 before there are any."""
  return jnp.exp(state.mean_log_norm)


def judge(state: GuardState, loss, grad_norm, spike_factor: float):
  """Is this step good?

  The mean is plain over the first `MEMORY_STEPS` good steps and exponential after, and in logs: a
  norm 9 times the average moves it by 2 %, not 9. A norm of exactly 0 is good but says nothing
  about scale, and stays out of the mean.

  Args:
    loss: f32 [].
    grad_norm: f32 [], the global norm before clipping.
    spike_factor: bad above this multiple of `average_norm`, once `WARMUP_STEPS` good steps are in;
      0 turns that test off.

  Returns:
    `ok` bool [], and the new state.
  """
  ok = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
  if spike_factor:
    spike = grad_norm > spike_factor * average_norm(state)
    ok &= ~(spike & (state.good >= WARMUP_STEPS))
  counts = ok & (grad_norm > 0)
  good = state.good + counts
  log_norm = jnp.log(jnp.where(counts, grad_norm, 1.0))
  moved = state.mean_log_norm + (log_norm - state.mean_log_norm) / jnp.clip(good, 1, MEMORY_STEPS)
  return ok, GuardState(
    mean_log_norm=jnp.where(counts, moved, state.mean_log_norm),
    good=good,
    consecutive_bad=jnp.where(ok, 0, state.consecutive_bad + 1),
    total_bad=state.total_bad + ~ok)


def select(ok, new, old):
  """`new` where `ok` (bool []), else `old`, leaf by leaf and bit for bit."""
  return jax.tree.map(lambda n, o: jnp.where(ok, n, o), new, old)
