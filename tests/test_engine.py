"""The engine: a request's answer is its own, whoever runs beside it; nothing is lost or left."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hysparse_jax.config import MeshConfig, ModelConfig
from hysparse_jax.data.tokenizer import ByteTokenizer
from hysparse_jax.errors import UserError
from hysparse_jax.inference.engine import Engine
from hysparse_jax.inference.requests import Request
from hysparse_jax.inference.sampling import generate, generate_text, sample_rows, sample_token
from hysparse_jax.sharding import make_mesh, shardings
from tests import weights
from tests.tolerances import assert_close

CFG = ModelConfig(num_layers=3, d_model=16, num_heads=2, num_kv_heads=2, head_dim=8, d_ff=16,
                  sparse_per_full=1, block_size=4, selected_tokens=8, window=8, dtype="float32")
ROOM = dict(slots=3, max_tokens=60, chunk=16)        # 15 pages a sequence
FEW = 17                                             # pages, where three sequences want more


@pytest.fixture(scope="module")
def model():
  return weights.drawn(CFG)


def prompts(*lengths, seed=0):
  rng = np.random.default_rng(seed)
  return [rng.integers(0, 256, length) for length in lengths]


SETTINGS = (dict(temperature=0), dict(temperature=0.8, top_k=20, top_p=0.9, seed=2**40 + 3))
REQUESTS = [Request(prompt, 4 + i, logprobs=2, **SETTINGS[i % 2])
            for i, prompt in enumerate(prompts(38, 19, 29, 1, 44, 16, 7, 33))]


def answers(engine, requests):
  """[(tokens, log-probabilities)] and the handles."""
  handles = [engine.submit(request) for request in requests]
  engine.run()
  assert all(handle.done and not handle.error for handle in handles)
  return [(handle.tokens, handle.logprobs) for handle in handles], handles


@pytest.fixture(scope="module")
def alone(model):
  """Every request's answer when nobody else is there."""
  return [answers(Engine(model, max_prefixes=0, **ROOM), [request])[0][0] for request in REQUESTS]


def check_pages(engine):
  """Everything that is not kept for reuse is free."""
  stats = engine.stats
  assert stats.running == stats.waiting == 0 and stats.pages_used == stats.pages_cached
  engine._prefixes.clear()
  assert engine.stats.pages_used == 0 and engine._pool.free == stats.pages
  assert (engine._table == -1).all() and not engine.busy


def test_rows_draw_as_each_would_alone():
  rng = np.random.default_rng(0)
  logits = jnp.asarray(rng.standard_normal((6, 50)), jnp.float32).at[5, 3].set(jnp.nan)
  keys = jax.random.split(jax.random.key(1), 6)
  temperature, top_k, top_p = [0, 1, 0.5, 2, 1, 1], [0, 0, 3, 0, 70, 0], [1, 1, 1, 0.3, 0.9, 1]
  of = lambda values, dtype: jnp.asarray(values, dtype)
  drawn = jax.jit(sample_rows)(logits, keys, of(temperature, jnp.float32), of(top_k, jnp.int32),
                               of(top_p, jnp.float32))
  for row in range(6):
    expected = sample_token(logits[row:row + 1], keys[row], temperature=temperature[row],
                            top_k=top_k[row], top_p=top_p[row])
    assert drawn[row] == expected[0]
  assert drawn[5] == -1 and drawn[0] == jnp.argmax(logits[0])


def test_requests_that_join_and_leave_equal_generate_one_by_one(model):
  engine, rng = Engine(model, max_prefixes=0, **ROOM), np.random.default_rng(1)
  handles, slots_seen = [], set()
  for request in REQUESTS:
    handles.append(engine.submit(request))
    for _ in range(rng.integers(0, 4)):
      engine.step()
      slots_seen.add(engine.stats.running)
  engine.run()
  assert max(slots_seen) == 3
  for request, handle in zip(REQUESTS, handles):
    expected = generate(model, request.tokens[None], request.max_new_tokens, seed=request.seed,
                        temperature=request.temperature, top_k=request.top_k, top_p=request.top_p)
    np.testing.assert_array_equal(handle.result(), expected[0])
    assert handle.finish_reason == "length" and handle.reused_tokens == 0
  check_pages(engine)


@pytest.mark.parametrize("pages, preempted", [(None, False), (FEW, True)])
def test_neighbours_and_preemption_change_no_bit(model, alone, pages, preempted):
  engine = Engine(model, num_pages=pages, **ROOM)
  order = [5, 0, 3, 7, 1, 4, 2, 6, 0]
  together, handles = answers(engine, [REQUESTS[i] for i in order])
  assert together == [alone[i] for i in order]
  assert (engine.stats.preemptions > 0) == preempted
  assert engine.stats.new_tokens == sum(len(handle.tokens) for handle in handles)
  check_pages(engine)


def test_the_newest_is_preempted_and_the_oldest_runs_on(model):
  engine = Engine(model, max_prefixes=0, num_pages=FEW, **ROOM)
  old, new = (engine.submit(Request(prompt, 24, temperature=0)) for prompt in prompts(30, 20))
  while not engine.stats.preemptions:
    engine.step()
  lost = len(new.tokens)
  assert lost > 0 and engine.stats.waiting == 1 and len(old.tokens) > lost
  assert [job.handle for job in engine._jobs if job is not None] == [old]
  newer = engine.submit(Request([1], 2))
  engine.step()
  assert engine.stats.waiting == 2                 # nobody overtakes
  engine.run()
  assert len(old.tokens) == len(new.tokens) == 24 and len(newer.tokens) == 2
  check_pages(engine)


@pytest.mark.parametrize("fields", [dict(), dict(attention="full"), dict(pattern="window window")],
                         ids=str)
def test_a_prefix_that_was_there_changes_no_bit(model, fields):
  """With rings and pages, without rings, without pages."""
  if fields:
    model = weights.drawn(dataclasses.replace(CFG, num_layers=2, **fields))
  system, first, second = prompts(37, 8, 15)
  requests = [Request(np.concatenate([system, end]), 6, seed=3, logprobs=1)
              for end in (first, second, first)]
  plain, _ = answers(Engine(model, max_prefixes=0, **ROOM), requests)
  engine = Engine(model, **ROOM)
  reused, handles = answers(engine, requests)
  assert reused == plain
  assert [handle.reused_tokens for handle in handles] == [0, 32, 32]
  assert engine.stats.reused_tokens == 64
  assert engine.stats.prompt_tokens == sum(len(request.tokens) for request in requests) - 64
  again, (handle,) = answers(engine, [requests[1]])
  assert again == [plain[1]] and handle.reused_tokens == 48
  check_pages(engine)


def test_shared_pages_are_held_by_all_who_read_them(model):
  engine = Engine(model, **ROOM)
  prompt = prompts(40)[0]
  answers(engine, [Request(prompt, 1)])
  assert engine.stats.pages_used == engine.stats.pages_cached == 8
  handles = [engine.submit(Request(prompt, 9, seed=seed)) for seed in (1, 2)]
  while engine.stats.running < 2:
    engine.step()
  tables = [engine._table[job.slot] for job in engine._jobs if job is not None]
  np.testing.assert_array_equal(tables[0][:8], tables[1][:8])
  assert not set(tables[0][8:11]) & set(tables[1][8:11]) - {-1}
  assert {engine._pool.holders(page) for page in tables[0][:8]} == {3}
  engine.cancel(handles[0])
  assert {engine._pool.holders(page) for page in tables[1][:8]} == {2}
  engine.run()
  check_pages(engine)


def test_no_program_is_compiled_after_the_first_of_each_length(model):
  engine = Engine(model, **ROOM)
  sizes = lambda: [program._cache_size() for program in engine._programs]
  answers(engine, [Request(p, 3, logprobs=1) for p in (*prompts(40, 3), prompts(40)[0])])
  before = sizes()
  assert min(before) >= 1
  answers(Engine(model, **ROOM), REQUESTS)
  mixed = [Request(p, 1 + i, temperature=i / 3, top_k=i, seed=i) for i, p in
           enumerate(prompts(1, 16, 17, 31, 50, 5, seed=4))]
  answers(engine, mixed)
  assert sizes() == before


def test_cancelling_frees_slot_and_pages_at_once(model):
  engine = Engine(model, max_prefixes=0, **ROOM)
  running, joining, waiting = (engine.submit(Request(p, 9)) for p in prompts(3, 40, 5))
  engine.step()
  engine.step()
  assert len(running.tokens) == 2 and not joining.tokens and engine.stats.running == 2
  before = engine.stats.pages_used
  engine.cancel(joining)
  assert engine.stats.pages_used == before - 11 and engine.stats.running == 1
  engine.cancel(waiting)
  engine.cancel(running)
  assert engine.stats.pages_used == 0 and not engine.busy and engine.step() == []
  for handle in (running, joining, waiting):
    engine.cancel(handle)                          # again: nothing
    assert handle.finish_reason == "cancelled" and handle.error is None
  assert answers(engine, [REQUESTS[1]])[0][0][0]   # the engine goes on
  check_pages(engine)


def test_nan_logits_end_their_request_alone(model, alone):
  """The embedding of one token, which no other request has, is NaN."""
  taken = {int(t) for r, (tokens, _) in zip(REQUESTS, alone) for t in [*r.tokens, *tokens]}
  bad = max(set(range(256)) - taken)
  broken = jax.tree.map(lambda leaf: leaf, model)
  broken.embedding = nnx.Param(model.embedding[...].at[bad].set(jnp.nan))
  engine = Engine(broken, num_pages=FEW, **ROOM)
  poison = np.array([*range(17), bad])
  handles = [engine.submit(request) for request in
             (REQUESTS[0], Request(poison, 5), *REQUESTS[1:5], Request(poison[:17], 2))]
  engine.run()
  nan = handles.pop(1)
  assert nan.finish_reason == "error" and nan.tokens == []
  with pytest.raises(FloatingPointError, match="new token 0 are NaN"):
    nan.result()
  assert handles.pop().finish_reason == "length"
  assert [(handle.tokens, handle.logprobs) for handle in handles] == alone[:5]
  engine.submit(Request([bad] * 33, 5))
  engine.run()
  assert engine.stats.pages_used == 0              # nobody goes on from a prefix that holds a NaN
  check_pages(engine)


def test_log_probabilities_are_the_models(model):
  request = REQUESTS[1]
  [(tokens, logprobs)], _ = answers(Engine(model, **ROOM), [request])
  row = np.concatenate([request.tokens, tokens])[None]
  whole = jax.nn.log_softmax(jax.jit(lambda model, row: model(row))(model, row)[0], axis=-1)
  whole = np.asarray(whole[len(request.tokens) - 1:-1])
  assert_close(np.array([entry.logprob for entry in logprobs]),
               whole[np.arange(len(tokens)), tokens], "decode_f32")
  for entry, expected in zip(logprobs, whole):
    best = np.argsort(-expected)[:2]
    assert [token for token, _ in entry.top] == best.tolist()
    assert_close(np.array([value for _, value in entry.top]), expected[best], "decode_f32")


def test_stop_tokens_and_text(model):
  engine = Engine(model, tokenizer=ByteTokenizer(), **ROOM)
  prompt = ByteTokenizer().encode("def f(")
  free = Request(prompt, 20, seed=5)
  expected = generate_text(model, ByteTokenizer(), "def f(", 20, seed=5)
  _, (handle,) = answers(engine, [free])
  assert handle.text == expected and handle.finish_reason == "length"
  stop = handle.tokens[4]
  first = handle.tokens.index(stop)
  _, (ended,) = answers(engine, [dataclasses.replace(free, stop_tokens=(stop,))])
  assert ended.tokens == handle.tokens[:first + 1] and ended.finish_reason == "stop"
  assert ended.text == ByteTokenizer().decode(handle.tokens[:first])
  for stop in ("", ("x", "")):
    with pytest.raises(UserError, match="a stop string is empty"):
      engine.submit(dataclasses.replace(free, stop=stop))
  late, early = expected[9:11], expected[6:8]
  assert expected.index(early) < expected.index(late)
  _, (cut,) = answers(engine, [dataclasses.replace(free, stop=(late, early))])
  assert cut.text == expected[:expected.index(early)] and cut.finish_reason == "stop"
  assert len(cut.tokens) < 20
  pieces, handle, seen = "", engine.submit(free), 0
  while engine.busy:
    for changed in engine.step():
      assert changed is handle and changed.text.startswith(pieces) and len(changed.tokens) > seen
      pieces, seen = changed.text, len(changed.tokens)
  assert pieces == expected and seen == 20
  check_pages(engine)


def test_a_tokenizer_that_fails_ends_its_request_alone(model, alone):
  class Failing(ByteTokenizer):
    def decode(self, ids):
      if list(ids)[-1:] == [alone[4][0][2]]:
        raise KeyError("no such token")
      return super().decode(ids)

  engine = Engine(model, tokenizer=Failing(), **ROOM)
  failed, other = (engine.submit(REQUESTS[i]) for i in (4, 6))
  engine.run()
  assert failed.finish_reason == "error" and failed.tokens == alone[4][0][:3]
  with pytest.raises(KeyError, match="no such token"):
    failed.result()
  assert other.tokens == alone[6][0]
  check_pages(engine)


def test_heads_split_over_a_mesh(model, alone):
  mesh = make_mesh(MeshConfig(fsdp=1, tensor=2), jax.devices()[:2])
  engine = Engine(jax.device_put(model, shardings(model, mesh)), **ROOM)
  for _ in range(2):                               # the second with a prefix
    [(tokens, _)], (handle,) = answers(engine, [REQUESTS[0]])
    assert tokens == alone[0][0]
  assert handle.reused_tokens == 32
  pages = engine._groups[0].k_pages
  assert pages.addressable_shards[0].data.shape[2] == 1 and pages.shape[2] == 2
  check_pages(engine)


def test_memory_decides_the_number_of_pages(model):
  size = lambda engine: sum(leaf.nbytes for leaf in jax.tree.leaves(engine._groups))
  whole = size(Engine(model, num_pages=9, **ROOM))
  page = size(Engine(model, num_pages=10, **ROOM)) - whole
  for extra in (0, page - 1):
    engine = Engine(model, memory_bytes=whole + extra, **ROOM)
    assert engine.stats.pages == 9 and size(engine) == whole
  assert Engine(model, **ROOM).stats.pages == 45


@pytest.mark.parametrize("changes, message", [
  (dict(tokens=[]), "the prompt is empty"),
  (dict(tokens=[[1, 2]]), r"has shape \(1, 2\)"),
  (dict(tokens=[1.5]), "are float64; give integers"),
  (dict(tokens=[2**70]), "give integers"),
  (dict(tokens=[256]), "token 256 is outside the vocabulary of 256"),
  (dict(tokens=[-1]), "token -1 is outside"),
  (dict(tokens=np.zeros(50, int), max_new_tokens=11), "50 tokens .* make 61; .* room for 60"),
  (dict(tokens=np.zeros(40, int), max_new_tokens=9), "needs 13 pages of the cache, which has 12"),
  (dict(max_new_tokens=0), "max_new_tokens is 0"),
  (dict(temperature=float("nan")), "temperature is nan"),
  (dict(top_k=-1), "top_k is -1"),
  (dict(top_p=1.5), "top_p is 1.5"),
  (dict(seed=-1), "seed is -1"),
  (dict(seed=2**63), "seed is 9223372036854775808; .* less than 2..63"),
  (dict(stop="x"), "stop strings need an engine with a tokenizer"),
  (dict(logprobs=6), "logprobs is 6; it must be from 0 to 5"),
  (dict(logprobs=-1), "logprobs is -1"),
], ids=str)
def test_bad_requests_are_refused_in_one_line(model, changes, message):
  engine = Engine(model, num_pages=12, **ROOM)
  with pytest.raises(UserError, match=message) as error:
    engine.submit(Request(**(dict(tokens=[1, 2], max_new_tokens=2) | changes)))
  assert "\n" not in str(error.value) and not engine.busy


@pytest.mark.parametrize("changes, message", [
  (dict(slots=0), "slots is 0"),
  (dict(max_tokens=1), "max_tokens is 1"),
  (dict(chunk=10), "chunk=10 is no multiple of the block size 4"),
  (dict(num_pages=0), "num_pages is 0"),
  (dict(max_prefixes=-1), "max_prefixes is -1"),
  (dict(num_pages=4, memory_bytes=10**6), "num_pages or memory_bytes, not both"),
  (dict(memory_bytes=100), "memory_bytes is 100; the rings of 3 slots take"),
], ids=str)
def test_bad_engines_are_refused_in_one_line(model, changes, message):
  with pytest.raises(UserError, match=message) as error:
    Engine(model, **(ROOM | changes))
  assert "\n" not in str(error.value)


def test_rows_split_over_a_mesh_are_refused(model):
  mesh = make_mesh(MeshConfig(data=2, fsdp=1), jax.devices()[:2])
  with pytest.raises(UserError, match="not split over data, fsdp or expert") as error:
    Engine(jax.device_put(model, shardings(model, mesh)), **ROOM)
  assert "\n" not in str(error.value)
