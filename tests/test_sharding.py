"""One device and eight compute the same; what cannot be split is said in one line."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from hysparse_jax import config, sharding
from hysparse_jax.data import batches as data
from hysparse_jax.errors import UserError
from hysparse_jax.model import cache as kv_cache
from hysparse_jax.model.hybrid import by_layer
from hysparse_jax.training import losses
from hysparse_jax.training import step as train_step
from hysparse_jax.training.checkpoint import Checkpoints
from tests.test_configs import REPO
from tests.tolerances import assert_close
from tests.weights import drawn

MESHES = {
  "data": dict(data=8, fsdp=1), "fsdp": dict(fsdp=8), "tensor": dict(fsdp=1, tensor=2),
  "mixed": dict(data=2, fsdp=2, tensor=2)}
MOE_MESHES = {
  "data": dict(data=4, fsdp=1), "fsdp": dict(fsdp=4), "tensor": dict(fsdp=1, tensor=2),
  "expert": dict(fsdp=1, expert=8), "mixed": dict(fsdp=2, tensor=2, expert=2)}


def cases(meshes):
  """HySparse on every mesh; the baselines, whose arrays have the same axes, on the mixed one."""
  return [(mesh, "hysparse") for mesh in meshes] + [("mixed", "full"), ("mixed", "swa")]


@functools.lru_cache
def load(name, attention):
  """The config at a length the tests can afford, and without the full layer at its end."""
  return config.override(config.load(str(REPO / "configs" / f"{name}.py")),
                         f"model.attention={attention}", "data.seq_len=64", "data.batch_size=8",
                         "model.num_layers=3", "model.pattern=full sparse sparse")


@functools.lru_cache
def batch_of(cfg):
  return jax.tree.map(np.asarray, data.TrainStream(cfg).batch(3))


@functools.lru_cache
def weights_of(cfg):
  return jax.device_get(drawn(cfg.model))


def gradients(cfg, mesh):
  """Loss and gradients by leaf name, with weights and batch where a run would have them."""
  sharding.check_divisible(cfg, mesh)

  def objective(net, batch):
    return losses.next_token(config.TrainConfig(z_loss=1e-3), net, batch)[0]

  net = weights_of(cfg)
  places = sharding.shardings(net, mesh)
  step = jax.jit(jax.value_and_grad(objective),
                 in_shardings=(places, sharding.batch_sharding(mesh)),
                 out_shardings=(None, places))
  with jax.set_mesh(mesh):
    value, grads = step(net, batch_of(cfg))
  leaves = jax.tree_util.tree_leaves_with_path(grads)
  return value, {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


@functools.lru_cache
def on_one_device(cfg):
  return gradients(cfg, sharding.make_mesh(config.MeshConfig(fsdp=1), jax.devices()[:1]))


def mesh_of(sizes):
  cfg = config.MeshConfig(**sizes)
  return sharding.make_mesh(cfg, jax.devices()[:np.prod(list(sizes.values()))])


def check(cfg, sizes):
  value, grads = gradients(cfg, mesh_of(sizes))
  expected_value, expected = on_one_device(cfg)
  assert_close(value, expected_value, "sharded_f32")
  assert grads.keys() == expected.keys()
  for name, leaf in grads.items():
    assert np.abs(expected[name]).max() > 0, f"{name} has no gradient"
    assert_close(leaf, expected[name], "sharded_f32")


@pytest.mark.parametrize("mesh, attention", cases(MESHES))
def test_tiny_on_a_mesh_equals_one_device(mesh, attention):
  check(load("tiny", attention), MESHES[mesh])


@pytest.mark.parametrize("mesh, attention", cases(MOE_MESHES))
def test_tiny_moe_on_a_mesh_equals_one_device(mesh, attention):
  check(load("tiny_moe", attention), MOE_MESHES[mesh])


MIXED = ("model.pattern=window full sparse window sparse", "model.num_layers=5",
         "model.rope_window.fraction=0.25")


def test_a_mixed_pattern_on_a_mesh_equals_one_device():
  check(config.override(load("tiny", "hysparse"), *MIXED), MESHES["mixed"])


def test_a_mixed_pattern_decodes_on_a_mesh_as_on_one_device():
  cfg = config.override(load("tiny", "hysparse"), *MIXED)
  net, tokens = jax.tree.map(jnp.asarray, weights_of(cfg)), batch_of(cfg).tokens[:4, :41]
  expected = np.asarray(net(tokens))
  mesh = mesh_of(MESHES["mixed"])
  with jax.set_mesh(mesh):
    cache = net.init_cache(4, 48)
  assert cache.page_table.tolist() == [[0, 1, 2]] * 4        # each shard has one row's pages
  places = kv_cache.shardings(cache, mesh)
  assert jax.tree.structure(places) == jax.tree.structure(cache)
  for leaf, place in zip(jax.tree.leaves(cache), jax.tree.leaves(places)):
    axes = {axis for entry in place.spec if entry for axis in np.atleast_1d(entry)}
    assert axes >= ({"data", "fsdp"} if leaf.ndim < 5 else {"data", "fsdp", "tensor"})
  options = dict(out_shardings=(None, places), donate_argnums=2)
  with jax.set_mesh(mesh):
    net = jax.device_put(net, sharding.shardings(net, mesh))
    cache = jax.device_put(cache, places)
    logits, cache = jax.jit(lambda net, ids, cache: net.prefill(ids, cache), **options)(
      net, tokens[:, :40], cache)
    assert_close(logits, expected[:, 39], "sharded_f32")
    logits, cache = jax.jit(lambda net, ids, cache: net.decode(ids, cache), **options)(
      net, tokens[:, 40], cache)
    assert_close(logits, expected[:, 40], "sharded_f32")


def test_a_mixed_pattern_trains_one_step():
  cfg = config.override(load("tiny_moe", "hysparse"), "model.pattern=window full sparse",
                        "model.num_layers=3", "model.moe.bias_update_rate=0.01")
  mesh = mesh_of(dict(fsdp=2, expert=2))
  program = train_step.build(cfg, mesh)
  with jax.set_mesh(mesh):
    state = program.init(jax.random.key(0))
    before = jax.tree.map(np.array, state)                   # the step takes the state's memory
    after, metrics = program.step(state, jax.device_put(batch_of(cfg), program.batch_sharding))
  assert bool(metrics.ok) and np.isfinite(float(metrics.loss))
  for (path, old), new in zip(jax.tree_util.tree_leaves_with_path(before.model),
                              jax.tree.leaves(after.model), strict=True):
    assert (np.asarray(old) != np.asarray(new)).any(), jax.tree_util.keystr(path)
  kinds = [(layer.gate_sparse is None, layer.gate_local is None)
           for layer in by_layer(cfg.model, metrics.layers)]
  window, full, sparse = (True, False), (True, True), (False, False)
  assert kinds == [window, full, sparse]


def test_a_misspelt_axis_or_operand_is_an_error():
  with pytest.raises(ValueError, match="'haeds' is not a logical axis; use one of embed, vocab"):
    sharding.spec(("batch", "haeds"))
  with pytest.raises(ValueError, match="'block_indexes' is not an operand"):
    sharding.sharded(lambda **arrays: None, block_indexes=np.zeros((1, 2, 3, 4), np.int32))
  with pytest.raises(ValueError, match="'result' is not an operand"):
    sharding.sharded(lambda q: q, returns="result", q=np.zeros((1, 2, 3, 4)))


def test_every_array_argument_of_the_ops_has_logical_axes():
  options = {"block_size", "num_blocks", "num_heads", "num_keys", "window", "scale",
             "implementation"}
  ops = [getattr(pallas_kernels, name) for name in pallas_kernels.__all__]
  arguments = {name for op in ops for name in inspect.signature(op).parameters}
  assert arguments - options == set(sharding.OPERANDS) - {
    "out", "query_positions", "valid"}                       # of the cache's own functions
  for axes in sharding.OPERANDS.values():
    sharding.spec(axes)


def test_operands_are_split_as_they_are_named():
  """Each device gets its own rows and heads, of stacked operands and of a plan too."""
  mesh = mesh_of(MESHES["mixed"])
  shapes = {}

  def op(**arrays):
    shapes.update(jax.tree.map(lambda x: x.shape, arrays))
    return arrays["q"], arrays["plan"]

  arrays = dict(q=np.zeros((4, 6, 4, 8)), k=np.zeros((3, 4, 6, 2, 8)), sinks=np.zeros(4),
                plan={"order": np.arange(4 * 2 * 5).reshape(4, 2, 5)}, segment_ids=None,
                layer=np.int32(1), query_offset=np.arange(4))
  with jax.set_mesh(mesh):
    q, plan = jax.jit(lambda arrays: sharding.sharded(op, returns=("q", "plan"), **arrays))(arrays)
  assert shapes == dict(q=(1, 6, 2, 8), k=(3, 1, 6, 1, 8), sinks=(2,), plan={"order": (1, 1, 5)},
                        segment_ids=None, layer=(), query_offset=(1,))
  np.testing.assert_array_equal(plan["order"], arrays["plan"]["order"])


@functools.lru_cache
def tiny_moe_program():
  """(cfg, mesh, program): router biases and Muon's moments move; one step is compiled for all."""
  cfg = config.override(load("tiny_moe", "hysparse"), "model.moe.bias_update_rate=0.01")
  mesh = mesh_of(MOE_MESHES["mixed"])
  return cfg, mesh, train_step.build(cfg, mesh)


def test_a_checkpoint_moves_between_meshes_byte_for_byte(tmp_path):
  cfg, mesh, first = tiny_moe_program()
  with jax.set_mesh(mesh):
    state = first.init(jax.random.key(0))
    batch = jax.device_put(batch_of(cfg), first.batch_sharding)
    state, _ = first.step(state, batch)
    saved = jax.device_get(state)
    with Checkpoints(tmp_path) as checkpoints:
      checkpoints.save(1, state, {}, block=True)
  for sizes in (MOE_MESHES["expert"], dict(data=1, fsdp=1)):
    second = train_step.build(cfg, mesh_of(sizes))
    with jax.set_mesh(mesh_of(sizes)), Checkpoints(tmp_path) as checkpoints:
      restored, _, step = checkpoints.restore(second.abstract_state)
    assert step == 1
    for a, b, place in zip(jax.tree.leaves(saved), jax.tree.leaves(restored),
                           jax.tree.leaves(second.abstract_state)):
      assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
      assert b.sharding.is_equivalent_to(place.sharding, b.ndim)


def test_a_bad_step_changes_nothing_and_is_counted():
  cfg, mesh, program = tiny_moe_program()
  with jax.set_mesh(mesh):
    state = program.init(jax.random.key(0))
    good = jax.device_put(batch_of(cfg), program.batch_sharding)
    poisoned = batch_of(cfg)
    poisoned = poisoned._replace(weights=np.where(poisoned.weights > 0, np.nan, 0).astype("f4"))
    bad = jax.device_put(poisoned, program.batch_sharding)
    state, metrics = program.step(state, good)
    assert bool(metrics.ok)
    assert np.abs(state.model.stack.groups[0].runs[0].mlp.router_bias[...]).max() > 0
    before = jax.device_get(state)
    state, metrics = program.step(state, bad)
    after = jax.device_get(state)
    assert not metrics.ok and int(metrics.consecutive_bad) == 1
    for part in ("model", "opt_state"):
      for a, b in zip(jax.tree.leaves(getattr(before, part)),
                      jax.tree.leaves(getattr(after, part))):
        assert a.tobytes() == b.tobytes()
    state, metrics = program.step(state, good)
    assert bool(metrics.ok) and int(metrics.total_bad) == 1 and int(metrics.consecutive_bad) == 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.device_get(state.model)))


def test_moments_are_sharded_as_their_parameters_are():
  cfg, mesh = load("tiny_moe", "hysparse"), mesh_of(MOE_MESHES["mixed"])
  for optimizer in ("adamw", "muon"):
    state = train_step.build(config.override(cfg, f"optim.optimizer={optimizer}"),
                             mesh).abstract_state
    weights = {leaf.sharding.spec for leaf in jax.tree.leaves(state.model)}
    assert jax.sharding.PartitionSpec(None, None, "expert", "fsdp", "tensor") in weights
    shapes = {}
    for leaf in jax.tree.leaves(state.model):
      shapes.setdefault(leaf.shape, set()).add(leaf.sharding.spec)
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.shape in shapes]
    assert len(moments) >= len(jax.tree.leaves(state.model))    # one each, or two under AdamW
    for leaf in moments:
      assert leaf.sharding.spec in shapes[leaf.shape]


def test_micro_batches_add_up_to_the_whole_batch():
  cfg = load("tiny", "hysparse")
  mesh = mesh_of(MESHES["mixed"])
  results, init = [], None
  for parts in (1, 2):
    program = train_step.build(config.override(cfg, f"train.grad_accum={parts}",
                                               "optim.clip_norm=0", "optim.optimizer=adamw",
                                               "data.batch_size=16"), mesh)
    batch = jax.tree.map(lambda x: np.concatenate([x, x[::-1]]), batch_of(cfg))
    batch = batch._replace(weights=batch.weights * (np.arange(64) < 40 + np.arange(16)[:, None]))
    init = init or program.init             # the same of both: compiled once
    with jax.set_mesh(mesh):
      _, metrics = program.step(init(jax.random.key(0)),
                                jax.device_put(batch, program.batch_sharding))
    results.append(jax.device_get(metrics))
  for name in ("loss", "total", "grad_norm", "tokens"):
    assert_close(getattr(results[0], name), getattr(results[1], name), "sharded_f32")


@pytest.mark.parametrize("name, overrides, message", [
  ("tiny", ["mesh.fsdp=3"], "mesh data=1, fsdp=3, .* needs 3 devices, here are 8"),
  ("tiny", ["mesh.data=3"], "3 does not divide the 8 devices"),
  ("tiny", ["mesh.tensor=8"], "model.num_heads=4 cannot be split over mesh tensor=8"),
  ("tiny", ["mesh.tensor=4"], "model.num_kv_heads=2 cannot be split over mesh tensor=4"),
  ("tiny", ["mesh.expert=8"], "mesh.expert is 8, but the model has no experts"),
  ("tiny", ["data.batch_size=6"], "data.batch_size / train.grad_accum=6 cannot be split"),
  ("tiny_moe", ["mesh.expert=8", "model.moe.num_experts=12"],
   "model.moe.num_experts=12 cannot be split over mesh expert=8")])
def test_an_impossible_mesh_is_one_line(name, overrides, message):
  cfg = config.override(config.load(str(REPO / "configs" / f"{name}.py")), *overrides)
  with pytest.raises(UserError, match=message) as error:
    train_step.build(cfg, sharding.make_mesh(cfg.mesh))
  assert "\n" not in str(error.value)


def test_context_parallelism_is_refused_plainly():
  with pytest.raises(UserError, match="mesh.context is 2; attention is not yet split"):
    config.override(config.Config(), "mesh.context=2")
