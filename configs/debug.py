"""Four layers of width 32 for five steps: every part of a run, in seconds; for jax.disable_jit too.

    python -m experiments.train --config=configs/debug.py --workdir=runs/debug
    the baselines: configs/debug.py:full, configs/debug.py:swa

No paper figure, no metric is meant. Hardware: one CPU core, meant to take seconds. Not run yet.
"""

from hysparse_jax.config import Config, DataConfig, ModelConfig, OptimConfig, TrainConfig


def get_config(arg="hysparse"):
  return Config(
    model=ModelConfig(
      attention=arg, vocab_size=256, num_layers=4, d_model=32, num_heads=2, num_kv_heads=1,
      head_dim=16, d_ff=64, sparse_per_full=2, block_size=8, selected_tokens=16, window=8,
      dtype="float32", remat="none"),
    data=DataConfig(source="python_stdlib", tokenizer="byte", seq_len=64, batch_size=2),
    optim=OptimConfig(lr=1e-3, warmup_steps=1),
    train=TrainConfig(steps=5, log_every=1, eval_every=0, eval_batches=1, checkpoint_every=0))
