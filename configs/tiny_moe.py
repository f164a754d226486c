"""The tiny model with a mixture of experts in every layer: 16 experts of width 128, 2 active.

    python -m experiments.train --config=configs/tiny_moe.py --workdir=runs/tiny_moe
    the baselines: configs/tiny_moe.py:full, configs/tiny_moe.py:swa

Stands for the paper's 80B-A3B model as configs/tiny.py does for the 7B.
Hardware: two CPU cores. Not run yet: no time or metric of our own.
"""

import dataclasses
import pathlib

from hysparse_jax import config


def get_config(arg="hysparse"):
  base = config.load(f"{pathlib.Path(__file__).with_name('tiny.py')}:{arg}")
  moe = config.MoeConfig(num_experts=16, experts_per_token=2, d_ff=128)
  return dataclasses.replace(base, model=dataclasses.replace(base.model, moe=moe))
