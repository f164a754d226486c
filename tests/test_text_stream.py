"""Streamed text is decode(prompt + new) after decode(prompt), whatever the tokenizer."""

import re

import numpy as np
import pytest

from hysparse_jax.data.tokenizer import ByteTokenizer, HuggingFaceTokenizer
from hysparse_jax.inference import text_stream
from hysparse_jax.inference.text_stream import TextStream

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
WORDS = ["▁", "▁def", "▁class", "▁ Foo", "a", "b", ".", "▁.", ",", "'", "'m", "▁not", "▁do", "né",
         "END", "E", "ND", "▁do▁not", "##ing", "▁n't", "t"]


class Cleaning:
  """Joins words by spaces, then cleans the whole text up, as `transformers` does."""

  words = ["I", "do", "not", ".", ",", "'m", "n't", "'", "go", "we", "'re", "?", "am", "A"]
  vocab_size = len(words)

  def encode(self, text):
    return np.asarray([self.words.index(word) for word in text.split() if word in self.words])

  def decode(self, ids):
    text = " ".join(self.words[token] for token in ids)
    for old, new in ((" .", "."), (" ?", "?"), (" ,", ","), (" ' ", "'"), (" n't", "n't"),
                     (" 'm", "'m"), (" do not", " don't"), (" 're", "'re")):
      text = text.replace(old, new)
    return text


def hugging_face(path, model, decoder, normalizer=None, byte_level=False):
  tokenizers = pytest.importorskip("tokenizers")
  tokenizer = tokenizers.Tokenizer(model(tokenizers))
  tokenizer.decoder = decoder(tokenizers.decoders)
  if normalizer is not None:
    tokenizer.normalizer = normalizer(tokenizers.normalizers)
  if byte_level:
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.save(str(path))
  return HuggingFaceTokenizer(str(path))


def bpe(byte_fallback):
  vocabulary = {token: index for index, token in enumerate([*BYTES, *WORDS, "<unk>"])}
  return lambda t: t.models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>",
                                byte_fallback=byte_fallback)


def llama(d):
  return d.Sequence([d.Replace("▁", " "), d.ByteFallback(), d.Fuse(), d.Strip(" ", 1, 0)])


MADE = {
  "byte": lambda path: ByteTokenizer(),
  "cleaning": lambda path: Cleaning(),
  "llama": lambda path: hugging_face(
    path, bpe(True), llama, lambda n: n.Sequence([n.Prepend("▁"), n.Replace(" ", "▁")])),
  "bytes_never_encoded": lambda path: hugging_face(path, bpe(False), llama),
  "metaspace": lambda path: hugging_face(path, bpe(False), lambda d: d.Metaspace()),
  "byte_level": lambda path: hugging_face(
    path, lambda t: t.models.BPE(vocab={c: i for i, c in enumerate(
      sorted(t.pre_tokenizers.ByteLevel.alphabet()))}, merges=[]), lambda d: d.ByteLevel(),
    byte_level=True),
  "wordpiece": lambda path: hugging_face(
    path, lambda t: t.models.WordPiece({w: i for i, w in enumerate(WORDS)}, unk_token="a"),
    lambda d: d.WordPiece(cleanup=True)),
  "bpe_suffix": lambda path: hugging_face(
    path, lambda t: t.models.BPE(vocab={"a</w>": 0, "b": 1, "c</w>": 2, ".</w>": 3}, merges=[]),
    lambda d: d.BPEDecoder()),
}


def streamed(tokenizer, prompt, new, stop=None):
  stream, pieces = TextStream(tokenizer, stop, prompt), []
  for token in new:
    pieces.append(stream.add(int(token)))
    if stream.stopped:
      break
  return [*pieces, stream.finish()]


@pytest.mark.parametrize("kept", [8, 64])
@pytest.mark.parametrize("name", MADE)
def test_pieces_are_the_text_of_all_ids(name, kept, tmp_path, monkeypatch):
  """Random ids, so that no run of bytes is spared; few kept tokens, so that the window is cut."""
  monkeypatch.setattr(text_stream, "KEPT_TOKENS", kept)
  tokenizer = MADE[name](tmp_path / "tokenizer.json")
  rng, rounds = np.random.default_rng(0), 0
  for _ in range(20):
    prompt, new = (rng.integers(0, tokenizer.vocab_size, n) for n in (rng.integers(1, 60), 300))
    if tokenizer.vocab_size > 256:          # as many words as bytes
      words = rng.random(300) < 0.5
      new[words] = rng.integers(256, tokenizer.vocab_size, words.sum())
      prompt[-1] = 256 + WORDS.index("a")
    before = tokenizer.decode(prompt)
    if not tokenizer.decode([*prompt, *new]).startswith(before):
      continue                              # the prompt ends within a character
    want = tokenizer.decode([*prompt, *new])[len(before):]
    assert "".join(streamed(tokenizer, prompt, new)) == want
    stop = want[40:43]
    assert "".join(streamed(tokenizer, prompt, new, stop)) == want[:want.index(stop)]
    rounds += 1
  assert rounds > 8


def test_byte_runs_of_a_llama_like_tokenizer(tmp_path):
  tokenizer = MADE["llama"](tmp_path / "tokenizer.json")
  prompt = tokenizer.encode("a")
  hello = list("你好".encode())
  end = tokenizer.encode("a")[-1]
  assert "".join(streamed(tokenizer, prompt, hello)) == "你好"
  pieces = streamed(tokenizer, prompt, [*hello, end, 0x41])
  assert pieces == ["", "", "", "", "", "", "你好a", "", "A"]         # one more byte spoils a run
  assert "".join(streamed(tokenizer, prompt, [*hello, 0xFF])) == "\N{REPLACEMENT CHARACTER}" * 7
  newline = [end, 0x0A, end]
  assert "".join(streamed(tokenizer, prompt, newline, "\n")) == "a"


def test_the_first_space_of_a_continuation_is_kept(tmp_path):
  tokenizer = MADE["llama"](tmp_path / "tokenizer.json")
  word = 256 + WORDS.index("▁class")
  assert tokenizer.decode([word]) == "class"
  assert "".join(streamed(tokenizer, tokenizer.encode("def"), [word, word])) == " class class"


def test_a_clean_up_takes_back_nothing_that_was_shown():
  tokenizer = Cleaning()
  ids = tokenizer.encode("I am . we do not go ? I 'm A ' A")
  pieces = streamed(tokenizer, ids[:1], ids[1:])
  assert "".join(pieces) == " am. we don't go? I'm A'A"
  for end in range(1, len(pieces)):
    assert tokenizer.decode(ids).startswith("I" + "".join(pieces[:end]))


@pytest.mark.parametrize("name", ["byte", "llama", "metaspace", "byte_level", "wordpiece"])
@pytest.mark.parametrize("what", ["words", "run of bytes"])
def test_time_is_linear(name, what, tmp_path):
  """Counted in ids decoded: twice the tokens, at most some twice the work."""
  tokenizer = MADE[name](tmp_path / "tokenizer.json")
  decoded = 0

  class Counting:
    vocab_size, encode = tokenizer.vocab_size, tokenizer.encode

    def decode(self, ids):
      nonlocal decoded
      decoded += len(ids)
      return tokenizer.decode(ids)

  rng = np.random.default_rng(1)
  low = 256 if what == "words" and tokenizer.vocab_size > 256 else 0
  high = min(tokenizer.vocab_size, 256) if what != "words" else tokenizer.vocab_size
  work = []
  for count in (2000, 4000):
    ids, decoded = rng.integers(low, high, count), 0
    text = "".join(streamed(Counting(), ids[:1], ids[1:]))
    assert len(text) > count / 8
    work.append(decoded)
  assert work[1] < 2.6 * work[0] and work[1] < 4000 * 8 * text_stream.KEPT_TOKENS


def test_plain_tokenizers_show_text_at_once(tmp_path):
  """Nothing is held back that need not be."""
  for name in ("byte", "byte_level"):
    tokenizer = MADE[name](tmp_path / "tokenizer.json")
    pieces = streamed(tokenizer, tokenizer.encode("x"), tokenizer.encode("a€b."))
    assert [len(re.sub("€", "e", piece)) for piece in pieces] == [1, 0, 0, 1, 1, 1, 0]
