"""Config files: where one lies, a path or the name of a packaged config, and what it returns.

In an installed package they are `hysparse_jax/configs/`, in a checkout `configs/` beside it.
"""

import ast
import contextlib
import difflib
import importlib.util
import pathlib
import traceback
import warnings

_PACKAGE = pathlib.Path(__file__).resolve().parent
FOLDER = next(filter(pathlib.Path.is_dir, (_PACKAGE / "configs", _PACKAGE.parent / "configs")),
              _PACKAGE / "configs")


def find(name: str) -> pathlib.Path | None:
  """The config file that `name` means, None where there is none.

  A path that exists wins: `"mine.py"`, `"configs/tiny.py"`. Otherwise it is the packaged config of
  that name: `"tiny"`, `"ablations/ratio"`, and `"configs/tiny.py"` where the working directory has
  no folder `configs` that could be meant.
  """
  path = pathlib.Path(name).expanduser()
  if path.is_file():
    return path
  packaged = _packaged(name)
  file = FOLDER / (packaged if packaged.suffix == ".py" else f"{packaged}.py")
  return file if not path.is_absolute() and ".." not in path.parts and file.is_file() else None


def hint(name: str) -> str:
  """What to add to "no config file NAME": the names that are close, else all packaged ones."""
  path = pathlib.Path(name)
  near = difflib.get_close_matches(path.name, [file.name for file in path.parent.glob("*.py")], n=3)
  near += [close for close in difflib.get_close_matches(_packaged(name).stem, names(), n=3)
           if f"{close}.py" not in near]
  return f"; did you mean {' or '.join(near)}?" if near else f"; packaged are {', '.join(names())}"


def names() -> list[str]:
  """Names of the packaged configs, such as `tiny` and `ablations/ratio`."""
  return sorted(file.relative_to(FOLDER).with_suffix("").as_posix()
                for file in FOLDER.rglob("*.py"))


def _packaged(name) -> pathlib.PurePath:
  path = pathlib.PurePath(name)
  if path.parts[:1] == ("configs",) and not pathlib.Path("configs").is_dir():
    return pathlib.PurePath(*path.parts[1:])
  return path


def run(file: pathlib.Path, arg: str):
  """What `get_config(arg)` of the file returns; called without an argument if `arg` is empty.

  Raises:
    AttributeError, ImportError and whatever the file raises; `spell` makes it one line.
  """
  spec = importlib.util.spec_from_file_location(f"config_{file.stem}", file)
  if spec is None or spec.loader is None:
    raise ImportError("not a Python file; give a config such as configs/tiny.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  if not hasattr(module, "get_config"):
    raise AttributeError("it defines no get_config(arg=None)")
  return module.get_config(arg) if arg else module.get_config()


def spell(file: pathlib.Path, error: BaseException) -> str:
  """One line that names the file, its last line on the way to the error, and the error."""
  lines = [f", line {frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)
           if frame.filename == str(file)]
  return f"{file}{lines[-1] if lines else ''}: {type(error).__name__}: " + " ".join(
    str(error).split())


def literal(text: str):
  """The value of a Python literal, and `text` itself where it is none."""
  with (contextlib.suppress(ValueError, SyntaxError, TypeError, MemoryError, RecursionError),
        warnings.catch_warnings(action="ignore")):
    return ast.literal_eval(text)
  return text
