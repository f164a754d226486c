"""The order of documents and rows: permutations computed from numbers, not stored."""

import itertools

import numpy as np

_EPOCHS_KEPT = 4          # orders of documents held at once


def shuffled_rows(numbers: np.ndarray, per_pass: int, seed: int) -> np.ndarray:
  """Where the rows `numbers`, i64 [R], stand in the sequence of rows, i64 [R].

  A bijection of every pass [n * per_pass, (n + 1) * per_pass) to itself, another for each pass and
  seed: a Feistel network over the next even number of bits, walked until it lands inside (Black
  and Rogaway 2002), so that no permutation need be held however long a pass is.
  """
  number_of_pass, within = np.divmod(numbers.astype(np.int64), per_pass)
  half = np.uint64(max(1, -(-(per_pass - 1).bit_length() // 2)))
  mask = np.uint64((1 << int(half)) - 1)
  key = _mix(_mix(np.array([seed % 2**64], np.uint64)) + number_of_pass.astype(np.uint64))
  place, outside = within.astype(np.uint64), np.ones(within.shape, bool)
  while outside.any():
    left, right = place >> half, place & mask
    for turn in range(4):
      left, right = right, left ^ (_mix(_mix(key + np.uint64(turn)) + right) & mask)
    place = np.where(outside, left << half | right, place)
    outside = place >= per_pass
  return number_of_pass * per_pass + place.astype(np.int64)


class EndlessOrder:
  """Documents of `counts[d]` units each, visited once per epoch, in a new order every epoch.

  Args:
    counts: i64 [documents], units (tokens, or rows) of each document.
    seed: of the orders; None keeps the given order.
  """

  def __init__(self, counts, seed):
    self._counts, self._seed = counts, seed
    self.total = int(counts.sum())   # units per epoch
    self._epochs = {}

  def locate(self, at: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For the units numbered `at`, i64: visit (a number no other visit has), document, offset."""
    epochs, within = np.divmod(at, self.total)
    visit, document, offset = (np.empty_like(at) for _ in range(3))
    for epoch in np.unique(epochs):
      chosen = epochs == epoch
      order, ends = self._epoch(int(epoch))
      rank = np.searchsorted(ends, within[chosen], side="right")
      visit[chosen] = epoch * len(order) + rank
      document[chosen] = order[rank]
      offset[chosen] = within[chosen] - (ends[rank] - self._counts[order[rank]])
    return visit, document, offset

  def _epoch(self, epoch):
    found = self._epochs.get(epoch)   # shared by threads: worst case, computed twice
    if found is None:
      order = (np.arange(len(self._counts)) if self._seed is None
               else np.argsort(_hashes(self._seed, epoch, len(self._counts)), kind="stable"))
      found = order, np.cumsum(self._counts[order])
      for old in list(itertools.islice(self._epochs, max(0, len(self._epochs) - _EPOCHS_KEPT + 1))):
        self._epochs.pop(old, None)
      self._epochs[epoch] = found
    return found


def _hashes(seed, epoch, count) -> np.ndarray:
  """u64 [count]: the SplitMix64 stream (Steele et al. 2014) of (seed, epoch).

  Written out because numpy does not promise the same permutation from one version to the next.
  """
  gamma = 0x9E3779B97F4A7C15
  start = np.array([seed % 2**64], np.uint64)
  start = _mix(_mix(start) + np.array([epoch], np.uint64))
  return _mix(start + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(gamma))


def _mix(x):
  x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return x ^ (x >> np.uint64(31))
