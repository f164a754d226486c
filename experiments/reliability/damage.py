"""Damaged files and folders: read in this process, without training."""

import collections
import os
import pathlib
import shutil
from collections.abc import Callable

from hysparse_jax.training import console, manifest, metrics, run
from hysparse_jax.training.checkpoint import Checkpoints

from .lab import CHEAP, STEPS, attempt, digests, flipped, outcome

KINDS = ("silent", "tracebacks", "more lines than one")


def _restored(lab, folder, seen, **settings) -> list[str]:
  """Opens checkpoints as a resume does, and counts what it saw; returns what must not happen."""
  def call():
    with Checkpoints(folder, **settings) as checkpoints:
      return checkpoints.restore(lab.target, report=console.warn)

  result, lines, kind = attempt(call)
  passed_over = result is None or result[2] != STEPS
  silent = passed_over and lines == 0
  if result is not None:
    right = digests(lab.whole.workdir, result[2])
    found = manifest.describe(*manifest.named_leaves(result[0]))
    silent |= any(found[name]["sha256"] != digest for name, digest in right.items())
  faults = [name for name, bad in zip(KINDS, (silent, kind is not None, lines > 1), strict=True)
            if bad]
  seen.update([*faults, *["fell back or refused"] * passed_over])
  return faults


def checkpoint_bits(lab, rounds):
  """One flipped bit in the newest checkpoint"""
  seen = collections.Counter(dict.fromkeys((*KINDS, "fell back or refused"), 0))
  folder = lab.whole.workdir / "checkpoints"
  files = sorted(path for path in (folder / str(STEPS)).rglob("*")
                 if path.is_file() and path.stat().st_size)
  ok = True
  for turn in range(rounds * CHEAP):
    path = files[turn % len(files)]
    whole = flipped(lab.rng, path)
    ok &= not _restored(lab, folder, seen, read_only=True)
    path.write_bytes(whole)
  return outcome(seen, "0 silent, 0 tracebacks, one line each", ok, rounds * CHEAP)


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
  seen = collections.Counter(dict.fromkeys((*KINDS, "fell back or refused"), 0))
  whole, done, bad = lab.whole.workdir / "checkpoints", 0, {}
  for _ in range(rounds):
    for name in _oddities(lab.rng, whole):
      folder = lab.new()
      shutil.copytree(whole, folder)
      _oddities(lab.rng, folder)[name]()
      faults = _restored(lab, folder, seen)
      bad |= {name: ", ".join(faults)} if faults else {}
      shutil.rmtree(folder)
      done += 1
  named = {"which": "; ".join(f"{name} ({faults})" for name, faults in bad.items())} if bad else {}
  return outcome({**seen, **named}, "0 silent, 0 tracebacks, at most one line each", not bad, done)
