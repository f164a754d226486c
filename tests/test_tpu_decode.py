"""Decode kernels for TPU against the reference, in strict TPU interpret mode; compiled at 128k."""

import dataclasses
import functools
import importlib.util
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels import tpu
from pallas_kernels.cached_attention import reference
from pallas_kernels.cached_attention.tpu import op as mosaic_tpu
from tests import tpu_interpret
from tests.attention_inputs import jitted, normal, qkv
from tests.tpu_interpret import race_detectors  # noqa: F401  (a fixture)

GENERATIONS = ["v5e", "v5p", "v6e"] if sys.version_info >= (3, 12) else ["v5p"]
SCALE = 0.1
needs_libtpu = pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None, reason="libtpu is not published for this platform")
oracle_reference = jitted(reference.cached_oracle_attention)
sparse_reference = jitted(reference.cached_block_sparse_attention)


@dataclasses.dataclass(frozen=True)
class Case:
  slots: int
  positions: tuple
  group: int = 1
  kv_heads: int = 2
  head_dim: int = 128
  v_dim: int | None = None
  dtype: str = "float32"
  block_size: int = 16
  num_blocks: int = 3
  layers: int | None = None
  sinks: bool = False
  interpret: object = tpu_interpret.INTERPRET


CASES = {
  # A piece of 64 slots, tails of 8: the start, middle and end of a block, and the last slot.
  "group of 1": Case(200, (64, 100, 127, 199), interpret=tpu_interpret.TWO_CORES),
  "group of 4, sinks": Case(136, (135, 70), group=4, kv_heads=8, dtype="bfloat16", sinks=True),
  "group of 16, wide": Case(160, (47, 130), group=16, kv_heads=1, head_dim=256, dtype="bfloat16"),
  "other v dim, a layer of three": Case(73, (72, 0), group=4, kv_heads=8, head_dim=256, v_dim=128,
                                        layers=3, sinks=True),
  "more picks than blocks": Case(192, (5, 191), group=4, block_size=64, num_blocks=8,
                                 dtype="bfloat16", sinks=True),
}


def small_pieces(monkeypatch, case):
  """Pieces of 4 blocks, two picked blocks to a step: short caches take several steps."""
  block = case.block_size * case.kv_heads * case.head_dim * jnp.dtype(case.dtype).itemsize
  monkeypatch.setattr(mosaic_tpu, "PIECE_BYTES", 4 * block)
  monkeypatch.setattr(mosaic_tpu, "GROUP_BYTES", 2 * block)


def inputs(case, seed=0):
  """q, k, v, positions i32 [B,1]; NaN after each row's position."""
  heads = case.group * case.kv_heads
  q, k, v = qkv(seed, len(case.positions), 1, heads, case.kv_heads, case.head_dim, case.v_dim,
                case.dtype, keys=case.slots)
  at = jnp.asarray(case.positions, jnp.int32)[:, None]
  written = (jnp.arange(case.slots) <= at)[..., None, None]
  return q, jnp.where(written, k, jnp.nan), jnp.where(written, v, jnp.nan), at


def some_blocks(case, seed):
  """i32 [B,K,1,P]: distinct blocks in any order, some of them not visible, a third -1."""
  rng = np.random.default_rng(seed)
  total = -(-case.slots // case.block_size)
  picked = np.full((len(case.positions), case.kv_heads, 1, case.num_blocks), -1, np.int32)
  for b, h in np.ndindex(*picked.shape[:2]):
    found = rng.permutation(total)[:case.num_blocks]
    picked[b, h, 0, :len(found)] = np.where(rng.random(len(found)) < 1 / 3, -1, found)
  picked[0, 0] = -1                                                    # a row that sees nothing
  return jnp.asarray(picked)


@pytest.mark.parametrize("name", CASES)
def test_like_the_reference(name, monkeypatch):
  case = CASES[name]
  small_pieces(monkeypatch, case)
  q, k, v, at = inputs(case)
  options = dict(block_size=case.block_size, scale=SCALE)
  run = dict(options, interpret=case.interpret)
  given = k, v
  if case.layers:
    given = [jnp.full((case.layers, *x.shape), jnp.nan, x.dtype).at[1].set(x) for x in (k, v)]
    run["layer"] = jnp.int32(1)
  exact = tpu_interpret.as_float32((q, k, v))
  out, picked = mosaic_tpu.cached_oracle_attention(q, *given, at, num_blocks=case.num_blocks, **run)
  want, want_picked = oracle_reference(*exact, at, num_blocks=case.num_blocks, **options)
  assert out.dtype == q.dtype
  tpu_interpret.assert_like_reference(out, want, case.dtype)
  np.testing.assert_array_equal(picked, want_picked)
  sinks = normal(5, q.shape[2]) if case.sinks else None
  for blocks in (picked, some_blocks(case, 6)):
    out = mosaic_tpu.cached_block_sparse_attention(q, *given, blocks, at, sinks=sinks, **run)
    want = sparse_reference(*exact, blocks, at, sinks=sinks, **options)
    assert out.dtype == q.dtype
    tpu_interpret.assert_like_reference(out, want, case.dtype)
  assert not np.asarray(out)[0, 0, :case.group].any()                  # exactly 0


def test_without_picks_in_one_piece():
  """The sizes that a TPU gets; plain attention, which writes no maxima."""
  case = Case(200, (199, 3), group=4)
  q, k, v, at = inputs(case)
  out, picked = mosaic_tpu.cached_oracle_attention(
    q, k, v, at, block_size=7, num_blocks=0, scale=SCALE, interpret=case.interpret)
  assert picked.shape == (2, 2, 1, 0)
  want, _ = oracle_reference(q, k, v, at, block_size=7, num_blocks=0, scale=SCALE)
  tpu_interpret.assert_like_reference(out, want, "float32")


def test_ties_go_to_the_lower_block(monkeypatch):
  """Blocks of the same keys weigh the same, within a piece and across pieces."""
  case = Case(160, (159, 150), group=4)
  small_pieces(monkeypatch, case)
  q, k, v, at = inputs(case)
  kinds = np.array([0, 1, 2, 0, 1, 2, 0, 1, 2, 0])
  k = jnp.concatenate([k[:1, 16 * kind:16 * kind + 16] for kind in kinds], axis=1)
  k = jnp.where((jnp.arange(160) <= at)[..., None, None], k, jnp.nan)
  _, picked = mosaic_tpu.cached_oracle_attention(
    q, k, v, at, block_size=16, num_blocks=5, scale=SCALE, interpret=case.interpret)
  _, want = oracle_reference(q, k, v, at, block_size=16, num_blocks=5, scale=SCALE)
  np.testing.assert_array_equal(picked, want)
  for blocks in np.asarray(picked)[0, :, 0]:       # of the row in which every block is complete
    all_of = [np.flatnonzero(kinds == kind).tolist() for kind in range(3)]
    used = [blocks[kinds[blocks] == kind].tolist() for kind in range(3)]
    # The whole of the best kind, then the lowest of the next.
    assert all(x == each[:len(x)] for x, each in zip(used, all_of))
    assert sorted(map(len, used)) in ([0, 1, 4], [0, 2, 3]) and any(
      x == each for x, each in zip(used, all_of))


def test_only_picked_blocks_and_no_slot_beyond_the_cache_is_read(monkeypatch):
  """All else is NaN; a full cache's next position reads the last slots, as the reference does."""
  case = Case(72, (71, 72), group=4)
  small_pieces(monkeypatch, case)
  q, k, v, at = inputs(case)
  blocks = jnp.broadcast_to(jnp.asarray([0, 2, 4], jnp.int32), (2, 2, 1, 3))
  kept = np.isin(np.arange(72) // 16, [0, 2, 4])[:, None, None]
  options = dict(block_size=16, sinks=None, scale=SCALE)
  out = mosaic_tpu.cached_block_sparse_attention(
    q, *(jnp.where(kept, x, jnp.nan) for x in (k, v)), blocks, at, interpret=case.interpret,
    **options)
  tpu_interpret.assert_like_reference(
    out, sparse_reference(q, k, v, blocks, at, **options), "float32")
  out, _ = mosaic_tpu.cached_oracle_attention(
    q, k, v, at, block_size=16, num_blocks=0, scale=SCALE, interpret=case.interpret)
  want, _ = oracle_reference(q, k, v, at, block_size=16, num_blocks=0, scale=SCALE)
  tpu_interpret.assert_like_reference(out, want, "float32")


@pytest.mark.parametrize("tokens, change, message", [
  (2, {}, "T=2; wanted T=1"), (1, dict(head_dim=64), "head dim 64; wanted 128 or 256"),
  (1, dict(kv_heads=3), "K=3 of head dim 128; wanted 1, 2, 4, a multiple of 8"),
  (1, dict(kv_heads=1, head_dim=256), "K=1 of head dim 256; wanted a multiple of 8"),
  (1, dict(kv_heads=1, slots=90), "S.K=90; wanted a multiple of 8"),
  (1, dict(block_size=12), "block_size=12; wanted a multiple of 8"),
  (1, dict(dtype="float16"), "q, k, v are float16")])
def test_limits_are_named(tokens, change, message):
  case = dataclasses.replace(Case(96, (95,)), **change)
  q, k, v, at = inputs(case)
  q, at = jnp.repeat(q, tokens, axis=1), jnp.repeat(at, tokens, axis=1)
  blocks = jnp.zeros((1, case.kv_heads, tokens, 2), jnp.int32)
  options = dict(block_size=case.block_size, implementation="mosaic_tpu")
  for op, given in (("cached_oracle_attention", ()), ("cached_block_sparse_attention", (blocks,))):
    with pytest.raises(NotImplementedError, match=f"{op} mosaic_tpu: {message}"):
      getattr(pallas_kernels, op)(q, k, v, *given, at, **options)


@needs_libtpu
@pytest.mark.parametrize("heads, kv_heads", [(32, 8), (64, 4)])
@pytest.mark.parametrize("generation", GENERATIONS)
def test_compiles_at_128k_and_copies_no_cache(generation, heads, kv_heads):
  """Both paper models' heads, in one layer of a stacked cache."""
  cache = jax.ShapeDtypeStruct((2, 1, 131_072, kv_heads, 128), jnp.bfloat16)
  q = jax.ShapeDtypeStruct((1, 1, heads, 128), jnp.bfloat16)
  at, layer = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((1, 1), ()))
  blocks = jax.ShapeDtypeStruct((1, kv_heads, 1, 16), jnp.int32)

  def oracle(q, k, v, at, layer, num_blocks=16):
    return pallas_kernels.cached_oracle_attention(q, k, v, at, layer=layer, num_blocks=num_blocks)

  def sparse(q, k, v, at, layer, blocks):
    return pallas_kernels.cached_block_sparse_attention(q, k, v, blocks, at, layer=layer)

  for fn, more, kernel in ((oracle, (), "cached_oracle_attention"),
                           (functools.partial(oracle, num_blocks=0), (), "cached_oracle_attention"),
                           (sparse, (blocks,), "cached_block_sparse_attention")):
    lowered = tpu.lower_for(generation, fn, q, cache, cache, at, layer, *more)
    assert f'kernel_name = "{kernel}"' in lowered.as_text()
    # A layer's keys are 32 MB or more; maxima and lists are some 100 kB.
    assert lowered.compile().memory_analysis().temp_size_in_bytes < 2 << 20


@needs_libtpu
@pytest.mark.parametrize("head_dim, dtype, kv_heads", [
  (width, dtype, n) for (width, dtype), free in mosaic_tpu.FREE_KV_HEADS.items() for n in free
] + [(128, "bfloat16", 24), (256, "float32", 8)])
def test_kv_heads_whose_cache_is_not_copied(head_dim, dtype, kv_heads):
  """With head dim 256 blocks of 256, and of 8 with 128: the largest and the smallest."""
  cache = jax.ShapeDtypeStruct((3, 2, 8_192, kv_heads, head_dim), dtype)
  q = jax.ShapeDtypeStruct((2, 1, kv_heads, head_dim), dtype)
  at, layer, blocks = (jax.ShapeDtypeStruct(shape, jnp.int32)
                       for shape in ((2, 1), (), (2, kv_heads, 1, 4)))
  options = dict(block_size=256 if head_dim == 256 else 8, implementation="mosaic_tpu")

  def both(q, k, v, at, layer, blocks):
    return (pallas_kernels.cached_oracle_attention(q, k, v, at, layer=layer, num_blocks=4,
                                                   **options),
            pallas_kernels.cached_block_sparse_attention(q, k, v, blocks, at, layer=layer,
                                                         **options))

  memory = tpu.compile_for("v5p", both, q, cache, cache, at, layer, blocks).memory_analysis()
  one_layer = math.prod(cache.shape[1:]) * jnp.dtype(dtype).itemsize
  assert memory.temp_size_in_bytes < one_layer // 2
