"""Checkpoints of older versions: where a leaf of today's state is in them.

Only names changed, never a shape or a value. Before hybrid blocks held runs of layers, the sparse
layers of a block were `sparse` and their gates and sinks leaves of their own:

    stack/groups/0/runs/0/wq            was  stack/groups/0/sparse/wq
    stack/groups/0/runs/0/sparse/gate   was  stack/groups/0/sparse/w_gate_sparse
    stack/groups/0/runs/0/local/sinks   was  stack/groups/0/sparse/sinks_local

The optimizer's moments go by the same paths as the parameters.
"""

import re
from collections.abc import Collection

_RUN = re.compile(r"(^|.*/)(stack/groups/\d+)/runs/0/(.+)")
_BRANCH = re.compile(r"(sparse|local)/(gate|sinks)\b(.*)")


def older_name(name: str) -> str:
  """The name that a leaf had in older checkpoints; most kept theirs."""
  run = _RUN.fullmatch(name)
  if run is None:
    return name
  before, group, rest = run.groups()
  branch = _BRANCH.fullmatch(rest)
  if branch is not None:
    which, kind, after = branch.groups()
    rest = f"{'w_gate' if kind == 'gate' else kind}_{which}{after}"
  return f"{before}{group}/sparse/{rest}"


def saved_names(names: list[tuple], saved: Collection[str]) -> list[tuple]:
  """Where a checkpoint that has the leaves `saved` holds each of `names` (tuples of path parts).

  A leaf that it holds under neither its own name nor its older one keeps its own.
  """
  found = []
  for name in names:
    own = "/".join(name)
    older = older_name(own)
    found.append(tuple(older.split("/")) if own not in saved and older in saved else name)
  return found
