"""The P best key blocks of every query, inside a TPU kernel: exact, from scores held in VMEM.

Blocks go down the sublanes, queries along the lanes. P times: the largest score of each lane, the
lowest block among equals, then that score is struck out. Eight blocks are compared at once, one per
sublane; each sublane keeps its own best score and where it was, a strict `>` keeps the lower block,
and only at the end of a sweep are the eight merged. Scores are compared as they are, in float32.
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.softmax import INITIAL_MAX, MASKED

ROWS = 64            # blocks per loop iteration: enough work to hide the loop
NONE = 2**30         # no block


def block_maxima(logits, block_size):
  """f32 [keys, queries] -> [keys / block_size, queries]: each block's largest, 8 blocks together.

  The 8 rows that remain of each of 8 blocks become one row each in three rounds: rows whose bit is
  0 keep the first block of a pair, the others the second, and each takes the larger of its own
  and of the row that the round brings around. A plain reduction costs half as much again.
  """
  queries = logits.shape[1]
  row = lax.broadcasted_iota(jnp.int32, (8, queries), 0)
  rows = []
  for first in range(0, logits.shape[0], 8 * block_size):
    left = [logits[a:a + block_size].reshape(-1, 8, queries).max(axis=0)
            for a in range(first, first + 8 * block_size, block_size)]
    for shift in (1, 2, 4):
      even = (row & shift) == 0
      left = [jnp.maximum(jnp.where(even, a, b), pltpu.roll(jnp.where(even, b, a), shift, 0))
              for a, b in zip(left[::2], left[1::2])]
    rows += left
  return jnp.concatenate(rows)


def group_scores(maxima_ref, lse, score_ref, first, last, rest):
  """score[c] = max over heads of (block maximum - lse), merged into what earlier heads left.

  Args:
    maxima_ref: f32 [heads, C, bq]; rows outside first..last hold anything.
    lse: list of f32 [1, bq], one per head.
    score_ref: f32 [C, bq]; may be `maxima_ref.at[0]`.
    first: first visible block; last: one past the last.
    rest: bool, or None where `score_ref` holds nothing yet at any step.
  """
  tile = score_ref.shape[1]

  def chunk(c, _):
    rows = pl.ds(pl.multiple_of(c * ROWS, ROWS), ROWS)
    score = maxima_ref[0, rows, :] - lse[0]
    for g in range(1, len(lse)):
      score = jnp.maximum(score, maxima_ref[g, rows, :] - lse[g])
    if rest is not None:
      score = jnp.maximum(score, jnp.where(rest, score_ref[rows, :], MASKED))
    block = c * ROWS + lax.broadcasted_iota(jnp.int32, (ROWS, tile), 0)
    score_ref[rows, :] = jnp.where((block >= first) & (block < last), score, MASKED)
    return 0

  lax.fori_loop(first // ROWS, pl.cdiv(last, ROWS), chunk, 0)


def pick(score_ref, picked_ref, first, last):
  """Writes the best blocks, ascending, -1 at the end; destroys the scores.

  Args:
    score_ref: f32 [C, bq], C a multiple of `ROWS`; `MASKED` where a block is no candidate.
    picked_ref: i32 [P, bq].
    first: first visible block; last: one past the last.
  """
  tile = score_ref.shape[1]
  num_blocks = picked_ref.shape[0]
  sublane = lax.broadcasted_iota(jnp.int32, (8, tile), 0)

  def one(p, struck):
    def chunk(c, carry):
      best, where = carry
      rows = pl.ds(pl.multiple_of(c * ROWS, ROWS), ROWS)
      eights = [c * (ROWS // 8) + i for i in range(ROWS // 8)]
      scores = score_ref[rows, :]
      scores = [jnp.where(struck == eight, MASKED, scores[8 * i:8 * i + 8])
                for i, eight in enumerate(eights)]
      score_ref[rows, :] = jnp.concatenate(scores)
      for eight, score in zip(eights, scores):
        better = score > best
        best, where = jnp.where(better, score, best), jnp.where(better, eight, where)
      return best, where

    start = jnp.full((8, tile), INITIAL_MAX), jnp.full((8, tile), NONE, jnp.int32)
    best, where = lax.fori_loop(first // ROWS, pl.cdiv(last, ROWS), chunk, start)
    block = jnp.where(where == NONE, NONE, where * 8 + sublane)
    top = best == best.max(axis=0, keepdims=True)
    block = jnp.where(top, block, NONE).min(axis=0, keepdims=True)
    picked_ref[pl.ds(p, 1), :] = block
    return jnp.where(sublane == (block & 7), block >> 3, -1)

  lax.fori_loop(0, num_blocks, one, jnp.full((8, tile), -1, jnp.int32))
  picked = picked_ref[...]

  def ascending(p, left):
    lowest = left.min(axis=0, keepdims=True)
    picked_ref[pl.ds(p, 1), :] = jnp.where(lowest == NONE, -1, lowest)
    return jnp.where(left == lowest, NONE, left)

  lax.fori_loop(0, num_blocks, ascending, picked)
