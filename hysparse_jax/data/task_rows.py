"""Rows of recall tasks for training, made by the generator that evaluation uses.

A row is cut into equal pieces, T, T/2, T/4, ... tokens each, one sample to a piece, each a document
of its own. With `align_documents` a piece that is not whole key blocks is padded to them. The first
rows can be kept to short pieces: many small puzzles a step, from which recall is learned long
before it is from a few long ones. Answers carry loss, and the tokens before them `context_weight`
each. As a function of (seed, row number) rows can be made anywhere, in any order.
"""

import dataclasses
import functools

import numpy as np

from hysparse_jax.config import Config
from hysparse_jax.errors import UserError
from hysparse_jax.tasks import token_tasks
from hysparse_jax.tasks.token_tasks import Ids

SHORTEST = 64              # tokens of a piece, at least
MAX_ANSWER_WEIGHT = 64.0   # of one answer token: a row that asks little cannot outweigh the batch
SHARE_STEPS = 1000         # the share is a multiple of 1 / this
JUMPS = 2                  # places in a sample where positions skip ahead


@dataclasses.dataclass(frozen=True)
class TaskRows:
  """The task rows of a config.

  Attributes:
    ids: what the tasks are spelled with.
    tasks: which ones, equally often where they fit.
    seq_len: T.
    alignment: samples start at multiples of this many tokens.
    seed: of the samples.
    weight: that a row's answers have together, as a share of T text tokens.
    context_weight: of each other token that a sample goes on from; a text token has 1.
    positions: samples are spread over up to this many positions; 0: none is skipped.
    warmup: rows during which the longest piece doubles at equal intervals, up to T.
  """

  ids: Ids
  tasks: tuple[str, ...]
  seq_len: int
  alignment: int
  seed: int
  weight: float
  context_weight: float
  positions: int
  warmup: int

  def levels(self) -> dict[int, tuple[str, ...]]:
    """Piece length -> the tasks that fit into it."""
    return _levels(self.ids, self.tasks, self.seq_len)

  def take(self, number: int, text: np.ndarray | None) -> dict[str, np.ndarray]:
    """Row `number` as arrays [T] by the field names of `data.Batch`.

    Args:
      number: at least 0.
      text: i32 [.] training tokens for the essay haystacks.
    """
    rng, jumps = (np.random.default_rng((kind, self.seed, number))
                  for kind in (2, 3))                       # 0 and 1 are splits of `token_tasks`
    levels = self.levels()
    allowed = len(levels)
    if number < self.warmup:
      allowed = 1 + number * len(levels) // self.warmup
    length = list(levels)[-allowed:][rng.integers(allowed)]
    stride = -(-length // self.alignment) * self.alignment
    pieces = max(1, self.seq_len // stride)
    row = {name: np.zeros(self.seq_len, np.int32)
           for name in ("tokens", "targets", "segment_ids", "positions")}
    row["weights"] = np.zeros(self.seq_len, np.float32)
    answers = np.zeros(self.seq_len, bool)
    for piece in range(pieces):
      task = levels[length][rng.integers(len(levels[length]))]
      made = token_tasks.sample(task, self.ids, length, number * pieces + piece, seed=self.seed,
                                split="train", text=text)
      start = piece * stride
      where = slice(start, start + length)
      row["tokens"][where] = made.tokens
      row["segment_ids"][where] = piece + 1
      row["positions"][where] = self._spread(jumps, length)
      row["targets"][start:start + length - 1] = made.tokens[1:]
      row["weights"][start:start + length - 1] = self.context_weight
      for first, last in made.items:
        answers[start + first - 1:start + last - 1] = True
    row["weights"][answers] = min(self.weight * self.seq_len / answers.sum(), MAX_ANSWER_WEIGHT)
    return row

  def _spread(self, rng, length):
    """Positions 0 .. with `JUMPS` skips, so that distances beyond T are met in training.

    As in PoSE (Zhu et al., arXiv 2309.10400): the rows stay short, the distances do not.
    """
    at = np.arange(length)
    if self.positions <= length:
      return at
    extra = rng.integers(self.positions - length + 1)
    cuts = np.sort(rng.integers(1, length, JUMPS))
    sizes = np.diff(np.sort(rng.integers(0, extra + 1, JUMPS + 1)))
    return at + sum(size * (at >= cut) for cut, size in zip(cuts, sizes))


def open_task_rows(cfg: Config, text_size: int) -> TaskRows | None:
  """The task rows of a config, None where it asks for none.

  Args:
    cfg: of the run.
    text_size: of the tokenizer; the task ids follow it.

  Raises:
    UserError: an unknown task, too few ids, rows too short for every task.
  """
  data = cfg.data
  if data.task_share == 0:
    return None
  tasks = tuple(token_tasks.TASKS) if data.tasks == "all" else tuple(data.tasks.split(","))
  for task in tasks:
    token_tasks.check_task(task)
  if data.task_ids < token_tasks.MIN_IDS:
    raise UserError(f"data.task_ids is {data.task_ids}; the tasks need at least "
                    f"{token_tasks.MIN_IDS}")
  rows = TaskRows(
    Ids(text_size, data.task_ids), tasks, data.seq_len, cfg.document_alignment, data.seed,
    data.task_weight, data.task_context_weight, data.task_positions,
    warmup=task_rows_before(data.task_warmup_steps * data.batch_size, data.task_share))
  if not rows.levels():
    raise UserError(f"data.seq_len={data.seq_len} is too short for every task of data.tasks; "
                    f"give at least {SHORTEST}")
  return rows


def split_row(number: int, share: float) -> tuple[bool, int]:
  """Is row `number` of the mixture a task row, and its number among the rows of its kind.

  Exact: of any 1000 consecutive rows round(1000 * share) are task rows, spread evenly.
  """
  before, after = (task_rows_before(n, share) for n in (number, number + 1))
  return after > before, before if after > before else number - before


def task_rows_before(number: int, share: float) -> int:
  """How many of the first `number` rows of the mixture are task rows."""
  return number * round(share * SHARE_STEPS) // SHARE_STEPS


@functools.lru_cache(maxsize=8)
def _levels(ids, tasks, seq_len):
  levels = {}
  for halvings in range(seq_len.bit_length()):
    length = seq_len >> halvings
    if halvings and length < SHORTEST:
      break
    fit = tuple(task for task in tasks if _fits(task, ids, length))
    if fit:
      levels[length] = fit
  return levels


def _fits(task, ids, length) -> bool:
  try:
    token_tasks.sample(task, ids, length, 0)
  except UserError:
    return False
  return True
