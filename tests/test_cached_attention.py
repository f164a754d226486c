"""The cached ops: the same values as float64 loops, one pass and each other; NaN is never read."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels.cached_attention.shapes import SHAPES
from pallas_kernels.reference import masked_attention
from tests import float64_loops as loops
from tests.attention_inputs import jitted, normal, qkv, random_blocks
from tests.tolerances import assert_close

cached_oracle_attention = jitted(pallas_kernels.cached_oracle_attention)
cached_block_sparse_attention = jitted(pallas_kernels.cached_block_sparse_attention)
cached_sliding_window_attention = jitted(pallas_kernels.cached_sliding_window_attention)


def positions(starts, tokens):
  return np.asarray(starts, np.int32)[:, None] + np.arange(tokens, dtype=np.int32)


def poison_after(x, last):
  """NaN in every slot after the row's last position."""
  slots = np.arange(x.shape[1])
  return jnp.where((slots <= np.asarray(last)[:, None])[..., None, None], x, jnp.nan)


def starts_of(s, tokens):
  """A first position per row: the very first, the very last, and one between."""
  return [0, s.tokens - tokens, (s.tokens - tokens) // 2][:s.batch]


def cache(s, seed, tokens, dtype="float32"):
  _, k, v = qkv(seed, s.batch, tokens, s.num_heads, s.num_kv_heads, s.head_dim, s.v_dim, dtype,
                keys=s.tokens)
  return normal(seed, s.batch, tokens, s.num_heads, s.head_dim, dtype=dtype), k, v


@pytest.mark.parametrize("tokens", [1, 2, 30])
@pytest.mark.parametrize("name", ["small", "one_head"])
def test_cached_oracle(name, tokens):
  s = SHAPES[name]
  q, k, v = cache(s, 1, tokens)
  at = positions(starts_of(s, tokens), tokens)
  out, indices = cached_oracle_attention(
    q, poison_after(k, at[:, -1]), poison_after(v, at[:, -1]), jnp.asarray(at),
    block_size=s.block_size, num_blocks=s.num_blocks)
  visible = loops.visible_keys(tokens, positions=at, num_keys=s.tokens)
  want, log_weights = loops.attention(q, k, v, visible)
  scores = loops.block_scores(log_weights, (s.batch, tokens, s.num_heads),
                              s.num_heads // s.num_kv_heads, s.block_size)
  want_indices, gap = loops.select(scores, (s.batch, tokens), s.num_kv_heads, s.num_blocks)
  assert gap > 2e-6
  assert_close(out, want, "attention_f32")
  np.testing.assert_array_equal(indices, want_indices)


def test_cached_oracle_without_blocks():
  s = SHAPES["small"]
  q, k, v = cache(s, 2, 5)
  at = positions(starts_of(s, 5), 5)
  out, indices = cached_oracle_attention(q, poison_after(k, at[:, -1]), v, jnp.asarray(at),
                                         num_blocks=0)
  assert indices.shape == (s.batch, s.num_kv_heads, 5, 0)
  visible = loops.visible_keys(5, positions=at, num_keys=s.tokens)
  assert_close(out, loops.attention(q, k, v, visible)[0], "attention_f32")


@pytest.mark.parametrize("dtype,sinks,tolerance", [("float32", True, "attention_f32"),
                                                   ("bfloat16", False, "attention_bf16")])
@pytest.mark.parametrize("tokens", [1, 2, 30])
@pytest.mark.parametrize("name", ["small", "one_head"])
def test_cached_block_sparse(name, tokens, dtype, sinks, tolerance):
  s = SHAPES[name]
  q, k, v = cache(s, 3, tokens, dtype)
  at = positions(starts_of(s, tokens), tokens)
  everywhere = random_blocks(4, s.batch, s.num_kv_heads, s.tokens, s.num_blocks, s.block_size)
  blocks = np.stack([everywhere[b][:, at[b]] for b in range(s.batch)])
  sinks = normal(5, s.num_heads) if sinks else None
  out = cached_block_sparse_attention(
    q, poison_after(k, at[:, -1]), poison_after(v, at[:, -1]), jnp.asarray(blocks),
    jnp.asarray(at), block_size=s.block_size, sinks=sinks)
  visible = loops.visible_keys(tokens, positions=at, num_keys=s.tokens, blocks=blocks,
                               block_size=s.block_size)
  assert out.dtype == q.dtype
  assert_close(out, loops.attention(q, k, v, visible, sinks)[0], tolerance)


def test_one_token_reads_only_the_picked_blocks():
  """All else is NaN, and the compiled program's work does not grow with the cache."""
  s = SHAPES["small"]
  q, k, v = cache(s, 6, 1)
  at = jnp.full((s.batch, 1), s.tokens - 1, jnp.int32)
  blocks = jnp.broadcast_to(jnp.asarray([2, 5, 11], jnp.int32), (s.batch, s.num_kv_heads, 1, 3))
  picked = np.isin(np.arange(s.tokens) // s.block_size, [2, 5, 11])[:, None, None]
  clean = cached_block_sparse_attention(q, k, v, blocks, at, block_size=s.block_size)
  poisoned = cached_block_sparse_attention(q, jnp.where(picked, k, jnp.nan),
                                           jnp.where(picked, v, jnp.nan), blocks, at,
                                           block_size=s.block_size)
  np.testing.assert_array_equal(clean, poisoned)

  def flops(cache_tokens):
    kv = jax.ShapeDtypeStruct((1, cache_tokens, 2, 16), jnp.float32)
    lowered = jax.jit(pallas_kernels.cached_block_sparse_attention).lower(
      jax.ShapeDtypeStruct((1, 1, 4, 16), jnp.float32), kv, kv,
      jax.ShapeDtypeStruct((1, 2, 1, 4), jnp.int32), jax.ShapeDtypeStruct((1, 1), jnp.int32))
    return lowered.cost_analysis()["flops"]

  assert flops(512) == flops(65_536) > 0


@pytest.mark.parametrize("tokens", [1, 3])
def test_a_layer_of_a_stack_is_that_layer(tokens):
  s = SHAPES["small"]
  q, k, v = cache(s, 15, tokens)
  at = jnp.asarray(positions(starts_of(s, tokens), tokens))
  stack = [jnp.full((3, *x.shape), jnp.nan).at[1].set(x) for x in (k, v)]
  options = dict(block_size=s.block_size)
  out, indices = cached_oracle_attention(q, k, v, at, num_blocks=s.num_blocks, **options)
  got, got_indices = cached_oracle_attention(q, *stack, at, num_blocks=s.num_blocks,
                                             layer=jnp.int32(1), **options)
  assert_close(got, out, "attention_routes_f32")
  np.testing.assert_array_equal(got_indices, indices)
  sparse = cached_block_sparse_attention(q, k, v, indices, at, **options)
  assert_close(cached_block_sparse_attention(q, *stack, indices, at, layer=jnp.int32(1), **options),
               sparse, "attention_routes_f32")
  with pytest.raises(ValueError, match=r"k has shape .*; wanted \[C,B=3,S,K,H=16\]"):
    cached_oracle_attention(q, k, v, at, layer=jnp.int32(1))


def ring_of(x, first, window):
  """Slot p % window holds the newest position p < first; NaN where there is none."""
  ring = np.full((x.shape[0], window, *x.shape[2:]), np.nan, np.float32)
  for b in range(x.shape[0]):
    for p in range(int(first[b])):
      ring[b, p % window] = np.asarray(x[b, p], np.float32)
  return jnp.asarray(ring, x.dtype)


@pytest.mark.parametrize("dtype,sinks,tolerance", [("float32", True, "attention_f32"),
                                                   ("bfloat16", False, "attention_bf16")])
@pytest.mark.parametrize("tokens", [1, 2, 65])
@pytest.mark.parametrize("window", [1, 20, 100])
def test_cached_sliding_window(window, tokens, dtype, sinks, tolerance):
  s = SHAPES["small"]
  _, k, v = cache(s, 7, tokens, dtype)
  q = normal(8, s.batch, tokens, s.num_heads, s.head_dim, dtype=dtype)
  first = np.asarray(starts_of(s, tokens))
  at = positions(first, tokens)
  new_k, new_v = (jnp.stack([x[b, at[b]] for b in range(s.batch)]) for x in (k, v))
  sinks = normal(9, s.num_heads) if sinks else None
  out = cached_sliding_window_attention(q, ring_of(k, first, window), ring_of(v, first, window),
                                        new_k, new_v, jnp.asarray(at), window=window, sinks=sinks)
  visible = loops.visible_keys(tokens, positions=at, num_keys=s.tokens, window=window)
  assert out.dtype == q.dtype
  assert_close(out, loops.attention(q, k, v, visible, sinks)[0], tolerance)


@pytest.mark.parametrize("pieces", [(37,), (1,) * 37, (16, 1, 19, 1), (30, 7)])
def test_pieces_equal_one_pass(pieces):
  """Chunked prefill and token-by-token decode reproduce the uncached ops."""
  batch, tokens, heads, kv_heads, width, window = 2, 37, 4, 2, 8, 10
  options = dict(block_size=4, num_blocks=3)
  q, k, v = qkv(10, batch, tokens, heads, kv_heads, width)
  sinks = normal(13, heads)
  want, want_indices = jitted(pallas_kernels.oracle_attention)(q, k, v, **options)
  want_sparse = jitted(pallas_kernels.block_sparse_attention)(q, k, v, want_indices, block_size=4,
                                                              sinks=sinks)
  want_local = jitted(pallas_kernels.sliding_window_attention)(q, k, v, window=window, sinks=sinks)
  start = 0
  for piece in pieces:
    rows = slice(start, start + piece)
    at = jnp.asarray(positions([start] * batch, piece))
    k_cache, v_cache = (poison_after(x, [start + piece - 1] * batch) for x in (k, v))
    out, indices = cached_oracle_attention(q[:, rows], k_cache, v_cache, at, **options)
    sparse = cached_block_sparse_attention(q[:, rows], k_cache, v_cache, indices, at, block_size=4,
                                           sinks=sinks)
    first = [start] * batch
    local = cached_sliding_window_attention(
      q[:, rows], ring_of(k, first, window), ring_of(v, first, window), k[:, rows], v[:, rows], at,
      window=window, sinks=sinks)
    assert_close(out, want[:, rows], "attention_routes_f32")
    np.testing.assert_array_equal(indices, want_indices[:, :, rows])
    assert_close(sparse, want_sparse[:, rows], "attention_routes_f32")
    assert_close(local, want_local[:, rows], "attention_routes_f32")
    start += piece


def test_chunks_change_nothing(monkeypatch):
  s = SHAPES["small"]
  q, k, v = cache(s, 14, 30)
  at = jnp.asarray(positions(starts_of(s, 30), 30))
  options = dict(block_size=s.block_size, num_blocks=s.num_blocks)
  out, indices = cached_oracle_attention(q, k, v, at, **options)
  sparse = cached_block_sparse_attention(q, k, v, indices, at, block_size=s.block_size)
  monkeypatch.setattr(masked_attention, "KEPT_SCORES", 0)
  monkeypatch.setattr(masked_attention, "CHUNK_SCORES", 3 * 4 * 96 * 7)
  chunked, chunked_indices = jax.jit(
    lambda *a: pallas_kernels.cached_oracle_attention(*a, **options))(q, k, v, at)
  chunked_sparse = jax.jit(lambda *a: pallas_kernels.cached_block_sparse_attention(
    *a, block_size=s.block_size))(q, k, v, indices, at)
  assert_close(chunked, out, "attention_routes_f32")
  np.testing.assert_array_equal(chunked_indices, indices)
  assert_close(chunked_sparse, sparse, "attention_routes_f32")


@pytest.mark.parametrize("op,change,message", [
  ("cached_oracle_attention", dict(query_positions=jnp.zeros((1, 3), jnp.int32)),
   "query_positions has shape [1, 3]; wanted [B=1,T=2]"),
  ("cached_oracle_attention", dict(query_positions=jnp.zeros((1, 2))),
   "query_positions is float32; wanted int32"),
  ("cached_block_sparse_attention", dict(block_indices=jnp.zeros((1, 1, 2, 4), jnp.int32)),
   "block_indices has shape [1, 1, 2, 4]; wanted [B=1,K=2,T=2,P]"),
  ("cached_sliding_window_attention", dict(window=7),
   "k_ring has shape [1, 8, 2, 4]; wanted [B=1,W=7,K,H=4]"),
  ("cached_sliding_window_attention", dict(v_new=jnp.zeros((1, 3, 2, 4))),
   "v_new has shape [1, 3, 2, 4]"),
])
def test_bad_input_is_one_clear_line(op, change, message):
  kv, new = jnp.zeros((1, 8, 2, 4)), jnp.zeros((1, 2, 2, 4))
  arguments = dict(q=jnp.zeros((1, 2, 4, 4)), query_positions=jnp.zeros((1, 2), jnp.int32))
  arguments |= {
    "cached_oracle_attention": dict(k=kv, v=kv),
    "cached_block_sparse_attention": dict(k=kv, v=kv,
                                          block_indices=jnp.zeros((1, 2, 2, 4), jnp.int32)),
    "cached_sliding_window_attention": dict(k_ring=kv, v_ring=kv, k_new=new, v_new=new, window=8),
  }[op] | change
  with pytest.raises(ValueError) as error:
    getattr(pallas_kernels, op)(**arguments)
  assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("op", ["cached_oracle_attention", "cached_block_sparse_attention",
                                "cached_sliding_window_attention"])
def test_an_implementation_that_does_not_exist(op):
  q, kv = jnp.zeros((1, 1, 1, 4)), jnp.zeros((1, 8, 1, 4))
  at = jnp.zeros((1, 1), jnp.int32)
  arguments = {"cached_oracle_attention": (q, kv, kv, at),
               "cached_block_sparse_attention": (q, kv, kv, jnp.zeros((1, 1, 1, 2), jnp.int32), at),
               "cached_sliding_window_attention": (q, kv, kv, q, q, at)}[op]
  options = dict(window=8) if op == "cached_sliding_window_attention" else {}
  with pytest.raises(NotImplementedError, match=f"{op}.*'warp'.*'reference'"):
    getattr(pallas_kernels, op)(*arguments, implementation="warp", **options)
