"""Evaluation: held-out loss by position, needles, and the oracle's figures against brute force."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hysparse_jax.config import ModelConfig
from hysparse_jax.data.batches import Batch
from hysparse_jax.data.tokenizer import ByteTokenizer
from hysparse_jax.errors import UserError
from hysparse_jax.evals import needle as needle_eval
from hysparse_jax.evals import oracle as oracle_eval
from hysparse_jax.model.hybrid import by_layer
from hysparse_jax.training import heldout as heldout_eval
from pallas_kernels.reference import masked_attention
from tests.tolerances import assert_close
from tests.weights import drawn

# Layers: full sparse sparse, twice, and a last full one. Three of up to twelve blocks are picked.
CFG = ModelConfig(num_layers=7, d_model=16, num_heads=4, num_kv_heads=2, head_dim=8, d_ff=16,
                  sparse_per_full=2, block_size=4, selected_tokens=12, window=8, dtype="float32")
T = 48


@pytest.fixture(scope="module")
def model():
  model = drawn(CFG)
  # Larger queries, so that attention is peaked and selections differ.
  return jax.tree_util.tree_map_with_path(
    lambda path, leaf: leaf * 4 if "wq" in jax.tree_util.keystr(path) else leaf, model)


@pytest.fixture(scope="module")
def small():
  """Full, sparse, full; all of the 12 blocks are picked."""
  return drawn(dataclasses.replace(CFG, selected_tokens=T, num_layers=3, sparse_per_full=1))


@pytest.fixture(scope="module")
def batch():
  """Two rows: one document of 48 tokens; one of 6, one of 36, and padding."""
  tokens = np.random.default_rng(1).integers(0, 256, (2, T + 1))
  segments = np.ones((2, T), np.int32)
  segments[1] = np.repeat([1, 2, 0], [6, 36, 6])
  positions = np.arange(T) - np.array([[0] * T, [0] * 6 + [6] * 36 + list(range(42, 48))])
  weights = np.ones((2, T), np.float32)
  weights[1, 5] = weights[1, 41:] = 0
  return Batch(tokens[:, :-1].astype(np.int32), tokens[:, 1:].astype(np.int32), segments,
               positions.astype(np.int32), weights)


# Held-out loss.

class _Lengths:
  byte_lengths = np.random.default_rng(2).integers(1, 5, 256)


def test_heldout_equals_the_logits(model, batch, monkeypatch):
  monkeypatch.setattr(heldout_eval, "FIRST_BUCKET", 8)
  result = heldout_eval.heldout(model, [batch, batch], _Lengths, chunk=24)
  logits = np.asarray(model(batch.tokens, batch.segment_ids, batch.positions), np.float64)
  log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  nats = -np.take_along_axis(log_p, batch.targets[..., None], -1)[..., 0]
  counted = batch.weights > 0
  assert_close(result.loss, nats[counted].mean(), "heldout_f32")
  length = _Lengths.byte_lengths[batch.targets[counted]].sum()
  assert_close(result.bits_per_byte, nats[counted].sum() / np.log(2) / length, "heldout_f32")
  assert result.tokens == 2 * counted.sum()
  assert [bucket[:2] for bucket in result.by_position] == [(0, 8), (8, 16), (16, 32), (32, 64)]
  for start, end, loss, tokens in result.by_position:
    inside = counted & (batch.positions >= start) & (batch.positions < end)
    assert tokens == 2 * inside.sum()
    assert_close(loss, nats[inside].mean(), "heldout_f32")


def test_uniform_model_costs_eight_bits(model, batch):
  uniform = jax.tree_util.tree_map_with_path(
    lambda path, leaf: leaf * 0 if "head" in jax.tree_util.keystr(path) else leaf, model)
  result = heldout_eval.heldout(uniform, [batch], _Bytes())
  assert_close([result.loss, result.bits_per_byte], [np.log(256), 8.0], "heldout_f32")


def test_heldout_without_targets_is_an_error(model, batch):
  with pytest.raises(UserError, match="hold no target"):
    heldout_eval.heldout(model, [batch._replace(weights=0 * batch.weights)], _Lengths)
  with pytest.raises(UserError, match="hold no target"):
    heldout_eval.heldout(model, [], _Lengths)


class _Bytes(ByteTokenizer):
  byte_lengths = np.ones(256, np.int64)


# The oracle.

def _naive_coverage(q, k, picked, block_size, segments):
  """The definition, in float64 loops: [B, T, N]."""
  q, k = np.asarray(q, np.float64), np.asarray(k, np.float64)
  batch, tokens, heads, width = q.shape
  group = heads // k.shape[2]
  out = np.full((batch, tokens, heads), np.nan)
  for b, t, n in np.ndindex(out.shape):
    keys = [j for j in range(t + 1) if segments[b, t] == segments[b, j] != 0]
    if keys:
      logits = np.array([q[b, t, n] @ k[b, j, n // group] for j in keys]) / width**0.5
      weights = np.exp(logits - logits.max())
      chosen = [j // block_size in picked[b, n // group, t] for j in keys]
      out[b, t, n] = weights[chosen].sum() / weights.sum()
  return out


def test_unrolled_trace_is_the_model(model, batch):
  hidden, layers = oracle_eval.trace(model, batch.tokens, batch.segment_ids)
  expected, stats = model.hidden(batch.tokens, batch.segment_ids)
  assert_close(hidden, expected, "unrolled_f32")
  stats = by_layer(CFG, stats)
  assert [layer.layer for layer in layers] == list(range(7))
  assert [layer.distance for layer in layers] == [0, 1, 2, 0, 1, 2, 0]
  for layer, stat in zip(layers, stats):
    for name in ("gate_sparse", "gate_local"):
      assert (getattr(layer, name) is None) == (getattr(stat, name) is None)
      if getattr(stat, name) is not None:
        assert_close(getattr(layer, name), getattr(stat, name), "unrolled_f32")


def test_trace_and_figures_of_a_mixed_pattern(batch):
  cfg = dataclasses.replace(CFG, pattern="window full sparse window sparse full window")
  mixed = drawn(cfg)
  hidden, layers = oracle_eval.trace(mixed, batch.tokens, batch.segment_ids)
  expected, stats = mixed.hidden(batch.tokens, batch.segment_ids)
  assert_close(hidden, expected, "unrolled_f32")
  for layer, stat in zip(layers, by_layer(cfg, stats), strict=True):
    for name in ("gate_sparse", "gate_local"):
      found, wanted = getattr(layer, name), getattr(stat, name)
      assert (found is None) == (wanted is None)
      if wanted is not None:
        assert_close(found, wanted, "unrolled_f32")
  assert [layer.distance for layer in layers] == [None, 0, 1, 2, 3, 0, 1]
  assert [layer.picked is None for layer in layers] == [True, False, False, True, False, True, True]
  result = oracle_eval.oracle(mixed, [batch])
  assert sorted(result.coverage_by_distance) == [0, 1, 3] and set(result.picked) == {1}


def test_coverage_is_the_definition(model, batch):
  """Every layer's own query against the full layer's keys, layer inputs taken from the layers."""
  _, layers = oracle_eval.trace(model, batch.tokens, batch.segment_ids)
  segments = jnp.asarray(batch.segment_ids)
  context = oracle_eval.TokenContext(jnp.asarray(batch.positions), segments, segments > 0)
  x = model.embed(batch.tokens)
  block = oracle_eval.unstacked(model.stack.groups[0], 0)
  inputs = [(block.full, x)]
  x, shared, _, _ = oracle_eval._full(block.full, x, context, CFG.num_blocks)
  picked = shared.block_indices
  for index in range(2):
    layer = oracle_eval.unstacked(block.runs[0], index)
    inputs.append((layer, x))
    x, _, _ = oracle_eval._sparse(layer, x, shared, context)
  real = batch.segment_ids > 0
  for traced, (layer, x) in zip(layers, inputs):
    q = layer.project(x, context)[1]
    expected = _naive_coverage(q, shared.k, np.asarray(picked), 4, batch.segment_ids)
    assert_close(traced.coverage[real], expected[real], "coverage_f32")
    assert np.isnan(traced.coverage[~real]).all()
    np.testing.assert_array_equal(traced.picked, picked)
  assert layers[1].coverage[real].mean() < 0.98      # it leaves something out
  assert layers[6].coverage is None and layers[6].picked is None


@pytest.mark.parametrize("chunk_scores", [1, 5 * 2 * 4 * T])
def test_coverage_in_chunks(chunk_scores, monkeypatch):
  monkeypatch.setattr(masked_attention, "CHUNK_SCORES", chunk_scores)
  rng = np.random.default_rng(3)
  q, k = rng.normal(size=(2, T, 4, 8)), rng.normal(size=(2, T, 2, 8))
  picked = np.stack([np.sort(rng.permutation(12)[:3]) for _ in range(2 * 2 * T)])
  picked = picked.reshape(2, 2, T, 3).astype(np.int32)
  picked[:, :, ::5, 2] = -1
  found = oracle_eval.coverage(jnp.asarray(q), jnp.asarray(k), jnp.asarray(picked), 4)
  assert_close(found, _naive_coverage(q, k, picked, 4, np.ones((2, T))), "coverage_f32")


def _naive_unions(picked, measured, segments, width):
  sizes = []
  for b, k in np.ndindex(picked.shape[:2]):
    for t in range(picked.shape[2] - width + 1):
      run = slice(t, t + width)
      if measured[b, run].all() and len(set(segments[b, run])) == 1:
        sizes.append(len(set(picked[b, k, run].ravel().tolist()) - {-1}))
  return sum(sizes), len(sizes)


def test_union_sums_count_sets():
  rng = np.random.default_rng(4)
  picked = np.argsort(rng.random((2, 3, T, 12)), axis=-1)[..., :4].astype(np.int32)
  picked[rng.random(picked.shape) < 0.2] = -1
  measured = rng.random((2, T)) < 0.97
  segments = np.repeat([[1, 2], [1, 1]], T // 2, axis=1)
  sums = oracle_eval.union_sums(picked, measured, segments)
  assert list(sums) == [1, 2, 4, 8, 16, 32]
  for width, found in sums.items():
    assert found == _naive_unions(picked, measured, segments, width)
  assert sums[16][1] > 0


def test_oracle_figures(model, batch):
  result = oracle_eval.oracle(model, [batch])
  _, layers = oracle_eval.trace(model, batch.tokens, batch.segment_ids)
  index = np.arange(T)
  measured = np.zeros((2, T), bool)
  measured[0] = index >= 24                        # 7 to 12 blocks to choose 3 from
  measured[1] = (index >= 24) & (index < 42)       # from block 1 (shared) on: 6 and more
  assert result.choosing_tokens == measured.sum() == 24 + 18
  for layer, traced in zip(result.layers[:6], layers):
    assert_close(layer.coverage, traced.coverage[measured].mean(), "coverage_f32")
  assert result.layers[6].coverage is None and result.layers[6].overlap is None
  assert_close(result.coverage_by_distance[1],
               (result.layers[1].coverage + result.layers[4].coverage) / 2, "coverage_f32")
  blocks = np.concatenate([index[24:] // 4 + 1, index[24:42] // 4])     # block 0 is another's
  assert_close(result.chance, np.mean(3 / blocks), "coverage_f32")
  overlap = result.layers[3].overlap
  assert overlap.picked == 3.0                     # U(1) is what a token picks
  sets = [[set(layers[3].picked[b, k, t]) for t in range(T)] for b, k in np.ndindex(2, 2)]
  pairs = [(b, t) for b in range(2) for t in range(1, T) if measured[b, t - 1] and measured[b, t]]
  new = [len(sets[2 * b + k][t] - sets[2 * b + k][t - 1]) for b, t in pairs for k in range(2)]
  assert_close(overlap.new_per_token, np.mean(new), "coverage_f32")
  assert 3.0 < overlap.union[4] < overlap.union[8] < overlap.union[16] <= 12.0
  assert 32 not in overlap.union                   # no run of 32 in half of 48 tokens
  assert set(result.picked) == {0, 3} and result.picked[0].shape == (T, 3)


def test_picking_everything_covers_everything(small, batch):
  """P = 12 blocks of 12: the full layer's coverage is 1 to the last bit, and nobody chooses."""
  result = oracle_eval.oracle(small, [batch])
  assert [layer.coverage for layer in result.layers] == [1.0, 1.0, None]
  assert result.choosing_tokens == 0 and result.chance == 1.0
  assert all(layer.overlap is None for layer in result.layers)


def test_oracle_needs_an_oracle(batch):
  full = drawn(ModelConfig(attention="full", num_layers=1, d_model=8, num_heads=1, num_kv_heads=1,
                          head_dim=8, d_ff=8))
  with pytest.raises(UserError, match="attention='full'"):
    oracle_eval.oracle(full, [batch])


# Needles.

HAYSTACK = np.frombuffer(b"the quick brown fox jumps over the lazy dog; " * 3, np.uint8)


def _reads_back(sight):
  """A stand-in for `generate` that knows only the last `sight` tokens of the prompt."""
  def generate(model, prompt, count, temperature):
    assert temperature == 0.0
    out = np.zeros((len(prompt), count), np.int32)
    for row, tokens in enumerate(prompt):
      text = bytes(tokens.astype(np.uint8))
      question = text[text.rindex(b"\n"):]
      assert question.endswith(b" = '") and text.count(question) == 2
      found = text[-sight:-len(question)].find(question)
      if found >= 0:
        start = len(text) - min(sight, len(text)) + found + len(question)
        out[row] = list(text[start:start + count])
    return out
  return generate


def test_grid_tells_depth_from_length(monkeypatch):
  monkeypatch.setattr(needle_eval, "generate", _reads_back(100))
  monkeypatch.setattr(needle_eval, "_teacher_forced",
                      lambda model, tokens, answers: (answers == answers, 0.5 + 0.0 * answers))
  result = needle_eval.needle(None, ByteTokenizer(), HAYSTACK, (80, 400), (0.0, 0.5, 1.0),
                              samples=3, distractors=2)
  np.testing.assert_array_equal(result.accuracy, [[1, 0], [1, 0], [1, 1]])
  np.testing.assert_array_equal(result.token_accuracy, 1.0)
  np.testing.assert_array_equal(result.log_likelihood, -0.5)


def test_cell_is_what_it_says():
  rng = lambda: np.random.default_rng((0, 0))
  puzzle = needle_eval._puzzle(ByteTokenizer(), rng(), 1)
  again = needle_eval._puzzle(ByteTokenizer(), rng(), 1)
  np.testing.assert_array_equal(puzzle.needle, again.needle)
  other = needle_eval._puzzle(ByteTokenizer(), np.random.default_rng((1, 0)), 1)
  assert (puzzle.needle != other.needle).any()
  for length in (64, 333):
    starts = []
    for depth in (0.0, 0.25, 1.0):
      prompts, answers, mask = needle_eval._cell([puzzle], HAYSTACK, length, depth, 0)
      assert prompts.shape[1] + answers.shape[1] == length and mask.all()
      text = bytes(prompts[0].astype(np.uint8))
      assert text.endswith(bytes(puzzle.question.astype(np.uint8)))
      assert bytes(puzzle.distractors[0].astype(np.uint8)) in text
      starts.append(text.index(bytes(puzzle.needle.astype(np.uint8))))
    fill = length - needle_eval._size(puzzle)
    assert starts[0] == 0 or starts[0] == len(puzzle.distractors[0])
    assert abs(starts[1] - fill / 4) <= len(puzzle.distractors[0]) + 1
    assert starts[2] >= fill


def test_needle_scores_are_the_models(small):
  """The real path: generation through the cache agrees with one forward pass over the answer."""
  tokenizer = ByteTokenizer()
  result = needle_eval.needle(small, tokenizer, HAYSTACK, (60,), (0.5,), samples=2, seed=7)
  puzzles = [needle_eval._puzzle(tokenizer, np.random.default_rng((7, s)), 0) for s in range(2)]
  prompts, answers, _ = needle_eval._cell(puzzles, HAYSTACK, 60, 0.5, 7)
  logits = np.asarray(small(np.concatenate([prompts, answers], 1)), np.float64)[:, -6:-1]
  log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  given = np.take_along_axis(log_p, answers[..., None], -1)
  assert_close(result.log_likelihood, [[given.mean()]], "heldout_f32")
  right = logits.argmax(-1) == answers
  assert result.token_accuracy[0, 0] == right.mean()
  assert result.accuracy[0, 0] == right.all(1).mean()


def test_ragged_answers_are_scored_to_their_own_length(monkeypatch):
  """A tokenizer that merges: answers of 3 to 5 tokens, compared over their own tokens only."""
  class Merging:
    def encode(self, text):
      return np.frombuffer(text.replace("a", "").replace("b", "").encode(), np.uint8)

  lengths = set()

  def generate(model, prompt, count, temperature):
    out = np.full((len(prompt), count), 255)
    for row, puzzle in enumerate(puzzles):
      out[row, :len(puzzle.answer)] = puzzle.answer
      lengths.add(len(puzzle.answer))
    return out

  puzzles = [needle_eval._puzzle(Merging(), np.random.default_rng((0, s)), 0) for s in range(12)]
  monkeypatch.setattr(needle_eval, "generate", generate)
  monkeypatch.setattr(needle_eval, "_teacher_forced",
                      lambda model, tokens, answers: (answers == answers, 0.0 * answers))
  result = needle_eval.needle(None, Merging(), HAYSTACK, (70,), (0.3,), samples=12)
  assert len(lengths) > 1 and result.accuracy[0, 0] == 1.0


@pytest.mark.parametrize("changes, message", [
  # 16 of the line, 9 of the question, 5 of the answer, 1 of text
  (dict(lengths=(64, 30)), "length 30 is too short.*at least 31 tokens"),
  (dict(depths=(0.5, 1.5)), "depth 1.5 is outside"),
  (dict(depths=()), "at least one length and one depth"),
  (dict(samples=0), "samples is 0"),
  (dict(distractors=-1), "distractors is -1"),
  (dict(haystack=np.zeros(0, int)), "held-out text is empty"),
])
def test_needle_bad_input_is_one_line(changes, message):
  arguments = dict(haystack=HAYSTACK, lengths=(64,), depths=(0.5,)) | changes
  with pytest.raises(UserError, match=message) as error:
    needle_eval.needle(None, ByteTokenizer(), **arguments)
  assert "\n" not in str(error.value)
