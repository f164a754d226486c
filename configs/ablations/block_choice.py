r"""Ablation: which blocks sparse layers read; the argument is random, previous or oracle.

    python -m experiments.train --config=configs/ablations/block_choice.py:random \
        --workdir=runs/block_choice
    at the paper's size: --config=configs/hysparse_7b.py --set model.block_choice=random

Not among the paper's ablations: what the choice is worth (random), and what one that is a token
old is worth (previous).
The model is that of configs/tiny.py with this one change.
Hardware: two CPU cores. Not run yet: no time or metric of our own.
"""

import pathlib

from hysparse_jax import config


def get_config(arg="random"):
  base = config.load(str(pathlib.Path(__file__).parents[1] / "tiny.py"))
  return config.override(base, f"model.block_choice={arg}")
