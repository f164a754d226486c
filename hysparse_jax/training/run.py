"""A run's folder: its lock, config.json, tokenizer and metrics; how to make and open one.

config.json carries a digest of itself, and every checkpoint the config that it was saved under.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import pathlib
import socket

from hysparse_jax import config
from hysparse_jax.data.corpus import absolute
from hysparse_jax.data.tokenizer import fingerprint_of
from hysparse_jax.errors import UserError
from hysparse_jax.training import console


def prepare(workdir) -> pathlib.Path:
  """The absolute path of the folder, made if missing.

  Raises:
    UserError: no folder named, one that cannot be written, or an address such as gs://.
  """
  if not workdir:
    raise UserError("--workdir is missing; name a folder for the run, such as runs/tiny")
  if "://" in str(workdir):
    raise UserError(f"workdir {workdir} is no folder of this machine; mount it, or give a folder "
                    "and copy it there afterwards")
  workdir = pathlib.Path(workdir).expanduser().absolute()
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    probe = workdir / f".write-test-{os.getpid()}"
    probe.write_bytes(b"a full disk takes a name but no byte")
    probe.unlink()
  except OSError as error:
    raise UserError(f"cannot write to workdir {workdir}: {error.strerror}; "
                    "give another --workdir") from error
  return workdir


@contextlib.contextmanager
def locked(workdir: pathlib.Path):
  """Holds the folder for this run alone; the system frees it when the process ends, however.

  Raises:
    UserError: another run holds it.
  """
  path = workdir / ".lock"
  with writing(path):
    file = path.open("a+")
  with file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      file.seek(0)
      holder = file.read().strip() or "another process"
      raise UserError(f"{workdir} is in use by {holder}; wait for it, or give another "
                      "--workdir") from error
    except OSError as error:      # file systems without locks
      console.warn(f"cannot lock {path} ({error.strerror}): start no second run in {workdir}")
    with writing(path):
      file.truncate(0)
      file.write(f"process {os.getpid()} on {socket.gethostname()}")
      file.flush()
    try:
      yield
    finally:
      with contextlib.suppress(OSError):     # the run's folder is gone, or its disk full
        file.truncate(0)


@contextlib.contextmanager
def writing(path):
  """An OSError in it is a UserError that names the path and the reason."""
  try:
    yield
  except OSError as error:
    raise UserError(f"cannot write {path}: {error.strerror or error}; run the same command again "
                    "once it can be written") from error


def replace(path: pathlib.Path, content: bytes):
  """Writes a file whole or not at all, and to the disk."""
  scratch = path.with_name(f".{path.name}.tmp")
  with writing(path):
    with scratch.open("wb") as file:
      file.write(content)
      file.flush()
      os.fsync(file.fileno())
    scratch.replace(path)


def write_config(workdir: pathlib.Path, cfg: config.Config):
  """Writes config.json, whole or not at all, with absolute paths of the data."""
  values = config.to_dict(dataclasses.replace(cfg, data=absolute(cfg.data)))
  replace(workdir / "config.json",
          (json.dumps({"digest": _digest(values), **values}, indent=2) + "\n").encode())


def _digest(values: dict) -> str:
  return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def keep_tokenizer(workdir: pathlib.Path, cfg: config.Config, fingerprint: str):
  """Copies a tokenizer.json into the run's folder; only the one with that `fingerprint`.

  Raises:
    UserError: it is no longer that file (the run's copy stays), or the folder cannot be written.
  """
  if cfg.data.tokenizer == "byte":
    return
  path = workdir / "tokenizer.json"
  content = pathlib.Path(cfg.data.tokenizer).expanduser().read_bytes()
  check_tokenizer(fingerprint_of(content), fingerprint)
  if not path.is_file() or path.read_bytes() != content:
    replace(path, content)


def own_data(workdir: pathlib.Path, data: config.DataConfig) -> config.DataConfig:
  """The data section with the run's own copy of its tokenizer.json, where it has one."""
  path = pathlib.Path(workdir) / "tokenizer.json"
  kept = data.tokenizer != "byte" and path.is_file()
  return dataclasses.replace(data, tokenizer=str(path)) if kept else data


def check_tokenizer(got: str, wanted: str):
  """Raises a UserError unless the fingerprints of two tokenizers are equal."""
  if got != wanted:
    raise UserError(f"the tokenizer is not the one the weights were trained with: got {got}, "
                    f"wanted {wanted}; put that file back")


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
  """The config that config.json holds; a UserError where there is none, or it is damaged."""
  path = pathlib.Path(workdir or "").expanduser() / "config.json"
  if not workdir or not path.is_file():
    raise UserError(f"missing checkpoint: {workdir or 'no --workdir'} holds no run; train one with "
                    "python -m experiments.train, or name its folder with --workdir")
  try:
    values = json.loads(path.read_bytes())
    if not isinstance(values, dict):
      raise ValueError(f"it holds a {type(values).__name__}")
    digest = values.pop("digest", None)      # older versions wrote none
    if digest not in (None, _digest(values)):
      raise ValueError("it is not what its digest says")
    return from_saved(values)
  except UserError:
    raise                                    # a config of another version
  except (ValueError, TypeError, RecursionError, OSError) as error:
    raise UserError(f"{path} is damaged: {error}; restore it, or start over in another "
                    "--workdir") from error


def from_saved(values: dict) -> config.Config:
  """The config of a dict that config.json or a checkpoint holds, of any version."""
  return config.from_dict(values | {section: fields | values.get(section, {})
                                    for section, fields in _BEFORE_THE_FIELD.items()})


def saved_config(workdir, extra: dict) -> config.Config:
  """The config of a run, from config.json and from what a checkpoint says of it.

  Args:
    workdir: of the run.
    extra: of the checkpoint; those of older versions hold no config.

  Raises:
    UserError: there is none, or config.json is that of another model than the checkpoint.
  """
  if "config" not in extra:
    return read_config(workdir)
  known = from_saved(extra["config"])
  try:
    cfg = read_config(workdir)
  except UserError as error:
    console.warn(f"{error} (going on with the config that the checkpoint holds)")
    return known
  check_same_model(workdir, known, cfg)
  return cfg


def check_same_model(workdir, was: config.Config, now: config.Config) -> list[str]:
  """Holds what is asked for to the weights and moments that a run has.

  Returns:
    One `a.b = new (was old)` for each field of the model that differs and may.

  Raises:
    UserError: another optimizer, or a field of the model that the weights depend on.
  """
  old, new = map(_model_lines, (was, now))
  differing = [name for name in dict.fromkeys([*old, *new]) if old.get(name) != new.get(name)]
  unused = set()
  if was.model.layer_kinds == now.model.layer_kinds:
    unused |= {"attention", "pattern", "sparse_per_full"}
  if was.model.v_dim == now.model.v_dim:
    unused.add("value_head_dim")
  if was.model.moe is not None and now.model.moe is not None:
    unused.add("d_ff")
  bound = [name for name in differing if name not in unused.union(_FREE)]
  if bound:
    spell = lambda lines: "; ".join(
      f"{name} = {lines[name]}" for name in bound if name in lines) or "less"
    raise UserError(f"the run in {workdir} has another model or optimizer: it has {spell(old)}, "
                    f"asked for {spell(new)}; restore its settings or give another --workdir")
  return [f"model.{name} = {new.get(name)} (was {old.get(name)})" for name in differing]


def _model_lines(cfg: config.Config) -> dict[str, str]:
  """Name -> value of every field that `check_same_model` compares."""
  lines = dict(line.split(" = ", 1) for line in config.to_text(cfg.model).splitlines())
  if cfg.model.moe is not None:
    lines["router_bias"] = str(cfg.model.moe.bias_update_rate > 0)
  return lines | {"optimizer": repr(cfg.optim.optimizer)}
