import concurrent.futures
import dataclasses
import hashlib
import json
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from hysparse_jax import data
from hysparse_jax.config import DataConfig
from hysparse_jax.errors import UserError

ROOT = pathlib.Path(__file__).parent.parent
# Every document opens with its own number, so a stream of tokens can be read back into documents.
# Lengths run from shorter than a tenth of a row to several rows.
DOCUMENTS = [f"<{i:03d}>" + "é" * (i % 3) + chr(97 + i % 26) * (i * 37 % 150) for i in range(60)]
T, B = 64, 4
GOLDEN = ["2ee341a92510caf4", "fb75c3e8d23125f4"]   # SHA-256 of 8 batches: packed, unpacked


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


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return write_folder(tmp_path_factory.mktemp("corpus") / "texts")


@pytest.fixture(scope="module")
def cfg(folder):
  return DataConfig(source=str(folder), seq_len=T, batch_size=B, heldout_fraction=0.15)


@pytest.fixture(scope="module")
def tokenizer_json(tmp_path_factory):
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
  path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
  tokenizer.save(str(path))
  return str(path)


def assert_same(left, right):
  assert type(left) is type(right) is data.Batch
  for name, a, b in zip(data.Batch._fields, left, right):
    assert a.dtype == b.dtype, name
    np.testing.assert_array_equal(a, b, err_msg=name)


def sha(batches):
  digest = hashlib.sha256()
  for batch in batches:
    for array in batch:
      digest.update(np.ascontiguousarray(array).tobytes())
  return digest.hexdigest()


def train_documents(cfg):
  return {document: i for i, document in enumerate(data.Corpus.open(cfg).train)}


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


def stream_of(stream, steps):
  return b"".join(stream.batch(step).tokens.astype(np.uint8).tobytes() for step in range(steps))


def loop_rows(visits, seq_len, packing):
  """Rows from a list of documents, one token at a time: the meaning of the five arrays."""
  rows, row = [], []
  for visit, document in enumerate(visits):
    pieces = []
    for i, token in enumerate(document):
      target = document[i + 1] if i + 1 < len(document) else None
      pieces.append((token, target, visit))
    if not packing and len(pieces) > 1 and (len(pieces) - 1) % seq_len == 0:
      pieces.pop()   # the last token is only a target: it has no row to itself
    for piece in pieces:
      row.append(piece)
      if len(row) == seq_len:
        rows.append(row)
        row = []
    if not packing and row:
      rows.append(row)
      row = []
  built = np.zeros((5, len(rows), seq_len), np.int64)
  for r, row in enumerate(rows):
    segment, position, previous = 0, 0, None
    for c, (token, target, visit) in enumerate(row):
      segment, position = (segment, position + 1) if visit == previous else (segment + 1, 0)
      previous = visit
      built[:, r, c] = token, target or 0, segment, position, target is not None
  return built


# Batches


@pytest.mark.parametrize("seed", [0, 7])
def test_packed_batches_equal_a_loop_over_the_documents(cfg, seed):
  cfg = dataclasses.replace(cfg, seed=seed)
  stream, known = data.TrainStream(cfg), train_documents(cfg)
  assert stream.num_documents == len(known)
  assert stream.tokens_per_epoch == sum(map(len, known))
  steps = 3 * stream.tokens_per_epoch // (B * T)   # nearly three epochs
  batches = [stream.batch(step) for step in range(steps)]
  visits = read_back(stream_of(stream, steps + 1), known)   # one more: the last row's target
  expected = loop_rows(visits, T, packing=True)
  for name, want, *got in zip(data.Batch._fields, expected, *batches):
    np.testing.assert_array_equal(np.concatenate(got), want[:steps * B], err_msg=name)
  dtypes = [a.dtype for a in batches[0]]
  assert dtypes == [np.int32, np.int32, np.int32, np.int32, np.float32]


def test_each_document_once_per_epoch_in_a_new_order(cfg):
  orders = {}
  for seed in (0, 1):
    stream, known = data.TrainStream(dataclasses.replace(cfg, seed=seed)), train_documents(cfg)
    visits = read_back(stream_of(stream, 3 * stream.tokens_per_epoch // (B * T)), known)
    for epoch in range(2):
      order = visits[epoch * len(known):(epoch + 1) * len(known)]
      assert sorted(order) == sorted(known)
      orders[seed, epoch] = tuple(order)
  assert len(set(orders.values())) == 4   # no two epochs, no two seeds alike
  assert tuple(known) not in orders.values()


def test_unpacked_rows_hold_one_document_each(cfg):
  cfg = dataclasses.replace(cfg, packing=False)
  stream, known = data.TrainStream(cfg), train_documents(cfg)
  per_epoch = sum(max(1, -(-(len(document) - 1) // T)) for document in known)
  steps = 2 * per_epoch // B
  got = [np.concatenate(arrays) for arrays in zip(*(stream.batch(s) for s in range(steps)))]
  assert set(np.unique(got[2])) == {0, 1}
  heads = [bytes(row[:5].astype(np.uint8)) for row in got[0]]
  by_head = {document[:5]: document for document in known}
  visits = [by_head[head] for row, head in enumerate(heads) if head in by_head]
  assert sorted(visits[:len(known)]) == sorted(known)
  expected = loop_rows(visits, T, packing=False)[:, :steps * B]
  for name, have, want in zip(data.Batch._fields, got, expected):
    np.testing.assert_array_equal(have[:want.shape[0]], want, err_msg=name)


def test_every_next_token_is_predicted_once_per_epoch(cfg):
  for packing in (True, False):
    stream = data.TrainStream(dataclasses.replace(cfg, packing=packing))
    rows = stream._rows.per_pass
    known = train_documents(cfg)
    weights = np.concatenate([stream.batch(step).weights for step in range(-(-rows // B))])
    predictions = sum(len(document) - 1 for document in known)
    if packing:   # the last row runs on into the next epoch
      weights = weights.reshape(-1)[:stream.tokens_per_epoch]
    else:
      weights = weights[:rows]
    assert weights.sum() == predictions


@pytest.mark.parametrize("workers", [0, 2])
def test_hosts_and_workers_do_not_change_the_batches(cfg, workers):
  steps, first = 6, 2
  whole = data.TrainStream(cfg)
  want = sha(whole.batch(step) for step in range(first, first + steps))

  def take(host, hosts):
    stream = data.TrainStream(dataclasses.replace(cfg, workers=workers), host, hosts)
    assert stream.fingerprint == whole.fingerprint
    iterator = stream.iterator(first)
    taken = [next(iterator) for _ in range(steps)]
    iterator.close()
    assert_same(stream.batch(first), taken[0])
    return taken

  places = [(host, hosts) for hosts in (1, 2, 4) for host in range(hosts)]
  with concurrent.futures.ThreadPoolExecutor(len(places)) as pool:
    taken = dict(zip(places, pool.map(take, *zip(*places))))
  for hosts in (1, 2, 4):
    slices = zip(*(taken[host, hosts] for host in range(hosts)))
    got = [data.Batch(*map(np.concatenate, zip(*parts))) for parts in slices]
    assert sha(got) == want, f"{hosts} hosts, {workers} workers"
    assert len(taken[0, hosts][0].tokens) == B // hosts


def test_batch_is_a_pure_function_of_the_step(cfg):
  stream, other = data.TrainStream(cfg), data.TrainStream(cfg)
  far = 10**9
  forward = [stream.batch(step) for step in (0, 1, 5, 200, far)]
  backward = [other.batch(step) for step in (far, 200, 5, 1, 0)][::-1]
  for left, right in zip(forward, backward):
    assert_same(left, right)
  assert_same(next(other.iterator(200)), forward[3])
  with pytest.raises(UserError, match="step is -1"):
    stream.batch(-1)
  with pytest.raises(UserError, match="step is -1"):
    stream.iterator(-1)


def test_batches_are_the_same_on_every_machine_and_version(cfg):
  # Computed once by this code; a change of it is a change of data.VERSION.
  digests = [sha(data.TrainStream(dataclasses.replace(cfg, packing=packing)).batch(step)
                 for step in range(8))[:16] for packing in (True, False)]
  assert (data.VERSION, digests) == ("1", GOLDEN)


def test_splitmix64_gives_its_published_stream():
  # seed 1234567: 6457827717110365317, 3203168211198807973 (rosettacode.org, Splitmix64)
  gamma = np.uint64(0x9E3779B97F4A7C15)
  states = np.array([1234567], np.uint64) + np.array([1, 2], np.uint64) * gamma
  assert data._mix(states).tolist() == [6457827717110365317, 3203168211198807973]


@pytest.mark.parametrize("workers, ending, status", [
  (2, "os.kill(os.getpid(), signal.SIGKILL)", -9), (2, "pass", 0), (0, "pass", 0)])
def test_an_open_iterator_ends_with_its_process(cfg, tmp_path, workers, ending, status):
  # In a fresh interpreter absl flags are unparsed, as in a notebook. Workers inherit stdout, so
  # reading it to its end means waiting for them. A SIGTERM of theirs is the parent's business.
  script = f"""
import multiprocessing, os, signal
from hysparse_jax import data
from hysparse_jax.config import DataConfig
batches = data.TrainStream(DataConfig(source={cfg.source!r}, seq_len=64, batch_size=4,
                                      heldout_fraction=0.15, workers={workers})).iterator(0)
next(batches), next(batches)   # one of each worker
for worker in multiprocessing.active_children():
  os.kill(worker.pid, signal.SIGTERM)
for _ in range(20):
  next(batches)
print(len(multiprocessing.active_children()), len(os.listdir(os.environ["TMPDIR"])), flush=True)
{ending}
"""
  done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60,
                        env={"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}, check=False)
  assert (done.returncode, done.stdout) == (status, f"{workers} {int(workers > 0)}\n"), done.stderr
  assert list(tmp_path.iterdir()) == []
  if status == 0:
    assert done.stderr == ""


# Recipe


def test_fingerprint_names_what_changed(cfg, tmp_path, tokenizer_json):
  saved = data.TrainStream(cfg).fingerprint
  other = write_folder(tmp_path / "other", [*DOCUMENTS[:-1], DOCUMENTS[-1] + "!"])
  same = write_folder(tmp_path / "same")
  changes = {
    "source": {"source": str(other)}, "tokenizer": {"tokenizer": tokenizer_json},
    "text_field": {"text_field": "body"}, "seq_len": {"seq_len": 32},
    "batch_size": {"batch_size": 8}, "packing": {"packing": False},
    "heldout_fraction": {"heldout_fraction": 0.2}, "seed": {"seed": 1},
  }
  assert set(saved) == {"version", *changes}
  for name, change in changes.items():
    current = data.TrainStream(dataclasses.replace(cfg, **change)).fingerprint
    with pytest.raises(UserError) as caught:
      data.check_fingerprint(saved, current)
    message = str(caught.value)
    assert f"{name} was {saved[name]}, is {current[name]}" in message
    assert message.count(" was ") == 1 and "\n" not in message
  for change in ({"workers": 3}, {"source": str(same)}):
    data.check_fingerprint(saved,
                           data.TrainStream(dataclasses.replace(cfg, **change)).fingerprint)
  with pytest.raises(UserError, match="version was absent, is 1"):
    data.check_fingerprint({k: v for k, v in saved.items() if k != "version"}, saved)
  assert json.loads(json.dumps(saved)) == saved


# Held-out documents


def test_split_depends_on_content_alone(cfg, tmp_path):
  corpus = data.Corpus.open(cfg)
  shuffled = write_folder(tmp_path / "a" / "elsewhere", DOCUMENTS[::-1] + DOCUMENTS[:30])
  moved = data.Corpus.open(dataclasses.replace(cfg, source=str(shuffled), seed=5))
  assert set(moved.train) == set(corpus.train) and set(moved.heldout) == set(corpus.heldout)
  assert not set(corpus.train) & set(corpus.heldout)
  assert set(corpus.train) | set(corpus.heldout) == {text.encode() for text in DOCUMENTS}
  by_hand = {text.encode() for text in DOCUMENTS
             if int(hashlib.sha256(text.encode()).hexdigest()[:16], 16) / 2**64 < 0.15}
  assert set(corpus.heldout) == by_hand and 3 <= len(by_hand) <= 15
  wider = data.Corpus.open(dataclasses.replace(cfg, heldout_fraction=0.3))
  assert set(wider.heldout) > set(corpus.heldout)


@pytest.mark.parametrize("packing", [True, False])
def test_heldout_batches_are_one_pass_over_the_heldout_documents(cfg, packing):
  cfg = dataclasses.replace(cfg, packing=packing)
  heldout = data.Corpus.open(cfg).heldout
  batches = data.heldout_batches(cfg, 1000, batch_size=3, seq_len=16)
  rows = loop_rows(heldout, 16, packing)
  if packing:   # the loop keeps whole rows; the rest of the last one is checked through the sums
    assert sum(b.weights.sum() for b in batches) == sum(len(d) - 1 for d in heldout)
    assert sum((b.segment_ids > 0).sum() for b in batches) == sum(map(len, heldout))
  for name, want, *got in zip(data.Batch._fields, rows, *batches):
    got = np.concatenate(got)
    np.testing.assert_array_equal(got[:len(want)], want, err_msg=name)
    assert len(got) % 3 == 0 and len(got) - len(want) <= 3
    if not packing:
      assert not got[len(want):].any()
  few = data.heldout_batches(dataclasses.replace(cfg, seed=9), 2, batch_size=3, seq_len=16)
  assert len(few) == 2
  for left, right in zip(few, batches):
    assert_same(left, right)
  assert data.heldout_batches(cfg, 1)[0].tokens.shape == (B, T)
  with pytest.raises(UserError, match="held-out count is 0"):
    data.heldout_batches(cfg, 0)


# Sources


def test_standard_library_is_the_default():
  corpus = data.Corpus.open(DataConfig())
  assert sum(map(len, corpus.train)) > 5e6
  assert any(document == pathlib.Path(dataclasses.__file__).read_bytes()
             for document in corpus.train + corpus.heldout)
  assert not set(corpus.train) & set(corpus.heldout)
  share = len(corpus.heldout) / (len(corpus.train) + len(corpus.heldout))
  assert 0.03 < share < 0.07
  numpy_source = pathlib.Path(np.__file__).read_bytes()
  assert numpy_source not in corpus.train + corpus.heldout   # installed, not standard
  assert data.TrainStream(DataConfig()).batch(0).tokens.shape == (8, 512)


def test_every_format_gives_the_same_corpus(cfg, tmp_path):
  want = data.Corpus.open(cfg)
  encoded = [text.encode() for text in DOCUMENTS]
  rows = [json.dumps({"text": text}).encode() for text in DOCUMENTS]
  sources = [
    write_jsonl(tmp_path / "a.jsonl"),
    write_parquet(tmp_path / "a.parquet"),
    write_arrayrecord(tmp_path / "a.arrayrecord", encoded),
    write_arrayrecord(tmp_path / "b.array_record", rows),
  ]
  for source in sources:
    assert data.Corpus.open(dataclasses.replace(cfg, source=str(source))) == want, source.name
  plain = tmp_path / "records.bin"
  plain.write_bytes(sources[2].read_bytes())
  named = dataclasses.replace(cfg, source=str(plain), format="arrayrecord")
  assert data.Corpus.open(named) == want


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
  assert data.Corpus.open(mixed) == data.Corpus.open(cfg)
  texts = dataclasses.replace(mixed, format="text", heldout_fraction=0.5)
  corpus = data.Corpus.open(texts)
  assert {*corpus.train, *corpus.heldout} == {text.encode() for text in DOCUMENTS[:10]}


def test_a_text_file_alone_is_cut_at_line_ends(cfg, tmp_path):
  lines = "".join(f"line {i} ü\n" for i in range(40_000)).encode() + b"no newline at the end"
  (tmp_path / "big.txt").write_bytes(lines)
  corpus = data.Corpus.open(dataclasses.replace(cfg, source=str(tmp_path / "big.txt")))
  pieces = sorted(corpus.train + corpus.heldout, key=lines.index)
  assert b"".join(pieces) == lines
  assert all(piece.endswith(b"\n") and 16384 <= len(piece) < 16410 for piece in pieces[:-1])


# Tokenizers


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
  cfg = dataclasses.replace(cfg, tokenizer=tokenizer_json)
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
  stream, known = data.TrainStream(cfg), train_documents(cfg)
  assert stream.tokens_per_epoch < sum(map(len, known))
  steps = stream.tokens_per_epoch // (B * T)
  tokens = np.concatenate([stream.batch(step).tokens.reshape(-1) for step in range(steps)])
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
    data.Corpus.open(DataConfig(source=str(make(tmp_path))))
  assert re.search(message, str(caught.value)), str(caught.value)
  assert "\n" not in str(caught.value)


def test_unreadable_source(tmp_path, monkeypatch):
  def refuse(self):
    raise PermissionError(13, "Permission denied", str(self))
  path = _file(tmp_path, "a.txt", "words")
  monkeypatch.setattr(pathlib.Path, "read_bytes", refuse)
  with pytest.raises(UserError, match=r"Permission denied.*a\.txt"):
    data.Corpus.open(DataConfig(source=str(path)))


@pytest.mark.parametrize("change, message", [
  ({"seq_len": 100_000}, r"training tokens, less than one row of data\.seq_len=100000"),
  ({"heldout_fraction": 1e-9}, r"too few documents for a held-out split: 60 for training, 0 held"),
  ({"format": "parquet"}, r"has no parquet file \(\.parquet\)"),
  ({"source": "python_stdlib", "format": "jsonl"}, r"data\.format='jsonl' does not fit"),
  ({"tokenizer": "nowhere.json"}, r"'nowhere\.json', which is not a file"),
])
def test_bad_config(cfg, change, message):
  with pytest.raises(UserError, match=message) as caught:
    data.TrainStream(dataclasses.replace(cfg, **change))
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["{", "{}", '{"version": "1.0", "model": {"type": "no"}}'])
def test_damaged_tokenizer(cfg, tmp_path, content):
  pytest.importorskip("tokenizers")
  path = _file(tmp_path, "tokenizer.json", content)
  with pytest.raises(UserError, match=r"tokenizer\.json: not a usable") as caught:
    data.load_tokenizer(dataclasses.replace(cfg, tokenizer=str(path)))
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize("index, count, message", [
  (0, 3, "batch_size=4 does not divide over 3 hosts"),
  (2, 2, "process_index is 2; expected 0 to 1"),
])
def test_bad_hosts(cfg, index, count, message):
  with pytest.raises(UserError, match=message):
    data.TrainStream(cfg, index, count)
