"""RULER's 13 tasks as text, for models that read a tokenizer's text.

The wording of prompts, questions and answer prefixes is that of the benchmark (Hsieh et al., arXiv
2404.06654, github.com/NVIDIA/RULER), since scores change with it. Six tasks need no outside corpus
and have its name; their keys and words are made of syllables here, where RULER takes them from a
word list. The others stand in for corpora that are not shipped and say so in their names,
`..._syn`: essays are sentences of a small grammar, questions and answers are made-up facts.

A prompt fits the length together with the tokens to generate: the amount of filler is found by
bisection. Like `token_tasks`, a sample is a function of
(task, length, seed, number).
"""

import functools
import string
import uuid
from typing import NamedTuple

import numpy as np

from hysparse_jax.errors import UserError
from hysparse_jax.tasks.scores import match_all, match_part
from hysparse_jax.tasks.token_tasks import different_words

SENTENCES = ("The grass is green. The sky is blue. The sun is yellow. Here we go. "
             "There and back again.")
MARGIN = 8      # tokens kept free: units are counted apart, and a tokenizer may merge across them


class TextSample(NamedTuple):
  """One question as text."""

  prompt: str
  references: tuple[str, ...]


class TextTask(NamedTuple):
  """How a task is made and scored."""

  make: callable          # (_Maker, filler units) -> TextSample; more units, a longer prompt
  new_tokens: int         # to generate
  match: callable         # of scores


def sample(task: str, tokenizer, length: int, number: int, *, seed: int = 0) -> TextSample:
  """Sample `number` of a task: prompt and `new_tokens` together at most `length` tokens.

  Raises:
    UserError: no such task, or a length with no room for its smallest prompt.
  """
  build = functools.partial(_build, task, number, seed)
  count = lambda units: _count(task, tokenizer, build(units))
  smallest = min_length(task, tokenizer, number, seed=seed)
  if smallest > length:
    raise UserError(f"{task} needs at least {smallest} tokens with this tokenizer, got length "
                    f"{length}")
  # The largest number of units that fits, bit by bit: a unit is a token at least, so it is at most
  # `length`.
  units, bit = 0, 1
  for _ in range(length.bit_length()):
    if count(bit) > length:
      break
    units, bit = bit, bit * 2
  step = units // 2
  while step:
    units += step if count(units + step) <= length else 0
    step //= 2
  return build(units)


def min_length(task: str, tokenizer, number: int, *, seed: int = 0) -> int:
  """The shortest that sample `number` of a task can be, in tokens, the answer included."""
  check_task(task)
  return _count(task, tokenizer, _build(task, number, seed, 0))


def _build(task, number, seed, units) -> TextSample:
  return TASKS[task].make(
    _Maker(np.random.default_rng((list(TASKS).index(task), seed, number))), units)


def _count(task, tokenizer, sample) -> int:
  return len(tokenizer.encode(sample.prompt)) + TASKS[task].new_tokens + MARGIN


def check_task(task: str):
  """Raises a UserError that names the tasks there are, and the stand-in of a missing corpus."""
  if task in TASKS:
    return
  if f"{task}_syn" in TASKS:
    raise UserError(f"the text form of {task} needs a corpus that is not shipped; its synthetic "
                    f"stand-in is {task}_syn")
  raise UserError(f"unknown text task {task!r}; allowed: {', '.join(TASKS)}")


class _Maker:
  """What the tasks draw with: the same draws whatever the amount of filler."""

  def __init__(self, rng: np.random.Generator):
    self.rng = rng

  def spawn(self) -> np.random.Generator:
    """A stream of its own, so that longer filler does not change what is asked."""
    return np.random.default_rng(self.rng.integers(2**63))

  def words(self, rng, count: int, syllables: int) -> list[str]:
    """Different pronounceable words."""
    letters = [c + v for c in "bdfghjklmnprstvwz" for v in "aeiou"]
    return ["".join(letters[part] for part in word)
            for word in different_words(rng, len(letters), count, syllables)]

  def keys(self, rng, count: int, kind: str) -> list[str]:
    if kind == "uuids":
      return [str(uuid.UUID(bytes=rng.bytes(16), version=4)) for _ in range(count)]
    if kind == "numbers":
      return [str(number) for number in 10**6 + rng.choice(9 * 10**6, size=count, replace=False)]
    return ["-".join((word[:4], word[4:])) for word in self.words(rng, count, 5)]

  def essay(self, rng, sentences: int) -> list[str]:
    """Sentences of a small grammar over drawn words: prose in form only."""
    nouns, verbs, kinds = (self.words(rng, 60, size) for size in (2, 3, 3))
    pick = lambda words: words[int(rng.integers(len(words)))]
    return [f"The {pick(kinds)} {pick(nouns)} {pick(verbs)}s a {pick(nouns)} of the {pick(nouns)}."
            for _ in range(sentences)]


def _hide(rng, filler: list[str], lines: list[str]) -> list[str]:
  """The filler with the lines at random places between its units."""
  places = np.sort(rng.integers(0, len(filler) + 1, len(lines)))
  out, at = [], 0
  for place, line in zip(places, lines):
    out += [*filler[at:place], line]
    at = place
  return out + filler[at:]


def _niah(make: _Maker, units: int, *, haystack="essay", keys=1, values=1, asked=1,
          key_kind="words", value_kind="numbers"):
  rng, filler, places = make.spawn(), make.spawn(), make.spawn()
  names = make.keys(rng, keys, key_kind)
  said = make.keys(rng, keys * values, value_kind)
  line = lambda key, value: f"One of the special magic {value_kind} for {key} is: {value}."
  lines = [line(names[n // values], value) for n, value in enumerate(said)]
  if haystack == "repeated":
    hay, join = [SENTENCES] * units, "\n"
  elif haystack == "needles":
    hay = [line(*pair) for pair in zip(make.keys(filler, units, key_kind),
                                       make.keys(filler, units, value_kind))]
    join = "\n"
  else:
    hay, join = make.essay(filler, units), " "
  order = places.permutation(len(lines))
  context = join.join(_hide(places, hay, [lines[n] for n in order]))
  chosen = places.permutation(keys)[:asked]
  wanted = [said[n] for key in chosen for n in range(key * values, (key + 1) * values)]
  query = [names[key] for key in chosen]
  query = query[0] if asked == 1 else ", ".join(query[:-1]) + ", and " + query[-1]
  one = len(wanted) == 1
  kind = value_kind[:-1] if one else value_kind
  prompt = (f"{'A' if one else 'Some'} special magic {kind} {'is' if one else 'are'} hidden within "
            f"the following text. Make sure to memorize it. I will quiz you about the {kind} "
            f"afterwards.\n{context}\n"
            + (f"What is the special magic {kind} for {query}" if one else
               f"What are all the special magic {kind} for {query}")
            + " mentioned in the provided text? "
            + f"The special magic {kind} for {query} mentioned in the provided text "
            + ("is" if one else "are"))
  return TextSample(prompt, tuple(wanted))


def _variable_tracking(make: _Maker, units: int):
  rng, places = make.spawn(), make.spawn()
  names = ["".join(string.ascii_uppercase[letter] for letter in name)
           for name in different_words(rng, 26, 5, 5)]
  value = int(rng.integers(10_000, 100_000))
  lines = [f"VAR {names[0]} = {value}"]
  lines += [f"VAR {new} = VAR {old}" for old, new in zip(names, names[1:])]
  context = "\n".join(_hide(places, [SENTENCES] * units, lines))
  # "assgined" is the benchmark's own spelling.
  prompt = ("Memorize and track the chain(s) of variable assignment hidden in the following text."
            f"\n\n{context}\nQuestion: Find all variables that are assigned the value {value} in "
            "the text above. Answer: According to the chain(s) of variable assignment in the text "
            f"above, 5 variables are assgined the value {value}, they are: ")
  return TextSample(prompt, tuple(names))


def _common_words(make: _Maker, units: int):
  """Ten words 30 times among others 3 times; below 500 others 6 times among ones."""
  rng, order = make.spawn(), make.spawn()
  often, seldom = (30, 3) if units >= 500 else (6, 1)
  words = make.words(rng, 10 + units, 3)
  listed = order.permutation(np.repeat(np.arange(10 + units), np.repeat([often, seldom],
                                                                          [10, units])))
  context = " ".join(f"{place}. {words[n]}" for place, n in enumerate(listed, 1))
  prompt = ("Below is a numbered list of words. In these words, some appear more often than "
            f"others. Memorize the ones that appear most often.\n{context}\nQuestion: What are the "
            "10 most common words in the above list? Answer: The top 10 words that appear most "
            "often in the list are:")
  return TextSample(prompt, tuple(words[:10]))


def _frequent_words(make: _Maker, units: int):
  """Coded words with Zipf frequencies (exponent 2); the first rank is the noise word '....'."""
  rng, order = make.spawn(), make.spawn()
  total = 60 + units
  counts = np.floor(total * 6 / np.pi**2 / np.arange(2, int(total**0.5) + 2)**2.0).astype(int)
  counts[:3] += (3, 2, 1)
  counts = counts[counts > 0]
  words = make.words(rng, 2000, 3)[:len(counts)]
  listed = np.repeat([*words, "...."], [*counts, total - counts.sum()])
  context = " ".join(order.permutation(listed))
  prompt = ("Read the following coded text and track the frequency of each coded word. Find the "
            f"three most frequently appeared coded words. {context}\nQuestion: Do not provide any "
            "explanation. Please ignore the dots '....'. What are the three most frequently "
            "appeared words in the above coded text? Answer: According to the coded text above, "
            "the three most frequently appeared words are:")
  return TextSample(prompt, tuple(words[:3]))


def _facts(make: _Maker, units: int, *, hops):
  """Made-up people, where they work and in which city that is; one asked for among many."""
  rng, filler, order = make.spawn(), make.spawn(), make.spawn()
  person, firm, city = (words[0].capitalize() for words in (
    make.words(rng, 1, 4), make.words(rng, 1, 3), make.words(rng, 1, 2)))
  other = lambda words: [word.capitalize() for word in words]
  people, firms = (other(make.words(filler, units + 1, size)) for size in (4, 3))
  cities = other(make.words(filler, min(units + 1, 7000), 2))
  firms = [name for name in firms if name != firm]
  people = [name for name in people if name != person]
  works = lambda who, where: f"{who} is a member of staff who works at {where}."
  lies = lambda what, where: f"{what} is a company whose head office is in {where}."
  documents = [works(person, firm), lies(firm, city)]
  documents += [works(people[n], firms[n]) if n % 2 else lies(firms[n], cities[n % len(cities)])
                for n in range(min(units, len(people), len(firms)))]
  documents = [documents[n] for n in order.permutation(len(documents))]
  context = "\n\n".join(f"Document {n}:\n{text}" for n, text in enumerate(documents, 1))
  ask = "Answer the question based on the given documents. Only give me the answer and do not " \
        "output any other words."
  question = (f"At which company does {person} work?" if hops == 1 else
              f"In which city is the head office of the company at which {person} works?")
  prompt = (f"{ask}\n\nThe following are given documents.\n\n{context}\n\n{ask}\n\n"
            f"Question: {question} Answer:")
  return TextSample(prompt, (firm if hops == 1 else city,))


def _needles(**knobs) -> TextTask:
  return TextTask(functools.partial(_niah, **knobs), 128, match_all)


TASKS = {
  "niah_single_1": _needles(haystack="repeated"),
  "niah_single_2_syn": _needles(),
  "niah_single_3_syn": _needles(value_kind="uuids"),
  "niah_multikey_1_syn": _needles(keys=4),
  "niah_multikey_2": _needles(haystack="needles"),
  "niah_multikey_3": _needles(haystack="needles", key_kind="uuids", value_kind="uuids"),
  "niah_multivalue_syn": _needles(values=4),
  "niah_multiquery_syn": _needles(keys=4, asked=4),
  "vt": TextTask(_variable_tracking, 30, match_all),
  "cwe": TextTask(_common_words, 120, match_all),
  "fwe": TextTask(_frequent_words, 50, match_all),
  "qa_1_syn": TextTask(functools.partial(_facts, hops=1), 32, match_part),
  "qa_2_syn": TextTask(functools.partial(_facts, hops=2), 32, match_part),
}
RULER = tuple(TASKS)
