r"""Full attention in all 36 layers, the 7B baseline (HySparse, the 7B results).

    python -m experiments.train --config=configs/full_7b.py --workdir=runs/full_7b \
        --set data.source=CORPUS --set data.tokenizer=TOKENIZER.json

Paper: MMLU 56.9, GSM8K 33.3, RULER-16K 93.0, RULER-32K 88.2; :long is the 32,768-token stage.
Everything but the attention is that of configs/hysparse_7b.py.
Hardware: a pod. Not run yet: no time or metric of our own.
"""

import pathlib

from hysparse_jax import config


def get_config(arg=None):
  path = pathlib.Path(__file__).with_name("hysparse_7b.py")
  return config.override(config.load(f"{path}:{arg or ''}"), "model.attention=full")
