"""Damage, locks and signals, without a training process."""

import json
import os
import signal
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hysparse_jax import config
from hysparse_jax.errors import UserError
from hysparse_jax.training import console, metrics, run, signals
from hysparse_jax.training import step as train_step
from hysparse_jax.training.loop import train
from tests.test_configs import REPO
from tests.test_run import tiny_moe


def logged(workdir, steps, **settings):
  with metrics.MetricsLog(workdir, resume_step=0, **settings) as log:
    for step in range(1, steps + 1):
      log.write(step, loss=step / 3, gates=[0.5, None])
  return metrics.read(workdir)


def test_no_flipped_bit_of_metrics_changes_a_row_and_one_warning_names_the_line(tmp_path, capfd):
  rows = logged(tmp_path, 5)
  path = tmp_path / "metrics.jsonl"
  whole = path.read_bytes()
  capfd.readouterr()
  for bit in range(8 * len(whole)):
    data = bytearray(whole)
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)
    found = metrics.read(tmp_path)
    assert all(row in rows for row in found) and len(found) >= 3, bit
    err = capfd.readouterr().err
    if len(found) < 5:
      assert err.count("\n") == 1 and err.startswith("warning: ") and " damaged" in err, bit
      assert f"line {1 + whole[:bit // 8].count(10)} " in err or "lines " in err
    else:
      assert err == "", bit


def test_a_resumed_log_drops_damaged_rows_and_repeated_steps(tmp_path):
  logged(tmp_path, 5)
  path = tmp_path / "metrics.jsonl"
  path.write_bytes(path.read_bytes().replace(b'"step": 2', b'"step": 7'))
  with metrics.MetricsLog(tmp_path, resume_step=3) as log:
    log.write(4, loss=4.0)
  assert [row["step"] for row in metrics.read(tmp_path)] == [1, 3, 4]


def test_tensorboard_has_one_value_a_step_after_a_resume(tmp_path):
  from tensorboardX.proto.event_pb2 import Event
  from tensorboardX.record_writer import struct
  logged(tmp_path, 5, tensorboard=True)
  with metrics.MetricsLog(tmp_path, resume_step=3, tensorboard=True) as log:
    log.write(4, loss=4.0)
  found = []
  for path in (tmp_path / "tensorboard").iterdir():
    data = path.read_bytes()
    while data:
      length = struct.unpack("<Q", data[:8])[0]
      event = Event.FromString(data[12:12 + length])
      found += [event.step for value in event.summary.value if value.tag == "loss"]
      data = data[16 + length:]
  assert sorted(found) == [1, 2, 3, 4]


def test_rows_of_an_earlier_run_are_set_aside(tmp_path):
  logged(tmp_path, 3)
  logged(tmp_path, 2)
  assert len(metrics.read(tmp_path)) == 2
  assert len((tmp_path / "metrics.1.jsonl").read_text().splitlines()) == 3


def test_a_loss_that_is_no_number_is_still_json(tmp_path):
  assert metrics._finite(np.float32("nan")) is None and metrics._finite(np.float32(2)) == 2.0


def test_no_flipped_bit_of_config_json_is_loaded_silently(tmp_path):
  cfg = tiny_moe()
  run.write_config(tmp_path, cfg)
  path = tmp_path / "config.json"
  whole = path.read_bytes()
  for bit in range(0, 8 * len(whole), 7):
    data = bytearray(whole)
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)
    try:
      assert run.read_config(tmp_path) == cfg, bit
    except UserError as error:
      assert "\n" not in str(error)


def test_a_checkpoint_knows_the_config_it_was_saved_under(tmp_path, capfd):
  cfg, other = tiny_moe(), tiny_moe("model.window=8")
  extra = {"config": json.loads(json.dumps(config.to_dict(cfg)))}
  run.write_config(tmp_path, other)
  with pytest.raises(UserError, match="another model or optimizer: it has window = 32"):
    run.saved_config(tmp_path, extra)
  (tmp_path / "config.json").write_text("{")
  assert run.saved_config(tmp_path, extra) == cfg
  assert capfd.readouterr().err.startswith("warning: ")


def test_the_same_layers_spelled_otherwise_are_the_same_model(tmp_path):
  cfg = tiny_moe()
  spelled = config.override(cfg, f"model.pattern={' '.join(cfg.model.layer_kinds)}",
                            "model.d_ff=77", f"model.value_head_dim={cfg.model.v_dim}")
  assert len(run.check_same_model(tmp_path, cfg, spelled)) == 3


def test_a_second_run_in_a_folder_is_refused_in_one_line(tmp_path):
  with run.locked(tmp_path):
    with pytest.raises(UserError, match=f"is in use by process {os.getpid()} on") as error, \
         run.locked(tmp_path):
      pass
    assert "\n" not in str(error.value)
  with run.locked(tmp_path):
    pass


def test_an_address_is_no_workdir():
  with pytest.raises(UserError, match="workdir gs://bucket/run is no folder"):
    run.prepare("gs://bucket/run")


def test_a_run_outlives_its_stdout(monkeypatch, capfd):
  with open("/dev/full", "w") as full:
    monkeypatch.setattr("sys.stdout", full)
    console.say("lost")
    console.say("lost too")
  err = capfd.readouterr().err
  assert err.count("\n") == 1 and "cannot write to stdout: No space left on device" in err


def test_a_signal_is_a_request_while_steps_are_unsaved_and_the_second_sigint_is_not():
  # Raised in this thread: sent to the process, another thread may take a while to pass it on.
  with signals.requests_to_stop() as stop:
    stop.unsaved()
    signal.raise_signal(signal.SIGTERM)
    assert stop.requested == signal.SIGTERM
    with pytest.raises(KeyboardInterrupt):
      signal.raise_signal(signal.SIGINT)
  with signals.requests_to_stop() as stop, pytest.raises(KeyboardInterrupt):
    signal.raise_signal(signal.SIGINT)          # nothing to save
  assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_another_thread_takes_no_signals():
  found = []

  def work():
    with signals.requests_to_stop() as stop:
      found.append(stop.requested)

  thread = threading.Thread(target=work)
  thread.start()
  thread.join()
  assert found == [None]


def test_pictures_leave_the_process_backend_alone(tmp_path):
  import matplotlib

  from hysparse_jax import plots
  before = matplotlib.rcParams._get("backend")
  assert plots.run_figures([{"step": 1, "loss": None}, {"step": 2, "loss": 1.0}], tmp_path)
  assert matplotlib.rcParams._get("backend") == before
  assert [path.name for path in tmp_path.iterdir()] == ["loss.png"]


def debug(*settings):
  return config.override(config.load(str(REPO / "configs/debug.py")), "train.steps=6",
                         "train.log_every=4", "train.checkpoint_every=1",
                         "train.keep_checkpoints=1", "train.eval_every=2",
                         "data.batch_size=8", *settings)


def test_training_in_a_thread_and_a_weight_that_turns_nan(tmp_path, monkeypatch):
  """Saves more frequent than log rows: the last good state stays, and has its rows."""
  build, made = train_step.build, []

  def poisoned(*args):
    program = build(*args)
    made.append(program)

    def step(state, batch):
      state, result = program.step(state, batch)
      if int(state.step) == 4:
        state = jax.tree.map(lambda leaf: leaf * jnp.nan if leaf.dtype == jnp.float32 else leaf,
                             state)
      return state, result

    return program._replace(step=step)

  errors = []

  def work():
    try:
      train(debug(), tmp_path)
    except FloatingPointError as error:
      errors.append(str(error))

  monkeypatch.setattr(train_step, "build", poisoned)
  thread = threading.Thread(target=work)
  thread.start()
  thread.join()
  assert len(errors) == 1 and "not finite after step 4" in errors[0]
  assert "the checkpoint of step 3 is good" in errors[0]
  assert [row["step"] for row in metrics.read(tmp_path) if "loss" in row] == [1, 2, 3, 4]

  monkeypatch.setattr(train_step, "build", lambda *args: made[0])      # compiled once
  assert train(debug(), tmp_path)["step"] == 6
  rows = metrics.read(tmp_path)
  assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4, 5, 6]
  assert [row["step"] for row in rows if "heldout_loss" in row] == [2, 4, 6]
  train(debug(), tmp_path)                                             # done: nothing twice
  assert [row["step"] for row in metrics.read(tmp_path) if "heldout_loss" in row] == [2, 4, 6]

  (tmp_path / "checkpoints").rename(tmp_path / "moved")
  with pytest.raises(UserError, match="another model or optimizer"):
    train(debug("model.window=16"), tmp_path)
  assert metrics.read(tmp_path)[0]["step"] == 1
