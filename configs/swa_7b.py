r"""Hybrid SWA 7B: 10 full layers, 26 that see a window of 128 (HySparse, the 7B results).

    python -m experiments.train --config=configs/swa_7b.py --workdir=runs/swa_7b \
        --set data.source=CORPUS --set data.tokenizer=TOKENIZER.json

Paper: GSM8K 35.6, RULER-16K 91.6, RULER-32K 84.2; :long is the 32,768-token stage.
Everything but the attention is that of configs/hysparse_7b.py.
Hardware: a pod. Not run yet: no time or metric of our own.
"""

import pathlib

from hysparse_jax import config


def get_config(arg=None):
  path = pathlib.Path(__file__).with_name("hysparse_7b.py")
  return config.override(config.load(f"{path}:{arg or ''}"), "model.attention=swa")
