"""Measures what kills, signals, damage, full disks and second runs do to a run of `train`.

    JAX_PLATFORMS=cpu python -m experiments.reliability --rounds=10 [--only=kill,sigterm]
        [--out=docs/reliability.md]

Every row starts runs of configs/debug.py in a scratch folder, hurts them at random moments and
compares what is left with a run that nothing happened to. The rows are appended to
`experiments/results/reliability.jsonl` (--append names another file), and the newest row of each
test there becomes a line of the table in --out. What needs no process is tried more often than
--rounds says. On two cores a round of all rows takes some minutes; `long` trains 2,000 steps once.
"""

import json
import pathlib
import tempfile
import time

from absl import flags

from hysparse_jax.errors import UserError
from hysparse_jax.training import run

from .. import cli, rows
from . import damage, runs
from .lab import Lab

_ROUNDS = flags.DEFINE_integer("rounds", 10, "How often each thing is done.", lower_bound=1)
_ONLY = flags.DEFINE_list("only", [], "Names of rows, such as kill,sigterm; default all.")
_SEED = flags.DEFINE_integer("moments_seed", 0, "Of the random moments, files and bits.")
_OUT = flags.DEFINE(cli.PATH, "out", "docs/reliability.md", "Markdown file to write the table to.")
flags.declare_key_flag(cli.JSON)
flags.adopt_module_key_flags(rows)

RESULTS = pathlib.Path(__file__).parents[1] / "results" / "reliability.jsonl"
TESTS = {test.__name__: test for test in (
  runs.kill, runs.sigterm, runs.sigint, damage.checkpoint_bits, damage.config_bits,
  damage.metrics_bits, damage.odd_folders, runs.full_disk, runs.vanished, runs.two_runs,
  runs.nan_weight, runs.long)}


def table(found: list[dict]) -> str:
  """A Markdown table with the newest row of each test, in the order of `TESTS`."""
  newest = {row["row"]: row for row in found}
  lines = ["| test | rounds | seen | wanted | |", "|---|---|---|---|---|"]
  for name, test in TESTS.items():
    if name in newest:
      row = newest[name]
      verdict = {True: "ok", False: "**not ok**", None: "skipped"}[row["ok"]]
      lines.append(f"| {test.__doc__} (`{name}`) | {row['rounds']} | {spelled(row['seen'])} | "
                   f"{row['wanted']} | {verdict} |")
  return "\n".join(lines) + "\n"


def spelled(seen: dict) -> str:
  """`steps lost 0; exit codes 0 twice and ...` in a table's cell."""
  inner = lambda value: (", ".join(f"{count} times {code}" for code, count in value.items())
                         if isinstance(value, dict) else str(value))
  return "; ".join(f"{name}: {inner(value)}" for name, value in seen.items())


def document(found: list[dict]) -> str:
  """The whole Markdown file."""
  last = found[-1]
  return f"""# Runs under kills, damage and load

Made by `python -m experiments.reliability` from `experiments/results/reliability.jsonl`; change
neither by hand. Each test hurts runs of `configs/debug.py` at random moments, files or bits, and
compares what is left with a run that nothing happened to. Newest row: {last["date"]}, jax
{last["jax"]}.

{table(found)}"""


def main(argv):
  """Measures what --only names, and writes the table of all that was ever measured."""
  del argv
  unknown = set(_ONLY.value) - set(TESTS)
  if unknown:
    raise UserError(f"--only: got {', '.join(sorted(unknown))}, want some of {', '.join(TESTS)}")
  if not flags.FLAGS.append:
    flags.FLAGS.append = str(RESULTS)
  with tempfile.TemporaryDirectory() as folder:
    lab = Lab(pathlib.Path(folder), _SEED.value)
    for name in _ONLY.value or TESTS:
      begun = time.monotonic()
      row = {"row": name, **TESTS[name](lab, _ROUNDS.value)}
      row["seconds"] = time.monotonic() - begun
      rows.emit(row, f"{name}: {spelled(row['seen'])}; ok: {row['ok']}")
      _write()


def _write():
  """Makes the document from every row in the file."""
  lines = pathlib.Path(flags.FLAGS.append).read_text().splitlines()
  out = pathlib.Path(_OUT.value)
  with run.writing(out):
    out.parent.mkdir(parents=True, exist_ok=True)
  run.replace(out, document([json.loads(line) for line in lines]).encode())


if __name__ == "__main__":
  cli.run(main)
