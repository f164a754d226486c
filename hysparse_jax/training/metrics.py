"""What a run writes down and shows: metrics.jsonl, a progress bar, throughput against the peak."""

import json
import os
import pathlib
import sys
import time

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from hysparse_jax.config import ModelConfig
from hysparse_jax.errors import UserError
from hysparse_jax.model.hybrid import by_layer

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

  Args:
    cfg: of the model.
    results: `step.Metrics` of consecutive steps, on the host.
    last_step: of the last of them.
  """
  rows = [{"step": step, "loss": float(result.loss), "grad_norm": float(result.grad_norm),
           "lr": float(result.lr), "skipped": int(result.total_bad)}
          for step, result in enumerate(results, last_step - len(results) + 1)]
  layers = by_layer(cfg, results[-1].layers)
  for name in ("gate_sparse", "gate_local"):
    values = [getattr(layer, name) for layer in layers]
    if any(value is not None for value in values):
      rows[-1][name] = [None if value is None else float(value) for value in values]
  if cfg.moe is not None:
    rows[-1]["expert_load"] = [layer.router.expert_load.tolist() for layer in layers]
  return rows


class MetricsLog:
  """Appends one JSON object per line to `metrics.jsonl`; after a resume no step stands twice."""

  def __init__(self, workdir, *, resume_step: int, tensorboard: bool = False):
    self._path = pathlib.Path(workdir) / "metrics.jsonl"
    _keep_until(self._path, resume_step)
    self._file = self._path.open("a")
    self._board = None
    if tensorboard:
      try:
        from tensorboardX import SummaryWriter  # optional: only where asked for
      except ImportError as error:
        raise UserError("train.tensorboard=True needs tensorboardX, which is not installed; "
                        "pip install tensorboardX, or set it to False") from error
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

  def __enter__(self):
    return self

  def __exit__(self, *error):
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

  def __init__(self, total_steps: int, flops_per_token: float):
    self._total = total_steps
    self._flops_per_token = flops_per_token
    self._peak = peak_flops()
    self._since = None              # (step, time) at which the present interval began
    self._bar = None
    if sys.stdout.isatty():
      self._bar = Progress(
        TextColumn("[bold]train"), BarColumn(), MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}"), TimeRemainingColumn(), console=Console())
      self._task = self._bar.add_task("", total=total_steps, figures="")

  def __enter__(self):
    if self._bar is not None:
      self._bar.start()
    return self

  def __exit__(self, *error):
    if self._bar is not None:
      self._bar.stop()

  def restart(self, step: int):
    """What came before `step` ended (compiling, evaluating) is not training time."""
    self._since = (step, time.perf_counter())
    if self._bar is not None:
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
      self._bar.update(self._task, completed=step, figures=text)
    else:
      print(f"step {step}/{self._total}  {text}  ETA {eta}", flush=True)
    return figures

  def note(self, text: str):
    """A line of its own, above the bar."""
    if self._bar is not None:
      self._bar.console.print(text, highlight=False, soft_wrap=True)
    else:
      print(text, flush=True)
