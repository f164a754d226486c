r"""Ablation 1: sparse layers without the sliding-window branch.

    python -m experiments.train --config=configs/ablations/no_local_branch.py \
        --workdir=runs/no_local_branch
    at the paper's size: --config=configs/hysparse_7b.py --set model.local_branch=False

Paper (HySparse, 7B, without it): DROP 52.2 to 46.4, GSM8K 37.7 to 29.7, BBH 52.4 to 48.2.
The model is that of configs/tiny.py with this one change.
Hardware: two CPU cores. Not run yet: no time or metric of our own.
"""

import pathlib

from hysparse_jax import config


def get_config():
  base = config.load(str(pathlib.Path(__file__).parents[1] / "tiny.py"))
  return config.override(base, "model.local_branch=False")
