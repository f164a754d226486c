"""Scores of the recall tasks: the rules by hand, the whole path with models that know or do not."""

import jax
import numpy as np
import pytest

from hysparse_jax.config import ModelConfig
from hysparse_jax.data.tokenizer import ByteTokenizer
from hysparse_jax.errors import UserError
from hysparse_jax.evals import recall as recall_eval
from hysparse_jax.evals.recall import recall, recall_text
from hysparse_jax.tasks import scores, token_tasks
from hysparse_jax.tasks.token_tasks import TASKS, Ids
from tests.weights import drawn

IDS = Ids(0, 256)
CFG = ModelConfig(num_layers=3, d_model=16, num_heads=2, num_kv_heads=1, head_dim=8, d_ff=16,
                  sparse_per_full=1, block_size=8, selected_tokens=16, window=8, dtype="float32")


@pytest.fixture(scope="module")
def model():
  return drawn(CFG)


def test_rules_by_hand():
  said = " 1234567 and Abcdefg.\nmore"
  assert scores.match_all(said, ["1234567", "abcdefg"]) == 1.0
  assert scores.match_all(said, ["1234567", "7654321", "more", "x9"]) == 0.5
  assert scores.match_part(said, ["zzz", "ABC"]) == 1.0 and scores.match_part(said, ["zz"]) == 0.0
  assert scores.named(said) == ["1234567", "abcdefg"]
  assert scores.named("a, b; and c.") == ["a", "b", "c"] and scores.named("") == []
  assert scores.set_f1(["a", "b"], ["a", "b"]) == 1.0
  assert scores.set_f1(["a", "b", "c", "d"], ["a"]) == pytest.approx(2 / 5)  # naming all costs
  assert scores.set_recall(["a", "b", "c", "d"], ["a"]) == 1.0               # and is free here
  assert scores.set_f1(["a", "a"], ["a", "b"]) == pytest.approx(2 / 3)
  assert scores.set_f1([], ["a"]) == 0.0 and scores.set_f1(["x"], ["a"]) == 0.0
  assert scores.set_recall(["a"], ["a", "b"]) == 0.5


def _next_tokens(model, tokens, segment_ids, places):
  """A stand-in for the model that knows every answer."""
  del model, segment_ids
  return np.take_along_axis(np.asarray(tokens), np.asarray(places) + 1, axis=1)


def test_knowing_everything_scores_one(monkeypatch):
  monkeypatch.setattr(recall_eval, "_most_likely", _next_tokens)
  result = recall(None, Ids(0, 768), TASKS, (256, 512), samples=6)
  for name in ("recall", "f1", "exact"):
    np.testing.assert_array_equal(getattr(result, name), 1.0)
  assert result.by_depth.shape == (15, 5, 2)
  depths = dict(zip(TASKS, result.by_depth))
  assert np.isnan(depths["cwe"]).all() and np.isnan(depths["fwe"]).all()
  np.testing.assert_array_equal(depths["mqar"], 1.0)


def test_partial_answers(monkeypatch):
  """Two of four values in each other's place: the set is right, the order is not."""
  def swapped(model, tokens, segment_ids, places):
    out = _next_tokens(model, tokens, segment_ids, places)
    return out[:, [2, 3, 0, 1, *range(4, out.shape[1])]]
  monkeypatch.setattr(recall_eval, "_most_likely", swapped)
  result = recall(None, IDS, ["niah_multivalue"], (128,), samples=1)
  assert (result.recall, result.f1, result.exact) == (1.0, 1.0, 0.0)
  assert np.nanmean(result.by_depth) < 1.0
  result = recall(None, IDS, ["copy"], (128,), samples=1)     # here places count: 4 of 32 wrong
  assert result.recall == pytest.approx(28 / 32, abs=2 / 32) and result.exact == 0.0

  def first_wrong(model, tokens, segment_ids, places):
    out = _next_tokens(model, tokens, segment_ids, places)
    out[:, 0] = 0
    return out
  monkeypatch.setattr(recall_eval, "_most_likely", first_wrong)
  result = recall(None, IDS, ["vt"], (128,), samples=1)
  assert (result.recall, result.exact) == (0.8, 0.0) and result.f1 == pytest.approx(0.8)
  assert recall(None, IDS, ["niah_single_1"], (128,), samples=1).recall == 0.0


def test_packed_rows_are_read_back_right(model):
  """Samples of mixed lengths share rows; each one's prediction is that of the sample alone."""
  tasks, lengths = ["vt", "mqar", "niah_single_2"], (128, 48)
  placed, num_rows = recall_eval._place(IDS, tasks, lengths, 2, 0, None, False)
  assert num_rows == 6 + 3                         # six of 128, then six of 48, two to a row
  predicted = recall_eval._predict(model, placed, num_rows, 128)
  alone = jax.jit(lambda model, tokens: model(tokens))
  for one, said in zip(placed, predicted):
    logits = np.asarray(alone(model, one.sample.tokens[None]))[0]
    for (start, stop), got in zip(one.sample.items, said):
      expected = logits[start - 1:stop - 1].argmax(-1)
      best = np.sort(logits[start - 1:stop - 1], -1)
      clear = best[:, -1] - best[:, -2] > 1e-4     # not decided by rounding
      np.testing.assert_array_equal(np.asarray(got)[clear], expected[clear])


def test_an_untrained_model_scores_by_chance(model):
  result = recall(model, IDS, list(TASKS), (192,), samples=4)
  assert result.recall.shape == (15, 1) and (result.recall < 0.3).all()
  assert (result.exact <= result.recall).all()


def test_text_form_is_scored_by_what_is_generated(monkeypatch, model):
  tokenizer = ByteTokenizer()
  def generate(model, prompt, count, temperature):
    assert temperature == 0.0
    text = tokenizer.decode(prompt[0])
    key = text.split("magic number for ")[-1].split(" mentioned")[0]
    value = text.split(f"for {key} is: ")[1].split(".")[0]
    return tokenizer.encode(f" {value}, 5.")[None]
  monkeypatch.setattr(recall_eval, "generate", generate)
  result = recall_text(model, tokenizer, ["niah_single_1", "niah_multikey_2"], (1500, 2500), 2)
  np.testing.assert_array_equal(result.recall, 1.0)
  np.testing.assert_array_equal(result.exact, 1.0)
  np.testing.assert_allclose(result.f1, 2 / 3)     # one answer too many
  assert result.by_depth is None and result.form == "text"


def test_what_cannot_fit_is_said_or_left_out(model):
  with pytest.raises(UserError, match="cwe needs at least 158 tokens, got length 100"):
    recall(model, IDS, ["vt", "cwe"], (100,))
  result = recall(model, IDS, ["vt", "cwe"], (100,), samples=1, skip_unfit=True)
  assert np.isnan(result.recall[1, 0]) and not np.isnan(result.recall[0, 0])
  for arguments, message in [
      ((["vt"], ()), "at least one task and one length"), (([], (64,)), "at least one task"),
      ((["vt"], (64,), 0), "samples is 0"), ((["vt"], (0,)), "length 0 is no length"),
      ((["fish"], (64,)), "unknown task 'fish'")]:
    with pytest.raises(UserError, match=message):
      recall(model, IDS, *arguments)
  with pytest.raises(UserError, match="none of the tasks cwe fits into 64 tokens"):
    recall(model, IDS, ["cwe"], (64,), skip_unfit=True)


def test_ordered_tasks_are_tasks():
  assert set(token_tasks.ORDERED) < set(TASKS) and len(token_tasks.RULER) == 13
