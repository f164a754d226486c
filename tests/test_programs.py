"""What all programs of `experiments/` have in common."""

import pathlib
import subprocess
import sys


def test_programs_can_be_imported_together():
  """absl's flags are one namespace: two programs with one name cannot share a process."""
  names = sorted(path.stem for path in pathlib.Path("experiments").glob("*.py"))
  done = subprocess.run(
    [sys.executable, "-c", "".join(f"import experiments.{name}\n" for name in names)],
    capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr
