"""Which cases the older stack runs (`make test-older`): enough to see that a version differs."""

import pytest


def older(cases, *kept):
  """Parameters of which the older stack runs `kept` alone; the newer stack runs all.

  Raises ValueError where a name in `kept` is no case, so that none is lost by renaming.
  """
  cases = list(cases)
  if lost := [case for case in kept if case not in cases]:
    raise ValueError(f"no such cases: {lost}; there are {cases}")
  return [case if case in kept else
          pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.newer)
          for case in cases]
