import glob
import hashlib
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
from collections import Counter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hysparse_jax import sharding
from hysparse_jax.config import MeshConfig, ModelConfig, OptimConfig
from hysparse_jax.errors import UserError
from hysparse_jax.model.layers import Mlp, stacked
from hysparse_jax.training import guard, optim
from hysparse_jax.training.checkpoint import TMP_MARK, Checkpoints, abstract_state

EXTRA = {"data": "fingerprint é", "steps": 12345678901234567890, "rates": [1e-5, 0.1, None, True]}


class State(NamedTuple):
  step: Any
  model: Any
  opt_state: Any
  guard: Any
  odd: Any


def new_state(seed):
  """Every kind of leaf a run may hold; `seed` is also its step."""
  cfg = ModelConfig(d_model=16, d_ff=24)
  model = stacked(lambda rngs: Mlp(cfg, rngs=rngs), 2, nnx.Rngs(seed))
  opt_state = optim.make_optimizer(OptimConfig(), 10, model).init(model)
  key = jax.random.key(seed)
  odd = {"key": key, "keys": jax.random.split(key, 3), "bf16": jnp.bfloat16([1.5, -0.0, np.nan]),
         "minus_zeros": jnp.full((70,), -0.0), "zeros": jnp.zeros((70,)),
         "bits": jnp.float32([np.nan, -np.inf, 1e-45]), "i8": jnp.arange(9, dtype=jnp.int8) - seed,
         "flag": jnp.bool_(True), "pair": (jnp.float32(seed), jnp.float16([seed]))}
  return State(jnp.int32(seed), model, opt_state, guard.init(), odd)


@pytest.fixture(scope="module")
def states():
  return {seed: jax.jit(new_state, static_argnums=0)(seed) for seed in (1, 2)}


def on_one_device(state):
  place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  return abstract_state(state, jax.tree.map(lambda _: place, state))


def as_bytes(state):
  plain = lambda leaf: (jax.random.key_data(leaf)
                        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf)
  return [(str(leaf.dtype), leaf.shape, np.asarray(plain(leaf)).tobytes())
          for leaf in jax.tree.leaves(state)]


def saved(directory, states, *steps, keep=3):
  checkpoints = Checkpoints(directory, keep=keep)
  for step in steps:
    checkpoints.save(step, states[step], EXTRA | {"step": step})
  checkpoints.close()


@pytest.fixture(scope="module")
def two(tmp_path_factory, states):
  """A directory with whole checkpoints 1 and 2, not to be changed."""
  directory = tmp_path_factory.mktemp("two")
  saved(directory, states, 1, 2)
  return directory


@pytest.fixture
def copy(tmp_path, two):
  return pathlib.Path(shutil.copytree(two, tmp_path / "copy"))


def restored(directory, target, step=None, **kwargs):
  """(state, extra, step, reports) from a fresh, read-only look at a directory."""
  reports = []
  checkpoints = Checkpoints(directory, read_only=True)
  result = checkpoints.restore(target, step, report=reports.append, **kwargs)
  checkpoints.close()
  return *result, reports


def test_a_state_comes_back_byte_for_byte(two, states):
  for step in (None, 2, 1):
    state, extra, got, reports = restored(two, on_one_device(states[1]), step)
    assert got == (step or 2) and reports == []
    assert as_bytes(state) == as_bytes(states[got])
    assert jax.tree.structure(state) == jax.tree.structure(states[got])
    assert extra == EXTRA | {"step": got}


def test_on_disk_are_plain_names_and_plain_digests(two, states):
  entries = json.loads((two / "2" / "manifest" / "metadata").read_text())["leaves"]
  weight = states[2].model.w_gate[...]
  once = hashlib.sha256(np.asarray(weight).tobytes()).digest()
  assert entries["model/w_gate"] == {"shape": [2, 16, 24], "dtype": "float32",
                                           "sha256": hashlib.sha256(once).hexdigest()}
  assert entries["odd/keys"]["impl"] == "threefry2x32"
  assert len(entries) == len(jax.tree.leaves(states[2]))


def test_large_leaves_are_digested_in_pieces(tmp_path):
  big = jnp.arange((9 << 20) // 4, dtype=jnp.int32)
  saved(tmp_path, {1: {"big": big}}, 1)
  raw = np.asarray(big).tobytes()
  pieces = b"".join(hashlib.sha256(raw[at:at + (8 << 20)]).digest() for at in (0, 8 << 20))
  entries = json.loads((tmp_path / "1" / "manifest" / "metadata").read_text())["leaves"]
  assert entries["big"]["sha256"] == hashlib.sha256(pieces).hexdigest()


def test_saved_on_one_mesh_loads_on_any_other(tmp_path, states):
  meshes = [sharding.make_mesh(MeshConfig(**sizes)) for sizes in (
    {"fsdp": 8}, {"fsdp": 2, "tensor": 4}, {"data": 2, "fsdp": 2, "tensor": 2})]
  meshes.append(sharding.make_mesh(MeshConfig(), jax.devices()[:1]))
  manifests = []
  for number, mesh in enumerate(meshes):
    places = sharding.shardings(states[2], mesh)
    saved(tmp_path / str(number), {2: jax.device_put(states[2], places)}, 2)
    manifests.append(json.loads((tmp_path / str(number) / "2/manifest/metadata").read_text()))
    target_mesh = meshes[(number + 1) % len(meshes)]
    places = sharding.shardings(states[2], target_mesh)
    state, *_ = restored(tmp_path / str(number), abstract_state(states[2], places))
    assert as_bytes(state) == as_bytes(states[2])
    for leaf, place in zip(jax.tree.leaves(state), jax.tree.leaves(places), strict=True):
      assert leaf.sharding.is_equivalent_to(place, leaf.ndim)
  assert all(manifest == manifests[0] for manifest in manifests)


def damages(data, rng):
  """(what, new bytes or None to delete) for one file."""
  yield "deleted", None
  yield "emptied", b""
  if data:
    yield "truncated", data[:len(data) // 2]
    yield "cut by one", data[:-1]
    for _ in range(5):
      bit = rng.randrange(8 * len(data))
      yield f"bit {bit} flipped", bytes(
        byte ^ (1 << bit % 8) if at == bit // 8 else byte for at, byte in enumerate(data))


def test_no_damage_to_any_file_is_loaded_silently(copy, states):
  rng = random.Random(0)
  target = on_one_device(states[1])
  wanted = {step: as_bytes(state) for step, state in states.items()}
  outcomes = Counter()
  files = [path for path in sorted((copy / "2").rglob("*")) if path.is_file()]
  assert len(files) > 10
  for path in files:
    data = path.read_bytes()
    for what, damaged in damages(data, rng):
      path.unlink()
      if damaged is not None:
        path.write_bytes(damaged)
      state, extra, step, reports = restored(copy, target)
      where = f"{path.relative_to(copy)} {what}: step {step}, {reports}"
      assert as_bytes(state) == wanted[step] and extra == EXTRA | {"step": step}, where
      assert len(reports) == (1 if step == 1 else 0), where
      assert all(line.startswith("checkpoint 2 rejected: ") and "\n" not in line
                 for line in reports), where
      outcomes[step] += 1
      path.write_bytes(data)
  assert sum(outcomes.values()) > 100 and min(outcomes.values()) > 20, outcomes


def test_a_report_names_the_leaf(copy, states):
  shutil.rmtree(copy / "2" / "state")
  shutil.copytree(copy / "1" / "state", copy / "2" / "state")
  *_, step, reports = restored(copy, on_one_device(states[1]))
  assert step == 1 and reports[0].startswith(
    "checkpoint 2 rejected: leaf step does not match its digest; leaf model/")
  with Checkpoints(copy, read_only=True) as checkpoints:
    problems = checkpoints.verify(2)
    assert "leaf model/w_gate does not match its digest" in problems
    assert "leaf odd/i8 does not match its digest" in problems
    assert not any("odd/flag" in problem for problem in problems)
    assert checkpoints.verify(1) == []


@pytest.mark.parametrize("edit, complaint", [
  (lambda text: text.replace('"steps": 12345678901234567890', '"steps": 12345678901234567891'),
   "the manifest does not match its own digest"),
  (lambda text: text.replace("fingerprint", "fingerprinT"),
   "the manifest does not match its own digest"),
  (lambda text: text.replace('"shape"', '"shapf"', 1), "the manifest does not match"),
  (lambda text: "[]", "the manifest does not match"),
  (lambda text: text[:-1], "unreadable manifest: JSONDecodeError"),
])
def test_extra_and_manifest_are_protected_too(copy, states, edit, complaint):
  path = copy / "2" / "manifest" / "metadata"
  path.write_text(edit(path.read_text()))
  _, extra, step, reports = restored(copy, on_one_device(states[1]))
  assert step == 1 and extra["step"] == 1 and complaint in reports[0]


def test_a_manifest_of_another_step_is_rejected(copy, states):
  shutil.copy(copy / "1/manifest/metadata", copy / "2/manifest/metadata")
  *_, step, reports = restored(copy, on_one_device(states[1]))
  assert step == 1 and "the manifest is that of step 1" in reports[0]


def flip_arrays(directory, step):
  """Damages the file that holds the arrays of one checkpoint."""
  path = max((directory / str(step) / "state").rglob("d/*"), key=lambda path: path.stat().st_size)
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 4
  path.write_bytes(data)


def test_after_a_fallback_the_run_goes_on_and_keeps_the_good(copy, states):
  flip_arrays(copy, 2)
  reports = []
  checkpoints = Checkpoints(copy, keep=1)
  _, _, step = checkpoints.restore(on_one_device(states[1]), report=reports.append)
  assert (step, len(reports), checkpoints.steps()) == (1, 1, [1])
  assert (copy / "rejected_2").is_dir()
  checkpoints.save(2, states[2], EXTRA | {"step": 2}, block=True)
  assert checkpoints.steps() == [2] and checkpoints.verify(2) == []
  checkpoints.close()
  state, *_, step, reports = restored(copy, on_one_device(states[1]))
  assert step == 2 and reports == [] and as_bytes(state) == as_bytes(states[2])


def test_no_whole_checkpoint_is_one_clear_line(copy, states):
  flip_arrays(copy, 1)
  flip_arrays(copy, 2)
  reports = []
  with (Checkpoints(copy) as checkpoints,
        pytest.raises(UserError, match="no whole checkpoint in .*tried 2, 1, all damaged") as e):
    checkpoints.restore(on_one_device(states[1]), report=reports.append)
  assert "\n" not in str(e.value) and [line[:12] for line in reports] == ["checkpoint 2",
                                                                          "checkpoint 1"]
  assert (copy / "1").is_dir() and (copy / "2").is_dir()


def test_an_asked_for_step_does_not_fall_back(copy, states):
  flip_arrays(copy, 2)
  with Checkpoints(copy) as checkpoints, pytest.raises(UserError, match="tried 2, all damaged"):
    checkpoints.restore(on_one_device(states[1]), 2, report=lambda line: None)


def test_a_missing_checkpoint_is_one_clear_line(tmp_path, two, states):
  target = on_one_device(states[1])
  with (Checkpoints(tmp_path / "new") as checkpoints,
        pytest.raises(UserError, match="missing checkpoint: wanted one in .*holds none")):
    checkpoints.restore(target)
  with pytest.raises(UserError, match="missing checkpoint: wanted step 7 in .*holds 1, 2"):
    restored(two, target, 7)
  with pytest.raises(UserError, match="missing checkpoint: there is no directory"):
    Checkpoints(tmp_path / "absent", read_only=True)
  assert not (tmp_path / "absent").exists()


def test_another_configuration_is_an_error_that_names_the_leaf(two, states):
  wider = states[1]._replace(odd=states[1].odd | {"i8": jnp.zeros(10, jnp.int8)})
  with pytest.raises(UserError, match=r"odd/i8 is int8\[9\] in it, int8\[10\] here"):
    restored(two, on_one_device(wider))
  fewer = states[1]._replace(guard=None)
  with pytest.raises(UserError, match=r"guard/mean_log_norm is float32\[\] in it, absent here"):
    restored(two, on_one_device(fewer))


def test_a_part_is_restored_without_the_rest(copy, states, monkeypatch):
  """The weights alone: the moments are not read, and damage to the weights is still seen."""
  target = {"model": on_one_device(states[2]).model}
  read, trees = Checkpoints._read_tree, []

  def spy(*args):
    trees.append(read(*args))
    return trees[-1]

  monkeypatch.setattr(Checkpoints, "_read_tree", spy)
  part, extra, step, reports = restored(copy, target, partial=True)
  assert set(part) == {"model"} and step == 2 and reports == []
  assert extra == json.loads(json.dumps(EXTRA | {"step": 2}))
  assert as_bytes(part["model"]) == as_bytes(states[2].model)
  assert [set(tree) for tree in trees] == [{"model"}]
  with pytest.raises(UserError, match="absent here"):
    restored(copy, target)                       # a whole state is not just a model
  thin = {"model": {"w_gate": target["model"].w_gate}}
  with pytest.raises(UserError, match="model/w_(out|up) is .* absent here"):
    restored(copy, thin, partial=True)
  flip_arrays(copy, 2)
  *_, step, reports = restored(copy, target, partial=True)
  assert step == 1 and len(reports) == 1 and reports[0].startswith("checkpoint 2 rejected")


def test_the_newest_are_kept_and_none_is_dropped_while_another_is_written(tmp_path):
  state = {"w": jnp.ones((500, 500))}
  checkpoints = Checkpoints(tmp_path, keep=3)
  seen = []
  for step in range(6):
    checkpoints.save(step, state, {})
    checkpoints.wait()
    seen.append(checkpoints.steps())
  assert seen == [[0], [0, 1], [0, 1, 2], [1, 2, 3], [2, 3, 4], [3, 4, 5]]
  assert checkpoints.latest_step() == 5
  checkpoints.close()


def test_buffers_may_be_donated_while_the_save_runs(tmp_path):
  advance = jax.jit(lambda state: {name: 3 * leaf + 1 for name, leaf in state.items()},
                    donate_argnums=0)
  place = jax.sharding.NamedSharding(jax.make_mesh((8,), ("x",)), jax.sharding.PartitionSpec("x"))
  state = {"one": jnp.ones((1000, 800)), "split": jax.device_put(jnp.ones((1000, 800)), place)}
  checkpoints = Checkpoints(tmp_path, keep=5)
  wanted = {}
  for step in range(5):
    wanted[step] = float(state["one"][0, 0])
    checkpoints.save(step, state, {})
    for _ in range(3):
      state = advance(state)
  checkpoints.close()
  assert len(set(wanted.values())) == 5
  target = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
            for name, leaf in state.items()}
  for step, value in wanted.items():
    got, *_, reports = restored(tmp_path, target, step)
    assert reports == [] and all((leaf == value).all() for leaf in got.values())


def test_saving_a_step_again_needs_the_same_state(copy, states):
  checkpoints = Checkpoints(copy)
  before = (copy / "2" / "manifest" / "metadata").stat().st_mtime_ns
  checkpoints.save(2, states[2], EXTRA | {"step": 2}, block=True)
  assert (copy / "2" / "manifest" / "metadata").stat().st_mtime_ns == before
  with pytest.raises(UserError, match="cannot save step 2 .* holds step 2"):
    checkpoints.save(2, states[1], EXTRA)
  with pytest.raises(UserError, match="cannot save step 1 .* holds step 2"):
    checkpoints.save(1, states[1], EXTRA | {"step": 1})
  checkpoints.close()


def test_a_place_that_cannot_be_written_is_one_clear_line(tmp_path, states):
  (tmp_path / "file").write_text("in the way")
  with pytest.raises(UserError, match="cannot write checkpoints to .*give a writable --workdir"):
    Checkpoints(tmp_path / "file" / "checkpoints")
  checkpoints = Checkpoints(tmp_path / "gone")
  shutil.rmtree(tmp_path / "gone")
  (tmp_path / "gone").write_text("in the way")
  with pytest.raises(UserError, match="cannot read .*gone: Not a directory"):
    checkpoints.save(1, states[1], {})


def test_read_only_touches_nothing(copy, states):
  (copy / f"3{TMP_MARK}").mkdir()
  flip_arrays(copy, 2)
  before = sorted(glob.glob(f"{copy}/**", recursive=True))
  assert restored(copy, on_one_device(states[1]))[2] == 1
  with (Checkpoints(copy, read_only=True) as checkpoints,
        pytest.raises(ValueError, match="read_only")):
    checkpoints.save(9, states[1], {})
  assert sorted(glob.glob(f"{copy}/**", recursive=True)) == before


def test_several_processes_are_refused(tmp_path, monkeypatch):
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  with pytest.raises(NotImplementedError, match="2 processes"):
    Checkpoints(tmp_path)


KILLED = """
import os, signal, sys
import jax.numpy as jnp
from hysparse_jax.training.checkpoint import Checkpoints
checkpoints = Checkpoints(sys.argv[1])
state = lambda value: {"w": jnp.full((4000, 4000), value), "step": jnp.int32(value)}
checkpoints.save(1, state(1.0), {}, block=True)
checkpoints.save(2, state(2.0), {})
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_kill_during_a_save_leaves_the_older_checkpoint(tmp_path):
  root = pathlib.Path(__file__).parents[1]
  env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(root)}
  done = subprocess.run([sys.executable, "-c", KILLED, tmp_path], env=env, capture_output=True)
  assert done.returncode == -signal.SIGKILL, done.stderr.decode()[-2000:]
  (tmp_path / f"2{TMP_MARK}-stale").mkdir()
  checkpoints = Checkpoints(tmp_path)
  assert not [path for path in tmp_path.rglob("*") if TMP_MARK in path.name]
  place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  target = {"w": jax.ShapeDtypeStruct((4000, 4000), jnp.float32, sharding=place),
            "step": jax.ShapeDtypeStruct((), jnp.int32, sharding=place)}
  reports = []
  state, _, step = checkpoints.restore(target, report=reports.append)
  assert step in (1, 2) and reports == []
  assert int(state["step"]) == step and (state["w"] == step).all()
  checkpoints.close()
