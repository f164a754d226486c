"""report.md of `experiments.reproduce`: tables, plots and verdicts from the rows of results."""

import collections
import pathlib

import numpy as np

from hysparse_jax import plots
from hysparse_jax.evals.recall import DEPTH_BINS

from . import plan as reproduce_plan
from . import verdicts
from .plan import ABLATIONS, HEADLINE, MODELS, Preset
from .verdicts import BITS, CLAIMS, RECALL

SHOWN = (*HEADLINE, *ABLATIONS, "hysparse_m3", "swa_m3")    # where not every model has room


def write(preset: Preset, results: list[dict], overlap: list[dict], workdir,
          note: str = "") -> pathlib.Path:
  """Writes report.md and its plots; what was not run yet is named as missing.

  `note` says what the rows cannot, such as runs that shared a GPU; it comes at the head.
  """
  workdir = pathlib.Path(workdir)
  final = chosen_rows(results)
  parts = [_head(preset, results, final), note]
  if final:
    groups = collections.defaultdict(dict)
    for model, rows in final.items():
      groups[rows[0]["seq_len"], rows[0]["tokens"]][model] = rows
    for (seq_len, tokens), models in groups.items():
      parts += [f"## Models: rows of {seq_len:,}, {tokens:,} tokens each", _models_table(models)]
    main = groups[preset.base.data.seq_len, reproduce_plan.tokens_of(preset.base)]
    if main:
      parts += [_verdicts(preset, main), _identical(results, main, preset.lengths),
                _plots(preset, main, workdir),
                f"## Tasks at {max(trained_lengths(preset)):,} tokens", _task_table(preset, main)]
  parts += [_tuning(results), _base_rates(preset, results, workdir)]
  for model in dict.fromkeys(row["model"] for row in overlap):
    parts.append(_mechanism(model, [row for row in overlap if row["model"] == model], workdir))
  path = workdir / "report.md"
  path.write_text("\n\n".join(part for part in parts if part) + "\n")
  return path


def chosen_rows(results, rate: float | None = None) -> dict[str, list[dict]]:
  """The rows that count, by model and ascending seed: those trained at the family's tuned rate.

  With `rate`, those trained at that multiple of the base rates, whatever tuning chose.
  """
  final = {}
  for model in MODELS:
    wanted = rate or reproduce_plan.tuned_rate(results, reproduce_plan.family(model))
    rows = [row for row in results
            if row["model"] == model and not row["tuning"] and row["rate"] == wanted
            and not row.get("again")]
    if rows:
      final[model] = sorted(rows, key=lambda row: row["seed"])
  return final


def mean_recall(row, lengths) -> float:
  """Percent: the mean over tasks of RULER's match rule, at those of the lengths that it has."""
  cells = [row["recall"][task][row["lengths"].index(length)]
           for task in row["recall"] for length in lengths if length in row["lengths"]]
  cells = [cell for cell in cells if cell is not None]
  return 100 * float(np.mean(cells)) if cells else float("nan")


def trained_lengths(preset: Preset):
  """The lengths that no longer than the training rows are."""
  return [length for length in preset.lengths if length <= preset.base.data.seq_len]


def _head(preset, results, final):
  kinds = {name: sorted({str(row[name]) for row in results})
           for name in ("device", "jax", "commit")}
  cfg = preset.base
  repeated = {(row["model"], row["seed"]) for row in results if row.get("again")}
  missing = []
  for piece in preset.pieces:
    for run in (run for run in piece.runs if not run.tuning):
      rows = final if run.rate is None else chosen_rows(results, run.rate)
      if not ((run.model, run.seed) in repeated if run.again else
              any(row["seed"] == run.seed for row in rows.get(run.model, ()))):
        missing.append(piece.name)
  lines = [
    f"# HySparse, reproduced small: preset `{preset.name}`", "",
    f"    python -m experiments.reproduce --preset={preset.name}", "",
    f"{cfg.model.num_layers} layers of width {cfg.model.d_model}, {cfg.model.num_heads} query and "
    f"{cfg.model.num_kv_heads} KV heads of {cfg.model.head_dim}; rows of {cfg.data.seq_len:,} "
    f"tokens, {reproduce_plan.tokens_of(cfg):,} tokens a model, the same batches for the same "
    f"seed. {cfg.data.task_share:.0%} of the rows are recall tasks whose answers alone carry loss "
    f"(all of a row's answers together {cfg.data.task_weight:g} of a text row's weight), the rest "
    f"is Python source as bytes (`data.source={cfg.data.source}`). Parameters outside embedding "
    "and head agree within 1 %, by the width of the FFN. Positions of task rows are spread over "
    f"up to {cfg.data.task_positions:,} (PoSE), so that longer contexts are not unseen distances. "
    f"Task samples grow from 64 tokens to whole rows over {cfg.data.task_warmup_steps:,} of "
    f"{cfg.train.steps:,} steps.",
    "", "; ".join(f"{name}: {', '.join(values) or '-'}" for name, values in kinds.items()) + "."]
  if missing:
    lines += ["", f"Not run yet: {', '.join(missing)}."]
  return "\n".join(lines)


def spread(values, spelling) -> str:
  """Mean ± standard deviation of what is there, in a format such as ".3f"."""
  values = [value for value in values if value is not None and not np.isnan(value)]
  if not values:
    return "-"
  text = f"{np.mean(values):{spelling}}"
  return f"{text} ± {np.std(values, ddof=1):{spelling}}" if len(values) > 1 else text


def _models_table(models):
  lengths = next(iter(models.values()))[0]["lengths"]
  head = ["model", "what", "body params", "KV bytes/token",
          f"cache at {next(iter(models.values()))[0]['kv_tokens']:,}", "bits/byte",
          *(f"recall {length // 1024}k" if length >= 1024 else f"recall {length}"
            for length in lengths), "tokens/s", "seeds"]
  lines = ["Mean ± standard deviation over seeds. Recall in percent: mean over the "
           f"{len(models[next(iter(models))][0]['recall'])} tasks of the share of references given "
           "(RULER's rule); lengths beyond the training rows are extrapolation.", "",
           "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
  for model in sorted(models, key=_order):
    rows = models[model]
    lines.append("| " + " | ".join([
      model, MODELS[model][0], f"{rows[0]['body_params']:,}",
      f"{rows[0]['kv_bytes_per_token']:,}", f"{rows[0]['kv_bytes_total'] / 1e6:.1f} MB",
      spread([row["bits_per_byte"] for row in rows], ".4f"),
      *(spread([mean_recall(row, [length]) for row in rows], ".1f") for length in lengths),
      spread([row["tokens_per_second"] for row in rows], ",.0f"), str(len(rows))]) + " |")
  return "\n".join(lines)


def _order(model):
  return list(MODELS).index(model)


def _verdicts(preset, models):
  planned = {run.model for piece in preset.pieces for run in piece.runs}
  return "\n".join([
    "## The paper's claims", "",
    "d: by how much the second model is worse. e: half the 95 % interval of d, from one standard "
    "deviation pooled over all models with more than one seed. \"Worse\" is reproduced if "
    "d - e > 0 and not if d + e stays below the margin "
    f"({RECALL.margin:g} points of recall, {BITS.margin:g} bits per byte); \"no worse\" is "
    "reproduced if d + e stays below the margin and d - e is not above 0, and not if it is. "
    "Anything else is not decidable here (`experiments/reproduce/verdicts.py`).", "",
    *_verdict_lines(preset, models, [claim for claim in CLAIMS
                                     if {claim.reference, claim.other} <= planned])])


def _verdict_lines(preset, models, claims):
  inside = trained_lengths(preset)
  beyond = [length for length in preset.lengths if length not in inside]
  of_rows = lambda value: {model: [value(row) for row in rows] for model, rows in models.items()}
  figures = [(RECALL, f"recall {where} {max(inside):,}",
              of_rows(lambda row, lengths=lengths: mean_recall(row, lengths)))
             for where, lengths in (("to", inside), ("beyond", beyond)) if lengths]
  figures.append((BITS, "bits per byte", of_rows(lambda row: row["bits_per_byte"])))
  lines = ["| claim | figure | d | e | verdict |", "|---|---|---|---|---|"]
  for claim in claims:
    for figure, name, values in figures:
      found = verdicts.decide(claim, figure, values)
      show = lambda number: "-" if not np.isfinite(number) else f"{number:+.3f}"
      lines.append(f"| {claim.text} | {name} | {show(found.difference)} | "
                   f"{show(found.error).replace('+', '±')} | **{found.outcome}**: {found.reason} |")
  return lines


def _identical(results, models, lengths):
  """What a run made twice, with the same seed, differs by."""
  lines = []
  for again in (row for row in results if row.get("again")):
    for row in models.get(again["model"], ()):
      if (row["seed"], row["rate"]) == (again["seed"], again["rate"]):
        bits = abs(row["bits_per_byte"] - again["bits_per_byte"])
        points = [abs(mean_recall(row, [n]) - mean_recall(again, [n])) for n in lengths]
        lines.append(f"`{row['model']}`, seed {row['seed']}, trained twice on {row['device']}: "
                     f"bits per byte differ by {bits:.4f}, mean recall by at most "
                     f"{max(points):.1f} points at any length.")
  return "\n".join(["## Two identical runs", "", *lines]) if lines else ""


def _quality(preset, models, path):
  inside = trained_lengths(preset)
  points = {model: (rows[0]["kv_bytes_total"], [row["bits_per_byte"] for row in rows],
                    [mean_recall(row, inside) for row in rows])
            for model, rows in sorted(models.items(), key=lambda pair: _order(pair[0]))}
  return plots.quality_against_cache(points, path, tokens=max(preset.lengths))


def _plots(preset, models, workdir):
  folder = workdir / "plots"
  paths = [_quality(preset, models, folder / "quality_against_cache.png")]
  shown = [model for model in SHOWN if model in models]
  paths.append(plots.lines_by_length(
    {model: [[mean_recall(row, [length]) for length in preset.lengths] for row in models[model]]
     for model in shown}, preset.lengths, folder / "recall_by_length.png",
    title="Recall, mean over tasks", y_name="references given (%)"))
  depths = [f"{(bin + 0.5) / DEPTH_BINS:.1f}" for bin in range(DEPTH_BINS)]
  labels = [f"{length:,}" for length in preset.lengths]
  for model in (model for model in HEADLINE if model in models):
    cells = np.array([[[np.nan if cell is None else cell for cell in line] for line in grid]
                      for row in models[model] for grid in row["by_depth"].values()], float)
    seen = ~np.isnan(cells)
    mean = np.where(seen, cells, 0).sum(axis=0) / np.maximum(seen.sum(axis=0), 1)
    mean[~seen.any(axis=0)] = np.nan
    paths.append(plots.heat_map(mean, labels, depths, folder / f"depth_{model}.png",
                                title=f"{model}: answers right", x_name="tokens",
                                y_name="depth of the evidence"))
  return "\n".join(["## Pictures", "", *(
    f"![{path.stem.replace('_', ' ')}](plots/{path.name})" for path in paths)])


def _task_table(preset, models):
  length = max(trained_lengths(preset))
  shown = [model for model in SHOWN if model in models]
  lines = ["Recall, percent, and exact-set F1 in brackets; means over seeds.", "",
           "| task | " + " | ".join(shown) + " |", "|" + "---|" * (len(shown) + 1)]
  for task in preset.tasks:
    cells = []
    for model in shown:
      pair = [[row[name][task][row["lengths"].index(length)] for row in models[model]]
              for name in ("recall", "f1")]
      recall, f1 = ([value for value in values if value is not None] for values in pair)
      cells.append(f"{100 * np.mean(recall):.0f} ({100 * np.mean(f1):.0f})" if recall else "-")
    lines.append(f"| {task} | " + " | ".join(cells) + " |")
  return "\n".join(lines)


def _tuning(results):
  rows = [row for row in results if row["tuning"]]
  if not rows:
    return ("## Learning rates\n\nNot tuned: every model ran at the preset's base rates.")
  lines = ["## Learning rates", "",
           "Final training loss (mean of the last tenth of the steps) of short runs; the lowest is "
           "what a family's models use.", "",
           "| model | " + " | ".join(f"x{rate:g}" for rate in reproduce_plan.RATES) + " | chosen |",
           "|" + "---|" * (len(reproduce_plan.RATES) + 2)]
  for model in HEADLINE:
    losses = {row["rate"]: row["train_loss"] for row in rows if row["model"] == model}
    cells = [f"{losses[rate]:.4f}" if rate in losses else "-" for rate in reproduce_plan.RATES]
    lines.append(f"| {model} | " + " | ".join(cells)
                 + f" | x{reproduce_plan.tuned_rate(results, model):g} |")
  return "\n".join(lines)


def _base_rates(preset, results, workdir):
  """The same models and claims where all are trained at the base rates.

  Nothing where no model has such rows besides those that tuning chose.
  """
  same = lambda row: (row["seq_len"], row["tokens"]) == (
    preset.base.data.seq_len, reproduce_plan.tokens_of(preset.base))
  models = {model: rows for model, rows in chosen_rows(results, 1.0).items() if same(rows[0])}
  tuned = chosen_rows(results)
  if all(rows == tuned.get(model) for model, rows in models.items()):
    return ""
  claims = [claim for claim in CLAIMS if claim.reference in models and claim.other in models]
  path = _quality(preset, models, workdir / "plots" / "quality_against_cache_base_rates.png")
  return "\n".join([
    "## All at the base learning rates", "",
    "What tuning chose differs between families, and rates alone change which tasks are learned. "
    "Here every model has the base rates (x1).", "", _models_table(models), "",
    *_verdict_lines(preset, models, claims), "",
    f"![quality against cache, base rates](plots/{path.name})", "", _task_table(preset, models)])


def _mechanism(model, overlap, workdir):
  last = max(row["step"] for row in overlap)
  now = [row for row in overlap if row["step"] == last]
  lines = [f"## What the oracle does: {MODELS[model][0]}", "",
           f"The run `{model}-s{now[0]['seed']}` (`overlap.jsonl`), held-out rows of "
           f"{now[0]['seq_len']:,} tokens, {now[0]['picks']} blocks of {now[0]['block_size']} a "
           f"token. Attention mass that the picked blocks hold at step {last:,}, by layer, the "
           "choosing ones bold; a sparse layer's is what its queries would give to all keys, "
           "though only picked ones ever trained them (random blocks: "
           f"{now[0]['chance']:.3f}): " + ", ".join(
             f"{'**' * (not row['distance'])}{row['layer']}{'**' * (not row['distance'])}: "
             f"{row['coverage']:.3f}" for row in now) + ".", ""]
  gates = [row for row in now if row["gate_sparse"] is not None]
  if gates:
    show = lambda value: "-" if value is None else f"{value:.2f}"
    lines += ["Mean gates by layer (sparse, local): " + "; ".join(
      f"{row['layer']}: {show(row['gate_sparse'])}, {show(row['gate_local'])}" for row in gates)
      + ".", ""]
  selecting = [row for row in overlap if "union" in row]
  if selecting:
    widths = sorted({int(width) for row in selecting for width in row["union"]})
    lines += ["Distinct blocks among the picks of w consecutive tokens:", "",
              "| step | layer | new per token | " + " | ".join(f"U({w})" for w in widths) + " |",
              "|" + "---|" * (len(widths) + 3)]
    series = collections.defaultdict(lambda: collections.defaultdict(list))
    for row in selecting:
      union = {int(width): value for width, value in row["union"].items()}
      lines.append(f"| {row['step']:,} | {row['layer']} | {row['new_per_token']:.2f} | "
                   + " | ".join(f"{union[w]:.1f}" if w in union else "-" for w in widths) + " |")
      for width, value in union.items():
        series[row["layer"]][width].append((row["step"], value))
    path = plots.overlap_by_step(series, workdir / "plots" / model / "overlap_by_step.png")
    lines += ["", f"![overlap by step](plots/{model}/{path.name})"]
  names = [name for name in ("oracle_coverage", "oracle_blocks", "oracle_overlap")
           if (workdir / "plots" / model / f"{name}.png").is_file()]
  lines += ["", *(f"![{name.replace('_', ' ')}](plots/{model}/{name}.png)" for name in names)]
  return "\n".join(lines)
