"""The README's tables of kernels are the results files', and those hold what was promised."""

import re

import pytest

from experiments import readme_tables
from hysparse_jax.errors import UserError


def test_the_readme_says_what_was_measured():
  text = (readme_tables.ROOT / "README.md").read_text()
  assert readme_tables.filled(text, readme_tables.tables()) == text, (
    "run: python -m experiments.readme_tables --write")


def test_the_last_row_counts():
  row = {"op": "oracle_attention", "shape": "7b_32k", "pass": "fwd", "speedup": 1.0,
         "device": "NVIDIA H200"}
  table = readme_tables.kernel_table([row, row | {"speedup": 1.026}, row | {
    "op": "block_sparse_attention", "selection": "random", "pass": "fwd_bwd", "speedup": 3.14}])
  assert "| oracle, blocks chosen | – | 1.03 / – | – | – | – |" in table
  assert "| block-sparse, `random` | – | – / 3.1 | – | – | – |" in table
  assert table.count("\n") == 3 and "H200" not in table
  table = readme_tables.kernel_table([row, row | {"device": "NVIDIA H100 80GB HBM3"}])
  assert table.startswith("| | 7b_8k | 7b_32k, H100 | 7b_128k |")
  table = readme_tables.kernel_table([row, row | {"pass": "fwd_bwd", "device": "NVIDIA H100 80GB"}])
  assert table.startswith("| | 7b_8k | 7b_32k, H100 and H200 | 7b_128k |")


def test_the_verdicts_in_the_readme_are_the_report_s():
  """Every `a ± b` of the prose about small models is a row of a report, rounded as it is there."""
  readme = (readme_tables.ROOT / "README.md").read_text()
  prose = readme.split("<!-- /evidence -->")[1].split("Kernels on one NVIDIA H200")[0]
  said = re.findall(r"(\d+\.\d+) ± (\d+\.\d+)", " ".join(prose.split()))
  reports = "".join((readme_tables.RESULTS / name / "report.md").read_text()
                    for name in ("reproduce_h200", "reproduce_h200_25_layers"))
  there = re.findall(r"(\d+\.\d+) (?:\| )?± ?(\d+\.\d+)", reports)
  places = lambda number, text: f"{float(number):.{len(text.partition('.')[2])}f}"
  assert len(said) >= 14
  for value, error in said:
    assert any((places(a, value), places(b, error)) == (value, error) for a, b in there), (
      f"README says {value} ± {error}, no report does")


def test_steps_with_and_without_segments_have_a_line_each():
  row = {"op": "train_step", "shape": "7b", "attention": "full", "documents": 1, "mfu": 0.4,
         "ms": 1500.0, "tokens_per_second": 2000.0, "peak_bytes": 5e9}
  packed = row | {"documents": 9, "segmented": True, "tokens_per_second": 1900.0}
  lines = readme_tables.step_table([row, packed, row | {"tokens_per_second": 2100.0}]).splitlines()
  assert lines[2:] == ["| 7b | full | 9 | 1,500 | 1,900 | 40 % | 5 GB |",
                       "| 7b | full | 1, no segment ids | 1,500 | 2,100 | 40 % | 5 GB |"]


def test_small_models_are_means_over_seeds_at_the_tuned_rate():
  row = {"model": "full", "seed": 0, "rate": 1.0, "tuning": False, "seq_len": 64,
         "lengths": [32, 64, 128], "recall": {"vt": [0.5, 0.7, 0.2]}, "kv_bytes_total": 5e6,
         "kv_tokens": 96, "train_loss": 1.0, "bits_per_byte": 1.0}
  rows = [row, row | {"seed": 1, "bits_per_byte": 2.0}, row | {"rate": 2.0, "seed": 2},
          row | {"tuning": True}, row | {"model": "block_64", "seq_len": 16}]
  table = readme_tables.evidence_table(rows)
  assert "KV cache at 96 | recall to 64 | recall beyond" in table
  base = "| `full` | 2 | x1 | 5 MB | 60.0 ± 0.0 % | 20.0 ± 0.0 % | 1.500 ± 0.707 |"
  assert table.endswith("|\n" + base) and table.count("`full`") == 1
  tuned = [row | {"tuning": True, "rate": rate, "train_loss": -rate} for rate in (0.5, 2.0)]
  table = readme_tables.evidence_table(rows + tuned)     # now x2 has the lowest loss of three
  assert table.endswith("| `full` | 1 | x2 | 5 MB | 60.0 % | 20.0 % | 1.000 |\n" + base)


def test_counts_of_a_generation():
  row = {"op": "block_sparse_attention", "selection": "walk r=1", "shape": "80b_32k",
         "generation": "v5p", "pass": "fwd", "speedup": 11.39, "mxu_share": 0.834}
  table = readme_tables.tpu_table([row, row | {"pass": "bwd", "speedup": 1.5, "mxu_share": 0.905}])
  assert "| v5p | block-sparse, `walk r=1` | – | – | – | 11.4 / 1.50 | – |" in table
  assert "% of the matrix units' floor | – | – | – | 83 / 90 | – |" in table
  assert "| v5p | oracle over itself without choosing | – | – | – | – | – |" in table


@pytest.mark.parametrize("shape, limit", [("7b_32k", 1.07), ("80b_32k", 1.03)])
def test_counted_targets(shape, limit):
  """The oracle over itself without choosing; the list kernels' loops against the matrix units."""
  last = {(row["generation"], row["op"], row["pass"]): row
          for row in readme_tables.read("tpu_static") if row["shape"] == shape}
  for generation in ("v5e", "v5p", "v6e"):
    assert last[generation, "oracle_attention", "fwd"]["over_no_maxima"] <= limit
    for op in ("oracle_attention", "block_sparse_attention", "sliding_window_attention"):
      assert {(generation, op, "fwd"), (generation, op, "bwd")} <= set(last)
  for generation in ("v5e", "v5p"):      # v6e's units are 256 wide, see experiments/LOG.md
    assert last[generation, "block_sparse_attention", "fwd"]["mxu_share"] >= 0.75
    assert last[generation, "block_sparse_attention", "bwd"]["mxu_share"] >= 0.85


def test_a_missing_marker_is_named():
  with pytest.raises(UserError, match="<!-- kernels -->"):
    readme_tables.filled("no tables here", {"kernels": ""})
