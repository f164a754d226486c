"""`experiments.selections`: what was recorded is a selection, and what is drawn is what it says."""

import numpy as np
import pytest

from experiments.bench import selections


@pytest.mark.parametrize("name, heads", [
  ("trace", 8), ("early", 8), ("hysparse", 4), ("hysparse_m3", 6)])
def test_recordings_are_causal_and_distinct(name, heads):
  picks = selections.recorded(name, heads)
  assert picks.shape == (heads, 32_768, 16) and picks.dtype == np.int32
  own = np.arange(32_768) // selections.BLOCK
  assert (picks <= own[None, :, None]).all() and (picks.max(-1) >= 0).all()
  assert ((picks >= 0).sum(-1) == np.minimum(own + 1, 16)).all()
  assert ((np.diff(picks, axis=-1) > 0) | (picks[..., 1:] < 0)).all()      # ascending, pads last
  assert any((a != b).any() for a, b in zip(picks, picks[1:]))
  more = selections.recorded(name, heads + 2)
  assert (more[:heads] == picks).all() and (more[heads:] == picks[:2]).all()     # they repeat


@pytest.mark.parametrize("rate", [0.5, 1.0, 2.0])
def test_a_walk_redraws_as_many_as_it_says_and_keeps_its_own_block(rate):
  """Of n causal blocks 16 are held: a draw is new in n - 16 of n cases; own blocks come by 1/64."""
  tokens, first = 16_384, 8192
  picks = selections.walk(1, tokens, rate)[0]
  assert (picks == np.arange(tokens)[:, None] // selections.BLOCK).any(-1).all()
  new = [len(set(picks[t]) - set(picks[t - 1])) for t in range(first, tokens)]
  blocks = np.arange(first, tokens) // selections.BLOCK + 1
  assert np.mean(new) == pytest.approx(rate * (1 - 16 / blocks).mean() + 1 / 64, rel=0.05)


def test_an_unknown_name_says_what_there_is():
  wanted = "got 'trase', want one of early, hysparse, hysparse_m3, trace"
  with pytest.raises(ValueError, match=wanted):
    selections.selection("trase", 1, 32_768)
  with pytest.raises(ValueError, match=r"recorded at \[T, P\] = \[32768, 16\], got \[1024, 16\]"):
    selections.selection("trace", 1, 1024)
