"""Block selections to measure sparse kernels on: recorded from models, or drawn.

`trace` and `early` are what full-attention layers of small byte-level models picked at 32,768
tokens of Python source (16 of 512 blocks of 64 keys a token): a trained one (0.97 bits per byte,
heads of layers 3, 4, 5) and an undertrained one (2.26, nearly random). `hysparse` and `hysparse_m3`
are what two runs of `experiments.reproduce` picked: layers 0 and 12 of 25, which learned no recall,
and layers 0, 4 and 8 of 13 at 1:3, which learned it. `walk` keeps the previous token's blocks and
redraws r of them on average; `random` draws every token's afresh.
"""

import pathlib

import numpy as np

from hysparse_jax.errors import UserError

_FOLDER = pathlib.Path(__file__).parents[1] / "data"     # of selections_*.npz
BLOCK = 64


def recorded(name, heads):
  """A recording, such as `trace` or `early`: i32 [heads, T, P], ascending, -1 last.

  T is 32768 and P 16 in the recordings that are kept here. `hysparse` has 4 heads, `hysparse_m3` 6,
  the others 8; where more are asked for, heads repeat in order: head i is recorded head
  i mod (recorded heads).

  Raises:
    UserError: no recording of that name.
  """
  known = []
  for path in sorted(_FOLDER.glob("selections_*.npz")):
    with np.load(path) as data:
      known += data.files
      if name in data:
        picks = data[name]
        break
  else:
    raise UserError(f"selection: got {name!r}, want one of {', '.join(sorted(known))}")
  return pads_last(picks[np.arange(heads) % picks.shape[0]].astype(np.int32))


def pads_last(picks):
  """Sorts each token's blocks ascending with the -1 pads at the end."""
  high = np.iinfo(np.int32).max
  picks = np.sort(np.where(picks < 0, high, picks), axis=-1)
  return np.where(picks == high, -1, picks).astype(np.int32)


def random(heads, tokens, picks=16, seed=0):
  """Distinct causal blocks drawn uniformly by every token -> i32 [heads, tokens, picks]."""
  rng = np.random.default_rng(seed)
  last = np.arange(tokens) // BLOCK
  out = np.full((heads, tokens, picks), -1, np.int32)
  few = min(tokens, 16 * picks * BLOCK)          # rows with few blocks: rank random numbers
  width = min(16 * picks, -(-tokens // BLOCK))
  for h in range(heads):
    score = rng.random((few, width))
    score[np.arange(width) > last[:few, None]] = 2.0
    order = np.argsort(score, axis=1)[:, :picks]
    chosen = np.where(np.take_along_axis(score, order, 1) > 1, -1, order)
    out[h, :few, :chosen.shape[1]] = chosen
    todo = np.arange(few, tokens)                # rows with many: draw until distinct
    while todo.size:
      drawn = np.sort(rng.integers(0, last[todo, None] + 1, (todo.size, picks)), axis=1)
      good = (np.diff(drawn, axis=1) > 0).all(1)
      out[h, todo[good]] = drawn[good]
      todo = todo[~good]
  return pads_last(out)


def walk(heads, tokens, replaced, picks=16, seed=0):
  """The previous token's blocks with `replaced` of them redrawn on average; own block always in.

  A draw that is already selected changes nothing: at 32,768 tokens 0.90 of 1 redrawn blocks are
  new.
  """
  rng = np.random.default_rng(seed)
  out = np.full((heads, tokens, picks), -1, np.int32)
  out[:, :picks * BLOCK] = np.where(
    np.arange(picks) <= np.arange(min(tokens, picks * BLOCK))[:, None] // BLOCK,
    np.arange(picks), -1)[None, :]
  chance = replaced / (picks - 1)
  first = picks * BLOCK
  for h in range(heads):
    change = rng.random((tokens, picks)) < chance
    drawn = (rng.random((tokens, picks)) * (np.arange(tokens)[:, None] // BLOCK + 1)).astype(int)
    leaves = rng.integers(picks, size=tokens).tolist()       # whose place a new own block takes
    current = list(range(picks))
    held = set(current)
    for t in range(first, tokens):
      own = t // BLOCK
      if own not in held:
        held.remove(current[leaves[t]])
        held.add(own)
        current[leaves[t]] = own
      for slot in np.flatnonzero(change[t]).tolist():
        block = int(drawn[t, slot])
        if current[slot] != own and block not in held:
          held.remove(current[slot])
          held.add(block)
          current[slot] = block
      out[h, t] = current
  return pads_last(out)


def selection(name, heads, tokens, picks=16, seed=0):
  """The selection of that name, `random`, `walk r=0.5|1|2` or a recording: i32 [heads, tokens, P].

  Raises:
    UserError: an unknown name, or a recording of another shape.
  """
  if name.startswith("walk r="):
    return walk(heads, tokens, float(name.removeprefix("walk r=")), picks, seed)
  if name == "random":
    return random(heads, tokens, picks, seed)
  out = recorded(name, heads)
  if out.shape[1:] != (tokens, picks):
    raise UserError(f"selection {name}: recorded at [T, P] = {list(out.shape[1:])}, "
                     f"got {[tokens, picks]}")
  return out
