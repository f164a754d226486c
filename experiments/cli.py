"""What every program of `experiments/` shares: the config flags, and how bad input ends.

A `UserError`, a bad flag or a stray argument is one line on stderr, `error: ...`, and exit code 2.
"""

import sys
from collections.abc import Callable

from absl import app, flags, logging

from hysparse_jax import config
from hysparse_jax.errors import UserError

CONFIG = flags.DEFINE_string("config", None, "Config file such as configs/mine.py, or the "
                                             "name of a packaged one: tiny, tiny:full.")
SET = flags.DEFINE_multi_string("set", [], "Override one field, such as model.window=64; may be "
                                           "given many times, later ones win.")
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run, such as runs/tiny.")
MESH = flags.DEFINE_string("mesh", None, "Devices per axis, such as data=2,fsdp=2,tensor=2.")
JSON = flags.DEFINE_bool("json", False, "Print one JSON object per line instead of a table.")


def load_config() -> config.Config:
  """The config named by `--config`, with every `--set` applied in order, then `--mesh`.

  Raises:
    UserError: no `--config`, or one that does not load; an override that does not fit.
  """
  if not CONFIG.value:
    raise UserError("--config is missing; name a config file, such as --config=configs/tiny.py")
  axes = [f"mesh.{part}" for part in MESH.value.split(",")] if MESH.value else []
  return config.load(CONFIG.value, *SET.value, *axes)


def run(main: Callable[[list[str]], None]):
  """Parses the flags, runs `main(argv)` and exits: 0, 2 for bad input, 130 when interrupted."""
  def guarded(argv):
    if len(argv) > 1:
      _fail(f"unexpected argument {argv[1]!r}; every argument is a flag, --name=value", code=2)
    if not flags.FLAGS["verbosity"].present:
      logging.set_verbosity(logging.WARNING)               # Orbax tells of every file at INFO
    try:
      main(argv)
    except UserError as error:
      _fail(error, code=2)
    except FloatingPointError as error:
      _fail(error, code=1)
    except KeyboardInterrupt:
      _fail("interrupted", code=130)

  app.run(guarded, flags_parser=_parse)


def _parse(argv):
  try:
    return flags.FLAGS(argv)
  except flags.Error as error:
    return _fail(f"{error}; --help lists the flags", code=2)


def _fail(message, code: int):
  print("error:", " ".join(str(message).split()), file=sys.stderr)
  sys.exit(code)
