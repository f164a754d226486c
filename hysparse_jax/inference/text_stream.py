"""Token ids in, text out, as soon as later tokens cannot change it."""

import os

KEPT_TOKENS = 64     # decoded again with every new token, at most twice as many
KEPT_TEXT = 16       # characters before a cut that decoding must reproduce
CLEANED = "So it is . I do not , we 're ? ' a ' !"   # what clean-up decoders write differently
CLEANED_TEXT = 16    # characters that a clean-up may still change, its longest rule being 7
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
RARE = "\U0010fffd"  # in no vocabulary: four bytes, where the tokenizer has bytes


class TextStream:
  """Tokens in, text out, never a piece that a later token could change.

  All pieces together are `decode(prompt + new)` after `decode(prompt)`, whatever the tokenizer:
  decoders that strip the first space need the prompt, and those that decode a run of byte tokens
  as a whole need the run. Only the last tokens are decoded again with every new one. Held back are

  - replacement characters at the end, which may be the first bytes of a character;
  - a run of byte tokens, if one more byte can turn all of it into replacement characters;
  - the last characters, if the decoder cleans up spaces;
  - an end of the text that may be the beginning of the stop string.

  Args:
    tokenizer: has `encode(str) -> ids` and `decode(ids) -> str`.
    stop: ends the text where it would begin; of several the one that is complete first; None:
      nothing does.
    prompt: ids that the new ones follow.
  """

  def __init__(self, tokenizer, stop: str | tuple[str, ...] | None = None, prompt=()):
    self._decode = tokenizer.decode
    self._stops = (stop,) if isinstance(stop, str) else stop or ()
    self._learn(tokenizer)
    self._ids = [int(token) for token in prompt]   # the window: what still matters
    text = self._decode(self._ids)
    self._given = len(text)   # characters of the window's text that are given out, or withheld
    self._withheld = ""       # certain, but perhaps the beginning of the stop string
    self._behind = 0          # new tokens since the window was decoded
    self._cut_at = 2 * KEPT_TOKENS
    self.stopped = False      # the stop string came; nothing follows
    self._cut(text)

  def _learn(self, tokenizer):
    """Finds out, by asking, what later tokens can change in this tokenizer's text."""
    rare = [int(token) for token in tokenizer.encode(RARE)]
    first = next((token for token in rare if self._decode([token]) == REPLACEMENT), None)
    bytes_ = rare[-4:]
    self._bytewise = self._decode(bytes_) == RARE and self._decode(
      [*bytes_, bytes_[0]]) == RARE + REPLACEMENT
    if not self._bytewise and first is None:       # byte tokens that `encode` does not use
      first = next((token for token in range(getattr(tokenizer, "vocab_size", 0))
                    if self._decode([token]) == REPLACEMENT), None)
    self._byte = None if self._bytewise else first
    self._hold = 0 if self._decode(tokenizer.encode(CLEANED)) == CLEANED else CLEANED_TEXT

  def add(self, token: int) -> str:
    """The text that is certain now and was not before; may be empty."""
    self._ids.append(token)
    self._behind += 1
    # A long run of bytes stays in the window. Decoded at every KEPT_TOKENS-th part of its growth
    # it costs time in proportion to its length.
    if self._behind <= len(self._ids) // (4 * KEPT_TOKENS):
      return ""
    self._behind = 0
    text = self._decode(self._ids)
    piece = self._up_to(text, max(self._settled(self._ids, text) - self._hold, 0))
    self._cut(text)
    return piece

  def finish(self) -> str:
    """The rest: no token follows."""
    text = self._decode(self._ids)
    return self._up_to(text, len(text), last=True)

  def _settled(self, ids, text) -> int:
    """How many characters of the text of `ids` no further byte can change."""
    end = len(text.rstrip(REPLACEMENT))
    if self._bytewise:
      return max(end, len(text) - 3)
    if self._byte is not None:
      end = min(end, len(os.path.commonprefix([text, self._decode([*ids, self._byte])])))
    return end

  def _cut(self, text):
    """Drops all but the last tokens of the window, if that changes nothing at its end."""
    if len(self._ids) < self._cut_at:
      return
    before, kept = self._ids[:-KEPT_TOKENS], self._ids[-KEPT_TOKENS:]
    before_text, kept_text = self._decode(before), self._decode(kept)
    tail = text[max(self._given - KEPT_TEXT, 0):]
    if (self._settled(before, before_text) == len(before_text) and len(tail) < len(kept_text)
        and kept_text.endswith(tail)):
      self._ids, self._given = kept, self._given - len(text) + len(kept_text)
      self._cut_at = 2 * KEPT_TOKENS
    else:
      self._cut_at = len(self._ids) * 17 // 16 + 1

  def _up_to(self, text, end, last=False):
    if self.stopped:
      return ""
    piece = self._withheld + text[self._given:end]
    self._given, self._withheld = max(self._given, end), ""
    starts = {stop: piece.find(stop) for stop in self._stops}
    found = [(start + len(stop), start) for stop, start in starts.items() if start >= 0]
    if found:
      self.stopped = True
      return piece[:min(found)[1]]
    if not last:
      cut = len(piece) - max((_overlap(piece, stop) for stop in self._stops), default=0)
      piece, self._withheld = piece[:cut], piece[cut:]
    return piece


def _overlap(text: str, stop: str) -> int:
  """The length of the longest end of `text` that `stop` begins with, not counting all of it."""
  return next((length for length in range(min(len(stop) - 1, len(text)), 0, -1)
               if text.endswith(stop[:length])), 0)
