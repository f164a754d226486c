r"""Ablation: keys per selectable block; the argument divides the selected tokens.

    python -m experiments.train --config=configs/ablations/block_size.py:8 \
        --workdir=runs/block_size
    at the paper's size: --config=configs/hysparse_7b.py --set model.block_size=32

Not among the paper's ablations; it uses 64. HySparse2 selects single tokens instead of blocks:
RULER-v2 56.1 against 49.6.
The model is that of configs/tiny.py with this one change.
Hardware: two CPU cores. Not run yet: no time or metric of our own.
"""

import pathlib

from hysparse_jax import config


def get_config(arg="8"):
  base = config.load(str(pathlib.Path(__file__).parents[1] / "tiny.py"))
  return config.override(base, f"model.block_size={arg}")
