"""Paged decode kernels for TPU against the reference, in strict TPU interpret mode."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels.paged_attention import reference
from pallas_kernels.paged_attention.tpu import full
from pallas_kernels.paged_attention.tpu import op as mosaic_tpu
from tests import tpu_interpret
from tests.attention_inputs import jitted, normal, small_integers
from tests.paged_inputs import paged, picks, ring
from tests.tpu_interpret import race_detectors  # noqa: F401  (a fixture)

oracle_reference = jitted(reference.paged_oracle_attention)
sparse_reference = jitted(reference.paged_sparse_layer_attention)
SCALE = 0.1


@dataclasses.dataclass(frozen=True)
class Case:
  lengths: tuple
  heads: int
  kv_heads: int
  head_dim: int = 128
  v_dim: int | None = None
  dtype: str = "float32"
  page_tokens: int = 64
  num_blocks: int = 3
  window: int = 20
  sinks: bool = False
  gates: tuple = ("head", "element")
  interpret: object = tpu_interpret.INTERPRET


CASES = {
  # The first and last token of a page, an idle row, a row of more steps than one.
  "group of 1, two cores": Case((64, 129, 0, 300), 2, 2, interpret=tpu_interpret.TWO_CORES),
  "group of 5, 4 KV heads": Case((190, 1), 20, 4, dtype="bfloat16", num_blocks=2, sinks=True),
  "wide keys, more picks than pages": Case((70, 130), 20, 1, head_dim=256, v_dim=128, sinks=True,
                                           num_blocks=5, gates=(None, "head")),
  "pages of 16": Case((75, 33), 8, 2, v_dim=256, dtype="bfloat16", page_tokens=16, window=128,
                      gates=("element", None)),
}


def inputs(case, seed=0, **given):
  """A `Paged` with pages of the case's size; entries past a row's pages name none that exists."""
  x = paged(seed, case.lengths, case.heads, case.kv_heads, case.head_dim, case.v_dim, case.dtype,
            **given)
  parts = 64 // case.page_tokens

  def cut(pages):
    layers, count, kv_heads, _, width = pages.shape
    pages = pages.reshape(layers, count, kv_heads, parts, -1, width).swapaxes(2, 3)
    return pages.reshape(layers, count * parts, kv_heads, -1, width)

  table = (x.page_table[..., None] * parts + jnp.arange(parts)).reshape(len(case.lengths), -1)
  used = jnp.arange(table.shape[1]) * case.page_tokens < x.lengths[:, None]
  table = jnp.where(used, table, 10**6)
  return dataclasses.replace(x, k_pages=cut(x.k_pages), v_pages=cut(x.v_pages), page_table=table)


def exact(arrays):
  """In float32 where they are floats: what the reference gets."""
  return jax.tree.map(lambda x: x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating)
                      else x, arrays)


@pytest.fixture
def two_pages_a_step(monkeypatch):
  """So that short rows take several steps."""
  tiles = mosaic_tpu._tiles
  monkeypatch.setattr(mosaic_tpu, "_tiles",
                      lambda *args: dataclasses.replace(tiles(*args), pages=2))


@pytest.mark.parametrize("name", CASES)
def test_like_the_reference(name, two_pages_a_step):
  """Unread slots, pages and layers hold NaN; the sparse layer gets the blocks that were selected,
  and others in any order."""
  case = CASES[name]
  x = inputs(case)
  arrays = x.q, *x.cache, *x.where
  options = dict(layer=x.layer, scale=SCALE)
  out, picked = mosaic_tpu.paged_oracle_attention(
    *arrays, num_blocks=case.num_blocks, interpret=case.interpret, **options)
  want, want_picked = oracle_reference(*exact(arrays), num_blocks=case.num_blocks, **options)
  assert out.dtype == x.q.dtype
  tpu_interpret.assert_like_reference(out, want, case.dtype)
  np.testing.assert_array_equal(picked, want_picked)

  rings = [ring(normal(i, *kv.shape), case.lengths, case.window, case.dtype)
           for i, kv in ((7, x.k), (8, x.v))]
  widths = {"head": 1, "element": x.v.shape[-1]}
  gates = [None if gate is None else
           jax.nn.sigmoid(normal(i, *x.q.shape[:2], widths[gate], dtype=case.dtype))
           for i, gate in enumerate(case.gates)]
  sinks = [normal(i, case.heads) if case.sinks else None for i in (9, 10)]
  options |= dict(sinks_sparse=sinks[0], sinks_local=sinks[1], ring_layer=jnp.int32(1))
  sparse_layer = jax.jit(functools.partial(
    mosaic_tpu.paged_sparse_layer_attention, scale=options.pop("scale"), interpret=case.interpret))
  for blocks in (picked, picked[..., ::-1].at[0, 0].set(-1)):
    arrays = (x.q, *x.cache, blocks, *x.where, *rings, *gates)
    out = sparse_layer(*arrays, **options)
    want = sparse_reference(*exact(arrays), scale=SCALE, **options)
    assert out.dtype == x.q.dtype
    tpu_interpret.assert_like_reference(out, want, case.dtype)
  idle = np.asarray(case.lengths) == 0
  assert not np.asarray(out, np.float32)[idle].any() and (np.asarray(picked)[idle] == -1).all()


@pytest.mark.parametrize("branch", ["sparse", "local", "no picks"])
def test_either_branch_alone(branch):
  case = Case((70, 3), 4, 2, num_blocks=2)
  x = inputs(case)
  blocks = picks(4, case.lengths, case.kv_heads, 0 if branch == "no picks" else case.num_blocks)
  options = dict(sinks_sparse=None, sinks_local=None, layer=None, ring_layer=None, scale=SCALE)
  if branch == "local":
    rings = [ring(y, case.lengths, case.window) for y in (x.k, x.v)]
    arrays = (x.q, None, None, None, None, x.lengths, *rings, None, None)
    options |= dict(ring_layer=jnp.int32(1), sinks_local=normal(5, case.heads))
  else:
    arrays = (x.q, *x.cache, blocks, *x.where, None, None, None, None)
    options |= dict(layer=x.layer)
  out = mosaic_tpu.paged_sparse_layer_attention(*arrays, interpret=case.interpret, **options)
  want = sparse_reference(*arrays, **options)
  assert np.asarray(want).any() == (branch != "no picks")
  tpu_interpret.assert_like_reference(out, want, "float32")


def test_without_selection_in_one_step():
  """The tiles that a TPU gets; plain attention; a length beyond the table reads no entry beyond it.
  """
  case = Case((192, 3), 8, 2)
  x = inputs(case)
  arrays = x.q, *x.cache, x.page_table[:, :3], x.lengths.at[0].add(1)
  options = dict(layer=x.layer, num_blocks=0, scale=SCALE)
  out, picked = mosaic_tpu.paged_oracle_attention(*arrays, interpret=case.interpret, **options)
  assert picked.shape == (2, 2, 0)
  tpu_interpret.assert_like_reference(out, oracle_reference(*arrays, **options)[0], "float32")


def test_ties_go_to_the_lower_block(two_pages_a_step):
  """Blocks of the same keys weigh the same, within a step and across steps. With one query head and
  this scale all but the best kind weigh so little that a row of padding must not count.
  """
  kinds = np.array([0, 1, 2, 0, 1, 2, 0, 1, 2, 0])
  case = Case((640,), 1, 1, num_blocks=5)
  keys = small_integers(1, 1, 3, 64, 1, 128)[:, kinds].reshape(1, 640, 1, 128)
  x = inputs(case, k=keys)
  options = dict(layer=x.layer, num_blocks=5, scale=4.0)
  _, picked = mosaic_tpu.paged_oracle_attention(x.q, *x.cache, *x.where,
                                                interpret=case.interpret, **options)
  _, want = oracle_reference(x.q, *x.cache, *x.where, **options)
  np.testing.assert_array_equal(picked, want)
  # The whole of the best kind, then the lowest of the next.
  blocks = np.asarray(picked)[0, 0]
  used = [blocks[kinds[blocks] == kind] for kind in range(3)]
  assert all((x == np.flatnonzero(kinds == kind)[:len(x)]).all() for kind, x in enumerate(used))
  assert sorted(map(len, used)) in ([0, 1, 4], [0, 2, 3])


def test_only_selected_pages_are_read():
  """All other pages are NaN; each KV head has its own."""
  case = Case((320,), 4, 2)
  x = inputs(case)
  blocks = jnp.asarray([[[0, 2, 4], [1, 3, -1]]], jnp.int32)
  kept = np.zeros(x.k_pages.shape[1:3], bool)
  for head, chosen in enumerate(blocks[0]):
    kept[x.page_table[0, chosen[chosen >= 0]], head] = True
  cache = [jnp.where(kept[..., None, None], pages, jnp.nan) for pages in x.cache]
  options = dict(sinks_sparse=None, sinks_local=None, layer=x.layer, ring_layer=None, scale=SCALE)
  run = lambda op, *cache: op(x.q, *cache, blocks, *x.where, None, None, None, None, **options)
  out = run(functools.partial(mosaic_tpu.paged_sparse_layer_attention, interpret=case.interpret),
            *cache)
  tpu_interpret.assert_like_reference(out, run(sparse_reference, *x.cache), "float32")


@pytest.mark.parametrize("batch, heads, kv_heads, room, want", [
  (1, 64, 4, 2048, (2, 16)), (2, 64, 4, 2048, (4, 16)), (8, 32, 8, 2048, (8, 8)),
  (8, 32, 32, 2048, (8, 8)), (1, 1, 1, 3, (1, 4)), (8, 32, 8, 32_768, (4, 16))])
def test_tiles(batch, heads, kv_heads, room, want):
  """Two programs or more, copies of up to 128 KiB, up to 1 MiB and 1,024 tokens a step."""
  pages = jax.ShapeDtypeStruct((1, 1, kv_heads, 64, 128), jnp.bfloat16)
  q = jax.ShapeDtypeStruct((batch, kv_heads, 16, 128), jnp.bfloat16)
  assert mosaic_tpu._tiles("op", q, pages, pages, room) == full.FullTiles(*want, 64)


@pytest.mark.parametrize("change, message", [
  (dict(head_dim=64), "head dim 64 of keys; wanted 128 or 256"),
  (dict(v_dim=64), "head dim 64 of values; wanted 128 or 256"),
  (dict(dtype="float16"), "q, keys, values float16; wanted all bfloat16 or all float32"),
  (dict(heads=130), "130 query heads a KV head; wanted at most 128"),
  (dict(page_tokens=8), "pages of 8 tokens; wanted a multiple of 16 up to 256")])
def test_limits_are_named(change, message):
  case = dataclasses.replace(Case((64,), 1, 1), **change)
  x = inputs(case)
  run = dict(layer=x.layer, implementation="mosaic_tpu")
  with pytest.raises(NotImplementedError, match=f"paged_oracle_attention mosaic_tpu: {message}"):
    pallas_kernels.paged_oracle_attention(x.q, *x.cache, *x.where, **run)
  blocks = picks(1, case.lengths, 1, 1)
  with pytest.raises(NotImplementedError, match=f"sparse_layer_attention mosaic_tpu: {message}"):
    pallas_kernels.paged_sparse_layer_attention(x.q, *x.cache, blocks, *x.where, None, None, **run)


def test_limits_of_memory_are_named():
  x = inputs(Case((64,), 1, 1))
  run = dict(layer=x.layer, implementation="mosaic_tpu")
  table = jnp.zeros((1, 32_769), jnp.int32)
  with pytest.raises(NotImplementedError, match="32769 pages a sequence; wanted at most 32768"):
    pallas_kernels.paged_oracle_attention(x.q, *x.cache, table, x.lengths, **run)
  blocks = jnp.zeros((1, 1, 65), jnp.int32)
  with pytest.raises(NotImplementedError, match="4259840 bytes of selected pages and window"):
    pallas_kernels.paged_sparse_layer_attention(x.q, *x.cache, blocks, *x.where, None, None, **run)
