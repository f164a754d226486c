"""Checkpoints of older versions: every leaf is found under the name it had."""

import functools
import pathlib

import jax
import numpy as np
import pytest

from hysparse_jax import config, sharding
from hysparse_jax.errors import UserError
from hysparse_jax.training import step as train_step
from hysparse_jax.training import upgrade
from hysparse_jax.training.checkpoint import Checkpoints
from hysparse_jax.training.manifest import named_leaves, nest
from tests.test_configs import REPO

# What the version before runs of layers called the leaves of configs/tiny_moe.py under Muon.
OLDER = (pathlib.Path(__file__).parent / "older_leaf_names.txt").read_text().split()


@functools.lru_cache
def program():
  cfg = config.override(config.load(str(REPO / "configs/tiny_moe.py")), "optim.optimizer=muon")
  mesh = sharding.make_mesh(config.MeshConfig(), jax.devices()[:1])
  with jax.set_mesh(mesh):
    built = train_step.build(cfg, mesh)
    return mesh, built.abstract_state, built.init(jax.random.key(0))


def test_every_leaf_has_the_name_that_it_had():
  names, _ = named_leaves(program()[1])
  assert sorted(upgrade.older_name("/".join(name)) for name in names) == sorted(OLDER)


def test_an_older_checkpoint_loads_byte_for_byte(tmp_path):
  mesh, abstract, state = program()
  names, leaves = named_leaves(state)
  # Every leaf other than every other one: a swap would show.
  leaves = [leaf + index if leaf.dtype.name == "float32" else leaf
            for index, leaf in enumerate(leaves)]
  state = jax.tree.unflatten(jax.tree.structure(state), leaves)
  older = nest([tuple(upgrade.older_name("/".join(name)).split("/")) for name in names], leaves)
  assert "sparse" in older["model"]["stack"]["groups"]["0"]
  with jax.set_mesh(mesh), Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, older, {"kept": 1}, block=True)
    restored, extra, step = checkpoints.restore(abstract)
    part, _, _ = checkpoints.restore({"model": abstract.model}, partial=True)
    assert (extra, step, checkpoints.verify(1)) == ({"kept": 1}, 1, [])
    for a, b in ((restored, state), (part["model"], state.model)):
      for ours, theirs in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.asarray(ours).tobytes() == np.asarray(theirs).tobytes()
    checkpoints.save(2, restored, {}, block=True)      # from now on by today's names
    again, _, _ = checkpoints.restore(abstract)
    for ours, theirs in zip(jax.tree.leaves(again), jax.tree.leaves(state), strict=True):
      assert np.asarray(ours).tobytes() == np.asarray(theirs).tobytes()


def test_a_leaf_that_is_in_neither_is_named(tmp_path):
  mesh, abstract, state = program()
  names, leaves = named_leaves(state.model)
  short = [(name, leaf) for name, leaf in zip(names, leaves) if name[-2:] != ("sparse", "gate")]
  older = nest([("model", *upgrade.older_name("/".join(name)).split("/")) for name, _ in short],
                [leaf for _, leaf in short])
  with jax.set_mesh(mesh), Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, older, {}, block=True)
    with pytest.raises(UserError, match="runs/0/sparse/gate") as error:
      checkpoints.restore({"model": abstract.model}, partial=True)
  assert "\n" not in str(error.value)
