"""The long-context tasks run on a model: scores per task and length, and where the answers stood.

Token form (`token_tasks`): one forward pass over context, question and answer. An answer is right
if each of its tokens is the most likely one given everything before it, earlier answers included as
they should be; up to its first mistake that is what greedy decoding would say. Samples of all
lengths share rows of one shape, kept apart by segment ids, so that one program is compiled.

Text form (`text_tasks`): the answer is generated greedily through the cache and matched as RULER
does.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hysparse_jax.errors import UserError
from hysparse_jax.inference.sampling import generate
from hysparse_jax.model.layers import positions_within
from hysparse_jax.model.transformer import Transformer
from hysparse_jax.tasks import scores, text_tasks, token_tasks
from hysparse_jax.tasks.token_tasks import Ids

DEPTH_BINS = 5
ROW_BATCH_TOKENS = 65_536   # tokens of one forward pass, at least one row


class RecallResult(NamedTuple):
  """Scores in [0, 1]: f64 [tasks, lengths], means over samples; NaN where a task cannot fit."""

  form: str                     # "tokens" or "text"
  tasks: tuple[str, ...]
  lengths: tuple[int, ...]      # tokens, question and answer included
  recall: np.ndarray            # RULER's match rule: the share of references that were given
  f1: np.ndarray                # between the set of answers given and the references
  exact: np.ndarray             # every answer right
  by_depth: np.ndarray | None   # f64 [tasks, DEPTH_BINS, lengths], token form: answers right, by
                                # the position of their evidence; NaN where there is none
  samples: int


class _Placed(NamedTuple):
  task: int
  length: int         # index
  row: int
  start: int          # in the row
  sample: token_tasks.Sample


def recall(model: Transformer, ids: Ids, tasks: Sequence[str], lengths: Sequence[int],
           samples: int = 16, *, seed: int = 0, text: np.ndarray | None = None,
           skip_unfit: bool = False) -> RecallResult:
  """Scores the token form of the tasks.

  Args:
    model: a Transformer whose vocabulary holds the ids.
    ids: see `token_tasks.ids_of`.
    tasks: of `token_tasks.TASKS`.
    lengths: tokens of a sample.
    samples: per task and length.
    seed: of the evaluation samples; training's never meet them.
    text: i32 [.] real tokens for the essay haystacks, see `token_tasks.sample`.
    skip_unfit: leave a task out at a length it cannot have, NaN, instead of raising.

  Raises:
    UserError: no such task, a length that a task cannot have, nothing to do.
  """
  tasks, lengths = tuple(tasks), tuple(int(length) for length in lengths)
  _check(tasks, lengths, samples, token_tasks.check_task)
  placed, num_rows = _place(ids, tasks, lengths, samples, seed, text, skip_unfit)
  predicted = _predict(model, placed, num_rows, max(lengths))
  totals = np.zeros((3, len(tasks), len(lengths)))
  counts = np.zeros((len(tasks), len(lengths)))
  right = np.zeros((len(tasks), DEPTH_BINS, len(lengths)))
  seen = np.zeros_like(right)
  for one, said in zip(placed, predicted):
    wanted = [tuple(one.sample.tokens[start:stop].tolist()) for start, stop in one.sample.items]
    cell = one.task, one.length
    if tasks[one.task] in token_tasks.ORDERED:
      wanted, said = list(enumerate(wanted)), list(enumerate(said))
    totals[:, *cell] += (scores.set_recall(said, wanted), scores.set_f1(said, wanted),
                         said == wanted)
    counts[cell] += 1
    for want, got, depth in zip(wanted, said, one.sample.depths):
      if not np.isnan(depth):
        where = one.task, min(int(depth * DEPTH_BINS), DEPTH_BINS - 1), one.length
        right[where] += want == got
        seen[where] += 1
  with np.errstate(invalid="ignore"):
    return RecallResult("tokens", tasks, lengths, *(totals / counts), right / seen, samples)


def recall_text(model: Transformer, tokenizer, tasks: Sequence[str], lengths: Sequence[int],
                samples: int = 4, *, seed: int = 0) -> RecallResult:
  """Scores the text form of the tasks, generating one answer at a time.

  Raises:
    UserError: no such task, a length without room for a task, nothing to do.
  """
  tasks, lengths = tuple(tasks), tuple(int(length) for length in lengths)
  _check(tasks, lengths, samples, text_tasks.check_task)
  totals = np.zeros((3, len(tasks), len(lengths)))
  made = {(t, n, i): text_tasks.sample(task, tokenizer, length, i, seed=seed)
          for t, task in enumerate(tasks) for n, length in enumerate(lengths)
          for i in range(samples)}               # all of them first: a bad length costs nothing
  for (t, n, _), (prompt, references) in made.items():
    spec = text_tasks.TASKS[tasks[t]]
    out = generate(model, np.asarray(tokenizer.encode(prompt))[None], spec.new_tokens,
                   temperature=0.0)
    said = tokenizer.decode(out[0])
    wanted = [reference.lower() for reference in references]
    match = spec.match(said, references)
    totals[:, t, n] += match, scores.set_f1(scores.named(said), wanted), match == 1.0
  return RecallResult("text", tasks, lengths, *(totals / samples), None, samples)


def _check(tasks, lengths, samples, check_task):
  for task in tasks:
    check_task(task)
  if not tasks or not lengths:
    raise UserError("the recall tasks need at least one task and one length")
  if samples < 1:
    raise UserError(f"recall samples is {samples}; it must be at least 1")
  if min(lengths) < 1:
    raise UserError(f"recall length {min(lengths)} is no length; give at least 1")


def _place(ids, tasks, lengths, samples, seed, text, skip_unfit):
  """Every sample and its place in rows of the longest length, filled one after the other."""
  placed, row, used = [], 0, 0
  for n, length in enumerate(lengths):
    for t, task in enumerate(tasks):
      for number in range(samples):
        try:
          made = token_tasks.sample(task, ids, length, number, seed=seed, text=text)
        except UserError:
          if not skip_unfit:
            raise
          break
        if used + length > max(lengths):
          row, used = row + 1, 0
        placed.append(_Placed(t, n, row, used, made))
        used += length
  if not placed:
    raise UserError(f"none of the tasks {', '.join(tasks)} fits into {max(lengths)} tokens")
  return placed, row + 1


def _predict(model, placed, num_rows, row_tokens) -> list[list[tuple]]:
  """The most likely tokens at the answers: per sample, a tuple of ids per item."""
  batch = max(1, min(num_rows, ROW_BATCH_TOKENS // row_tokens))
  num_rows = -(-num_rows // batch) * batch
  tokens = np.zeros((num_rows, row_tokens), np.int32)
  segments = np.zeros((num_rows, row_tokens), np.int32)
  asked = [[] for _ in range(num_rows)]          # places before each answer token
  for one in placed:
    where = slice(one.start, one.start + len(one.sample.tokens))
    tokens[one.row, where] = one.sample.tokens
    segments[one.row, where] = segments[one.row].max() + 1
    asked[one.row] += [one.start + at - 1 for start, stop in one.sample.items
                       for at in range(start, stop)]
  width = max(map(len, asked))
  places = np.asarray([row + [0] * (width - len(row)) for row in asked], np.int32)
  chosen = np.concatenate([
    np.asarray(_most_likely(model, *(x[first:first + batch] for x in (tokens, segments, places))))
    for first in range(0, num_rows, batch)])
  answers, read = [], [0] * num_rows
  for one in placed:
    said = []
    for start, stop in one.sample.items:
      at = read[one.row]
      said.append(tuple(chosen[one.row, at:at + stop - start].tolist()))
      read[one.row] += stop - start
    answers.append(said)
  return answers


@jax.jit
def _most_likely(model: Transformer, tokens, segment_ids, places):
  """i32 [B, T], segments, places i32 [B, A] -> the next token after each place, i32 [B, A]."""
  hidden, _ = model.hidden(tokens, segment_ids, positions_within(segment_ids, tokens.shape))
  picked = jnp.take_along_axis(hidden, places[..., None], axis=1)
  return jnp.argmax(model.logits(picked), axis=-1).astype(jnp.int32)
