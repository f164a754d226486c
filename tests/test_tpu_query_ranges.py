"""The TPU kernels on any range of the queries: offsets, fewer or more keys than queries, segments.

Against the reference, and a range cut out of a sequence against the same rows of the whole, in
strict TPU interpret mode.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels.block_sparse_attention.tpu import op as block_sparse_tpu
from pallas_kernels.block_sparse_attention.tpu.op import LoopConfig, Options
from pallas_kernels.oracle_attention.tpu import op as oracle_tpu
from pallas_kernels.sliding_window_attention.tpu import op as window_tpu
from pallas_kernels.sparse_layer_attention.tpu import op as layer_tpu
from tests import tpu_interpret
from tests.attention_inputs import normal, packed_segments, qkv
from tests.older import older
from tests.tolerances import assert_close
from tests.tpu_interpret import race_detectors  # noqa: F401  (a fixture)

BLOCK, WINDOW, SCALE = 16, 40, 0.2
HEADS, KV_HEADS, WIDTH = 4, 2, 64
OPTIONS = Options(LoopConfig(2, 2, 2), LoopConfig(2, 2, 2), interpret=tpu_interpret.INTERPRET)
DENSE = dataclasses.replace(OPTIONS, dense=True, dense_forward=LoopConfig(2, 1, 1),
                            dense_backward=LoopConfig(2, 1, 1))


def op_of(name, kernel, options=OPTIONS):
  """op(arrays, blocks, offsets and segments) -> (out, selected blocks or None)."""
  if not kernel:
    run = dict(implementation="reference")
    oracle, window, sparse, layer = (
      pallas_kernels.oracle_attention, pallas_kernels.sliding_window_attention,
      pallas_kernels.block_sparse_attention, pallas_kernels.sparse_layer_attention)
  else:
    run = {"interpret": options.interpret} if name in ("oracle", "window") else {"options": options}
    oracle, window, sparse, layer = (
      oracle_tpu.oracle_attention, window_tpu.sliding_window_attention,
      block_sparse_tpu.block_sparse_attention, layer_tpu.sparse_layer_attention)
  run["scale"] = SCALE

  def attend(arrays, blocks, where):
    q, k, v, *more = arrays
    where = {"segment_ids": None} | where
    if name == "oracle":
      return oracle(q, k, v, block_size=BLOCK, num_blocks=3, **where, **run)
    if name == "window":
      return window(q, k, v, window=WINDOW, sinks=more[0], **where, **run), None
    if name == "sparse":
      return sparse(q, k, v, blocks, block_size=BLOCK, sinks=more[0], **where, **run), None
    k_local, v_local, sinks, *gates = more
    gates = gates or (None, None)
    return layer(q, k, v, blocks, k_local, v_local, *gates, sinks_sparse=sinks, sinks_local=sinks,
                 block_size=BLOCK, window=WINDOW, **where, **run), None

  return attend


def arrays_of(name, batch, num_queries, num_keys, local_keys=None):
  q, k, v = qkv(1, batch, num_queries, HEADS, KV_HEADS, WIDTH, keys=num_keys)
  if name == "oracle":
    return [q, k, v]
  if name in ("window", "sparse"):
    return [q, k, v, normal(4, HEADS)]
  local = [normal(seed, batch, local_keys or num_keys, KV_HEADS, WIDTH) for seed in (5, 6)]
  gates = [jax.nn.sigmoid(normal(seed, batch, num_queries, HEADS, 1)) for seed in (7, 8)]
  return [q, k, v, *local, normal(4, HEADS), *(gates if name == "layer" else [])]


def blocks_at(positions, num_keys, seed=9):
  """i32 [B,K,T,P]: distinct blocks at or before each query's, its own mostly among them."""
  rng = np.random.default_rng(seed)
  found = np.full((positions.shape[0], KV_HEADS, positions.shape[1], 3), -1, np.int32)
  for b, k, t in np.ndindex(found.shape[:3]):
    count = min(positions[b, t], num_keys - 1) // BLOCK + 1
    some = rng.permutation(count)[:3]
    if count - 1 not in some and t % 4:
      some[0] = count - 1
    found[b, k, t, :len(some)] = np.sort(some)
  return jnp.asarray(found)


def values_and_grads(attend, arrays, blocks, where, cotangent):
  def run(arrays, blocks, where, cotangent):
    out, pullback, aux = jax.vjp(lambda arrays: attend(arrays, blocks, where), arrays,
                                 has_aux=True)
    return out, aux, pullback(cotangent)[0]
  static = {n: x for n, x in where.items() if isinstance(x, int)}
  traced = {n: x for n, x in where.items() if n not in static}
  return jax.jit(lambda arrays, blocks, traced, cotangent: run(
    arrays, blocks, static | traced, cotangent))(arrays, blocks, traced, cotangent)


# op, T, S, offset (int: static; tuple: traced, one a row), segmented
CASES = {
  "oracle, static, short tail": ("oracle", 130, 300, 170, False),
  "oracle, traced, segments": ("oracle", 70, 290, (3, 201), True),
  "oracle, behind the keys": ("oracle", 40, 150, (100, 140), False),
  "window, static, segments": ("window", 90, 310, 133, True),
  "window, traced, behind the keys": ("window", 150, 200, (0, 171), False),
  "sparse, static, segments": ("sparse", 60, 150, 85, True),
  "sparse, traced": ("sparse", 50, 140, (90, 7), False),
  "sparse, dense, traced": ("sparse", 50, 141, (91, 70), True),
  "sparse, behind the keys": ("sparse", 40, 75, 50, False),
  "layer, traced, segments": ("layer", 50, 140, (83, 9), True),
  "layer without gates, static": ("ungated", 45, 120, 75, False),
}


@pytest.mark.parametrize("case", older(
  CASES, "oracle, traced, segments", "window, traced, behind the keys", "sparse, traced",
  "layer, traced, segments"))
def test_values_gradients_and_selection(case, monkeypatch):
  name, T, S, offset, segmented = CASES[case]
  tpu_interpret.small_tiles(monkeypatch)
  batch = 1 if isinstance(offset, int) else 2
  local = 40 if name in ("layer", "ungated") else 0       # of the keys that the local branch lacks
  arrays = arrays_of(name, batch, T, S, S - local)
  start = np.broadcast_to(np.asarray(offset, np.int32), (batch,))
  positions = start[:, None] + np.arange(T, dtype=np.int32)
  where = {"query_offset": offset if isinstance(offset, int) else jnp.asarray(start)}
  if local:
    where["local_query_offset"] = (offset - local if isinstance(offset, int)
                                   else jnp.asarray(np.maximum(start - local, 0)))
  hidden = np.zeros((batch, T), bool)
  if segmented:
    kv = packed_segments(10, batch, S, padding=5)
    segments = np.take_along_axis(kv, np.minimum(positions, S - 1), axis=1)
    segments[:, T // 2:T // 2 + 3] = 0
    hidden = segments == 0
    where |= {"segment_ids": jnp.asarray(segments), "kv_segment_ids": jnp.asarray(kv)}
    if local:
      where["local_kv_segment_ids"] = jnp.asarray(kv[:, local:])
  blocks = blocks_at(positions, S)
  cotangent = normal(11, batch, T, HEADS, WIDTH)
  options = DENSE if "dense" in case else OPTIONS
  got = values_and_grads(op_of(name, True, options), arrays, blocks, where, cotangent)
  want = values_and_grads(op_of(name, False), arrays, blocks, where, cotangent)
  tpu_interpret.assert_like_reference(got[0], want[0], "float32")
  if name == "oracle":
    np.testing.assert_array_equal(got[1], want[1])
    assert (np.asarray(got[1]).transpose(0, 2, 1, 3)[hidden] == -1).all()
  assert (np.asarray(got[0])[hidden] == 0).all()
  for grad, wanted in zip(got[2], want[2], strict=True):
    tpu_interpret.assert_like_reference(grad, wanted, "float32", grad=True)


@pytest.mark.parametrize("name", older(["oracle", "window", "sparse", "layer"], "window"))
def test_a_cut_sequence_equals_the_whole(name, monkeypatch):
  """Ranges of 1, 7, 64 and 65, cut mid-block: the same rows, gradients that add up."""
  tpu_interpret.small_tiles(monkeypatch)
  total, cuts = 137, (0, 1, 8, 72, 137)
  arrays = arrays_of(name, 1, total, total)
  by_row = [i for i, x in enumerate(arrays) if i == 0 or i > 5]          # q and gates
  blocks = blocks_at(np.arange(total, dtype=np.int32)[None], total)
  cotangent = normal(12, 1, total, HEADS, WIDTH)
  attend = op_of(name, True)
  whole = values_and_grads(attend, arrays, blocks, {"query_offset": 0}, cotangent)
  sums = [jnp.zeros_like(x) for x in arrays]
  for a, b in zip(cuts, cuts[1:]):
    some = [x[:, a:b] if i in by_row else x for i, x in enumerate(arrays)]
    where = {"query_offset": a}
    if name == "layer":
      where["local_query_offset"] = a
    out, picked, grads = values_and_grads(attend, some, blocks[:, :, a:b], where,
                                          cotangent[:, a:b])
    assert_close(out, whole[0][:, a:b], "attention_routes_f32")
    if picked is not None:
      np.testing.assert_array_equal(picked, whole[1][:, :, a:b])
    sums = [x.at[:, a:b].set(g) if i in by_row else x + g
            for i, (x, g) in enumerate(zip(sums, grads))]
  for got, want in zip(sums, whole[2], strict=True):
    assert_close(got, want, "attention_grad_f32")


@pytest.mark.parametrize("absent", ["sparse", "local"])
def test_an_absent_branch(absent):
  T, S, offset = 30, 100, 61
  q, k, v, sinks = arrays_of("sparse", 1, T, S)
  gate = jax.nn.sigmoid(normal(7, 1, T, HEADS, WIDTH))
  blocks = blocks_at(offset + np.arange(T, dtype=np.int32)[None], S)
  cotangent = normal(12, 1, T, HEADS, WIDTH)

  def attend(op, **run):
    def one(arrays, blocks, where):
      q, k, v, sinks, gate = arrays
      if absent == "sparse":
        return op(q, None, None, None, k, v, None, gate, sinks_local=sinks, window=WINDOW,
                  local_query_offset=offset, scale=SCALE, **run), None
      return op(q, k, v, blocks, None, None, gate, None, sinks_sparse=sinks, block_size=BLOCK,
                query_offset=offset, scale=SCALE, **run), None
    return values_and_grads(one, [q, k, v, sinks, gate], blocks, {}, cotangent)

  got = attend(layer_tpu.sparse_layer_attention, options=OPTIONS)
  want = attend(pallas_kernels.sparse_layer_attention, implementation="reference")
  tpu_interpret.assert_like_reference(got[0], want[0], "float32")
  for grad, wanted in zip(got[2], want[2], strict=True):
    tpu_interpret.assert_like_reference(grad, wanted, "float32", grad=True)


def test_a_block_that_no_tile_divides_hides_its_later_keys():
  """Tiles of 32 tokens, blocks of 24: two of a list's blocks hold keys after a tile's tokens."""
  q, k, v, sinks = arrays_of("sparse", 1, 100, 100)
  q = jnp.concatenate([q, q], axis=2)                                # G=4: tiles of 32 tokens
  blocks = jnp.broadcast_to(jnp.arange(5, dtype=jnp.int32), (1, KV_HEADS, 100, 5))
  options = dict(block_size=24, sinks=None, scale=SCALE)
  got = jax.jit(lambda: block_sparse_tpu.block_sparse_attention(
    q, k, v, blocks, options=dataclasses.replace(OPTIONS, forward=LoopConfig(4, 1, 2)),
    **options))()
  want = pallas_kernels.block_sparse_attention(q, k, v, blocks, implementation="reference",
                                               **options)
  tpu_interpret.assert_like_reference(got, want, "float32")


def test_plan_leaves_lead_with_batch_and_kv_heads():
  blocks = blocks_at(np.arange(50, dtype=np.int32)[None] + np.array([[5], [90]], np.int32), 140)
  plan = pallas_kernels.plan_blocks(
    blocks, num_heads=HEADS, num_keys=140, block_size=BLOCK, implementation="mosaic_tpu",
    query_offset=jnp.array([5, 90], jnp.int32))
  assert {leaf.shape[:2] for leaf in jax.tree.leaves(plan)} == {(2, KV_HEADS)}
  np.testing.assert_array_equal(plan.positions[:, 0, 0], [5, 90])
  assert (plan.num_keys, plan.query_offset, plan.may_pass_end) == (140, None, True)
