"""What a run writes down and shows: metrics.jsonl, a progress bar, throughput against the peak.

A line of metrics.jsonl is a JSON object whose last entry is a CRC-32 of what comes before it, so
that a row with a flipped bit is not taken for a measurement. Files of older versions have none.
"""

import contextlib
import itertools
import json
import math
import os
import pathlib
import time
import zlib

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from hysparse_jax.config import ModelConfig
from hysparse_jax.errors import UserError
from hysparse_jax.model.hybrid import by_layer
from hysparse_jax.training import console, run

# Dense bf16 FLOP/s per device by `jax.Device.device_kind`, from the vendors' datasheets.
PEAK_FLOPS = {
  "NVIDIA H100 80GB HBM3": 989e12,
  "NVIDIA H200": 989e12,
  "NVIDIA B200": 2250e12,
  "NVIDIA A100-SXM4-80GB": 312e12,
  "NVIDIA A100-SXM4-40GB": 312e12,
  "TPU v4": 275e12,
  "TPU v5 lite": 197e12,
  "TPU v5": 459e12,
  "TPU v6 lite": 918e12,
}


def peak_flops() -> float | None:
  """Dense bf16 FLOP/s of all devices together; None where the device is not in the table."""
  devices = jax.devices()
  one = PEAK_FLOPS.get(devices[0].device_kind)
  return None if one is None else one * len(devices)


def step_rows(cfg: ModelConfig, results: list, last_step: int) -> list[dict]:
  """A JSON-ready row per step; the last one also has gates and expert loads, by layer.

  A loss or norm that is not a finite number is None, since JSON has no NaN.

  Args:
    cfg: of the model.
    results: `step.Metrics` of consecutive steps, on the host.
    last_step: of the last of them.
  """
  rows = [{"step": step, "loss": _finite(result.loss), "grad_norm": _finite(result.grad_norm),
           "lr": float(result.lr), "skipped": int(result.total_bad)}
          for step, result in enumerate(results, last_step - len(results) + 1)]
  layers = by_layer(cfg, results[-1].layers)
  for name in ("gate_sparse", "gate_local"):
    values = [getattr(layer, name) for layer in layers]
    if any(value is not None for value in values):
      rows[-1][name] = [None if value is None else _finite(value) for value in values]
  if cfg.moe is not None:
    rows[-1]["expert_load"] = [layer.router.expert_load.tolist() for layer in layers]
  return rows


def _finite(value) -> float | None:
  return float(value) if math.isfinite(value) else None


class MetricsLog:
  """Appends one JSON object per line to `metrics.jsonl`, and the same to TensorBoard.

  Rows of steps after `resume_step` are dropped from both, since the run repeats those steps. A new
  run sets the rows of an earlier one aside, in metrics.1.jsonl. `evaluate_again` also drops the
  held-out row of `resume_step`.

  Raises:
    UserError: the files cannot be written.
  """

  def __init__(self, workdir, *, resume_step: int, tensorboard: bool = False,
               evaluate_again: bool = False):
    workdir = pathlib.Path(workdir)
    self._path = workdir / "metrics.jsonl"
    rows = []
    if os.path.lexists(self._path):
      rows = [row for row in read(workdir) if row["step"] < resume_step or
              (row["step"] == resume_step and not (evaluate_again and "heldout_loss" in row))]
      if rows or resume_step:
        run.replace(self._path, "".join(map(_line, rows)).encode())
      else:
        with run.writing(self._path):
          self._path.rename(next(path for number in itertools.count(1) if not os.path.lexists(
            path := workdir / f"metrics.{number}.jsonl")))
    self.evaluated = {row["step"] for row in rows if "heldout_loss" in row}
    with run.writing(self._path):
      self._file = self._path.open("a")
    self._board = _board(workdir / "tensorboard", rows) if tensorboard else None

  def write(self, step: int, **values):
    """One row; values are numbers, strings or lists."""
    row = {"step": step, **values}
    with run.writing(self._path):
      self._file.write(_line(row))
    if self._board is not None:
      _to_board(self._board, row)

  def flush(self):
    """Everything written so far survives the process."""
    with run.writing(self._path):
      self._file.flush()
      os.fsync(self._file.fileno())
    if self._board is not None:
      self._board.flush()

  def __enter__(self):
    return self

  def __exit__(self, *error):
    try:
      self.flush()
    finally:
      with contextlib.suppress(OSError):     # what `flush` has reported
        self._file.close()
      if self._board is not None:
        self._board.close()


def _board(folder: pathlib.Path, rows):
  """A TensorBoard writer whose folder holds `rows` and nothing else of this run."""
  try:
    from tensorboardX import SummaryWriter  # optional: only where asked for
  except ImportError as error:
    raise UserError("train.tensorboard=True needs tensorboardX, which is not installed; "
                    "pip install tensorboardX, or set it to False") from error
  with run.writing(folder):
    for path in folder.glob("events.out.tfevents.*"):
      path.unlink()
    board = SummaryWriter(str(folder))
  for row in rows:
    _to_board(board, row)
  return board


def _to_board(board, row: dict):
  for name, value in row.items():
    if name != "step" and isinstance(value, (int, float)):
      board.add_scalar(name, value, row["step"])


def read(workdir) -> list[dict]:
  """The rows of a run's metrics.jsonl.

  Damaged lines are left out, with one warning that names them. A torn last line, left by a kill, is
  not a row.

  Raises:
    UserError: the file cannot be read.
  """
  path = pathlib.Path(workdir) / "metrics.jsonl"
  if os.path.lexists(path) and not path.is_file():
    raise UserError(f"{path} is not a file; move it away")
  try:
    *lines, torn = path.read_bytes().split(b"\n")
  except OSError as error:
    raise UserError(f"cannot read {path}: {error.strerror}") from error
  rows = [_parse(line) for line in lines]
  if torn:      # the last newline may be what was lost, or what a flipped bit made of it
    last = _parse(torn) or _parse(torn[:-1])
    rows += [last] if last else []
  sealed = any(row and _SEAL in row for row in rows)
  bad = [number for number, row in enumerate(rows, 1)
         if row is None or (sealed and _SEAL not in row)]
  if bad:
    which = ", ".join(map(str, bad[:10])) + (", ..." if len(bad) > 10 else "")
    console.warn(f"{path}: line{'s' * (len(bad) > 1)} {which} damaged, left out")
  return [_unsealed(row) for number, row in enumerate(rows, 1) if number not in set(bad)]


_SEAL = "crc"     # the last entry of a row


def _line(row: dict) -> str:
  text = json.dumps(row)     # rows of older versions may hold NaN
  return f'{text[:-1]}, "{_SEAL}": "{zlib.crc32(text.encode()):08x}"}}\n'


def _unsealed(row: dict) -> dict:
  return {name: value for name, value in row.items() if name != _SEAL}


def _parse(line: bytes) -> dict | None:
  """The row of a line, its seal included; None where there is none, or one that is damaged."""
  try:
    row = json.loads(line)
  except (ValueError, RecursionError):
    return None
  if not isinstance(row, dict) or type(row.get("step")) is not int:
    return None
  return row if _SEAL not in row or _line(_unsealed(row)).encode() == line + b"\n" else None


class TrainProgress:
  """A progress bar with loss, tokens/s, MFU and ETA on a terminal; plain lines elsewhere."""

  def __init__(self, total_steps: int, flops_per_token: float):
    self._total = total_steps
    self._flops_per_token = flops_per_token
    self._peak = peak_flops()
    self._since = None              # (step, time) at which the present interval began
    self._bar = None
    if console.is_terminal():
      self._bar = Progress(
        TextColumn("[bold]train"), BarColumn(), MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}"), TimeRemainingColumn(), console=Console())
      self._task = self._bar.add_task("", total=total_steps, figures="")

  def __enter__(self):
    if self._bar is not None:
      with console.outlived():
        self._bar.start()
    return self

  def __exit__(self, *error):
    if self._bar is not None:
      with console.outlived():
        self._bar.stop()

  def restart(self, step: int):
    """What came before `step` ended (compiling, evaluating) is not training time."""
    self._since = (step, time.perf_counter())
    if self._bar is not None:
      with console.outlived():
        self._bar.update(self._task, completed=step)

  def update(self, step: int, loss: float, tokens_per_step: int, skipped: int) -> dict:
    """Shows the interval that ends at `step`.

    Returns:
      tokens_per_second and, where the peak is known, mfu in [0, 1]; nothing for an empty interval.
    """
    now = time.perf_counter()
    since_step, since = self._since
    figures, text, eta = {}, f"loss {loss:.4f}", "?"
    if step > since_step:
      seconds_per_step = (now - since) / (step - since_step)
      speed = tokens_per_step / seconds_per_step
      figures["tokens_per_second"] = speed
      text += f"  {speed:,.0f} tokens/s"
      eta = f"{seconds_per_step * (self._total - step):,.0f} s"
      if self._peak is not None:
        figures["mfu"] = speed * self._flops_per_token / self._peak
        text += f"  MFU {figures['mfu']:.1%}"
      else:
        text += f"  {speed * self._flops_per_token / 1e9:,.1f} GFLOP/s"
    if skipped:
      text += f"  skipped {skipped}"
    self._since = (step, now)
    if self._bar is not None:
      with console.outlived():
        self._bar.update(self._task, completed=step, figures=text)
    else:
      console.say(f"step {step}/{self._total}  {text}  ETA {eta}")
    return figures

  def note(self, text: str):
    """A line of its own, above the bar."""
    if self._bar is not None:
      with console.outlived():
        self._bar.console.print(text, highlight=False, soft_wrap=True)
    else:
      console.say(text)
