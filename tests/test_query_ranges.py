"""The ops with queries that are not all keys: offsets, keys of another length, two segment ids.

Every op against the float64 loops, and any cut of the queries against the whole: outputs,
selections and gradients.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels.block_sparse_attention import reference as block_sparse_reference
from pallas_kernels.reference import masked_attention, windowed_attention
from tests import float64_loops as loops
from tests.attention_inputs import (
  cut_ranges,
  jitted,
  normal,
  packed_segments,
  qkv,
  query_positions,
  random_blocks,
)
from tests.tolerances import assert_close, assert_rows_close

HEADS, KV_HEADS, WIDTH, BLOCK, BLOCKS, WINDOW = 4, 2, 8, 8, 3, 20
OPS = {"oracle": jitted(pallas_kernels.oracle_attention),
       "block_sparse": jitted(pallas_kernels.block_sparse_attention),
       "window": jitted(pallas_kernels.sliding_window_attention),
       "wide_window": jitted(pallas_kernels.sliding_window_attention)}
WINDOWS = {"window": WINDOW, "wide_window": 1000}
EAGER = {"oracle": pallas_kernels.oracle_attention,
         "block_sparse": pallas_kernels.block_sparse_attention,
         "window": pallas_kernels.sliding_window_attention,
         "wide_window": pallas_kernels.sliding_window_attention}
EVERY_OP = pytest.mark.parametrize("op", sorted(OPS))


def call(op, q, k, v, blocks, sinks, offset, segments, kv_segments):
  """out and the selected blocks, or None. A Python offset stays static under jit."""
  run = OPS[op] if not isinstance(offset, int) else jax.jit(
    lambda *a, **o: EAGER[op](*a, query_offset=offset, **o, **static))
  static = (dict(window=WINDOWS[op]) if op in WINDOWS else
            dict(block_size=BLOCK) if op == "block_sparse" else
            dict(block_size=BLOCK, num_blocks=BLOCKS))
  arrays = dict(segment_ids=segments, kv_segment_ids=kv_segments)
  if op != "oracle":
    arrays["sinks"] = sinks
  options = arrays if isinstance(offset, int) else arrays | static | dict(query_offset=offset)
  out = run(q, k, v, *([blocks] if op == "block_sparse" else []), **options)
  return out if op == "oracle" else (out, None)


def visible(op, tokens, keys, positions, blocks, segments=None, kv_segments=None):
  limit = (dict(window=WINDOWS[op]) if op in WINDOWS else
           dict(blocks=np.asarray(blocks), block_size=BLOCK) if op == "block_sparse" else {})
  return loops.visible_keys(tokens, segments, positions=positions, num_keys=keys,
                            kv_segments=kv_segments, **limit)


def blocks_at(seed, positions, keys):
  """Random causal blocks of queries at these positions."""
  whole = random_blocks(seed, len(positions), KV_HEADS, int(positions.max()) + 1, BLOCKS, BLOCK)
  return np.stack([whole[b][:, row] for b, row in enumerate(positions)])


def problem(seed, tokens, keys, offset, packed):
  q, k, v = qkv(seed, 2, tokens, HEADS, KV_HEADS, WIDTH, 12, keys=keys)
  at = query_positions(offset, 2, tokens)
  segments = kv_segments = None
  if packed:
    kv_segments = packed_segments(seed, 2, keys, documents=3, padding=5)
    segments = np.take_along_axis(kv_segments, np.minimum(at, keys - 1), axis=1)
    segments[:, 1::7] = 0
  return q, k, v, blocks_at(seed, at, keys), normal(seed + 3, HEADS), at, segments, kv_segments


@EVERY_OP
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("tokens,keys,offset", [
  (20, 90, 37),                                # a static offset inside a block
  (20, 90, 88),                                # past the last key
  (5, 12, 400),                                # wholly past it
  (20, 90, jnp.int32(41)),                     # traced, one for all rows
  (9, 90, jnp.asarray([0, 86], jnp.int32)),    # a row each, the second past the end
  (7, 12, jnp.asarray([3, 150], jnp.int32)),
])
def test_values_selections_and_gradients_at_an_offset(op, tokens, keys, offset, packed):
  q, k, v, blocks, sinks, at, segments, kv_segments = problem(1, tokens, keys, offset, packed)
  has_sinks = op != "oracle"
  cotangent = normal(5, 2, tokens, HEADS, 12)

  def loss(q, k, v, sinks):
    out, picked = call(op, q, k, v, jnp.asarray(blocks), sinks, offset, segments, kv_segments)
    return (out * cotangent).sum(), (out, picked)

  grads, (out, picked) = jax.grad(loss, (0, 1, 2, 3), has_aux=True)(q, k, v, sinks)
  see = visible(op, tokens, keys, at, blocks, segments, kv_segments)
  want, log_weights = loops.attention(q, k, v, see, sinks if has_sinks else None)
  assert_close(out, want, "attention_f32")
  assert_rows_close(out, want, "attention_rows_f32")
  exact = loops.gradients(q, k, v, see, cotangent, sinks if has_sinks else None)
  for got, right in zip(grads[:3 + has_sinks], exact):
    assert_rows_close(got, right, "attention_grad_rows_f32", size=1e-2)
  if op == "oracle":
    scores = loops.block_scores(log_weights, (2, tokens, HEADS), HEADS // KV_HEADS, BLOCK)
    want_blocks, gap = loops.select(scores, (2, tokens), KV_HEADS, BLOCKS)
    assert gap > 2e-6
    np.testing.assert_array_equal(picked, want_blocks)


@EVERY_OP
@pytest.mark.parametrize("traced", [False, True])
def test_any_cut_of_the_queries_equals_the_whole(op, traced):
  """Ranges of 1, 7, 64 and 65 queries; the static cut gets only the keys up to its last query."""
  tokens = 137
  q, k, v, blocks, sinks, _, segments, _ = problem(11, tokens, tokens, 0, True)
  segments = packed_segments(11, 2, tokens, padding=9)
  blocks, cotangent = jnp.asarray(blocks), normal(15, 2, tokens, HEADS, 12)

  def part(q, k, v, sinks, start, stop):
    rows = slice(start, stop)
    reach = tokens if traced else stop
    offset = jnp.full((2,), start, jnp.int32) if traced else start
    return call(op, q[:, rows], k[:, :reach], v[:, :reach], blocks[:, :, rows], sinks, offset,
                segments[:, rows], segments[:, :reach])

  def loss(q, k, v, sinks, start, stop):
    out, picked = part(q, k, v, sinks, start, stop)
    return (out * cotangent[:, start:stop]).sum(), (out, picked)

  grad = jax.jit(jax.grad(loss, (0, 1, 2, 3), has_aux=True), static_argnums=(4, 5))
  want_grads, (want, want_picked) = grad(q, k, v, sinks, 0, tokens)
  total = None
  for start, stop in cut_ranges(tokens, 1, 7, 64, 65):
    grads, (out, picked) = grad(q, k, v, sinks, start, stop)
    assert_close(out, want[:, start:stop], "attention_routes_f32")
    if op == "oracle":
      np.testing.assert_array_equal(picked, want_picked[:, :, start:stop])
    total = grads if total is None else jax.tree.map(jnp.add, total, grads)
  for got, right in zip(total[:3 + (op != "oracle")], want_grads):
    assert_rows_close(got, right, "attention_grad_rows_f32")


@EVERY_OP
@pytest.mark.parametrize("offset", [30, jnp.asarray([30, 12], jnp.int32)])
def test_what_hidden_keys_hold_changes_no_bit(op, offset):
  """Finite garbage after the last query and in padding: same outputs, gradients 0 there."""
  tokens, keys = 20, 90
  q, k, v, blocks, sinks, at, _, _ = problem(21, tokens, keys, offset, False)
  kv_segments = np.ones((2, keys), np.int32)
  kv_segments[:, 3:9] = 0
  segments = np.ones((2, tokens), np.int32)
  hidden = (np.arange(keys) > at[:, -1:]) | (kv_segments == 0)
  junk = lambda x: jnp.where(hidden[..., None, None], 1e18, x)

  def loss(k, v):
    out, picked = call(op, q, k, v, jnp.asarray(blocks), sinks, offset, segments, kv_segments)
    return jnp.sin(out).sum(), (out, picked)

  run = jax.grad(loss, (0, 1), has_aux=True)
  (dk, dv), (out, picked) = run(k, v)
  (junk_dk, junk_dv), (junk_out, junk_picked) = run(junk(k), junk(v))
  np.testing.assert_array_equal(out, junk_out)
  if op == "oracle":
    np.testing.assert_array_equal(picked, junk_picked)
  for got, junk_got in ((dk, junk_dk), (dv, junk_dv)):
    np.testing.assert_array_equal(got, junk_got)
    assert (np.asarray(got)[hidden] == 0).all() and np.abs(got).max() > 0


@EVERY_OP
def test_a_traced_offset_goes_chunk_by_chunk(op, monkeypatch):
  """Past `KEPT_SCORES`: the same values, and no array of all scores in the compiled program."""
  tokens, keys, offset = 128, 300, jnp.asarray([0, 172], jnp.int32)
  q, k, v, blocks, sinks, *_ = problem(31, tokens, keys, offset, False)

  def loss(q, k, v):
    run = {"oracle": lambda: EAGER[op](q, k, v, block_size=BLOCK, num_blocks=BLOCKS,
                                       query_offset=offset)[0],
           "block_sparse": lambda: EAGER[op](q, k, v, jnp.asarray(blocks), block_size=BLOCK,
                                             sinks=sinks, query_offset=offset)}
    out = run.get(op, lambda: EAGER[op](q, k, v, window=WINDOWS[op], query_offset=offset))()
    return jnp.sin(out).sum(), out

  def compiled():
    grad = jax.grad(lambda *a: loss(*a), (0, 1, 2), has_aux=True)
    return jax.jit(grad).lower(q, k, v).compile()

  whole = compiled()
  for module, chunk in ((masked_attention, 2 * HEADS * keys * 5),
                        (windowed_attention, 2 * HEADS * 64 * 128)):
    monkeypatch.setattr(module, "KEPT_SCORES", 0)
    monkeypatch.setattr(module, "CHUNK_SCORES", chunk)
  chunked = compiled()
  all_scores = 4 * 2 * HEADS * tokens * (keys if op != "window" else 128)
  assert chunked.memory_analysis().temp_size_in_bytes < whole.memory_analysis().temp_size_in_bytes
  if op != "window":
    assert chunked.memory_analysis().temp_size_in_bytes < all_scores
  (grads, out), (chunked_grads, chunked_out) = whole(q, k, v), chunked(q, k, v)
  assert_close(chunked_out, out, "attention_routes_f32")
  for got, want in zip(chunked_grads, grads):
    assert_rows_close(got, want, "attention_grad_rows_f32")


BAD = [
  (dict(query_offset=-1), "query_offset=-1; wanted at least 0; drop the queries before key 0"),
  (dict(query_offset=np.asarray([0, -3], np.int32)), "query_offset=[ 0 -3]; wanted at least 0"),
  (dict(query_offset=1.0), "query_offset=1.0; wanted an int, or an i32 array [] or [B=2]"),
  (dict(query_offset=True), "query_offset=True; wanted an int"),
  (dict(query_offset=jnp.zeros(3, jnp.int32)), "query_offset has shape [3]; wanted [B=2]"),
  (dict(query_offset=jnp.zeros(2)), "query_offset is float32; wanted int32"),
  (dict(segment_ids=jnp.ones((2, 4), jnp.int32)),
   "got segment_ids without kv_segment_ids for T=4 queries and S=8 keys at query offset 0; wanted "
   "kv_segment_ids i32 [B,S] unless T=S at offset 0; give the keys' own segment ids too"),
  (dict(kv_segment_ids=jnp.ones((2, 8), jnp.int32)), "got kv_segment_ids without segment_ids"),
  (dict(segment_ids=jnp.ones((2, 4), jnp.int32), kv_segment_ids=jnp.ones((2, 4), jnp.int32)),
   "kv_segment_ids has shape [2, 4]; wanted [B=2,S=8]"),
]


@EVERY_OP
@pytest.mark.parametrize("change,message", BAD)
def test_bad_input_is_one_clear_line(op, change, message):
  q, kv = jnp.zeros((2, 4, 4, 4)), jnp.zeros((2, 8, 2, 4))
  blocks = [jnp.zeros((2, 2, 4, 3), jnp.int32)] if op == "block_sparse" else []
  with pytest.raises(ValueError) as error:
    EAGER[op](q, kv, kv, *blocks, **change)
  assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("packed", [False, True])
def test_rows_much_longer_than_a_selection_copy_its_keys(packed, monkeypatch):
  """The other route of the reference: the same outputs and gradients."""
  q, k, v, blocks, sinks, _, segments, kv_segments = problem(7, 13, 70, [5, 50], packed)
  blocks = jnp.asarray(blocks).at[0, :, 3].set(-1)                    # a query that selects nothing

  def run(gather_from):
    monkeypatch.setattr(block_sparse_reference, "GATHER_FROM", gather_from)
    op = lambda q, k, v, sinks: pallas_kernels.block_sparse_attention(
      q, k, v, blocks, block_size=BLOCK, sinks=sinks, query_offset=jnp.array([5, 50]),
      segment_ids=segments, kv_segment_ids=kv_segments)
    out, pullback = jax.vjp(op, q, k, v, sinks)
    return out, pullback(jnp.cos(out))

  copied, masked = run(1e-6), run(1e6)
  assert np.abs(masked[0]).max() > 0.1
  jax.tree.map(lambda a, b: assert_close(a, b, "gradient_f32"), copied, masked)
