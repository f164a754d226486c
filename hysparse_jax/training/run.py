"""A run's folder: config.json, metrics.jsonl, checkpoints/ and plots/; how to make and open one."""

import json
import os
import pathlib
import sys

from hysparse_jax import config
from hysparse_jax.errors import UserError


def prepare(workdir) -> pathlib.Path:
  """The absolute path of the folder, made if missing.

  Raises:
    UserError: no folder named, or one that cannot be written.
  """
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


def write_config(workdir: pathlib.Path, cfg: config.Config):
  """Writes config.json, whole or not at all."""
  scratch = workdir / "config.json.tmp"
  scratch.write_text(json.dumps(config.to_dict(cfg), indent=2) + "\n")
  scratch.replace(workdir / "config.json")


def read_config(workdir) -> config.Config:
  """The config of the run in `workdir`; a UserError where there is none."""
  path = pathlib.Path(workdir) / "config.json"
  if not workdir or not path.is_file():
    raise UserError(f"missing checkpoint: {workdir or 'no --workdir'} holds no run; train one with "
                    "python -m experiments.train, or name its folder with --workdir")
  try:
    values = json.loads(path.read_text())
  except ValueError as error:
    raise UserError(f"{path} is damaged: {error}; restore it, or start over in another "
                    "--workdir") from error
  return config.from_dict(values)


def check_same_model(workdir: pathlib.Path, cfg: config.Config):
  """Weights and moments stay what they are: a UserError where a resumed run would change them."""
  old = read_config(workdir)
  was = config.to_text(old.model).splitlines() + [f"optimizer = {old.optim.optimizer!r}"]
  now = config.to_text(cfg.model).splitlines() + [f"optimizer = {cfg.optim.optimizer!r}"]
  lost, new = sorted(set(was) - set(now)), sorted(set(now) - set(was))
  if lost or new:
    raise UserError(f"the run in {workdir} has another model or optimizer: it has "
                    f"{'; '.join(lost) or 'less'}, asked for {'; '.join(new) or 'less'}; "
                    "restore its settings or give another --workdir")


def warn(text: str):
  """What a restore passed over, on stderr."""
  print(f"warning: {text}", file=sys.stderr, flush=True)
