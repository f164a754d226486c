"""The training loop: config, mesh, data, model, restore, step, evaluation, in that order."""

import math
import os
import signal

import jax
import numpy as np

from hysparse_jax import accounting, config, sharding
from hysparse_jax.data import batches as data
from hysparse_jax.errors import UserError
from hysparse_jax.model.transformer import implementations_of
from hysparse_jax.seeds import key_of
from hysparse_jax.training import console, losses, metrics, run, signals
from hysparse_jax.training import step as train_step
from hysparse_jax.training.checkpoint import Checkpoints
from hysparse_jax.training.console import say
from hysparse_jax.training.heldout import heldout


class _StoppedError(Exception):
  """A signal came while steps that are not saved were evaluated."""


def train(cfg: config.Config, workdir,
          objective: losses.Objective = losses.next_token) -> dict:
  """Runs `cfg` in `workdir` to its last step, from its newest good checkpoint if there is one.

  SIGTERM and SIGINT end the run after the present step, which is saved (`training.signals`); in
  another thread than the main one they are not looked at.

  Args:
    cfg: of the run.
    workdir: its folder, made if missing.
    objective: what a step minimises.

  Returns:
    step, preempted (SIGTERM ended it early), tokens_per_second (median over log intervals) and,
    unless preempted, the final heldout_loss (nats per token) and bits_per_byte.

  Raises:
    UserError: bad input; nothing that was there is lost.
    FloatingPointError: `train.max_bad_steps` steps in a row were not finite, or weights are not.
    KeyboardInterrupt: SIGINT ended it early; every step is saved.
  """
  # Mesh and data. A batch is a function of (seed, step), so resuming needs one number.
  mesh = sharding.make_mesh(cfg.mesh)
  sharding.check_divisible(cfg, mesh)
  tokenizer = data.load_tokenizer(cfg.data)
  _check_vocabulary(cfg, tokenizer)
  stream = data.TrainStream(cfg, jax.process_index(), jax.process_count())
  # As many rows at once as a micro-batch has, so that evaluation needs no more memory.
  parts = cfg.train.grad_accum
  heldout_batches = data.heldout_batches(cfg, cfg.train.eval_batches * parts,
                                         cfg.data.batch_size // parts)
  if not any((batch.weights > 0).any() for batch in heldout_batches):
    raise UserError("the held-out batches hold no target; give more held-out text "
                    "(data.heldout_fraction) or shorter rows")
  workdir = run.prepare(workdir)

  # What this will cost, before it costs it.
  account = accounting.account(cfg.model, cfg.data.seq_len)
  say(accounting.summary(cfg.model, cfg.data.seq_len))
  for line in stream.warnings:
    console.warn(line)
  places = cfg.train.steps * cfg.data.batch_size * cfg.data.seq_len
  say(f"data: {stream.describe()}; {cfg.train.steps:,} steps have room for {places:,} tokens")

  # Model, optimizer and step, jitted once with explicit shardings, on one device too.
  program = train_step.build(cfg, mesh, objective)

  with (run.locked(workdir), jax.set_mesh(mesh), signals.requests_to_stop() as stop,
        Checkpoints(workdir / "checkpoints", keep=cfg.train.keep_checkpoints) as checkpoints):
    say(f"ops: {_implementations(cfg)}")
    if not signals.in_program():
      stop.unsaved()       # nobody can end compiling from outside: a signal waits for it

    # The newest good checkpoint, or new weights.
    if checkpoints.latest_step() is None:
      _check_new(workdir, cfg)
      state, start = program.init(key_of(cfg.train.seed)), 0
    else:
      was = run.saved_config(workdir, checkpoints.extra())
      changes = run.check_same_model(workdir, was, cfg)
      state, extra, start = checkpoints.restore(program.abstract_state, report=console.warn)
      data.check_fingerprint(extra["data"], stream.fingerprint)
      if start > cfg.train.steps:
        raise UserError(f"the run in {workdir} is at step {start}, beyond "
                        f"train.steps={cfg.train.steps}; raise it or give another --workdir")
      say("; ".join([f"resumed at step {start}", *changes]))
    run.write_config(workdir, cfg)
    run.keep_tokenizer(workdir, cfg, stream.fingerprint["tokenizer"])

    def place(batch):
      return jax.tree.map(lambda rows: jax.make_array_from_process_local_data(
        program.batch_sharding, rows), batch)

    def check(step):
      """Raises unless the state is finite, and so is its loss on a batch that it never saw."""
      batch = heldout_batches[0]
      nats = losses.evaluate_batch(state.model, place(batch), chunk=cfg.train.loss_chunk)
      if not (train_step.all_finite(state)
              and np.isfinite(np.asarray(nats)[batch.weights > 0]).all()):
        raise FloatingPointError(
          f"the weights or their loss are not finite after step {step}, which is not saved; "
          f"{_last_good(checkpoints)}; lower optim.lr")

    # Compiles evaluation too, so that what it cannot do is found before step 1.
    check(start)
    if start == cfg.train.steps:
      stop.saved()

    with (metrics.MetricsLog(workdir, resume_step=start, tensorboard=cfg.train.tensorboard,
                             evaluate_again=start == cfg.train.steps) as log,
          metrics.TrainProgress(cfg.train.steps, account.train_flops_per_token) as progress):

      def place_or_stop(batch):
        if stop.requested:
          raise _StoppedError
        return place(batch)

      def evaluate(step):
        result = heldout(state.model, heldout_batches, tokenizer, cfg.train.loss_chunk,
                         place=place_or_stop)
        figures = {"heldout_loss": result.loss, "bits_per_byte": result.bits_per_byte}
        log.write(step, **figures)
        progress.note(f"held-out at step {step}: {result.loss:.4f} nats/token, "
                      f"{result.bits_per_byte:.4f} bits/byte")
        progress.restart(step)
        return figures

      def due(step, every):
        return every > 0 and step % every == 0 and 0 < step < cfg.train.steps

      def save(step, block):
        check(step)
        log.flush()                                # so that no saved step lacks its rows
        checkpoints.save(step, state, {"data": stream.fingerprint,
                                       "config": config.to_dict(cfg)}, block=block)
        stop.saved(checkpoints.wait)

      step, pending, speeds, owed = start, [], [], False
      try:
        if due(start, cfg.train.eval_every) and start not in log.evaluated:
          evaluate(start)                          # a kill came between the save and this
        for step, batch in zip(range(start + 1, cfg.train.steps + 1), stream.iterator(start)):
          state, result = program.step(state, place(batch))
          pending.append(result)
          if step == start + 1:
            jax.block_until_ready(result)          # compiled by now: the clock starts
            progress.restart(step)
          stop.unsaved()
          last = step == cfg.train.steps or stop.requested is not None   # read once
          owed |= last or due(step, cfg.train.checkpoint_every)
          shown = last or step % cfg.train.log_every == 0
          if shown or owed:
            results, pending = jax.device_get(pending), []
            rows = metrics.step_rows(cfg.model, results, step)
            if shown:
              rows[-1] |= progress.update(step, float(results[-1].loss), cfg.data.batch_size *
                                          cfg.data.seq_len, rows[-1]["skipped"])
              speeds += [row["tokens_per_second"] for row in rows if "tokens_per_second" in row]
            for row in rows:
              log.write(**row)
            _stop_if_broken(cfg, workdir, step, results[-1], stream, checkpoints, log)
            # While steps are skipped the last good checkpoint stays the newest.
            if owed and (last or results[-1].ok):
              save(step, block=last)
              owed = False
          if last:
            break
          if due(step, cfg.train.eval_every):
            evaluate(step)
            if stop.requested:
              raise _StoppedError
      except _StoppedError:
        if step > start:
          save(step, block=True)

      figures = {"step": step, "preempted": stop.requested is not None,
                 "tokens_per_second": float(np.median(speeds)) if speeds else math.nan}
      if figures["preempted"]:
        progress.note(f"stopped by {stop.requested.name} at step {step}, which is saved; to go on, "
                      f"run the same command with --workdir={workdir}")
        if stop.requested == signal.SIGINT:
          raise KeyboardInterrupt
        return figures
      figures |= evaluate(step)

  _draw(workdir)
  return figures


def _draw(workdir):
  """Pictures of a run that is done; one that cannot be drawn takes nothing from it."""
  try:
    from hysparse_jax import plots  # after the loop: matplotlib is slow to import
    for path in plots.run_figures(metrics.read(workdir), workdir / "plots"):
      say(f"wrote {path}")
  except Exception as error:
    console.warn(f"no pictures in {workdir / 'plots'}: {type(error).__name__}: {error}")


def _implementations(cfg) -> str:
  """What runs for each attention op; a UserError where nothing takes the config's sizes."""
  try:
    names = implementations_of(cfg.model, cfg.data.batch_size // cfg.train.grad_accum,
                               cfg.data.seq_len)
  except NotImplementedError as error:
    raise UserError(str(error)) from error
  return ", ".join(f"{op} {name}" for op, name in names.items())


def _check_vocabulary(cfg, tokenizer):
  ids = tokenizer.vocab_size + (cfg.data.task_ids if cfg.data.task_share else 0)
  if ids > cfg.model.vocab_size:
    extra = f" and data.task_ids={cfg.data.task_ids}" if cfg.data.task_share else ""
    raise UserError(f"model.vocab_size={cfg.model.vocab_size} is smaller than the tokenizer's "
                    f"{tokenizer.vocab_size}{extra}; set model.vocab_size to at least {ids}")


def _check_new(workdir, cfg):
  """Refuses another model where rows of an earlier run are whose checkpoints are gone."""
  if os.path.lexists(workdir / "metrics.jsonl") and metrics.read(workdir):
    run.check_same_model(workdir, run.read_config(workdir), cfg)


def _last_good(checkpoints) -> str:
  checkpoints.wait()
  step = checkpoints.latest_step()
  return "no step was saved" if step is None else f"the checkpoint of step {step} is good"


def _stop_if_broken(cfg, workdir, step, result, stream, checkpoints, log):
  """After too many bad steps in a row: keeps the batch, names it, stops."""
  if int(result.consecutive_bad) < cfg.train.max_bad_steps:
    return
  log.flush()
  path = workdir / f"bad_batch_{step}.npz"
  scratch = path.with_suffix(".tmp.npz")
  with run.writing(path):
    np.savez(scratch, **stream.batch(step - 1)._asdict())
    scratch.replace(path)
  raise FloatingPointError(
    f"{int(result.consecutive_bad)} steps in a row up to step {step} were skipped: loss "
    f"{float(result.total)}, gradient norm {float(result.grad_norm)}; batch {step - 1} is in "
    f"{path}, {_last_good(checkpoints)}; lower optim.lr or raise train.spike_factor")
