"""`experiments.bench_step` packs what training packs: same alignment, padding and segment ids."""

import numpy as np
import pytest

from experiments.bench import steps
from hysparse_jax import config

CFG = config.override(config.Config(), "data.seq_len=8192", "data.batch_size=3")


@pytest.mark.parametrize("documents", [None, 1, 3])
def test_documents_are_aligned_and_padding_carries_no_loss(documents):
  lengths = steps.document_lengths(CFG, documents)
  batch = steps.packed_batch(CFG, lengths, segmented=True)
  for row in range(3):
    ids, positions = batch.segment_ids[row], batch.positions[row]
    starts = np.flatnonzero((ids > 0) & (np.diff(ids, prepend=0) != 0))
    assert (starts % CFG.model.block_size == 0).all() and (positions[starts] == 0).all()
    assert [int((ids == number).sum()) for number in range(1, ids.max() + 1)] == lengths[row]
    assert (np.diff(positions)[ids[1:] == ids[:-1]] == 1)[ids[1:][ids[1:] == ids[:-1]] > 0].all()
  assert ((batch.weights > 0) == (batch.segment_ids > 0)).all()
  if documents is not None:
    assert [len(row) for row in lengths] == [documents] * 3


def test_lengths_are_log_normal():
  cfg = config.override(CFG, "data.batch_size=400", "data.seq_len=1048576")
  lengths = np.concatenate([row[:-1] for row in steps.document_lengths(cfg, None)])
  assert np.median(lengths) == pytest.approx(steps.MEDIAN_DOCUMENT, rel=0.05)
  assert np.log(lengths).std() == pytest.approx(steps.LOG_DEVIATION, rel=0.05)


def test_a_step_takes_segment_ids_unless_told_not_to():
  small = config.override(
    CFG, "model.num_layers=2", "model.sparse_per_full=1", "model.d_model=32", "model.num_heads=2",
    "model.num_kv_heads=1", "model.head_dim=16", "model.d_ff=32", "model.selected_tokens=64",
    "data.seq_len=256", "data.batch_size=8")
  packed = steps.bench(small, 2, 1, 1.0, 0)
  alone = steps.bench(small, 0, 1, 1.0, 0)
  assert packed["segmented"] and packed["documents"] == 16 and packed["padding"] == 0
  assert not alone["segmented"] and alone["documents"] == 8
  assert packed["loss"] != alone["loss"]
