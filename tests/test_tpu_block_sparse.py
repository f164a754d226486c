"""Block-sparse attention for TPU: the plan against loops, the kernels in TPU interpret mode.

Interpret mode is strict: memory starts as NaN, a stray read raises, races are detected.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.bench import selections
from experiments.tpu_static import count as tpu_static
from experiments.tpu_static import sparse_cost as tpu_sparse_cost
from pallas_kernels import block_sparse_attention as op
from pallas_kernels.block_sparse_attention import reference
from pallas_kernels.block_sparse_attention.tpu import op as mosaic_tpu
from pallas_kernels.block_sparse_attention.tpu import plan as tpu_plan
from pallas_kernels.block_sparse_attention.tpu.op import LoopConfig, Options
from pallas_kernels.named_shapes import AttentionShape
from tests import tpu_interpret
from tests.attention_inputs import normal, packed_segments, qkv, random_blocks
from tests.older import older
from tests.tpu_interpret import race_detectors  # noqa: F401  (a fixture)

SMALL = LoopConfig(2, 2, 2)        # short sequences then span steps, bodies, tiles and programs
OPTIONS = Options(SMALL, SMALL, dense_forward=LoopConfig(2, 1, 1),
                  dense_backward=LoopConfig(1, 2, 2), interpret=tpu_interpret.INTERPRET)


@dataclasses.dataclass(frozen=True)
class Case:
  batch: int = 1
  tokens: int = 130
  kv_heads: int = 1
  group: int = 4
  head_dim: int = 64
  value_dim: int | None = None
  picks: int = 3
  block_size: int = 64
  dtype: str = "float32"
  sinks: bool = True
  segmented: bool = False
  options: Options = OPTIONS
  launches: int = 1              # of the forward kernel, and
  backward_launches: int = 1


CASES = {
  "batch_and_segments": Case(batch=2, tokens=140, kv_heads=2, segmented=True,
                             options=dataclasses.replace(
                               OPTIONS, interpret=tpu_interpret.TWO_CORES)),
  "group_of_one": Case(tokens=150, group=1, block_size=16, dtype="bfloat16", sinks=False),
  "group_of_three": Case(tokens=70, kv_heads=2, group=3, head_dim=24, value_dim=40, block_size=8),
  "wide_group": Case(tokens=100, group=16, head_dim=128, options=Options(
    interpret=tpu_interpret.INTERPRET)),
  "wide_heads": Case(tokens=70, group=8, head_dim=256, dtype="bfloat16", picks=2),
  "key_segments": Case(tokens=250, block_size=16, picks=5, segmented=True, launches=3,
                       backward_launches=3, options=dataclasses.replace(
                         OPTIONS, backward=LoopConfig(11, 2, 1), vmem_bytes=7500 << 10)),
  "steps_ahead": Case(batch=2, tokens=140, kv_heads=2, segmented=True, options=dataclasses.replace(
    OPTIONS, forward=LoopConfig(2, 3, 2, 2), backward=LoopConfig(2, 3, 2, 1),
    interpret=tpu_interpret.TWO_CORES)),
  "ahead_in_key_segments": Case(
    tokens=250, group=16, block_size=16, picks=5, dtype="bfloat16", launches=2,
    backward_launches=4, options=dataclasses.replace(
      OPTIONS, forward=LoopConfig(2, 3, 3, 2), backward=LoopConfig(8, 3, 2, 2),
      vmem_bytes=7650 << 10)),
  "dense": Case(tokens=300, block_size=16, options=dataclasses.replace(OPTIONS, dense=True)),
  "no_picks": Case(tokens=40, picks=0),
}


def inputs(case, seed=0):
  heads = case.kv_heads * case.group
  q, k, v = qkv(seed, case.batch, case.tokens, heads, case.kv_heads, case.head_dim,
                case.value_dim, dtype=case.dtype)
  picked = jnp.asarray(random_blocks(seed + 3, case.batch, case.kv_heads, case.tokens, case.picks,
                                     case.block_size))
  segments = None
  if case.segmented:
    segments = jnp.asarray(packed_segments(seed + 4, case.batch, case.tokens, padding=7))
  arrays = [q, k, v] + ([normal(seed + 5, heads)] if case.sinks else [])
  return arrays, picked, segments, normal(seed + 6, *q.shape[:3], v.shape[-1], dtype=case.dtype)


def check(case, name, monkeypatch):
  arrays, picked, segments, cotangent = inputs(case)
  launched = []
  call = mosaic_tpu.schedule.call
  monkeypatch.setattr(mosaic_tpu.schedule, "call", lambda kernel, name, *args, **options: (
    launched.append(name), call(kernel, name, *args, **options))[1])

  def run(fn, **options):
    def attend(q, k, v, sinks=None):
      return fn(q, k, v, picked, block_size=case.block_size, sinks=sinks, segment_ids=segments,
                query_offset=0, kv_segment_ids=segments, scale=case.head_dim ** -0.5,
                **options), None
    return functools.partial(tpu_interpret.value_and_grads, attend)

  (out, _), grads = run(mosaic_tpu.block_sparse_attention, options=case.options)(arrays, cotangent)
  single = [x.astype(jnp.float32) for x in arrays]
  (want, _), expected = run(reference.block_sparse_attention)(
    single, cotangent.astype(jnp.float32))
  assert sum("forward" in x for x in launched) == case.launches, name
  assert sum("backward" in x for x in launched) == case.backward_launches, name
  assert out.dtype == arrays[0].dtype
  tpu_interpret.assert_like_reference(out, want, case.dtype)
  for got, wanted, array in zip(grads, expected, arrays, strict=True):
    assert got.dtype == array.dtype
    if case.picks:
      tpu_interpret.assert_like_reference(got, wanted, case.dtype, grad=True)
  return out, picked, segments, grads


@pytest.mark.parametrize("name", older(
  CASES, "batch_and_segments", "dense", "group_of_one"))
def test_values_and_gradients_match_the_reference(name, monkeypatch):
  case = CASES[name]
  out, picked, segments, grads = check(case, name, monkeypatch)
  if not case.sinks or case.segmented:
    return
  blind = np.repeat((np.asarray(picked) < 0).all(-1).transpose(0, 2, 1), case.group, axis=2)
  assert blind.any() and not np.asarray(out)[blind].any()          # exactly 0
  assert not np.asarray(grads[0])[blind].any()


def test_padding_documents_see_nothing(monkeypatch):
  case = Case(tokens=70, segmented=True, block_size=16, dtype="bfloat16")
  out, _, segments, grads = check(case, "segmented", monkeypatch)
  hidden = np.asarray(segments) == 0
  assert hidden.any() and not np.asarray(out, np.float32)[hidden].any()
  assert not any(np.asarray(g, np.float32)[hidden].any() for g in grads[:3])


def test_large_queries_go_by_parts_of_the_heads(monkeypatch):
  monkeypatch.setattr(mosaic_tpu, "part_bytes", lambda: 1 << 14)
  traces = 2                              # of one launch: for the shapes, and for the loop
  check(Case(tokens=64, kv_heads=2, block_size=16, backward_launches=traces), "by parts",
        monkeypatch)


@pytest.mark.parametrize("tokens, group, block_size, picks", [
  (200, 4, 64, 5), (300, 1, 16, 4), (260, 16, 8, 3), (64, 8, 64, 32), (130, 32, 16, 2)])
def test_plan_matches_loops(tokens, group, block_size, picks):
  rng = np.random.default_rng(0)
  blocks = -(-tokens // block_size)
  # No blocks, future blocks, blocks that are not there, the same block twice.
  picked = rng.integers(-1, blocks + 2, (2, 2, tokens, picks)).astype(np.int32)
  plan = jax.jit(tpu_plan.make_plan, static_argnames=("group", "block_size"))(
    picked, group=group, block_size=block_size)
  tile, seen = plan.tile_tokens, np.zeros((2, 2, tokens, blocks), bool)
  assert tile * group == 128
  for at in np.ndindex(2, 2, tokens):
    for block in picked[at]:
      if 0 <= block <= at[2] // block_size:
        seen[(*at, block)] = True
  for b, k, start in np.ndindex(2, 2, -(-tokens // tile)):
    union = np.flatnonzero(seen[b, k, start * tile:(start + 1) * tile].any(0))[::-1]
    count = int(plan.counts[b, k, start])
    assert count == len(union)
    assert plan.blocks[b, k, start, :count].tolist() == union.tolist()
  assert (members(plan, blocks) == seen).all()
  dense = plan.dense()
  assert (members(dense, blocks) == seen).all()
  last = np.minimum((np.arange(dense.counts.shape[-1]) + 1) * tile * 4 - 1, tokens - 1)
  assert (np.asarray(dense.counts) == last // block_size + 1).all()


def members(plan, blocks):
  """bool [B,K,T,C] of a plan."""
  listed, words, counts = (np.asarray(x) for x in (plan.blocks, plan.words, plan.counts))
  out = np.zeros((*counts.shape[:2], plan.tokens, blocks), bool)
  for b, k, start in np.ndindex(counts.shape):
    count = counts[b, k, start]
    assert not words[b, k, start, :, count:].any() or plan.tile_tokens * plan.group > 128
    for i in range(min(plan.tile_tokens, plan.tokens - start * plan.tile_tokens)):
      hit = (words[b, k, start, i // 32, :count] >> (i % 32)) & 1
      out[b, k, start * plan.tile_tokens + i, listed[b, k, start, :count]] = hit
  return out


@pytest.mark.parametrize("generation, picks, want", [
  ("v5e", 16, False), ("v6e", 16, True), ("v6e", 1, False), (None, 16, False)])
def test_wide_unions_go_dense_where_that_is_cheaper(monkeypatch, generation, picks, want):
  monkeypatch.setattr(mosaic_tpu, "tpu_generation", lambda: generation)
  tokens = 512
  picked = np.where(np.arange(picks) <= np.arange(tokens)[:, None] // 64, np.arange(picks), -1)
  plan = tpu_plan.make_plan(jnp.asarray(picked[None, None], jnp.int32), 4)
  run = lambda plan, options: jnp.array([plan.tile_tokens, options.forward.blocks_per_step])
  for forced in (None, True, False):
    options = Options(LoopConfig(3, 1, 1), dense_forward=LoopConfig(5, 1, 1), dense=forced)
    expected = [128, 5] if (want if forced is None else forced) else [32, 3]
    assert mosaic_tpu.choose(plan, options, run).tolist() == expected


def test_loops_are_the_generations_unless_given():
  given = LoopConfig(3, 2, 1, 1)
  v6e, other = (Options(backward=given).loops_of(name) for name in ("v6e", "v5e"))
  assert other == Options(backward=given).loops_of(None)
  assert v6e.backward == other.backward == given
  assert v6e.forward.steps_ahead and not other.forward.steps_ahead


def test_counted_bundles_of_a_launch():
  """Hand-counted: 2 heads x 4 tiles of 32 tokens, lists of 6.5 blocks in steps of 4, 2 a body."""
  def span(start, bundles, depth, mxu, stores=0.0):
    return tpu_static.Span(start, bundles, depth, {"MXU": mxu},
                           {"MXU": mxu / bundles, "VSTORE": stores})
  spans = [span(0, 30, 1, 0), span(30, 70, 1, 0, 1.0), span(100, 100, 1, 9),
           span(200, 600, 2, 500), span(800, 50, 2, 0)]
  shape = AttentionShape(tokens=128, num_heads=8, num_kv_heads=2, head_dim=128)
  got = tpu_sparse_cost.count(spans, shape, 6.5, LoopConfig(4, 2, 4), 2, together=2)
  assert got["bundles_per_step"] == 300 and got["steps"] == 16
  # 16 steps and half a step for each of the 2 programs; 8 tiles finished two by two; 2 programs
  # started; 2 heads' sums cleared.
  assert got["bundles"] == 17 * 300 + 4 * 50 + 2 * 130 + 2 * 70
  assert got["flops_per_step"] == 2 * 2 * 4 * 64 * 128 * 128


def test_the_counted_backward_goes_by_parts_as_the_op_does(monkeypatch):
  monkeypatch.setattr(mosaic_tpu, "part_bytes", lambda: 128 * 4 * 128 * 2)
  seen, run = [], mosaic_tpu.run_backward
  monkeypatch.setattr(mosaic_tpu, "run_backward", lambda op, inputs, *args: (
    seen.append(inputs["q"].shape[2]), run(op, inputs, *args))[1])
  shape = AttentionShape(tokens=128, num_heads=8, num_kv_heads=2, head_dim=128)
  q, k, *others = arrays = tpu_sparse_cost._arrays(shape)
  found = jax.eval_shape(lambda *a: tpu_sparse_cost._run(shape, "bwd", *a), *arrays)
  assert [x.shape for x in found] == [q.shape, k.shape, others[0].shape]
  assert set(seen) == {4}


def test_mean_union_is_the_plans():
  shape = AttentionShape(tokens=4096, num_heads=8, num_kv_heads=2)
  picks = selections.selection("walk r=1", 2, 4096)
  plan = tpu_plan.make_plan(jnp.asarray(picks)[None], 4)
  assert tpu_sparse_cost.mean_union("walk r=1", shape) == pytest.approx(float(plan.counts.mean()))


@pytest.mark.parametrize("change, named", [
  (dict(dtype="float16"), "q dtype float16"), (dict(head_dim=257), "q head dim 257"),
  (dict(value_dim=300), "v head dim 300"), (dict(block_size=24, dtype="bfloat16"), "block_size 24"),
  (dict(group=129), "G=129")])
def test_limits_are_named(change, named):
  case = dataclasses.replace(Case(tokens=64, block_size=16, head_dim=16), **change)
  arrays, picked, _, _ = inputs(case)
  with pytest.raises(NotImplementedError, match=named):
    op(*arrays[:3], picked, block_size=case.block_size, implementation="mosaic_tpu")


def test_other_errors_are_named():
  arrays, picked, _, _ = inputs(Case(tokens=64))
  plan = tpu_plan.make_plan(picked, 8)
  with pytest.raises(ValueError, match=r"= \(8, 64, 64, 64, 0\); wanted \(4, 64, 64, 64, 0\)"):
    mosaic_tpu.block_sparse_attention(*arrays[:3], picked, plan=plan)
  with pytest.raises(ValueError, match="steps_per_body: got 0"):
    LoopConfig(1, 0, 1)
  with pytest.raises(ValueError, match="steps_ahead: got 2, want None or 1 to 1"):
    LoopConfig(1, 2, 1, 2)
  with pytest.raises(NotImplementedError, match="do not fit 1 MiB of VMEM"):
    mosaic_tpu.block_sparse_attention(
      *arrays[:3], picked, options=dataclasses.replace(OPTIONS, vmem_bytes=1 << 20))
