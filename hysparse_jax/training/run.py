"""A run's folder: config.json, metrics.jsonl, checkpoints/ and plots/; how to make and open one."""

import dataclasses
import json
import os
import pathlib
import sys

from hysparse_jax import config
from hysparse_jax.data.corpus import absolute
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
  """Writes config.json, whole or not at all, with absolute paths of the data."""
  cfg = dataclasses.replace(cfg, data=absolute(cfg.data))
  scratch = workdir / "config.json.tmp"
  scratch.write_text(json.dumps(config.to_dict(cfg), indent=2) + "\n")
  scratch.replace(workdir / "config.json")


# What a config that does not name a field yet was run with, where that is not the default.
_BEFORE_THE_FIELD = {"data": {"align_documents": False}}

# Fields of the model that a resumed run may change: no weight changes its shape or its meaning.
# They say how it is computed (remat, implementation, dtype of activations), what else is minimised
# (weights of the router's losses), or how far it reaches (rope, stretched for longer rows). All
# others define the function that the weights were trained for: sizes, pattern, selection, window,
# gates, sinks, norms. `moe.bias_update_rate` decides by being 0 whether there is a bias at all.
_FREE = ("remat", "implementation", "dtype", "moe.load_balance_weight", "moe.router_z_weight",
         "moe.bias_update_rate", *(f"{section}.{field}" for section in ("rope", "rope_window")
                                   for field in ("base", "scaling", "factor", "original_tokens",
                                                 "beta_fast", "beta_slow")))


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
  for section, fields in _BEFORE_THE_FIELD.items():
    values[section] = fields | values.get(section, {})
  return config.from_dict(values)


def check_same_model(workdir: pathlib.Path, cfg: config.Config) -> list[str]:
  """Holds what a resumed run asks for to the weights and moments that it has.

  Returns:
    One `a.b = new (was old)` for each field of the model that differs and may.

  Raises:
    UserError: another optimizer, or a field of the model that the weights depend on.
  """
  was, now = map(_model_lines, (read_config(workdir), cfg))
  differing = [name for name in dict.fromkeys([*was, *now]) if was.get(name) != now.get(name)]
  bound = [name for name in differing if name not in _FREE]
  if bound:
    spell = lambda lines: "; ".join(
      f"{name} = {lines[name]}" for name in bound if name in lines) or "less"
    raise UserError(f"the run in {workdir} has another model or optimizer: it has {spell(was)}, "
                    f"asked for {spell(now)}; restore its settings or give another --workdir")
  return [f"model.{name} = {now[name]} (was {was[name]})" for name in differing]


def _model_lines(cfg: config.Config) -> dict[str, str]:
  """Name -> value of every field that `check_same_model` compares."""
  lines = dict(line.split(" = ", 1) for line in config.to_text(cfg.model).splitlines())
  if cfg.model.moe is not None:
    lines["router_bias"] = str(cfg.model.moe.bias_update_rate > 0)
  return lines | {"optimizer": repr(cfg.optim.optimizer)}


def warn(text: str):
  """What a restore passed over, on stderr."""
  print(f"warning: {text}", file=sys.stderr, flush=True)
