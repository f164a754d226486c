"""The training loop: config, mesh, data, model, restore, step, evaluation, in that order."""

import math

import jax
import numpy as np

from hysparse_jax import accounting, config, sharding
from hysparse_jax.data import batches as data
from hysparse_jax.errors import UserError
from hysparse_jax.model.transformer import implementations_of
from hysparse_jax.training import losses, metrics, run
from hysparse_jax.training import step as train_step
from hysparse_jax.training.checkpoint import Checkpoints
from hysparse_jax.training.heldout import heldout
from hysparse_jax.training.signals import StopOnSigterm


def train(cfg: config.Config, workdir,
          objective: losses.Objective = losses.next_token) -> dict:
  """Runs `cfg` in `workdir` to its last step, from its newest good checkpoint if there is one.

  Args:
    cfg: of the run.
    workdir: its folder, made if missing.
    objective: what a step minimises.

  Returns:
    step, preempted (SIGTERM ended it early), tokens_per_second (median over log intervals) and,
    unless preempted, the final heldout_loss (nats per token) and bits_per_byte.

  Raises:
    UserError: bad input; nothing that was there is lost.
    FloatingPointError: `train.max_bad_steps` steps in a row were not finite, or spikes.
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
  workdir = run.prepare(workdir)

  # What this will cost, before it costs it.
  account = accounting.account(cfg.model, cfg.data.seq_len)
  print(accounting.summary(cfg.model, cfg.data.seq_len))
  for line in stream.warnings:
    run.warn(line)
  places = cfg.train.steps * cfg.data.batch_size * cfg.data.seq_len
  print(f"data: {stream.describe()}; {cfg.train.steps:,} steps have room for {places:,} tokens",
        flush=True)

  # Model, optimizer and step, jitted once with explicit shardings, on one device too.
  program = train_step.build(cfg, mesh, objective)

  def place(batch):
    return jax.tree.map(lambda rows: jax.make_array_from_process_local_data(
      program.batch_sharding, rows), batch)

  with (jax.set_mesh(mesh),
        Checkpoints(workdir / "checkpoints", keep=cfg.train.keep_checkpoints) as checkpoints):
    print(f"ops: {_implementations(cfg)}", flush=True)

    # The newest good checkpoint, or new weights.
    if checkpoints.latest_step() is None:
      state, start = program.init(jax.random.key(cfg.train.seed)), 0
    else:
      changes = run.check_same_model(workdir, cfg)
      state, extra, start = checkpoints.restore(program.abstract_state, report=run.warn)
      data.check_fingerprint(extra["data"], stream.fingerprint)
      if start > cfg.train.steps:
        raise UserError(f"the run in {workdir} is at step {start}, beyond "
                        f"train.steps={cfg.train.steps}; raise it or give another --workdir")
      print("; ".join([f"resumed at step {start}", *changes]), flush=True)
    run.write_config(workdir, cfg)

    with (metrics.MetricsLog(workdir, resume_step=start, tensorboard=cfg.train.tensorboard) as log,
          metrics.TrainProgress(cfg.train.steps, account.train_flops_per_token) as progress,
          StopOnSigterm() as stop):

      def evaluate(step):
        result = heldout(state.model, heldout_batches, tokenizer, cfg.train.loss_chunk,
                         place=place)
        figures = {"heldout_loss": result.loss, "bits_per_byte": result.bits_per_byte}
        log.write(step, **figures)
        progress.note(f"held-out at step {step}: {result.loss:.4f} nats/token, "
                      f"{result.bits_per_byte:.4f} bits/byte")
        progress.restart(step)
        return figures

      step, pending, speeds = start, [], []
      for step, batch in zip(range(start + 1, cfg.train.steps + 1), stream.iterator(start)):
        state, result = program.step(state, place(batch))
        pending.append(result)
        if step == start + 1:
          jax.block_until_ready(result)            # compiled by now: the clock starts
          progress.restart(step)
        last = step == cfg.train.steps or stop.requested   # read once: a signal may come any time
        if step % cfg.train.log_every == 0 or last:
          results, pending = jax.device_get(pending), []
          rows = metrics.step_rows(cfg.model, results, step)
          rows[-1] |= progress.update(step, rows[-1]["loss"], cfg.data.batch_size *
                                      cfg.data.seq_len, rows[-1]["skipped"])
          speeds += [row["tokens_per_second"] for row in rows if "tokens_per_second" in row]
          for row in rows:
            log.write(**row)
          _stop_if_broken(cfg, workdir, step, results, stream)
        if cfg.train.eval_every and step % cfg.train.eval_every == 0 and not last:
          evaluate(step)
        if last or (cfg.train.checkpoint_every and step % cfg.train.checkpoint_every == 0):
          log.flush()                              # so that no saved step lacks its rows
          checkpoints.save(step, state, {"data": stream.fingerprint}, block=last)
        if last:
          break

      figures = {"step": step, "preempted": step < cfg.train.steps,
                 "tokens_per_second": float(np.median(speeds)) if speeds else math.nan}
      if figures["preempted"]:
        progress.note(f"stopped by SIGTERM at step {step}, which is saved; to go on, run the same "
                      f"command with --workdir={workdir}")
        return figures
      figures |= evaluate(step)

  from hysparse_jax import plots  # after the loop: matplotlib is slow to import
  for path in plots.run_figures(metrics.read(workdir), workdir / "plots"):
    print(f"wrote {path}")
  return figures


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


def _stop_if_broken(cfg, workdir, last_step, results, stream):
  """After too many bad steps in a row: keeps the batch, names it, stops; the weights are good."""
  for step, result in enumerate(results, last_step - len(results) + 1):
    if int(result.consecutive_bad) >= cfg.train.max_bad_steps:
      path = workdir / f"bad_batch_{step}.npz"
      np.savez(path, **stream.batch(step - 1)._asdict())
      raise FloatingPointError(
        f"{int(result.consecutive_bad)} steps in a row up to step {step} were skipped: loss "
        f"{float(result.total)}, gradient norm {float(result.grad_norm)}; batch {step - 1} is in "
        f"{path}, the last checkpoint is good; lower optim.lr or raise train.spike_factor")
