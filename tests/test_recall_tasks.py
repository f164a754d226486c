"""Recall tasks: every answer is in the context and found by a small solver; lengths are exact."""

import numpy as np
import pytest

from hysparse_jax.data.tokenizer import ByteTokenizer
from hysparse_jax.errors import UserError
from hysparse_jax.tasks import text_tasks, token_tasks
from hysparse_jax.tasks.token_tasks import RULER, TASKS, Ids, min_length, sample

IDS = Ids(256, 768)
MARK = {name: IDS.marker(name) for name in token_tasks.MARKERS}


def _after(context, pattern, count):
  """What follows each occurrence of `pattern`: lists of `count` tokens, in order."""
  width = len(pattern)
  found = [at for at in range(len(context) - width - count + 1)
           if context[at:at + width] == list(pattern)]
  return [context[at + width:at + width + count] for at in found]


def _split(made):
  """Context and question as lists, answers as lists of tokens."""
  tokens = made.tokens.tolist()
  asks = [MARK[name] for name in ("query", "chain", "common", "frequent", "one_hop", "two_hop",
                                  "recall", "copy")]
  cut = max(at for at, token in enumerate(tokens) if token in asks)
  end = made.items[0][0]
  return tokens[:cut], tokens[cut:end], [tokens[a:b] for a, b in made.items]


# Solvers: they know a task's form, not how it is generated.

def _solve_needles(context, question, key_tokens, value_tokens):
  keys = question[1:-1]
  keys = [keys[n:n + key_tokens] for n in range(0, len(keys), key_tokens)]
  return [value for key in keys
          for value in _after(context, [MARK["needle"], *key, MARK["is"]], value_tokens)]


def _solve_chain(context, question):
  names, known = [], question[1:-1]
  while True:
    at = [n for n, token in enumerate(context) if token == MARK["assign"]
          and context[n + 2] == MARK["is"] and context[n + 3:n + 3 + len(known)] == known]
    if not at or [context[at[0] + 1]] in names:
      return names
    known = [context[at[0] + 1]]
    names.append(known)


def _solve_common(context):
  pairs = [tuple(context[n:n + 2]) for n in range(len(context) % 2, len(context), 2)]
  words = [pair for pair in pairs if all(token in IDS.keys for token in pair)]
  unique, first, count = np.unique(words, axis=0, return_index=True, return_counts=True)
  best = sorted(np.argsort(-count, kind="stable")[:10], key=lambda n: first[n])
  assert sorted(count)[-10] > sorted(count)[-11]
  return unique[best].tolist()


def _solve_frequent(context):
  unique, count = np.unique([t for t in context if t in IDS.keys], return_counts=True)
  best = np.argsort(-count, kind="stable")[:3]
  assert len(set(count[best])) == 3 and (np.delete(count, best) < count[best[-1]]).all()
  assert sum(t == MARK["word"] for t in context) > count.max()
  return [[int(word)] for word in unique[best]]


def _solve_facts(context, question, hops):
  subject, attribute = question[1:3], question[-2]
  if hops == 2:
    subject = _after(context, [MARK["document"], *subject], 2)[0]
  return _after(context, [*subject, attribute], 1)


def _solve_pairs(made):
  tokens = made.tokens.tolist()
  context = tokens[:tokens.index(MARK["recall"])]
  return [_after(context, [MARK["pair"], tokens[a - 1]], 1)[0] for a, _ in made.items]


def _solve_copy(context, count):
  at = context.index(MARK["passage"])
  assert context[at + 1 + count] == MARK["is"]
  return [[token] for token in context[at + 1:at + 1 + count]]


def _solve(task, made):
  context, question, answers = _split(made)
  if task.startswith("niah"):
    key_tokens = {"niah_multikey_2": 2, "niah_multikey_3": 4}.get(task, 1)
    found = _solve_needles(context, question, key_tokens, len(answers[0]))
  elif task == "vt":
    found = _solve_chain(context, question)
  elif task == "cwe":
    found = _solve_common(context)
  elif task == "fwe":
    found = _solve_frequent(context)
  elif task.startswith("qa"):
    found = _solve_facts(context, question, int(task[-1]))
  elif task == "mqar":
    found = _solve_pairs(made)
  else:
    found = _solve_copy(context, len(answers))
  return found, answers


@pytest.mark.parametrize("task", TASKS)
def test_a_solver_finds_the_answer_at_every_length(task):
  least = min_length(task, IDS)
  for length in (least, least + 1, least + 13, 512, 4096, 8192):
    for number in range(3):
      made = sample(task, IDS, length, number)
      assert made.tokens.shape == (length,) and made.tokens.dtype == np.int32
      assert made.tokens.min() >= 256 and made.tokens.max() < 1024
      found, answers = _solve(task, made)
      assert found == answers, (length, number)
      assert made.items[-1][1] == length            # the answer ends the sample


@pytest.mark.parametrize("task", TASKS)
def test_depth_is_where_the_evidence_stands(task):
  made = sample(task, IDS, 2048, 5)
  if task in ("cwe", "fwe"):
    assert np.isnan(made.depths).all()
    return
  context = _split(made)[0]
  spread = []
  for number in range(80):
    made = sample(task, IDS, 2048, number)
    context, _, answers = _split(made)
    for depth, answer in zip(made.depths, answers):
      at = round(depth * (len(context) - 1))
      assert _after(context[at:at + 16], answer, 0), (number, depth)
    spread += made.depths.tolist()
  assert min(spread) < 0.15 and max(spread) > 0.85 and 0.35 < np.mean(spread) < 0.65


def test_knobs_of_the_13_tasks():
  line = lambda made: sum(token == MARK["needle"] for token in made.tokens)
  made = {task: sample(task, IDS, 2048, 0) for task in TASKS}
  assert {task: line(made[task]) for task in RULER[:8]} == {
    "niah_single_1": 1, "niah_single_2": 1, "niah_single_3": 1, "niah_multikey_1": 4,
    "niah_multikey_2": (2048 - 6) // 6, "niah_multikey_3": (2048 - 10) // 10,
    "niah_multivalue": 4, "niah_multiquery": 4}
  assert {task: len(one.items) for task, one in made.items()} == {
    "niah_single_1": 1, "niah_single_2": 1, "niah_single_3": 1, "niah_multikey_1": 1,
    "niah_multikey_2": 1, "niah_multikey_3": 1, "niah_multivalue": 4, "niah_multiquery": 4,
    "vt": 5, "cwe": 10, "fwe": 3, "qa_1": 1, "qa_2": 1, "mqar": 32, "copy": 32}
  assert [made["niah_single_3"].items[0], made["niah_single_2"].items[0]] == [(2044, 2048),
                                                                              (2046, 2048)]


@pytest.mark.parametrize("task", TASKS)
def test_samples_are_a_function_of_everything_named(task):
  draw = lambda **changes: sample(task, IDS, **{"length": 256, "number": 3, "seed": 1,
                                                "split": "eval", **changes}).tokens.tolist()
  assert draw() == draw()
  assert len({tuple(draw(**changes)[:256]) for changes in (
    {}, {"number": 4}, {"seed": 2}, {"split": "train"})}) == 4


def test_training_and_evaluation_never_meet(monkeypatch):
  """Every generator's seed names its split, whatever the other numbers are."""
  seeds = {"train": set(), "eval": set()}
  real = np.random.default_rng
  for split, drawn in seeds.items():
    monkeypatch.setattr(np.random, "default_rng", lambda seed, drawn=drawn: drawn.add(seed)
                        or real(seed))
    for task in TASKS:
      for seed in range(3):
        for number in range(5):
          sample(task, IDS, 256, number, seed=seed, split=split)
  assert len(seeds["train"]) == len(seeds["eval"]) == 15 * 3 * 5
  assert not seeds["train"] & seeds["eval"]
  assert {seed[0] for seed in seeds["train"]} == {0} and {s[0] for s in seeds["eval"]} == {1}


def test_essays_are_cut_from_the_text_given():
  text = np.arange(200, dtype=np.uint8)
  made = sample("niah_single_2", IDS, 128, 0, text=text)
  context = made.tokens[made.tokens < 256]
  assert len(context) == 128 - min_length("niah_single_2", IDS) + token_tasks.MIN_HAYSTACK
  assert (np.diff(context) % 200 == 1).all()
  assert (sample("niah_single_1", IDS, 128, 0, text=text).tokens >= 256).all()


@pytest.mark.parametrize("call, message", [
  (lambda: sample("niah", IDS, 100, 0), "unknown task 'niah'; allowed: niah_single_1"),
  (lambda: sample("vt", IDS, 45, 0), "vt needs at least 46 tokens, got length 45"),
  (lambda: sample("vt", IDS, 0, 0), "got length 0"),
  (lambda: sample("vt", IDS, 100, 0, split="test"), "unknown split 'test'; allowed: train, eval"),
  (lambda: sample("cwe", Ids(0, 64), 2000, 0), "cwe at 2000 tokens needs 939 different words, 18 "
                                               "ids spell only 324"),
  (lambda: token_tasks.ids_of(40, 10), "at least 64 ids, this model has model.vocab_size=40"),
  (lambda: text_tasks.sample("qa_1", ByteTokenizer(), 999, 0), "its synthetic stand-in is "
                                                               "qa_1_syn"),
  (lambda: text_tasks.sample("qa_3", ByteTokenizer(), 999, 0), "unknown text task 'qa_3'"),
  (lambda: text_tasks.sample("vt", ByteTokenizer(), 99, 0), "vt needs at least"),
])
def test_bad_input_is_one_line(call, message):
  with pytest.raises(UserError) as caught:
    call()
  assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("vocab, text, expected", [
  (1024, 256, (256, 768)), (320, 256, (256, 64)), (319, 256, (0, 319)), (256, 256, (0, 256))])
def test_ids_stand_above_the_text_where_there_is_room(vocab, text, expected):
  ids = token_tasks.ids_of(vocab, text)
  assert ids == expected
  ranges = [range(ids.first, ids.first + 16), ids.noise, ids.keys, ids.values]
  assert [r.stop for r in ranges[:-1]] == [r.start for r in ranges[1:]]
  assert ranges[-1].stop == ids.first + ids.size and min(map(len, ranges)) >= 12


@pytest.mark.parametrize("size", [64, 100, 768])
def test_every_length_ends(size):
  """From nothing to the minimum it is an error; from there every length is made or is one."""
  ids = Ids(0, size)
  for task in TASKS:
    least = min_length(task, ids)
    with pytest.raises(UserError):
      sample(task, ids, least - 1, 0)
    for length in range(least, least + 120, 7):
      try:
        assert len(sample(task, ids, length, 0).tokens) == length
      except UserError as error:
        assert "different words" in str(error)       # noqa: PT017


# The text form.

@pytest.mark.parametrize("task", text_tasks.TASKS)
def test_text_prompts_fit_and_hold_their_answers(task):
  tokenizer, spec = ByteTokenizer(), text_tasks.TASKS[task]
  for length in (2048, 6000):
    made = text_tasks.sample(task, tokenizer, length, 2)
    used = len(tokenizer.encode(made.prompt)) + spec.new_tokens
    assert length - 300 < used <= length or task == "cwe" and length - 2000 < used <= length
    prompt = made.prompt.lower()
    assert all(reference.lower() in prompt for reference in made.references)
    assert made == text_tasks.sample(task, tokenizer, length, 2)
    assert made != text_tasks.sample(task, tokenizer, length, 3)
  expected = {"niah_multivalue_syn": 4, "niah_multiquery_syn": 4, "vt": 5, "cwe": 10, "fwe": 3}
  assert len(made.references) == expected.get(task, 1)
  assert set(text_tasks.TASKS) >= {"niah_single_1", "niah_multikey_2", "niah_multikey_3"}


def test_text_answers_are_what_the_context_says():
  tokenizer = ByteTokenizer()
  made = text_tasks.sample("niah_multikey_2", tokenizer, 4000, 0)
  key = made.prompt.split("The special magic number for ")[-1].split(" mentioned")[0]
  assert f"One of the special magic numbers for {key} is: {made.references[0]}." in made.prompt
  made = text_tasks.sample("vt", tokenizer, 4000, 0)
  value = made.prompt.split("assigned the value ")[1].split(" in")[0]
  known = [value]
  for line in made.prompt.split("\n"):
    if line.startswith("VAR ") and line.split(" = ")[1].removeprefix("VAR ") == known[-1]:
      known.append(line.split()[1])
  assert tuple(known[1:]) == made.references
  made = text_tasks.sample("qa_2_syn", tokenizer, 4000, 0)
  person = made.prompt.split("the company at which ")[1].split()[0]
  firm = made.prompt.split(f"{person} is a member of staff who works at ")[1].split(".")[0]
  city = made.prompt.split(f"{firm} is a company whose head office is in ")[1].split(".")[0]
  assert (city,) == made.references
  made = text_tasks.sample("fwe", tokenizer, 4000, 0)
  words = made.prompt.split("coded words. ")[1].split("\n")[0].split()
  ranked = sorted(set(words) - {"...."}, key=lambda word: -words.count(word))
  assert tuple(ranked[:3]) == made.references
  made = text_tasks.sample("cwe", tokenizer, 4000, 0)
  words = made.prompt.split("\n")[1].split()[1::2]
  ranked = sorted(set(words), key=lambda word: -words.count(word))
  assert set(ranked[:10]) == set(made.references)
