"""A HySparse small enough for two CPU cores: 5 layers, 2 full and 3 sparse, on raw bytes.

    python -m experiments.train --config=configs/tiny.py --workdir=runs/tiny
    the baselines, same everything but the attention: configs/tiny.py:full, configs/tiny.py:swa

Stands for the paper's 7B comparisons (table 2) at a size anyone can run; block, selection and
window shrink with the 256-token rows, so that the selection is a quarter of them.
Corpus: the Python source of the standard library.
Hardware: two CPU cores, about a minute. Held-out 2.390 bits per byte, its full-attention twin
2.508 (one seed, Python 3.11's library; the unigram entropy is 4.58).
"""

from hysparse_jax.config import Config, DataConfig, ModelConfig, OptimConfig, TrainConfig


def get_config(arg="hysparse"):
  return Config(
    model=ModelConfig(
      attention=arg, vocab_size=256, num_layers=5, d_model=128, num_heads=4, num_kv_heads=2,
      head_dim=32, d_ff=256, sparse_per_full=3, block_size=16, selected_tokens=64, window=32,
      qk_norm=True, dtype="float32"),
    data=DataConfig(source="python_stdlib", tokenizer="byte", seq_len=256, batch_size=8),
    optim=OptimConfig(optimizer="muon", lr=3e-3, muon_lr=2e-2, schedule="wsd", warmup_steps=10),
    train=TrainConfig(steps=200, log_every=20, eval_every=100, checkpoint_every=100))
