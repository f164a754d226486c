"""Token ids in, text out, as soon as later tokens cannot change it."""


class TextStream:
  """Tokens in, text out, never a piece that a later token could change.

  Held back are up to three replacement characters at the end, which may be the first bytes of a
  character, and an end of the text that may be the beginning of the stop string.
  """

  def __init__(self, tokenizer, stop: str | None = None):
    self._tokenizer = tokenizer
    self._stop = stop
    self._ids = []
    self._shown = 0          # characters given out
    self.stopped = False     # the stop string came; nothing follows

  def add(self, token: int) -> str:
    """The text that is certain now and was not before; may be empty."""
    self._ids.append(token)
    text = self._tokenizer.decode(self._ids)
    return self._up_to(text, len(text) - _unfinished(text))

  def finish(self) -> str:
    """The rest: no token follows."""
    text = self._tokenizer.decode(self._ids)
    return self._up_to(text, len(text), last=True)

  def _up_to(self, text, end, last=False):
    if self.stopped:
      return ""
    if self._stop is not None:
      found = text.find(self._stop, 0, end)
      if found >= 0:
        self.stopped, end = True, found
      elif not last:
        end -= _overlap(text[:end], self._stop)
    start, self._shown = self._shown, max(self._shown, end)
    return text[start:end]


def _unfinished(text: str) -> int:
  """How many characters at the end may turn into others with the next byte."""
  return min(len(text) - len(text.rstrip("\N{REPLACEMENT CHARACTER}")), 3)


def _overlap(text: str, stop: str) -> int:
  """The length of the longest end of `text` that `stop` begins with, not counting all of it."""
  return next((length for length in range(min(len(stop) - 1, len(text)), 0, -1)
               if text.endswith(stop[:length])), 0)
