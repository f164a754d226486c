"""PNG pictures of a run and of what the oracle does. One function per figure.

Figures are made without pyplot, whose backend belongs to the process (a notebook's, say).
"""

import pathlib

import matplotlib
import numpy as np
from matplotlib import ticker
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from hysparse_jax import accounting
from hysparse_jax.config import ModelConfig


def _subplots(rows: int = 1, columns: int = 1, *, figsize, **layout):
  """A figure and its axes, as `pyplot.subplots` gives them."""
  figure = Figure(figsize=figsize)
  FigureCanvasAgg(figure)
  return figure, figure.subplots(rows, columns, **layout)


def _save(figure, path):
  """Writes a picture whole or not at all."""
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  scratch = path.with_suffix(".tmp.png")
  figure.savefig(scratch, dpi=120, bbox_inches="tight")
  scratch.replace(path)
  return path


def run_figures(rows: list[dict], folder) -> list[pathlib.Path]:
  """loss.png, learning_rate.png and, where logged, gates.png and expert_load.png.

  Args:
    rows: of metrics.jsonl, see `metrics.read`.
    folder: where the pictures go.
  """
  folder = pathlib.Path(folder)
  paths = []
  train = [(row["step"], row["loss"]) for row in rows if row.get("loss") is not None]
  heldout = [(row["step"], row["heldout_loss"]) for row in rows if "heldout_loss" in row]
  if train:
    figure, axes = _subplots(figsize=(7, 4))
    axes.plot(*zip(*train), linewidth=0.7, alpha=0.6, label="train")
    if heldout:
      axes.plot(*zip(*heldout), marker="o", label="held-out")
    axes.set(xlabel="step", ylabel="loss (nats per token)", title="Loss")
    axes.legend()
    axes.grid(alpha=0.3)
    paths.append(_save(figure, folder / "loss.png"))
  rates = [(row["step"], row["lr"]) for row in rows if "lr" in row]
  if rates:
    figure, axes = _subplots(figsize=(7, 3))
    axes.plot(*zip(*rates))
    axes.set(xlabel="step", ylabel="learning rate", title="Learning rate")
    axes.grid(alpha=0.3)
    paths.append(_save(figure, folder / "learning_rate.png"))
  gates = [row for row in rows if "gate_local" in row or "gate_sparse" in row]
  if gates:
    paths.append(_save(_gates(gates), folder / "gates.png"))
  loads = [row for row in rows if "expert_load" in row]
  if loads:
    load = np.asarray(loads[-1]["expert_load"])                    # [L, E]
    figure, axes = _subplots(figsize=(8, 4))
    image = axes.imshow(load * load.shape[1], aspect="auto", vmin=0, cmap="viridis")
    axes.set(xlabel="expert", ylabel="layer",
             title=f"Expert load at step {loads[-1]['step']} (1 = its even share)")
    figure.colorbar(image)
    paths.append(_save(figure, folder / "expert_load.png"))
  return paths


def _gates(rows):
  branches = [name for name in ("gate_sparse", "gate_local") if name in rows[0]]
  figure, axes = _subplots(1, len(branches), figsize=(6 * len(branches), 4), sharey=True,
                              squeeze=False)
  for axis, name in zip(axes[0], branches):
    values = np.asarray([[np.nan if v is None else v for v in row[name]] for row in rows])
    steps = [row["step"] for row in rows]
    for layer in np.flatnonzero(~np.isnan(values).all(0)):
      axis.plot(steps, values[:, layer], label=f"layer {layer}")
    axis.set(xlabel="step", title=f"mean {name.replace('_', ' ')}")
    axis.grid(alpha=0.3)
  axes[0, 0].set_ylabel("sigmoid gate, mean over tokens and heads")
  axes[0, -1].legend(fontsize=7, ncol=2)
  return figure


def architecture(cfg: ModelConfig, path, *, title: str):
  """A config's layers and whose KV each reads; beside it the cache of it and its baselines."""
  figure, (left, right) = _subplots(1, 2, figsize=(13, 3.8), width_ratios=(2, 1))
  full_color, sparse_color, ring_color = "#1f3b5c", "#8fb8de", "#f2a65a"
  start = 0
  for layer, kind in enumerate(cfg.layer_kinds):
    if kind == "full":
      start = layer
      left.add_patch(Rectangle((layer, 0), 0.8, 2.0, color=full_color))
    if kind == "sparse":
      left.add_patch(Rectangle((layer, 0), 0.8, 1.0, color=sparse_color))
    if cfg.has_local_branch(kind):
      left.add_patch(Rectangle((layer, 0), 0.8, 0.25, color=ring_color))
    if kind == "sparse":
      left.annotate("", (layer + 0.4, 1.02), (start + 0.8, 1.8), arrowprops=dict(
        arrowstyle="-|>", color="0.45", linewidth=0.6, mutation_scale=6,
        connectionstyle="arc3,rad=-0.15"))
  left.set(xlim=(-0.5, cfg.num_layers + 0.3), ylim=(-1.25, 2.1), yticks=[], xlabel="layer")
  left.spines[["left", "right", "top"]].set_visible(False)
  names = [(full_color, "full attention: keeps all KV, selects "
                        f"{cfg.num_blocks} blocks of {cfg.block_size} keys per token"),
           (sparse_color, "sparse: reads those blocks of the full layer's KV"),
           (ring_color, f"its own window of {cfg.window} tokens")]
  left.legend([Rectangle((0, 0), 1, 1, color=color) for color, _ in names],
              [name for _, name in names], loc="lower center", fontsize=8, frameon=False,
              handlelength=1.0, labelspacing=0.25)
  left.set_title(title)
  tokens = 2 ** np.arange(10, 21)
  full, swa = (accounting.baselines(cfg)[name] for name in ("full", "swa"))
  totals = {}
  for name, model, color, style in (("full attention", full, "#b03a2e", "-"),
                                    ("HySparse", cfg, full_color, "-"),
                                    ("Hybrid SWA", swa, ring_color, "--")):
    totals[name] = [accounting.account(model, int(n)).kv_bytes_total / 1e9 for n in tokens]
    right.plot(tokens, totals[name], style, color=color, label=name)
  more, less = totals["full attention"][-3], totals["HySparse"][-3]
  right.annotate(f"{more / less:.1f}x", (tokens[-3], (more * less) ** 0.5), ha="center")
  right.set_xscale("log", base=2)
  right.set_yscale("log")
  right.set(xlabel="tokens", ylabel="GB (bf16)", title="KV cache of one sequence")
  right.legend(fontsize=8)
  right.grid(alpha=0.3)
  return _save(figure, path)


def compare_runs(runs: dict, path):
  """Training loss (smoothed) and held-out points of several runs, from `metrics.read` each."""
  figure, axes = _subplots(figsize=(7, 4))
  for color, (name, rows) in zip(("tab:blue", "tab:red", "tab:orange", "tab:green"), runs.items()):
    steps, losses = zip(*((row["step"], row["loss"]) for row in rows
                          if row.get("loss") is not None))
    width = max(1, len(losses) // 20)
    smooth = np.convolve(losses, np.ones(width) / width, mode="valid")
    axes.plot(steps[width - 1:], smooth, color=color, label=f"{name}, train")
    points = [(row["step"], row["heldout_loss"]) for row in rows if "heldout_loss" in row]
    if points:
      axes.plot(*zip(*points), "o", color=color, label=f"{name}, held-out")
  axes.set(xlabel="step", ylabel="loss (nats per token)")
  axes.legend(fontsize=8)
  axes.grid(alpha=0.3)
  return _save(figure, path)


def heat_map(values, x_labels, y_labels, path, *, title: str, x_name: str, y_name: str,
             limits=(0.0, 1.0)):
  """A labelled heat map with its values written in: f [len(y_labels), len(x_labels)]."""
  values = np.asarray(values, float)
  figure, axes = _subplots(figsize=(1.5 + 0.9 * len(x_labels), 1.5 + 0.6 * len(y_labels)))
  image = axes.imshow(values, vmin=limits[0], vmax=limits[1], cmap="RdYlGn", aspect="auto")
  axes.set_xticks(range(len(x_labels)), x_labels)
  axes.set_yticks(range(len(y_labels)), y_labels)
  axes.set(xlabel=x_name, ylabel=y_name, title=title)
  for (i, j), value in np.ndenumerate(values):
    axes.text(j, i, "-" if np.isnan(value) else f"{value:.2f}", ha="center", va="center",
              fontsize=8)
  figure.colorbar(image)
  return _save(figure, path)


def block_map(picked: dict, path, *, block_size: int):
  """The key blocks each token selects: a panel per full layer, rows tokens, columns key blocks.

  Args:
    picked: layer -> i32 [T, P] of one KV head, -1 for none.
    path: of the PNG.
    block_size: keys per block, for the causal edge.
  """
  figure, axes = _subplots(1, len(picked), figsize=(1.5 + 3.2 * len(picked), 5), sharey=True,
                              squeeze=False)
  for axis, (layer, blocks) in zip(axes[0], picked.items()):
    blocks = np.asarray(blocks)
    tokens = len(blocks)
    columns = -(-tokens // block_size)
    chosen = np.zeros((tokens, columns + 1))
    np.put_along_axis(chosen, np.where(blocks < 0, columns, blocks), 1.0, axis=1)
    axis.imshow(chosen[:, :columns], aspect="auto", interpolation="nearest", cmap="Blues",
                vmin=0, vmax=1, extent=(0, columns, tokens, 0))
    axis.plot([0, columns], [0, columns * block_size], color="tab:red", linewidth=0.8)
    axis.set(xlabel="key block", title=f"layer {layer}", xlim=(0, columns), ylim=(tokens, 0))
  axes[0, 0].set_ylabel("token")
  figure.suptitle("Blocks each token picks (first KV head); red: the token itself")
  return _save(figure, path)


def coverage_by_layer(layers, path, *, chance: float):
  """Attention mass the shared selection covers: a bar per layer, f in [0, 1].

  Args:
    layers: (layer, layers since the full one, coverage) triples.
    path: of the PNG.
    chance: the share that as many blocks drawn at random would hold, drawn as a line.
  """
  number, distance, share = (np.asarray(column) for column in zip(*layers))
  figure, axis = _subplots(figsize=(2 + 0.45 * len(layers), 4))
  colors = np.where(distance == 0, "tab:red", "tab:blue")
  bars = axis.bar(number, share, color=colors)
  axis.bar_label(bars, fmt="%.2f", fontsize=7)
  axis.axhline(chance, color="black", linestyle="--", linewidth=0.8, label="blocks at random")
  axis.legend(fontsize=7)
  axis.set(xlabel="layer (red: the full layer that selects)", ylabel="share of attention mass",
           title="Mass the selected blocks cover", ylim=(0, 1.08), xticks=number)
  return _save(figure, path)


def overlap_by_layer(unions: dict, path):
  """Distinct blocks that w consecutive tokens select, a line per full layer.

  Args:
    unions: layer -> {w: mean number of distinct blocks}, w = 1 being what one token selects.
    path: of the PNG.
  """
  figure, axis = _subplots(figsize=(6, 4))
  for layer, union in unions.items():
    axis.plot(list(union), list(union.values()), marker="o", label=f"layer {layer}")
  axis.set_xscale("log", base=2)
  axis.set(xlabel="consecutive tokens w", ylabel="distinct blocks, mean",
           title="Union of neighbouring tokens' selections")
  axis.set_ylim(bottom=0)
  axis.legend(fontsize=7, ncol=2)
  axis.grid(alpha=0.3)
  return _save(figure, path)


def oracle_figures(result, folder, *, block_size: int) -> list[pathlib.Path]:
  """oracle_coverage.png, oracle_blocks.png and, where tokens choose, oracle_overlap.png.

  Args:
    result: an `evals.oracle.OracleResult`.
    folder: where the pictures go.
    block_size: keys per block.
  """
  folder = pathlib.Path(folder)
  paths = [
    coverage_by_layer([(layer.layer, layer.distance, layer.coverage)
                       for layer in result.layers if layer.coverage is not None],
                      folder / "oracle_coverage.png", chance=result.chance),
    block_map(result.picked, folder / "oracle_blocks.png", block_size=block_size)]
  unions = {layer.layer: {1: layer.overlap.picked, **layer.overlap.union}
            for layer in result.layers if layer.overlap is not None}
  if unions:
    paths.append(overlap_by_layer(unions, folder / "oracle_overlap.png"))
  return paths


def quality_against_cache(points: dict, path, *, tokens: int):
  """Held-out bits per byte and mean recall against the cache of one sequence, a point per model.

  Args:
    points: model -> (cache bytes, [bits per byte], [recall in percent]), one value per seed.
    path: of the PNG.
    tokens: that the cache holds.
  """
  figure, axes = _subplots(1, 2, figsize=(12, 4.2))
  for column, (axis, label) in enumerate(zip(axes, ("recall (%)", "held-out bits per byte")), 1):
    for index, (model, values) in enumerate(points.items()):
      seeds = np.asarray(values[3 - column], float)
      axis.errorbar(values[0] / 1e6, seeds.mean(), yerr=seeds.std(ddof=1) if seeds.size > 1 else 0,
                    marker="os^Dvp*X<>hd"[index % 12],
                    color=matplotlib.colormaps["tab20"](2 * index % 20 + index // 10 % 2),
                    capsize=3, linestyle="none", label=model)
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
    axis.xaxis.set_minor_formatter(ticker.NullFormatter())
    axis.set(xlabel=f"KV cache at {tokens:,} tokens (MB, bf16)", ylabel=label)
    axis.grid(alpha=0.3, which="both")
  axes[1].legend(fontsize=7, bbox_to_anchor=(1.02, 1), loc="upper left")
  return _save(figure, path)


def lines_by_length(lines: dict, lengths, path, *, title: str, y_name: str):
  """Lines over sequence lengths with the spread over seeds: name -> f [seeds, lengths]."""
  figure, axis = _subplots(figsize=(8.5, 4))
  for name, values in lines.items():
    values = np.asarray(values, float)
    spread = values.std(axis=0, ddof=1) if len(values) > 1 else None
    axis.errorbar(lengths, values.mean(axis=0), yerr=spread, marker="o", capsize=3, label=name)
  axis.set_xscale("log", base=2)
  axis.set_xticks(lengths, [f"{length:,}" for length in lengths])
  axis.set(xlabel="tokens", ylabel=y_name, title=title)
  axis.legend(fontsize=7, bbox_to_anchor=(1.02, 1), loc="upper left")
  axis.grid(alpha=0.3)
  return _save(figure, path)


def overlap_by_step(unions: dict, path):
  """U(w) over training, a panel per selecting layer: layer -> {w: [(step, U(w)), ...]}."""
  figure, axes = _subplots(1, len(unions), figsize=(1 + 4 * len(unions), 3.6), sharey=True,
                              squeeze=False)
  for axis, (layer, widths) in zip(axes[0], unions.items()):
    for width, points in widths.items():
      axis.plot(*zip(*points), marker="o", label=f"U({width})")
    axis.set(xlabel="step", title=f"layer {layer}")
    axis.grid(alpha=0.3)
  axes[0, 0].set_ylim(bottom=0)     # shared, and fixed from here on: once all lines are there
  axes[0, 0].set_ylabel("distinct blocks, mean")
  axes[0, -1].legend(fontsize=7, bbox_to_anchor=(1.02, 1), loc="upper left")
  return _save(figure, path)
