import concurrent.futures
import dataclasses
import hashlib
import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from hysparse_jax.config import Config, DataConfig, ModelConfig
from hysparse_jax.data import batches as data
from hysparse_jax.data import order as data_order
from hysparse_jax.errors import UserError
from tests.corpora import DOCUMENTS, read_back, train_documents, write_folder, write_tokenizer

ROOT = pathlib.Path(__file__).parent.parent
T, B = 64, 4
BLOCK = 16      # to which documents are aligned
# SHA-256 of 8 batches: packed anywhere, unpacked, packed and aligned.
GOLDEN = ["2a21d6abbb47271d", "e100124f24508d50", "10efc034099d5bb9"]


@pytest.fixture(scope="module")
def cfg(tmp_path_factory):
  folder = write_folder(tmp_path_factory.mktemp("corpus") / "texts")
  return Config(
    model=ModelConfig(block_size=BLOCK, selected_tokens=64),
    data=DataConfig(source=str(folder), seq_len=T, batch_size=B, heldout_fraction=0.15))


def changed(cfg, **fields):
  """The config with other settings of its data."""
  return dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, **fields))


@pytest.fixture(scope="module")
def tokenizer_json(tmp_path_factory):
  return write_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.json")


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


def in_order(stream, step):
  """The batch that `step` would have if rows were not shuffled."""
  return stream._rows.take(step * B + np.arange(B))


def stream_of(stream, steps):
  """The text of the first steps, without the padding between documents."""
  batches = [in_order(stream, step) for step in range(steps)]
  return b"".join(batch.tokens[batch.segment_ids > 0].astype(np.uint8).tobytes()
                  for batch in batches)


def loop_rows(visits, seq_len, packing, align=1):
  """Rows from a list of documents, one token at a time: the meaning of the five arrays."""
  rows, row = [], []
  for visit, document in enumerate(visits):
    pieces = []
    for i, token in enumerate(document):
      target = document[i + 1] if i + 1 < len(document) else None
      pieces.append((token, target, visit))
    if not packing and len(pieces) > 1 and (len(pieces) - 1) % seq_len == 0:
      pieces.pop()   # the last token is only a target: it has no row to itself
    if packing:
      pieces += [None] * (-len(pieces) % align)
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
    for c, piece in enumerate(row):
      if piece is None:
        continue
      token, target, visit = piece
      segment, position = (segment, position + 1) if visit == previous else (segment + 1, 0)
      previous = visit
      built[:, r, c] = token, target or 0, segment, position, target is not None
  return built


# Batches


@pytest.mark.parametrize("seed, align", [(0, True), (0, False), (7, True)])
def test_packed_batches_equal_a_loop_over_the_documents(cfg, seed, align):
  cfg = changed(cfg, seed=seed, align_documents=align)
  stream, known = data.TrainStream(cfg), train_documents(cfg.data)
  assert stream.num_documents == len(known)
  assert stream.tokens_per_epoch == sum(map(len, known))
  steps = 3 * stream.tokens_per_epoch // (B * T)   # nearly three epochs
  batches = [in_order(stream, step) for step in range(steps)]
  visits = read_back(stream_of(stream, steps + 1), known)   # one more: the last row's target
  expected = loop_rows(visits, T, packing=True, align=BLOCK if align else 1)
  for name, want, *got in zip(data.Batch._fields, expected, *batches):
    np.testing.assert_array_equal(np.concatenate(got), want[:steps * B], err_msg=name)
  dtypes = [a.dtype for a in batches[0]]
  assert dtypes == [np.int32, np.int32, np.int32, np.int32, np.float32]


def test_each_document_once_per_epoch_in_a_new_order(cfg):
  orders = {}
  for seed in (0, 1):
    stream, known = data.TrainStream(changed(cfg, seed=seed)), train_documents(cfg.data)
    visits = read_back(stream_of(stream, 3 * stream.tokens_per_epoch // (B * T)), known)
    for epoch in range(2):
      order = visits[epoch * len(known):(epoch + 1) * len(known)]
      assert sorted(order) == sorted(known)
      orders[seed, epoch] = tuple(order)
  assert len(set(orders.values())) == 4   # no two epochs, no two seeds alike
  assert tuple(known) not in orders.values()


def test_a_document_that_follows_itself_is_a_new_segment(cfg, tmp_path):
  folder = write_folder(tmp_path / "two", ["never seen", "abc" * 30])
  first, second = (hashlib.sha256(text.encode()).digest() for text in ("never seen", "abc" * 30))
  assert first < second   # so a fraction between the two holds out the first
  fraction = (int.from_bytes(first[:8], "big") + 2**40) / 2**64
  stream = data.TrainStream(changed(cfg, source=str(folder), batch_size=1,
                                                heldout_fraction=fraction))
  assert (stream.num_documents, stream.tokens_per_epoch) == (1, 90)
  # Places 64 to 127: the end of one epoch, the start of the next, at the next key block.
  batch = stream._rows.take(np.array([1]))
  assert batch.segment_ids.tolist() == [[1] * 26 + [0] * 6 + [2] * 32]
  assert batch.weights.tolist() == [[1] * 25 + [0] * 7 + [1] * 32]
  anywhere = changed(cfg, source=str(folder), batch_size=1, heldout_fraction=fraction,
                     align_documents=False)
  batch = data.TrainStream(anywhere)._rows.take(np.array([1]))
  assert batch.segment_ids.tolist() == [[1] * 26 + [2] * 38]
  assert batch.weights.tolist() == [[1] * 25 + [0] + [1] * 38]


def test_unpacked_rows_hold_one_document_each(cfg):
  cfg = changed(cfg, packing=False)
  stream, known = data.TrainStream(cfg), train_documents(cfg.data)
  per_epoch = sum(max(1, -(-(len(document) - 1) // T)) for document in known)
  steps = 2 * per_epoch // B
  got = [np.concatenate(arrays) for arrays in zip(*(in_order(stream, s) for s in range(steps)))]
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
    stream = data.TrainStream(changed(cfg, packing=packing))
    rows = stream._rows.per_pass
    known = train_documents(cfg.data)
    weights = np.concatenate([in_order(stream, step).weights for step in range(-(-rows // B))])
    predictions = sum(len(document) - 1 for document in known)
    if packing:   # the last row runs on into the next epoch
      weights = weights.reshape(-1)[:sum(-(-len(document) // BLOCK) * BLOCK for document in known)]
    else:
      weights = weights[:rows]
    assert weights.sum() == predictions


@pytest.mark.parametrize("packing", [True, False])
def test_rows_are_shuffled_within_every_pass(cfg, packing):
  stream = data.TrainStream(changed(cfg, packing=packing))
  rows = stream._rows.per_pass
  straight = stream._rows.take(np.arange(2 * rows + B)).tokens
  order = data.shuffled_rows(np.arange(2 * rows + B), rows, seed=0)
  got = np.concatenate([stream.batch(step).tokens for step in range(2 * rows // B)])
  np.testing.assert_array_equal(got, straight[order[:len(got)]])


@pytest.mark.parametrize("per_pass", [1, 2, 3, 16, 17, 1000, 4096])
def test_shuffled_rows_are_a_bijection_of_every_pass(per_pass):
  numbers = np.arange(3 * per_pass)
  orders = {}
  for seed in (0, 1):
    order = data.shuffled_rows(numbers, per_pass, seed)
    for epoch in range(3):
      part = order[epoch * per_pass:(epoch + 1) * per_pass]
      assert sorted(part) == list(range(epoch * per_pass, (epoch + 1) * per_pass))
      orders[seed, epoch] = tuple(part - epoch * per_pass)
    picked = numbers[::3]
    np.testing.assert_array_equal(data.shuffled_rows(picked, per_pass, seed), order[::3])
  if per_pass >= 16:
    assert len(set(orders.values())) == 6 and tuple(range(per_pass)) not in orders.values()
  if per_pass == 4096:   # neighbours are parted: their mean distance is a third of the pass
    order = np.asarray(orders[0, 0])
    assert 0.30 < np.abs(np.diff(order)).mean() / per_pass < 0.37


@pytest.mark.parametrize("workers", [0, 2])
def test_hosts_and_workers_do_not_change_the_batches(cfg, workers):
  steps, first = 6, 2
  whole = data.TrainStream(cfg)
  want = sha(whole.batch(step) for step in range(first, first + steps))

  def take(host, hosts):
    stream = data.TrainStream(changed(cfg, workers=workers), host, hosts)
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
  digests = [sha(data.TrainStream(changed(cfg, packing=packing, align_documents=align)).batch(step)
                 for step in range(8))[:16]
             for packing, align in ((True, False), (False, True), (True, True))]
  assert (data.VERSION, digests) == ("2", GOLDEN)


def test_splitmix64_gives_its_published_stream():
  # seed 1234567: 6457827717110365317, 3203168211198807973 (rosettacode.org, Splitmix64)
  gamma = np.uint64(0x9E3779B97F4A7C15)
  states = np.array([1234567], np.uint64) + np.array([1, 2], np.uint64) * gamma
  assert data_order._mix(states).tolist() == [6457827717110365317, 3203168211198807973]


@pytest.mark.parametrize("workers, ending, status", [
  (2, "os.kill(os.getpid(), signal.SIGKILL)", -9), (2, "pass", 0), (0, "pass", 0)])
def test_an_open_iterator_ends_with_its_process(cfg, tmp_path, workers, ending, status):
  # In a fresh interpreter absl flags are unparsed, as in a notebook. Workers inherit stdout, so
  # reading it to its end means waiting for them. A SIGTERM of theirs is the parent's business.
  script = f"""
import multiprocessing, os, signal
from hysparse_jax.data import batches as data
from hysparse_jax.config import Config, DataConfig
batches = data.TrainStream(Config(data=DataConfig(
  source={cfg.data.source!r}, seq_len=64, batch_size=4, heldout_fraction=0.15,
  workers={workers}))).iterator(0)
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
  assert set(saved) == {"version", *changes, "align_documents"}
  for name, change in changes.items():
    current = data.TrainStream(changed(cfg, **change)).fingerprint
    with pytest.raises(UserError) as caught:
      data.check_fingerprint(saved, current)
    message = str(caught.value)
    assert f"{name} was {saved[name]}, is {current[name]}" in message
    # Rows of one document each have nothing to align.
    assert message.count(" was ") == (2 if name == "packing" else 1) and "\n" not in message
  for change in ({"workers": 3}, {"source": str(same)}):
    data.check_fingerprint(saved,
                           data.TrainStream(changed(cfg, **change)).fingerprint)
  with pytest.raises(UserError, match="version was absent, is 2"):
    data.check_fingerprint({k: v for k, v in saved.items() if k != "version"}, saved)
  # A run from before documents were aligned: the error names the setting that resumes it.
  before = {name: value for name, value in saved.items() if name != "align_documents"}
  with pytest.raises(UserError, match="align_documents was absent, is 16; .*"
                                      "--set data.align_documents=False packs") as caught:
    data.check_fingerprint(before, saved)
  assert "\n" not in str(caught.value)
  data.check_fingerprint(before, data.TrainStream(changed(cfg, align_documents=False)).fingerprint)
  unpacked = [data.TrainStream(changed(cfg, packing=False, align_documents=align)).fingerprint
              for align in (True, False)]
  assert unpacked[0] == unpacked[1]                       # the same batches
  assert json.loads(json.dumps(saved)) == saved


# Held-out documents


@pytest.mark.parametrize("packing", [True, False])
def test_heldout_batches_are_one_pass_over_the_heldout_documents(cfg, packing):
  cfg = changed(cfg, packing=packing)
  heldout = data.Corpus.open(cfg.data).heldout
  batches = data.heldout_batches(cfg, 1000, batch_size=3, seq_len=16)
  rows = loop_rows(heldout, 16, packing, BLOCK)
  if packing:   # the loop keeps whole rows; the rest of the last one is checked through the sums
    assert sum(b.weights.sum() for b in batches) == sum(len(d) - 1 for d in heldout)
    assert sum((b.segment_ids > 0).sum() for b in batches) == sum(map(len, heldout))
  per_pass = sum(-(-len(d) // 16) for d in heldout) if packing else rows.shape[1]
  order = data.shuffled_rows(np.arange(3 * len(batches)), per_pass, seed=0)
  assert (order[:len(rows[0])] != np.arange(len(rows[0]))).any()
  for name, want, *got in zip(data.Batch._fields, rows, *batches):
    got = np.concatenate(got)[np.argsort(order)]
    np.testing.assert_array_equal(got[:len(want)], want, err_msg=name)
    assert len(got) % 3 == 0 and len(got) - len(want) <= 3
    if not packing:
      assert not got[len(want):].any()
  few = data.heldout_batches(changed(cfg, seed=9), 2, batch_size=3, seq_len=16)
  assert len(few) == 2
  for left, right in zip(few, batches):
    assert_same(left, right)
  assert data.heldout_batches(cfg, 1)[0].tokens.shape == (B, T)
  with pytest.raises(UserError, match="held-out count is 0"):
    data.heldout_batches(cfg, 0)
  if packing:
    with pytest.raises(UserError, match="rows of 24 tokens are not whole key blocks of "
                                        "model.block_size=16"):
      data.heldout_batches(cfg, 1, seq_len=24)


@pytest.mark.parametrize("packing", [True, False])
def test_padding_share_is_what_an_epoch_holds(cfg, packing):
  stream = data.TrainStream(changed(cfg, packing=packing))
  rows = stream._rows.take(np.arange(stream._rows.per_pass)).segment_ids.reshape(-1)
  if packing:      # the last row runs on into the next epoch
    rows = rows[:sum(-(-len(d) // BLOCK) * BLOCK for d in train_documents(cfg.data))]
  assert 0.05 < stream.padding_share < 0.5
  np.testing.assert_allclose((rows == 0).mean(), stream.padding_share, rtol=1e-12)
  assert (stream.batch(3).weights[stream.batch(3).segment_ids == 0] == 0).all()


def test_default_stream_reads_the_standard_library():
  assert data.TrainStream(Config()).batch(0).tokens.shape == (8, 512)


@pytest.mark.parametrize("change, message", [
  ({"seq_len": 160_000}, r"training tokens, less than one row of data\.seq_len=160000"),
  ({"format": "parquet"}, r"has no parquet file \(\.parquet\)"),
  ({"source": "python_stdlib", "format": "jsonl"}, r"data\.format='jsonl' does not fit"),
  ({"tokenizer": "nowhere.json"}, r"'nowhere\.json', which is not a file"),
])
def test_bad_config(cfg, change, message):
  with pytest.raises(UserError, match=message) as caught:
    data.TrainStream(changed(cfg, **change))
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize("index, count, message", [
  (0, 3, "batch_size=4 does not divide over 3 hosts"),
  (2, 2, "process_index is 2; expected 0 to 1"),
])
def test_bad_hosts(cfg, index, count, message):
  with pytest.raises(UserError, match=message):
    data.TrainStream(cfg, index, count)


def test_heldout_rows_do_not_depend_on_the_size_of_a_batch(cfg):
  """Evaluation in micro-batches: more batches of fewer rows are the same rows in order."""
  whole = data.heldout_batches(cfg, 3)
  parts = data.heldout_batches(cfg, 3 * 2, B // 2)
  for name, want, got in zip(data.Batch._fields, *(map(np.concatenate, zip(*batches))
                                                   for batches in (whole, parts))):
    np.testing.assert_array_equal(got, want[:len(got)], err_msg=name)
    assert not want[len(got):].any()


def test_the_start_up_line_has_documents_tokens_and_the_held_out_share(tmp_path):
  folder = write_folder(tmp_path / "texts")
  stream = data.TrainStream(Config(data=DataConfig(source=str(folder), seq_len=64,
                                                   heldout_fraction=0.15)))
  line = stream.describe()
  held = 60 - stream.num_documents
  assert f"60 documents, {held} of them held out, " in line and "% of the text" in line
  assert f"; {stream.tokens_per_epoch:,} tokens an epoch" in line
