"""The paper's claims at a small scale: trains every model alike, evaluates, writes report.md.

    python -m experiments.reproduce --preset=smoke --workdir=runs/smoke     minutes on two CPU cores
    python -m experiments.reproduce --preset=h200 --list                    pieces, FLOPs, minutes
    python -m experiments.reproduce --preset=h200 --workdir=DIR --piece=3,4,5
    python -m experiments.reproduce --preset=h200 --workdir=DIR --report    tables and plots alone

Without --piece everything that is not done yet runs, in order. What is done is what has a row in
<workdir>/results.jsonl, one row per model and seed: a folder that holds nothing else goes on where
it stopped. Weights are kept in <workdir>/runs/ only until their row is written, so a model must
train within one piece; within a piece a stopped run goes on from its last checkpoint.
Beside it: overlap.jsonl (overlap of neighbouring selections, by layer and step),
selections_MODEL.npz (recorded block indices for `experiments.bench.selections`), plots/, report.md.
"""

import datetime
import hashlib
import json
import math
import pathlib
import shutil

import jax
import numpy as np
from absl import flags
from rich import box
from rich.console import Console
from rich.table import Table

from hysparse_jax import accounting, config
from hysparse_jax.data import batches as data
from hysparse_jax.errors import UserError
from hysparse_jax.evals.recall import recall
from hysparse_jax.inference.load import load_run
from hysparse_jax.tasks import token_tasks
from hysparse_jax.training import metrics, run
from hysparse_jax.training.loop import train

from .. import cli, rows
from . import mechanism
from . import plan as reproduce_plan
from . import report as reproduce_report
from .plan import Piece, Preset, Run

for _flag in (cli.SET, cli.WORKDIR):
  flags.declare_key_flag(_flag)
flags.declare_key_flag(rows.COMMIT)
_PRESET = flags.DEFINE_string("preset", None, "smoke or h200.")
_PIECE = flags.DEFINE_list("piece", None, "Numbers of the pieces to run, such as 3,4; see --list.")
_LIST = flags.DEFINE_bool("list", False, "Show the pieces and what they will cost, and stop.")
_NOTE = flags.DEFINE_string("note", "", "A sentence for the head of the report of --report.")
_REPORT = flags.DEFINE_bool("report", False, "Write report.md from the rows there are, and stop.")

EVALUATION_SEED = 0


def reproduce(preset: Preset, workdir, pieces=None) -> list[dict]:
  """Runs the pieces that are not done yet and writes the report; the rows of results.

  Args:
    preset: of `reproduce_plan.preset`.
    workdir: folder of results; made if missing.
    pieces: numbers of pieces; None: all.

  Raises:
    UserError: no such piece, a folder of another preset or that cannot be written.
  """
  chosen = range(len(preset.pieces)) if pieces is None else pieces
  for number in chosen:
    if not 0 <= number < len(preset.pieces):
      raise UserError(f"no piece {number}; preset {preset.name} has 0 to "
                      f"{len(preset.pieces) - 1}, see --list")
  workdir = run.prepare(workdir)
  read_results(workdir, preset)
  for number in chosen:
    if not _run_piece(preset, preset.pieces[number], workdir):
      return read_results(workdir, preset)
  results = read_results(workdir, preset)
  path = reproduce_report.write(preset, results, _read_lines(workdir / "overlap.jsonl"), workdir)
  print(f"wrote {path}", flush=True)
  return results


def read_results(workdir, preset: Preset) -> list[dict]:
  """The rows of results.jsonl, none where there is none.

  Raises:
    UserError: rows of another preset.
  """
  results = _read_lines(pathlib.Path(workdir) / "results.jsonl")
  for row in results:
    if row["preset"] != preset.name:
      raise UserError(f"{workdir} holds results of preset {row['preset']}, not {preset.name}; "
                      "give another --workdir")
  return results


def _read_lines(path) -> list[dict]:
  if not path.is_file():
    return []
  try:
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
  except ValueError as error:
    raise UserError(f"{path} is damaged: {error}; remove the bad line") from error


def _run_piece(preset: Preset, piece: Piece, workdir) -> bool:
  """Trains and evaluates what of a piece is not done; False if SIGTERM stopped it."""
  for one in piece.runs:
    results = read_results(workdir, preset)
    rate = _key(one, results)[2]
    cfg = reproduce_plan.with_rate(one.cfg, rate)
    done = [row for row in results if _row_key(row) == _key(one, results)]
    if any(row["settings"] != _settings(cfg) for row in done):
      raise UserError(f"{workdir} holds {one.name} with other settings; give another --workdir, "
                      "or the same --set")
    if done:
      print(f"{one.name}: done before", flush=True)
      continue
    settings = _settings(cfg)
    if one.watched:
      every = -(-cfg.train.steps // preset.overlap_steps)
      cfg = config.override(cfg, f"train.checkpoint_every={every}",
                            f"train.keep_checkpoints={preset.overlap_steps + 1}")
    folder = workdir / "runs" / one.name
    print(f"\n=== {piece.name}: {one.name}, learning rates x{rate:g}", flush=True)
    figures = train(cfg, folder)
    if figures["preempted"]:
      return False
    row = {**_row(preset, one, cfg, rate, figures, folder), "settings": settings}
    if not one.tuning:
      row |= _evaluate(preset, one, folder)
    if one.watched:
      _look_inside(preset, one, cfg, folder, workdir)
    with (workdir / "results.jsonl").open("a") as file:
      file.write(cli.to_json(row) + "\n")
    shutil.rmtree(folder / "checkpoints")
    jax.clear_caches()      # no later run compiles the same programs
  return True


def _key(one: Run, results) -> tuple:
  """What a run's row is known by: its own rate, else the one that tuning chose."""
  rate = one.rate
  if rate is None:
    rate = reproduce_plan.tuned_rate(results, reproduce_plan.family(one.model))
  return one.model, one.seed, rate, one.again


def _row_key(row) -> tuple:
  return row["model"], row["seed"], row["rate"], row.get("again", False)   # the first rows had none


def _settings(cfg) -> str:
  """Tells configs apart."""
  return hashlib.sha256(config.to_text(cfg).encode()).hexdigest()[:16]


def _row(preset, one: Run, cfg, rate, figures, folder) -> dict:
  """What training says; everything but speed and date is a function of the config."""
  losses = [row["loss"] for row in metrics.read(folder) if row.get("loss") is not None]
  tail = losses[-max(1, len(losses) // 10):]
  account = accounting.account(cfg.model, max(preset.lengths))
  return {
    "preset": preset.name, "model": one.model, "seed": one.seed, "rate": rate,
    "tuning": one.tuning, "again": one.again, "train_loss": float(np.mean(tail)),
    "bits_per_byte": figures["bits_per_byte"], "heldout_loss": figures["heldout_loss"],
    "params": account.params, "body_params": reproduce_plan.body_params(cfg.model),
    "d_ff": cfg.model.d_ff, "kv_bytes_per_token": account.kv_bytes_per_token,
    "kv_bytes_total": account.kv_bytes_total, "kv_tokens": max(preset.lengths),
    "tokens": reproduce_plan.tokens_of(cfg), "steps": cfg.train.steps,
    "seq_len": cfg.data.seq_len, "lr": cfg.optim.lr, "muon_lr": cfg.optim.muon_lr,
    # Nothing is timed by a run that only had its evaluation left.
    "tokens_per_second": (None if math.isnan(figures["tokens_per_second"])
                          else figures["tokens_per_second"]),
    "device": jax.devices()[0].device_kind, "jax": jax.__version__, "commit": rows.commit(),
    "date": datetime.date.today().isoformat()}


def _evaluate(preset, one: Run, folder) -> dict:
  """The recall tasks: lists over lengths by task, and by depth of the evidence."""
  cfg, model, tokenizer, _ = load_run(folder)
  text, _ = tokenizer.encode_documents(data.Corpus.open(cfg.data).heldout)
  ids = token_tasks.Ids(tokenizer.vocab_size, cfg.data.task_ids)
  found = recall(model, ids, preset.tasks, one.lengths, preset.samples, seed=EVALUATION_SEED,
                 text=text, skip_unfit=True)
  by_task = lambda values: {
    task: [None if np.isnan(value) else float(value) for value in row]
    for task, row in zip(preset.tasks, values)}
  depths = {task: [[None if np.isnan(value) else float(value) for value in line] for line in cells]
            for task, cells in zip(preset.tasks, found.by_depth) if not np.isnan(cells).all()}
  return {"lengths": list(one.lengths), "recall": by_task(found.recall), "f1": by_task(found.f1),
          "exact": by_task(found.exact), "by_depth": depths, "samples": preset.samples}


def _look_inside(preset, one: Run, cfg, folder, workdir):
  """Overlap by step, the oracle's pictures, and a selection to measure kernels on."""
  every = cfg.train.checkpoint_every
  steps = sorted({*range(every, cfg.train.steps + 1, every), cfg.train.steps})
  found, last = mechanism.overlap_rows(folder, steps)
  kept = [row for row in _read_lines(workdir / "overlap.jsonl") if row["model"] != one.model]
  found = [{"preset": preset.name, "model": one.model, "seed": one.seed,
            "block_size": cfg.model.block_size, "picks": cfg.model.num_blocks, **row}
           for row in found]
  (workdir / "overlap.jsonl").write_text("".join(cli.to_json(row) + "\n" for row in kept + found))
  from hysparse_jax import plots  # matplotlib is slow to import
  plots.oracle_figures(last, workdir / "plots" / one.model, block_size=cfg.model.block_size)
  mechanism.save_selection(folder, preset.selection_tokens,
                           workdir / f"selections_{one.model}.npz", name=one.model)


def show_pieces(preset: Preset, results, console: Console):
  """The table of --list."""
  table = Table("piece", "name", "body", "tokens", "PFLOP", "eval", "minutes", "",
                box=box.SIMPLE_HEAD)
  table.columns[1].no_wrap, table.columns[1].min_width = True, 18
  done = {_row_key(row) for row in results}
  total, notes = 0.0, set()
  for number, piece in enumerate(preset.pieces):
    flops = [reproduce_plan.predicted_flops(preset, one) for one in piece.runs]
    minutes = reproduce_plan.predicted_minutes(preset, piece)
    finished = all(_key(one, results) in done for one in piece.runs)
    total += 0.0 if finished else minutes
    notes |= {piece.note} - {""}
    table.add_row(
      str(number), piece.name,
      f"{reproduce_plan.body_params(piece.runs[0].cfg.model) / 1e6:.1f}M",
      f"{sum(reproduce_plan.tokens_of(one.cfg) for one in piece.runs) / 1e6:.1f}M",
      f"{sum(train for train, _ in flops) / 1e15:.1f}",
      f"{sum(rest for _, rest in flops) / 1e15:.1f}",
      f"{minutes:.1f}", "done" if finished else piece.note.partition(":")[0])
  console.print(table)
  for line in (*sorted(notes), f"{total:.0f} minutes left in all, predicted at "
               f"{reproduce_plan.UTILISATION:.0%} of {reproduce_plan.PEAK_FLOPS / 1e12:.0f} "
               f"TFLOP/s and {reproduce_plan.COMPILE_MINUTES:g} minute a run besides"):
    console.print(line, highlight=False, soft_wrap=True)


def main(argv):
  """Entry point."""
  del argv
  if not _PRESET.value:
    raise UserError("--preset is missing; give smoke or h200")
  preset = reproduce_plan.preset(_PRESET.value, tuple(cli.SET.value))
  workdir = pathlib.Path(cli.WORKDIR.value or f"runs/reproduce_{preset.name}")
  if _LIST.value:
    show_pieces(preset, read_results(workdir, preset), Console())
  elif _REPORT.value:
    path = reproduce_report.write(preset, read_results(workdir, preset),
                                  _read_lines(workdir / "overlap.jsonl"), run.prepare(workdir),
                                  _NOTE.value)
    print(f"wrote {path}")
  else:
    try:
      pieces = None if _PIECE.value is None else [int(number) for number in _PIECE.value]
    except ValueError as error:
      raise UserError(f"--piece={','.join(_PIECE.value)}: give numbers, see --list") from error
    reproduce(preset, workdir, pieces)
