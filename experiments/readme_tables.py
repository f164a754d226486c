"""The measured tables of README.md, made from `experiments/results/h200_kernels.jsonl`.

    python -m experiments.readme_tables            prints them
    python -m experiments.readme_tables --write    puts them between the README's markers

Of several rows about the same thing the last one counts.
"""

import json
import pathlib

from absl import flags

from experiments import cli
from hysparse_jax.errors import UserError
from pallas_kernels.named_shapes import PAPER

ROOT = pathlib.Path(__file__).resolve().parent.parent
ROWS = ROOT / "experiments" / "results" / "h200_kernels.jsonl"
SELECTIONS = ("trace", "early", "walk r=0.5", "walk r=1", "walk r=2", "random")
OPS = {"oracle_attention": "oracle, blocks chosen", "block_sparse_attention": "block-sparse",
       "hybrid_sparse_attention": "sparse layer"}

_WRITE = flags.DEFINE_bool("write", False, "Write the tables into README.md.")


def read(path=ROWS) -> list[dict]:
  """The rows of a results file, in order."""
  return [json.loads(line) for line in path.read_text().splitlines()]


def kernel_table(rows) -> str:
  """Markdown: op and selection down, shapes across, `forward / forward and backward` in a cell."""
  speedup = {(row["op"], row.get("selection"), row["shape"], row["pass"]): row["speedup"]
             for row in rows if "speedup" in row}
  lines = ["| | " + " | ".join(PAPER) + " |", "|---" * (len(PAPER) + 1) + "|"]
  for op, label in OPS.items():
    for selection in (None, *SELECTIONS):
      cells = [_cell(speedup, op, selection, shape) for shape in PAPER]
      if any(cells):
        name = label if selection is None else f"{label}, `{selection}`"
        lines.append(f"| {name} | " + " | ".join(cell or "–" for cell in cells) + " |")
  return "\n".join(lines)


def _cell(speedup, op, selection, shape) -> str:
  found = [speedup.get((op, selection, shape, which)) for which in ("fwd", "fwd_bwd")]
  if found == [None, None]:
    return ""
  return " / ".join("–" if x is None else f"{x:.2f}" if x < 2 else f"{x:.1f}" for x in found)


def step_table(rows) -> str:
  """Markdown: whole training steps, a model and its full-attention twin."""
  last = {(row["shape"], row["attention"]): row for row in rows if row["op"] == "train_step"}
  lines = ["| | attention | tokens/s | MFU | peak memory |", "|---" * 5 + "|"]
  for (shape, attention), row in sorted(last.items(), reverse=True):
    lines.append(f"| {shape} | {attention} | {row['tokens_per_second']:,.0f} | "
                 f"{100 * row['mfu']:.0f} % | {row['peak_bytes'] / 1e9:.0f} GB |")
  return "\n".join(lines)


TABLES = {"kernels": kernel_table, "steps": step_table}


def filled(text: str, rows) -> str:
  """README text with every table between its markers made anew.

  Raises:
    UserError: a marker is missing.
  """
  for name, make in TABLES.items():
    begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    if begin not in text or end not in text:
      raise UserError(f"README.md has no {begin.strip()} ... {end}; put them where the table goes")
    head, rest = text.split(begin, 1)
    text = head + begin + make(rows) + "\n" + end + rest.split(end, 1)[1]
  return text


def main(argv):
  """Prints or writes the tables."""
  del argv
  rows = read()
  if _WRITE.value:
    readme = ROOT / "README.md"
    readme.write_text(filled(readme.read_text(), rows))
  else:
    print("\n\n".join(make(rows) for make in TABLES.values()))


if __name__ == "__main__":
  cli.run(main)
