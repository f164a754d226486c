"""Ablation: M sparse layers per full layer; the argument is M (11 is the 80B model's).

    python -m experiments.train --config=configs/ablations/ratio.py:5 --workdir=runs/ratio
    at the paper's size: --config=configs/hysparse_7b.py --set model.sparse_per_full=11

Not among the paper's ablations; the paper uses 3 at 7B and 11 at 80B.
The model is that of configs/tiny.py with 13 layers, so that 11 sparse ones fit between two full.
Hardware: two CPU cores. Not run yet: no time or metric of our own.
"""

import pathlib

from hysparse_jax import config


def get_config(arg="11"):
  base = config.load(str(pathlib.Path(__file__).parents[1] / "tiny.py"))
  return config.override(base, "model.num_layers=13", f"model.sparse_per_full={arg}")
