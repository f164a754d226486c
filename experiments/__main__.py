"""The command `hysparse`: every program of this folder under one name.

    hysparse train --config=tiny --workdir=runs/tiny      as  python -m experiments.train ...
    hysparse train --help                                 the program's flags

In a checkout this is `python -m experiments NAME ...`. Installed, the folder is the package
`hysparse_jax.experiments`, so that site-packages gets no module of a name as general as
`experiments`; its modules import each other relatively and run under either name.
"""

import ast
import difflib
import pathlib
import runpy
import sys

_FOLDER = pathlib.Path(__file__).parent


def programs() -> dict[str, str]:
  """Name -> what it does, the first sentence of its docstring."""
  found = {}
  for path in sorted([*_FOLDER.glob("*.py"), *_FOLDER.glob("*/__main__.py")]):
    text = path.read_text(encoding="utf-8")
    if "  cli.run(" in text:
      name = path.parent.name if path.stem == "__main__" else path.stem
      found[name] = (ast.get_docstring(ast.parse(text)) or "").split("\n")[0]
  return found


def main() -> None:
  """Runs the program that the first argument names with the others; exits with 2 if none is."""
  name, rest = (sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else ("--help", [])
  known = programs()
  if name in ("-h", "--help", "help"):
    print("usage: hysparse PROGRAM [--flag=value ...]    hysparse PROGRAM --help\n")
    for program, purpose in known.items():
      print(f"  {program:<14} {purpose}")
    return
  if name in ("-V", "--version", "version"):
    import hysparse_jax
    print(f"hysparse-jax {hysparse_jax.__version__}")
    return
  if name not in known:
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {near[0]}?" if near else f"; there are {', '.join(known)}"
    print(f"error: no program {name!r}{hint}", file=sys.stderr)
    sys.exit(2)
  sys.argv = [f"hysparse {name}", *rest]
  runpy.run_module(f"{__package__}.{name}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
  main()
