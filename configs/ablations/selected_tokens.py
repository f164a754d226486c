r"""Ablation: keys selected per token; the argument is a multiple of the block size.

    python -m experiments.train --config=configs/ablations/selected_tokens.py:32 \
        --workdir=runs/selected_tokens
    at the paper's size: --config=configs/hysparse_7b.py --set model.selected_tokens=512

Not among the paper's ablations; the paper uses 1024.
The model is that of configs/tiny.py with this one change.
Hardware: two CPU cores. Not run yet: no time or metric of our own.
"""

import pathlib

from hysparse_jax import config


def get_config(arg="32"):
  base = config.load(str(pathlib.Path(__file__).parents[1] / "tiny.py"))
  return config.override(base, f"model.selected_tokens={arg}")
