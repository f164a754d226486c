"""What a run writes down and shows: metrics.jsonl, a progress bar, throughput against the peak."""

import json
import os
import pathlib
import sys
import time

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

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


class MetricsLog:
  """Appends one JSON object per line to `metrics.jsonl`; after a resume no step stands twice."""

  def __init__(self, workdir, *, resume_step: int, tensorboard: bool = False):
    self._path = pathlib.Path(workdir) / "metrics.jsonl"
    _keep_until(self._path, resume_step)
    self._file = self._path.open("a")
    self._board = None
    if tensorboard:
      from tensorboardX import SummaryWriter   # optional: only where asked for
      self._board = SummaryWriter(str(pathlib.Path(workdir) / "tensorboard"))

  def write(self, step: int, **values):
    """One row; values are numbers, strings or lists."""
    self._file.write(json.dumps({"step": step, **values}) + "\n")
    if self._board is not None:
      for name, value in values.items():
        if isinstance(value, (int, float)):
          self._board.add_scalar(name, value, step)

  def flush(self):
    """Everything written so far survives the process."""
    self._file.flush()
    os.fsync(self._file.fileno())
    if self._board is not None:
      self._board.flush()

  def close(self):
    """Flushes and closes."""
    self.flush()
    self._file.close()
    if self._board is not None:
      self._board.close()


def read(workdir) -> list[dict]:
  """The rows of a run's metrics.jsonl; a torn last line, left by a kill, is not a row."""
  path = pathlib.Path(workdir) / "metrics.jsonl"
  return [row for row in map(_parse, path.read_text().splitlines()) if row is not None]


def _parse(line: str) -> dict | None:
  try:
    return json.loads(line)
  except json.JSONDecodeError:
    return None


def _keep_until(path: pathlib.Path, step: int):
  if not path.exists():
    return
  rows = [line for line in path.read_text().splitlines()
          if (row := _parse(line)) is not None and row["step"] <= step]
  scratch = path.with_suffix(".tmp")
  scratch.write_text("".join(line + "\n" for line in rows))
  scratch.replace(path)


class TrainProgress:
  """A progress bar with loss, tokens/s, MFU and ETA on a terminal; plain lines elsewhere."""

  def __init__(self, total_steps: int, flops_per_token: float, *, label: str = "train"):
    self._total = total_steps
    self._flops_per_token = flops_per_token
    self._peak = peak_flops()
    self._label = label
    self._last = None
    self._bar = None
    if sys.stdout.isatty():
      self._bar = Progress(
        TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}"), TimeRemainingColumn(), console=Console())
      self._task = self._bar.add_task(label, total=total_steps, figures="")
      self._bar.start()

  def start(self, step: int):
    """The clock of the first interval starts now, at `step` (after compilation)."""
    self._last = (step, time.perf_counter())
    if self._bar is not None:
      self._bar.update(self._task, completed=step)

  def update(self, step: int, loss: float, tokens: int, skipped: int) -> dict:
    """Shows the interval that ends at `step`, in which `tokens` were processed.

    Returns:
      tokens_per_second and, where the peak is known, mfu in [0, 1].
    """
    now = time.perf_counter()
    last_step, then = self._last
    seconds = max(now - then, 1e-9)
    speed = tokens / seconds
    figures = {"tokens_per_second": speed}
    text = f"loss {loss:.4f}  {speed:,.0f} tok/s"
    if self._peak is not None:
      figures["mfu"] = speed * self._flops_per_token / self._peak
      text += f"  MFU {figures['mfu']:.1%}"
    if skipped:
      text += f"  skipped {skipped}"
    self._last = (step, now)
    if self._bar is not None:
      self._bar.update(self._task, completed=step, figures=text)
    else:
      left = seconds / max(step - last_step, 1) * (self._total - step)
      print(f"{self._label} {step}/{self._total}  {text}  ETA {left:,.0f} s", flush=True)
    return figures

  def note(self, text: str):
    """A line of its own, above the bar."""
    if self._bar is not None:
      self._bar.console.print(text, highlight=False)
    else:
      print(text, flush=True)

  def close(self):
    """Takes the bar down."""
    if self._bar is not None:
      self._bar.stop()
