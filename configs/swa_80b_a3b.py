r"""Hybrid SWA 80B-A3B: 5 full layers, 44 that see a window of 128 (HySparse, the 80B results).

    python -m experiments.train --config=configs/swa_80b_a3b.py --workdir=runs/swa_80b_a3b \
        --set data.source=CORPUS --set data.tokenizer=TOKENIZER.json \
        --mesh=fsdp=64,expert=8

Paper: MMLU 54.9, BBH 48.2, RULER-16K 72.7, RULER-32K 69.5.
Everything but the attention is that of configs/hysparse_80b_a3b.py.
Hardware: a pod. Not run yet: no time or metric of our own.
"""

import pathlib

from hysparse_jax import config


def get_config():
  path = pathlib.Path(__file__).with_name("hysparse_80b_a3b.py")
  return config.override(config.load(str(path)), "model.attention=swa")
