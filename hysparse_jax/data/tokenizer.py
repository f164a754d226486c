"""Text to token ids and back: raw bytes, or a Hugging Face `tokenizer.json`.

Neither adds special tokens. Documents are told apart by segment ids, not by BOS or EOS, so the
byte vocabulary is exactly 256 and every id the model sees is text.
"""

import hashlib
import json
import pathlib
import re
from collections.abc import Sequence

import numpy as np

from hysparse_jax.config import DataConfig
from hysparse_jax.errors import UserError

_BATCH = 256            # documents per call into `tokenizers`: bounds what it holds at once
_BYTE_TOKEN = re.compile("<0x[0-9A-F]{2}>")
_INVALID_BYTE = 0xFF    # occurs nowhere in UTF-8, so it decodes to U+FFFD


class ByteTokenizer:
  """The UTF-8 bytes of the text, ids 0 to 255, nothing added."""

  vocab_size = 256
  fingerprint = "byte"
  byte_lengths = np.ones(256, np.int64)

  def encode(self, text: str | bytes) -> np.ndarray:
    """Ids i32 [T]. Bytes are taken as they are, valid UTF-8 or not."""
    data = text.encode() if isinstance(text, str) else text
    return np.frombuffer(data, np.uint8).astype(np.int32)

  def decode(self, ids) -> str:
    """Text of `ids`; what is not UTF-8, or not a byte, becomes U+FFFD."""
    ids = np.asarray(ids, np.int64).reshape(-1)
    known = np.where((ids >= 0) & (ids < 256), ids, _INVALID_BYTE)
    return known.astype(np.uint8).tobytes().decode("utf-8", errors="replace")

  def encode_documents(self, documents: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """All documents as one array u8 [tokens], and where each starts, i64 [documents + 1]."""
    return np.frombuffer(b"".join(documents), np.uint8), _starts(map(len, documents))


class HuggingFaceTokenizer:
  """A `tokenizer.json`, run by the `tokenizers` package; truncation and padding switched off."""

  def __init__(self, path: str):
    try:
      import tokenizers
    except ImportError as error:
      raise UserError(f"data.tokenizer={path!r} needs the tokenizers package; "
                      "pip install tokenizers") from error
    file = pathlib.Path(path).expanduser()
    if not file.is_file():
      raise UserError(f"data.tokenizer is {path!r}, which is not a file; give 'byte' or the path "
                      "of a tokenizer.json")
    data = file.read_bytes()
    try:
      self._tokenizer = tokenizers.Tokenizer.from_buffer(data)
    except Exception as error:  # the package raises bare Exception
      raise UserError(f"{path}: not a usable tokenizer.json ({_one_line(error)}); save it again "
                      "with tokenizer.save(path)") from error
    self._tokenizer.no_truncation()
    self._tokenizer.no_padding()
    # Ids may have holes; the embedding must cover the largest.
    vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
    self.vocab_size = max(vocabulary.values(), default=-1) + 1
    if self.vocab_size == 0:
      raise UserError(f"{path}: the vocabulary is empty; train the tokenizer first")
    self.byte_lengths = _byte_lengths(self._tokenizer, vocabulary, self.vocab_size)
    self.fingerprint = fingerprint_of(data)

  def encode(self, text: str | bytes) -> np.ndarray:
    """Ids i32 [T], no special tokens added; bytes that are not UTF-8 become U+FFFD first."""
    if isinstance(text, bytes):
      text = text.decode("utf-8", errors="replace")
    return np.asarray(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

  def decode(self, ids) -> str:
    """Text of `ids`, special tokens included; ids outside the vocabulary are left out."""
    ids = np.asarray(ids, np.int64).reshape(-1)
    known = ids[(ids >= 0) & (ids < self.vocab_size)]
    return self._tokenizer.decode(known.tolist(), skip_special_tokens=False)

  def encode_documents(self, documents: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """All documents as one array u16 or i32 [tokens], and their starts, i64 [documents + 1]."""
    dtype = np.uint16 if self.vocab_size <= 1 << 16 else np.int32
    pieces = []
    for first in range(0, len(documents), _BATCH):
      texts = [document.decode() for document in documents[first:first + _BATCH]]
      pieces += [np.asarray(encoding.ids, dtype) for encoding in
                 self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
    flat = np.concatenate(pieces) if pieces else np.zeros(0, dtype)
    return flat, _starts(map(len, pieces))


def fingerprint_of(content: bytes) -> str:
  """The `fingerprint` of the tokenizer whose tokenizer.json holds `content`."""
  return "tokenizer.json sha256:" + hashlib.sha256(content).hexdigest()


def load_tokenizer(cfg: DataConfig) -> ByteTokenizer | HuggingFaceTokenizer:
  """The tokenizer of `cfg.tokenizer`: `"byte"` or the path of a `tokenizer.json`.

  Both have `vocab_size`, `encode(str | bytes) -> i32 [T]`, `decode(ids) -> str`, `byte_lengths`
  i64 [V], the UTF-8 bytes each id stands for, and a `fingerprint` that changes with the ids.

  Raises:
    UserError: no such file, not a tokenizer, or the `tokenizers` package is missing.
  """
  return ByteTokenizer() if cfg.tokenizer == "byte" else HuggingFaceTokenizer(cfg.tokenizer)


def _byte_lengths(tokenizer, vocabulary, size) -> np.ndarray:
  """i64 [V]. Exact for byte-level and byte-fallback vocabularies, which keep every byte.

  Byte-level spells each byte as one character. Elsewhere a token is its own spelling, with
  "\u2581" for a space and <0xAB> for a byte; what such a tokenizer normalises away is not counted.
  """
  decoder = json.loads(tokenizer.to_str())["decoder"] or {}
  steps = {step["type"]: step for step in decoder.get("decoders", [decoder]) if step}
  added = {id_: token.content for id_, token in tokenizer.get_added_tokens_decoder().items()}
  prefix = steps.get("WordPiece", {}).get("prefix", "")
  lengths = np.zeros(size, np.int64)
  for token, id_ in vocabulary.items():
    if id_ in added:
      lengths[id_] = len(added[id_].encode())
    elif "ByteLevel" in steps:
      lengths[id_] = len(token)
    elif "ByteFallback" in steps and _BYTE_TOKEN.fullmatch(token):
      lengths[id_] = 1
    else:
      lengths[id_] = len(token.removeprefix(prefix).replace("\u2581", " ").encode())
  return lengths


def _starts(lengths) -> np.ndarray:
  return np.cumsum([0, *lengths], dtype=np.int64)


def _one_line(error) -> str:
  return " ".join(str(error).split())
