"""Runs that are killed, stopped, damaged and misused, through the programs people call."""

import contextlib
import io
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from absl import flags

from experiments import cli, evaluate, generate, train
from hysparse_jax.errors import UserError
from hysparse_jax.training import metrics
from hysparse_jax.training.checkpoint import Checkpoints
from tests.test_configs import REPO

# tiny_moe, packed, smaller: two groups of layers, 12 steps, a checkpoint every 3.
SETTINGS = [
  "model.num_layers=3", "model.pattern=full sparse full", "model.d_model=32", "model.head_dim=16",
  "model.moe.num_experts=4", "model.moe.d_ff=16", "model.moe.bias_update_rate=0.01",
  "data.seq_len=64", "data.batch_size=4", "train.grad_accum=2", "train.steps=12",
  "train.log_every=2", "train.eval_every=0", "train.eval_batches=1", "train.checkpoint_every=3",
  "train.keep_checkpoints=10", "optim.warmup_steps=2"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
  folder = tmp_path_factory.mktemp("corpus")
  rng = np.random.default_rng(0)
  for number in range(40):
    words = rng.choice(["alpha", "beta", "gamma", "delta", "epsilon"], rng.integers(5, 60))
    (folder / f"{number}.txt").write_text(" ".join(words))
  return folder


def arguments(corpus, workdir, *more, name="tiny_moe"):
  sets = [*SETTINGS, f"data.source={corpus}", *more]
  return [f"--config={REPO / 'configs' / name}.py", f"--workdir={workdir}",
          *(f"--set={setting}" for setting in sets)]


# experiments.train, which gets a SIGTERM while the rows of its first log interval are written.
STOPPED = """
import os, signal
from hysparse_jax.training import metrics, signals
signals.install()
rows = metrics.step_rows
def step_rows(*arguments):
  os.kill(os.getpid(), signal.SIGTERM)
  return rows(*arguments)
metrics.step_rows = step_rows
from experiments import cli, train
cli.run(train.main, needs_stdout=False)
"""


def start(args, cache=None, program=("-m", "experiments.train")):
  """`experiments.train` in a process of its own; `cache` keeps what XLA compiled for the next."""
  env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
  if cache is not None:
    env |= {"JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3"}
  return subprocess.Popen([sys.executable, *program, *args], cwd=REPO, env=env,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process):
  out, err = process.communicate(timeout=300)
  return process.returncode, out, err


def losses(workdir):
  rows = [row for row in metrics.read(workdir) if "loss" in row]
  assert [row["step"] for row in rows] == sorted({row["step"] for row in rows})
  return {row["step"]: (row["loss"], row["grad_norm"], row["lr"]) for row in rows}


def state_bytes(workdir, step):
  """Every leaf's digest, as the checkpoint's manifest has it."""
  manifest = json.loads(
    (pathlib.Path(workdir) / "checkpoints" / str(step) / "manifest" / "metadata").read_text())
  return {name: entry["sha256"] for name, entry in manifest["leaves"].items()}


def wait_for(path, process, seconds=240):
  end = time.monotonic() + seconds
  while not path.exists() and process.poll() is None and time.monotonic() < end:
    time.sleep(0.002)
  assert path.exists(), process.communicate()


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
  return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module")
def uninterrupted(corpus, cache, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("whole") / "run"
  code, out, err = finish(start(arguments(corpus, workdir), cache))
  assert code == 0, err
  assert "KV bytes per token" in out and "held-out at step 12" in out
  assert {"loss.png", "learning_rate.png", "gates.png", "expert_load.png"} <= {
    path.name for path in (workdir / "plots").iterdir()}
  return workdir


def kill_after(step, process, workdir):
  """SIGKILL at an arbitrary time from the checkpoint's appearance on, in a step or a save."""
  wait_for(workdir / "checkpoints" / str(step), process)
  time.sleep(np.random.default_rng(step).uniform(0, 0.2))
  process.send_signal(signal.SIGKILL)
  code, _, _ = finish(process)
  assert code == -signal.SIGKILL


def test_kill_9_and_resume_is_bit_exact(corpus, cache, uninterrupted, tmp_path):
  """Killed twice; the second run is one that XLA compiles again."""
  workdir = tmp_path / "run"
  kill_after(3, start(arguments(corpus, workdir), cache), workdir)
  kill_after(6, start(arguments(corpus, workdir)), workdir)
  code, out, err = finish(start(arguments(corpus, workdir), cache))
  assert code == 0, err
  assert "resumed at step" in out
  assert losses(workdir) == losses(uninterrupted)
  assert set(losses(workdir)) == set(range(1, 13))
  assert state_bytes(workdir, 12) == state_bytes(uninterrupted, 12)


def test_sigterm_saves_and_a_flipped_bit_in_that_falls_back(corpus, cache, uninterrupted, tmp_path):
  """On the run's own checkpoint; every file and many bits are tried in test_checkpoint.py."""
  workdir = tmp_path / "run"
  shutil.copytree(uninterrupted, workdir)
  for step in (9, 12):
    shutil.rmtree(workdir / "checkpoints" / str(step))
  args = arguments(corpus, workdir, "train.checkpoint_every=0")
  code, out, err = finish(start(args, cache, ("-c", STOPPED)))
  assert code == 0, err
  assert "stopped by SIGTERM at step 9, which is saved" in out
  assert Checkpoints(workdir / "checkpoints", read_only=True).steps()[-1] == 9
  assert losses(workdir) == {step: row for step, row in losses(uninterrupted).items() if step < 10}

  newest = workdir / "checkpoints" / "9" / "state"
  largest = max((path for path in newest.rglob("*") if path.is_file()),
                key=lambda path: path.stat().st_size)
  content = bytearray(largest.read_bytes())
  content[len(content) // 2] ^= 1
  largest.write_bytes(content)
  code, out, err = finish(start(args, cache))
  assert code == 0, err
  assert "warning: checkpoint 9 rejected" in err
  assert "resumed at step 6" in out
  assert state_bytes(workdir, 12) == state_bytes(uninterrupted, 12)
  assert losses(workdir) == losses(uninterrupted)


def call(program, *args):
  """(exit code, stdout, stderr) of a program's main in this process, which has eight devices."""
  out, err = io.StringIO(), io.StringIO()
  for name in flags.FLAGS:
    flags.FLAGS[name].unparse()
  try:
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), \
         contextlib.redirect_stderr(err):
      patch.setattr(sys, "argv", [program.__name__, *map(str, args)])
      with pytest.raises(SystemExit) as exit_:
        cli.run(program.main)
  finally:
    flags.FLAGS.unparse_flags()
    flags.FLAGS.mark_as_parsed()
  return exit_.value.code or 0, out.getvalue(), err.getvalue()


@pytest.fixture
def one_device(monkeypatch):
  """The mesh that `start` has, for `call`."""
  device = jax.devices()[0]
  monkeypatch.setattr(jax, "devices", lambda: [device])


def files(folder):
  return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("setting, message", [
  ("train.steps=6", "is at step 12, beyond train.steps=6"),
  ("model.window=16", "has another model or optimizer: it has window = 32, asked for window = 16"),
  ("optim.optimizer=adamw", "another model or optimizer"),
  ("data.seed=7", "seed"),
])
def test_another_recipe_on_resume_is_refused(setting, message, corpus, uninterrupted, one_device):
  before = files(uninterrupted)
  code, _, err = call(train, *arguments(corpus, uninterrupted, setting))
  assert code == 2
  assert err.startswith("error: ") and message in err and err.count("\n") == 1
  assert files(uninterrupted) == before                   # nothing lost


TINY = f"--config={REPO / 'configs' / 'tiny.py'}"


@pytest.mark.parametrize("args, message", [
  (["--set=model.selected_tokens=100"], "model.selected_tokens=100 is not a multiple of"),
  (["--set=model.windw=3"], "has no field 'windw'; did you mean 'window'?"),
  (["--set=model.window=3.5"], "model.window=3.5: expected int, got float"),
  (["--set=model.window=0"], "ModelConfig.window is 0; it must be at least 1"),
  (["--set=model.num_heads=6", "--set=model.num_kv_heads=4"],
   "model.num_heads=6 is not a multiple of model.num_kv_heads=4"),
  (["--set=data.source=CORRUPT"], "corrupt.jsonl"),
  (["--set=data.source=nowhere"], "nowhere"),
  (["--workdir=UNWRITABLE"], "cannot write to workdir"),
  (["--workdir="], "--workdir is missing"),
  (["--mesh=data=3"], "does not divide the 8 devices"),
  (["--mesh=daat=3"], "has no field 'daat'; did you mean 'data'?"),
  (["--set=model.vocab_size=100"], "model.vocab_size=100 is smaller than the tokenizer's 256"),
  (["--config=configs/tinny.py"], "no config file configs/tinny.py; did you mean"),
  (["--stepps=3"], "stepps"),
])
def test_bad_input_to_train_is_one_line_and_exit_code_2(args, message, tmp_path):
  (tmp_path / "corrupt.jsonl").write_text('{"text": "fine"}\n{"text": "torn\n')
  (tmp_path / "a_file").write_text("in the way")
  before = files(tmp_path)
  args = [arg.replace("CORRUPT", str(tmp_path / "corrupt.jsonl"))
          .replace("UNWRITABLE", str(tmp_path / "a_file" / "run")) for arg in args]
  defaults = [] if any(a.startswith("--config") for a in args) else [TINY]
  if not any(a.startswith("--workdir") for a in args):
    defaults.append(f"--workdir={tmp_path / 'run'}")
  code, _, err = call(train, *defaults, *args)
  assert code == 2
  assert err.startswith("error: ") and message in err and err.count("\n") == 1
  assert files(tmp_path) == before


@pytest.mark.parametrize("program, args, message", [
  (generate, ["--workdir=RUN", "--prompt="], "the prompt is empty"),
  (generate, ["--workdir=EMPTY", "--prompt=a"], "missing checkpoint"),
  (generate, ["--workdir=RUN", "--prompt=a", "--max_tokens=0"], "max_new_tokens is 0"),
  (evaluate, ["--workdir=RUN", "--tasks=juggling"], "unknown task 'juggling'"),
  (evaluate, ["--workdir=EMPTY"], "missing checkpoint"),
  (evaluate, ["--workdir=NO_CHECKPOINTS"], "missing checkpoint"),
])
def test_bad_input_to_generate_and_evaluate(program, args, message, uninterrupted, tmp_path):
  (tmp_path / "empty").mkdir()
  bare = tmp_path / "bare"
  bare.mkdir()
  shutil.copy(uninterrupted / "config.json", bare)
  args = [arg.replace("RUN", str(uninterrupted)).replace("EMPTY", str(tmp_path / "empty"))
          .replace("NO_CHECKPOINTS", str(bare)) for arg in args]
  before = files(uninterrupted)
  code, _, err = call(program, *args)
  assert code == 2
  assert err.startswith("error: ") and message in err and err.count("\n") == 1
  assert files(uninterrupted) == before


def test_too_many_bad_steps_name_the_step_and_keep_the_batch(corpus, tmp_path, one_device):
  """A learning rate that blows up: the run stops by itself, the weights stay finite."""
  workdir = tmp_path / "run"
  code, _, err = call(train, *arguments(
    corpus, workdir, "optim.lr=1e18", "train.max_bad_steps=2", "train.log_every=1",
    "optim.clip_norm=0"))
  assert code == 1, err
  assert err.count("\n") == 1 and "2 steps in a row up to step" in err
  step = int(err.split("up to step ")[1].split()[0])
  with np.load(workdir / f"bad_batch_{step}.npz") as batch:
    assert set(batch) == {"tokens", "targets", "segment_ids", "positions", "weights"}
  assert losses(workdir).keys() == set(range(1, step + 1))


def test_a_run_can_be_evaluated_and_continued_by_text(uninterrupted):
  code, out, err = call(generate, f"--workdir={uninterrupted}", "--prompt=alpha ",
                        "--max_tokens=5", "--temperature=0", "--json")
  assert code == 0, err
  row = json.loads(out)
  assert row["step"] == 12 and row["prompt"] == "alpha " and 0 < len(row["text"]) <= 5
  again = json.loads(call(generate, f"--workdir={uninterrupted}", "--prompt=alpha ",
                          "--max_tokens=5", "--temperature=0", "--json")[1])
  assert again == row


def test_metrics_forget_what_came_after_the_step_resumed_from(tmp_path):
  with metrics.MetricsLog(tmp_path, resume_step=0) as log:
    for step in range(1, 6):
      log.write(step, loss=float(step))
  with (tmp_path / "metrics.jsonl").open("a") as file:
    file.write('{"step": 6, "lo')                          # torn by a kill
  with metrics.MetricsLog(tmp_path, resume_step=3, tensorboard=True) as log:
    log.write(4, loss=40.0)
  assert [(row["step"], row["loss"]) for row in metrics.read(tmp_path)] == [
    (1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0)]
  assert any((tmp_path / "tensorboard").iterdir())


def test_tensorboard_that_is_not_there_is_one_line(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "tensorboardX", None)
  with pytest.raises(UserError, match="needs tensorboardX, which is not installed"):
    metrics.MetricsLog(tmp_path, resume_step=0, tensorboard=True)
