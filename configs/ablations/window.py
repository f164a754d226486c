"""Ablation: tokens the local branch sees; the argument is the window.

    python -m experiments.train --config=configs/ablations/window.py:16 --workdir=runs/window
    at the paper's size: --config=configs/hysparse_7b.py --set model.window=64

Not among the paper's ablations; the paper uses 128.
The model is that of configs/tiny.py with this one change.
Hardware: two CPU cores. Not run yet: no time or metric of our own.
"""

import pathlib

from hysparse_jax import config


def get_config(arg="16"):
  base = config.load(str(pathlib.Path(__file__).parents[1] / "tiny.py"))
  return config.override(base, f"model.window={arg}")
