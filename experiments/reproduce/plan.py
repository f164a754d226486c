"""What `experiments.reproduce` trains: models, presets, pieces of work, and what they will cost.

Every model of a preset sees the same batches for the same seed, has the same number of parameters
outside embedding and head to 1 % (the width of the FFN makes up for gates and key-value
projections), and the same learning-rate grid.
"""

import asyncio
import dataclasses
import pathlib
from typing import NamedTuple

from hysparse_jax import accounting, config
from hysparse_jax.config import (
  Config,
  DataConfig,
  ModelConfig,
  OptimConfig,
  RopeConfig,
  TrainConfig,
)
from hysparse_jax.errors import UserError
from hysparse_jax.tasks import token_tasks

MODELS = {   # name: (what it is, what it changes in the preset's hysparse)
  "full": ("every layer full attention", ("model.attention=full",)),
  "swa": ("Hybrid SWA", ("model.attention=swa",)),
  "hysparse": ("HySparse", ()),
  "no_local": ("ablation 1: no local branch", ("model.local_branch=False",)),
  "shared_local_kv": ("ablation 2: the local branch reads the full layer's KV",
                      ("model.local_shares_kv=True",)),
  "random": ("random blocks instead of the oracle's", ("model.block_choice=random",)),
  "previous": ("the previous token's blocks", ("model.block_choice=previous",)),
  "swa_m3": ("Hybrid SWA, 1:3", ("model.attention=swa", "model.sparse_per_full=3")),
  "hysparse_m3": ("HySparse, 1:3", ("model.sparse_per_full=3",)),
  "hysparse_m5": ("HySparse, 1:5", ("model.sparse_per_full=5",)),
  "selected_512": ("512 keys selected", ("model.selected_tokens=512",)),
  "selected_256": ("256 keys selected", ("model.selected_tokens=256",)),
  "block_32": ("blocks of 32, rows of 2,048", ("model.block_size=32",)),
  "block_64": ("blocks of 64, rows of 2,048", ("model.block_size=64",)),
  "block_128": ("blocks of 128, rows of 2,048", ("model.block_size=128",)),
}
HEADLINE = ("full", "swa", "hysparse")
ABLATIONS = ("no_local", "shared_local_kv", "random", "previous")
WATCHED = ("hysparse", "hysparse_m3")    # whose oracle is looked at, in the run of seed 0

RATES = (0.5, 1.0, 2.0)      # of the base learning rates: the grid that every family is tuned on
TUNE_SHARE = 4 / 7           # of the steps that a tuning run takes

# For predictions only: what an H200 is hoped to reach, and what a run takes in addition.
PEAK_FLOPS, UTILISATION = 790e12, 0.35
REFERENCE_FLOPS = 15e12      # of dense float32 attention where no kernel covers the block size
COMPILE_MINUTES = 1.0        # per training run, evaluation's programs included
LOOK_MINUTES = 1.5           # for the checkpoints of the run whose oracle is looked at


class Run(NamedTuple):
  """One model to train and evaluate."""

  model: str
  seed: int
  rate: float | None     # the multiple of the base rates; None: whatever tuning chose
  cfg: Config
  lengths: tuple[int, ...]   # of its recall tasks
  again: bool = False    # the same run once more: what the device alone changes
  tuning: bool = False   # only its training loss counts

  @property
  def name(self) -> str:
    return (f"{self.model}-s{self.seed}" + ("" if self.rate is None else f"-x{self.rate:g}")
            + "-again" * self.again)

  @property
  def watched(self) -> bool:
    """Is it a run whose oracle is looked at?"""
    return self.model in WATCHED and self.seed == 0 and self.rate is None and not self.again


class Piece(NamedTuple):
  """Runs that are done in one go, and what is kept of a piece once it is done: rows of results."""

  name: str
  runs: tuple[Run, ...]
  note: str = ""


@dataclasses.dataclass(frozen=True)
class Preset:
  """A scale at which everything is compared."""

  name: str
  base: Config                     # the HySparse model's; of the others before matching
  lengths: tuple[int, ...]         # of the recall tasks
  samples: int                     # per task and length
  tasks: tuple[str, ...]
  overlap_steps: int               # checkpoints of a run whose oracle is looked at
  selection_tokens: int            # length of the selection that is kept for kernel benchmarks
  pieces: tuple[Piece, ...] = ()


def preset(name: str, overrides: tuple[str, ...] = ()) -> Preset:
  """The preset of that name, its base changed by `overrides`, `a.b=v` each.

  Raises:
    UserError: no such preset, an override that does not fit.
  """
  makers = {"smoke": _smoke, "h200": _h200}
  if name not in makers:
    raise UserError(f"unknown preset {name!r}; allowed: {', '.join(makers)}")
  return makers[name](overrides)


def family(model: str) -> str:
  """Whose tuned learning rate a model takes."""
  return {"full": "full", "swa": "swa", "swa_m3": "swa"}.get(model, "hysparse")


def body_params(cfg: ModelConfig) -> int:
  """Parameters outside embedding and head."""
  groups = accounting.param_groups(cfg)
  return sum(groups.values()) - groups["embedding"] - groups["head"]


def matched(cfg: ModelConfig, wanted: int) -> ModelConfig:
  """The model with the FFN width that brings `body_params` to within 1 % of `wanted`.

  The width is a multiple of as large a power of two, up to 64, as half of that allows.

  Raises:
    UserError: no width does.
  """
  per_width = 3 * cfg.d_model * cfg.num_layers
  exact = cfg.d_ff + (wanted - body_params(cfg)) / per_width
  for multiple in (64, 32, 16, 8, 4, 2, 1):
    width = max(multiple, round(exact / multiple) * multiple)
    found = dataclasses.replace(cfg, d_ff=width)
    if abs(body_params(found) - wanted) <= 0.005 * wanted:
      return found
  raise UserError(f"no FFN width gives {cfg.attention!r} {wanted:,} parameters; "
                  f"the nearest has {body_params(found):,}")


def run_of(base: Config, model: str, seed: int, lengths, *, rate: float | None = None,
           steps: int | None = None) -> Run:
  """A model of a preset with the parameters of the preset's full-attention model.

  `steps` instead of the preset's make it a tuning run, and shorten the growth of the task samples
  alike.
  """
  target = body_params(dataclasses.replace(base.model, attention="full"))
  cfg = config.override(base, *MODELS[model][1], f"train.seed={seed}", f"data.seed={seed}")
  cfg = dataclasses.replace(cfg, model=matched(cfg.model, target))
  if steps is not None:
    growth = round(cfg.data.task_warmup_steps * steps / cfg.train.steps)
    cfg = config.override(cfg, f"train.steps={steps}", f"data.task_warmup_steps={growth}")
  return Run(model, seed, rate, cfg, tuple(lengths), tuning=steps is not None)


def with_rate(cfg: Config, rate: float) -> Config:
  """Both learning rates times `rate`."""
  optim = dataclasses.replace(cfg.optim, lr=cfg.optim.lr * rate, muon_lr=cfg.optim.muon_lr * rate)
  return dataclasses.replace(cfg, optim=optim)


def tuned_rate(results, model: str) -> float:
  """The rate of lowest final training loss among a family's tuning runs; 1 until all are done."""
  losses = {row["rate"]: row["train_loss"] for row in results
            if row["tuning"] and row["model"] == model}
  if set(losses) != set(RATES):
    return 1.0
  return min(losses, key=losses.get)


def tokens_of(cfg: Config) -> int:
  """Training tokens of a run."""
  return cfg.train.steps * cfg.data.batch_size * cfg.data.seq_len


def predicted_flops(preset_: Preset, run: Run) -> tuple[float, float]:
  """(training, evaluation) FLOPs of one run."""
  cfg = run.cfg
  train = accounting.train_flops_per_token(cfg.model, cfg.data.seq_len) * tokens_of(cfg)
  if run.tuning:
    return train, 0.0
  evaluation = sum(accounting.prefill_flops(cfg.model, length) for length in run.lengths)
  return train, float(evaluation * len(preset_.tasks) * preset_.samples)


def predicted_minutes(preset_: Preset, piece: Piece) -> float:
  """At 35 % of 790 TFLOP/s, where kernels run; where they do not, see REFERENCE_FLOPS."""
  minutes = 0.0
  for run in piece.runs:
    seconds = sum(predicted_flops(preset_, run)) / (PEAK_FLOPS * UTILISATION)
    if piece.note:
      seconds += _reference_flops(preset_, run) / REFERENCE_FLOPS
    minutes += seconds / 60 + COMPILE_MINUTES + LOOK_MINUTES * run.watched
  return minutes


def _reference_flops(preset_, run) -> float:
  """Dense causal attention in every layer and branch: forward, recomputed, and backward twice."""
  cfg = run.cfg
  per_token = lambda tokens: accounting.train_flops_per_token(
    accounting.baselines(cfg.model)["full"], tokens) / 3
  forward = lambda tokens: (1 + cfg.model.local_branch) * (per_token(tokens) - per_token(1))
  evaluated = sum(forward(length) * length for length in run.lengths)
  return (4 * forward(cfg.data.seq_len) * tokens_of(cfg)
          + evaluated * len(preset_.tasks) * preset_.samples)


def _smoke(overrides) -> Preset:
  """Everything once, in minutes, on two CPU cores: that it runs, not what is true."""
  base = Config(
    model=ModelConfig(
      vocab_size=384, num_layers=5, d_model=64, num_heads=4, num_kv_heads=2, head_dim=16, d_ff=128,
      sparse_per_full=3, block_size=4, selected_tokens=16, window=8, qk_norm=True,
      dtype="float32"),
    data=DataConfig(source=str(pathlib.Path(asyncio.__file__).parent), format="text",
                    heldout_fraction=0.25, seq_len=64, batch_size=16, task_share=0.5,
                    task_ids=128, task_positions=160),
    optim=OptimConfig(lr=3e-3, warmup_steps=2),
    train=TrainConfig(steps=16, log_every=4, eval_every=0, eval_batches=2, checkpoint_every=0))
  base = config.override(base, *overrides)
  lengths = (64, 160)
  pieces = tuple(Piece(model, (run_of(base, model, 0, lengths),))
                 for model in (*HEADLINE, *ABLATIONS))
  return Preset("smoke", base, lengths=lengths, samples=2, tasks=tuple(token_tasks.TASKS),
                overlap_steps=2, selection_tokens=128, pieces=pieces)


def _h200(overrides) -> Preset:
  """13 layers (full ones: 0 and 12 at 1:11), 39M parameters in the body, 29M tokens a model."""
  base = Config(
    model=ModelConfig(
      vocab_size=1024, num_layers=13, d_model=512, num_heads=8, num_kv_heads=2, head_dim=64,
      d_ff=1536, sparse_per_full=11, block_size=64, selected_tokens=1024, window=128, qk_norm=True,
      rope=RopeConfig(base=640_000.0), dtype="bfloat16", remat="layer"),
    data=DataConfig(source="python_packages", heldout_fraction=0.01, seq_len=8192, batch_size=4,
                    task_share=0.5, task_ids=768, task_positions=32_768, task_warmup_steps=448),
    optim=OptimConfig(optimizer="muon", lr=2e-3, muon_lr=1.4e-2, warmup_steps=60,
                      decay_fraction=0.3),
    train=TrainConfig(steps=896, log_every=16, eval_every=0, eval_batches=16,
                      checkpoint_every=0, spike_factor=0.0))
  base = config.override(base, *overrides)
  short = config.override(base, "data.seq_len=2048", "data.batch_size=16", "train.steps=320",
                          "model.selected_tokens=512", "data.task_positions=8192",
                          "data.task_warmup_steps=160")
  lengths = (2048, 4096, 8192, 16_384, 32_768)
  tune = round(base.train.steps * TUNE_SHARE)
  pieces = [Piece(f"tune-{model}-x{rate:g}", (
    run_of(base, model, 100, lengths, rate=rate, steps=tune),))
    for model in HEADLINE for rate in RATES]
  one = lambda model, seed: Piece(
    f"{model}-s{seed}", (run_of(base, model, seed, lengths),))
  pieces += [one(model, 0) for model in HEADLINE]
  pieces += [one(model, seed) for seed in (1, 2) for model in HEADLINE]
  pieces += [Piece("hysparse-s0-again", (run_of(base, "hysparse", 0, lengths)._replace(
    again=True),))]
  pieces += [one(model, 0) for model in (*ABLATIONS, "hysparse_m3", "swa_m3", "hysparse_m5",
                                         "selected_512", "selected_256")]
  pieces += [one(model, 1) for model in ABLATIONS[:3]]
  slow = "slow: no kernel for its block size, the reference runs"
  pieces += [Piece(f"{model}-s0", (run_of(short, model, 0, lengths[:3]),),
                   slow if model != "block_64" else "") for model in (
    "block_64", "block_32", "block_128")]
  pieces += [one(model, seed) for seed in (1, 2) for model in ("hysparse_m3", "swa_m3")]
  # Rates alone change what a model learns, so the base rates for those that tuning moves off them.
  fixed = [run_of(base, model, seed, lengths, rate=1.0) for seed in (0, 1, 2)
           for model in ("full", "swa", "swa_m3")]
  pieces += [Piece(run.name, (run,)) for run in fixed]
  pieces += [one(model, 2) for model in ABLATIONS[:3]]
  return Preset("h200", base, lengths=lengths, samples=16,
                tasks=tuple(token_tasks.TASKS), overlap_steps=5, selection_tokens=32_768,
                pieces=tuple(pieces))
