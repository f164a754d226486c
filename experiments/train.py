"""Trains a model: config, mesh, data, model, restore, loop, evaluation, in that order.

    python -m experiments.train --config=configs/tiny.py --workdir=runs/tiny [--set a.b=v ...]
        [--mesh=data=2,fsdp=2,tensor=2]

Run it again with the same --workdir to go on where it stopped: after a kill, a SIGTERM or a larger
--set train.steps. The work folder holds config.json, metrics.jsonl, checkpoints/ and plots/.
"""

import json
import math
import os
import pathlib
import signal

import jax
import numpy as np
from absl import flags
from rich.console import Console

from experiments import cli
from hysparse_jax import accounting, config, data, metrics, model, optim, sharding, train_step
from hysparse_jax.checkpoint import Checkpoints
from hysparse_jax.errors import UserError
from hysparse_jax.hybrid import by_layer

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; made if missing.")
_MESH = flags.DEFINE_string("mesh", None, "Devices per axis, such as data=2,fsdp=2,tensor=2.")


def train(cfg: config.Config, workdir) -> dict:
  """Runs `cfg` in `workdir` to its last step, from its newest good checkpoint if there is one.

  Returns:
    The last held-out figures: heldout_loss (nats per token), bits_per_byte, tokens_per_second
    (median over the run's log intervals), step, and preempted (True: SIGTERM ended it early).

  Raises:
    UserError: bad input; nothing that was there is lost.
    FloatingPointError: `train.max_bad_steps` steps in a row were not finite, or spikes.
  """
  workdir = _prepare(workdir)
  console = Console()

  # Mesh and data. A batch is a function of (seed, step), so resuming needs one number.
  mesh = sharding.make_mesh(cfg.mesh)
  sharding.check_divisible(cfg, mesh)
  tokenizer = data.load_tokenizer(cfg.data)
  _check_vocab(cfg, tokenizer)
  stream = data.TrainStream(cfg.data, jax.process_index(), jax.process_count())
  heldout = data.heldout_batches(cfg.data, cfg.train.eval_batches)

  # What this will cost, before it costs it.
  account = accounting.account(cfg.model, cfg.data.seq_len)
  console.print(accounting.summary(cfg.model, cfg.data.seq_len), highlight=False)

  # Model, optimizer and step, jitted once with explicit shardings, on one device too.
  program = train_step.build(cfg, mesh)
  place = lambda batch: jax.tree.map(
    lambda rows: jax.make_array_from_process_local_data(program.batch_sharding, rows), batch)
  rate = optim.schedule(cfg.optim, cfg.train.steps, cfg.optim.lr)

  with jax.set_mesh(mesh):
    checkpoints = Checkpoints(workdir / "checkpoints", keep=cfg.train.keep_checkpoints)
    state, start = _restore_or_init(cfg, workdir, program, checkpoints, stream, console)
    _write_config(cfg, workdir)
    log = metrics.MetricsLog(workdir, resume_step=start, tensorboard=cfg.train.tensorboard)
    progress = metrics.TrainProgress(cfg.train.steps, account.train_flops_per_token)
    stop = _StopOnSigterm()

    def save(state, step, block=False):
      checkpoints.save(step, state, {"data": stream.fingerprint, "config": config.to_dict(cfg)},
                       block=block)

    pending, speeds, saved = [], [], start
    step = start
    for step, batch in zip(range(start + 1, cfg.train.steps + 1), stream.iterator(start)):
      state, result = program.step(state, place(batch))
      pending.append((step, result))
      if step == start + 1:
        jax.block_until_ready(result)
        progress.start(step)
      last = step == cfg.train.steps or stop.requested

      if step % cfg.train.log_every == 0 or last:
        figures = _log(cfg, log, progress, pending, rate, batch)
        speeds.append(figures["tokens_per_second"])
        pending = []
        _stop_if_broken(result, step, batch, workdir, cfg)
      if cfg.train.eval_every and step % cfg.train.eval_every == 0 and not last:
        _evaluate(state.model, heldout, place, tokenizer, log, progress, step, cfg)
        progress.start(step)
      if last or (cfg.train.checkpoint_every and step % cfg.train.checkpoint_every == 0):
        log.flush()
        save(state, step, block=last)
        saved = step
      if stop.requested:
        break

    figures = {"step": step, "preempted": stop.requested and step < cfg.train.steps}
    if figures["preempted"]:
      progress.close()
      console.print(f"stopped by SIGTERM; step {saved} is saved. To go on: run the same command "
                    f"with --workdir={workdir}", soft_wrap=True, highlight=False)
    else:
      figures |= _evaluate(state.model, heldout, place, tokenizer, log, progress, step, cfg)
      progress.close()
    checkpoints.close()
    log.close()
    stop.restore()

  if not figures["preempted"]:
    from hysparse_jax import plots   # after the loop: matplotlib is slow to import
    for path in plots.run_figures(metrics.read(workdir), workdir / "plots"):
      console.print(f"wrote {path}", soft_wrap=True, highlight=False)
  figures["tokens_per_second"] = float(np.median(speeds)) if speeds else math.nan
  return figures


def load_run(workdir):
  """The config, model and tokenizer of the newest good checkpoint of a run.

  Raises:
    UserError: no run there, or no checkpoint that verifies.
  """
  workdir = pathlib.Path(workdir)
  path = workdir / "config.json"
  if not path.is_file():
    raise UserError(f"no run in {workdir}: config.json is missing; train one with "
                    "python -m experiments.train")
  cfg = config.from_dict(json.loads(path.read_text()))
  mesh = sharding.make_mesh(config.MeshConfig(data=1, fsdp=1), jax.devices()[:1])
  program = train_step.build(cfg, mesh)
  with jax.set_mesh(mesh):
    checkpoints = Checkpoints(workdir / "checkpoints", keep=cfg.train.keep_checkpoints)
    state, _, step = checkpoints.restore(program.abstract_state, report=_report)
    checkpoints.close()
  return cfg, state.model, data.load_tokenizer(cfg.data), step


def _report(text):
  Console(stderr=True).print(f"warning: {text}", soft_wrap=True, highlight=False)


def _prepare(workdir):
  if not workdir:
    raise UserError("--workdir is missing; name a folder for the run, such as runs/tiny")
  workdir = pathlib.Path(workdir).absolute()
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    probe = workdir / f".write-test-{os.getpid()}"
    probe.touch()
    probe.unlink()
  except OSError as error:
    raise UserError(f"cannot write to workdir {workdir}: {error.strerror}; "
                    "give another --workdir") from error
  return workdir


def _check_vocab(cfg, tokenizer):
  if tokenizer.vocab_size > cfg.model.vocab_size:
    raise UserError(f"model.vocab_size={cfg.model.vocab_size} is smaller than the tokenizer's "
                    f"{tokenizer.vocab_size}; set model.vocab_size to at least that")


def _restore_or_init(cfg, workdir, program, checkpoints, stream, console):
  if checkpoints.latest_step() is None:
    return program.init(jax.random.key(cfg.train.seed)), 0
  _check_same_model(cfg, workdir)
  state, extra, step = checkpoints.restore(program.abstract_state, report=_report)
  data.check_fingerprint(extra["data"], stream.fingerprint)
  if step > cfg.train.steps:
    raise UserError(f"the run in {workdir} is at step {step}, beyond "
                    f"train.steps={cfg.train.steps}; raise it or give another --workdir")
  console.print(f"resumed at step {step}", highlight=False)
  return state, step


def _check_same_model(cfg, workdir):
  path = workdir / "config.json"
  if not path.is_file():
    return
  old = config.from_dict(json.loads(path.read_text()))
  for section in ("model", "optim"):
    before = config.to_text(getattr(old, section)).splitlines()
    after = config.to_text(getattr(cfg, section)).splitlines()
    changed = [f"{section}.{a} -> {b.partition(' = ')[2]}"
               for a, b in zip(before, after) if a != b] or (
                 [section] if len(before) != len(after) else [])
    if changed and section == "model":
      raise UserError(f"the run in {workdir} has another model ({'; '.join(changed)}); "
                      "restore its settings or give another --workdir")
    if changed and old.optim.optimizer != cfg.optim.optimizer:
      raise UserError(f"the run in {workdir} has another optimizer ({'; '.join(changed)}); "
                      "restore it or give another --workdir")


def _write_config(cfg, workdir):
  scratch = workdir / "config.json.tmp"
  scratch.write_text(json.dumps(config.to_dict(cfg), indent=2) + "\n")
  scratch.replace(workdir / "config.json")


def _log(cfg, log, progress, pending, rate, batch):
  """Writes the rows of the interval that ends now; one device sync for all of them."""
  results = jax.device_get([result for _, result in pending])
  for (step, _), result in zip(pending, results):
    row = {"loss": float(result.loss), "grad_norm": float(result.grad_norm),
           "lr": float(rate(step - 1 - int(result.total_bad))), "skipped": int(result.total_bad)}
    if step == pending[-1][0]:
      layers = by_layer(cfg.model, result.layers)
      for name in ("gate_sparse", "gate_local"):
        values = [getattr(layer, name) for layer in layers]
        if any(value is not None for value in values):
          row[name] = [None if value is None else float(value) for value in values]
      if cfg.model.moe is not None:
        row["expert_load"] = [layer.router.expert_load.tolist() for layer in layers]
    log.write(step, **row)
  step, result = pending[-1][0], results[-1]
  tokens = len(pending) * cfg.data.batch_size * cfg.data.seq_len
  figures = progress.update(step, float(result.loss), tokens, int(result.total_bad))
  log.write(step, **figures)
  return figures


def _stop_if_broken(result, step, batch, workdir, cfg):
  """After too many bad steps in a row: keep the batch, name it, stop. The weights are still good."""
  if int(result.consecutive_bad) < cfg.train.max_bad_steps:
    return
  path = workdir / f"bad_batch_{step}.npz"
  np.savez(path, **batch._asdict())
  raise FloatingPointError(
    f"{int(result.consecutive_bad)} steps in a row up to step {step} had a loss or gradient that "
    f"is not finite or spikes; the weights of the last good step are kept, the batch is in {path}")


def _evaluate(params, heldout, place, tokenizer, log, progress, step, cfg):
  """Held-out loss over all of `heldout`, logged and shown."""
  nats = tokens = length = 0.0
  for batch in heldout:
    losses = np.asarray(model.evaluate_batch(params, place(batch), chunk=cfg.train.loss_chunk))
    counted = batch.weights > 0
    nats += float((losses * batch.weights).sum(dtype=np.float64))
    tokens += float(batch.weights.sum())
    length += float(tokenizer.byte_lengths[batch.targets[counted]].sum())
  figures = {"heldout_loss": nats / tokens, "bits_per_byte": nats / math.log(2) / length}
  log.write(step, **figures)
  progress.note(f"held-out at step {step}: loss {figures['heldout_loss']:.4f} nats/token, "
                f"{figures['bits_per_byte']:.4f} bits/byte")
  return figures


class _StopOnSigterm:
  """While it stands, SIGTERM asks the loop to save and leave instead of killing it."""

  def __init__(self):
    self.requested = False
    self._previous = signal.signal(signal.SIGTERM, self._request)

  def _request(self, *_):
    self.requested = True

  def restore(self):
    signal.signal(signal.SIGTERM, self._previous)


def main(argv):
  """Entry point."""
  del argv
  cfg = cli.load_config()
  if _MESH.value:
    for part in _MESH.value.split(","):
      cfg = config.override(cfg, f"mesh.{part}")
  train(cfg, _WORKDIR.value)


if __name__ == "__main__":
  cli.run(main)
