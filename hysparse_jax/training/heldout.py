"""Held-out loss, bits per byte, and the loss by position in the document.

Bits per byte compares models with different tokenizers; the loss by position shows whether a model
uses its context: it falls with the distance from the document's start while context helps.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from hysparse_jax.errors import UserError
from hysparse_jax.model.transformer import Transformer
from hysparse_jax.training.losses import evaluate_batch

FIRST_BUCKET = 64   # tokens of the first position bucket; each later one ends at twice the last


class PositionLoss(NamedTuple):
  """The mean loss of targets predicted from positions [start, end) of their document."""

  start: int
  end: int
  loss: float      # nats per token
  tokens: int


class HeldoutResult(NamedTuple):
  """Means over every target that counts."""

  loss: float                        # nats per token
  bits_per_byte: float
  by_position: list[PositionLoss]    # ascending; buckets without a token are left out
  tokens: int


def heldout(model: Transformer, batches: Sequence, tokenizer, chunk: int = 0, *,
            place: Callable = lambda batch: batch) -> HeldoutResult:
  """The loss of a model on batches it was not trained on.

  Args:
    model: a Transformer.
    batches: of `data.heldout_batches`: tokens, targets, segment_ids, positions i32 [B, T] and
      weights f32 [B, T].
    tokenizer: its `byte_lengths`, i64 [V], are the UTF-8 bytes of each token.
    chunk: tokens per row whose logits exist at once, a divisor of T; 0: all.
    place: puts a batch on its devices.

  Raises:
    UserError: the batches hold no target.
  """
  nats, counts, length = np.zeros(64), np.zeros(64, np.int64), 0
  for batch in batches:
    losses = np.asarray(evaluate_batch(model, place(batch), chunk=chunk), np.float64)
    counted = np.asarray(batch.weights) > 0
    bucket = _bucket(np.asarray(batch.positions)[counted])
    nats += np.bincount(bucket, losses[counted], minlength=64)
    counts += np.bincount(bucket, minlength=64)
    length += int(tokenizer.byte_lengths[np.asarray(batch.targets)[counted]].sum())
  tokens = int(counts.sum())
  if tokens == 0:
    raise UserError("the held-out batches hold no target; give more held-out text "
                    "(data.heldout_fraction) or shorter rows")
  by_position = [
    PositionLoss(FIRST_BUCKET << index - 1 if index else 0, FIRST_BUCKET << index,
                 float(nats[index] / counts[index]), int(counts[index]))
    for index in np.flatnonzero(counts).tolist()]
  total = float(nats.sum())
  return HeldoutResult(total / tokens, total / math.log(2) / max(length, 1), by_position, tokens)


def _bucket(positions):
  """0 for positions below FIRST_BUCKET, then one more for every doubling."""
  return np.frexp(positions // FIRST_BUCKET)[1]
