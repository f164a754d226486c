"""A scratch folder, runs of `train` in it, and what is left of them."""

import contextlib
import functools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from hysparse_jax import config, sharding
from hysparse_jax.errors import UserError
from hysparse_jax.training import console, metrics, step
from hysparse_jax.training.checkpoint import Checkpoints

PROGRAM = f"{__package__.rpartition('.')[0]}.train"
STEPS = 40
CHEAP = 50                           # tries a round of what needs no process


class Whole(NamedTuple):
  """An undisturbed run."""
  workdir: pathlib.Path
  first_save_s: float                # from the start of the process
  run_s: float                       # to its end


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
      [sys.executable, "-m", PROGRAM, "--config=debug", f"--workdir={workdir}",
       *(f"--set={setting}" for setting in [*self.settings, *settings])],
      env=os.environ | cache, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

  def pause(self, process, workdir, early: float):
    """Until a random moment: with probability `early` before the first save, else after it."""
    ended = lambda: process.poll() is not None
    before, random = newest(workdir), self.rng.random()
    if self.rng.random() < early:
      wait_until(ended, random * self.whole.first_save_s)
      return
    wait_until(lambda: ended() or newest(workdir) != before, 300)
    wait_until(ended, random * (self.whole.run_s - self.whole.first_save_s))

  @functools.cached_property
  def whole(self) -> "Whole":
    """The run that nothing happens to; timed at the second start, which compiles nothing."""
    finish(self.start(self.new()))
    workdir, begun = self.new(), time.monotonic()
    process = self.start(workdir)
    wait_until(lambda: process.poll() is not None or newest(workdir), 300)
    first_save_s = time.monotonic() - begun
    code, errors, _ = finish(process)
    if code:
      raise UserError(f"an undisturbed run ended with {code}: {errors}; see to that first")
    return Whole(workdir, first_save_s, time.monotonic() - begun)

  @functools.cached_property
  def target(self):
    """The abstract state of the runs' model."""
    return step.build(self.cfg, sharding.make_mesh(self.cfg.mesh)).abstract_state

  def leaves_differ(self, workdir) -> int:
    """Leaves of the last state whose bytes are not those of the undisturbed run."""
    wanted, found = (digests(folder, STEPS) for folder in (self.whole.workdir, workdir))
    return sum(found.get(name) != digest for name, digest in wanted.items())

  def rows_missing(self, workdir, last=STEPS) -> int:
    """Rows of steps up to `last` that are not those of the undisturbed run."""
    wanted, found = (losses(folder) for folder in (self.whole.workdir, workdir))
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


def skipped(reason: str, wanted: str) -> dict:
  """The row of a test that this machine does not allow."""
  return {"rounds": 0, "seen": {"not run": reason}, "wanted": wanted, "ok": None}
