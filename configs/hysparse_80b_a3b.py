r"""HySparse 80B-A3B mixture of experts: 49 layers, 5 full and 44 sparse (HySparse, 80B results).

    python -m experiments.train --config=configs/hysparse_80b_a3b.py --workdir=runs/hysparse_80b \
        --set data.source=CORPUS --set data.tokenizer=TOKENIZER.json --mesh=fsdp=64,expert=8

Paper: 500B tokens at 32,768, WSD, peak 1e-3, RoPE base 640,000; MMLU 62.2, BBH 56.3, GSM8K 54.1,
RULER-16K 90.6, RULER-32K 87.4; KV cache 9.5x smaller than full attention's at 32,768 tokens.
Ours where the paper is silent: 512 experts of width 512, 8 active, in every layer, none shared;
vocabulary 151,680; 4.2M tokens per step. Elementwise gates make 5.1B parameters active; with
--set model.gate=per_head it is 3.7B, nearer the name.
Hardware: a pod. Not run yet: no time or metric of our own.
"""

from hysparse_jax.config import (
  Config,
  DataConfig,
  MeshConfig,
  ModelConfig,
  MoeConfig,
  OptimConfig,
  RopeConfig,
  TrainConfig,
)


def get_config():
  return Config(
    model=ModelConfig(
      attention="hysparse", vocab_size=151_680, num_layers=49, d_model=2048, num_heads=64,
      num_kv_heads=4, head_dim=128, moe=MoeConfig(num_experts=512, experts_per_token=8, d_ff=512),
      sparse_per_full=11, block_size=64, selected_tokens=1024, window=128,
      rope=RopeConfig(base=640_000.0), dtype="bfloat16", remat="layer"),
    data=DataConfig(
      source="corpus", tokenizer="tokenizer.json", seq_len=32_768, batch_size=128, workers=8),
    optim=OptimConfig(
      optimizer="adamw", lr=1e-3, b1=0.9, b2=0.95, schedule="wsd", warmup_steps=2000),
    train=TrainConfig(
      steps=119_210, z_loss=1e-5, loss_chunk=1024, log_every=50, eval_every=2000,
      checkpoint_every=1000),
    mesh=MeshConfig(expert=8))
