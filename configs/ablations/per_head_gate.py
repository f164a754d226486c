r"""Ablation: one gate per head and branch instead of one per channel.

    python -m experiments.train --config=configs/ablations/per_head_gate.py \
        --workdir=runs/per_head_gate
    at the paper's size: --config=configs/hysparse_7b.py --set model.gate=per_head

Not among the paper's ablations: it does not say which it uses. At 80B it decides between 5.1B and
3.7B active parameters.
The model is that of configs/tiny.py with this one change.
Hardware: two CPU cores. Not run yet: no time or metric of our own.
"""

import pathlib

from hysparse_jax import config


def get_config():
  base = config.load(str(pathlib.Path(__file__).parents[1] / "tiny.py"))
  return config.override(base, "model.gate=per_head")
