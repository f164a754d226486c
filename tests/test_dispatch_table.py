"""The dispatch table of `pallas_kernels/README.md` names what the code runs."""

import ast
import importlib
import pathlib
import re

import pallas_kernels

ROOT = pathlib.Path(pallas_kernels.__file__).parent
ROW = re.compile(r"^\| `(\w+)` \| `(\w+)` \| (\w+) \| ([^|]+) \| ([^|]+) "
                 r"\| `([\w/.]+): (\w+)` \| ([^|]+) \|$")


def table():
  """[(op, implementation, platform, G, pass, file, function, not taken)], in order."""
  lines = (ROOT / "README.md").read_text().splitlines()
  first = next(i for i, line in enumerate(lines) if line.startswith("| op |"))
  rows = []
  for line in lines[first + 2:]:
    if not line.startswith("|"):
      return rows
    found = ROW.match(line)
    assert found, f"README row of another form: {line}"
    rows.append(found.groups())
  raise AssertionError("the table has no end")


def dispatch(op):
  """(_AVAILABLE, _BY_PLATFORM) of an op."""
  kind = op.split("_")[0]
  several = kind == "paged"
  api = importlib.import_module(f"pallas_kernels.{f'{kind}_attention' if several else op}.api")
  return (api._AVAILABLE[op], api._BY_PLATFORM[op]) if several else (
    api._AVAILABLE, api._BY_PLATFORM)


def test_each_row_names_a_function_of_its_file():
  for *_, path, function, _ in table():
    tree = ast.parse((ROOT / path).read_text())
    defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert function in defined, f"{path} has no function {function}"


def test_the_table_has_every_op():
  aliases = {"hybrid_sparse_attention", "plan_blocks"}
  assert {row[0] for row in table()} == set(pallas_kernels.__all__) - aliases


def test_implementations_and_defaults_are_those_of_the_code():
  rows = table()
  for op in dict.fromkeys(row[0] for row in rows):
    available, by_platform = dispatch(op)
    mine = [row for row in rows if row[0] == op]
    assert {row[1] for row in mine} == set(available), op
    listed = {}
    for _, implementation, platform, *_ in mine:
      if implementation == "reference":
        assert platform == "any"
      else:
        listed.setdefault(platform, {})[implementation] = None
    assert {platform: tuple(names) for platform, names in listed.items()} == by_platform, op
