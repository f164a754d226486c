"""Measures what kills, signals, damage, full disks and second runs do to a run of `train`.

    python -m experiments.reliability --rounds=10 [--only=kill,sigterm] [--out=docs/reliability.md]

Every row starts runs of configs/debug.py in a scratch folder, hurts them at random moments and
compares what is left with a run that nothing happened to. The rows are appended to
`experiments/results/reliability.jsonl` (--append names another file), and the newest row of each
test there becomes a line of the table in --out. What needs no process is tried 50 times a round.
About one minute a round and row on two cores; `long` takes as long as 2,000 steps.
"""

import collections
import contextlib
import functools
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from hysparse_jax import config, sharding
from hysparse_jax.errors import UserError
from hysparse_jax.training import console, loop, manifest, metrics, run, step
from hysparse_jax.training.checkpoint import Checkpoints

from . import cli, rows

_ROUNDS = flags.DEFINE_integer("rounds", 10, "How often each thing is done.", lower_bound=1)
_ONLY = flags.DEFINE_list("only", [], "Names of rows, such as kill,sigterm; default all.")
_SEED = flags.DEFINE_integer("moments_seed", 0, "Of the random moments, files and bits.")
_OUT = flags.DEFINE(cli.PATH, "out", "docs/reliability.md", "Markdown file to write the table to.")
flags.declare_key_flag(cli.JSON)
flags.adopt_module_key_flags(rows)

RESULTS = pathlib.Path(__file__).parent / "results" / "reliability.jsonl"
STEPS = 40
CHEAP = 50                           # tries a round of what needs no process


class Lab:
  """A scratch folder with a corpus, and runs in it."""

  def __init__(self, folder: pathlib.Path, seed: int):
    self.folder, self.rng, self._runs = folder, np.random.default_rng(seed), 0
    corpus = folder / "corpus"
    corpus.mkdir()
    for number in range(20):
      words = self.rng.choice(["alpha", "beta", "gamma", "delta"], 200)
      (corpus / f"{number}.txt").write_text(" ".join(words))
    self.settings = [f"data.source={corpus}", f"train.steps={STEPS}", "train.checkpoint_every=2",
                     "train.eval_every=10"]
    self.cfg = config.override(config.load("debug"), *self.settings)

  def new(self) -> pathlib.Path:
    """A folder for one more run, not made yet."""
    self._runs += 1
    return self.folder / f"run_{self._runs}"

  def start(self, workdir, *settings, compiled=True) -> subprocess.Popen:
    """`train` in a process of its own; `compiled`: with what XLA compiled for earlier ones."""
    cache = {"JAX_COMPILATION_CACHE_DIR": str(self.folder / "xla") if compiled else "",
             "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    return subprocess.Popen(
      [sys.executable, "-m", f"{__package__}.train", "--config=debug", f"--workdir={workdir}",
       *(f"--set={setting}" for setting in [*self.settings, *settings])],
      env=os.environ | cache, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

  def pause(self, process, workdir, early: float):
    """Until a random moment: with probability `early` before the first save, else after it."""
    del self.whole, self.whole               # measures the times, where nobody has yet
    before, random = newest(workdir), self.rng.random()
    if self.rng.random() < early:
      wait_until(lambda: process.poll() is not None, random * self.first_save_s)
      return
    wait_until(lambda: process.poll() is not None or newest(workdir) != before, 300)
    wait_until(lambda: process.poll() is not None, random * (self.run_s - self.first_save_s))

  @functools.cached_property
  def whole(self) -> pathlib.Path:
    """The run that nothing happens to; its times are the second start's, which compiles nothing."""
    finish(self.start(self.new()))
    workdir, begun = self.new(), time.monotonic()
    process = self.start(workdir)
    wait_until(lambda: process.poll() is not None or newest(workdir), 300)
    self.first_save_s = time.monotonic() - begun
    code, errors, _ = finish(process)
    self.run_s = time.monotonic() - begun
    if code:
      raise UserError(f"an undisturbed run ended with {code}: {errors}; see to that first")
    return workdir

  @functools.cached_property
  def target(self):
    """The abstract state of the runs' model."""
    return step.build(self.cfg, sharding.make_mesh(self.cfg.mesh)).abstract_state

  def leaves_differ(self, workdir) -> int:
    """Leaves of the last state whose bytes are not those of the undisturbed run."""
    wanted, found = (digests(folder, STEPS) for folder in (self.whole, workdir))
    return sum(found.get(name) != digest for name, digest in wanted.items())

  def rows_missing(self, workdir, last=STEPS) -> int:
    """Rows of steps up to `last` that are not those of the undisturbed run."""
    wanted, found = (losses(folder) for folder in (self.whole, workdir))
    return sum(found.get(number) != wanted[number] for number in range(1, last + 1))

  def resumed(self, workdir) -> dict:
    """Runs it to its end; what then differs."""
    finish(self.start(workdir))
    return {"leaves that differ": self.leaves_differ(workdir),
            "rows missing": self.rows_missing(workdir)}


def finish(process) -> tuple[int, list[str], float]:
  """Exit code as a shell gives it, lines of stderr, and seconds until the process ended."""
  begun = time.monotonic()
  _, errors = process.communicate(timeout=600)
  code = process.returncode
  return 128 - code if code < 0 else code, errors.splitlines(), time.monotonic() - begun


def wait_until(holds: Callable[[], object], seconds: float):
  """Returns once it holds, or after that many seconds."""
  end = time.monotonic() + seconds
  while time.monotonic() < end and not holds():
    time.sleep(0.003)


def newest(workdir) -> int:
  """The newest committed step of a run, 0 where there is none."""
  folder = workdir / "checkpoints"
  if not folder.is_dir():
    return 0
  return Checkpoints(folder, read_only=True).latest_step() or 0


def digests(workdir, number) -> dict[str, str]:
  """The SHA-256 of every leaf of a checkpoint, from its manifest; none where it is absent."""
  path = workdir / "checkpoints" / str(number) / "manifest" / "metadata"
  leaves = json.loads(path.read_text())["leaves"] if path.is_file() else {}
  return {name: leaf["sha256"] for name, leaf in leaves.items()}


def losses(workdir) -> dict[int, tuple]:
  """step -> loss and norm, of every step that has a row."""
  found = metrics.read(workdir) if (workdir / "metrics.jsonl").exists() else []
  return {row["step"]: (row["loss"], row["grad_norm"]) for row in found if "loss" in row}


def attempt(call) -> tuple[object, int, str | None]:
  """What a call returns, the lines it puts on stderr, and its error's kind unless a UserError."""
  result = kind = None
  with tempfile.TemporaryFile() as file, _stderr_to(file):
    try:
      result = call()
    except UserError as error:
      console.warn(str(error))
    except Exception as error:
      kind = type(error).__name__
      traceback.print_exc()
    file.seek(0)
    return result, len(file.read().splitlines()), kind


@contextlib.contextmanager
def _stderr_to(file):
  """Sends the system's stderr, and Python's, to a file."""
  sys.stderr.flush()
  kept, python = os.dup(2), sys.stderr
  os.dup2(file.fileno(), 2)
  try:
    with open(os.dup(2), "w", buffering=1) as sys.stderr:
      yield
  finally:
    sys.stderr = python
    os.dup2(kept, 2)
    os.close(kept)


def flipped(rng, path: pathlib.Path) -> bytes:
  """Flips one random bit of a file; returns what it held."""
  whole = path.read_bytes()
  bit = int(rng.integers(8 * len(whole)))
  path.write_bytes(whole[:bit // 8] + bytes([whole[bit // 8] ^ 1 << bit % 8])
                   + whole[bit // 8 + 1:])
  return whole


def outcome(seen: dict, wanted: str, ok: bool, rounds: int) -> dict:
  """A row without its name."""
  return {"rounds": rounds, "seen": dict(seen), "wanted": wanted, "ok": bool(ok)}


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


def _restored(lab, folder, seen, **settings):
  """Opens checkpoints as a resume does, and counts what must not happen."""
  def call():
    with Checkpoints(folder, **settings) as checkpoints:
      return checkpoints.restore(lab.target, report=console.warn)

  result, lines, kind = attempt(call)
  passed_over = result is None or result[2] != STEPS
  seen["tracebacks"] += kind is not None
  seen["more lines than one"] += lines > 1
  seen["fell back or refused"] += passed_over
  if result is None:
    seen["silent"] += lines == 0
    return
  found = manifest.describe(*manifest.named_leaves(result[0]))
  right = digests(lab.whole, result[2])
  seen["silent"] += (passed_over and lines == 0) or any(
    found[name]["sha256"] != digest for name, digest in right.items())


def checkpoint_bits(lab, rounds):
  """One flipped bit in the newest checkpoint"""
  seen = collections.Counter({"silent": 0, "tracebacks": 0, "more lines than one": 0,
                              "fell back or refused": 0})
  folder = lab.whole / "checkpoints"
  files = sorted(path for path in (folder / str(STEPS)).rglob("*")
                 if path.is_file() and path.stat().st_size)
  for turn in range(rounds * CHEAP):
    path = files[turn % len(files)]
    whole = flipped(lab.rng, path)
    _restored(lab, folder, seen, read_only=True)
    path.write_bytes(whole)
  bad = seen["silent"] + seen["tracebacks"] + seen["more lines than one"]
  return outcome(seen, "0 silent, 0 tracebacks, one line each", not bad, rounds * CHEAP)


def config_bits(lab, rounds):
  """One flipped bit in config.json"""
  seen = collections.Counter({"another config": 0, "tracebacks": 0, "refused": 0})
  folder = lab.new()
  folder.mkdir()
  run.write_config(folder, lab.cfg)
  right = run.read_config(folder)
  for _ in range(rounds * CHEAP):
    whole = flipped(lab.rng, folder / "config.json")
    found, lines, kind = attempt(lambda: run.read_config(folder))
    seen["another config"] += found not in (None, right) or (found is None and lines != 1)
    seen["tracebacks"] += kind is not None
    seen["refused"] += found is None and kind is None
    (folder / "config.json").write_bytes(whole)
  return outcome(seen, "0 and 0", not seen["another config"] + seen["tracebacks"], rounds * CHEAP)


def metrics_bits(lab, rounds):
  """One flipped bit in metrics.jsonl"""
  seen = collections.Counter({"rows changed": 0, "rows lost silently": 0, "tracebacks": 0})
  folder = lab.new()
  folder.mkdir()
  with metrics.MetricsLog(folder, resume_step=0) as log:
    for number in range(1, 21):
      log.write(number, loss=number / 3, gates=[0.5, None])
  right = metrics.read(folder)
  for _ in range(rounds * CHEAP):
    whole = flipped(lab.rng, folder / "metrics.jsonl")
    found, lines, kind = attempt(lambda: metrics.read(folder))
    seen["tracebacks"] += kind is not None
    seen["rows changed"] += sum(row not in right for row in found or [])
    seen["rows lost silently"] += len(found or []) < len(right) and lines != 1
    (folder / "metrics.jsonl").write_bytes(whole)
  return outcome(seen, "0, 0 and 0; a damaged row is one warning", not seen.total(),
                 rounds * CHEAP)


def _oddities(rng, folder: pathlib.Path) -> dict[str, Callable[[], object]]:
  """Ways to spoil a folder of checkpoints."""
  step_folder = folder / str(STEPS)
  file = rng.choice(sorted(path for path in step_folder.rglob("*") if path.is_file()))
  inner = rng.choice(sorted(path for path in step_folder.rglob("*") if path.is_dir()))
  def instead(path, make):
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    make(path)
  return {
    "a torn file": lambda: os.truncate(file, int(rng.integers(file.stat().st_size + 1))),
    "no file": file.unlink,
    "a folder as a file": lambda: instead(file, pathlib.Path.mkdir),
    "a pipe as a file": lambda: instead(file, os.mkfifo),
    "a link to nowhere": lambda: instead(file, lambda path: path.symlink_to("nowhere")),
    "a link to itself": lambda: instead(file, lambda path: path.symlink_to(path)),
    "no folder": lambda: shutil.rmtree(inner),
    "a file as a folder": lambda: instead(inner, pathlib.Path.touch),
    "a step that is empty": lambda: instead(step_folder, pathlib.Path.mkdir),
    "a step that is a file": lambda: instead(step_folder, pathlib.Path.touch),
    "a step that links to another": lambda: instead(
      step_folder, lambda path: path.symlink_to(folder / str(STEPS - 2))),
    "odd names": lambda: [(folder / name).mkdir() for name in ("abc", "0041", "-1", "1e3", "٤٢")],
    "a huge step": lambda: (folder / ("9" * 30)).mkdir(),
    "an unfinished save": lambda: (folder / "42.orbax-checkpoint-tmp-7").mkdir(),
    "no right to read": lambda: file.chmod(0),
  }


def odd_folders(lab, rounds):
  """Torn or odd folders of checkpoints"""
  seen = collections.Counter({"silent": 0, "tracebacks": 0, "more lines than one": 0,
                              "fell back or refused": 0})
  done = 0
  for _ in range(rounds):
    for name in _oddities(lab.rng, lab.whole / "checkpoints"):
      folder = lab.new()
      shutil.copytree(lab.whole / "checkpoints", folder)
      _oddities(lab.rng, folder)[name]()
      _restored(lab, folder, seen)
      shutil.rmtree(folder)
      done += 1
  bad = seen["silent"] + seen["tracebacks"] + seen["more lines than one"]
  return outcome(seen, "0 silent, 0 tracebacks, at most one line each", not bad, done)


