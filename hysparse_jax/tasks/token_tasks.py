"""Long-context tasks made of token ids: RULER's 13 tasks, associative recall and copying.

For models trained here. No tokenizer and no text: keys, values and noise are ranges of ids, and a
sample has exactly the length asked for, question and answer included. The tasks keep the structure
and the knobs of RULER (Hsieh et al., arXiv 2404.06654, table 2); `tasks/text_tasks.py` has the
text form.

    needle      NEEDLE key IS value                         question    QUERY key... ANSWER value...

A sample is a function of (split, task, length, seed, number): training and evaluation draw from the
same generator with seed sequences that differ in the split and so never meet. Nothing is drawn
until it fits: every loop below runs over a number of things that is known before.
"""

import functools
from typing import NamedTuple

import numpy as np

from hysparse_jax.errors import UserError

SPLITS = ("train", "eval")
MARKERS = ("needle", "is", "query", "answer", "assign", "chain", "word", "common", "frequent",
           "document", "one_hop", "two_hop", "passage", "copy", "pair", "recall")
MIN_IDS = 64             # the smallest vocabulary: 16 markers, 12 noise ids, 18 keys, 18 values
MIN_HAYSTACK = 16        # noise tokens that a needle is hidden in at least
NOISE_SENTENCES = 5      # that the plainest haystack repeats
NOISE_SENTENCE = 8       # tokens of each

NUMBER, UUID = 2, 4      # tokens of a value
COPY_TOKENS = 32
MAX_PAIRS = 32           # of mqar
COMMON_WORDS, RARE_LENGTH = 10, 4096
VARIABLES = 5            # of vt: one chain, four hops
FREQUENT = 3
ATTRIBUTES = 3           # facts in a document of qa


class Ids(NamedTuple):
  """Which ids stand for what: [first, first + size) is markers, noise, keys, values, in order."""

  first: int
  size: int

  @property
  def noise(self) -> range:
    return self._eighths(0, 2)

  @property
  def keys(self) -> range:
    return self._eighths(2, 5)

  @property
  def values(self) -> range:
    return self._eighths(5, 8)

  def marker(self, name: str) -> int:
    return self.first + MARKERS.index(name)

  def _eighths(self, start, stop):
    begin, rest = self.first + len(MARKERS), self.size - len(MARKERS)
    return range(begin + rest * start // 8, begin + rest * stop // 8)


def ids_of(vocab_size: int, text_size: int) -> Ids:
  """The task ids of a model: those above its tokenizer's if there are enough, else all of them.

  Args:
    vocab_size: of the model.
    text_size: of the tokenizer.

  Raises:
    UserError: fewer than MIN_IDS ids.
  """
  first = text_size if vocab_size - text_size >= MIN_IDS else 0
  if vocab_size - first < MIN_IDS:
    raise UserError(f"the recall tasks need a vocabulary of at least {MIN_IDS} ids, this model "
                    f"has model.vocab_size={vocab_size}")
  return Ids(first, vocab_size - first)


class Sample(NamedTuple):
  """One puzzle with its answer."""

  tokens: np.ndarray              # i32 [length]
  items: list[tuple[int, int]]    # [start, stop) of each reference answer in tokens, ascending
  depths: np.ndarray              # f64 [items], position of its evidence in [0, 1]; NaN: everywhere


def sample(task: str, ids: Ids, length: int, number: int, *, seed: int = 0, split: str = "eval",
           text: np.ndarray | None = None) -> Sample:
  """Sample `number` of a task, exactly `length` tokens long.

  Args:
    task: of `TASKS`.
    ids: of the model.
    length: tokens, at least `min_length(task, ids)`.
    number: at least 0; with seed, split, task and length it decides everything.
    seed: at least 0.
    split: "train" or "eval".
    text: i32 [.] real text that the "essay" haystacks are cut from; None: noise ids whose
      frequencies fall as 1 / rank.

  Raises:
    UserError: no such task or split, a length that is too short, or one that needs more keys than
      the ids can spell.
  """
  check_task(task)
  if split not in SPLITS:
    raise UserError(f"unknown split {split!r}; allowed: {', '.join(SPLITS)}")
  if text is not None and len(text) == 0:
    text = None
  least = min_length(task, ids)
  if length < least:
    raise UserError(f"{task} needs at least {least} tokens, got length {length}")
  rng = np.random.default_rng(
    (SPLITS.index(split), list(TASKS).index(task), length, seed, number))
  made = TASKS[task](_Maker(ids, rng, text, f"{task} at {length} tokens"), length)
  assert len(made.tokens) == length, (task, length, len(made.tokens))
  return made


def check_task(task: str):
  """Raises a UserError that names the tasks there are."""
  if task not in TASKS:
    raise UserError(f"unknown task {task!r}; allowed: {', '.join(TASKS)}")


def min_length(task: str, ids: Ids) -> int:
  """The shortest sample there is, in tokens."""
  check_task(task)
  return _least(task, ids)


@functools.cache
def _least(task, ids) -> int:
  return TASKS[task](_Maker(ids), None)


def different_words(rng, letters: int, count: int, length: int) -> np.ndarray:
  """`count` different words of `length` letters each, numbered from 0: i64 [count, length]."""
  numbers = rng.choice(letters ** length, size=count, replace=False)
  return np.stack(np.unravel_index(numbers, (letters,) * length), -1)


def inserted(haystack: np.ndarray, lines, cuts):
  """The haystack with line n before its token cuts[n] -> tokens i64 [.], start of each line."""
  pieces, starts, at, written = [], [0] * len(lines), 0, 0
  for index in np.argsort(cuts, kind="stable").tolist():
    pieces += [haystack[at:cuts[index]], np.asarray(lines[index])]
    starts[index] = written + cuts[index] - at
    written = starts[index] + len(lines[index])
    at = cuts[index]
  return np.concatenate([*pieces, haystack[at:]]).astype(np.int64), starts


class _Maker:
  """What the tasks draw with. Without a generator they return their smallest length instead."""

  def __init__(self, ids: Ids, rng: np.random.Generator | None = None, text=None, name=""):
    self.ids, self.rng, self.text, self.name = ids, rng, text, name

  def mark(self, name):
    return [self.ids.marker(name)]

  def words(self, alphabet: range, count: int, tokens: int) -> np.ndarray:
    """`count` different words of `tokens` ids each, i64 [count, tokens]."""
    space = len(alphabet) ** tokens
    if count > space:
      raise UserError(f"{self.name} needs {count} different words, {len(alphabet)} ids spell only "
                      f"{space}; use a shorter length or a larger model.vocab_size")
    return different_words(self.rng, len(alphabet), count, tokens) + alphabet.start

  def values(self, count: int, tokens: int) -> np.ndarray:
    return self.words(self.ids.values, count, tokens)

  def repeated(self, count: int) -> np.ndarray:
    """Five fixed sentences, over and over."""
    noise = self.ids.noise
    sentence = np.arange(NOISE_SENTENCES * NOISE_SENTENCE) * 7 % len(noise) + noise.start
    return np.resize(sentence, count)

  def essay(self, count: int) -> np.ndarray:
    """A piece of real text, or noise ids by Zipf's law."""
    if self.text is not None:
      start = self.rng.integers(len(self.text))
      return self.text[(start + np.arange(count)) % len(self.text)].astype(np.int64)
    noise = self.ids.noise
    share = np.cumsum(1 / np.arange(1, len(noise) + 1))
    return noise.start + np.searchsorted(share[:-1] / share[-1], self.rng.random(count))

  def hide(self, lines: list, haystack: np.ndarray, in_order: bool = False):
    """The haystack with the lines at random places -> tokens i64 [.], start of each line."""
    cuts = self.rng.integers(0, len(haystack) + 1, len(lines))
    return inserted(haystack, lines, np.sort(cuts) if in_order else cuts)

  def finish(self, context, question, answers, starts) -> Sample:
    """context + question + answers; `starts` are the places of the answers' evidence, or None."""
    tokens, items = [context, np.asarray(question)], []
    at = len(context) + len(question)
    for answer in answers:
      items.append((at, at + len(answer)))
      tokens.append(np.asarray(answer))
      at += len(answer)
    depths = (np.full(len(items), np.nan) if starts is None
              else np.asarray(starts, float) / max(1, len(context) - 1))
    return Sample(np.concatenate(tokens).astype(np.int32), items, depths)


def _niah(make: _Maker, length, *, haystack="essay", keys=1, key_tokens=1, values=1,
          value_tokens=NUMBER, asked=1):
  """Needles in a haystack: `asked` of `keys` keys with `values` values each."""
  line = 2 + key_tokens + value_tokens
  tail = 2 + asked * key_tokens + asked * values * value_tokens
  fixed = keys * values * line + tail
  if length is None:
    return fixed + (2 * line if haystack == "needles" else MIN_HAYSTACK)
  room = length - fixed
  extra = room // line if haystack == "needles" else 0
  every = make.words(make.ids.keys, keys + extra, key_tokens)
  said = make.values(keys * values, value_tokens)
  lines = [[*make.mark("needle"), *every[n // values], *make.mark("is"), *said[n]]
           for n in range(keys * values)]
  if extra:
    others = make.rng.integers(make.ids.values.start, make.ids.values.stop, (extra, value_tokens))
    hay = np.concatenate([np.full((extra, 1), make.ids.marker("needle")), every[keys:],
                          np.full((extra, 1), make.ids.marker("is")), others], axis=1)
    # Whole lines stay whole: the needles are put between them.
    order = make.rng.permutation(keys * values + extra)
    rows = np.concatenate([np.asarray(lines), hay])[order]
    context = np.concatenate([make.repeated(room % line), rows.ravel()])
    starts = room % line + line * np.argsort(order)[:keys * values]
  else:
    hay = make.repeated(room) if haystack == "repeated" else make.essay(room)
    context, starts = make.hide(lines, hay)
  chosen = make.rng.permutation(keys)[:asked]
  question = [*make.mark("query"), *every[chosen].ravel(), *make.mark("answer")]
  # A key's values are named in the order in which the context gives them.
  wanted = [n for key in chosen
            for n in sorted(range(key * values, (key + 1) * values), key=lambda n: starts[n])]
  return make.finish(context, question, [said[n] for n in wanted], [starts[n] for n in wanted])


def _variable_tracking(make: _Maker, length):
  """x1 is given a value, x2 is given x1, ... x5: which variables hold the value?"""
  first, hop = 3 + NUMBER, 4
  fixed = first + (VARIABLES - 1) * hop + 2 + NUMBER + VARIABLES
  if length is None:
    return fixed + MIN_HAYSTACK
  names = make.words(make.ids.keys, VARIABLES, 1)[:, 0]
  value = make.values(1, NUMBER)[0]
  lines = [[*make.mark("assign"), names[0], *make.mark("is"), *value]]
  lines += [[*make.mark("assign"), new, *make.mark("is"), old]
            for old, new in zip(names[:-1], names[1:])]
  context, starts = make.hide(lines, make.repeated(length - fixed), in_order=True)
  question = [*make.mark("chain"), *value, *make.mark("answer")]
  return make.finish(context, question, [[name] for name in names], starts)


def _common_words(make: _Maker, length):
  """Ten words are in the list more often than the others: name them, in order of appearance."""
  often, seldom = (30, 3) if length is not None and length >= RARE_LENGTH else (6, 1)
  word = 2
  tail = 2 + COMMON_WORDS * word
  fixed = COMMON_WORDS * often * word + tail
  if length is None:
    return fixed + MIN_HAYSTACK
  room = length - fixed
  others = room // (seldom * word)
  words = make.words(make.ids.keys, COMMON_WORDS + others, word)
  counts = np.repeat([often, seldom], [COMMON_WORDS, others])
  listed = make.rng.permutation(np.repeat(np.arange(len(words)), counts))
  context = np.concatenate([make.repeated(room % (seldom * word)), words[listed].ravel()])
  order = np.argsort([np.argmax(listed == n) for n in range(COMMON_WORDS)])
  return make.finish(context, [*make.mark("common"), *make.mark("answer")], words[order], None)


def _frequent_words(make: _Maker, length):
  """Words with Zipf frequencies (exponent 2), the first rank noise: name ranks two to four."""
  tail = 2 + FREQUENT
  if length is None:
    return tail + 64       # from here on the ranks named differ in count: 4, 2, 1 ... of 64
  room = length - tail
  ranks = np.arange(2, min(len(make.ids.keys), int(room**0.5)) + 2)
  counts = np.floor(room * 6 / np.pi**2 / ranks**2.0).astype(int)
  counts[:FREQUENT] += np.arange(FREQUENT, 0, -1)     # so that no two of them tie, however short
  counts = counts[:max(FREQUENT, int((counts > 0).sum()))]
  words = make.words(make.ids.keys, len(counts), 1)[:, 0]
  listed = np.concatenate([np.repeat(words, counts),
                           np.full(room - counts.sum(), make.ids.marker("word"))])
  context = make.rng.permutation(listed)
  return make.finish(context, [*make.mark("frequent"), *make.mark("answer")],
                     [[word] for word in words[:FREQUENT]], None)


def _documents(make: _Maker, length, *, hops):
  """Documents of three facts each, most of them irrelevant: `subject attribute object`."""
  fact = 4                                     # subject (2), attribute, object or 2 of a bridge
  document = 1 + ATTRIBUTES * fact
  tail = 2 + 2 + hops + 1
  fixed = (hops + 1) * document + tail
  if length is None:
    return fixed
  room = length - tail
  count = room // document
  names = make.words(make.ids.keys, count + 1, 2)
  # Attributes are value ids of their own, the lowest: objects never look like one.
  attributes = make.ids.values[:2 * ATTRIBUTES]
  objects = np.asarray(make.ids.values[2 * ATTRIBUTES:])
  said = make.rng.choice(objects, (count, ATTRIBUTES))
  has = np.argsort(make.rng.random((count, 2 * ATTRIBUTES)))[:, :ATTRIBUTES]
  facts = np.stack([np.broadcast_to(names[:count, :1], has.shape),
                    np.broadcast_to(names[:count, 1:], has.shape),
                    has + attributes[0], said], -1)             # [documents, facts, 4]
  person, place = make.rng.permutation(count)[:2]
  which = int(make.rng.integers(ATTRIBUTES))
  if hops == 2:      # the first fact of the person names the place, by both of its ids
    facts[person, 0] = [*names[person], *names[place]]
    question = [*make.mark("two_hop"), *names[person], make.ids.marker("is"),
                facts[place, which, 2], *make.mark("answer")]
    gold = place
  else:
    question = [*make.mark("one_hop"), *names[person], facts[person, which, 2],
                *make.mark("answer")]
    gold = person
  rows = np.concatenate([np.full((count, 1), make.ids.marker("document")),
                         facts.reshape(count, -1)], axis=1)
  start = length - len(question) - 1 - count * document
  context = np.concatenate([make.repeated(start), rows.ravel()])
  return make.finish(context, question, [[facts[gold, which, 3]]],
                     [start + gold * document + 1 + which * fact])


def _associative_recall(make: _Maker, length):
  """Pairs of a key and a value; then the keys again in another order, each to be completed."""
  ids = make.ids
  if length is None:
    return 4 * 3 + 1 + 4 * 2 + MIN_HAYSTACK
  pairs = min(MAX_PAIRS, len(ids.keys) // 2, (length - 1) // 10)
  keys = make.words(ids.keys, pairs, 1)[:, 0]
  values = make.rng.integers(ids.values.start, ids.values.stop, pairs)
  lines = [[*make.mark("pair"), key, value] for key, value in zip(keys, values)]
  context, starts = make.hide(lines, make.essay(length - 1 - 5 * pairs))
  order = make.rng.permutation(pairs)
  tokens = [*make.mark("recall"), *np.stack([keys[order], values[order]], 1).ravel()]
  first = len(context) + 2
  return Sample(np.concatenate([context, tokens]).astype(np.int32),
                [(first + 2 * n, first + 2 * n + 1) for n in range(pairs)],
                np.asarray(starts, float)[order] / max(1, len(context) - 1))


def _copy(make: _Maker, length):
  """A passage of random values somewhere in the context, to be said again."""
  if length is None:
    return 2 * 8 + 4 + MIN_HAYSTACK
  tokens = min(COPY_TOKENS, (length - 4 - MIN_HAYSTACK) // 2)
  passage = make.rng.integers(make.ids.values.start, make.ids.values.stop, tokens)
  line = [*make.mark("passage"), *passage, *make.mark("is")]
  context, (start,) = make.hide([line], make.essay(length - 4 - 2 * tokens))
  return make.finish(context, [*make.mark("copy"), *make.mark("passage")],
                     [[token] for token in passage], start + 1 + np.arange(tokens))


TASKS = {
  "niah_single_1": functools.partial(_niah, haystack="repeated"),
  "niah_single_2": _niah,
  "niah_single_3": functools.partial(_niah, value_tokens=UUID),
  "niah_multikey_1": functools.partial(_niah, keys=4),
  "niah_multikey_2": functools.partial(_niah, haystack="needles", key_tokens=2),
  "niah_multikey_3": functools.partial(_niah, haystack="needles", key_tokens=UUID,
                                       value_tokens=UUID),
  "niah_multivalue": functools.partial(_niah, values=4),
  "niah_multiquery": functools.partial(_niah, keys=4, asked=4),
  "vt": _variable_tracking,
  "cwe": _common_words,
  "fwe": _frequent_words,
  "qa_1": functools.partial(_documents, hops=1),
  "qa_2": functools.partial(_documents, hops=2),
  "mqar": _associative_recall,
  "copy": _copy,
}
RULER = tuple(TASKS)[:13]
ORDERED = ("mqar", "copy")     # an answer counts in its own place only
