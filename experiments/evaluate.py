"""Evaluates the newest good checkpoint of a run: loss, needles, recall tasks, the oracle's figures.

    python -m experiments.evaluate --workdir=runs/tiny [--tasks=heldout,needle,oracle] [--json]
        [--batches=8] [--seq_len=4096] [--lengths=256,512] [--depths=0,0.5,1] [--samples=4]
        [--mesh=fsdp=2,tensor=2] [--dtype=bfloat16]
    python -m experiments.evaluate --workdir=runs/tiny --tasks=ruler,mqar,copy
        [--lengths=2048,4096,8192,16384,32768] [--samples=16] [--form=tokens|text]

    heldout  loss in nats per token and bits per byte, whole and by position in the document
    needle   recall of a value by its key, over lengths and depths (hysparse_jax/evals/needle.py)
    oracle   of attention="hysparse": overlap of neighbouring tokens' selections, attention mass the
             selection covers in every layer, mean gates (hysparse_jax/evals/oracle.py)
    ruler    the 13 RULER tasks; any of them, mqar and copy can be named alone. `--form=tokens`
             (hysparse_jax/tasks/token_tasks.py): ids for models trained on them (data.task_share),
             one forward pass over the answer. `--form=text` (tasks/text_tasks.py): the benchmark's
             prompts, answers generated through the cache

Prints a table per task, or with --json one object per line and task, as soon as it is there;
pictures go to <workdir>/plots/. Nothing else in the run's folder is touched.
"""

import contextlib
import math
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from absl import flags
from rich import box
from rich.console import Console
from rich.table import Table

from hysparse_jax import sharding
from hysparse_jax.config import Config
from hysparse_jax.data import batches as data
from hysparse_jax.errors import UserError
from hysparse_jax.evals.needle import needle
from hysparse_jax.evals.oracle import UNION_TOKENS, oracle
from hysparse_jax.evals.recall import DEPTH_BINS, recall, recall_text
from hysparse_jax.inference.load import load_run
from hysparse_jax.model.transformer import Transformer
from hysparse_jax.tasks import text_tasks, token_tasks
from hysparse_jax.training.heldout import heldout

from . import cli

for _flag in (cli.WORKDIR, cli.MESH, cli.DTYPE, cli.JSON):
  flags.declare_key_flag(_flag)
_TASKS = flags.DEFINE_list("tasks", None, "Of heldout, needle, oracle, ruler, and the recall tasks "
                                          "by name; default: the first three, if the model has "
                                          "them.")
_FORM = flags.DEFINE_enum("form", "tokens", ["tokens", "text"], "Of the recall tasks.")
_BATCHES = flags.DEFINE_integer("batches", 8, "Held-out batches for heldout and oracle.")
_SEQ_LEN = flags.DEFINE_integer("seq_len", None, "Tokens per row of heldout and oracle; default: "
                                                 "data.seq_len.")
_LENGTHS = flags.DEFINE_list("lengths", None, "Needle and recall tasks: tokens; default: a "
                                              "quarter, half and all of data.seq_len, each at "
                                              "least 64 and what the tasks need.")
_DEPTHS = flags.DEFINE_list("depths", ["0", "0.25", "0.5", "0.75", "1"],
                            "Needle: places, 0 the start, 1 right before the question.")
_SAMPLES = flags.DEFINE_integer("samples", 4, "Needle: puzzles per length and depth; recall tasks: "
                                            "per length.")
_DISTRACTORS = flags.DEFINE_integer("distractors", 0, "Needle: further lines with other keys.")
_NEEDLE_SEED = flags.DEFINE_integer("needle_seed", 0, "Needle: of keys, values and text.",
                                    lower_bound=0)

ALL_TASKS = ("heldout", "needle", "oracle")
USED = {"heldout": ("batches", "seq_len"), "oracle": ("batches", "seq_len"),
        "needle": ("lengths", "depths", "samples", "distractors", "needle_seed")}
USED_BY_RECALL = ("lengths", "samples", "form")
FORMS = {"tokens": token_tasks, "text": text_tasks}   # by --form: each has TASKS and RULER


class Settings(NamedTuple):
  """What to evaluate with; None takes what the run's config says."""

  batches: int = 8
  seq_len: int | None = None
  lengths: tuple[int, ...] | None = None
  depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
  samples: int = 4
  distractors: int = 0
  needle_seed: int = 0
  form: str = "tokens"


class _Run(NamedTuple):
  cfg: Config
  model: Transformer
  tokenizer: object
  plots: pathlib.Path


def evaluate(workdir, tasks=None, settings: Settings | None = None,
             console: Console | None = None, *, on_row: Callable[[dict], None] | None = None,
             **load_options) -> list[dict]:
  """Runs the tasks on the run in `workdir`; one JSON-ready row per task.

  Args:
    workdir: of `experiments.train`.
    tasks: of `ALL_TASKS` and the `TASKS` of the form, or "ruler" for its 13; None: those of
      `ALL_TASKS` that the model has.
    settings: None: the defaults.
    console: where tables go; None: nowhere.
    on_row: called with each row as soon as it is there.
    **load_options: mesh and dtype of `load_run`.

  Raises:
    UserError: no such task, no run or checkpoint, a setting that cannot be.
  """
  settings = Settings() if settings is None else settings
  tasks, asked = _known(tasks, settings.form)
  if not workdir:
    raise UserError("--workdir is missing; name the folder of a run, such as runs/tiny")
  loaded = load_run(workdir, **load_options)
  cfg = loaded.cfg
  run = _Run(cfg, loaded.model, loaded.tokenizer, pathlib.Path(workdir) / "plots")
  if tasks is None:
    has_oracle = cfg.model.attention == "hysparse" and "sparse" in cfg.model.layer_kinds
    tasks = ALL_TASKS if has_oracle else ALL_TASKS[:2]
  parts = [([task], {"heldout": _heldout, "needle": _needle, "oracle": _oracle}[task])
           for task in tasks] + ([(asked, _recall)] if asked else [])
  rows = []
  show = lambda part: console is None or console.print(part, soft_wrap=isinstance(part, str),
                                                       highlight=False)
  for names, function in parts:
    with _on_mesh(load_options.get("mesh"), settings, names, cfg):
      if function is _recall:
        found, shown, draw = _recall(run, settings, names)
      else:
        row, shown, draw = function(run, settings)
        found = [row]
    for part in shown:
      show(part)
    paths = cli.drawn(draw)
    for part in (*(f"wrote {path}" for path in paths), ""):
      show(part)
    for task, row in zip(names, found):
      rows.append({"task": task, "step": loaded.step, **row, "plots": paths})
      if on_row is not None:
        on_row(rows[-1])
  return rows


def _on_mesh(mesh, settings, tasks, cfg):
  """The mesh, for whatever runs in it; a UserError where its batch axes cannot split the rows."""
  if mesh is None:
    return contextlib.nullcontext()
  parts = math.prod(mesh.shape[axis] for axis in sharding.BATCH_AXES)
  rows = {"--samples": settings.samples} if tasks == ["needle"] else (
    {"data.batch_size": cfg.data.batch_size} if tasks[0] in ALL_TASKS else {"a row": 1})
  for name, count in rows.items():
    if count % parts:
      raise UserError(f"{'/'.join(tasks)}: {name}={count} cannot be split over the mesh's data * "
                      f"fsdp * expert = {parts}; choose sizes that divide it, or split by tensor")
  return jax.set_mesh(mesh)


def _known(tasks, form):
  """The tasks of `ALL_TASKS` asked for (None: whatever there is) and the recall tasks."""
  if tasks is None:
    return None, []
  if not tasks:
    raise UserError(f"--tasks is empty; give some of {', '.join(ALL_TASKS)}, ruler, "
                    f"{', '.join(FORMS[form].TASKS)}, or leave it out")
  recall_tasks = FORMS[form].TASKS
  first, asked = [], []
  for task in tasks:
    if task == "ruler":
      asked += FORMS[form].RULER
    elif task in ALL_TASKS:
      first.append(task)
    elif task in recall_tasks:
      asked.append(task)
    elif form == "text" and task in token_tasks.TASKS:
      text_tasks.check_task(task)
    else:
      raise UserError(f"unknown task {task!r}; allowed: {', '.join(ALL_TASKS)}, ruler, "
                      f"{', '.join(recall_tasks)}")
  return first, list(dict.fromkeys(asked))


def _batches(run, settings):
  seq_len = run.cfg.data.seq_len if settings.seq_len is None else settings.seq_len
  rows = max(1, run.cfg.data.batch_size * run.cfg.data.seq_len // max(seq_len, 1))
  return data.heldout_batches(run.cfg, settings.batches, rows, seq_len)


def _heldout(run, settings):
  batches = _batches(run, settings)
  chunk = run.cfg.train.loss_chunk
  seq_len = batches[0].tokens.shape[1]
  result = heldout(run.model, batches, run.tokenizer,
                   chunk if chunk and seq_len % chunk == 0 else 0)
  table = Table("position", "tokens", "nats/token", box=box.SIMPLE_HEAD)
  for start, end, loss, tokens in result.by_position:
    table.add_row(f"{start:,} to {end - 1:,}", f"{tokens:,}", f"{loss:.4f}")
  note = (f"held-out: {result.bits_per_byte:.4f} bits per byte, {result.loss:.4f} nats per token; "
          f"rows of {seq_len:,} tokens")
  by_position = [bucket._asdict() for bucket in result.by_position]
  return ({**result._asdict(), "by_position": by_position, "seq_len": seq_len}, [note, table],
          lambda: [])


def _lengths(run, settings, least: Callable[[], int]):
  """The lengths asked for; else those of the rows, each at least what the tasks need."""
  if settings.lengths is not None:
    return settings.lengths
  shortest = -(-least() // 64) * 64
  return tuple(sorted({max(shortest, run.cfg.data.seq_len // part) for part in (4, 2, 1)}))


def _heldout_tokens(run):
  documents = data.Corpus.open(run.cfg.data).heldout
  return run.tokenizer.encode_documents(documents)[0]


def _recall(run, settings, tasks):
  if settings.form == "text":
    lengths = _lengths(run, settings, lambda: max(
      text_tasks.min_length(task, run.tokenizer, number) for task in tasks
      for number in range(settings.samples)))
    result, ids = recall_text(run.model, run.tokenizer, tasks, lengths, settings.samples), None
  else:
    text_size = run.tokenizer.vocab_size
    trained = run.cfg.data.task_share > 0
    ids = token_tasks.ids_of(
      text_size + run.cfg.data.task_ids if trained else run.cfg.model.vocab_size, text_size)
    lengths = _lengths(run, settings,
                       lambda: max(token_tasks.min_length(task, ids) for task in tasks))
    # Ids above the text's: essays are held-out text. Else text would hold keys by accident.
    text = _heldout_tokens(run) if ids.first == text_size else None
    result = recall(run.model, ids, tasks, lengths, settings.samples, text=text)
  names = [f"{length:,}" for length in lengths]
  table = Table("recall (F1)", *names, box=box.SIMPLE_HEAD)
  for task, shares, f1 in zip(tasks, result.recall, result.f1):
    table.add_row(task, *(f"{a:.2f} ({b:.2f})" for a, b in zip(shares, f1)))
  note = (f"recall tasks, {settings.form} form, {settings.samples} samples per cell: references "
          "given by RULER's rule (exact-set F1)"
          + ("; answers scored in one forward pass" if ids else "; answers generated greedily"))

  def draw():
    from hysparse_jax import plots  # matplotlib is slow to import
    yield plots.heat_map(result.recall, names, tasks, run.plots / "recall.png",
                         title=f"Recall by task ({settings.form} form)", x_name="tokens",
                         y_name="")
    depths = [f"{(bin + 0.5) / DEPTH_BINS:.1f}" for bin in range(DEPTH_BINS)]
    for task, row, by_depth in zip(tasks, rows, result.by_depth if ids else ()):
      if "by_depth" in row:
        yield plots.heat_map(
          by_depth, names, depths, run.plots / f"recall_{task}.png",
          title=f"{task}: answers right", x_name="tokens", y_name="depth of the evidence")

  rows = []
  for index in range(len(tasks)):
    row = {name: getattr(result, name)[index].tolist() for name in ("recall", "f1", "exact")}
    if ids is not None and not np.isnan(result.by_depth[index]).all():
      row["by_depth"] = result.by_depth[index].tolist()
    rows.append({"form": settings.form, "lengths": list(lengths), **row,
                 "samples": settings.samples, "ids": ids and ids._asdict()})
  return rows, [note, table], draw


def _needle(run, settings):
  lengths = _lengths(run, settings, lambda: 64)
  result = needle(run.model, run.tokenizer, _heldout_tokens(run), lengths, settings.depths,
                  settings.samples, settings.needle_seed, settings.distractors)
  table = Table("depth", *(f"{length:,} tokens" for length in result.lengths), box=box.SIMPLE_HEAD)
  for depth, exact, tokens in zip(result.depths, result.accuracy, result.token_accuracy):
    table.add_row(f"{depth:g}", *(f"{a:.2f} ({b:.2f})" for a, b in zip(exact, tokens)))
  note = (f"needle: values recalled (value tokens right, one by one); {settings.samples} puzzles "
          f"per cell, {settings.distractors} distractors; mean log-likelihood "
          f"{result.log_likelihood.mean():.2f} nats per value token")

  def draw():
    from hysparse_jax import plots  # matplotlib is slow to import
    for name, title, values in (
        ("needle", "Needle: values recalled", result.accuracy),
        ("needle_tokens", "Needle: value tokens right, one by one", result.token_accuracy)):
      yield plots.heat_map(values, [f"{length:,}" for length in result.lengths],
                           [f"{depth:g}" for depth in result.depths], run.plots / f"{name}.png",
                           title=title, x_name="tokens", y_name="depth of the needle")

  row = {name: getattr(result, name).tolist()
         for name in ("accuracy", "token_accuracy", "log_likelihood")}
  return {"lengths": list(result.lengths), "depths": list(result.depths), **row,
          "samples": settings.samples, "distractors": settings.distractors}, [note, table], draw


def _oracle(run, settings):
  batches = _batches(run, settings)
  result = oracle(run.model, batches)
  seq_len = batches[0].tokens.shape[1]
  table = Table("layer", "behind", "mass", "new", *(f"U({width})" for width in UNION_TOKENS),
                "sparse", "local", box=box.SIMPLE_HEAD)
  show = lambda value, spelling=".2f": "-" if value is None else f"{value:{spelling}}"
  for layer in result.layers:
    overlap = layer.overlap
    union = {} if overlap is None else overlap.union
    table.add_row(
      str(layer.layer), {0: "full", None: "-"}.get(layer.distance, f"+{layer.distance}"),
      show(layer.coverage, ".3f"), show(overlap and overlap.new_per_token),
      *(show(union.get(width), ".1f") for width in UNION_TOKENS), show(layer.gate_sparse),
      show(layer.gate_local))
  picks = run.cfg.model.num_blocks
  note = (f"oracle: behind = layers since the full one, mass = attention mass its {picks} blocks "
          "cover, new = blocks new per token, U(w) = distinct blocks of w consecutive tokens, "
          f"sparse and local = mean gates; rows of {seq_len:,} tokens, of which "
          f"{result.choosing_tokens:,} could choose")
  if result.choosing_tokens == 0:
    note += f": none sees more than {picks} blocks, give a longer --seq_len"
  reach = "mass covered by layers since the full one: " + ", ".join(
    f"{distance}: {share:.3f}" for distance, share in result.coverage_by_distance.items())
  reach += f"; by blocks at random: {result.chance:.3f}"

  def draw():
    from hysparse_jax import plots  # matplotlib is slow to import
    return plots.oracle_figures(result, run.plots, block_size=run.cfg.model.block_size)

  layers = [layer._asdict() | {"overlap": layer.overlap and layer.overlap._asdict()}
            for layer in result.layers]
  row = {"layers": layers, "coverage_by_distance": result.coverage_by_distance,
         "chance": result.chance, "choosing_tokens": result.choosing_tokens,
         "seq_len": seq_len}
  return row, [note, table, reach], draw


def _numbers(flag, kind):
  """The values of a list flag; a UserError names the one that is none."""
  values = []
  if not flag.value:
    raise UserError(f"--{flag.name} is empty; give numbers, or leave it out")
  for text in flag.value:
    try:
      value = kind(text)
    except ValueError as error:
      raise UserError(f"--{flag.name}: {text!r} is not a number") from error
    if not math.isfinite(value):
      raise UserError(f"--{flag.name}: {text!r} is not finite")
    values.append(value)
  return tuple(values)


def main(argv):
  """Entry point."""
  del argv
  settings = Settings(
    batches=_BATCHES.value, seq_len=_SEQ_LEN.value,
    lengths=None if _LENGTHS.value is None else _numbers(_LENGTHS, int),
    depths=_numbers(_DEPTHS, float), samples=_SAMPLES.value, distractors=_DISTRACTORS.value,
    needle_seed=_NEEDLE_SEED.value, form=_FORM.value)
  _check_used(ALL_TASKS if _TASKS.value is None else _TASKS.value)
  to_line = lambda row: print(cli.to_json(row), flush=True)
  evaluate(cli.WORKDIR.value, _TASKS.value, settings, None if cli.JSON.value else Console(),
           on_row=to_line if cli.JSON.value else None, **cli.load_options())


def _check_used(tasks):
  """Raises a UserError for a flag that none of the tasks uses."""
  used = {name for task in tasks for name in USED.get(task, USED_BY_RECALL)}
  for name in sorted({*USED_BY_RECALL}.union(*USED.values()) - used):
    if flags.FLAGS[name].present and tasks:
      raise UserError(f"--{name} is not used by --tasks={','.join(tasks)}; leave it out")


if __name__ == "__main__":
  cli.run(main)
