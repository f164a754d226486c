r"""Ablation 2: the local branch reads the full layer's KV instead of its own.

    python -m experiments.train --config=configs/ablations/shared_local_kv.py \
        --workdir=runs/shared_local_kv
    at the paper's size: --config=configs/hysparse_7b.py --set model.local_shares_kv=True

Paper (HySparse, 7B): MMLU 58.4 to 52.8, BBH 53.9 to 47.2.
The model is that of configs/tiny.py with this one change.
Hardware: two CPU cores. Not run yet: no time or metric of our own.
"""

import pathlib

from hysparse_jax import config


def get_config():
  base = config.load(str(pathlib.Path(__file__).parents[1] / "tiny.py"))
  return config.override(base, "model.local_shares_kv=True")
