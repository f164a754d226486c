"""Runs that are killed, stopped, filled up, doubled or poisoned."""

import collections
import contextlib
import io
import pathlib
import signal
import subprocess
import time

import jax
import jax.numpy as jnp
import numpy as np

from hysparse_jax import config, sharding
from hysparse_jax.errors import UserError
from hysparse_jax.training import loop, metrics, step

from .lab import STEPS, finish, losses, newest, outcome, skipped, wait_until


def kill(lab, rounds):
  """kill -9 at random moments, saves included, then resume"""
  seen = collections.Counter({"leaves that differ": 0, "rows missing": 0})
  done = 0
  while done < rounds:
    workdir, alive = lab.new(), True
    while alive and done < rounds:
      process = lab.start(workdir)
      lab.pause(process, workdir, early=0.2)
      process.kill()
      alive = finish(process)[0] == 128 + signal.SIGKILL
      done += alive
      seen["rows missing"] += lab.rows_missing(workdir, newest(workdir))
    seen.update(lab.resumed(workdir))
  return outcome(seen, "0 and 0", not seen.total(), rounds)


def _signalled(lab, rounds, number, wanted):
  """Sends a signal at random moments, then resumes; every other run compiles everything."""
  codes, slowest, early_s = collections.Counter(), 0.0, 0.0
  seen = collections.Counter({"steps lost": 0, "leaves that differ": 0, "rows missing": 0})
  bad, done = 0, 0
  while done < rounds:
    workdir = lab.new()
    process = lab.start(workdir, compiled=done % 2 == 0)
    lab.pause(process, workdir, early=0.6)
    if process.poll() is not None:
      finish(process)
      continue
    done += 1
    process.send_signal(number)
    begun = newest(workdir) > 0
    code, _, seconds = finish(process)
    codes[code] += 1
    bad += code not in wanted and not (code == 0 and newest(workdir) == STEPS)
    slowest, early_s = max(slowest, seconds), early_s if begun else max(early_s, seconds)
    seen["steps lost"] += max(losses(workdir), default=0) - newest(workdir)
    seen.update(lab.resumed(workdir))
  report = {"exit codes": {str(code): count for code, count in sorted(codes.items())}, **seen,
            "slowest end, s": round(slowest, 1), "slowest before a save, s": round(early_s, 1)}
  return report, not bad and not seen.total()


def sigterm(lab, rounds):
  """SIGTERM at random moments, then resume"""
  seen, ok = _signalled(lab, rounds, signal.SIGTERM, (0, 143))
  return outcome(seen, "exit 0 or 143, no step lost, bit-equal", ok, rounds)


def sigint(lab, rounds):
  """SIGINT at random moments, compiling included, then resume"""
  seen, ok = _signalled(lab, rounds, signal.SIGINT, (130,))
  return outcome(seen, "exit 130, within 2 s before a save, no step lost, bit-equal",
                 ok and seen["slowest before a save, s"] <= 2, rounds)


def full_disk(lab, rounds):
  """A disk that is full during a save, then is not"""
  wanted = "exit 2, one line with the reason, nothing lost"
  seen = collections.Counter({"checkpoints lost": 0, "leaves that differ": 0, "rows missing": 0,
                              "other lines or codes": 0})
  disk = lab.new()
  disk.mkdir()
  for _ in range(rounds):
    size = f"size={lab.rng.integers(1_500, 5_000)}k"
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", disk],
                             capture_output=True, text=True, check=False)
    if mounted.returncode:
      return skipped(f"cannot mount a small disk: {mounted.stderr.strip()}", wanted)
    try:
      code, errors, _ = finish(lab.start(disk / "run", "train.keep_checkpoints=1000"))
      seen["other lines or codes"] += not (
        code == 2 and len(errors) == 1 and "No space left" in errors[0])
      subprocess.run(["mount", "-o", "remount,size=1g", disk], check=True)
      seen["checkpoints lost"] += sum(not (disk / "run" / "checkpoints" / str(number)).is_dir()
                                      for number in range(2, newest(disk / "run"), 2))
      seen.update(lab.resumed(disk / "run"))
    finally:
      subprocess.run(["umount", disk], check=True)
  return outcome(seen, wanted, not seen.total(), rounds)


def vanished(lab, rounds):
  """A save whose folder vanishes"""
  slowest, wrong = 0.0, 0
  for _ in range(rounds):
    workdir = lab.new()
    process = lab.start(workdir, "train.steps=1000000")
    lab.pause(process, workdir, early=0)
    (workdir / "checkpoints").rename(workdir / "gone")
    code, errors, seconds = finish(process)
    slowest, wrong = max(slowest, seconds), wrong + (code != 2 or len(errors) != 1)
  return outcome({"slowest end, s": round(slowest, 1), "other lines or codes": wrong},
                 "exit 2 within 5 s, one line", slowest <= 5 and not wrong, rounds)


def two_runs(lab, rounds):
  """Two runs in one workdir"""
  seen = collections.Counter({"not one refused in one line": 0, "leaves that differ": 0,
                              "rows missing": 0})
  for _ in range(rounds):
    workdir = lab.new()
    first = lab.start(workdir)
    wait_until(lambda: False, lab.rng.random() * lab.whole.run_s / 2)
    ends = [finish(process) for process in (lab.start(workdir), first)]
    (done, _, _), (refused, errors, _) = sorted(ends)
    seen["not one refused in one line"] += not (
      (done, refused, len(errors)) == (0, 2, 1) and " is in use by " in errors[0])
    seen["leaves that differ"] += lab.leaves_differ(workdir)
    seen["rows missing"] += lab.rows_missing(workdir)
  return outcome(seen, "the second is refused in one line, the first loses nothing",
                 not seen.total(), rounds)


def nan_weight(lab, rounds):
  """A weight that turns NaN, checkpoints more frequent than log rows"""
  wanted = "the last good state stays, and the message names it"
  cfg = config.override(lab.cfg, "train.log_every=7", "train.checkpoint_every=1",
                        "train.keep_checkpoints=1")
  build, wrong = step.build, 0
  program = build(cfg, sharding.make_mesh(cfg.mesh))
  for _ in range(rounds):
    workdir, moment = lab.new(), int(lab.rng.integers(2, STEPS))

    def poisoned(state, batch, moment=moment):
      state, result = program.step(state, batch)
      if int(state.step) == moment:
        state = jax.tree.map(
          lambda leaf: leaf * jnp.nan if leaf.dtype == jnp.float32 else leaf, state)
      return state, result

    step.build = lambda *_, run=poisoned: program._replace(step=run)
    try:
      with contextlib.redirect_stdout(io.StringIO()):
        loop.train(cfg, workdir)
      wrong += 1
    except FloatingPointError as error:
      wrong += (f"not finite after step {moment}" not in str(error)
                or f"the checkpoint of step {moment - 1} is good" not in str(error)
                or newest(workdir) != moment - 1
                or sorted(losses(workdir)) != list(range(1, moment + 1)))
    finally:
      step.build = build
  return outcome({"lost or untrue": wrong}, wanted, not wrong, rounds)


def long(lab, rounds):
  """2,000 steps: memory of the process and time of a step"""
  del rounds
  workdir, memory = lab.new(), {}
  process = lab.start(workdir, "train.steps=2000", "train.log_every=50", "train.eval_every=500",
                      "train.checkpoint_every=50")
  while process.poll() is None:
    with contextlib.suppress(OSError, ValueError, IndexError):
      pages = int(pathlib.Path(f"/proc/{process.pid}/statm").read_text().split()[1])
      if newest(workdir) not in (0, 2000):
        memory[newest(workdir)] = pages          # the last sample before the next save
    time.sleep(0.05)
  code, errors, _ = finish(process)
  if code or 500 not in memory or 1950 not in memory:
    raise UserError(f"2,000 steps ended with {code} {errors}, memory seen at {sorted(memory)}; "
                    "run it again")
  speeds = [row["tokens_per_second"] for row in metrics.read(workdir)
            if "tokens_per_second" in row and row["step"] > 500]
  growth = 100 * (memory[1950] / memory[500] - 1)
  half = len(speeds) // 2
  drift = 100 * (np.median(speeds[:half]) / np.median(speeds[half:]) - 1)
  return outcome({"memory, step 500 to 1,950, %": round(growth, 2),
                  "median step time, later half to earlier, %": round(float(drift), 1)},
                 "memory at most 1 %, step time at most 5 % (both cores free)",
                 growth <= 1 and drift <= 5, 1)
