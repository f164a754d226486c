"""Runs as other processes leave them: exchanged tokenizers, rotating, torn and odd checkpoints."""

import dataclasses
import json
import os
import pathlib
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from hysparse_jax import config
from hysparse_jax.data.tokenizer import fingerprint_of
from hysparse_jax.errors import UserError
from hysparse_jax.inference.load import load_run
from hysparse_jax.training import run
from hysparse_jax.training.checkpoint import Checkpoints
from tests.corpora import write_tokenizer
from tests.test_load_run import config as with_experts
from tests.weights import drawn

CFG = with_experts("float32")
CFG = dataclasses.replace(CFG, model=dataclasses.replace(CFG.model, moe=None, num_layers=1))


@pytest.fixture(scope="module")
def model():
  return drawn(CFG.model)


def keep(folder, model, *steps, extra=None, keep=3):
  with Checkpoints(folder / "checkpoints", keep=keep) as checkpoints:
    for step in steps:
      checkpoints.save(step, {"model": model}, extra or {}, block=True)


@pytest.fixture
def own(tmp_path, model):
  """A run with a tokenizer.json: (its folder, the file that it was trained with)."""
  source = pathlib.Path(write_tokenizer(tmp_path / "source.json"))
  cfg = config.override(CFG, f"data.tokenizer={source}")
  fingerprint = fingerprint_of(source.read_bytes())
  folder = tmp_path / "run"
  folder.mkdir()
  run.write_config(folder, cfg)
  run.keep_tokenizer(folder, cfg, fingerprint)
  keep(folder, model, 1, extra={"data": {"tokenizer": fingerprint},
                                "config": json.loads(json.dumps(config.to_dict(cfg)))})
  return folder, source


def exchange(path):
  """Another vocabulary in a file of the same size: two tokens change their ids."""
  text = path.read_text()
  vocabulary = json.loads(text)["model"]["vocab"]
  one, two = (f'"{letter}": {vocabulary[letter]}' for letter in "ab")
  other = text.replace(one, "\0").replace(two, f'"b": {vocabulary["a"]}').replace(
    "\0", f'"a": {vocabulary["b"]}')
  assert other != text and len(other) == len(text)
  path.write_text(other)


def test_a_run_outlives_the_exchange_of_its_tokenizer(own):
  folder, source = own
  want = load_run(folder).tokenizer.encode("abc")
  exchange(source)
  np.testing.assert_array_equal(load_run(folder).tokenizer.encode("abc"), want)
  source.unlink()
  np.testing.assert_array_equal(load_run(folder).tokenizer.encode("abc"), want)


def test_another_tokenizer_than_the_one_trained_with_is_refused(own):
  folder, source = own
  copy = folder / "tokenizer.json"
  whole = copy.read_bytes()
  exchange(copy)
  with pytest.raises(UserError, match="is not the one the weights were trained with") as error:
    load_run(folder)
  assert "\n" not in str(error.value)
  copy.write_bytes(whole[:-9])
  with pytest.raises(UserError, match="tokenizer.json: not a usable tokenizer.json") as error:
    load_run(folder)
  assert "\n" not in str(error.value)
  copy.unlink()
  exchange(source)
  with pytest.raises(UserError, match="is not the one the weights were trained with"):
    load_run(folder)


def test_a_good_copy_is_never_replaced_by_an_exchanged_tokenizer(own):
  folder, source = own
  whole = (folder / "tokenizer.json").read_bytes()
  exchange(source)
  cfg = run.read_config(folder)
  with pytest.raises(UserError, match="is not the one the weights were trained with"):
    run.keep_tokenizer(folder, cfg, fingerprint_of(whole))
  assert (folder / "tokenizer.json").read_bytes() == whole


@pytest.mark.parametrize("moment", ["_read_manifest", "_read_tree"])
def test_a_reader_beside_a_trainer_takes_the_next_checkpoint(tmp_path, model, monkeypatch, capfd,
                                                             moment):
  """The checkpoint that was listed is deleted before it is read, twice in a row."""
  run.write_config(tmp_path, CFG)
  keep(tmp_path, model, 1)
  read, steps = getattr(Checkpoints, moment), [3, 2]

  def rotating(self, step, *args):
    if steps:
      keep(tmp_path, model, steps.pop(), keep=1)
    return read(self, step, *args)

  monkeypatch.setattr(Checkpoints, moment, rotating)
  assert load_run(tmp_path).step == 3 and steps == []
  assert capfd.readouterr().err == ""


def file(path):
  shutil.rmtree(path)
  path.write_text("in the way")


def dangling(path):
  shutil.rmtree(path)
  path.symlink_to(path.parent / "nowhere")


def circle(path):
  shutil.rmtree(path)
  path.symlink_to(path)


def empty(path):
  shutil.rmtree(path)
  path.mkdir()


def pipe(path):
  shutil.rmtree(path)
  os.mkfifo(path)


def metadata(change):
  def changed(path):
    found = path / "manifest" / "metadata"
    found.unlink()
    change(found)
  return changed


TORN = {
  **{f"{change.__name__}_for_{part or 'all'}": (part, change)
     for part in ("", "state", "manifest", "state/d")
     for change in (file, dangling, circle, empty, pipe)},
  "no_state": ("state", shutil.rmtree),
  "no_manifest": ("manifest", shutil.rmtree),
  "manifest_is_a_folder": ("", metadata(lambda path: path.mkdir())),
  "manifest_is_a_pipe": ("", metadata(os.mkfifo)),
  "manifest_dangles": ("", metadata(lambda path: path.symlink_to("nowhere"))),
  "manifest_is_deep": ("", metadata(lambda path: path.write_text("[" * 99999))),
  "manifest_has_no_step": ("", metadata(lambda path: path.write_text('{"digest": 1}'))),
}
ODD = ("03", "-4", "+5", "9e9", "\u0664", "latest", " 7", "1.bak", "rejected_", "8.orbax")


@pytest.fixture(scope="module")
def two(tmp_path_factory, model):
  folder = tmp_path_factory.mktemp("two")
  run.write_config(folder, CFG)
  keep(folder, model, 1, 2)
  for number, name in enumerate(ODD):
    path = folder / "checkpoints" / name
    [path.mkdir, path.touch, lambda path=path: path.symlink_to("nowhere")][number % 3]()
  return folder


@pytest.mark.parametrize("part, change", TORN.values(), ids=TORN)
def test_a_torn_checkpoint_is_passed_over(tmp_path, two, model, capfd, part, change):
  """By a reader, and by the run itself, which then saves its step again."""
  folder = shutil.copytree(two, tmp_path / "run", symlinks=True)
  change(folder / "checkpoints" / "2" / part if part else folder / "checkpoints" / "2")
  assert load_run(folder).step == 1
  err = capfd.readouterr().err
  assert err.count("\n") == 1 and err.startswith("warning: checkpoint 2 rejected: ")
  place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  target = {"model": jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), model)}
  reports = []
  with Checkpoints(folder / "checkpoints") as checkpoints:
    assert checkpoints.restore(target, report=reports.append)[2] == 1
    assert all("\n" not in line for line in reports) and len(reports) == 1
    checkpoints.save(2, {"model": model}, {}, block=True)
    assert checkpoints.steps() == [1, 2] and checkpoints.verify(2) == []
  assert capfd.readouterr().err == ""


def test_a_disk_that_takes_no_more_is_one_reason_and_loses_nothing(tmp_path, capfd):
  """Orbax's own writes are refused, by the limit of a file's size."""
  state = {"w": jnp.asarray(np.random.default_rng(0).random((300, 300), np.float32))}
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, state, {}, block=True)
  checkpoints = Checkpoints(tmp_path)
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
  try:
    with pytest.raises(UserError, match="cannot save to .*: .*[Ff]ile too large") as error:
      checkpoints.save(2, state, {}, block=True)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  assert "\n" not in str(error.value) and len(str(error.value)) < 400
  assert capfd.readouterr().err == ""
  with Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.steps() == [1] and checkpoints.verify(1) == []
    checkpoints.save(2, state, {}, block=True)
    assert checkpoints.verify(2) == []


@pytest.mark.parametrize("remade", [False, True])
def test_a_folder_that_vanishes_during_a_save_is_one_reason(tmp_path, monkeypatch, capfd, remade):
  """Even where Orbax, which had written all of it, does not notice."""
  folder, whole_wait = tmp_path / "checkpoints", ocp.CheckpointManager.wait_until_finished
  checkpoints = Checkpoints(folder)
  checkpoints.save(1, {"w": jnp.ones(9)}, {}, block=True)
  checkpoints.save(2, {"w": jnp.ones(9)}, {})

  def wait(self):
    whole_wait(self)
    if not (tmp_path / "moved").exists():
      folder.rename(tmp_path / "moved")
      if remade:                   # as Orbax does for the next file that it writes
        folder.mkdir()

  monkeypatch.setattr(ocp.CheckpointManager, "wait_until_finished", wait)
  for _ in range(2):
    with pytest.raises(UserError, match="cannot save to .*: the folder is gone") as error:
      checkpoints.wait()
    assert "\n" not in str(error.value)
  assert capfd.readouterr().err == ""
