"""Ablation: no sink logits in the sparse and local branches.

    python -m experiments.train --config=configs/ablations/no_sinks.py --workdir=runs/no_sinks
    at the paper's size: --config=configs/hysparse_7b.py --set model.sinks=False

Not among the paper's ablations.
The model is that of configs/tiny.py with this one change.
Hardware: two CPU cores. Not run yet: no time or metric of our own.
"""

import pathlib

from hysparse_jax import config


def get_config():
  base = config.load(str(pathlib.Path(__file__).parents[1] / "tiny.py"))
  return config.override(base, "model.sinks=False")
