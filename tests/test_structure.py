"""The packages' order: who may import whom, how deep, and how long a file may be."""

import ast
import pathlib

import pytest

REPO = pathlib.Path(__file__).parents[1]
STOREYS = ("pallas_kernels", "hysparse_jax", "experiments")       # each imports those before it
MOST_LEVELS = 7
# Kernels are one idea each and may be longer. LONGER names files that exceed it and may only
# shrink.
MOST_LINES = {"hysparse_jax": 400, "experiments": 400, "configs": 400, "pallas_kernels": 600}
LONGER = {"hysparse_jax/config.py": 589}


def module_name(path):
  parts = path.relative_to(REPO).with_suffix("").parts
  return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path) -> set[str]:
  """Every module that a file imports, at its top or inside a function, relative ones resolved."""
  found = set()
  package = module_name(path).split(".")[:None if path.name == "__init__.py" else -1]
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      base = package[:len(package) - node.level + 1] if node.level else []
      base = ".".join([*base, *([node.module] if node.module else [])])
      found |= {f"{base}.{alias.name}" for alias in node.names}
  return found


def room(name):
  """`hysparse_jax.data.batches` and `hysparse_jax.data` -> `data`; None for other packages."""
  parts = name.split(".")
  return parts[1] if parts[0] == "hysparse_jax" and len(parts) > 1 else None


def rooms() -> dict[str, set[str]]:
  """Each room of hysparse_jax (a folder or a file at its top) and those that it imports."""
  graph = {}
  for path in sorted((REPO / "hysparse_jax").rglob("*.py")):
    here = room(module_name(path))
    if here is not None:
      graph.setdefault(here, set())
      graph[here] |= {there for there in map(room, imports(path)) if there not in (None, here)}
  return {here: {there for there in others if there in graph} for here, others in graph.items()}


def levels(graph) -> dict[str, int]:
  """1 for a room that imports none, else one more than the highest it imports.

  Raises:
    ValueError: names the rooms of a circle.
  """
  found = {}
  while len(found) < len(graph):
    ready = {here: 1 + max((found[there] for there in others), default=0)
             for here, others in graph.items() if here not in found and others <= found.keys()}
    if not ready:
      raise ValueError("a circle among " + ", ".join(
        f"{here} -> {sorted(others - found.keys())}" for here, others in sorted(graph.items())
        if here not in found))
    found |= ready
  return found


def test_levels_of_a_graph():
  assert levels({"a": set(), "b": {"a"}, "c": {"a", "b"}}) == {"a": 1, "b": 2, "c": 3}
  with pytest.raises(ValueError, match=r"a circle among b -> \['c'\], c -> \['b'\]"):
    levels({"a": set(), "b": {"a", "c"}, "c": {"b"}})


def test_the_rooms_of_hysparse_jax_form_few_levels():
  found = levels(rooms())
  assert {"config", "errors", "sharding", "accounting", "plots", "model", "tasks", "data",
          "training", "inference", "evals"} <= found.keys()
  assert max(found.values()) <= MOST_LEVELS, found


@pytest.mark.parametrize("package", [*STOREYS, "configs"])
def test_no_import_goes_upwards(package):
  above = {"experiments", "configs", "tests"}
  above |= set(STOREYS[STOREYS.index(package) + 1:]) if package in STOREYS else set()
  above -= {package}
  for path in sorted((REPO / package).rglob("*.py")):
    upwards = {name for name in imports(path) if name.split(".")[0] in above}
    assert not upwards, f"{path.relative_to(REPO)} imports {sorted(upwards)}"


@pytest.mark.parametrize("package", MOST_LINES)
def test_files_fit_on_a_few_screens(package):
  sizes = {str(path.relative_to(REPO)): len(path.read_text().splitlines())
           for path in sorted((REPO / package).rglob("*.py"))}
  assert len(sizes) > 3
  long = {name: lines for name, lines in sizes.items()
          if lines > LONGER.get(name, MOST_LINES[package])}
  assert not long, f"more than {MOST_LINES[package]} lines: {long}"


if __name__ == "__main__":
  graph = rooms()
  for here, level in sorted(levels(graph).items(), key=lambda item: item[::-1]):
    print(level, here, "<-", ", ".join(sorted(graph[here])))
