r"""Full attention in all 49 layers, the 80B-A3B baseline (HySparse, the 80B results).

    python -m experiments.train --config=configs/full_80b_a3b.py --workdir=runs/full_80b_a3b \
        --set data.source=CORPUS --set data.tokenizer=TOKENIZER.json \
        --mesh=fsdp=64,expert=8

Paper: MMLU 61.8, BBH 56.1, GSM8K 53.8, RULER-16K 93.6, RULER-32K 82.1.
Everything but the attention is that of configs/hysparse_80b_a3b.py.
Hardware: a pod. Not run yet: no time or metric of our own.
"""

import pathlib

from hysparse_jax import config


def get_config():
  path = pathlib.Path(__file__).with_name("hysparse_80b_a3b.py")
  return config.override(config.load(str(path)), "model.attention=full")
