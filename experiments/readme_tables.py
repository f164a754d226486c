"""The tables of README.md about kernels and small models, from files in `experiments/results/`.

h200_kernels.jsonl was measured; tpu_static.jsonl was counted from the TPU compiler's schedules;
reproduce_h200/results.jsonl is what `experiments.reproduce` trained.

    python -m experiments.readme_tables            prints them
    python -m experiments.readme_tables --write    puts them between the README's markers

Of several rows about the same thing the last one counts.
"""

import json
import pathlib

from absl import flags

from hysparse_jax.errors import UserError
from pallas_kernels.named_shapes import PAPER

from . import cli
from .reproduce import report as reproduce_report

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = ROOT / "experiments" / "results"
SELECTIONS = ("trace", "early", "walk r=0.5", "walk r=1", "walk r=2", "random")
OPS = {"oracle_attention": "oracle, blocks chosen", "block_sparse_attention": "block-sparse",
       "hybrid_sparse_attention": "sparse layer"}

COUNTED = (("oracle_attention", None), ("block_sparse_attention", "trace"),
           ("block_sparse_attention", "walk r=1"), ("hybrid_sparse_attention", "trace"),
           ("hybrid_sparse_attention", "walk r=1"))

_WRITE = flags.DEFINE_bool("write", False, "Write the tables into README.md.")


def read(name) -> list[dict]:
  """The rows of a results file, in order."""
  return [json.loads(line) for line in (RESULTS / f"{name}.jsonl").read_text().splitlines()]


def kernel_table(rows) -> str:
  """Markdown: op and selection down, shapes across, `forward / forward and backward` in a cell.

  A shape names the cards it was measured on where these are not H200s alone.
  """
  speedup, devices = _last(rows, "speedup"), _last(rows, "device")
  heads = []
  for shape in PAPER:
    cards = sorted({device.removeprefix("NVIDIA ").split()[0] for key, device in devices.items()
                    if key[0] in OPS and key[2] == shape})
    heads.append(shape if cards in ([], ["H200"]) else f"{shape}, {' and '.join(cards)}")
  lines = ["| | " + " | ".join(heads) + " |", "|---" * (len(PAPER) + 1) + "|"]
  for op in OPS:
    for selection in (None, *SELECTIONS):
      cells = [_cell(speedup, op, selection, shape, ("fwd", "fwd_bwd")) for shape in PAPER]
      if any(cells):
        lines.append(_line([_label(op, selection)], cells))
  return "\n".join(lines)


def tpu_table(rows) -> str:
  """Markdown: generation, op and selection down, shapes across, `forward / backward` in a cell."""
  lines = ["| | | " + " | ".join(PAPER) + " |", "|---" * (len(PAPER) + 2) + "|"]
  for generation in sorted({row["generation"] for row in rows}):
    here = [row for row in rows if row["generation"] == generation]
    speedup = _last(here, "speedup")
    share = {key: 100 * value for key, value in _last(here, "mxu_share").items()}
    cost = _last(here, "over_no_maxima")
    for op, selection in COUNTED:
      lines.append(_line([generation, _label(op, selection)], [
        _cell(speedup, op, selection, shape, ("fwd", "bwd")) for shape in PAPER]))
    lines.append(_line([generation, "oracle over itself without choosing"], [
      _cell(cost, "oracle_attention", None, shape, ("fwd",), "{:.3f}") for shape in PAPER]))
    lines.append(_line([generation, "block-sparse loop, % of the matrix units' floor"], [
      _cell(share, "block_sparse_attention", "walk r=1", shape, ("fwd", "bwd"), "{:.0f}")
      for shape in PAPER]))
  return "\n".join(lines)


def _last(rows, field):
  """{(op, selection, shape, pass): the field of the last such row}."""
  return {(row["op"], row.get("selection"), row["shape"], row["pass"]): row[field]
          for row in rows if field in row and "pass" in row}


def _label(op, selection) -> str:
  return OPS[op] if selection is None else f"{OPS[op]}, `{selection}`"


def _line(heads, cells) -> str:
  return "| " + " | ".join([*heads, *(cell or "–" for cell in cells)]) + " |"


def _cell(values, op, selection, shape, passes, form=None) -> str:
  found = [values.get((op, selection, shape, which)) for which in passes]
  if not any(found):
    return ""
  return " / ".join("–" if x is None else (form or ("{:.2f}" if x < 2 else "{:.1f}")).format(x)
                    for x in found)


def step_table(rows) -> str:
  """Markdown: whole training steps of a model and its baselines, with and without segment ids."""
  last = {(row["shape"], row["attention"], row["documents"], row.get("segmented", False)): row
          for row in rows if row["op"] == "train_step"}
  lines = ["| | attention | documents | ms | tokens/s | MFU | peak memory |", "|---" * 7 + "|"]
  for (shape, attention, documents, segmented), row in sorted(last.items(), reverse=True):
    lines.append(_line([shape, attention], [
      f"{documents}" if segmented else f"{documents}, no segment ids", f"{row['ms']:,.0f}",
      f"{row['tokens_per_second']:,.0f}", f"{100 * row['mfu']:.0f} %",
      f"{row['peak_bytes'] / 1e9:.0f} GB"]))
  return "\n".join(lines)


def evidence_table(rows) -> str:
  """Markdown: the small models with rows of the longest length, means and spread over seeds.

  A model that was trained at the base rates besides those that tuning chose has a line for each.
  """
  tuned, base = reproduce_report.chosen_rows(rows), reproduce_report.chosen_rows(rows, 1.0)
  models = [(model, found) for model in tuned for found in (tuned[model], base.get(model))
            if found and (found is tuned[model] or found[0]["rate"] != tuned[model][0]["rate"])]
  longest = max(row["seq_len"] for _, found in models for row in found)
  lines = [f"| | seeds | rates | KV cache at {rows[0]['kv_tokens']:,} | recall to {longest:,} "
           "| recall beyond | bits per byte |", "|---" * 7 + "|"]
  for model, found in models:
    if found[0]["seq_len"] == longest:
      lengths = found[0]["lengths"]
      recall = [reproduce_report.spread([reproduce_report.mean_recall(row, some) for row in found],
                                        ".1f")
                for some in ([n for n in lengths if n <= longest],
                             [n for n in lengths if n > longest])]
      cache = round(found[0]["kv_bytes_total"] / 1e6)
      lines.append(_line([f"`{model}`"], [
        str(len(found)), f"x{found[0]['rate']:g}", f"{cache} MB", *(f"{x} %" for x in recall),
        reproduce_report.spread([row["bits_per_byte"] for row in found], ".3f")]))
  return "\n".join(lines)


TABLES = {"evidence": ("reproduce_h200/results", evidence_table),
          "kernels": ("h200_kernels", kernel_table), "steps": ("h200_kernels", step_table),
          "tpu": ("tpu_static", tpu_table)}


def tables() -> dict[str, str]:
  """{marker: markdown} of every table."""
  return {name: make(read(file)) for name, (file, make) in TABLES.items()}


def filled(text: str, made: dict[str, str]) -> str:
  """README text with the given tables between their markers.

  Raises:
    UserError: a marker is missing.
  """
  for name, table in made.items():
    begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    if begin not in text or end not in text:
      raise UserError(f"README.md has no {begin.strip()} ... {end}; put them where the table goes")
    head, rest = text.split(begin, 1)
    text = head + begin + table + "\n" + end + rest.split(end, 1)[1]
  return text


def main(argv):
  """Prints or writes the tables."""
  del argv
  if _WRITE.value:
    readme = ROOT / "README.md"
    readme.write_text(filled(readme.read_text(), tables()))
  else:
    print("\n\n".join(tables().values()))


if __name__ == "__main__":
  cli.run(main)
