"""What is asked of the engine, and what it answers."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from hysparse_jax.errors import UserError
from hysparse_jax.inference.sampling import check_settings
from hysparse_jax.model.transformer import check_tokens


@dataclasses.dataclass(frozen=True)
class Request:
  """A prompt to continue, and how."""

  tokens: Sequence[int] | np.ndarray    # the prompt, [T], T at least 1
  max_new_tokens: int
  temperature: float = 1.0              # 0 takes the most likely token
  top_k: int = 0                        # draws from the k most likely tokens; 0: from all
  top_p: float = 1.0                    # and of these from the fewest whose probability reaches it
  seed: int = 0                         # at least 0, less than 2**63
  stop_tokens: tuple[int, ...] = ()     # the request is done when it draws one of them
  stop: str | tuple[str, ...] = ()      # its text ends where one of these would begin
  logprobs: int | None = None           # how many likely tokens to report beside each new one


class TokenLogprobs(NamedTuple):
  """Log-probabilities at one new token, by the model's distribution over all tokens."""

  logprob: float                        # the token's own
  top: list[tuple[int, float]]          # the most likely tokens and theirs, descending


class Stats(NamedTuple):
  """Counts of an engine, now and since it was made."""

  waiting: int          # requests without a slot
  running: int          # requests with one
  pages: int            # in all
  pages_used: int       # held by requests or by prefixes
  pages_cached: int     # held by prefixes alone: freed when they are needed
  prompt_tokens: int    # prefilled since the start
  reused_tokens: int    # not prefilled because a prefix was there
  new_tokens: int       # drawn
  preemptions: int      # requests that lost their slot and waited again


@dataclasses.dataclass(eq=False)
class Handle:
  """A request's answer so far. The engine fills it in; nobody else writes to it."""

  request: Request
  tokens: list[int] = dataclasses.field(default_factory=list)   # with the stop token, if one came
  logprobs: list[TokenLogprobs] = dataclasses.field(default_factory=list)  # one a token, if wanted
  text: str = ""     # what later tokens cannot change, without stop strings and tokens; "" if the
                     # engine has no tokenizer
  reused_tokens: int = 0               # of the prompt, whose KV was there when it was last admitted
  finish_reason: str | None = None     # "stop", "length", "cancelled" or "error"; None: not done
  error: Exception | None = None       # FloatingPointError: NaN logits; or the tokenizer's

  @property
  def done(self) -> bool:
    """Whether nothing more will come."""
    return self.finish_reason is not None

  def result(self) -> np.ndarray:
    """The new tokens, i32 [up to max_new_tokens].

    Raises:
      Exception: `error`, if the request ended with one.
    """
    if self.error is not None:
      raise self.error
    return np.asarray(self.tokens, np.int32)


def checked_prompt(request: Request, *, vocab_size: int, max_tokens: int, most_logprobs: int,
                   has_tokenizer: bool) -> np.ndarray:
  """The prompt as i32 [T], everything in the request possible.

  Args:
    request: as it came.
    vocab_size: of the model.
    max_tokens: room of the engine's cache for a sequence.
    most_logprobs: that the engine can report.
    has_tokenizer: whether it can look for stop strings.

  Raises:
    UserError: names the first thing that is impossible.
  """
  prompt = np.asarray(request.tokens)
  if prompt.ndim != 1:
    raise UserError(f"the prompt has shape {prompt.shape}; give one row of tokens")
  if prompt.size == 0:
    raise UserError("the prompt is empty; give at least one token")
  if not np.issubdtype(prompt.dtype, np.integer):
    raise UserError(f"the prompt's tokens are {prompt.dtype}; give integers")
  check_tokens(prompt, vocab_size)
  check_settings(request.max_new_tokens, request.temperature, request.top_k, request.top_p,
                 request.seed)
  total = prompt.size + request.max_new_tokens
  if total > max_tokens:
    raise UserError(
      f"the prompt of {prompt.size} tokens and max_new_tokens={request.max_new_tokens} make "
      f"{total}; the cache has room for {max_tokens}; shorten one of them")
  if request.stop and not has_tokenizer:
    raise UserError("stop strings need an engine with a tokenizer; use stop_tokens")
  if "" in ((request.stop,) if isinstance(request.stop, str) and request.stop else request.stop):
    raise UserError("a stop string is empty; leave it out")
  if request.logprobs is not None and not 0 <= request.logprobs <= most_logprobs:
    raise UserError(f"logprobs is {request.logprobs}; it must be from 0 to {most_logprobs}, the "
                    "engine's most_logprobs")
  return prompt.astype(np.int32)
