"""What `/v1/completions` is asked and answers, in OpenAI's fields."""

import json
import secrets
from typing import Any, NamedTuple

import numpy as np

from hysparse_jax.errors import UserError
from hysparse_jax.inference.requests import Request, TokenLogprobs
from hysparse_jax.inference.text_stream import REPLACEMENT


class FieldError(UserError):
  """A field of the body is wrong."""

  def __init__(self, field: str, message: str):
    super().__init__(message)
    self.field = field


class UnknownModelError(FieldError):
  """No such model is served."""


class Call(NamedTuple):
  """A request's body, checked."""

  requests: list[Request]     # one a choice
  prompt_tokens: int          # each prompt once
  stream: bool
  include_usage: bool


def _integer(value):
  return isinstance(value, int) and not isinstance(value, bool)


def _number(value):
  try:
    return not isinstance(value, bool) and isinstance(value, int | float) and float(value) >= 0
  except OverflowError:
    return False


def _tokens(value):
  return isinstance(value, list) and all(map(_integer, value))


def _stop(value):
  return isinstance(value, str) or isinstance(value, list) and len(value) <= 4 and all(
    isinstance(one, str) for one in value)


def _prompt(value):
  return isinstance(value, str) or isinstance(value, list) and value and (
    _tokens(value) or all(isinstance(one, str) for one in value) or all(map(_tokens, value)))


# Name -> what it is if it is missing or null, what it must be, and whether it is.
FIELDS = {
  "model": (None, "a string", lambda value: isinstance(value, str)),
  "prompt": (None, "a string, a list of tokens, or a list of these, not empty", _prompt),
  "max_tokens": (16, "an integer", _integer),
  "temperature": (1.0, "a number, at least 0", _number),
  "top_p": (1.0, "a number above 0 and at most 1", _number),
  "top_k": (0, "an integer", _integer),
  "n": (1, "an integer, at least 1", lambda value: _integer(value) and value >= 1),
  "seed": (None, "an integer", _integer),
  "stop": ([], "a string or a list of up to 4", _stop),
  "logprobs": (None, "an integer", _integer),
  "stream": (False, "true or false", lambda value: isinstance(value, bool)),
  "stream_options": ({}, 'an object such as {"include_usage": true}', lambda value: (
    isinstance(value, dict) and set(value) <= {"include_usage"}
    and all(isinstance(one, bool) for one in value.values()))),
  "user": (None, "a string", lambda value: isinstance(value, str)),
}
# What is not supported, and the values with which it asks for nothing.
NEUTRAL = {"best_of": 1, "echo": False, "suffix": "", "presence_penalty": 0, "frequency_penalty": 0,
           "logit_bias": {}}


def parse(body: bytes, model: str, tokenizer, most_choices: int) -> Call:
  """The requests that a body asks for.

  Args:
    body: JSON.
    model: the one that is served.
    tokenizer: of the model.
    most_choices: that one body can ask for.

  Raises:
    UserError: the body is not JSON; FieldError, UnknownModelError: names the first wrong field.
  """
  fields = _fields(body)
  if fields["model"] != model:
    raise UnknownModelError("model", f"model is {fields['model']!r}; this server has {model!r}")
  texts = fields["prompt"]
  if isinstance(texts, str) or _tokens(texts):
    texts = [texts]
  if len(texts) * fields["n"] > most_choices:
    raise FieldError("n", f"{len(texts)} prompts with n={fields['n']} are more than the "
                          f"{most_choices} choices that this server takes; ask for fewer")
  prompts = [_encoded(text, tokenizer) for text in texts]
  stop = fields["stop"]
  seed = secrets.randbits(62) if fields["seed"] is None else fields["seed"]
  requests = [Request(
    prompt, fields["max_tokens"], float(fields["temperature"]), fields["top_k"],
    float(fields["top_p"]), seed + choice, stop=(stop,) if isinstance(stop, str) else tuple(stop),
    logprobs=fields["logprobs"]) for prompt in prompts for choice in range(fields["n"])]
  if not fields["stream"] and fields["stream_options"]:
    raise FieldError("stream_options", "stream_options needs stream=true")
  return Call(requests, sum(map(len, prompts)), fields["stream"],
              fields["stream_options"].get("include_usage", False))


def _fields(body) -> dict[str, Any]:
  try:
    given = json.loads(body, parse_constant=_no_constant)
  except (ValueError, RecursionError) as error:
    raise UserError(f"the body is not JSON: {error}") from error
  if not isinstance(given, dict):
    raise UserError(f"the body is a {type(given).__name__}; give a JSON object")
  for name, value in given.items():
    if name in NEUTRAL:
      if value is not None and value != NEUTRAL[name]:
        raise FieldError(name, f"{name} is not supported; leave it out")
    elif name not in FIELDS:
      raise FieldError(name, f"no field {name!r}; there are {', '.join(FIELDS)}")
  fields = {}
  for name, (default, kind, fits) in FIELDS.items():
    value = given.get(name)
    if value is None and name in ("model", "prompt"):
      raise FieldError(name, f"{name} is missing; give {kind}")
    if value is not None and not fits(value):
      raise FieldError(name, f"{name} must be {kind}")
    fields[name] = default if value is None else value
  return fields


def _no_constant(name):
  raise ValueError(f"{name} is no JSON number")


def _encoded(prompt, tokenizer) -> np.ndarray | list[int]:
  if not isinstance(prompt, str):
    return prompt
  try:
    prompt.encode()
  except UnicodeEncodeError as error:
    raise FieldError("prompt", "the prompt is not valid Unicode at character "
                               f"{error.start}; give UTF-8 text") from error
  return tokenizer.encode(prompt)


class Choice:
  """One choice: what has come so far, and the pieces that a stream has."""

  def __init__(self, index: int, tokenizer, wants_logprobs: bool):
    self.index, self.text, self.tokens, self.finish_reason = index, "", 0, None
    self._tokenizer, self._offset = tokenizer, 0
    self._logprobs: dict[str, list] | None = None if not wants_logprobs else {
      "tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}

  def add(self, progress) -> dict | None:
    """Takes a `Progress`; returns its piece as a choice, None if there is nothing to see."""
    self.text += progress.text
    self.tokens += len(progress.tokens)
    self.finish_reason = progress.finish_reason
    logprobs = self._measured(progress.tokens, progress.logprobs)
    if not (progress.text or progress.finish_reason or logprobs and logprobs["tokens"]):
      return None
    return _choice(self.index, progress.text, logprobs, progress.finish_reason)

  def whole(self) -> dict:
    """The choice with all that came."""
    return _choice(self.index, self.text, self._logprobs, self.finish_reason)

  def _measured(self, tokens: list[int], entries: list[TokenLogprobs]) -> dict | None:
    if self._logprobs is None:
      return None
    offsets = []
    for token in tokens:
      offsets.append(self._offset)
      self._offset += len(self._tokenizer.decode([token]))
    top = []
    for token, entry in zip(tokens, entries):
      named: dict[str, float] = {}
      for candidate, logprob in [*entry.top, (token, entry.logprob)] if entry.top else []:
        named.setdefault(self._name(candidate), logprob)
      top.append(named)
    piece = {"tokens": [self._name(token) for token in tokens],
             "token_logprobs": [entry.logprob for entry in entries], "top_logprobs": top,
             "text_offset": offsets}
    for name, values in piece.items():
      self._logprobs[name] += values
    return piece

  def _name(self, token: int) -> str:
    """The token's text; of one that is no text alone, such as a byte of a character, its id."""
    text = self._tokenizer.decode([token])
    return f"token_id:{token}" if not text or REPLACEMENT in text else text


def _choice(index, text, logprobs, finish_reason) -> dict:
  return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}


def usage(prompt_tokens: int, choices: list[Choice]) -> dict:
  """OpenAI's counts."""
  new = sum(choice.tokens for choice in choices)
  return {"prompt_tokens": prompt_tokens, "completion_tokens": new,
          "total_tokens": prompt_tokens + new}
