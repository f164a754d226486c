"""Opens a trained run."""

import dataclasses
import pathlib
from typing import NamedTuple

import jax

from hysparse_jax import config, sharding
from hysparse_jax.data.tokenizer import ByteTokenizer, HuggingFaceTokenizer, load_tokenizer
from hysparse_jax.model.transformer import Transformer
from hysparse_jax.training import console, run
from hysparse_jax.training import step as train_step
from hysparse_jax.training.checkpoint import Checkpoints


class Run(NamedTuple):
  """A trained model and what belongs to it."""

  cfg: config.Config
  model: Transformer                                # float32 weights
  tokenizer: ByteTokenizer | HuggingFaceTokenizer
  step: int                                         # training steps behind the weights


def load_run(workdir, step: int | None = None) -> Run:
  """The newest good checkpoint of a run, or that of a step, on the first device.

  Only the weights are read, and only they are verified: no optimizer moments.

  Raises:
    UserError: no run there, no checkpoint that verifies, or a config.json or tokenizer that is not
      the one that the checkpoint was trained with.
  """
  folder = pathlib.Path(workdir or "").expanduser()
  if not workdir or not (folder / "checkpoints").is_dir():
    run.read_config(workdir)      # says what is missing
  mesh = sharding.make_mesh(config.MeshConfig(fsdp=1), jax.devices()[:1])
  with Checkpoints(folder / "checkpoints", read_only=True) as checkpoints:
    cfg = run.saved_config(folder, checkpoints.extra(step))
    state, extra, step = checkpoints.restore({"model": train_step.abstract_model(cfg, mesh)}, step,
                                             partial=True, report=console.warn)
  cfg = dataclasses.replace(cfg, data=run.own_data(folder, cfg.data))
  tokenizer = load_tokenizer(cfg.data)
  if "data" in extra:
    run.check_tokenizer(tokenizer, extra["data"]["tokenizer"])
  return Run(cfg, state["model"], tokenizer, step)
