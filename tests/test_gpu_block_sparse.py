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

import pallas_kernels
from experiments.bench import selections
from pallas_kernels import compat
from pallas_kernels.block_sparse_attention.gpu import forward as tile_kernel
from pallas_kernels.block_sparse_attention.gpu import forward_split as split_kernel
from pallas_kernels.block_sparse_attention.gpu import op as gpu
from pallas_kernels.block_sparse_attention.gpu import plan as selection_plan
from pallas_kernels.block_sparse_attention.gpu.visibility import visibility
from pallas_kernels.checks import NotCoveredError
from tests import triton_interpreter
from tests.tolerances import TOLERANCES, assert_norm_close

make_plan = jax.jit(gpu.make_plan, static_argnums=(1, 2, 3, 4))
block_sparse = functools.partial(pallas_kernels.block_sparse_attention, implementation="mosaic_gpu")
block_sparse_reference = jax.jit(functools.partial(
  pallas_kernels.block_sparse_attention, implementation="reference"))


@pytest.fixture(scope="module")
def on_cpu():
  if jax.default_backend() != "cpu":
    pytest.skip("interpreters run on CPU")
  patch = pytest.MonkeyPatch()
  triton_interpreter.install_all(patch)
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


def norm(dtype, grad=False):
  """The tolerance's name."""
  return f"gpu_sparse_{'grad_' if grad else ''}{jnp.dtype(dtype).name}_norm"


def compare(run, reference_run, arguments, dout, dtype):
  """Forward and gradients of `run` against the reference's in float32; returns what `run` gave."""
  out, pullback = jax.vjp(run, *arguments)
  grads = pullback(dout)

  @jax.jit
  def expected(arguments, dout):
    want, pullback = jax.vjp(reference_run, *arguments)
    return want, pullback(dout)

  want, want_grads = expected(*jax.tree.map(lambda x: x.astype(jnp.float32), (arguments, dout)))
  assert out.dtype == dtype
  assert_norm_close(out, want, norm(dtype))
  for got, want_grad in zip(grads, want_grads, strict=True):
    assert_norm_close(got, want_grad, norm(dtype, grad=True))
  return out, grads


def check_plan(picks, config, num_keys, offsets):
  """Every list of a plan against loops; offsets: int of each batch row."""
  static = len(set(offsets)) == 1
  build = jax.jit(lambda picks, offsets: selection_plan.build_plan(
    picks, num_keys, offsets if not static else int(offsets_given[0]), config))
  offsets_given = np.asarray(offsets, np.int32)
  plan = jax.tree.map(np.asarray, build(picks, offsets_given))
  batch, kv_heads, tokens, width = picks.shape
  assert all(leaf.shape[:2] == (batch, kv_heads) for leaf in jax.tree.leaves(plan))
  tile, blocks = config.tile_tokens, -(-num_keys // 64)
  for b, k in np.ndindex(batch, kv_heads):
    mine = picks[b, k]
    position = np.minimum(offsets[b] + np.arange(tokens), num_keys - 1)
    is_rare = np.zeros(mine.shape, bool)
    for index in range(tokens // tile):
      rows = mine[index * tile:(index + 1) * tile]
      found, members = np.unique(rows[rows >= 0], return_counts=True)
      dense = members.sum() >= config.dense_tile * tile * len(found) and config.has_hot
      hot = found[members >= (1 if dense else config.hot_threshold)].tolist()
      if config.scattered:
        hot.sort(key=lambda block: block * 317 % blocks)       # of a power of two here
      own = sorted(set((position[index * tile:(index + 1) * tile] // 64).tolist()) & set(hot))
      hot = own + [x for x in hot if x not in own]
      assert len(own) <= plan.own_steps
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
      for work, want in ((plan.rare_work, entry[first]),
                         (plan.all_work, np.concatenate([entry[first], entry[~first]]))):
        if work is plan.rare_work and not config.has_rare:
          continue
        work = jax.tree.map(lambda x, at=(b, k): x[at], work)
        programs = range(work.first[block], work.first[block + 1])
        assert all(work.block[i] == block for i in programs)
        got = [e for i in programs for e in plan.entries[b, k][work.starts[i]:work.ends[i]]]
        assert got == want.tolist()


@pytest.mark.parametrize("config", [
  selection_plan.PlanConfig(32, 8, 2, 16, 32),
  selection_plan.PlanConfig(16, 2, 1, 16, 32, dense_tile=0.33, longest_first=False),
  selection_plan.PlanConfig(16, 1, 1, 16, 32, longest_first=False, scattered=True),
  selection_plan.PlanConfig(32, 33, 2, 16, 32)], ids=str)
@pytest.mark.parametrize("packed_bits", [32, 18, 2], ids=["one_sort", "sort_a_head", "two_keys"])
def test_plan_matches_loops(monkeypatch, config, packed_bits):
  monkeypatch.setattr(selection_plan, "PACKED_BITS", packed_bits)
  picks = np.stack([selections.walk(2, 1024, 2.0, 5), selections.random(2, 1024, 5)])
  picks[:, :, ::7] = -1
  check_plan(picks, config, 1024, (0, 0))


@pytest.mark.parametrize("config", [
  selection_plan.PlanConfig(32, 8, 2, 16, 32),
  selection_plan.PlanConfig(16, 1, 1, 16, 32, longest_first=False, scattered=True)], ids=str)
@pytest.mark.parametrize("offsets", [(40, 40), (70, 131), (777, 900)], ids=str)
def test_plan_of_some_queries_matches_loops(config, offsets):
  """Tiles that straddle two blocks, and queries past the last key."""
  picks = np.stack([selections.walk(2, 1024, 2.0, 5), selections.random(2, 1024, 5)])
  cut = np.full((2, 2, 192, 5), -1, np.int32)
  for b, offset in enumerate(offsets):
    rows = picks[b, :, offset:offset + 192]
    cut[b, :, :rows.shape[1]] = rows
  check_plan(cut, config, 1000, offsets)


def test_plan_of_32_selected_blocks():
  picks = np.stack([selections.random(1, 4096, 32)])[:, :, 2048:2304]
  check_plan(picks, selection_plan.PlanConfig(32, 8, 2, 16, 32), 4096, (2048,))


def test_plan_leaves_out_invisible_blocks():
  """Blocks past a token's position, or past the keys, as the reference leaves them out."""
  picks = np.tile(np.asarray([0, 1, 5, 99], np.int32), (1, 1, 128, 1))
  plan = selection_plan.build_plan(picks, 256, 0, selection_plan.PlanConfig())
  assert (plan.valid[0, 0] == 1 + np.arange(128) // 64).all()
  assert plan.num_blocks == 4


@pytest.mark.parametrize("offset,tokens,keys,window", [
  (0, 192, 192, 100), (50, 128, 178, 128), (100, 64, 110, 1), (30, 64, 600, 65)])
@pytest.mark.parametrize("group", [4, 16])
def test_window_plan_matches_loops(offset, tokens, keys, window, group):
  for given in (offset, jnp.asarray([offset, 0], jnp.int32)):
    visible = visibility(tokens, keys, given, None, None, window)
    config = selection_plan.PlanConfig(
      tile_tokens=tile_kernel.tile_tokens(group), hot_threshold=1)
    plan = jax.tree.map(np.asarray, selection_plan.window_plan(2, 3, tokens, visible, config))
    assert all(leaf.shape[:2] == (2, 3) for leaf in jax.tree.leaves(plan))
    for b, start in enumerate((offset, offset if given is offset else 0)):
      listed, entries = {}, plan.entries[b, 1]
      tile = config.tile_tokens
      for index in range(tokens // tile):
        steps = plan.counts[b, 1, index] * config.list_multiple
        words = plan.words[b, 1, index]
        assert not words[steps:].any()
        for block, word in zip(plan.blocks[b, 1, index], words):
          if word:
            for i in range(tile):
              listed.setdefault(index * tile + i, set()).add(int(block))
      work = jax.tree.map(lambda x, b=b: x[b, 1], plan.all_work)
      gathered = {}
      for block, first, last in zip(work.block, work.starts, work.ends):
        for entry in entries[first:last]:
          token, slot = divmod(int(entry), plan.selected)
          assert slot < plan.valid[b, 1, token]
          gathered.setdefault(token, {})[slot] = int(block)
      for token in range(tokens):
        position = start + token
        need = {j // 64 for j in range(max(position - window + 1, 0), min(position + 1, keys))}
        assert need <= listed.get(token, set())
        slots = gathered.get(token, {})
        assert need <= set(slots.values()) and len(set(slots.values())) == len(slots)
        assert sorted(slots) == list(range(plan.valid[b, 1, token]))


def test_plan_packs_where_it_was_measured_to_pay():
  configs = {
    (group, tokens): jax.eval_shape(
      functools.partial(gpu.make_plan, group=group, num_keys=tokens, query_offset=0),
      jax.ShapeDtypeStruct((1, 1, tokens, 16), jnp.int32)).config
    for group, tokens in ((4, 1024), (16, 32768), (16, 65536))}
  assert {key: config.hot_threshold for key, config in configs.items()} == {
    (4, 1024): 8, (16, 32768): 1, (16, 65536): 2}
  assert [config.scattered for config in configs.values()] == [False, True, True]


def test_plan_names_what_it_cannot_do():
  config = selection_plan.PlanConfig()
  with pytest.raises(NotCoveredError, match="T=100"):
    selection_plan.build_plan(jnp.zeros((1, 1, 100, 4), jnp.int32), 128, 0, config)
  with pytest.raises(NotCoveredError, match="33 selected blocks in tiles of 32"):
    selection_plan.build_plan(jnp.zeros((1, 1, 128, 33), jnp.int32), 128, 0, config)
  with pytest.raises(ValueError, match="tile_tokens"):
    selection_plan.PlanConfig(tile_tokens=5)
  with pytest.raises(ValueError, match="slots"):
    split_kernel.SplitConfig(slots=6)
  with pytest.raises(ValueError, match="prefetch_depth"):
    split_kernel.SplitConfig(prefetch_depth=5)
  plan = make_plan(jnp.zeros((1, 1, 128, 4), jnp.int32), 4, 128, 0)
  array = lambda heads: jnp.zeros((1, 128, heads, 64), jnp.bfloat16)
  with pytest.raises(ValueError, match="tiles of 32 tokens"):
    split_kernel.split_forward(array(16), array(1), array(1), plan,
                               visibility(128, 128, 0, None, None), scale=1.0, sinks=None)


def test_a_plan_of_other_arguments_is_refused():
  indices = jnp.zeros((1, 1, 64, 1), jnp.int32)
  array = lambda tokens, heads: jnp.zeros((1, tokens, heads, 64), jnp.bfloat16)
  plan = make_plan(indices, 4, 64, 0)
  with pytest.raises(ValueError, match="num_keys"):
    block_sparse(array(64, 4), array(128, 1), array(128, 1), indices, plan=plan)
  with pytest.raises(ValueError, match="query_offset=0; wanted 64"):
    block_sparse(array(64, 4), array(64, 1), array(64, 1), indices, plan=plan, query_offset=64)


def hot_kernel(group, config):
  """The tile or split kernel, interpreted, every selection hot: out and lse, compiled.

  config: SplitConfig, or the tile kernel's number of programs.
  """
  split = isinstance(config, split_kernel.SplitConfig)
  plan_config = selection_plan.PlanConfig(
    tile_tokens=(split_kernel if split else tile_kernel).tile_tokens(group), hot_threshold=1,
    list_multiple=1 if split else tile_kernel.BLOCKS_PER_STEP, scattered=split)
  kernel = split_kernel.split_forward if split else tile_kernel.tile_forward
  kernel = functools.partial(kernel, **{"config" if split else "programs": config})

  @jax.jit
  def run(q, k, v, indices, sinks=None, segment_ids=None):
    plan = selection_plan.build_plan(indices, k.shape[1], 0, plan_config)
    visible = visibility(q.shape[1], k.shape[1], 0, segment_ids, segment_ids)
    return kernel(q, k, v, plan, visible, scale=0.125, sinks=sinks,
                  interpret=compat.InterpretGPUParams())

  return run


@pytest.mark.parametrize("batch,tokens,group,picks,segmented,config", [
  (1, 128, 4, 2, False, 3),                                           # a second round for one
  (2, 64, 8, 1, True, 132),
  (1, 128, 16, 2, False, split_kernel.SplitConfig(programs=3)),       # up to three rounds
  (2, 64, 16, 1, True, split_kernel.SplitConfig(slots=3, prefetch_depth=1)),
], ids=str)
def test_hot_forward_interpreted(batch, tokens, group, picks, segmented, config):
  q, k, v, _, sinks, segments = make_inputs(
    0, batch, tokens, 1, group, 64, jnp.bfloat16, segmented)
  q = q.at[:, ::17].multiply(30)            # scores up to 1,000 in some tiles, and not in others
  indices = random_picks(1, batch, 1, tokens, picks)
  out, lse = hot_kernel(group, config)(q, k, v, indices, sinks=sinks, segment_ids=segments)
  want = block_sparse_reference(
    q.astype(jnp.float32), k, v, indices, sinks=sinks, segment_ids=segments)
  assert_norm_close(out, want, norm(jnp.bfloat16))
  assert (np.asarray(lse) > sinks - 1e-3).all()      # natural, the sink is in every sum


@pytest.mark.parametrize("group,config", [(4, 132), (16, split_kernel.SplitConfig())], ids=str)
def test_lse_is_natural_and_minus_infinity_without_a_key(group, config):
  q, k, v, _, _, _ = make_inputs(3, 1, 64, 1, group, 64, jnp.bfloat16, False)
  indices = jnp.where(jnp.arange(64)[:, None] % 3 == 0, -1, jnp.zeros((1, 1, 64, 1), jnp.int32))
  out, lse = hot_kernel(group, config)(q, k, v, indices)
  scores = np.einsum("btnh,bsh->btns", *(np.asarray(x, np.float64) for x in (q, k[:, :, 0])))
  visible = np.arange(64)[:, None] >= np.arange(64)
  want = np.log((np.exp(scores * 0.125) * visible[:, None]).sum(-1))
  none = np.arange(64) % 3 == 0
  assert np.isneginf(lse[:, none]).all() and not np.asarray(out[:, none]).any()
  np.testing.assert_allclose(lse[:, ~none], want[:, ~none], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("group,config", [
  (4, 132), (16, split_kernel.SplitConfig())])
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
  assert_norm_close(other[:, :cut], out[:, :cut], norm(jnp.bfloat16))


@pytest.mark.parametrize("group", [4, 16])
def test_smallest_weights_interpreted(group):
  """Rows whose every score is -78 in base 2 keep no maximum, those of -81 and -3000 do."""
  tokens, head_dim = 64, 64
  k = jnp.ones((1, tokens, 1, head_dim), jnp.bfloat16)
  v = jnp.asarray(np.random.default_rng(0).standard_normal(k.shape), jnp.bfloat16)
  indices = jnp.zeros((1, 1, tokens, 1), jnp.int32)
  run = hot_kernel(
    group, split_kernel.SplitConfig() if group == 16 else tile_kernel.PROGRAMS)
  want = (np.cumsum(np.asarray(v, np.float64), 1) / np.arange(1, tokens + 1)[:, None, None])
  for size in (6.75, 7.0, 256.0):
    score = -size * head_dim * 0.125
    q = jnp.full((1, tokens, group, head_dim), -size, jnp.bfloat16)
    out, lse = run(q, k, v, indices)
    assert_norm_close(out, np.broadcast_to(want, out.shape), norm(jnp.bfloat16))
    np.testing.assert_allclose(
      lse[0], score + np.log(np.arange(1, tokens + 1))[:, None].repeat(group, 1), rtol=1e-5)


@pytest.mark.parametrize("group,head_dim,segmented,tokens,threshold,offset", [
  (4, 128, False, 1024, None, 0), (8, 64, True, 1000, 1, None), (16, 128, True, 1024, 1, None),
  (16, 64, False, 1000, None, 40)])
def test_forward_lowers_for_cuda(monkeypatch, group, head_dim, segmented, tokens, threshold,
                                 offset):
  """The Mosaic kernels of both branches; the Triton kernels need a GPU to be imported."""
  def hot(q, k, v, sinks, visible, plan, scale):
    return gpu.hot_forward(q, k, v, gpu.whole_plan(q, k, visible, plan), visible, sinks=sinks,
                           scale=scale)

  monkeypatch.setattr(gpu, "forward", hot)

  def run(q, k, v, indices, segments, kv_segments, offsets):
    options = dict(implementation="mosaic_gpu",
                   query_offset=offsets if offset is None else offset)
    if segmented:
      options |= dict(segment_ids=segments, kv_segment_ids=kv_segments)
    plan = gpu.make_plan(indices, group, k.shape[1], options["query_offset"], threshold)
    return (pallas_kernels.block_sparse_attention(q, k, v, indices, plan=plan, **options),
            pallas_kernels.sliding_window_attention(q, k, v, **options))

  array = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype)
  keys = array((1, tokens + 100, 2, head_dim), jnp.bfloat16)
  lowered = jax.jit(run).trace(
    array((1, tokens, 2 * group, head_dim), jnp.bfloat16), keys, keys,
    array((1, 2, tokens, 16), jnp.int32), array((1, tokens), jnp.int32),
    array((1, tokens + 100), jnp.int32), array((1,), jnp.int32),
  ).lower(lowering_platforms=("cuda",))
  assert lowered.as_text().count("mosaic_gpu_v2") == 2


@pytest.mark.parametrize("batch,tokens,kv_heads,group,picks,segmented,threshold,partial_bytes", [
  (2, 100, 1, 3, 2, True, 1000, 1),         # key-major alone, padded T and G, a pass a head
  (1, 128, 1, 4, 2, False, 20, 6 << 30),    # hot and rare picks
])
def test_whole_op_interpreted(on_cpu, monkeypatch, batch, tokens, kv_heads, group, picks,
                              segmented, threshold, partial_bytes):
  from pallas_kernels.block_sparse_attention.gpu import key_major

  small = key_major.KeyMajorConfig(partial_bytes=partial_bytes)
  monkeypatch.setattr(key_major, "KeyMajorConfig", lambda: small)
  q, k, v, dout, sinks, segments = make_inputs(
    2, batch, tokens, kv_heads, group, 64, jnp.float16, segmented)
  indices = random_picks(3, batch, kv_heads, tokens, picks)
  plan = make_plan(indices, group, tokens, 0, threshold)
  compare(
    lambda q, k, v, sinks: block_sparse(
      q, k, v, indices, sinks=sinks, segment_ids=segments, plan=plan),
    lambda q, k, v, sinks: block_sparse_reference(
      q, k, v, indices, sinks=sinks, segment_ids=segments),
    (q, k, v, sinks), dout, jnp.float16)


@pytest.mark.parametrize("tokens,group,window,segmented", [(192, 4, 100, False)])
def test_sliding_window_interpreted(on_cpu, tokens, group, window, segmented):
  q, k, v, dout, sinks, segments = make_inputs(4, 1, tokens, 1, group, 64, jnp.float16, segmented)
  run = lambda implementation: lambda q, k, v, sinks: pallas_kernels.sliding_window_attention(
    q, k, v, window=window, sinks=sinks, segment_ids=segments, implementation=implementation)
  compare(run("mosaic_gpu"), run("reference"), (q, k, v, sinks), dout, jnp.float16)


def compare_hybrid(seed, batch, tokens, kv_heads, group, head_dim, dtype, picks, *, segmented,
                   per_head, window, plan):
  """Forward and gradients of the whole layer against the reference's."""
  q, k, v, dout, sinks, segments = make_inputs(
    seed, batch, tokens, kv_heads, group, head_dim, dtype, segmented)
  _, k_local, v_local, gates, sinks_local, _ = make_inputs(
    seed + 1, batch, tokens, kv_heads, group, head_dim, dtype, False)
  gates = jax.nn.sigmoid(gates[..., :1].astype(jnp.float32) if per_head else gates)
  run = lambda implementation, plan: (
    lambda q, k, v, *rest: pallas_kernels.sparse_layer_attention(
      q, k, v, picks, *rest, window=window, segment_ids=segments, plan=plan,
      implementation=implementation))
  return compare(
    run("mosaic_gpu", plan), run("reference", None),
    (q, k, v, k_local, v_local, gates, 1 - gates, sinks, sinks_local), dout, dtype)


@pytest.mark.parametrize("batch,tokens,group,threshold,per_head,segmented", [
  (2, 60, 3, 17, False, True),    # gates in the sum of the parts, a pass a row, padded T and G
  (1, 64, 4, 1, True, False),     # one kernel has all the picks, XLA gates
])
def test_hybrid_interpreted(on_cpu, monkeypatch, batch, tokens, group, threshold, per_head,
                            segmented):
  from pallas_kernels.block_sparse_attention.gpu import key_major

  small = key_major.KeyMajorConfig(partial_bytes=1)
  monkeypatch.setattr(key_major, "KeyMajorConfig", lambda: small)
  picks = random_picks(6, batch, 1, tokens, 2)
  plan = make_plan(picks, group, tokens, 0, threshold)
  rare = int(plan.rare.sum())
  assert (rare == 0) if threshold == 1 else (0 < rare < int(plan.valid.sum()))
  compare_hybrid(5, batch, tokens, 1, group, 64, jnp.float16, picks, segmented=segmented,
                 per_head=per_head, window=40, plan=plan)


@pytest.mark.parametrize("change,named", [
  (dict(block_size=32), "block_size 32"), (dict(head_dim=96), "H 96"),
  (dict(dtype=jnp.float32), "q dtype float32"), (dict(group=32), "G=32"),
  (dict(picks=33), "33 selected blocks"),
])
def test_limits_are_named(change, named):
  sizes = dict(block_size=64, head_dim=64, dtype=jnp.bfloat16, group=4, picks=4) | change
  array = lambda heads: jnp.zeros((1, 64, heads, sizes["head_dim"]), sizes["dtype"])
  with pytest.raises(NotCoveredError, match=named):
    block_sparse(
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
  @jax.jit
  def run(q, k, v, sinks, indices, segments):
    return block_sparse(
      q, k, v, indices, sinks=sinks, segment_ids=segments,
      plan=gpu.make_plan(indices, group, tokens, 0, threshold))

  @jax.jit
  def both(arguments, indices, segments, dout):
    out, pullback = jax.vjp(lambda *a: run(*a, indices, segments), *arguments)
    return out, pullback(dout)

  @jax.jit
  def expected(arguments, indices, segments, dout):
    arguments = jax.tree.map(lambda x: x.astype(jnp.float32), arguments)
    out, pullback = jax.vjp(lambda q, k, v, sinks: block_sparse_reference(
      q, k, v, indices, sinks=sinks, segment_ids=segments), *arguments)
    return out, pullback(dout.astype(jnp.float32))

  @jax.jit
  def summands(arguments, indices, segments, dout, out):
    """Norm of the -p_sink out dout that a sink's gradient sums: they cancel, their rounding not."""
    q, k, _, sinks = arguments
    seen = block_sparse_reference(                # the keys' share of the softmax
      q.astype(jnp.float32), k.astype(jnp.float32), jnp.ones(k.shape, jnp.float32), indices,
      sinks=sinks, segment_ids=segments)
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
    for got, again in zip(jax.tree.leaves(first), jax.tree.leaves(second)):
      assert (got == again).all(), "two runs differ"
    (out, (*grads, dsinks)), (want_out, (*want_grads, want_dsinks)) = first, want
    assert_norm_close(out, want_out, norm(dtype))
    for got, value in zip(grads, want_grads):
      assert_norm_close(got, value, norm(dtype, grad=True))
    limit = TOLERANCES[norm(dtype, grad=True)][1]
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
  out = jax.jit(lambda q, k, v: block_sparse(
    q, k, v, indices, plan=gpu.make_plan(indices, group, 1000, 0, threshold), **options))(q, k, v)
  want = block_sparse_reference(*(x.astype(jnp.float32) for x in (q, k, v)), indices, **options)
  assert_norm_close(out, want, norm(dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("group,head_dim", [(4, 128), (16, 128), (8, 64)])
@pytest.mark.parametrize("threshold", [None, 1, 12])
def test_hybrid_on_device(group, head_dim, threshold):
  tokens = 1000
  picks = jnp.asarray(np.stack([
    selections.selection(name, 2, tokens, 6, 1) for name in ("walk r=1", "random")]))
  run = functools.partial(
    compare_hybrid, 7, 2, tokens, 2, group, head_dim, jnp.bfloat16, picks, segmented=True,
    per_head=threshold == 1, window=128, plan=gpu.make_plan(picks, group, tokens, 0, threshold))
  for got, again in zip(jax.tree.leaves(run()), jax.tree.leaves(run())):
    assert (got == again).all(), "two runs differ"
