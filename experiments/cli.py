"""What every program of `experiments/` shares: the flags, and how bad input ends.

A program takes the flags that its module defines and those that it declares with
`flags.declare_key_flag`; any other is refused. Whatever is wrong with the input or with the machine
(no disk, no memory, nobody reading) is one line on stderr, `error: ...`, and exit code 2.
"""

import contextlib
import json
import math
import os
import pathlib
import stat
import sys
import textwrap
from collections.abc import Callable, Iterable

from absl import app, flags, logging

from hysparse_jax import config
from hysparse_jax.errors import UserError
from hysparse_jax.training.console import warn


class _PathParser(flags.ArgumentParser):
  """Paths of this machine: `~` is the home folder, addresses are refused."""

  def parse(self, argument):
    if "://" in argument:
      raise ValueError("this is an address; give a path of this machine, such as that of a mount")
    return os.path.expanduser(argument)


class _FileParser(_PathParser):
  """Paths of files to write: no folder, no device, no pipe, which perhaps nobody reads."""

  def parse(self, argument):
    path = super().parse(argument)
    with contextlib.suppress(OSError):         # what is not there yet is made
      if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError("this is a folder, a pipe or a device; give a file")
    return path


PATH = _PathParser()     # flags.DEFINE(cli.PATH, name, default, help)
FILE = _FileParser()     # for what a program writes

CONFIG = flags.DEFINE(PATH, "config", None, "Config file such as configs/mine.py, or the "
                                            "name of a packaged one: tiny, tiny:full.")
SET = flags.DEFINE_multi_string("set", [], "Override one field, such as model.window=64; may be "
                                           "given many times, later ones win.")
WORKDIR = flags.DEFINE(PATH, "workdir", None, "Folder of the run, such as runs/tiny.")
MESH = flags.DEFINE_string("mesh", None, "Devices per axis, such as data=2,fsdp=2,tensor=2.")
JSON = flags.DEFINE_bool("json", False, "Print one JSON object per line instead of a table.")
DTYPE = flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"],
                          "Of the weights in memory; default: float32, as they were trained.")


def load_config() -> config.Config:
  """The config named by `--config`, with every `--set` applied in order, then `--mesh`.

  Raises:
    UserError: no `--config`, or one that does not load; an override that does not fit.
  """
  if not CONFIG.value:
    raise UserError("--config is missing; name a config file, such as --config=configs/tiny.py")
  return config.load(CONFIG.value, *SET.value, *_axes())


def load_options() -> dict:
  """The arguments of `load_run` that `--mesh` and `--dtype` give: those that were given."""
  options: dict = {} if DTYPE.value is None else {"dtype": DTYPE.value}
  if MESH.value is not None:
    from hysparse_jax import sharding  # imports jax, which `account` does without
    one = config.Config(mesh=config.MeshConfig(fsdp=1))
    options["mesh"] = sharding.make_mesh(config.override(one, *_axes()).mesh)
  return options


def to_json(row: dict) -> str:
  """One line of JSON; what is not a finite number is null, since JSON has no NaN."""
  return json.dumps(_finite(row), allow_nan=False)


def _finite(value):
  if isinstance(value, dict):
    return {key: _finite(inner) for key, inner in value.items()}
  if isinstance(value, (list, tuple)):
    return [_finite(inner) for inner in value]
  return None if isinstance(value, float) and not math.isfinite(value) else value


def drawn(draw: Callable[[], Iterable]) -> list[str]:
  """Paths of the pictures that `draw()` makes; one that cannot be drawn is a warning.

  A picture shows results that are there already: failing to draw it must not lose them.
  """
  paths: list[str] = []
  try:
    for path in draw():
      paths.append(str(path))
  except Exception as error:       # whatever a drawing library or a file system raises
    warn(f"no pictures: {type(error).__name__}: {error}")
  return paths


def _axes() -> list[str]:
  if MESH.value == "":
    raise UserError("--mesh is empty; give sizes such as data=2,tensor=2, or leave it out")
  return [f"mesh.{axis}" for axis in MESH.value.split(",")] if MESH.value else []


def run(main: Callable[[list[str]], None], *, needs_stdout: bool = True):
  """Parses the flags, runs `main(argv)` and exits: 0, 2 for bad input, 130 when interrupted.

  Args:
    main: of the program; the flags of its module are the program's.
    needs_stdout: whether there is nothing to do where stdout is closed.
  """
  def guarded(argv):
    if len(argv) > 1:
      _fail(f"unexpected argument {argv[1]!r}; every argument is a flag, --name=value", code=2)
    if not flags.FLAGS["verbosity"].present:
      logging.set_verbosity(logging.WARNING)               # Orbax tells of every file at INFO
    _keep_compiled_programs()
    with _one_line():
      if sys.stdout is None and needs_stdout:
        raise UserError("stdout is closed; send it to a file, or to /dev/null")
      if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")    # what the terminal cannot show
      main(argv)
      if sys.stdout is not None:
        sys.stdout.flush()

  app.run(guarded, flags_parser=lambda argv: _parse(argv, main.__module__))


@contextlib.contextmanager
def _one_line():
  """Ends the program with one line for every error that is not the program's own."""
  try:
    yield
  except (UserError, NotImplementedError) as error:
    _fail(error, code=2)
  except FloatingPointError as error:
    _fail(error, code=1)
  except KeyboardInterrupt:
    _fail("interrupted", code=130)
  except OSError as error:
    where = "" if error.filename is None else f"{error.filename}: "
    _fail(f"{where}{error.strerror or error}", code=2)
  except (MemoryError, OverflowError) as error:
    _fail(f"a size is too large for this machine ({type(error).__name__}: {error}); lower it",
          code=2)
  except RuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    _fail(f"out of device memory; lower batch, length or model: {error}", code=2)


def _parse(argv, module):
  if {"--help", "-help", "-h", "--helpshort", "--helpfull"} & set(argv[1:]):
    with _one_line():
      _print_help(module)
    sys.exit(0)
  try:
    rest = flags.FLAGS(argv)
  except flags.Error as error:
    return _fail(f"{error}; --help lists the flags", code=2)
  taken = {flag.name for flag in flags.FLAGS.get_key_flags_for_module(module)}
  here = __name__.removesuffix("cli")
  for owner, found in flags.FLAGS.flags_by_module_dict().items():
    for flag in found:
      if owner.startswith(here) and flag.present and flag.name not in taken:
        _fail(f"this program does not use --{flag.name}; leave it out (--help lists its flags)",
              code=2)
  return rest


def _print_help(module):
  """The program's docstring and every flag that it takes."""
  print((sys.modules[module].__doc__ or "").strip(), end="\n\nFlags:\n")
  for flag in sorted(flags.FLAGS.get_key_flags_for_module(module), key=lambda flag: flag.name):
    default = "" if flag.default in (None, []) else f" Default: {flag.default_as_str}."
    name = f"--[no]{flag.name}" if flag.boolean else f"--{flag.name}=..."
    print(textwrap.fill(f"{name:<24}{flag.help}{default}", 100, initial_indent="  ",
                        subsequent_indent=" " * 26))
  sys.stdout.flush()


def _keep_compiled_programs():
  """Keeps what XLA compiles in the user's cache folder, for the next start of any program.

  `JAX_COMPILATION_CACHE_DIR` names another folder; empty, nothing is kept.
  """
  if "jax" not in sys.modules or "JAX_COMPILATION_CACHE_DIR" in os.environ:
    return
  import jax
  cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
  folder = pathlib.Path(cache) / "hysparse_jax" / "xla"
  with contextlib.suppress(OSError):
    folder.mkdir(parents=True, exist_ok=True)
  if os.access(folder, os.W_OK):
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


def _fail(message, code: int):
  """Ends the program with one line on stderr; what stdout's buffer still holds may be lost."""
  try:
    if sys.stdout is not None:
      sys.stdout.flush()
  except OSError:                       # Python would try again at exit, and print a traceback
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
  with contextlib.suppress(OSError, AttributeError):      # AttributeError: stderr is closed
    sys.stderr.write("error: " + " ".join(str(message).split()) + "\n")
    sys.stderr.flush()
  sys.exit(code)
