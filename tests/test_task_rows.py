"""Task rows in the training mixture: exact share, answers alone weigh, any host and any order."""

import dataclasses

import numpy as np
import pytest

from hysparse_jax.config import Config, DataConfig, ModelConfig
from hysparse_jax.data import batches as data
from hysparse_jax.data import task_rows
from hysparse_jax.data.task_rows import open_task_rows, split_row
from hysparse_jax.errors import UserError
from hysparse_jax.tasks import token_tasks
from tests.corpora import write_folder

T = 512


@pytest.fixture(scope="module")
def cfg(tmp_path_factory):
  source = write_folder(tmp_path_factory.mktemp("text") / "documents")
  return Config(
    model=ModelConfig(block_size=64),
    data=DataConfig(source=str(source), seq_len=T, batch_size=8, heldout_fraction=0.2,
                    task_share=0.375, task_ids=300))


def changed(cfg, **fields):
  """The config with other settings of its data."""
  return dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, **fields))


def _is_task(batch):
  return (batch.tokens >= 256).any(axis=1)


def test_share_is_exact_and_nothing_is_lost(cfg):
  kinds = [split_row(number, 0.375) for number in range(2000)]
  assert sum(is_task for is_task, _ in kinds) == 750
  for wanted in (True, False):
    numbers = [number for is_task, number in kinds if is_task == wanted]
    assert numbers == list(range(len(numbers)))
  stream = data.TrainStream(cfg)
  assert [_is_task(stream.batch(step)).sum() for step in range(4)] == [3] * 4
  plain = data.TrainStream(changed(cfg, task_share=0.0))
  text = [row.tolist() for step in range(8) for row in stream.batch(step).tokens
          if row.max() < 256]
  assert text == [row.tolist() for step in range(5) for row in plain.batch(step).tokens]
  assert plain.fingerprint.keys() < stream.fingerprint.keys()


def test_answers_alone_have_weight(cfg):
  stream = data.TrainStream(changed(cfg, task_share=1.0))
  lengths = set()
  for step in range(3):
    batch = stream.batch(step)
    for row in range(8):
      asked = batch.weights[row] > 0
      weights = np.unique(batch.weights[row][asked])
      assert len(weights) == 1
      expected = min(cfg.data.task_weight * T / asked.sum(), task_rows.MAX_ANSWER_WEIGHT)
      np.testing.assert_allclose(weights[0], expected, rtol=1e-6)
      at = np.flatnonzero(asked)
      np.testing.assert_array_equal(batch.targets[row, at], batch.tokens[row, at + 1])
      assert (batch.segment_ids[row, at] == batch.segment_ids[row, at + 1]).all()
      lengths.add(T // batch.segment_ids[row].max())
      starts = np.flatnonzero(np.diff(batch.segment_ids[row], prepend=0))
      assert (batch.positions[row, starts] == 0).all()
  assert lengths == {64, 128, 256, 512}


def test_samples_grow_during_warmup(cfg):
  """12 steps of 3 task rows, four lengths: nine rows until each next length joins."""
  rows = open_task_rows(changed(cfg, task_warmup_steps=12), 256)
  plain = open_task_rows(cfg, 256)
  length = lambda number: T // rows.take(number, None)["segment_ids"].max()
  lengths = [length(number) for number in range(36)]
  for longest, start in zip((64, 128, 256, 512), range(0, 36, 9)):
    assert max(lengths[start:start + 9]) == longest
  assert set(lengths[:9]) == {64} and len(set(lengths[27:])) > 1
  for number in range(36, 46):
    for name, value in plain.take(number, None).items():
      np.testing.assert_array_equal(rows.take(number, None)[name], value)


def test_context_weighs_what_it_is_told_to(cfg):
  rows = [open_task_rows(changed(cfg, task_context_weight=weight), 256)
          for weight in (0.0, 0.25)]
  for number in range(20):
    plain, row = (one.take(number, None) for one in rows)
    answers = plain["weights"] > 0
    np.testing.assert_array_equal(row["weights"][answers], plain["weights"][answers])
    last = np.diff(row["segment_ids"], append=0) != 0      # of a sample: nothing follows it
    assert (row["weights"][last] == 0).all()
    assert (row["weights"][~answers & ~last] == 0.25).all()
    np.testing.assert_array_equal(row["targets"][:-1][~last[:-1]], row["tokens"][1:][~last[:-1]])


def test_rows_hold_training_samples(cfg):
  """Every piece is `sample(..., split="train")` of its number, and none is an evaluation's."""
  rows = open_task_rows(changed(cfg, tasks="vt,mqar"), 256)
  row = rows.take(7, None)
  pieces = row["segment_ids"].max()
  length = T // pieces
  for piece in range(pieces):
    tokens = row["tokens"][piece * length:(piece + 1) * length].tolist()
    drawn = {split: [token_tasks.sample(task, rows.ids, length, 7 * pieces + piece, split=split,
                                        seed=cfg.data.seed).tokens.tolist() for task in rows.tasks]
             for split in token_tasks.SPLITS}
    assert tokens in drawn["train"] and tokens not in drawn["eval"]


def test_hosts_and_workers_agree(cfg):
  whole = data.TrainStream(cfg).batch(5)
  parts = [data.TrainStream(cfg, host, 2).batch(5) for host in range(2)]
  for name, values in whole._asdict().items():
    np.testing.assert_array_equal(values, np.concatenate([getattr(p, name) for p in parts]))
  batches = data.TrainStream(cfg).iterator(5)
  np.testing.assert_array_equal(next(batches).tokens, whole.tokens)
  batches.close()


def test_samples_start_at_key_blocks(cfg):
  """Key blocks of 128 tokens: samples of 64 are padded to one, longer ones are whole blocks."""
  rows = open_task_rows(dataclasses.replace(cfg, model=ModelConfig(block_size=128)), 256)
  plain = open_task_rows(cfg, 256)
  strides = set()
  for number in range(30):
    row, same = rows.take(number, None), plain.take(number, None)
    starts = np.flatnonzero(np.diff(row["segment_ids"], prepend=0) > 0)
    assert (starts % 128 == 0).all()
    length, = np.unique(np.bincount(row["segment_ids"])[1:])
    strides.add((length, T // len(starts)))
    padding = row["segment_ids"] == 0
    assert not any(row[name][padding].any() for name in row)
    if length >= 128:
      for name, value in same.items():
        np.testing.assert_array_equal(row[name], value, err_msg=name)
  assert strides == {(64, 128), (128, 128), (256, 256), (512, 512)}


def test_positions_skip_ahead_within_a_sample(cfg):
  rows = open_task_rows(changed(cfg, task_positions=4 * T), 256)
  plain = open_task_rows(cfg, 256)
  furthest = 0
  for number in range(30):
    row, same = rows.take(number, None), plain.take(number, None)
    np.testing.assert_array_equal(row["tokens"], same["tokens"])
    steps = np.diff(row["positions"])
    inside = np.diff(row["segment_ids"]) == 0
    assert (steps[inside] >= 1).all() and row["positions"].max() < 4 * T
    skips = (steps[inside] > 1).sum()
    assert skips <= task_rows.JUMPS * row["segment_ids"].max()
    furthest = max(furthest, row["positions"].max())
  assert furthest > 2 * T


@pytest.mark.parametrize("changes, message", [
  (dict(tasks="vt,niah"), "unknown task 'niah'"),
  (dict(task_ids=63), "task_ids is 63; the tasks need at least 64"),
  (dict(seq_len=64, tasks="cwe"), "seq_len=64 is too short for every task"),
])
def test_bad_mixtures(cfg, changes, message):
  with pytest.raises(UserError, match=message):
    open_task_rows(changed(cfg, **changes), 256)
  with pytest.raises(UserError, match="task_share is 1.5; it must be between 0 and 1"):
    changed(cfg, task_share=1.5)
