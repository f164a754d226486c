"""Result rows (`experiments/results/*.jsonl`): stamped, printed, appended by what measured them."""

import datetime
import subprocess

import jax
from absl import flags

from . import cli

_APPEND = flags.DEFINE(cli.FILE, "append", None, "File to add the rows to, one JSON object a line.")
COMMIT = flags.DEFINE_string("commit", None, "Commit to name in the rows; default git's.")


def emit(row: dict, line: str, device: str | None = "here"):
  """Prints `line`, or with --json the row, and appends the row to the file of --append.

  Floats are rounded to four places; device (None: nothing ran on one), jax, commit and date are
  added.
  """
  row = {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}
  if device == "here":
    device = jax.devices()[0].device_kind
  row |= {} if device is None else {"device": device}
  row |= dict(jax=jax.__version__, commit=commit(),
              date=datetime.date.today().isoformat())
  if _APPEND.value:
    with open(_APPEND.value, "a") as file:
      file.write(cli.to_json(row) + "\n")
  print(cli.to_json(row) if cli.JSON.value else line, flush=True)


def commit() -> str:
  """What --commit says, or the short hash of the checkout, empty where there is none."""
  if flags.FLAGS.is_parsed() and COMMIT.value:      # not parsed where a notebook calls
    return COMMIT.value
  try:
    return subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True,
                          check=False).stdout.strip()
  except FileNotFoundError:
    return ""
