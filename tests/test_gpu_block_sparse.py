"""Block-sparse and sliding-window attention for Hopper.

On CPU: the plan against loops, the Mosaic kernel in GPU interpret mode, the Triton kernels on
Triton's interpreter (outputs poisoned with NaN), and lowering for CUDA. On a GPU (`-m gpu`): the
compiled kernels against the reference, forward and gradients, and bit for bit across two runs.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.bench import selections
from pallas_kernels import compat
from pallas_kernels.block_sparse_attention import reference
from pallas_kernels.block_sparse_attention.gpu import forward as mosaic_gpu
from pallas_kernels.block_sparse_attention.gpu import forward_split as mosaic_gpu_split
from pallas_kernels.block_sparse_attention.gpu import op as gpu
from pallas_kernels.block_sparse_attention.gpu import plan as index_plan
from pallas_kernels.sliding_window_attention import reference as window_reference
from pallas_kernels.sliding_window_attention.gpu import op as window_gpu
from pallas_kernels.sparse_layer_attention import reference as hybrid_reference
from pallas_kernels.sparse_layer_attention.gpu import op as hybrid_gpu
from tests import triton_interpreter
from tests.attention_inputs import jitted

# ||got - want|| / ||want||: the operands and the stored parts are rounded to 8 (bf16) or 11 (f16)
# bits, each product's error is independent, and norms average them.
RELATIVE = {"bfloat16": 5e-3, "float16": 7e-4}
make_plan = jax.jit(gpu.make_plan, static_argnums=(1, 2))


@pytest.fixture(scope="module")
def on_cpu():
  if jax.default_backend() != "cpu":
    pytest.skip("interpreters run on CPU")
  patch = pytest.MonkeyPatch()
  triton_interpreter.install(patch)
  for module, name in ((mosaic_gpu, "union_forward"), (mosaic_gpu_split, "split_forward")):
    patch.setattr(module, name, functools.partial(
      getattr(module, name), interpret=compat.InterpretGPUParams()))
  yield
  patch.undo()


def random_picks(seed, batch, kv_heads, tokens, picks):
  """Between none and `picks` distinct causal blocks for every token, ascending, -1 last."""
  rng = np.random.default_rng(seed)
  out = np.full((batch, kv_heads, tokens, picks), -1, np.int32)
  for at in np.ndindex(batch, kv_heads, tokens):
    blocks = at[2] // 64 + 1
    count = rng.integers(0, min(blocks, picks) + 1)
    out[at][:count] = np.sort(rng.choice(blocks, count, replace=False))
  return jnp.asarray(out)


def make_inputs(seed, batch, tokens, kv_heads, group, head_dim, dtype, segmented):
  rng = np.random.default_rng(seed)
  draw = lambda n: jnp.asarray(rng.standard_normal((batch, tokens, n, head_dim)), dtype)
  sinks = jnp.asarray(rng.standard_normal(kv_heads * group), jnp.float32)
  segments = np.sort(rng.integers(0, 4, (batch, tokens)), axis=1).astype(np.int32)
  return (draw(kv_heads * group), draw(kv_heads), draw(kv_heads), draw(kv_heads * group), sinks,
          jnp.asarray(segments) if segmented else None)


def relative(got, want):
  got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
  assert np.isfinite(got).all()
  return np.linalg.norm(got - want) / np.linalg.norm(want)


def compare(run, reference_run, arguments, dout, dtype):
  """Forward and gradients of `run` against the reference's in float32; returns what `run` gave."""
  out, pullback = jax.vjp(run, *arguments)
  grads = pullback(dout)

  @jax.jit
  def expected(arguments, dout):
    want, pullback = jax.vjp(reference_run, *arguments)
    return want, pullback(dout)

  want, want_grads = expected(*jax.tree.map(lambda x: x.astype(jnp.float32), (arguments, dout)))
  name = jnp.dtype(dtype).name
  assert out.dtype == dtype
  assert relative(out, want) < RELATIVE[name]
  for got, want_grad in zip(grads, want_grads, strict=True):
    assert relative(got, want_grad) < 2 * RELATIVE[name]
  return out, grads


def check_plan(picks, config, blocks):
  build = jax.jit(lambda picks: index_plan.build_plan(picks, blocks, config))
  plan = jax.tree.map(np.asarray, build(picks))
  batch, kv_heads, tokens, width = picks.shape
  tile = config.tile_tokens
  for b, k in np.ndindex(batch, kv_heads):
    mine = picks[b, k]
    is_rare = np.zeros(mine.shape, bool)
    for index in range(tokens // tile):
      rows = mine[index * tile:(index + 1) * tile]
      found, members = np.unique(rows[rows >= 0], return_counts=True)
      dense = members.sum() >= config.dense_tile * tile * len(found) and config.has_hot
      hot = found[members >= (1 if dense else config.hot_threshold)].tolist()
      if config.scattered:
        hot.sort(key=lambda block: block * 317 % blocks)       # of a power of two here
      own = index * tile // 64
      if own in hot:
        hot = [own] + [x for x in hot if x != own]
      steps = max(-(-len(hot) // config.list_multiple), 1)
      assert plan.counts[b, k, index] == steps
      assert plan.blocks.shape[-1] >= steps * config.list_multiple
      assert plan.blocks[b, k, index, :len(hot)].tolist() == hot
      words = [sum(1 << i for i in range(tile) if block in rows[i]) for block in hot]
      got = plan.words[b, k, index].astype(np.int64) & 0xFFFFFFFF
      assert got[:len(hot)].tolist() == words and not got[len(hot):].any()
      is_rare[index * tile:(index + 1) * tile] = (rows >= 0) & ~np.isin(rows, hot)
    steps = plan.counts[b, k][plan.order[b, k]]
    late_first = list(range(tokens // tile))[::-1]
    if config.longest_first:
      assert sorted(plan.order[b, k])[::-1] == late_first and (np.diff(steps) <= 0).all()
    else:
      assert plan.order[b, k].tolist() == late_first
    rare = is_rare.sum(1)
    is_hot = (mine >= 0) & ~is_rare
    assert (plan.rare[b, k] == rare).all() and (plan.valid[b, k] == (mine >= 0).sum(1)).all()
    slot = np.where(is_rare, is_rare.cumsum(1), rare[:, None] + is_hot.cumsum(1)) - 1
    for block in range(blocks):
      t, p = np.nonzero(mine == block)
      entry, first = t * width + slot[t, p], is_rare[t, p]
      group = (b * kv_heads + k) * blocks + block
      for work, want in ((plan.rare_work, entry[first]),
                         (plan.all_work, np.concatenate([entry[first], entry[~first]]))):
        if work is plan.rare_work and not config.has_rare:
          continue
        programs = range(work.first[group], work.first[group + 1])
        assert all(work.group[i] == group for i in programs)
        got = [e for i in programs for e in plan.entries[work.starts[i]:work.ends[i]]]
        assert got == want.tolist()


@pytest.mark.parametrize("config", [
  index_plan.PlanConfig(32, 8, 2, 16, 32),
  index_plan.PlanConfig(16, 2, 1, 16, 32, dense_tile=0.33, longest_first=False),
  index_plan.PlanConfig(16, 1, 1, 16, 32, longest_first=False, scattered=True),
  index_plan.PlanConfig(32, 33, 2, 16, 32)], ids=str)
@pytest.mark.parametrize("packed_bits", [32, 2], ids=["one_sort", "sort_a_head"])
def test_plan_matches_loops(monkeypatch, config, packed_bits):
  monkeypatch.setattr(index_plan, "PACKED_BITS", packed_bits)
  picks = np.stack([selections.walk(2, 1024, 2.0, 5), selections.random(2, 1024, 5)])
  picks[:, :, ::7] = -1
  check_plan(picks, config, 16)


def test_plan_packs_where_it_was_measured_to_pay():
  configs = {
    (group, tokens): jax.eval_shape(
      functools.partial(gpu.make_plan, group=group),
      jax.ShapeDtypeStruct((1, 1, tokens, 16), jnp.int32)).config
    for group, tokens in ((4, 1024), (16, 32768), (16, 65536))}
  assert {key: config.hot_threshold for key, config in configs.items()} == {
    (4, 1024): 8, (16, 32768): 1, (16, 65536): 2}
  assert [config.scattered for config in configs.values()] == [False, True, True]


def test_plan_names_what_it_cannot_do():
  with pytest.raises(NotImplementedError, match="T=100"):
    index_plan.build_plan(jnp.zeros((1, 1, 100, 4), jnp.int32), 2)
  with pytest.raises(NotImplementedError, match="17 picks in tiles of 32"):
    index_plan.build_plan(jnp.zeros((1, 1, 128, 17), jnp.int32), 2)
  with pytest.raises(ValueError, match="tile_tokens"):
    index_plan.PlanConfig(tile_tokens=5)
  with pytest.raises(ValueError, match="stages"):
    mosaic_gpu.UnionConfig(blocks_per_step=2, stages=4)
  with pytest.raises(ValueError, match="slots"):
    mosaic_gpu_split.SplitConfig(slots=6)
  with pytest.raises(ValueError, match="ahead"):
    mosaic_gpu_split.SplitConfig(ahead=5)
  plan = make_plan(jnp.zeros((1, 1, 128, 4), jnp.int32), 4)
  array = lambda heads: jnp.zeros((1, 128, heads, 64), jnp.bfloat16)
  with pytest.raises(ValueError, match="tiles of 32 tokens"):
    mosaic_gpu_split.split_forward(array(16), array(1), array(1), plan, scale=1.0)


def hot_kernel(group, config):
  """The union or split kernel, interpreted, with every pick hot; gives out and lse, compiled."""
  split = isinstance(config, mosaic_gpu_split.SplitConfig)
  plan_config = index_plan.PlanConfig(
    tile_tokens=(mosaic_gpu_split if split else mosaic_gpu).tile_tokens(group), hot_threshold=1,
    list_multiple=1 if split else config.blocks_per_step, scattered=split)
  kernel = mosaic_gpu_split.split_forward if split else mosaic_gpu.union_forward

  @jax.jit
  def run(q, k, v, indices, **options):
    plan = index_plan.build_plan(indices, q.shape[1] // 64, plan_config)
    return kernel(q, k, v, plan, scale=0.125, config=config,
                  interpret=compat.InterpretGPUParams(), **options)

  return run


@pytest.mark.parametrize("batch,tokens,group,picks,segmented,config", [
  (1, 128, 4, 2, False, mosaic_gpu.UnionConfig(programs=3)),          # a second round for one
  (2, 64, 8, 1, True, mosaic_gpu.UnionConfig(blocks_per_step=1)),
  (1, 128, 16, 2, False, mosaic_gpu_split.SplitConfig(programs=3)),   # up to three rounds
  (2, 64, 16, 1, True, mosaic_gpu_split.SplitConfig(slots=3, ahead=1)),
], ids=str)
def test_hot_forward_interpreted(batch, tokens, group, picks, segmented, config):
  q, k, v, _, sinks, segments = make_inputs(
    0, batch, tokens, 1, group, 64, jnp.bfloat16, segmented)
  q = q.at[:, ::17].multiply(30)            # scores up to 1,000 in some tiles, and not in others
  indices = random_picks(1, batch, 1, tokens, picks)
  out, lse = hot_kernel(group, config)(q, k, v, indices, sinks=sinks, segment_ids=segments)
  want = jitted(reference.block_sparse_attention)(
    q.astype(jnp.float32), k, v, indices, block_size=64, sinks=sinks, segment_ids=segments,
    scale=0.125)
  assert relative(out, want) < RELATIVE["bfloat16"]
  assert (np.asarray(lse) > sinks * np.log2(np.e) - 1e-3).all()      # the sink is in every sum


@pytest.mark.parametrize("group,config", [
  (4, mosaic_gpu.UnionConfig()), (16, mosaic_gpu_split.SplitConfig())])
def test_another_future_changes_no_past(group, config):
  """Not a bit of earlier tiles; in the tile of the change a longer list may round differently."""
  tokens, cut = 128, 127
  q, k, v, _, sinks, _ = make_inputs(0, 1, tokens, 1, group, 64, jnp.bfloat16, False)
  q = q.at[:, ::17].multiply(30)
  run = hot_kernel(group, config)
  here = np.zeros((1, 1, tokens, 1), np.int32)
  there = here.copy()
  there[:, :, cut:] = 1
  out, _ = run(q, k, v, jnp.asarray(here), sinks=sinks)
  other, _ = run(*(x.at[:, cut:].add(1) for x in (q, k, v)), jnp.asarray(there), sinks=sinks)
  moved = np.abs(np.asarray(out, np.float32) - np.asarray(other, np.float32)).max((0, 2, 3))
  assert (moved[:cut - cut % 32] == 0).all() and moved[cut] > 0
  assert relative(other[:, :cut], out[:, :cut]) < RELATIVE["bfloat16"]


@pytest.mark.parametrize("group", [4, 16])
def test_smallest_weights_interpreted(group):
  """Rows whose every score is -78 in base 2 keep no maximum, those of -81 and -3000 do."""
  tokens, head_dim = 64, 64
  k = jnp.ones((1, tokens, 1, head_dim), jnp.bfloat16)
  v = jnp.asarray(np.random.default_rng(0).standard_normal(k.shape), jnp.bfloat16)
  indices = jnp.zeros((1, 1, tokens, 1), jnp.int32)
  run = hot_kernel(
    group, mosaic_gpu_split.SplitConfig() if group == 16 else mosaic_gpu.UnionConfig())
  want = (np.cumsum(np.asarray(v, np.float64), 1) / np.arange(1, tokens + 1)[:, None, None])
  for size in (6.75, 7.0, 256.0):
    score = -size * head_dim * 0.125 * np.log2(np.e)
    q = jnp.full((1, tokens, group, head_dim), -size, jnp.bfloat16)
    out, lse = run(q, k, v, indices)
    assert relative(out, np.broadcast_to(want, out.shape)) < RELATIVE["bfloat16"]
    np.testing.assert_allclose(
      lse[0], score + np.log2(np.arange(1, tokens + 1))[:, None].repeat(group, 1), rtol=1e-5)


@pytest.mark.parametrize("group,head_dim,segmented,tokens,threshold", [
  (4, 128, False, 1024, None), (8, 64, True, 1000, 1), (16, 128, True, 1024, 1),
  (16, 64, False, 1000, None)])
def test_forward_lowers_for_cuda(monkeypatch, group, head_dim, segmented, tokens, threshold):
  """The Mosaic kernels of both branches; the Triton kernels need a GPU to be imported."""
  def hot(q, k, v, sinks, segment_ids, plan, scale, window):
    limit = {} if window is None else dict(window=window)
    return gpu.hot_forward(
      q, k, v, plan, sinks=sinks, segment_ids=segment_ids, scale=scale, **limit)

  monkeypatch.setattr(gpu, "forward", hot)

  def run(q, k, v, indices, segments):
    segments = segments if segmented else None
    return (gpu.block_sparse_attention(q, k, v, indices, segment_ids=segments,
                                       hot_threshold=threshold),
            window_gpu.sliding_window_attention(q, k, v, segment_ids=segments))

  array = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype)
  keys = array((1, tokens, 2, head_dim), jnp.bfloat16)
  lowered = jax.jit(run).trace(
    array((1, tokens, 2 * group, head_dim), jnp.bfloat16), keys, keys,
    array((1, 2, tokens, 16), jnp.int32), array((1, tokens), jnp.int32),
  ).lower(lowering_platforms=("cuda",))
  assert lowered.as_text().count("mosaic_gpu_v2") == 2


@pytest.mark.parametrize("batch,tokens,kv_heads,group,picks,segmented,threshold,partial_bytes", [
  (2, 100, 1, 3, 2, True, 1000, 1),         # key-major alone, padded T and G, a pass a head
  (1, 128, 1, 4, 2, False, 20, 6 << 30),    # hot and rare picks
])
def test_whole_op_interpreted(on_cpu, monkeypatch, batch, tokens, kv_heads, group, picks,
                              segmented, threshold, partial_bytes):
  from pallas_kernels.block_sparse_attention.gpu import backward as key_major

  small = key_major.KeyMajorConfig(partial_bytes=partial_bytes)
  monkeypatch.setattr(key_major, "KeyMajorConfig", lambda: small)
  q, k, v, dout, sinks, segments = make_inputs(
    2, batch, tokens, kv_heads, group, 64, jnp.float16, segmented)
  indices = random_picks(3, batch, kv_heads, tokens, picks)
  plan = make_plan(indices, group, threshold)
  compare(
    lambda q, k, v, sinks: gpu.block_sparse_attention(
      q, k, v, indices, sinks=sinks, segment_ids=segments, plan=plan),
    lambda q, k, v, sinks: reference.block_sparse_attention(
      q, k, v, indices, block_size=64, sinks=sinks, segment_ids=segments, scale=0.125),
    (q, k, v, sinks), dout, jnp.float16)


@pytest.mark.parametrize("tokens,group,window,segmented", [(192, 4, 100, False)])
def test_sliding_window_interpreted(on_cpu, tokens, group, window, segmented):
  q, k, v, dout, sinks, segments = make_inputs(4, 1, tokens, 1, group, 64, jnp.float16, segmented)
  compare(
    lambda q, k, v, sinks: window_gpu.sliding_window_attention(
      q, k, v, window=window, sinks=sinks, segment_ids=segments),
    lambda q, k, v, sinks: window_reference.sliding_window_attention(
      q, k, v, window=window, sinks=sinks, segment_ids=segments, scale=0.125),
    (q, k, v, sinks), dout, jnp.float16)


def compare_hybrid(seed, batch, tokens, kv_heads, group, head_dim, dtype, picks, *, segmented,
                   per_head, window, plan):
  """Forward and gradients of the whole layer against the reference's."""
  q, k, v, dout, sinks, segments = make_inputs(
    seed, batch, tokens, kv_heads, group, head_dim, dtype, segmented)
  _, k_local, v_local, gates, sinks_local, _ = make_inputs(
    seed + 1, batch, tokens, kv_heads, group, head_dim, dtype, False)
  gates = jax.nn.sigmoid(gates[..., :1].astype(jnp.float32) if per_head else gates)
  options = dict(window=window, segment_ids=segments)
  return compare(
    lambda q, k, v, kl, vl, g, h, s, sl: hybrid_gpu.hybrid_sparse_attention(
      q, k, v, picks, kl, vl, g, h, sinks_sparse=s, sinks_local=sl, plan=plan, **options),
    lambda q, k, v, kl, vl, g, h, s, sl: hybrid_reference.hybrid_sparse_attention(
      q, k, v, picks, kl, vl, g, h, sinks_sparse=s, sinks_local=sl, block_size=64,
      scale=head_dim ** -0.5, **options),
    (q, k, v, k_local, v_local, gates, 1 - gates, sinks, sinks_local), dout, dtype)


@pytest.mark.parametrize("batch,tokens,group,threshold,per_head,segmented", [
  (2, 60, 3, 17, False, True),    # gates in the sum of the parts, a pass a row, padded T and G
  (1, 64, 4, 1, True, False),     # one kernel has all the picks, XLA gates
])
def test_hybrid_interpreted(on_cpu, monkeypatch, batch, tokens, group, threshold, per_head,
                            segmented):
  from pallas_kernels.block_sparse_attention.gpu import backward as key_major

  small = key_major.KeyMajorConfig(partial_bytes=1)
  monkeypatch.setattr(key_major, "KeyMajorConfig", lambda: small)
  picks = random_picks(6, batch, 1, tokens, 2)
  plan = make_plan(picks, group, threshold)
  rare = int(plan.rare.sum())
  assert (rare == 0) if threshold == 1 else (0 < rare < int(plan.valid.sum()))
  compare_hybrid(5, batch, tokens, 1, group, 64, jnp.float16, picks, segmented=segmented,
                 per_head=per_head, window=40, plan=plan)


@pytest.mark.parametrize("change,named", [
  (dict(block_size=32), "block_size 32"), (dict(head_dim=96), "H 96"),
  (dict(dtype=jnp.float32), "q dtype float32"), (dict(group=32), "G=32"),
  (dict(picks=17), "17 picks"),
])
def test_limits_are_named(change, named):
  sizes = dict(block_size=64, head_dim=64, dtype=jnp.bfloat16, group=4, picks=4) | change
  array = lambda heads: jnp.zeros((1, 64, heads, sizes["head_dim"]), sizes["dtype"])
  with pytest.raises(NotImplementedError, match=named):
    gpu.block_sparse_attention(
      array(sizes["group"]), array(1), array(1), jnp.zeros((1, 1, 64, sizes["picks"]), jnp.int32),
      block_size=sizes["block_size"])


# tokens, kv_heads, group, head_dim, dtype, threshold
ON_DEVICE = [
  (1024, 2, 4, 128, jnp.bfloat16, None), (1024, 2, 4, 128, jnp.bfloat16, 1),
  (1024, 2, 4, 128, jnp.bfloat16, 1000), (1000, 2, 16, 128, jnp.bfloat16, None),
  (1024, 2, 16, 64, jnp.float16, 1), (960, 3, 8, 64, jnp.bfloat16, None),
  (520, 2, 1, 64, jnp.float16, None), (2048, 1, 16, 128, jnp.bfloat16, 1000),
]


@pytest.mark.gpu
@pytest.mark.parametrize("case", ON_DEVICE, ids=str)
@pytest.mark.parametrize("segmented", [False, True])
def test_on_device(case, segmented):
  tokens, kv_heads, group, head_dim, dtype, threshold = case
  scale = head_dim ** -0.5

  @jax.jit
  def run(q, k, v, sinks, indices, segments):
    return gpu.block_sparse_attention(
      q, k, v, indices, sinks=sinks, segment_ids=segments,
      plan=gpu.make_plan(indices, group, threshold))

  @jax.jit
  def both(arguments, indices, segments, dout):
    out, pullback = jax.vjp(lambda *a: run(*a, indices, segments), *arguments)
    return out, pullback(dout)

  @jax.jit
  def expected(arguments, indices, segments, dout):
    arguments = jax.tree.map(lambda x: x.astype(jnp.float32), arguments)
    out, pullback = jax.vjp(lambda q, k, v, sinks: reference.block_sparse_attention(
      q, k, v, indices, block_size=64, sinks=sinks, segment_ids=segments, scale=scale), *arguments)
    return out, pullback(dout.astype(jnp.float32))

  @jax.jit
  def summands(arguments, indices, segments, dout, out):
    """Norm of the -p_sink out dout that a sink's gradient sums: they cancel, their rounding not."""
    q, k, _, sinks = arguments
    seen = reference.block_sparse_attention(      # the keys' share of the softmax
      q.astype(jnp.float32), k.astype(jnp.float32), jnp.ones(k.shape, jnp.float32), indices,
      block_size=64, sinks=sinks, segment_ids=segments, scale=scale)
    return jnp.linalg.norm((1 - seen) * out * dout.astype(jnp.float32))

  for seed in range(12):
    q, k, v, dout, sinks, segments = make_inputs(
      seed, 2, tokens, kv_heads, group, head_dim, dtype, segmented)
    name = ("random", "walk r=1", "walk r=2")[seed % 3]
    indices = jnp.asarray(np.stack([
      selections.selection(name, kv_heads, tokens, 5, seed + b) for b in range(2)]))
    indices = jnp.where((jnp.arange(tokens) % 11 == seed)[:, None], -1, indices)
    given = (q, k, v, sinks), indices, segments, dout
    first, second, want = both(*given), both(*given), expected(*given)
    limit = 2 * RELATIVE[jnp.dtype(dtype).name]
    for got, again in zip(jax.tree.leaves(first), jax.tree.leaves(second)):
      assert (got == again).all(), "two runs differ"
    (out, (*grads, dsinks)), (want_out, (*want_grads, want_dsinks)) = first, want
    for got, value in zip((out, *grads), (want_out, *want_grads)):
      assert relative(got, value) < limit
    size = max(np.linalg.norm(want_dsinks), summands(*given, want_out))
    assert np.linalg.norm(np.asarray(dsinks - want_dsinks)) < limit * size


@pytest.mark.gpu
@pytest.mark.parametrize("group,head_dim,dtype,threshold", [
  (4, 128, jnp.bfloat16, 1), (4, 64, jnp.float16, None), (8, 128, jnp.bfloat16, None),
  (16, 128, jnp.bfloat16, None), (16, 64, jnp.bfloat16, 2), (16, 128, jnp.float16, 1)], ids=str)
def test_large_scores_on_device(group, head_dim, dtype, threshold):
  """Scores in the hundreds beside small ones, and rows that see small ones only."""
  q, k, v, _, sinks, segments = make_inputs(8, 2, 1000, 2, group, head_dim, dtype, True)
  q, k = q.at[:, ::37].multiply(8), k.at[:, ::53].multiply(8)
  indices = jnp.asarray(np.stack([
    selections.selection(name, 2, 1000, 5, 1) for name in ("walk r=1", "random")]))
  options = dict(sinks=sinks, segment_ids=segments)
  out = jax.jit(lambda q, k, v: gpu.block_sparse_attention(
    q, k, v, indices, plan=gpu.make_plan(indices, group, threshold), **options))(q, k, v)
  want = jax.jit(lambda *a: reference.block_sparse_attention(
    *a, indices, block_size=64, scale=head_dim ** -0.5, **options))(
      *(x.astype(jnp.float32) for x in (q, k, v)))
  assert relative(out, want) < RELATIVE[jnp.dtype(dtype).name]


@pytest.mark.gpu
@pytest.mark.parametrize("group,head_dim", [(4, 128), (16, 128), (8, 64)])
@pytest.mark.parametrize("threshold", [None, 1, 12])
def test_hybrid_on_device(group, head_dim, threshold):
  tokens = 1000
  picks = jnp.asarray(np.stack([
    selections.selection(name, 2, tokens, 6, 1) for name in ("walk r=1", "random")]))
  run = functools.partial(
    compare_hybrid, 7, 2, tokens, 2, group, head_dim, jnp.bfloat16, picks, segmented=True,
    per_head=threshold == 1, window=128, plan=gpu.make_plan(picks, group, threshold))
  for got, again in zip(jax.tree.leaves(run()), jax.tree.leaves(run())):
    assert (got == again).all(), "two runs differ"
