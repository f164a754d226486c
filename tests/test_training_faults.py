"""What goes wrong around a tiny trained run, in this process: disk, pictures, data, meshes."""

import dataclasses
import errno
import json
import shutil
import time

import numpy as np
import orbax.checkpoint as ocp
import pytest

from experiments import cli, evaluate, generate
from experiments import train as train_program
from hysparse_jax import config, plots
from hysparse_jax.config import Config, DataConfig, ModelConfig, OptimConfig, TrainConfig
from hysparse_jax.data.corpus import Corpus
from hysparse_jax.errors import UserError
from hysparse_jax.training import metrics
from hysparse_jax.training import step as train_step
from hysparse_jax.training.checkpoint import Checkpoints
from hysparse_jax.training.loop import train
from tests.corpora import write_jsonl
from tests.test_one_line import call


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  """(config, run folder, compiled program) of two steps of training."""
  folder = tmp_path_factory.mktemp("trained")
  rng = np.random.default_rng(0)
  source = write_jsonl(folder / "corpus.jsonl", [
    " ".join(rng.choice(["alpha", "beta", "gamma"], 60)) for _ in range(20)])
  cfg = Config(
    model=ModelConfig(num_layers=2, pattern="full sparse", d_model=16, num_heads=2, num_kv_heads=2,
                      head_dim=8, d_ff=16, block_size=8, selected_tokens=16, window=8,
                      dtype="float32"),
    data=DataConfig(source=str(source), seq_len=64, batch_size=8, heldout_fraction=0.3),
    optim=OptimConfig(lr=0.01, warmup_steps=1),
    train=TrainConfig(steps=2, log_every=1, eval_every=0, eval_batches=1, checkpoint_every=1))
  build, programs = train_step.build, []
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(train_step, "build", lambda *args: programs.append(build(*args)) or programs[0])
    train(cfg, folder / "run")
  return cfg, folder / "run", programs[0]


@pytest.fixture
def going_on(trained, tmp_path, monkeypatch):
  """(config of two steps more, copy of the run folder, program); nothing is compiled again."""
  cfg, folder, program = trained
  monkeypatch.setattr(train_step, "build", lambda *_: program)
  return (config.override(cfg, "train.steps=4"), shutil.copytree(folder, tmp_path / "run"), program)


def run_train(monkeypatch, capfd, cfg, workdir):
  """(exit code, lines of stderr) of the program `train` with this config."""
  monkeypatch.setattr(cli, "load_config", lambda: cfg)
  code, _, err = call(monkeypatch, capfd, train_program, f"--workdir={workdir}")
  return code, err.splitlines()


def check_nothing_lost(workdir, last_step):
  with Checkpoints(workdir / "checkpoints", read_only=True) as checkpoints:
    assert checkpoints.latest_step() == last_step and checkpoints.verify(last_step) == []
  steps = [row["step"] for row in metrics.read(workdir) if "loss" in row]
  assert steps == list(range(1, steps[-1] + 1)) and steps[-1] >= last_step


@pytest.mark.parametrize("method", ["save", "wait_until_finished"])
def test_a_full_disk_is_one_line_with_the_reason(going_on, monkeypatch, capfd, method):
  """Refused when the save of step 3 begins, and when it is waited for."""
  cfg, workdir, _ = going_on
  saved = []
  whole_save, whole_wait = ocp.CheckpointManager.save, ocp.CheckpointManager.wait_until_finished

  def refuse():
    raise OSError(errno.ENOSPC, "No space left on device")

  def save(self, step, *args, **kwargs):
    if method == "save":
      refuse()
    whole_save(self, step, *args, **kwargs)
    saved.append(step)

  def wait(self):
    whole_wait(self)
    if saved:
      refuse()

  monkeypatch.setattr(ocp.CheckpointManager, "save", save)
  monkeypatch.setattr(ocp.CheckpointManager, "wait_until_finished", wait)
  code, err = run_train(monkeypatch, capfd, cfg, workdir)
  assert code == 2 and saved == ([] if method == "save" else [3])
  assert len(err) == 1 and err[0].startswith("error: cannot save to ")
  assert err[0].endswith("No space left on device")
  monkeypatch.undo()
  check_nothing_lost(workdir, 2 if method == "save" else 3)


def test_a_checkpoint_folder_that_vanishes_ends_the_run_within_five_seconds(going_on, monkeypatch,
                                                                            capfd):
  cfg, workdir, program = going_on
  vanished = []

  def step(state, batch):
    result = program.step(state, batch)
    shutil.rmtree(workdir / "checkpoints", ignore_errors=True)
    vanished.append(time.perf_counter())
    return result

  monkeypatch.setattr(train_step, "build", lambda *_: program._replace(step=step))
  code, err = run_train(monkeypatch, capfd, cfg, workdir)
  assert time.perf_counter() - vanished[0] < 5
  assert code == 2 and 1 <= len(err) <= 2 and err[-1].startswith("error: cannot ")
  assert str(workdir / "checkpoints") in err[-1]
  assert [row["step"] for row in metrics.read(workdir) if "loss" in row][:3] == [1, 2, 3]


def test_pictures_that_cannot_be_drawn_take_no_result(going_on, monkeypatch, capfd):
  cfg, workdir, _ = going_on
  shutil.rmtree(workdir / "plots")
  (workdir / "plots").write_text("in the way")
  result = train(cfg, workdir)
  assert result["step"] == 4 and result["bits_per_byte"] > 0
  err = capfd.readouterr().err
  assert err.count("\n") == 1 and err.startswith(f"warning: no pictures in {workdir / 'plots'}: ")

  def fails(*_):
    raise RuntimeError("a drawing library\nof another version")

  monkeypatch.setattr(plots, "run_figures", fails)
  assert train(cfg, workdir)["bits_per_byte"] == result["bits_per_byte"]
  err = capfd.readouterr().err
  assert err.count("\n") == 1 and "RuntimeError: a drawing library of another version" in err


def test_heldout_text_without_a_target_is_refused_before_step_one(trained, tmp_path, monkeypatch):
  """Long documents are trained on; those held out are single characters."""
  cfg, _, program = trained
  source = write_jsonl(tmp_path / "corpus.jsonl", [
    *(f"{number} " * 40 for number in range(40)), *map(chr, range(97, 123))])
  cfg = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, source=str(source)))
  corpus = Corpus.open(cfg.data)
  short = [document for document in corpus.heldout if len(document) == 1]
  assert short
  write_jsonl(source, [text.decode() for text in (*corpus.train, *short)])
  monkeypatch.setattr(train_step, "build", pytest.fail)
  with pytest.raises(UserError, match="the held-out batches hold no target; give more") as error:
    train(cfg, tmp_path / "run")
  assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_a_mesh_and_bfloat16_weights_say_what_one_device_says(trained, monkeypatch, capsys):
  workdir = f"--workdir={trained[1]}"
  prompt = ("--prompt=alpha beta ", "--max_tokens=12", "--temperature=0", "--json")
  texts, losses = [], []
  mesh = "--mesh=data=4,tensor=2"                                 # all of the eight devices
  for options in ((), (mesh, "--dtype=bfloat16"), (mesh,)):
    code, out, err = call(monkeypatch, capsys, generate, workdir, *prompt, *options)
    assert (code, err) == (0, "")
    texts.append(json.loads(out)["text"])
    code, out, err = call(monkeypatch, capsys, evaluate, workdir, "--tasks=heldout", "--json",
                          "--batches=1", *options)
    assert (code, err) == (0, "")
    losses.append(json.loads(out)["loss"])
  assert texts[0] and texts == [texts[0]] * 3
  np.testing.assert_allclose(losses[1], losses[0], rtol=2e-3)     # weights of 8 bits' precision
  np.testing.assert_allclose(losses[2], losses[0], rtol=1e-6)
