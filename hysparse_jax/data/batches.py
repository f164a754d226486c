"""Batches as a pure function of (config, step): any step, any host, any number of workers.

Documents are tokenised once into one flat array. Training reads an endless sequence of rows:
epoch after epoch, each with the documents in a fresh order drawn from (seed, epoch). With
`packing` the epochs form one stream, cut every `seq_len`; with `align_documents` each document in
it is padded to whole key blocks, so that the next one starts at a multiple of `block_size` in its
row. Without `packing` every row is one document, or a `seq_len` piece of a longer one, padded. With
`task_share` that share of the rows are recall tasks (`task_rows.py`).

The place of a row follows from its number by a search in cumulative lengths, so nothing is replayed
on resume and no reader state is saved: a checkpoint holds the step and the `fingerprint` of the
recipe. Rows are trained on in a shuffled order, pass by pass, since neighbours are often pieces of
one document: the batch of step s is the rows numbered `shuffled_rows` of [s*B, (s+1)*B); host i of
n takes the i-th of n equal slices.

Tokens are held in memory (1 byte each for bytes); there is no on-disk cache between runs.
"""

import dataclasses
import functools
import multiprocessing.connection
import os
import pathlib
import shutil
import signal
import tempfile
import threading
import weakref
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from absl import flags

from hysparse_jax.config import Config
from hysparse_jax.data.corpus import Corpus
from hysparse_jax.data.order import EndlessOrder, shuffled_rows
from hysparse_jax.data.task_rows import TaskRows, open_task_rows, split_row
from hysparse_jax.data.tokenizer import load_tokenizer
from hysparse_jax.errors import UserError

__all__ = ["Batch", "Corpus", "TrainStream", "check_fingerprint", "heldout_batches",
           "load_tokenizer"]

VERSION = "2"             # of the mapping from config and step to batches; in the fingerprint
_PREFETCH = 2             # batches ready ahead of the step, per worker
_STEPS = 1 << 40          # more than any run has
_FILES = ("tokens.npy", "starts.npy")   # of what worker processes map


class Batch(NamedTuple):
  """Rows of tokens. Padding is 0 in every array."""

  tokens: np.ndarray        # i32 [B,T]
  targets: np.ndarray       # i32 [B,T], the next token of the same document; 0 where there is none
  segment_ids: np.ndarray   # i32 [B,T], 1, 2, ... per row, one for each document in it; 0 = padding
  positions: np.ndarray     # i32 [B,T], from 0 in every segment
  weights: np.ndarray       # f32 [B,T], 1 where there is a target, else 0; answers of tasks weigh
                            # what `task_rows.py` says


class TrainStream:
  """The training batches of a config, whole or one host's slice.

  Raises:
    UserError: what `Corpus.open` and `load_tokenizer` raise; fewer tokens than one row; a batch
      that does not divide over the hosts.
  """

  def __init__(self, cfg: Config, process_index: int = 0, process_count: int = 1):
    data = cfg.data
    if not 0 <= process_index < process_count:
      raise UserError(f"process_index is {process_index}; expected 0 to {process_count - 1} of "
                      f"process_count={process_count}")
    if data.batch_size % process_count:
      raise UserError(f"data.batch_size={data.batch_size} does not divide over {process_count} "
                      "hosts; make it a multiple")
    corpus, tokenizer = Corpus.open(data), load_tokenizer(data)
    self._workers = data.workers
    self._recipe = _Recipe(_Layout.of(cfg, data.seq_len), data.seed)
    self._rows = self._recipe.rows(*tokenizer.encode_documents(corpus.train))
    self._folder: str | None = None   # of the tokens as files, once worker processes need them
    share = data.batch_size // process_count
    self._slice = _Slice(data.batch_size, process_index * share, share, data.task_share,
                         open_task_rows(cfg, tokenizer.vocab_size))
    self.num_documents = len(corpus.train)
    self.warnings = corpus.warnings           # what was left out of the source, a line each
    self._described = corpus.describe()
    self.tokens_per_epoch = self._rows.tokens.size
    if self.tokens_per_epoch < (data.seq_len if data.packing else 1):
      raise UserError(
        f"data.source={data.source!r} has {self.tokens_per_epoch} training tokens, less than one "
        f"row of data.seq_len={data.seq_len}; add text or shorten the row")
    self.fingerprint = {
      "version": VERSION,
      "source": f"sha256:{corpus.digest}",
      "tokenizer": tokenizer.fingerprint,
      **{name: str(getattr(data, name)) for name in (
        "text_field", "seq_len", "batch_size", "packing", "heldout_fraction", "seed")},
    }
    if cfg.document_alignment > 1 and (data.packing or data.task_share):
      self.fingerprint["align_documents"] = str(cfg.document_alignment)
    if data.task_share:
      self.fingerprint |= {name: str(getattr(data, name)) for name in (
        "task_share", "tasks", "task_ids", "task_weight", "task_context_weight",
        "task_positions", "task_warmup_steps")}

  @property
  def padding_share(self) -> float:
    """The share of the places in rows of text that hold no token, over one epoch."""
    return self._rows.padding_share

  def describe(self) -> str:
    """Documents, held-out share, tokens per epoch and padding in one line."""
    return (f"{self._described}; {self.tokens_per_epoch:,} tokens an epoch, "
            f"{self.padding_share:.2%} of the places in rows are padding")

  def batch(self, step: int) -> Batch:
    """This host's slice of the batch of `step`, [B / process_count, T]."""
    return self._slice.of(self._rows, _checked_step(step))

  def iterator(self, start_step: int) -> Iterator[Batch]:
    """`batch(start_step), batch(start_step + 1), ...` without end, made ahead of time by grain.

    `data.workers` processes make the batches; with 0 a thread of this process does. The tokens
    reach the processes as memory-mapped temporary files, removed with the stream. Processes are
    spawned: a script that uses them must guard its entry with `if __name__ == "__main__"`.
    """
    import grain
    steps = grain.MapDataset.range(_checked_step(start_step), _STEPS)
    if self._workers == 0:
      dataset = steps.map(self.batch).to_iter_dataset(
        grain.ReadOptions(num_threads=1, prefetch_buffer_size=_PREFETCH))
    else:
      if not flags.FLAGS.is_parsed():   # in a notebook nobody has, and grain reads its flags
        flags.FLAGS.mark_as_parsed()
      dataset = steps.map(self._worker_batches()).to_iter_dataset(
        grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
      # Shared memory stays off: it is small in containers and outlives a killed run.
      dataset = grain.experimental.WithOptionsIterDataset(
        dataset, grain.experimental.DatasetOptions(min_shm_size=1 << 62))
      # Whole batches are dealt to the workers in turn and collected in the same turn, so their
      # number cannot change the order.
      dataset = dataset.mp_prefetch(
        grain.MultiprocessingOptions(num_workers=self._workers,
                                     per_worker_buffer_size=_PREFETCH),
        worker_init_fn=functools.partial(_prepare_worker, self._folder))
    held = [iter(dataset)]
    batches = self._forward(held)
    weakref.finalize(batches, _close, held)   # at exit too, while grain can still close
    return batches

  def _forward(self, held):
    try:
      while held:
        yield next(held[0])
    finally:
      while held:   # spelled out: at exit, this module's names may be gone
        held.pop().close()

  def _worker_batches(self):
    if self._folder is None:
      folder = self._folder = tempfile.mkdtemp(prefix="hysparse_tokens_")
      weakref.finalize(self, functools.partial(shutil.rmtree, folder, ignore_errors=True))
      self._rows.save(folder)
    return _WorkerBatches(self._folder, self._recipe, self._slice)


def heldout_batches(cfg: Config, count: int, batch_size: int | None = None,
                    seq_len: int | None = None) -> list[Batch]:
  """The first `count` batches of the held-out documents, fewer where they end sooner.

  One pass over rows drawn from all of them, the same for every seed, packed as `cfg.data` says;
  what the documents do not fill of the last batch is padding. Batches are global: every host gets
  the same ones.

  Raises:
    UserError: as `TrainStream`; a `count`, `batch_size` or `seq_len` below 1; a `seq_len` that is
      not whole key blocks, where documents are aligned to them.
  """
  batch_size = cfg.data.batch_size if batch_size is None else batch_size
  seq_len = cfg.data.seq_len if seq_len is None else seq_len
  for name, value in (("count", count), ("batch_size", batch_size), ("seq_len", seq_len)):
    if value < 1:
      raise UserError(f"held-out {name} is {value}; it must be at least 1")
  tokenizer, documents = load_tokenizer(cfg.data), Corpus.open(cfg.data).heldout
  rows = _Recipe(_Layout.of(cfg, seq_len), seed=None).rows(*tokenizer.encode_documents(documents))
  available = -(-rows.per_pass // batch_size)
  numbers = np.arange(min(count, available) * batch_size).reshape(-1, batch_size)
  return [rows.take(shuffled_rows(batch, rows.per_pass, seed=0)) for batch in numbers]


def check_fingerprint(saved: dict[str, str], current: dict[str, str]):
  """Passes if both recipes give the same batches.

  Raises:
    UserError: names every field that differs, with both values.
  """
  differing = [f"{name} was {saved.get(name, 'absent')}, is {current.get(name, 'absent')}"
               for name in dict.fromkeys([*saved, *current])
               if saved.get(name) != current.get(name)]
  if differing:
    hint = (" (--set data.align_documents=False packs documents as before they were aligned)"
            if "align_documents" in current and "align_documents" not in saved else "")
    raise UserError(f"the data differs from the checkpoint's: {'; '.join(differing)}; restore the "
                    f"old values{hint}, or start in a new workdir")


class _Slice(NamedTuple):
  """Rows [first, first + size) of every global batch of `batch_size`."""

  batch_size: int
  first: int
  size: int
  task_share: float
  tasks: TaskRows | None

  def of(self, rows, step) -> Batch:
    numbers = step * self.batch_size + self.first + np.arange(self.size)
    if self.tasks is None:
      return rows.take(shuffled_rows(numbers, rows.per_pass, rows.seed))
    kinds = [split_row(number, self.task_share) for number in numbers.tolist()]
    text = np.array([number for is_task, number in kinds if not is_task], np.int64)
    batch = rows.take(shuffled_rows(text, rows.per_pass, rows.seed))
    asked = [self.tasks.take(number, rows.tokens) for is_task, number in kinds if is_task]
    order = np.argsort([is_task for is_task, _ in kinds], kind="stable").argsort()
    return Batch(*(np.concatenate([one, *(row[name][None] for row in asked)])[order]
                   for name, one in batch._asdict().items()))


@dataclasses.dataclass(frozen=True)
class _WorkerBatches:
  """`TrainStream.batch` for another process: pickles as a path and a few numbers."""

  folder: str
  recipe: "_Recipe"
  slice: _Slice

  def __call__(self, step):
    return self.slice.of(_mapped_rows(self.folder, self.recipe), step)


def _close(held):
  while held:
    held.pop().close()


def _prepare_worker(folder, worker_index, worker_count):
  """Lets the parent alone decide when a worker ends: by closing it, or by dying itself.

  Signals to the process group (Ctrl-C, a scheduler's SIGTERM) are the parent's to handle. Without
  the thread, workers of a parent killed outright would wait for ever, and its files stay.
  """
  del worker_index, worker_count
  for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN)
  process = multiprocessing.parent_process()
  assert process is not None, "a worker has a parent"

  def follow_parent():
    multiprocessing.connection.wait([process.sentinel])
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)

  threading.Thread(target=follow_parent, daemon=True).start()


@functools.lru_cache(maxsize=1)
def _mapped_rows(folder, recipe):
  """The rows of `recipe` over the tokens that `_Rows.save` wrote, memory-mapped."""
  return recipe.rows(*(np.load(pathlib.Path(folder, name), mmap_mode="r") for name in _FILES))


class _Layout(NamedTuple):
  """How documents fill rows."""

  seq_len: int      # T
  packing: bool     # several documents per row, or one
  alignment: int    # packed documents start at multiples of this many tokens

  @classmethod
  def of(cls, cfg: Config, seq_len: int) -> "_Layout":
    cfg.check_row_length(seq_len)
    return cls(seq_len, cfg.data.packing, cfg.document_alignment)


class _Recipe(NamedTuple):
  """What makes rows of tokens and starts, but for these: small enough for another process."""

  layout: _Layout
  seed: int | None    # of the epochs' orders; None: one pass in the given order

  def rows(self, tokens, starts) -> "_Rows":
    return _Rows(tokens, starts, self.layout, self.seed)


class _Rows:
  """Rows by number: endless and shuffled per epoch, or, with `seed=None`, one pass in order.

  Args:
    tokens: integers [tokens], all documents end to end.
    starts: i64 [documents + 1], where each begins.
    layout: how documents fill rows.
    seed: of the epochs' orders, or None.
  """

  def __init__(self, tokens, starts, layout: _Layout, seed):
    self.tokens, self.starts, self.seed = tokens, starts, seed
    self._seq_len, self._packing, alignment = layout
    self._one_pass = seed is None
    self._lengths = np.diff(starts)
    if self._packing:
      counts = -(-self._lengths // alignment) * alignment
    else:   # n tokens hold n - 1 predictions, T to a row; one token alone still has a row
      counts = np.where(self._lengths > 0, np.maximum(1, -(-(self._lengths - 1) // self._seq_len)),
                        0)
    self._order = EndlessOrder(counts, seed)

  @property
  def per_pass(self) -> int:
    """Rows that one pass over the documents fills, the last perhaps in part."""
    return -(-self._order.total // self._seq_len) if self._packing else self._order.total

  @property
  def padding_share(self) -> float:
    """The share of the places in one pass that hold no token."""
    if self._packing:
      return 1 - self._lengths.sum() / self._order.total
    targets_alone = (self._lengths > 1) & ((self._lengths - 1) % self._seq_len == 0)
    return 1 - (self._lengths.sum() - targets_alone.sum()) / (self._order.total * self._seq_len)

  def save(self, folder: str):
    """Writes the tokens where `_mapped_rows` maps them from."""
    for name, array in zip(_FILES, (self.tokens, self.starts)):
      np.save(pathlib.Path(folder, name), array)

  def take(self, numbers: np.ndarray) -> Batch:
    """Rows `numbers`, i64 [R], as a batch of R; past the end of a single pass they are padding."""
    columns = np.arange(self._seq_len + 1)   # one more than T: the target of the last
    if self._packing:
      at = numbers[:, None] * self._seq_len + columns
      visit, document, offset = self._order.locate(at)
      present = offset < self._lengths[document]
      if self._one_pass:
        present &= at < self._order.total
    else:
      visit, document, piece = (x[:, None] for x in self._order.locate(numbers))
      offset = piece * self._seq_len + columns
      present = offset < self._lengths[document]
      if self._one_pass:
        present &= numbers[:, None] < self._order.total
      visit = np.broadcast_to(visit, offset.shape)
    offset = np.where(present, offset, 0)
    tokens = np.where(present, self.tokens[self.starts[document] + offset], 0)
    return _batch(tokens, np.where(present, visit, -1))


def _batch(tokens, visit) -> Batch:
  """A batch from T+1 columns of tokens and of the document visit they belong to; -1 = padding."""
  here, following = visit[:, :-1], visit[:, 1:]
  columns = np.arange(here.shape[1])
  opens = np.concatenate([np.ones_like(here[:, :1], bool), here[:, 1:] != here[:, :-1]], axis=1)
  opened_at = np.maximum.accumulate(np.where(opens, columns, 0), axis=1)
  text = here >= 0
  predicts = text & (here == following)
  return Batch(
    tokens=tokens[:, :-1].astype(np.int32),
    targets=np.where(predicts, tokens[:, 1:], 0).astype(np.int32),
    segment_ids=np.where(text, np.cumsum(opens & text, axis=1), 0).astype(np.int32),
    positions=np.where(text, columns - opened_at, 0).astype(np.int32),
    weights=predicts.astype(np.float32))


def _checked_step(step) -> int:
  if step < 0:
    raise UserError(f"step is {step}; steps count from 0")
  return int(step)
