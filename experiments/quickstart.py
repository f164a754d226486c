"""Trains a tiny HySparse and its full-attention baseline on real text and shows what differs.

    python -m experiments.quickstart --workdir=runs/quickstart

No download: the text is the Python source of the standard library, the tokens are its bytes. Some
three minutes on two CPU cores. Then: a table, a sample, and pictures in <workdir>/plots.
"""

import collections
import math
import pathlib
import time

import numpy as np
from absl import flags
from rich import box
from rich.console import Console
from rich.table import Table

from hysparse_jax import accounting, config, plots
from hysparse_jax.data import batches as data
from hysparse_jax.inference.load import load_run
from hysparse_jax.inference.sampling import generate_text
from hysparse_jax.training import metrics
from hysparse_jax.training.loop import train

from . import cli
from .evaluate import Settings, evaluate

for _flag in (cli.SET, cli.WORKDIR):
  flags.declare_key_flag(_flag)
CONFIG = pathlib.Path(__file__).parent.parent / "configs" / "tiny.py"
LONG_TOKENS = 32_768    # where the cache is compared
PROMPT = "def "


def main(argv):
  """Entry point."""
  del argv
  begun = time.perf_counter()
  workdir = pathlib.Path(cli.WORKDIR.value or "runs/quickstart")
  console = Console(highlight=False)
  results = {}
  for attention in ("hysparse", "full"):
    console.rule(f"{attention}: python -m experiments.train --config=configs/tiny.py:{attention}")
    cfg = config.override(config.load(f"{CONFIG}:{attention}"), *cli.SET.value)
    results[attention] = (cfg, train(cfg, workdir / attention))
    if results[attention][1]["preempted"]:
      return

  console.rule("the result")
  console.print(_table(results))
  cfg = results["hysparse"][0]
  console.print(f"held-out unigram entropy: {_unigram_bits(cfg):.2f} bits/byte\n")

  run = load_run(workdir / "hysparse")
  console.print("a sample (temperature 0.7):", style="bold")
  text = generate_text(run.model, run.tokenizer, PROMPT, 200, temperature=0.7, seed=0)
  console.print(PROMPT + text + "\n", markup=False, emoji=False)

  console.print("which blocks tokens pick, and how much attention they cover:", style="bold")
  evaluate(workdir / "hysparse", ["oracle"], Settings(batches=1), console)

  def draw():
    yield plots.compare_runs({name: metrics.read(workdir / name) for name in results},
                             workdir / "plots" / "loss.png")
    yield plots.architecture(cfg.model, workdir / "plots" / "architecture.png",
                             title=f"configs/tiny.py: {cfg.model.num_layers} layers")

  for path in cli.drawn(draw):
    console.print(f"wrote {path}", soft_wrap=True)
  console.print(f"\n{time.perf_counter() - begun:.0f} s in all. Next: change one field, such as "
                "--set model.window=16, or read hysparse_jax/model/hybrid.py.")


def _table(results) -> Table:
  table = Table("", *results, box=box.SIMPLE_HEAD)
  accounts = {name: accounting.account(cfg.model, LONG_TOKENS)
              for name, (cfg, _) in results.items()}
  rows = [
    ("held-out bits per byte", [f"{r['bits_per_byte']:.4f}" for _, r in results.values()]),
    ("parameters", [f"{a.params:,}" for a in accounts.values()]),
    ("KV bytes per token", [f"{a.kv_bytes_per_token:,}" for a in accounts.values()]),
    (f"KV cache at {LONG_TOKENS:,} tokens",
     [f"{a.kv_bytes_total / 1e6:.1f} MB" for a in accounts.values()]),
    ("tokens per second", [f"{r['tokens_per_second']:,.0f}" for _, r in results.values()]),
  ]
  for label, values in rows:
    table.add_row(label, *values)
  return table


def _unigram_bits(cfg: config.Config) -> float:
  """Entropy of the held-out targets' frequencies: the best a model without context could do."""
  counts = collections.Counter()
  for batch in data.heldout_batches(cfg, cfg.train.eval_batches):
    counts.update(batch.targets[batch.weights > 0].tolist())
  share = np.asarray(list(counts.values())) / counts.total()
  return float(-(share * np.log2(share)).sum()) if counts else math.nan


if __name__ == "__main__":
  cli.run(main)
