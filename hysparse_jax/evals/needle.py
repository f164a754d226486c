"""A needle in a haystack, small enough for small models: recall a value by its key.

A line such as `qkzv = '7h2m9'` is hidden in held-out text of the run's own corpus, at a depth
between 0 (the start) and 1 (right before the question); the text ends with `qkzv = '` and the model
has to go on with the value. Keys and values are random, so only the context determines them.
Distractors are further such lines with other keys and values, at random depths.

Built from tokens, not from text: needle, question and value are encoded apart, so the
value's tokens are the same in the needle and in the answer whatever the tokenizer merges.
"""

import string
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hysparse_jax.errors import UserError
from hysparse_jax.inference.sampling import generate
from hysparse_jax.model.transformer import Transformer
from hysparse_jax.tasks.token_tasks import different_words, inserted
from hysparse_jax.training.losses import token_losses

KEY_LETTERS = 4
VALUE_LETTERS = 5


class NeedleResult(NamedTuple):
  """A cell per depth and length, f64 [depths, lengths], means over the samples."""

  lengths: tuple[int, ...]      # tokens of haystack, question and answer together
  depths: tuple[float, ...]
  accuracy: np.ndarray          # the whole value came out, greedily generated
  token_accuracy: np.ndarray    # value tokens that were the most likely one, the ones before given
  log_likelihood: np.ndarray    # nats per value token, the ones before given; at most 0


class _Puzzle(NamedTuple):
  needle: np.ndarray            # i32 [.], the line with the value
  distractors: list             # of such lines with other keys
  question: np.ndarray          # i32 [.], the line up to the value
  answer: np.ndarray            # i32 [.], the value


def needle(model: Transformer, tokenizer, haystack, lengths: Sequence[int],
           depths: Sequence[float], samples: int = 4, seed: int = 0,
           distractors: int = 0) -> NeedleResult:
  """Hides, asks and scores over a grid of lengths and depths.

  The sample of a number has the same puzzle and text in every cell, so that cells differ in length
  and depth alone.

  Args:
    model: a Transformer.
    tokenizer: has `encode(text) -> i32 [.]`.
    haystack: i32 [.], held-out text to hide in; repeated where it is too short.
    lengths: tokens, answer included.
    depths: in [0, 1].
    samples: per cell.
    seed: of keys, values, text and the distractors' places.
    distractors: further lines of the same kind, with other keys.

  Raises:
    UserError: a length with no room for needle, distractors, question and answer (names the
      smallest that has), a depth outside [0, 1], no text.
  """
  lengths, depths = tuple(int(length) for length in lengths), tuple(map(float, depths))
  haystack = np.asarray(haystack, np.int32)
  if samples < 1:
    raise UserError(f"needle samples is {samples}; it must be at least 1")
  if not lengths or not depths:
    raise UserError("the needle task needs at least one length and one depth")
  if distractors < 0:
    raise UserError(f"needle distractors is {distractors}; it must be at least 0")
  outside = [depth for depth in depths if not 0.0 <= depth <= 1.0]
  if outside:
    raise UserError(f"needle depth {outside[0]} is outside 0 (the start) to 1 (the question)")
  if haystack.size == 0:
    raise UserError("the held-out text is empty; the needle has nothing to hide in")
  puzzles = [_puzzle(tokenizer, np.random.default_rng((seed, sample)), distractors)
             for sample in range(samples)]
  minimum = (max(_size(puzzle) - len(puzzle.answer) for puzzle in puzzles)
             + max(len(puzzle.answer) for puzzle in puzzles) + 1)
  if min(lengths) < minimum:
    raise UserError(f"needle length {min(lengths)} is too short: needle, question and answer need "
                    f"at least {minimum} tokens; raise --lengths")

  scores = np.zeros((3, len(depths), len(lengths)))
  for column, length in enumerate(lengths):
    for row, depth in enumerate(depths):
      prompts, answers, mask = _cell(puzzles, haystack, length, depth, seed)
      scores[:, row, column] = _score(model, prompts, answers, mask)
  return NeedleResult(lengths, depths, *scores)


def _puzzle(tokenizer, rng, distractors) -> _Puzzle:
  keys = _distinct_words(rng, string.ascii_lowercase, KEY_LETTERS, distractors + 1)
  values = _distinct_words(rng, string.ascii_lowercase + string.digits, VALUE_LETTERS,
                           distractors + 1)
  questions = [np.asarray(tokenizer.encode(f"\n{key} = '")) for key in keys]
  answers = [np.asarray(tokenizer.encode(value)) for value in values]
  close = np.asarray(tokenizer.encode("'\n"))
  lines = [np.concatenate([question, answer, close])
           for question, answer in zip(questions, answers)]
  return _Puzzle(lines[0], lines[1:], questions[0], answers[0])


def _distinct_words(rng, alphabet, letters, count):
  """`count` different random words of the alphabet."""
  if count > len(alphabet) ** letters:
    raise UserError(f"needle distractors is {count - 1}; there are only "
                    f"{len(alphabet) ** letters} keys")
  return ["".join(alphabet[letter] for letter in word[::-1])
          for word in different_words(rng, len(alphabet), count, letters)]


def _size(puzzle) -> int:
  lines = [puzzle.needle, *puzzle.distractors, puzzle.question, puzzle.answer]
  return sum(map(len, lines))


def _cell(puzzles, haystack, length, depth, seed):
  """Prompts i32 [samples, T]; answers i32 and their mask bool [samples, longest answer].

  All prompts are equally long: the text around takes up what the puzzles differ in.
  """
  longest = max(len(puzzle.answer) for puzzle in puzzles)
  prompts = []
  for sample, puzzle in enumerate(puzzles):
    rng = np.random.default_rng((seed, sample, 1))
    fill = length - longest - (_size(puzzle) - len(puzzle.answer))
    text = haystack[(rng.integers(haystack.size) + np.arange(fill)) % haystack.size]
    places = np.asarray([depth, *rng.random(len(puzzle.distractors))])
    context, _ = inserted(text, [puzzle.needle, *puzzle.distractors],
                          np.rint(places * len(text)).astype(int))
    prompts.append(np.concatenate([context, puzzle.question]))
  answers = np.zeros((len(puzzles), longest), np.int32)
  mask = np.zeros(answers.shape, bool)
  for row, puzzle in enumerate(puzzles):
    answers[row, :len(puzzle.answer)] = puzzle.answer
    mask[row, :len(puzzle.answer)] = True
  return np.stack(prompts).astype(np.int32), answers, mask


def _score(model, prompts, answers, mask):
  """(accuracy, token accuracy, log-likelihood per token) of one cell."""
  generated = generate(model, prompts, answers.shape[1], temperature=0.0)
  exact = ((generated == answers) | ~mask).all(axis=1)
  right, nats = _teacher_forced(model, np.concatenate([prompts, answers], axis=1), answers)
  counted = mask.sum()
  return (exact.mean(), (np.asarray(right) & mask).sum() / counted,
          -(np.asarray(nats, np.float64) * mask).sum() / counted)


@jax.jit
def _teacher_forced(model: Transformer, tokens, answers):
  """Tokens i32 [B, T] that end in answers i32 [B, A] -> bool and f32 nats [B, A]."""
  hidden, _ = model.hidden(tokens)
  count = answers.shape[1]
  before = hidden[:, -count - 1:-1]
  right = jnp.argmax(model.logits(before), axis=-1) == answers
  return right, token_losses(model, before, answers)[0]
