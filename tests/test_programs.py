"""What all programs of `experiments/` have in common."""

import os
import pathlib
import re
import subprocess
import sys

import pytest


def test_programs_can_be_imported_together():
  """absl's flags are one namespace: two programs with one name cannot share a process."""
  names = sorted(path.stem for path in pathlib.Path("experiments").glob("*.py"))
  done = subprocess.run(
    [sys.executable, "-c", "".join(f"import experiments.{name}\n" for name in names)],
    capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("program, flag", [
  ("bench_kernels", "--platform=tpu"), ("check_kernels", "--implementation=mosaic_tpu")])
def test_a_missing_tpu_is_one_line(program, flag):
  done = subprocess.run(
    [sys.executable, "-m", f"experiments.{program}", flag], capture_output=True, text=True,
    check=False, env=os.environ | {"JAX_PLATFORMS": "cpu"})
  assert done.returncode == 2 and done.stdout == ""
  assert re.fullmatch(rf"error: {flag}\D* found cpu\n", done.stderr), done.stderr
