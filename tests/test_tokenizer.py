import dataclasses
import sys

import numpy as np
import pytest

from hysparse_jax.config import Config, DataConfig
from hysparse_jax.data import batches as data
from hysparse_jax.errors import UserError
from tests.corpora import DOCUMENTS, read_back, train_documents, write_folder, write_tokenizer


@pytest.fixture(scope="module")
def cfg(tmp_path_factory):
  folder = write_folder(tmp_path_factory.mktemp("corpus") / "texts")
  return DataConfig(source=str(folder), seq_len=64, batch_size=4, heldout_fraction=0.15)


@pytest.fixture(scope="module")
def tokenizer_json(tmp_path_factory):
  return write_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.json")


def test_byte_tokenizer():
  tokenizer = data.load_tokenizer(DataConfig())
  text = "naïve 🙂\r\n\x00"
  ids = tokenizer.encode(text)
  assert tokenizer.vocab_size == 256 and ids.dtype == np.int32
  assert ids.tolist() == list(text.encode()) == tokenizer.encode(text.encode()).tolist()
  assert tokenizer.decode(ids) == text
  assert tokenizer.decode(ids[:8]) == "naïve \ufffd"   # in the middle of the emoji
  assert tokenizer.decode([104, 105, 256, -1, 300]) == "hi\ufffd\ufffd\ufffd"
  assert tokenizer.decode([]) == ""
  assert tokenizer.byte_lengths.tolist() == [1] * 256


def test_hugging_face_tokenizer(cfg, tokenizer_json):
  cfg = dataclasses.replace(cfg, tokenizer=tokenizer_json, align_documents=False)
  tokenizer = data.load_tokenizer(cfg)
  text = "<001>éé naïve 🙂"
  ids = tokenizer.encode(text)
  assert ids.dtype == np.int32 and ids.max() < tokenizer.vocab_size <= 300
  assert len(ids) > 3 and tokenizer.decode(ids) == text   # neither cut nor given a <s>
  assert tokenizer.encode(text.encode()).tolist() == ids.tolist()
  assert tokenizer.decode(ids[:-1]).startswith("<001>éé naïve ")
  assert tokenizer.decode([5_000, -1]) == ""
  assert len(tokenizer.byte_lengths) == tokenizer.vocab_size
  for some in (*DOCUMENTS, text, "a<s>b"):
    assert tokenizer.byte_lengths[tokenizer.encode(some)].sum() == len(some.encode())
  stream, known = data.TrainStream(Config(data=cfg)), train_documents(cfg)
  assert stream.tokens_per_epoch < sum(map(len, known))
  in_order = np.arange(stream.tokens_per_epoch // cfg.seq_len)
  tokens = stream._rows.take(in_order).tokens.reshape(-1)
  visits = read_back(tokenizer.decode(tokens).rpartition("<")[0].encode(), known)
  assert len(set(visits)) == len(visits) > 0.5 * len(known)


def test_byte_lengths_of_a_vocabulary_with_byte_fallback(cfg, tmp_path):
  tokenizers = pytest.importorskip("tokenizers")
  vocabulary = ["<unk>", "\u2581", "a", "ü", "\u2581a", "<0xF0>", "<0x9F>", "<0x99>", "<0x82>"]
  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(
    {token: i for i, token in enumerate(vocabulary)}, [("\u2581", "a")], byte_fallback=True,
    unk_token="<unk>"))
  tokenizer.normalizer = tokenizers.normalizers.Replace(" ", "\u2581")
  tokenizer.decoder = tokenizers.decoders.Sequence([
    tokenizers.decoders.Replace("\u2581", " "), tokenizers.decoders.ByteFallback(),
    tokenizers.decoders.Fuse()])
  tokenizer.save(str(tmp_path / "tokenizer.json"))
  loaded = data.load_tokenizer(dataclasses.replace(cfg, tokenizer=str(tmp_path / "tokenizer.json")))
  assert loaded.byte_lengths.tolist() == [5, 1, 1, 2, 2, 1, 1, 1, 1]
  ids = loaded.encode("a aü 🙂")
  assert loaded.decode(ids) == "a aü 🙂"
  assert loaded.byte_lengths[ids].sum() == len("a aü 🙂".encode())
  assert loaded.decode(ids[:-1]).startswith("a aü ")


def test_missing_tokenizers_package(monkeypatch, cfg):
  monkeypatch.setitem(sys.modules, "tokenizers", None)
  with pytest.raises(UserError, match="pip install tokenizers"):
    data.load_tokenizer(dataclasses.replace(cfg, tokenizer="tokenizer.json"))


@pytest.mark.parametrize("content", ["{", "{}", '{"version": "1.0", "model": {"type": "no"}}'])
def test_damaged_tokenizer(cfg, tmp_path, content):
  pytest.importorskip("tokenizers")
  path = tmp_path / "tokenizer.json"
  path.write_text(content)
  with pytest.raises(UserError, match=r"tokenizer\.json: not a usable") as caught:
    data.load_tokenizer(dataclasses.replace(cfg, tokenizer=str(path)))
  assert "\n" not in str(caught.value)
