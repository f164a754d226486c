"""The README's measured tables are the results file's."""

import pytest

from experiments import readme_tables
from hysparse_jax.errors import UserError


def test_the_readme_says_what_was_measured():
  text = (readme_tables.ROOT / "README.md").read_text()
  assert readme_tables.filled(text, readme_tables.read()) == text, (
    "run: python -m experiments.readme_tables --write")


def test_the_last_row_counts():
  row = {"op": "oracle_attention", "shape": "7b_32k", "pass": "fwd", "speedup": 1.0}
  table = readme_tables.kernel_table([row, row | {"speedup": 1.026}, row | {
    "op": "block_sparse_attention", "selection": "random", "pass": "fwd_bwd", "speedup": 3.14}])
  assert "| oracle, blocks chosen | – | 1.03 / – | – | – | – |" in table
  assert "| block-sparse, `random` | – | – / 3.1 | – | – | – |" in table
  assert table.count("\n") == 3


def test_a_missing_marker_is_named():
  with pytest.raises(UserError, match="<!-- kernels -->"):
    readme_tables.filled("no tables here", [])
