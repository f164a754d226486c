"""Sixty small documents, in every format that `hysparse_jax.corpus` reads."""

import json

import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from hysparse_jax.data.corpus import Corpus

# Every document opens with its own number, so a stream of tokens can be read back into documents.
# Lengths run from shorter than a tenth of a row to several rows.
DOCUMENTS = [f"<{i:03d}>" + "é" * (i % 3) + chr(97 + i % 26) * (i * 37 % 150) for i in range(60)]


def write_folder(folder, documents=DOCUMENTS):
  folder.mkdir(parents=True)
  for i, text in enumerate(documents):
    (folder / f"{i:03d}.txt").write_bytes(text.encode())
  return folder


def write_jsonl(path, documents=DOCUMENTS, field="text"):
  path.write_text("".join(json.dumps({"id": i, field: text}) + "\n"
                          for i, text in enumerate(documents)))
  return path


def write_parquet(path, documents=DOCUMENTS, field="text"):
  pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
  parquet.write_table(pa.table({"id": range(len(documents)), field: documents}), path,
                      row_group_size=17, compression="none", use_dictionary=False,
                      write_page_checksum=True)
  return path


def write_arrayrecord(path, records):
  writer = ArrayRecordWriter(str(path), "group_size:1")
  for record in records:
    writer.write(record)
  writer.close()
  return path


def write_tokenizer(path):
  """A byte-level BPE that would add a token and cut at three, were it let."""
  tokenizers = pytest.importorskip("tokenizers")
  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = tokenizers.decoders.ByteLevel()
  tokenizer.train_from_iterator(DOCUMENTS, tokenizers.trainers.BpeTrainer(
    vocab_size=300, special_tokens=["<s>"], show_progress=False,
    initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
  tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
    single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))])
  tokenizer.enable_truncation(3)
  tokenizer.save(str(path))
  return str(path)


def train_documents(cfg):
  return {document: i for i, document in enumerate(Corpus.open(cfg).train)}


def read_back(stream_bytes, known):
  """The documents, in order, whose concatenation `stream_bytes` begins with."""
  by_head = {document[:5]: document for document in known}
  found, at = [], 0
  while at < len(stream_bytes):
    document = by_head[stream_bytes[at:at + 5]]
    assert stream_bytes[at:at + len(document)] == document[:len(stream_bytes) - at]
    found.append(document)
    at += len(document)
  return found
