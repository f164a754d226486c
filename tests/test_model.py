"""The model: one forward for training, prefill and decoding; ablations that do what they say."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hysparse_jax import config
from hysparse_jax.data.batches import Batch
from hysparse_jax.errors import UserError
from hysparse_jax.model import transformer as model
from hysparse_jax.model.cache import init_cache
from hysparse_jax.model.decoder_layer import TokenContext
from hysparse_jax.model.fused import fused
from hysparse_jax.model.hybrid import FullLayer, SparseLayer, by_layer
from hysparse_jax.model.layers import positions_within
from hysparse_jax.model.transformer import Transformer
from hysparse_jax.training import losses
from tests.older import older
from tests.tolerances import TOLERANCES, assert_close
from tests.weights import drawn

# Two groups of layers, (full + 2) and a last full one; 8 blocks of 16 keys at T=128, 2 selected.
SMALL = config.ModelConfig(
  num_layers=4, sparse_per_full=2, d_model=48, num_heads=4, num_kv_heads=2, head_dim=16, d_ff=64,
  vocab_size=64, block_size=16, selected_tokens=32, window=24, qk_norm=True, dtype="float32")
TRAIN = config.TrainConfig()
MOE = config.MoeConfig(num_experts=4, experts_per_token=2, d_ff=32)
NOPE, PARTIAL = config.RopeConfig(fraction=0.0), config.RopeConfig(base=500.0, fraction=0.25)

# One absent device: what runs there is known without it.
TPU = jax.sharding.AbstractMesh(
  (1,) * len(config.MESH_AXES), config.MESH_AXES,
  axis_types=(jax.sharding.AxisType.Auto,) * len(config.MESH_AXES),
  abstract_device=jax.sharding.AbstractDevice(
    device_kind="TPU v5", num_cores=1, platform="tpu"))


def variant(**fields):
  return dataclasses.replace(SMALL, **fields)


make = functools.lru_cache(drawn)


@jax.jit
def forward(net, tokens, segment_ids=None, positions=None):
  return net(tokens, segment_ids, positions)


@jax.jit
def prefill(net, tokens, cache, lengths=None):
  return net.prefill(tokens, cache, lengths)


@jax.jit
def decode(net, tokens, cache, lengths=None):
  return net.decode(tokens, cache, lengths)


def random_tokens(shape, seed=1, vocab=64):
  return jax.random.randint(jax.random.key(seed), shape, 0, vocab)


def random_batch(shape=(4, 64), seed=2, cut=21):
  """Two documents per row, the second from `cut` on, and padding at the end."""
  tokens = random_tokens((shape[0], shape[1] + 1), seed)
  end = shape[1] - 5
  index = jnp.broadcast_to(jnp.arange(shape[1]), shape)
  segments = jnp.where(index < cut, 1, jnp.where(index < end, 2, 0))
  weights = ((segments > 0) & (index != cut - 1) & (index != end - 1)).astype(jnp.float32)
  return Batch(tokens[:, :-1], tokens[:, 1:], segments,
               positions_within(segments, shape), weights)


@pytest.mark.parametrize("fields", older([
  dict(), dict(attention="full"), dict(attention="swa"), dict(local_shares_kv=True),
  dict(moe=MOE), dict(block_choice="random"), dict(gate="none", sinks=False),
  dict(local_branch=False), dict(pattern="full sparse full window sparse", num_layers=5),
  dict(pattern="window window full sparse full sparse", num_layers=6),
  dict(pattern="window window", num_layers=2),
  dict(pattern="full window sparse sparse", local_shares_kv=True),
  dict(pattern="full sparse window full", rope=NOPE, rope_window=PARTIAL)],
  dict(), dict(moe=MOE), dict(pattern="window window full sparse full sparse", num_layers=6)),
  ids=str)
def test_decoding_equals_one_pass(fields):
  net = make(variant(**fields))
  tokens = random_tokens((2, 70))
  whole = forward(net, tokens)
  cache = net.init_cache(2, 80)
  edges = [0, 15, 30, 45]                       # across block edges at 16, 32 and the window's 24
  for start, end in zip(edges, edges[1:]):
    logits, cache = prefill(net, tokens[:, start:end], cache)
    assert_close(logits, whole[:, end - 1], "decode_f32")
  for t in range(45, 70):
    logits, cache = decode(net, tokens[:, t], cache)
    assert_close(logits, whole[:, t], "decode_f32")
  assert cache.length.tolist() == [70, 70]


def test_rows_of_different_length_prefill_together():
  net = make(SMALL)
  tokens = random_tokens((2, 40))
  together, cache = prefill(net, tokens, net.init_cache(2, 64), jnp.array([40, 29]))
  together2, _ = decode(net, tokens[:, 0], cache)
  for row, length in ((0, 40), (1, 29)):
    alone = tokens[row:row + 1, :length]
    assert_close(together[row], forward(net, alone)[0, -1], "decode_f32")
    longer = jnp.concatenate([alone, tokens[row:row + 1, :1]], axis=1)
    assert_close(together2[row], forward(net, longer)[0, -1], "decode_f32")


def test_sparse_layers_cache_nothing_that_grows():
  for attention, has_ring in (("hysparse", True), ("swa", True), ("full", False)):
    cfg = variant(attention=attention)
    short, long = (jax.eval_shape(functools.partial(init_cache, cfg, 2, n)) for n in (100, 200))
    for a, b, group in zip(short.groups, long.groups, cfg.layer_groups):
      for cache, pages in ((a, 7), (b, 13)):                       # of 16 tokens
        assert cache.k_pages.shape == (group.count, 2 * pages, 2, 16, 16)
      assert len(a.rings) == len(group.runs)
      for one, other, run in zip(a.rings, b.rings, group.runs):
        assert has_ring
        assert one.k.shape == other.k.shape == (group.count * run.count, 2, 2, 24, 16)
  assert init_cache(variant(local_shares_kv=True), 1, 8).groups[0].rings[0].k is None
  mixed = variant(pattern="full window sparse sparse", local_shares_kv=True)
  assert [ring.k is None for ring in init_cache(mixed, 1, 8).groups[0].rings] == [False, True]
  leading = init_cache(variant(pattern="window window full sparse"), 1, 8)
  assert leading.groups[0].k_pages is None and leading.max_tokens == 16


def test_rows_share_pages_in_any_order():
  """Rows take pages out of one pool as they grow; what lies in other pages changes nothing."""
  net, rng = make(SMALL), np.random.default_rng(0)
  tokens, lengths = random_tokens((3, 50)), np.array([50, 17, 33])
  cache = net.init_cache(3, 64, num_pages=10)
  assert cache.page_table.tolist() == [[-1] * 4] * 3 and cache.max_tokens == 64
  dirty = jax.tree.map(lambda x: x + jnp.nan if x.ndim == 5 else x, cache.groups)
  table, free = np.full((3, 4), -1, np.int32), list(rng.permutation(10))
  cache = cache._replace(groups=dirty)
  for start, end in ((0, 20), (20, 41), (41, 50)):
    used = np.clip(lengths - start, 0, end - start)
    for row, length in enumerate(np.minimum(lengths, end)):
      for page in range(-(-length // 16)):
        table[row, page] = free.pop() if table[row, page] < 0 else table[row, page]
    before, cache = cache.length, cache._replace(page_table=jnp.asarray(table))
    logits, cache = prefill(net, tokens[:, start:end], cache, jnp.asarray(used))
    for row in range(3):
      if used[row]:
        assert_close(logits[row], forward(net, tokens[row:row + 1])[0, before[row] + used[row] - 1],
                     "decode_f32")
  more, cache = decode(net, tokens[:, 0], cache, jnp.array([1, 0, 1]))
  assert cache.length.tolist() == [51, 17, 34]
  for row in (0, 2):
    longer = jnp.concatenate([tokens[row, :lengths[row]], tokens[row, :1]])[None]
    assert_close(more[row], forward(net, longer)[0, -1], "decode_f32")
  # Row 1's page is full at 32 tokens, and it has two; row 2 has three.
  full = cache._replace(length=jnp.array([51, 32, 34]))
  assert np.isnan(decode(net, tokens[:, 0], full)[0]).any(-1).tolist() == [False, True, False]


@pytest.mark.parametrize("fields", [
  dict(), dict(gate="per_head", pattern="full window sparse full", attention="hysparse"),
  dict(gate="none", local_branch=False), dict(local_shares_kv=True), dict(moe=MOE)], ids=str)
def test_fused_weights_compute_the_same(fields):
  net = make(variant(**fields))
  side_by_side, tokens = fused(net), random_tokens((2, 40))
  assert sum(x.size for x in jax.tree.leaves(side_by_side)) == sum(
    x.size for x in jax.tree.leaves(net))
  assert len(jax.tree.leaves(side_by_side)) < len(jax.tree.leaves(net))
  assert_close(forward(side_by_side, tokens), forward(net, tokens), "decode_f32")


def test_the_previous_tokens_blocks_do_not_decode():
  with pytest.raises(UserError, match="'previous' trains and evaluates without a cache") as error:
    make(variant(block_choice="previous")).init_cache(1, 8)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize("attention", ["hysparse", "full", "swa"])
def test_documents_of_a_row_never_see_each_other(attention):
  net = make(variant(attention=attention))
  batch = random_batch((1, 64), cut=32)     # at a block's edge: blocks are counted along the row
  second = batch.segment_ids[0] == 2
  logits = lambda net, tokens: forward(net, tokens, batch.segment_ids, batch.positions)
  changed = jnp.where(batch.segment_ids == 1, (batch.tokens + 7) % 64, batch.tokens)
  before, after = logits(net, batch.tokens)[0], logits(net, changed)[0]
  assert (before[second] == after[second]).all()
  assert (before[batch.segment_ids[0] == 1] != after[batch.segment_ids[0] == 1]).any()
  alone = forward(net, batch.tokens[:, second])
  assert_close(before[second], alone[0], "decode_f32")


def test_positions_count_from_the_start_of_each_document():
  segments = jnp.array([[1, 1, 1, 2, 2, 0, 0]])
  assert positions_within(segments, (1, 7)).tolist() == [[0, 1, 2, 0, 1, 0, 1]]
  assert positions_within(None, (2, 3)).tolist() == [[0, 1, 2]] * 2


CHANGES = dict(
  attention="full", vocab_size=72, num_layers=6, d_model=64, num_heads=8, num_kv_heads=4,
  head_dim=32, value_head_dim=8, d_ff=96, moe=MOE, sparse_per_full=1, block_size=32,
  selected_tokens=48, window=16, local_branch=False, local_shares_kv=True,
  pattern="full sparse window full", gate="per_head", sinks=False, qk_norm=False, rope=PARTIAL,
  norm_eps=1e-5, tied_embeddings=True, dtype="bfloat16", remat="layer", block_choice="random")


def lowered(cfg):
  """The program of the loss, and of its gradient where only that can differ."""
  abstract = jax.eval_shape(lambda key: Transformer(cfg, rngs=nnx.Rngs(key)), jax.random.key(0))
  batch = jax.eval_shape(lambda: random_batch((2, 128)))
  objective = lambda net, batch: losses.next_token(config.TrainConfig(), net, batch)[0]
  objective = objective if cfg.remat == "none" else jax.grad(objective)
  return jax.jit(objective).lower(abstract, batch).as_text()


def test_every_model_field_changes_the_program():
  names = {field.name for field in dataclasses.fields(config.ModelConfig)}
  # `implementation` names a kernel and `rope_window` needs window layers, see below.
  assert names == set(CHANGES) | {"implementation", "rope_window"}
  reference = lowered(SMALL)
  assert lowered(dataclasses.replace(SMALL)) == reference  # the comparison itself is stable
  for name, value in CHANGES.items() - {("remat", "layer")}:
    assert lowered(variant(**{name: value})) != reference, f"{name}={value!r} changed nothing"
  assert lowered(variant(gate="none")) != lowered(variant(gate="per_head"))
  assert lowered(variant(remat="layer")) != lowered(variant(remat="block"))


def test_every_rope_field_changes_the_program():
  windows = dict(pattern="full sparse window full")
  base = lowered(variant(**windows))
  assert lowered(variant(**windows, rope_window=PARTIAL)) != base
  yarn = config.RopeConfig(scaling="yarn", factor=4.0, original_tokens=1024)
  base = lowered(variant(rope=yarn))
  changes = dict(base=500.0, fraction=0.5, scaling="ntk", factor=2.0, original_tokens=4096,
                 beta_fast=4.0, beta_slow=0.5)
  assert set(changes) == {field.name for field in dataclasses.fields(config.RopeConfig)}
  for name, value in changes.items():
    assert lowered(variant(rope=dataclasses.replace(yarn, **{name: value}))) != base, name


def test_every_moe_field_changes_the_program():
  base = lowered(variant(moe=MOE))
  changes = dict(num_experts=8, experts_per_token=1, d_ff=16, load_balance_weight=0.5,
                 router_z_weight=0.5, bias_update_rate=0.1, normalize_weights=False)
  assert set(changes) == {field.name for field in dataclasses.fields(config.MoeConfig)}
  for name, value in changes.items():
    assert lowered(variant(moe=dataclasses.replace(MOE, **{name: value}))) != base, name


def test_an_implementation_that_is_not_there_is_an_error():
  with pytest.raises(UserError, match="abacus"):
    variant(implementation="abacus")


def test_cached_ops_obey_the_implementation():
  """One named implementation runs or raises, with a cache as without."""
  abstract = lambda cfg: jax.eval_shape(lambda: Transformer(cfg, rngs=nnx.Rngs(0)))
  net = abstract(variant(implementation="mosaic_gpu"))
  cache = jax.eval_shape(lambda: init_cache(net.cfg, 1, 8))
  with pytest.raises(NotImplementedError, match="paged_oracle_attention: .*'mosaic_gpu'"):
    jax.eval_shape(lambda net, cache: net.decode(jnp.zeros(1, jnp.int32), cache), net, cache)
  # On a TPU, None takes the kernels and "reference" does not.
  shape = dict(head_dim=128, block_size=64, selected_tokens=128, window=128)
  with jax.sharding.use_abstract_mesh(TPU):
    chosen = model.implementations_of(variant(**shape), 1, 512, decode=True)
    assert chosen == {"paged_oracle_attention": "mosaic_tpu",
                      "paged_sparse_layer_attention": "mosaic_tpu"}
    named = variant(implementation="reference", **shape)
    assert set(model.implementations_of(named, 1, 512, decode=True).values()) == {"reference"}


def test_the_implementation_of_every_op_is_known_before_the_run():
  ops = ["oracle_attention", "plan_blocks", "sparse_layer_attention"]
  assert model.implementations_of(SMALL, 2, 64) == dict.fromkeys(ops, "reference")
  chosen = model.implementations_of(variant(attention="swa"), 2, 64)
  assert sorted(chosen) == ["oracle_attention", "sparse_layer_attention"]
  with jax.sharding.use_abstract_mesh(TPU):     # the kernels do not take blocks of 12 keys
    with pytest.raises(NotImplementedError, match="rows of 4096 tokens are too long"):
      model.implementations_of(variant(block_size=12, selected_tokens=24), 1, 4096)
    asked = variant(block_size=12, selected_tokens=24, implementation="reference")
    assert set(model.implementations_of(asked, 1, 4096).values()) == {"reference"}


def test_all_blocks_selected_is_full_attention_over_the_shared_kv():
  cfg = variant(local_branch=False, selected_tokens=128, gate="none", sinks=False)
  full, layer = FullLayer(cfg, rngs=nnx.Rngs(0)), SparseLayer(cfg, rngs=nnx.Rngs(1))
  x = jax.random.normal(jax.random.key(2), (2, 100, 48))
  context = TokenContext(positions_within(None, (2, 100)))

  @jax.jit
  def both(x):
    after, shared, _, _ = full(x, context, cfg.num_blocks)
    return after, shared, layer(after, shared, context)[0]

  after, shared, actual = both(x)

  q, *_ = layer.project(after, context)
  q = q.reshape(2, 100, 2, 2, 16)
  scores = jnp.einsum("btkgh,bskh->bkgts", q, shared.k) / 4.0
  scores = jnp.where(jnp.tril(jnp.ones((100, 100), bool)), scores, -jnp.inf)
  o = jnp.einsum("bkgts,bskh->btkgh", jax.nn.softmax(scores), shared.v).reshape(2, 100, 4, 16)
  expected, _ = layer.finish(after, o, context)
  assert_close(actual, expected, "attention_routes_f32")


def test_sharing_the_kv_takes_projections_away():
  assert not hasattr(make(variant(local_shares_kv=True)).stack.groups[0].runs[0], "wk")
  assert hasattr(make(SMALL).stack.groups[0].runs[0], "wk")


def test_remat_changes_memory_not_values():
  """Six hybrid blocks, so that what each saves outweighs what one needs while it is recomputed."""
  batch, results, temporaries = random_batch(), [], []
  cfg = variant(num_layers=18, pattern=" ".join(["full sparse sparse"] * 6))
  for remat in ("none", "layer", "block"):
    net = make(dataclasses.replace(cfg, remat=remat))
    program = jax.jit(jax.value_and_grad(
      lambda net: losses.next_token(TRAIN, net, batch)[0])).lower(net).compile()
    value, grads = program(net)
    results.append((value, jax.tree.leaves(grads)))
    temporaries.append(program.memory_analysis().temp_size_in_bytes)
  none, layer, block = temporaries
  assert layer < 0.7 * none and block < 0.7 * none, temporaries
  for value, grads in results[1:]:
    assert_close(value, results[0][0], "same_sum_f32")
    for a, b in zip(grads, results[0][1]):
      assert_close(a, b, "gradient_f32")


def test_the_head_multiplies_in_the_compute_dtype_both_ways():
  rng = np.random.default_rng(0)
  hidden = jnp.asarray(rng.standard_normal((2, 24, 32)), jnp.bfloat16)
  head = jnp.asarray(rng.standard_normal((32, 50)) / 6, jnp.bfloat16)
  lse = lambda hidden, head: jax.nn.logsumexp(model._scores(hidden, head), axis=-1).sum()
  program = jax.jit(jax.grad(lse, argnums=(0, 1))).lower(hidden, head).as_text()
  products = [line for line in program.splitlines() if "dot_general" in line]
  assert len(products) == 3
  assert all(line.split(" : (")[1].split(") ->")[0].count("bf16") == 2 for line in products)
  got = jax.grad(lse, argnums=(0, 1))(hidden, head)
  exact = jax.grad(lambda x, w: jax.nn.logsumexp(x @ w, axis=-1).sum(), argnums=(0, 1))(
    hidden.astype(jnp.float32), head.astype(jnp.float32))
  for value, expected in zip(got, exact):
    error = jnp.linalg.norm(value.astype(jnp.float32) - expected) / jnp.linalg.norm(expected)
    assert error < TOLERANCES["head_grad_bf16"][0]


def test_loss_in_chunks_and_z_loss():
  net, batch = make(variant(tied_embeddings=True)), random_batch()
  loss = jax.jit(losses.next_token, static_argnums=0)
  whole, stats = loss(config.TrainConfig(z_loss=0.01), net, batch)
  chunked, _ = loss(config.TrainConfig(z_loss=0.01, loss_chunk=16), net, batch)
  assert_close(chunked, whole, "same_sum_f32")
  logits = np.asarray(forward(net, batch.tokens, batch.segment_ids, batch.positions), np.float64)
  lse = np.log(np.exp(logits).sum(-1))
  nll = lse - np.take_along_axis(logits, np.asarray(batch.targets)[..., None], -1)[..., 0]
  expected = ((nll + 0.01 * lse**2) * batch.weights).sum() / batch.weights.sum()
  assert_close(whole, expected, "heldout_f32")
  assert float(stats.weight) == float(batch.weights.sum())


def test_padding_reaches_nothing():
  net, batch = make(SMALL), random_batch()
  padding = (batch.segment_ids == 0)[..., None]

  @jax.jit
  def states(net, x):
    return net.stack(x, TokenContext(batch.positions, batch.segment_ids))[0]

  x = net.embed(batch.tokens)
  poisoned = states(net, jnp.where(padding, 1e4 * jax.random.normal(jax.random.key(5), x.shape), x))
  assert (jnp.where(padding, 0, poisoned) == jnp.where(padding, 0, states(net, x))).all()
  assert (jnp.where(padding, poisoned, 0) != jnp.where(padding, states(net, x), 0)).any()


def test_bad_tokens_and_full_caches_are_errors():
  net = make(SMALL)
  cache = net.init_cache(1, 8)
  with pytest.raises(UserError, match="token 64 is outside the vocabulary of 64"):
    net.prefill(jnp.array([[1, 64]]), cache)
  with pytest.raises(UserError, match="token -1"):
    net.prefill(jnp.array([[-1]]), cache)
  with pytest.raises(UserError, match="room for 16 tokens, 0 are in it and 17 more"):
    net.prefill(random_tokens((1, 17)), cache)
  with pytest.raises(UserError, match="between 0 and the 2"):
    net.prefill(random_tokens((1, 2)), cache, jnp.array([3]))
  with pytest.raises(UserError, match="holds 1 sequences, got 2"):
    net.prefill(random_tokens((2, 2)), cache)
  # Where values are not known, the row is NaN instead.
  logits, _ = prefill(net, random_tokens((1, 17)), cache)
  assert np.isnan(logits).all()
  logits = forward(net, jnp.array([[3, 64, 5], [1, 2, 3]]))
  assert np.isnan(logits[0, 1:]).all() and np.isfinite(logits[1]).all()


def test_gate_means_leave_padding_out():
  """Rows with padding report the means of the same rows without it."""
  net, batch = make(SMALL), random_batch((4, 64))
  stats = lambda tokens, segments: by_layer(
    SMALL, jax.jit(lambda net: net.hidden(tokens, segments)[1])(net))
  padded = stats(batch.tokens, batch.segment_ids)
  alone = stats(batch.tokens[:, :59], batch.segment_ids[:, :59])
  with_padding = stats(batch.tokens, jnp.maximum(batch.segment_ids, 3 * (batch.segment_ids == 0)))
  for layer in (1, 2):
    for name in ("gate_sparse", "gate_local"):
      value, without, over_all = (float(getattr(s[layer], name))
                                  for s in (padded, alone, with_padding))
      assert_close(value, without, "same_sum_f32")
      assert abs(value - over_all) > 1e-5


def test_a_profile_reads_like_the_model():
  cfg = variant(pattern="window full sparse sparse", moe=MOE, block_choice="random")
  net = jax.eval_shape(lambda: Transformer(cfg, rngs=nnx.Rngs(0)))
  step = jax.jit(jax.grad(lambda net: losses.next_token(TRAIN, net, random_batch())[0]))
  text = step.lower(net).as_text(debug_info=True)
  stages = [f"{kind}_layer/{stage}" for kind in ("window", "full", "sparse")
            for stage in ("project", "attend", "out", "moe")]
  for scope in ["embed", "full_layer/select", "head", "loss", *stages]:
    assert re.search(rf"\b{scope}\b", text), scope
  dense = jax.jit(lambda net, tokens: net(tokens)).lower(make(SMALL), random_tokens((1, 32)))
  assert "sparse_layer/mlp" in dense.as_text(debug_info=True)


def test_gates_and_loads_are_reported_by_layer():
  net = make(variant(moe=MOE))
  _, stats = jax.jit(losses.next_token, static_argnums=0)(config.TrainConfig(), net,
                                                           random_batch())
  layers = by_layer(net.cfg, stats.layers)
  assert [layer.gate_sparse is None for layer in layers] == [True, False, False, True]
  for layer in layers:
    assert layer.router.expert_load.shape == (4,)
    assert_close(layer.router.expert_load.sum(), 1.0, "same_sum_f32")
  assert 0 < float(layers[1].gate_local) < 1
