"""The paper's claims, decided from the numbers by a stated rule.

For two models and one figure, with means over their seeds and one pooled standard deviation s:

    d = mean(a) - mean(b), oriented so that d > 0 says that b is worse
    e = t * s * sqrt(1 / n_a + 1 / n_b), t the two-sided 95 % quantile of Student's distribution

"b is worse than a"      reproduced if d - e > 0, else not reproduced if d + e < margin
"b is no worse than a"   not reproduced if d - e > 0, else reproduced if d + e < margin
Else, and with fewer than two degrees of freedom, not decidable at this scale. s pools the spread
over seeds of all models that have more than one. A comparison of recall where both are at the floor
says nothing and is not decidable either.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import scipy.stats

REPRODUCED, NOT_REPRODUCED, UNDECIDABLE = (
  "reproduced", "not reproduced", "not decidable at this scale")


class Figure(NamedTuple):
  """A number that models are compared by."""

  name: str
  sign: int           # +1: higher is better
  margin: float       # the difference that would matter
  floor: float | None # at or below it a value says nothing


class Claim(NamedTuple):
  """`worse` (or, with `or_equal`, "no worse than") between models."""

  text: str
  reference: str
  other: str
  or_equal: bool = False


class Verdict(NamedTuple):
  """What the rule says, and from which numbers."""

  outcome: str
  difference: float     # d, in the figure's unit; NaN where a model is missing
  error: float          # e; inf with too few seeds
  reason: str


RECALL = Figure("recall", 1, 3.0, 5.0)              # points of 100
BITS = Figure("bits per byte", -1, 0.01, None)

CLAIMS = (
  Claim("HySparse is within noise of full attention, or better", "full", "hysparse", True),
  Claim("Hybrid SWA is worse than full attention", "full", "swa"),
  Claim("Hybrid SWA is worse than HySparse", "hysparse", "swa"),
  Claim("ablation 1: without the local branch it is worse", "hysparse", "no_local"),
  Claim("ablation 2: with the local branch on the shared KV it is worse", "hysparse",
        "shared_local_kv"),
  Claim("random blocks are worse than the oracle's", "hysparse", "random"),
  Claim("random blocks are worse than ablation 1", "no_local", "random"),
  Claim("random blocks are worse than ablation 2", "shared_local_kv", "random"),
  Claim("at 1:3, HySparse is within noise of full attention, or better", "full", "hysparse_m3",
        True),
  Claim("at 1:3, Hybrid SWA is worse than full attention", "full", "swa_m3"),
  Claim("at 1:3, Hybrid SWA is worse than HySparse", "hysparse_m3", "swa_m3"),
)


def decide(claim: Claim, figure: Figure, values: Mapping[str, Sequence[float]]) -> Verdict:
  """The verdict on one claim.

  Args:
    claim: names two models.
    figure: what the values are.
    values: model -> one value per seed, for every model with the same setup.
  """
  a, b = (np.asarray(values.get(model, ()), float) for model in (claim.reference, claim.other))
  if not a.size or not b.size:
    missing = claim.other if a.size else claim.reference
    return Verdict(UNDECIDABLE, math.nan, math.inf, f"{missing} was not run")
  difference = figure.sign * float(a.mean() - b.mean())
  spread, freedom = pooled_deviation(values.values())
  if freedom < 2:
    return Verdict(UNDECIDABLE, difference, math.inf, "too few seeds")
  error = float(scipy.stats.t.ppf(0.975, freedom) * spread * math.sqrt(1 / a.size + 1 / b.size))
  if figure.floor is not None and max(a.mean(), b.mean()) <= figure.floor:
    return Verdict(UNDECIDABLE, difference, error, f"both at most {figure.floor:g}")
  low, high = difference - error, difference + error
  worse, no_worse = (NOT_REPRODUCED, REPRODUCED) if claim.or_equal else (REPRODUCED, NOT_REPRODUCED)
  if low > 0:
    return Verdict(worse, difference, error, "worse by more than the noise")
  if high < figure.margin:
    return Verdict(no_worse, difference, error, f"a loss of {figure.margin:g} is excluded")
  return Verdict(UNDECIDABLE, difference, error, "the noise is as large as the difference")


def pooled_deviation(groups) -> tuple[float, int]:
  """The standard deviation about the groups' own means, and its degrees of freedom."""
  squares, freedom = 0.0, 0
  for group in groups:
    group = np.asarray(group, float)
    if group.size > 1:
      squares += float(((group - group.mean()) ** 2).sum())
      freedom += group.size - 1
  return (math.sqrt(squares / freedom) if freedom else math.nan), freedom
