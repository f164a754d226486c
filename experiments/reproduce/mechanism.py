"""Measures the oracle of one HySparse run: overlap by layer and step, coverage, gates, pictures.

Writes rows to `overlap.jsonl`, one per checkpoint and layer, and one set of recorded block indices
for `experiments.bench.selections`.
"""

import pathlib

import numpy as np

from hysparse_jax import config
from hysparse_jax.data import batches as data
from hysparse_jax.evals import oracle
from hysparse_jax.inference.load import load_run


def overlap_rows(workdir, steps, *, batches: int = 1) -> tuple[list[dict], object]:
  """What the oracle does at each saved step of a run.

  Args:
    workdir: of `experiments.train`.
    steps: of its checkpoints, ascending.
    batches: held-out ones, each a single row of data.seq_len tokens.

  Returns:
    One JSON-ready row per step and layer that selects or reads a selection: `step, layer, distance`
    (layers since the full one), `coverage` (attention mass of the selected blocks), `chance`,
    mean gates and, for selecting layers, `new_per_token` and `union` {w: U(w)}; and the last
    `OracleResult`.
  """
  rows, result = [], None
  for step in steps:
    cfg, model, _, _ = load_run(workdir, step)
    held_out = data.heldout_batches(cfg, batches, 1, cfg.data.seq_len)
    result = oracle.oracle(model, held_out)
    for layer in result.layers:
      if layer.coverage is None:
        continue
      row = {"step": step, "layer": layer.layer, "distance": layer.distance,
             "coverage": layer.coverage, "chance": result.chance,
             "gate_sparse": layer.gate_sparse, "gate_local": layer.gate_local}
      if layer.overlap is not None:
        union = {1: layer.overlap.picked, **layer.overlap.union}
        row |= {"new_per_token": layer.overlap.new_per_token,
                "union": {str(width): value for width, value in union.items()}}
      rows.append(row | {"seq_len": cfg.data.seq_len, "choosing_tokens": result.choosing_tokens})
  return rows, result


def save_selection(workdir, tokens: int, path, *, name: str = "hysparse") -> np.ndarray:
  """Records what a trained model's full layers pick on one held-out row of `tokens` tokens.

  Returns:
    What was saved under `name` in the npz file: i16 [layers that select * K, tokens, P].
  """
  cfg, model, _, _ = load_run(workdir)
  # One document over the whole row, as in the selections recorded before: no padding between the
  # documents it is made of, and `segment_ids` None.
  cfg = config.override(cfg, "data.align_documents=False")
  batch, = data.heldout_batches(cfg, 1, 1, tokens)
  _, layers = oracle.trace(model, batch.tokens)
  picked = [layer.picked[0] for layer in layers if layer.distance == 0 and layer.picked is not None]
  picks = np.concatenate(picked).astype(np.int16)
  pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
  np.savez_compressed(path, **{name: picks})
  return picks
