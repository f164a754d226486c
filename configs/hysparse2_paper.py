r"""The two baselines of the HySparse2 paper, whose KV sizes at 1M tokens it prints; for accounting.

    python -m experiments.account --config=configs/hysparse2_paper.py:hybrid_swa \
        --tokens=1048576 --kv_dtype=fp8
    python -m experiments.account --config=configs/hysparse2_paper.py:hysparse \
        --tokens=1048576 --kv_dtype=fp8

Paper (HySparse2, fp8 KV at 1M tokens): Hybrid SWA, 9 of 49 layers full, 12.09 GB; HySparse, 5 of
49, 6.72 GB. Both 64/4 heads, 192 channels of queries and keys, 128 of values.
Everything but the heads and the pattern is that of configs/hysparse_80b_a3b.py. Hardware: none, it
is arithmetic, and gives both figures (tests/test_accounting.py). Training: not run yet.
"""

import dataclasses
import pathlib

from hysparse_jax import config
from hysparse_jax.errors import UserError


def get_config(arg="hysparse"):
  patterns = {"hybrid_swa": ("swa", 5), "hysparse": ("hysparse", 11)}
  if arg not in patterns:
    raise UserError(f"hysparse2_paper takes {' or '.join(patterns)}, got {arg!r}")
  attention, sparse_per_full = patterns[arg]
  base = config.load(str(pathlib.Path(__file__).with_name("hysparse_80b_a3b.py")))
  model = dataclasses.replace(base.model, attention=attention, sparse_per_full=sparse_per_full,
                              head_dim=192, value_head_dim=128)
  return dataclasses.replace(base, model=model)
