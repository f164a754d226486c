"""Packed equals alone: a document in a packed row gives the logits that it gives by itself."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hysparse_jax.config import Config, DataConfig, ModelConfig
from hysparse_jax.data.batches import Corpus, TrainStream
from pallas_kernels import oracle_attention
from tests.corpora import write_folder
from tests.tolerances import assert_close
from tests.weights import drawn

BLOCK, T = 8, 256
# Lengths that end inside a key block, at its end and right behind it.
LENGTHS = (21, 64, 9, 43, 33, 8, 57, 70)


@pytest.fixture(scope="module")
def cfg(tmp_path_factory):
  rng = np.random.default_rng(0)
  texts = ["".join(map(chr, rng.integers(32, 127, length))) for length in (*LENGTHS, *LENGTHS)]
  folder = write_folder(tmp_path_factory.mktemp("packing") / "texts", texts)
  return Config(
    model=ModelConfig(num_layers=5, d_model=32, num_heads=4, num_kv_heads=2, head_dim=8, d_ff=48,
                      sparse_per_full=3, block_size=BLOCK, selected_tokens=2 * BLOCK, window=12,
                      qk_norm=True, dtype="float32"),
    data=DataConfig(source=str(folder), seq_len=T, batch_size=1, heldout_fraction=0.2))


def packed_row(cfg):
  """The first row of the stream, and (start, stop) of every document that is whole in it."""
  row = jax.tree.map(lambda x: x[0], TrainStream(cfg)._rows.take(np.arange(1)))
  spans = [(at[0], at[-1] + 1) for number in range(1, row.segment_ids.max() + 1)
           for at in [np.flatnonzero(row.segment_ids == number)]]
  known = set(Corpus.open(cfg.data).train)
  whole = [(start, stop) for start, stop in spans
           if row.tokens[start:stop].astype(np.uint8).tobytes() in known]
  assert len(whole) >= 4
  return row, whole


def largest_difference(cfg):
  """Between the logits of documents in a packed row and alone, over the largest logit."""
  model = drawn(cfg.model)
  row, spans = packed_row(cfg)
  # All of them in one call: a row each, the document first and padding behind it.
  alone = np.zeros((len(spans), T), np.int32)
  segments = np.zeros((len(spans), T), np.int32)
  for index, (start, stop) in enumerate(spans):
    alone[index, :stop - start], segments[index, :stop - start] = row.tokens[start:stop], 1
  forward = jax.jit(lambda model, *rows: model(*rows))
  together = forward(model, row.tokens[None], row.segment_ids[None], row.positions[None])[0]
  apart = forward(model, alone, segments)
  return max(float(jnp.abs(together[start:stop] - apart[index, :stop - start]).max())
             for index, (start, stop) in enumerate(spans)) / float(jnp.abs(apart).max())


@pytest.mark.parametrize("attention", ["hysparse", "full", "swa"])
def test_packed_equals_alone(cfg, attention):
  cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, attention=attention))
  assert_close(largest_difference(cfg), 0.0, "decode_f32")


def test_documents_that_start_anywhere_choose_other_blocks(cfg):
  """Why they are aligned: without it the same comparison fails, for HySparse alone."""
  cfg = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, align_documents=False))
  assert largest_difference(cfg) > 1e-2


def test_the_selection_is_that_of_the_document_alone(cfg):
  row, spans = packed_row(cfg)
  q, k, v = (jax.random.normal(jax.random.key(seed), (1, T, heads, 8))
             for seed, heads in ((0, 4), (1, 2), (2, 2)))
  oracle = jax.jit(lambda *qkv, segment_ids=None: oracle_attention(
    *qkv, block_size=BLOCK, num_blocks=2, segment_ids=segment_ids))
  out, together = oracle(q, k, v, segment_ids=jnp.asarray(row.segment_ids)[None])
  for start, stop in spans:
    expected, alone = oracle(*(x[:, start:stop] for x in (q, k, v)))
    mine = np.asarray(together[:, :, start:stop])
    np.testing.assert_array_equal(np.where(mine < 0, -1, mine - start // BLOCK), alone)
    assert_close(out[:, start:stop], expected, "attention_routes_f32")
  assert (np.asarray(together)[:, :, row.segment_ids == 0] == -1).all()
