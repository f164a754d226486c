"""The program that measures runs under kills and damage, without a run."""

import json
import subprocess
import sys

import pytest

from experiments.reliability import __main__ as reliability
from experiments.reliability import lab
from tests.test_configs import REPO
from tests.test_training import call


def test_the_document_is_made_from_the_rows():
  rows = [json.loads(line) for line in reliability.RESULTS.read_text().splitlines()]
  assert (REPO / "docs" / "reliability.md").read_text() == reliability.document(rows), (
    "run: python -m experiments.reliability")


def test_the_newest_row_of_a_test_counts_and_says_whether_it_is_ok():
  row = {"row": "kill", "rounds": 2, "seen": {"rows missing": 1}, "wanted": "0", "ok": False}
  table = reliability.table([row | {"rounds": 9}, row, row | {"row": "sigint", "ok": None, "seen": {
    "exit codes": {"0": 3, "130": 1}}}])
  assert "| 2 | rows missing: 1 | 0 | **not ok** |" in table and "| 9 |" not in table
  assert "| 2 | exit codes: 3 times 0, 1 times 130 | 0 | skipped |" in table
  assert table.count("\n") == 4


def test_flipped_bits_are_counted_in_this_process(tmp_path):
  out, appended = tmp_path / "docs" / "table.md", tmp_path / "rows.jsonl"
  code, _, err = call(reliability, "--only=config_bits,metrics_bits", "--rounds=20",
                      f"--out={out}", f"--append={appended}", "--commit=abc")
  assert code == 0, err
  rows = [json.loads(line) for line in appended.read_text().splitlines()]
  assert [row["row"] for row in rows] == ["config_bits", "metrics_bits"]
  assert all(row["ok"] and row["rounds"] == 20 * lab.CHEAP for row in rows)
  assert 0 < rows[0]["seen"]["refused"] <= rows[0]["rounds"]
  assert out.read_text() == reliability.document(rows)


def test_an_unknown_row_is_one_line(tmp_path):
  code, _, err = call(reliability, "--only=kil", f"--append={tmp_path / 'rows'}")
  assert code == 2 and "got kil, want some of kill, sigterm" in err and err.count("\n") == 1


def test_what_is_silent_or_a_traceback_is_told_apart():
  def fails():
    raise ValueError("two\nlines")

  assert lab.attempt(lambda: 7) == (7, 0, None)
  result, lines, kind = lab.attempt(fails)
  assert (result, kind) == (None, "ValueError") and lines > 3


@pytest.mark.parametrize("ends, code", [("os._exit(3)", 3), ("os.kill(os.getpid(), 9)", 137)])
def test_exit_codes_are_those_of_a_shell(ends, code):
  process = subprocess.Popen([sys.executable, "-c", f"import os; {ends}"], stderr=subprocess.PIPE,
                             text=True)
  assert lab.finish(process)[:2] == (code, [])
