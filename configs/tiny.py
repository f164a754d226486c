"""A HySparse small enough for two CPU cores: 8 layers, 3 full and 5 sparse, on raw bytes.

    python -m experiments.train --config=configs/tiny.py --workdir=runs/tiny
    the twins, same everything but the attention: configs/tiny.py:full, configs/tiny.py:swa

Stands for the paper's 7B comparisons at a size anyone can run; block, selection and
window shrink with the 512-token rows, so that the selection is a quarter of them.
Corpus: the Python source of the standard library. Hardware: two CPU cores, meant to take about two
minutes and to end well under the unigram entropy. Not run yet: no time or metric of our own.
"""

from hysparse_jax.config import Config, DataConfig, ModelConfig, OptimConfig, TrainConfig


def get_config(arg="hysparse"):
  return Config(
    model=ModelConfig(
      attention=arg, vocab_size=256, num_layers=8, d_model=128, num_heads=4, num_kv_heads=2,
      head_dim=32, d_ff=384, sparse_per_full=3, block_size=16, selected_tokens=128, window=32,
      qk_norm=True, dtype="float32"),
    data=DataConfig(source="python_stdlib", tokenizer="byte", seq_len=512, batch_size=8),
    optim=OptimConfig(lr=3e-3, schedule="wsd", warmup_steps=20),
    train=TrainConfig(steps=200, log_every=10, eval_every=100, checkpoint_every=100))
