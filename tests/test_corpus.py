import dataclasses
import hashlib
import json
import os
import pathlib
import re

import numpy as np
import pytest

from hysparse_jax.config import DataConfig
from hysparse_jax.data import corpus
from hysparse_jax.data.corpus import Corpus, absolute
from hysparse_jax.data.files import LeftOut
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


# Own data


def open_folder(folder, **changes):
  return Corpus.open(DataConfig(source=str(folder), **changes))


def test_three_files_have_their_ends_held_out(tmp_path):
  texts = ["".join(f"{name} line {i} \u00fc\n" for i in range(500)) for name in "abc"]
  found = open_folder(write_folder(tmp_path / "texts", texts))
  assert found.ends and len(found.train) == len(found.heldout) == 3
  for text, start, end in zip(texts, found.train, found.heldout):
    assert (start + end).decode() == text
    assert start.endswith(b"\n") and 0.02 < len(end) / len(text.encode()) <= 0.05
  assert found == open_folder(write_folder(tmp_path / "again", texts))
  assert "3 documents, held out the ends of them, 4." in found.describe()
  assert open_folder(tmp_path / "texts", heldout_fraction=0.2).heldout != found.heldout


@pytest.mark.parametrize("text", [
  "word " * 200, "x" * 1000, "\u00fc\u4f60" * 300, "ab\n" + "x" * 500])
def test_an_end_is_cut_between_characters(text, tmp_path):
  found = open_folder(write_folder(tmp_path / "texts", [text]))
  (start,), (end,) = found.train, found.heldout
  assert (start.decode() + end.decode()) == text and len(end) >= 16


def test_documents_that_hashes_can_split_are_not_cut(cfg):
  assert not Corpus.open(cfg).ends


def test_one_long_line_becomes_documents(tmp_path):
  text = b"".join(b"anarchism originated as term %d " % i for i in range(15_000))   # 525 kB
  path = _file(tmp_path, "text8", text)
  found = open_folder(path, format="text")
  assert len(found.train) + len(found.heldout) >= 20 and len(found.heldout) >= 1
  assert not found.ends
  pieces = list(corpus._pieces(text, long_lines=True))
  assert b"".join(pieces) == text and {*found.train, *found.heldout} == set(pieces)
  assert all(piece.endswith(b" ") and len(piece) < 16_500 for piece in pieces[:-1])
  assert len(pieces[-1]) < 33_000
  assert list(corpus._pieces(text)) == [text]     # elsewhere long lines stay whole, as they were


def test_what_cannot_be_read_is_named_once(tmp_path):
  folder = write_folder(tmp_path / "texts")
  want = open_folder(folder)
  for name, content in (("a.csv", b"1,2"), ("b.csv", b"1,2"), ("sub/c.png", b"\x89"),
                        ("latin.txt", b"caf\xe9")):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(content)
  _pipe(folder / "pipe.txt")
  (folder / "gone.txt").symlink_to("nowhere")
  (folder / "linked").symlink_to(tmp_path)
  found = open_folder(folder)
  assert found == want and not want.warnings
  text = "\n".join(found.warnings)
  assert "3 files of unknown format (.csv .png; known: .txt" in text
  assert "a.csv, b.csv, sub/c.png" in text
  assert "not UTF-8 text: latin.txt" in text and "not followed: linked" in text
  assert "gone.txt (dangling link), pipe.txt (no regular file)" in text
  assert all(text.count(name) == 1 for name in ("a.csv", "latin.txt", "pipe.txt", "gone.txt"))


def test_an_unreadable_subfolder_or_file_is_named(tmp_path, monkeypatch):
  folder = write_folder(tmp_path / "texts")
  (folder / "closed").mkdir()
  (folder / "closed" / "x.txt").write_text("never read")
  scandir, access = os.scandir, os.access

  def refuse(path):
    if str(path).endswith("closed"):
      raise PermissionError(13, "Permission denied", str(path))
    return scandir(path)

  monkeypatch.setattr(os, "scandir", refuse)
  monkeypatch.setattr(os, "access", lambda path, mode: not str(path).endswith("007.txt")
                      and access(path, mode))
  (line,) = open_folder(folder).warnings
  assert "left out 2 unreadable: closed (Permission denied), 007.txt (Permission denied)" in line


def test_documentation_beside_data_is_no_data(tmp_path):
  folder = tmp_path / "downloaded"
  (folder / "data").mkdir(parents=True)
  write_parquet(folder / "data" / "train.parquet")
  want = open_folder(folder)
  for name in ("README.md", ".gitattributes", "LICENSE", "dataset_card.md"):
    (folder / name).write_text("about the data " * 50)
  found = open_folder(folder)
  assert found == want
  (line,) = found.warnings
  assert line.endswith("documentation beside data: LICENSE, README.md, dataset_card.md")
  (folder / "license.py").write_text("x = 1 # code")
  assert len(open_folder(folder).train + open_folder(folder).heldout) == len(DOCUMENTS) + 1
  only_text = write_folder(tmp_path / "texts")
  (only_text / "README.md").write_text("a document like the others")
  assert not open_folder(only_text).warnings


def test_null_texts_are_left_out_and_counted_like_empty_ones(tmp_path):
  want = open_folder(write_jsonl(tmp_path / "a.jsonl"))
  with_nulls = [*DOCUMENTS[:5], None, "", *DOCUMENTS[5:], None]
  for source in (write_jsonl(tmp_path / "b.jsonl", with_nulls),
                 write_parquet(tmp_path / "b.parquet", with_nulls)):
    found = open_folder(source)
    assert found == want and (found.num_null, found.num_empty) == (2, 1)
    assert "60 documents (1 empty and 2 null left out)" in found.describe()


def test_paths_of_the_data_are_made_absolute(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  made = absolute(DataConfig(source="texts", tokenizer="tokenizer.json"))
  assert made.source == str(tmp_path / "texts")
  assert made.tokenizer == str(tmp_path / "tokenizer.json")
  assert absolute(made) == made and absolute(DataConfig()) == DataConfig()
  with pytest.raises(UserError, match=f"'texts' does not exist in {tmp_path}"):
    open_folder("texts")


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


def _pipe(path):
  os.mkfifo(path)
  return path


def pa_text(values):
  return pytest.importorskip("pyarrow").array(values, "string")


GOOD = '{"text": "a"}\n'
LONG = ["some text " * 50 + str(i) for i in range(60)]
BAD_SOURCES = {
  "missing": (lambda d: d / "nowhere", r"nowhere' does not exist; give a file"),
  "empty folder": (lambda d: d, r"holds no text"),
  "empty file": (lambda d: _file(d, "a.txt", ""), r"holds no text"),
  "little text": (lambda d: _file(d, "a.txt", "words " * 9), r"too little text.*1 documents, 54 b"),
  "unknown extension": (lambda d: _file(d, "a.xyz", "words"), r"a\.xyz.*extension '\.xyz'"),
  "unknown in folder": (lambda d: _file(d, "a.csv", "words").parent, r"no text.*\(\.csv;.*a\.csv"),
  "latin-1 folder": (lambda d: _file(d, "a.txt", b"caf\xe9").parent, r"not UTF-8 text: a\.txt"),
  "pipe": (lambda d: _pipe(d / "a.txt"), r"a\.txt' is a pipe or a device; give a file"),
  "not utf-8": (lambda d: _file(d, "a.txt", b"abc\xffdef"), r"a\.txt: not UTF-8 .* byte 3"),
  "not json": (lambda d: _file(d, "a.jsonl", GOOD + "\n{'text'\n"), r"a\.jsonl: line 3: not valid"),
  "json bytes": (lambda d: _file(d, "a.jsonl", b'{"text": "\xff"}'), r"line 1: not valid JSON"),
  "json deep": (lambda d: _file(d, "a.jsonl", "[" * 10**6), r"line 1: not valid JSON"),
  "json list": (lambda d: _file(d, "a.jsonl", GOOD + "[1]\n"), r"line 2: a JSON list"),
  "json field": (lambda d: _file(d, "a.jsonl", '{"body": "a"}'),
                 r"line 1: no field 'text' \(fields: body\)"),
  "json type": (lambda d: _file(d, "a.jsonl", GOOD + '{"text": 3}'),
                r"line 2: field 'text' is int"),
  "json null": (lambda d: _file(d, "a.jsonl", '{"text": null}'),
                r"no text; 1 records whose 'text' is null"),
  "surrogate": (lambda d: _file(d, "a.jsonl", r'{"text": "\ud800"}'), r"line 1: .*surrogate"),
  "parquet garbage": (lambda d: _file(d, "a.parquet", "PAR1?"), r"a\.parquet: damaged or not parq"),
  "parquet cut": (lambda d: _truncated(write_parquet(d / "a.parquet")), r"a\.parquet: damaged"),
  "parquet page": (lambda d: _flip(write_parquet(d / "a.parquet", LONG), 5000),
                   r"a\.parquet: damaged.*CRC"),
  "parquet column": (lambda d: write_parquet(d / "a.parquet", field="body"),
                     r"no column 'text' \(columns: id, body\)"),
  "parquet null": (lambda d: write_parquet(d / "a.parquet", pa_text([None, None])),
                   r"no text; 2 records"),
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
  found = list(corpus._documents(DataConfig(source="python_packages"), LeftOut()))
  assert found == [b"x = 1\n", b"y = 2\n"]
  with pytest.raises(UserError, match="does not fit data.source='python_packages'"):
    list(corpus._documents(DataConfig(source="python_packages", format="jsonl"), LeftOut()))
