"""Prints parameters, FLOPs and KV bytes of a config beside its full and SWA baselines.

Runs nothing:

    python -m experiments.account --config=configs/hysparse_80b_a3b.py --tokens=32768
        [--set a.b=v ...] [--kv_dtype=bf16|fp8|f32] [--json] [--picture=layers.png]
"""

from absl import flags

from hysparse_jax import accounting

from . import cli

for _flag in (cli.CONFIG, cli.SET, cli.JSON):
  flags.declare_key_flag(_flag)
_TOKENS = flags.DEFINE_integer("tokens", None, "Sequence length; default: data.seq_len.")
_KV_DTYPE = flags.DEFINE_enum("kv_dtype", "bf16", list(accounting.KV_DTYPE_BYTES),
                              "Element type of the KV cache.")
_PICTURE = flags.DEFINE(cli.FILE, "picture", None,
                        "Also draw the layers and the cache to this PNG.")


def main(argv):
  """Entry point."""
  del argv
  cfg = cli.load_config()
  tokens = cfg.data.seq_len if _TOKENS.value is None else _TOKENS.value
  if _PICTURE.value:
    from hysparse_jax import plots  # matplotlib is slow to import
    full = cfg.model.layer_kinds.count("full")
    cli.drawn(lambda: [plots.architecture(
      cfg.model, _PICTURE.value, title=f"{cli.CONFIG.value}: {cfg.model.num_layers} layers, "
      f"{full} of them full attention")])
  if cli.JSON.value:
    print(cli.to_json(accounting.account_row(cfg.model, tokens, _KV_DTYPE.value)))
    return
  print(accounting.summary(cfg.model, tokens, _KV_DTYPE.value))
  print("\nparameters by group")
  for name, size in accounting.param_groups(cfg.model).items():
    print(f"  {name.replace('_', ' '):<26}{size:>18,}")


if __name__ == "__main__":
  cli.run(main)
