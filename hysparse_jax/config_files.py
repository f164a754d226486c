"""Where a config file lies: a path, or the name of one of the configs that come with the package.

In an installed package they are `hysparse_jax/configs/`, in a checkout `configs/` beside it.
"""

import difflib
import pathlib

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
