r"""HySparse 7B dense: 36 layers, 10 full and 26 sparse (HySparse, the 7B results).

    python -m experiments.train --config=configs/hysparse_7b.py --workdir=runs/hysparse_7b \
        --set data.source=CORPUS --set data.tokenizer=TOKENIZER.json
    the settings of the long-context stage: configs/hysparse_7b.py:long (it starts from the first
    stage's weights; handing those over is not built yet)

Paper: 1T tokens at 8,192 (WSD, peak 8.3e-4), then 200B at 32,768 (3e-5, RoPE base 640,000); MMLU
58.8, GSM8K 37.9, RULER-16K 94.1, RULER-32K 89.3.
Ours where the paper is silent: SwiGLU width 11,008 and vocabulary 151,680 (MiMo-7B's), elementwise
gates, 4.2M tokens per step, RoPE base 10,000 in the first stage.
Hardware: a pod; 1T tokens need 5e22 FLOPs. Not run yet: no time or metric of our own.
"""

from hysparse_jax.config import (
  Config,
  DataConfig,
  ModelConfig,
  OptimConfig,
  RopeConfig,
  TrainConfig,
)
from hysparse_jax.errors import UserError


def get_config(arg=None):
  if arg not in (None, "long"):
    raise UserError(f"hysparse_7b takes no argument or 'long', got {arg!r}")
  long = arg == "long"
  return Config(
    model=ModelConfig(
      attention="hysparse", vocab_size=151_680, num_layers=36, d_model=4096, num_heads=32,
      num_kv_heads=8, head_dim=128, d_ff=11_008, sparse_per_full=3, block_size=64,
      selected_tokens=1024, window=128, rope=RopeConfig(base=640_000.0 if long else 10_000.0),
      dtype="bfloat16", remat="layer"),
    data=DataConfig(
      source="corpus", tokenizer="tokenizer.json", seq_len=32_768 if long else 8192,
      batch_size=128 if long else 512, workers=8),
    optim=OptimConfig(
      optimizer="adamw", lr=3e-5 if long else 8.3e-4, b1=0.9, b2=0.95,
      schedule="constant" if long else "wsd", warmup_steps=0 if long else 2000),
    train=TrainConfig(
      steps=47_684 if long else 238_419, z_loss=1e-5, loss_chunk=1024, log_every=50,
      eval_every=2000, checkpoint_every=1000))
