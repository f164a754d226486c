import dataclasses
import hashlib
import json
import pathlib
import re

import numpy as np
import pytest

from hysparse_jax.config import DataConfig
from hysparse_jax.data import corpus
from hysparse_jax.data.corpus import Corpus
from hysparse_jax.errors import UserError
from tests.corpora import (
  DOCUMENTS,
  write_arrayrecord,
  write_folder,
  write_jsonl,
  write_parquet,
)


@pytest.fixture(scope="module")
def cfg(tmp_path_factory):
  folder = write_folder(tmp_path_factory.mktemp("corpus") / "texts")
  return DataConfig(source=str(folder), seq_len=64, batch_size=4, heldout_fraction=0.15)


def test_split_depends_on_content_alone(cfg, tmp_path):
  corpus = Corpus.open(cfg)
  shuffled = write_folder(tmp_path / "a" / "elsewhere", DOCUMENTS[::-1] + DOCUMENTS[:30])
  moved = Corpus.open(dataclasses.replace(cfg, source=str(shuffled), seed=5))
  assert set(moved.train) == set(corpus.train)
  assert tuple(dict.fromkeys(moved.heldout)) == corpus.heldout   # in an order of their own
  assert not set(corpus.train) & set(corpus.heldout)
  assert set(corpus.train) | set(corpus.heldout) == {text.encode() for text in DOCUMENTS}
  by_hand = {text.encode() for text in DOCUMENTS
             if int(hashlib.sha256(text.encode()).hexdigest()[:16], 16) / 2**64 < 0.15}
  assert set(corpus.heldout) == by_hand and 3 <= len(by_hand) <= 15
  wider = Corpus.open(dataclasses.replace(cfg, heldout_fraction=0.3))
  assert set(wider.heldout) > set(corpus.heldout)


def test_standard_library_is_the_default():
  corpus = Corpus.open(DataConfig())
  assert sum(map(len, corpus.train)) > 5e6
  assert any(document == pathlib.Path(dataclasses.__file__).read_bytes()
             for document in corpus.train + corpus.heldout)
  assert not set(corpus.train) & set(corpus.heldout)
  share = len(corpus.heldout) / (len(corpus.train) + len(corpus.heldout))
  assert 0.03 < share < 0.07
  numpy_source = pathlib.Path(np.__file__).read_bytes()
  assert numpy_source not in corpus.train + corpus.heldout   # installed, not standard


def test_every_format_gives_the_same_corpus(cfg, tmp_path):
  want = Corpus.open(cfg)
  encoded = [text.encode() for text in DOCUMENTS]
  rows = [json.dumps({"text": text}).encode() for text in DOCUMENTS]
  sources = [
    write_jsonl(tmp_path / "a.jsonl"),
    write_parquet(tmp_path / "a.parquet"),
    write_arrayrecord(tmp_path / "a.arrayrecord", encoded),
    write_arrayrecord(tmp_path / "b.array_record", rows),
  ]
  for source in sources:
    assert Corpus.open(dataclasses.replace(cfg, source=str(source))) == want, source.name
  plain = tmp_path / "records.bin"
  plain.write_bytes(sources[2].read_bytes())
  named = dataclasses.replace(cfg, source=str(plain), format="arrayrecord")
  assert Corpus.open(named) == want


def test_a_folder_mixes_formats_in_the_order_of_paths(cfg, tmp_path):
  folder = write_folder(tmp_path / "mixed" / "0", DOCUMENTS[:10]).parent
  write_jsonl(folder / "1.jsonl", DOCUMENTS[10:20], field="body")
  write_parquet(folder / "2.PARQUET", DOCUMENTS[20:40], field="body")
  write_arrayrecord(folder / "3.arrayrecord", [text.encode() for text in DOCUMENTS[40:]])
  for hidden in (".git", "__pycache__"):
    (folder / hidden).mkdir()
    (folder / hidden / "x.py").write_text("never read")
  (folder / ".DS_Store").write_bytes(b"\xff")
  (folder / "4.txt").write_text("")
  mixed = dataclasses.replace(cfg, source=str(folder), text_field="body")
  assert Corpus.open(mixed) == Corpus.open(cfg)
  texts = dataclasses.replace(mixed, format="text", heldout_fraction=0.5)
  corpus = Corpus.open(texts)
  assert {*corpus.train, *corpus.heldout} == {text.encode() for text in DOCUMENTS[:10]}


def test_a_text_file_alone_is_cut_at_line_ends(cfg, tmp_path):
  lines = "".join(f"line {i} ü\n" for i in range(40_000)).encode() + b"no newline at the end"
  (tmp_path / "big.txt").write_bytes(lines)
  corpus = Corpus.open(dataclasses.replace(cfg, source=str(tmp_path / "big.txt")))
  pieces = sorted(corpus.train + corpus.heldout, key=lines.index)
  assert b"".join(pieces) == lines
  assert all(piece.endswith(b"\n") and 16384 <= len(piece) < 16410 for piece in pieces[:-1])


# Bad input


def _flip(path, at):
  damaged = bytearray(path.read_bytes())
  damaged[at] ^= 4
  path.write_bytes(damaged)
  return path


def _file(folder, name, content):
  path = folder / name
  path.write_bytes(content if isinstance(content, bytes) else content.encode())
  return path


def _truncated(path):
  path.write_bytes(path.read_bytes()[:-1000])
  return path


GOOD = '{"text": "a"}\n'
LONG = ["some text " * 50 + str(i) for i in range(60)]
BAD_SOURCES = {
  "missing": (lambda d: d / "nowhere", r"nowhere' does not exist; give a file"),
  "empty folder": (lambda d: d, r"holds no text"),
  "empty file": (lambda d: _file(d, "a.txt", ""), r"holds no text"),
  "one document": (lambda d: _file(d, "a.txt", "words " * 99), r"too few documents.*1 for"),
  "unknown extension": (lambda d: _file(d, "a.xyz", "words"), r"a\.xyz.*extension '\.xyz'"),
  "unknown in folder": (lambda d: _file(d, "a.csv", "words").parent, r"a\.csv.*'\.csv'"),
  "not utf-8": (lambda d: _file(d, "a.txt", b"abc\xffdef"), r"a\.txt: not UTF-8 .* byte 3"),
  "not json": (lambda d: _file(d, "a.jsonl", GOOD + "\n{'text'\n"), r"a\.jsonl: line 3: not valid"),
  "json bytes": (lambda d: _file(d, "a.jsonl", b'{"text": "\xff"}'), r"line 1: not valid JSON"),
  "json deep": (lambda d: _file(d, "a.jsonl", "[" * 10**6), r"line 1: not valid JSON"),
  "json list": (lambda d: _file(d, "a.jsonl", GOOD + "[1]\n"), r"line 2: a JSON list"),
  "json field": (lambda d: _file(d, "a.jsonl", '{"body": "a"}'),
                 r"line 1: no field 'text' \(fields: body\)"),
  "json type": (lambda d: _file(d, "a.jsonl", GOOD + '{"text": 3}'),
                r"line 2: field 'text' is int"),
  "json null": (lambda d: _file(d, "a.jsonl", '{"text": null}'), r"line 1: .* is NoneType"),
  "surrogate": (lambda d: _file(d, "a.jsonl", r'{"text": "\ud800"}'), r"line 1: .*surrogate"),
  "parquet garbage": (lambda d: _file(d, "a.parquet", "PAR1?"), r"a\.parquet: damaged or not parq"),
  "parquet cut": (lambda d: _truncated(write_parquet(d / "a.parquet")), r"a\.parquet: damaged"),
  "parquet page": (lambda d: _flip(write_parquet(d / "a.parquet", LONG), 5000),
                   r"a\.parquet: damaged.*CRC"),
  "parquet column": (lambda d: write_parquet(d / "a.parquet", field="body"),
                     r"no column 'text' \(columns: id, body\)"),
  "parquet null": (lambda d: write_parquet(d / "a.parquet", ["a", None]),
                   r"row 2: field 'text' is NoneType"),
  "parquet empty": (lambda d: write_parquet(d / "a.parquet", []), r"holds no text"),
  "arrayrecord garbage": (lambda d: _file(d, "a.arrayrecord", "x" * 10**5),
                          r"a\.arrayrecord: damaged or not ArrayRecord"),
  "arrayrecord short": (lambda d: _file(d, "a.arrayrecord", "x"), r"damaged or not ArrayRecord"),
  "arrayrecord cut": (lambda d: _truncated(write_arrayrecord(d / "a.arrayrecord", [b"abc"])),
                      r"a\.arrayrecord: damaged"),
  "arrayrecord bits": (lambda d: _flip(write_arrayrecord(d / "a.arrayrecord", [b"abc"] * 9), 104),
                       r"a\.arrayrecord: damaged.*hash mismatch"),
  "arrayrecord utf-8": (lambda d: write_arrayrecord(d / "a.arrayrecord", [b"abc", b"\xff"]),
                        r"record 1: not UTF-8"),
  "arrayrecord field": (lambda d: write_arrayrecord(d / "a.arrayrecord", [b'{"text":"a"}', b"{}"]),
                        r"record 1: no field 'text'"),
  "arrayrecord empty": (lambda d: write_arrayrecord(d / "a.arrayrecord", []), r"holds no text"),
}


@pytest.mark.parametrize("case", BAD_SOURCES)
def test_bad_source(case, tmp_path):
  make, message = BAD_SOURCES[case]
  with pytest.raises(UserError) as caught:
    Corpus.open(DataConfig(source=str(make(tmp_path))))
  assert re.search(message, str(caught.value)), str(caught.value)
  assert "\n" not in str(caught.value)


def test_unreadable_source(tmp_path, monkeypatch):
  def refuse(self):
    raise PermissionError(13, "Permission denied", str(self))
  path = _file(tmp_path, "a.txt", "words")
  monkeypatch.setattr(pathlib.Path, "read_bytes", refuse)
  with pytest.raises(UserError, match=r"Permission denied.*a\.txt"):
    Corpus.open(DataConfig(source=str(path)))


def test_python_packages_are_the_sources_beside_the_library(tmp_path, monkeypatch):
  for name, text in (("a/one.py", b"x = 1\n"), ("b/two.py", b"y = 2\n"), ("b/no.txt", b"z"),
                     ("b/latin.py", b"\xe9\xe9"), ("b/__pycache__/three.py", b"w")):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_bytes(text)
  monkeypatch.setattr(corpus.sysconfig, "get_path", lambda name: str(tmp_path / "a"))
  monkeypatch.setattr(corpus.site, "getsitepackages", lambda: [str(tmp_path / "b")])
  found = list(corpus._documents(DataConfig(source="python_packages")))
  assert found == [b"x = 1\n", b"y = 2\n"]
  with pytest.raises(UserError, match="does not fit data.source='python_packages'"):
    list(corpus._documents(DataConfig(source="python_packages", format="jsonl")))
