"""The training loop: config, mesh, data, model, restore, step, evaluation, in that order."""

import math
import signal

import jax
import numpy as np

from hysparse_jax import accounting, config, sharding
from hysparse_jax.data import batches as data
from hysparse_jax.errors import UserError
from hysparse_jax.model.hybrid import by_layer
from hysparse_jax.training import metrics, optim, run
from hysparse_jax.training import step as train_step
from hysparse_jax.training.checkpoint import Checkpoints
from hysparse_jax.training.heldout import heldout


def train(cfg: config.Config, workdir) -> dict:
  """Runs `cfg` in `workdir` to its last step, from its newest good checkpoint if there is one.

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
  ids = tokenizer.vocab_size + (cfg.data.task_ids if cfg.data.task_share else 0)
  if ids > cfg.model.vocab_size:
    extra = f" and data.task_ids={cfg.data.task_ids}" if cfg.data.task_share else ""
    raise UserError(f"model.vocab_size={cfg.model.vocab_size} is smaller than the tokenizer's "
                    f"{tokenizer.vocab_size}{extra}; set model.vocab_size to at least {ids}")
  stream = data.TrainStream(cfg.data, jax.process_index(), jax.process_count())
  heldout_batches = data.heldout_batches(cfg.data, cfg.train.eval_batches)
  workdir = run.prepare(workdir)

  # What this will cost, before it costs it.
  account = accounting.account(cfg.model, cfg.data.seq_len)
  print(accounting.summary(cfg.model, cfg.data.seq_len), flush=True)

  # Model, optimizer and step, jitted once with explicit shardings, on one device too.
  program = train_step.build(cfg, mesh)
  rate = optim.schedule(cfg.optim, cfg.train.steps, cfg.optim.lr)

  def place(batch):
    return jax.tree.map(lambda rows: jax.make_array_from_process_local_data(
      program.batch_sharding, rows), batch)

  with jax.set_mesh(mesh), Checkpoints(workdir / "checkpoints",
                                       keep=cfg.train.keep_checkpoints) as checkpoints:
    state, start = _restore_or_init(cfg, workdir, program, checkpoints, stream)
    run.write_config(workdir, cfg)

    with (metrics.MetricsLog(workdir, resume_step=start, tensorboard=cfg.train.tensorboard) as log,
          metrics.TrainProgress(cfg.train.steps, account.train_flops_per_token) as progress,
          _StopOnSigterm() as stop):

      def evaluate(step):
        result = heldout(state.model, heldout_batches, tokenizer, cfg.train.loss_chunk,
                         place=place)
        log.write(step, heldout_loss=result.loss, bits_per_byte=result.bits_per_byte)
        progress.note(f"held-out at step {step}: {result.loss:.4f} nats/token, "
                      f"{result.bits_per_byte:.4f} bits/byte")
        progress.restart(step)
        return {"heldout_loss": result.loss, "bits_per_byte": result.bits_per_byte}

      step, pending, speeds = start, [], []
      for step, batch in zip(range(start + 1, cfg.train.steps + 1), stream.iterator(start)):
        state, result = program.step(state, place(batch))
        pending.append(result)
        if step == start + 1:
          jax.block_until_ready(result)            # compiled by now: the clock starts
          progress.restart(step)
        last = step == cfg.train.steps or stop.requested   # read once: a signal may come any time
        if step % cfg.train.log_every == 0 or last:
          speeds += _log(cfg, log, progress, step, jax.device_get(pending), rate)
          _stop_if_broken(cfg, workdir, step, jax.device_get(pending), stream)
          pending = []
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


def _restore_or_init(cfg, workdir, program, checkpoints, stream):
  """The state to go on from, and the step it is at."""
  if checkpoints.latest_step() is None:
    return program.init(jax.random.key(cfg.train.seed)), 0
  run.check_same_model(workdir, cfg)
  state, extra, step = checkpoints.restore(program.abstract_state, report=run.warn)
  data.check_fingerprint(extra["data"], stream.fingerprint)
  if step > cfg.train.steps:
    raise UserError(f"the run in {workdir} is at step {step}, beyond "
                    f"train.steps={cfg.train.steps}; raise it or give another --workdir")
  print(f"resumed at step {step}", flush=True)
  return state, step


def _log(cfg, log, progress, last_step, results, rate):
  """Writes a row per step of the interval that ends now; its tokens per second, if it has one."""
  speeds = []
  for step, result in enumerate(results, last_step - len(results) + 1):
    row = {"loss": float(result.loss), "grad_norm": float(result.grad_norm),
           "lr": float(rate(step - 1 - int(result.total_bad))), "skipped": int(result.total_bad)}
    if step == last_step:
      layers = by_layer(cfg.model, result.layers)
      for name in ("gate_sparse", "gate_local"):
        values = [getattr(layer, name) for layer in layers]
        if any(value is not None for value in values):
          row[name] = [None if value is None else float(value) for value in values]
      if cfg.model.moe is not None:
        row["expert_load"] = [layer.router.expert_load.tolist() for layer in layers]
      shown = progress.update(step, row["loss"], cfg.data.batch_size * cfg.data.seq_len,
                              row["skipped"])
      speeds = [shown["tokens_per_second"]] if shown else []
      row |= shown
    log.write(step, **row)
  return speeds


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


class _StopOnSigterm:
  """While it is open, SIGTERM asks the loop to save and leave instead of killing it."""

  def __init__(self):
    self.requested = False

  def __enter__(self):
    self._previous = signal.signal(signal.SIGTERM, self._request)
    return self

  def __exit__(self, *error):
    signal.signal(signal.SIGTERM, self._previous)

  def _request(self, *_):
    self.requested = True
